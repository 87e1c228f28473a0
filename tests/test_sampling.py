"""The noise is Gumbel and a pure function of (seed, order, id); choices follow softmax, top-k and top-p exactly.

Statistics are on fixed seeds, so a test that passes always passes; bounds are those of 5 standard deviations.
Shape suffixes: N requests, C places, V ids.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import processes
from tidar_mega.decode.sampling import Sampling, SamplingParams, choose, gumbel

WORD = 2**64


def splitmix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def plain_gumbel(seed: int, order: int, token: int) -> float:
    """The same definition in Python's integers and float64."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix((seed + golden) % WORD) + (order + 1) * golden) % WORD)
    bits = splitmix((key + (token + 1) * golden) % WORD) >> 24
    return -math.log(-math.log1p(-(bits + 0.5) / 2**40))


def noise(seeds, orders, first: int, count: int) -> torch.Tensor:
    return gumbel(torch.as_tensor(seeds)[:, None], torch.as_tensor(orders)[None], first, count)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6), st.integers(0, 200_000))
@settings(max_examples=200, deadline=None)
def test_noise_is_the_documented_function(seed, order, token):
    found = float(gumbel(torch.tensor(seed), torch.tensor(order), token, 1))
    expected = plain_gumbel(seed, order, token)
    exponential = math.exp(-expected)
    # u = 1 - exp(-E) has 24 bits: exact where the noise is large and can win, coarse in its lower tail
    tolerance = 1e-5 + 2.0**-23 * math.expm1(exponential) / exponential
    assert found == pytest.approx(expected, rel=1e-5, abs=min(tolerance, 1.0))
    assert tolerance < 2e-5 or expected < 1


def test_noise_is_gumbel_distributed():
    """Kolmogorov-Smirnov against the float64 distribution function, and mean, variance and both tails."""
    x = noise([5], range(250), 0, 4096).double().flatten().sort().values
    n = len(x)
    cdf = torch.exp(-torch.exp(-x))
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - rank[:-1]).abs().max(), (cdf - rank[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in 1000
    assert x.mean().item() == pytest.approx(0.5772156649, abs=5 * math.sqrt(1.6449 / n))
    assert x.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.isfinite(x).all() and x[-1] > math.log(n) - 3 and x[0] < -math.log(math.log(n)) + 0.5


@pytest.mark.parametrize(
    "other",
    [
        lambda: noise(range(64), range(64), 1, 256),  # the next id
        lambda: noise(range(64), range(1, 65), 0, 256),  # the next order
        lambda: noise(range(1, 65), range(64), 0, 256),  # the next seed
        lambda: noise(range(64), range(64), 0, 256).transpose(0, 1),  # seed and order in each other's place
        lambda: noise([-s - 1 for s in range(64)], range(64), 0, 256),
        lambda: noise([s + 2**32 for s in range(64)], range(64), 0, 256),
    ],
)
def test_noise_is_independent_over_seed_order_and_id(other):
    """Chi-square of the joint counts in 8 x 8 quantile cells."""
    a, b = noise(range(64), range(64), 0, 256), other()
    differs = a != b  # a transposed diagonal is the same noise, rightly
    cell_a, cell_b = (torch.exp(-torch.exp(-x[differs].double())).mul(8).long().clamp(max=7) for x in (a, b))
    count = torch.bincount(cell_a * 8 + cell_b, minlength=64).double()
    expected = count.sum() / 64
    assert differs.double().mean() > 0.98
    assert ((count - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_noise_of_a_slice_is_the_slice_of_the_noise():
    whole = noise([1, -7], [0, 5, 9], 0, 1000)
    torch.testing.assert_close(noise([1, -7], [0, 5, 9], 300, 200), whole[..., 300:500], rtol=0, atol=0)


def kept_ids(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Plain reference: the ids that the filters keep, and their probabilities."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weight = {i: math.exp((logits[i] - max(logits)) / temperature) for i in ranked}
    total, mass, kept = sum(weight.values()), 0.0, {}
    for i in ranked:
        if mass >= top_p:
            break
        kept[i] = weight[i]
        mass += weight[i] / total
    return {i: w / sum(kept.values()) for i, w in kept.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.9), (0, 0.3), (12, 0.8), (1000, 0.999)])
def test_frequencies_are_those_of_the_filtered_softmax(temperature, top_k, top_p):
    draws, vocab = 40_000, 40
    logits_V = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    sampling = Sampling.of([params], [], vocab)
    ids = choose(logits_V.expand(1, draws, vocab).clone(), torch.arange(draws)[None], sampling)[0]
    count = torch.bincount(ids, minlength=vocab).tolist()
    reference = kept_ids(logits_V.tolist(), temperature, top_k, top_p)
    assert {i for i, c in enumerate(count) if c} <= set(reference)
    statistic = sum((count[i] - draws * p) ** 2 / (draws * p) for i, p in reference.items())
    freedom = len(reference) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@given(st.integers(0, 10**6), st.integers(0, 40), st.floats(0.05, 1.0), st.floats(0.3, 3.0))
@settings(max_examples=100, deadline=None)
def test_filters_keep_exactly_the_reference_ids(seed, top_k, top_p, temperature):
    """With flat logits inside the filters, every kept id appears among enough draws, and no other."""
    logits_V = torch.randn(24, generator=torch.Generator().manual_seed(seed)) / 2
    sampling = Sampling.of([SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)], [], 24)
    ids = choose(logits_V.expand(1, 4000, 24).clone(), torch.arange(4000)[None], sampling)
    reference = kept_ids(logits_V.tolist(), temperature, top_k, top_p)
    found = set(ids.unique().tolist())
    close = {i for i, p in reference.items() if p < 0.004}  # too rare to be certain of
    assert found <= set(reference)
    assert set(reference) - close <= found


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1), SamplingParams(temperature=2, top_p=0.5)]
)
def test_ids_that_are_no_text_are_never_chosen(params):
    logits = torch.full((1, 500, 16), -30.0)
    logits[..., [3, 14, 15]] = 50.0
    ids = choose(logits, torch.arange(500)[None], Sampling.of([params], [3, 14, 15], 16))
    assert not set(ids.unique().tolist()) & {3, 14, 15}


