"""The plan of the `tiles` backend: which keys each small group of query rows has to look at.

Made once for a batch of rows and shared by all layers. Visibility is asked of `rows.rule` alone, for one tile of
queries against all keys at a time, so the plan is exact for any rows; only how rows are put together into tiles is a
guess at what is fast: chunks of clean rows together with the mask rows of the same places, because both read the same
clean prefix (TiDAR, arXiv 2511.08923, section 3.1).

Shape suffixes: B sequences, T rows, R query rows of a tile, L keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tidar_mega.rows import CLEAN, Rows, rule

CHUNK = 64  # clean rows of a tile; about 3 * S * CHUNK pairs are computed in vain, smaller chunks cost more calls
GAP = 16  # unseen keys that are taken along (and masked) so as to keep two ranges of keys in one piece

ROWS_STEP, WIDTH_STEP = 16, 32  # tiles of few different sizes: oneDNN compiles a kernel for each size it meets

Range = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Query rows `start..stop-1` of the structure's row order against the keys of `keys`, in that order."""

    start: int
    stop: int
    keys: tuple[Range, ...]  # ranges of the rows' own numbering
    width: int  # L, the number of keys
    kept: int  # leading keys that are also the leading keys of the tile before
    free: int  # leading keys that every query row of the tile sees
    bias_LR: Tensor | None  # float32 [L - free, R], 0 or -inf, for the other keys; None if every row sees them
    sees_R: Tensor | None  # float32 [R], 0 for query rows that see no key at all; None if there are none

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Structure:
    """What the sequences with equal document, order, horizon and group share."""

    sequences: Tensor  # int64, which sequences of the batch
    row_order: Tensor  # int64 [T]: the rows in the order of the tiles
    tiles: tuple[Tile, ...]

    @cached_property
    def place(self) -> Tensor:
        """int64 [T]: where in `row_order` each row is."""
        return self.row_order.argsort()

    @cached_property
    def rows(self) -> int:
        """Query rows of the tile with the most rows."""
        return max((t.rows for t in self.tiles), default=0)

    @cached_property
    def area(self) -> int:
        """Query-key pairs of the largest tile."""
        return max((t.rows * t.width for t in self.tiles), default=0)

    @cached_property
    def width(self) -> int:
        """Keys of the tile with the most keys."""
        return max((t.width for t in self.tiles), default=0)

    @property
    def pairs(self) -> int:
        """Query-key pairs computed for one sequence; the true mask has fewer."""
        return sum(t.rows * t.width for t in self.tiles)

    def visible(self) -> Tensor:
        """bool [T, T]: the mask that the tiles apply, put together again (for tests and drawings)."""
        seen_TT = torch.zeros(len(self.row_order), len(self.row_order), dtype=torch.bool)
        for tile in self.tiles:
            columns = torch.cat([torch.arange(a, b) for a, b in tile.keys])
            tile_RL = torch.ones(tile.rows, tile.width, dtype=torch.bool)
            if tile.bias_LR is not None:
                tile_RL[:, tile.free :] = tile.bias_LR.T == 0
            if tile.sees_R is not None:
                tile_RL &= tile.sees_R[:, None] > 0
            seen_TT[self.row_order[tile.start : tile.stop, None], columns] = tile_RL
        return seen_TT


def make_plan(rows: Rows, chunk: int = CHUNK) -> tuple[Structure, ...]:
    """One `Structure` for each different structure in the batch (one alone where documents are not packed)."""
    fields = [x.cpu() for x in (rows.document, rows.order, rows.horizon, rows.group)]
    different, which = torch.unique(torch.stack(fields, dim=1), dim=0, return_inverse=True)
    return tuple(
        _structure(different[i], (which == i).nonzero().squeeze(1), rows.causal_in_group, chunk)
        for i in range(len(different))
    )


def _structure(fields_4T: Tensor, sequences: Tensor, causal_in_group: bool, chunk: int) -> Structure:
    query_ranges = _query_ranges(fields_4T[0], fields_4T[1], fields_4T[3] == CLEAN, chunk)
    document, order, horizon, group = fields_4T.to(torch.int32).numpy()  # numpy: many small steps, no threads to wake
    tiles, row_order, start, before, shared = [], [], 0, (), {}
    for ranges in query_ranges:
        r = np.concatenate([np.arange(a, b) for a, b in ranges])
        sees_RT = rule(
            document[r, None], order[r, None], horizon[r, None], group[r, None], document, order, group, causal_in_group
        )
        keys, free = _key_ranges(sees_RT)
        row_order.append(r)
        if keys:  # a tile whose rows see nothing needs no work: its output stays zero
            bias, sees = _bias(sees_RT, keys, free, shared)
            width = sum(b - a for a, b in keys)
            kept = _common(before, keys)
            tiles.append(Tile(start, start + len(r), keys, width, kept, free, bias, sees))
            before = keys
        start += len(r)
    return Structure(sequences, torch.from_numpy(np.concatenate(row_order)), tuple(tiles))


