"""Decoding through its commands, on a real run: layouts, benchmarks, the latency curve, the trace, Hugging Face."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import processes
from tests.test_main_job import CONFIG, make_corpus, tidar
from tidar_mega import cli
from tidar_mega.decode.load import load_engine
from tidar_mega.launch.local import _free_port

pytestmark = pytest.mark.distributed
PROMPT = "    def read(self, path"
REJECTION = "decode.acceptance=rejection"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run trained with tensor parallelism, for a few steps."""
    folder = tmp_path_factory.mktemp("decode")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    layout = ("parallel.data=1", "parallel.tensor=2", "parallel.sequence=true", "model.init_std=0.1")
    tidar(folder, "pretrain", "run.yaml", "run_dir=run", "train.steps=12", *layout)
    return folder


def here(folder: Path, *arguments: str, code: int = 0) -> str:
    """The command in this process, which has imported everything; what it says. Rank 0 of several is a process."""
    with contextlib.chdir(folder), io.StringIO() as said:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = cli.main(list(arguments))
        assert found == code, said.getvalue()
        return said.getvalue()


def generate(folder: Path, *arguments: str) -> dict:
    settings = ("decode.max_tokens=40", "decode.temperature=1", *arguments)
    command = tidar if any(re.match("decode.(tensor|pipeline|data)=", a) for a in arguments) else here
    command(folder, "generate", "run", "--prompt", PROMPT, *settings, "--json", "text.json")
    return json.loads((folder / "text.json").read_text())


def test_every_layout_and_choice_of_outcomes_writes_the_same_text(work):
    expected = generate(work, "decode.mode=ar")
    assert len(expected["text"]) > 20 and expected["tokens_per_forward"] == 1
    for overrides in (
        ["decode.outcomes=all"],
        ["decode.outcomes=auto"],
        ["decode.outcomes=[1,4]", "decode.prefill_chunk=3"],
        ["decode.outcomes=last", "decode.tensor=2"],
        ["decode.outcomes=none", "decode.pipeline=2", "decode.block=8"],
        ["decode.data=2"],
    ):
        found = generate(work, *overrides)
        assert found["text"] == expected["text"], overrides
    curves = json.loads((work / "run" / "latency.json").read_text())
    assert any("tensor 1, pipeline 1" in name for name in curves), "the automatic choice keeps what it has measured"


def _loaded(rank: int, checkpoints: list[Path], port: int) -> Path:
    dist.destroy_process_group()  # loading joins the world that a launcher describes
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    loaded = load_engine(checkpoints[rank], ["decode.tensor=2", "decode.outcomes=all"])
    return loaded.checkpoint


def test_ranks_that_find_another_newest_checkpoint_load_that_of_the_first(work):
    """As each does while the run goes on."""
    checkpoints = sorted((work / "run" / "checkpoints").glob("step_*"))[-2:]
    assert processes.run(_loaded, 2, checkpoints, _free_port()) == [checkpoints[0]] * 2


def test_bench_slots_keeps_the_latency_curve_beside_the_checkpoints(work):
    (work / "run" / "latency.json").unlink(missing_ok=True)
    told = here(
        work, "bench", "slots", "run", "--repeats", "1", "--prefixes", "32", "--json", "slots.json", "decode.batch=4"
    )
    figures = json.loads((work / "slots.json").read_text())
    curve = figures["by_prefix"]["32"]
    assert set(curve["step"]) == {"1", "2", "4"} and "stored in" in told
    assert all(seconds >= 0 for points in curve["step"].values() for _, seconds in points)
    stored = json.loads((work / "run" / "latency.json").read_text())[figures["key"]]
    assert stored["by_prefix"]["32"]["step"] == curve["step"] and curve["slots"]["1"]["2.0x"] >= 1


def test_bench_decode_compares_with_ar_and_with_transformers(work):
    arguments = ("--prompts=3", "--prompt-tokens=16", "--max-tokens=12", "--repeats=1", "--batches", "1", "2")
    plot = ("--blocks", "4", "2", "--outcomes", "all", "auto", "--plot", "speed.png", "--json", "figures.json")
    here(work, "bench", "decode", "run", *arguments, *plot)
    figures = json.loads((work / "figures.json").read_text())
    assert figures["identical_to_ar"] == 1 and figures["tokens_per_forward"] >= 1
    assert 0 < figures["engine_overhead"] < 1 and figures["ar_over_transformers"] > 0
    ways = {
        (row["batch"], row["temperature"], row["way"], row["block"], row["outcomes"]) for row in figures["settings"]
    }
    expected = {(b, t, "ar", None, None) for b in (1, 2) for t in (0.0, 1.0)}
    expected |= {
        (b, t, "fused", block, outcomes)
        for b in (1, 2)
        for t in (0.0, 1.0)
        for block in (2, 4)
        for outcomes in ("all", "auto")
    }
    expected |= {(1, 0.0, "transformers", None, None), (2, 0.0, "transformers", None, None)}
    assert ways == expected | {(1, 0.0, "prompt lookup", None, None)}
    peers = [row for row in figures["settings"] if row["way"] in ("transformers", "prompt lookup")]
    assert all(row["identical_to_ar"] == 1 for row in peers), "transformers must compute the same model"
    assert (work / "speed.png").stat().st_size > 1000 and figures["validation_nats_per_byte"] > 0
    oracle = ("--oracle", "1.0", "--no-peers", "--batches", "1", "--blocks", "4", "--temperatures", "0")
    here(work, "bench", "decode", "run", *arguments[:4], *oracle, "--json", "oracle.json")
    forced = json.loads((work / "oracle.json").read_text())
    assert forced["tokens_per_forward"] > 3 and forced["identical_to_ar"] == 1


