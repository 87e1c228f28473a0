"""Runs that begin from another run's weights: in any layout, refused with a clear error where they do not fit, and with
adapters that are saved alone and know their base."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.test_main_job import make_corpus
from tidar_mega import config as config_module
from tidar_mega.checkpoint.store import CheckpointError
from tidar_mega.config import UserError

pytestmark = pytest.mark.distributed

TREE = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    },
    "data": {"seq_length": 64},
    "train": {
        "steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "block": 2,
        "eval_interval": 0,
        "final_eval_sequences": 2,
    },
    "optimizer": {"lr": 3e-3, "warmup_steps": 1},
    "precision": {"dtype": "bf16"},
    "checkpoint": {"interval": 4, "keep_last": 9},
    "log": {"interval": 1, "tensorboard": False},
    "launch": {"preflight": False},
}


def settings(folder: Path, run: str, **sections) -> config_module.Config:
    tree = {k: {**v, **sections.pop(k, {})} for k, v in TREE.items()}
    tree["data"] = tree["data"] | {"path": str(folder / "corpus")}
    return config_module.from_tree({**tree, **sections, "run_dir": str(folder / run)})


def run(config: config_module.Config) -> list[Path]:
    """A whole run inside this process's world; its checkpoints."""
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train.health import StopRequest
    from tidar_mega.train.loop import train

    train(config, build_mesh(config), StopRequest())
    gc.collect()  # what holds the lock of the run folder until the process ends
    return sorted((Path(config.run_dir) / "checkpoints").glob("step_*"))


