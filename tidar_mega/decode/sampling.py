"""Choosing tokens: greedy and coupled sampling, one function for the AR half and for the draft alike.

Sampling is argmax(logits / T + Gumbel noise), which draws from softmax(logits / T) (Gumbel-max trick). The noise is a
pure function of (seed, order, token id): AR and draft see the same noise at a place, so fused decoding gives exactly
the sequence that plain AR sampling with this seed gives, and the shared noise makes drafts agree often. No generator
has a state, so nothing depends on batching, on the layout or on which forward asked.

Shape suffixes: N requests, C choices of a request, V vocabulary ids of this tensor-parallel rank, K most likely ids.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.config import UserError

FEW = 256  # on a CPU, sorting this many of a row's logits is far cheaper than sorting all, and mostly enough for top-p
ACCEPTANCES = ("coupled", "rejection")
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
    stop_strings texts that end the continuation, which then ends with the token that completes the first of them
    logprobs     also give the log-probability of every new token under the AR half, at temperature 1 without filters
    acceptance   "coupled": AR and draft share their noise, so that the output is AR's own; "rejection": speculative
                 sampling, distributed as AR's (greedy decoding is coupled either way)
    beta         mixed verification: below 1, the masks' logits are mixed into AR's, and the output is no longer AR's
    threshold    mode "blocks": the probability from which on a slot's token is kept
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    acceptance: str = "coupled"
    beta: float = 1.0
    threshold: float = 0.9

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        ok = self.temperature == 0 or (math.isfinite(self.temperature) and self.temperature >= LOWEST_TEMPERATURE)
        _require(ok, "temperature", self.temperature, f"0 (greedy) or a finite number of at least {LOWEST_TEMPERATURE}")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all ids) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (all ids)")
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "an integer of 64 bits")
        ok = self.acceptance in ACCEPTANCES
        _require(ok, "acceptance", repr(self.acceptance), f"one of {', '.join(ACCEPTANCES)}")
        _require(0 <= self.beta <= 1, "beta", self.beta, "from 0 (trust the masks) to 1 (trust AR, exact)")
        _require(0 < self.threshold <= 1, "threshold", self.threshold, "above 0 and at most 1")
        if self.beta < 1 and self.acceptance != "coupled":
            raise UserError(
                f"beta = {self.beta}: mixed verification has no rejection; set acceptance = coupled or beta = 1"
            )
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        _require(not isinstance(self.stop_strings, str), "stop_strings", repr(self.stop_strings), "a list of texts")
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        _require(all(self.stop_strings), "stop_strings", self.stop_strings, "texts that are not empty")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def rule(self) -> str:
        """What decides (`rules.py`): coupled and rejection are exact, mixed is not."""
        if self.beta < 1:
            return "mixed"
        return "coupled" if self.is_greedy else self.acceptance

    @property
    def without_masks(self) -> SamplingParams:
        """What plain AR decoding is compared by."""
        return replace(self, beta=1.0)

    def for_request(self, number: int) -> SamplingParams:
        """The same with a seed of its own, so that the requests of a batch get independent noise."""
        return replace(self, seed=(self.seed + number + 2**63) % 2**64 - 2**63)


def _whole(name: str, value: object) -> int:
    """64.0, as JSON may have it, would count neither rows nor pages."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {value!r}: must be a whole number, and is a {type(value).__name__}") from None


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise UserError(f"{name} = {value}: must be {allowed}")


