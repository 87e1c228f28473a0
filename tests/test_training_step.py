"""One training step of the megatron model against the independent plain model, and every layout against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import processes
from tests.plain_tidar import PlainTidar
from tidar_mega import config as config_module
from tidar_mega.rows import PADDING, Rows, concatenate

VOCAB, MASK, LENGTH, SEQUENCES = 61, 60, 32, 4
TOKEN_BYTES = torch.arange(VOCAB) % 4.0
SETTINGS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "qk_layernorm": True,
        "vocab_multiple": 4,
        "init_std": 0.2,
    },
    "data": {"seq_length": LENGTH},
    "train": {"block": 4, "alpha": 0.5, "global_batch_size": SEQUENCES, "micro_batch_size": 2, "loss_chunk": 24},
    "precision": {"dtype": "fp32"},
}


def settings(**sections) -> config_module.Config:
    tree = {**SETTINGS, **{k: {**SETTINGS.get(k, {}), **v} for k, v in sections.items()}}
    return config_module.from_tree(tree)


def text(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, document) [LENGTH + 1] of documents of mixed lengths."""
    draw = torch.Generator().manual_seed(sequence)
    token = torch.randint(MASK, (LENGTH + 1,), generator=draw)
    cuts = (torch.rand(LENGTH + 1, generator=draw) < 0.1).long()
    return token, cuts.cumsum(0)


def clean_rows(sequence: int) -> Rows:
    token, document = text(sequence)
    order = torch.zeros(LENGTH, dtype=torch.int64)
    for i in range(1, LENGTH):
        order[i] = order[i - 1] + 1 if document[i] == document[i - 1] else 0
    weight = (document[1:] == document[:-1]).float()
    zero = torch.zeros_like(order)
    rows = Rows(token[:-1], order, order, order + 1, zero, document[:-1], token[1:], weight)
    return rows.map(lambda x: x[None])


class Text:
    """Just enough of a data stream for a step: rows by global index."""

    @staticmethod
    def rows(index: int) -> Rows:
        return clean_rows(index)


def one_step(rank: int, config: config_module.Config) -> dict:
    """Loss figures, gradient norm and the full gradient of every weight after one forward and backward."""
    from tidar_mega import methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    mesh = build_mesh(config)
    method = methods.load(config, MASK)
    (model,) = optim.wrap(config, gpt.build(config, VOCAB))
    weights = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    optimizer = optim.build_optimizer(config, [model])
    task = Task(config, mesh, method, [model], TOKEN_BYTES)
    sums = accumulate_gradients(task, list(micro_batches(task, Text, 0, SEQUENCES)))
    gradients = {n: p.main_grad.clone() for n, p in model.module.named_parameters()}
    norm, applied = optim.update(optimizer, clip=0.0)
    assert applied
    if config.parallel.overlap_param_gather:  # else the next forward gathers
        model.start_param_sync(force_sync=True)
    after = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    return {
        "figures": summarise(task, sums),
        "norm": norm,
        "gradients": gradients,
        "weights": weights,
        "after": after,
        "tensor_rank": dist.get_rank(mesh.tensor),
    }


def plain_step(weights: dict, config: config_module.Config):
    weights = {n: w.double().requires_grad_() for n, w in weights.items()}
    shape = config_module.to_tree(config)["model"]
    sequences = [text(i) for i in range(SEQUENCES)]
    losses = PlainTidar(weights, shape).loss(sequences, config.train.block, config.train.alpha, MASK)
    return losses, dict(zip(weights, torch.autograd.grad(losses[0], list(weights.values())), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_a_step_equals_the_plain_model(backend, tie):
    config = settings(model={"attention": backend, "tie_embeddings": tie})
    (got,) = processes.run(one_step, 1, config)
    (loss, ar, draft), gradients = plain_step(got["weights"], config)
    assert got["figures"]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert got["figures"]["loss_ar"] == pytest.approx(float(ar), rel=1e-6)
    assert got["figures"]["loss_draft"] == pytest.approx(float(draft), rel=1e-6)
    labels = torch.cat([token[1:][document[1:] == document[:-1]] for token, document in map(text, range(SEQUENCES))])
    nats_per_byte = float(ar) * len(labels) / float(TOKEN_BYTES[labels].sum())
    assert got["figures"]["nats_per_byte"] == pytest.approx(nats_per_byte, rel=1e-6)
    assert gradients.keys() == got["gradients"].keys()
    for name, expected in gradients.items():
        error = (got["gradients"][name] - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"{name}: {error}"
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert got["norm"] == pytest.approx(float(norm), rel=1e-5)


def full_gradient(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Joins the tensor-parallel slices of a weight."""
    if "linear_fc1" in name:  # [gate; up] per rank
        halves = [p.chunk(2) for p in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    if any(
        part in name for part in ("linear_qkv", "word_embeddings", "output_layer", "causal_input.tokens", "eh_proj")
    ):
        return torch.cat(parts)
    if "linear_proj" in name or "linear_fc2" in name:
        return torch.cat(parts, dim=1)
    return parts[0]


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
    for got in results:
        for name, value in expected["figures"].items():
            assert got["figures"][name] == pytest.approx(value, rel=2e-6), name
        assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    if parallel.get("data", 1) == 1:  # else each rank holds a part of the sum
        for name, gradient in expected["gradients"].items():
            joined = full_gradient(name, [r["gradients"][name] for r in results])
            assert (joined - gradient).abs().max() / gradient.abs().max() < 2e-5, name
    slices = results[: parallel.get("tensor", 1)]
    for name, weight in expected["weights"].items():
        assert torch.equal(full_gradient(name, [r["weights"][name] for r in slices]), weight), name
        moved = expected["after"][name] - weight
        after = full_gradient(name, [r["after"][name] for r in slices])
        # Adam's first step is the sign of the gradient, which rounding may turn where the gradient is almost zero
        assert ((after - expected["after"][name]).abs() > 1e-3 * moved.abs().max()).float().mean() < 2e-3, name


def test_padding_documents_are_unlike_any_other():
    assert int(concatenate([clean_rows(0), clean_rows(1)], 0).document.min()) > PADDING
