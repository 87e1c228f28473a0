"""Runs that are handed to Slurm: by sbatch and slurm/pretrain.sh, or from Python as a job of submitit.

Both start the same `tidar pretrain` in every task, with the same rules for requeues (`restarts.py`) and the same logs,
RUN_DIR/logs/JOB/rank_*.log, and both run a copy of the code and of the settings as they were when they were submitted,
RUN_DIR/code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tidar_mega import config as config_module
from tidar_mega.config import Config, UserError
from tidar_mega.launch import restarts, slurm
from tidar_mega.launch.resources import Resources, check, check_cluster, check_inputs, fills_nodes, minutes
from tidar_mega.lifetime import STOP_SIGNALS, end_with

if TYPE_CHECKING:
    import submitit

_ROOT = Path(__file__).parents[2]
SETTINGS = "settings.yaml"  # of a snapshot: every setting of the run that is submitted
# srun does not inherit it; as in slurm/pretrain.sh
_CPUS = "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))}"
_END_SECONDS = 900.0  # for the marker of rank 0 or its requeue, which is tried twice where the controller is away
ASK_SECONDS = 10.0  # between two questions to the controller
_FINAL = (UserError.exit_code, restarts.GAVE_UP)


def submit(
    config: str | Path,
    overrides: Sequence[str] = (),
    executor: str = "slurm",
    **resources: int | str | Sequence[str] | None,
) -> submitit.Job:
    """Trains in a job of submitit, whose `results()` say for each task how far the run came:
    {"finished": .., "step": .., "run_dir": ..}; with one task, also `result()`.

    `executor` is slurm, local (a process beside this one) or debug (in this one); `resources` are those of `Resources`.
    Raises UserError before anything is submitted.
    """
    r = Resources(**resources)
    task, settings = _task(config, list(overrides), r, executor)
    return _executor(Path(settings.run_dir), r, executor).submit(task)


def sweep(
    config: str | Path,
    overrides: Sequence[Sequence[str]],
    executor: str = "slurm",
    at_once: int = 8,
    **resources: int | str | Sequence[str] | None,
) -> list[submitit.Job]:
    """One run for each list of overrides, as an array of jobs; prints which folder each run has.

    Runs that do not fill their nodes share them: say `cpus`, and the memory as sbatch=["--mem=64G"].
    A run without a run_dir of its own gets one that is named by its overrides: the same ones resume it in a later sweep
    too, and others start anew. Raises UserError before anything is submitted.
    """
    r = Resources(**resources)
    base = Path(config_module.load(config).run_dir)
    runs = {}
    for own in overrides:
        named = any(word.startswith("run_dir=") for word in own)
        words = list(own) if named else [*own, f"run_dir={_sweep_folder(base, own)}"]
        folder = config_module.load(config, words).run_dir
        if folder in runs:
            raise UserError(
                f"overrides {list(own)}: another run of this sweep is in the same folder, {folder}; leave one of them "
                "out, or give it a run_dir of its own"
            )
        runs[folder] = words
    tasks = [_task(config, words, r, executor)[0] for words in runs.values()]
    for folder, own in zip(runs, overrides, strict=True):
        print(f"{folder}: {' '.join(own)}", flush=True)
    jobs = _executor(base, r, executor)
    jobs.update_parameters(**({"slurm_array_parallelism": at_once} if executor == "slurm" else {}))
    return jobs.map_array(Pretrain.__call__, tasks)


def _sweep_folder(base: Path, own: Sequence[str]) -> Path:
    """In whatever order the overrides stand; of two of one key the last one counts."""
    settings = sorted(dict(word.partition("=")[::2] for word in own).items())
    return base / f"sweep_{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def _task(config: str | Path, overrides: list[str], r: Resources, executor: str) -> tuple[Pretrain, Config]:
    settings = config_module.load(config, overrides)
    check(settings, r)
    check_inputs(settings)
    own: tuple[str, ...] = ()
    if executor == "slurm":
        check_cluster(settings, r)
    elif settings.parallel.data is None:  # the processes are started by `tidar pretrain` itself
        own = (f"parallel.data={r.world_size // settings.parallel.model_size}",)
    code = make_ready(settings)
    return Pretrain(str(code / SETTINGS), own, str(code)), settings


def _executor(run_dir: Path, r: Resources, executor: str) -> submitit.AutoExecutor:
    import submitit

    jobs = submitit.AutoExecutor(folder=run_dir / "submitit" / "%j", cluster=executor)
    jobs.update_parameters(name="tidar", timeout_min=minutes(r.time), nodes=r.nodes, tasks_per_node=1)
    if executor == "slurm":
        optional = {"slurm_partition": r.partition, "cpus_per_task": r.cpus, "gpus_per_node": r.gpus or None}
        if fills_nodes(r):
            optional |= {"slurm_exclusive": True, "slurm_mem": "0"}
        more = (option.removeprefix("--").partition("=") for option in r.sbatch)
        jobs.update_parameters(
            tasks_per_node=r.tasks_per_node,
            slurm_signal_delay_s=r.signal_seconds,
            slurm_srun_args=["--kill-on-bad-exit=1"],
            slurm_setup=[_CPUS],
            slurm_additional_parameters={
                **({} if "--no-requeue" in r.sbatch else {"requeue": True}),
                **{name.replace("-", "_"): value if equals else True for name, equals, value in more},
            },
            **{name: value for name, value in optional.items() if value is not None},
        )
    return jobs


@dataclass(frozen=True)
class Pretrain:
    """What each task of a job of submitit runs: `tidar pretrain` in a process of its own.

    submitit's way to a checkpoint, a method that its signal handler calls on rank 0 alone, cannot save what lies on all
    ranks. So the signal is forwarded: the processes agree at a step boundary, save together, and rank 0 requeues.
    """

    config: str
    overrides: tuple[str, ...]
    code: str  # the copy of the package that is run

    def __call__(self) -> dict:
        settings = config_module.load(self.config, self.overrides)
        code = self._run(settings)
        if _job():
            if code not in (0, *_FINAL) and _first_to_requeue(settings):
                code = restarts.after_crash(settings, code)
            _wait(settings, code)
        done = restarts.finished(settings) is not None
        if code == UserError.exit_code:
            raise UserError(restarts.first_failure(_logs(settings)))
        if code and not done:
            raise UserError(f"ended with code {code}; {restarts.first_failure(_logs(settings))}")
        return {"finished": done, "step": restarts.newest_step(Path(settings.run_dir)), "run_dir": settings.run_dir}

    def _run(self, settings: Config) -> int:
        path = os.pathsep.join(part for part in (self.code, os.environ.get("PYTHONPATH")) if part)
        command = [sys.executable, "-P", "-u", "-m", "tidar_mega.cli", "pretrain", self.config, *self.overrides]
        job, logs = _job(), _logs(settings)
        logs.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if job or not name.startswith("SLURM_")}
        path_of_log = logs / f"rank_{kept.get('SLURM_PROCID', 0)}.log"
        restarts.mark_start(path_of_log)
        with path_of_log.open("a") as log:
            print(f"the words of this task are in {log.name}", flush=True)
            child = subprocess.Popen(
                command,
                env={**kept, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through this process only, once
                preexec_fn=functools.partial(end_with, os.getpid()),
            )
            before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in STOP_SIGNALS}
            try:
                return child.wait()
            finally:
                for number, handler in before.items():  # in a Slurm job, submitit's would requeue by themselves
                    signal.signal(number, signal.SIG_IGN if job else handler)


def _job() -> str | None:
    """The Slurm job of this task; none with the other executors, although they may run inside somebody's job."""
    return slurm.own_job() if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else None