def test_a_mixed_batch_chooses_as_each_request_alone():
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.3, top_k=7, seed=2),
        SamplingParams(temperature=1, top_p=0.6, seed=2),
        SamplingParams(temperature=1, top_k=50, top_p=0.95, seed=-4),
        SamplingParams(top_k=2, top_p=0.1),
    ]
    logits = 3 * torch.randn(6, 9, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randint(1000, (6, 9), generator=torch.Generator().manual_seed(1))
    together = choose(logits.clone(), order, Sampling.of(params, [0, 63], 64))
    for n, p in enumerate(params):
        alone = choose(logits[n : n + 1].clone(), order[n : n + 1], Sampling.of([p], [0, 63], 64))
        assert torch.equal(alone[0], together[n])
    assert torch.equal(together[0], logits[0, :, 1:63].argmax(dim=-1) + 1)


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 4.0, 10.0])
def test_looking_at_few_ids_first_changes_nothing(sharpness):
    """Flat and peaked rows, alone and beside each other, in a vocabulary much larger than FEW."""
    params = [SamplingParams(temperature=1, top_p=p, top_k=k, seed=1) for p in (0.3, 0.95, 1) for k in (0, 40)]
    logits = sharpness * torch.randn(6, 7, 2000, generator=torch.Generator().manual_seed(0))
    order = torch.arange(42).view(6, 7)
    sampling = Sampling.of(params, [], 2000)
    assert sampling.try_few
    found = choose(logits.clone(), order, sampling)
    assert torch.equal(found, choose(logits.clone(), order, replace(sampling, try_few=False)))
    for n, p in enumerate(params):
        for c in range(7):
            alone = choose(
                logits[n : n + 1, c : c + 1].clone(), order[n : n + 1, c : c + 1], Sampling.of([p], [], 2000)
            )
            assert alone == found[n, c] and int(alone) in kept_ids(logits[n, c].tolist(), 1.0, p.top_k, p.top_p)


def test_a_choice_depends_on_nothing_but_logits_place_and_seed():
    logits = torch.randn(1, 1, 50)
    sampling = Sampling.of([SamplingParams(temperature=1, seed=3)], [], 50)
    torch.manual_seed(0)
    first = choose(logits.clone(), torch.tensor([[17]]), sampling)
    torch.manual_seed(1)
    assert torch.equal(first, choose(logits.clone(), torch.tensor([[17]]), sampling))


def test_requests_get_seeds_of_their_own_that_stay_64_bits():
    seeds = [SamplingParams(seed=2**63 - 2).for_request(i).seed for i in range(4)]
    assert len(set(seeds)) == 4 and all(-(2**63) <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"max_tokens": 0},
        {"max_tokens": 64.0},
        {"top_k": 2.5},
        {"seed": 2**63},
        {"seed": 1.5},
    ],
)
def test_impossible_parameters_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*: must be"):
        SamplingParams(**bad)


def _choose_slices(rank: int, whole, order, all_params) -> list[torch.Tensor]:
    found = []
    for params in all_params:
        sampling = Sampling.of(params, [1, 40, 61], 32, group=dist.group.WORLD)
        found.append(choose(whole[..., 32 * rank : 32 * rank + 32].clone(), order, sampling))
    return found


@pytest.mark.distributed
def test_ranks_that_hold_slices_choose_as_one_that_holds_all():
    whole = 2 * torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    order = torch.arange(150).view(3, 50)
    kinds = [{}, {"temperature": 1}, {"temperature": 1, "top_k": 5}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}]
    all_params = [[SamplingParams(**kind, seed=s) for s in range(3)] for kind in kinds]
    expected = [choose(whole.clone(), order, Sampling.of(params, [1, 40, 61], 64)) for params in all_params]
    for found in processes.run(_choose_slices, 2, whole, order, all_params):
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
