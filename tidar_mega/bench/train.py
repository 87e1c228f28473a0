"""A training step against a plain-PyTorch model of the same shape with the dense mask.

Speed is measured in one process, the two in turn; peak memory in one process each, as it cannot be reset on a host.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from tidar_mega import config as config_module
from tidar_mega import device, methods
from tidar_mega.arguments import at_least, positive
from tidar_mega.bench.plain import PlainModel
from tidar_mega.bench.text import RandomText
from tidar_mega.config import Config, UserError
from tidar_mega.model import gpt
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.rows import Rows
from tidar_mega.train import optim
from tidar_mega.train.step import Task, accumulate_gradients, normalise

OURS, PLAIN = "tidar_mega", "plain"
_SETTING = ("seq_length", "block", "layers", "hidden", "vocab", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-length", type=positive, default=2048, help="clean tokens of a sequence (S)")
    parser.add_argument("--block", type=positive, default=8)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--hidden", type=positive, default=512, help="width; heads are 64 wide, 4 to a key head")
    parser.add_argument("--vocab", type=at_least(2), default=16384, help="ids, of which one is the mask")
    parser.add_argument("--dtype", choices=sorted(device.DTYPES), default="bf16")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--only", choices=(OURS, PLAIN), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict:
    """Figures: tokens/s of both, their ratio, and the peak memory of both and its ratio."""
    device.start_alone()
    steps = _contenders(args)
    if args.only is None:
        return _compare(args, steps)
    for _ in range(2):
        steps[args.only]()
    figures = {"peak_memory_bytes": device.peak_memory_bytes()}
    print(json.dumps(figures))
    return figures


def _compare(args: argparse.Namespace, steps: dict) -> dict:
    seconds = device.medians_in_turn(steps, args.repeats)
    memory = {name: _peak_memory(args, name) for name in steps}
    figures = {
        "speedup_over_plain": seconds[PLAIN] / seconds[OURS],
        "tokens_per_second": {name: args.seq_length / s for name, s in seconds.items()},
        "peak_memory_bytes": memory,
        "memory_over_plain": memory[OURS] / memory[PLAIN],
        "setting": {key: getattr(args, key) for key in _SETTING},
        "threads": torch.get_num_threads(),
    }
    _show(figures)
    return figures


def _show(figures: dict) -> None:
    table = Table("training step", "tokens/s", "peak memory MiB")
    for name, tokens in figures["tokens_per_second"].items():
        table.add_row(name, f"{tokens:,.0f}", f"{figures['peak_memory_bytes'][name] / 2**20:,.0f}")
    speed, memory = figures["speedup_over_plain"], figures["memory_over_plain"]
    table.add_row(f"{OURS} / {PLAIN}", f"{speed:.2f}x", f"{memory:.2f}x")
    Console().print(table)


def _contenders(args: argparse.Namespace) -> dict:
    """name -> a training step on the same rows."""
    config = config_module.from_tree(_settings(args))
    mesh = build_mesh(config)
    method = methods.load(config, mask_id=args.vocab - 1)
    clean = RandomText(args.vocab - 1, args.seq_length).rows(0)
    rows = method.training_rows(clean, torch.zeros(1, dtype=torch.int64))
    builders = {OURS: _our_step, PLAIN: _plain_step}
    wanted = [args.only] if args.only else list(builders)
    return {name: builders[name](config, mesh, method, rows, args.vocab) for name in wanted}


def _our_step(config: Config, mesh, method, rows: Rows, vocab: int):
    (model,) = optim.wrap(config, gpt.build(config, vocab))
    optimizer = optim.build_optimizer(config, [model])
    scheduler = optim.build_scheduler(config, optimizer)
    task = Task(config, mesh, method, [model], torch.ones(vocab, device=device.device()))

    def step() -> None:
        accumulate_gradients(task, [rows])
        optim.update(optimizer, config.optimizer.clip_grad)
        scheduler.step(1)

    return step


def _plain_step(config: Config, mesh, method, rows: Rows, vocab: int):
    """Float32 weights; bf16 is torch's autocast, the usual way of it, as both then keep float32 optimizer state."""
    dtype = device.DTYPES[config.precision.dtype]
    model = PlainModel(config.model, config.padded_vocab_size(vocab)).to(device.device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    weighted = normalise(Task(config, mesh, method, [], torch.ones(0)), [rows])[0][0].to(device.device())

    def step() -> None:
        with torch.autocast(device.device().type, dtype, enabled=dtype != torch.float32):
            loss = model(weighted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _settings(args: argparse.Namespace) -> dict:
    heads = args.hidden // 64
    shape = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "ffn_hidden_size": args.hidden * 11 // 4,
        "num_attention_heads": heads,
        "num_query_groups": max(1, heads // 4),
    }
    return {
        "model": shape,
        "data": {"seq_length": args.seq_length},
        "train": {"block": args.block, "global_batch_size": 1, "micro_batch_size": 1},
        "precision": {"dtype": args.dtype},
    }


def _peak_memory(args: argparse.Namespace, name: str) -> int:
    setting = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in _SETTING]
    command = [sys.executable, "-m", "tidar_mega.cli", "bench", "train", *setting, "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"`{shlex.join(command)}` ended with code {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]
