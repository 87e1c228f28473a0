"""Forwards of decoding as CUDA graphs: a step of a small batch is hundreds of kernels of a few microseconds each, and
launching them one by one from Python takes longer than running them.

A recording belongs to a *kind* of forward: for each plan in it, how many requests (a power of two; the rest of them
stand for nobody and write into the cache's scratch page) and how they choose. All that differs from step to step (the
tokens, the lengths, the page tables) goes into one buffer by one copy, and all that the host must know comes back by
another. Steps of decoding are recorded: whole drafts verified by the coupled rule, in any mix of plans. Pieces of
prompts, other rules and pipelines run as they are, and so does everything on a CPU.

Shape suffixes: N requests of a plan, C tokens of each, W pages of the longest request, T rows of the forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tidar_mega.decode.flex import Batch, FlexPagedAttention
from tidar_mega.decode.forward import Forwards, Plan, Result, Work, columns, moved, results
from tidar_mega.decode.sampling import Sampling, SamplingParams

# recordings that are kept, more than a measurement of latencies makes; their activations lie in a pool that all share
MOST = 128
WARM_UP = 3  # runs before a recording, in which kernels are compiled and chosen


@dataclass(frozen=True)
class Kind:
    """The requests of one plan. Of how they choose: what decides which kernels run."""

    plan: Plan
    requests: int  # a power of two
    wants_logprobs: bool
    greedy: bool
    candidates: int

    @property
    def numbers(self) -> int:
        """Of each request, but for its page table: its length and its tokens."""
        return 1 + self.plan.clean


class Recorder:
    """The recordings of one engine.

    width    pages of the longest possible request
    """

    def __init__(self, forwards: Forwards, width: int) -> None:
        self.forwards, self.width = forwards, width
        self.recordings: OrderedDict[tuple[Kind, ...], Recording] = OrderedDict()
        on_gpu = forwards.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.side = torch.cuda.Stream() if on_gpu else None  # one for all: cuBLAS keeps a workspace for each stream

    def run(self, batches: list[list[Work]]) -> list[list[Result]] | None:
        """One forward of the requests of each plan, or None if its like is not recorded."""
        if self.forwards.model.pipeline.size() > 1 or not all(map(_is_recorded, batches)):
            return None
        samplings = [self._sampling(batch) for batch in batches]
        kinds = tuple(_kind(batch, sampling) for batch, sampling in zip(batches, samplings, strict=True))
        if kinds not in self.recordings:
            self.recordings[kinds] = Recording(self.forwards, kinds, samplings, self.width, self.pool, self.side)
        self.recordings.move_to_end(kinds)
        if len(self.recordings) > MOST:
            self.recordings.popitem(last=False)
        return self.recordings[kinds].run(batches, samplings)

    def _sampling(self, batch: list[Work]) -> Sampling:
        params = [work.params for work in batch]
        return self.forwards.sampling((*params, *[params[-1]] * (_bucket(batch) - len(batch))))


def _is_recorded(batch: list[Work]) -> bool:
    plan = batch[0].plan
    return plan.choosing == plan.clean and not plan.denoises and batch[0].params.rule == "coupled"


def _bucket(batch: list[Work]) -> int:
    return 1 << (len(batch) - 1).bit_length()


def _kind(batch: list[Work], sampling: Sampling) -> Kind:
    logprobs = any(work.params.logprobs for work in batch)
    return Kind(batch[0].plan, _bucket(batch), logprobs, sampling.greedy, sampling.candidates)


class Recording:
    """One kind of forward, from the buffers that it reads to the one that it fills."""

    def __init__(
        self, forwards: Forwards, kinds: tuple[Kind, ...], samplings: Sequence[Sampling], width: int, pool, side
    ) -> None:
        self.forwards, self.kinds, self.width = forwards, kinds, width
        on_gpu = forwards.device.type == "cuda"
        self.sizes = [kind.requests * (kind.numbers + width) for kind in kinds]
        self.host = torch.empty(sum(self.sizes), dtype=torch.int64, pin_memory=on_gpu)
        self.given = torch.zeros(sum(self.sizes), dtype=torch.int64, device=forwards.device)
        # held here, because a recording reads them where they are in memory
        self.rows = forwards.rows_together(tuple(kind.plan for kind in kinds for _ in range(kind.requests)))
        self.biases = [forwards.rows_of(kind.plan)[1] for kind in kinds]
        self.samplings, self.copied = [_own(sampling) for sampling in samplings], list(samplings)
        self._give([[]] * len(kinds))
        self.replay, self.packed = self._record(pool, side) if on_gpu else (self._run_here, None)

    def run(self, batches: list[list[Work]], samplings: Sequence[Sampling]) -> list[list[Result]]:
        self._give(batches)
        for i, sampling in enumerate(samplings):
            if sampling is not self.copied[i]:
                _copy(sampling, self.samplings[i])
                self.copied[i] = sampling
        self.replay()
        sizes = [kind.requests * columns(kind.plan) for kind in self.kinds]
        tables = zip(self.kinds, batches, self.packed.cpu().split(sizes), strict=True)
        return [results(kind.plan, kind.wants_logprobs, table, {})[: len(batch)] for kind, batch, table in tables]

    def _give(self, batches: list[list[Work]]) -> None:
        """Lengths, tokens and page tables to the device. Where nobody is: no committed row, and the scratch page."""
        scratch = self.forwards.cache.scratch
        lines: list[int] = []
        for kind, batch in zip(self.kinds, batches, strict=True):
            for work in batch:
                pages = [page for run in work.slots.runs for page in run]
                lines += [work.length, *work.tokens, *pages, *[scratch] * (self.width - len(pages))]
            lines += (kind.requests - len(batch)) * [*[0] * kind.numbers, *[scratch] * self.width]
        # a replay that still reads the buffer must have ended: the results of the step before came after it
        self.host.copy_(torch.tensor(lines, dtype=torch.int64))
        self.given.copy_(self.host, non_blocking=True)

    def _record(self, pool, side: torch.cuda.Stream) -> tuple[Callable[[], None], Tensor]:
        # on a stream of its own, as torch asks for; nobody is in the buffers yet, so that no request's rows are written
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            packed = self._forward()
        return graph.replay, packed

    def _run_here(self) -> None:
        self.packed = self._forward()

    def _forward(self) -> Tensor:
        """What `Forwards.run` does, from the buffers alone: `Decision.packed` of all groups."""
        forwards, groups, batches, tokens, lengths, first = self.forwards, [], [], [], [], 0
        parts = zip(self.kinds, self.samplings, self.biases, self.given.split(self.sizes), strict=True)
        for kind, sampling, bias_tt, given in parts:
            plan, N = kind.plan, kind.requests
            length_N1, token_NC, page_NW = given.view(N, -1).split([1, plan.clean, self.width], dim=1)
            length_N, params = length_N1[:, 0], (SamplingParams(logprobs=kind.wants_logprobs),)
            batches.append(Batch(forwards.cache, first, plan.rows, plan.clean, bias_tt, length_N, page_NW))
            groups.append(forwards.group(plan, params, sampling, first, length_N, token_NC))
            mask_NM = token_NC.new_full((N, plan.rows - plan.clean), forwards.mask_id)
            tokens.append(torch.cat([token_NC, mask_NM], dim=1).flatten())
            lengths.append(length_N1.expand(N, plan.rows).flatten())
            first += N * plan.rows
        rows = moved(self.rows, torch.cat(tokens)[None], torch.cat(lengths)[None])
        hidden_T1D = forwards.model(rows, FlexPagedAttention(forwards.cache, batches))
        decisions = forwards.decide(hidden_T1D[:, 0], groups)
        return torch.cat([d.packed(group.plan.slots).flatten() for d, group in zip(decisions, groups, strict=True)])


def _own(sampling: Sampling) -> Sampling:
    """A copy whose tensors stay where they are, to be filled anew."""
    return replace(sampling, **{name: getattr(sampling, name).clone() for name in _OF_REQUESTS})


def _copy(sampling: Sampling, into: Sampling) -> None:
    for name in _OF_REQUESTS:
        getattr(into, name).copy_(getattr(sampling, name))


_OF_REQUESTS = [f.name for f in fields(Sampling) if f.name.endswith("_N")]
