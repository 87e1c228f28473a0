"""What a machine has for a run, what it lacks, what that costs, and the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
    findings += [_device(), *_accelerated(), _memory(), _disk(), _threads()]
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


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", WARN, "CPU with gloo", "no CUDA GPU is seen: fine for tests and the quickstart only")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("device", OK, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}")


def _accelerated() -> list[Finding]:
    """Optional parts; without them the same run is right but slower."""
    import torch

    cuda = torch.cuda.is_available()
    install = 'pip install --no-build-isolation "transformer_engine[core_cu13,pytorch]>=2.9,<2.12"'
    parts = [
        (
            "transformer-engine",
            importlib.util.find_spec("transformer_engine") is not None,
            "absent: no FP8, no fused norm-linear layers; AdamW is torch's",
            install if cuda else "needs a CUDA GPU; nothing to do here",
        ),
        (
            "apex",
            importlib.util.find_spec("amp_C") is not None,  # PyPI's `apex` is another project and has no amp_C
            "absent: not needed beside Transformer Engine",
            "build NVIDIA's from source; PyPI's package of that name is an unrelated project" if cuda else "",
        ),
        (
            "triton",
            importlib.util.find_spec("triton") is not None,
            "absent: FlexAttention cannot be compiled; on CPU the `tiles` backend is used",
            "pip install triton" if cuda else "needs a CUDA GPU; nothing to do here",
        ),
    ]
    return [
        Finding(name, OK, "present") if there else Finding(name, WARN, cost, fix) for name, there, cost, fix in parts
    ]


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
    except UserError as error:
        return Finding(f"data {folder}", MISSING, str(error), "run `tidar prepare` again")
    return Finding(f"data {folder}", OK, "every shard has the sha256 of its index")
