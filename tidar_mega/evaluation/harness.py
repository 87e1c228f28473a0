"""Tasks of EleutherAI's lm-evaluation-harness: `tidar evaluate RUN --tasks NAMES`. The only importer of lm_eval.

Likelihoods are the AR half's (`likelihood.py`). Continuations come from the engine as `decode.*` says, but for what a
task itself decides: how long, until which text, and how tokens are chosen. From Python:

    lm_eval.simple_evaluate(HarnessModel(load_engine(RUN)), tasks=["arc_easy"])
"""

from __future__ import annotations

import argparse
import difflib
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tidar_mega.config import UserError
from tidar_mega.data.progress import Progress
from tidar_mega.decode.load import Loaded
from tidar_mega.decode.requests import Generation
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.evaluation.acceptance import tokens_per_forward
from tidar_mega.evaluation.likelihood import score
from tidar_mega.parallel.mesh import share_out

_BATCHES = 8  # handed to the engine at once, of decode.batch requests each
_ROUNDS = 1000  # of bootstrapping, for the standard error of what is not a mean
_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234}  # lm_eval's own


class HarnessModel(TemplateLM):
    """A loaded checkpoint as the tasks see it. Every rank of a layout must ask the same; replicas divide the work.

    Contexts are cut on the left: those of likelihoods to `data.seq_length`, which is what `tidar convert` tells
    transformers, and prompts to what `decode.capacity` leaves. `generations` is all that was decoded.
    """

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded = loaded
        self.max_length = loaded.config.data.seq_length
        self.generations: list[Generation] = []

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request) for request in requests]
        by_context: dict[tuple, list[int]] = {}
        for number, (context, _continuation) in enumerate(pairs):
            # behind a single token, as of windows of texts, there is nothing to share
            by_context.setdefault(context if len(context) > 1 else (context, number), []).append(number)
        questions = list(by_context.values())  # of one replica each, as their continuations share the context's rows
        engine, mesh = self.loaded.engine, self.loaded.mesh

        def work(own: list[list[int]]) -> list[list[tuple[float, bool]]]:
            numbers = [number for question in own for number in question]
            with self._progress("scoring", len(numbers), disable_tqdm) as progress:
                found = iter(mesh.from_head(score(engine, [pairs[n] for n in numbers], told=progress.advance)))
            return [[next(found) for _ in question] for question in own]

        answers = share_out(questions, work, engine.replicas)
        by_number = {
            number: answer
            for question, own in zip(questions, answers, strict=True)
            for number, answer in zip(question, own, strict=True)
        }
        return [by_number[number] for number in range(len(pairs))]

    def _pair(self, texts: object, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], list[int]]:
        """The context cut to what fits, of at least one token. Raises UserError for a continuation that has none, or
        too many."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a task asks for the likelihood of {len(continuation)} tokens: at least 1 and at most "
                f"data.seq_length = {self.max_length} can be scored; (context, continuation) = {str(texts)[:200]}"
            )
        kept = self.max_length + 1 - len(continuation)
        return tuple(context or [self.prefix_token_id])[-kept:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, the first token behind an end of document; in disjoint windows of `max_length` tokens."""
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        nats = [0.0] * len(requests)
        for (number, *_), (found, _) in zip(windows, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            nats[number] += found
        return nats

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        engine, mode = self.loaded.engine, self.loaded.config.decode.mode
        asked = [self._asked(number, *request.args) for number, request in enumerate(requests)]
        size = _BATCHES * engine.batch * self.loaded.mesh.data_size
        found: list[Generation] = []
        with self._progress("decoding", len(asked), disable_tqdm) as progress:
            for first in range(0, len(asked), size):
                prompts, params = zip(*asked[first : first + size], strict=True)
                found += engine.generate(prompts, params, mode)
                progress.advance(len(prompts))
        self.generations += found
        longer = sum(len(p) + len(g.tokens) > self.max_length for (p, _), g in zip(asked, found, strict=True))
        if longer and self.loaded.mesh.is_main:
            told = f"warning: {longer} of {len(found)} prompts with their continuations are longer than data.seq_length"
            print(f"{told} = {self.max_length}; a lower decode.capacity cuts prompts", file=sys.stderr, flush=True)
        return [generation.text for generation in found]

    def _asked(self, number: int, context: str, settings: dict) -> tuple[list[int], SamplingParams]:
        """The prompt, and how the task wants it to be continued. Raises UserError for what this engine does not do."""
        wanted = normalize_gen_kwargs(settings)
        most, until, samples = wanted.pop("max_gen_toks"), wanted.pop("until"), wanted.pop("do_sample")
        chosen = {"temperature": wanted.pop("temperature", 1.0 if samples else 0.0)}  # sampling means 1, as elsewhere
        chosen |= {name: wanted.pop(name) for name in ("top_k", "top_p") if name in wanted}
        if wanted.pop("num_beams", 1) != 1 or wanted:
            raise UserError(
                f"a task asks for generation_kwargs {settings}: until, max_gen_toks, do_sample, temperature, top_k and "
                "top_p are known here, and num_beams = 1; take another task, or a copy with others (--include-path)"
            )
        room = self.loaded.engine.capacity - most
        if room < 1:
            raise UserError(
                f"a task asks for {most} new tokens, and decode.capacity = {self.loaded.engine.capacity} has to hold "
                f"them and a prompt: set decode.capacity={most + self.max_length}"
            )
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        params = replace(self.loaded.params, max_tokens=most, stop_strings=tuple(filter(None, until)), **chosen)
        return prompt, params.for_request(number)

    def _progress(self, title: str, count: int, is_silent: bool) -> Progress:
        return Progress(title, count, "requests", is_silent or not self.loaded.mesh.is_main)


@dataclass(frozen=True)
class Tasks:
    """What `--tasks` names, ready to be asked: the data sets are on this machine."""

    manager: TaskManager
    names: list[str]


def find(args: argparse.Namespace) -> Tasks:
    """The tasks of `--tasks`, whose data sets are fetched where they are not in the cache yet. Call it before there are
    other processes, which would wait for them. Raises UserError."""
    if args.include_path is not None and not args.include_path.is_dir():
        raise UserError(f"--include-path {args.include_path}: there is no such folder")
    manager, names = TaskManager(include_path=args.include_path), []
    for name in args.tasks.split(","):
        found = manager.match_tasks([name])
        if not found:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5)) or "nothing alike"
            raise UserError(
                f"--tasks {name}: lm_eval {version('lm_eval')} has no task of that name (it has {near}); tasks of your "
                "own are found with --include-path"
            )
        names += found
    random.seed(_SEEDS["random_seed"])  # what a task shuffles is kept in the cache, in the order of this first time
    np.random.seed(_SEEDS["numpy_random_seed"])
    try:
        loaded = manager.load(names)["tasks"]
    except Exception as error:  # data sets come from anywhere, and tasks may bring code
        raise UserError(
            f"--tasks {','.join(names)}: one could not be loaded ({type(error).__name__}: {error}); data sets come "
            "from the Hugging Face hub or its cache (HF_HOME): fetch them where there is a network"
        ) from error
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            raise UserError(f"--tasks {name}: runs the code that the model writes; allow it: --confirm-run-unsafe-code")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {name}: shows pictures or sounds, and the model reads text; leave it out")
    return Tasks(manager, names)


def run(args: argparse.Namespace, tasks: Tasks, loaded: Loaded) -> dict[str, float]:
    """lm_eval's figures by its own names of metrics and filters: `arc_easy/acc`, `arc_easy/acc_stderr`,
    `gsm8k/exact_match,strict-match`; where something was decoded, also `tasks_tokens_per_forward`.

    Empty but on the main process. Raises UserError.
    """
    is_main, model = loaded.mesh.is_main, HarnessModel(loaded)
    results = simple_evaluate(
        model,
        tasks=tasks.names,
        task_manager=tasks.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=_ROUNDS if is_main else 0,
        log_samples=False,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        **_SEEDS,
    )
    if not is_main:
        return {}
    figures = {
        f"{task}/{metric.replace(',none', '')}": value
        for task, found in results["results"].items()
        for metric, value in found.items()
        if isinstance(value, float) and math.isfinite(value)
    }
    if model.generations:
        figures["tasks_tokens_per_forward"] = tokens_per_forward(model.generations)
    for name, value in figures.items():
        print(f"{name} {value:.4f}", flush=True)
    return figures
