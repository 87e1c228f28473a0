"""Bytes that a rank sends in a step, by group, and the links that they take.

Collectives are counted as rings: an all-gather or reduce-scatter over n ranks sends (n - 1) / n of the whole from every
rank, an all-reduce twice that (Thakur et al. 2005, sections 4.1 and 4.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tidar_mega.plan.hardware import Hardware
from tidar_mega.plan.layout import Layout
from tidar_mega.plan.memory import FLOAT32, fp8_share, width
from tidar_mega.plan.parameters import head_parameters, layer_parameters


@dataclass(frozen=True)
class Link:
    """How the ranks of a group reach each other."""

    crosses_nodes: bool
    bytes_per_second: float


@dataclass(frozen=True)
class Transfer:
    """What one rank sends for one kind of parallelism, in a step. `exposed` seconds pass while nothing is computed."""

    kind: str
    what: str
    bytes: float
    link: Link
    exposed: float

    @property
    def seconds(self) -> float:
        return self.bytes / self.link.bytes_per_second


def group_link(hardware: Hardware, gpus: int, size: int, stride: int) -> Link:
    """The slowest link of the groups of `size` ranks, `stride` apart, that `gpus` are divided into.

    NVLink inside a node; across nodes a ring for each of a group's members in a node, each with its own network card,
    but no faster than NVLink. Where groups and nodes do not fit evenly, a group has few members in some node.
    """
    node = int(hardware.gpus_per_node)
    rings = math.gcd(size, node // stride) if node % stride == 0 else 1
    return _link(hardware, gpus > node and rings < size, rings)


def _link(hardware: Hardware, crosses_nodes: bool, rings: int) -> Link:
    rate = min(hardware.nvlink_gbs, hardware.internode_gbs * rings) if crosses_nodes else hardware.nvlink_gbs
    return Link(crosses_nodes, rate * 1e9 * hardware.network_efficiency)


def stages_link(layout: Layout, hardware: Hardware) -> Link:
    """The slowest between two pipeline stages, which are the outermost groups: each rank has one partner."""
    return _link(hardware, layout.gpus > hardware.gpus_per_node, rings=1)


def tensor_link(layout: Layout, hardware: Hardware) -> Link:
    return group_link(hardware, layout.gpus, layout.config.parallel.tensor, 1)


def layer_tensor_seconds(layout: Layout, hardware: Hardware) -> float:
    """Of one layer and micro-batch, what no product hides.

    Sequence parallel: an all-gather before and a reduce-scatter after each half of the layer, forward and backward; the
    backward hides those of the qkv and fc1 inputs behind products, as it does the all-reduces of plain tensor parallel
    (Korthikanti et al. 2022, section 4.2.2; Megatron's `linear_with_grad_accumulation_and_async_allreduce`).
    """
    p = layout.config.parallel
    link = tensor_link(layout, hardware)
    forward = 4 if p.sequence else 2 * 2  # an all-reduce is worth two
    backward = 2 if p.sequence else 0
    again = forward if p.recompute == "full" else 0
    return (forward + backward + again) * _gather_bytes(layout) / link.bytes_per_second


def layer_tensor_bytes(layout: Layout) -> float:
    """Of one layer and micro-batch, hidden or not: the backward also gathers the inputs of qkv and fc1 again."""
    p = layout.config.parallel
    forward, backward = (4, 4 + 2) if p.sequence else (4, 4)
    again = forward if p.recompute == "full" else 0
    return (forward + backward + again) * _gather_bytes(layout)


def _gather_bytes(layout: Layout) -> float:
    """Sent by a rank to all-gather the hidden states of a micro-batch over the tensor group."""
    p = layout.config.parallel
    return width(layout) * layout.batch_rows * layout.config.model.hidden_size * (p.tensor - 1) / p.tensor


def layer_context_bytes(layout: Layout) -> float:
    """Of one layer and micro-batch: the clean rows' keys and values go to all ranks, and their gradients back."""
    m, p, t = layout.config.model, layout.config.parallel, layout.config.train
    clean = t.micro_batch_size * layout.config.data.seq_length
    keys = width(layout) * 2 * clean * m.head_width * m.num_query_groups / p.tensor
    times = 2 if p.recompute == "none" else 3
    return times * keys * (p.context - 1) / p.context


def context_link(layout: Layout, hardware: Hardware) -> Link:
    return group_link(hardware, layout.gpus, layout.config.parallel.context, layout.config.parallel.tensor)


def message_bytes(layout: Layout) -> float:
    """What a stage hands to the next for one micro-batch."""
    return width(layout) * layout.batch_rows * layout.config.model.hidden_size / layout.residual_split


def _data_bytes(layout: Layout) -> tuple[float, float]:
    """(gradients, weights) that the fullest rank sends once in a step; a plain optimizer all-reduces the gradients."""
    p, n = layout.config.parallel, layout.data_context_size
    stage = max(layout.representative_stages, key=layout.trained)
    parameters, ring = layout.trained(stage), (n - 1) / n
    if not p.distributed_optimizer:
        return 2 * FLOAT32 * parameters * ring, 0.0
    gathered = width(layout) * parameters
    if layout.config.precision.fp8_param_gather:
        in_fp8 = fp8_share(layout) * layout.config.stage_layers[stage] * layer_parameters(layout.config) / p.tensor
        gathered -= (width(layout) - 1) * in_fp8
    return FLOAT32 * parameters * ring, gathered * ring


def transfers(layout: Layout, hardware: Hardware, layer_seconds: float) -> list[Transfer]:
    """All communication of a step. `layer_seconds`: computing one layer and micro-batch, forward and backward."""
    p, m = layout.config.parallel, layout.micro_batches
    layers, result = m * max(layout.visited_layers(stage) for stage in layout.representative_stages), []
    if p.tensor > 1:
        what = "hidden states, sequence parallel" if p.sequence else "hidden states, all-reduce"
        exposed = layers * layer_tensor_seconds(layout, hardware)
        total = layers * layer_tensor_bytes(layout)
        result.append(Transfer("tensor", what, total, tensor_link(layout, hardware), exposed))
    if p.context > 1:
        link, total = context_link(layout, hardware), layers * layer_context_bytes(layout)
        result.append(Transfer("context", "clean keys and values", total, link, total / link.bytes_per_second))
    if p.pipeline > 1:
        result.append(_pipeline(layout, hardware))
        if layout.config.model.tie_embeddings or layout.config.traits.has_depths:
            result.append(_embedding(layout, hardware))
    if layout.data_context_size > 1:
        result += _data(layout, hardware, max(layout.config.stage_layers) * layer_seconds)
    return result


def _pipeline(layout: Layout, hardware: Hardware) -> Transfer:
    """A stage in the middle sends every micro-batch on, and its gradient back, once for each visit. The interleaved
    schedule sends while it computes, save for filling and draining."""
    p, m = layout.config.parallel, layout.micro_batches
    link, each = stages_link(layout, hardware), 2 * message_bytes(layout)
    waits = p.pipeline - 1 + (m if p.virtual_pipeline == 1 else 0)
    exposed = waits * each / link.bytes_per_second
    return Transfer("pipeline", "activations between stages", m * p.virtual_pipeline * each, link, exposed)


def _embedding(layout: Layout, hardware: Hardware) -> Transfer:
    """The first stage's table and its copy on the last add up their gradients, once all is computed."""
    link, table = stages_link(layout, hardware), head_parameters(layout.config, layout.vocab)
    total = FLOAT32 * table / layout.config.parallel.tensor  # an all-reduce of two
    return Transfer("pipeline", "gradient of the embedding's copy", total, link, total / link.bytes_per_second)


def _data(layout: Layout, hardware: Hardware, micro_batch_seconds: float) -> list[Transfer]:
    """Overlapped, the gradients hide behind the last backward (two thirds of a micro-batch), the weights behind the
    first forward."""
    p = layout.config.parallel
    link = group_link(hardware, layout.gpus, layout.data_context_size, p.tensor)
    gradients, weights = _data_bytes(layout)
    hidden = {
        "gradients": micro_batch_seconds * 2 / 3 if p.overlap_grad_reduce else 0.0,
        "weights": micro_batch_seconds / 3 if p.overlap_param_gather else 0.0,
    }
    result = []
    for what, total in {"gradients": gradients, "weights": weights}.items():
        if total:
            exposed = max(0.0, total / link.bytes_per_second - hidden[what])
            result.append(Transfer("data", f"{what}, once a step", total, link, exposed))
    return result
