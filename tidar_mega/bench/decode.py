"""Decoding speed, each against plain AR decoding in the same engine, process and run: fused for several draft lengths,
and Hugging Face transformers on the same weights (`generate`, and assisted by prompt lookup).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tidar_mega.arguments import positive
from tidar_mega.bench.figure import save
from tidar_mega.bench.peer import open_peer
from tidar_mega.config import UserError
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.load import Loaded, load_engine
from tidar_mega.decode.requests import Generation, Request
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.evaluation.acceptance import held_out_prompts, held_out_text, summarise, tokens_per_forward
from tidar_mega.evaluation.likelihood import held_out_loss
from tidar_mega.plan.parameters import total_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=positive, default=16, help="held-out prompts")
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=64, help="longest continuation")
    parser.add_argument("--repeats", type=positive, default=3, help="of each way of decoding, in turn")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16], help="requests decoded at once")
    parser.add_argument("--blocks", type=positive, nargs="+", help="draft lengths; the trained one and powers of 2")
    parser.add_argument("--outcomes", nargs="+", default=["all"], help="all, last, none, auto or a list such as 1,4")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--oracle",
        type=float,
        metavar="SHARE",
        help="exchange drafted tokens for ones of which AR confirms this share: the speed of a well-trained drafter",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens per second against draft length")


def run(args: argparse.Namespace) -> dict:
    """Figures of `compare` on held-out text of the checkpoint's data, with the model's loss on it. Raises UserError."""
    room = f"decode.capacity={args.prompt_tokens + args.max_tokens}"  # every way has an engine, with pages of its own
    settings = [room, *args.overrides, f"decode.batch={max(args.batches)}", "decode.outcomes=all"]
    loaded = load_engine(args.checkpoint, settings)
    if args.oracle is not None:
        _require_coupled(loaded.params, args.temperatures)
    stream = held_out_text(loaded)
    prompts = held_out_prompts(stream, args.prompts, args.prompt_tokens)
    args.blocks = args.blocks or _blocks(loaded.engine)
    if "auto" in args.outcomes:  # measured once, as far as is needed
        loaded.latency(max(args.blocks))
    with tempfile.TemporaryDirectory() as folder:
        peer = None if args.no_peers else open_peer(loaded, Path(folder))
        figures = compare(loaded, prompts, args, peer)
    figures |= loaded.mesh.from_head(held_out_loss(loaded.engine, stream, loaded.tokenizer.token_bytes))
    parameters = total_parameters(loaded.config, loaded.tokenizer.vocab_size)
    figures |= {"parameters": parameters, "checkpoint": str(loaded.checkpoint)}
    if loaded.mesh.is_main:
        show(figures)
        if args.plot:
            plot(figures, args.plot)
    return figures


def _require_coupled(params: SamplingParams, temperatures: Sequence[float]) -> None:
    """Other rules read what the drafts were drawn from, which an oracle does not exchange. Raises UserError."""
    if {replace(params, temperature=temperature).rule for temperature in temperatures} != {"coupled"}:
        asked = f"decode.beta = {params.beta}" if params.beta < 1 else f"decode.acceptance = {params.acceptance}"
        raise UserError(
            f"--oracle: {asked} weighs drafted tokens by what the model proposed, and not the oracle; set "
            "decode.acceptance=coupled and decode.beta=1, or leave --oracle out"
        )


def _blocks(engine: Engine) -> list[int]:
    """The trained draft length and, beside it, powers of 2 as far as its drafter goes."""
    longest = 1 + engine.drafter.depths if engine.drafter.depths else 16
    return sorted({engine.block, *(block for block in (2, 4, 8, 16) if block <= longest)})


@dataclass
class Way:
    """One way of decoding: `decode(prompts, params)` gives generations; `block` is None for a peer."""

    name: str
    decode: Callable[[Sequence[Sequence[int]], list[SamplingParams]], list[Generation]]
    engine: Engine | None = None
    block: int | None = None
    outcomes: str | None = None


def compare(loaded: Loaded, prompts: Sequence[Sequence[int]], args: argparse.Namespace, peer) -> dict:
    """All ways of decoding the same prompts.

    settings             one row for each batch, temperature and way: tokens/s, medians of repeats in turn; what
                         `evaluation.acceptance.summarise` says; `rule`: what decided (`decode/rules.py`)
    tokens_per_forward, distinct_4gram, speedup_vs_ar   of the first row of the trained block: batch 1 and greedy by
                         default; with the suffix _sampled: at the last temperature
    identical_to_ar      share of outputs equal to AR's, over the rows whose rule is to give AR's own (greedy or
                         coupled); None without any
    engine_overhead      share of a fused step outside the model, batch 1
    ar_over_transformers tokens/s of our AR over transformers' `generate`, batch 1, greedy
    """
    rows = []
    for batch in args.batches:
        for temperature in args.temperatures:
            rows += _setting(loaded, prompts, args, peer, batch, temperature)
    fused = [row for row in rows if row["way"] == "fused"]
    trained = loaded.engine.block
    main = next((row for row in fused if row["block"] == trained), fused[0])
    sampled = [
        r for r in fused if (r["block"], r["batch"], r["outcomes"]) == (main["block"], main["batch"], main["outcomes"])
    ]
    figures = {}
    for key in ("tokens_per_forward", "distinct_4gram", "speedup_vs_ar"):
        figures |= {key: main[key], f"{key}_sampled": sampled[-1][key]}
    same = [row["identical_to_ar"] for row in fused if row["rule"] == "coupled"]
    figures["identical_to_ar"] = statistics.mean(same) if same else None
    figures["engine_overhead"] = _overhead(main, loaded, prompts, args)
    plain = [row for row in rows if row["way"] == "transformers" and row["batch"] == rows[0]["batch"]]
    figures["ar_over_transformers"] = 1 / plain[0]["speedup_vs_ar"] if plain else None
    names = ("prompts", "prompt_tokens", "max_tokens", "repeats", "oracle")
    setting = {name: getattr(args, name) for name in names} | {"block": main["block"]}
    return figures | {"setting": setting, "threads": torch.get_num_threads(), "settings": rows}


def _setting(loaded: Loaded, prompts, args: argparse.Namespace, peer, batch: int, temperature: float) -> list[dict]:
    """The rows of one batch size and temperature."""
    base = replace(loaded.params, max_tokens=args.max_tokens, temperature=temperature)
    params = [base.for_request(i) for i in range(len(prompts))]
    gc.collect()  # engines of the setting before: their pages are real memory on a GPU
    ways = [_ar(loaded, batch)]
    expected = ways[0].decode(prompts, params)
    for block in args.blocks:
        ways += [_fused(loaded, batch, block, outcomes, args.oracle, expected) for outcomes in args.outcomes]
    if peer is not None and temperature == 0:
        ways.append(Way("transformers", lambda p, s: peer.generate(p, s, batch)))
        if batch == 1:
            ways.append(Way("prompt lookup", lambda p, s: peer.generate(p, s, 1, prompt_lookup_num_tokens=10)))
    outputs, seconds = _in_turn(ways, prompts, params, args.repeats)
    ar = _row(ways[0], outputs["ar"], outputs["ar"], seconds["ar"], batch, temperature)
    rows = [ar]
    for way in ways[1:]:
        row = _row(way, outputs[_key(way)], outputs["ar"], seconds[_key(way)], batch, temperature)
        row |= {"rule": base.rule, "speedup_vs_ar": row["tokens_per_second"] / ar["tokens_per_second"]}
        rows.append(row)
    return rows


def _in_turn(ways: list[Way], prompts, params, repeats: int) -> tuple[dict, dict]:
    """Outputs and median seconds of each way; the order turns round at every repeat."""
    outputs, seconds = {}, {_key(way): [] for way in ways}
    for way in ways:  # warm-up; an automatic choice of outcomes learns the acceptance
        way.decode(prompts, params)
    for repeat in range(repeats):
        for way in ways if repeat % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            outputs[_key(way)] = way.decode(prompts, params)
            seconds[_key(way)].append(time.perf_counter() - started)
    return outputs, {key: statistics.median(times) for key, times in seconds.items()}


def _key(way: Way):
    return way.name if way.block is None else (way.name, way.block, way.outcomes)


def _row(
    way: Way, found: list[Generation], ar: list[Generation], seconds: float, batch: int, temperature: float
) -> dict:
    tokens = sum(len(g.tokens) for g in found)
    row = {"way": way.name, "batch": batch, "temperature": temperature, "block": way.block, "outcomes": way.outcomes}
    row |= {"tokens_per_second": tokens / seconds, "speedup_vs_ar": 1.0}
    if way.engine is None:
        same = [g.tokens == a.tokens for g, a in zip(found, ar, strict=True)]
        return row | {"identical_to_ar": statistics.mean(same)}
    # one request's share of a forward: with several at once they run side by side
    forwards = sum(g.forwards for g in found)
    row["forward_seconds"] = seconds / forwards
    if way.name == "ar":
        return row | {"tokens_per_forward": tokens_per_forward(found)}
    return row | summarise(way.block, found, ar)


def _ar(loaded: Loaded, batch: int) -> Way:
    engine = _engine(Engine, loaded, loaded.engine.model, batch, 1, "all")
    return Way("ar", lambda prompts, params: engine.generate(prompts, [p.without_masks for p in params], "ar"), engine)


def _fused(loaded: Loaded, batch: int, block: int, outcomes: str, oracle: float | None, expected) -> Way:
    kind = Engine if oracle is None else OracleEngine
    engine = _engine(kind, loaded, loaded.engine.model, batch, block, _outcomes(outcomes))
    if oracle is not None:
        engine.share, engine.expected = oracle, [g.tokens for g in expected]
    return Way("fused", lambda prompts, params: engine.generate(prompts, params), engine, block, outcomes)


def _engine(kind: type[Engine], loaded: Loaded, model, batch: int, block: int, outcomes) -> Engine:
    d, named = loaded.config.decode, "all" if outcomes == "auto" else outcomes
    engine = kind(
        model,
        loaded.tokenizer,
        block,
        d.capacity,
        batch,
        d.prefill_chunk,
        named,
        cache_tokens=d.cache_tokens,
        replicas=loaded.engine.replicas,
        cuda_graphs=d.cuda_graphs,
        drafter=loaded.engine.drafter,
    )
    if outcomes == "auto":
        engine.choose_outcomes(loaded.latency(block))
    return engine


def _outcomes(text: str) -> str | list[int]:
    if text[:1].isdigit():
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise UserError(f"--outcomes {text}: must be auto, all, last, none or numbers such as 1,4") from None
    return text


class OracleEngine(Engine):
    """Verifies drafts of which AR confirms a given share at each slot, instead of the model's own: everything is
    computed as ever, only the drafted tokens are exchanged for AR's known output, or for something else."""

    share: float
    expected: list[list[int]]

    def next_draft(self, request: Request, result) -> list[int]:
        draft, place = list(result.draft), len(request.result.tokens) + len(result.tokens)
        for slot in range(1, len(draft)):
            known = self.expected[request.number]
            right = known[place + slot - 1] if place + slot - 1 < len(known) else 0
            digest = hashlib.blake2b(f"{request.number}/{place + slot}".encode(), digest_size=8).digest()
            confirmed = int.from_bytes(digest, "little") < self.share * 2**64
            draft[slot] = right if confirmed else (right + 1) % self.specials.vocab_size
        return draft


