"""Speculative sampling by rejection: the output is distributed as AR sampling's, not equal to it token for token.

The draft is drawn from q, the drafter's distribution under the request's temperature, top-k and top-p; a drafted token
d is kept with min(1, p(d) / q(d)), and the first one that is not is replaced by a draw from max(0, p - q), normalised
(Leviathan et al. 2023, arXiv 2211.17192; TiDAR, arXiv 2511.08923, section 3.2). Behind a wholly kept draft the token
is drawn from p. Each place is decided once, with noise of its own for each of the three draws, so the places' draws
are independent; coupled sampling needs none of this and accepts more often.

Shape suffixes: N requests, C choosing rows, S = C - 1 tested tokens, M requests that drafted, V ids of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tidar_mega.decode.rules import Decision, Rule, accepted, chosen_logprobs, draft
from tidar_mega.decode.sampling import Sampling, draw, log_distribution, take_ids, uniform

if TYPE_CHECKING:
    from tidar_mega.decode.forward import Group

DRAFT, ACCEPT, FOLLOW = 1, 2, 3  # the purposes of noise; 0 is that of coupled sampling


def rejection(group: Group) -> Rule:
    logits_NCV = yield group.choosing_rows
    order_NC, sampling = group.choosing_order, group.sampling
    p_NCV = log_distribution(logits_NCV, sampling)
    accepted_N, follow_NV = _test(group, p_NCV, order_NC)
    last_N1 = accepted_N[:, None] - 1
    follow_N1 = draw(follow_NV[:, None], order_NC.gather(1, last_N1), sampling, FOLLOW)
    # new output: the kept draft behind its first token, then what follows it
    output_NC = torch.cat([group.draft_NC[:, 1:], follow_N1], dim=1).scatter(1, last_N1, follow_N1)
    drafted = yield from draft(group, accepted_N, _draw_draft)
    return Decision(accepted_N, output_NC, chosen_logprobs(logits_NCV, output_NC, group), drafted)


def _test(group: Group, p_NCV: Tensor, order_NC: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens stay (the first always), and the log-weights [N, V] of what follows them."""
    if group.plan.choosing == 1:  # nothing but AR's own last choice: plain sampling
        return torch.ones_like(order_NC[:, 0]), p_NCV[:, 0]
    tested_NS = group.draft_NC[:, 1:]
    q_NSV = torch.stack(group.proposals)
    p_NSV = p_NCV[:, :-1]
    ratio_NS = (
        take_ids(p_NSV, tested_NS, group.sampling.group) - take_ids(q_NSV, tested_NS, group.sampling.group)
    ).exp()
    stays_NS = uniform(order_NC[:, :-1], group.sampling, ACCEPT) < ratio_NS
    accepted_N = accepted(stays_NS)
    request_N = torch.arange(len(accepted_N), device=accepted_N.device)
    row_N = accepted_N - 1
    p_NV = p_NCV[request_N, row_N]
    all_stay_N1 = row_N[:, None] == tested_NS.shape[1]
    q_NV = q_NSV[request_N, row_N.clamp(max=tested_NS.shape[1] - 1)]
    plain_NV = p_NV.exp()
    # rounding can leave nothing of max(0, p - q) where p and q are equal: then p itself decides
    residual_NV = (plain_NV - q_NV.exp()).clamp_(min=0).add_(plain_NV, alpha=1e-30).log_()
    return accepted_N, torch.where(all_stay_N1, p_NV, residual_NV)


def _draw_draft(logits_MSV: Tensor, order_MS: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    q_MSV = log_distribution(logits_MSV, sampling)
    return draw(q_MSV, order_MS, sampling, DRAFT), q_MSV
