"""Layers and number formats: what is refused on which machine, what megatron-core is told, recomputation, repeats, and
Transformer Engine's layout of the weights against the local one.

Transformer Engine cannot be imported without a GPU: a layer on the CPU stands for its one layer whose weights differ.
Its kernels and FP8 arithmetic are tested by test_gpu.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import processes
from tests.steps import one_step, settings
from tidar_mega.config import ConfigError

CPU = {"why_no_engine": "there is no CUDA GPU"}
H100 = {"capability": (9, 0), "cuda": "13.0", "engine": "2.9.0"}
BARE = {"capability": (9, 0), "cuda": "13.0"}  # a GPU without Transformer Engine
FP8 = {"dtype": "bf16", "fp8": "tensorwise"}
OFFLOAD = {"parallel": {"optimizer_offload": 0.5}, "precision": {"dtype": "bf16"}}

REFUSED = {
    # name: (machine, sections of the config, words of the message)
    "te without a GPU": (CPU, {"precision": {"layers": "te"}}, "precision.layers = te: no CUDA GPU"),
    "te not installed": (BARE, {"precision": {"layers": "te"}}, "precision.layers = te: not installed; pip install"),
    "te too old": (H100 | {"engine": "1.8.0"}, {"precision": {"layers": "te"}}, "precision.layers: 1.8.0 1.9"),
    "fp8 without a GPU": (CPU, {"precision": FP8}, "precision.fp8 = tensorwise: none no CUDA GPU"),
    "fp8 without te": (BARE, {"precision": FP8}, "precision.fp8 = tensorwise: none Transformer Engine pip install"),
    "te older than the recipe": (
        H100 | {"engine": "2.1.0"},
        {"precision": FP8},
        "precision.fp8: 2.2 found 2.1.0 delayed",
    ),
    "fp8 on Ampere": (
        H100 | {"capability": (8, 0)},
        {"precision": FP8},
        "precision.fp8: 8.9 found capability 8.0 none",
    ),
    "blockwise on Ada": (
        H100 | {"capability": (8, 9)},
        {"precision": FP8 | {"fp8": "blockwise"}},
        "precision.fp8 = blockwise: delayed or tensorwise or none 9.0 found capability 8.9",
    ),
    "blockwise on CUDA 12.8": (
        H100 | {"cuda": "12.8"},
        {"precision": FP8 | {"fp8": "blockwise"}},
        "precision.fp8 = blockwise: CUDA 12.9 found CUDA 12.8",
    ),
    "mxfp8 on Hopper": (
        H100,
        {"precision": FP8 | {"fp8": "mxfp8"}},
        "precision.fp8 = mxfp8: 10.0 found capability 9.0",
    ),
    "mxfp8 on a GPU after the last": (
        H100 | {"capability": (12, 0)},
        {"precision": FP8 | {"fp8": "mxfp8"}},
        "precision.fp8 = mxfp8: below 12.0 found capability 12.0",
    ),
    "narrow matrices": (
        H100,
        {"precision": FP8, "model": {"ffn_hidden_size": 104}},
        "model.ffn_hidden_size = 104: multiple of 16",
    ),
    "odd rows": (
        H100,
        {"precision": FP8, "data": {"seq_length": 36}, "train": {"micro_batch_size": 1}},
        "data.seq_length = 36: rows of a forward 72 multiple of 16 train.micro_batch_size",
    ),
    "gathered fp8 without shards": (
        H100,
        {"precision": FP8 | {"fp8_param_gather": True}, "parallel": {"distributed_optimizer": False}},
        "precision.fp8_param_gather: distributed_optimizer",
    ),
    "gathered mxfp8": (
        H100 | {"capability": (10, 0)},
        {"precision": FP8 | {"fp8": "mxfp8", "fp8_param_gather": True}},
        "precision.fp8_param_gather: mxfp8",
    ),
    "more bf16 layers than a stage has": (
        H100,
        {"precision": FP8 | {"bf16_first_layers": 2}, "parallel": {"pipeline": 2}},
        "precision.bf16_first_layers = 2: at most stage 1",
    ),
    "recompute units that do not fit": (
        CPU,
        {"parallel": {"recompute": "full", "recompute_layers": 2, "pipeline": 2}},
        "parallel.recompute_layers = 2: divisor 1",
    ),
    "fused gradients on a CPU": (
        CPU,
        {"parallel": {"gradient_accumulation_fusion": True}},
        "parallel.gradient_accumulation_fusion: fused_weight_gradient_mlp_cuda no CUDA GPU",
    ),
    "fused gradients of local layers": (
        H100,
        {"parallel": {"gradient_accumulation_fusion": True}, "precision": {"layers": "local"}},
        "parallel.gradient_accumulation_fusion: layers are local fused_weight_gradient_mlp_cuda",
    ),
    "offload without a GPU": (CPU, OFFLOAD, "parallel.optimizer_offload = 0.5: GPU"),
    "offload without te": (BARE, OFFLOAD, "parallel.optimizer_offload: Adam"),
    "offload of whole weights": (
        H100,
        {"parallel": {"optimizer_offload": 0.5, "distributed_optimizer": False}},
        "parallel.optimizer_offload: distributed_optimizer",
    ),
    "offload in fp32": (H100, {"parallel": {"optimizer_offload": 0.5}}, "parallel.optimizer_offload: precision.dtype"),
    "offload of fp8": (
        H100,
        OFFLOAD | {"precision": FP8 | {"fp8": "delayed", "fp8_param_gather": True}},
        "parallel.optimizer_offload: precision.fp8_param_gather",
    ),
    "deterministic": (
        H100,
        {"precision": {"deterministic": True}},
        "precision.deterministic: CUBLAS_WORKSPACE_CONFIG=:4096:8",
    ),
}


def check(machine: dict, environment: dict | None = None, **sections) -> None:
    from tidar_mega.model import precision

    precision.check(settings(**sections), precision.Machine(**machine), environment or {})


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_its_key_and_the_way_out(case):
    machine, sections, words = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        check(machine, **sections)
    key, _, rest = words.partition(":")
    assert str(error.value).startswith(key), error.value
    for word in rest.split():
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_what_can_work_is_let_through():
    check(CPU, parallel={"recompute": "full", "recompute_layers": 2}, precision={"deterministic": True})
    check(H100, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, precision={"deterministic": True})
    check(H100, precision=FP8 | {"fp8": "blockwise", "fp8_param_gather": True, "bf16_last_layers": 1})
    check(H100, precision=FP8 | {"fp8": "delayed"}, parallel={"optimizer_offload": 1.0})
    check(H100, parallel={"gradient_accumulation_fusion": True}, precision={"layers": "te"})
    check(BARE | {"fused_gradients": True}, parallel={"gradient_accumulation_fusion": True})
    check(H100 | {"capability": (10, 0)}, precision=FP8 | {"fp8": "mxfp8"}, model={"ffn_hidden_size": 128})


def test_this_machine_refuses_fp8_here(monkeypatch):
    """The whole way from the config: on a machine without a GPU, megatron itself would train in bf16 without a word."""
    from tidar_mega.model import spec

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="precision.fp8 = delayed.*no CUDA GPU"):
        spec.transformer_config(settings(precision={"dtype": "bf16", "fp8": "delayed"}))


@pytest.mark.parametrize(
    ("asked", "machine", "layers"),
    [
        ("auto", H100, "te"),
        ("auto", BARE, "local"),
        ("auto", CPU, "local"),
        ("local", H100, "local"),
        ("te", H100, "te"),
    ]
    + [("auto", H100 | {"engine": "1.8"}, "local")],
)
def test_layers_are_transformer_engines_where_it_works(asked, machine, layers):
    from tidar_mega.model import precision

    bf16, fp32 = (settings(precision={"layers": asked, "dtype": dtype}) for dtype in ("bf16", "fp32"))
    assert precision.resolve_layers(bf16, precision.Machine(**machine)) == layers
    exact = "local" if asked == "auto" else layers  # Transformer Engine multiplies fp32 in TF32
    assert precision.resolve_layers(fp32, precision.Machine(**machine)) == exact


def test_megatron_is_told_the_fp8_recipe():
    from tidar_mega.model import precision
    from tidar_mega.model.spec import BackboneConfig

    fp8 = FP8 | {"fp8": "blockwise", "fp8_format": "e4m3", "fp8_param_gather": True, "bf16_first_layers": 1}
    fields = precision.settings(settings(precision=fp8))
    shape = BackboneConfig(num_layers=2, hidden_size=64, num_attention_heads=4, **fields)  # megatron's own checks
    assert (shape.fp8, shape.fp8_recipe, shape.fp8_param) == ("e4m3", "blockwise", True)
    assert shape.first_last_layers_bf16
    assert (shape.num_layers_at_start_in_bf16, shape.num_layers_at_end_in_bf16) == (1, 0)
    none = precision.settings(settings(precision={"dtype": "bf16"}))
    assert "fp8" not in none and not BackboneConfig(num_layers=2, hidden_size=64, num_attention_heads=4, **none).fp8


def test_rows_are_filled_up_to_what_sequence_parallelism_and_fp8_want():

    def multiple(**train):
        parallel = {"tensor": 2, "sequence": True}
        return settings(parallel=parallel, precision=FP8, train=train).row_multiple

    assert settings().row_multiple == 1
    assert settings(parallel={"tensor": 2, "sequence": True}).row_multiple == 2
    assert multiple(micro_batch_size=1, global_batch_size=1) == 32
    assert multiple(micro_batch_size=4) == 8
    assert settings().forward_rows == 64
    assert settings(train={"draft_fraction": 0.5}).forward_rows == 48
    assert replace(settings(), method="ar").forward_rows == 32


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("virtual", [1, 2])
def test_no_layout_gets_the_p2p_settings_that_train_on_wrong_activations(pipeline, virtual):
    """megatron-core 0.16.1 to 0.19.2: interleaved with two stages and batched sends is wrong without an error."""
    from tidar_mega.model import spec

    virtual = virtual if pipeline > 1 else 1
    parallel = {"pipeline": pipeline, "virtual_pipeline": virtual}
    shape = spec.transformer_config(settings(model={"num_layers": 8}, parallel=parallel))
    assert (shape.virtual_pipeline_model_parallel_size is not None) == (virtual > 1)
    assert shape.batch_p2p_comm != shape.overlap_p2p_comm
    assert virtual == 1 or not shape.batch_p2p_comm
    assert shape.pipeline_model_parallel_size == pipeline


class Held:
    """Bytes that the backward keeps: a live count through autograd's hooks, weights left out."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor):
        return tensor if isinstance(tensor, torch.nn.Parameter) else Kept(self, tensor)

    @staticmethod
    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept


class Kept:
    def __init__(self, held: Held, tensor: torch.Tensor) -> None:
        self.held, self.tensor, self.size = held, tensor, tensor.numel() * tensor.element_size()
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


RECOMPUTE = {
    "none": {},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "full in units of 2": {"recompute": "full", "recompute_layers": 2},
}


def recomputed_steps(rank: int, backend: str) -> dict:
    """For each way: one step, the most bytes kept for its backward, and how often attention was computed."""
    from tidar_mega.model.attention import HybridAttention

    results, forward = {}, HybridAttention.forward
    for name, parallel in RECOMPUTE.items():
        held, calls = Held(), []

        def counted(self, *args, calls=calls, **kwargs):
            calls.append(self.layer_number)
            return forward(self, *args, **kwargs)

        HybridAttention.forward = counted
        with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
            step = one_step(rank, settings(model={"attention": backend}, parallel=parallel))
        results[name] = (step, held.most, sorted(calls))
    HybridAttention.forward = forward
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_recomputation_changes_no_bit_and_keeps_less(backend):
    (results,) = processes.run(recomputed_steps, 1, backend)
    plain, most, calls = results["none"]
    assert calls == [1, 1, 2, 2]  # two layers, two micro-batches
    for name, (step, _, recalls) in results.items():
        assert step["figures"] == plain["figures"], name
        for weight, gradient in plain["gradients"].items():
            assert torch.equal(step["gradients"][weight], gradient), f"{name}: {weight}"
        if name != "none":
            assert recalls == sorted(calls * 2), name
    bytes_kept = {name: kept for name, (_, kept, _) in results.items()}
    assert bytes_kept["selective"] < most
    assert bytes_kept["full"] < 0.6 * most  # one of two layers at a time
    assert bytes_kept["full in units of 2"] < most