@dataclass(frozen=True)
class Sampling:
    """The parameters of N requests as tensors, made once per batch, for one rank's slice of the vocabulary.

    scale_N      float32, 1 / temperature (1 where greedy)
    noisy_N      float32, 0 where greedy, else 1
    key_N        int64, hashed from the seed
    count_V      int64, what each id of the slice adds to a place's key
    top_k_N      int64, at least 1
    top_p_N      float32, above 1 where nothing is to be filtered
    no_top_k_N   bool, top-k keeps all ids
    unfiltered_N bool, neither top-k nor top-p
    forbidden    int64, local indices of the ids that are no text and never chosen
    first_id     global id of the slice's first logit
    candidates   how many of the most likely ids the filters must look at; 0 = no filter
    try_few      the filters may look at FEW ids first
    group        tensor-parallel group that holds the other slices; None = this is the whole vocabulary
    """

    scale_N: Tensor
    noisy_N: Tensor
    key_N: Tensor
    count_V: Tensor
    top_k_N: Tensor
    top_p_N: Tensor
    no_top_k_N: Tensor
    unfiltered_N: Tensor
    forbidden: Tensor
    first_id: int
    candidates: int
    try_few: bool
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
        alone = group is None or group.size() == 1
        first, total = (0, vocab) if alone else (group.rank() * vocab, group.size() * vocab)
        top_k = [min(p.top_k or total, total) for p in params]
        filters = [not p.is_greedy and (k < total or p.top_p < 1) for k, p in zip(top_k, params, strict=True)]
        real = {"dtype": torch.float32, "device": device}
        count_V, local = _of_vocabulary(tuple(forbidden), first, vocab, torch.device(device))
        return cls(
            scale_N=torch.tensor([1 / (p.temperature or 1) for p in params], **real),
            noisy_N=torch.tensor([float(not p.is_greedy) for p in params], **real),
            key_N=_seed_key(torch.tensor([p.seed for p in params], dtype=torch.int64, device=device)),
            count_V=count_V,
            top_k_N=torch.tensor(top_k, device=device),
            # cumulated float32 probabilities reach 1 early: "all" must not be a comparison with 1
            top_p_N=torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], **real),
            no_top_k_N=torch.tensor([k == total for k in top_k], device=device),
            unfiltered_N=torch.tensor([not f for f in filters], device=device),
            forbidden=local,
            first_id=first,
            candidates=max((k for k, f in zip(top_k, filters, strict=True) if f), default=0),
            try_few=alone and all(k <= FEW or k == total for k in top_k) and torch.device(device).type == "cpu",
            greedy=all(p.is_greedy for p in params),
            group=None if alone else group,
        )

    def take(self, request_M: Tensor) -> Sampling:
        """The parameters of some of the requests."""
        if len(request_M) == len(self.key_N):
            return self
        names = [f.name for f in fields(self) if f.name.endswith("_N")]
        return replace(self, **{name: getattr(self, name)[request_M] for name in names})