def weights(path: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Those that decoding would use, in this process's layout."""
    from tidar_mega.decode import load
    from tidar_mega.parallel.mesh import build_mesh

    checkpoint, config = load.saved(path, ["decode.dtype=bf16", *overrides])
    config = load.decoding_config(config)
    model = load.load_model(checkpoint, config, build_mesh(config))
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def refusal(action) -> str:
    try:
        action()
    except (CheckpointError, UserError) as error:
        return str(error)
    return "not refused"


def begin(rank: int, folder: Path) -> dict:
    """In two processes: a base by tensor parallelism, and what begins from it by other layouts."""
    runs, found = str(folder / "base"), {}
    run(settings(folder, "base", method="ar", parallel={"tensor": 2, "sequence": True}))
    start = {"init_from": runs}
    other = settings(folder, "other", method="ar", train={"seed": 99}, parallel={"data": 2})
    run(other)
    # no learning: what is saved is what it began with, through the optimizer's float32 copies
    still = {"lr": 1e-20, "min_lr": 0.0, "weight_decay": 0.0}
    run(settings(folder, "still", method="tidar", train=start, optimizer=still, parallel={"pipeline": 2}))
    run(settings(folder, "idlm", method="idlm", train=start, parallel={"data": 2}))
    lora = {"rank": 4, "alpha": 8.0}
    adapters = settings(folder, "lora", method="idlm", train=start, lora=lora, parallel={"tensor": 2})
    run(adapters)
    longer = {**start, "steps": 6}
    run(settings(folder, "lora", method="idlm", train=longer, lora=lora, parallel={"tensor": 2}))
    found["resumed over another"] = refusal(
        lambda: run(
            settings(
                folder,
                "lora",
                method="idlm",
                train={"steps": 8, "init_from": str(folder / "other")},
                lora=lora,
                parallel={"tensor": 2},
            )
        )
    )
    for name, sections in {
        "shape": {"model": {"num_layers": 4}},
        "nowhere": {"train": {"init_from": str(folder / "nothing")}},
        "adapters": {"train": {"init_from": str(folder / "lora")}},
    }.items():
        changed = {"train": start, "parallel": {"data": 2}} | sections
        found[name] = refusal(lambda name=name, changed=changed: run(settings(folder, name, **changed)))
    return found


def look(rank: int, folder: Path) -> dict:
    """In one process: what was saved, and what is refused of it."""
    from tidar_mega import device
    from tidar_mega.decode import load

    device.start_alone()
    found = {name: weights(folder / name, []) for name in ("base", "still", "idlm", "lora")}
    moved = folder / "moved"
    shutil.copytree(folder / "base", moved)
    found["moved"] = weights(folder / "lora", [f"train.init_from={moved}"])
    over_other = [f"train.init_from={folder / 'other'}"]
    found["over another"] = refusal(lambda: weights(folder / "lora", over_other))
    found["convert"] = refusal(lambda: load.export(folder / "lora", [], folder / "hf"))
    outputs = {}
    for name, mode in (("base", "ar"), ("lora", "fused")):
        loaded = load.load_engine(
            folder / name, ["decode.outcomes=last", f"decode.mode={mode}", "decode.temperature=1"]
        )
        prompts = [loaded.tokenizer.encode(text) for text in ("def main(", "class A:\n    x = ", "import os")]
        outputs[name] = [g.tokens for g in loaded.engine.generate(prompts, loaded.params, mode)]
        assert name == "base" or loaded.engine.block == 3, "the trained stride is one more than the block"
    found["outputs"] = outputs
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init_from")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def begun(folder) -> dict:
    return processes.run(begin, 2, folder, timeout_seconds=1200)[0]


@pytest.fixture(scope="module")
def seen(folder, begun) -> dict:
    return processes.run(look, 1, folder, timeout_seconds=600)[0]


def test_a_run_begins_with_the_weights_of_another_layout_and_method(seen):
    assert seen["still"].keys() == seen["base"].keys()
    for name, weight in seen["base"].items():
        assert torch.equal(seen["still"][name], weight), name
    assert any(not torch.equal(seen["idlm"][name], weight) for name, weight in seen["base"].items())


def test_adapters_are_saved_alone_and_loaded_over_their_base(seen, folder):
    base, ours = seen["base"], seen["lora"]
    assert all(torch.equal(ours[name], weight) for name, weight in base.items())
    adapters = ours.keys() - base.keys()
    assert len(adapters) == 2 * 4 * 2 and all(ours[name].abs().max() > 0 for name in adapters)
    assert all(torch.equal(seen["moved"][name], weight) for name, weight in ours.items())
    sizes = {
        run: sum(f.stat().st_size for f in folder.glob(f"{run}/checkpoints/step_00000004/*.distcp"))
        for run in ("base", "lora")
    }
    assert sizes["lora"] < 0.4 * sizes["base"]


def test_the_adapted_run_decodes_what_its_base_says(seen):
    assert seen["outputs"]["lora"] == seen["outputs"]["base"]
    assert len({token for tokens in seen["outputs"]["base"] for token in tokens}) > 10


def test_another_base_is_refused(seen, begun):
    for message in (seen["over another"], begun["resumed over another"]):
        assert "not the base that the adapters of" in message and "fingerprint" in message


def test_what_does_not_fit_is_refused(seen, begun):
    assert "model.num_layers = 4: train.init_from =" in begun["shape"] and "was made with 2" in begun["shape"]
    assert "train.init_from =" in begun["nowhere"] and "no checkpoint there" in begun["nowhere"]
    assert "holds only adapters" in begun["adapters"]
    assert "adapters act on mask rows alone" in seen["convert"] and "convert its base" in seen["convert"]


def test_a_tokenizer_of_other_tokens_is_refused(folder, begun, tmp_path):
    from tidar_mega.checkpoint import base as base_module
    from tidar_mega.checkpoint import store

    checkpoint = store.resolve(folder / "base")
    meta = store.read_meta(checkpoint)
    other = tmp_path / "tokenizer"
    shutil.copytree(checkpoint / "tokenizer", other)
    model = (other / "tokenizer.json").read_text()
    base_module._check(checkpoint, meta, store.saved_config(checkpoint, meta), meta["vocab_size"], other)
    (other / "tokenizer.json").write_text(model.replace('"merges":', '"merges_of_others":', 1))
    with pytest.raises(CheckpointError, match="its tokenizer .* is not that of data.path"):
        base_module._check(checkpoint, meta, store.saved_config(checkpoint, meta), meta["vocab_size"], other)


def test_a_fingerprint_is_that_of_the_files(folder, begun, tmp_path):
    from tidar_mega.checkpoint import store
    from tidar_mega.checkpoint.base import fingerprint

    checkpoint = store.resolve(folder / "base")
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    assert fingerprint(copy) == fingerprint(checkpoint) != fingerprint(store.resolve(folder / "other"))
    shard = next(copy.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert fingerprint(copy) != fingerprint(checkpoint)
