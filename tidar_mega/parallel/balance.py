"""Which rank of a context-parallel group takes which rows, so that all have the same attention work.

The work of a row is the number of keys that it sees under the true mask. Every rank takes the same number of clean
rows, in tiles of neighbouring rows, and whole groups of mask rows (a group's rows see each other, and their keys never
travel). In three steps:

1. tiles of clean rows, each weighed with the mask groups of the same places: the heaviest first, to the least loaded
   rank that still lacks clean rows (LPT; Graham 1969). Without packing this is the zig-zag of ring attention;
2. mask groups stay with their tile while the rank has room; the others go to the least loaded rank with room;
3. the most and the least loaded rank swap two mask groups of equal size, as long as that helps.

Large tiles are the fastest to attend with; where they come out uneven, the steps are done again with smaller ones.

Room: with `slots` >= ceil(M / ranks) + block - 1 for M mask rows in groups of at most `block`, step 2 always finds a
rank. If none had room for a group, each would hold more than slots - block rows, so at least ceil(M / ranks), and all M
rows would be placed already.

Pure numpy: `plan/` uses it too. Shape suffixes: T rows of one sequence (S clean rows, then M mask rows), N tiles of
clean rows, U groups ("units") of mask rows, R ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

TILES = (128, 64, 32, 16, 8)  # most clean rows of a tile, in the order of trying; 128 is FlexAttention's block
EVEN = 1.01  # largest load / mean that does not ask for smaller tiles
DONE = 1.0005  # swaps end here
SWAPS = 8  # most swaps, for each rank

PADDING = -1  # the document of a padding row
NOBODY = -1  # the rank of the padding among the mask rows, which nobody has to hold


@dataclass(frozen=True)
class Units:
    """The groups of mask rows of one sequence, by document and group; padding is in none.

    of_M     int64 [M], the unit of each mask row, NOBODY for padding
    size_U   int64 [U], rows
    work_U   int64 [U], visible pairs (were all rows of a group to see each other)
    place_U  int64 [U], the clean row at the place of the unit's first row
    """

    of_M: ndarray
    size_U: ndarray
    work_U: ndarray
    place_U: ndarray


def mask_slots(clean: int, masks: int, ranks: int, block: int, multiple: int = 1) -> int:
    """Mask rows of every rank, padding included, for `clean` clean and `masks` mask rows in groups of up to `block`.

    Rounded up so that a rank's rows, clean / ranks + slots, are a multiple of `multiple` (sequence parallel).
    """
    slots = -(-masks // ranks) + block - 1 if masks else 0
    return slots + -(clean // ranks + slots) % multiple


def assign(
    document_T: ndarray, position_T: ndarray, horizon_T: ndarray, group_T: ndarray, clean: int, ranks: int, slots: int
) -> ndarray:
    """The rank of each row of one sequence, int64 [T]; NOBODY for padding among the mask rows.

    The fields are those of `rows.Rows`; the first `clean` rows are the clean ones, a multiple of `ranks`. Each rank
    gets clean / ranks clean rows and at most `slots` mask rows (see `mask_slots`).
    """
    assert clean % ranks == 0, f"{clean} clean rows cannot be dealt evenly to {ranks} ranks"
    units = find_units(document_T, position_T, horizon_T, group_T, clean)
    for tile in tile_sizes(clean // ranks):
        tile_U = units.place_U // tile
        work_N = horizon_T[:clean].reshape(-1, tile).sum(axis=1)
        rank_N = _deal_tiles(work_N + _total(tile_U, units.work_U, len(work_N)), ranks)
        load_R = _total(rank_N, work_N, ranks)
        rank_U = _deal_units(units, rank_N[tile_U], load_R, slots)
        _swap(units, rank_U, load_R)
        if load_R.max() <= EVEN * load_R.mean():
            break
    return np.concatenate([np.repeat(rank_N, tile), np.append(rank_U, NOBODY)[units.of_M]])


def tile_sizes(rows: int) -> list[int]:
    """Sizes of tiles to try for a rank with `rows` clean rows, largest first; all are divisors of `rows`."""
    sizes = [next(size for size in range(min(most, rows), 0, -1) if rows % size == 0) for most in TILES]
    return sorted(set(sizes), reverse=True)


def find_units(document_T: ndarray, position_T: ndarray, horizon_T: ndarray, group_T: ndarray, clean: int) -> Units:
    document_M = document_T[clean:]
    real = np.flatnonzero(document_M != PADDING)
    key_M = document_M * (group_T.max() + 1) + group_T[clean:]
    _, first_U, unit, size_U = np.unique(key_M[real], return_index=True, return_inverse=True, return_counts=True)
    first_U = real[first_U]
    of_M = np.full(len(document_M), NOBODY)
    of_M[real] = unit
    # the clean row at the place of a mask row has the same document and position
    place_T = document_T * (position_T.max() + 1) + position_T
    sorter = place_T[:clean].argsort(kind="stable")
    at_U = np.searchsorted(place_T[:clean], place_T[clean:][first_U], sorter=sorter).clip(max=clean - 1)
    return Units(of_M, size_U, size_U * (horizon_T[clean:][first_U] + size_U), sorter[at_U])


def _total(index: ndarray, value: ndarray, length: int) -> ndarray:
    return np.bincount(index, value, minlength=length).astype(np.int64)


def _deal_tiles(work_N: ndarray, ranks: int) -> ndarray:
    """The rank of each tile, equally many for each: the heaviest first, to the least loaded that lacks tiles."""
    rank_N = np.empty(len(work_N), dtype=np.int64)
    most = len(work_N) // ranks
    heap = [(0, rank, 0) for rank in range(ranks)]
    for n, work in sorted(enumerate(work_N.tolist()), key=lambda tile: -tile[1]):
        load, rank, held = heapq.heappop(heap)
        rank_N[n] = rank
        if held + 1 < most:
            heapq.heappush(heap, (load + work, rank, held + 1))
    return rank_N


def _deal_units(units: Units, home_U: ndarray, load_R: ndarray, slots: int) -> ndarray:
    """The rank of each unit: its home, unless that has no room. Adds the work of the units to `load_R`."""
    ranks, rank_U = len(load_R), home_U.copy()
    for rank in np.flatnonzero(_total(home_U, units.size_U, ranks) > slots):
        here = np.flatnonzero(home_U == rank)
        here = here[units.work_U[here].argsort(kind="stable")]  # the lightest leave: that changes the loads least
        stays = units.size_U[here][::-1].cumsum()[::-1] <= slots
        rank_U[here[~stays]] = NOBODY
    placed = rank_U != NOBODY
    load_R += _total(rank_U[placed], units.work_U[placed], ranks)
    held_R = _total(rank_U[placed], units.size_U[placed], ranks)
    for u in sorted(np.flatnonzero(~placed), key=lambda u: -units.work_U[u]):
        has_room_R = held_R + units.size_U[u] <= slots
        assert has_room_R.any(), f"a group of {units.size_U[u]} mask rows is larger than a block"
        rank = rank_U[u] = np.where(has_room_R, load_R, np.iinfo(np.int64).max).argmin()
        load_R[rank] += units.work_U[u]
        held_R[rank] += units.size_U[u]
    return rank_U


def _swap(units: Units, rank_U: ndarray, load_R: ndarray) -> None:
    """Evens out `load_R` by swaps of whole blocks between the most and the least loaded rank; changes its arguments."""
    whole = np.flatnonzero(units.size_U == units.size_U.max(initial=0))
    whole = whole[units.work_U[whole].argsort(kind="stable")]
    work = units.work_U[whole]
    for _ in range(SWAPS * len(load_R)):
        high, low = load_R.argmax(), load_R.argmin()
        gap = load_R[high] - load_R[low]
        gives, takes = (np.flatnonzero(rank_U[whole] == rank) for rank in (high, low))
        if load_R[high] <= DONE * load_R.mean() or not len(gives) or not len(takes):
            return
        # for each unit that `high` may give, the one of `low` that comes nearest to closing the gap
        nearest = takes[np.searchsorted(work[takes], work[gives] - gap // 2).clip(max=len(takes) - 1)]
        moved = work[gives] - work[nearest]
        best = abs(2 * moved - gap).argmin()
        if not 0 < moved[best] < gap:
            return
        rank_U[whole[gives[best]]], rank_U[whole[nearest[best]]] = low, high
        load_R[high] -= moved[best]
        load_R[low] += moved[best]


def imbalance(lengths: Sequence[int], block: int, ranks: int, fraction: float = 1.0) -> float:
    """Most visible pairs of a rank over the mean, for one sequence packed with documents of these lengths.

    `block` is the draft length, `fraction` the share of blocks that are drafted (0: autoregressive training). The sum
    of the lengths must be a multiple of `ranks`.
    """
    order_S = np.concatenate([np.arange(n) for n in lengths])
    document_S = np.repeat(np.arange(len(lengths)), lengths)
    first_S = order_S // block * block
    group_S = np.append(1, 1 + (np.diff(document_S * len(order_S) + first_S) != 0).cumsum())
    drafted = np.flatnonzero((np.random.default_rng(0).random(group_S[-1] + 1) < fraction)[group_S])
    document, order = (np.append(x_S, x_S[drafted]) for x_S in (document_S, order_S))
    horizon, group = np.append(order_S + 1, first_S[drafted]), np.append(0 * group_S, group_S[drafted])
    clean = len(order_S)
    slots = mask_slots(clean, len(drafted), ranks, block)
    rank_T = assign(document, order, horizon, group, clean, ranks, slots)
    work_T = horizon + np.append(0, np.bincount(group)[1:])[group]
    load_R = _total(rank_T, work_T, ranks)
    return float(load_R.max() / load_R.mean())
