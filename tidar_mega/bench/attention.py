"""The backend that training takes on this machine (`tiles` on a CPU, `flex` on a GPU) against the dense mask and
against plain causal attention over 2S rows, forward and backward.

The three take turns in one process, and the ratios are of medians, so that a busy machine slows all of them alike.
Accuracy is the relative Frobenius error against an explicit softmax in float64.

Shape suffixes: T = 2S rows, B sequences, H query heads, G key heads, F query heads of a key head, E head width.
"""

from __future__ import annotations

import argparse
import functools

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidar_mega import device
from tidar_mega.arguments import positive
from tidar_mega.config import UserError
from tidar_mega.model.attention import TrainingAttention, choose_backend
from tidar_mega.rows import Rows, visible

RESULTS = ("out", "dq", "dk", "dv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-length", type=positive, default=2048, help="clean tokens of a sequence (S)")
    parser.add_argument("--block", type=positive, default=8)
    parser.add_argument("--heads", type=positive, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=positive, default=2)
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU")
    parser.add_argument("--dtype", choices=(*device.DTYPES, "both"), default="both")


def run(args: argparse.Namespace) -> dict:
    """Figures of fp32 at the top level (`dense_over_tiles`, `tiles_over_causal_2s`; on a GPU `flex` for `tiles`), and
    of each type under its name."""
    if args.seq_length % args.block:
        raise UserError(f"--seq-length {args.seq_length} must be a multiple of --block {args.block}")
    if args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        names = device.DTYPES if args.dtype == "both" else (args.dtype,)
        figures = {name: _measure(args, device.DTYPES[name]) for name in names}
    finally:
        torch.set_num_threads(before)
    _print(args, figures)
    flat = {"setting": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}, **figures}
    for name, suffix in (("fp32", ""), ("bf16", "_bf16")):
        ratios = {key: value for key, value in figures.get(name, {}).items() if "_over_" in key}
        flat |= {f"{key}{suffix}": value for key, value in ratios.items()}
    flat["errors"] = {name: f["errors"] for name, f in figures.items()}
    return flat


def doubled_rows(seq_length: int, block: int) -> Rows:
    """One sequence of one document and its masks at block offset 0 (TiDAR, arXiv 2511.08923, section 3.1)."""
    place = torch.arange(seq_length)
    first = place // block * block
    order = torch.cat([place, place])[None]
    zero = torch.zeros_like(order)
    horizon = torch.cat([place + 1, first])[None]
    group = torch.cat([torch.zeros_like(place), 1 + place // block])[None]
    return Rows(zero, order, order, horizon, group, zero, zero, zero.float())


def _measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    T, scale, here = 2 * args.seq_length, args.head_dim**-0.5, device.device()
    draw = torch.Generator().manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    *qkv, grad = (torch.randn(T, 1, h, args.head_dim, generator=draw).to(here, dtype) for h in heads)
    qkv = [x.requires_grad_() for x in qkv]
    rows = doubled_rows(args.seq_length, args.block).to(here)
    fast = choose_backend("auto", here, dtype)
    ways = {name: _attend(TrainingAttention(rows, name), scale) for name in (fast, "dense")}
    ways["causal_2s"] = _causal(scale)
    # the plan or mask, which all layers of a step share; on a GPU also the kernel, compiled once
    first_seconds = device.seconds(lambda: ways[fast](*qkv))

    steps = {name: functools.partial(_forward_backward, way, qkv, grad) for name, way in ways.items()}
    seconds = device.medians_in_turn(steps, args.repeats)
    return {
        "backend": fast,
        f"dense_over_{fast}": seconds["dense"] / seconds[fast],
        f"{fast}_over_causal_2s": seconds[fast] / seconds["causal_2s"],
        "milliseconds": {name: 1e3 * s for name, s in seconds.items()},
        "first_call_milliseconds": 1e3 * first_seconds,
        "errors": _errors({name: ways[name] for name in (fast, "dense")}, qkv, grad, rows, scale),
    }


def _attend(context: TrainingAttention, scale: float):
    return lambda q, k, v: context.attend(1, q, k, v, scale)


def _causal(scale: float):
    def attend(*qkv: Tensor) -> Tensor:
        q_BHTE, k_BGTE, v_BGTE = (x.permute(1, 2, 0, 3) for x in qkv)
        out_BHTE = scaled_dot_product_attention(
            q_BHTE, k_BGTE, v_BGTE, is_causal=True, scale=scale, enable_gqa=k_BGTE.shape[1] != q_BHTE.shape[1]
        )
        return out_BHTE.permute(2, 0, 1, 3)

    return attend


def _forward_backward(way, qkv: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    out = way(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def _errors(ways: dict, qkv: list[Tensor], grad: Tensor, rows: Rows, scale: float) -> dict:
    exact = _exact(qkv, grad, rows, scale)
    errors = {}
    for name, way in ways.items():
        found = _forward_backward(way, qkv, grad)
        errors[name] = {
            key: float((a.double() - b).norm() / b.norm()) for key, a, b in zip(RESULTS, found, exact, strict=True)
        }
    return errors


def _exact(qkv: list[Tensor], grad: Tensor, rows: Rows, scale: float) -> tuple[Tensor, ...]:
    """The output and the gradients in float64, written out, one query head at a time (memory)."""
    q, k, v = (x.detach().double() for x in qkv)
    g, per_key = grad.double(), q.shape[2] // k.shape[2]
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    hidden_TT = ~visible(rows, rows)[0]
    for h in range(q.shape[2]):
        Q, K, V, G = q[:, 0, h], k[:, 0, h // per_key], v[:, 0, h // per_key], g[:, 0, h]
        p_TT = (Q @ K.T).mul_(scale).masked_fill_(hidden_TT, float("-inf")).softmax(-1)
        out[:, 0, h] = P_V = p_TT @ V
        dv[:, 0, h // per_key] += p_TT.T @ G
        ds_TT = (G @ V.T).sub_((G * P_V).sum(-1, keepdim=True)).mul_(p_TT).mul_(scale)
        dq[:, 0, h] = ds_TT @ K
        dk[:, 0, h // per_key] += ds_TT.T @ Q
    return out, dq, dk, dv


def _print(args: argparse.Namespace, figures: dict) -> None:
    where = f"{args.threads} thread(s)" if device.device().type == "cpu" else torch.cuda.get_device_name()
    table = Table(
        title=f"attention forward + backward, S {args.seq_length} ({2 * args.seq_length} rows), block {args.block}, "
        f"{args.heads}/{args.kv_heads} heads of {args.head_dim}, {where}, medians of {args.repeats}"
    )
    for column in ("type", "backend", "ms", "dense ms", "causal 2S ms", "dense / backend", "backend / causal 2S"):
        table.add_column(column, justify="right")
    errors = Table(title="relative error against float64")
    for column in ("type", "backend", *RESULTS):
        errors.add_column(column, justify="right")
    for name, f in figures.items():
        fast = f["backend"]
        ms = (f"{f['milliseconds'][way]:.4g}" for way in (fast, "dense", "causal_2s"))
        ratios = f"{f[f'dense_over_{fast}']:.2f}", f"{f[f'{fast}_over_causal_2s']:.3f}"
        table.add_row(name, fast, *ms, *ratios)
        for backend, values in f["errors"].items():
            errors.add_row(name, backend, *(f"{values[key]:.1e}" for key in RESULTS))
    console = Console()
    console.print(table)
    console.print(errors)
