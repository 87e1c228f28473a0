"""Tasks of EleutherAI's lm-evaluation-harness: `tidar evaluate RUN --tasks NAMES`. The only importer of lm_eval.

Likelihoods are the AR half's (`likelihood.py`). Continuations come from the engine as `decode.*` says, but for what a
task itself decides: how long, until which text, and how tokens are chosen. From Python:

    lm_eval.simple_evaluate(HarnessModel(load_engine(RUN)), tasks=["arc_easy"])
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version

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


class HarnessModel(TemplateLM):
    """A loaded checkpoint as the tasks see it. Every rank of a layout must ask the same; replicas divide the work.

    Contexts of likelihoods are cut on the left to `data.seq_length`, which is what `tidar convert` tells transformers;
    those of continuations to what `decode.capacity` leaves. `generations` is all that was decoded.
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
        pairs = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of {len(continuation)} tokens in one piece; the model knows texts "
                    f"of data.seq_length = {self.max_length}"
                )
            kept = self.max_length + 1 - len(continuation)
            pairs.append((context[-kept:], continuation))
        engine, mesh = self.loaded.engine, self.loaded.mesh

        def work(own: list) -> list[tuple[float, bool]]:
            with self._progress("scoring", len(own), disable_tqdm) as progress:
                return mesh.from_head(score(engine, own, told=progress.advance))

        return share_out(pairs, work, engine.replicas)

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
        return [generation.text for generation in found]

    def _asked(self, number: int, context: str, settings: dict) -> tuple[list[int], SamplingParams]:
        """The prompt, and how the task wants it to be continued. Raises UserError for what this engine does not do."""
        wanted = normalize_gen_kwargs(settings)
        most, until, samples = wanted.pop("max_gen_toks"), wanted.pop("until"), wanted.pop("do_sample")
        chosen = {"temperature": wanted.pop("temperature", 1.0 if samples else 0.0)}  # transformers' defaults
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


def run(args: argparse.Namespace, loaded: Loaded) -> dict[str, float]:
    """What `--tasks` names, with lm_eval's names of metrics and filters: `arc_easy/acc`, `arc_easy/acc_stderr`,
    `gsm8k/exact_match,strict-match`; where something was decoded, also `tasks_tokens_per_forward`.

    Empty but on the main process. Raises UserError.
    """
    mesh, model = loaded.mesh, HarnessModel(loaded)
    manager, names = _named(args)
    mesh.on_main(lambda: _fetch(manager, names))
    results = simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=_ROUNDS if mesh.is_main else 0,
        log_samples=False,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )
    if not mesh.is_main:
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


def _named(args: argparse.Namespace) -> tuple[TaskManager, list[str]]:
    """All tasks there are, and the names of those that `--tasks` means. Raises UserError."""
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
    return manager, names


def _fetch(manager: TaskManager, names: list[str]) -> None:
    """Loads the tasks once, so that what is wrong with them is one error and their data sets lie in the cache, where
    every process finds them. Raises UserError."""
    try:
        manager.load(names)
    except Exception as error:  # data sets come from anywhere, and tasks may bring code
        raise UserError(
            f"--tasks {','.join(names)}: one could not be loaded ({type(error).__name__}: {error}); data sets come "
            "from the Hugging Face hub or its cache (HF_HOME): fetch them where there is a network"
        ) from error
