"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): layers behind the backbone draft in turn.

Depth k = 1..D is one layer of megatron-core's multi-token-prediction block (`MultiTokenGPT` in `model/gpt.py`). Its row
of place i is made from the hidden state of place i at depth k - 1 and the token of place i + k, sees the rows of its
depth up to i, and predicts the token of place i + k + 1 through the shared head. Decoding drafts with the depths one
after another and verifies with the backbone (`decode/multi_token.py`): self-speculation, whose output is AR's.

A sequence has (1 + D) S rows: S for the backbone, clean, then S for each depth, a causal group of each document.

Shape suffixes: B sequences, S places, D depths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import RowLosses
from tidar_mega.methods import Drafter, Method, Term
from tidar_mega.methods.tidar import draft_figures
from tidar_mega.rows import Rows, concatenate


class MultiTokenPrediction(Method):
    """Loss: CE_AR + mtp_loss_scaling_factor * mean over the depths of their cross entropies (equation 25)."""

    def __init__(self, config: Config, mask_id: int) -> None:
        self.mask_id, self.depths = mask_id, config.model.mtp_num_layers
        self.drafter = Drafter(depths=self.depths)
        share = config.train.mtp_loss_scaling_factor / self.depths
        self.terms = (Term("ar", 1.0, lambda rows: rows.is_clean),)
        self.terms += tuple(
            Term(f"depth_{k}", share, lambda rows, k=k: self._is_depth(rows, k)) for k in range(1, 1 + self.depths)
        )

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        clean = replace(clean, causal_in_group=True)
        return concatenate([clean, *(self._depth(clean, k) for k in range(1, 1 + self.depths))], dim=1)

    def _depth(self, clean: Rows, k: int) -> Rows:
        """Of each place the token k places behind it, and the label and weight of that place; at the end of a document
        there is none: a row without weight, which no row with one sees."""

        def ahead(x_BS: Tensor, fill: int) -> Tensor:
            moved_BS = torch.full_like(x_BS, fill)
            moved_BS[:, :-k] = x_BS[:, k:]
            return moved_BS.where(same_BS, torch.full_like(x_BS, fill))

        same_BS = torch.zeros_like(clean.token, dtype=torch.bool)
        same_BS[:, :-k] = clean.document[:, k:] == clean.document[:, :-k]
        return replace(
            clean,
            token=ahead(clean.token, self.mask_id),
            label=ahead(clean.label, 0),
            weight=ahead(clean.weight, 0),
            horizon=torch.zeros_like(clean.horizon),
            group=k + self.depths * (1 + clean.document),  # one of each depth and document; padding is document -1
        )

    def _is_depth(self, rows: Rows, k: int) -> Tensor:
        return ~rows.is_clean & ((rows.group - k) % self.depths == 0)

    def statistics(self, rows: Rows, losses: RowLosses) -> dict[str, Tensor]:
        """Per depth: predicted places and right ones; and the run of predictions that AR's own choices would accept,
        with the true tokens before them."""
        shape = (rows.shape[0], 1 + self.depths, -1)
        prediction_BT, counts_BT = torch.full_like(rows.token, -1), torch.zeros_like(rows.token, dtype=torch.bool)
        prediction_BT[losses.index], counts_BT[losses.index] = losses.prediction, True
        right_BDS = (counts_BT & (prediction_BT == rows.label)).view(shape)[:, 1:]
        prediction, counts_BDS = prediction_BT.view(shape), counts_BT.view(shape)[:, 1:]
        choice_BDS = torch.stack([prediction[:, 0].roll(-k, dims=1) for k in range(1, 1 + self.depths)], dim=1)
        accepted_BS = (counts_BDS & (prediction[:, 1:] == choice_BDS)).long().cumprod(dim=1).sum(dim=1)
        whole_BS1 = counts_BDS.all(dim=1)[..., None]
        lengths = torch.arange(1 + self.depths, device=rows.token.device)
        return {
            "slot_count": counts_BDS.sum(dim=(0, 2)).double(),
            "slot_correct": right_BDS.sum(dim=(0, 2)).double(),
            "accepted_lengths": (whole_BS1 & (accepted_BS[..., None] == lengths)).sum(dim=(0, 1)).double(),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return draft_figures(sums)


METHOD = MultiTokenPrediction
