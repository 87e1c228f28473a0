"""One forward of decoding for any mix of requests: prompts, drafts to verify, plain AR steps, all through one model.

Every request brings a *plan*: relative rows with a static mask, made once (`methods/tidar.py`, `decoding_rows`). The
rows of all requests lie behind one another in one sequence, so requests of different plans share the forward. What a
plan's rows decide is said by the request's *rule* (`rules.py`), which asks for the logits that it needs and no others.

Every rank of a tensor-parallel or pipeline layout runs this with the same requests and gets the same results.

Shape suffixes: T rows of the forward, N requests of one plan and rule, C choosing rows, S = slots - 1 draft slots
behind the first, D hidden width, V vocabulary ids of this rank, R rows with logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.decode.approximate import denoise, mixed
from tidar_mega.decode.cache import PagedAttention, PagedCache, Part, Slots
from tidar_mega.decode.flex import FlexPagedAttention
from tidar_mega.decode.rejection import rejection
from tidar_mega.decode.rules import Decision, coupled
from tidar_mega.decode.sampling import Sampling, SamplingParams
from tidar_mega.methods.tidar import decoding_rows
from tidar_mega.model.attention import AttentionContext
from tidar_mega.rows import Rows, concatenate, visible

RULES = {"coupled": coupled, "rejection": rejection, "mixed": mixed, "denoise": denoise}


class DecodingModel(Protocol):
    """What decoding asks of a model (`model/inference.py`)."""

    device: torch.device
    dtype: torch.dtype
    vocab: int  # logits of this tensor-parallel rank
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup

    def __call__(self, rows: Rows, context: AttentionContext) -> Tensor | None: ...

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """The rows of one request in one forward.

    clean     rows that take tokens: a piece of a prompt, or drafted tokens to verify
    choosing  how many of them, from the last, AR speaks behind: all of a draft, one at a prompt's end, none inside it
    outcomes  numbers of kept clean rows behind each of which a group of masks drafts
    slots     masks of a group: the next draft's length
    denoises  the one group's slots choose tokens for themselves (block diffusion), and AR for none
    """

    clean: int
    choosing: int
    outcomes: tuple[int, ...] = ()
    slots: int = 1
    denoises: bool = False

    @property
    def rows(self) -> int:
        return self.clean + len(self.outcomes) * self.slots

    @property
    def choices(self) -> int:
        """Tokens that the forward chooses at most, but for drafts."""
        return self.slots if self.denoises else self.choosing


@dataclass(frozen=True)
class Work:
    """What one request wants of a forward: its plan, the tokens of the clean rows, and where its rows are kept.

    drawn        tokens that stand in the slots of a denoising plan already; None is a mask
    proposal_SV  the logits that the drafted tokens behind the first were drawn from; only the rejection rule keeps them
    """

    plan: Plan
    tokens: Sequence[int]
    slots: Slots
    length: int
    params: SamplingParams
    proposal_SV: Tensor | None = None
    drawn: Sequence[int | None] = ()


@dataclass(frozen=True)
class Result:
    """What a forward gave one request.

    kept      clean rows to commit
    tokens    new output: those drafted tokens that were confirmed, and what was chosen behind them
    draft     tokens to verify next; the first is the last new output, alone where nothing was drafted behind `kept`
              (of a denoising plan: `tokens` are what its slots choose, `logprobs` how surely, and there is no draft)
    logprobs  of `tokens` under the AR half, before temperature and filters; empty if the request does not want them
    proposal_SV  as in Work, for the next forward
    """

    kept: int
    tokens: list[int]
    draft: list[int]
    logprobs: list[float] = field(default_factory=list)
    proposal_SV: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """The requests of one plan and rule in a forward.

    first_N     their first rows among all rows
    length_N    what they have committed
    draft_NC    the tokens of the choosing rows
    """

    plan: Plan
    sampling: Sampling
    works: list[Work]
    first_N: Tensor
    length_N: Tensor
    draft_NC: Tensor
    wants_logprobs: bool

    @property
    def choosing_rows(self) -> Tensor:
        """int64 [N, C]"""
        p = self.plan
        return self.first_N[:, None] + torch.arange(p.clean - p.choosing, p.clean, device=self.first_N.device)

    @property
    def choosing_order(self) -> Tensor:
        """The places that AR chooses for, int64 [N, C]."""
        p = self.plan
        slot_C = torch.arange(p.clean - p.choosing + 1, p.clean + 1, device=self.first_N.device)
        return self.length_N[:, None] + slot_C

    def drafting_rows(self, group_M: Tensor, request_M: Tensor, first_slot: int) -> Tensor:
        """The mask rows of one group of each of some requests, from slot `first_slot` on, int64 [M, slots - first]."""
        p = self.plan
        slot_S = torch.arange(first_slot, p.slots, device=self.first_N.device)
        return (self.first_N[request_M] + p.clean + group_M * p.slots)[:, None] + slot_S

    def drafting_order(self, kept_M: Tensor, request_M: Tensor, first_slot: int) -> Tensor:
        slot_S = torch.arange(first_slot, self.plan.slots, device=self.first_N.device)
        return (self.length_N[request_M] + kept_M)[:, None] + slot_S


class Forwards:
    """The forwards of one model.

    forbidden  ids that are no text and never chosen, by AR and draft alike
    """

    def __init__(self, model: DecodingModel, cache: PagedCache, mask_id: int, forbidden: Sequence[int]) -> None:
        self.model, self.cache, self.mask_id, self.forbidden = model, cache, mask_id, tuple(forbidden)
        self.device = model.device
        self.attention = FlexPagedAttention if self.device.type == "cuda" else PagedAttention
        # what the requests of the last forwards had in common is not made again
        self.rows_of = functools.lru_cache(maxsize=32)(self._rows_of)
        self.rows_together = functools.lru_cache(maxsize=32)(self._rows_together)
        self.sampling = functools.lru_cache(maxsize=32)(self._sampling)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Result]:
        """One forward. The order of the results is that of `works`."""
        hidden_T1D, placed = self.hidden(works), self._place(works)
        members = self._members(works)
        groups = [self._group([works[i] for i in m], [placed[i] for i in m]) for m in members]
        decisions = None if hidden_T1D is None else self._decide(hidden_T1D[:, 0], groups)
        results = [Result(work.plan.clean, [], []) for work in works]  # inside a prompt nothing is chosen
        for places, found in zip(members, self._share(groups, decisions), strict=True):
            for i, result in zip(places, found, strict=True):
                results[i] = result
        return results

    def hidden(self, works: Sequence[Work]) -> Tensor | None:
        """Hidden states of all rows, [T, 1, D], request by request; the clean rows' keys and values are in the cache.
        None on pipeline stages before the last."""
        parts = [
            Part(rows, work.plan.clean, work.slots, work.length, self.rows_of(work.plan)[1])
            for work, rows in zip(works, self._place(works), strict=True)
        ]
        return self.model(self._rows(works), self.attention(self.cache, parts))

    # rows

    def _rows_of(self, plan: Plan) -> tuple[Rows, Tensor | None]:
        """Relative rows and the additive mask among them, [T, T]: 0 where visible, -inf elsewhere."""
        rows = decoding_rows(plan.clean, plan.outcomes, plan.slots, self.mask_id).to(self.device)
        if plan.rows == 1:
            return rows, None
        hidden_TT = ~visible(rows, rows)[0]
        bias_TT = torch.zeros(hidden_TT.shape, dtype=self.model.dtype, device=self.device)
        return rows, bias_TT.masked_fill_(hidden_TT, -torch.inf)

    @staticmethod
    def _place(works: Sequence[Work]) -> list[range]:
        """Where the rows of each request are."""
        first, placed = 0, []
        for work in works:
            placed.append(range(first, first + work.plan.rows))
            first += work.plan.rows
        return placed

    def _rows(self, works: Sequence[Work]) -> Rows:
        """All rows, [1, T]. Relative places, moved by what each request has committed."""
        tokens, lengths = [], []
        for work in works:
            masked = work.drawn or [None] * (work.plan.rows - work.plan.clean)
            tokens += [*work.tokens, *[self.mask_id if token is None else token for token in masked]]
            lengths += [work.length] * work.plan.rows
        token_1T, length_1T = torch.tensor([[tokens], [lengths]], device=self.device)
        rows = self.rows_together(tuple(work.plan for work in works))
        moved = {name: getattr(rows, name) + length_1T for name in ("position", "order", "horizon")}
        return replace(rows, token=token_1T, **moved)

    def _rows_together(self, plans: tuple[Plan, ...]) -> Rows:
        return concatenate([self.rows_of(plan)[0] for plan in plans], dim=1)

    # decisions

    def _sampling(self, params: tuple[SamplingParams, ...]) -> Sampling:
        group = self.model.tensor
        return Sampling.of(params, self.forbidden, self.model.vocab, self.device, group)

    @staticmethod
    def _members(works: Sequence[Work]) -> list[list[int]]:
        """The places in `works` of those that choose, by plan and rule."""
        found: dict[tuple[Plan, str, float], list[int]] = {}
        for i, work in enumerate(works):
            if work.plan.choices:
                found.setdefault((work.plan, work.params.rule, work.params.beta), []).append(i)
        return list(found.values())

    def _group(self, works: list[Work], placed: list[range]) -> Group:
        plan = works[0].plan
        table = [
            [rows.start, w.length, *w.tokens[plan.clean - plan.choosing :]]
            for w, rows in zip(works, placed, strict=True)
        ]
        numbers = torch.tensor(table, device=self.device)
        sampling = self.sampling(tuple(work.params for work in works))
        logprobs = any(work.params.logprobs for work in works)
        return Group(plan, sampling, works, numbers[:, 0], numbers[:, 1], numbers[:, 2:], logprobs)

    def _decide(self, hidden_TD: Tensor, groups: list[Group]) -> list[Decision]:
        """Runs the rules of all groups side by side: what they ask for at the same time shares one product."""
        names = ["denoise" if group.plan.denoises else group.works[0].params.rule for group in groups]
        rules = [RULES[name](group) for name, group in zip(names, groups, strict=True)]
        wanted = [next(rule) for rule in rules]
        decisions: dict[int, Decision] = {}
        while len(decisions) < len(rules):
            asking = [i for i in range(len(rules)) if i not in decisions]
            logits_RV = self.model.logits(hidden_TD[torch.cat([wanted[i].flatten() for i in asking])])
            pieces = logits_RV.split([wanted[i].numel() for i in asking])
            for i, piece_RV in zip(asking, pieces, strict=True):
                try:
                    wanted[i] = rules[i].send(piece_RV.view(*wanted[i].shape, -1))
                except StopIteration as end:
                    decisions[i] = end.value
        return [decisions[i] for i in range(len(rules))]

    def _share(self, groups: list[Group], decisions: list[Decision] | None) -> list[list[Result]]:
        """The results of all groups, on every pipeline stage: one copy from the device."""
        columns = [2 + 2 * group.plan.choices + group.plan.slots - 1 for group in groups]
        sizes = [len(group.works) * width for group, width in zip(groups, columns, strict=True)]
        packed = torch.empty(sum(sizes), dtype=torch.float64, device=self.device)
        if decisions:
            tables = [d.packed(group.plan.slots).flatten() for d, group in zip(decisions, groups, strict=True)]
            torch.cat(tables, out=packed)
        if self.model.pipeline.size() > 1 and groups:
            dist.broadcast(packed, group=self.model.pipeline, group_src=self.model.pipeline.size() - 1)
        tables = [t.view(-1, width).tolist() for t, width in zip(packed.cpu().split(sizes), columns, strict=True)]
        proposals = [_proposals(d) for d in decisions] if decisions else [{}] * len(groups)
        return [
            [_result(group, row, proposal.get(n)) for n, row in enumerate(table)]
            for group, table, proposal in zip(groups, tables, proposals, strict=True)
        ]


def _proposals(decision: Decision) -> dict[int, Tensor]:
    drafted = decision.drafted
    if drafted is None or drafted.proposal_MSV is None:
        return {}
    return dict(zip(drafted.request_M.tolist(), drafted.proposal_MSV, strict=True))


def _result(group: Group, row: list[float], proposal_SV: Tensor | None) -> Result:
    """One line of `Decision.packed`."""
    plan, (accepted, has_draft, *numbers) = group.plan, row
    C, accepted = plan.choices, int(accepted)
    if plan.denoises:
        return Result(plan.clean, [int(token) for token in numbers[:C]], [], numbers[C : 2 * C])
    tokens = [int(token) for token in numbers[:accepted]]
    logprobs = numbers[C : C + accepted] if group.wants_logprobs else []
    draft = [int(token) for token in numbers[2 * C :]] if has_draft else []
    return Result(plan.clean - C + accepted, tokens, [tokens[-1], *draft], logprobs, proposal_SV)
