"""A job that goes back into Slurm's queue until its run is finished, and not for ever.

Slurm itself requeues a job only when it preempts it or loses a node; never after a time limit or a crash. After a stop
signal all ranks have saved together, and rank 0 requeues (`finish_or_requeue`). After a crash the last line of the
batch script does (`after_crash`). Both stop after `launch.max_restarts`, and after `launch.max_idle_restarts` without a
new checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

from tidar_mega.config import Config, LostError, UserError
from tidar_mega.launch import slurm
from tidar_mega.launch.slurm import say

_MARKER = "finished.json"
GAVE_UP = 3  # exit code: the run is not finished, and its job is not started again
_START = "=== start"  # begins the line in a log behind which a later start of its job writes


def finished(config: Config) -> int | None:
    """How many steps the run of this folder has done if it has come to its end, else None."""
    marker = _read(Path(config.run_dir) / _MARKER)
    done = marker.get("step", -1)
    whole = (Path(config.run_dir) / "checkpoints" / str(marker.get("checkpoint"))).is_dir()
    return done if done >= config.train.steps and whole else None


def begin(config: Config) -> None:
    """As a job is submitted and before training: a run that goes on behind an earlier end is not finished."""
    if finished(config) is None:
        (Path(config.run_dir) / _MARKER).unlink(missing_ok=True)


def finish_or_requeue(config: Config, step: int) -> int:
    """On rank 0 after training has ended in order: marks a finished run, or requeues this job; the exit code."""
    if step >= config.train.steps:
        _write(Path(config.run_dir) / _MARKER, {"step": step, "checkpoint": f"step_{step:08d}"})
        return 0
    if slurm.own_job() is None:
        return 0  # whoever has stopped it will start it again
    code = _requeue(config)
    note_exit(config, code)
    return code


def note_exit(config: Config, code: int) -> None:
    """Called by a rank that ends by an error: its code is the one to go by, whatever `srun` makes of it."""
    if slurm.own_job() is not None and code in (UserError.exit_code, GAVE_UP):
        _write(_exit_note(config), {"code": code})


def _exit_note(config: Config) -> Path:
    return Path(config.run_dir) / "logs" / str(slurm.own_job()) / f"exit_{slurm.restart_count()}.json"


def after_crash(config: Config, code: int) -> int:
    """In the batch shell once `srun` has ended with `code`: requeues a job that may run again; the exit code.

    The code of `srun` is the highest one, which is that of the ranks it has killed because one had failed (143 or 137).
    """
    logs = Path(config.run_dir) / "logs" / str(slurm.own_job())
    if code:
        say(f"srun ended with code {code}; {first_failure(logs)}")
        code = _read(_exit_note(config)).get("code", code)
        if finished(config) is not None:
            say("the run is finished all the same")
            return 0
    if code in (0, GAVE_UP):
        return code
    if code == UserError.exit_code:
        say("not requeued: the same command would fail again")
        return code
    return _requeue(config) or code


def coming_back() -> bool | None:
    """Whether Slurm starts this job again: True once anybody has requeued it or a preemption or a lost node has, False
    once it is cancelled or at its time limit, None while that is open or nobody answers."""
    job = slurm.own_job()
    try:
        known = slurm.show(job) if job else {}
    except UserError:  # nobody to ask
        return None
    if slurm.is_requeued(known):
        return True
    return False if known.get("JobState") in ("COMPLETING", "CANCELLED", "TIMEOUT", "DEADLINE") else None


def mark_start(log: Path) -> None:
    """Before a start of a job writes into `log`: what stands there is of earlier ones."""
    with log.open("a") as file:
        file.write(f"\n{_START} {slurm.restart_count()}\n")


def first_failure(logs: Path) -> str:
    """Which of the logs of all ranks says what went wrong first in the newest start."""
    paths = sorted(logs.glob("rank_*.log"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    newest = {path: path.read_text(errors="replace").rpartition(f"\n{_START} ")[2] for path in paths}
    last = {path: "\n".join(text.splitlines()[-200:]) for path, text in newest.items()}
    blamed = [rank for text in last.values() for rank in re.findall(r"ended because rank (\d+) had failed", text)]
    own = [p for p, text in last.items() if re.search(r"^(\[rank \d+\] )?(error:|failed at)", text, re.M)]
    own = [p for p in own if p.stem == f"rank_{blamed[-1]}"] + own if blamed else own
    if not own:
        return f"no rank has said why in {logs}: it was killed, see above what srun says (such as `task 1: Killed`)"
    where = [line for line in last[own[0]].splitlines() if re.match(r"(\[rank \d+\] )?(error:|failed at)", line)]
    return f"the first failure is in {own[0]}: {where[-1]}"


def _requeue(config: Config) -> int:
    """0 if this job goes back into the queue, else a line that says why, and GAVE_UP, or where the controller does not
    answer the code of LostError: then another process may try again."""
    job = slurm.own_job()
    try:
        refusal = _refusal(config, job)
        if refusal is None:
            bad = _bad_nodes(config, job)
            say(
                f"job {job} is requeued, restart {slurm.restart_count() + 1}"
                + (f", without {', '.join(bad)}" if bad else "")
            )
            slurm.requeue(job, bad)
    except LostError as error:
        say(f"error: job {job} is not requeued: {error}")
        return error.exit_code
    except UserError as error:
        refusal = str(error)
    if refusal:
        say(f"not requeued: {refusal}")
    return GAVE_UP if refusal else 0


def _refusal(config: Config, job: str) -> str | None:
    """Why a job must not start again; None if it may. Counts this start. Raises UserError."""
    known = slurm.show(job)
    state, count = known.get("JobState", "unknown"), slurm.restart_count()
    if state != "RUNNING":
        return f"job {job} is {state}: cancelled, at its time limit, or already requeued"
    if known.get("BatchFlag") != "1" or known.get("Requeue") != "1":
        return f"job {job} was not submitted with `sbatch --requeue`, or was told to end; start it again, it resumes"
    if count >= config.launch.max_restarts:
        return f"it has been restarted {count} times, launch.max_restarts; raise that and submit it again, it resumes"
    idle = _count_idle(config, job, count)
    if idle > config.launch.max_idle_restarts:
        return (
            f"{idle} starts in a row have made no new checkpoint in {config.run_dir}, above launch.max_idle_restarts = "
            f"{config.launch.max_idle_restarts}; look for the first failure in its logs, or lower checkpoint.interval"
        )
    return None


def _count_idle(config: Config, job: str, count: int) -> int:
    """How many starts of this job in a row, this one included, have ended without a checkpoint of their own."""
    path = Path(config.run_dir) / "restarts.json"
    newest, last = newest_step(path.parent), _read(path)
    same = last.get("job") == job
    if same and last["restart"] == count:
        return last["idle"]  # another process of this start was here before
    before = last["newest"] if same else -1
    idle = 0 if newest > before else (last["idle"] if same else 0) + 1
    _write(path, {"job": job, "restart": count, "newest": newest, "idle": idle})
    return idle


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of a run folder, -1 without one."""
    steps = [p.name.removeprefix("step_") for p in (run / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def note_bad_nodes(config: Config, nodes: list[str]) -> None:
    """Called by a rank that has found out: this job is not to use these nodes again. Ranks may do so at once."""
    job = slurm.own_job()
    if job is not None:
        folder = _bad_nodes_folder(config, job)
        folder.mkdir(parents=True, exist_ok=True)
        for node in nodes:
            (folder / node).touch()


def _bad_nodes(config: Config, job: str) -> list[str]:
    folder = _bad_nodes_folder(config, job)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _bad_nodes_folder(config: Config, job: str) -> Path:
    return Path(config.run_dir) / "bad_nodes" / job


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)
