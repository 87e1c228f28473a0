"""Choosing tokens: greedy and coupled sampling, one function for the AR half and for the draft alike.

Sampling is argmax(logits / T + Gumbel noise), which draws from softmax(logits / T) (Gumbel-max trick). The noise is a
pure function of (seed, order, token id): AR and draft see the same noise at a place, so fused decoding gives exactly the
sequence that plain AR sampling with this seed gives, and the shared noise makes drafts agree often. No generator has a
state, so nothing depends on batching, on the layout or on which forward asked.

Shape suffixes: N requests, C choices of a request, V vocabulary ids of this tensor-parallel rank, K most likely ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.config import UserError

LOWEST_TEMPERATURE = 1e-3  # below it, logits / T leaves float32's useful range; 0 is greedy


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Raises UserError on impossible values.

    max_tokens   longest continuation, in tokens
    temperature  0 = greedy; else logits are divided by it
    top_k        keep the k most likely ids (ties with the k-th are kept); 0 = all
    top_p        keep the most likely ids up to this share of the probability that top_k left; 1 = all
    seed         of the noise, any integer of 64 bits; the same seed and prompt give the same continuation
    stop_tokens  ids that end the continuation (and are its last token); None = the end-of-document id, () = none
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        ok = self.temperature == 0 or (math.isfinite(self.temperature) and self.temperature >= LOWEST_TEMPERATURE)
        _require(ok, "temperature", self.temperature, f"0 (greedy) or a finite number of at least {LOWEST_TEMPERATURE}")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all ids) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (all ids)")
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "an integer of 64 bits")
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def for_request(self, number: int) -> SamplingParams:
        """The same with a seed of its own, so that the requests of a batch get independent noise."""
        return replace(self, seed=(self.seed + number + 2**63) % 2**64 - 2**63)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise UserError(f"{name} = {value}: must be {allowed}")


@dataclass(frozen=True)
class Sampling:
    """The parameters of N requests as tensors, made once per batch, for one rank's slice of the vocabulary.

    scale_N      float32, 1 / temperature (1 where greedy)
    noisy_N      float32, 0 where greedy, else 1
    seed_N       int64
    top_k_N      int64, at least 1
    top_p_N      float32, above 1 where nothing is to be filtered
    unfiltered_N bool, neither top-k nor top-p
    forbidden    int64, local indices of the ids that are no text and never chosen
    first_id     global id of the slice's first logit
    candidates   how many of the most likely ids the filters must look at; 0 = no filter
    group        tensor-parallel group that holds the other slices; None = this is the whole vocabulary
    """

    scale_N: Tensor
    noisy_N: Tensor
    seed_N: Tensor
    top_k_N: Tensor
    top_p_N: Tensor
    unfiltered_N: Tensor
    forbidden: Tensor
    first_id: int
    candidates: int
    greedy: bool
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        forbidden: Sequence[int],
        vocab: int,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> Sampling:
        """`vocab` is the number of logits of this rank's slice; slices of a group are equally wide, in rank order."""
        first = group.rank() * vocab if group is not None else 0
        total = vocab * (group.size() if group is not None else 1)
        top_k = [min(p.top_k or total, total) for p in params]
        filters = [not p.is_greedy and (k < total or p.top_p < 1) for k, p in zip(top_k, params, strict=True)]
        real = {"dtype": torch.float32, "device": device}
        return cls(
            scale_N=torch.tensor([1 / (p.temperature or 1) for p in params], **real),
            noisy_N=torch.tensor([float(not p.is_greedy) for p in params], **real),
            seed_N=torch.tensor([p.seed for p in params], dtype=torch.int64, device=device),
            top_k_N=torch.tensor(top_k, device=device),
            # cumulated float32 probabilities reach 1 early: "all" must not be a comparison with 1
            top_p_N=torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], **real),
            unfiltered_N=torch.tensor([not f for f in filters], device=device),
            forbidden=torch.tensor([i - first for i in forbidden if 0 <= i - first < vocab], dtype=torch.int64).to(
                device
            ),
            first_id=first,
            candidates=max((k for k, f in zip(top_k, filters, strict=True) if f), default=0),
            greedy=all(p.is_greedy for p in params),
            group=group if group is not None and group.size() > 1 else None,
        )


