"""Bytes that one rank holds: weights, gradients, optimizer, activations, logits.

Activations after Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4,
for the layer that is built here: RMSNorm, grouped-query attention that keeps q, k, v, its output and log-sum-exp but no
probabilities, SwiGLU that keeps its input, no dropout. Kernels are those of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidar_mega.plan.layout import Layout
from tidar_mega.plan.parameters import layer_parameters

GIB = 2**30
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept from forwards for their backwards
    logits: float  # hidden states, logits and gradients of the head, on the last stage
    working: float  # what one layer's backward needs beside

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.working


def width(layout: Layout) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if layout.config.precision.dtype == "bf16" else FLOAT32


def fp8_share(layout: Layout) -> float:
    """Share of the layers whose matrix products run in FP8."""
    precision, layers = layout.config.precision, layout.config.model.num_layers
    if precision.fp8 == "none":
        return 0.0
    return 1 - (precision.bf16_first_layers + precision.bf16_last_layers) / layers


def layer_activations(layout: Layout) -> dict[str, float]:
    """What a layer keeps of one micro-batch until its backward, in bytes; with full recomputation, in the backward.

    Norms and residuals are divided by the tensor group with sequence parallelism, all else always. FP8 keeps the inputs
    of matrix products in one byte. Selective recomputation makes core attention again: the gathering of keys over the
    context group, the log-sum-exp and the output; but the output, in the order of the rows, is the projection's input.
    """
    m, p, rows, b = layout.config.model, layout.config.parallel, layout.batch_rows, width(layout)
    residual, heads, groups = rows * m.hidden_size / layout.residual_split, m.num_attention_heads, m.num_query_groups
    query, key = (rows * m.head_width * count / p.tensor for count in (heads, groups))
    inner, share = rows * m.ffn_hidden_size / p.tensor, fp8_share(layout)
    linear = b * (1 - share) + share
    is_kept = p.recompute != "selective"
    is_gathered = p.context > 1 and is_kept
    keys = key * layout.keys / layout.rows if is_gathered else key
    kept = {
        "input norm": b * residual + FLOAT32 * rows / layout.residual_split,
        "qkv input": linear * residual,
        "RoPE tables": b * 4 * rows * m.head_width,  # cosine and sine, for q and for k
        "attention q, k, v": b * (query + 2 * keys),
        "attention output, log-sum-exp": (b * query + FLOAT32 * rows * heads / p.tensor) * is_kept,
        "projection input": linear * query,
        "MLP norm": b * residual + FLOAT32 * rows / layout.residual_split,
        "fc1 input": linear * residual,
        "SwiGLU input": b * 2 * inner,
        "fc2 input": linear * inner,
    }
    if m.qk_layernorm:  # q before its norm is a copy; both norms keep a float for each head
        kept["q, k norm"] = b * query + FLOAT32 * rows * (heads + groups) / p.tensor
    if not is_gathered:  # v is a view of the product's whole output
        kept["rest of qkv output"] = b * (query + key)
    elif m.qk_layernorm:  # so is the input of k's norm
        kept["qkv output"] = b * (query + 2 * key)
    return kept


def kept_per_layer(layout: Layout, stage: int) -> float:
    """Bytes of one layer and micro-batch under parallel.recompute, averaged over the layers of a unit."""
    p = layout.config.parallel
    if p.recompute == "full":
        return _layer_input(layout) / min(p.recompute_layers, layout.chunk_layers(stage))
    return sum(layer_activations(layout).values())


def _layer_input(layout: Layout) -> float:
    return width(layout) * layout.batch_rows * layout.config.model.hidden_size / layout.residual_split


def joining_activations(layout: Layout) -> float:
    """What the last stage keeps of one micro-batch beside its layers: a depth of multi-token prediction, of its three
    norms and of the projection of two joined states; the causal layer of masked diffusion, of its two input norms, of
    the projection of three, and of the twice as many rows that leave it."""
    config, rows = layout.config, layout.batch_rows / layout.residual_split
    residual = width(layout) * rows * config.model.hidden_size
    if config.traits.has_depths:
        return config.model.mtp_num_layers * (5 * residual + 3 * FLOAT32 * rows)
    if config.traits.has_causal_block:
        return 6 * residual + 4 * FLOAT32 * rows
    return 0.0


def in_flight(layout: Layout, stage: int) -> int:
    """Visits of micro-batches to a stage whose backward is still to come, at most.

    1F1B: one for each stage from here on. Interleaved (Narayanan et al. 2021, section 2.2): as Megatron's schedule
    warms up, 2 (p - stage - 1) + (v - 1) p + 1 visits of 1/v of the layers.
    """
    p, visits = layout.config.parallel, layout.micro_batches * layout.config.parallel.virtual_pipeline
    behind = p.pipeline - stage - 1
    if p.virtual_pipeline > 1:
        return min(2 * behind + (p.virtual_pipeline - 1) * p.pipeline + 1, visits)
    return min(behind + 1, visits)


def activation_bytes(layout: Layout, stage: int) -> float:
    """What the forwards in flight keep; with full recomputation also one unit of layers made again."""
    p, m = layout.config.parallel, layout.config.model
    total = in_flight(layout, stage) * layout.layers_of(stage) * kept_per_layer(layout, stage)
    if stage == p.pipeline - 1 and p.recompute != "full":
        total += in_flight(layout, stage) * joining_activations(layout)
    if p.recompute == "full":
        total += min(p.recompute_layers, layout.chunk_layers(stage)) * sum(layer_activations(layout).values())
        total += in_flight(layout, stage) * FLOAT32 * layout.batch_rows * m.head_width  # RoPE angles
    return total


def weight_bytes(layout: Layout, stage: int) -> float:
    """Transformer Engine keeps two FP8 copies of a weight, as its products on Hopper take one layout only; with
    precision.fp8_param_gather they replace the bf16 one."""
    layers = fp8_share(layout) * layout.config.stage_layers[stage]
    fp8 = layers * layer_parameters(layout.config) / layout.config.parallel.tensor
    extra = 2 - (width(layout) if layout.config.precision.fp8_param_gather else 0)
    return width(layout) * layout.parameters(stage) + extra * fp8


def optimizer_bytes(layout: Layout, stage: int) -> float:
    """Adam's two moments, and master weights where the weights are bf16; the distributed optimizer divides them over
    all ranks with the same weights (ZeRO stage 1, Rajbhandari et al. 2020)."""
    p = layout.config.parallel
    each = 3 * FLOAT32 if width(layout) < FLOAT32 else 2 * FLOAT32
    shards = layout.data_context_size if p.distributed_optimizer else 1
    return each * layout.trained(stage) / shards * (1 - p.optimizer_offload)


def head_bytes(layout: Layout) -> float:
    """The last stage's hidden states and their gradient, twice (whole, and the rows with a loss); logits of one chunk
    in float32 and their gradient; the head's gradient in float32 (`losses.py`)."""
    m, p, b = layout.config.model, layout.config.parallel, width(layout)
    vocab, rows = layout.vocab / p.tensor, layout.batch_rows * layout.config.rows_per_place
    chunk = min(layout.config.train.loss_chunk, rows)
    return 4 * b * rows * m.hidden_size + (FLOAT32 + b) * chunk * vocab + (FLOAT32 + b) * vocab * m.hidden_size


def working_bytes(layout: Layout) -> float:
    """Gradients inside the MLP of one layer, its gathered input, and a weight gradient before it is added up."""
    m, p = layout.config.model, layout.config.parallel
    inner, rows = m.ffn_hidden_size / p.tensor, layout.batch_rows
    return width(layout) * (rows * (3 * inner + 2 * m.hidden_size) + 2 * inner * m.hidden_size)


def stage_memory(layout: Layout, stage: int) -> Memory:
    is_last = stage == layout.config.parallel.pipeline - 1
    return Memory(
        weights=weight_bytes(layout, stage),
        gradients=FLOAT32 * layout.trained(stage),
        optimizer=optimizer_bytes(layout, stage),
        activations=activation_bytes(layout, stage),
        logits=head_bytes(layout) if is_last else 0.0,
        working=working_bytes(layout),
    )


def fullest_stage(layout: Layout) -> tuple[int, Memory]:
    """The stage with the most bytes."""
    return max(
        ((stage, stage_memory(layout, stage)) for stage in layout.representative_stages), key=lambda pair: pair[1].total
    )
