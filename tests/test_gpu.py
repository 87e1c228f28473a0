"""What only a GPU can show: NCCL, FlexAttention in a training run, Transformer Engine's layers and FP8, a resume there,
memory and speed, and decoding on the device. `make test-gpu` runs it; the figures that it prints are not asserted."""

from __future__ import annotations

import json
import math
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.steps import MASK, SEQUENCES, VOCAB, Text, settings
from tests.test_main_job import CONFIG, losses, make_corpus, metrics, tidar
from tidar_mega import config as config_module
from tidar_mega.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run `make test-gpu` on one"),
]

TIDAR_1_5B = Path(__file__).parent.parent / "configs" / "tidar_1.5b.yaml"
MIDDLE = {  # big enough to fill a GPU, small enough for any that is used for training
    "num_layers": 8,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 16,
    "num_query_groups": 4,
}


def recipes() -> list[str]:
    from tidar_mega.model import precision

    return precision.possible_recipes(precision.this_machine())


def need_engine() -> None:
    from tidar_mega.model import precision

    machine = precision.this_machine()
    if machine.engine is None:
        pytest.skip(f"needs Transformer Engine: {machine.why_no_engine}")


def alone(function, *args):
    """`function(*args)` in a process of its own, as a world of one with NCCL: peak memory and settings are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_world, function, args).result(timeout=900)


def _in_world(function, args):
    from tidar_mega import device

    device.start_alone()
    return function(*args)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with real source code, prepared, and a config."""
    folder = tmp_path_factory.mktemp("gpu")
    make_corpus(folder)
    text = CONFIG.replace("parallel: {data: 2}", "parallel: {data: 1}").replace("seq_length: 64", "seq_length: 256")
    (folder / "run.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def work(corpus):
    """The same with a finished run."""
    tidar(corpus, "pretrain", "run.yaml", "run_dir=whole")
    return corpus


@pytest.fixture
def say(capsys):
    """Prints a line of figures, though pytest keeps what else is printed to itself."""

    def line(name: str, figures: dict) -> None:
        shown = ", ".join(f"{key} {value:,.3f}" for key, value in figures.items() if key != "loss")
        with capsys.disabled():
            print(f"\n  {name}: {shown}")

    return line


def test_training_on_the_gpu_learns_and_flex_equals_dense(work):
    tidar(work, "pretrain", "run.yaml", "run_dir=dense", "model.attention=dense")
    flex, dense = losses(work, "whole"), losses(work, "dense")
    assert metrics(work, "whole")[16]["loss"] < metrics(work, "whole")[1]["loss"] - 0.3
    for step, figures in flex.items():
        assert figures[0] == pytest.approx(dense[step][0], rel=2e-2)


def test_a_resume_on_the_gpu_goes_on_where_it_stopped(work):
    tidar(work, "pretrain", "run.yaml", "run_dir=halves", "train.steps=8", "optimizer.schedule=constant")
    tidar(work, "pretrain", "run.yaml", "run_dir=halves", "optimizer.schedule=constant")
    tidar(work, "pretrain", "run.yaml", "run_dir=constant", "optimizer.schedule=constant")
    whole, halves = losses(work, "constant"), losses(work, "halves")
    assert whole.keys() == halves.keys()
    for step, figures in whole.items():
        assert halves[step] == pytest.approx(figures, rel=1e-2)  # kernels may add up in another order


def test_fused_decoding_on_the_gpu_equals_ar(work):
    texts = []
    for mode, outcomes in (("ar", "all"), ("fused", "all"), ("fused", "last"), ("fused", "none"), ("fused", "auto")):
        settings = (
            f"decode.mode={mode}",
            f"decode.outcomes={outcomes}",
            "decode.max_tokens=300",
        )  # beyond pages of 128
        tidar(work, "generate", "whole", "--prompt", "def main(", *settings, "--json", "text.json")
        texts.append(json.loads((work / "text.json").read_text())["text"])
    assert len(set(texts)) == 1


def test_adapters_on_the_gpu_leave_the_output_of_their_base(work):
    """Recorded or not: the gate of each row is a choice inside the graph."""
    more = ("train.init_from=whole", "lora.rank=8", "optimizer.lr=1.0e-2")
    tidar(work, "pretrain", "run.yaml", "run_dir=adapted", *more)
    texts = set()
    for run, mode, graphs in (("whole", "ar", "true"), ("adapted", "fused", "true"), ("adapted", "fused", "false")):
        same = ("decode.outcomes=all", "decode.max_tokens=64", "decode.temperature=1", "--json", "text.json")
        kind = (f"decode.mode={mode}", f"decode.cuda_graphs={graphs}")
        tidar(work, "generate", run, "--prompt", "def main(", *kind, *same)
        texts.add(json.loads((work / "text.json").read_text())["text"])
    assert len(texts) == 1


def test_multi_token_prediction_on_the_gpu_decodes_what_ar_decodes(work):
    mtp = ("method=mtp", "model.mtp_num_layers=3", "run_dir=mtp")
    tidar(work, "pretrain", "run.yaml", *mtp)
    small = ("--prompts", "8", "--batches", "1", "4", "--blocks", "4", "--no-peers", "--outcomes", "all")
    tidar(work, "bench", "decode", "mtp", *small, "--json", "mtp.json")
    found = json.loads((work / "mtp.json").read_text())
    assert found["identical_to_ar"] == 1 and found["tokens_per_forward"] > 1


def test_recorded_forwards_on_the_gpu_give_the_same(work, say):
    figures = {}
    for name, graphs in (("recorded", "true"), ("launched one by one", "false")):
        small = ("--prompts", "8", "--batches", "1", "4", "--blocks", "4", "--no-peers", "--outcomes", "all", "last")
        small += ("--max-tokens", "200")  # pages of 128 tokens fill up while recordings are replayed
        tidar(work, "bench", "decode", "whole", f"decode.cuda_graphs={graphs}", *small, "--json", "decode.json")
        found = json.loads((work / "decode.json").read_text())
        assert found["identical_to_ar"] == 1
        rows = [row for row in found["settings"] if row["way"] in ("ar", "fused") and row["temperature"] == 0]
        figures |= {f"{name}, {r['way']}, batch {r['batch']}, ms": 1e3 * r["forward_seconds"] for r in rows}
    say("one forward of a request", figures)


def compare_attentions() -> float:
    """Largest difference of hidden states between FlexAttention over pages and plain products over them."""
    from tests.test_decode_batching import mixed_hidden
    from tests.test_decode_requests import Bytes
    from tidar_mega.decode.engine import Engine
    from tidar_mega.model.gpt import build
    from tidar_mega.model.inference import InferenceModel
    from tidar_mega.parallel.mesh import build_mesh

    config = config_module.from_tree({"model": MIDDLE | {"num_layers": 2}, "precision": {"dtype": "fp32"}})
    build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    engine = Engine(InferenceModel(model), Bytes(), 4, 2048, cache_tokens=8192)
    plain, flex = mixed_hidden(engine, lengths=(127, 0, 256, 3, 300, 129))
    return float((flex - plain).abs().max() / plain.abs().max())


def test_the_attention_over_pages_has_the_numbers_of_plain_products():
    assert alone(compare_attentions) < 2e-3  # TF32 in FlexAttention's kernels


def compare_scores() -> float:
    """Largest difference of log-likelihoods of continuations between FlexAttention and the dense mask, in nats."""
    from tests.test_decode_requests import Bytes
    from tidar_mega.decode.engine import Engine
    from tidar_mega.evaluation import likelihood
    from tidar_mega.model.gpt import build
    from tidar_mega.model.inference import InferenceModel
    from tidar_mega.parallel.mesh import build_mesh

    config = config_module.from_tree({"model": MIDDLE | {"num_layers": 2}, "precision": {"dtype": "fp32"}})
    build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    engine = Engine(InferenceModel(model), Bytes(), 4, 2048, cache_tokens=8192)
    pairs = [(list(range(1 + 30 * (i // 3))), list(range(i, i + 4))) for i in range(15)]
    flex = likelihood.score(engine, pairs)
    likelihood.choose_backend = lambda *_: "dense"
    dense = likelihood.score(engine, pairs)
    return max(abs(a - b) for (a, _), (b, _) in zip(flex, dense, strict=True))


def test_likelihoods_of_continuations_are_those_of_the_dense_mask():
    assert alone(compare_scores) < 2e-2


def test_the_latency_curve_of_this_gpu(work, say):
    tidar(work, "bench", "slots", "whole", "--json", "slots.json")
    figures = json.loads((work / "slots.json").read_text())
    say(figures["key"], {f"{r:g} rows, ms": 1e3 * seconds for r, seconds in figures["by_prefix"]["64"]["step"]["1"]})


def test_a_deterministic_run_repeats_bit_by_bit(work, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for run in ("first", "second"):
        tidar(work, "pretrain", "run.yaml", f"run_dir={run}", "precision.deterministic=true")
    assert losses(work, "first") == losses(work, "second")


def step_of_layers(config: Config) -> dict:
    """Loss and the gradient of every weight, by its local name, of one step; weights depend on the seed alone."""
    from tidar_mega import device, methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    mesh = build_mesh(config)
    chunks = optim.wrap(config, gpt.build(config, VOCAB))
    token_bytes = torch.ones(VOCAB, device=device.device())
    task = Task(config, mesh, methods.load(config, MASK), chunks, token_bytes)
    sums = accumulate_gradients(task, list(micro_batches(task, Text, 0, SEQUENCES)))
    named = chunks[0].module.named_parameters()
    gradients = {_local(name): p.main_grad.float().cpu() for name, p in named}
    return {"loss": summarise(task, sums)["loss"], "gradients": gradients}


def waits_for_the_device() -> dict[int, int]:
    """How often the host waits for the GPU in the forwards and backwards of a step, by its number of micro-batches."""
    from tidar_mega import device, methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches

    config = settings(train={"micro_batch_size": 1, "global_batch_size": 4}, precision={"dtype": "bf16"})
    mesh = build_mesh(config)
    chunks = optim.wrap(config, gpt.build(config, VOCAB))
    token_bytes = torch.ones(VOCAB, device=device.device())
    task, found = Task(config, mesh, methods.load(config, MASK), chunks, token_bytes), {}
    for count in (1, 4, 1, 4):  # the first compile
        batch = list(micro_batches(task, Text, 0, count))
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            accumulate_gradients(task, batch)
        torch.cuda.set_sync_debug_mode("default")
        found[count] = sum("synchronizing" in str(warning.message) for warning in said)
    return found


def test_no_micro_batch_waits_for_the_device():
    found = alone(waits_for_the_device)
    assert found[4] == found[1] > 0, "those of a whole step, whose figures are read once"


def _local(name: str) -> str:
    """The local name of a weight of Transformer Engine's layers."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-2), ("bf16", 6e-2)])  # its fp32 products are TF32
@pytest.mark.parametrize("more", [{}, {"recompute": "full"}, {"gradient_accumulation_fusion": True}])
def test_transformer_engines_layers_equal_the_local_ones(dtype, tolerance, more):
    need_engine()
    sections = {"train": {"micro_batch_size": 2}, "model": {"add_qkv_bias": True, "attention": "dense"}}
    local = alone(step_of_layers, settings(precision={"dtype": dtype, "layers": "local"}, **sections))
    engine = alone(step_of_layers, settings(precision={"dtype": dtype, "layers": "te"}, parallel=more, **sections))
    assert engine["loss"] == pytest.approx(local["loss"], rel=tolerance / 10)
    assert engine["gradients"].keys() == local["gradients"].keys()
    for name, expected in local["gradients"].items():
        error = (engine["gradients"][name] - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(("first", "then"), [("local", "te"), ("te", "local")])
def test_each_kind_of_layers_goes_on_from_the_others_checkpoint(work, first, then):
    need_engine()
    for run, layers in (("_one_kind", first), ("_both_kinds", then)):
        run_dir = f"run_dir={first}{run}"
        tidar(
            work,
            "pretrain",
            "run.yaml",
            run_dir,
            "train.steps=8",
            f"precision.layers={first}",
            "optimizer.schedule=constant",
        )
        tidar(work, "pretrain", "run.yaml", run_dir, f"precision.layers={layers}", "optimizer.schedule=constant")
    alike, mixed = losses(work, f"{first}_one_kind"), losses(work, f"{first}_both_kinds")
    assert alike.keys() == mixed.keys()
    for step, figures in alike.items():
        assert mixed[step][0] == pytest.approx(figures[0], rel=2e-2)


def last_20_of_200_steps(folder: Path, *precision: str) -> float:
    """Mean loss on real text, of a model that has learnt something by then.

    The learning rate is so low that rounding alone changes little: with 3e-3 and with 1e-3, runs in float32 and in
    bfloat16 already end 1 to 1.5% apart (docs/log.md).
    """
    shape = ["model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_layers=4", "train.micro_batch_size=8"]
    rate = ["optimizer.lr=3e-4", "optimizer.min_lr=3e-5", "optimizer.warmup_steps=20"]
    overrides = [f"data.path={folder / 'corpus'}", "train.steps=200", "precision.layers=te", *shape, *rate, *precision]
    curve = alone(training_on_text, config_module.load(folder / "run.yaml", overrides))
    assert curve[-1] < curve[0] - 1
    return sum(curve[-20:]) / 20


@pytest.fixture(scope="module")
def bf16_end(corpus):
    need_engine()
    return last_20_of_200_steps(corpus)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("gather", [False, True])
def test_200_steps_in_fp8_learn_what_bf16_learns(corpus, bf16_end, say, recipe, gather):
    if recipe not in recipes():
        pytest.skip(f"this GPU, CUDA or Transformer Engine has no {recipe}; it has {recipes()}")
    if gather and recipe == "mxfp8":
        pytest.skip("megatron gathers mxfp8 weights in bf16")
    found = last_20_of_200_steps(corpus, f"precision.fp8={recipe}", f"precision.fp8_param_gather={gather}")
    say(f"last 20 of 200 steps, gathered in FP8: {gather}", {"bf16": bf16_end, recipe: found})
    assert found == pytest.approx(bf16_end, rel=1e-2)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_run_in_fp8_resumes(work, recipe):
    """The first step alone has the weights as they were loaded; later ones come from the float32 copies."""
    if recipe not in recipes():
        pytest.skip(f"this GPU, CUDA or Transformer Engine has no {recipe}; it has {recipes()}")
    fp8 = (f"precision.fp8={recipe}", "precision.fp8_param_gather=true", "optimizer.schedule=constant")
    halves, whole = f"fp8_halves_{recipe}", f"fp8_whole_{recipe}"
    tidar(work, "pretrain", "run.yaml", f"run_dir={halves}", *fp8, "train.steps=8")
    tidar(work, "pretrain", "run.yaml", f"run_dir={halves}", *fp8)
    tidar(work, "pretrain", "run.yaml", f"run_dir={whole}", *fp8)
    expected, found = losses(work, whole), losses(work, halves)
    for step, figures in expected.items():
        assert found[step][0] == pytest.approx(figures[0], rel=2e-2)
    assert found[9] == pytest.approx(expected[9], rel=2e-3)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_run_in_fp8_begins_with_the_weights_of_another(work, recipe):
    if recipe not in recipes():
        pytest.skip(f"this GPU, CUDA or Transformer Engine has no {recipe}; it has {recipes()}")
    more = ("train.init_from=whole", "train.steps=2", "optimizer.warmup_steps=0", "optimizer.lr=1.0e-7")
    still = (*more, "optimizer.min_lr=1.0e-7", "optimizer.weight_decay=0")
    tidar(work, "pretrain", "run.yaml", "run_dir=bf16_from", *still)
    fp8 = (f"precision.fp8={recipe}", "precision.fp8_param_gather=true")
    tidar(work, "pretrain", "run.yaml", f"run_dir=fp8_from_{recipe}", *still, *fp8)
    expected, found = losses(work, "bf16_from"), losses(work, f"fp8_from_{recipe}")
    for step in (1, 2):  # the weights as loaded, and those made from the float32 copies
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-2)


def test_an_offloaded_optimizer_trains_alike_and_resumes(work):
    need_engine()
    share = "parallel.optimizer_offload=0.5"
    constant = ("optimizer.schedule=constant", "precision.layers=te")
    tidar(work, "pretrain", "run.yaml", "run_dir=offload", share, "train.steps=8", *constant)
    tidar(work, "pretrain", "run.yaml", "run_dir=offload", share, *constant)
    tidar(work, "pretrain", "run.yaml", "run_dir=on_the_gpu", *constant)
    for step, figures in losses(work, "on_the_gpu").items():
        assert losses(work, "offload")[step][0] == pytest.approx(figures[0], rel=2e-2)


def take_steps(config: Config, vocab: int, mask: int, text, step_text: Callable[[int], int], steps: int):
    """For each step: its loss, the seconds it took, and what it counted. `step_text(step)` is its first sample."""
    from tidar_mega import device, methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    mesh = build_mesh(config)
    chunks = optim.wrap(config, gpt.build(config, vocab))
    optimizer = optim.build_optimizer(config, chunks)
    scheduler = optim.build_scheduler(config, optimizer)
    task = Task(config, mesh, methods.load(config, mask), chunks, torch.ones(vocab, device=device.device()))
    for step in range(steps):
        batch = list(micro_batches(task, text, step_text(step), config.train.global_batch_size))
        found: dict = {}

        def one_step(batch=batch, found=found) -> None:
            found.update(accumulate_gradients(task, batch))
            optim.update(optimizer, config.optimizer.clip_grad)
            scheduler.step(1)

        seconds = device.seconds(one_step)
        yield summarise(task, found)["loss"], seconds, found


def training_on_text(config: Config) -> list[float]:
    """The loss of every step."""
    from tidar_mega.data.stream import open_stream

    text = open_stream(config.data.path, "train", config.data.seq_length, config.train.seed)
    vocab, batch, tokenizer = text.tokenizer.vocab_size, config.train.global_batch_size, text.tokenizer
    steps = take_steps(config, vocab, tokenizer.mask, text, lambda step: step * batch, config.train.steps)
    return [loss for loss, _, _ in steps]


def training(config: Config, vocab: int, steps: int) -> dict:
    """Steps on one batch of random text: loss of each, and of the later ones speed, utilisation and peak memory."""
    from tidar_mega import device, plan
    from tidar_mega.bench.text import RandomText

    text = RandomText(vocab - 1, config.data.seq_length)
    taken = take_steps(config, vocab, vocab - 1, text, lambda step: 0, steps)
    curve, seconds, (*_, sums) = zip(*taken, strict=True)
    best = min(seconds[1:])
    work = (float(sums[f"count.{name}"]) for name in ("rows", "pairs", "head_rows"))
    flops = plan.training_flops(config, config.padded_vocab_size(vocab), *work)
    return {
        "loss": list(curve),
        "tokens_per_second": float(sums["count.tokens"]) / best,
        "rows_per_second": float(sums["count.rows"]) / best,
        "model_flop_utilisation": flops / best / device.peak_flops(config.precision.dtype),
        "memory_gib": device.peak_memory_bytes() / 2**30,
    }


def middle(length: int, **sections) -> Config:
    train = {"global_batch_size": 2, "micro_batch_size": 2, "steps": 100, "block": 16}
    tree = {"model": MIDDLE, "data": {"seq_length": length}, "train": train, "optimizer": {"warmup_steps": 1}}
    return config_module.from_tree(tree | sections)


def test_memory_and_speed_against_causal_training_of_as_many_rows(say):
    ours = alone(training, middle(2048), 32000, 6)
    causal = alone(training, replace(middle(4096), method="ar"), 32000, 6)
    say("TiDAR, 2 x 2048 clean tokens", ours)
    say("causal, 2 x 4096 tokens", causal)
    ratios = {key: ours[key] / causal[key] for key in ("rows_per_second", "memory_gib")}
    say("TiDAR / causal", ratios)
    assert all(math.isfinite(loss) for loss in ours["loss"] + causal["loss"])
    assert ratios["memory_gib"] < 1.5  # no 2S x 2S mask anywhere: that alone would be 64 MiB a sequence and head


def test_recomputation_lowers_memory_on_the_gpu(say):
    ways = {
        way: alone(training, middle(2048, parallel={"recompute": way}), 32000, 3)
        for way in ("none", "selective", "full")
    }
    for way, figures in ways.items():
        say(f"recompute {way}", figures)
        assert figures["loss"] == pytest.approx(ways["none"]["loss"], rel=1e-3)
    assert ways["full"]["memory_gib"] < 0.9 * ways["none"]["memory_gib"]
    assert ways["selective"]["memory_gib"] < 1.02 * ways["none"]["memory_gib"]


def test_a_cut_down_1_5b_model_trains_on_one_gpu(say):
    small = ["model.num_layers=4", "train.global_batch_size=2", "train.micro_batch_size=1", "optimizer.warmup_steps=1"]
    config = config_module.load(TIDAR_1_5B, [*small, "optimizer.lr=1e-3"])
    alone_on_one = replace(config, parallel=config_module.ParallelConfig())
    figures = alone(training, alone_on_one, 32000, 8)
    say("4 layers of TiDAR 1.5B, 2 x 4096 clean tokens", figures)
    assert figures["loss"][-1] < figures["loss"][0] - 0.5
