"""Cross entropy over only the rows that carry weight, vocabulary-parallel, in chunks; and losses of whole drafts.

The head and its loss are one operation that makes the gradient in the forward pass: the logits of a chunk are used
for the loss and for both gradients while they are at hand, and are never kept or computed twice. So the logits of all
rows never exist at once, and the head costs no more than it does in a plain step.

Shape suffixes: N rows that carry weight, C rows of one chunk, M those of them that draft, G drafts (blocks), K slots, D
hidden width, V vocabulary ids of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_mega.rows import Rows


@dataclass(frozen=True)
class RowLosses:
    """What the head said of the N weighted rows of a forward.

    total       scalar, sum of weight * cross entropy, and the losses of whole drafts; the one differentiable field
    loss        float32 [N], cross entropy in nats
    prediction  int64 [N], the most likely id
    index       (sequence [N], row [N]): where in the Rows they stand
    """

    total: Tensor
    loss: Tensor
    prediction: Tensor
    index: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DraftTerms:
    """Losses of whole drafts, because a draft is verified from left to right: what stands behind its first error is
    lost (arXiv 2606.11552, "Teaching diffusion to speculate left-to-right").

    focal  coefficient of the cross entropy at the first slot whose most likely id is wrong; 0 of a draft without error
    chain  coefficient of minus the expected accepted length, sum_k prod_{j<=k} q_j, q_j = exp(-cross entropy)
    first  the first slot that counts: 1 where AR itself decides slot 0 (TiDAR)

    In a step, the coefficients are divided by the number of drafts of the global batch.
    """

    focal: float = 0.0
    chain: float = 0.0
    first: int = 0

    @property
    def any(self) -> bool:
        return self.focal > 0 or self.chain > 0

    def count(self, rows: Rows) -> Tensor:
        """Drafts that count: those that reach the first slot."""
        return (~rows.is_clean & (rows.weight > 0) & (rows.order - rows.horizon == self.first)).sum()


@dataclass(frozen=True)
class DraftLosses:
    """Per draft, float32 [G]: the focal loss and the expected accepted length, `first` slots not counted; and what
    their sums have as derivative with respect to the cross entropy of each row, float32 [M] (that of the negative
    length, for `chain_M`)."""

    focal_G: Tensor
    length_G: Tensor
    focal_M: Tensor
    chain_M: Tensor


def of_drafts(loss_M: Tensor, right_M: Tensor, draft_M: Tensor, slot_M: Tensor, first: int) -> DraftLosses:
    """`draft_M` int64 says to which draft a row belongs, 0..G-1, and `slot_M` where it stands in it. The slots of a
    draft begin at 0 and have no gap.

    The identity behind `chain_M`: d E / d log q_j = sum_{k>=j} prod_{i<=k} q_i.
    """
    shape_GK = (int(draft_M.max()) + 1, int(slot_M.max()) + 1) if len(draft_M) else (0, first + 1)
    loss_GK, wrong_GK, counts_GK = loss_M.new_zeros(3, *shape_GK)
    loss_GK[draft_M, slot_M] = loss_M
    wrong_GK[draft_M, slot_M] = (~right_M).to(loss_M.dtype)
    counts_GK[draft_M, slot_M] = 1
    for x_GK in (loss_GK, wrong_GK, counts_GK):
        x_GK[:, :first] = 0
    until_KK = loss_GK.new_ones(shape_GK[1], shape_GK[1]).triu()  # a cumsum of floats is not deterministic on a GPU
    is_first_GK = wrong_GK * (wrong_GK @ until_KK == 1)
    reached_GK = (-loss_GK @ until_KK).exp() * counts_GK  # prod_{j<=k} q_j
    chain_GK = reached_GK @ until_KK.t() * counts_GK
    return DraftLosses(
        (is_first_GK * loss_GK).sum(dim=1),
        reached_GK.sum(dim=1),
        is_first_GK[draft_M, slot_M],
        chain_GK[draft_M, slot_M],
    )


def cross_entropy(
    hidden_TBD: Tensor,
    head_weight_VD: Tensor,
    rows: Rows,
    group: dist.ProcessGroup | None,
    chunk: int,
    drafts: DraftTerms | None = None,
    index: tuple[Tensor, Tensor] | None = None,
) -> RowLosses:
    """Weighted cross entropy of every row with `weight` > 0; with `drafts`, the losses of whole drafts on top. `index`
    is where these rows are, if the caller knows it: to find them on a GPU, the host would have to wait for it.

    `head_weight_VD` holds this rank's ids rank*V .. rank*V+V-1 of `group` (None: all of them); `chunk` bounds the
    number of rows whose logits exist at once. Losses are in nats and equal on every rank of the group, gradients with
    respect to the hidden states are this rank's part, to be summed over the group.
    """
    index = rows.weight.nonzero(as_tuple=True) if index is None else index
    terms = _TermsOfRows(drafts, rows, index) if drafts is not None and drafts.any else None
    edges = _edges(len(index[0]), chunk, terms)
    selected_ND = hidden_TBD[index[1], index[0]]
    # validation runs without: its gradients would be two more products of every chunk
    args = (rows.label[index], rows.weight[index], group, edges, terms, torch.is_grad_enabled())
    total, loss, prediction = _HeadCrossEntropy.apply(selected_ND, head_weight_VD, *args)
    return RowLosses(total, loss, prediction, index)


def draft_sums(terms: DraftTerms, rows: Rows, losses: RowLosses) -> tuple[Tensor, Tensor]:
    """Over all drafts, float64: the focal losses and the expected accepted lengths."""
    right_N = losses.prediction == rows.label[losses.index]
    found = _TermsOfRows(terms, rows, losses.index).losses(losses.loss, right_N, slice(None))
    return found.focal_G.sum(dtype=torch.float64), found.length_G.sum(dtype=torch.float64)


class _TermsOfRows:
    """DraftTerms of a forward's weighted rows. The rows of a draft are neighbours: methods put them so, and a
    context-parallel rank has whole drafts."""

    def __init__(self, terms: DraftTerms, rows: Rows, index: tuple[Tensor, Tensor]) -> None:
        self.terms = terms
        self.slot_N = torch.where(rows.is_clean, -1, rows.order - rows.horizon)[index]  # -1: drafts nothing
        draft_N = index[0] * (int(rows.group.max()) + 1) + rows.group[index]
        self.starts_N = torch.ones_like(draft_N, dtype=torch.bool)
        self.starts_N[1:] = (draft_N[1:] != draft_N[:-1]) | (self.slot_N[1:] < 0)

    def losses(self, loss_C: Tensor, right_C: Tensor, at: slice) -> DraftLosses:
        """Of a chunk of whole drafts."""
        drafts_C, draft_C = self.slot_N[at] >= 0, self.starts_N[at].cumsum(dim=0)
        _, draft_M = torch.unique_consecutive(draft_C[drafts_C], return_inverse=True)
        slot_M = self.slot_N[at][drafts_C]
        return of_drafts(loss_C[drafts_C], right_C[drafts_C], draft_M, slot_M, self.terms.first)

    def __call__(self, loss_C: Tensor, right_C: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """What a chunk adds to the total, and to the weights of its rows."""
        found = self.losses(loss_C, right_C, at)
        weight_C = torch.zeros_like(loss_C)
        weight_C[self.slot_N[at] >= 0] = self.terms.focal * found.focal_M + self.terms.chain * found.chain_M
        return self.terms.focal * found.focal_G.sum() - self.terms.chain * found.length_G.sum(), weight_C


def _edges(count: int, chunk: int, terms: _TermsOfRows | None) -> list[int]:
    """Where the chunks begin and end; a draft is never cut."""
    if terms is None:
        return [*range(0, count, chunk), count]
    starts = terms.starts_N.nonzero().squeeze(1).tolist()
    edges = [0]
    for start, end in pairwise([*starts, count]):
        if end - edges[-1] > chunk and start > edges[-1]:
            edges.append(start)
    return [*edges, count]


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, label_N, weight_N, group, edges, terms, learns):
        wants_head = learns and head_VD.requires_grad
        wants_gradient = learns and (hidden_ND.requires_grad or head_VD.requires_grad)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        # summed over chunks in float32 so that the gradient does not depend on how many chunks there are
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        losses, predictions, more = [], [], weight_N.new_zeros(())
        for at in map(slice, edges[:-1], edges[1:]):
            logits_CV = (hidden_ND[at] @ head_VD.t()).float()
            loss_C, prediction_C, logit_gradient_CV = _vocabulary_parallel(logits_CV, label_N[at], group)
            losses.append(loss_C)
            predictions.append(prediction_C)
            weight_C = weight_N[at]
            if terms is not None:
                more_here, more_C = terms(loss_C, prediction_C == label_N[at], at)
                more, weight_C = more + more_here, weight_C + more_C
            if wants_gradient:
                gradient_CV = logit_gradient_CV.mul_(weight_C[:, None]).to(hidden_ND.dtype)
                grad_hidden_ND[at] = gradient_CV @ head_VD
            if wants_head:
                grad_head_VD += gradient_CV.t() @ hidden_ND[at]
        loss_N = torch.cat(losses) if losses else weight_N.new_zeros(0)
        prediction_N = torch.cat(predictions) if predictions else label_N
        if wants_gradient:
            ctx.save_for_backward(grad_hidden_ND, grad_head_VD.to(head_VD.dtype) if wants_head else None)
        ctx.mark_non_differentiable(loss_N, prediction_N)
        return (loss_N * weight_N).sum() + more, loss_N, prediction_N

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        grad_head_VD = None if grad_head_VD is None else grad_head_VD * grad_total
        return grad_hidden_ND * grad_total, grad_head_VD, None, None, None, None, None, None


def _vocabulary_parallel(logits_CV: Tensor, label_C: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy [C], most likely id [C] and d(cross entropy)/d(logits) [C, V]; `logits_CV` is overwritten."""
    width = logits_CV.shape[1]
    first = group.rank() * width if group is not None else 0
    largest_C, prediction_C = logits_CV.max(dim=1)
    here_C, largest_C = largest_C, _reduce(largest_C.clone(), dist.ReduceOp.MAX, group)
    # of equals, the lowest id
    is_largest_C, no_id = here_C == largest_C, torch.iinfo(prediction_C.dtype).max
    prediction_C = _reduce(torch.where(is_largest_C, prediction_C + first, no_id), dist.ReduceOp.MIN, group)

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


def _reduce(x: Tensor, operation, group) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)
    return x
