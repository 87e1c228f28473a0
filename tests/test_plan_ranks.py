"""`tidar plan` against two real ranks: what each holds, keeps and sends is counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import processes
from tests.test_plan import MASK, SHAPES, clean_rows, kept_bytes, last_norm, layout_of, settings, start
from tidar_mega import config as config_module
from tidar_mega.plan.communication import layer_context_bytes, layer_tensor_bytes
from tidar_mega.plan.memory import activation_bytes, layer_activations


class Sent(TorchDispatchMode):
    """Bytes that this rank sends through collectives, counted as rings."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ring, self.bytes = (ranks - 1) / ranks, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            largest = max(x.numel() * x.element_size() for x in tensors)
            self.bytes += (2 if "allreduce" in function.__name__ else 1) * self.ring * largest
        return function(*args, **(kwargs or {}))


def two_ranks(rank: int, cases: list[config_module.Config]) -> list[dict]:
    """For each config what this rank holds and, without a pipeline, what it keeps and sends."""
    measured = []
    for config in cases:
        chunks = start(config)[1]
        found = {"parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters())}
        if config.parallel.pipeline == 1:
            with pytest.MonkeyPatch.context() as patch:
                found["kept"] = kept_bytes(config, patch)
            found["sent"] = sent_bytes(config)
        measured.append(found)
    return measured


def sent_bytes(config: config_module.Config) -> float:
    """What one layer sends, as the difference of two models."""
    totals = []
    for layers in (1, 2):
        shallow = config_module.override(config, [f"model.num_layers={layers}"])
        totals.append(_sent_bytes(shallow))
    return totals[1] - totals[0]


def _sent_bytes(config: config_module.Config) -> float:
    from tidar_mega import methods
    from tidar_mega.model.attention import TrainingAttention
    from tidar_mega.parallel.context import split

    mesh, (model,) = start(config)
    rows = methods.load(config, MASK).training_rows(clean_rows(2), torch.arange(2))
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    part = split(rows, mesh.context, config.train.block, multiple)
    with Sent(2) as sent:
        model(rows=part.rows, context=TrainingAttention(part, "tiles")).sum().backward()
    return sent.bytes


LAYOUTS = {
    "tensor": ("wide heads", {"tensor": 2}),
    "tensor, sequence": ("wide heads", {"tensor": 2, "sequence": True}),
    "tensor, sequence, recompute": ("untied", {"tensor": 2, "sequence": True, "recompute": "full"}),
    "context": ("untied", {"context": 2}),
    "context, norms": ("q, k norms", {"context": 2}),
    "context, recompute": ("wide heads", {"context": 2, "recompute": "selective"}),
    "pipeline": ("tied", {"pipeline": 2}),
    "unlike stages": ("untied", {"pipeline": 2, "last_stage_layers": 1}),
    "interleaved": ("wide heads", {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.distributed
def test_a_rank_of_two_holds_keeps_and_sends_what_the_plan_says():
    cases = [settings({**SHAPES[shape], "num_layers": 4}, parallel) for shape, parallel in LAYOUTS.values()]
    ranks = processes.run(two_ranks, 2, cases)
    for i, config in enumerate(cases):
        layout, p = layout_of(config), config.parallel
        for stage, got in enumerate(ranks):
            assert got[i]["parameters"] == layout.parameters(stage if p.pipeline > 1 else 0), (p, stage)
        if p.pipeline > 1:
            continue
        kept = activation_bytes(layout, 0) + last_norm(layout)
        if p.recompute == "full":
            kept -= sum(layer_activations(layout).values())
        sent = layer_tensor_bytes(layout) if p.tensor > 1 else layer_context_bytes(layout)
        for got in ranks:
            assert got[i]["kept"] == pytest.approx(kept, rel=0.04), p  # token ids are not counted
            assert got[i]["sent"] == pytest.approx(sent, rel=0.02), p


@pytest.mark.parametrize("fp8", ["none", "blockwise", "mxfp8"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("context", [2, 4])
def test_a_context_rank_has_the_rows_that_the_plan_says(context, sequence, fraction, fp8):
    from tidar_mega import methods
    from tidar_mega.parallel.context import split

    parallel = {"context": context, "tensor": 2 if sequence else 1, "sequence": sequence}
    config = settings(parallel=parallel, draft_fraction=fraction)
    if fp8 != "none":
        config = config_module.override(config, [f"precision.fp8={fp8}", "model.ffn_hidden_size=192"])
    layout = layout_of(config)
    rows = methods.load(config, MASK).training_rows(clean_rows(1), torch.arange(1))
    group = SimpleNamespace(size=lambda: context, rank=lambda: 0)
    part = split(rows, group, config.train.block, config.row_multiple)
    assert (layout.rows, layout.keys) == (part.rows.shape[1], part.keys.shape[1])
