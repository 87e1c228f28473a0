"""The benchmarks run, write the keys that others read, and compare like with like; their figures are not asserted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tidar_mega import cli
from tidar_mega.bench import layouts

pytestmark = pytest.mark.distributed


def bench(tmp_path, *arguments: str) -> dict:
    file = tmp_path / "figures.json"
    assert cli.main(["bench", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_bench_attention(tmp_path):
    figures = bench(tmp_path, "attention", "--seq-length", "128", "--repeats", "1")
    assert figures["dense_over_tiles"] > 0 and figures["tiles_over_causal_2s"] > 0
    assert figures["dense_over_tiles_bf16"] > 0
    assert all(error < 1e-5 for error in figures["errors"]["fp32"]["tiles"].values())


def test_json_without_a_file_prints_the_figures_alone(capfd):
    assert cli.main(["bench", "attention", "--seq-length", "64", "--repeats", "1", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["dense_over_tiles"] > 0
    assert "against float64" in captured.err


def test_bench_train(tmp_path):
    small = ("--seq-length=64", "--layers=1", "--hidden=128", "--vocab=128", "--repeats=1")
    figures = bench(tmp_path, "train", *small)
    assert figures["speedup_over_plain"] > 0
    assert set(figures["peak_memory_bytes"]) == set(figures["tokens_per_second"]) == {"tidar_mega", "plain"}
    assert all(value > 2**20 for value in figures["peak_memory_bytes"].values())


def test_bench_layouts(tmp_path):
    size = ("--seq-length=32", "--layers=4", "--hidden=256", "--vocab=128", "--batch=2", "--steps=1", "--rounds=1")
    figures = bench(tmp_path, "layouts", *size, "--processes=2")["layouts"]
    processes = {str((t, p, v, c, d)): t * p * c * d for t, p, v, c, d in layouts.LAYOUTS}
    assert list(figures) == [layout for layout, count in processes.items() if count <= 2]
    assert figures[str(layouts.LAYOUTS[0])]["speedup_over_one_process"] == 1
    for found in figures.values():
        assert found["tokens_per_second"] > 0 and 0 <= found["communication"] < 1


def test_on_gpus_there_is_no_share_of_communication(capsys):
    args = SimpleNamespace(batch=2, seq_length=32)
    found = layouts._summary(
        [{layouts.LAYOUTS[0]: {"seconds": [2.0], "communication": None}}], layouts.LAYOUTS[0], args
    )
    assert found["communication"] is None and found["tokens_per_second"] == 32
    layouts._show({str(layouts.LAYOUTS[0]): found})
    assert "- │" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "layouts"])
def test_a_vocabulary_needs_an_id_beside_the_mask(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", name, "--vocab", "1"])
    assert "--vocab: 1: must be a whole number of 2 or more" in capsys.readouterr().err


def test_the_peer_computes_the_same_loss():
    """A speed-up over a peer that does something else would say nothing."""
    from tests import processes

    ours, plain = processes.run(both_losses, 1)[0]
    assert ours == pytest.approx(plain, rel=1e-6)


def both_losses(rank: int) -> tuple[float, float]:
    from tests.steps import MASK, VOCAB, Text, settings
    from tidar_mega import methods
    from tidar_mega.bench.plain import PlainModel
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, normalise, summarise

    config = settings(
        model={"qk_layernorm": False, "num_attention_heads": 4, "num_query_groups": 4, "attention": "dense"},
        train={"global_batch_size": 2, "micro_batch_size": 2},
    )
    mesh = build_mesh(config)
    (model,) = optim.wrap(config, gpt.build(config, VOCAB))
    task = Task(config, mesh, methods.load(config, MASK), [model], torch.ones(VOCAB))
    batch = list(micro_batches(task, Text, 0, 2))
    plain = PlainModel(config.model, config.padded_vocab_size(VOCAB))
    _copy(model.module, plain)
    ours = summarise(task, accumulate_gradients(task, batch))["loss"]
    return ours, float(plain(normalise(task, batch)[0][0]))


@torch.no_grad()
def _copy(model, plain) -> None:
    heads = plain.layers[0].heads
    plain.embedding.weight.copy_(model.embedding.word_embeddings.weight)
    plain.head.weight.copy_(model.head_weight)
    plain.norm.weight.copy_(model.decoder.final_layernorm.weight)
    for layer, twin in zip(model.decoder.layers, plain.layers, strict=True):
        per_head = layer.self_attention.linear_qkv.weight.unflatten(0, (heads, 3, -1))  # megatron: q, k, v of each head
        twin.qkv.weight.copy_(per_head.transpose(0, 1).flatten(0, 2))
        twin.out.weight.copy_(layer.self_attention.linear_proj.weight)
        twin.gate_up.weight.copy_(layer.mlp.linear_fc1.weight)
        twin.down.weight.copy_(layer.mlp.linear_fc2.weight)
        twin.norm_attention.weight.copy_(layer.input_layernorm.weight)
        twin.norm_mlp.weight.copy_(layer.pre_mlp_layernorm.weight)
