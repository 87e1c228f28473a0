"""What a layer is made of: megatron-core's description of the backbone and the layer spec around our core attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from tidar_mega.config import Config
from tidar_mega.device import DTYPES, has_cuda
from tidar_mega.model.attention import HybridAttention


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


def block_spec(shape: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with the hybrid attention and a norm that knows sequence parallelism."""
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_layernorm, normalization=shape.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=HybridAttention)
    if shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(shape, vp_stage), layer_norm=Norm)


class Norm(nn.RMSNorm):
    """RMSNorm whose gradient megatron sums over the tensor group if rows are split over it (its stock norm refuses)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
