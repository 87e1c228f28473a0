"""Drafting by the layers of multi-token prediction (`methods/mtp.py`), behind the outcome of a verification.

A forward of the backbone has kept the rows of places n .. n' - 1, and AR has chosen the token of place n'. Depth k then
runs its rows up to place n' - 1: the last one takes the token of place n' - 1 + k, which AR chose or depth k - 1 has
just drafted, and drafts that of place n' + k. It begins with the first row whose token the step before did not know,
that of place n - k + 1. What this row needs of depth k - 1 is not among that depth's new rows: of each depth, the state
of the last row with known tokens is kept from step to step. So keys, values and states are those of the training
forward, save for the newest rows, which the next step makes again.

Drafts decide how many tokens a forward gives, never which: verification is AR's.

Shape suffixes: T rows of the backbone's forward, R rows of a depth, N requests of one group, D hidden width, V ids of
this rank, C choosing rows, S drafted tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tidar_mega.decode.cache import PagedCache, Part, Slots
from tidar_mega.decode.rules import Decision, Drafted
from tidar_mega.decode.sampling import choose
from tidar_mega.model.attention import AttentionContext
from tidar_mega.model.inference import InferenceModel

if TYPE_CHECKING:
    from tidar_mega.decode.forward import Group, Work


@dataclass(frozen=True)
class Line:
    """A request whose forward has kept the places `old` .. `new` - 1.

    first   its first row among those of the forward
    tokens  of the places old + 1 .. new; the drafted ones come behind them
    drafts  whether any are wanted; inside a prompt the tokens are known, and left to the next piece
    """

    first: int
    old: int
    new: int
    tokens: list[int]
    slots: Slots
    drafts: bool

    @property
    def page(self) -> int:
        return self.slots.runs[0].start

    def rows(self, depth: int) -> range:
        """The places of the rows that the depth runs."""
        start = max(0, self.old - depth + 1)
        return range(start, self.new if self.drafts else max(start, self.new - depth + 1))


@dataclass(frozen=True)
class States:
    """Hidden states of one depth, and where in them each line begins: its first place, and the index of that."""

    state_RD: Tensor
    begins: list[tuple[int, int]]


class Speculator:
    """The drafts of all forwards of one engine, on the pipeline stage that has the depths."""

    def __init__(self, model: InferenceModel, cache: PagedCache, attention: type) -> None:
        self.model, self.cache, self.attention = model, cache, attention
        shape = (cache.pages.count, len(model.depths), model.config.hidden_size)
        # of a request, at its first page: the state of each depth's last row with known tokens
        self.kept = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.bias = functools.lru_cache(maxsize=64)(self._bias)

    def draft(
        self, hidden_TD: Tensor, batches: Sequence[list[Work]], groups: Sequence[Group], decisions: Sequence[Decision]
    ) -> list[Decision]:
        """The decisions, with the next drafts. `groups` and `decisions` belong to those batches that choose."""
        lines, drafting, first = [], [], 0
        chosen = iter(zip(groups, decisions, strict=True))
        for batch in batches:
            plan = batch[0].plan
            group, decision = next(chosen) if plan.choices else (None, None)
            mine = _lines(batch, first, decision) if plan.slots > 1 else []
            lines += mine
            if group is not None:
                drafting.append((group, mine))
            first += len(batch) * plan.rows
        states = States(hidden_TD, [(line.old, line.first) for line in lines])
        kept_NSD = self.kept[[line.page for line in lines]]  # of the step before: this one's states replace them
        for depth in range(1, 1 + max((batch[0].plan.slots - 1 for batch in batches), default=0)):
            states = self._run(depth, states, kept_NSD, lines)
            self._choose(depth, states, lines, [(group, mine) for group, mine in drafting if mine])
        return [
            _with_drafts(decision, mine, group.plan.slots - 1) if mine else decision
            for decision, (group, mine) in zip(decisions, drafting, strict=True)
        ]

    def _run(self, depth: int, before: States, kept_NSD: Tensor, lines: list[Line]) -> States:
        """The states that a depth makes of those of the depth before, for the rows of all lines."""
        sources, tokens, places, parts, begins = [], [], [], [], []
        for n, (line, (start, at)) in enumerate(zip(lines, before.begins, strict=True)):
            rows, first = line.rows(depth), len(places)
            begins.append((rows.start, first))
            # a row before those of the depth before has its state among the kept ones
            sources += [at + p - start if p >= start else len(before.state_RD) + n for p in rows]
            tokens += line.tokens[rows.start + depth - line.old - 1 :][: len(rows)]
            places += rows
            if rows:
                part = range(first, len(places))
                parts.append(Part(part, len(rows), line.slots, rows.start, self.bias(len(rows))))
        if not places:  # pieces of prompts that are shorter than the depth
            return States(before.state_RD[:0], begins)
        known_RD = torch.cat([before.state_RD, kept_NSD[:, depth - 2]]) if depth > 1 else before.state_RD
        source_R, token_R, place_R = torch.tensor([sources, tokens, places], device=self.model.device)
        context: AttentionContext = self.attention.of(self.cache, parts)
        found = States(self.model.depth(depth, known_RD[source_R], token_R, place_R, context), begins)
        self._keep(depth, found, lines)
        return found

    def _keep(self, depth: int, states: States, lines: list[Line]) -> None:
        last = [
            (line.page, at + line.new - depth - start)
            for line, (start, at) in zip(lines, states.begins, strict=True)
            if line.new - depth in line.rows(depth)
        ]
        if last:
            pages, rows = map(list, zip(*last, strict=True))
            self.kept[pages, depth - 1] = states.state_RD[rows]

    def _choose(self, depth: int, states: States, lines: list[Line], drafting: list[tuple[Group, list[Line]]]) -> None:
        """Appends to the tokens of each line that drafts what stands behind its last row: chosen as AR chooses, with
        the noise of its place."""
        ends = [at + len(line.rows(depth)) for line, (_, at) in zip(lines, states.begins, strict=True)]
        last = [end - 1 for line, end in zip(lines, ends, strict=True) if line.drafts]
        if not last:
            return
        logits = self.model.logits(states.state_RD[last]).split([len(mine) for _, mine in drafting])
        for (group, mine), logits_NV in zip(drafting, logits, strict=True):
            order_N = torch.tensor([line.new + depth for line in mine], device=self.model.device)
            choice_N1 = choose(logits_NV[:, None], order_N[:, None], group.sampling)
            for line, token in zip(mine, choice_N1[:, 0].tolist(), strict=True):
                line.tokens.append(token)

    def _bias(self, rows: int) -> Tensor | None:
        """The additive causal mask among the rows of a line; None for a single one."""
        if rows == 1:
            return None
        bias = torch.full((rows, rows), -torch.inf, dtype=self.model.dtype, device=self.model.device)
        return bias.triu_(1)


def _lines(batch: list[Work], first: int, decision: Decision | None) -> list[Line]:
    """Of the requests of one plan: how many rows were kept, and the token behind them, AR's choice or the prompt's."""
    plan = batch[0].plan
    if decision is None:
        ends = [(plan.clean, work.following) for work in batch]
    else:
        accepted_N1 = decision.accepted_N[:, None]
        numbers = torch.cat([accepted_N1, decision.output_NC.gather(1, accepted_N1 - 1)], dim=1).tolist()
        ends = [(plan.clean - plan.choosing + accepted, choice) for accepted, choice in numbers]
    lines = []
    for n, (work, (kept, following)) in enumerate(zip(batch, ends, strict=True)):
        tokens, drafts = [*work.tokens[1:kept], following], decision is not None
        lines.append(Line(first + n * plan.rows, work.length, work.length + kept, tokens, work.slots, drafts))
    return lines


def _with_drafts(decision: Decision, lines: list[Line], count: int) -> Decision:
    device = decision.accepted_N.device
    draft_NS = torch.tensor([line.tokens[-count:] for line in lines], device=device)
    request_N = torch.arange(len(lines), device=device)
    return replace(decision, drafted=Drafted(request_N, draft_NS, torch.ones_like(request_N, dtype=torch.bool)))
