"""`tidar launch`: a run as a Slurm job, and what has become of it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from tidar_mega import config as config_module
from tidar_mega.config import Config, UserError
from tidar_mega.launch import jobs, restarts, slurm
from tidar_mega.launch.resources import Resources, check, check_cluster, check_inputs

_WAITING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def add_arguments(parser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file; settings may stand behind it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.steps=100")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs, and so processes, of each node (default 8); 0: CPU")
    parser.add_argument("--tasks", type=int, help="processes of each node with --gpus 0")
    parser.add_argument("--cpus", type=int, help="CPUs of each process; by default its share of the node")
    parser.add_argument("--time", default="24:00:00", help="limit of each start; the run goes on in the next one")
    parser.add_argument("--signal-seconds", type=int, default=300, help="for the last save before the limit")
    parser.add_argument("--partition", help="or several, with commas; by default SBATCH_PARTITION's or the cluster's")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=--OPTION",
        help="one more option of sbatch, such as --sbatch=--account=physics; may be given again",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check all, print the command and the script, and stop")
    what.add_argument("--follow", action="store_true", help="show what rank 0 says until the job is over")
    what.add_argument("--status", metavar="RUN", type=Path, help="say how the job of a run folder is")
    what.add_argument(
        "--cancel",
        metavar="RUN",
        type=Path,
        help="end the job of a run folder after a last save; a second time: at once",
    )


def run(args) -> int:
    """Raises UserError."""
    if args.status or args.cancel:
        return _status(args.status) if args.status else _cancel(args.cancel)
    if args.config is None:
        raise UserError("no config: use tidar launch configs/quickstart.yaml --nodes 2, or --status RUN")
    config = config_module.load(args.config, args.overrides)
    names = ("nodes", "gpus", "tasks", "cpus", "time", "partition", "signal_seconds", "sbatch")
    r = Resources(**{name: getattr(args, name) for name in names})
    check(config, r)
    check_inputs(config)
    words = [args.config, *args.overrides]
    if args.dry_run:
        return _show(config, words, r)
    check_cluster(config, r)
    _ask_slurm(jobs.sbatch_command(jobs.script(), words, r))
    code = jobs.make_ready(config)
    script = code / jobs.script().relative_to(jobs.script().parents[1])
    command = jobs.sbatch_command(script, [str(code / jobs.SETTINGS)], r, code)
    job = slurm.ask([command[0], "--parsable", *command[1:]]).strip().split(";")[0]
    note = {"job": job, "output": f"tidar-{job}.out", "command": shlex.join(command)}
    _write_note(Path(config.run_dir), note)
    print(f"job {job} is in the queue; tidar launch --status {config.run_dir}")
    return _follow(config, job) if args.follow else 0


def _ask_slurm(command: list[str]) -> None:
    """Whether Slurm itself would take the job: limits of time, accounts, what only it knows. Raises UserError."""
    slurm.ask([command[0], "--test-only", *command[1:]])


def _show(config: Config, words: list[str], r: Resources) -> int:
    print(f"# {r.nodes} nodes x {r.tasks_per_node} processes; settings and layout are good")
    command = jobs.sbatch_command(jobs.script(), words, r)
    if shutil.which("sbatch"):
        check_cluster(config, r)
        _ask_slurm(command)
    else:
        print("# sbatch is not on PATH here: nodes, GPUs and partition were not checked")
    print(f"# the job runs a copy of this code and of these settings, which is made in {config.run_dir}/code")
    print(shlex.join(command))
    print(jobs.script().read_text(), end="")
    return 0


def _write_note(run: Path, note: dict) -> None:
    (run / "job.json").write_text(json.dumps(note) + "\n")


def _note_of(run: Path) -> dict:
    """What is known of the job that was submitted for a run folder, its id under `job`. Raises UserError."""
    try:
        note = json.loads((run / "job.json").read_text())
        return {**note, "job": note["job"]}
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{run}: `tidar launch` has submitted no job from here for a run of that folder; "
            "name the run_dir that it was given, or see squeue"
        ) from None


def _status(run: Path) -> int:
    note = _note_of(run)
    job = note["job"]
    known = slurm.show(job)
    state = known.get("JobState", "no longer known to Slurm")
    where = known.get("NodeList", "(null)")
    print(f"job {job}: {state}" + (f" on {where}" if where != "(null)" else f" ({known.get('Reason', '')})"))
    print(f"started again: {known.get('Restarts', 'unknown')} times; for {known.get('RunTime', 'unknown')} now")
    newest = restarts.newest_step(run)
    print(f"newest checkpoint: {'none' if newest < 0 else f'step_{newest:08d}'}")
    if (run / "finished.json").exists():
        print("finished")
    elif note.get("stopped"):
        print("`tidar launch --cancel` has told it to save and end; the same command resumes it")
    elif known and not state.startswith(_WAITING):
        print(restarts.first_failure(run / "logs" / job))
    return 0


def _cancel(run: Path) -> int:
    """Ends a run that trains by the signal after which all ranks save together, as Slurm's own way to end a job leaves
    them only its KillWait, most often 30 s; and anything else at once."""
    note = _note_of(run)
    job = note["job"]
    if note.get("stopped") or not _trains(job):
        slurm.ask(["scancel", job])
        print(f"job {job} is cancelled, and not requeued")
        return 0
    slurm.ask(["scontrol", "update", f"JobId={job}", "Requeue=0"])
    slurm.ask(["scancel", "--signal=USR2", job])
    _write_note(run, {**note, "stopped": True})
    print(
        f"job {job} saves at the next step boundary, however long that takes, then ends and is not requeued; "
        f"tidar launch --cancel {run} once more ends it at once"
    )
    return 0


def _trains(job: str) -> bool:
    """Whether a step of the job runs, which hears signals; the batch shell alone does not."""
    if slurm.show(job).get("JobState") != "RUNNING":
        return False
    steps = slurm.ask(["squeue", "--noheader", "--steps", "--format=%i", "--jobs", job]).split()
    return any(step.rpartition(".")[2].isdigit() for step in steps)


def _follow(config: Config, job: str) -> int:
    """Shows the batch shell's and rank 0's words as they come; 0 if the run comes to its end."""
    run = Path(config.run_dir)
    shown: dict[Path, int] = {Path(f"tidar-{job}.out"): 0, run / "logs" / job / "rank_0.log": 0}
    try:
        over, ask_at = False, 0.0
        while True:
            if time.monotonic() >= ask_at:
                over = not slurm.show(job).get("JobState", "over").startswith(_WAITING)
                ask_at = time.monotonic() + jobs.ASK_SECONDS
            for path, offset in shown.items():
                if path.exists():
                    with path.open("rb") as log:
                        log.seek(offset)
                        new = log.read()
                    shown[path] = offset + len(new)
                    sys.stdout.write(new.decode(errors="replace"))
                    sys.stdout.flush()
            if over:
                return 0 if restarts.finished(config) is not None else 1
            time.sleep(1.0)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; tidar launch --cancel {run} ends it")
        return 0
