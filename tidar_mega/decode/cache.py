"""Keys and values of decoding in fixed pages, and the attention of a forward's rows over them.

A request holds whole pages for all that it may ever commit, from its admission to its end; a run of neighbouring pages
is read as one view, so nothing is gathered. Of a forward's rows only the clean ones are written, right behind the
committed ones: a commit advances a length, a rejected row is overwritten by the next forward, an end gives the pages
back, and nothing is ever moved. Mask rows are read by their own forward alone and are never stored.

Everything committed is visible to every row (orders below L), so only the forward's own T columns need a mask, and that
mask is the plan's: it is the same at every step.

Shape suffixes: T rows of a forward, N requests, H query heads, G key heads, F = H/G query heads of one key head, E head
width, S slots of the cache, t rows of one request, Q = F*t of its query rows per key head, P committed, K = P + t keys.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Pages:
    """Which of `count` pages are free. Gives the fewest runs of neighbouring pages that it can."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = [range(count)] if count else []  # in order, never touching one another

    @property
    def free(self) -> int:
        return sum(map(len, self._free))

    def take(self, count: int) -> list[range] | None:
        """Runs of `count` pages in all, or None if there are not enough: the tightest single run, else the longest."""
        if count > self.free:
            return None
        fitting = [run for run in self._free if len(run) >= count]
        order = [min(fitting, key=len)] if fitting else sorted(self._free, key=len, reverse=True)
        taken = []
        for run in order:
            self._free.remove(run)
            taken.append(run[:count])
            if len(run) > count:
                bisect.insort(self._free, run[count:], key=lambda r: r.start)
            count -= len(taken[-1])
            if not count:
                return taken
        raise AssertionError("free pages were counted wrongly")

    def give_back(self, runs: Sequence[range]) -> None:
        merged: list[range] = []
        for run in sorted([*self._free, *runs], key=lambda r: r.start):
            if merged and merged[-1].stop == run.start:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                assert not merged or merged[-1].stop < run.start, "a page was given back twice"
                merged.append(run)
        self._free = merged


class PagedCache:
    """Keys and values of this rank's layers and key heads: for each layer number, k and v [G, S, E] of S slots.

    scratch  a page behind those that requests get, for rows that stand for nobody (`graphs.py`)

    One tensor per layer, not one for all: a compiled forward that writes slices of a shared tensor copies it.
    """

    def __init__(
        self,
        layers: Sequence[int],
        heads: int,
        width: int,
        pages: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (heads, (pages + 1) * page, width)
        self.page, self.device, self.pages, self.scratch = page, device, Pages(pages), pages
        self.k = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.v = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}

    def pages_of(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page)

    def take(self, tokens: int) -> Slots | None:
        """Room for `tokens` rows of one request; None if it is not free now."""
        runs = self.pages.take(self.pages_of(tokens))
        return None if runs is None else Slots(runs, self.page)

    def give_back(self, slots: Slots) -> None:
        self.pages.give_back(slots.runs)


class Slots:
    """Where the rows of one request are, in their order: runs of pages."""

    def __init__(self, runs: list[range], page: int) -> None:
        self.runs = runs
        self.slots = [range(run.start * page, run.stop * page) for run in runs]

    def of(self, start: int, stop: int) -> list[range]:
        """The slots of rows start..stop-1, as runs."""
        found, before = [], 0
        for run in self.slots:
            first, last = max(start - before, 0), min(stop - before, len(run))
            if first < last:
                found.append(run[first:last])
            before += len(run)
        assert sum(map(len, found)) == stop - start, "more rows than a request was admitted for"
        return found


@dataclass(frozen=True)
class Part:
    """The rows of one request in a forward.

    rows     where they are among all rows of the forward
    clean    how many of them, from the first, are clean
    slots    the request's
    length   rows that it has committed
    bias_tt  the plan's mask among the rows; None for a single row
    """

    rows: range
    clean: int
    slots: Slots
    length: int
    bias_tt: Tensor | None


