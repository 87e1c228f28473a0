"""Block diffusion (BD3-LM, arXiv 2503.09573) in TiDAR's doubled rows: blocks of which a random part is masked.

The clean half is causal and predicts the next token, so the engine decodes by drafts, as blocks may be all masks, or
by denoising, `decode.mode=blocks`. In a noisy block the tokens that are not masked stand in their places and are seen
by the masks; masks predict their own places.

Noise: a block of n places has k masks, k uniform in 1..n, at random places, and each counts n / k. The sum over a block
is the evidence bound of its likelihood (Hoogeboom et al., arXiv 2110.02037, section 3), which is that of continuous
noise levels with weight 1 / t, with less variance; its weights sum to n whatever k is.

Shape suffixes: B sequences, M mask rows, T rows, G blocks of a sequence.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import DraftTerms
from tidar_mega.methods import Term, generator
from tidar_mega.methods.tidar import Tidar
from tidar_mega.rows import PADDING, Rows


class BlockDiffusion(Tidar):
    def __init__(self, config: Config, mask_id: int) -> None:
        super().__init__(config, mask_id)
        clean, _ = self.terms
        self.terms = (clean, Term("draft", 1 - clean.coefficient, share))
        self.drafts = DraftTerms(first=1)

    def masks(self, clean: Rows, offset_B: Tensor, sample: Tensor) -> Rows:
        rows = super().masks(clean, offset_B, sample)
        draws = [generator(self.seed, "noise", int(i)) for i in sample]
        is_masked_BM = torch.stack([masked(g_M, draw) for g_M, draw in zip(rows.group, draws, strict=True)])
        token_BM = rows.token.where(is_masked_BM, clean.token)
        return replace(rows, token=token_BM, weight=rows.weight * is_masked_BM)


def masked(group_M: Tensor, draw: torch.Generator) -> Tensor:
    """Which rows of the blocks `group_M` are masked, bool [M]: a random number of each, 1 to all of it."""
    size_G = torch.bincount(group_M)
    count_G = 1 + (torch.rand(len(size_G), generator=draw, dtype=torch.float64) * size_G).long()
    order_M = (group_M + torch.rand(len(group_M), generator=draw, dtype=torch.float64)).argsort()
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(order_M)) - (size_G.cumsum(dim=0) - size_G)[group_M[order_M]]
    return rank_M < count_G[group_M]


def share(rows: Rows) -> Tensor:
    """n / k of each mask, float32 [B, T], in a block of n places with k masks; 0 elsewhere."""
    noisy_BT = ~rows.is_clean & (rows.document != PADDING)
    is_masked_BT = noisy_BT & (rows.weight > 0)
    groups_BG = torch.zeros(rows.shape[0], int(rows.group.max()) + 1, device=rows.token.device)
    size_BG, count_BG = (groups_BG.scatter_add(1, rows.group, x_BT.float()) for x_BT in (noisy_BT, is_masked_BT))
    return is_masked_BT * (size_BG / count_BG.clamp(min=1)).gather(1, rows.group)


METHOD = BlockDiffusion