def choose(logits_NCV: Tensor, order_NC: Tensor, sampling: Sampling) -> Tensor:
    """The ids [N, C] for the places `order_NC`, from float32 logits (overwritten at the forbidden ids).

    Greedy: the most likely id. Else: of the ids that top-k and top-p keep, the argmax of logits / T + noise. On every
    rank of a tensor-parallel group the same ids come out; of equals, the lowest.
    """
    logits_NCV.index_fill_(-1, sampling.forbidden, -torch.inf)
    if sampling.greedy:
        return _argmax(logits_NCV, sampling)
    scaled_NCV = logits_NCV * sampling.scale_N[:, None, None]
    noise_NCV = gumbel(sampling.seed_N[:, None], order_NC, sampling.first_id, scaled_NCV.shape[-1])
    score_NCV = noise_NCV.mul_(sampling.noisy_N[:, None, None]).add_(scaled_NCV)
    if sampling.candidates:
        score_NCV.masked_fill_(scaled_NCV < _threshold(scaled_NCV, sampling), -torch.inf)
    return _argmax(score_NCV, sampling)


def gumbel(seed: Tensor, order: Tensor, first_id: int, count: int) -> Tensor:
    """Standard Gumbel noise, float32 [*shape, count], for the ids first_id .. first_id + count - 1.

    `seed` and `order` are int64 and broadcast to `shape`. Counter-based (SplitMix64, Steele et al. 2014): a key is
    hashed from seed and order, and the ids count on from there; only integer arithmetic that wraps, so equal on every
    device. 40 bits make an exponential E = -log(1 - u), exact to float32 where it is small and the noise -log(E) large.
    """
    key = _mix(_mix(seed + _GOLDEN) + (order + 1) * _GOLDEN)
    ids_V = torch.arange(first_id + 1, first_id + 1 + count, device=order.device) * _GOLDEN
    bits = _shift_right(_mix(key[..., None] + ids_V), 24)
    uniform = bits.float().add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical shift of int64, which torch has only with the sign kept."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _threshold(scaled_NCV: Tensor, sampling: Sampling) -> Tensor:
    """The smallest logit / T that top-k and then top-p keep, [N, C, 1]."""
    top_NCK = _most_likely(scaled_NCV, sampling)
    rank_K = torch.arange(top_NCK.shape[-1], device=top_NCK.device)
    kept_NCK = (rank_K < sampling.top_k_N[:, None, None]).expand_as(top_NCK)
    probability_NCK = top_NCK.masked_fill(~kept_NCK, -torch.inf).softmax(dim=-1)
    likelier_NCK = probability_NCK.cumsum(dim=-1) - probability_NCK
    kept_NCK = kept_NCK & (likelier_NCK < sampling.top_p_N[:, None, None])
    last_NC1 = kept_NCK.sum(dim=-1, keepdim=True) - 1
    threshold_NC1 = top_NCK.gather(-1, last_NC1)
    return threshold_NC1.masked_fill(sampling.unfiltered_N[:, None, None], -torch.inf)


def _most_likely(scaled_NCV: Tensor, sampling: Sampling) -> Tensor:
    """The `candidates` largest values over all ranks, in falling order."""
    top_NCK = scaled_NCV.topk(min(sampling.candidates, scaled_NCV.shape[-1]), dim=-1).values
    if sampling.group is None:
        return top_NCK
    parts = [torch.empty_like(top_NCK) for _ in range(sampling.group.size())]
    dist.all_gather(parts, top_NCK.contiguous(), group=sampling.group)
    return torch.cat(parts, dim=-1).sort(dim=-1, descending=True).values[..., : sampling.candidates]


def _argmax(score_NCV: Tensor, sampling: Sampling) -> Tensor:
    """The id of the largest score over all ranks."""
    if sampling.group is None:
        return score_NCV.argmax(dim=-1) + sampling.first_id
    largest_NC, id_NC = score_NCV.max(dim=-1)
    best_NC = largest_NC.clone()
    dist.all_reduce(best_NC, op=dist.ReduceOp.MAX, group=sampling.group)
    id_NC = torch.where(largest_NC == best_NC, id_NC + sampling.first_id, torch.iinfo(torch.int64).max)
    dist.all_reduce(id_NC, op=dist.ReduceOp.MIN, group=sampling.group)
    return id_NC
