"""Stopping in time: signals become one decision that all ranks take together at a step boundary.

Nothing here imports torch at the top: the handlers must be there before such an import, which takes seconds.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal of this process. Install before anything that takes long."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame) -> None:
        self.signal = self.signal or number

    def agreed(self) -> str | None:
        """Collective. The name of the signal that any rank has received, or None."""
        number = _highest(self.signal or 0)
        return signal.Signals(number).name if number else None


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