def _query_ranges(document: Tensor, order: Tensor, is_clean: Tensor, chunk: int) -> list[tuple[Range, ...]]:
    """Every row once: chunks of clean rows, each with the mask rows of the same places."""
    clean, total = int(is_clean.sum()), len(is_clean)
    if clean == total or not bool(is_clean[:clean].all()):  # no masks, or no clean half in front
        return [((a, min(a + 2 * chunk, total)),) for a in range(0, total, 2 * chunk)]
    place = torch.where(document < 0, 1 << 30, document) * (1 << 32) + order
    firsts = torch.arange(0, clean, chunk)
    if bool((place[:clean].diff() >= 0).all() and (place[clean:].diff() >= 0).all()):
        cuts = torch.searchsorted(place[clean:].contiguous(), place[firsts[1:]].contiguous())
    else:
        cuts = firsts[1:] * (total - clean) // max(clean, 1)
    cuts = ((cuts + ROWS_STEP // 2) // ROWS_STEP * ROWS_STEP).clamp_max(total - clean)
    edges = [clean, *(clean + cuts).tolist(), total]
    result: list[tuple[Range, ...]] = []
    for i, a in enumerate(firsts.tolist()):
        b, low, high = min(a + chunk, clean), edges[i], edges[i + 1]
        middle = min(high, low + chunk)
        result.append(((a, b), (low, middle)) if middle > low else ((a, b),))
        result += [((c, min(c + chunk, high)),) for c in range(middle, high, chunk)]
    return result


def _runs(flag_T: np.ndarray, gap: int = 0) -> list[Range]:
    """The ranges where the flag is set; ranges at most `gap` apart become one."""
    index = np.flatnonzero(flag_T)
    if not len(index):
        return []
    breaks = np.flatnonzero(np.diff(index) > gap + 1)
    firsts = [int(index[0]), *index[breaks + 1].tolist()]
    lasts = [*index[breaks].tolist(), int(index[-1])]
    return [(a, b + 1) for a, b in zip(firsts, lasts, strict=True)]


def _key_ranges(sees_RT: np.ndarray) -> tuple[tuple[Range, ...], int]:
    """The ranges of keys that some row of the tile sees, beginning with the longest that all of its rows see."""
    runs = _runs(sees_RT.any(0), GAP)
    everywhere = _runs(sees_RT.all(0))
    if not everywhere:
        return _rounded(runs, sees_RT.shape[1]), 0
    first, last = max(everywhere, key=lambda r: r[1] - r[0])
    home = next(r for r in runs if r[0] <= first and last <= r[1])
    rest = [(home[0], first)] if home[0] < first else []
    runs = [(first, home[1]), *rest, *(r for r in runs if r != home)]
    return _rounded(runs, sees_RT.shape[1]), last - first


def _rounded(ranges: list[Range], total: int) -> tuple[Range, ...]:
    """Takes unseen keys along behind the last range, where there are any, to make the width a multiple of a step."""
    if not ranges:
        return ()
    more = -sum(b - a for a, b in ranges) % WIDTH_STEP
    first, last = ranges[-1]
    end = min([total, *(a for a, _ in ranges if a >= last)])
    return (*ranges[:-1], (first, min(last + more, end)))


def _bias(sees_RT: np.ndarray, keys: tuple[Range, ...], free: int, shared: dict) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask of the keys that are not free, and which rows see anything; equal tensors are made once."""
    sees_LR = np.ascontiguousarray(np.concatenate([sees_RT[:, a:b] for a, b in keys], axis=1)[:, free:].T)
    if sees_LR.all():
        return None, None
    sees_R = sees_LR.any(0) | (free > 0)
    key = (sees_LR.shape, sees_LR.tobytes())
    if key not in shared:
        shared[key] = torch.from_numpy(np.where(sees_LR | ~sees_R, np.float32(0), np.float32("-inf")))
    return shared[key], None if sees_R.all() else torch.from_numpy(sees_R).float()


def _common(before: tuple[Range, ...], keys: tuple[Range, ...]) -> int:
    """Length of the common beginning of two lists of keys."""
    length = 0
    for (a, b), (c, d) in zip(before, keys, strict=False):
        if a != c:
            break
        length += min(b, d) - a
        if b != d:
            break
    return length
