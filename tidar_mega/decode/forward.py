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
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.decode.approximate import denoise, mixed
from tidar_mega.decode.cache import PagedAttention, PagedCache, Part, Slots
from tidar_mega.decode.flex import FlexPagedAttention
from tidar_mega.decode.multi_token import Speculator
from tidar_mega.decode.rejection import rejection
from tidar_mega.decode.rules import Decision, coupled
from tidar_mega.decode.sampling import Sampling, SamplingParams
from tidar_mega.methods import IN_PLACE, Drafter
from tidar_mega.methods.tidar import decoding_rows
from tidar_mega.model.attention import AttentionContext
from tidar_mega.rows import Rows, concatenate, visible

if TYPE_CHECKING:
    from tidar_mega.decode.graphs import Recorder

RULES = {"coupled": coupled, "rejection": rejection, "mixed": mixed, "denoise": denoise}


class DecodingModel(Protocol):
    """What decoding asks of a model (`model/inference.py`)."""

    device: torch.device
    dtype: torch.dtype
    vocab: int  # logits of this tensor-parallel rank
    depths: Sequence  # layers that draft (`multi_token.py`)
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
    slots     the next draft's length
    denoises  the one group's slots choose tokens for themselves (block diffusion), and AR for none
    drafter   how the model's masks draft; the same in all plans of a forward
    """

    clean: int
    choosing: int
    outcomes: tuple[int, ...] = ()
    slots: int = 1
    denoises: bool = False
    drafter: Drafter = IN_PLACE

    @property
    def masks(self) -> int:
        """Of one group. Where they predict the next place, the first slot, which is AR's own, needs none."""
        return self.slots - self.drafter.ahead

    @property
    def rows(self) -> int:
        return self.clean + len(self.outcomes) * self.masks

    @property
    def choices(self) -> int:
        """Tokens that the forward chooses at most, but for drafts."""
        return self.slots if self.denoises else self.choosing


