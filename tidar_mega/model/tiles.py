"""The `tiles` attention backend: exact attention on a CPU that skips the work which the visibility rule forbids.

The plan (`tile_plan.py`) says which keys each small group of query rows meets. Two algorithms go by it, because no
single one is fast for every type on every processor (`choose_algorithm`):

    flash      `flash_tiles.py`: torch's flash kernel on bands of tiles, merged by log-sum-exp. float32, float64, and
               bfloat16 worked on in float32
    products   here: a few plain matrix products for each tile; for bfloat16 where the processor multiplies in it

Products. A tile has all query heads of a key head folded into rows. A row meets all its keys inside one tile, so
nothing has to be merged; q, k, v, the output and the log-sum-exp of each row are kept for the backward, which makes the
probabilities again (FlashAttention-2, arXiv 2307.08691, section 3). The three products whose rounding would show in the
result (scores, output, gradient of the probabilities) run in float32 on the bfloat16 operands; the other three (dq, dk,
dv, from probabilities rounded to bfloat16 as flash kernels do) run in bfloat16 and are added up in float32.

Shape suffixes: T query rows, K keys, B sequences, H query heads, G key heads (groups), F query heads of one key head,
E head width, N (sequence, key head) pairs worked on together, R query rows of a tile, Q = R * F, L keys of a tile; 16
is a bfloat16 copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tidar_mega.model.flash_tiles import FlashTiles
from tidar_mega.model.tile_plan import Structure, Tile

SCRATCH = 1 << 20  # scores that are worked on together: more would leave the caches, fewer would cost more calls
LOG2_E = math.log2(math.e)  # torch has a much faster exp2 than exp on CPU, so scores are kept in base 2


def tiled_attention(
    q_TBHE: Tensor,
    k_KBGE: Tensor,
    v_KBGE: Tensor,
    scale: float,
    plan: tuple[Structure, ...],
    algorithm: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v with the mask of `plan`; returns [T, B, H, E]. Rows that see nothing give 0.

    `algorithm` is "flash", "products" (bfloat16 only) or, None, what is fast here."""
    name = algorithm or choose_algorithm(q_TBHE.dtype)
    return {"flash": FlashTiles, "products": ProductTiles}[name].apply(q_TBHE, k_KBGE, v_KBGE, scale, plan)


def choose_algorithm(dtype: torch.dtype) -> str:
    """The fast algorithm for a type on this processor."""
    return "products" if dtype == torch.bfloat16 and has_bfloat16_units() else "flash"


def has_bfloat16_units() -> bool:
    """Whether the processor multiplies in bfloat16 (x86; those with AMX can do it in AVX-512 too). With AVX-512 alone,
    which is all that `torch.ops.mkldnn._is_mkldnn_bf16_supported` asks for, oneDNN is slower in bfloat16 than in
    float32."""
    return torch.cpu._is_avx512_bf16_supported()


