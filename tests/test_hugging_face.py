"""Runs that begin with the weights of a Hugging Face model, in any layout, and what of such a folder is refused.

What a run has begun with is written by `tidar convert`, whose output is compared with transformers elsewhere
(test_decode_commands.py), and must be the very weights that transformers had saved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import processes
from tests.test_init_from import refusal, run, settings, weights
from tests.test_main_job import make_corpus
from tidar_mega.checkpoint import hugging_face
from tidar_mega.checkpoint.store import CheckpointError
from tidar_mega.config import LoraConfig, ModelConfig

pytestmark = pytest.mark.distributed

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
KINDS = {  # kind: (what our model is besides, rows of the tables, of which ours have 320)
    "qwen3": ({"qk_layernorm": True, "kv_channels": 24, "rotary_base": 1e6}, 352),
    "qwen2": ({"add_qkv_bias": True, "tie_embeddings": True}, 300),
    "llama": ({"norm_epsilon": 1e-5}, 320),
}
STILL = {"lr": 1e-20, "min_lr": 0.0, "weight_decay": 0.0}  # nothing is learnt
LAYOUTS = [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}, {"data": 2}]


def make(folder: Path, m: ModelConfig, rows: int, tokenizer: Path) -> None:
    """A model of random weights of that shape, saved by transformers in several files, with a tokenizer."""
    import transformers

    name = "Qwen3" if m.qk_layernorm else "Qwen2" if m.add_qkv_bias else "Llama"
    torch.manual_seed(rows)
    about = getattr(transformers, f"{name}Config")(
        vocab_size=rows,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_query_groups,
        rope_theta=m.rotary_base,
        rms_norm_eps=m.norm_epsilon,
        initializer_range=0.1,
        tie_word_embeddings=m.tie_embeddings,
        **({"head_dim": m.head_width} if name == "Qwen3" else {}),
    )
    made = getattr(transformers, f"{name}ForCausalLM")(about)
    for weight in made.parameters():  # norms and biases too
        weight.data += 0.01 * torch.randn_like(weight)
    made.save_pretrained(folder, max_shard_size="100KB")
    shutil.copy(tokenizer / "tokenizer.json", folder)


def of_run(folder: Path, kind: str, number: int):
    sections = {"train": {"init_from": str(folder / kind)}, "optimizer": STILL, "precision": {"dtype": "fp32"}}
    model = {**SHAPE, **KINDS[kind][0]}
    return settings(folder, f"{kind}_{number}", model=model, parallel=LAYOUTS[number], method="tidar", **sections)


def begin(rank: int, folder: Path) -> None:
    for kind in KINDS:
        for number in range(len(LAYOUTS)):
            run(of_run(folder, kind, number))


def begin_adapters(rank: int, folder: Path) -> None:
    run(replace(of_run(folder, "qwen2", 0), lora=LoraConfig(rank=4), run_dir=str(folder / "adapters")))


def look_at_adapters(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder / "adapters", ["decode.dtype=fp32"])


def write_back(rank: int, folder: Path) -> None:
    from tidar_mega.decode import load

    for kind in KINDS:
        for number in range(len(LAYOUTS)):
            load.export(folder / f"{kind}_{number}", [], folder / f"{kind}_{number}_hf")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hugging_face")
    make_corpus(folder)
    for kind, (_, rows) in KINDS.items():
        make(folder / kind, of_run(folder, kind, 0).model, rows, folder / "corpus" / "tokenizer")
        assert len(list((folder / kind).glob("*.safetensors"))) > 1
    processes.run(begin, 2, folder)
    processes.run(write_back, 1, folder)
    return folder


@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_the_weights_of_a_hugging_face_model(kind, layout, written):
    expected = {k: v for part in (written / kind).glob("*.safetensors") for k, v in load_file(part).items()}
    found = load_file(written / f"{kind}_{layout}_hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        rows = min(len(weight), len(found[name]))
        assert torch.equal(found[name][:rows], weight[:rows]), name
        assert rows == len(weight) == len(found[name]) or "embed" in name or "lm_head" in name


def test_adapters_lie_over_a_hugging_face_model(written):
    """Their checkpoint names it, and decoding reads it again; rows of the vocabulary that it lacks are drawn alike."""
    processes.run(begin_adapters, 2, written)
    found = processes.run(look_at_adapters, 1, written)[0]
    theirs = {k: v for part in (written / "qwen2").glob("*.safetensors") for k, v in load_file(part).items()}
    assert torch.equal(found["decoder.final_layernorm.weight"], theirs["model.norm.weight"])
    down = found["decoder.layers.1.mlp.linear_fc2.weight"]
    assert torch.equal(down, theirs["model.layers.1.mlp.down_proj.weight"])
    assert any(name.endswith(".a") for name in found)
    drawn = load_file(written / "qwen2_0_hf" / "model.safetensors")["model.embed_tokens.weight"][300:]
    assert drawn.abs().min(dim=1).values.count_nonzero() == len(drawn) > 0
    assert torch.equal(found["embedding.word_embeddings.weight"][300:], drawn)


def refused(rank: int, folder: Path, kind: str, path: Path, more: dict) -> str:
    config = of_run(folder, kind, 3)
    train, model = replace(config.train, init_from=str(path)), replace(config.model, **more)
    config = replace(config, train=train, model=model, run_dir=str(folder / "refused"))
    return refusal(lambda: run(config))


def of(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def without(path: Path, name: str) -> None:
    for part in path.glob("*.safetensors"):
        tensors = load_file(part)
        if tensors.pop(name, None) is not None:
            save_file(tensors, part)


def cut(path: Path) -> None:
    part = next(path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])


def another_tokenizer(path: Path) -> None:
    tree = json.loads((path / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    (path / "tokenizer.json").write_text(json.dumps(tree))


REFUSED = {  # what was changed in the folder: (in our config, words of the message)
    "another width": (lambda path: None, {"ffn_hidden_size": 96}, "model.ffn_hidden_size = 96: was made with 128"),
    "scaled RoPE": (lambda path: of(path, rope_scaling={"rope_type": "yarn"}), {}, "rope_scaling yarn config.json"),
    "another kind": (lambda path: of(path, model_type="gpt2"), {}, "model_type gpt2 must be qwen3, qwen2 or llama"),
    "no tensor": (lambda path: without(path, "model.norm.weight"), {}, "no tensor model.norm.weight"),
    "half a file": (cut, {}, "safetensors: cannot be read"),
    "another tokenizer": (another_tokenizer, {}, "its tokenizer is not that of data.path; tidar prepare --tokenizer"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), {}, "no tokenizer can be read there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, written, tmp_path):
    change, more, words = REFUSED[case]
    path = tmp_path / "model"
    shutil.copytree(written / "llama", path)
    change(path)
    message = processes.run(refused, 2, written, "llama", path, more)[0]
    assert message.startswith(("train.init_from = ", "model.")) or case == "no tokenizer", message
    for word in words.split():
        assert word in message, f"{word!r} is not in: {message}"


def test_rope_of_transformers_5_is_read(written, tmp_path):
    shutil.copytree(written / "qwen3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | new))
    assert hugging_face.Model(tmp_path / "model").shape["rotary_base"] == 5e5
    of(tmp_path / "model", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5})
    with pytest.raises(CheckpointError, match="rope_type yarn"):
        _ = hugging_face.Model(tmp_path / "model").shape
