"""Every parallel layout at the same global batch, against one process on the same machine.

Each layout is a world of processes of its own, started as `tidar pretrain` starts them; rounds over all layouts follow
one another, so that a machine that slows down slows all alike. The share of communication is the time that the Python
thread of a rank spends inside torch.distributed, waiting for others included, in one more step under cProfile. On GPUs
there is no such figure: NCCL's calls return at once, and the time is spent elsewhere.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tidar_mega import config as config_module
from tidar_mega import device, launch, methods
from tidar_mega.arguments import at_least, positive
from tidar_mega.bench.text import RandomText
from tidar_mega.config import Config, UserError
from tidar_mega.model import gpt
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.train import optim
from tidar_mega.train.step import Task, accumulate_gradients, micro_batches

NAMES = ("tensor", "pipeline", "virtual_pipeline", "context", "data")
LAYOUTS = (  # the tensor-parallel ones with sequence parallelism
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (1, 2, 1, 1, 1),
    (1, 2, 2, 1, 1),
    (1, 1, 1, 2, 1),
    (1, 1, 1, 1, 2),
    (2, 2, 1, 1, 1),
    (2, 1, 1, 2, 1),
    (1, 2, 1, 2, 1),
    (2, 1, 1, 1, 2),
)
_SHAPE = ("seq_length", "block", "layers", "hidden", "vocab", "batch", "dtype", "steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-length", type=positive, default=512, help="clean tokens of a sequence (S)")
    parser.add_argument("--block", type=positive, default=8)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--hidden", type=positive, default=256, help="width; heads are 64 wide, 2 to a key head")
    parser.add_argument("--vocab", type=at_least(2), default=4096, help="ids, of which one is the mask")
    parser.add_argument("--batch", type=positive, default=8, help="sequences of a step, in micro-batches of one")
    parser.add_argument("--dtype", choices=sorted(device.DTYPES), default="fp32")
    parser.add_argument("--steps", type=positive, default=5, help="measured steps of each layout in each round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--processes", type=positive, default=4, help="leave out layouts of more processes than this")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict:
    """Figures: for each layout tokens/s, its ratio to one process and the share of communication (None on GPUs)."""
    if args.only is not None:
        return _work(args, tuple(json.loads(args.only)))
    gpus = torch.cuda.device_count()
    limit = min(args.processes, gpus) if gpus else args.processes
    layouts = [layout for layout in LAYOUTS if _processes(layout) <= limit]
    for layout in layouts:
        _config(args, layout)  # a shape that does not fit is one error here
    rounds = [{layout: _measure(args, layout, gpus) for layout in layouts} for _ in range(args.rounds)]
    figures = {str(layout): _summary(rounds, layout, args) for layout in layouts}
    result = {"layouts": figures, "setting": {key: getattr(args, key) for key in (*_SHAPE, "rounds")}}
    _show(figures)
    return result


def _processes(layout: tuple) -> int:
    tensor, pipeline, _, context, data = layout
    return tensor * pipeline * context * data


def _config(args: argparse.Namespace, layout: tuple) -> Config:
    heads = args.hidden // 64
    shape = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "ffn_hidden_size": args.hidden * 11 // 4,
        "num_attention_heads": heads,
        "num_query_groups": max(1, heads // 2),
    }
    return config_module.from_tree(
        {
            "model": shape,
            "data": {"seq_length": args.seq_length},
            "train": {"block": args.block, "global_batch_size": args.batch, "micro_batch_size": 1},
            "parallel": {**dict(zip(NAMES, layout, strict=True)), "sequence": layout[0] > 1},
            "precision": {"dtype": args.dtype},
        }
    )


def _measure(args: argparse.Namespace, layout: tuple, gpus: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        setting = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in _SHAPE]
        only = [f"--only={json.dumps(layout)}", f"--report={report}"]
        code = launch.run_local(["bench", "layouts", *setting, *only], _processes(layout), gpus)
        if code:
            raise UserError(f"layout {layout}: its processes ended with code {code}; the first error is above")
        return json.loads(report.read_text())


def _work(args: argparse.Namespace, layout: tuple) -> dict:
    """On a rank: measures this layout; the main process writes the report."""
    config = _config(args, layout)
    device.start_process_group(config, int(os.environ["LOCAL_RANK"]))
    mesh = build_mesh(config)
    chunks = optim.wrap(config, gpt.build(config, args.vocab))
    optimizer = optim.build_optimizer(config, chunks)
    scheduler = optim.build_scheduler(config, optimizer)
    method = methods.load(config, mask_id=args.vocab - 1)
    task = Task(config, mesh, method, chunks, torch.ones(args.vocab, device=device.device()))
    batch = list(micro_batches(task, RandomText(args.vocab - 1, args.seq_length), 0, args.batch))

    def step() -> None:
        accumulate_gradients(task, batch)
        optim.update(optimizer, config.optimizer.clip_grad)
        scheduler.step(1)

    step()  # warm-up
    seconds = []
    for _ in range(args.steps):
        dist.barrier()
        seconds.append(device.seconds(step))
    report = {"seconds": seconds, "communication": None if device.has_cuda() else _communication_share(step)}
    if mesh.is_main:
        args.report.write_text(json.dumps(report))
    return report


def _communication_share(step) -> float:
    """Collective. The mean of all ranks."""
    profile = cProfile.Profile()
    dist.barrier()
    taken = device.seconds(lambda: profile.runcall(step))
    calls = pstats.Stats(profile).stats.items()
    spent = sum(own for (_, _, name), (_, _, own, _, _) in calls if "_distributed_c10d" in name)
    share = torch.tensor(spent / taken)
    dist.all_reduce(share)
    return float(share) / dist.get_world_size()


def _summary(rounds: list[dict], layout: tuple, args: argparse.Namespace) -> dict:
    seconds = [statistics.median(measured[layout]["seconds"]) for measured in rounds]
    alone = [statistics.median(measured[LAYOUTS[0]]["seconds"]) for measured in rounds]
    shares = [measured[layout]["communication"] for measured in rounds]
    return {
        "processes": _processes(layout),
        "tokens_per_second": args.batch * args.seq_length / statistics.median(seconds),
        "speedup_over_one_process": statistics.median(a / s for a, s in zip(alone, seconds, strict=True)),
        "communication": None if None in shares else statistics.median(shares),
    }


def _show(figures: dict) -> None:
    table = Table(title="one training step at the same global batch")
    for column in ("(TP, PP, VPP, CP, DP)", "processes", "tokens/s", "over one process", "communication"):
        table.add_column(column, justify="right")
    for layout, f in figures.items():
        speed = f"{f['speedup_over_one_process']:.2f}x"
        communication = "-" if f["communication"] is None else f"{f['communication']:.0%}"
        row = (f"{f['tokens_per_second']:,.0f}", speed, communication)
        table.add_row(layout, str(f["processes"]), *row)
    Console().print(table)
