"""The machine's latency curves: how long one forward takes against its number of rows, behind a few and behind many
committed tokens, measured once and kept.

`tidar bench slots` measures it and stores it in the run folder, beside the checkpoints; the engine reads it to choose
how far to draft (`outcomes.py`). Curves belong to one model on one kind of machine in one layout: `key` says which.
"""

from __future__ import annotations

import json
import os
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist

from tidar_mega import device
from tidar_mega.decode.cache import Slots
from tidar_mega.decode.forward import DecodingModel, Forwards, Plan, Work
from tidar_mega.decode.sampling import SamplingParams, choose
from tidar_mega.methods import Drafter

FILE = "latency.json"
FORMAT = 4
MOST = 1024  # rows of a measured forward; beyond, the last slope goes on
BURST, BURST_SECONDS = 16, 0.1  # of one size in a row
PREFIXES = (64, 1024)  # committed tokens of each request, and up to SPREAD more
SPREAD = 64  # no two lengths alike, and few of them round: kernels are faster with those
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 72, 136, 272)


@dataclass(frozen=True)
class Latency:
    """Seconds behind so many committed tokens, by linear interpolation between measured points (and beyond them by the
    last slope).

    step    for each number of requests: (rows of each request, seconds of a forward but for its head)
    fused   likewise of forwards that verify drafts and make the next, but for their two heads; as far as `longest`.
            The rows are a mean where some requests verify and others catch up, as they do in decoding
    head    (rows, seconds) of logits and greedy choice; sampled  the same with noise
    """

    step: dict[int, list[tuple[float, float]]]
    fused: dict[int, list[tuple[float, float]]]
    head: list[tuple[float, float]]
    sampled: list[tuple[float, float]]
    longest: int

    def seconds(self, requests: int, rows: float, first: float, second: float, sampled: bool) -> float:
        """One forward of `rows` rows in all, with the head on `first` rows and then on `second`."""
        sizes = sorted(self.step)
        near = sizes[min(bisect_left(sizes, requests), len(sizes) - 1)]
        each = max(rows / near, 1.0)  # more or fewer requests than were measured: as many rows, of the nearest number
        head = self.sampled if sampled else self.head
        if second:
            return _interpolate(self.fused[near], each) + _interpolate(head, first) + _interpolate(head, second)
        return _interpolate(self.step[near], each) + _interpolate(head, first)


@dataclass(frozen=True)
class Curves:
    """A curve for each of some numbers of committed tokens, measured with the same rows and requests."""

    by_prefix: dict[int, Latency]

    def cover(self, requests: int, block: int) -> bool:
        curves = self.by_prefix.values()
        return all(max(curve.step) >= requests and curve.longest >= block for curve in curves)

    def at(self, length: int) -> Latency:
        """The curve behind `length` committed tokens of each request, between the measured ones; before the first, the
        first."""
        prefixes = sorted(self.by_prefix)
        curves, length = [self.by_prefix[prefix] for prefix in prefixes], max(length, prefixes[0])

        def between(tables: list[dict[int, list[tuple[float, float]]]]) -> dict[int, list[tuple[float, float]]]:
            found: dict[int, list[tuple[float, float]]] = {}
            for n in tables[0]:
                for points in zip(*(table[n] for table in tables), strict=True):
                    of_prefix = list(zip(prefixes, [seconds for _, seconds in points], strict=True))
                    found.setdefault(n, []).append((points[0][0], _interpolate(of_prefix, length)))
            return found

        step, fused = between([curve.step for curve in curves]), between([curve.fused for curve in curves])
        return replace(curves[0], step=step, fused=fused)


