"""Plain autoregressive training: the clean rows as they are."""

from __future__ import annotations

from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.methods import IN_PLACE, Method, Term
from tidar_mega.rows import Rows


class AutoRegressive(Method):
    drafter = IN_PLACE  # decoding may draft with its masks, which have learnt nothing

    def __init__(self, config: Config, mask_id: int) -> None:
        self.terms = (Term("ar", 1.0, lambda rows: rows.is_clean),)

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        return clean


METHOD = AutoRegressive
