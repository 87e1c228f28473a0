"""`tidar plan` as a command: speed, search, errors, and the parts of a prediction that can be checked by hand."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tidar_mega import cli
from tidar_mega import config as config_module
from tidar_mega.config import ConfigError, UserError
from tidar_mega.plan.command import choose_vocab_size, parse_tokens
from tidar_mega.plan.communication import group_link, transfers
from tidar_mega.plan.hardware import KNOWN, choose
from tidar_mega.plan.imbalance import packed, whole_sequence
from tidar_mega.plan.layout import Layout, make_layout
from tidar_mega.plan.memory import GIB, fp8_share, fullest_stage, stage_memory
from tidar_mega.plan.parameters import layer_parameters
from tidar_mega.plan.search import MEMORY, overrides, search
from tidar_mega.plan.timing import head_seconds, layer_seconds, predict

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "tidar_8b.yaml")
H100 = KNOWN["h100"]
VOCAB = 151936


def layout(gpus: int, *settings: str) -> Layout:
    return make_layout(config_module.load(CONFIG, settings), VOCAB, gpus)


def run(*arguments: str, code: int = 0) -> None:
    assert cli.main(["plan", CONFIG, *arguments]) == code


@pytest.mark.parametrize("arguments", [["--gpus", "64"], ["--gpus", "512", "--search"]], ids=["plan", "search"])
def test_it_takes_less_than_two_seconds_and_no_torch(arguments):
    """Of processor time, with the start of Python: what a user waits for on a machine that does nothing else."""
    check = "import sys; from tidar_mega.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", check, "plan", CONFIG, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 2


def test_what_is_printed_is_what_is_written(tmp_path, capsys):
    run("--gpus", "64", "parallel.context=2", "--json", str(tmp_path / "plan.json"), "--tokens", "1T")
    out, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and "fits: " in out and plan["parameters"]["total"] == 8_190_735_360
    assert f"{plan['time']['tokens_per_second']:,.0f}" in out
    assert f"{plan['memory_gib']['none']['total']:.2f}" in out
    assert f"{plan['time']['days']:.1f} days" in out and "1,000B tokens" in out
    assert plan["time"]["step_seconds"] == pytest.approx(sum(v for k, v in plan["time"].items() if k in PARTS))
    assert plan["context_imbalance"]["packed_worst"] >= plan["context_imbalance"]["packed_mean"] >= 1
    assert "Qwen's, as data/qwen3 is not prepared" in out


PARTS = [f"{p}_seconds" for p in ("matmul", "attention", "memory_bound", "bubble", "communication", "optimizer")]


def test_a_model_of_one_stage_has_no_bubble_of_a_rounding_error_below_zero(capsys):
    for gpus in (8, 16, 24, 32, 40, 48, 56):  # by chance of the last digit, some would
        run("--gpus", str(gpus), f"train.global_batch_size={8 * gpus}")
    assert "-0.0" not in capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_so_and_how(capsys):
    run("--gpus", "1", "parallel.tensor=1", "parallel.sequence=false", code=1)
    assert "does not fit" in capsys.readouterr().out
    run("--gpus", "8", "train.micro_batch_size=4", code=1)
    assert "set parallel.recompute=full, or" in capsys.readouterr().out


ERRORS = {
    "--gpus=3": "must divide the 3 GPUs (--gpus); lower one of them, or take a multiple of 2",
    "--gpus=0": "--gpus 0: must be above 0",
    "parallel.data=8": "parallel.data = 8: 64 GPUs",
    "--hardware=tpu": "must be one of a100",
    "--matmul-efficiency=1.5": "--matmul-efficiency 1.5: must be at most 1",
    "--nvlink-gbs=0": "--nvlink-gbs 0: must be a number above 0",
    "--memory-gib=nan": "--memory-gib nan: must be a number above 0",
    "parallel.timeout_minutes=.inf": "parallel.timeout_minutes = inf: must be from 0.01",
    "optimizer.lr=.inf": "optimizer.lr = inf: must be a number above 0",
    "model.rotary_base=0": "model.rotary_base = 0.0: must be a number above 0",
    "--tokens=many": "--tokens many: must be a number",
    "--vocab-size=0": "--vocab-size 0",
    "method=tidra": "method = tidra: must be one of ar, block_diffusion, ",
    "train.micro_batch_size=3": "train.global_batch_size = 512: must be a multiple of",
    "parallel.tensor=16": "model.num_query_groups",
}


@pytest.mark.parametrize("argument", ERRORS)
def test_bad_input_is_one_clear_error(argument, tmp_path, capsys):
    run("--gpus=64", argument, f"--json={tmp_path}/plan.json", code=2)
    assert ERRORS[argument] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_fp8_needs_hardware_that_has_it():
    fp8 = config_module.load(CONFIG, ["precision.fp8=mxfp8"])
    with pytest.raises(ConfigError, match="precision.fp8 = mxfp8: must be none on A100"):
        choose("a100", {}, fp8)
    with pytest.raises(ConfigError, match="before Blackwell"):
        choose("h100", {}, fp8)
    assert choose("b200", {"memory_gib": 170.0}, fp8).memory_gib == 170


def test_the_vocabulary_is_the_tokenizers_if_there_is_one(tmp_path):
    from tidar_mega.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["some text of no account, and some more text"], 270)
    tokenizer.save(tmp_path / "tokenizer")
    config = config_module.load(CONFIG, [f"data.path={tmp_path}"])
    assert choose_vocab_size(None, config)[0] == tokenizer.vocab_size
    assert choose_vocab_size(500, config) == (500, "--vocab-size")


def test_tokens_take_suffixes():
    plan = layout(64)
    assert [parse_tokens(t, plan) for t in ("1T", "50B", "2e12", "3m")] == [1e12, 5e10, 2e12, 3e6]
    assert parse_tokens(None, plan) == 71526 * 512 * 4096
    for bad in ("", "-1B", "inf", "B"):
        with pytest.raises(UserError):
            parse_tokens(bad, plan)


# memory


def test_the_optimizer_is_divided_over_all_ranks_with_the_same_weights():
    one, many = stage_memory(layout(2), 0), stage_memory(layout(64), 0)
    assert one.optimizer == 32 * many.optimizer and one.gradients == many.gradients
    assert one.optimizer == 12 * layout(2).parameters(0)
    assert stage_memory(layout(64, "parallel.context=2"), 0).optimizer == many.optimizer
    plain = ["parallel.distributed_optimizer=false", "parallel.overlap_param_gather=false"]
    assert stage_memory(layout(64, *plain), 0).optimizer == one.optimizer
    assert stage_memory(layout(64, "parallel.optimizer_offload=0.75"), 0).optimizer == many.optimizer / 4


def test_fp8_keeps_smaller_inputs_and_more_weights():
    fp8 = ["precision.fp8=tensorwise", "precision.bf16_first_layers=1", "precision.bf16_last_layers=1"]
    wide, narrow = stage_memory(layout(64), 0), stage_memory(layout(64, *fp8), 0)
    assert narrow.activations < wide.activations and narrow.weights > wide.weights
    assert fp8_share(layout(64, *fp8)) == pytest.approx(34 / 36)
    gathered = stage_memory(layout(64, *fp8, "precision.fp8_param_gather=true"), 0)
    assert gathered.weights == pytest.approx(wide.weights)  # two bytes either way


# time


def test_an_optimizer_on_the_host_takes_longer():
    here, there = (predict(layout(64, f"parallel.optimizer_offload={share}"), H100) for share in (0, 1))
    assert there.optimizer > 5 * here.optimizer and there.matmul == here.matmul


def test_the_layouts_of_a_search_are_those_that_their_overrides_make(tmp_path):
    """Also where the file says something of the stages itself."""
    config = config_module.load(CONFIG, ["parallel.pipeline=4", "parallel.first_stage_layers=6"])
    found = search(config, VOCAB, 64, H100)
    assert {c.layout.config.stage_layers[-1] for c in found.best} > {18, 16}, "some have a shorter last stage"
    for candidate in found.best[::50]:
        again = config_module.override(config, overrides(candidate.layout))
        assert again == replace(candidate.layout.config, parallel=replace(again.parallel))
        assert again.stage_layers == candidate.layout.config.stage_layers


@pytest.mark.parametrize("ends", [(None, None), (None, 6), (None, 3), (10, 6), (12, 12), (3, None)])
def test_a_step_is_that_of_a_played_pipeline_of_unlike_stages(ends):
    from tests.test_plan import one_forward_one_backward

    settings = ("parallel.pipeline=4", "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false")
    first, last = ends
    given = {"first_stage_layers": first, "last_stage_layers": last}
    plan = layout(64, *settings, *(f"parallel.{key}={value}" for key, value in given.items() if value))
    fast = replace(H100, nvlink_gbs=1e12, internode_gbs=1e12)  # communication has its own tests
    between = (36 - (first or 0) - (last or 0)) // (4 - bool(first) - bool(last))
    layer = layer_seconds(plan, fast).total
    stages = [layer * (first or between), layer * between, layer * between, layer * (last or between)]
    stages[-1] += head_seconds(plan, fast).total
    timing = predict(plan, fast)
    played = one_forward_one_backward(stages, plan.micro_batches)
    # exact where the last is the slowest; else up to a forward too much
    assert timing.step - timing.optimizer == pytest.approx(played, rel=1e-6 if stages[-1] == max(stages) else 1e-2)


def test_recomputation_costs_a_forward():
    none, full = (layer_seconds(layout(64, f"parallel.recompute={kind}"), H100) for kind in ("none", "full"))
    assert full.matmul == pytest.approx(none.matmul * 4 / 3)
    assert full.attention == pytest.approx(none.attention * 4.5 / 3.5)
    selective = layer_seconds(layout(64, "parallel.recompute=selective"), H100)
    assert (selective.matmul, selective.attention) == (none.matmul, full.attention)


@pytest.mark.parametrize(
    "size, stride, crosses, rate",
    [(8, 1, False, 450), (2, 4, False, 450), (16, 1, True, 400), (16, 2, True, 200), (4, 8, True, 50)],
)
def test_a_group_that_leaves_the_node_shares_its_network_cards(size, stride, crosses, rate):
    link = group_link(replace(H100, network_efficiency=1.0), 256, size, stride)
    assert (link.crosses_nodes, link.bytes_per_second) == (crosses, rate * 1e9)


@pytest.mark.parametrize("gpus", [4, 8, 12, 24, 48, 96])
def test_groups_that_do_not_fit_the_nodes_are_found(gpus):
    """Every group is written down, with its members in each node of 8."""
    for stride in (s for s in (1, 2, 4, 8, 24) if gpus % s == 0):
        for size in (n for n in range(2, gpus // stride + 1) if gpus % (n * stride) == 0):
            groups = [range(r, r + size * stride, stride) for r in range(gpus) if r // stride % size == 0]
            members = [Counter(rank // 8 for rank in group) for group in groups]
            link = group_link(replace(H100, network_efficiency=1.0), gpus, size, stride)
            assert link.crosses_nodes == any(len(nodes) > 1 for nodes in members), (size, stride)
            if link.crosses_nodes:
                fewest = min(count for nodes in members if len(nodes) > 1 for count in nodes.values())
                assert link.bytes_per_second == min(450, 50 * fewest) * 1e9, (size, stride)


def test_a_tied_embedding_in_stages_adds_up_its_two_gradients():
    shape = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
    untied, tied = (
        {t.what: t for t in transfers(layout(16, *shape, f"model.tie_embeddings={tie}"), H100, 1.0)}
        for tie in ("false", "true")
    )
    extra = tied["gradient of the embedding's copy"]
    assert tied.keys() - untied.keys() == {extra.what}
    assert extra.bytes == 4 * 4096 * 151936 / 2 and extra.link.crosses_nodes and extra.exposed == extra.seconds


def test_layers_in_bf16_are_gathered_in_bf16():
    gather = ("precision.fp8=tensorwise", "precision.fp8_param_gather=true")
    sent = []
    for kept in (0, 4):
        plan = layout(64, *gather, f"precision.bf16_first_layers={kept}")
        sent += [t.bytes for t in transfers(plan, H100, 1.0) if "weights" in t.what]
    others = (plan.data_context_size - 1) / plan.data_context_size
    per_layer = layer_parameters(plan.config) / plan.config.parallel.tensor * others
    assert sent[1] - sent[0] == pytest.approx(4 * per_layer)


def test_a_search_uses_every_gpu():
    config = config_module.load(CONFIG, ["train.global_batch_size=600"])
    for gpus in (7, 12, 20, 100):
        found = search(config, 151936, gpus, H100)
        assert {c.layout.gpus for c in found.best} <= {gpus}
    assert found.best


def test_gradients_and_weights_are_sent_once_a_step():
    plan = layout(64)
    sent = {t.what: t for t in transfers(plan, H100, layer_seconds(plan, H100).total) if t.kind == "data"}
    parameters = plan.parameters(0)
    assert sent["gradients, once a step"].bytes == pytest.approx(4 * parameters * 31 / 32)
    assert sent["weights, once a step"].bytes == pytest.approx(2 * parameters * 31 / 32)
    exposed = layout(64, "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false")
    for t in transfers(exposed, H100, 1.0):
        if t.kind == "data":
            assert t.exposed == t.seconds > sent[t.what].exposed


def test_context_ranks_are_even_with_and_without_packing():
    config = config_module.load(CONFIG, ["parallel.context=4"])
    assert 1 <= whole_sequence(config) < 1.01
    drawn = packed(config, 1000)
    assert 1 <= drawn.mean <= drawn.worst < 1.05 and 0.1 < drawn.pairs < 1


# search


@pytest.mark.parametrize("gpus, settings", [(8, []), (64, []), (48, ["train.global_batch_size=528"])])
def test_every_layout_of_a_search_is_allowed_and_fits(gpus, settings):
    config = config_module.load(CONFIG, settings)
    found = search(config, VOCAB, gpus, H100)
    assert len(found.best) > 10
    for candidate in found.best:
        p = candidate.layout.config.parallel
        assert p.model_size * candidate.layout.data == gpus and p.tensor <= 8
        assert candidate.memory.total <= H100.usable_bytes
    speeds = [c.timing.tokens_per_second for c in found.best]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in found.best[:20]:  # the settings that are printed are all that it takes
        again = make_layout(config_module.override(config, overrides(candidate.layout)), VOCAB, gpus)
        assert fullest_stage(again)[1] == candidate.memory
        assert predict(again, H100, whole_sequence(again.config)).step == pytest.approx(candidate.timing.step)


def test_a_search_says_what_rules_layouts_out(capsys):
    found = search(config_module.load(CONFIG), VOCAB, 8, replace(H100, memory_gib=24.0))
    assert found.refused[MEMORY] > 0 and "model.num_layers" in found.refused
    none = search(config_module.load(CONFIG), VOCAB, 8, replace(H100, memory_gib=10.0))
    assert not none.best and none.nearest[1].total > 4 * GIB
    run("--gpus", "8", "--search", "--memory-gib", "10", code=1)
    out = capsys.readouterr().out
    assert "no layout fits" in out and "the least is" in out and "ruled out by" in out


def test_the_printed_command_is_the_best_layout(tmp_path, capsys):
    run("--gpus", "16", "--search", "train.loss_chunk=1024", "--json", str(tmp_path / "found.json"))
    command = capsys.readouterr().out.split("the fastest in full:")[1].split()
    assert command[:2] == ["tidar", "plan"] and "train.loss_chunk=1024" in command
    assert cli.main([*command[1:], "--json", str(tmp_path / "best.json")]) == 0
    found, best = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("found", "best"))
    assert found["best"][0]["tokens_per_second"] == pytest.approx(best["time"]["tokens_per_second"])
