"""The tiles of the `tiles` backend by torch's flash kernel for CPUs, whose pieces are merged by their log-sum-exp.

Neighbouring tiles that begin with the same keys form a *band*. All rows of a band meet the keys that all of them see
in one call without a mask; each tile meets its other keys in a call with its mask. The pieces of a row are averaged
with the weights exp(log-sum-exp of the piece - log-sum-exp of all). The backward needs no such weights: given the
merged output and the merged log-sum-exp, the kernel makes each piece's share of the true probabilities again, and the
gradients of the pairs add up (FlashAttention-2, arXiv 2307.08691, section 3.1: P = exp(S - LSE), D = rowsum(dO * O)).

Precision. float32 and float64: the input's type. Narrower types are worked on in float32, which on a processor without
units for them is also faster than the kernel in that type; only the output that the backward reads is rounded.

Shape suffixes: T query rows, K keys, B sequences, H query heads, G key heads (the kernel takes fewer of them), E head
width, R query rows of a band or of a tile, L keys of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tidar_mega.model.tile_plan import Range, Structure, Tile

BAND = 768  # query rows of a band: from here on the kernel works on blocks of 256, which spares the caches most
SLACK = 384  # free keys by which the tiles of a band may differ; what is not common goes through a tile's mask
FEW = 32  # free keys that are not worth a call of their own
MASKS = 32  # masks that are kept for the next tiles: one document needs a few, and packed documents share hardly any

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashTiles(torch.autograd.Function):
    """`tiled_attention` of `tiles.py`."""

    @staticmethod
    def forward(ctx, q_TBHE: Tensor, k_KBGE: Tensor, v_KBGE: Tensor, scale: float, plan: tuple[Structure, ...]):
        parts = []
        for structure in plan:
            q, k, v = (_sequences(x, structure) for x in (q_TBHE, k_KBGE, v_KBGE))
            parts.append(_forward(q, _for_kernel(k), _for_kernel(v), scale, structure))
        outs, lses = zip(*parts, strict=True)
        out_TBHE = _join(outs, plan)
        ctx.save_for_backward(q_TBHE, k_KBGE, v_KBGE, out_TBHE, *lses)
        ctx.scale, ctx.plan = scale, plan
        return out_TBHE

    @staticmethod
    @once_differentiable
    def backward(ctx, g_TBHE: Tensor):
        q_TBHE, k_KBGE, v_KBGE, out_TBHE, *lses = ctx.saved_tensors
        parts = []
        for structure, lse_BHT in zip(ctx.plan, lses, strict=True):
            q, k, v, o, g = (_sequences(x, structure) for x in (q_TBHE, k_KBGE, v_KBGE, out_TBHE, g_TBHE))
            parts.append(_backward(q, _for_kernel(k), _for_kernel(v), o, g, lse_BHT, ctx.scale, structure))
        dq_TBHE, dk_KBGE, dv_KBGE = (_join(x, ctx.plan).to(q_TBHE.dtype) for x in zip(*parts, strict=True))
        return dq_TBHE, dk_KBGE, dv_KBGE, None, None


def _forward(
    q_TBHE: Tensor, k_KBGE: Tensor, v_KBGE: Tensor, scale: float, structure: Structure
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row in the order of the tiles, [B, H, T]."""
    out_TBHE = _result_rows(q_TBHE, structure)
    lse_BHT = k_KBGE.new_zeros(*q_TBHE.shape[1:3], len(q_TBHE))
    for rows, pieces, sees_R in _bands(structure, k_KBGE.dtype):
        place_R = structure.row_order[rows]
        q_BHRE = _take(q_TBHE, place_R)
        out_BHRE = lse_BHR = None
        for piece in pieces:
            q, k, v = q_BHRE[:, :, piece.rows], piece.of(k_KBGE), piece.of(v_KBGE)
            part_BHRE, part_BHR = _flash(q, k, v, attn_mask=piece.bias_RL, scale=scale)
            if out_BHRE is None:  # the first piece is one of all rows
                out_BHRE, lse_BHR = part_BHRE, part_BHR
            else:
                _merge(out_BHRE[:, :, piece.rows], lse_BHR[:, :, piece.rows], part_BHRE, part_BHR, piece.bias_RL)
        if sees_R is not None:
            out_BHRE.mul_(sees_R[:, None])
            lse_BHR.masked_fill_(sees_R == 0, float("inf"))  # probabilities of 0 in the backward
        out_TBHE.index_copy_(0, place_R, out_BHRE.permute(2, 0, 1, 3).to(out_TBHE.dtype))
        lse_BHT[:, :, rows] = lse_BHR
    return out_TBHE, lse_BHT


def _merge(out_BHRE: Tensor, lse_BHR: Tensor, part_BHRE: Tensor, part_BHR: Tensor, bias_RL: Tensor | None) -> None:
    """Takes another piece of the same rows in."""
    if bias_RL is not None:
        part_BHR.add_(bias_RL.amax(1))  # -inf for rows that see none of the piece's keys: the kernel says 0 for them
    both_BHR = torch.logaddexp(lse_BHR, part_BHR)
    out_BHRE.lerp_(part_BHRE, part_BHR.sub_(both_BHR).exp_()[..., None])
    lse_BHR.copy_(both_BHR)


