"""What the rows of a forward decide: which drafted tokens are kept, what follows them, and the next draft.

A rule is a generator. It yields the rows whose logits it needs, int64 of any shape [..], receives them [.., V], and
returns a `Decision`: the head runs on no other rows. In TiDAR that is the verify rows and then the one group of the
actual outcome, there without the first slot, which is AR's own choice: 2B - 1 of B + B*B rows.

This file and `rejection.py` are exact. What is not stands in `approximate.py`; `forward.py` knows them all by name.

Shape suffixes: N requests, C choosing rows, S = slots - 1 draft slots behind the first, M those requests that drafted,
V vocabulary ids of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tidar_mega.decode.sampling import Sampling, choose, log_probabilities, take_ids

if TYPE_CHECKING:
    from tidar_mega.decode.forward import Group

Rule = Generator[Tensor, Tensor, "Decision"]
Draw = Callable[[Tensor, Tensor, Sampling], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Drafted:
    """The next drafts behind the first slot, of those requests whose outcome had a group.

    request_M int64; token_MS int64; exists_M bool: false where nothing was drafted (on a GPU the rows of all requests
    are computed, because dropping some would need to know them on the host); proposal_MSV as in Work, or None
    """

    request_M: Tensor
    token_MS: Tensor
    exists_M: Tensor
    proposal_MSV: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """For N requests: accepted_N int64, 1..C, how many of the tokens output_NC are new output; their log-probabilities
    (None if nobody asked); and the next drafts (None if the plan has no groups)."""

    accepted_N: Tensor
    output_NC: Tensor
    logprob_NC: Tensor | None
    drafted: Drafted | None

    def packed(self, slots: int) -> Tensor:
        """Everything that the host must know, float64 [N, 2 + 2C + S] (ids are exact in it)."""
        N, C = self.output_NC.shape
        table = torch.zeros(N, 2 + 2 * C + slots - 1, dtype=torch.float64, device=self.output_NC.device)
        table[:, 0] = self.accepted_N
        table[:, 2 : 2 + C] = self.output_NC
        if self.logprob_NC is not None:
            table[:, 2 + C : 2 + 2 * C] = self.logprob_NC
        if self.drafted is not None:
            d = self.drafted
            table[d.request_M, 1] = d.exists_M.double()
            table[d.request_M, 2 + 2 * C :] = d.token_MS.double()
        return table


def coupled(group: Group) -> Rule:
    """AR and draft choose with one function and one noise: the output is AR's own, token for token.

    With L committed tokens, the draft d[0..C-1] for orders L.., whose d[0] is AR's own choice, and y_j, j = 1..C, what
    AR chooses for order L + j given d[0..j-1]:

        r = 1;  while r < C and d[r] == y_r: r += 1

    d[0..r-1] are committed and y_r, AR's choice after them, becomes d[0] of the next draft. By induction every
    committed token is AR's choice given the tokens before it, so the output equals AR decoding, greedy or sampled, as
    long as a choice is a function of the logits and the place alone. (TiDAR, arXiv 2511.08923, section 3.2, with AR's
    token always put first: the released code trusts the drafter there, which is not exact.)
    """
    logits_NCV = yield group.choosing_rows
    choice_NC = choose(logits_NCV, group.choosing_order, group.sampling)
    accepted_N = accepted(group.draft_NC[:, 1:] == choice_NC[:, :-1])
    logprob_NC = chosen_logprobs(logits_NCV, choice_NC, group)
    drafted = yield from draft(group, accepted_N)
    return Decision(accepted_N, choice_NC, logprob_NC, drafted)


def accepted(stays_NS: Tensor) -> Tensor:
    """How many tokens of each draft are kept, int64 [N], 1..C: its first one, and those behind it up to the first that
    does not stay."""
    return 1 + stays_NS.long().cumprod(dim=1).sum(dim=1)


def draft(group: Group, accepted_N: Tensor, draw: Draw | None = None) -> Generator[Tensor, Tensor, Drafted | None]:
    """The drafts of the groups that stand behind the actual outcomes, slots 1.., chosen as AR chooses, or by `draw`:
    (logits_MSV, order_MS, sampling) to ids [M, S] and the logits that they were drawn from."""
    place = behind(group, accepted_N)
    if place is None:
        return None
    request_M, kept_M, group_M, exists_M = place
    logits_MSV = yield group.drafting_rows(group_M, request_M, 1)
    order_MS, sampling = group.drafting_order(kept_M, request_M, 1), group.sampling.take(request_M)
    if draw is None:
        return Drafted(request_M, choose(logits_MSV, order_MS, sampling), exists_M)
    token_MS, proposal_MSV = draw(logits_MSV, order_MS, sampling)
    return Drafted(request_M, token_MS, exists_M, proposal_MSV)


def behind(group: Group, accepted_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Which requests have a group behind their outcome: (request_M, kept rows_M, group_M, does it exist_M), or None.

    On a GPU all of them, with group 0 in place of one that is not there: nothing of it is used.
    """
    plan, device = group.plan, accepted_N.device
    if not plan.outcomes or plan.slots == 1:
        return None
    kept_N = plan.clean - plan.choosing + accepted_N
    group_N = _group_numbers(plan.clean, plan.outcomes, device)[kept_N]
    exists_N = group_N >= 0
    request_M = torch.arange(len(kept_N), device=device) if device.type == "cuda" else exists_N.nonzero().squeeze(1)
    if not len(request_M):
        return None
    return request_M, kept_N[request_M], group_N[request_M].clamp(min=0), exists_N[request_M]


@functools.cache  # recordings read these tensors for as long as they live (`graphs.py`)
def _group_numbers(clean: int, outcomes: tuple[int, ...], device: torch.device) -> Tensor:
    """For each number of kept clean rows, which group stands behind it; -1: none."""
    number = {kept: group for group, kept in enumerate(outcomes)}
    return torch.tensor([number.get(kept, -1) for kept in range(clean + 1)], device=device)


def chosen_logprobs(logits_NCV: Tensor, choice_NC: Tensor, group: Group) -> Tensor | None:
    """Log-probabilities of the chosen ids under the AR half, if one of the requests wants them."""
    if not group.wants_logprobs:
        return None
    return take_ids(log_probabilities(logits_NCV, group.sampling), choice_NC, group.sampling.group)
