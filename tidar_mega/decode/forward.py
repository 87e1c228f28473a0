"""The forwards of decoding: prompt, fused and plain AR, all through the same model, cache and `choose`.

Every forward is a *plan*: relative rows with a static mask, made once. A forward adds each request's committed length
to the places and fills in the tokens; nothing else changes from step to step. AR decoding is the plan of one row.

Shape suffixes: N requests, T rows, B draft slots, S = B - 1 draft slots behind the first, D hidden width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tidar_mega.decode import accept
from tidar_mega.decode.cache import CachedAttention, KVCache, mask_bias
from tidar_mega.decode.sampling import Sampling, choose
from tidar_mega.methods.tidar import fused_rows
from tidar_mega.model.gpt import HybridGPT
from tidar_mega.rows import Rows, concatenate


@dataclass(frozen=True)
class Plan:
    """Relative rows [1, T] of one kind of forward, for a committed length of 0, and their additive mask.

    The first `clean` rows take tokens and may be committed; the others are drafting slots.
    """

    rows: Rows
    bias_QT: Tensor
    clean: int


@dataclass(frozen=True)
class Step:
    """What a forward decided for N requests.

    choice_NB  ids that AR chooses behind the accepted tokens; the first `accepted` of them are new output
    accepted_N how many rows are committed
    draft_NB   tokens to verify next; the first is AR's own last choice
    """

    choice_NB: Tensor
    accepted_N: Tensor
    draft_NB: Tensor


class Forwards:
    """The plans of one model and block size, and the forwards made of them.

    `block` 1 is plain AR decoding: there is nothing to draft behind AR's own choice.
    """

    def __init__(self, model: HybridGPT, block: int, mask_id: int, device: torch.device) -> None:
        self.model, self.block, self.mask_id, self.device = model, block, mask_id, device
        self.step_plan = self._plan(fused_rows(block, mask_id) if block > 1 else causal_rows(1), clean=block)
        self.step_rows = self.step_plan.rows.shape[1]
        self.prompt_plan = functools.lru_cache(maxsize=4)(self._prompt_plan)  # prompts come in pieces of one size
        self._slot_B = torch.arange(block, device=device)
        self._slot_S = torch.arange(1, block, device=device)

    def _prompt_plan(self, tokens: int, drafts: bool) -> Plan:
        """`tokens` causal rows and, at the end of a prompt, the masks of the first draft, which see all of them."""
        rows = causal_rows(tokens)
        if drafts and self.block > 1:
            rows = concatenate([rows, draft_rows(tokens, self.block, self.mask_id)], dim=1)
        return self._plan(rows, clean=tokens)

    def _plan(self, rows: Rows, clean: int) -> Plan:
        shape = self.model.config
        heads_per_key = shape.num_attention_heads // shape.num_query_groups
        dtype = next(self.model.parameters()).dtype
        rows = rows.to(self.device)
        return Plan(rows, mask_bias(rows, heads_per_key, dtype), clean)

    def hidden(self, plan: Plan, cache: KVCache, requests: slice, token_NB: Tensor) -> Tensor:
        """Hidden states [T, N, D] of the plan's rows behind what each request has committed."""
        length_N1 = torch.tensor(cache.lengths[requests], device=self.device)[:, None]
        rows = plan.rows.map(lambda x_1T: x_1T.expand(len(length_N1), -1))
        rows = replace(
            rows,
            token=torch.cat([token_NB, rows.token[:, plan.clean :]], dim=1),
            position=rows.position + length_N1,
            order=rows.order + length_N1,
            horizon=rows.horizon + length_N1,
        )
        return self.model(rows=rows, context=CachedAttention(cache, plan.bias_QT, requests))

    def prompt_chunk(self, plan: Plan, cache: KVCache, request: int, token_1T: Tensor, sampling: Sampling) -> Step:
        """Encodes a piece of one request's prompt and commits it; the last piece also makes the first draft.

        `choice_NB` then holds AR's choice behind the prompt, d[0]; the masks give the draft of the slots behind it.
        """
        hidden_T1D = self.hidden(plan, cache, slice(request, request + 1), token_1T)
        cache.commit(request, plan.clean)
        length = cache.lengths[request]
        drafted = hidden_T1D.shape[0] - plan.clean
        last_TD = hidden_T1D[plan.clean - 1 :, 0]
        kept_TD = torch.cat([last_TD[:1], last_TD[2:]])  # the first mask stands where AR has just chosen
        order_1B = length + self._slot_B[None, : max(drafted, 1)]
        draft_1B = choose(self.model.logits(kept_TD)[None], order_1B, sampling)
        return Step(draft_1B[:, :1], torch.ones_like(draft_1B[:, 0]), draft_1B)

    def autoregressive(self, cache: KVCache, draft_N1: Tensor, sampling: Sampling) -> Step:
        """One token per request."""
        requests = slice(0, len(draft_N1))
        hidden_1ND = self.hidden(self.step_plan, cache, requests, draft_N1)
        order_N1 = torch.tensor(cache.lengths, device=self.device)[:, None] + 1
        choice_N1 = choose(self.model.logits(hidden_1ND.transpose(0, 1)), order_N1, sampling)
        return Step(choice_N1, torch.ones_like(choice_N1[:, 0]), choice_N1)

    def fused(self, cache: KVCache, draft_NB: Tensor, sampling: Sampling) -> Step:
        """Verifies the draft and drafts behind every possible outcome, in one forward (arXiv 2511.08923, section 3.2).

        The head runs on the B verify rows and then only on the group of the actual outcome, and there only on the slots
        behind the first, which is AR's own choice.
        """
        requests = slice(0, len(draft_NB))
        hidden_TND = self.hidden(self.step_plan, cache, requests, draft_NB)
        order_NB = torch.tensor(cache.lengths, device=self.device)[:, None] + 1 + self._slot_B
        choice_NB = choose(self.model.logits(hidden_TND[: self.block].transpose(0, 1)), order_NB, sampling)
        accepted_N = accept.exact(draft_NB, choice_NB)
        last_N1 = accepted_N[:, None] - 1
        row_NS = self.block + last_N1 * self.block + self._slot_S
        hidden_NSD = hidden_TND[row_NS, torch.arange(len(draft_NB), device=self.device)[:, None]]
        drafted_NS = choose(self.model.logits(hidden_NSD), order_NB[:, :1] + last_N1 + self._slot_S, sampling)
        return Step(choice_NB, accepted_N, torch.cat([choice_NB.gather(1, last_N1), drafted_NS], dim=1))

    def step(self, cache: KVCache, draft_NB: Tensor, sampling: Sampling) -> Step:
        return (self.fused if self.block > 1 else self.autoregressive)(cache, draft_NB, sampling)


def causal_rows(count: int) -> Rows:
    """Relative clean rows [1, count]: each sees the ones before it."""
    order_1T = torch.arange(count)[None]
    zero_1T = torch.zeros_like(order_1T)
    return Rows(zero_1T, order_1T, order_1T, order_1T + 1, zero_1T, zero_1T, zero_1T, zero_1T.float())


def draft_rows(first: int, block: int, mask_id: int) -> Rows:
    """One group of relative mask rows [1, block] at the places first.., which see everything before `first`."""
    order_1B = first + torch.arange(block)[None]
    zero_1B = torch.zeros_like(order_1B)
    token_1B = torch.full_like(order_1B, mask_id)
    horizon_1B, group_1B = torch.full_like(order_1B, first), torch.ones_like(order_1B)
    return Rows(token_1B, order_1B, order_1B, horizon_1B, group_1B, zero_1B, zero_1B, zero_1B.float())
