"""Lossless LoRA: clean rows are the base's bit by bit, mask rows those of a plain float64 model, in every layout; and
what is decoded is the base model's own output."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.steps import (
    IN_TWO,
    MASK,
    SEQUENCES,
    VOCAB,
    Text,
    assert_gradients,
    assert_same_step,
    full_gradient,
    settings,
)
from tests.steps import text as documents
from tests.test_decode import Bytes, prompts, text, tiny_config, world  # noqa: F401
from tests.test_decode import clean_rows as rows_of_text
from tests.test_idlm import train
from tidar_mega import config as config_module
from tidar_mega import methods
from tidar_mega.config import ConfigError, ParallelConfig
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.flex import FlexPagedAttention
from tidar_mega.decode.graphs import Recorder
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.evaluation.likelihood import score
from tidar_mega.model import gpt, lora
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh

ADAPTERS = {"rank": 4, "alpha": 8.0}


def adapted(config: config_module.Config, **changes) -> config_module.Config:
    """`config` with adapters; the base is built, not loaded, where the test calls `gpt.build` itself."""
    tree = config_module.to_tree(config)
    train_section = tree["train"] | {"init_from": "built by the test"}
    return config_module.from_tree({**tree, "train": train_section, "lora": ADAPTERS, **changes})


@torch.no_grad()
def fill_adapters(chunks: list, std: float = 0.3) -> None:
    """b is zero at the start, and then an adapter has no gradient in a and no effect. The same in every layout."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, weight in layer.named_parameters():
                if name.endswith("lora.b"):
                    is_column = "linear_qkv" in name or "linear_fc1" in name
                    pieces, dim = 2 if "linear_fc1" in name else 1, 0 if is_column else None
                    gpt._set_part(weight, 7, f"{layer.layer_number} {name}", std, dim, pieces)


# one step


def lora_steps(rank: int, configs: dict) -> dict:
    return {name: lora_step(config) for name, config in configs.items()}


def lora_step(config: config_module.Config) -> dict:
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    mesh = build_mesh(config)
    models = gpt.build(config, VOCAB)
    fill_adapters(models)
    chunks = optim.wrap(config, models)
    before = {n: p.detach().clone() for model in models for n, p in model.named_parameters()}
    optimizer = optim.build_optimizer(config, chunks)
    task = Task(config, mesh, methods.load(config, MASK), chunks, torch.ones(VOCAB))
    sums = accumulate_gradients(task, list(micro_batches(task, Text, 0, SEQUENCES)))
    grads = {n: p.main_grad.clone() for model in models for n, p in model.named_parameters() if p.requires_grad}
    frozen = [p for model in models for n, p in model.named_parameters() if not lora.is_adapter(n)]
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    norm = optim.update(optimizer, clip=0.0)
    assert math.isfinite(norm)
    return {
        "figures": summarise(task, sums),
        "norm": norm,
        "gradients": grads,
        "weights": before,
        "after": {n: p.detach().clone() for model in models for n, p in model.named_parameters()},
        "base gradients": [p.grad is not None or hasattr(p, "main_grad") or p.requires_grad for p in frozen],
        "optimised": held,
    }


