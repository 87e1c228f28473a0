"""The backbone: megatron-core's GPTModel whose RoPE follows the rows' positions and whose attention follows the rows.

Shape suffixes: B sequences, T rows, D hidden width, N selected rows, V vocabulary ids of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from tidar_mega.config import Config
from tidar_mega.device import DTYPES, has_cuda
from tidar_mega.model.attention import AttentionContext, HybridAttention
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


def transformer_config(config: Config, training: bool = True) -> TransformerConfig:
    """megatron-core's description of the backbone."""
    m, p = config.model, config.parallel
    dtype = DTYPES[config.precision.dtype]
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_width,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        qk_layernorm=m.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=m.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=m.init_std,
        tensor_model_parallel_size=p.tensor,
        sequence_parallel=p.sequence and training,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Without these, weights depend on the tensor-parallel layout; with them they are cut from one full draw.
        use_cpu_initialization=True,
        # Fused kernels of megatron compile at first use, which costs more than they give without a GPU.
        bias_activation_fusion=has_cuda(),
        bias_dropout_fusion=has_cuda(),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # The weights of the rows already hold the global denominators: gradients are plain sums over all ranks.
        calculate_per_token_loss=True,
    )


def block_spec(shape: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with the hybrid attention and a norm that knows sequence parallelism."""
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_layernorm, normalization=shape.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=HybridAttention)
    if shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * shape.num_layers, layer_norm=Norm)


class Norm(nn.RMSNorm):
    """RMSNorm whose gradient megatron sums over the tensor group if rows are split over it (its stock norm refuses)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
