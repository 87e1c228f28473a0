"""The weights of a Hugging Face model as those of a checkpoint of ours: Qwen3, Qwen2 and Llama, as `convert.py` writes.

A run may begin with them (`train.init_from`), and they are decoded as they are. Every rank reads its own part, in any
layout: megatron's sharded state says of each tensor which weight of the whole model it is a part of, and where it lies
in that.

Shape suffixes: G key heads, E head width, D hidden width.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors, force_all_tensors_to_non_fp8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tidar_mega.checkpoint.store import CheckpointError

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_AGAIN = "take the whole folder from its origin again"
_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
_WHOLE = {  # ours: theirs
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_OF_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def _error(path: Path, said: str) -> CheckpointError:
    return CheckpointError(f"{path}: {said}")


def setting(name: str) -> str:
    """The setting in `model` of a name of a shape."""
    return {"head_width": "kv_channels"}.get(name, name)


def is_model(folder: Path) -> bool:
    return (folder / _CONFIG).is_file()


class Model:
    """The folder of a model: what its config.json says, and its tensors. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._json(_CONFIG)
        kind = self.config.get("model_type")
        if kind not in ("qwen3", "qwen2", "llama"):
            raise _error(folder / _CONFIG, f"model_type {kind}; must be qwen3, qwen2 or llama")
        for key, allowed in {
            "hidden_act": "silu",
            "rope_scaling": None,
            "use_sliding_window": False,
            "mlp_bias": False,
            "attention_bias": False,
        }.items():
            found = self.config.get(key, allowed)
            if found != allowed:
                raise _error(folder / _CONFIG, f"{key} = {found}; only models with {allowed} can be read")

    @cached_property
    def shape(self) -> dict[str, object]:
        """What `model.*` must be for these weights, by its names; `head_width` for kv_channels."""
        c, kind = self.config, self.config["model_type"]
        try:
            heads = c["num_attention_heads"]
            return {
                "num_layers": c["num_hidden_layers"],
                "hidden_size": c["hidden_size"],
                "ffn_hidden_size": c["intermediate_size"],
                "num_attention_heads": heads,
                "num_query_groups": c.get("num_key_value_heads", heads),
                "head_width": c.get("head_dim") or c["hidden_size"] // heads,
                "qk_layernorm": kind == "qwen3",
                "add_qkv_bias": kind == "qwen2",
                "tie_embeddings": c.get("tie_word_embeddings", False),
                "rotary_base": float(self._rope().get("rope_theta", 10000.0)),
                "norm_epsilon": c["rms_norm_eps"],
            }
        except KeyError as error:
            raise _error(self.folder / _CONFIG, f"{error} is missing; {_AGAIN}") from None

    @property
    def settings(self) -> dict:
        """The model as a config of ours: plain autoregressive, as it drafts nothing."""
        model = {setting(name): value for name, value in self.shape.items()}
        return {"method": "ar", "model": model, "decode": {"mode": "ar"}}

    def _rope(self) -> dict:
        found = self.config.get("rope_parameters") or self.config  # of transformers 5, and before
        if found.get("rope_type", "default") != "default":
            raise _error(self.folder / _CONFIG, f"rope_type {found['rope_type']}; only default can be read")
        return found

    @cached_property
    def files(self) -> dict[str, str]:
        """Name of a tensor -> its file."""
        if (self.folder / _INDEX).is_file():
            return self._json(_INDEX).get("weight_map", {})
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise _error(self.folder, f"no tensor {name} in its safetensors; {_AGAIN}")
        try:
            return self._open(self.files[name]).get_tensor(name)
        except SafetensorError as error:
            raise _error(self.folder / self.files[name], f"{name} cannot be read ({error}); {_AGAIN}") from None

    def _open(self, file: str):
        try:
            return safe_open(self.folder / file, "pt")
        except (OSError, SafetensorError) as error:
            raise _error(self.folder / file, f"cannot be read ({error}); {_AGAIN}") from None

    def _json(self, file: str) -> dict:
        try:
            return json.loads((self.folder / file).read_text())
        except (OSError, ValueError) as error:
            raise _error(self.folder / file, f"cannot be read ({error}); {_AGAIN}") from None


def load(model: Model, parts: dict) -> dict:
    """Fills the template `parts` (`state.sharded_base`) of a model of the same shape. Raises CheckpointError.

    A table of the vocabulary may have another number of rows: those that it lacks, such as that of a mask token that
    was added, stay as they are.
    """
    with torch.no_grad():
        force_all_tensors_to_non_fp8(parts)
    sharded, _, factories = load_preprocess(parts)
    sharded, _ = extract_sharded_tensors(sharded)  # without the states of FP8
    for part in nested_values(sharded):
        part.data = _part(model, part)
    return apply_factory_merges(_data(sharded), factories)


def _data(tree):
    if isinstance(tree, dict):
        return {key: _data(value) for key, value in tree.items()}
    return [_data(value) for value in tree] if isinstance(tree, list) else tree.data


def _part(model: Model, part: ShardedTensor) -> Tensor:
    """This rank's part of a weight."""
    axes = part.prepend_axis_num  # of layers, if the state has them in one tensor
    whole = _weight(model, part.key, part.global_offset[0] if axes else None)
    place = [slice(at, at + size) for at, size in zip(part.global_offset[axes:], part.local_shape, strict=True)]
    found = part.data.detach().clone()
    if part.key in _TABLES:
        rows = whole[place[0]]
        found[: len(rows)] = rows
        return found
    if whole.shape != part.global_shape[axes:]:
        expected = tuple(part.global_shape[axes:])
        raise _error(model.folder, f"{part.key} has the shape {tuple(whole.shape)} instead of {expected}")
    return found.copy_(whole[tuple(place)])


def _weight(model: Model, key: str, layer: int | None) -> Tensor:
    """A weight of the whole model by its name in a checkpoint of ours."""
    if key in _WHOLE:
        return model[_WHOLE[key]]
    numbered = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    if numbered is None:
        raise _error(model.folder, f"a Hugging Face model has no {key}; begin with another method")
    layer, name = (int(numbered[1]) if layer is None else layer), numbered[2]
    theirs = f"model.layers.{layer}."
    if name in _OF_LAYER:
        return model[theirs + _OF_LAYER[name]]
    if name == "mlp.linear_fc1.weight":
        return torch.cat([model[f"{theirs}mlp.{kind}_proj.weight"] for kind in ("gate", "up")])
    if (kind := name.removeprefix("self_attention.linear_qkv.")) in ("weight", "bias"):
        # megatron keeps each key head's queries, key and value together
        groups = (model.shape["num_query_groups"], -1)
        parts = [model[f"{theirs}self_attn.{x}_proj.{kind}"].unflatten(0, groups) for x in "qkv"]
        return torch.cat(parts, dim=1).flatten(0, 1)
    raise _error(model.folder, f"a Hugging Face model has no {key}; begin with another method")
