"""Lossless LoRA: low-rank adapters of the linear layers that are active on mask rows alone, over a frozen base.

Clean rows, in training and in decoding, are computed by the base's weights and by nothing else, so the AR half is the
base model itself, bit by bit, and decoding that verifies with it gives the base's own output (I-DLM, arXiv 2604.11035,
residual mode; the adapters are LoRA's, arXiv 2106.09685). They take the place of megatron's linear layers in the layer
spec and keep the base's names in a checkpoint. `inference.py` computes the same without megatron.

A forward's clean rows come first in every sequence, and then its mask rows (`methods/`, `parallel/context.py`). How
many they are, each layer hears from the context that it is called with, also where it is called again to recompute.

Shape suffixes: T rows, B sequences, I inputs and O outputs (of this tensor-parallel rank where split), R rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tidar_mega.config import LoraConfig


def is_adapter(name: str) -> bool:
    """Whether a weight of that name belongs to an adapter."""
    return ".lora." in name


@dataclass
class Gate:
    """How many rows of the forward that a layer is in are clean: they come first."""

    clean: int = 0

    def open(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before every call of the layer, the repeated ones of recomputation among them."""
        self.clean = kwargs["attention_bias"].clean


class Adapter(nn.Module):
    """a [R, I] and b [O, R]; `split` says of which this rank has a slice. b begins at zero, so as to add nothing."""

    def __init__(self, linear: nn.Module, lora: LoraConfig, shape_a: tuple, shape_b: tuple, split: str) -> None:
        super().__init__()
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.a, self.b = (nn.Parameter(torch.zeros(shape, **like)) for shape in (shape_a, shape_b))
        self.scale, self.gate = lora.alpha / lora.rank, Gate()
        self.group, self.sequence = linear.tp_group, linear.sequence_parallel
        sliced, whole = (self.b, self.a) if split == "b" else (self.a, self.b)
        set_tensor_model_parallel_attributes(sliced, True, dim=0 if split == "b" else 1, stride=1)
        whole.sequence_parallel = self.sequence  # its gradient is made of this rank's rows alone: megatron sums it

    def add(self, output: Tensor, low_TBR: Tensor, first: int) -> Tensor:
        """`output`, and behind its `first` rows the adapter's part; the rows before are the very same numbers."""
        return torch.cat([output[:first], output[first:] + self.scale * F.linear(low_TBR[first:], self.b)])


class LoraColumn(ColumnParallelLinear):
    """Outputs are split: so is b."""

    def __init__(self, *args, lora: LoraConfig, tp_comm_buffer_name: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        shapes = (lora.rank, self.input_size), (self.output_size_per_partition, lora.rank)
        self.lora, self.is_gated = Adapter(self, lora, *shapes, split="b"), tp_comm_buffer_name == "fc1"

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        output_TBO, bias = super().forward(input_, weight, runtime_gather_output)
        low = F.linear(input_, self.lora.a)
        if self.lora.sequence:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.lora.group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.lora.group)
        return self.lora.add(output_TBO, low, self.lora.gate.clean), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        found = _sharded(self, {"weight": 0, "bias": 0, "lora.b": 0}, prefix, sharded_offsets, metadata)
        if self.is_gated:  # gate and up projection are split each, as megatron's MLP says of the weight
            key = f"{prefix}lora.b"
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class LoraRow(RowParallelLinear):
    """Inputs are split: so is a."""

    def __init__(self, *args, lora: LoraConfig, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        shapes = (lora.rank, self.input_size_per_partition), (self.output_size, lora.rank)
        self.lora = Adapter(self, lora, *shapes, split="a")

    def forward(self, input_: Tensor):
        output, bias = super().forward(input_)
        low, first = F.linear(input_, self.lora.a), self.lora.gate.clean
        if self.lora.sequence:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.lora.group)
            first = min(max(first - self.lora.group.rank() * len(low), 0), len(low))
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.lora.group)
        return self.lora.add(output, low, first), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return _sharded(self, {"weight": 1, "lora.a": 1}, prefix, sharded_offsets, metadata)


def _sharded(linear: nn.Module, split: dict[str, int], prefix: str, offsets: tuple, metadata: dict | None) -> dict:
    """As megatron's linear layers, with the adapter: which weights are split over the tensor group, and where."""
    state = linear.state_dict(prefix="", keep_vars=True)
    groups = {"tp_group": linear.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, split, offsets, **groups)


def adapt(layer: ModuleSpec, lora: LoraConfig) -> None:
    """Puts adapters into the layer spec, at `lora.targets`."""
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    mlp = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules  # from megatron 0.18 on
    for name in lora.targets:
        kind = LoraColumn if name in ("linear_qkv", "linear_fc1") else LoraRow
        setattr(attention if hasattr(attention, name) else mlp, name, ModuleSpec(kind, params={"lora": lora}))


def freeze(model: nn.Module) -> None:
    """Adapters alone get gradients, and each layer tells its own which rows are clean."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_adapter(name))
    for layer in model.decoder.layers:
        gate = Gate()
        layer.register_forward_pre_hook(gate.open, with_kwargs=True)
        for module in layer.modules():
            if isinstance(module, Adapter):
                module.gate = gate
