"""The gradients of one step, and one validation: rows -> model -> losses -> gradients. `optim.py` has the update.

Shape suffixes: B sequences, T rows, N weighted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tidar_mega import device
from tidar_mega.config import Config
from tidar_mega.data.stream import Samples
from tidar_mega.losses import DraftTerms, RowLosses, cross_entropy, draft_sums
from tidar_mega.methods import Method, Term
from tidar_mega.model.any_order import AnyOrderAttention
from tidar_mega.model.attention import AttentionContext, TrainingAttention, choose_backend
from tidar_mega.model.multi_token import MultiTokenAttention
from tidar_mega.parallel.context import Part, restore, split, split_copies, whole
from tidar_mega.parallel.mesh import Mesh
from tidar_mega.rows import PADDING, Rows, concatenate, move, visible_pairs

Sums = dict[str, Tensor]

_VALIDATED_AT_ONCE = 16  # micro-batches for each pipeline stage, whose rows are in memory together


@dataclass(frozen=True)
class Task:
    """What every step needs and none changes. `chunks` is this rank's part of the model."""

    config: Config
    mesh: Mesh
    method: Method
    chunks: list[DistributedDataParallel]
    token_bytes: Tensor  # utf-8 bytes of each id, for nats per byte
    progress: Callable[[], None] = lambda: None  # called with each forward of a micro-batch


def micro_batches(task: Task, stream: Samples, first: int, count: int) -> Iterator[Rows]:
    """This replica's rows of the global samples first..first+count-1, in micro-batches of micro_batch_size sequences.

    Samples go round the replicas in turn, so the batch does not depend on their number. Where they do not fill the
    last micro-batch (held-out sequences), sequences without weight do: all forwards of a run have one shape.
    """
    parallel, size = task.config.parallel, task.config.train.micro_batch_size
    mine = list(range(first + task.mesh.data_rank, first + count, task.mesh.data_size))
    unit = size * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)  # what the interleaved schedule takes
    for i in range(0, max(1, math.ceil(len(mine) / unit)) * unit, size):
        samples = mine[i : i + size]
        rows = _rows(task, stream, samples + [first] * (size - len(samples)))
        rows.weight[len(samples) :] = 0
        yield rows


def _rows(task: Task, stream: Samples, samples: list[int]) -> Rows:
    clean = concatenate([stream.rows(i) for i in samples], dim=0)
    return task.method.training_rows(clean, torch.tensor(samples))


def normalise(task: Task, batch: list[Rows]) -> tuple[list[Rows], DraftTerms]:
    """Divides each row's weight by its term's total over the global batch and multiplies by the term's coefficient;
    likewise the losses of whole drafts.

    The loss of a step is then the plain sum over all rows and drafts of all ranks, whatever the layout.
    """
    shares = [[term.share(rows).double() for term in task.method.terms] for rows in batch]
    totals = torch.zeros(len(task.method.terms) + 1, dtype=torch.float64)
    for rows, own in zip(batch, shares, strict=True):
        sums = [(rows.weight * share).sum(dtype=torch.float64) for share in own]
        totals += torch.stack([*sums, task.method.drafts.count(rows).double()])
    totals = totals.to(device.device())
    dist.all_reduce(totals, group=task.mesh.data)
    *of_terms, drafts = totals.clamp(min=1).tolist()
    scale = [factor / total for factor, total in zip(_coefficients(task, batch), of_terms, strict=True)]
    scaled = []
    for rows, own in zip(batch, shares, strict=True):
        factor_BT = sum(s * share for s, share in zip(scale, own, strict=True))
        scaled.append(replace(rows, weight=(rows.weight * factor_BT).float()))
    terms = task.method.drafts
    return scaled, replace(terms, focal=terms.focal / drafts, chain=terms.chain / drafts)


@torch.no_grad()
def _coefficients(task: Task, batch: list[Rows]) -> list[float]:
    """Of each term in this step. One that balances another needs the losses of the whole global batch before the first
    gradient is made, so a forward of all its micro-batches goes before: exact, whatever the layout."""
    if not any(term.balances for term in task.method.terms):
        return [term.coefficient for term in task.method.terms]
    return _balanced(task.method.terms, _means(task, _run_schedule(task, batch, DraftTerms(), forward_only=True)))


