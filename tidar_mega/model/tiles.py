"""The `tiles` attention backend: exact attention on a CPU that skips the work which the visibility rule forbids.

Each tile of the plan (`tile_plan.py`) is a few plain matrix products over all query heads of a key head folded into
rows. A row meets all its keys inside one tile, so nothing has to be merged; q, k, v, the output and the log-sum-exp of
each row are kept for the backward, which makes the probabilities again (FlashAttention-2, arXiv 2307.08691, section 3).

Precision. float32 and float64: everything in the input's type. bfloat16: the three products whose rounding would show
in the result (scores, output, gradient of the probabilities) run in float32 on the bfloat16 operands; the other three
(dq, dk, dv, from probabilities rounded to bfloat16 as flash kernels do) run in bfloat16 and are added up in float32.

Shape suffixes: T rows, B sequences, H query heads, G key heads (groups), F query heads of one key head, E head width,
N (sequence, key head) pairs worked on together, Q query rows of a tile times F, L keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_mega.model.tile_plan import Structure, Tile

SCRATCH = 1 << 20  # scores that are worked on together: more would leave the caches, fewer would cost more calls
LOG2_E = math.log2(math.e)  # torch has a much faster exp2 than exp on CPU, so scores are kept in base 2


def tiled_attention(
    q_TBHE: Tensor, k_TBGE: Tensor, v_TBGE: Tensor, scale: float, plan: tuple[Structure, ...]
) -> Tensor:
    """softmax(scale * q k^T + mask) v with the mask of `plan`; returns [T, B, H, E]. Rows that see nothing give 0."""
    return _TiledAttention.apply(q_TBHE, k_TBGE, v_TBGE, scale, plan)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TBHE: Tensor, k_TBGE: Tensor, v_TBGE: Tensor, scale: float, plan: tuple[Structure, ...]):
        out_TBHE = torch.empty(q_TBHE.shape, dtype=q_TBHE.dtype)
        lses = []
        with _exact_bfloat16_products(q_TBHE.dtype):
            for structure in plan:
                q, k, v = _take(structure, (q_TBHE,), (k_TBGE, v_TBGE))
                out_TNFE = torch.zeros(q.shape, dtype=q.dtype)
                lse_NFT = torch.zeros(*q.shape[1:3], len(q), dtype=_wide(q.dtype))
                for n in _blocks(q, structure):
                    _forward(q[:, n], k[:, n], v[:, n], scale, structure, out_TNFE[:, n], lse_NFT[n])
                _put_queries(out_TBHE, out_TNFE, structure)
                lses.append(lse_NFT)
        ctx.save_for_backward(q_TBHE, k_TBGE, v_TBGE, out_TBHE, *lses)
        ctx.scale, ctx.plan = scale, plan
        return out_TBHE

    @staticmethod
    @once_differentiable
    def backward(ctx, g_TBHE: Tensor):
        q_TBHE, k_TBGE, v_TBGE, out_TBHE, *lses = ctx.saved_tensors
        dq_TBHE, dk_TBGE, dv_TBGE = (torch.empty(x.shape, dtype=x.dtype) for x in (q_TBHE, k_TBGE, v_TBGE))
        with _exact_bfloat16_products(q_TBHE.dtype):
            for structure, lse_NFT in zip(ctx.plan, lses, strict=True):
                q, g, o, k, v = _take(structure, (q_TBHE, g_TBHE, out_TBHE), (k_TBGE, v_TBGE))
                dq_TNFE = torch.zeros(q.shape, dtype=q.dtype)
                dk_NTE, dv_NTE = (torch.zeros(x.transpose(0, 1).shape, dtype=_wide(x.dtype)) for x in (k, v))
                for n in _blocks(q, structure):
                    inputs = (q[:, n], k[:, n], v[:, n], o[:, n], g[:, n], lse_NFT[n])
                    _backward(*inputs, ctx.scale, structure, dq_TNFE[:, n], dk_NTE[n], dv_NTE[n])
                _put_queries(dq_TBHE, dq_TNFE, structure)
                _put_keys(dk_TBGE, dk_NTE.mul_(ctx.scale), structure)
                _put_keys(dv_TBGE, dv_NTE, structure)
        return dq_TBHE, dk_TBGE, dv_TBGE, None, None


def _forward(
    q_TNFE: Tensor, k_TNE: Tensor, v_TNE: Tensor, scale: float, structure: Structure, out_TNFE: Tensor, lse_NFT: Tensor
) -> None:
    """Writes the output and the base-2 log-sum-exp of one block of pairs; query rows are in the order of the tiles."""
    _, N, F, E = q_TNFE.shape
    wide = _wide(q_TNFE.dtype)
    scores, queries = _Buffer(N * F * structure.area, wide), _Buffer(N * F * E * structure.rows, wide)
    keys, values = _Buffer(N * E * structure.width, wide), _Buffer(N * E * structure.width, wide)
    for tile in structure.tiles:
        rows, R, L = slice(tile.start, tile.stop), tile.rows, tile.width
        q_NQE = queries.load_queries(q_TNFE, rows)
        k_NLE, v_NLE = keys.load_keys(k_TNE, tile), values.load_keys(v_TNE, tile)
        s_NQL = scores.view(N, F * R, L)
        torch.baddbmm(s_NQL, q_NQE, k_NLE.transpose(1, 2), beta=0, alpha=scale * LOG2_E, out=s_NQL)
        if tile.bias_LR is not None:
            s_NQL.view(N, F, R, L)[..., tile.free :] += tile.bias_LR.T
        top_NQ1 = s_NQL.amax(-1, keepdim=True)
        p_NQL = s_NQL.sub_(top_NQ1).exp2_()
        sum_NQ1 = p_NQL.sum(-1, keepdim=True)
        o_NFRE = torch.bmm(p_NQL, v_NLE).div_(sum_NQ1).view(N, F, R, E)
        if tile.sees_R is not None:
            o_NFRE.mul_(tile.sees_R[:, None])
        out_TNFE[rows].copy_(o_NFRE.permute(2, 0, 1, 3))
        lse_NFT[:, :, rows].copy_(sum_NQ1.log2_().add_(top_NQ1).view(N, F, R))


def _backward(
    q_TNFE: Tensor,
    k_TNE: Tensor,
    v_TNE: Tensor,
    o_TNFE: Tensor,
    g_TNFE: Tensor,
    lse_NFT: Tensor,
    scale: float,
    structure: Structure,
    dq_TNFE: Tensor,
    dk_NTE: Tensor,
    dv_NTE: Tensor,
) -> None:
    """Writes dq and adds to dk (still to be scaled) and dv, of one block of pairs.

    Keys are rows here: both products that add up over many queries then read their operands along memory."""
    _, N, F, E = q_TNFE.shape
    narrow, wide = q_TNFE.dtype, _wide(q_TNFE.dtype)
    area, rows_size, keys_size = N * F * structure.area, N * F * E * structure.rows, N * E * structure.width
    weights, slopes = _Buffer(area, wide), _Buffer(area, wide)
    queries, grads, outputs = (_Buffer(rows_size, wide) for _ in range(3))
    keys, values = _Buffer(keys_size, wide), _Buffer(keys_size, wide)
    if narrow != wide:
        rounded, keys16 = _Buffer(area, narrow), _Buffer(keys_size, narrow)
        queries16, grads16 = _Buffer(rows_size, narrow), _Buffer(rows_size, narrow)
    for tile in structure.tiles:
        rows, R, L = slice(tile.start, tile.stop), tile.rows, tile.width
        k_NLE, v_NLE = keys.load_keys(k_TNE, tile), values.load_keys(v_TNE, tile)
        q_NQE, g_NQE = queries.load_queries(q_TNFE, rows), grads.load_queries(g_TNFE, rows)
        delta_NQ = outputs.load_queries(o_TNFE, rows).mul_(g_NQE).sum(-1)
        q16, g16, k16 = q_NQE, g_NQE, k_NLE
        if narrow != wide:
            q16, g16 = queries16.load_queries(q_TNFE, rows), grads16.load_queries(g_TNFE, rows)
            k16 = keys16.load_keys(k_TNE, tile)

        p_NLQ = weights.view(N, L, F * R)
        torch.baddbmm(p_NLQ, k_NLE, q_NQE.transpose(1, 2), beta=0, alpha=scale * LOG2_E, out=p_NLQ)
        p_NLQ.sub_(lse_NFT[:, :, rows].reshape(N, 1, -1))
        if tile.bias_LR is not None:
            p_NLQ.view(N, L, F, R)[:, tile.free :] += tile.bias_LR[:, None]
        p_NLQ.exp2_()
        if tile.sees_R is not None:
            p_NLQ.view(N, L, F, R).mul_(tile.sees_R)
        p16 = p_NLQ if narrow == wide else rounded.view(N, L, F * R).copy_(p_NLQ)
        _add_keys(dv_NTE, torch.bmm(p16, g16), tile)

        ds_NLQ = torch.bmm(v_NLE, g_NQE.transpose(1, 2), out=slopes.view(N, L, F * R))
        ds_NLQ.sub_(delta_NQ[:, None]).mul_(p_NLQ)
        ds16 = ds_NLQ if narrow == wide else rounded.view(N, L, F * R).copy_(ds_NLQ)
        _add_keys(dk_NTE, torch.bmm(ds16, q16), tile)
        dq_NQE = torch.bmm(ds16.transpose(1, 2), k16).mul_(scale)
        dq_TNFE[rows].copy_(dq_NQE.view(N, F, R, E).permute(2, 0, 1, 3))


def _add_keys(sum_NTE: Tensor, part_NLE: Tensor, tile: Tile) -> None:
    at = 0
    for a, b in tile.keys:
        sum_NTE[:, a:b] += part_NLE[:, at : at + b - a]
        at += b - a


class _Buffer:
    """Memory that all tiles of a block use in turn: fresh memory for each product would cost more than its softmax."""

    def __init__(self, elements: int, dtype: torch.dtype):
        self.memory = torch.empty(elements, dtype=dtype)

    def view(self, *shape: int) -> Tensor:
        return self.memory[: math.prod(shape)].view(shape)

    def load_queries(self, source_TNFE: Tensor, rows: slice) -> Tensor:
        """A tile's query rows with their heads folded in, [N, Q, E]."""
        R, N, F, E = source_TNFE[rows].shape
        return self.view(N, F, R, E).copy_(source_TNFE[rows].permute(1, 2, 0, 3)).view(N, F * R, E)

    def load_keys(self, source_TNE: Tensor, tile: Tile) -> Tensor:
        """The tile's keys one after the other, [N, L, E]; of a single pair, those of the tile before stay in place."""
        _, N, E = source_TNE.shape
        keys_NLE = self.view(N, tile.width, E)
        at, kept = 0, tile.kept if N == 1 else 0
        for a, b in tile.keys:
            skip = min(max(kept - at, 0), b - a)
            if skip < b - a:
                keys_NLE[:, at + skip : at + b - a].copy_(source_TNE[a + skip : b].transpose(0, 1))
            at += b - a
        return keys_NLE


