#!/bin/bash
# Pretrain on a Slurm cluster, from the root of the repository:
#
#     sbatch slurm/pretrain.sh configs/tidar_8b.yaml run_dir=/shared/runs/8b
#     sbatch --nodes=8 --time=12:00:00 slurm/pretrain.sh configs/tidar_8b.yaml train.steps=100000
#     sbatch --ntasks-per-node=4 --gpus-per-node=4 slurm/pretrain.sh CONFIG               # nodes of 4 GPUs
#     sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=0 slurm/pretrain.sh CONFIG     # CPU only
#
# A run of weeks needs no chain, as a job goes back into the queue by itself. Where requeues are forbidden (--no-requeue),
# both of these go on until the run is finished, and what comes after the end says "already done":
#
#     sbatch --array=1-5%1 slurm/pretrain.sh CONFIG                         # one at a time, from one line
#     sbatch --dependency=singleton --job-name=8b slurm/pretrain.sh CONFIG  # as often as wanted; one at a time by name
#
# Any line below can be changed on the command line of sbatch. Nodes, GPUs and the first node's address are Slurm's own.
# To share nodes with others: --oversubscribe --mem=200G --cpus-per-task=8, or what the job needs.
#
#SBATCH --job-name=tidar
#SBATCH --nodes=1
# One process runs in each task, on a GPU of its own: the two are always equal, unless there are no GPUs.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# Whole nodes with all of their memory and CPUs: by Slurm's own defaults a rank would have one CPU for itself, its NCCL, its
# compiler and its writer, and the memory of that CPU.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# 5 minutes before the time limit every rank gets USR2 (not the batch shell: that would need `B:` and a trap); they save
# together at the next step boundary, and rank 0 requeues the job. Allow for the time of a step and of a save.
#SBATCH --signal=USR2@300
#SBATCH --requeue
# One log over all restarts; what the ranks say is in RUN_DIR/logs/JOB/rank_*.log.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail

# Modules, virtual environment, NCCL: everything of a cluster that is not of the run; see env.example.sh.
environment=${TIDAR_ENV:-slurm/env.sh}
if [[ -f $environment ]]; then
    source "$environment"
fi
if [[ -n ${TIDAR_CODE:-} ]]; then # the copy of the code that `tidar launch` has made
    export PYTHONPATH=$TIDAR_CODE${PYTHONPATH:+:$PYTHONPATH}
fi
python=${TIDAR_PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT # of the shell that called sbatch; srun's tasks have their own
export SLURM_EXPORT_ENV=ALL # to srun's tasks, also after sbatch --export=NONE

# A container through pyxis, if one is named; it needs Slurm's commands inside, for the requeue.
container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD}" --container-workdir="$PWD")
fi
first_node=()
if ((${#container[@]})); then
    first_node=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${container[@]}")
fi
launch() { # an empty array is no variable to bash before 4.4
    ${first_node[@]+"${first_node[@]}"} "$python" -P -m tidar_mega.launch "$@"
}

# Bad settings end here, before any rank has started; what else fails, such as a file system, may come back.
logs=$(launch logs "$@")
code=$?
if ((code == 2)); then
    exit 2
fi
if ((code == 0)); then
    echo "$(date '+%F %T') job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, logs in $logs"

    # srun inherits the number of tasks, but not their CPUs: each has its share of those of the node that has the fewest
    fewest=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | head -n 1)
    cpus=${SLURM_CPUS_PER_TASK:-$((fewest / ${SLURM_NTASKS_PER_NODE:-1}))}
    srun --cpus-per-task=$((cpus > 0 ? cpus : 1)) ${container[@]+"${container[@]}"} --kill-on-bad-exit=1 --wait=60 --open-mode=append --output="$logs/rank_%t.log" \
        "$python" -P -u -m tidar_mega.cli pretrain "$@"
    code=$?
fi

# Says which rank failed first; requeues after a crash, never after a bad setting.
trap '' TERM # a requeue ends this shell at once, and with it whoever has yet to tell Slurm which nodes to leave out
launch after $code "$@"
