"""A config cut up over a number of GPUs: what one rank holds of layers, heads, rows and sequences.

Megatron numbers its ranks with the tensor group fastest, then context, data and pipeline (megatron-core's default
order tp-cp-ep-dp-pp): that decides which groups stay inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tidar_mega.config import Config, replicas
from tidar_mega.plan.parameters import adapter_parameters, mtp_depths, stage_parameters


@dataclass(frozen=True)
class Layout:
    """`vocab` is the padded vocabulary, `data` the number of replicas."""

    config: Config
    vocab: int
    data: int

    @cached_property
    def gpus(self) -> int:
        return self.config.parallel.model_size * self.data

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of one replica in a step."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.data)

    @cached_property
    def data_context_size(self) -> int:
        """Ranks that hold the same weights, and that the distributed optimizer divides its state over."""
        return self.data * self.config.parallel.context

    @cached_property
    def representative_stages(self) -> tuple[int, ...]:
        """Those among which the fullest and the slowest are: the ends, and of the stages between them, which are alike,
        the one with the most micro-batches in flight."""
        last = self.config.parallel.pipeline - 1
        return tuple(sorted({0, min(1, last), last}))

    def chunk_layers(self, stage: int) -> int:
        """Layers of the backbone that a micro-batch passes in a visit to a stage."""
        return self.config.stage_layers[stage] // self.config.parallel.virtual_pipeline

    @cached_property
    def rows(self) -> int:
        """Rows of one sequence on one rank, before sequence parallelism: the clean and mask rows, or its part of them.

        A context-parallel rank's mask rows are filled up to a fixed number of slots (`parallel/balance.py`).
        """
        config, context = self.config, self.config.parallel.context
        if context == 1:
            return config.forward_rows
        from tidar_mega.parallel.balance import mask_slots

        length, drafted = config.data.seq_length, config.drafted_rows
        return length // context + mask_slots(length, drafted, context, config.train.block, config.row_multiple)

    @cached_property
    def keys(self) -> int:
        """Rows whose keys a rank attends to: with context parallelism all clean rows, and its own mask rows."""
        length, context = self.config.data.seq_length, self.config.parallel.context
        return self.rows if context == 1 else length + self.rows - length // context

    @cached_property
    def batch_rows(self) -> int:
        """Rows of one micro-batch on one rank."""
        return self.rows * self.config.train.micro_batch_size

    @cached_property
    def residual_split(self) -> int:
        """Over how many ranks norms and residuals are split (Korthikanti et al. 2022, section 4.2.2)."""
        return self.config.parallel.tensor if self.config.parallel.sequence else 1

    @cached_property
    def step_tokens(self) -> int:
        """Tokens of text that a step trains on."""
        return self.config.train.global_batch_size * self.config.data.seq_length

    def parameters(self, stage: int) -> int:
        """Weights of one rank of a pipeline stage."""
        return stage_parameters(self.config, self.vocab, stage)

    def trained(self, stage: int) -> int:
        """Those of them that have a gradient: with `lora.rank`, the adapters alone."""
        if self.config.lora.rank:
            return self.config.stage_layers[stage] * adapter_parameters(self.config, self.config.parallel.tensor)
        return self.parameters(stage)

    def layers_of(self, stage: int) -> int:
        """Layers that a micro-batch passes in a visit to a stage, multi-token prediction's on the last among them."""
        return self.chunk_layers(stage) + self._mtp_depths(stage)

    def visited_layers(self, stage: int) -> int:
        """The same of all visits to the stage."""
        return self.config.stage_layers[stage] + self._mtp_depths(stage)

    def _mtp_depths(self, stage: int) -> int:
        return mtp_depths(self.config) if stage == self.config.parallel.pipeline - 1 else 0

    def describe(self) -> str:
        p = self.config.parallel
        names = {"tensor": p.tensor, "pipeline": p.pipeline, "context": p.context, "data": self.data}
        return " x ".join(f"{name} {size}" for name, size in names.items())


def make_layout(config: Config, vocab_size: int, gpus: int) -> Layout:
    """The layout of `config` on `gpus` GPUs. Raises ConfigError."""
    data = replicas(config, gpus, f"{gpus} GPUs (--gpus)")
    return Layout(config, config.padded_vocab_size(vocab_size), data)
