"""Rejection sampling against the exact joint distribution, and mixed verification, on a vocabulary of four text ids."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from tests import processes
from tests.test_decode import clean_rows, tiny_config
from tidar_mega import device
from tidar_mega.config import ParallelConfig, UserError
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh

PROMPT, LENGTH, SAMPLES = [2, 0, 1, 3, 3], 4, 6000


@dataclass(frozen=True)
class Four:
    vocab_size: int = 6
    eod: int = 3
    pad: int = 4
    mask: int = 5
    not_text: frozenset[int] = frozenset({4, 5})


def sharp_model() -> InferenceModel:
    """Every prefix has its own distribution, and the masks another one than AR."""
    (model,) = build(tiny_config(vocab_multiple=8), Four.vocab_size)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
        model.head_weight.mul_(0.25)
    return InferenceModel(model)


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    device.start_alone()
    build_mesh(tiny_config())
    return sharp_model()


@torch.no_grad()
def joint(model, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every continuation under AR sampling, in float64 and without any of the engine's parts."""
    found = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for done, p in found.items():
            rows = clean_rows(torch.tensor([[*PROMPT, *done]]))
            logits_V = model.logits(model(rows, TrainingAttention(rows, "dense"))[-1:, 0])[0, :4].double()
            probability_V = filtered((logits_V / params.temperature).softmax(dim=0), params)
            longer |= {(*done, i): p * float(probability_V[i]) for i in range(4) if probability_V[i] > 0}
        found = longer
    assert math.isclose(sum(found.values()), 1, rel_tol=1e-9)
    return found


def filtered(probability_V, params: SamplingParams):
    kept, left = torch.zeros(4, dtype=torch.bool), params.top_p
    for i in probability_V.argsort(descending=True)[: params.top_k or 4]:
        kept[i] = left > 0
        left -= float(probability_V[i])
    chosen = probability_V * kept
    return chosen / chosen.sum()


def sample(engine: Engine, params: SamplingParams, count: int = SAMPLES) -> list:
    own = [replace(params, seed=seed) for seed in range(count)]
    return engine.generate([PROMPT] * count, own)


