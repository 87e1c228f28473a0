"""Every method on the same text: trained from the same start, with as many rows through the backbone in each step, and
decoded behind the same held-out prompts.

Each is an ordinary run, made by the commands that a user would type, in a folder of `--runs`; one that is finished is
not trained again, so that an interrupted comparison goes on. What a method is here stands in METHODS; all else is in
one config file. Through every layer go 2S rows of a sequence of S tokens where it has masks beside it, else S: methods
without take two sequences for one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tidar_mega import config as config_module
from tidar_mega import methods
from tidar_mega.arguments import positive
from tidar_mega.bench.figure import save
from tidar_mega.config import Config, UserError
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.plan import training_flops
from tidar_mega.plan.work import sequence_work, through_layers

# alpha so that AR keeps half of the loss: what is added to the drafts' half alone would be paid for by AR's
_POSITION = ("train.alpha=3", "train.position_weight=0.5")
_FOCAL, _CHAIN = "train.focal_weight=0.1", "train.chain_weight=0.1"
METHODS: dict[str, tuple[str, ...]] = {
    "ar": ("method=ar",),
    "mtp": ("method=mtp",),
    "block_diffusion": ("method=block_diffusion",),
    "tidar": ("method=tidar",),
    "tidar_position": ("method=tidar", *_POSITION),
    "tidar_left_to_right": ("method=tidar", *_POSITION, _FOCAL, _CHAIN),
    "idlm": ("method=idlm",),
    "masked_diffusion": ("method=masked_diffusion",),
    "ssmd": ("method=ssmd",),
}
# of both samplers, fewer than `tidar bench diffusion` tries: the whole comparison is to end within an hour on two cores
_CURVES = ("--windows", "2:0.005", "3:0.01", "4:0.02", "8:0.04", "10:0.083", "--forwards", "8", "16", "32", "64", "128")
_JUDGE, _STANDARD, _SPECULATIVE = "ar", "masked_diffusion", "ssmd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="model, data and training that all methods share")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of weights and of the order of the text")
    parser.add_argument("--prompts", type=positive, default=16, help="held-out prompts")
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=64, help="longest continuation")
    parser.add_argument("--samples", type=positive, default=16, help="of masked diffusion, for each setting")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens per forward against the loss")


def run(args: argparse.Namespace) -> dict:
    """`runs`: a row for each method and seed; `methods`: their means over the seeds. Raises ConfigError, UserError."""
    shared = config_module.load(args.config, args.overrides)
    configs = {(name, seed): _config(shared, name, seed, args.runs) for seed in args.seeds for name in args.methods}
    rows = []
    for (name, seed), config in configs.items():
        _train(config)
        if config.traits.is_left_to_right:
            figures = _decoded(config, args)
        else:
            figures = _sampled(config, configs.get((_JUDGE, seed)), configs.get((_STANDARD, seed)), args)
        rows.append({"method": name, "seed": seed, **_trained(config), **figures})
    names = ("prompts", "prompt_tokens", "max_tokens", "samples", "seeds")
    figures = {"methods": means(rows), "runs": rows, "setting": {name: getattr(args, name) for name in names}}
    _show(figures["methods"])
    if args.plot:
        plot(rows, args.plot)
    return figures


def _config(shared: Config, name: str, seed: int, runs: Path) -> Config:
    """With drafts of masks as long, and as many rows through the layers of a step, as TiDAR by the shared config."""
    own = [*METHODS[name], f"train.seed={seed}", f"run_dir={runs / name}_{seed}"]
    if "method=mtp" in own:  # with as many depths as layers, S rows go through either, as TiDAR's 2S through the layers
        own.append(f"model.mtp_num_layers={shared.model.num_layers}")
    config = config_module.override(shared, own)
    if config.traits.drafts_blocks:
        masks = shared.train.block - (draft_length(config) - config.train.block)
        config = config_module.override(config, [f"train.block={masks}"])
    rows = shared.train.global_batch_size * _layer_rows(config_module.override(shared, ["method=tidar"]))
    return config_module.override(config, [f"train.global_batch_size={round(rows / _layer_rows(config))}"])


def draft_length(config: Config) -> int:
    """Tokens of a draft of the block that a method was trained with: masks may predict places behind their own."""
    drafter = methods.load(config, mask_id=0).drafter
    return drafter.length(config.train.block) if drafter else config.train.block


def _layer_rows(config: Config) -> float:
    """Of one sequence, added up over the layers."""
    work = sequence_work(config)
    return through_layers(config, work.rows, work.pairs)[0]


def _train(config: Config) -> None:
    folder = Path(config.run_dir)
    _refuse_other(folder, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(config_module.to_yaml(config))
    _tidar("pretrain", str(path))


def _refuse_other(folder: Path, config: Config) -> None:
    """A run that an earlier comparison has left is only gone on with if it is the same."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    was = config_module.load(path)
    for name in ("method", "model", "data", "train", "optimizer", "precision"):
        if getattr(was, name) != getattr(config, name):
            raise UserError(
                f"--runs: {folder} holds a run of other settings ({name}); delete it, or name another folder"
            )


