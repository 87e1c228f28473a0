"""Self-speculative against standard masked diffusion: the quality of samples against the forwards that they took.

Both samplers draw whole sequences (`decode/diffusion.py`); an autoregressive model of the same text, and its words,
judge them (`evaluation/samples.py`). At equal judged likelihood, the figure is the ratio of forwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tidar_mega.arguments import positive
from tidar_mega.bench.figure import save
from tidar_mega.config import ConfigError, UserError
from tidar_mega.data.mixture import open_data
from tidar_mega.data.stream import Samples
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode import load
from tidar_mega.decode.diffusion import PAPER_WINDOWS, Backbone, Loaded, Window, load_denoiser, sample
from tidar_mega.evaluation import samples as quality
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh

STANDARD, SPECULATIVE, TEXT = "masked_diffusion", "self_speculative", "held_out_text"
_STANDARD_FORWARDS = (8, 12, 16, 24, 32, 48, 64, 96, 128)
_LEVELS = 21  # at which two curves are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--judge", type=Path, required=True, metavar="RUN", help="a run of method ar on the same data.path")
    add(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="a run of method masked_diffusion; else the drafts of the first run",
    )
    add("--samples", type=positive, default=64, help="sequences of each setting (default 64)")
    add("--batch", type=positive, default=64, help="sequences drawn together (default 64)")
    add("--windows", type=_window, nargs="+", metavar="VERIFY:WIDTH", help="of self-speculation (default: the paper's)")
    add("--forwards", type=positive, nargs="+", metavar="N", help="of the standard sampler, 1 / width of its windows")
    add("--plot", type=Path, metavar="FILE", help="draw both curves")


def _window(word: str) -> Window:
    try:
        verify, width = word.split(":")
        window = Window(int(verify), float(width))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word}: write it as 4:0.02 (verifications, width of the window)") from None
    if window.verify < 1 or not 0 < window.width <= 1:
        raise argparse.ArgumentTypeError(f"{word}: at least 1 verification, and a width above 0 and at most 1")
    return window


def run(args: argparse.Namespace) -> dict:
    """A row for each sampler and setting, the held-out text itself, and the derived ratios. Raises UserError."""
    speculative = load_denoiser(args.checkpoint, args.overrides)
    if speculative.config.method != "ssmd":
        raise ConfigError(f"method = {speculative.config.method}: {args.checkpoint} must be a run of method = ssmd")
    standard = load_denoiser(args.baseline, args.overrides) if args.baseline else speculative
    judge = Judge(args.judge, speculative)
    lengths = [loaded.config.data.seq_length for loaded in (standard, speculative)]
    if lengths[0] != lengths[1]:
        raise ConfigError(
            f"data.seq_length: {lengths[0]} in {args.baseline} and {lengths[1]} in {args.checkpoint}; both must have "
            "the same"
        )
    if standard.tokenizer.fingerprint != speculative.tokenizer.fingerprint:
        raise UserError(
            f"--baseline {args.baseline}: its tokenizer is not that of {args.checkpoint}; train both on one data.path"
        )
    windows, forwards = args.windows or PAPER_WINDOWS, args.forwards or _STANDARD_FORWARDS
    work = [(STANDARD, standard.denoiser, Window(0, 1 / n)) for n in forwards]
    work += [(SPECULATIVE, speculative.denoiser, window) for window in windows]
    rows = [{"sampler": TEXT, "setting": "", "forwards": None, **judge(judge.held_out(args.samples))}]
    for name, denoiser, window in work:
        rows.append(_row(name, denoiser, window, judge, args))
        print(_line(rows[-1]), flush=True)
    figures = {"rows": rows, **ratios(rows), "setting": _setting(args, speculative)}
    _show(figures)
    if args.plot:
        plot(figures, args.plot)
    return figures


class Judge:
    """A left-to-right model of the same text as `of`, and the words of that text."""

    def __init__(self, path: Path, of: Loaded) -> None:
        checkpoint, config = load.saved(path)
        if not config.traits.is_left_to_right:
            raise ConfigError(f"--judge {path}: method = {config.method} must be one with a causal half, such as ar")
        self.tokenizer = Tokenizer.load(checkpoint / "tokenizer")
        if self.tokenizer.fingerprint != of.tokenizer.fingerprint:
            raise UserError(
                f"--judge {path}: its tokenizer is not that of {of.checkpoint}; train both on one data.path"
            )
        config = load.decoding_config(config)
        self.model = InferenceModel(load.load_model(checkpoint, config, build_mesh(config)))
        self.length, self._data = of.config.data.seq_length, of.config.data
        self.known = quality.vocabulary(self._stream("train", self._long_window()))

    def __call__(self, token_BS: torch.Tensor) -> dict[str, float]:
        return quality.measure(self.model, self.tokenizer, self.known, token_BS)

    def held_out(self, count: int) -> torch.Tensor:
        """`count` whole windows of the validation text, spread evenly, int64 [count, S]."""
        parts = self._stream("validation", self.length).parts(count)
        at = [(part, i * (part.samples_per_epoch - 1) // n) for _, part, n in parts for i in range(n)]
        return torch.cat([part.rows(i).token for part, i in at])

    def _long_window(self) -> int:
        """Of the training text, to cut few words: as long as its folders allow, with little left over at their end."""
        parts = self._stream("train", self.length).parts(1)
        shortest = self.length * min(part.samples_per_epoch for _, part, _ in parts)
        return shortest // -(-shortest // quality.WINDOW)

    def _stream(self, split: str, length: int) -> Samples:
        return open_data(self._data, split, seed=0, seq_length=length)


def _row(name: str, denoiser: Backbone, window: Window, judge: Judge, args: argparse.Namespace) -> dict:
    parts = [range(i, min(i + args.batch, args.samples)) for i in range(0, args.samples, args.batch)]
    drawn = [sample(denoiser, window, part, seed=0) for part in parts]
    forwards = float(torch.cat([s.forwards for s in drawn]).mean())
    setting = f"{window.verify}:{window.width:g}" if window.verify else f"{window.width:.4f}"
    return {"sampler": name, "setting": setting, "forwards": forwards, **judge(torch.cat([s.token for s in drawn]))}


def ratios(rows: Sequence[dict]) -> dict[str, float | None]:
    """Forwards of self-speculation over those of the standard sampler at equal judged likelihood, and spelling."""
    return {
        "forwards_ratio_at_equal_nll": forwards_ratio(rows, lambda row: row["judge_nll"]),
        "forwards_ratio_at_equal_spelling": forwards_ratio(rows, lambda row: -row["spelling_accuracy"]),
    }


def forwards_ratio(rows: Sequence[dict], cost) -> float | None:
    """Geometric mean of the ratio over levels of `cost` (lower is better) that both curves reach, spread evenly between
    the best and the worst such level; None where the curves share no level."""
    curves = [_curve(rows, name, cost) for name in (SPECULATIVE, STANDARD)]
    low, high = max(c[0].min() for c in curves), min(c[0].max() for c in curves)
    if low >= high:
        return None
    levels = np.linspace(low, high, _LEVELS)
    ours, theirs = (np.interp(levels, cost_N, log_forwards_N) for cost_N, log_forwards_N in curves)
    return float(np.exp((ours - theirs).mean()))


def _curve(rows: Sequence[dict], name: str, cost) -> tuple[np.ndarray, np.ndarray]:
    """The best cost that is had with so many forwards, rising, and the logarithm of the forwards."""
    points = sorted((row["forwards"], cost(row)) for row in rows if row["sampler"] == name)
    forwards, costs = zip(*points, strict=True)
    best = list(accumulate(costs, min))
    kept = [i for i in range(len(best)) if i == 0 or best[i] < best[i - 1]][::-1]
    return np.array([best[i] for i in kept]), np.log([forwards[i] for i in kept])


def _setting(args: argparse.Namespace, loaded: Loaded) -> dict:
    return {
        "run": str(args.checkpoint),
        "baseline": str(args.baseline) if args.baseline else None,
        "judge": str(args.judge),
        "samples": args.samples,
        "seq_length": loaded.config.data.seq_length,
        "causal_share": loaded.denoiser.causal_share,
    }


def _line(row: dict) -> str:
    return (
        f"{row['sampler']} {row['setting']}: forwards {row['forwards']:.1f}, nll {row['judge_nll']:.3f} "
        f"± {row['judge_nll_error']:.3f}, entropy {row['entropy']:.3f}, spelling {row['spelling_accuracy']:.3f}"
    )


def _show(figures: dict) -> None:
    table = Table("sampler", "window", "forwards", "judge nats/token", "entropy", "spelling")
    for row in figures["rows"]:
        forwards = "" if row["forwards"] is None else f"{row['forwards']:.1f}"
        cells = (f"{row['judge_nll']:.3f} ± {row['judge_nll_error']:.3f}", f"{row['entropy']:.3f}")
        table.add_row(row["sampler"], row["setting"], forwards, *cells, f"{row['spelling_accuracy']:.1%}")
    console = Console()
    console.print(table)
    for what in ("nll", "spelling"):
        ratio = figures[f"forwards_ratio_at_equal_{what}"]
        told = "no level is reached by both samplers" if ratio is None else f"{ratio:.2f}"
        console.print(f"forwards of self-speculation over standard at equal {what}: {told}")


def plot(figures: dict, path: Path) -> None:
    """Judged likelihood and spelling against forwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, key, label in zip(
        both, ("judge_nll", "spelling_accuracy"), ("judge, nats per token", "spelling"), strict=True
    ):
        for name in (STANDARD, SPECULATIVE):
            points = [(row["forwards"], row[key]) for row in figures["rows"] if row["sampler"] == name]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.axhline(figures["rows"][0][key], color="gray", linestyle=":", label=TEXT)
        axes.set(xscale="log", xlabel="forwards", ylabel=label)
        axes.legend()
    save(figure, path)