@contextmanager
def _exact_bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """For bfloat16 inputs: lets the float32 products go to oneDNN, which is faster than MKL on some processors and may
    multiply in bfloat16 where there are units for it. The setting is of the whole process, so it is put back."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(q_TNFE: Tensor, structure: Structure) -> list[slice]:
    """Pairs that are worked on together, so that one tile's scores are about `SCRATCH` many."""
    _, pairs, F, _ = q_TNFE.shape
    size = max(1, SCRATCH // max(1, F * structure.area))
    return [slice(i, i + size) for i in range(0, pairs, size)]


def _take(structure: Structure, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Tensor]:
    """The structure's sequences of [T, B, H, E] tensors: queries in tile order as [T, N, F, E], keys as [T, N, E]."""
    B, G = keys[0].shape[1:3]
    if len(structure.sequences) < B:
        queries, keys = ([x[:, structure.sequences] for x in xs] for xs in (queries, keys))
    sorted_queries = [x_TBHE.index_select(0, structure.row_order) for x_TBHE in queries]
    return [x.unflatten(2, (G, -1)).flatten(1, 2) for x in sorted_queries] + [x.flatten(1, 2) for x in keys]


def _put_queries(whole_TBHE: Tensor, part_TNFE: Tensor, structure: Structure) -> None:
    """Undoes `_take` for a result in the shape of the queries."""
    T, B, H, E = whole_TBHE.shape
    part_TBHE = part_TNFE.view(T, -1, H, E)
    if part_TBHE.shape[1] == B:
        torch.index_select(part_TBHE, 0, structure.place, out=whole_TBHE)
    else:
        whole_TBHE[:, structure.sequences] = part_TBHE.index_select(0, structure.place)


def _put_keys(whole_TBGE: Tensor, part_NTE: Tensor, structure: Structure) -> None:
    """Puts an accumulated gradient of keys or values back to its sequences, in their type."""
    part_TBGE = part_NTE.unflatten(0, (len(structure.sequences), -1)).permute(2, 0, 1, 3)
    if part_TBGE.shape[1] == whole_TBGE.shape[1]:
        whole_TBGE.copy_(part_TBGE)
    else:
        whole_TBGE[:, structure.sequences] = part_TBGE.to(whole_TBGE.dtype)
