"""What Slurm says to a process of a job, and what a process may ask of Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from tidar_mega.config import ConfigError, LostError, UserError

# Below the ports that Linux gives to outgoing connections (32768 and above), so that none of these holds it by chance.
_FIRST_PORT, _PORTS = 10000, 10000
_AWAY = "Unable to contact slurm controller|Socket timed out|Connection refused"
_AWAY_SECONDS = 180.0  # for the controller to come back, or for its backup, which waits for SlurmctldTimeout (120 s)
_ANSWER_SECONDS = 120.0  # for one of Slurm's commands


def set_distributed_env() -> bool:
    """True in a process that a launcher has given a rank; in a task of `srun` it takes that from Slurm's variables.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT there. Raises ConfigError.
    """
    # torchrun and `run_local` set both; in tasks of srun, enroot's hook for PyTorch sets RANK, but not all the rest
    if "LOCAL_WORLD_SIZE" in os.environ or ("RANK" in os.environ and "SLURM_PROCID" not in os.environ):
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" not in os.environ or tasks == 1:
        return False
    if "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"this is the shell of a Slurm job with {tasks} tasks: it would train on its first node alone; "
            "start the run with srun, as slurm/pretrain.sh does"
        )
    os.environ.update(distributed_env(os.environ))
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # at a failure it would warn at length of every lost socket
    return True


def distributed_env(slurm: dict | os._Environ) -> dict[str, str]:
    """The variables of torch's launcher for the `srun` task that has the environment `slurm`. Raises ConfigError."""
    local = int(slurm["SLURM_LOCALID"])
    visible = [gpu for gpu in slurm.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if len(visible) == 1:
        gpu = 0  # Slurm shows each task its own one only (--gpus-per-task)
    elif visible and local >= len(visible):
        raise ConfigError(
            f"task {slurm['SLURM_PROCID']} is number {local + 1} of its node, which has {len(visible)} GPUs for this "
            "job: one process per GPU; set --ntasks-per-node to --gpus-per-node"
        )
    else:
        gpu = local
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm["SLURM_JOB_NODELIST"]
    # steps of one job, and jobs that were submitted one after the other, may be on one node at once
    port = _FIRST_PORT + (7 * int(slurm["SLURM_JOB_ID"]) + int(slurm.get("SLURM_STEP_ID", 0))) % _PORTS
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": str(gpu),
        "WORLD_SIZE": slurm.get("SLURM_STEP_NUM_TASKS") or slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": re.split(r"\D", slurm.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(port),
    }


def check_tasks(job: dict | os._Environ) -> None:
    """Whether a job whose batch shell has the environment `job` has a task for each GPU. Raises ConfigError."""
    # what was asked for, if it is known: a job that has its nodes for itself is given all of their GPUs
    asked = job.get("SLURM_GPUS_PER_NODE") or job.get("SLURM_GPUS_ON_NODE") or "0"
    gpus, tasks = int(asked.rpartition(":")[2]), int(job.get("SLURM_NTASKS_PER_NODE") or 0)
    if gpus and tasks and gpus != tasks:
        raise ConfigError(
            f"--ntasks-per-node {tasks}: must be --gpus-per-node ({gpus}), one process per GPU; give sbatch both, "
            f"--ntasks-per-node={gpus} --gpus-per-node={gpus}"
        )


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list such as `gpu[07-09,12],cpu1`, on which task 0 runs. Raises ConfigError."""
    found = re.match(r"(?:[^,\[\]]|\[[^\]]+\])+", nodes)
    if not found:
        raise ConfigError(f"SLURM_JOB_NODELIST = {nodes!r}: not a list of hosts; is this process a task of srun?")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group())


def own_job() -> str | None:
    """The id of the Slurm job that this process belongs to; of one job of an array, such as 17_3."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the plain id of the last one is that of the whole array
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def show(job: str) -> dict[str, str]:
    """What the controller knows of a job; empty if it has forgotten it. Raises UserError without Slurm, LostError if
    the controller does not answer."""
    found = ask(["scontrol", "show", "job", "--oneliner", job], check=False)
    return dict(word.split("=", 1) for word in found.split() if "=" in word)


def requeue(job: str, exclude: list[str]) -> None:
    """Ends a running job and puts it back into the queue, never again to run on the nodes `exclude`.

    Raises UserError if Slurm refuses, LostError if the controller does not answer.
    """
    excluded = show(job).get("ExcNodeList", "(null)")
    # Slurm ends this process too, but takes the list of a waiting job only; what is started from here ignores it, too
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        ask(["scontrol", "requeue", job])
    except LostError:
        raise
    except UserError:
        if not is_requeued(show(job)):
            raise  # else a first try was heard, and only its answer was lost
    if exclude:
        nodes = ",".join([*([] if excluded == "(null)" else [excluded]), *exclude])
        ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])


def is_requeued(known: dict[str, str]) -> bool:
    """Whether this process's job, of which the controller knows `known`, starts again: Slurm counts a restart as soon
    as it requeues a job, and none when it cancels one or ends it at its time limit."""
    return int(known.get("Restarts", 0)) > restart_count()


def ask(command: list[str], check: bool = True) -> str:
    """What one of Slurm's commands prints. Raises LostError if the controller is away for longer than its restart or
    the change to its backup takes, UserError if the command is not there or, with `check`, if it fails."""
    # a second sbatch could be a second job, and its user is there to try again
    deadline = time.monotonic() + (0 if command[0] == "sbatch" else _AWAY_SECONDS)
    while True:
        done = _run(command)
        said = done.stderr.strip() or done.stdout.strip()
        is_away = done.returncode != 0 and re.search(_AWAY, done.stderr) is not None
        if not is_away or time.monotonic() > deadline:
            break
        time.sleep(_AWAY_SECONDS / 20)
    if is_away:
        raise LostError(f"`{' '.join(command)}` got no answer of Slurm's controller: {said}")
    if check and done.returncode:
        raise UserError(f"`{' '.join(command)}` was refused by Slurm: {said}")
    return done.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on PATH: no Slurm here; log in to a node of the cluster (and in a container, mount "
            "Slurm's commands), or start the run on this machine with `tidar pretrain`"
        ) from None
    except subprocess.TimeoutExpired:
        said = f"Socket timed out: nothing within {_ANSWER_SECONDS:g} s, look at `scontrol ping`"
        return subprocess.CompletedProcess(command, 1, "", said)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
