#!/bin/bash
# A real Slurm on this one host, for tests: a controller and two nodes, all on loopback, as root or as a plain user.
#
#     tests/slurm/cluster.sh run COMMAND...     start, run the command with SLURM_CONF set, stop however it ends
#     tests/slurm/cluster.sh start              prints the line to `eval` for its clients
#     tests/slurm/cluster.sh stop
#     tests/slurm/cluster.sh node 2             starts the second node again after its daemon was killed
#
# Installs slurmctld, slurmd, slurm-client and munge, and gcc and headers for container.c, by apt where they are not
# there (that needs root). The state is in $TIDAR_SLURM_FOLDER; nothing outside it is written, and only processes that were started here are ended.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${TIDAR_SLURM_FOLDER:-${TMPDIR:-/tmp}/tidar-slurm-$(id -u)}
nodes=2 cpus=8 gpus=2 port=30500 # up to 32499: below the ports of outgoing connections, above those of local ranks
export SLURM_CONF=$folder/slurm.conf

install() {
    local missing=() command package
    for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge cc:gcc; do
        IFS=: read -r command package <<<"$pair"
        command -v "$command" >/dev/null || missing+=("$package")
    done
    [[ -e /usr/include/slurm/spank.h ]] || missing+=(libslurm-dev)
    [[ -e /usr/include/stdlib.h ]] || missing+=(libc6-dev)
    ((${#missing[@]})) || return 0
    echo "installing ${missing[*]}" >&2
    local policy=/usr/sbin/policy-rc.d made=
    if [[ ! -e $policy ]]; then # the packages would start daemons of their own
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=1
    fi
    local get=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}")
    "${get[@]}" >/dev/null 2>&1 || { apt-get update -qq && "${get[@]}" >/dev/null; }
    [[ -z $made ]] || rm -f $policy
}

configure() {
    rm -rf "$folder"
    mkdir -p "$folder"/{state,spool,log,pid,dev}
    chmod 755 "$folder" "$folder"/*
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    local n
    for ((n = 0; n < gpus; n++)); do
        ln -s /dev/null "$folder/dev/nvidia$n" # any character device counts as a GPU
    done
    # A third node, which is not there, stands for machines that are not this one.
    # The nodes are named by loopback addresses, so that every name resolves. cred_expire is also the delay before a
    # requeued job starts again; FirstJobId differs at each start, as folders are named after jobs.
    cat >"$SLURM_CONF" <<CONF
ClusterName=tidar
FirstJobId=$((($(date +%s) % 60000) * 100 + 1))
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange=$((port + 1000))-$((port + 1999))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pid/slurmctld.own
SlurmdPidFile=$folder/pid/slurmd.%n.own
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MinJobAge=600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=100000
PropagateResourceLimits=NONE
PlugStackConfig=$folder/plugstack.conf
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
$(for ((n = 1; n <= nodes; n++)); do
        echo "NodeName=127.0.0.1$n NodeHostname=127.0.0.1$n NodeAddr=127.0.0.1 Port=$((port + 10 + n)) CPUs=$cpus Boards=1" \
            "SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=16000 Gres=gpu:$gpus"
    done)
NodeName=far NodeAddr=192.0.2.1 Port=$((port + 10)) CPUs=$cpus RealMemory=16000 Gres=gpu:$gpus State=DOWN
PartitionName=far Nodes=far
PartitionName=short Nodes=127.0.0.[11-1$nodes] MaxTime=30
PartitionName=main Nodes=127.0.0.[11-1$nodes] Default=YES DefaultTime=30 MaxTime=INFINITE DefMemPerCPU=1
CONF
    echo "NodeName=far,127.0.0.[11-1$nodes] Name=gpu File=$folder/dev/nvidia[0-$((gpus - 1))]" >"$folder/gres.conf"
    cc -shared -fPIC -o "$folder/container.so" "$here/container.c"
    echo "required $folder/container.so" >"$folder/plugstack.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$folder/cgroup.conf" # is read, and not used
}

# background NAME COMMAND...: a daemon whose pid and words are kept
background() {
    local name=$1
    shift
    "$@" </dev/null >"$folder/log/$name.out" 2>&1 &
    echo $! >"$folder/pid/$name"
}

# soon COMMAND...: waits up to 30 s until it succeeds
soon() {
    local try
    for ((try = 0; try < 300; try++)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "not ready: $*" >&2
    tail -n 5 "$folder"/log/* >&2
    return 1
}

start_node() {
    mkdir -p "$folder/spool/127.0.0.1$1"
    background "slurmd.$1" slurmd -D -N "127.0.0.1$1"
}

all_idle() {
    [[ $(sinfo -h -N -p main -o '%N %t' | grep -c ' idle$') == "$nodes" ]]
}

start() {
    stop
    configure
    background munged munged --force --foreground --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/pid/munged.own" --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
    soon munge -S "$folder/munge.socket" -n
    background slurmctld slurmctld -D -c
    local n
    for ((n = 1; n <= nodes; n++)); do
        start_node "$n"
    done
    soon all_idle || { stop && return 1; }
}

alive() {
    grep -qs '^State:[[:space:]]*[^Z]' "/proc/$1/status" # a zombie nobody has waited for is as good as gone
}

stop() {
    [[ -d $folder/pid ]] || return 0
    if [[ -f $folder/pid/slurmctld ]] && alive "$(cat "$folder/pid/slurmctld")"; then
        squeue -h -o %A | sort -u | xargs -r scancel || true
        for _ in {1..50}; do
            [[ -n $(squeue -h) ]] || break
            sleep 0.2
        done
    fi
    local name pid
    for name in slurmd.1 slurmd.2 slurmctld munged; do
        pid=$(cat "$folder/pid/$name" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in {1..100}; do
            alive "$pid" || break
            sleep 0.1
        done
        ! alive "$pid" || kill -9 "$pid"
        rm -f "$folder/pid/$name"
    done
}

case ${1:-} in
start)
    install
    start
    echo "export SLURM_CONF=$SLURM_CONF TIDAR_SLURM=1 TIDAR_SLURM_FOLDER=$folder PATH=$here/bin:\$PATH"
    ;;
stop) stop ;;
node) start_node "$2" ;;
run)
    shift
    install
    trap stop EXIT
    start
    TIDAR_SLURM=1 TIDAR_SLURM_FOLDER=$folder PATH="$here/bin:$PATH" "$@"
    ;;
*)
    sed -n '2,10s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
