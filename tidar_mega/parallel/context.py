"""Context parallelism: each rank of a group holds a part of every sequence's rows and attends for them alone.

A rank's queries look at clean keys of all ranks and at mask keys of their own group. Groups of mask rows live on one
rank, so only clean keys and values travel: half of what context parallelism over the doubled sequence would send. Which
rank holds what is computed by every rank alone, from the whole rows (`balance.py`), and may differ between sequences.

Shape suffixes: B sequences, T rows of the whole sequence (S clean rows, then mask rows), L rows of a rank (C clean
ones, then mask rows, then padding), K keys of a rank, R ranks, G key heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_mega.parallel.balance import assign, mask_slots
from tidar_mega.rows import PADDING, Rows, concatenate, move

EMPTY = -1  # the place of a padding row that fills a rank up


@dataclass(frozen=True)
class Part:
    """What one rank of a context group holds of the whole rows.

    rows    Rows [B, L]: clean rows and mask rows, both in the order of the whole rows, then padding
    keys    Rows [B, K], what they may look at: all S clean rows in order, then the mask rows (and padding) of `rows`
    places  int64 [R, B, L], the place of every rank's rows in the whole rows, EMPTY for padding
    clean   C, the number of clean rows of each rank (0 where `group` is None: nothing travels)
    group   the context group; None where one process holds everything, and then `keys` is `rows`
    """

    rows: Rows
    keys: Rows
    places: Tensor
    clean: int
    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def index(self) -> Tensor:
        """int64 [B, L]: the place of this rank's rows in the whole rows, EMPTY for padding."""
        return self.places[self.rank]

    @cached_property
    def clean_target(self) -> tuple[Tensor, Tensor]:
        """Indexes keys [K, B] in the order in which the ranks' clean rows are gathered: to [R, C, B]."""
        place_RCB = self.places[:, :, : self.clean].transpose(1, 2)
        return place_RCB, torch.arange(place_RCB.shape[2], device=place_RCB.device)

    @cached_property
    def clean_source(self) -> tuple[Tensor, Tensor]:
        """Indexes gathered clean rows [R * C, B] in the order of their places: to [S, B]."""
        place_RCB, sequence_B = self.clean_target
        return place_RCB.flatten(0, 1).argsort(dim=0), sequence_B

    def to(self, device: torch.device | str) -> Part:
        rows = self.rows.to(device)
        keys = rows if self.keys is self.rows else self.keys.to(device)
        if self.group is None:  # nobody asks for the places on the device
            return replace(self, rows=rows, keys=keys)
        return replace(self, rows=rows, keys=keys, places=move(self.places, device))


def whole(rows: Rows) -> Part:
    """All rows on one process."""
    places = torch.arange(rows.shape[1], device=rows.token.device).expand(1, *rows.shape)
    return Part(rows, rows, places, clean=0)