@dataclass(frozen=True)
class Work:
    """What one request wants of a forward: its plan, the tokens of the clean rows, and where its rows are kept.

    following    the token behind a piece of a prompt that is not the last
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
    following: int | None = None


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
    """The requests of one plan and rule in a forward, whose rows lie behind one another.

    first_N      their first rows among all rows
    length_N     what they have committed
    draft_NC     the tokens of the choosing rows
    proposals    of each request, the logits that its draft was drawn from; only the rejection rule has them
    """

    plan: Plan
    rule: str
    beta: float
    sampling: Sampling
    first_N: Tensor
    length_N: Tensor
    draft_NC: Tensor
    wants_logprobs: bool
    proposals: tuple[Tensor | None, ...] = ()

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
        """The mask rows that predict the slots from `first_slot` on, in one group of each of some requests, int64
        [M, slots - first]."""
        p = self.plan
        slot_S = torch.arange(first_slot, p.slots, device=self.first_N.device)
        return (self.first_N[request_M] + p.clean + group_M * p.masks)[:, None] + slot_S - p.drafter.ahead

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
        self.speculator = Speculator(model, cache, self.attention) if model.depths else None
        self.recorder: Recorder | None = None  # of forwards that come again and again; the engine knows its bounds
        # what the requests of the last forwards had in common is not made again
        self.rows_of = functools.lru_cache(maxsize=32)(self._rows_of)
        self.rows_together = functools.lru_cache(maxsize=32)(self._rows_together)
        self.sampling = functools.lru_cache(maxsize=32)(self._sampling)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Result]:
        """One forward. The order of the results is that of `works`."""
        members: dict[tuple[Plan, str, float], list[int]] = {}
        for i, work in enumerate(works):
            members.setdefault((work.plan, work.params.rule, work.params.beta), []).append(i)
        # in an order of their own, not that of the requests: what is made for the same plans is found again
        members = {key: members[key] for key in sorted(members, key=repr)} if len(members) > 1 else members
        batches = [[works[i] for i in places] for places in members.values()]
        recorded = self.recorder.run(batches) if self.recorder else None
        found = iter(result for batch in recorded or self._run(batches) for result in batch)
        by_place = {i: next(found) for places in members.values() for i in places}
        return [by_place[i] for i in range(len(works))]

    def _run(self, batches: list[list[Work]]) -> list[list[Result]]:
        """Of the requests of one plan and rule, and of the next, and so on."""
        hidden_T1D = self.hidden([work for batch in batches for work in batch])
        first, groups, empty = 0, [], []
        for batch in batches:
            plan = batch[0].plan
            if plan.choices:
                groups.append(self._group(batch, first))
            else:  # inside a prompt nothing is chosen
                empty.append([Result(plan.clean, [], []) for _ in batch])
            first += len(batch) * plan.rows
        decisions = None if hidden_T1D is None else self.decide(hidden_T1D[:, 0], groups)
        if decisions is not None and self.speculator and batches[0][0].plan.drafter.depths:
            decisions = self.speculator.draft(hidden_T1D[:, 0], batches, groups, decisions)
        chosen, others = iter(self._share(groups, decisions)), iter(empty)
        return [next(chosen if batch[0].plan.choices else others) for batch in batches]

    def hidden(self, works: Sequence[Work]) -> Tensor | None:
        """Hidden states of all rows, [T, 1, D], request by request; the clean rows' keys and values are in the cache.
        None on pipeline stages before the last."""
        first, parts = 0, []
        for work in works:
            rows = range(first, first + work.plan.rows)
            parts.append(Part(rows, work.plan.clean, work.slots, work.length, self.rows_of(work.plan)[1]))
            first = rows.stop
        return self.model(self._rows(works), self.attention.of(self.cache, parts))

    # rows

    def _rows_of(self, plan: Plan) -> tuple[Rows, Tensor | None]:
        """Relative rows and the additive mask among them, [T, T]: 0 where visible, -inf elsewhere."""
        rows = decoding_rows(plan.clean, plan.outcomes, plan.masks, self.mask_id).to(self.device)
        rows = replace(rows, causal_in_group=plan.drafter.causal_in_group)
        if plan.rows == 1:
            return rows, None
        hidden_TT = ~visible(rows, rows)[0]
        bias_TT = torch.zeros(hidden_TT.shape, dtype=self.model.dtype, device=self.device)
        return rows, bias_TT.masked_fill_(hidden_TT, -torch.inf)

    def _rows(self, works: Sequence[Work]) -> Rows:
        """All rows, [1, T]. Relative places, moved by what each request has committed."""
        tokens, lengths = [], []
        for work in works:
            masked = work.drawn or [None] * (work.plan.rows - work.plan.clean)
            tokens += [*work.tokens, *[self.mask_id if token is None else token for token in masked]]
            lengths += [work.length] * work.plan.rows
        token_1T, length_1T = torch.tensor([[tokens], [lengths]], device=self.device)
        return moved(self.rows_together(tuple(work.plan for work in works)), token_1T, length_1T)

    def _rows_together(self, plans: tuple[Plan, ...]) -> Rows:
        return concatenate([self.rows_of(plan)[0] for plan in plans], dim=1)

    # decisions

    def _sampling(self, params: tuple[SamplingParams, ...]) -> Sampling:
        group = self.model.tensor
        return Sampling.of(params, self.forbidden, self.model.vocab, self.device, group)

    def _group(self, works: list[Work], first: int) -> Group:
        """`first`: where their rows begin among all rows."""
        plan, params = works[0].plan, tuple(work.params for work in works)
        table = [[w.length, *w.tokens[plan.clean - plan.choosing :]] for w in works]
        numbers = torch.tensor(table, device=self.device)
        proposals = tuple(work.proposal_SV for work in works)
        return self.group(plan, params, self.sampling(params), first, numbers[:, 0], numbers[:, 1:], proposals)

    @staticmethod
    def group(
        plan: Plan,
        params: Sequence[SamplingParams],
        sampling: Sampling,
        first: int,
        length_N: Tensor,
        draft_NC: Tensor,
        proposals: tuple[Tensor | None, ...] = (),
    ) -> Group:
        first_N = first + plan.rows * torch.arange(len(length_N), device=length_N.device)
        rule = "denoise" if plan.denoises else params[0].rule
        logprobs = any(p.logprobs for p in params)
        return Group(plan, rule, params[0].beta, sampling, first_N, length_N, draft_NC, logprobs, proposals)

    def decide(self, hidden_TD: Tensor, groups: list[Group]) -> list[Decision]:
        """Runs the rules of all groups side by side: what they ask for at the same time shares one product."""
        rules = [RULES[group.rule](group) for group in groups]
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
        sizes = [len(group.first_N) * columns(group.plan) for group in groups]
        packed = torch.empty(sum(sizes), dtype=torch.float64, device=self.device)
        if decisions:
            torch.cat([d.packed(g.plan.slots).flatten() for d, g in zip(decisions, groups, strict=True)], out=packed)
        if self.model.pipeline.size() > 1 and groups:
            dist.broadcast(packed, group=self.model.pipeline, group_src=self.model.pipeline.size() - 1)
        proposals = [_proposals(d) for d in decisions] if decisions else [{}] * len(groups)
        return [
            results(group.plan, group.wants_logprobs, table, proposal)
            for group, table, proposal in zip(groups, packed.cpu().split(sizes), proposals, strict=True)
        ]


def moved(rows: Rows, token_1T: Tensor, length_1T: Tensor) -> Rows:
    """Relative rows with their tokens, behind what the request of each row has committed."""
    places = {name: getattr(rows, name) + length_1T for name in ("position", "order", "horizon")}
    return replace(rows, token=token_1T, **places)


def columns(plan: Plan) -> int:
    """Of `Decision.packed`."""
    return 2 + 2 * plan.choices + plan.slots - 1


def _proposals(decision: Decision) -> dict[int, Tensor]:
    drafted = decision.drafted
    if drafted is None or drafted.proposal_MSV is None:
        return {}
    return dict(zip(drafted.request_M.tolist(), drafted.proposal_MSV, strict=True))


def results(plan: Plan, wants_logprobs: bool, packed: Tensor, proposals: dict[int, Tensor]) -> list[Result]:
    """Those of one plan's requests, from `Decision.packed` on the host."""
    lines = packed.view(-1, columns(plan)).tolist()
    return [_result(plan, wants_logprobs, line, proposals.get(n)) for n, line in enumerate(lines)]


def _result(plan: Plan, wants_logprobs: bool, line: list[float], proposal_SV: Tensor | None) -> Result:
    accepted, has_draft, *numbers = line
    C, accepted = plan.choices, int(accepted)
    if plan.denoises:
        return Result(plan.clean, [int(token) for token in numbers[:C]], [], numbers[C : 2 * C])
    tokens = [int(token) for token in numbers[:accepted]]
    logprobs = numbers[C : C + accepted] if wants_logprobs else []
    draft = [int(token) for token in numbers[2 * C :]] if has_draft else []
    return Result(plan.clean - C + accepted, tokens, [tokens[-1], *draft], logprobs, proposal_SV)