@functools.lru_cache(maxsize=8)
def _of_vocabulary(forbidden: tuple[int, ...], first: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What depends on the slice of the vocabulary alone: Sampling.count_V and Sampling.forbidden."""
    local = [i - first for i in forbidden if 0 <= i - first < vocab]
    return _id_counts(first, vocab, device), torch.tensor(local, dtype=torch.int64, device=device)


def choose(logits_NCV: Tensor, order_NC: Tensor, sampling: Sampling) -> Tensor:
    """The ids [N, C] for the places `order_NC`, from float32 logits (overwritten at the forbidden ids).

    Greedy: the most likely id. Else: of the ids that top-k and top-p keep, the argmax of logits / T + noise. On every
    rank of a tensor-parallel group the same ids come out; of equals, the lowest.
    """
    logits_NCV.index_fill_(-1, sampling.forbidden, -torch.inf)
    if sampling.greedy:
        return _argmax(logits_NCV, sampling)
    scaled_NCV = logits_NCV * sampling.scale_N[:, None, None]
    score_NCV = _noise(sampling.key_N[:, None], order_NC, sampling.count_V)
    score_NCV = score_NCV.mul_(sampling.noisy_N[:, None, None]).add_(scaled_NCV)
    if sampling.candidates:
        score_NCV.masked_fill_(scaled_NCV < _threshold(scaled_NCV, sampling), -torch.inf)
    return _argmax(score_NCV, sampling)


def log_probabilities(logits_NCV: Tensor, sampling: Sampling) -> Tensor:
    """Log-softmax over all text ids, whatever the temperature and the filters (forbidden ids are overwritten)."""
    logits_NCV.index_fill_(-1, sampling.forbidden, -torch.inf)
    return logits_NCV - log_sum(logits_NCV, sampling.group)


def log_distribution(logits_NCV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities that `choose` draws from: under the temperature, top-k and top-p of each request."""
    logits_NCV.index_fill_(-1, sampling.forbidden, -torch.inf)
    scaled_NCV = logits_NCV * sampling.scale_N[:, None, None]
    if sampling.candidates:
        scaled_NCV.masked_fill_(scaled_NCV < _threshold(scaled_NCV, sampling), -torch.inf)
    return scaled_NCV - log_sum(scaled_NCV, sampling.group)


def draw(weight_NCV: Tensor, order_NC: Tensor, sampling: Sampling, purpose: int) -> Tensor:
    """Ids [N, C] drawn from log-weights that need not be normalised, with noise of `purpose` (1..) and place."""
    noise_NCV = _noise(_key(sampling, purpose)[:, None], order_NC, sampling.count_V)
    return _argmax(noise_NCV.add_(weight_NCV), sampling)


def uniform(order_NC: Tensor, sampling: Sampling, purpose: int) -> Tensor:
    """Numbers [N, C] in (0, 1), a function of the request's seed, the place and `purpose` (1..)."""
    key_NC = _mix(_key(sampling, purpose)[:, None] + (order_NC + 1) * _GOLDEN)
    return _shift_right(key_NC, 24).float().add_(0.5).mul_(2.0**-40)


def take_ids(x_NCV: Tensor, id_NC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The values [..] of single ids among values [.., V], from whichever rank of the group has them."""
    local_NC = id_NC - (x_NCV.shape[-1] * group.rank() if group is not None else 0)
    foreign_NC = (local_NC < 0) | (local_NC >= x_NCV.shape[-1])
    value_NC = x_NCV.gather(-1, local_NC.masked_fill(foreign_NC, 0)[..., None])[..., 0]
    value_NC = value_NC.masked_fill(foreign_NC, -torch.inf)
    if group is not None:
        dist.all_reduce(value_NC, op=dist.ReduceOp.MAX, group=group)
    return value_NC


def _key(sampling: Sampling, purpose: int) -> Tensor:
    return _mix(sampling.key_N + _signed(purpose * _MIX_1 % 2**64))


def gumbel(seed: Tensor, order: Tensor, first_id: int, count: int) -> Tensor:
    """Standard Gumbel noise, float32 [*shape, count], for the ids first_id .. first_id + count - 1.

    `seed` and `order` are int64 and broadcast to `shape`. Counter-based (SplitMix64, Steele et al. 2014): a key is
    hashed from seed and order, and the ids count on from there; only integer arithmetic that wraps, so equal on every
    device. 40 bits make an exponential E = -log(1 - u), exact to float32 where it is small and the noise -log(E) large.
    """
    return _noise(_seed_key(seed), order, _id_counts(first_id, count, order.device))


def _seed_key(seed: Tensor) -> Tensor:
    return _mix(seed + _GOLDEN)


def _id_counts(first_id: int, count: int, device) -> Tensor:
    return torch.arange(first_id + 1, first_id + 1 + count, device=device) * _GOLDEN


def _noise(seed_key: Tensor, order: Tensor, count_V: Tensor) -> Tensor:
    key = _mix(seed_key + (order + 1) * _GOLDEN)
    bits = _shift_right(_mix(key[..., None] + count_V), 24)
    uniform = bits.float().add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: a bijection of 64-bit integers; every input bit moves every output bit."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical shift of int64, which torch has only with the sign kept."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _threshold(scaled_NCV: Tensor, sampling: Sampling) -> Tensor:
    """The smallest logit / T that top-k and then top-p keep, [N, C, 1]."""
    if sampling.try_few and sampling.candidates > FEW:
        threshold_NC1, settled = _threshold_among(scaled_NCV, sampling, FEW)
        if settled:
            return threshold_NC1
    return _threshold_among(scaled_NCV, sampling, sampling.candidates)[0]


def _threshold_among(scaled_NCV: Tensor, sampling: Sampling, count: int) -> tuple[Tensor, Tensor]:
    """The threshold if it is among the `count` most likely ids, and whether it certainly is, for all choices."""
    top_NCK = _most_likely(scaled_NCV, sampling.group, count)
    in_top_k_NCK = torch.arange(top_NCK.shape[-1], device=top_NCK.device) < sampling.top_k_N[:, None, None]
    all_NC1 = log_sum(scaled_NCV, sampling.group)
    # the probability that top-k left is that of the candidates, or all of it where it does not filter
    left_NC1 = top_NCK.masked_fill(~in_top_k_NCK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    total_NC1 = torch.where(sampling.no_top_k_N[:, None, None], all_NC1, left_NC1)
    mass_NCK = (top_NCK - total_NC1).exp().cumsum(dim=-1)
    likelier_NCK = torch.cat([torch.zeros_like(mass_NCK[..., :1]), mass_NCK[..., :-1]], dim=-1)
    kept_NCK = in_top_k_NCK & (likelier_NCK < sampling.top_p_N[:, None, None])
    threshold_NC1 = top_NCK.gather(-1, (kept_NCK.sum(dim=-1, keepdim=True) - 1).clamp_(min=0))
    settled_NC = (mass_NCK[..., -1] >= sampling.top_p_N[:, None]) | (~sampling.no_top_k_N | sampling.unfiltered_N)[
        :, None
    ]
    return threshold_NC1.masked_fill(sampling.unfiltered_N[:, None, None], -torch.inf), settled_NC.all()


def _most_likely(scaled_NCV: Tensor, group: dist.ProcessGroup | None, count: int) -> Tensor:
    """The `count` largest values over all ranks, in falling order."""
    top_NCK = scaled_NCV.topk(min(count, scaled_NCV.shape[-1]), dim=-1).values
    if group is None:
        return top_NCK
    return _gather(top_NCK, group).sort(dim=-1, descending=True).values[..., :count]


def log_sum(scaled_NCV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over the ids of all ranks, [.., 1]."""
    local_NC1 = scaled_NCV.logsumexp(dim=-1, keepdim=True)
    return local_NC1 if group is None else _gather(local_NC1, group).logsumexp(dim=-1, keepdim=True)


def _gather(x_NCK: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x_NCK) for _ in range(group.size())]
    dist.all_gather(parts, x_NCK.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


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
