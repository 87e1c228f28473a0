"""What a layer is made of: megatron-core's description of the backbone and the layer spec around our core attention.

There are two kinds of layers with the same weights under the same names in a checkpoint, so that each loads what the
other saved: megatron's own ("local", any device, the reference), and those of Transformer Engine, whose input norms are
part of the linear layers behind them. megatron keeps the latter's names; its local spec maps its own to them.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tidar_mega.config import Config, LoraConfig
from tidar_mega.device import DTYPES, has_cuda
from tidar_mega.model import lora, precision
from tidar_mega.model.any_order import CausalLayer
from tidar_mega.model.attention import HybridAttention
from tidar_mega.model.norm import Norm


@dataclass
class BackboneConfig(TransformerConfig):
    """megatron-core's description of the backbone, and what it has no field for."""

    # Weight gradients fused into float32 in Transformer Engine's layers alone. gradient_accumulation_fusion says it for
    # all, and the output head, which is never one of theirs, then insists on apex's extension.
    engine_gradient_fusion: bool = False


def transformer_config(config: Config, training: bool = True) -> BackboneConfig:
    """megatron-core's description of the backbone. Raises ConfigError for what this machine cannot do."""
    machine = precision.this_machine()
    precision.check(config, machine)
    layers = precision.resolve_layers(config, machine)
    fields = _shape(config) | _layout(config, training) | _recompute(config) | precision.settings(config)
    with warnings.catch_warnings():  # megatron doubts every selective recompute, as its own attention may not need it
        warnings.filterwarnings("ignore", message=".*core_attn recompute.*", category=UserWarning)
        return BackboneConfig(**fields, **_implementation(config, layers))


def _shape(config: Config) -> dict:
    m = config.model
    return {
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "ffn_hidden_size": m.ffn_hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "kv_channels": m.head_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": m.norm_epsilon,
        "qk_layernorm": m.qk_layernorm,
        "add_bias_linear": False,
        "add_qkv_bias": m.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": m.init_std,
        # drawn by gpt.py, or loaded
        "init_method": torch.nn.init.zeros_,
        "output_layer_init_method": torch.nn.init.zeros_,
        "embedding_init_method": torch.nn.init.zeros_,
        # megatron keeps layers of one kind as one tensor on disk, and the causal layer is of another
        "hetereogenous_dist_checkpoint": config.traits.has_causal_block,
        "mtp_num_layers": m.mtp_num_layers if config.traits.has_depths else None,
    }


def _layout(config: Config, training: bool) -> dict:
    p, dtype = config.parallel, DTYPES[config.precision.dtype]
    interleaved = p.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": p.tensor,
        "sequence_parallel": p.sequence and training,
        "pipeline_model_parallel_size": p.pipeline,
        "num_layers_in_first_pipeline_stage": p.first_stage_layers,
        "num_layers_in_last_pipeline_stage": p.last_stage_layers,
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline if interleaved else None,
        "context_parallel_size": p.context,
        # With two stages, the stage before and the stage after are one process, and batched sends to it are matched in
        # the wrong order: the interleaved schedule then trains on wrong activations without an error.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "variable_seq_lengths": False,  # all forwards of a run have one shape
        # What was sent is kept by the next stage. NCCL guards the memory of a send in flight; gloo does not, and what
        # is freed there arrives as other numbers.
        "deallocate_pipeline_outputs": p.pipeline > 1 and has_cuda(),
        # The weights of the rows already hold the global denominators: gradients are plain sums over all ranks.
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }


def _recompute(config: Config) -> dict:
    """What is not kept for the backward. Norms alone cannot be left out: megatron needs Transformer Engine for it."""
    if config.parallel.recompute == "full":
        layers = config.parallel.recompute_layers
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": layers}
    if config.parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _implementation(config: Config, layers: str) -> dict:
    fusion, engine = config.parallel.gradient_accumulation_fusion, layers == "te"
    return {
        "transformer_impl": "transformer_engine" if engine else "local",
        # Weights drawn on the CPU do not depend on the tensor-parallel layout; FP8 weights can only be made on the GPU.
        "use_cpu_initialization": not (engine and has_cuda()),
        # Fused kernels of megatron compile at first use, which costs more than they give without a GPU.
        "bias_activation_fusion": has_cuda(),
        "bias_dropout_fusion": has_cuda(),
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": fusion and not engine,
        "engine_gradient_fusion": fusion and engine,
    }


def block_spec(
    shape: BackboneConfig,
    vp_stage: int | None = None,
    adapters: LoraConfig | None = None,
    causal: dict | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (one virtual stage of it) around the hybrid attention, and the last norm.

    `adapters`, of a rank above 0, are in its local layers. `causal`: the last layer is a `CausalLayer` with these
    arguments."""
    engine = shape.transformer_impl == "transformer_engine"
    layer = _engine_layer(shape) if engine else _local_layer(shape)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=HybridAttention)
    if shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if adapters is not None and adapters.rank:
        lora.adapt(layer, adapters)
    layers = [layer] * get_num_layers_to_build(shape, vp_stage)
    if causal is not None:
        layers[-1] = ModuleSpec(module=CausalLayer, params={**layer.params, **causal}, submodules=layer.submodules)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def multi_token_spec(
    shape: BackboneConfig, backbone: TransformerBlockSubmodules, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers of multi-token prediction, each around one like the backbone's last; None but on the last stage."""
    engine = shape.transformer_impl == "transformer_engine"
    block = gpt_layer_specs.get_gpt_mtp_block_spec(shape, backbone, use_transformer_engine=engine, vp_stage=vp_stage)
    for layer in block.layer_specs if block else ():
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = Norm
    return block


def _local_layer(shape: BackboneConfig) -> ModuleSpec:
    layer = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=shape.qk_layernorm, normalization=shape.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return layer


def _engine_layer(shape: BackboneConfig) -> ModuleSpec:
    """Transformer Engine's linear layers; the norms that are fused into them are theirs too, the others stay ours.

    Its norms alone would add nothing but an `_extra_state` each, which a checkpoint of local layers does not have.
    """
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_layernorm)
    if shape.engine_gradient_fusion:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
        # a ModuleSpec until megatron-core 0.18, then a function with its parts bound
        mlp = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        attention.linear_qkv, attention.linear_proj = map(_fused, (attention.linear_qkv, attention.linear_proj))
        mlp.linear_fc1, mlp.linear_fc2 = map(_fused, (mlp.linear_fc1, mlp.linear_fc2))
    return layer


def _fused(linear: type) -> type:
    """`linear`, told to add its weight gradient into main_grad by itself."""

    class Fused(linear):
        def __init__(self, *args, config: BackboneConfig, **kwargs) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    return Fused


@torch.no_grad()
def set_weight(weight: Tensor, value: Tensor) -> None:
    """Copies `value` into a weight that may be kept in FP8.

    Such a weight also remembers the values that it was first given, from which the optimizer makes its float32 copy.
    """
    weight.copy_(value)
    remembered = getattr(weight, "get_high_precision_init_val", lambda: None)()
    if remembered is not None:
        remembered.copy_(value)
