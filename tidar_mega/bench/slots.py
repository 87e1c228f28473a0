"""The machine's latency curve: one forward of decoding against its number of rows, kept beside the checkpoints."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from tidar_mega.decode import latency
from tidar_mega.decode.load import load_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", type=int, default=512, help="committed tokens of each request")
    parser.add_argument("--repeats", type=int, default=7, help="of each size, in turn")


def run(args: argparse.Namespace) -> dict:
    """Measures the curve for the engine that decode.* describes and stores it; its figures. Raises UserError."""
    loaded = load_engine(args.checkpoint, [*args.overrides, "decode.outcomes=all"])
    curve, path = loaded.measure_latency(args.prefix, args.repeats)
    figures = {
        "key": latency.key(loaded.engine.forwards),
        "file": str(path),
        "prefix": args.prefix,
        "step": {str(n): points for n, points in curve.step.items()},
        "head": curve.head,
        "sampled": curve.sampled,
        "slots": {str(n): free_slots(points) for n, points in curve.step.items()},
    }
    if loaded.mesh.is_main:
        show(figures)
    return figures


def free_slots(points: list[tuple[float, float]]) -> dict[str, float]:
    """Rows per request that cost at most 1.2, 1.5 and 2 times one row."""
    one = points[0][1]
    return {f"{limit}x": max(r for r, seconds in points if seconds <= limit * one) for limit in (1.2, 1.5, 2.0)}


def show(figures: dict) -> None:
    sizes = list(figures["step"])
    table = Table("rows of each request", *[f"{n} requests, ms" for n in sizes], title=figures["key"])
    rows = sorted({r for points in figures["step"].values() for r, _ in points})
    for r in rows:
        cells = [next((f"{1e3 * s:.2f}" for x, s in figures["step"][n] if x == r), "") for n in sizes]
        table.add_row(str(r), *cells)
    console = Console()
    console.print(table)
    for n, slots in figures["slots"].items():
        told = ", ".join(f"{rows:g} for {limit}" for limit, rows in slots.items())
        console.print(f"{n} requests: rows for the price of one forward of one row: {told}")
    console.print(f"stored in {figures['file']}; decode.outcomes=auto uses it")
