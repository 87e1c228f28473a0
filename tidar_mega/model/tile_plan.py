"""The plan of the `tiles` backend: which keys each small group of query rows has to look at.

Made once for a batch of rows and shared by all layers. Visibility is asked of `rows.rule` alone, for one tile of
queries against all keys at a time, so the plan is exact for any queries and keys; only how rows are put together into
tiles is a guess at what is fast: rows whose clean prefixes are about as long, which in training are those of the same
places in both halves (TiDAR, arXiv 2511.08923, section 3.1), and not across documents where that is much in vain.

Shape suffixes: B sequences, T rows, R query rows of a tile, L keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tidar_mega.rows import Rows, rule

CHUNK = 64  # most query rows of a tile; about S * CHUNK pairs are computed in vain, smaller tiles cost more calls
STEP = 16  # tiles are cut at multiples of it: oneDNN compiles a kernel for each size of tile it meets
CALL, COPY = 8192, 32  # cost of a tile, and of each key that it loads, in (query, key) pairs
GAP = 16  # unseen keys that are taken along (and masked) so as to keep two ranges of keys in one piece

WIDTH_STEP = 32  # numbers of keys are multiples of it, for the same reason as STEP

Range = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Query rows `start..stop-1` of the structure's row order against the keys of `keys`, in that order."""

    start: int
    stop: int
    keys: tuple[Range, ...]  # ranges of the key rows' own numbering
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
    keys: int  # K, the number of keys; T where the rows look at one another

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
        """bool [T, K]: the mask that the tiles apply, put together again (for tests and drawings)."""
        seen_TK = torch.zeros(len(self.row_order), self.keys, dtype=torch.bool)
        for tile in self.tiles:
            columns = torch.cat([torch.arange(a, b) for a, b in tile.keys])
            tile_RL = torch.ones(tile.rows, tile.width, dtype=torch.bool)
            if tile.bias_LR is not None:
                tile_RL[:, tile.free :] = tile.bias_LR.T == 0
            if tile.sees_R is not None:
                tile_RL &= tile.sees_R[:, None] > 0
            seen_TK[self.row_order[tile.start : tile.stop, None], columns] = tile_RL
        return seen_TK


def make_plan(queries: Rows, keys: Rows | None = None, chunk: int = CHUNK) -> tuple[Structure, ...]:
    """One `Structure` for each different structure in the batch (one alone where documents are not packed).

    `keys` are what the queries may look at, in their own numbering; without them, the queries look at one another."""
    keys = queries if keys is None else keys
    fields = [_fields(queries, "document", "order", "horizon", "group"), _fields(keys, "document", "order", "group")]
    together = torch.cat([x_BFT.flatten(1) for x_BFT in fields], dim=1)
    _, which = torch.unique(together, dim=0, return_inverse=True)
    structures = []
    for i in range(int(which.max()) + 1):
        sequences = (which == i).nonzero().squeeze(1)
        queries_4T, keys_3K = (x_BFT[sequences[0]] for x_BFT in fields)
        structures.append(_structure(queries_4T, keys_3K, sequences, queries.causal_in_group, chunk))
    return tuple(structures)


def _fields(rows: Rows, *names: str) -> Tensor:
    return torch.stack([getattr(rows, name).cpu() for name in names], dim=1)


def _structure(queries_4T: Tensor, keys_3K: Tensor, sequences: Tensor, causal_in_group: bool, chunk: int) -> Structure:
    # numpy: many small steps, no threads to wake
    queries_4T, keys_3K = (x.to(torch.int32).numpy() for x in (queries_4T, keys_3K))
    tiles, row_order, start, before, shared = [], [], 0, (), {}
    for r, sees_RK in _groups(queries_4T, keys_3K, causal_in_group, chunk):
        keys, free = _key_ranges(sees_RK)
        row_order.append(r)
        if keys:  # a tile whose rows see nothing needs no work: its output stays zero
            bias, sees = _bias(sees_RK, keys, free, shared)
            width = sum(b - a for a, b in keys)
            kept = _common(before, keys)
            tiles.append(Tile(start, start + len(r), keys, width, kept, free, bias, sees))
            before = keys
        start += len(r)
    row_order_T = torch.from_numpy(np.concatenate(row_order))
    return Structure(sequences, row_order_T, tuple(tiles), keys_3K.shape[1])


def _groups(queries_4T: np.ndarray, keys_3K: np.ndarray, causal_in_group: bool, chunk: int):
    """Every query row once: the rows of each tile, int64 [R], and which keys they see, bool [R, K]."""
    document_T, _, horizon_T, _ = queries_4T
    last = np.iinfo(np.int32).max  # padding comes last
    sorted_T = np.lexsort((horizon_T, np.where(document_T < 0, last, document_T)))
    for i in range(0, len(sorted_T), chunk):
        r = sorted_T[i : i + chunk]
        sees_RK = rule(*queries_4T[:, r, None], *keys_3K, causal_in_group)
        cuts = _cuts(sees_RK)
        for a, b in zip(cuts, cuts[1:], strict=False):
            runs = a + r[a:b].argsort()  # neighbours in memory stay neighbours
            yield r[runs], sees_RK[runs]


def _cuts(sees_RK: np.ndarray) -> list[int]:
    """Where to cut rows into tiles, at the lowest cost: rows times the keys that any of them sees, and overheads."""
    edges = [*range(0, len(sees_RK), STEP), len(sees_RK)]
    seen_NK = [sees_RK[a:b].any(axis=0) for a, b in zip(edges, edges[1:], strict=False)]
    best: list[tuple[int, list[int]]] = [(0, [0])]  # for the rows before each edge: cost and cuts
    for end in range(1, len(edges)):
        seen_K, found = np.zeros_like(seen_NK[0]), []
        for begin in reversed(range(end)):
            seen_K |= seen_NK[begin]
            tile = CALL + (edges[end] - edges[begin] + COPY) * int(np.count_nonzero(seen_K))
            found.append((best[begin][0] + tile, [*best[begin][1], edges[end]]))
        best.append(min(found))
    return best[-1][1]


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