class ProductTiles(torch.autograd.Function):
    """`tiled_attention` of bfloat16."""

    @staticmethod
    def forward(ctx, q_TBHE: Tensor, k_KBGE: Tensor, v_KBGE: Tensor, scale: float, plan: tuple[Structure, ...]):
        assert q_TBHE.dtype == torch.bfloat16, f"the precision of products is made for bfloat16, not {q_TBHE.dtype}"
        out_TBHE = torch.empty(q_TBHE.shape, dtype=q_TBHE.dtype)
        lses = []
        with _exact_bfloat16_products():
            for structure in plan:
                q, k, v = _take(structure, (q_TBHE,), (k_KBGE, v_KBGE))
                out_TNFE = torch.zeros(q.shape, dtype=q.dtype)
                lse_NFT = torch.zeros(*q.shape[1:3], len(q), dtype=torch.float32)
                for n in _blocks(q, structure):
                    _forward(q[:, n], k[:, n], v[:, n], scale, structure, out_TNFE[:, n], lse_NFT[n])
                _put_queries(out_TBHE, out_TNFE, structure)
                lses.append(lse_NFT)
        ctx.save_for_backward(q_TBHE, k_KBGE, v_KBGE, out_TBHE, *lses)
        ctx.scale, ctx.plan = scale, plan
        return out_TBHE

    @staticmethod
    @once_differentiable
    def backward(ctx, g_TBHE: Tensor):
        q_TBHE, k_KBGE, v_KBGE, out_TBHE, *lses = ctx.saved_tensors
        dq_TBHE, dk_KBGE, dv_KBGE = (torch.empty(x.shape, dtype=x.dtype) for x in (q_TBHE, k_KBGE, v_KBGE))
        with _exact_bfloat16_products():
            for structure, lse_NFT in zip(ctx.plan, lses, strict=True):
                q, g, o, k, v = _take(structure, (q_TBHE, g_TBHE, out_TBHE), (k_KBGE, v_KBGE))
                dq_TNFE = torch.zeros(q.shape, dtype=q.dtype)
                dk_NKE, dv_NKE = (torch.zeros(x.transpose(0, 1).shape, dtype=torch.float32) for x in (k, v))
                for n in _blocks(q, structure):
                    inputs = (q[:, n], k[:, n], v[:, n], o[:, n], g[:, n], lse_NFT[n])
                    _backward(*inputs, ctx.scale, structure, dq_TNFE[:, n], dk_NKE[n], dv_NKE[n])
                _put_queries(dq_TBHE, dq_TNFE, structure)
                _put_keys(dk_KBGE, dk_NKE.mul_(ctx.scale), structure)
                _put_keys(dv_KBGE, dv_NKE, structure)
        return dq_TBHE, dk_KBGE, dv_KBGE, None, None


def _forward(
    q_TNFE: Tensor, k_KNE: Tensor, v_KNE: Tensor, scale: float, structure: Structure, out_TNFE: Tensor, lse_NFT: Tensor
) -> None:
    """Writes the output and the base-2 log-sum-exp of one block of pairs; query rows are in the order of the tiles."""
    _, N, F, E = q_TNFE.shape
    scores, queries = _Buffer(N * F * structure.area), _Buffer(N * F * E * structure.rows)
    keys, values = _Buffer(N * E * structure.width), _Buffer(N * E * structure.width)
    for tile in structure.tiles:
        rows, R, L = slice(tile.start, tile.stop), tile.rows, tile.width
        q_NQE = queries.load_queries(q_TNFE, rows)
        k_NLE, v_NLE = keys.load_keys(k_KNE, tile), values.load_keys(v_KNE, tile)
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
    k_KNE: Tensor,
    v_KNE: Tensor,
    o_TNFE: Tensor,
    g_TNFE: Tensor,
    lse_NFT: Tensor,
    scale: float,
    structure: Structure,
    dq_TNFE: Tensor,
    dk_NKE: Tensor,
    dv_NKE: Tensor,
) -> None:
    """Writes dq and adds to dk (still to be scaled) and dv, of one block of pairs.

    Keys are rows here: both products that add up over many queries then read their operands along memory."""
    _, N, F, E = q_TNFE.shape
    area, rows_size, keys_size = N * F * structure.area, N * F * E * structure.rows, N * E * structure.width
    weights, slopes, rounded = _Buffer(area), _Buffer(area), _Buffer(area, torch.bfloat16)
    queries, grads, outputs = (_Buffer(rows_size) for _ in range(3))
    queries16, grads16 = (_Buffer(rows_size, torch.bfloat16) for _ in range(2))
    keys, values, keys16 = _Buffer(keys_size), _Buffer(keys_size), _Buffer(keys_size, torch.bfloat16)
    for tile in structure.tiles:
        rows, R, L = slice(tile.start, tile.stop), tile.rows, tile.width
        k_NLE, v_NLE = keys.load_keys(k_KNE, tile), values.load_keys(v_KNE, tile)
        q_NQE, g_NQE = queries.load_queries(q_TNFE, rows), grads.load_queries(g_TNFE, rows)
        delta_NQ = outputs.load_queries(o_TNFE, rows).mul_(g_NQE).sum(-1)
        q16_NQE, g16_NQE = queries16.load_queries(q_TNFE, rows), grads16.load_queries(g_TNFE, rows)
        k16_NLE = keys16.load_keys(k_KNE, tile)

        p_NLQ = weights.view(N, L, F * R)
        torch.baddbmm(p_NLQ, k_NLE, q_NQE.transpose(1, 2), beta=0, alpha=scale * LOG2_E, out=p_NLQ)
        p_NLQ.sub_(lse_NFT[:, :, rows].reshape(N, 1, -1))
        if tile.bias_LR is not None:
            p_NLQ.view(N, L, F, R)[:, tile.free :] += tile.bias_LR[:, None]
        p_NLQ.exp2_()
        if tile.sees_R is not None:
            p_NLQ.view(N, L, F, R).mul_(tile.sees_R)
        p16_NLQ = rounded.view(N, L, F * R).copy_(p_NLQ)
        _add_keys(dv_NKE, torch.bmm(p16_NLQ, g16_NQE), tile)

        ds_NLQ = torch.bmm(v_NLE, g_NQE.transpose(1, 2), out=slopes.view(N, L, F * R))
        ds_NLQ.sub_(delta_NQ[:, None]).mul_(p_NLQ)
        ds16_NLQ = rounded.view(N, L, F * R).copy_(ds_NLQ)
        _add_keys(dk_NKE, torch.bmm(ds16_NLQ, q16_NQE), tile)
        dq_NQE = torch.bmm(ds16_NLQ.transpose(1, 2), k16_NLE).mul_(scale)
        dq_TNFE[rows].copy_(dq_NQE.view(N, F, R, E).permute(2, 0, 1, 3))