def _wait(settings: Config, code: int) -> None:
    """After the end of a task's process with `code`: returns once the run is finished or nothing more is to come. Never
    returns in a job that comes back, as a task would leave a result; Slurm ends it, however long that takes.

    Raises UserError in a job that Slurm ends for good.
    """
    deadline = time.monotonic() + (0 if code in _FINAL else _END_SECONDS)
    ask_at, back = 0.0, None
    while restarts.finished(settings) is None:
        if time.monotonic() >= ask_at:
            back = restarts.coming_back()
            ask_at = time.monotonic() + ASK_SECONDS
        if back is False:
            raise UserError(f"Slurm ends job {_job()}: cancelled, at its time limit, or another task has failed")
        if back is None and time.monotonic() >= deadline:
            return
        time.sleep(0.5)


def _logs(settings: Config) -> Path:
    return Path(settings.run_dir) / "logs" / (_job() or "local")


def _first_to_requeue(settings: Config) -> bool:
    """Whether no other task of this start of the job was here before."""
    try:
        (_logs(settings) / f"requeue.{slurm.restart_count()}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make_ready(settings: Config) -> Path:
    """The run folder of a job that is to be submitted, and in it the code and the settings that it will run. Raises
    UserError."""
    try:
        restarts.begin(settings)
        return snapshot(settings)
    except OSError as error:
        said = f"run_dir = {settings.run_dir}: cannot be written ({error.strerror})"
        raise UserError(f"{said}; set it to a folder that can") from None


def snapshot(settings: Config) -> Path:
    """Copies what a job runs into the run folder: the package, the scripts and the settings as they are now, whatever
    becomes of them before the job starts or starts again."""
    target = Path(settings.run_dir).resolve() / "code" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    for path in [*(_ROOT / "tidar_mega").rglob("*.py"), *(_ROOT / "slurm").glob("*.sh")]:
        copy = target / path.relative_to(_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    git = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    (target / "COMMIT").write_text(subprocess.run(git, capture_output=True, text=True).stdout or "no git\n")
    (target / SETTINGS).write_text(config_module.to_yaml(settings))
    return target


def script() -> Path:
    """slurm/pretrain.sh of this code. Raises UserError."""
    path = _ROOT / "slurm" / "pretrain.sh"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `tidar launch` from a clone of the repository (pip install -e .)")
    return path


def sbatch_command(path: Path, words: Sequence[str], r: Resources, code: Path | None = None) -> list[str]:
    """The command that submits slurm/pretrain.sh, of the copy `code` if given, with `words` behind it."""
    options = [f"--nodes={r.nodes}", f"--gpus-per-node={r.gpus}", f"--time={r.time}"]
    options += [f"--signal=USR2@{r.signal_seconds}"]
    options += [f"--ntasks-per-node={r.tasks_per_node}"]
    options += [f"--cpus-per-task={r.cpus}"] if r.cpus else []
    options += [f"--partition={r.partition}"] if r.partition else []
    options += r.sbatch
    if code:
        exported = [f"{name}={value}" for name, value in {"TIDAR_CODE": code, **_of_root()}.items()]
        if bad := [word for word in exported if "," in word]:
            raise UserError(f"{bad[0]}: sbatch cannot hand on a path with a comma; choose another run_dir or folder")
        options.append(",".join(["--export=ALL", *exported]))
    return ["sbatch", *options, str(path), *words]


def _of_root() -> dict[str, Path]:
    """What the script finds beside itself where it is submitted from the root of the repository: for other folders."""
    found = {"TIDAR_ENV": "slurm/env.sh", "TIDAR_PYTHON": ".venv/bin/python"}
    here = Path.cwd() == _ROOT
    return {
        name: _ROOT / place
        for name, place in found.items()
        if not here and name not in os.environ and (_ROOT / place).exists() and not Path(place).exists()
    }
