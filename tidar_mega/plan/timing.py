"""Seconds of a step, from a layout and the figures of the hardware: a roofline with stated efficiencies, not a measure.

Products and attention take their operations / (rate x efficiency), all else its bytes / (bandwidth x efficiency);
communication that nothing hides is added, and the pipeline waits for its slowest stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tidar_mega.plan.communication import Transfer, context_link, layer_context_bytes, layer_tensor_seconds, transfers
from tidar_mega.plan.hardware import Hardware
from tidar_mega.plan.layout import Layout
from tidar_mega.plan.memory import FLOAT32, fp8_share, width
from tidar_mega.plan.parameters import head_parameters, layer_parameters, mtp_depths
from tidar_mega.plan.work import attention_flops, hardware_flops, matmul_passes, model_flops, recomputed, sequence_work

# Elements read and written per row in a layer's forward, where D is the hidden width, Q and K those of q and of k
RESIDUAL_ELEMENTS = 10  # x D: two norms (read, write) and two residual sums (read two, write one)
ROPE_ELEMENTS = 11  # x (Q + K): turn, two products, sum and two copies, each by a kernel of its own
QUERY_ELEMENTS = 4  # x Q: q copied out of the product, the attention's output put in rows
SWIGLU_ELEMENTS = 3  # x F: read two, write one
LOGIT_BYTES = 60  # per logit: what `losses.py` reads and writes between its products
OFFLOADED_BYTES = 34  # per weight of Adam on the host: as below, and the gradient down and the weight up
OPTIMIZER_BYTES = 30  # per weight: gradient, master weight and moments read, the last three and the bf16 weight written
ACCUMULATION_BYTES = 12  # per weight and micro-batch: its bf16 gradient written, then added to the float32 one


@dataclass(frozen=True)
class Timing:
    """Seconds of one optimizer step, by what they are spent on; they add up to `step`."""

    layout: Layout
    hardware: Hardware
    matmul: float
    attention: float
    memory_bound: float  # norms, RoPE, SwiGLU, residuals, cross entropy, adding up gradients
    bubble: float  # the pipeline fills and drains, and waits for its slowest stage
    communication: float  # what nothing hides
    optimizer: float
    transfers: tuple[Transfer, ...]

    @property
    def parts(self) -> dict[str, float]:
        names = ("matmul", "attention", "memory_bound", "bubble", "communication", "optimizer")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def step(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.step_tokens / self.step

    @property
    def utilisation(self) -> float:
        """Model FLOPs / what all GPUs could do in that time (MFU; PaLM, Chowdhery et al. 2022, appendix B)."""
        return model_flops(self.layout.config, self.layout.vocab) / self._available

    @property
    def hardware_utilisation(self) -> float:
        """The same of what the GPUs really compute: with recomputation and whole tiles of attention."""
        return hardware_flops(self.layout.config, self.layout.vocab) / self._available

    @property
    def _available(self) -> float:
        return self.step * peak(self.layout, self.hardware) * self.layout.gpus


@dataclass(frozen=True)
class Seconds:
    """Computing one micro-batch, forward and backward."""

    matmul: float
    attention: float
    memory_bound: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory_bound

    def times(self, factor: float) -> Seconds:
        return Seconds(self.matmul * factor, self.attention * factor, self.memory_bound * factor)

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory_bound + other.memory_bound,
        )


def peak(layout: Layout, hardware: Hardware) -> float:
    """FLOP/s of one GPU in precision.dtype; the measure of utilisation, under FP8 too."""
    return 1e12 * (hardware.bf16_tflops if width(layout) == 2 else hardware.fp32_tflops)


def layer_seconds(layout: Layout, hardware: Hardware, imbalance: float = 1.0) -> Seconds:
    """One layer on the most loaded rank of its context group (`imbalance`: its attention work over the mean)."""
    config, p, m = layout.config, layout.config.parallel, layout.config.model
    again_matmul, again_attention = recomputed(config)
    rate, share = peak(layout, hardware), fp8_share(layout)
    slowness = (1 - share) / (rate * hardware.matmul_efficiency)
    if share:
        slowness += share / (1e12 * hardware.fp8_tflops * hardware.fp8_efficiency)
    weights = layer_parameters(config) / p.tensor
    pairs = sequence_work(config).tile_pairs * config.train.micro_batch_size / p.context * imbalance
    attention = attention_flops(config, pairs) / p.tensor / (rate * hardware.attention_efficiency)
    residual = RESIDUAL_ELEMENTS * m.hidden_size / layout.residual_split
    query, key = (m.head_width * count / p.tensor for count in (m.num_attention_heads, m.num_query_groups))
    heads = ROPE_ELEMENTS * (query + key) + QUERY_ELEMENTS * query
    elements = residual + heads + SWIGLU_ELEMENTS * m.ffn_hidden_size / p.tensor
    moved = layout.batch_rows * elements * width(layout) * (3 + again_matmul)
    accumulated = weights * (ACCUMULATION_BYTES - (4 if p.gradient_accumulation_fusion else 0))
    return Seconds(
        matmul=2 * weights * layout.batch_rows * (matmul_passes(config) + again_matmul) * slowness,
        attention=attention * (3.5 + again_attention),
        memory_bound=(moved + accumulated) / (1e9 * hardware.memory_gbs * hardware.memory_efficiency),
    )


def head_seconds(layout: Layout, hardware: Hardware) -> Seconds:
    """Logits, loss and both gradients of the rows with a loss, on the last stage."""
    t, p = layout.config.train, layout.config.parallel
    rows = sequence_work(layout.config).head_rows * t.micro_batch_size / p.context
    weights = head_parameters(layout.config, layout.vocab) / p.tensor
    moved = LOGIT_BYTES * rows * layout.vocab / p.tensor + ACCUMULATION_BYTES * weights
    rate = peak(layout, hardware) * hardware.matmul_efficiency
    return Seconds(
        matmul=2 * matmul_passes(layout.config) * weights * rows / rate,
        attention=0.0,
        memory_bound=moved / (1e9 * hardware.memory_gbs * hardware.memory_efficiency),
    )


def bubble_fraction(layout: Layout) -> float:
    """Idle time over computing time of equal stages, (p - 1) / (v m) (Narayanan et al. 2021, section 2.2)."""
    p = layout.config.parallel
    return (p.pipeline - 1) / (p.virtual_pipeline * layout.micro_batches)


def predict(layout: Layout, hardware: Hardware, imbalance: float = 1.0) -> Timing:
    """One step. The last stage also has the head: the others wait for the slowest in every micro-batch."""
    p, m = layout.config.parallel, layout.micro_batches
    layer, head = layer_seconds(layout, hardware, imbalance), head_seconds(layout, hardware)
    whole = layer.times(layout.config.model.num_layers + mtp_depths(layout.config)).plus(head)
    mean = whole.times(1 / p.pipeline)  # what a stage computes on average
    seconds = {stage: layer.total * layout.visited_layers(stage) for stage in layout.representative_stages}
    seconds[p.pipeline - 1] += head.total
    slowest = max(seconds, key=seconds.__getitem__)
    sent = transfers(layout, hardware, layer.total)
    # while the pipeline fills and drains, one micro-batch goes through all other stages
    waits = _layer_waits(layout, hardware) * (layout.config.model.num_layers - layout.config.stage_layers[slowest])
    filling = (whole.total - seconds[slowest] + waits) / p.virtual_pipeline
    return Timing(
        layout,
        hardware,
        matmul=m * mean.matmul,
        attention=m * mean.attention,
        memory_bound=m * mean.memory_bound,
        bubble=max(0.0, m * (seconds[slowest] - mean.total) + filling),  # one stage's could be a rounding error below 0
        communication=sum(t.exposed for t in sent),
        optimizer=_optimizer_seconds(layout, hardware),
        transfers=tuple(sent),
    )


def _layer_waits(layout: Layout, hardware: Hardware) -> float:
    """Communication inside a layer and micro-batch that nothing hides."""
    waits, p = 0.0, layout.config.parallel
    if p.tensor > 1:
        waits += layer_tensor_seconds(layout, hardware)
    if p.context > 1:
        waits += layer_context_bytes(layout) / context_link(layout, hardware).bytes_per_second
    return waits


def _optimizer_seconds(layout: Layout, hardware: Hardware) -> float:
    p, parameters = layout.config.parallel, max(map(layout.trained, layout.representative_stages))
    mine = parameters / (layout.data_context_size if p.distributed_optimizer else 1)
    on_gpu = OPTIMIZER_BYTES * mine * (1 - p.optimizer_offload) + FLOAT32 * parameters  # gradients are set to 0
    on_host = OFFLOADED_BYTES * mine * p.optimizer_offload
    return on_gpu / (1e9 * hardware.memory_gbs * hardware.memory_efficiency) + on_host / (1e9 * hardware.host_gbs)
