"""Self-speculative masked diffusion (arXiv 2510.03929): masked diffusion whose last block is causal in its order.

All blocks but the last see the partly masked document as in `masked_diffusion`, and draft every masked place.
The last block has one row for each place, too, but these see one another only in the order sigma of the document: the
row of sigma(j+1) holds the true token of sigma(j) (in sampling: the drafted one), and sees the rows of
sigma(0) .. sigma(j+1). So it says what stands at its place given all tokens before it in the order.

A sequence has 2S rows: S for the blocks before the last, clean, then S for the last one, a causal group of each
document. Both predict the token of their own place, from one forward. `model/any_order.py` runs them.

Shape suffixes: B sequences, S places.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.methods import Method, Term
from tidar_mega.methods.masked_diffusion import bound_weight, partly_masked
from tidar_mega.rows import Rows, concatenate, place_before


class SelfSpeculative(Method):
    def __init__(self, config: Config, mask_id: int) -> None:
        self.mask_id, self.seed = mask_id, config.train.seed
        self.terms = (
            Term("noncausal", 1.0, lambda rows: rows.is_clean * bound_weight(rows)),
            Term("causal", 1.0, lambda rows: ~rows.is_clean * bound_weight(rows)),
        )

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        masked, order_BS = partly_masked(clean, sample, self.mask_id, self.seed)
        causal = causal_rows(masked, order_BS, clean.token, self.mask_id)
        return concatenate([replace(masked, causal_in_group=True), causal], dim=1)


def causal_rows(rows: Rows, order_BS: Tensor, token_BS: Tensor, mask_id: int) -> Rows:
    """The rows of the causal block for `rows` of all places, with the tokens `token_BS` of these places: each holds the
    token of the place before it in the order, the first of a document the mask."""
    ordered = replace(
        rows,
        order=order_BS,
        horizon=torch.zeros_like(rows.horizon),
        group=rows.document + 2,  # one of each document, as the drafts of other methods have; padding is document -1
        causal_in_group=True,
    )
    before_BS, exists_BS = place_before(ordered, ordered)
    return replace(ordered, token=token_BS.gather(1, before_BS).masked_fill(~exists_BS, mask_id))


METHOD = SelfSpeculative