class PlainLora(PlainTidar):
    """A plain model whose last half of the rows, the masks, has adapters."""

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = super().linear(x, name)
        a, b = self.w[f"{name}.lora.a"], self.w[f"{name}.lora.b"]
        own = F.linear(x, ADAPTERS["alpha"] / ADAPTERS["rank"] * b @ a)
        return y + torch.where((torch.arange(len(x)) >= len(x) // 2)[:, None], own, torch.zeros_like(own))


METHODS, BACKENDS = ("tidar", "idlm"), ("dense", "tiles")
TRAIN = {"block": 2, "micro_batch_size": 1, "draft_fraction": 0.5, "random_offset": True}
LAYOUTS = IN_TWO | {"pipeline 2": {"pipeline": 2, "recompute": "full"}}


def divided(method: str, **parallel) -> config_module.Config:
    tie = method == "idlm"  # both kinds of head
    config = settings(train=TRAIN, parallel=parallel, model={"tie_embeddings": tie})
    return adapted(config, method=method)


@pytest.fixture(scope="module")
def alone() -> dict:
    plain = adapted(settings(train={"alpha": 0.5}))
    configs = {
        ("plain", backend): replace(plain, model=replace(plain.model, attention=backend)) for backend in BACKENDS
    }
    return processes.run(lora_steps, 1, configs | {method: divided(method) for method in METHODS})[0]


@pytest.fixture(scope="module")
def in_layouts() -> list[dict]:
    pairs = [(layout, method) for layout in LAYOUTS for method in METHODS]
    return processes.run(lora_steps, 2, {(name, m): divided(m, **LAYOUTS[name]) for name, m in pairs})


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_equals_the_plain_model(alone, backend):
    got = alone["plain", backend]
    weights = {n: w.double().requires_grad_(lora.is_adapter(n)) for n, w in got["weights"].items()}
    shape = config_module.to_tree(settings())["model"]
    sequences = [documents(i) for i in range(SEQUENCES)]
    loss, ar, draft = PlainLora(weights, shape).loss(sequences, 4, 0.5, MASK)
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert got["figures"]["loss_ar"] == pytest.approx(ar.item(), rel=1e-6)
    trained = {n: w for n, w in weights.items() if w.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert_gradients(got["gradients"], loss, trained)


@pytest.mark.distributed
def test_the_base_has_no_gradient_no_optimizer_state_and_does_not_move(alone):
    for method in METHODS:
        got = alone[method]
        assert not any(got["base gradients"])
        assert got["optimised"] == sum(g.numel() for g in got["gradients"].values())
        for name, weight in got["weights"].items():
            assert torch.equal(got["after"][name], weight) != lora.is_adapter(name), name


def joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of a whole adapter from the slices of the tensor-parallel ranks."""
    is_column = "linear_qkv" in name or "linear_fc1" in name
    return full_gradient(name, parts) if name.endswith(".b") == is_column else parts[0]


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout, method, alone, in_layouts):
    results, expected = [result[layout, method] for result in in_layouts], alone[method]
    assert_same_step(results, expected, LAYOUTS[layout], joined)


# the forward


@pytest.fixture(scope="module")
def pair(world):  # noqa: F811
    """A base, and the same with adapters that change much."""
    config = tiny_config(qk_layernorm=True, add_qkv_bias=True)
    (base,), (model,) = gpt.build(config, Bytes.vocab_size), gpt.build(adapted(config), Bytes.vocab_size)
    fill_adapters([model])
    return base, model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_clean_rows_are_the_bases_bit_by_bit(pair, method, backend):
    base, model = pair
    token = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    config = replace(tiny_config(), method=method)
    rows = methods.load(config, Bytes.mask).training_rows(rows_of_text(token), torch.tensor([0, 1]))
    with torch.no_grad():
        of_base, ours = (m(rows=rows, context=TrainingAttention(rows, backend)) for m in (base, model))
        fast = InferenceModel(model)(rows, TrainingAttention(rows, backend))
        fast_base = InferenceModel(base)(rows, TrainingAttention(rows, backend))
    assert torch.equal(ours[:64], of_base[:64]) and torch.equal(fast[:64], fast_base[:64])
    assert (ours[64:] - of_base[64:]).abs().min(dim=-1).values.max() > 1e-3, "masks must differ"
    torch.testing.assert_close(fast, ours, rtol=3e-5, atol=3e-5)


def test_the_adapters_begin_with_adding_nothing(world):  # noqa: F811
    config = tiny_config()
    (base,), (model,) = gpt.build(config, Bytes.vocab_size), gpt.build(adapted(config), Bytes.vocab_size)
    rows = methods.load(config, Bytes.mask).training_rows(rows_of_text(torch.arange(16)[None]), torch.tensor([0]))
    hidden = [m(rows=rows, context=TrainingAttention(rows, "dense")) for m in (base, model)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=0)


def test_likelihoods_are_those_of_the_base(pair, prompts):  # noqa: F811
    """Continuations are groups of rows there, as masks are, and yet no adapter may act on them."""
    pairs = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1][:4]
    assert pairs
    base, model = (Engine(InferenceModel(m), Bytes(), 4, 128) for m in pair)
    assert score(model, pairs) == score(base, pairs)


@pytest.mark.parametrize("outcomes", ["all", "last", "none"])
def test_the_recordings_of_gpus_gate_each_row(pair, prompts, outcomes):  # noqa: F811
    """The buffers and the attention of a recorded forward, on a CPU, and the choice among all rows that a GPU makes."""
    base, model = pair
    params = [SamplingParams(20, 1.0, seed=i, stop_tokens=()) for i in range(3)]
    expected = Engine(InferenceModel(base), Bytes(), 4, 128).generate(prompts[:3], params, "ar")
    e = Engine(InferenceModel(model), Bytes(), 4, 128, page=16, outcomes=outcomes)
    e.forwards.attention, e.forwards.recorder = FlexPagedAttention, Recorder(e.forwards, e.cache.pages_of(131))
    assert [g.tokens for g in e.generate(prompts[:3], params)] == [g.tokens for g in expected]
    assert e.forwards.recorder.recordings


def test_choosing_among_all_rows_is_computing_the_chosen(pair):
    from tidar_mega.model.inference import Masks

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 2, 8, generator=draw), torch.randn(9, 2, 6, generator=draw)
    a, b = torch.randn(3, 8, generator=draw), torch.randn(6, 3, generator=draw)
    is_mask = torch.rand(9, 2, generator=draw) < 0.5
    by_index, by_choice = Masks(is_mask), Masks(is_mask)
    by_choice.index = None
    found = by_index.add(y.clone(), x, a, b)
    torch.testing.assert_close(found, by_choice.add(y.clone(), x, a, b), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[~is_mask], y[~is_mask])


# decoding

STEPS = 250
SETTINGS = {
    "greedy": SamplingParams(max_tokens=16),
    "t0.7": SamplingParams(max_tokens=16, temperature=0.7),
    "t1": SamplingParams(max_tokens=16, temperature=1.0),
}


@pytest.fixture(scope="module")
def base(world, text):  # noqa: F811
    """A plain AR model, trained for some seconds."""
    config = config_module.override(tiny_config(), ["method=ar"])
    torch.manual_seed(0)
    (model,) = gpt.build(config, Bytes.vocab_size)
    train(model, methods.load(config, Bytes.mask), text, STEPS)
    return model


@pytest.fixture(scope="module")
def references(base, prompts) -> dict:  # noqa: F811
    engine = Engine(InferenceModel(base), Bytes(), block=4, capacity=128, batch=50)
    return {name: [g.tokens for g in engine.generate(prompts[:200], seeds(name), "ar")] for name in SETTINGS}


def seeds(name: str) -> list[SamplingParams]:
    return [SETTINGS[name].for_request(i) for i in range(200)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_hundred_outputs_are_those_of_the_base(base, references, text, prompts, method):  # noqa: F811
    """Adapters that were trained for some seconds: drafts are accepted and rejected, and the output is the base's."""
    config = config_module.override(tiny_config(), [f"method={method}", "train.block=3", "data.seq_length=126"])
    config = adapted(config, lora={"rank": 16, "alpha": 32.0})
    (model,) = gpt.build(config, Bytes.vocab_size)
    model.load_state_dict(base.state_dict(), strict=False)
    trainer = methods.load(config, Bytes.mask)
    train(model, trainer, text, STEPS)
    for name, weight in base.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    fast = InferenceModel(model)
    for name, expected in references.items():
        for block, outcomes in ((4, "all"), (4, "last")):
            e = Engine(fast, Bytes(), block, 128, batch=50, outcomes=outcomes, drafter=trainer.drafter)
            found = e.generate(prompts[:200], seeds(name))
            assert [g.tokens for g in found] == expected
            commits = [count for g in found for count in g.commits[1:]]
            rejected = sum(r < 4 for g in found for r in g.accepted)
            print(f"\n{method}, {name}, {outcomes}: {sum(commits) / len(commits):.2f} tokens per forward")
            assert sum(commits) / len(commits) > 1 and rejected > 0
    assert [g.tokens for g in e.generate(prompts[:20], seeds(name)[:20], "ar")] == expected[:20]


def _decode(rank: int, tensor: int, pipeline: int) -> list:
    config = adapted(tiny_config(init_std=0.2))
    config = replace(config, parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    build_mesh(config)
    found = []
    for kind in (config, replace(config, lora=config_module.LoraConfig())):
        (model,) = gpt.build(kind, Bytes.vocab_size, training=False)
        fill_adapters([model])
        engine = Engine(InferenceModel(model), Bytes(), block=4, capacity=128)
        generations = engine.generate([[65], [200] * 30, list(range(9))], list(SETTINGS.values()))
        found.append([(g.tokens, g.commits) for g in generations])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_parallel_ranks_decode_what_one_process_decodes(tensor, pipeline):
    ((ours, of_base),) = processes.run(_decode, 1, 1, 1)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in of_base]
    for found in processes.run(_decode, 2, tensor, pipeline):
        assert found == [ours, of_base]


# settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": {}}, "train.init_from = None: must be the run or checkpoint whose weights stay frozen"),
        ({"method": "ar"}, "lora.rank = 4: must be 0 with method = ar, which has no mask rows"),
        ({"lora": {"rank": 4, "targets": ["linear_q"]}}, r"lora.targets = \['linear_q'\]: must be some of linear_qkv"),
        ({"lora": {"rank": 4, "targets": []}}, r"lora.targets = \[\]: must be some of"),
        ({"lora": {"rank": -1}}, "lora.rank = -1: must be a number of 0 or more"),
        ({"lora": {"rank": 4, "alpha": 0.0}}, "lora.alpha = 0.0: must be above 0"),
        ({"precision": {"layers": "te"}}, "precision.layers = te: must be auto or local with lora.rank"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    tree = {"train": {"init_from": "runs/base"}, "lora": ADAPTERS} | changes
    with pytest.raises(ConfigError, match=message):
        config_module.from_tree(tree)