def split(rows: Rows, group: dist.ProcessGroup | None, block: int, multiple: int = 1) -> Part:
    """This rank's part of the whole rows, which all ranks of the group must hold alike. No communication.

    Args:
        rows: [B, T] on the CPU, the clean rows of every sequence in front and their number a multiple of the group's
            size; mask rows of one document and group are one unit of at most `block` rows.
        multiple: the number of rows of a part is a multiple of it.

    The number of rows of a part depends on nothing but T, S, the group's size, `block` and `multiple`: all ranks and
    all micro-batches of a run have parts of one shape. Padding among the mask rows of `rows` is left out.
    """
    if group is None or group.size() == 1:
        return whole(rows)
    ranks, clean = group.size(), int(rows.is_clean[0].sum())
    assert rows.is_clean[:, :clean].all() and not rows.is_clean[:, clean:].any(), "clean rows come first"
    slots = mask_slots(clean, rows.shape[1] - clean, ranks, block, multiple)
    places = deal(rows, clean, ranks, slots)
    mine = _take(rows, places[group.rank()])
    keys = concatenate([rows.slice(0, clean), mine.slice(clean // ranks, clean // ranks + slots)], dim=1)
    return Part(mine, keys, places, clean // ranks, group)


def split_copies(rows: Rows, group: dist.ProcessGroup | None, count: int, multiple: int = 1) -> Part:
    """As `split`, for rows that are S places `count` times (`methods/ssmd.py`, `methods/mtp.py`): the first S are
    dealt, and each rank computes the other rows of its places, too. `copies` takes the part apart again."""
    if group is None or group.size() == 1:
        return whole(rows)
    size = rows.shape[1] // count
    first = split(rows.slice(0, size), group, 1, multiple)
    parts = [first]
    for start in range(size, rows.shape[1], size):
        copy = rows.slice(start, start + size)
        mine = _take(copy, first.index)
        keys = concatenate([copy, mine.slice(first.clean, mine.shape[1])], dim=1)
        parts.append(Part(mine, keys, first.places.where(first.places == EMPTY, first.places + start), first.clean))
    return Part(
        concatenate([part.rows for part in parts], dim=1),
        concatenate([part.keys for part in parts], dim=1),
        torch.cat([part.places for part in parts], dim=2),
        first.clean,
        group,
    )


def copies(part: Part, count: int) -> list[Part]:
    """The parts of S places each that `split_copies` has put together; keys of all travel alike."""
    rows, keys = part.rows.shape[1] // count, part.keys.shape[1] // count
    size = rows if part.group is None else part.clean * part.group.size()
    parts = []
    for i in range(count):
        places = part.places[:, :, i * rows : (i + 1) * rows]
        own = part.rows.slice(i * rows, (i + 1) * rows)
        seen = own if part.group is None else part.keys.slice(i * keys, (i + 1) * keys)
        parts.append(Part(own, seen, places.where(places == EMPTY, places - i * size), part.clean, part.group))
    return parts


def deal(rows: Rows, clean: int, ranks: int, slots: int) -> Tensor:
    """The place of every rank's rows in the whole rows, int64 [R, B, clean / ranks + slots], EMPTY for padding."""
    places_RBL = np.full((ranks, rows.shape[0], clean // ranks + slots), EMPTY)
    fields = [x.numpy() for x in (rows.document, rows.position, rows.horizon, rows.group)]
    for b, fields_T in enumerate(zip(*fields, strict=True)):
        rank_T = assign(*fields_T, clean, ranks, slots)
        for rank in range(ranks):
            mine = np.flatnonzero(rank_T == rank)  # in order, so that runs of neighbours stay together
            places_RBL[rank, b, : len(mine)] = mine
    return torch.from_numpy(places_RBL)


def _take(rows: Rows, places_BL: Tensor) -> Rows:
    """The rows at these places; an EMPTY one becomes padding that sees nothing but other padding."""
    is_empty = places_BL == EMPTY
    taken = rows.take(places_BL.clamp(min=0)).map(lambda x_BL: x_BL.masked_fill(is_empty, 0))
    document = taken.document.masked_fill(is_empty, PADDING)
    group = taken.group.masked_fill(is_empty, int(rows.group.max()) + 1)
    return replace(taken, document=document, group=group)


def gather_keys(k_TBGE: Tensor, v_TBGE: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Keys and values of `part.keys`, [K, B, G, E] each, from those of `part.rows`, [L, B, G, E]; differentiable.

    Collective over the context group: one all-gather of the clean rows' keys and values. The backward sends each rank
    the gradients of its clean rows in their own type and adds them up in float32 in the order of the ranks, so that
    bfloat16 costs no more bytes than a reduce-scatter, is rounded once and not at every rank, and is repeatable.
    """
    if part.group is None:
        return k_TBGE, v_TBGE
    return _GatherClean.apply(part, k_TBGE, v_TBGE)


def gather_states(x_LBD: Tensor, part: Part) -> Tensor:
    """Hidden states of `part.keys`, [K, B, D], from those of `part.rows`; as `gather_keys`."""
    return x_LBD if part.group is None else _GatherClean.apply(part, x_LBD)[0]


class _GatherClean(torch.autograd.Function):
    """Of n tensors [L, B, ...] of a rank's rows those of its keys, [K, B, ...], in one exchange."""

    @staticmethod
    def forward(ctx, part: Part, *of_rows: Tensor) -> tuple[Tensor, ...]:
        ctx.part, C = part, part.clean
        mine_nCB = torch.stack([x_LB[:C] for x_LB in of_rows])
        all_RnCB = mine_nCB.new_empty(len(part.places), *mine_nCB.shape)
        dist.all_gather_into_tensor(all_RnCB.flatten(0, 1), mine_nCB, group=part.group)
        # into the order of places, in which a clean prefix is one range of keys
        clean_SB = (all_RnCB[:, i].flatten(0, 1)[part.clean_source] for i in range(len(of_rows)))
        return tuple(torch.cat([x_SB, x_LB[C:]]) for x_SB, x_LB in zip(clean_SB, of_rows, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *of_keys: Tensor) -> tuple[Tensor | None, ...]:
        part, S = ctx.part, ctx.part.clean * len(ctx.part.places)
        for_all_RnCB = torch.stack([dx_KB[part.clean_target] for dx_KB in of_keys], dim=1)
        from_all_RnCB = torch.empty_like(for_all_RnCB)
        dist.all_to_all_single(from_all_RnCB, for_all_RnCB, group=part.group)
        dtype = of_keys[0].dtype
        mine_nCB = from_all_RnCB.sum(dim=0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
        return None, *(torch.cat([mine_CB, dx_KB[S:]]) for mine_CB, dx_KB in zip(mine_nCB, of_keys, strict=True))


@torch.no_grad()
def restore(x_BL: Tensor, part: Part, total: int, fill: float = 0) -> Tensor:
    """Values of this rank's rows, [B, L] -> those of all `total` whole rows on every rank, [B, T]. Collective.

    `fill` stands where no rank holds the row: the whole rows' own padding among mask rows. No gradient flows.
    """
    if part.group is None:
        return x_BL
    all_RBL = x_BL.new_empty(len(part.places), *x_BL.shape)
    dist.all_gather_into_tensor(all_RBL.flatten(0, 1), x_BL.contiguous(), group=part.group)
    place_RBL = part.places.where(part.places != EMPTY, total)  # padding goes behind the end
    whole_BT = x_BL.new_full((x_BL.shape[0], total + 1), fill)
    whole_BT[torch.arange(x_BL.shape[0], device=x_BL.device)[:, None], place_RBL] = all_RBL
    return whole_BT[:, :total]
