"""Preallocated keys and values of decoding, and the attention of new rows over them.

A forward writes its T new rows right behind the committed length of each request and attends over
[committed | new]. Everything committed is visible to every row (orders below L), so only the last T columns need a
mask, and that mask depends on the relative rows alone: it is made once per kind of forward. A commit advances lengths
and moves nothing: the accepted verify rows are already where they belong, all other rows are overwritten next time.

Shape suffixes: N requests, T new rows, H query heads, G key heads, F = H/G query heads of one key head, E head width,
P committed rows (the longest request's), K = P + T keys, Q = F*T query rows of one key head, C capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidar_mega.rows import Rows, visible


class KVCache:
    """Keys and values [N, G, C, E] of every layer, and the committed length of every request.

    One tensor per layer, not one for all: a compiled forward that writes slices of a shared tensor copies it.
    """

    def __init__(
        self,
        layers: int,
        requests: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (requests, heads, capacity, width)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = [0] * requests
        self.capacity = capacity

    def commit(self, request: int, count: int) -> None:
        """The first `count` of the rows that the last forward wrote for this request are kept."""
        self.lengths[request] += count


def mask_bias(rows: Rows, heads_per_key: int, dtype: torch.dtype) -> Tensor:
    """Additive mask among the relative rows [1, T]: [F*T, T], 0 where visible, -inf elsewhere."""
    hidden_TT = ~visible(rows, rows)[0]
    bias_TT = torch.zeros(hidden_TT.shape, dtype=dtype, device=hidden_TT.device).masked_fill_(hidden_TT, -torch.inf)
    return bias_TT.repeat(heads_per_key, 1)


class CachedAttention:
    """The attention context of one forward: T new rows of the requests `requests` (a slice of the cache).

    Exact attention, softmax in float32 or better. The query heads of a key head are folded into rows, so that keys are
    neither repeated nor read twice. Requests of one length need one product over [committed | new]; else the committed
    part is padded to the longest and the two parts meet in the softmax.
    """

    def __init__(self, cache: KVCache, bias_QT: Tensor, requests: slice) -> None:
        self.cache, self.bias_QT, self.requests = cache, bias_QT, requests
        self.lengths = cache.lengths[requests]
        self.rows = bias_QT.shape[1]
        assert max(self.lengths) + self.rows <= cache.capacity, "the engine admits only what fits"
        self.ragged = len(set(self.lengths)) > 1
        if self.ragged:
            self._prepare_ragged(bias_QT)

    def _prepare_ragged(self, bias_QT: Tensor) -> None:
        device = bias_QT.device
        length_N1 = torch.tensor(self.lengths, device=device)[:, None]
        self.request_N1 = torch.arange(len(self.lengths), device=device)[:, None]
        self.row_NT = length_N1 + torch.arange(self.rows, device=device)
        beyond_NP = torch.arange(max(self.lengths), device=device) >= length_N1
        self.bias_NP = torch.zeros(beyond_NP.shape, dtype=bias_QT.dtype, device=device)
        self.bias_NP.masked_fill_(beyond_NP, -torch.inf)

    def attend(self, layer_number: int, q_TNHE: Tensor, k_TNGE: Tensor, v_TNGE: Tensor, scale: float) -> Tensor:
        """Writes the new keys and values of layer 1.. and returns the attention's output [T, N, H, E]."""
        k_NGCE = self.cache.k[layer_number - 1][self.requests]
        v_NGCE = self.cache.v[layer_number - 1][self.requests]
        (T, N, H, E), G = q_TNHE.shape, k_TNGE.shape[2]
        q_ZQE = (q_TNHE * scale).view(T, N, G, H // G, E).permute(1, 2, 3, 0, 4).reshape(N * G, H // G * T, E)
        attend = self._ragged if self.ragged else self._aligned
        out_ZQE = attend(q_ZQE, k_NGCE, v_NGCE, k_TNGE, v_TNGE)
        return out_ZQE.view(N, G, H // G, T, E).permute(3, 0, 1, 2, 4).reshape(T, N, H, E)

    def _aligned(self, q_ZQE, k_NGCE, v_NGCE, k_TNGE, v_TNGE) -> Tensor:
        start, stop = self.lengths[0], self.lengths[0] + self.rows
        k_NGCE[:, :, start:stop] = k_TNGE.permute(1, 2, 0, 3)
        v_NGCE[:, :, start:stop] = v_TNGE.permute(1, 2, 0, 3)
        score_ZQK = torch.bmm(q_ZQE, _flat(k_NGCE[:, :, :stop]).transpose(1, 2))
        if self.rows > 1:
            score_ZQK[:, :, start:] += self.bias_QT
        return torch.bmm(_softmax(score_ZQK), _flat(v_NGCE[:, :, :stop]))

    def _ragged(self, q_ZQE, k_NGCE, v_NGCE, k_TNGE, v_TNGE) -> Tensor:
        k_NGCE[self.request_N1, :, self.row_NT] = k_TNGE.transpose(0, 1)
        v_NGCE[self.request_N1, :, self.row_NT] = v_TNGE.transpose(0, 1)
        longest = max(self.lengths)
        bias_Z1P = self.bias_NP.repeat_interleave(k_TNGE.shape[2], dim=0)[:, None]
        new_k_ZTE, new_v_ZTE = (x.permute(1, 2, 0, 3).flatten(0, 1) for x in (k_TNGE, v_TNGE))
        committed_ZQP = torch.baddbmm(bias_Z1P, q_ZQE, _flat(k_NGCE[:, :, :longest]).transpose(1, 2))
        new_ZQT = torch.baddbmm(self.bias_QT, q_ZQE, new_k_ZTE.transpose(1, 2))
        weight_ZQK = _softmax(torch.cat([committed_ZQP, new_ZQT], dim=2))
        out_ZQE = torch.bmm(weight_ZQK[:, :, longest:], new_v_ZTE)
        return out_ZQE.baddbmm_(weight_ZQK[:, :, :longest], _flat(v_NGCE[:, :, :longest]))


def _flat(x_NGKE: Tensor) -> Tensor:
    """[N*G, K, E], without a copy: requests and heads lie at one common stride."""
    N, G, K, E = x_NGKE.shape
    return x_NGKE.as_strided((N * G, K, E), (x_NGKE.stride(1), E, 1), x_NGKE.storage_offset())


def _softmax(score_ZQK: Tensor) -> Tensor:
    wide = torch.promote_types(score_ZQK.dtype, torch.float32)
    return score_ZQK.softmax(dim=-1, dtype=wide).to(score_ZQK.dtype)
