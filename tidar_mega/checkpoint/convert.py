"""A trained model as a Hugging Face one: `config.json` and `model.safetensors` that transformers loads and runs.

The AR half of a TiDAR model is a plain decoder, and the masks are rows of that same decoder, so nothing is lost: with
q/k norms it is a Qwen3, with biases on q, k and v a Qwen2, with neither a Llama.

Shape suffixes: G key heads, F query heads of one key head, E head width, D hidden width.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tidar_mega.checkpoint.store import CheckpointError, copy_files
from tidar_mega.config import Config, UserError
from tidar_mega.model.gpt import HybridGPT

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def description(config: Config, model: HybridGPT, eod: int) -> dict:
    """What `config.json` says. Raises UserError for a shape that transformers has no model for."""
    m = config.model
    if m.qk_layernorm and m.add_qkv_bias:
        raise UserError(
            "model.qk_layernorm and model.add_qkv_bias: transformers has no model with both; train with one of them"
        )
    kind = "qwen3" if m.qk_layernorm else "qwen2" if m.add_qkv_bias else "llama"
    name = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups,
        "head_dim": m.head_width,
        "rms_norm_eps": m.norm_epsilon,
        "rope_theta": float(m.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(m.rotary_base)},
        "max_position_embeddings": config.data.seq_length,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": eod,
        "torch_dtype": _DTYPES[next(model.parameters()).dtype],
    }


def weights(model: HybridGPT) -> dict[str, Tensor]:
    """All weights of a model that is whole on this process, by transformers' names."""
    found = {
        "model.embed_tokens.weight": model.embedding.word_embeddings.weight,
        "model.norm.weight": model.decoder.final_layernorm.weight,
    }
    if not model.share_embeddings_and_output_weights:
        found["lm_head.weight"] = model.head_weight
    for layer in model.decoder.layers:
        for name, weight in _layer(layer).items():
            found[f"model.layers.{layer.layer_number - 1}.{name}"] = weight
    return {name: weight.detach().contiguous() for name, weight in found.items()}


def _layer(layer) -> dict[str, Tensor]:
    attention, mlp = layer.self_attention, layer.mlp
    gate, up = mlp.linear_fc1.weight.chunk(2)
    found = {
        "input_layernorm.weight": layer.input_layernorm.weight,
        "post_attention_layernorm.weight": layer.pre_mlp_layernorm.weight,
        "self_attn.o_proj.weight": attention.linear_proj.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": mlp.linear_fc2.weight,
    }
    found |= _split(attention, "weight", attention.linear_qkv.weight)
    if attention.linear_qkv.bias is not None:
        found |= _split(attention, "bias", attention.linear_qkv.bias)
    if layer.config.qk_layernorm:
        found["self_attn.q_norm.weight"] = attention.q_layernorm.weight
        found["self_attn.k_norm.weight"] = attention.k_layernorm.weight
    return found


def _split(attention, kind: str, mixed: Tensor) -> dict[str, Tensor]:
    """megatron keeps each key head's queries, key and value together: [G, F + 2, E] rows."""
    G, E = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    parts = mixed.unflatten(0, (G, -1, E))
    pieces = {"q": parts[:, :-2], "k": parts[:, -2], "v": parts[:, -1]}
    return {f"self_attn.{name}_proj.{kind}": x.reshape(-1, *mixed.shape[1:]) for name, x in pieces.items()}


def export(model: HybridGPT, config: Config, tokenizer: Path, about_tokens: dict, eod: int, folder: Path) -> Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; it appears whole or not at all.

    `tokenizer` is the checkpoint's folder and `about_tokens` what its tokenizer_config.json must say. Raises UserError
    if the folder exists or the shape has no counterpart, CheckpointError if it cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    about = description(config, model, eod)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            new = Path(beside) / folder.name
            copy_files(tokenizer, new)
            (new / "tokenizer_config.json").write_text(json.dumps(about_tokens, indent=1) + "\n")
            (new / "config.json").write_text(json.dumps(about, indent=1) + "\n")
            save_file(weights(model), new / "model.safetensors", metadata={"format": "pt"})
            new.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); free space or name another") from None
    return folder
