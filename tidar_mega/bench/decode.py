"""Fused decoding against plain AR decoding of the same checkpoint, in the same engine and process, in turn.

Shape suffixes: none; see decode/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from tidar_mega.data.stream import open_stream
from tidar_mega.decode.engine import Engine, Generation
from tidar_mega.decode.load import load_engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.evaluation.acceptance import held_out_prompts, summarise
from tidar_mega.evaluation.likelihood import held_out_loss

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64, help="longest continuation")
    parser.add_argument("--repeats", type=int, default=3, help="of each mode, in turn")
    parser.add_argument("--batch", type=int, default=1, help="requests decoded at once")


def run(args: argparse.Namespace) -> dict:
    """Figures of `compare` on held-out text of the checkpoint's data, with the model's loss on it. Raises UserError."""
    loaded = load_engine(args.checkpoint, args.overrides)
    data = loaded.config.data
    stream = open_stream(data.path, "validation", data.seq_length, loaded.config.train.seed)
    prompts = held_out_prompts(stream, args.prompts, args.prompt_tokens)
    loaded.engine.batch = args.batch
    params = SamplingParams(max_tokens=args.max_tokens, seed=loaded.config.decode.seed)
    figures = compare(loaded.engine, prompts, params, args.repeats)
    figures |= held_out_loss(loaded.engine, stream, loaded.tokenizer.token_bytes)
    figures |= {"parameters": loaded.parameters, "checkpoint": str(loaded.checkpoint)}
    show(figures)
    return figures


def compare(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, repeats: int) -> dict:
    """Both modes on the same prompts, greedy and at temperature 1: what `measure` says, and medians of times.

    tokens_per_forward, distinct_4gram, speedup_vs_ar   greedy; with the suffix _sampled: temperature 1
    identical_to_ar                                     share of outputs equal to AR's, over both
    settings                                            one row each: the above, tokens/s and acceptance histogram
    """
    settings = {}
    for name, temperature in TEMPERATURES.items():
        own = [
            SamplingParams(params.max_tokens, temperature, seed=params.seed).for_request(i) for i in range(len(prompts))
        ]
        settings[name] = {"temperature": temperature} | _compare_setting(engine, prompts, own, repeats)
    figures = {}
    for key in ("tokens_per_forward", "distinct_4gram", "speedup_vs_ar"):
        figures |= {key: settings["greedy"][key], f"{key}_sampled": settings["sampled"][key]}
    identical = statistics.mean(s["identical_to_ar"] for s in settings.values())
    setting = {"block": engine.block, "batch": engine.batch, "prompts": len(prompts), "repeats": repeats}
    extra = {"identical_to_ar": identical, "setting": setting, "threads": torch.get_num_threads()}
    return figures | extra | {"settings": settings}


def _compare_setting(engine: Engine, prompts, params: list[SamplingParams], repeats: int) -> dict:
    outputs: dict[str, list[Generation]] = {}
    seconds: dict[str, list[float]] = {"fused": [], "ar": []}
    for mode in seconds:  # warm-up
        engine.generate(prompts[:1], params[:1], mode)
    for repeat in range(repeats):
        for mode in ("fused", "ar") if repeat % 2 == 0 else ("ar", "fused"):
            started = time.perf_counter()
            outputs[mode] = engine.generate(prompts, params, mode)
            seconds[mode].append(time.perf_counter() - started)
    median = {mode: statistics.median(times) for mode, times in seconds.items()}
    tokens = {mode: sum(len(g.tokens) for g in outputs[mode]) for mode in seconds}
    speed = {mode: tokens[mode] / median[mode] for mode in seconds}
    found = summarise(engine.block, outputs["fused"], outputs["ar"])
    # per token, so that a flipped near-tie in bf16, which changes lengths, does not pass for speed
    return found | {"speedup_vs_ar": speed["fused"] / speed["ar"], "tokens_per_second": speed, "seconds": median}


def show(figures: dict) -> None:
    """The figures as a table."""
    columns = ("T", "tok/fwd", "= AR", "4-grams", "tok/s", "AR tok/s", "speed-up", "accepted 1..B")
    table = Table(*columns, title=f"fused against AR decoding, B = {figures['setting']['block']}")
    for row in figures["settings"].values():
        speed = row["tokens_per_second"]
        table.add_row(
            f"{row['temperature']:g}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['identical_to_ar']:.1%}",
            f"{row['distinct_4gram']:.2f}",
            f"{speed['fused']:.0f}",
            f"{speed['ar']:.0f}",
            f"{row['speedup_vs_ar']:.2f}x",
            " ".join(map(str, row["acceptance_histogram"])),
        )
    console = Console()
    console.print(table)
    if "validation_nats_per_byte" in figures:
        console.print(f"held-out loss of the AR half: {figures['validation_nats_per_byte']:.3f} nats per byte")
