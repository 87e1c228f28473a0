"""Cross entropy over only the rows that carry weight, vocabulary-parallel, in chunks.

The head and its loss are one operation that makes the gradient in the forward pass: the logits of a chunk are used
for the loss and for both gradients while they are at hand, and are never kept or computed twice. So the logits of all
rows never exist at once, and the head costs no more than it does in a plain step.

Shape suffixes: N rows that carry weight, C rows of one chunk, D hidden width, V vocabulary ids of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.rows import Rows


@dataclass(frozen=True)
class RowLosses:
    """What the head said of the N weighted rows of a forward.

    total       scalar, sum of weight * cross entropy; the one differentiable field
    loss        float32 [N], cross entropy in nats
    prediction  int64 [N], the most likely id
    index       (sequence [N], row [N]): where in the Rows they stand
    """

    total: Tensor
    loss: Tensor
    prediction: Tensor
    index: tuple[Tensor, Tensor]


def cross_entropy(
    hidden_TBD: Tensor, head_weight_VD: Tensor, rows: Rows, group: dist.ProcessGroup | None, chunk: int
) -> RowLosses:
    """Weighted cross entropy of every row with `weight` > 0.

    `head_weight_VD` holds this rank's ids rank*V .. rank*V+V-1 of `group` (None: all of them); `chunk` bounds the
    number of rows whose logits exist at once. Losses are in nats and equal on every rank of the group, gradients with
    respect to the hidden states are this rank's part, to be summed over the group.
    """
    index = rows.weight.nonzero(as_tuple=True)
    selected_ND = hidden_TBD[index[1], index[0]]
    args = (rows.label[index], rows.weight[index], group, chunk)
    total, loss, prediction = _HeadCrossEntropy.apply(selected_ND, head_weight_VD, *args)
    return RowLosses(total, loss, prediction, index)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, label_N, weight_N, group, chunk):
        wants_gradient = hidden_ND.requires_grad or head_VD.requires_grad
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        # summed over chunks in float32 so that the gradient does not depend on how many chunks there are
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_gradient else None
        losses, predictions = [], []
        for start in range(0, len(label_N), chunk):
            at = slice(start, start + chunk)
            logits_CV = (hidden_ND[at] @ head_VD.t()).float()
            loss_C, prediction_C, logit_gradient_CV = _vocabulary_parallel(logits_CV, label_N[at], group)
            losses.append(loss_C)
            predictions.append(prediction_C)
            if wants_gradient:
                gradient_CV = logit_gradient_CV.mul_(weight_N[at, None]).to(hidden_ND.dtype)
                grad_hidden_ND[at] = gradient_CV @ head_VD
                grad_head_VD += gradient_CV.t() @ hidden_ND[at]
        loss_N = torch.cat(losses) if losses else weight_N.new_zeros(0)
        prediction_N = torch.cat(predictions) if predictions else label_N
        if wants_gradient:
            ctx.save_for_backward(grad_hidden_ND, grad_head_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(loss_N, prediction_N)
        return (loss_N * weight_N).sum(), loss_N, prediction_N

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_total, grad_head_VD * grad_total, None, None, None, None


def _vocabulary_parallel(logits_CV: Tensor, label_C: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy [C], most likely id [C] and d(cross entropy)/d(logits) [C, V]; `logits_CV` is overwritten."""
    width = logits_CV.shape[1]
    first = group.rank() * width if group is not None else 0
    largest_C, prediction_C = logits_CV.max(dim=1)
    prediction_C = _global_argmax(largest_C, prediction_C + first, group)
    largest_C = _reduce(largest_C, dist.ReduceOp.MAX, group)

    local_C = label_C - first
    is_here_C = (local_C >= 0) & (local_C < width)
    local_C = local_C.clamp(0, width - 1)[:, None]
    logits_CV -= largest_C[:, None]
    label_logit_C = logits_CV.gather(1, local_C).squeeze(1) * is_here_C
    probability_CV = logits_CV.exp_()
    total_C = probability_CV.sum(dim=1)
    label_logit_C, total_C = _reduce(torch.stack([label_logit_C, total_C]), dist.ReduceOp.SUM, group)

    probability_CV /= total_C[:, None]
    probability_CV.scatter_add_(1, local_C, -is_here_C.to(probability_CV.dtype)[:, None])
    return total_C.log() - label_logit_C, prediction_C, probability_CV


def _global_argmax(largest_C: Tensor, id_C: Tensor, group) -> Tensor:
    """The id of the largest logit over the group; of equals, the lowest id."""
    if group is None or group.size() == 1:
        return id_C
    best_C = _reduce(largest_C.clone(), dist.ReduceOp.MAX, group)
    no_id = torch.iinfo(id_C.dtype).max
    return _reduce(torch.where(largest_C == best_C, id_C, no_id), dist.ReduceOp.MIN, group)


def _reduce(x: Tensor, operation, group) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)
    return x