def repeated_steps(rank: int) -> tuple:
    first, second = (one_step(rank, settings(precision={"deterministic": True})) for _ in range(2))
    return first, second, torch.are_deterministic_algorithms_enabled()


@pytest.mark.distributed
def test_deterministic_steps_repeat_bit_by_bit():
    ((first, second, is_deterministic),) = processes.run(repeated_steps, 1)
    assert is_deterministic
    assert first["figures"] == second["figures"] and first["norm"] == second["norm"]
    for kind in ("gradients", "after"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind]), kind


@contextlib.contextmanager
def transformer_engine():
    """A machine with Transformer Engine, as far as names and shapes of weights go.

    FusedColumn is a norm and a column-parallel linear in one layer, with the weights and extra state of
    TELayerNormColumnParallelLinear. Everything around it (megatron's spec for Transformer Engine, ours) is real.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from tidar_mega.model import precision

    class FusedColumn(ColumnParallelLinear):
        def __init__(self, input_size, output_size, *, config, **kwargs):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            self.epsilon = config.layernorm_epsilon

        def forward(self, x, *args, **kwargs):
            return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.epsilon), *args, **kwargs)

        def get_extra_state(self):  # as with FP8: bytes, where local layers have None
            return torch.arange(3, dtype=torch.uint8)

        def set_extra_state(self, state):
            assert state is None or state.tolist() == [0, 1, 2]

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self):
            return True

        def column_parallel_layer_norm_linear(self):
            return FusedColumn

    before = getattr(gpt_layer_specs, "TESpecProvider", None), precision.this_machine
    gpt_layer_specs.TESpecProvider, precision.this_machine = Provider, lambda: precision.Machine(**H100)
    yield
    gpt_layer_specs.TESpecProvider, precision.this_machine = before


def train_and_exchange(rank: int, folder: Path) -> dict:
    """Two steps with each kind of layers, a checkpoint, two more; and two more from the other kind's checkpoint."""
    from tests.test_checkpoint import Trainer
    from tidar_mega.checkpoint.state import sharded_weights
    from tidar_mega.train import optim

    def trainer_of(kind: str) -> Trainer:
        sections = {"train": {"micro_batch_size": 1}, "optimizer": {"warmup_steps": 2}}
        return Trainer(settings(precision={"layers": kind}, **sections), folder / kind)

    kinds, results = {"local": contextlib.nullcontext, "te": transformer_engine}, {}
    for kind, machine in kinds.items():
        (folder / kind / "tokenizer").mkdir(parents=True)
        with machine():
            trainer = trainer_of(kind)
            model = trainer.state.chunks[0].module
            before, path, after = trainer.steps(2), trainer.save(), trainer.steps(2)
        keys = {part.key for part in sharded_weights(model)["model"].values()}
        names = [name for name, _ in model.named_parameters()]
        results[kind] = {"steps": before + after, "names": names, "keys": keys, "path": path}
    for kind, other in (("local", "te"), ("te", "local")):
        with kinds[kind]():
            trainer = trainer_of(kind)
            trainer.load(results[other]["path"])
            optim.apply_settings(trainer.config, trainer.state.optimizer)
            results[kind]["from the other"] = trainer.steps(2)
    return results


