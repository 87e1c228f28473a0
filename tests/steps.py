"""One training step of a tiny model in a world of ranks, and how two of them are compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.plain_tidar import PlainTidar
from tidar_mega import config as config_module
from tidar_mega.rows import Rows

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
    norm = optim.update(optimizer, clip=0.0)
    assert math.isfinite(norm)
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


def one_steps(rank: int, configs: dict) -> dict:
    """One world for many: starting one takes longer than a step."""
    return {name: one_step(rank, config) for name, config in configs.items()}


def plain_step(weights: dict, config: config_module.Config):
    weights = {n: w.double().requires_grad_() for n, w in weights.items()}
    shape = config_module.to_tree(config)["model"]
    sequences = [text(i) for i in range(SEQUENCES)]
    losses = PlainTidar(weights, shape).loss(sequences, config.train.block, config.train.alpha, MASK)
    return losses, dict(zip(weights, torch.autograd.grad(losses[0], list(weights.values())), strict=True))


IN_TWO = {  # how two ranks may divide a step
    "data 2": {"data": 2},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "context 2": {"context": 2},
    "pipeline 2": {"pipeline": 2},
    "overlapped, data 2": {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_gradients(found: dict, loss: torch.Tensor, weights: dict) -> None:
    """`found` by name are those of `loss` with respect to `weights`, which it was computed from in float64."""
    assert found.keys() == weights.keys()
    for name, expected in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        assert error(found[name], expected) < 2e-5, name


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


def assert_same_step(
    results: list[dict], expected: dict, parallel: dict, join: Callable = full_gradient, tight: bool = False
) -> None:
    """The step of every rank is that of one process; the gradients, too, where each rank holds slices of them, and
    neither a part of the sum nor of the layers."""
    for got in results:
        for name, value in expected["figures"].items():
            assert got["figures"][name] == pytest.approx(value, rel=2e-6 if tight else 5e-6), name
        assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5 if tight else 2e-5)
    if parallel.get("tensor") and parallel.get("data", 1) == 1:
        for name, gradient in expected["gradients"].items():
            assert error(join(name, [r["gradients"][name] for r in results]), gradient) < 2e-5, name
