"""Decoding whose output is *not* that of the AR half. The engine says so of every request that asks for it.

Shape suffixes: N requests, C choosing rows, V vocabulary ids of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tidar_mega.decode.rules import Decision, Rule, accepted, chosen_logprobs, draft
from tidar_mega.decode.sampling import choose, log_probabilities, take_ids

if TYPE_CHECKING:
    from tidar_mega.decode.forward import Group


def mixed(group: Group) -> Rule:
    """Mixed verification (TiDAR, arXiv 2511.08923, section 4.4.3): v_j = beta a_{j-1} + (1 - beta) g_{j,0}.

    a is what the AR half says of a place and g what the masks say of it, as logits; beta = 1 trusts AR (that is
    `coupled`), 0 trusts diffusion. Needs a group behind every choosing row.
    """
    plan, beta = group.plan, group.beta
    N, C = group.choosing_rows.shape
    request_NC = torch.arange(N, device=group.first_N.device)[:, None].expand(N, C).flatten()
    group_NC = torch.arange(C, device=group.first_N.device).repeat(N)
    assert plan.outcomes == tuple(range(plan.clean - C + 1, plan.clean + 1)), "a group behind every choosing row"
    first_NC = group.drafting_rows(group_NC, request_NC, 0)[:, 0].view(N, C)
    logits_2NCV = yield torch.stack([group.choosing_rows, first_NC])
    logits_NCV = beta * logits_2NCV[0] + (1 - beta) * logits_2NCV[1]
    choice_NC = choose(logits_NCV, group.choosing_order, group.sampling)
    accepted_N = accepted(group.draft_NC[:, 1:] == choice_NC[:, :-1])
    logprob_NC = chosen_logprobs(logits_2NCV[0], choice_NC, group)
    drafted = yield from draft(group, accepted_N)
    return Decision(accepted_N, choice_NC, logprob_NC, drafted)


def denoise(group: Group) -> Rule:
    """What each slot of a block of masks would put at its own place, and how surely (`blocks.py`)."""
    device, N = group.first_N.device, len(group.first_N)
    request_N, first_N = torch.arange(N, device=device), torch.zeros(N, dtype=torch.int64, device=device)
    logits_NCV = yield group.drafting_rows(first_N, request_N, 0)
    order_NC = group.drafting_order(torch.full_like(first_N, group.plan.clean), request_N, 0)
    choice_NC = choose(logits_NCV, order_NC, group.sampling)
    sure_NC = take_ids(log_probabilities(logits_NCV, group.sampling), choice_NC, group.sampling.group)
    return Decision(torch.ones_like(first_N), choice_NC, sure_NC, None)