def chi_square(generations, expected: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations the statistic is above its mean; rare continuations count as one."""
    seen = dict.fromkeys(expected, 0)
    for g in generations:
        seen[tuple(g.tokens)] += 1  # KeyError: a continuation that AR can never give
    common = [c for c, p in expected.items() if p * len(generations) >= 5]
    cells = [(seen[c], expected[c] * len(generations)) for c in common]
    rest = len(generations) - sum(s for s, _ in cells), len(generations) - sum(e for _, e in cells)
    cells += [rest] if rest[1] > 5 else []
    freedom = len(cells) - 1
    return (sum((s - e) ** 2 / e for s, e in cells) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("outcomes", ["all", "last", [1]])
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 3, 1.0), (1.0, 0, 0.85)], ids=["plain", "top-k", "top-p"]
)
def test_rejection_samples_the_exact_joint_distribution(model, outcomes, temperature, top_k, top_p):
    params = SamplingParams(LENGTH, temperature, top_k, top_p, stop_tokens=(), acceptance="rejection")
    found = sample(Engine(model, Four(), 3, 16, batch=64, outcomes=outcomes), params)
    accepted = [r for g in found for r in g.accepted]
    assert {1, 2, 3} <= set(accepted), "drafts must be kept wholly, in part and not at all"
    assert chi_square(found, joint(model, params)) < 4


def test_coupled_sampling_has_the_same_distribution_and_a_wrong_rule_is_found_out(model):
    params = SamplingParams(LENGTH, 1.0, stop_tokens=())
    expected = joint(model, params)
    coupled = sample(Engine(model, Four(), 3, 16, batch=64), params)
    assert chi_square(coupled, expected) < 4
    trusting = sample(Engine(model, Four(), 3, 16, batch=64), replace(params, beta=0.0))
    assert chi_square(trusting, expected) > 20, "the test must see a distribution that is not AR's"


def test_mixed_verification_is_said_not_to_be_exact(model):
    engine = Engine(model, Four(), 3, 16)
    params = SamplingParams(10, stop_tokens=(), beta=0.5)
    (found,) = engine.generate([PROMPT], params)
    (exact,) = engine.generate([PROMPT], replace(params, beta=1.0))
    assert exact.exact and not found.exact
    assert exact.tokens == engine.generate([PROMPT], replace(params, beta=1.0), "ar")[0].tokens
    for bad in (Engine(model, Four(), 3, 16, outcomes="last"), Engine(model, Four(), 1, 16)):
        with pytest.raises(UserError, match="mixed verification reads the masks behind every outcome"):
            bad.generate([PROMPT], params)
    with pytest.raises(UserError, match="mixed verification has no rejection"):
        replace(params, acceptance="rejection")
    with pytest.raises(UserError, match="acceptance = 'maybe': must be one of coupled, rejection"):
        replace(params, acceptance="maybe")
    with pytest.raises(UserError, match="beta = 1.5"):
        replace(params, beta=1.5)


@torch.no_grad()
def test_mixed_verification_mixes_the_logits_of_both_halves(model):
    """Each token against separate dense forwards: AR's row, and the first mask of a group behind the same tokens."""
    from tests.test_decode import concatenate_masks

    params = SamplingParams(9, stop_tokens=(), beta=0.3, logprobs=True)
    (found,) = Engine(model, Four(), 3, 16).generate([PROMPT], params)
    tokens, trusted_ar = list(PROMPT), []
    for token, logprob in zip(found.tokens, found.logprobs, strict=True):
        rows = concatenate_masks(torch.tensor(tokens), 3, Four.mask)
        logits_TV = model.logits(model(rows, TrainingAttention(rows, "dense"))[:, 0])[:, :4]
        ar_V, mask_V = logits_TV[len(tokens) - 1], logits_TV[len(tokens)]
        assert token == int((0.3 * ar_V + 0.7 * mask_V).argmax())
        trusted_ar.append(token == int(ar_V.argmax()))
        assert logprob == pytest.approx(float(ar_V.log_softmax(dim=0)[token]), abs=1e-5), "AR's own"
        tokens.append(token)
    assert not all(trusted_ar)


def _sample_in_parallel(rank: int, tensor: int, pipeline: int) -> list[list[int]]:
    config = tiny_config(vocab_multiple=8)
    config = replace(
        config,
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        model=replace(config.model, init_std=0.2),
    )
    build_mesh(config)
    (model,) = build(config, Four.vocab_size, training=False)
    params = SamplingParams(8, 1.0, top_p=0.95, stop_tokens=(), acceptance="rejection")
    return [g.tokens for g in sample(Engine(InferenceModel(model), Four(), 3, 16, batch=8), params, 40)]


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_parallel_ranks_reject_what_one_process_rejects(tensor, pipeline):
    (expected,) = processes.run(_sample_in_parallel, 1, 1, 1)
    assert len({*itertools.chain(*expected)}) == 4 and len({*map(tuple, expected)}) > 30
    assert processes.run(_sample_in_parallel, 2, tensor, pipeline) == [expected] * 2


@torch.no_grad()
def plain_blocks(model, prompt, length: int, slots: int, threshold: float) -> tuple[list[int], int]:
    """Block diffusion by dense forwards over the whole sequence; the tokens, and the forwards that drew them."""
    from tests.test_decode import concatenate_masks

    tokens, forwards = list(prompt), 0
    while len(tokens) < len(prompt) + length:
        block = [None] * slots
        while None in block:
            rows = concatenate_masks(torch.tensor(tokens), slots, Four.mask)
            token = rows.token.clone()
            for slot, drawn in enumerate(block):
                if drawn is not None:
                    token[0, len(tokens) + slot] = drawn
            hidden_TD = model(replace(rows, token=token), TrainingAttention(rows, "dense"))[:, 0]
            probability_S, choice_S = model.logits(hidden_TD[len(tokens) :])[:, :4].softmax(dim=-1).max(dim=-1)
            left = [s for s in range(slots) if block[s] is None]
            surest = max(left, key=lambda s, p=probability_S: float(p[s]))
            for s in left:
                if s == surest or probability_S[s] >= threshold:
                    block[s] = int(choice_S[s])
            forwards += 1
        tokens += block
    return tokens[len(prompt) :][:length], forwards


@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.6, 1.0])
def test_block_diffusion_is_that_of_dense_forwards(model, threshold):
    params = SamplingParams(11, stop_tokens=(), threshold=threshold)
    prompts = [PROMPT, PROMPT[:2], PROMPT * 3]
    found = Engine(model, Four(), 4, 64, prefill_chunk=6).generate(prompts, params, "blocks")
    for prompt, generation in zip(prompts, found, strict=True):
        tokens, forwards = plain_blocks(model, prompt, 11, 4, threshold)
        assert generation.tokens == tokens and generation.forwards == forwards and not generation.exact
        assert generation.tokens_per_forward == pytest.approx(len(tokens) / forwards)
    assert found[0].forwards == {0.05: 3, 1.0: 12}.get(threshold, found[0].forwards)


def test_block_diffusion_needs_blocks(model):
    with pytest.raises(UserError, match="mode = blocks: needs a block of 2 or more"):
        Engine(model, Four(), 1, 16).generate([PROMPT], SamplingParams(4), "blocks")
    with pytest.raises(UserError, match="threshold = 0"):
        SamplingParams(threshold=0)