def _tidar(*arguments: str) -> None:
    print(f"$ tidar {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "tidar_mega.cli", *arguments])
    if done.returncode:
        raise UserError(f"tidar {arguments[0]} ended with code {done.returncode}; what it said stands above")


def _trained(config: Config) -> dict:
    """The last validation, and what a token of text has cost."""
    lines = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["kind"] == "validation"][-1]
    vocab = config.padded_vocab_size(Tokenizer.load(Path(config.data.folders[0]) / "tokenizer").vocab_size)
    work = sequence_work(config)
    flops = training_flops(config, vocab, work.rows, work.pairs, work.head_rows)
    return {
        "validation_loss_ar": last.get("loss_ar"),
        "validation_loss": last["loss"],
        "training_flops_per_token": flops / config.data.seq_length,
        "tokens": config.train.steps * config.train.global_batch_size * config.data.seq_length,
    }


def _decoded(config: Config, args: argparse.Namespace) -> dict:
    """Tokens per forward with drafts behind every outcome, and the speed that the engine's own choice reaches."""
    path = Path(config.run_dir) / "decode.json"
    text = (
        "--prompts",
        str(args.prompts),
        "--prompt-tokens",
        str(args.prompt_tokens),
        "--max-tokens",
        str(args.max_tokens),
    )
    outcomes = ("all",) if config.traits.has_depths else ("all", "auto")  # layers draft behind the actual outcome alone
    drafts = ("--blocks", str(draft_length(config)), "--outcomes", *outcomes, "--temperatures", "0", "1")
    _tidar("bench", "decode", config.run_dir, *text, *drafts, "--batches", "1", "--no-peers", "--json", str(path))
    found = json.loads(path.read_text())
    auto = {r["temperature"]: r["speedup_vs_ar"] for r in found["settings"] if r.get("outcomes") == outcomes[-1]}
    names = ("tokens_per_forward", "tokens_per_forward_sampled", "distinct_4gram_sampled", "identical_to_ar")
    return {**{name: found[name] for name in names}, "speedup_vs_ar": auto[0.0], "speedup_vs_ar_sampled": auto[1.0]}


def _sampled(config: Config, judge: Config | None, standard: Config | None, args: argparse.Namespace) -> dict:
    """Of self-speculation: its forwards over those of the standard sampler at equal judged likelihood."""
    if config.method != _SPECULATIVE or judge is None:
        return {}
    path = Path(config.run_dir) / "diffusion.json"
    baseline = ("--baseline", standard.run_dir) if standard is not None else ()
    judged = ("--judge", judge.run_dir, *baseline, "--samples", str(args.samples))
    _tidar("bench", "diffusion", config.run_dir, *judged, *_CURVES, "--json", str(path))
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name.startswith("forwards_ratio")}


def means(rows: Sequence[dict]) -> dict[str, dict]:
    """method -> mean of each figure over the seeds, and under `spread` half of its range."""
    found = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        # a ratio of two curves may not exist for some seed
        keys = [k for k in mine[0] if k not in ("method", "seed") and all(row[k] is not None for row in mine)]
        values = {key: [row[key] for row in mine] for key in keys}
        spread = {key: (max(v) - min(v)) / 2 for key, v in values.items()}
        found[name] = {key: statistics.mean(v) for key, v in values.items()} | {"spread": spread}
    return found


_COLUMNS = {
    "validation_loss_ar": ("AR loss", "{:.4f}"),
    "tokens_per_forward": ("tokens/forward, T 0", "{:.3f}"),
    "tokens_per_forward_sampled": ("T 1", "{:.3f}"),
    "speedup_vs_ar": ("over AR, T 0", "{:.2f}x"),
    "speedup_vs_ar_sampled": ("T 1", "{:.2f}x"),
    "training_flops_per_token": ("training FLOPs/token", "{:.3g}"),
    "forwards_ratio_at_equal_nll": ("forwards at equal likelihood", "{:.2f}"),
}


def _show(by_method: dict[str, dict]) -> None:
    table = Table("method", *[title for title, _ in _COLUMNS.values()])
    for name, figures in by_method.items():
        table.add_row(name, *[form.format(figures[k]) if k in figures else "" for k, (_, form) in _COLUMNS.items()])
    Console().print(table)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Tokens per forward of each run, greedy and sampled, against the loss of its AR half."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, key in zip(both, ("tokens_per_forward", "tokens_per_forward_sampled"), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows if key in row):
            points = [(row["validation_loss_ar"], row[key]) for row in rows if row["method"] == name]
            axes.plot(*zip(*points, strict=True), "o", label=name)
        axes.set(xlabel="AR loss, nats per token", ylabel=key.replace("_", " "))
    both[0].legend(fontsize=7)
    save(figure, path)
