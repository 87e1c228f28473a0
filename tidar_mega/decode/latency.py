"""The machine's latency curves: how long one forward takes against its number of rows, behind a few and behind many
committed tokens, measured once and kept.

`tidar bench slots` measures it and stores it in the run folder, beside the checkpoints; the engine reads it to choose
how far to draft (`outcomes.py`). Curves belong to one model on one kind of machine in one layout: `key` says which.
"""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tidar_mega.decode.forward import Forwards, Plan, Work
from tidar_mega.decode.sampling import SamplingParams, choose

FILE = "latency.json"
MOST = 1024  # rows of a measured forward; beyond, the last slope goes on
BURST = 5  # of one size in a row
PREFIXES = (64, 1024)  # committed tokens of each request
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 72, 136, 272)


@dataclass(frozen=True)
class Latency:
    """Seconds behind so many committed tokens, by linear interpolation between measured points (and beyond them by the
    last slope).

    step    for each number of requests: (rows of each request, seconds of a forward that chooses one token per request)
    head    (rows, seconds) of logits and greedy choice; sampled  the same with noise
    """

    step: dict[int, list[tuple[float, float]]]
    head: list[tuple[float, float]]
    sampled: list[tuple[float, float]]

    def seconds(self, requests: int, rows: float, first: float, second: float, sampled: bool) -> float:
        """One forward of `rows` rows in all, with the head on `first` rows and then on `second`."""
        sizes = sorted(self.step)
        near = sizes[min(bisect_left(sizes, requests), len(sizes) - 1)]
        head = self.sampled if sampled else self.head
        # more or fewer requests than were measured: as many rows, of the nearest number of requests
        seconds = _interpolate(self.step[near], max(rows / near, 1.0)) - _interpolate(self.head, near)
        seconds += _interpolate(head, first)
        return seconds + (_interpolate(head, second) if second else 0.0)


@dataclass(frozen=True)
class Curves:
    """A curve for each of some numbers of committed tokens, measured with the same rows and requests."""

    by_prefix: dict[int, Latency]

    @property
    def most_requests(self) -> int:
        return max(max(curve.step) for curve in self.by_prefix.values())

    def at(self, length: int) -> Latency:
        """The curve behind `length` committed tokens of each request, between the measured ones; before the first, the
        first."""
        prefixes = sorted(self.by_prefix)
        curves, length = [self.by_prefix[prefix] for prefix in prefixes], max(length, prefixes[0])

        def between(seconds: Sequence[float]) -> float:
            return _interpolate(list(zip(prefixes, seconds, strict=True)), length)

        step = {}
        for n in curves[0].step:
            of_rows = zip(*(curve.step[n] for curve in curves), strict=True)
            step[n] = [(points[0][0], between([seconds for _, seconds in points])) for points in of_rows]
        return Latency(step, curves[0].head, curves[0].sampled)


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    if len(points) == 1:
        return points[0][1]
    at = min(max(bisect_left([p[0] for p in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@torch.inference_mode()
def measure(forwards: Forwards, requests: list[int], rows: int, prefix: int, repeats: int = 5) -> Latency:
    """Forwards of up to `rows` rows for each of some numbers of requests, behind `prefix` committed tokens each.

    The cache must hold them. Medians; the sizes are measured in turn, so that a slow moment does not bend the curve.
    """
    cache, params = forwards.cache, SamplingParams()
    sizes = [r for r in ROWS if r < rows] + [rows]
    held = [cache.take(prefix + rows) for _ in range(max(requests))]
    assert None not in held, "the cache is too small for the measurement"
    jobs = {
        (n, r): [Work(Plan(r, 1), [0] * r, slots, prefix, params) for slots in held[:n]]
        for n in requests
        for r in sizes
        if r <= 16 or n * r <= MOST
    }
    step = _medians({key: lambda works=works: forwards.run(works) for key, works in jobs.items()}, repeats)
    for slots in held:
        cache.give_back(slots)
    curves = []
    for temperature in (0.0, 1.0):
        found = _medians({r: _head(forwards, r, temperature) for r in ROWS}, repeats)
        curves.append(sorted(found.items()))
    return Latency({n: [(r, step[n, r]) for r in sizes if (n, r) in step] for n in requests}, *curves)


def _head(forwards: Forwards, rows: int, temperature: float):
    model = forwards.model
    sampling = forwards.sampling((SamplingParams(temperature=temperature),))
    order_1R = torch.arange(rows, device=forwards.device)[None]
    hidden_RD = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=forwards.device)
    if not model.is_last:
        return lambda: None
    return lambda: choose(model.logits(hidden_RD)[None], order_1R, sampling).cpu()


def _medians(jobs: dict, repeats: int) -> dict:
    """Each several times in a row, as decoding does: behind one of another size, a small one finds the caches cold."""
    times: dict = {key: [] for key in jobs}
    for _ in range(repeats):
        for key, job in jobs.items():
            for again in range(BURST):
                started = time.perf_counter()
                job()
                if again:  # the first is a warm-up
                    times[key].append(time.perf_counter() - started)
    return {key: statistics.median(found) for key, found in times.items()}


def key(forwards: Forwards) -> str:
    """Model, machine and layout that a curve belongs to."""
    model, shape = forwards.model, forwards.model.config
    kind = torch.cuda.get_device_name() if forwards.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sizes = f"{shape.num_layers} layers of {shape.hidden_size}, {str(model.dtype).removeprefix('torch.')}"
    return f"{kind}, {sizes}, tensor {model.tensor.size()}, pipeline {model.pipeline.size()}"


def save(folder: Path, name: str, curves: Curves) -> Path:
    """Adds what was measured to the file of the run folder."""
    path = folder / FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    new = path.with_suffix(".new")
    kept = {"by_prefix": {str(prefix): asdict(curve) for prefix, curve in curves.by_prefix.items()}}
    new.write_text(json.dumps(found | {name: kept}, indent=1) + "\n")
    new.replace(path)
    return path


def load(folder: Path, name: str) -> Curves | None:
    """None if nothing was measured there, or by a version that knew one prefix alone."""
    path = folder / FILE
    found = json.loads(path.read_text()).get(name, {}) if path.exists() else {}
    if "by_prefix" not in found:
        return None
    return Curves({int(prefix): _latency(curve) for prefix, curve in found["by_prefix"].items()})


def _latency(curve: dict) -> Latency:
    return Latency({int(n): points for n, points in curve["step"].items()}, curve["head"], curve["sampled"])
