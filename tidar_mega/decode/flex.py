"""The attention of `cache.py` for GPUs: the committed part by FlexAttention straight from the pages, without a mask
inside whole pages and without copying a key; the few rows of the forward itself by plain products; both merged by
log-sum-exp.

Requests of one plan are one batch. A page is a block of FlexAttention's kernel, and a request's page table is the list
of blocks that its rows visit.

Shape suffixes: N requests of one plan, t rows of each, H query heads, G key heads, E head width, S slots, W pages of
the longest request.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tidar_mega.decode.cache import PagedCache, Part

PAGE = 128  # slots of a page on a GPU: the block of FlexAttention's kernels
_QUERY_BLOCK = 128


class FlexPagedAttention:
    """The attention context of one forward, as `cache.PagedAttention`."""

    def __init__(self, cache: PagedCache, parts: Sequence[Part]) -> None:
        self.cache, device = cache, cache.device
        rows = [row for part in parts for row in part.rows[: part.clean]]
        slots = [slot for p in parts for run in p.slots.of(p.length, p.length + p.clean) for slot in run]
        self.clean_C, self.slot_C = (torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, slots))
        groups: dict[tuple[int, int], list[Part]] = {}
        for part in parts:
            groups.setdefault((len(part.rows), id(part.bias_tt)), []).append(part)
        self.batches = [_Batch(cache, group) for group in groups.values()]

    def attend(self, layer_number: int, q_T1HE: Tensor, k_T1GE: Tensor, v_T1GE: Tensor, scale: float) -> Tensor:
        """Stores the clean rows' keys and values; the attention's output [T, 1, H, E]."""
        k_GSE, v_GSE = self.cache.k[layer_number], self.cache.v[layer_number]
        q_THE, k_TGE, v_TGE = q_T1HE[:, 0], k_T1GE[:, 0], v_T1GE[:, 0]
        k_GSE.index_copy_(1, self.slot_C, k_TGE.index_select(0, self.clean_C).transpose(0, 1))
        v_GSE.index_copy_(1, self.slot_C, v_TGE.index_select(0, self.clean_C).transpose(0, 1))
        out_THE = torch.empty_like(q_THE)
        for batch in self.batches:
            q_NHtE, k_NGtE, v_NGtE = (x[batch.row_Nt].transpose(1, 2) for x in (q_THE, k_TGE, v_TGE))
            out_NHtE = batch.attend(q_NHtE, k_NGtE, v_NGtE, k_GSE, v_GSE, scale)
            out_THE[batch.row_Nt] = out_NHtE.transpose(1, 2)
        return out_THE[:, None]


class _Batch:
    """The requests of one plan: row_Nt int64, where their rows are among all."""

    def __init__(self, cache: PagedCache, parts: list[Part]) -> None:
        device = cache.device
        self.row_Nt = torch.tensor([list(part.rows) for part in parts], device=device)
        self.bias_tt = parts[0].bias_tt
        self.mask = _page_mask(cache, parts, self.row_Nt.shape[1])
        self.is_empty_N111 = torch.tensor([p.length == 0 for p in parts], device=device)[:, None, None, None]

    def attend(self, q_NHtE, k_NGtE, v_NGtE, k_GSE, v_GSE, scale: float) -> Tensor:
        new_NHtE, new_lse_NHt = self._new(q_NHtE, k_NGtE, v_NGtE, scale)
        if self.mask is None:
            return new_NHtE.to(q_NHtE.dtype)
        old_NHtE, aux = _flex(q_NHtE.is_cuda)(
            q_NHtE.contiguous(),
            k_GSE[None],
            v_GSE[None],
            block_mask=self.mask,
            scale=scale,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        # a request without committed rows has no block to visit, and nothing that was computed for it counts
        old_NHtE = old_NHtE.masked_fill(self.is_empty_N111, 0).to(new_NHtE.dtype)
        old_lse_NHt = aux.lse.to(new_lse_NHt.dtype).masked_fill(self.is_empty_N111[..., 0], -torch.inf)
        share_NHt1 = torch.sigmoid(old_lse_NHt - new_lse_NHt)[..., None]  # of the committed part
        return torch.lerp(new_NHtE, old_NHtE, share_NHt1).to(q_NHtE.dtype)

    def _new(self, q_NHtE: Tensor, k_NGtE: Tensor, v_NGtE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention among the rows of the forward, and its log-sum-exp, in float32 or better."""
        N, H, t, E = q_NHtE.shape
        G = k_NGtE.shape[1]
        wide = torch.promote_types(q_NHtE.dtype, torch.float32)
        q_NGQE = q_NHtE.reshape(N, G, H // G * t, E)
        score_NGFtt = (q_NGQE @ k_NGtE.transpose(2, 3)).to(wide).mul_(scale).view(N, G, H // G, t, t)
        if self.bias_tt is not None:
            score_NGFtt = score_NGFtt + self.bias_tt
        lse_NGFt = score_NGFtt.logsumexp(dim=-1)
        weight_NGQt = (score_NGFtt - lse_NGFt[..., None]).exp().to(v_NGtE.dtype).view(N, G, H // G * t, t)
        return (weight_NGQt @ v_NGtE).to(wide).view(N, H, t, E), lse_NGFt.view(N, H, t)


def _page_mask(cache: PagedCache, parts: list[Part], rows: int) -> BlockMask | None:
    """The pages that each request's rows visit: whole ones without looking, the last one up to its length.

    `mask_mod` says by itself what is visible; a GPU asks it only inside the last pages.
    """
    if not any(part.length for part in parts):
        return None
    page, device = cache.page, cache.device
    whole = [[slot // page for run in p.slots.of(0, p.length // page * page) for slot in run[::page]] for p in parts]
    last = [[p.slots.of(p.length - 1, p.length)[0].start // page] if p.length % page else [] for p in parts]
    width = max(1, max(map(len, whole)))
    length_N = torch.tensor([p.length for p in parts], device=device)
    logical_NP = torch.full((len(parts), cache.pages.count), -1, dtype=torch.int32, device=device)
    for n, pages in enumerate(zip(whole, last, strict=True)):
        own = torch.tensor([*pages[0], *pages[1]], dtype=torch.int64, device=device)
        logical_NP[n, own] = torch.arange(len(own), dtype=torch.int32, device=device)
    blocks = -(-rows // _QUERY_BLOCK)

    def counts(lists: list[list[int]]) -> Tensor:
        found = torch.tensor([len(x) for x in lists], dtype=torch.int32, device=device)
        return found[:, None, None].expand(-1, 1, blocks).contiguous()

    def indices(lists: list[list[int]], width: int) -> Tensor:
        found = torch.tensor([x + [0] * (width - len(x)) for x in lists], dtype=torch.int32, device=device)
        return found[:, None, None].expand(-1, 1, blocks, -1).contiguous()

    def mask_mod(b, h, q, slot):
        number = logical_NP[b, slot // page]
        return (number >= 0) & (number * page + slot % page < length_N[b])

    return BlockMask.from_kv_blocks(
        counts(last),
        indices(last, 1),
        counts(whole),
        indices(whole, width),
        BLOCK_SIZE=(_QUERY_BLOCK, page),
        mask_mod=mask_mod,
        seq_lengths=(rows, cache.pages.count * page),
        compute_q_blocks=False,
    )


@functools.cache
def _flex(compiled: bool):
    # the number of requests and of their pages changes from step to step
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
