"""Stopping in time: signals become one decision that all ranks take together at a step boundary. And losses that jump.

Nothing here imports torch at the top: the handlers must be there before such an import, which takes seconds.
"""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidar_mega.checkpoint.state import Progress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal of this process. Install before anything that takes long."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        self.signal = self.signal or number

    def ignore(self) -> None:
        """From now on, as this process ends by itself: Python's end gives signals back the power to kill it, and Slurm
        sends one to all ranks once one of them has requeued the job."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self) -> str | None:
        """Collective. The name of the signal that any rank has received, or None."""
        number = _highest(self.signal or 0)
        return signal.Signals(number).name if number else None


_RECENT = 0.02  # share of the newest loss in the mean, and
_FIRST_STEPS = 20  # losses before any is called a spike


def spike(progress: Progress, loss: float, sigmas: float) -> float | None:
    """How many standard deviations above the recent mean this loss is, if more than `sigmas`. Takes it into the mean.

    A spike counts in the mean as well: where losses stay high, that is soon the new normal.
    """
    if sigmas == 0 or not math.isfinite(loss):
        return None  # the NaN policy's
    height = loss - progress.loss_mean
    deviation = math.sqrt(progress.loss_variance)
    found = height / deviation if progress.loss_steps >= _FIRST_STEPS and height > sigmas * deviation > 0 else None
    progress.loss_steps += 1
    weight = max(_RECENT, 1 / progress.loss_steps)
    progress.loss_mean += weight * height
    progress.loss_variance = (1 - weight) * (progress.loss_variance + weight * height**2)
    progress.spikes += found is not None
    return found


def anywhere(truth: bool) -> bool:
    """Collective. Whether `truth` holds on any rank."""
    return bool(_highest(int(truth)))


def _highest(number: int) -> int:
    import torch
    import torch.distributed as dist

    from tidar_mega import device

    highest = torch.tensor(number, device=device.device())
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)
