"""The left-to-right losses of drafts (arXiv 2606.11552): against autograd and plain loops in float64, in a whole step,
and under every way of dividing the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.steps import (
    IN_TWO,
    MASK,
    SEQUENCES,
    assert_gradients,
    assert_same_step,
    clean_rows,
    one_step,
    one_steps,
    settings,
    text,
)
from tidar_mega import config as config_module
from tidar_mega.config import ConfigError
from tidar_mega.losses import DraftTerms, cross_entropy, of_drafts
from tidar_mega.methods.tidar import mask_rows
from tidar_mega.rows import concatenate

ALL = {"position_weight": 0.7, "position_gamma": 2.0, "focal_weight": 0.3, "chain_weight": 0.4}


def drafts_of(lengths: list[int], seed: int):
    """Random cross entropies and verdicts of drafts of some lengths: (loss, right, draft, slot) of their rows."""
    draw = torch.Generator().manual_seed(seed)
    loss = -torch.rand(sum(lengths), generator=draw, dtype=torch.float64).log()
    right = torch.rand(sum(lengths), generator=draw) < 0.6
    draft = torch.tensor([g for g, n in enumerate(lengths) for _ in range(n)])
    return loss, right, draft, torch.tensor([k for n in lengths for k in range(n)])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 1), st.integers(0, 1000))
@hypothesis_settings(deadline=None)
def test_the_terms_and_their_derivatives(lengths, first, seed):
    loss, right, draft, slot = drafts_of(lengths, seed)
    found = of_drafts(loss, right, draft, slot, first)
    log_q = (-loss).requires_grad_()
    values = log_q.detach()
    for g, length in enumerate(lengths):
        own, ok = values[draft == g], right[draft == g]
        expected = [own[first : k + 1].sum().exp() for k in range(first, length)]  # prod_{first <= j <= k} q_j
        assert float(found.length_G[g]) == pytest.approx(float(sum(expected)))
        wrong = [k for k in range(first, length) if not ok[k]]
        assert float(found.focal_G[g]) == pytest.approx(float(-own[wrong[0]]) if wrong else 0.0)
        assert found.focal_M[draft == g].nonzero().flatten().tolist() == wrong[:1]
        for j in range(first, length):  # d E / d log q_j = sum_{k >= j} prod_{i <= k} q_i
            assert float(found.chain_M[draft == g][j]) == pytest.approx(float(sum(expected[j - first :])))
        if expected:
            length = sum(log_q[draft == g][first : k + 1].sum().exp() for k in range(first, length))
            (gradient,) = torch.autograd.grad(length, log_q)
            torch.testing.assert_close(found.chain_M[draft == g], gradient[draft == g])


def plain_loss(weights: dict, config: config_module.Config) -> dict[str, torch.Tensor]:
    """Every term by loops over the blocks."""
    t, shape = config.train, config_module.to_tree(config)["model"]
    ar, drafts = PlainTidar(weights, shape).losses([text(i) for i in range(SEQUENCES)], t.block, MASK)
    slots = [(k, ce[k]) for ce, _ in drafts for k in range(len(ce))]
    shares = [torch.tensor(-k / t.position_gamma).exp() for k, _ in slots]
    position = sum(w * ce for w, (_, ce) in zip(shares, slots, strict=True)) / sum(shares)
    focal, chain, count = 0.0, 0.0, 0
    for ce, right in drafts:
        count += len(ce) > 1
        wrong = [k for k in range(1, len(ce)) if not right[k]]
        focal = focal + (ce[wrong[0]] if wrong else 0.0)
        chain = chain - sum((-ce[1 : k + 1].sum()).exp() for k in range(1, len(ce)))
    terms = {"ar": ar.mean(), "draft": torch.cat([ce for ce, _ in drafts]).mean(), "position": position}
    return terms | {"focal": focal / count, "chain": chain / count}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kept", [tuple(ALL), ("position_weight", "position_gamma"), ("focal_weight",), ("chain_weight",)]
)
def test_a_step_equals_the_plain_model(kept):
    given_ = {key: ALL[key] for key in kept}
    config = settings(train=given_)
    (got,) = processes.run(one_step, 1, config)
    weights = {n: w.double().requires_grad_() for n, w in got["weights"].items()}
    terms, t = plain_loss(weights, config), config.train
    loss = (t.alpha * terms["ar"] + terms["draft"]) / (1 + t.alpha)
    for name in ("position", "focal", "chain"):
        loss = loss + getattr(t, f"{name}_weight") * terms[name]
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name in kept:
        if name.endswith("_weight"):
            term = name.removesuffix("_weight")
            assert got["figures"][f"loss_{term}"] == pytest.approx(terms[term].item(), rel=1e-5)
    assert_gradients(got["gradients"], loss, weights)


@pytest.fixture(scope="module")
def alone() -> dict:
    return processes.run(one_steps, 1, {offset: divided(offset) for offset in (False, True)})[0]


@pytest.fixture(scope="module")
def in_layouts() -> list[dict]:
    pairs = [(layout, offset) for layout in IN_TWO for offset in (False, True)]
    return processes.run(one_steps, 2, {(layout, o): divided(o, **IN_TWO[layout]) for layout, o in pairs})


def divided(offset: bool, **parallel) -> config_module.Config:
    train = ALL | {"micro_batch_size": 1, "random_offset": offset, "draft_fraction": 0.5 if offset else 1.0}
    return settings(train=train, parallel=parallel)


@pytest.mark.distributed
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("layout", IN_TWO)
def test_every_layout_equals_one_process(layout, offset, alone, in_layouts):
    assert_same_step([result[layout, offset] for result in in_layouts], alone[offset], IN_TWO[layout])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_of_the_head_cut_no_draft(chunk):
    clean = concatenate([clean_rows(0), clean_rows(1)], dim=0)
    rows = concatenate([clean, mask_rows(clean, MASK, 4, torch.tensor([0, 3]))], dim=1)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows.shape[1], 2, 8, generator=draw, dtype=torch.float64).requires_grad_()
    head = torch.randn(MASK + 1, 8, generator=draw, dtype=torch.float64).requires_grad_()
    terms = DraftTerms(0.3, 0.4, first=1)
    whole, cut = (cross_entropy(hidden, head, rows, None, size, terms).total for size in (10**6, chunk))
    plain = cross_entropy(hidden, head, rows, None, chunk).total
    assert float(cut) == pytest.approx(float(whole)) and float(cut) != pytest.approx(float(plain))
    for a, b in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (whole, cut)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # logits are float32 in the head


def test_what_drafts_nothing_has_no_such_losses():
    with pytest.raises(ConfigError, match=r"train.chain_weight = 0.1: must be 0 with method = ar"):
        config_module.from_tree({"method": "ar", "train": {"chain_weight": 0.1}})
    with pytest.raises(ConfigError, match=r"train.focal_weight = -1.0: must be a number of 0 or more"):
        config_module.from_tree({"train": {"focal_weight": -1.0}})
