"""Data-sheet figures of GPUs, and the fractions of them that a plan assumes to be reached. Every one is an option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from tidar_mega.config import Config, ConfigError


def _figure(meaning: str, default: float | None = None):
    return field(metadata={"meaning": meaning}, **({} if default is None else {"default": default}))


@dataclass(frozen=True)
class Hardware:
    """A node of GPUs. Rates are of one GPU; GB/s are 1e9 bytes, one direction."""

    name: str
    memory_gib: float = _figure("memory that a process can use, GiB")
    bf16_tflops: float = _figure("dense bf16 TFLOP/s, data sheet")
    fp8_tflops: float = _figure("dense FP8 TFLOP/s, data sheet; 0 = none")
    fp32_tflops: float = _figure("fp32 TFLOP/s without tensor cores, data sheet")
    memory_gbs: float = _figure("memory bandwidth GB/s, data sheet")
    nvlink_gbs: float = _figure("to GPUs of the same node, GB/s")
    internode_gbs: float = _figure("to other nodes (InfiniBand or RoCE), GB/s for each GPU")
    host_gbs: float = _figure("Adam in host memory (parallel.optimizer_offload), GB/s for each GPU", 20)
    gpus_per_node: float = _figure("GPUs of a node", 8)
    matmul_efficiency: float = _figure("share of the bf16 or fp32 rate that matrix products reach", 0.70)
    fp8_efficiency: float = _figure("share of the FP8 rate, casts included", 0.55)
    attention_efficiency: float = _figure("share of the bf16 rate that attention kernels reach", 0.40)
    memory_efficiency: float = _figure("share of the memory bandwidth", 0.85)
    network_efficiency: float = _figure("share of the link rates", 0.80)
    reserve_gib: float = _figure("kept free: CUDA, NCCL and cuBLAS buffers, fragmentation, GiB", 6.0)

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gib - self.reserve_gib) * 2**30


# memory_gib is what nvidia-smi shows, which is less than the name says
KNOWN = {
    "a100-40g": Hardware("A100 SXM 40 GB", 39.4, 312, 0, 19.5, 1555, 300, 25),
    "a100": Hardware("A100 SXM 80 GB", 79.2, 312, 0, 19.5, 2039, 300, 25),
    "h100": Hardware("H100 SXM 80 GB", 79.6, 989, 1979, 67, 3350, 450, 50),
    "h200": Hardware("H200 SXM 141 GB", 139.8, 989, 1979, 67, 4800, 450, 50),
    "b200": Hardware("B200 SXM 180 GB", 178.4, 2250, 4500, 75, 7700, 900, 50),
}


def figures() -> dict[str, str]:
    """Name -> meaning of every figure that may be set."""
    return {f.name: f.metadata["meaning"] for f in fields(Hardware) if "meaning" in f.metadata}


def choose(name: str, changes: dict[str, float], config: Config) -> Hardware:
    """The GPU of that name with some figures changed. Raises ConfigError if it cannot run the config's precision."""
    if name not in KNOWN:
        raise ConfigError(f"--hardware {name}: must be one of {', '.join(KNOWN)}; take the nearest and set its figures")
    hardware = replace(KNOWN[name], **changes)
    for figure, value in changes.items():
        option = f"--{figure.replace('_', '-')}"
        if not 0 <= value < math.inf or (value == 0 and figure not in ("fp8_tflops", "reserve_gib")):
            raise ConfigError(f"{option} {value:g}: must be a number above 0 ({figures()[figure]})")
        if figure.endswith("_efficiency") and value > 1:
            raise ConfigError(f"{option} {value:g}: must be at most 1 ({figures()[figure]})")
    fp8 = config.precision.fp8
    if fp8 != "none" and hardware.fp8_tflops == 0:
        raise ConfigError(f"precision.fp8 = {fp8}: must be none on {hardware.name}, or choose another --hardware")
    if fp8 == "mxfp8" and name != "b200":
        raise ConfigError("precision.fp8 = mxfp8: must be delayed, tensorwise or blockwise before Blackwell (b200)")
    return hardware
