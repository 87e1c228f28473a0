"""The backbone: megatron-core's GPTModel whose RoPE follows the rows' positions and whose attention follows the rows.

Shape suffixes: B sequences, T rows, D hidden width, N selected rows, V vocabulary ids of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.device import has_cuda
from tidar_mega.model.attention import AttentionContext
from tidar_mega.model.spec import block_spec, transformer_config
from tidar_mega.rows import Rows


class HybridGPT(GPTModel):
    """A GPTModel that runs any `Rows`. `forward` stops after the final norm: the head is only computed where needed."""

    def __init__(self, *args, rotary_base: float, **kwargs) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        width = self.config.kv_channels
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        self.register_buffer("inverse_frequency", (rotary_base**-exponents).float(), persistent=False)

    def forward(self, rows: Rows, context: AttentionContext) -> Tensor:
        """Hidden states after the final norm, [T, B, D], identical on every tensor-parallel rank.

        The gradient that flows back into them is summed over the tensor-parallel group, as each rank's part of the
        head contributes its own.
        """
        hidden = super().forward(
            input_ids=rows.token,
            position_ids=rows.position,
            attention_mask=None,
            extra_block_kwargs={"attention_bias": context},
        )
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden)

    @property
    def head_weight(self) -> Tensor:
        """Output weights of this rank's slice of the vocabulary, [V, D]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over this rank's slice of the vocabulary, [N, V], float32."""
        return F.linear(hidden_ND, self.head_weight).float()

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple:
        # GPTModel's own RoPE ignores the positions that it is given; element 1 is where it hands on its angles
        embedded, no_rope, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        assert no_rope is None
        return (embedded, self._rope_angles(position_ids), *rest)

    def _rope_angles(self, position_BT: Tensor) -> Tensor:
        angle_TBE = position_BT.t().float()[..., None] * self.inverse_frequency
        return torch.cat([angle_TBE, angle_TBE], dim=-1)[:, :, None, :]

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


def build(config: Config, vocab_size: int, training: bool = True) -> HybridGPT:
    """The model on this rank of megatron's (already initialised) groups, in `precision.dtype`, on its device.

    Weights are drawn from megatron's seeded random states: equal for every data-parallel rank and for every layout.
    """
    shape = transformer_config(config, training)
    model = HybridGPT(
        config=shape,
        transformer_layer_spec=block_spec(shape),
        vocab_size=padded_vocab_size(config, vocab_size),
        max_sequence_length=config.data.seq_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        rotary_base=config.model.rotary_base,
    )
    return model.cuda(torch.cuda.current_device()) if has_cuda() else model


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """Ids of the embedding and head: `vocab_size` rounded up to model.vocab_multiple."""
    multiple = config.model.vocab_multiple
    return (vocab_size + multiple - 1) // multiple * multiple
