"""I-DLM, introspective diffusion language models (arXiv 2604.11035): TiDAR's doubled rows, but causal everywhere.

A mask sees the clean tokens before its block and the masks of its block before it, and has the label of the clean row
of its place: the next token. So blocks of b masks draft b tokens behind AR's own one, and a forward of decoding
verifies drafts of b + 1 tokens (the paper's stride N). Introspective strided decoding, 2N - 1 rows that draft behind
the outcome that all is accepted alone, is the engine's `decode.outcomes=last`; any other outcomes are exact, too.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import DraftTerms
from tidar_mega.methods import Drafter, Term
from tidar_mega.methods.tidar import Tidar, position_term
from tidar_mega.rows import Rows


class IntrospectiveDiffusion(Tidar):
    """Loss: CE_draft + w CE_AR with w = train.clean_weight, or w = stopgrad(CE_draft / CE_AR) of the global batch."""

    drafter = Drafter(ahead=1, causal_in_group=True)

    def __init__(self, config: Config, mask_id: int) -> None:
        super().__init__(config, mask_id)
        t = config.train
        if t.balance_clean:
            clean = Term("ar", 1.0, lambda rows: rows.is_clean, balances="draft")
        else:
            clean = Term("ar", t.clean_weight, lambda rows: rows.is_clean)
        self.terms = (clean, Term("draft", 1.0, lambda rows: ~rows.is_clean))
        if t.position_weight:
            self.terms += (position_term(t.position_weight, t.position_gamma),)
        self.drafts = DraftTerms(t.focal_weight, t.chain_weight)  # AR's own token stands before slot 0

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        return super().training_rows(replace(clean, causal_in_group=True), sample)

    def masks(self, clean: Rows, offset_B: Tensor, sample: Tensor) -> Rows:
        return replace(super().masks(clean, offset_B, sample), label=clean.label, weight=clean.weight)


METHOD = IntrospectiveDiffusion
