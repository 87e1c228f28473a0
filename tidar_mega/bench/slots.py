"""The machine's latency curves: one forward of decoding against its number of rows, kept beside the checkpoints."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from tidar_mega.arguments import positive
from tidar_mega.decode import latency
from tidar_mega.decode.load import load_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefixes", type=positive, nargs="+", default=latency.PREFIXES, help="committed tokens of each request"
    )
    parser.add_argument("--repeats", type=positive, default=7, help="of each size, in turn")


def run(args: argparse.Namespace) -> dict:
    """Measures the curves for the engine that decode.* describes and stores them; their figures. Raises UserError."""
    loaded = load_engine(args.checkpoint, [*args.overrides, "decode.outcomes=all"])
    curves, path = loaded.measure_latency(loaded.engine.block, args.prefixes, args.repeats)
    figures = {
        "key": latency.key(loaded.engine.forwards),
        "file": str(path) if path else None,
        "by_prefix": {str(prefix): _figures(curve) for prefix, curve in curves.by_prefix.items()},
    }
    if loaded.mesh.is_main:
        console = Console()
        for prefix, found in figures["by_prefix"].items():
            show(console, f"{figures['key']}, behind {prefix} tokens", found)
        if path:
            console.print(f"stored in {path}; decode.outcomes=auto uses them")
    return figures


def _figures(curve: latency.Latency) -> dict:
    return {
        "step": {str(n): points for n, points in curve.step.items()},
        "fused": {str(n): points for n, points in curve.fused.items()},
        "head": curve.head,
        "sampled": curve.sampled,
        "slots": {str(n): free_slots(points) for n, points in curve.step.items()},
    }


def free_slots(points: list[tuple[float, float]]) -> dict[str, float]:
    """Rows per request that cost at most 1.2, 1.5 and 2 times one row."""
    one = points[0][1]
    return {f"{limit}x": max(r for r, seconds in points if seconds <= limit * one) for limit in (1.2, 1.5, 2.0)}


def show(console: Console, title: str, figures: dict) -> None:
    sizes = list(figures["step"])
    table = Table("rows of each request", *[f"{n} requests, ms" for n in sizes], title=title)
    rows = sorted({r for points in figures["step"].values() for r, _ in points})
    for r in rows:
        cells = [next((f"{1e3 * s:.2f}" for x, s in figures["step"][n] if x == r), "") for n in sizes]
        table.add_row(str(r), *cells)
    console.print(table)
    for n, slots in figures["slots"].items():
        told = ", ".join(f"{rows:g} for {limit}" for limit, rows in slots.items())
        console.print(f"{n} requests: rows for the price of one forward of one row: {told}")
