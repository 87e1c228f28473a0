"""`tidar plan` against the real model, whose parameters, kept activations and operations are counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tidar_mega import config as config_module
from tidar_mega.plan.layout import Layout, make_layout
from tidar_mega.plan.memory import activation_bytes, in_flight, layer_activations, stage_memory
from tidar_mega.plan.parameters import head_parameters, total_parameters
from tidar_mega.plan.timing import bubble_fraction
from tidar_mega.plan.work import sequence_work, training_flops

VOCAB, MASK, LENGTH = 500, 499, 256
SHAPE = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 8, "num_query_groups": 4}
SHAPES = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "q, k, v biases": {"add_qkv_bias": True, "tie_embeddings": True},
    "q, k norms": {"qk_layernorm": True},
    "wide heads": {"kv_channels": 24, "qk_layernorm": True, "add_qkv_bias": True, "vocab_multiple": 96},
}


def settings(model: dict | None = None, parallel: dict | None = None, **train) -> config_module.Config:
    return config_module.from_tree(
        {
            "model": {**SHAPE, **(model or {})},
            "data": {"seq_length": LENGTH},
            "train": {"block": 4, "micro_batch_size": 2, "global_batch_size": 8, **train},
            "parallel": parallel or {},
        }
    )


def layout_of(config: config_module.Config) -> Layout:
    return make_layout(config, VOCAB, config.parallel.model_size)


def clean_rows(sequences: int):
    from tidar_mega.rows import Rows

    order = torch.arange(LENGTH).expand(sequences, LENGTH)
    token = (order * 7 + torch.arange(sequences)[:, None]) % MASK
    zero = torch.zeros_like(order)
    return Rows(token, order, order, order + 1, zero, zero, token, torch.ones_like(order).float())


def start(config: config_module.Config):
    """A world of this process, or the one it is in, and this rank's chunks of the model."""
    from tidar_mega import device
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh

    device.start_alone()
    mesh = build_mesh(config)
    return mesh, gpt.build(config, VOCAB)


# parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = settings(SHAPES[shape])
    (model,) = start(config)[1]
    counted = sum(p.numel() for p in model.parameters())
    assert layout_of(config).parameters(0) == counted
    assert total_parameters(config, layout_of(config).vocab) == counted


