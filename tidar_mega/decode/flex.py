"""The attention of `cache.py` for GPUs: the committed part by FlexAttention straight from the pages, without a mask
inside whole pages and without copying a key; the few rows of the forward itself by plain products; both merged by
log-sum-exp.

Requests of one plan are one batch. A page is a block of FlexAttention's kernel, and a request's page table is the list
of blocks that its rows visit.

Shape suffixes: T rows of the forward, N requests of one plan, t rows of each, C their clean rows, H query heads, G key
heads, E head width, S slots, P pages of the cache, W pages of the longest request.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tidar_mega.decode.cache import PagedCache, Part

PAGE = 128  # slots of a page on a GPU: the block of FlexAttention's kernels
_QUERY_BLOCK = 128


class FlexPagedAttention:
    """The attention context of one forward, as `cache.PagedAttention`."""

    def __init__(self, cache: PagedCache, batches: Sequence[Batch]) -> None:
        self.cache, self.batches = cache, batches
        self.all_clean = all(batch.all_clean for batch in batches)

    @classmethod
    def of(cls, cache: PagedCache, parts: Sequence[Part]) -> FlexPagedAttention:
        """For rows that lie request by request."""
        return cls(cache, [_batch(cache, list(group)) for _, group in itertools.groupby(parts, key=_shape)])

    def attend(self, layer_number: int, q_T1HE: Tensor, k_T1GE: Tensor, v_T1GE: Tensor, scale: float) -> Tensor:
        """Stores the clean rows' keys and values; the attention's output [T, 1, H, E]."""
        k_GSE, v_GSE = self.cache.k[layer_number], self.cache.v[layer_number]
        outs = []
        for batch in self.batches:
            q_NHtE, k_NGtE, v_NGtE = (batch.of(x[:, 0]) for x in (q_T1HE, k_T1GE, v_T1GE))
            batch.store(k_NGtE, k_GSE)
            batch.store(v_NGtE, v_GSE)
            outs.append(batch.attend(q_NHtE, k_NGtE, v_NGtE, k_GSE, v_GSE, scale).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)[:, None]


def _shape(part: Part) -> tuple[int, int, int]:
    return len(part.rows), part.clean, id(part.bias_tt)


def _batch(cache: PagedCache, parts: list[Part]) -> Batch:
    lengths = [p.length for p in parts]
    pages = [[page for run in p.slots.runs for page in run] for p in parts]
    width = max(map(len, pages))
    table = [own + [cache.scratch] * (width - len(own)) for own in pages]
    length_N, page_NW = (torch.tensor(x, dtype=torch.int64, device=cache.device) for x in (lengths, table))
    return Batch(cache, parts[0].rows.start, len(parts[0].rows), parts[0].clean, parts[0].bias_tt, length_N, page_NW)


class Batch:
    """Requests of one plan in a forward: tensors alone, so that a recorded forward can fill them anew (`graphs.py`).

    first    where their first row is among all rows of the forward; request by request, `rows` of each
    clean    how many rows of each, from the first, are clean
    bias_tt  the plan's mask among the rows; None for a single row
    length_N int64, what each has committed
    page_NW  int64, the pages of each in their order; `cache.scratch` behind the last
    """

    def __init__(
        self,
        cache: PagedCache,
        first: int,
        rows: int,
        clean: int,
        bias_tt: Tensor | None,
        length_N: Tensor,
        page_NW: Tensor,
    ) -> None:
        self.rows, self.bias_tt = slice(first, first + len(length_N) * rows), bias_tt
        place_NC = length_N[:, None] + torch.arange(clean, device=cache.device)
        slot_NC = page_NW.gather(1, place_NC // cache.page) * cache.page + place_NC % cache.page
        self.clean, self.slot_C, self.all_clean = clean, slot_NC.flatten(), clean == rows
        self.mask = _page_mask(cache, length_N, page_NW, rows)
        self.is_empty_N111 = (length_N == 0)[:, None, None, None]

    def of(self, x_THE: Tensor) -> Tensor:
        """The batch's rows, [N, H, t, E]."""
        return x_THE[self.rows].unflatten(0, (len(self.is_empty_N111), -1)).transpose(1, 2)

    def store(self, x_NGtE: Tensor, cache_GSE: Tensor) -> None:
        """Puts the clean rows where they are kept."""
        cache_GSE.index_copy_(1, self.slot_C, x_NGtE[:, :, : self.clean].transpose(0, 1).flatten(1, 2))

    def attend(self, q_NHtE, k_NGtE, v_NGtE, k_GSE, v_GSE, scale: float) -> Tensor:
        new_NHtE, new_lse_NHt = self._new(q_NHtE, k_NGtE, v_NGtE, scale)
        old_NHtE, aux = _flex(q_NHtE.is_cuda)(
            q_NHtE.contiguous(),
            k_GSE[None],
            v_GSE[None],
            block_mask=self.mask,
            scale=scale,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
            kernel_options={"FORCE_USE_FLEX_ATTENTION": not _is_few(q_NHtE, k_NGtE)},
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
        q_NGQE = q_NHtE.reshape(N, G, H // G * t, E).to(wide)  # in bfloat16 a score of 20 may be off by 1 / 16
        score_NGFtt = (q_NGQE @ k_NGtE.to(wide).transpose(2, 3)).mul_(scale).view(N, G, H // G, t, t)
        if self.bias_tt is not None:
            score_NGFtt = score_NGFtt + self.bias_tt
        lse_NGFt = score_NGFtt.logsumexp(dim=-1)
        weight_NGQt = (score_NGFtt - lse_NGFt[..., None]).exp().to(v_NGtE.dtype).view(N, G, H // G * t, t)
        return (weight_NGQt @ v_NGtE).to(wide).view(N, H, t, E), lse_NGFt.view(N, H, t)


def _is_few(q_NHtE: Tensor, k_NGtE: Tensor) -> bool:
    """Whether FlexAttention's kernel for few rows, which divides the pages among processors, may be taken: it takes all
    query rows of a key head at once, and these must fit into a block of the mask."""
    H, t, G = q_NHtE.shape[1], q_NHtE.shape[2], k_NGtE.shape[1]
    return H // G * t <= _QUERY_BLOCK


def _page_mask(cache: PagedCache, length_N: Tensor, page_NW: Tensor, rows: int) -> BlockMask:
    """The pages that each request's rows visit: whole ones without looking, the last one up to its length.

    `mask_mod` says by itself what is visible; a GPU asks it only inside the last pages.
    """
    page, (N, W), device = cache.page, page_NW.shape, cache.device
    whole_N, used_N = length_N // page, -(-length_N // page)
    number_W = torch.arange(W, device=device)
    # which page of its request a page of the cache is; -1: of none, or not written yet
    number_NW = torch.where(number_W < used_N[:, None], number_W, -1)
    number_NP = torch.full((N, cache.scratch + 1), -1, device=device).scatter_(1, page_NW, number_NW)
    # of each row only the first is read, but the kernels find the rows of both tables by the strides of this one
    last_NW = page_NW.gather(1, whole_N.clamp(max=W - 1)[:, None]).expand(N, W)
    blocks = -(-rows // _QUERY_BLOCK)

    def of_blocks(x: Tensor) -> Tensor:
        return x.to(torch.int32)[:, None, None].expand(N, 1, blocks, *x.shape[1:]).contiguous()

    def mask_mod(b, h, q, slot):
        number = number_NP[b, slot // page]
        return (number >= 0) & (number * page + slot % page < length_N[b])

    return BlockMask.from_kv_blocks(
        of_blocks(used_N - whole_N),
        of_blocks(last_NW),
        of_blocks(whole_N),
        of_blocks(page_NW),
        BLOCK_SIZE=(_QUERY_BLOCK, page),
        mask_mod=mask_mod,
        seq_lengths=(rows, (cache.scratch + 1) * page),
        compute_q_blocks=False,
    )


@functools.cache
def _flex(compiled: bool):
    if not compiled:
        return flex_attention
    # The numbers of requests, rows and pages change from step to step. One kernel serves all but those that are 1: with
    # torch's limit of 8, the last kinds would be computed without a kernel, from the scores of all pages.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)
