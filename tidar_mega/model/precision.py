"""Which layers and number formats a run uses, and whether this machine has what they need.

megatron-core accepts every FP8 setting and, without Transformer Engine, quietly computes in bf16; a recipe that the GPU
lacks fails deep inside a kernel. So what depends on the machine is checked here, before anything is built; the rest is
checked by `config/checks.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from packaging.version import Version

from tidar_mega.config import Config, require
from tidar_mega.device import has_cuda

OLDEST_ENGINE = "1.9"  # before it, its norm made models with q/k norm converge worse (megatron's own remark)
INSTALL = 'pip install --no-build-isolation "transformer_engine[core_cu13,pytorch]>=2.9,<2.12" (core_cu12 for CUDA 12)'


@dataclass(frozen=True)
class Recipe:
    """What an FP8 recipe needs: the oldest Transformer Engine, GPU and CUDA."""

    engine: str
    capability: tuple[int, int]
    cuda: str = "12.1"
    below: tuple[int, int] | None = None  # GPUs from this capability on lack it

    def fits_gpu(self, machine: Machine) -> bool:
        return machine.capability >= self.capability and (self.below is None or machine.capability < self.below)

    def missing(self, machine: Machine) -> list[str]:
        """What a machine with a GPU and Transformer Engine lacks for it."""
        limit = f" but below {_dotted(self.below)}" if self.below else ""
        gpu = f"a GPU of compute capability {_dotted(self.capability)} or newer{limit}"
        return [
            *([] if self.fits_gpu(machine) else [gpu]),
            *([] if Version(machine.engine) >= Version(self.engine) else [f"Transformer Engine {self.engine}"]),
            *([] if Version(machine.cuda) >= Version(self.cuda) else [f"CUDA {self.cuda}"]),
        ]


# Transformer Engine's names: DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling
RECIPES = {
    "delayed": Recipe("1.9", (8, 9)),
    "tensorwise": Recipe("2.2", (8, 9)),
    "blockwise": Recipe("2.3", (9, 0), cuda="12.9"),
    "mxfp8": Recipe("2.1", (10, 0), cuda="12.8", below=(12, 0)),
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
    _check_gradient_fusion(config, machine, layers)
    _check_offload(config, machine)
    if config.precision.deterministic and machine.capability is not None:
        _check_deterministic(environment)


def _check_fp8(config: Config, machine: Machine, layers: str) -> None:
    p = config.precision
    if p.fp8 == "none":
        return
    if layers != "te":
        found = machine.why_no_engine if machine.engine is None else f"its version {machine.engine} is too old"
        allowed = f"none here: FP8 is done by Transformer Engine alone ({found})"
        _refuse("precision.fp8", p.fp8, allowed, _install(machine))
    if missing := RECIPES[p.fp8].missing(machine):
        possible = " or ".join([*possible_recipes(machine), "none"])
        gpu = f"capability {_dotted(machine.capability)}"
        found = f"found {gpu}, Transformer Engine {machine.engine} and CUDA {machine.cuda}"
        _refuse("precision.fp8", p.fp8, f"{possible} here: {' and '.join(missing)} needed, {found}")


def possible_recipes(machine: Machine) -> list[str]:
    """The FP8 recipes that this machine can compute."""
    return [] if machine.engine is None else [name for name, recipe in RECIPES.items() if not recipe.missing(machine)]


def _check_gradient_fusion(config: Config, machine: Machine, layers: str) -> None:
    if not config.parallel.gradient_accumulation_fusion or layers == "te" or machine.fused_gradients:
        return
    reason = machine.why_no_engine if machine.engine is None else "the layers are local"
    allowed = f"false here: {reason}, and apex's extension fused_weight_gradient_mlp_cuda is missing"
    _refuse("parallel.gradient_accumulation_fusion", True, allowed, _install(machine))


def _check_offload(config: Config, machine: Machine) -> None:
    """The limits of megatron's HybridDeviceOptimizer."""
    share, problem = config.parallel.optimizer_offload, None
    if share == 0:
        return
    if machine.capability is None:
        problem = "there is no GPU whose memory it could spare"
    elif machine.engine is None:
        # with torch's Adam on the GPU, megatron cannot tell the two optimizers' states apart in a checkpoint
        problem = f"the share on the GPU needs Transformer Engine's Adam ({machine.why_no_engine})"
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


_refuse = functools.partial(require, False)
