"""Which layers and number formats a run uses, and whether this machine has what they need.

megatron-core accepts every FP8 setting and, without Transformer Engine, quietly computes in bf16; a recipe that the GPU
lacks fails deep inside a kernel. So everything is checked here, before anything is built, and each refusal names the
key, what was found, what is needed and the way out.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from packaging.version import Version

from tidar_mega.config import Config, ConfigError
from tidar_mega.device import has_cuda

OLDEST_ENGINE = "1.9"  # before it, its norm made models with q/k norm converge worse (megatron's own remark)
INSTALL = 'pip install --no-build-isolation "transformer_engine[core_cu13,pytorch]>=2.9,<2.12" (core_cu12 for CUDA 12)'


@dataclass(frozen=True)
class Recipe:
    """What an FP8 recipe needs: the oldest Transformer Engine, GPU and CUDA, and matrices of whole blocks."""

    engine: str
    capability: tuple[int, int]
    align: int  # rows and widths of every matrix product are multiples of it
    cuda: str = "12.1"
    below: tuple[int, int] | None = None  # GPUs from this capability on lack it

    def runs_on(self, machine: Machine) -> bool:
        too_new = self.below is not None and machine.capability >= self.below
        return machine.capability >= self.capability and not too_new and Version(machine.cuda) >= Version(self.cuda)

    @property
    def hardware(self) -> str:
        limit = f" but below {_dotted(self.below)}" if self.below else ""
        return f"a GPU of compute capability {_dotted(self.capability)} or newer{limit} and CUDA {self.cuda}"


# Transformer Engine's names: DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling
RECIPES = {
    "delayed": Recipe("1.9", (8, 9), 16),
    "tensorwise": Recipe("2.2", (8, 9), 16),
    "blockwise": Recipe("2.3", (9, 0), 16, cuda="12.9"),
    "mxfp8": Recipe("2.1", (10, 0), 32, cuda="12.8", below=(12, 0)),
}


@dataclass(frozen=True)
class Machine:
    """What the choice of layers depends on."""

    capability: tuple[int, int] | None = None  # of the GPU, such as (9, 0) for Hopper; None without one
    cuda: str | None = None  # version that torch was built for
    engine: str | None = None  # version of Transformer Engine; None if it cannot be used
    why_no_engine: str = "Transformer Engine is not installed"
    fused_gradients: bool = False  # apex's extension fused_weight_gradient_mlp_cuda


@functools.cache
def this_machine() -> Machine:
    if not has_cuda():  # Transformer Engine cannot even be imported without a GPU's libraries
        return Machine(why_no_engine="there is no CUDA GPU")
    engine, why = _find_engine()
    return Machine(
        capability=torch.cuda.get_device_capability(),
        cuda=torch.version.cuda,
        engine=engine,
        why_no_engine=why,
        fused_gradients=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def _find_engine() -> tuple[str | None, str]:
    """(version, "") or (None, why not)."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "Transformer Engine is not installed"
    try:
        import transformer_engine
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # whatever of its libraries is missing or does not fit torch
        return None, f"the import of Transformer Engine fails: {str(error).splitlines()[0]}"
    return transformer_engine.__version__, ""


def resolve_layers(config: Config, machine: Machine) -> str:
    """`precision.layers` as te or local. Raises ConfigError.

    auto is te where it works, but local in fp32, of which Transformer Engine's products (TF32) keep only ten bits, and
    with adapters, which sit in megatron's own layers.
    """
    asked = config.precision.layers
    too_old = machine.engine is not None and Version(machine.engine) < Version(OLDEST_ENGINE)
    if asked == "auto":
        is_local = machine.engine is None or too_old or config.precision.dtype == "fp32" or config.lora.rank > 0
        return "local" if is_local else "te"
    if asked == "te" and machine.engine is None:
        _refuse("precision.layers", "te", f"local or auto here: {machine.why_no_engine}", _install(machine))
    if asked == "te" and too_old:
        _refuse("precision.layers", "te", f"local with Transformer Engine {machine.engine}; {OLDEST_ENGINE} is needed")
    return asked


