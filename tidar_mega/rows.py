"""Rows and the visibility rule: the one noun that data, methods, decoding and the model exchange.

A *row* is one token slot of a forward pass, in training or in decoding. A clean row holds a real token, a mask row
is a drafting slot. Which rows see which is decided by `rule` and by nothing else: the dense reference mask, the
FlexAttention `mask_mod`, the work-skipping CPU path and the drawn picture are all made from it.

Shape suffixes: B sequences, T rows of one forward, Q query rows, K key rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

CLEAN = 0  # the group of a clean row
PADDING = -1  # the document of a padding row, which no real row ever sees


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass; every tensor has shape [B, T].

    token     int64   input id; the mask id for a drafting slot
    position  int64   RoPE position; a clean token and the mask that predicts the same place share it
    order     int64   place in the causal order of its document (equal to `position`, save for any-order methods)
    horizon   int64   clean rows with `order < horizon` are visible: `order + 1` for a clean row, its block's first
                      order for a mask row
    group     int64   0 for a clean row; mask rows of one document with the same group see each other
    document  int64   rows of other documents are never visible; -1 marks padding
    label     int64   the id that this row must predict (any valid id where `weight` is 0)
    weight    float32 how much the prediction counts; 0 = no loss, and no head is computed
    """

    token: Tensor
    position: Tensor
    order: Tensor
    horizon: Tensor
    group: Tensor
    document: Tensor
    label: Tensor
    weight: Tensor
    causal_in_group: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.token.shape

    @property
    def is_clean(self) -> Tensor:
        """bool [B, T]"""
        return self.group == CLEAN

    def map(self, function) -> Rows:
        """A new Rows with `function` applied to each tensor."""
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "causal_in_group"}
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> Rows:
        return self.map(lambda x: move(x, device))

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of every sequence."""
        return self.map(lambda x_BT: x_BT[:, start:stop])

    def take(self, index_BT: Tensor) -> Rows:
        """Of every sequence, the rows at its own places `index_BT`, int64 [B, T']."""
        return self.map(lambda x_BT: x_BT.gather(1, index_BT))

    def select(self, sequences) -> Rows:
        """The given sequences (a slice or index tensor over B)."""
        return self.map(lambda x_BT: x_BT[sequences])


def move(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on the device, without waiting for what that has still to do: from memory that cannot be paged out, as the
    copy from any other begins with such a wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()  # which cannot copy an expanded tensor
    return x.to(device, non_blocking=True)


def concatenate(parts: list[Rows], dim: int) -> Rows:
    """Joins Rows along B (`dim=0`) or T (`dim=1`); they must agree on `causal_in_group`."""
    assert len({p.causal_in_group for p in parts}) == 1, "rows of different in-group rules cannot share a forward"
    names = [f.name for f in fields(Rows) if f.name != "causal_in_group"]
    joined = {n: torch.cat([getattr(p, n) for p in parts], dim=dim) for n in names}
    return Rows(**joined, causal_in_group=parts[0].causal_in_group)


def rule(
    q_document, q_order, q_horizon, q_group, k_document, k_order, k_group, causal_in_group: bool = False
) -> Tensor:
    """The visibility rule on broadcastable tensors (or scalars inside a FlexAttention `mask_mod`)."""
    prefix = (k_group == CLEAN) & (k_order < q_horizon)
    own_group = (k_group != CLEAN) & (k_group == q_group)
    if causal_in_group:
        own_group = own_group & (k_order <= q_order)
    return (q_document == k_document) & (prefix | own_group)


def visible(q: Rows, k: Rows) -> Tensor:
    """Dense reference mask, bool [B, Q, K]: True where query row q sees key row k."""
    return rule(
        q.document[:, :, None],
        q.order[:, :, None],
        q.horizon[:, :, None],
        q.group[:, :, None],
        k.document[:, None, :],
        k.order[:, None, :],
        k.group[:, None, :],
        q.causal_in_group,
    )


def place_before(q: Rows, k: Rows) -> tuple[Tensor, Tensor]:
    """Which key row stands directly before each query row in the order of its document, int64 [B, Q] (0 where there is
    none), and where there is one, bool [B, Q]. The orders of a document's key rows must differ."""
    steps = int(k.order.max()) + 2
    code_BQ, code_BK = q.document * steps + q.order - 1, k.document * steps + k.order
    sorted_BK, place_BK = code_BK.sort(dim=1)
    at_BQ = torch.searchsorted(sorted_BK, code_BQ).clamp(max=sorted_BK.shape[1] - 1)
    exists_BQ = (sorted_BK.gather(1, at_BQ) == code_BQ) & (q.order > 0) & (q.document != PADDING)
    return place_BK.gather(1, at_BQ).masked_fill(~exists_BQ, 0), exists_BQ


def visible_pairs(rows: Rows) -> int:
    """How many (query, key) pairs of real rows the mask allows, without making it: the work of exact attention.

    Holds where every document's clean rows have the orders 0, 1, 2, ... (packed training rows).
    """
    real_BT = rows.document != PADDING
    prefix = int(rows.horizon[real_BT].sum())
    masks_BT = real_BT & ~rows.is_clean
    sequence_BT = torch.arange(rows.shape[0], device=rows.token.device)[:, None].expand(rows.shape)
    groups = int(rows.group.max()) + 1
    size = torch.bincount((sequence_BT * groups + rows.group)[masks_BT])
    return prefix + int((size * (size + 1) // 2 if rows.causal_in_group else size * size).sum())
