"""One optimizer step, and one validation: rows -> model -> losses -> gradients -> update.

Shape suffixes: B sequences, T rows, N weighted rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tidar_mega import device
from tidar_mega.config import Config
from tidar_mega.data.stream import Stream
from tidar_mega.losses import RowLosses, cross_entropy
from tidar_mega.methods import Method
from tidar_mega.model.attention import TrainingAttention, choose_backend
from tidar_mega.parallel.mesh import Mesh
from tidar_mega.rows import PADDING, Rows, concatenate, visible_pairs

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What every step needs and none changes."""

    config: Config
    mesh: Mesh
    method: Method
    model: DistributedDataParallel
    token_bytes: Tensor  # utf-8 bytes of each id, for nats per byte


def micro_batches(task: Task, stream: Stream, first: int, count: int) -> Iterator[Rows]:
    """This rank's rows of the global samples first..first+count-1, in micro-batches of at most micro_batch_size.

    Samples go round the data-parallel ranks in turn, so the batch does not depend on their number.
    """
    mine = range(first + task.mesh.data_rank, first + count, task.mesh.data_size)
    size = task.config.train.micro_batch_size
    if not mine:  # fewer held-out sequences than ranks: this one takes part in the sums with nothing
        idle = _rows(task, stream, [first])
        yield replace(idle, weight=torch.zeros_like(idle.weight))
    for i in range(0, len(mine), size):
        yield _rows(task, stream, list(mine[i : i + size]))


def _rows(task: Task, stream: Stream, samples: list[int]) -> Rows:
    clean = concatenate([stream.rows(i) for i in samples], dim=0)
    return task.method.training_rows(clean, torch.tensor(samples))


def normalise(task: Task, batch: list[Rows]) -> list[Rows]:
    """Divides each row's weight by its term's total over the global batch and multiplies by the term's coefficient.

    The loss of a step is then the plain sum over all rows of all ranks, whatever the layout.
    """
    selected = [[term.select(rows) for term in task.method.terms] for rows in batch]
    totals = torch.zeros(len(task.method.terms), dtype=torch.float64)
    for rows, masks in zip(batch, selected, strict=True):
        totals += torch.stack([(rows.weight * m).sum(dtype=torch.float64) for m in masks])
    totals = totals.to(device.device())
    dist.all_reduce(totals, group=task.mesh.data)
    coefficients = torch.tensor([t.coefficient for t in task.method.terms], dtype=torch.float64)
    scale = coefficients / totals.cpu().clamp(min=1)
    scaled = []
    for rows, masks in zip(batch, selected, strict=True):
        factor_BT = sum(s * m for s, m in zip(scale, masks, strict=True))
        scaled.append(replace(rows, weight=(rows.weight * factor_BT).float()))
    return scaled


def forward(task: Task, model, rows: Rows) -> RowLosses:
    """Losses of every weighted row of one micro-batch."""
    backend = choose_backend(task.config.model.attention, rows.token.device, model_dtype(task.config))
    hidden_TBD = model(rows=rows, context=TrainingAttention(rows, backend))
    head = task.model.module.head_weight
    return cross_entropy(hidden_TBD, head, rows, task.mesh.tensor, task.config.train.loss_chunk)


def model_dtype(config: Config) -> torch.dtype:
    return device.DTYPES[config.precision.dtype]


@torch.no_grad()
def validate(task: Task, stream: Stream, sequences: int) -> dict[str, float]:
    """Mean loss of each term in nats and, for the AR rows, nats per byte, over at most `sequences` held-out ones."""
    count = min(sequences, stream.samples_per_epoch)
    task.model.eval()
    sums: Sums = {}
    for rows in micro_batches(task, stream, 0, count):
        rows = rows.to(device.device())
        _add(sums, _statistics(task, rows, forward(task, task.model.module, rows)))
    task.model.train()
    return summarise(task, _over_ranks(task, sums))


def accumulate_gradients(task: Task, batch: list[Rows]) -> Sums:
    """Forward and backward of a step's micro-batches through megatron's schedule. Returns sums over all ranks."""
    task.model.zero_grad_buffer()
    sums: Sums = {}

    def forward_step(iterator: Iterator[Rows], model):
        rows = next(iterator).to(device.device())
        losses = forward(task, model, rows)

        def loss_function(_):
            _add(sums, _statistics(task, rows, losses))
            # no tokens to divide by: the weights already hold the global denominators
            return losses.total, torch.zeros((), dtype=torch.int, device=losses.total.device), {}

        return losses.total, loss_function

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(normalise(task, batch)),
        model=task.model,
        num_microbatches=len(batch),
        seq_length=batch[0].shape[1],
        micro_batch_size=batch[0].shape[0],
        forward_only=False,
    )
    return _over_ranks(task, sums)


def _statistics(task: Task, rows: Rows, losses: RowLosses) -> Sums:
    sums: Sums = {}
    label_N = rows.label[losses.index]
    for term in task.method.terms:
        picked_N = term.select(rows)[losses.index]
        sums[f"{term.name}.loss"] = losses.loss[picked_N].sum(dtype=torch.float64)
        sums[f"{term.name}.rows"] = picked_N.sum(dtype=torch.float64)
        sums[f"{term.name}.bytes"] = task.token_bytes[label_N[picked_N]].sum(dtype=torch.float64)
    counts = {
        "count.rows": (rows.document != PADDING).sum(),
        "count.tokens": (rows.is_clean & (rows.document != PADDING)).sum(),
        "count.pairs": torch.tensor(visible_pairs(rows), device=label_N.device),
        "count.head_rows": torch.tensor(len(label_N), device=label_N.device),
    }
    return sums | {k: v.double() for k, v in counts.items()} | task.method.statistics(rows, losses)


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value.detach()


def _over_ranks(task: Task, sums: Sums) -> Sums:
    flat = torch.cat([v.double().reshape(-1) for v in sums.values()])
    dist.all_reduce(flat, group=task.mesh.data)
    pieces = flat.cpu().split([v.numel() for v in sums.values()])
    return {name: piece.reshape(v.shape) for (name, v), piece in zip(sums.items(), pieces, strict=True)}


def summarise(task: Task, sums: Sums) -> dict[str, float]:
    """Figures for a log: the loss as it is optimised, each term's mean, nats per byte, the method's own figures."""
    figures = {t.name: float(sums[f"{t.name}.loss"] / sums[f"{t.name}.rows"].clamp(min=1)) for t in task.method.terms}
    loss = sum(t.coefficient * figures[t.name] for t in task.method.terms)
    named = {f"loss_{name}": value for name, value in figures.items()}
    if "ar.bytes" in sums:
        named["nats_per_byte"] = float(sums["ar.loss"] / sums["ar.bytes"].clamp(min=1))
    return {"loss": loss, **named, **task.method.summary(sums)}
