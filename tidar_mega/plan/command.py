"""`tidar plan`: its options, and the figures that it returns."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from tidar_mega import config as config_module
from tidar_mega.arguments import above_zero
from tidar_mega.config import Config, UserError
from tidar_mega.plan import hardware as hardware_module
from tidar_mega.plan import parameters, report
from tidar_mega.plan.hardware import Hardware
from tidar_mega.plan.imbalance import packed, whole_sequence
from tidar_mega.plan.layout import Layout, make_layout
from tidar_mega.plan.memory import GIB, fullest_stage
from tidar_mega.plan.search import RECOMPUTE, Candidate, Found, overrides, search
from tidar_mega.plan.timing import Timing, bubble_fraction, predict
from tidar_mega.plan.work import hardware_flops, model_flops, sequence_work

DEFAULT_VOCAB = 151936  # of Qwen2.5 and Qwen3 below 14B, whose shapes the configs have
SHOWN = 10  # layouts of a search
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/tidar_8b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as parallel.tensor=4")
    parser.add_argument("--gpus", type=int, help="all GPUs of the run; by default what parallel.data says, or a node")
    parser.add_argument("--hardware", default="h100", help=f"{', '.join(hardware_module.KNOWN)}; h100 by default")
    parser.add_argument("--vocab-size", type=int, help="by default that of data.path's tokenizer, or Qwen's")
    parser.add_argument("--tokens", help="to be trained on, such as 50B or 1T; by default those of train.steps")
    parser.add_argument("--document-tokens", type=above_zero, default=1000, help="mean length of packed documents")
    parser.add_argument("--search", action="store_true", help="find the layouts of --gpus that fit, the fastest first")
    figures = parser.add_argument_group("figures of the hardware, instead of those of --hardware")
    for name, meaning in hardware_module.figures().items():
        figures.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", help=meaning)


def run(args: argparse.Namespace) -> dict:
    """Prints the plan and returns its figures; `fits` says whether it can run. Raises UserError."""
    config = config_module.load(args.config, args.overrides)
    changes = {name: getattr(args, name) for name in hardware_module.figures() if getattr(args, name) is not None}
    hardware = hardware_module.choose(args.hardware, changes, config)
    vocab_size, source = choose_vocab_size(args.vocab_size, config)
    gpus = choose_gpus(args.gpus, config, hardware)
    show = report.Report(hardware, f"vocabulary {vocab_size:,} ({source})")
    if args.search:
        found = search(config, vocab_size, gpus, hardware)
        show.search(found, gpus, command_line(args, found, gpus), SHOWN)
        return search_figures(found, gpus, hardware)
    layout = make_layout(config, vocab_size, gpus)
    figures = plan_figures(layout, hardware, parse_tokens(args.tokens, layout), args.document_tokens)
    show.plan(layout, figures)
    return figures


def command_line(args: argparse.Namespace, found: Found, gpus: int) -> str:
    """What shows the best layout in full."""
    settings = overrides(found.best[0].layout) if found.best else []
    decided = {setting.split("=")[0] for setting in settings}
    kept = [setting for setting in args.overrides if setting.split("=")[0] not in decided]
    options = {name: getattr(args, name) for name in ("vocab_size", "tokens", *hardware_module.figures())}
    asked = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    asked.append(f"--gpus {gpus} --hardware {args.hardware} --document-tokens {args.document_tokens:g}")
    return " ".join(["tidar plan", str(args.config), *asked, *kept, *settings])


def choose_vocab_size(given: int | None, config: Config) -> tuple[int, str]:
    """(ids, where the number comes from). Raises UserError."""
    if given is not None:
        if given < 1:
            raise UserError(f"--vocab-size {given}: must be above 0")
        return given, "--vocab-size"
    folder = config.data.folders[0]
    path = Path(folder) / "tokenizer" / "tidar_tokenizer.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())["vocab_size"], f"the tokenizer of data.path = {folder}"
        except (OSError, ValueError, KeyError):
            raise UserError(f"{path}: damaged; run `tidar prepare` again, or give --vocab-size") from None
    return DEFAULT_VOCAB, f"Qwen's, as {folder} is not prepared; set --vocab-size for another"


def choose_gpus(given: int | None, config: Config, hardware: Hardware) -> int:
    """All GPUs of the run; without --gpus and parallel.data, a node or the replicas that fill most of it."""
    if given is not None:
        if given < 1:
            raise UserError(f"--gpus {given}: must be above 0")
        return given
    size = config.parallel.model_size
    return size * (config.parallel.data or max(1, int(hardware.gpus_per_node) // size))


def parse_tokens(text: str | None, layout: Layout) -> float:
    """'50B' -> 5e10. Raises UserError."""
    if text is None:
        return float(layout.config.train.steps * layout.step_tokens)
    number, factor = (text[:-1], _SUFFIXES[text[-1].upper()]) if text[-1:].upper() in _SUFFIXES else (text, 1.0)
    try:
        tokens = float(number) * factor
    except ValueError:
        tokens = 0.0
    if not 0 < tokens < float("inf"):
        raise UserError(f"--tokens {text}: must be a number above 0, such as 50B, 1.5T or 2e12")
    return tokens


def plan_figures(layout: Layout, hardware: Hardware, tokens: float, document_tokens: float) -> dict:
    """Everything that `tidar plan` says of one layout, as plain numbers."""
    timing = predict(layout, hardware, whole_sequence(layout.config))
    _, memory = fullest_stage(layout)
    return {
        "gpus": layout.gpus,
        "layout": {**asdict(layout.config.parallel), "data": layout.data, "micro_batches": layout.micro_batches},
        "fits": memory.total <= hardware.usable_bytes,
        "vocab_size": layout.vocab,
        "parameters": parameter_figures(layout),
        "memory_gib": {"usable": hardware.usable_bytes / GIB, **memory_figures(layout)},
        "work": work_figures(layout),
        "time": time_figures(timing, tokens),
        "communication": [transfer_figures(t) for t in timing.transfers],
        "context_imbalance": imbalance_figures(layout, document_tokens),
        "hardware": asdict(hardware),
    }


def parameter_figures(layout: Layout) -> dict:
    config, p = layout.config, layout.config.parallel
    total = parameters.total_parameters(config, layout.vocab)
    tables = (1 if config.model.tie_embeddings else 2) * parameters.head_parameters(config, layout.vocab)
    layer = parameters.layer_parameters(config) + parameters.norm_parameters(config)
    return {
        "total": total,
        "embedding_and_head": tables,
        "without_embedding_and_head": total - tables,
        "layer": layer + parameters.bias_parameters(config),
        "rank_of_first_stage": layout.parameters(0),
        "rank_of_last_stage": layout.parameters(p.pipeline - 1),
    }


def memory_figures(layout: Layout) -> dict:
    """GiB of a rank of the fullest pipeline stage, for each kind of recomputation."""
    found = {}
    for kind in RECOMPUTE:
        parallel = replace(layout.config.parallel, recompute=kind)
        stage, memory = fullest_stage(replace(layout, config=replace(layout.config, parallel=parallel)))
        figures = {**asdict(memory), "total": memory.total}
        found[kind] = {"stage": stage, **{name: value / GIB for name, value in figures.items()}}
    return found


def work_figures(layout: Layout) -> dict:
    config, work = layout.config, sequence_work(layout.config)
    return {
        "tokens": layout.step_tokens,
        "clean_rows": config.data.seq_length,
        "mask_rows": config.drafted_rows,
        "visible_pairs": work.pairs,
        "computed_pairs": work.tile_pairs,
        "model_flops": model_flops(config, layout.vocab),
        "hardware_flops": hardware_flops(config, layout.vocab),
    }


def time_figures(timing: Timing, tokens: float) -> dict:
    return {
        "step_seconds": timing.step,
        **{f"{name}_seconds": value for name, value in timing.parts.items()},
        "bubble_fraction": bubble_fraction(timing.layout),
        "tokens_per_second": timing.tokens_per_second,
        "model_flop_utilisation": timing.utilisation,
        "hardware_flop_utilisation": timing.hardware_utilisation,
        "tokens": tokens,
        "days": tokens / timing.tokens_per_second / 86400,
    }


def transfer_figures(transfer) -> dict:
    return {
        "kind": transfer.kind,
        "what": transfer.what,
        "gib": transfer.bytes / GIB,
        "crosses_nodes": transfer.link.crosses_nodes,
        "gb_per_second": transfer.link.bytes_per_second / 1e9,
        "seconds": transfer.seconds,
        "exposed_seconds": transfer.exposed,
    }


def imbalance_figures(layout: Layout, document_tokens: float) -> dict | None:
    if layout.config.parallel.context == 1:
        return None
    drawn = packed(layout.config, document_tokens)
    return {
        "one_document": whole_sequence(layout.config),
        "document_tokens": document_tokens,
        "packed_mean": drawn.mean,
        "packed_worst": drawn.worst,
        "packed_pairs": drawn.pairs,
    }


def search_figures(found: Found, gpus: int, hardware: Hardware) -> dict:
    return {
        "gpus": gpus,
        "fits": bool(found.best),
        "layouts_that_fit": len(found.best),
        "refused": dict(found.refused),
        "best": [candidate_figures(c) for c in found.best[:SHOWN]],
        "hardware": asdict(hardware),
    }


def candidate_figures(candidate: Candidate) -> dict:
    layout, timing = candidate.layout, candidate.timing
    return {
        "overrides": overrides(layout),
        "data": layout.data,
        "memory_gib": candidate.memory.total / GIB,
        "step_seconds": timing.step,
        "tokens_per_second": timing.tokens_per_second,
        "model_flop_utilisation": timing.utilisation,
        "bubble_fraction": bubble_fraction(layout),
    }