@pytest.mark.distributed
def test_local_and_transformer_engines_layers_train_alike_and_load_each_others_checkpoints(tmp_path):
    (results,) = processes.run(train_and_exchange, 1, tmp_path)
    local, engine = results["local"], results["te"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in engine["names"]
    assert "decoder.layers.0.input_layernorm.weight" in local["names"]
    assert local["keys"] == engine["keys"]
    for expected, got in zip(local["steps"], engine["steps"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    for kind in results.values():
        for expected, got in zip(local["steps"][2:], kind["from the other"], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def fp8_contexts(rank: int) -> list[tuple]:
    """What megatron asks of FP8 while the model is built and makes a step: (layer from 0, is it built)."""
    from contextlib import nullcontext

    from megatron.core.transformer import transformer_block

    asked = []

    def get_fp8_context(shape, layer_no=-1, is_init=False):
        asked.append((shape.fp8_recipe, layer_no, is_init))
        return nullcontext()

    transformer_block.get_fp8_context = get_fp8_context
    with transformer_engine():
        one_step(rank, settings(precision=FP8))
    return asked


@pytest.mark.distributed
def test_megatron_itself_puts_every_layer_of_our_model_into_its_fp8_context():
    (asked,) = processes.run(fp8_contexts, 1)
    building, two_micro_batches = [("tensorwise", layer, True) for layer in (0, 1)], [0, 1, 0, 1]
    assert asked == building + [("tensorwise", layer, False) for layer in two_micro_batches]


def test_with_transformer_engine_only_its_own_layers_fuse_gradients():
    """The output head is megatron's; told the same, it refuses to be built without apex's extension."""
    from tidar_mega.model import spec

    with transformer_engine():
        parallel, te = {"gradient_accumulation_fusion": True}, {"layers": "te"}
        shape = spec.transformer_config(settings(parallel=parallel, precision=te))
    assert shape.transformer_impl == "transformer_engine"
    assert shape.engine_gradient_fusion and not shape.gradient_accumulation_fusion

    class Linear:
        def __init__(self, size, *, config):
            self.size, self.config = size, config

    linear = spec._fused(Linear)(3, config=shape)
    assert linear.size == 3 and linear.config.gradient_accumulation_fusion
    assert not shape.gradient_accumulation_fusion


def test_a_weight_in_fp8_is_given_its_exact_values_too():
    from tidar_mega.model.spec import set_weight

    plain, weight = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    remembered, value = torch.zeros(3), torch.rand(3)
    weight.get_high_precision_init_val = lambda: remembered  # as Transformer Engine adds to its FP8 weights
    for parameter in (plain, weight):
        set_weight(parameter, value)
        assert torch.equal(parameter, value)
    assert torch.equal(remembered, value)
