"""One training step of the megatron model against the independent plain model, and every layout against one process."""

from __future__ import annotations

import pytest
import torch

from tests import processes
from tests.steps import (
    SEQUENCES,
    TOKEN_BYTES,
    assert_same_step,
    clean_rows,
    error,
    full_gradient,
    one_step,
    plain_step,
    settings,
    text,
)
from tidar_mega.rows import PADDING, concatenate


@pytest.mark.distributed
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_a_step_equals_the_plain_model(backend, tie):
    config = settings(model={"attention": backend, "tie_embeddings": tie})
    (got,) = processes.run(one_step, 1, config)
    (loss, ar, draft), gradients = plain_step(got["weights"], config)
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert got["figures"]["loss_ar"] == pytest.approx(ar.item(), rel=1e-6)
    assert got["figures"]["loss_draft"] == pytest.approx(draft.item(), rel=1e-6)
    labels = torch.cat([token[1:][document[1:] == document[:-1]] for token, document in map(text, range(SEQUENCES))])
    nats_per_byte = ar.item() * len(labels) / float(TOKEN_BYTES[labels].sum())
    assert got["figures"]["nats_per_byte"] == pytest.approx(nats_per_byte, rel=1e-6)
    assert gradients.keys() == got["gradients"].keys()
    for name, expected in gradients.items():
        assert error(got["gradients"][name], expected) < 2e-5, name
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert got["norm"] == pytest.approx(float(norm), rel=1e-5)


LAYOUTS = {
    "data 2": (2, {"data": 2}),
    "data 2, plain optimizer": (2, {"data": 2, "distributed_optimizer": False}),
    "data 2, overlapped": (2, {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "tensor 2, data 2": (4, {"tensor": 2, "data": 2}),
}


@pytest.fixture(scope="module")
def single() -> dict:
    """One process, for draft_fraction 1 and 0.5 with random offsets."""
    return {f: processes.run(one_step, 1, settings(train=drafting(f)))[0] for f in (1.0, 0.5)}


def drafting(fraction: float) -> dict:
    return {"draft_fraction": fraction, "random_offset": fraction < 1, "micro_batch_size": 1}


@pytest.mark.distributed
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout, fraction, single):
    count, parallel = LAYOUTS[layout]
    results = processes.run(one_step, count, settings(train=drafting(fraction), parallel=parallel))
    expected = single[fraction]
    assert_same_step(results, expected, parallel, tight=True)
    slices = results[: parallel.get("tensor", 1)]
    for name, weight in expected["weights"].items():
        assert torch.equal(full_gradient(name, [r["weights"][name] for r in slices]), weight), name
        moved = expected["after"][name] - weight
        after = full_gradient(name, [r["after"][name] for r in slices])
        # Adam's first step is the sign of the gradient, which rounding may turn where the gradient is almost zero
        assert ((after - expected["after"][name]).abs() > 1e-3 * moved.abs().max()).float().mean() < 2e-3, name


def test_padding_documents_are_unlike_any_other():
    assert int(concatenate([clean_rows(0), clean_rows(1)], 0).document.min()) > PADDING