def _add_keys(sum_NKE: Tensor, part_NLE: Tensor, tile: Tile) -> None:
    at = 0
    for a, b in tile.keys:
        sum_NKE[:, a:b] += part_NLE[:, at : at + b - a]
        at += b - a


class _Buffer:
    """Memory that all tiles of a block use in turn: fresh memory for each product would cost more than its softmax."""

    def __init__(self, elements: int, dtype: torch.dtype = torch.float32):
        self.memory = torch.empty(elements, dtype=dtype)

    def view(self, *shape: int) -> Tensor:
        return self.memory[: math.prod(shape)].view(shape)

    def load_queries(self, source_TNFE: Tensor, rows: slice) -> Tensor:
        """A tile's query rows with their heads folded in, [N, Q, E]."""
        R, N, F, E = source_TNFE[rows].shape
        return self.view(N, F, R, E).copy_(source_TNFE[rows].permute(1, 2, 0, 3)).view(N, F * R, E)

    def load_keys(self, source_KNE: Tensor, tile: Tile) -> Tensor:
        """The tile's keys one after the other, [N, L, E]; of a single pair, those of the tile before stay in place."""
        _, N, E = source_KNE.shape
        keys_NLE = self.view(N, tile.width, E)
        at, kept = 0, tile.kept if N == 1 else 0
        for a, b in tile.keys:
            skip = min(max(kept - at, 0), b - a)
            if skip < b - a:
                keys_NLE[:, at + skip : at + b - a].copy_(source_KNE[a + skip : b].transpose(0, 1))
            at += b - a
        return keys_NLE


@contextmanager
def _exact_bfloat16_products() -> Iterator[None]:
    """Lets the float32 products of bfloat16 operands go to oneDNN, which is faster than MKL on some processors and may
    multiply in bfloat16 where there are units for it. The setting is of the whole process, so it is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _blocks(q_TNFE: Tensor, structure: Structure) -> list[slice]:
    """Pairs that are worked on together, so that one tile's scores are about `SCRATCH` many."""
    _, pairs, F, _ = q_TNFE.shape
    size = max(1, SCRATCH // max(1, F * structure.area))
    return [slice(i, i + size) for i in range(0, pairs, size)]


def _take(structure: Structure, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Tensor]:
    """The structure's sequences of [T, B, H, E] tensors: queries in tile order as [T, N, F, E], keys as [K, N, E]."""
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


def _put_keys(whole_KBGE: Tensor, part_NKE: Tensor, structure: Structure) -> None:
    """Puts an accumulated gradient of keys or values back to its sequences, in their type."""
    part_KBGE = part_NKE.unflatten(0, (len(structure.sequences), -1)).permute(2, 0, 1, 3)
    if part_KBGE.shape[1] == whole_KBGE.shape[1]:
        whole_KBGE.copy_(part_KBGE)
    else:
        whole_KBGE[:, structure.sequences] = part_KBGE.to(whole_KBGE.dtype)