PUBLISHED = {  # of the safetensors files on Hugging Face; the millions without embeddings of the model cards
    "configs/tidar_1.5b.yaml": (151936, 1_543_714_304, 1310),
    "configs/tidar_8b.yaml": (151936, 8_190_735_360, 6950),
    "configs/tidar_70b.yaml": (152064, 72_706_203_648, 70000),
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_parameters_of_the_configs_are_the_published_ones(path):
    vocab, total, without = PUBLISHED[path]
    config = config_module.load(Path(__file__).parent.parent / path)
    assert total_parameters(config, vocab) == total
    tables = (1 if config.model.tie_embeddings else 2) * head_parameters(config, vocab)
    assert (total - tables) / 1e6 == pytest.approx(without, rel=0.01)


# activations


class KernelNorm(torch.autograd.Function):
    """RMSNorm that keeps what a GPU's kernel keeps: its input and one float32 for each row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[1]), None


def kept_bytes(config: config_module.Config, monkeypatch: pytest.MonkeyPatch, attention=None) -> int:
    """Bytes of all storages that one forward keeps for its backward, weights left out; kernels as on a GPU.

    `attention` makes the context of a method with several rows for each place from its whole rows.
    """
    from tidar_mega import methods
    from tidar_mega.model import spec
    from tidar_mega.model.attention import TrainingAttention
    from tidar_mega.parallel.context import split, whole

    monkeypatch.setattr(spec, "has_cuda", lambda: True)  # megatron's fused SwiGLU
    monkeypatch.setattr(spec.Norm, "forward", lambda self, x: KernelNorm.apply(x, self.weight, self.eps))
    mesh, (model,) = start(config)
    rows = methods.load(config, MASK).training_rows(clean_rows(config.train.micro_batch_size), torch.arange(2))
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    part = whole(rows) if attention else split(rows, mesh.context, config.train.block, multiple)
    context = attention(part) if attention else TrainingAttention(part, "tiles")
    attend = context.attend
    context.attend = lambda *args: attend(*args).clone()  # as flex, whose output is put into the order of the rows
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # x lives, so its place is not reused
        return x

    uncompiled = torch._dynamo.config.patch(disable=True)
    with uncompiled, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(rows=part.rows, context=context)
    return sum(size for place, (size, _) in kept.items() if place not in weights)


def last_norm(layout: Layout) -> float:
    """Bytes that the norm before the head keeps, which the plan counts with the head's hidden states."""
    return 2 * layout.batch_rows * layout.config.model.hidden_size / layout.residual_split


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_a_forward_keeps(shape, recompute, monkeypatch):
    config = settings(SHAPES[shape], {"recompute": recompute})
    layout = layout_of(config)
    estimate = activation_bytes(layout, stage=0)
    if recompute == "full":  # the layer that is made again is not there yet after a forward
        estimate -= sum(layer_activations(layout).values())
    assert kept_bytes(config, monkeypatch) == pytest.approx(estimate + last_norm(layout), rel=0.03)


def test_activations_of_depths_are_what_a_forward_keeps(monkeypatch):
    from tidar_mega.model.multi_token import MultiTokenAttention

    for depths in (1, 3):
        config = config_module.override(settings(), ["method=mtp", f"model.mtp_num_layers={depths}"])
        attention, layout = partial(MultiTokenAttention, backend="tiles", depths=depths), layout_of(config)
        estimate = activation_bytes(layout, stage=0) + last_norm(layout)
        assert kept_bytes(config, monkeypatch, attention) == pytest.approx(estimate, rel=0.03)


def test_activations_of_a_causal_layer_are_what_a_forward_keeps(monkeypatch):
    from tidar_mega.model.any_order import AnyOrderAttention

    config = config_module.override(settings(), ["method=ssmd"])
    layout = layout_of(config)
    estimate = activation_bytes(layout, stage=0) + last_norm(layout)
    estimate += config.train.micro_batch_size * 2 * LENGTH**2  # a mask in bfloat16, which no GPU needs
    kept = kept_bytes(config, monkeypatch, partial(AnyOrderAttention, backend="tiles"))
    assert kept == pytest.approx(estimate, rel=0.03)


def test_recomputation_keeps_less():
    kept = [activation_bytes(layout_of(settings(parallel={"recompute": kind})), 0) for kind in ("none", "selective")]
    assert kept[1] < kept[0]
    deep = {"num_layers": 24}
    kept = [activation_bytes(layout_of(settings(deep, {"recompute": k})), 0) for k in ("none", "full")]
    assert kept[1] < 0.15 * kept[0]


# operations


def test_operations_are_those_that_torch_counts():
    """With the dense mask, every pair is computed: torch must count what the formula says for all pairs, both ways."""
    from tidar_mega import methods
    from tidar_mega.losses import cross_entropy
    from tidar_mega.model.attention import TrainingAttention

    config = settings({"attention": "dense"})
    _, (model,) = start(config)
    rows = methods.load(config, MASK).training_rows(clean_rows(2), torch.arange(2))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        hidden = model(rows=rows, context=TrainingAttention(rows, "dense"))
        cross_entropy(hidden, model.head_weight, rows, None, 64).total.backward()
    B, T = rows.shape
    work = sequence_work(config)
    assert (work.rows, work.head_rows) == (T, int((rows.weight > 0).sum()) // B)
    expected = training_flops(config, layout_of(config).vocab, B * T, B * T * T, B * work.head_rows)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("block", [4, 16])
def test_pairs_are_those_of_the_mask_and_of_its_tiles(block, fraction):
    from tidar_mega import methods
    from tidar_mega.model.attention import TrainingAttention
    from tidar_mega.rows import visible_pairs

    config = settings(block=block, draft_fraction=fraction)
    count = 64 if fraction < 1 else 1  # blocks are drawn at random, and the formula is their mean
    rows = methods.load(config, MASK).training_rows(clean_rows(count), torch.arange(count))
    work = sequence_work(config)
    assert rows.shape[1] == work.rows == LENGTH + config.drafted_rows
    assert visible_pairs(rows) / count == pytest.approx(work.pairs, rel=0.02 if fraction < 1 else 1e-9)
    if fraction == 1:
        mask = TrainingAttention(rows, "flex").block_mask
        tiles = int(mask.kv_num_blocks.sum()) + int(mask.full_kv_num_blocks.sum())
        assert work.tile_pairs == tiles * 128**2


def test_an_autoregressive_model_has_no_mask_rows():
    config = config_module.override(settings(), ["method=ar"])
    work = sequence_work(config)
    assert (work.rows, work.pairs) == (LENGTH, LENGTH * (LENGTH + 1) / 2)


def test_masked_diffusion_and_its_causal_block_are_counted():
    """Parameters and operations of the real model; a dense mask computes all pairs of the causal block, too."""
    from tidar_mega import methods
    from tidar_mega.losses import cross_entropy
    from tidar_mega.model.any_order import AnyOrderAttention
    from tidar_mega.parallel.context import whole
    from tidar_mega.plan.work import attention_flops
    from tidar_mega.rows import visible_pairs

    config = config_module.override(settings({"attention": "dense"}), ["method=ssmd"])
    _, (model,) = start(config)
    vocab, count = layout_of(config).vocab, 64
    counted = sum(p.numel() for p in model.parameters())
    assert layout_of(config).parameters(0) == total_parameters(config, vocab) == counted
    rows = methods.load(config, MASK).training_rows(clean_rows(count), torch.arange(count))
    work, pairs = sequence_work(config), visible_pairs(rows) / count
    assert (rows.shape[1], pairs) == (work.rows, work.pairs)
    assert int((rows.weight > 0).sum()) / count == pytest.approx(work.head_rows, rel=0.1)  # the mean of the draws
    one = rows.select(slice(0, 1))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        hidden = model(rows=one, context=AnyOrderAttention(whole(one), "dense"))
        cross_entropy(hidden, model.head_weight, one, None, 64).total.backward()
    expected = training_flops(config, vocab, work.rows, pairs, int((one.weight > 0).sum()))
    in_vain = 3 * attention_flops(config, LENGTH**2 - LENGTH * (LENGTH + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(expected + in_vain, rel=1e-9)


@pytest.mark.parametrize("tie", [False, True])
def test_multi_token_prediction_is_counted(tie):
    """Parameters and operations of the real model; a dense mask computes all pairs."""
    from tidar_mega import methods
    from tidar_mega.losses import cross_entropy
    from tidar_mega.model.multi_token import MultiTokenAttention
    from tidar_mega.parallel.context import whole
    from tidar_mega.plan.work import attention_flops
    from tidar_mega.rows import visible_pairs

    shape = {"attention": "dense", "tie_embeddings": tie}
    config = config_module.override(settings(shape), ["method=mtp", "model.mtp_num_layers=2"])
    _, (model,) = start(config)
    vocab, layers = layout_of(config).vocab, config.model.num_layers + 2
    counted = sum(p.numel() for p in model.parameters())
    assert layout_of(config).parameters(0) == total_parameters(config, vocab) == counted
    rows = methods.load(config, MASK).training_rows(clean_rows(1), torch.arange(1))
    work = sequence_work(config)
    assert (rows.shape[1], visible_pairs(rows)) == (work.rows, work.pairs)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        hidden = model(rows=rows, context=MultiTokenAttention(whole(rows), "dense", 2))
        cross_entropy(hidden, model.head_weight, rows, None, 64).total.backward()
    expected = training_flops(config, vocab, work.rows, work.pairs, int((rows.weight > 0).sum()))
    in_vain = 3 * layers * attention_flops(config, LENGTH**2 - LENGTH * (LENGTH + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(expected + in_vain, rel=1e-9)


@pytest.mark.parametrize("targets", [["linear_qkv", "linear_fc2"], ["linear_proj", "linear_fc1"]])
def test_adapters_alone_have_gradients_and_optimizer(targets):
    more = ["lora.rank=4", f"lora.targets=[{','.join(targets)}]", "train.init_from=base"]
    whole, config = settings(), config_module.override(settings(), more)
    _, (model,) = start(config)
    layout = layout_of(config)
    assert layout.parameters(0) == total_parameters(config, layout.vocab) == sum(p.numel() for p in model.parameters())
    assert layout.trained(0) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory, before = stage_memory(layout, 0), stage_memory(layout_of(whole), 0)
    share = layout.trained(0) / layout_of(whole).parameters(0)
    assert memory.gradients + memory.optimizer == pytest.approx(share * (before.gradients + before.optimizer))
    # without the products for the weights' own gradients
    assert training_flops(config, 64, 8, 0, 8) == pytest.approx(2 / 3 * training_flops(whole, 64, 8, 0, 8))


# pipeline


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [4, 8, 32])
def test_micro_batches_in_flight_are_those_of_megatrons_schedule(virtual, micro_batches):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    stages = 4
    model, parallel = {"num_layers": 24}, {"pipeline": stages, "virtual_pipeline": virtual}
    layout = layout_of(settings(model, parallel, micro_batch_size=1, global_batch_size=micro_batches))
    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        sizes = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
        total, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, virtual, stages, p2p_communicator=sizes)
        assert in_flight(layout, stage) == min(warm_up + 1, total)  # the first backward comes after one more forward


def one_forward_one_backward(stage_seconds: list[float], micro_batches: int) -> float:
    """Seconds of the 1F1B schedule, played step by step; a backward takes twice as long as a forward."""
    stages, orders = len(stage_seconds), []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micro_batches)
        order = [("F", i) for i in range(warm_up)]
        for i in range(micro_batches - warm_up):
            order += [("F", warm_up + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(micro_batches - warm_up, micro_batches)])
    done, clock, at = {}, [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            if at[s] == len(orders[s]):
                continue
            kind, i = orders[s][at[s]]
            before = (kind, i, s - 1 if kind == "F" else s + 1)
            is_first = s == 0 if kind == "F" else s == stages - 1
            if is_first or before in done:
                ready = 0.0 if is_first else done[before]
                clock[s] = done[kind, i, s] = max(clock[s], ready) + stage_seconds[s] * (1 if kind == "F" else 2) / 3
                at[s] += 1
    return max(clock)


@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (4, 4), (4, 16), (8, 32)])
def test_the_bubble_is_that_of_a_played_schedule(stages, micro_batches):
    parallel = {"pipeline": stages}
    layout = layout_of(settings({"num_layers": 8}, parallel, micro_batch_size=1, global_batch_size=micro_batches))
    computing = 3 * micro_batches
    idle = one_forward_one_backward([3.0] * stages, micro_batches) - computing
    assert bubble_fraction(layout) == pytest.approx(idle / computing)
