"""Masked diffusion (MDLM, arXiv 2406.07524): every masked token is predicted from the revealed ones, in any order.

Each document of a sequence has an order of its own, a random permutation of its D places, of which the first i are
revealed, i uniform in 0..D-1. All rows see all rows of their document. With the weight D / (D - i) the loss is the
evidence bound of an any-order autoregressive model (arXiv 2110.02037, section 3), in nats per token.

Shape suffixes: B sequences, S rows of one, P places of one document.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.methods import Method, Term, generator
from tidar_mega.rows import PADDING, Rows


class MaskedDiffusion(Method):
    def __init__(self, config: Config, mask_id: int) -> None:
        self.mask_id, self.seed = mask_id, config.train.seed
        self.terms = (Term("diffusion", 1.0, bound_weight),)

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        return partly_masked(clean, sample, self.mask_id, self.seed)[0]


def partly_masked(clean: Rows, sample: Tensor, mask_id: int, seed: int) -> tuple[Rows, Tensor]:
    """Rows that all see their whole document, some with their token masked; and each row's place in the random order
    of its document, int64 [B, S]. The masked rows carry weight 1, the label is the row's own token."""
    drawn = [_draw_orders(clean.document[b], seed, index) for b, index in enumerate(sample.tolist())]
    order_BS, revealed_BS = (torch.stack(x) for x in zip(*drawn, strict=True))
    is_masked = order_BS >= revealed_BS
    rows = replace(
        any_to_any(clean),
        token=clean.token.masked_fill(is_masked, mask_id),
        label=clean.token,
        weight=(is_masked & (clean.document != PADDING)).to(clean.weight.dtype),
    )
    return rows, order_BS


def any_to_any(clean: Rows) -> Rows:
    """Clean rows of which each sees all of its document: the horizon lies behind the last place."""
    size_BS = torch.stack([_per_row(lambda size: size.expand(int(size)), document_S) for document_S in clean.document])
    return replace(clean, horizon=size_BS)


def bound_weight(rows: Rows) -> Tensor:
    """float64 [B, T]: D / (D - i) of a document with D rows of which D - i carry weight, clean rows and the rows of a
    causal block (`ssmd`) counted apart."""
    B, T = rows.shape
    sequence_B1 = torch.arange(B, device=rows.token.device)[:, None]
    documents = int(rows.document.max()) + 2  # with padding
    unit_BT = ((sequence_B1 * documents) + rows.document + 1) * 2 + (~rows.is_clean).long()
    units = unit_BT.flatten(), unit_BT[rows.weight > 0]
    size, masked = (torch.bincount(unit, minlength=2 * B * documents) for unit in units)
    return (size.double() / masked.clamp(min=1))[unit_BT]


def _draw_orders(document_S: Tensor, seed: int, sample: int) -> tuple[Tensor, Tensor]:
    """Of every row, its place in the order of its document and how many places of that are revealed, int64 [S]."""
    draw = generator(seed, "order", sample)

    def of_document(size: Tensor) -> Tensor:
        revealed_P = torch.randint(int(size), (1,), generator=draw).expand(int(size))
        return torch.stack([torch.randperm(int(size), generator=draw), revealed_P], dim=1)

    order_S, revealed_S = _per_row(of_document, document_S).unbind(dim=1)
    return order_S, revealed_S


def _per_row(function, document_S: Tensor) -> Tensor:
    """Joins what `function` gives for the number of rows of each document, [P, ...], in their order."""
    sizes = torch.unique_consecutive(document_S, return_counts=True)[1]
    return torch.cat([function(size) for size in sizes])


METHOD = MaskedDiffusion