def test_bench_decode_tells_rows_that_are_not_ars_own_from_those_that_are(work):
    arguments = ("--prompts=3", "--prompt-tokens=16", "--max-tokens=12", "--repeats=1", "--batches", "2", "--no-peers")
    here(work, "bench", "decode", "run", *arguments, "--blocks", "4", "--json", "rejection.json", REJECTION)
    figures = json.loads((work / "rejection.json").read_text())
    rules = {row["temperature"]: row["rule"] for row in figures["settings"] if row["way"] == "fused"}
    assert rules == {0.0: "coupled", 1.0: "rejection"} and figures["identical_to_ar"] == 1
    sampled = ("--temperatures", "1", "--blocks", "4", "--oracle", "0.8")
    for setting, said in ((REJECTION, "decode.acceptance = rejection"), ("decode.beta=0.5", "decode.beta = 0.5")):
        told = here(work, "bench", "decode", "run", *arguments, *sampled, setting, code=2)
        assert f"--oracle: {said} weighs drafted tokens" in told


@pytest.mark.parametrize(
    "shape", [(), ("model.qk_layernorm=true",), ("model.add_qkv_bias=true", "model.tie_embeddings=true")]
)
def test_a_converted_model_is_the_same_in_transformers(work, tmp_path, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = "run"
    if shape:
        run = str(tmp_path / "run")
        tidar(
            work,
            "pretrain",
            "run.yaml",
            f"run_dir={run}",
            "train.steps=4",
            "parallel.data=1",
            "model.init_std=0.1",
            *shape,
        )
    folder = tmp_path / "hf"
    here(work, "convert", run, "--to", str(folder))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"  # as it was trained
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    settings = ("decode.max_tokens=24", "decode.mode=ar", "--json", "ours.json")
    here(work, "generate", run, "--prompt", PROMPT, *settings)
    ours = json.loads((work / "ours.json").read_text())
    assert tokenizer.decode(output[0], skip_special_tokens=True) == PROMPT + ours["text"]
    assert f"{folder}: exists already" in here(work, "convert", run, "--to", str(folder), code=2)
    here(work, "generate", str(folder), "--prompt", PROMPT, "decode.max_tokens=24", "--json", "theirs.json")
    assert json.loads((work / "theirs.json").read_text())["text"] == ours["text"]


def test_a_hugging_face_model_is_evaluated_as_it_is(work, tmp_path):
    folder = tmp_path / "hf"
    here(work, "convert", "run", "--to", str(folder))
    few = ("--prompts", "2", "--max-tokens", "8", "--sequences", "4", "data.seq_length=64")
    before = sorted(folder.iterdir())
    here(work, "evaluate", str(folder), *few, "data.path=corpus", "--json", "hf.json")
    here(work, "evaluate", "run", *few, "decode.mode=ar", "--json", "run.json")
    theirs, ours = (json.loads((work / f"{name}.json").read_text()) for name in ("hf", "run"))
    assert theirs.pop("step") is None and ours.pop("step") > 0
    for name in ("validation_nats_per_token", "validation_nats_per_byte", "tokens", "distinct_4gram"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    assert sorted(folder.iterdir()) == before
    assert "is a Hugging Face model already" in here(work, "convert", str(folder), "--to", str(tmp_path / "x"), code=2)
    tidar(work, "prepare", "source", "--output", "other", "--vocab-size", "300")
    out = here(work, "evaluate", str(folder), *few, "data.path=other", code=2)
    assert "data.path = other: its tokenizer is not that of" in out


def test_a_trace_shows_drafts_and_corrections(work):
    settings = ("generate", "run", "--prompt", PROMPT, "decode.max_tokens=20", "decode.outcomes=all")
    assert "AR's own" in here(work, *settings, "--trace")
    told = tidar(work, *settings[:-1], "--trace", settings[-1], code=2)  # argparse ends the process
    assert "argument --trace: decode.outcomes=all: looks like a setting" in told
    here(work, "generate", "run", "--prompt", PROMPT, "--trace", "trace.html", "decode.max_tokens=20")
    page = (work / "trace.html").read_text()
    assert page.startswith("<!doctype html>") and page.count('<span class="ar">') > 3
    blocks = ("decode.max_tokens=20", "decode.mode=blocks", "--json", "blocks.json")
    here(work, "generate", "run", "--prompt", PROMPT, "--trace", "blocks.html", *blocks)
    drawn = (work / "blocks.html").read_text().count('<span class="drawn">')
    assert drawn == 1 + len(sum(json.loads((work / "blocks.json").read_text())["commits"], [])), "all, and the legend"


def test_what_is_not_exact_is_said(work):
    arguments = ("generate", "run", "--prompt", PROMPT, "decode.max_tokens=8", "decode.outcomes=all")
    assert "not the AR half's own output" in here(work, *arguments, "decode.beta=0.5")
    assert "not the AR half's own output" not in here(work, *arguments)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["decode.tensor=3"], "decode.tensor = 3: must be a divisor of model.num_attention_heads (4)"),
        (["decode.pipeline=3"], "decode.pipeline = 3: must be a divisor of model.num_layers (2)"),
        (["decode.outcomes=some"], "decode.outcomes = some: must be auto, all, last, none or a list"),
        (["decode.outcomes=[9]"], "outcomes = [9]: 9 is not among 1 .. 4, the draft length"),
        (["decode.cache_tokens=16"], "the engine's pages hold 64 tokens in all"),
        (["decode.beta=0.5", "decode.outcomes=last"], "mixed verification reads the masks behind every outcome"),
    ],
)
def test_impossible_settings_are_one_clear_error(work, overrides, message):
    told = here(work, "generate", "run", "--prompt", PROMPT, "decode.max_tokens=90", *overrides, code=2)
    assert message in told and "Traceback" not in told