def _backward(
    q_TBHE: Tensor,
    k_KBGE: Tensor,
    v_KBGE: Tensor,
    o_TBHE: Tensor,
    g_TBHE: Tensor,
    lse_BHT: Tensor,
    scale: float,
    structure: Structure,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq in the type of q; dk and dv as they were added up."""
    dq_TBHE = _result_rows(q_TBHE, structure)
    dk_KBGE, dv_KBGE = torch.zeros_like(k_KBGE), torch.zeros_like(v_KBGE)
    for rows, pieces, _ in _bands(structure, k_KBGE.dtype):
        place_R = structure.row_order[rows]
        q_BHRE, o_BHRE, g_BHRE = (_take(x_TBHE, place_R) for x_TBHE in (q_TBHE, o_TBHE, g_TBHE))
        lse_BHR, dq_BHRE = lse_BHT[:, :, rows], None
        for piece in pieces:
            g, q, o, lse = (x[:, :, piece.rows] for x in (g_BHRE, q_BHRE, o_BHRE, lse_BHR))
            k, v = piece.of(k_KBGE), piece.of(v_KBGE)
            dq, dk, dv = _flash_backward(g, q, k, v, o, lse, 0.0, False, attn_mask=piece.bias_RL, scale=scale)
            if dq_BHRE is None:
                dq_BHRE = dq
            else:
                dq_BHRE[:, :, piece.rows] += dq
            piece.add_to(dk_KBGE, dk)
            piece.add_to(dv_KBGE, dv)
        dq_TBHE.index_copy_(0, place_R, dq_BHRE.permute(2, 0, 1, 3).to(dq_TBHE.dtype))
    return dq_TBHE, dk_KBGE, dv_KBGE


@dataclass(frozen=True)
class Piece:
    """One call of the kernel: some rows of a band against some keys."""

    rows: slice  # of the band
    keys: tuple[Range, ...]
    bias_RL: Tensor | None  # 0 or -inf; None if every row sees every key

    def of(self, x_KBGE: Tensor) -> Tensor:
        """The piece's keys or values, [B, G, L, E]."""
        parts = [x_KBGE[a:b] for a, b in self.keys]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(1, 2, 0, 3)

    def add_to(self, sum_KBGE: Tensor, part_BGLE: Tensor) -> None:
        at = 0
        for a, b in self.keys:
            sum_KBGE[a:b] += part_BGLE[:, :, at : at + b - a].permute(2, 0, 1, 3)
            at += b - a


def _bands(structure: Structure, dtype: torch.dtype) -> Iterator[tuple[slice, list[Piece], Tensor | None]]:
    """For each band: its rows in `row_order`, its pieces, of which the first has all rows, and the tile's `sees_R`.

    Rows that see nothing are in a tile without free keys, which is a band of its own."""
    biases: dict[tuple[int, int], Tensor] = {}  # equal ones are made once, as in the plan
    for band in _neighbours(structure.tiles):
        start, first = band[0].start, band[0].keys[0][0]
        common = min(t.free for t in band)
        common = common if common >= FEW else 0
        pieces = [Piece(slice(0, band[-1].stop - start), ((first, first + common),), None)] if common else []
        for tile in band:
            keys = ((first + common, tile.keys[0][1]), *tile.keys[1:])
            keys = tuple((a, b) for a, b in keys if a < b)
            if keys:
                bias_RL = _bias(tile, tile.free - common, dtype, biases)
                pieces.append(Piece(slice(tile.start - start, tile.stop - start), keys, bias_RL))
        yield slice(start, band[-1].stop), pieces, band[0].sees_R


def _neighbours(tiles: tuple[Tile, ...]) -> list[list[Tile]]:
    """The tiles of each band."""
    bands: list[list[Tile]] = []
    for tile in tiles:
        if bands and _belongs(tile, bands[-1]):
            bands[-1].append(tile)
        else:
            bands.append([tile])
    return bands


def _belongs(tile: Tile, band: list[Tile]) -> bool:
    frees = [t.free for t in (*band, tile)]
    return (
        tile.start == band[-1].stop
        and tile.start - band[0].start < BAND
        and tile.keys[0][0] == band[0].keys[0][0]
        and min(frees) >= FEW
        and max(frees) - min(frees) <= SLACK
    )


def _bias(tile: Tile, more: int, dtype: torch.dtype, biases: dict) -> Tensor | None:
    """The additive mask [R, L] of a tile's keys: the last `more` of the free ones and all that are not free."""
    if tile.bias_LR is None:
        return None
    key = (id(tile.bias_LR), more)
    if len(biases) > MASKS:
        biases.clear()
    if key not in biases:
        biases[key] = pad(tile.bias_LR.T.to(dtype), (more, 0)).contiguous()
    return biases[key]


def _result_rows(q_TBHE: Tensor, structure: Structure) -> Tensor:
    """Room for what the bands give for each row; 0 if there are rows in no tile."""
    make = torch.empty if sum(tile.rows for tile in structure.tiles) == len(q_TBHE) else torch.zeros
    return make(q_TBHE.shape, dtype=q_TBHE.dtype)


def _take(x_TBHE: Tensor, place_R: Tensor) -> Tensor:
    """The rows of a band as the kernel wants them, [B, H, R, E]."""
    return _for_kernel(x_TBHE.index_select(0, place_R)).permute(1, 2, 0, 3)


def _for_kernel(x: Tensor) -> Tensor:
    """In a type that the kernel is fast in, and with the head width along memory, as it takes for granted."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequences(x_TBHE: Tensor, structure: Structure) -> Tensor:
    """The structure's sequences of the batch."""
    return x_TBHE if len(structure.sequences) == x_TBHE.shape[1] else x_TBHE[:, structure.sequences]


def _join(parts: tuple[Tensor, ...], plan: tuple[Structure, ...]) -> Tensor:
    """A result from its parts, one for each structure."""
    if len(parts) == 1:
        return parts[0]
    sequences = torch.cat([structure.sequences for structure in plan])
    return torch.cat(parts, dim=1).index_select(1, sequences.argsort())
