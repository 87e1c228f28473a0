"""Likelihoods under the AR half: of held-out text, and of any continuations of any contexts.

Shape suffixes: T rows of one forward, N those that have weight, D hidden width, V vocabulary ids of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.data.stream import Samples
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import log_sum, take_ids
from tidar_mega.model.attention import TrainingAttention, choose_backend
from tidar_mega.rows import CLEAN, PADDING, Rows

_HEAD_ROWS = 2048  # whose logits exist at once


@torch.inference_mode()
def held_out_loss(engine: Engine, stream: Samples, token_bytes, sequences: int = 16) -> dict:
    """AR loss on some held-out sequences: acceptance means nothing without it, as untrained halves agree on noise.

    The same on every rank of a tensor-parallel layout; empty on pipeline stages before the last.
    """
    nats = tokens = length = 0.0
    spread = [(part, i * part.samples_per_epoch // n) for _, part, n in stream.parts(sequences) for i in range(n)]
    for part, at in spread:
        rows = part.rows(at).to(engine.model.device)
        found = _score_rows(engine, rows, TrainingAttention)
        if found is None:
            continue
        label_N = rows.label[rows.weight > 0]
        nats -= float(found[0].sum(dtype=torch.float64))
        tokens += len(label_N)
        length += float(torch.as_tensor(token_bytes, device=label_N.device)[label_N].sum())
    if not tokens:
        return {}
    return {"validation_nats_per_token": nats / tokens, "validation_nats_per_byte": nats / length}


@torch.inference_mode()
def score(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    rows: int = 4096,
    told: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, bool]] | None:
    """Of each (context, continuation): the log-likelihood of the continuation in nats, and whether each of its tokens
    is the most likely one there. Both have at least one token.

    Continuations of one context share its rows: behind it, each is a group of rows that see the context and those of
    their own group that stand before them, by the rule of all masks. A forward has `rows` rows, or as many as the
    longest pair needs; `told` hears how many pairs each has scored. None on pipeline stages before the last.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for forward in _forwards(pairs, rows):
        scores = _score_rows(engine, forward.rows().to(engine.model.device), _ScoringAttention)
        told(len(forward.numbers))
        if scores is None:
            found = None
            continue
        pieces = zip(*(x_N.split(forward.lengths) for x_N in scores), strict=True)
        for number, (nats_N, best_N) in zip(forward.numbers, pieces, strict=True):
            found[number] = float(nats_N.sum(dtype=torch.float64)), bool(best_N.all())
    return found


class _ScoringAttention(TrainingAttention):
    all_clean = True  # the groups are text: adapters are for masks


def _score_rows(engine: Engine, rows: Rows, attention: type[TrainingAttention]) -> tuple[Tensor, Tensor] | None:
    """Of the weighted rows [1, T]: log-likelihood of the label, float32 [N], and whether no id is more likely, bool
    [N]. The same on every rank of a tensor-parallel layout; None on pipeline stages before the last."""
    model = engine.model
    group = model.tensor if model.tensor.size() > 1 else None
    hidden_T1D = model(rows, attention(rows, choose_backend("auto", model.device, model.dtype)))
    if hidden_T1D is None:
        return None
    counts_T = rows.weight[0] > 0
    parts = []
    for hidden_ND, label_N in zip(
        hidden_T1D[counts_T, 0].split(_HEAD_ROWS), rows.label[0, counts_T].split(_HEAD_ROWS), strict=True
    ):
        logits_NV = model.logits(hidden_ND)
        label_logit_N, largest_N = take_ids(logits_NV, label_N, group), logits_NV.amax(dim=1)
        if group is not None:
            dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
        parts.append((label_logit_N - log_sum(logits_NV, group)[:, 0], label_logit_N == largest_N))
    nats, best = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(best)


@dataclass
class _Forward:
    """What one forward scores, of several contexts, each with some continuations. `size` rows, padding included."""

    size: int
    used: int = 0
    contexts: list[Sequence[int]] = field(default_factory=list)
    continuations: list[tuple[int, Sequence[int]]] = field(default_factory=list)  # behind which context
    numbers: list[int] = field(default_factory=list)  # whose they are

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for _, tokens in self.continuations]

    def take(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether there is room; those of one context come one after the other."""
        is_new = not self.contexts or self.contexts[-1] != context
        needed = len(continuation) + is_new * (len(context) - 1)
        if self.used + needed > self.size:
            return False
        if is_new:
            self.contexts.append(context)
        self.continuations.append((len(self.contexts) - 1, continuation))
        self.numbers.append(number)
        self.used += needed
        return True

    def rows(self) -> Rows:
        """[1, T]: all contexts but for their last tokens, then the groups, each of which begins with that token."""
        columns: list[tuple[int, int, int, int, int, int, float]] = []
        for document, context in enumerate(self.contexts):
            columns += [(token, i, i + 1, CLEAN, document, 0, 0.0) for i, token in enumerate(context[:-1])]
        for number, (document, tokens) in enumerate(self.continuations):
            last = len(self.contexts[document]) - 1
            read = [self.contexts[document][-1], *tokens[:-1]]
            for i, (token, label) in enumerate(zip(read, tokens, strict=True)):
                columns.append((token, last + i, last, CLEAN + 1 + number, document, label, 1.0))
        columns += [(0, 0, 0, CLEAN + 1 + len(self.continuations), PADDING, 0, 0.0)] * (self.size - self.used)
        *whole, weight = (torch.tensor(column)[None] for column in zip(*columns, strict=True))
        token, order, horizon, group, document, label = whole
        return Rows(token, order, order, horizon, group, document, label, weight, causal_in_group=True)


def _forwards(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], most: int) -> Iterator[_Forward]:
    """All pairs, those of one context beside one another; every forward has one size, as a GPU's kernels want."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(number)
    queue = [(number, context, pairs[number][1]) for context, numbers in by_context.items() for number in numbers]
    longest = max((len(context) - 1 + len(continuation) for _, context, continuation in queue), default=0)
    needed = sum(len(context) - 1 for context in by_context) + sum(len(continuation) for *_, continuation in queue)
    forward = _Forward(max(longest, min(most, needed)))
    for item in queue:
        if not forward.take(*item):
            yield forward
            forward = _Forward(forward.size)
            assert forward.take(*item)
    if forward.numbers:
        yield forward
