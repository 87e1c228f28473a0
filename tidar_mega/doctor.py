"""What a machine has for a run, what it lacks, what that costs, and the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tidar_mega.model.precision import Machine

OK, WARN, MISSING = "OK", "WARN", "MISSING"

_REQUIRED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "psutil": "psutil",
    "omegaconf": "omegaconf",
    "webdataset": "webdataset",
    "tensorboard": "tensorboard",
    "submitit": "submitit",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "zstandard": "zstandard",
}


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # OK | WARN | MISSING
    found: str
    fix: str = ""


def examine(data: Path | None = None) -> list[Finding]:
    """Looks at the interpreter, packages, devices, accelerated parts, memory and, if given, a prepared folder."""
    findings = [_python(), *(_package(name, module) for name, module in _REQUIRED.items())]
    if any(f.status == MISSING for f in findings):
        return findings  # the rest imports what is not there
    findings += [*_device(), *_accelerated(), _memory(), _disk(), _threads()]
    if data is not None:
        findings.append(_shards(data))
    return findings


def show(findings: list[Finding]) -> None:
    table = Table("", "what", "found", "fix")
    colours = {OK: "green", WARN: "yellow", MISSING: "red"}
    for f in findings:
        table.add_row(f"[{colours[f.status]}]{f.status}[/]", f.name, f.found, f.fix)
    Console().print(table)


def _python() -> Finding:
    found = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    return Finding("python", OK if good else MISSING, found, "" if good else "install Python 3.11 or newer")


def _package(name: str, module: str) -> Finding:
    try:
        present = importlib.util.find_spec(module) is not None
        return Finding(name, OK, importlib.metadata.version(name)) if present else _absent(name)
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return _absent(name)


def _absent(name: str) -> Finding:
    return Finding(name, MISSING, "not installed", f"pip install -c constraints.txt {name}")


def _device() -> list[Finding]:
    """The GPUs and what lies between them and torch."""
    import torch

    if not torch.cuda.is_available():
        cpu = "no CUDA GPU is seen: fine for tests and the quickstart only"
        return [
            Finding("device", WARN, "CPU with gloo", cpu),
            Finding("NCCL", WARN, "absent: processes exchange through gloo", _NO_GPU),
        ]
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    gpus = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, compute capability {capability}"
    cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()
    return [
        Finding("device", OK, gpus),
        _driver(),
        Finding("CUDA of torch", OK, str(torch.version.cuda)),
        Finding("cuDNN", OK, str(cudnn))
        if cudnn
        else Finding("cuDNN", WARN, "absent", "install a CUDA build of torch"),
        Finding("NCCL", OK, ".".join(map(str, nccl))),
    ]


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return Finding("driver", WARN, "nvidia-smi does not say", "torch sees the GPU, so a run can start")
    return Finding("driver", OK, found.strip())


def _accelerated() -> list[Finding]:
    """Optional parts; without them the same run is right but slower."""
    from tidar_mega.model.precision import this_machine

    machine = this_machine()
    cuda = machine.capability is not None
    return [
        _engine(machine, _version("transformer-engine")),
        fp8(machine),
        *_apex(cuda),
        _optional("triton", "FlexAttention cannot be compiled; on CPU the `tiles` backend is used", cuda),
    ]


_NO_GPU = "needs a CUDA GPU; nothing to do here"


def _engine(machine: Machine, installed: str | None) -> Finding:
    """Transformer Engine, of which `installed` is the version that pip knows of."""
    from tidar_mega.model.precision import INSTALL

    name, cuda = "transformer-engine", machine.capability is not None
    if machine.engine is not None:
        return Finding(name, OK, machine.engine)
    if installed is None:
        cost = "absent: no FP8, no fused norm-linear layers; AdamW is torch's"
        return Finding(name, WARN, cost, INSTALL if cuda else _NO_GPU)
    if not cuda:
        found = f"{installed}, whose import fails without a GPU and takes megatron-core's with it"
        return Finding(name, MISSING, found, f"pip uninstall {name}")
    return Finding(name, MISSING, f"{installed}, but {machine.why_no_engine}", INSTALL)


def fp8(machine: Machine) -> Finding:
    """Which values of `precision.fp8` a run may have here."""
    from tidar_mega.model.precision import INSTALL, RECIPES, possible_recipes

    cost = "none: matrix products stay in bf16, at up to half the speed"
    if machine.capability is None:
        return Finding("FP8", WARN, cost, _NO_GPU)
    if machine.engine is None:
        return Finding("FP8", WARN, cost, INSTALL)
    able = possible_recipes(machine)
    lacking = {name: recipe.missing(machine) for name, recipe in RECIPES.items() if recipe.fits_gpu(machine)}
    newer = "; ".join(f"{name} needs {' and '.join(parts)}" for name, parts in lacking.items() if parts)
    if not able:
        return Finding("FP8", WARN, cost, newer or "a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)")
    return Finding("FP8", OK, f"precision.fp8 may be {', '.join(able)}", newer)


def _apex(cuda: bool) -> list[Finding]:
    source = "build NVIDIA's from source; PyPI's package of that name is an unrelated project" if cuda else _NO_GPU
    parts = {
        "apex": ("amp_C", "absent: not needed beside Transformer Engine"),
        "apex gradient fusion": (
            "fused_weight_gradient_mlp_cuda",
            "absent: parallel.gradient_accumulation_fusion needs precision.layers=te",
        ),
    }
    return [
        Finding(name, OK, "present") if importlib.util.find_spec(module) else Finding(name, WARN, cost, source)
        for name, (module, cost) in parts.items()  # PyPI's `apex` has neither module
    ]


def _optional(name: str, cost: str, cuda: bool) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, WARN, f"absent: {cost}", f"pip install {name}" if cuda else _NO_GPU)
    return Finding(name, OK, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> Finding:
    import psutil

    gib = psutil.virtual_memory().available / 2**30
    enough = gib >= 4
    return Finding("memory", OK if enough else WARN, f"{gib:.1f} GiB available", "" if enough else "4 GiB are wanted")


def _disk() -> Finding:
    gib = shutil.disk_usage(".").free / 2**30
    fix = "free 5 GiB, or set run_dir and data.path to another disk"
    return Finding("disk here", OK if gib >= 5 else WARN, f"{gib:.1f} GiB free", "" if gib >= 5 else fix)


def _threads() -> Finding:
    cores = os.cpu_count() or 1
    return Finding("cores", OK, f"{cores}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")


def _shards(folder: Path) -> Finding:
    from tidar_mega.config import UserError
    from tidar_mega.data.shards import verify

    try:
        verify(folder)
    except (UserError, OSError) as error:
        return Finding(f"data {folder}", MISSING, str(error), "run `tidar prepare` again")
    return Finding(f"data {folder}", OK, "every shard has the sha256 of its index")
