"""CUDA with NCCL, or CPU with gloo; the one place where megatron-core is taught to run without CUDA.

megatron-core assumes CUDA throughout: it asks for the current CUDA device, allocates on `"cuda"` and keeps CUDA random
states. Without a GPU, `prepare_megatron` gives megatron's own modules another `torch`: a proxy whose CUDA calls and
allocations go to the CPU. `torch` itself stays as it is, save for two tensor methods that can only fail without CUDA.
With CUDA nothing is changed at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from tidar_mega.config import Config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# of torch's functions, those that oneMKL computes on a CPU (aten/src/ATen/cpu/vml.h)
_VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1"),
    *("log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)

# Every module of the training path that reads `torch` at import; a missing one is of another megatron-core version.
_MEGATRON_MODULES = (
    "dist_checkpointing",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.serialization",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed.distributed_data_parallel",
    "distributed.finalize_model_grads",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rope_utils",
    "models.common.embeddings.rotary_pos_embedding",
    "models.gpt.gpt_layer_specs",
    "models.gpt.gpt_model",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "optimizer_param_scheduler",
    "parallel_state",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.cross_entropy",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "timers",
    "transformer.attention",
    "transformer.module",
    "transformer.transformer_layer",
    "transformer.utils",
    "utils",
)


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def start_process_group(config: Config, local_rank: int) -> None:
    """Joins the world that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    if has_cuda():
        # read when CUDA starts: one queue, so that kernels run in the order in which megatron launches them, a transfer
        # before the product that hides it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    torch.distributed.init_process_group("nccl" if has_cuda() else "gloo", timeout=timeout)


def start_alone() -> None:
    """A world of this one process, for decoding and measuring; does nothing inside an existing world."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if has_cuda() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def settle_kernels() -> None:
    """Calls the functions of oneMKL that torch uses on a CPU once, on this thread alone, before anything is computed.

    oneMKL looks for the kernel of a function at its first call in a process. If several threads make that call at once,
    one of them may compute its share with a kernel of low accuracy, that one time (pytorch/pytorch issue 188792): a
    first forward with cosines that are wrong by 1.5e-4, which no other run repeats.
    """
    for dtype in (torch.float32, torch.float64):
        for name in _VECTOR_FUNCTIONS:
            getattr(torch.full((1,), 0.5, dtype=dtype), name)()


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on the host."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss also remembers the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


# dense tensor-core FLOP/s from the data sheets, as in plan/hardware.py
_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@functools.cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of this process's device at its best: the data sheet's for known GPUs, else a measured matrix product."""
    if has_cuda() and dtype == "bf16":
        name = torch.cuda.get_device_name()
        known = [peak for key, peak in _PEAK_BF16.items() if key in name]
        if known:
            return known[0]
    size = 4096 if has_cuda() else 1024
    a, b = torch.ones(2, size, size, dtype=DTYPES[dtype], device=device())
    best = min(seconds(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / best


def seconds(action) -> float:
    """How long `action` takes on this process's device."""
    synchronise = torch.cuda.synchronize if has_cuda() else lambda: None
    synchronise()
    started = time.perf_counter()
    action()
    synchronise()
    return time.perf_counter() - started


def medians_in_turn(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median `seconds` of each, which take turns, so that a busy machine slows all alike; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            taken = seconds(action)
            if repeat:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


def prepare_megatron() -> None:
    """Makes megatron-core usable on this machine; call before its modules are used, as often as wanted."""
    if has_cuda():
        return
    for name in _MEGATRON_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"megatron.core.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _proxy()
    _use_cpu_random_states()
    _patch_tensor_methods()


@functools.cache
def _proxy() -> types.ModuleType:
    proxy = _Forwarding("torch", torch)
    for name in ("zeros", "ones", "tensor", "empty", "full", "zeros_like", "empty_like"):
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    cuda = _Forwarding("torch.cuda", torch.cuda)
    cuda.Event = cuda.Stream = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _NoStream()
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    proxy.cuda = cuda
    return proxy


class _Forwarding(types.ModuleType):
    """A module whose missing names are those of another."""

    def __init__(self, name: str, target: types.ModuleType) -> None:
        super().__init__(name)
        self._target = target

    def __getattr__(self, name: str):
        return getattr(self._target, name)


class _NoStream:
    """Stands for a CUDA stream or event where there is none: everything is already in order."""

    def __init__(self, *_, **__) -> None: ...

    def wait_stream(self, *_) -> None: ...

    def wait_event(self, *_) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_) -> None: ...

    def record_event(self, *_):
        return self


def _on_cpu(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)  # pinning needs an accelerator
        return allocate(*args, **kwargs)

    return wrapper


@functools.cache
def _use_cpu_random_states() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Named random states that swap torch's CPU generator instead of a CUDA one."""

        @contextlib.contextmanager
        def fork(self, name=megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            if name not in self.states_:
                raise ValueError(f"random state {name!r} was never added")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@functools.cache
def _patch_tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        # megatron's optimizers recognise their parameters by the literal names of CUDA tensor types
        caller = sys._getframe(1).f_globals.get("__name__", "")
        found = plain_type(self, *args, **kwargs)
        if args or kwargs or not caller.startswith("megatron.core.optimizer"):
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *_, **__: self


def cpu_name() -> str:
    """The processor's name as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
