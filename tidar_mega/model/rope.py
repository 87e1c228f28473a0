"""Rotary position encoding from the rows' positions (arXiv 2104.09864).

Shape suffixes: B sequences, T rows, F = E/2 frequencies of a head of width E.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(base: float, width: int) -> Tensor:
    """float32 [F]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return (base**-exponents).float()


def angles(position_BT: Tensor, frequency_F: Tensor) -> Tensor:
    """What megatron rotates by, [T, B, 1, E]: pairs are (i, i + F)."""
    return _doubled(position_BT.t().float()[..., None] * frequency_F)


def angles_of_two(first_BT: Tensor, second_BT: Tensor, frequency_F: Tensor) -> Tensor:
    """Two positions of one row: every other frequency turns by the first, the others by the second, [T, B, 1, E]."""
    position_TB2 = torch.stack([first_BT.t(), second_BT.t()], dim=-1).float()
    which_F = torch.arange(len(frequency_F), device=frequency_F.device) % 2
    return _doubled(position_TB2[..., which_F] * frequency_F)


def _doubled(angle_TBF: Tensor) -> Tensor:
    return torch.cat([angle_TBF, angle_TBF], dim=-1)[:, :, None, :]
