"""Plain autoregressive training: the clean rows as they are."""

from __future__ import annotations

from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import DraftTerms, RowLosses
from tidar_mega.methods import IN_PLACE, Term
from tidar_mega.rows import Rows


class AutoRegressive:
    drafter = IN_PLACE  # decoding may draft with its masks, which have learnt nothing

    def __init__(self, config: Config, mask_id: int) -> None:
        self.terms = (Term("ar", 1.0, lambda rows: rows.is_clean),)
        self.drafts = DraftTerms()

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        return clean

    def statistics(self, rows: Rows, losses: RowLosses) -> dict[str, Tensor]:
        return {}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {}


METHOD = AutoRegressive