def _balanced(terms: tuple[Term, ...], means: dict[str, float]) -> list[float]:
    """Coefficients at these mean losses."""

    def factor(term: Term) -> float:
        if term.balances is None:
            return term.coefficient
        ratio = means[term.balances] / means[term.name] if means[term.name] else 0.0
        # of losses that are not finite, the step is skipped; a weight that is NaN would be a row with and without loss
        return term.coefficient * (ratio if math.isfinite(ratio) else 1.0)

    return [factor(term) for term in terms]


def _means(task: Task, sums: Sums) -> dict[str, float]:
    return {t.name: float(sums[f"{t.name}.loss"] / sums[f"{t.name}.rows"].clamp(min=1)) for t in task.method.terms}


@torch.no_grad()
def validate(task: Task, stream: Samples, sequences: int) -> dict[str, float]:
    """Mean loss of each term in nats and, for the AR rows, nats per byte, over at most `sequences` held-out ones; of
    several folders, each has its share of these, one at least, and `loss/NAME` and `nats_per_byte/NAME` of its own."""
    sums: Sums = {}
    figures: dict[str, float] = {}
    parts = stream.parts(sequences)
    for chunk in task.chunks:
        chunk.eval()
    for name, part, count in parts:
        found = _held_out(task, part, count)
        _add(sums, found)
        if len(parts) > 1:
            own = summarise(task, found)
            figures |= {f"{key}/{name}": own[key] for key in ("loss", "nats_per_byte") if key in own}
    for chunk in task.chunks:
        chunk.train()
    return summarise(task, sums) | figures


def _held_out(task: Task, stream: Samples, count: int) -> Sums:
    """Over the first `count` samples."""
    parallel = task.config.parallel
    at_once = _VALIDATED_AT_ONCE * task.config.train.micro_batch_size * task.mesh.data_size * parallel.pipeline
    sums: Sums = {}
    for first in range(0, count, at_once):
        batch = list(micro_batches(task, stream, first, min(at_once, count - first)))
        _add(sums, _run_schedule(task, batch, DraftTerms(), forward_only=True))
    return sums


def accumulate_gradients(task: Task, batch: list[Rows], begin: Callable[[], None] = lambda: None) -> Sums:
    """Forward and backward of a step's micro-batches. Returns sums over all ranks. `begin` is called once all have met,
    before this rank's first forward."""
    for chunk in task.chunks:
        chunk.zero_grad_buffer()
    weighted = normalise(task, batch)
    begin()
    return _run_schedule(task, *weighted, forward_only=False)


def _run_schedule(task: Task, batch: list[Rows], drafts: DraftTerms, forward_only: bool) -> Sums:
    """Takes the micro-batches through megatron's schedule of the layout. Returns sums over all ranks, on every rank."""
    sums: Sums = {}

    def forward_step(iterator: Iterator[tuple[Rows, Part]], chunk: DistributedDataParallel):
        task.progress()
        rows, part = next(iterator)
        # what only the host must know is found before the rows are moved: the device is never waited for
        index, part = _weighted(part.rows), part.to(device.device())
        hidden_TBD = chunk(rows=part.rows, context=_context(task)(part, _backend(task)))
        if not chunk.module.post_process:
            return hidden_TBD, None
        head_VD, chunk_rows = _head_weight(chunk), task.config.train.loss_chunk
        losses = cross_entropy(hidden_TBD, head_VD, part.rows, task.mesh.tensor, chunk_rows, drafts, index)

        def loss_function(_):
            _add(sums, _statistics(task, rows, *_whole(task, losses, rows, part)))
            # no tokens to divide by: the weights already hold the global denominators
            return losses.total, torch.zeros((), dtype=torch.int, device=losses.total.device), {}

        return losses.total, loss_function

    work = [(rows, _part(task, rows)) for rows in batch]
    is_single = len(task.chunks) == 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(work) if is_single else [iter(work) for _ in task.chunks],
        model=task.chunks[0] if is_single else task.chunks,
        num_microbatches=len(work),
        seq_length=_backbone_rows(task, work[0][1]) * task.mesh.context.size(),
        micro_batch_size=work[0][1].rows.shape[0],
        forward_only=forward_only,
    )
    return task.mesh.from_head(_over_replicas(task, sums) if task.mesh.has_head else None)


def _part(task: Task, rows: Rows) -> Part:
    """The rows that this rank of the context group computes."""
    if task.mesh.context.size() == 1:
        return whole(rows)
    if task.config.rows_per_place > 1:
        return split_copies(rows, task.mesh.context, task.config.rows_per_place, task.config.row_multiple)
    return split(rows, task.mesh.context, task.config.train.block, task.config.row_multiple)