class PagedAttention:
    """The attention context of one forward: each request's rows over what it has committed and over one another.

    Exact, softmax in float32 or better. The query heads of a key head are folded into rows, so that keys are neither
    repeated nor read twice.
    """

    @classmethod
    def of(cls, cache: PagedCache, parts: Sequence[Part]) -> PagedAttention:
        return cls(cache, parts)

    def __init__(self, cache: PagedCache, parts: Sequence[Part]) -> None:
        self.cache = cache
        rows, slots = [], []
        for part in parts:
            rows += part.rows[: part.clean]
            for run in part.slots.of(part.length, part.length + part.clean):
                slots += run
        self.all_clean = len(rows) == sum(len(p.rows) for p in parts)
        self.clean_C = None if self.all_clean else _index(rows, cache.device)
        self.slot_C = _index(slots, cache.device)
        # a single row sees itself as the newest of the committed ones
        self.read = [(p, p.slots.of(0, p.length + (p.bias_tt is None))) for p in parts]

    def attend(self, layer_number: int, q_T1HE: Tensor, k_T1GE: Tensor, v_T1GE: Tensor, scale: float) -> Tensor:
        """Stores the clean rows' keys and values; the attention's output [T, 1, H, E]."""
        k_GSE, v_GSE = self.cache.k[layer_number], self.cache.v[layer_number]
        (T, _, H, E), G = q_T1HE.shape, k_T1GE.shape[2]
        k_GTE, v_GTE = k_T1GE[:, 0].transpose(0, 1), v_T1GE[:, 0].transpose(0, 1)
        self._store(k_GSE, k_GTE)
        self._store(v_GSE, v_GTE)
        wide = torch.promote_types(q_T1HE.dtype, torch.float32)  # in bfloat16 a score of 20 may be off by 1 / 16
        q_GFTE = (q_T1HE.to(wide) * scale).view(T, G, H // G, E).permute(1, 2, 0, 3)
        outs = []
        for part, runs in self.read:
            rows = slice(part.rows.start, part.rows.stop)
            q_GQE = q_GFTE[:, :, rows].reshape(G, -1, E)
            new = None if part.bias_tt is None else (k_GTE[:, rows], v_GTE[:, rows], part.bias_tt)
            out_GQE = _attend(q_GQE, [(k_GSE[:, r.start : r.stop], v_GSE[:, r.start : r.stop]) for r in runs], new)
            outs.append(out_GQE.view(G, H // G, -1, E))
        out_GFTE = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
        return out_GFTE.permute(2, 0, 1, 3).reshape(T, 1, H, E)

    def _store(self, x_GSE: Tensor, new_GTE: Tensor) -> None:
        x_GSE.index_copy_(1, self.slot_C, new_GTE if self.clean_C is None else new_GTE.index_select(1, self.clean_C))


def _attend(q_GQE: Tensor, committed: list[tuple[Tensor, Tensor]], new: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Softmax over all committed keys and the new ones: the pieces of the scores meet in one softmax."""
    wide = q_GQE.dtype
    scores = [torch.bmm(q_GQE, k_GPE.to(wide).transpose(1, 2)) for k_GPE, _ in committed]
    values = [v_GPE for _, v_GPE in committed]
    if new is not None:
        k_GtE, v_GtE, bias_tt = new
        score_GQt = torch.bmm(q_GQE, k_GtE.to(wide).transpose(1, 2))
        score_GQt.unflatten(1, (-1, len(bias_tt))).add_(bias_tt)
        scores.append(score_GQt)
        values.append(v_GtE)
    score_GQK = torch.cat(scores, dim=2) if len(scores) > 1 else scores[0]
    weight_GQK = score_GQK.softmax(dim=-1).to(values[0].dtype)
    pieces = weight_GQK.split([v.shape[1] for v in values], dim=2)
    out_GQE = torch.bmm(pieces[0], values[0])
    for weight_GQP, v_GPE in zip(pieces[1:], values[1:], strict=True):
        out_GQE.baddbmm_(weight_GQP, v_GPE)
    return out_GQE


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)
