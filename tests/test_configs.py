"""The shipped configs: what their comments say is run, they fit their GPUs, and a cut-down twin of each trains."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from tests.test_hugging_face import make as make_hugging_face
from tests.test_main_job import make_corpus, metrics, tidar
from tidar_mega import cli, config
from tidar_mega.plan.command import choose_gpus
from tidar_mega.plan.hardware import choose
from tidar_mega.plan.imbalance import whole_sequence
from tidar_mega.plan.layout import make_layout
from tidar_mega.plan.memory import fullest_stage
from tidar_mega.plan.search import search
from tidar_mega.plan.timing import predict

ROOT = Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted((ROOT / "configs").glob("tidar_*.yaml"))}


def commands(path: Path, verb: str) -> list[list[str]]:
    """The command lines in the comments of a config."""
    lines = re.findall(rf"^#   tidar {verb} (.*)$", path.read_text(), re.M)
    return [shlex.split(line) for line in lines]


PLANS = [words for path in PATHS.values() for words in commands(path, "plan")]
TRAININGS = [words for path in PATHS.values() for words in commands(path, "pretrain")]


def test_every_config_says_how_to_plan_prepare_and_train():
    assert sorted(PATHS) == ["tidar_1.5b", "tidar_70b", "tidar_8b"]
    for path in PATHS.values():
        kinds = [" ".join(words) for words in commands(path, "pretrain")]
        assert any("optimizer.lr" in line for line in kinds) and any("precision.fp8" in line for line in kinds)
        assert commands(path, "plan") and commands(path, "prepare")


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_every_plan_in_a_comment_fits_with_room_to_spare(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *words, "--json", str(tmp_path / "plan.json")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    used = plan["memory_gib"][plan["layout"]["recompute"]]["total"]
    assert used < 0.85 * plan["memory_gib"]["usable"]


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_every_training_in_a_comment_is_allowed(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = config.load(words[0], words[1:])
    assert "_scratch" in loaded.run_dir or loaded.optimizer.lr == 1e-5
    assert loaded.train.global_batch_size * loaded.data.seq_length == 1 << 21


@pytest.mark.parametrize("name", ["tidar_8b", "tidar_70b"])
def test_what_needs_several_nodes_says_how_to_submit_it(name):
    (line,) = re.findall(r"`sbatch (.*?)`", PATHS[name].read_text())
    nodes, script, path, *settings = line.split()
    assert (ROOT / script).is_file() and ROOT / path == PATHS[name]
    gpus = 8 * int(nodes.removeprefix("--nodes="))
    assert config.replicas(config.load(ROOT / path, settings), gpus, f"{gpus} GPUs") > 1


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_an_h100_with_transformer_engine_can_do_it(words):
    from tidar_mega.model import precision

    machine = precision.Machine(capability=(9, 0), cuda="12.9", engine="2.9.0")
    precision.check(config.load(ROOT / words[0], words[1:]), machine, {})


@pytest.mark.parametrize("name, tokens", [("tidar_1.5b", 50e9), ("tidar_8b", 150e9), ("tidar_70b", 50e9)])
def test_the_recipe_is_that_of_the_paper(name, tokens):
    loaded = config.load(PATHS[name])
    t, o = loaded.train, loaded.optimizer
    assert t.steps == math.ceil(tokens / (1 << 21))
    assert o.warmup_steps == round(0.01 * t.steps)
    assert (o.lr, o.min_lr, o.schedule, t.block, t.alpha) == (1e-5, 3e-6, "cosine", 16, 1.0)


@pytest.mark.parametrize("words", [w for w in PLANS if not any("fp8" in word for word in w)], ids=" ".join)
def test_no_layout_is_much_faster_than_the_one_of_the_config(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = cli._parser(["plan", *words]).parse_args(["plan", *words])
    loaded, vocab = config.load(args.config, args.overrides), args.vocab_size or 151936
    hardware = choose(args.hardware, {}, loaded)
    gpus = choose_gpus(args.gpus, loaded, hardware)
    layout = make_layout(loaded, vocab, gpus)
    assert fullest_stage(layout)[1].total < hardware.usable_bytes
    best = search(loaded, vocab, gpus, hardware).best[0].timing.tokens_per_second
    assert predict(layout, hardware, whole_sequence(loaded)).tokens_per_second > 0.95 * best


# cut-down twins

SMALL = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.kv_channels": 16,
    "data.path": "corpus",
    "data.seq_length": 64,
    "train.steps": 2,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "train.eval_interval": 0,
    "train.final_eval_sequences": 4,
    "optimizer.warmup_steps": 1,
    "checkpoint.interval": 2,
    "log.interval": 1,
    "precision.layers": "local",
    "precision.fp8": "none",
    "precision.bf16_first_layers": 0,
    "precision.bf16_last_layers": 0,
}
ONE_REPLICA = {"parallel.tensor": 1, "parallel.sequence": False, "parallel.context": 1, "parallel.data": 1}
TWINS = {  # run_dir of a training of the comments -> a layout of two processes, of a kind that the config has
    "runs/tidar_1.5b_scratch": {"parallel.data": 2},
    "runs/tidar_8b": {"parallel.data": 1},
    "runs/tidar_8b_fp8": {"parallel.data": 1, "parallel.tensor": 1, "parallel.sequence": False},
    "runs/tidar_70b": {**ONE_REPLICA, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    "runs/tidar_70b_scratch": {
        **ONE_REPLICA,
        "parallel.pipeline": 1,
        "parallel.virtual_pipeline": 1,
        "parallel.context": 2,
    },
}
KEPT = {
    "model": ("qk_layernorm", "add_qkv_bias", "tie_embeddings", "rotary_base", "norm_epsilon", "vocab_multiple"),
    "train": ("block", "alpha", "draft_fraction", "random_offset", "loss_chunk"),
    "optimizer": ("lr", "min_lr", "schedule", "weight_decay", "clip_grad"),
    "precision": ("dtype",),
    "parallel": ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
    "checkpoint": ("asynchronous",),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    make_corpus(folder)
    return folder


def run_dir(words: list[str]) -> str:
    return config.load(ROOT / words[0], words[1:]).run_dir


IDLM = ROOT / "configs" / "idlm.yaml"
IDLM_SMALL = SMALL | {"data.seq_length": 63, "parallel.data": 1}


@pytest.mark.distributed
def test_a_twin_of_every_command_of_the_idlm_config_runs(corpus):
    """In the order of the comments: the AR model, I-DLM that begins from it, adapters over it, and their decoding."""
    smaller = [f"{key}={value}" for key, value in IDLM_SMALL.items()]
    trainings = commands(IDLM, "pretrain")
    assert [run_dir(words) for words in trainings] == ["runs/idlm_base", "runs/idlm", "runs/idlm_lora"]
    for words in trainings:
        out = tidar(corpus, "pretrain", str(ROOT / words[0]), *words[1:], *smaller)
        assert "done: 2 steps" in out
    (words,) = commands(IDLM, "generate")
    texts = []
    for name in (words[0], "runs/idlm_base"):  # adapters say what their base says
        tidar(corpus, "generate", name, *words[1:], "decode.max_tokens=12", "--json", f"{Path(name).name}.json")
        texts.append(json.loads((corpus / f"{Path(name).name}.json").read_text())["text"])
    assert texts[0] == texts[1]


@pytest.mark.distributed
@pytest.mark.parametrize("run", TWINS)
def test_a_twin_trains(run, corpus):
    """The command of a comment with a smaller shape, without FP8, which needs a GPU."""
    (words,) = [words for words in TRAININGS if run_dir(words) == run]
    smaller = [f"{key}={value}" for key, value in {**SMALL, **TWINS[run]}.items()]
    original, twin = config.load(ROOT / words[0], words[1:]), config.load(ROOT / words[0], [*words[1:], *smaller])
    for section, names in KEPT.items():
        for name in names:
            assert getattr(getattr(twin, section), name) == getattr(getattr(original, section), name), name
    if twin.train.init_from is not None:
        base = corpus / f"{Path(run).name}_base"
        make_hugging_face(base, twin.model, 320, corpus / "corpus" / "tokenizer")
        smaller.append(f"train.init_from={base}")
    out = tidar(corpus, "pretrain", str(ROOT / words[0]), *words[1:], *smaller)
    assert "done: 2 steps" in out and (twin.train.init_from is None or f"from {base}" in out)
    losses = [line["loss"] for line in metrics(corpus, run).values()]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