def _overhead(row: dict, loaded: Loaded, prompts, args: argparse.Namespace) -> float:
    """Share of the time of a fused run, one request at a time, that is not spent in the model's forwards and heads. On
    a GPU, of one that is not recorded: a recording is one piece."""
    model = _Timed(loaded.engine.model)
    engine = _engine(Engine, loaded, model, 1, row["block"], "all")
    engine.forwards.recorder = None
    params = replace(loaded.params, max_tokens=args.max_tokens, temperature=0.0)
    shares = []
    for prompt in prompts[: max(3, args.repeats)]:
        model.seconds, started = 0.0, time.perf_counter()
        engine.generate([prompt], params)
        shares.append(1 - model.seconds / (time.perf_counter() - started))
    return statistics.median(shares)


class _Timed:
    """A model that counts the seconds spent in it."""

    def __init__(self, model) -> None:
        self.model, self.seconds = model, 0.0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, rows, context):
        return self._count(lambda: self.model(rows, context))

    def logits(self, hidden_ND):
        return self._count(lambda: self.model.logits(hidden_ND))

    def depth(self, *args):
        return self._count(lambda: self.model.depth(*args))

    def _count(self, action):
        self._wait()
        started = time.perf_counter()
        found = action()
        self._wait()
        self.seconds += time.perf_counter() - started
        return found

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def show(figures: dict) -> None:
    """The figures as a table."""
    columns = ("batch", "T", "way", "B", "outcomes", "tok/fwd", "= AR", "4-grams", "tok/s", "speed-up")
    table = Table(*columns, title="decoding, against plain AR in the same engine")
    for row in figures["settings"]:
        table.add_row(
            str(row["batch"]),
            f"{row['temperature']:g}",
            row["way"],
            str(row["block"] or ""),
            row["outcomes"] or "",
            *[_format(row, key, text) for key, text in _FORMATS.items()],
        )
    console = Console()
    console.print(table)
    if figures["setting"]["oracle"] is not None:
        console.print(f"drafts of an oracle: AR confirms {figures['setting']['oracle']:.0%} at each slot")
    console.print(f"engine outside the model: {figures['engine_overhead']:.1%} of a fused step")
    if figures["ar_over_transformers"]:
        console.print(f"our AR over transformers' generate: {figures['ar_over_transformers']:.2f}x")
    if "validation_nats_per_byte" in figures:
        console.print(f"held-out loss of the AR half: {figures['validation_nats_per_byte']:.3f} nats per byte")


_FORMATS = {
    "tokens_per_forward": "{:.2f}",
    "identical_to_ar": "{:.1%}",
    "distinct_4gram": "{:.2f}",
    "tokens_per_second": "{:.0f}",
    "speedup_vs_ar": "{:.2f}x",
}


def _format(row: dict, key: str, text: str) -> str:
    return text.format(row[key]) if row.get(key) is not None else ""


def plot(figures: dict, path: Path) -> None:
    """Tokens per second against draft length, one line for each batch size, temperature and choice of outcomes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in figures["settings"]:
        if row["way"] == "fused":
            lines.setdefault((row["batch"], row["temperature"], row["outcomes"]), []).append(
                (row["block"], row["speedup_vs_ar"])
            )
    for (batch, temperature, outcomes), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"batch {batch}, T {temperature:g}, {outcomes}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="draft length B", ylabel="tokens per second over AR", xscale="log")
    blocks = sorted({row["block"] for row in figures["settings"] if row["block"]})
    axes.set_xticks(blocks, [str(b) for b in blocks])
    axes.legend(fontsize=8)
    save(figure, path)
