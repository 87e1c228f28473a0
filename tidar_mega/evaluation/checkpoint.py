"""`tidar evaluate`: one checkpoint by real decoding of held-out text. `watch.py` does it for each new one of a run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tidar_mega.config import UserError
from tidar_mega.decode import trace
from tidar_mega.decode.load import Loaded, load_engine
from tidar_mega.decode.requests import Commit, Generation
from tidar_mega.evaluation import watch
from tidar_mega.evaluation.acceptance import held_out_prompts, held_out_text, summarise
from tidar_mega.evaluation.likelihood import held_out_loss
from tidar_mega.evaluation.watch import FILE

# (run folder, step, figures, accepted lengths, picture of a decode)
Draw = Callable[[Path, int, dict[str, float], list[int], np.ndarray], None]


def find_tasks(args: argparse.Namespace) -> Any:
    """What `--tasks` names, for `run`; None without it. Raises UserError."""
    if not args.tasks:
        return None
    try:
        from tidar_mega.evaluation import harness
    except ImportError as error:
        raise UserError(f"--tasks needs lm-evaluation-harness ({error}): pip install lm-eval") from None
    return harness.find(args)


def run(args: argparse.Namespace, tasks: Any, draw: Draw) -> dict:
    """The checkpoint's step, `decode.mode`, its `held_out_loss`, what `acceptance.summarise` says, and the figures of
    the tasks; of a run also as a line of FILE in its folder and, by `draw`, as pictures. Raises UserError."""
    loaded = load_engine(args.checkpoint, ["decode.outcomes=all", *args.overrides])
    of_tasks: dict[str, float] = {}
    if tasks is not None:
        from tidar_mega.evaluation import harness

        of_tasks = harness.run(args, tasks, loaded)
    stream = held_out_text(loaded)
    prompts = held_out_prompts(stream, args.prompts, args.prompt_tokens)
    step = loaded.step
    found, ar, commits = _decode(loaded, prompts, args.max_tokens)
    loss = held_out_loss(loaded.engine, stream, loaded.tokenizer.token_bytes, args.sequences)
    figures = loaded.mesh.from_head(loss) | summarise(loaded.engine.block, found, ar)
    numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
    figures = {"step": step, "mode": loaded.config.decode.mode, **figures, **of_tasks}
    if loaded.mesh.is_main and step is not None:
        picture = trace.picture(commits, loaded.tokenizer.decode)
        with _kept(loaded.run_folder / FILE):
            watch.append(loaded.run_folder, figures)
        with _kept(loaded.run_folder / "tensorboard"):
            draw(loaded.run_folder, step, numbers | of_tasks, figures["acceptance_histogram"], picture)
    if loaded.mesh.is_main:
        said = " | ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        what = loaded.checkpoint if step is None else f"step {step}"
        print(f"evaluation of {what} | {said}", flush=True)
    return figures


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Says what could not be kept: the figures are worth their work without it, as `--json` and in what is printed."""
    try:
        yield
    except OSError as error:
        print(f"{path}: not kept ({error.strerror})", file=sys.stderr)


def _decode(
    loaded: Loaded, prompts: Sequence[Sequence[int]], most: int
) -> tuple[list[Generation], list[Generation], list[Commit]]:
    """(as `decode.mode` says, AR, what each forward of the first of the former gave)"""
    base, mode = replace(loaded.params, max_tokens=most), loaded.config.decode.mode
    params = [base.for_request(i) for i in range(len(prompts))]
    found = loaded.engine.generate(prompts, params, mode)
    ar = loaded.engine.generate(prompts, [p.without_masks for p in params], "ar")
    return found, ar, list(loaded.engine.stream(prompts[0], params[0], mode))
