"""Which ranks are slow: how long each works on a step by itself, before it waits for the gradients of the others.

That is the time of reading the samples and of the forward and backward up to the exchange of gradients. Ranks of one
replica exchange rows and layers in between and so are slow together: the report names a replica there, not a GPU.
"""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed as dist

from tidar_mega import device

_PATIENCE = 3  # reports in a row in which a rank must be slow before it is named


class OwnWork:
    """Adds up this rank's seconds between two reports."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seconds, self.steps = 0.0, 0
        self._begun = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._slow_for: dict[int, int] = {}
        self._hosts: list[str] | None = None

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.steps += 1

    def begin(self) -> None:
        self._begun = time.perf_counter()
        if device.has_cuda():  # kernels run behind this process: the device keeps the time
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def end(self) -> None:
        if self._events:
            self._events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self._begun

    def report(self) -> tuple[dict[str, float], str | None]:
        """Collective. Figures of the time since the last report, equal on all ranks, and a warning where due."""
        own = torch.tensor(self._mean(), dtype=torch.float64, device=device.device())
        everybody = own.new_zeros(dist.get_world_size())
        dist.all_gather_into_tensor(everybody, own[None])
        seconds = everybody.tolist()
        median = float(everybody.cpu().median())  # of two, the lower
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        figures = {
            "rank_seconds_median": median,
            "rank_seconds_slowest": seconds[slowest],
            "slowest_rank": slowest,
        }
        return figures, self._warning(seconds, median)

    def _mean(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self.seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        mean = self.seconds / max(1, self.steps)
        self.seconds, self.steps, self._events = 0.0, 0, []
        return mean

    def _warning(self, seconds: list[float], median: float) -> str | None:
        if self._hosts is None:
            self._hosts = [""] * len(seconds)
            dist.all_gather_object(self._hosts, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        slow = {r for r, own in enumerate(seconds) if self.factor > 0 and own > self.factor * median}
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        named = [rank for rank, times in self._slow_for.items() if times == _PATIENCE]  # once, until it is fast again
        if not named:
            return None
        said = ", ".join(f"rank {r} on {self._hosts[r]} ({seconds[r] / median:.1f}x)" for r in sorted(named))
        return (
            f"warning: slow against the median of the ranks, {median:.3f} s a step, in {_PATIENCE} reports in a row: "
            f"{said}; look at what else runs on that machine"
        )
