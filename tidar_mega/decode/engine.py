"""The decoding engine: prompts in, exact continuations out, several tokens per forward.

Requests are decoded in batches in lock-step; each has its own length, draft, acceptance and end. Mode "ar" runs the
same loop, model, cache and `choose` with one row per forward: the baseline that fused decoding must equal and beat.

Shape suffixes: N requests, B draft slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tidar_mega.config import UserError
from tidar_mega.decode.cache import KVCache
from tidar_mega.decode.forward import Forwards, Step
from tidar_mega.decode.sampling import Sampling, SamplingParams
from tidar_mega.model.gpt import HybridGPT

MODES = ("fused", "ar")


class Specials(Protocol):
    """What the engine asks of a tokenizer: ids 0 .. vocab_size - 1, of which `pad` and `mask` are no text."""

    vocab_size: int
    eod: int
    pad: int
    mask: int


@dataclass(frozen=True)
class Commit:
    """What one forward gave one request.

    request   its number among the prompts
    tokens    new output, cut at a stop token or the longest length
    draft     the tokens that the forward verified; the first is the last output token (empty: the prompt's forward)
    accepted  how many of them AR confirmed, the first included, before any cut (0: the prompt's forward)
    finished  "stop" or "length" on the last commit of a request
    """

    request: int
    tokens: list[int]
    draft: list[int]
    accepted: int
    finished: str | None


@dataclass
class Generation:
    """One request's continuation.

    tokens         with the stop token that ended it, if one did
    commits        tokens that each forward gave; the first is the prompt's forward, which always gives one
    accepted       draft tokens that each later forward confirmed (1..B), before a cut at the end
    finish_reason  "stop" or "length"
    seconds        from the start of its batch to its end
    """

    tokens: list[int] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    finish_reason: str = ""
    seconds: float = 0.0

    @property
    def forwards(self) -> int:
        """All forwards, the prompt's included."""
        return len(self.commits)

    @property
    def tokens_per_forward(self) -> float:
        """Output tokens per forward behind the prompt's (1 in AR decoding; 1 where there was none)."""
        return sum(self.commits[1:]) / len(self.commits[1:]) if len(self.commits) > 1 else 1.0

    @property
    def text_tokens(self) -> list[int]:
        """`tokens` without the stop token."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens

    def acceptance_histogram(self, block: int) -> list[int]:
        """How many forwards confirmed 1, 2, .. `block` draft tokens."""
        return [self.accepted.count(r) for r in range(1, block + 1)]


class Engine:
    """Decodes with a trained HybridGPT.

    model          on its device, in the dtype to decode in (only float32 keeps near-ties out of the kernels' hands)
    specials       a tokenizer, or anything with its vocab_size, eod, pad and mask
    block          draft length; 1 makes both modes plain AR
    capacity       most tokens of a prompt and its continuation together
    batch          most requests decoded at once; more are taken in turn
    prefill_chunk  prompt tokens encoded by one forward
    """

    def __init__(
        self,
        model: HybridGPT,
        specials: Specials,
        block: int,
        capacity: int,
        batch: int = 16,
        prefill_chunk: int = 512,
    ) -> None:
        for name, value in {"block": block, "batch": batch, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise UserError(f"{name} = {value}: must be 1 or more")
        if capacity < 2:
            raise UserError(f"capacity = {capacity}: must be 2 or more, a prompt token and a new one")
        self.model, self.specials = model, specials
        self.block, self.capacity, self.batch, self.prefill_chunk = block, capacity, batch, prefill_chunk
        self.device = next(model.parameters()).device
        self.group = model.pg_collection.tp
        self.forwards = {
            "fused": Forwards(model, block, specials.mask, self.device),
            "ar": Forwards(model, 1, specials.mask, self.device),
        }

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], mode: str = "fused"
    ) -> list[Generation]:
        """Continues every prompt; `params` for all, or one each. Both modes give the same tokens.

        A prompt is one document from its start, positions from 0. Raises UserError on a prompt that is empty, holds
        ids that are no text or leaves no room for a token, before anything is computed.
        """
        results = [Generation() for _ in prompts]
        started = time.perf_counter()
        for commit in self.stream_batch(prompts, params, mode):
            if commit is None:  # the next batch starts
                started = time.perf_counter()
                continue
            result = results[commit.request]
            result.tokens += commit.tokens
            result.commits.append(len(commit.tokens))
            if commit.draft:
                result.accepted.append(commit.accepted)
            if commit.finished:
                result.finish_reason, result.seconds = commit.finished, time.perf_counter() - started
        return results

    def stream(self, prompt: Sequence[int], params: SamplingParams, mode: str = "fused") -> Iterator[Commit]:
        """Continues one prompt, yielding what each forward gives as soon as it is known. Raises as `generate`."""
        return (commit for commit in self.stream_batch([prompt], params, mode) if commit is not None)

    def stream_batch(self, prompts, params, mode: str = "fused") -> Iterator[Commit | None]:
        """Continues every prompt; yields each commit, and None where another batch of requests starts."""
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if mode not in MODES:
            raise UserError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")
        if len(all_params) != len(prompts):
            raise UserError(f"{len(all_params)} sampling parameters for {len(prompts)} prompts: give one, or one each")
        for number, prompt in enumerate(prompts):
            self._check_prompt(number, prompt)
        return self._run_batches(prompts, all_params, mode)

    def _run_batches(self, prompts, params: list[SamplingParams], mode: str) -> Iterator[Commit | None]:
        was_training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(prompts), self.batch):
                yield None
                part = slice(first, first + self.batch)
                yield from _Batch(self, self.forwards[mode], first, prompts[part], params[part]).run()
        finally:
            self.model.train(was_training)

    def _check_prompt(self, number: int, prompt: Sequence[int]) -> None:
        s = self.specials
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty: there is nothing to continue; give at least one token")
        if len(prompt) >= self.capacity:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: at most {self.capacity - 1} leave room for a new one "
                f"within the engine's capacity of {self.capacity}; shorten it or raise the capacity"
            )
        bad = [i for i in prompt if not 0 <= i < s.vocab_size or i in (s.pad, s.mask)]
        if bad:
            raise UserError(
                f"prompt {number} holds id {bad[0]}: must be a text token, 0 .. {s.vocab_size - 1} without "
                f"padding ({s.pad}) and mask ({s.mask})"
            )

    def sampling(self, params: Sequence[SamplingParams]) -> Sampling:
        """Never chosen, by AR and draft alike: the mask, padding and the ids that only fill up the vocabulary."""
        width = self.model.head_weight.shape[0]
        forbidden = [self.specials.pad, self.specials.mask]
        forbidden += range(self.specials.vocab_size, width * self.group.size())
        return Sampling.of(params, forbidden, width, self.device, self.group)

    def cache(self, requests: int, capacity: int) -> KVCache:
        shape = self.model.config
        dtype = next(self.model.parameters()).dtype
        heads = shape.num_query_groups // self.group.size()
        return KVCache(shape.num_layers, requests, heads, capacity, shape.kv_channels, dtype, self.device)


class _Batch:
    """Requests decoded in lock-step. A finished one stays in place, its length no longer advanced."""

    def __init__(self, engine: Engine, forwards: Forwards, first: int, prompts, params: Sequence[SamplingParams]):
        self.engine, self.forwards, self.first, self.prompts = engine, forwards, first, prompts
        self.params = params
        self.sampling = engine.sampling(params)
        limits = [min(p.max_tokens, engine.capacity - len(t)) for t, p in zip(prompts, params, strict=True)]
        longest = max(len(t) + limit for t, limit in zip(prompts, limits, strict=True))
        # the last forward starts before the end and its rows, accepted or not, are all written
        self.kv = engine.cache(len(prompts), longest + forwards.step_rows)
        self.room = limits
        self.stops = [{engine.specials.eod} if p.stop_tokens is None else set(p.stop_tokens) for p in params]

    def run(self) -> Iterator[Commit]:
        drafts = []
        for n in range(len(self.prompts)):
            step = self._prefill(n)
            drafts.append(step.draft_NB)
            yield self._emit(n, step.choice_NB[0].tolist(), [], 0)
        draft_NB = torch.cat(drafts)
        while any(self.room):
            verified_NB = draft_NB
            draft_NB, outcomes = self._step(verified_NB)
            for n, (accepted, choice, verified) in enumerate(outcomes):
                if self.room[n]:
                    commit = self._emit(n, choice[:accepted], verified, accepted)
                    if not commit.finished:  # else its rows may lie beyond the cut, and nothing follows them
                        self.kv.commit(n, accepted)
                    yield commit

    @torch.inference_mode()
    def _prefill(self, n: int) -> Step:
        tokens, size = self.prompts[n], self.engine.prefill_chunk
        sampling = self.engine.sampling([self.params[n]])
        for start in range(0, len(tokens), size):
            piece = torch.tensor([list(tokens[start : start + size])], device=self.engine.device)
            plan = self.forwards.prompt_plan(piece.shape[1], drafts=start + size >= len(tokens))
            step = self.forwards.prompt_chunk(plan, self.kv, n, piece, sampling)
        return step

    @torch.inference_mode()
    def _step(self, draft_NB: Tensor) -> tuple[Tensor, list[tuple[int, list[int], list[int]]]]:
        """The next draft, and for each request (accepted, AR's choices, the draft): one copy from the device."""
        step = self.forwards.step(self.kv, draft_NB, self.sampling)
        block = draft_NB.shape[1]
        table = torch.cat([step.accepted_N[:, None], step.choice_NB, draft_NB], dim=1).tolist()
        return step.draft_NB, [(row[0], row[1 : 1 + block], row[1 + block :]) for row in table]

    def _emit(self, n: int, tokens: list[int], draft: list[int], accepted: int) -> Commit:
        """Cuts what a forward gave at the request's end."""
        tokens = tokens[: self.room[n]]
        self.room[n] -= len(tokens)
        finished = None if self.room[n] else "length"
        stop = next((i for i, token in enumerate(tokens) if token in self.stops[n]), None)
        if stop is not None:
            tokens, finished, self.room[n] = tokens[: stop + 1], "stop", 0
        return Commit(self.first + n, tokens, draft, accepted, finished)