def draft_lengths(block: int) -> list[int]:
    """Those that are measured and chosen from, but for 1, plain AR: powers of two, and `block`."""
    return sorted({block, *(2**i for i in range(1, block.bit_length()))} - {1})


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    if len(points) == 1:
        return points[0][1]
    at = min(max(bisect_left(points, x, key=itemgetter(0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    slope = (y1 - y0) / (x1 - x0)
    return y1 + max(slope, 0.0) * (x - x1) if x > x1 else y0 + slope * (x - x0)  # noise must not fall below nothing


@torch.inference_mode()
def measure(
    forwards: Forwards, requests: list[int], block: int, drafter: Drafter, prefix: int, repeats: int = 5
) -> Latency:
    """Forwards for each of some numbers of requests, behind `prefix` committed tokens each or some more, with drafts of
    up to `block` tokens.

    The cache must hold them. Medians; the sizes are measured in turn, so that a slow moment does not bend the curve.
    """
    most = most_rows(block)
    plain = [Plan(r, r) for r in [*(r for r in ROWS if r < most), most]]  # verified drafts, as CUDA graphs hold them
    plans = [(p, p) for p in plain] + _drafting(block, drafter)
    heads = {(r, t): _head(forwards, r, t) for r in ROWS for t in (0.0, 1.0)}
    found = _medians(forwards.model, heads, repeats)
    head, sampled = ([(r, found[r, t]) for r in ROWS] for t in (0.0, 1.0))
    held = [forwards.cache.take(prefix + SPREAD + most) for _ in range(max(requests))]
    assert None not in held, "the cache is too small for the measurement"
    jobs = {
        (n, pair): _forward(forwards, pair, held[:n], prefix)
        for n in requests
        for pair in plans
        if max(plan.rows for plan in pair) <= 16 or n * max(plan.rows for plan in pair) <= MOST
    }
    found = _medians(forwards.model, jobs, repeats)
    for slots in held:
        forwards.cache.give_back(slots)
    step: dict[int, list[tuple[float, float]]] = {n: [] for n in requests}
    fused: dict[int, list[tuple[float, float]]] = {n: [] for n in requests}
    for (n, pair), seconds in found.items():
        each = [pair[i % 2] for i in range(n)]
        drafted = sum(plan.slots - 1 for plan in each if plan.outcomes)
        heads_too = _interpolate(head, sum(plan.choosing for plan in each))
        heads_too += _interpolate(head, drafted) if drafted else 0.0
        rows = sum(plan.rows for plan in each) / n
        (fused if drafted else step)[n].append((rows, max(seconds - heads_too, 0.0)))
    return Latency(_curves(step), _curves(fused), head, sampled, block)


def _drafting(block: int, drafter: Drafter) -> list[tuple[Plan, Plan]]:
    """What the requests of a forward do, every first and every second one: all verify and draft behind every outcome;
    some behind the last or behind none, while the others catch up. Layers that draft have no outcomes to choose."""
    pairs = []
    for b in [] if drafter.depths else draft_lengths(block):
        behind_all, behind_last, behind_none = (
            Plan(b, b, outcomes, b, drafter=drafter) for outcomes in (tuple(range(1, b + 1)), (b,), ())
        )
        catching_up = Plan(1, 1, (1,), b, drafter=drafter)
        pairs += [(behind_all, behind_all), (behind_last, catching_up), (catching_up, behind_none)]
    return pairs


def most_rows(block: int) -> int:
    """Of a request in a measured forward."""
    return min(block * (block + 1), ROWS[-1])


def _forward(forwards: Forwards, pair: tuple[Plan, Plan], held: Sequence[Slots], prefix: int):
    works = []
    for i, slots in enumerate(held):
        plan, length = pair[i % 2], prefix + 37 * (i + 1) % SPREAD
        works.append(Work(plan, [0] * plan.clean, slots, length, SamplingParams()))
    return lambda: forwards.run(works)


def _curves(measured: dict[int, list[tuple[float, float]]]) -> dict[int, list[tuple[float, float]]]:
    """In the order of rows; one point for each number of rows."""
    found = {}
    for n, points in measured.items():
        by_rows: dict[float, list[float]] = {}
        for rows, seconds in sorted(points):
            by_rows.setdefault(rows, []).append(seconds)
        found[n] = [(rows, statistics.mean(seconds)) for rows, seconds in by_rows.items()]
    return found


def _head(forwards: Forwards, rows: int, temperature: float):
    model = forwards.model
    sampling = forwards.sampling((SamplingParams(temperature=temperature),))
    order_1R = torch.arange(rows, device=forwards.device)[None]
    hidden_RD = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=forwards.device)
    if not model.is_last:
        return lambda: None
    return lambda: choose(model.logits(hidden_RD)[None], order_1R, sampling).cpu()


def _medians(model: DecodingModel, jobs: dict, repeats: int) -> dict:
    """Each many times in a row, as decoding does: behind one of another size, a small one finds the caches cold."""
    times: dict = {key: [] for key in jobs}
    count: dict = {}
    for _ in range(repeats):
        for key, job in jobs.items():
            job()  # a warm-up
            if key not in count:
                count[key] = max(1, min(BURST, round(BURST_SECONDS / _of_the_slowest(model, device.seconds(job)))))
            times[key] += [device.seconds(job) for _ in range(count[key])]
    return {key: statistics.median(found) for key, found in times.items()}


def _of_the_slowest(model: DecodingModel, seconds: float) -> float:
    """The same on every rank: all must run a forward as often."""
    seconds_1 = torch.tensor([max(seconds, 1e-9)], dtype=torch.float64, device=model.device)
    for group in (model.tensor, model.pipeline):
        if group.size() > 1:
            dist.all_reduce(seconds_1, dist.ReduceOp.MAX, group=group)
    return seconds_1.item()


def key(forwards: Forwards) -> str:
    """Model, machine, layout, and if steps are recorded: what a curve belongs to."""
    model, shape = forwards.model, forwards.model.config
    kind = f"CPU {device.cpu_name()}, {torch.get_num_threads()} threads"
    if forwards.device.type == "cuda":
        kind = torch.cuda.get_device_name() + (", CUDA graphs" if forwards.recorder else "")
    sizes = f"{shape.num_layers} layers of {shape.hidden_size}, {str(model.dtype).removeprefix('torch.')}"
    return f"{kind}, {sizes}, tensor {model.tensor.size()}, pipeline {model.pipeline.size()}"


def save(folder: Path, name: str, curves: Curves) -> Path:
    """Adds what was measured to the file of the run folder. Raises OSError."""
    path = folder / FILE
    new = path.with_suffix(f".{os.getpid()}")  # several may measure at once
    kept = {"format": FORMAT, "by_prefix": {str(prefix): asdict(curve) for prefix, curve in curves.by_prefix.items()}}
    new.write_text(json.dumps(_stored(path) | {name: kept}, indent=1) + "\n")
    new.replace(path)
    return path


def _stored(path: Path) -> dict:
    """What the file holds; nothing if it is not there or is damaged, for it can be measured again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def load(folder: Path, name: str) -> Curves | None:
    """None if nothing was measured there, or by another version."""
    found = _stored(folder / FILE).get(name, {})
    if found.get("format") != FORMAT:
        return None
    return Curves({int(prefix): _latency(curve) for prefix, curve in found["by_prefix"].items()})


def _latency(curve: dict) -> Latency:
    tables = {name: {int(n): points for n, points in curve[name].items()} for name in ("step", "fused")}
    return Latency(**{**curve, **tables})