def _context(task: Task) -> Callable[[Part, str], AttentionContext]:
    if task.config.traits.has_depths:
        return partial(MultiTokenAttention, depths=task.config.model.mtp_num_layers)
    return AnyOrderAttention if task.config.traits.has_causal_block else TrainingAttention


def _backbone_rows(task: Task, part: Part) -> int:
    """Rows of a sequence that pass from layer to layer; those of a causal block or of depths are made in the last."""
    return part.rows.shape[1] // task.config.rows_per_place


def _whole(task: Task, losses: RowLosses, rows: Rows, part: Part) -> tuple[Rows, RowLosses]:
    """Collective over the context group. All its rows, and their losses without the gradient, on the device."""
    if task.mesh.context.size() == 1:
        return part.rows, losses
    values = []
    for value_N in (losses.loss, losses.prediction):
        value_BT = value_N.new_zeros(part.rows.shape)
        value_BT[losses.index] = value_N
        values.append(restore(value_BT, part, rows.shape[1]))
    index = _weighted(rows)
    found = RowLosses(losses.total.detach(), values[0][index], values[1][index], index)
    return rows.to(device.device()), found


def _weighted(rows: Rows) -> tuple[Tensor, Tensor]:
    """Where rows on the CPU have weight: (sequence, row), on the device."""
    return tuple(move(x_N, device.device()) for x_N in rows.weight.nonzero(as_tuple=True))


def _head_weight(chunk: DistributedDataParallel) -> Tensor:
    weight = chunk.module.head_weight
    # megatron waits in the layer's own call, which the loss goes around; what is frozen is never gathered
    if chunk.ddp_config.overlap_param_gather and weight.requires_grad:
        chunk.param_to_bucket_group[weight].finish_param_sync(chunk.ddp_config.align_param_gather)
    return weight


def _backend(task: Task) -> str:
    return choose_backend(task.config.model.attention, device.device(), device.DTYPES[task.config.precision.dtype])


def _statistics(task: Task, rows: Rows, there: Rows, losses: RowLosses) -> Sums:
    """Of whole rows, on the CPU and `there` on the device. What the rows alone decide is counted on the CPU."""
    sums: Sums = {}
    where = rows.weight > 0
    bytes_N = task.token_bytes[there.label[losses.index]]
    for term in task.method.terms:
        own_N = term.share(rows)[where].double()
        share_N = move(own_N, device.device())
        sums[f"{term.name}.loss"] = (losses.loss * share_N).sum()
        sums[f"{term.name}.rows"] = own_N.sum()
        sums[f"{term.name}.bytes"] = (bytes_N * share_N).sum()
    is_real = rows.document != PADDING
    counts = {
        "rows": is_real.sum(),
        "tokens": (rows.is_clean & is_real).sum(),
        "pairs": torch.tensor(visible_pairs(rows)),
        "head_rows": where.sum(),
    }
    sums |= {f"count.{name}": count.double() for name, count in counts.items()} | task.method.statistics(there, losses)
    if task.method.drafts.any:
        focal, length = draft_sums(task.method.drafts, there, losses)
        sums |= {"drafts.focal": focal, "drafts.chain": -length, "drafts.count": task.method.drafts.count(rows)}
    return sums


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value.detach()


def _over_replicas(task: Task, sums: Sums) -> Sums:
    flat = torch.cat([move(v.double().reshape(-1), device.device()) for v in sums.values()])
    dist.all_reduce(flat, group=task.mesh.data)
    pieces = flat.cpu().split([v.numel() for v in sums.values()])
    return {name: piece.reshape(v.shape) for (name, v), piece in zip(sums.items(), pieces, strict=True)}


def summarise(task: Task, sums: Sums) -> dict[str, float]:
    """Figures for a log: the loss as it is optimised, each term's mean, nats per byte, the method's own figures."""
    terms, figures = task.method.terms, _means(task, sums)
    loss = sum(c * figures[t.name] for c, t in zip(_balanced(terms, figures), terms, strict=True))
    for name in ("focal", "chain") if task.method.drafts.any else ():
        figures[name] = float(sums[f"drafts.{name}"] / sums["drafts.count"].clamp(min=1))
        loss += getattr(task.method.drafts, name) * figures[name]
    named = {f"loss_{name}": value for name, value in figures.items()}
    if "ar.bytes" in sums:
        named["nats_per_byte"] = float(sums["ar.loss"] / sums["ar.bytes"].clamp(min=1))
    return {"loss": loss, **named, **task.method.summary(sums)}
