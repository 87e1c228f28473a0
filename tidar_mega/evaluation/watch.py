"""`tidar evaluate RUN --watch`: each new checkpoint of a run that goes on, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tidar_mega.arguments import above_zero, positive, whole
from tidar_mega.config import UserError

FILE = "evaluations.jsonl"  # in the run folder, one line for each evaluation
_PASSED_ON = ("prompts", "prompt-tokens", "max-tokens", "sequences", "tasks", "num-fewshot", "limit", "include-path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=positive, default=16, help="held-out prompts")
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=64, help="longest continuation")
    parser.add_argument("--sequences", type=positive, default=64, help="held-out sequences for the loss")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install lm-eval)")
    tasks.add_argument("--tasks", metavar="NAME,..", help="its tasks, groups and tags, such as arc_easy,gsm8k")
    tasks.add_argument("--num-fewshot", type=whole, help="examples in a prompt; without, the task's own number")
    tasks.add_argument("--limit", type=positive, help="only so many questions of each task")
    tasks.add_argument("--include-path", type=Path, metavar="FOLDER", help="YAML files of tasks of your own")
    tasks.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="for tasks that run the code that the model writes"
    )
    parser.add_argument("--watch", action="store_true", help="each new checkpoint, until the run is finished")
    parser.add_argument("--period", type=above_zero, default=30.0, help="seconds between two looks of --watch")


def run(args: argparse.Namespace) -> None:
    """Returns once the last checkpoint of a finished run is evaluated. What an earlier watch has done is not done
    again. Raises UserError."""
    folder = args.checkpoint
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such run folder; --watch needs one, it may still be without checkpoints"
        )
    from tidar_mega.checkpoint.store import CheckpointStore  # imports torch, which the parser of arguments need not

    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1)
    while True:
        done = _steps_done(folder)
        missing = [path for path in checkpoints.published() if _step(path) not in done]
        if missing:
            _evaluate(folder, missing[0], args)
        elif _is_finished(folder):
            print(f"{folder} is finished, and its last checkpoint is evaluated", flush=True)
            return
        else:
            time.sleep(args.period)


def append(folder: Path, figures: dict) -> None:
    """Adds the line of one evaluation, which has its `step`, to FILE. Raises OSError."""
    with (folder / FILE).open("ab+") as file:
        torn = b""
        if file.seek(0, os.SEEK_END):  # a process that was killed may have left a part of its line
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + json.dumps(figures).encode() + b"\n")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _evaluate(folder: Path, path: Path, args: argparse.Namespace) -> None:
    given = {name: getattr(args, name.replace("-", "_")) for name in _PASSED_ON}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if args.confirm_run_unsafe_code:
        options.append("--confirm-run-unsafe-code")
    words = ["evaluate", str(path), *options, *args.overrides]
    code = subprocess.run([sys.executable, "-P", "-u", "-m", "tidar_mega.cli", *words]).returncode
    if code and path.is_dir():  # else it was deleted under its hands (checkpoint.keep_last)
        raise UserError(f"the evaluation of {path} ended with code {code}, see above; the same command goes on there")
    if not code and _step(path) not in _steps_done(folder):
        raise UserError(
            f"{folder / FILE}: the evaluation of {path} was not kept there, and by this file --watch knows what is "
            "done; make it writable for this user"
        )


def _steps_done(folder: Path) -> set[int]:
    """By the lines that are whole: a process that was killed may have left a part of one."""
    path, done = folder / FILE, set()
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            done.add(json.loads(line)["step"])
    return done


def _is_finished(folder: Path) -> bool:
    """Whether the marker is there that a run leaves at its end, and the checkpoint that it names was not missing."""
    marker = folder / "finished.json"
    return marker.exists() and json.loads(marker.read_text())["step"] in _steps_done(folder)
