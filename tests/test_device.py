"""What `tidar_mega/device.py` does for a machine without CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tidar_mega import device
from tidar_mega.plan.hardware import KNOWN

# the first call of a process, by several threads, and the second; as few rows as a forward of decoding has
TWICE = """
import torch
from tidar_mega.device import settle_kernels

settle_kernels()
x = torch.arange(512).remainder(64).float()[:, None] * torch.linspace(0, 1, 32)
assert torch.equal(x.cos(), x.cos())
"""


@pytest.mark.slow
def test_the_first_call_by_several_threads_computes_what_the_second_does():
    """Fresh processes, as each has one first call only; without `settle_kernels` a third fail on some machines."""
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_peaks_are_those_of_the_planner():
    for hardware in KNOWN.values():
        (peak,) = [peak for name, peak in device._PEAK_BF16.items() if name in hardware.name]
        assert peak == hardware.bf16_tflops * 1e12