def check(config: Config, machine: Machine, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses what this machine, or megatron-core, cannot do as asked. Raises ConfigError."""
    layers = resolve_layers(config, machine)
    _check_fp8(config, machine, layers)
    _check_recompute(config)
    _check_gradient_fusion(config, machine, layers)
    _check_offload(config, machine)
    if config.precision.deterministic and machine.capability is not None:
        _check_deterministic(environment)


def _check_fp8(config: Config, machine: Machine, layers: str) -> None:
    p, parallel = config.precision, config.parallel
    if p.fp8 == "none":
        return
    recipe = RECIPES[p.fp8]
    if layers != "te":
        found = machine.why_no_engine if machine.engine is None else f"its version {machine.engine} is too old"
        allowed = f"none here: FP8 is done by Transformer Engine alone ({found})"
        _refuse("precision.fp8", p.fp8, allowed, _install(machine))
    if Version(machine.engine) < Version(recipe.engine):
        found = f"Transformer Engine {recipe.engine} or newer is needed, found {machine.engine}"
        _refuse("precision.fp8", p.fp8, f"{_possible(machine)} here: {found}")
    if not recipe.runs_on(machine):
        found = f"found capability {_dotted(machine.capability)} and CUDA {machine.cuda}"
        _refuse("precision.fp8", p.fp8, f"{_possible(machine)} here: {recipe.hardware} are needed, {found}")
    _check_fp8_shapes(config, recipe)
    if p.fp8_param_gather and not parallel.distributed_optimizer:
        _refuse("precision.fp8_param_gather", True, "false without parallel.distributed_optimizer")
    if p.fp8_param_gather and p.fp8 == "mxfp8":
        _refuse("precision.fp8_param_gather", True, "false with mxfp8, whose weights megatron gathers in bf16")
    for key, kept in {"first": p.bf16_first_layers, "last": p.bf16_last_layers}.items():
        most = config.model.num_layers // parallel.pipeline
        if kept > most:
            _refuse(f"precision.bf16_{key}_layers", kept, f"at most the layers of one pipeline stage ({most})")


def _possible(machine: Machine) -> str:
    able = [n for n, r in RECIPES.items() if Version(machine.engine) >= Version(r.engine) and r.runs_on(machine)]
    return " or ".join([*able, "none"])


def _check_fp8_shapes(config: Config, recipe: Recipe) -> None:
    m, tensor, align = config.model, config.parallel.tensor, recipe.align
    for key, width in {
        "model.hidden_size": m.hidden_size,
        "model.ffn_hidden_size": m.ffn_hidden_size / tensor,
        "model.num_attention_heads": m.num_attention_heads * m.head_width / tensor,
        "model.num_query_groups": (m.num_attention_heads + 2 * m.num_query_groups) * m.head_width / tensor,
    }.items():
        if width % align:
            name = key.removeprefix("model.")
            allowed = (
                f"such that matrices have a multiple of {align} columns with precision.fp8, found {width:g} on a rank"
            )
            _refuse(key, getattr(m, name), allowed)
    if config.parallel.context > 1:  # the parts of the rows are filled up to row_multiple
        return
    rows, multiple = forward_rows(config), row_multiple(config)
    if rows % multiple:
        allowed = f"a length whose rows of a forward ({rows}) are a multiple of {multiple} with precision.fp8"
        way_out = f"or change train.draft_fraction or train.micro_batch_size ({config.train.micro_batch_size})"
        _refuse("data.seq_length", config.data.seq_length, allowed, way_out)


def forward_rows(config: Config) -> int:
    """Rows of each sequence in a training forward: the clean ones and the drafted ones."""
    return config.data.seq_length + config.drafted_rows


def row_multiple(config: Config) -> int:
    """The rows of one sequence on one context-parallel rank must be a multiple of this.

    Sequence parallelism deals them to the tensor group, and FP8 wants whole blocks of (rows x sequences) on each.
    """
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    if config.precision.fp8 == "none":
        return ranks
    align = RECIPES[config.precision.fp8].align
    return ranks * align // math.gcd(align, config.train.micro_batch_size)


def _check_recompute(config: Config) -> None:
    p = config.parallel
    layers = config.model.num_layers // (p.pipeline * p.virtual_pipeline)
    if p.recompute == "full" and layers % p.recompute_layers:  # megatron would ask for a layer that does not exist
        _refuse("parallel.recompute_layers", p.recompute_layers, f"a divisor of the layers of one stage ({layers})")


def _check_gradient_fusion(config: Config, machine: Machine, layers: str) -> None:
    if not config.parallel.gradient_accumulation_fusion or layers == "te" or machine.fused_gradients:
        return
    reason = machine.why_no_engine if machine.engine is None else "the layers are local"
    allowed = f"false here: {reason}, and apex's extension fused_weight_gradient_mlp_cuda is missing"
    _refuse("parallel.gradient_accumulation_fusion", True, allowed, _install(machine))


def _check_offload(config: Config, machine: Machine) -> None:
    """The limits of megatron's HybridDeviceOptimizer."""
    share, p = config.parallel.optimizer_offload, config.precision
    if share == 0:
        return
    problem = None
    if machine.capability is None:
        problem = "there is no GPU whose memory it could spare"
    elif machine.engine is None:
        # with torch's Adam on the GPU, megatron cannot tell the two optimizers' states apart in a checkpoint
        problem = f"the share on the GPU needs Transformer Engine's Adam ({machine.why_no_engine})"
    elif not config.parallel.distributed_optimizer:
        problem = "it works on the shards of parallel.distributed_optimizer"
    elif p.dtype != "bf16":
        problem = "it restores float32 copies of bf16 weights, and precision.dtype is fp32"
    elif p.fp8_param_gather and p.fp8 != "delayed":
        problem = "precision.fp8_param_gather works with it only under delayed scaling"
    if problem:
        _refuse("parallel.optimizer_offload", share, f"0 here: {problem}")


_CUBLAS = (":4096:8", ":16:8")
_NCCL = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


def _check_deterministic(environment: Mapping[str, str]) -> None:
    """cuBLAS reads its variable once, when the process first uses the GPU: it cannot be set from here."""
    found = environment.get("CUBLAS_WORKSPACE_CONFIG", "not set")
    if found not in _CUBLAS:
        way_out = f"start with CUBLAS_WORKSPACE_CONFIG={_CUBLAS[0]} in the environment"
        _refuse("precision.deterministic", True, f"false with CUBLAS_WORKSPACE_CONFIG {found}", way_out)
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several and environment.get("NCCL_ALGO") not in _NCCL:
        found = environment.get("NCCL_ALGO", "not set")
        way_out = f"set it to one of {', '.join(_NCCL)}, so that sums over GPUs are always taken in one order"
        _refuse("precision.deterministic", True, f"false with NCCL_ALGO {found} on several GPUs", way_out)


def settings(config: Config) -> dict:
    """megatron-core's TransformerConfig fields for `precision.fp8*` and `precision.deterministic`."""
    p = config.precision
    fields = {"deterministic_mode": p.deterministic}
    if p.fp8 == "none":
        return fields
    kept = p.bf16_first_layers + p.bf16_last_layers
    return fields | {
        "fp8": p.fp8_format,
        "fp8_recipe": p.fp8,
        "fp8_param": p.fp8_param_gather,
        # delayed scaling looks back; megatron's default, the last step alone, clips at every new largest value
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": kept > 0,
        "num_layers_at_start_in_bf16": p.bf16_first_layers,
        "num_layers_at_end_in_bf16": p.bf16_last_layers,
    }


def make_deterministic(config: Config) -> None:
    """Has torch choose kernels that repeat bit by bit, and raise where it has none."""
    if config.precision.deterministic:
        torch.use_deterministic_algorithms(True)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _install(machine: Machine) -> str:
    return f"install it: {INSTALL}" if machine.capability is not None and machine.engine is None else ""


def _refuse(key: str, value: object, allowed: str, way_out: str = "") -> None:
    raise ConfigError(f"{key} = {value}: must be {allowed}" + (f"; {way_out}" if way_out else ""))
