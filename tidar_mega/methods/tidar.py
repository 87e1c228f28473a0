"""TiDAR (arXiv 2511.08923): one forward over clean rows and over fully masked blocks of the same places.

Training, section 3.1: the clean half is causal and predicts the next token; the mask half predicts the token of its
own place from the clean tokens before its block and from the masks of its block, in both directions. Blocks restart
at every document. Decoding, section 3.2, is `decoding_rows`.

Shape suffixes: B sequences, S clean rows, M mask rows, T = S + M rows, G blocks of a sequence, K slots of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import DraftTerms, RowLosses
from tidar_mega.methods import IN_PLACE, Method, Term, generator
from tidar_mega.rows import PADDING, Rows, concatenate


class Tidar(Method):
    drafter = IN_PLACE

    def __init__(self, config: Config, mask_id: int) -> None:
        self.mask_id = mask_id
        self.block = config.train.block
        self.fraction = config.train.draft_fraction
        self.random_offset = config.train.random_offset
        self.seed = config.train.seed
        t = config.train
        self.terms = (
            Term("ar", t.alpha / (1 + t.alpha), lambda rows: rows.is_clean),
            Term("draft", 1 / (1 + t.alpha), lambda rows: ~rows.is_clean),
        )
        if t.position_weight:
            self.terms += (position_term(t.position_weight, t.position_gamma),)
        self.drafts = DraftTerms(t.focal_weight, t.chain_weight, first=1)

    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        offset_B = torch.zeros_like(sample)
        if self.random_offset:
            draw = [torch.randint(self.block, (), generator=generator(self.seed, "offset", int(i))) for i in sample]
            offset_B = torch.stack(draw)
        masks = self.masks(clean, offset_B, sample)
        if self.fraction < 1:
            masks = self._subset(masks, sample)
        return concatenate([clean, masks], dim=1)

    def masks(self, clean: Rows, offset_B: Tensor, sample: Tensor) -> Rows:
        """One mask row per clean row, see `mask_rows`."""
        return mask_rows(clean, self.mask_id, self.block, offset_B)

    def _subset(self, masks: Rows, sample: Tensor) -> Rows:
        """The same number of slots of every sequence: whole random blocks that fit, then padding."""
        slots = max(1, round(self.fraction * masks.shape[1] / self.block)) * self.block
        parts = []
        for b, index in enumerate(sample.tolist()):
            kept_M = _random_blocks(masks.group[b], masks.document[b], slots, generator(self.seed, "blocks", index))
            parts.append(_pad(masks.select(slice(b, b + 1)).map(lambda x_BM, at=kept_M: x_BM[:, at]), slots))
        return concatenate(parts, dim=0)

    def statistics(self, rows: Rows, losses: RowLosses) -> dict[str, Tensor]:
        """Per slot: drafted places and right ones; and the run of drafts that AR's own choices would accept."""
        prediction_BT = torch.full_like(rows.token, -1)
        prediction_BT[losses.index] = losses.prediction
        drafted_BT, slot_BT = ~rows.is_clean & (rows.weight > 0), rows.order - rows.horizon
        ahead, first = self.drafter.ahead, self.drafts.first
        agrees_BT = (prediction_BT == _ar_choice(rows, prediction_BT, ahead)) | (slot_BT < first)

        # every size is known without a look at the rows, which may be on a GPU that has not made them yet: there are
        # at most T groups, and one behind them for rows that draft nothing.
        # where masks predict their own place, AR's own choice replaces slot 0, which is then always accepted; where
        # they predict the next one, it stands before them; a partial block has no end
        B, T = rows.shape
        group_BT = rows.group.where(drafted_BT, torch.full_like(rows.group, T + 1))
        where = (torch.arange(B, device=group_BT.device)[:, None], group_BT, slot_BT.clamp(min=0))
        exists_BGK, agrees_BGK = torch.zeros(2, B, T + 2, self.block, dtype=torch.bool, device=group_BT.device)
        exists_BGK[where], agrees_BGK[where] = drafted_BT, agrees_BT
        whole_BG1 = exists_BGK[:, :-1].all(dim=-1, keepdim=True)
        length_BG1 = agrees_BGK[:, :-1].long().cumprod(dim=-1).sum(dim=-1, keepdim=True)  # 0..K, and AR's own token
        lengths = torch.arange(1 - ahead, self.block + 1, device=slot_BT.device)
        at_BTK = drafted_BT[..., None] & (slot_BT[..., None] == torch.arange(self.block, device=slot_BT.device))
        right_BT1 = (prediction_BT == rows.label)[..., None]
        return {
            "slot_count": at_BTK.sum(dim=(0, 1)).double(),
            "slot_correct": (at_BTK & right_BT1).sum(dim=(0, 1)).double(),
            "accepted_lengths": (whole_BG1 & (length_BG1 == lengths)).sum(dim=(0, 1)).double(),
        }

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return draft_figures(sums)


def draft_figures(sums: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy at each slot of a draft, and how many tokens a forward would commit."""
    slots = (sums["slot_correct"] / sums["slot_count"].clamp(min=1)).tolist()
    figures = {f"draft_accuracy/slot_{k}": accuracy for k, accuracy in enumerate(slots)}
    figures["draft_accuracy"] = float(sums["slot_correct"].sum() / sums["slot_count"].sum().clamp(min=1))
    lengths_K = sums["accepted_lengths"]  # of 1, 2, .. tokens
    accepted = (lengths_K * torch.arange(1, len(lengths_K) + 1, device=lengths_K.device)).sum()
    figures["expected_tokens_per_forward"] = float(accepted / lengths_K.sum().clamp(min=1))
    return figures


def position_term(weight: float, gamma: float) -> Term:
    """Cross entropy of the drafting rows, the more the earlier their slot: exp(-slot / gamma) (arXiv 2606.11552)."""
    return Term("position", weight, lambda rows: (~rows.is_clean) * torch.exp((rows.horizon - rows.order) / gamma))


def mask_rows(clean: Rows, mask_id: int, block: int, offset_B: Tensor) -> Rows:
    """One mask row per clean row: same place and document, label = the token there.

    Blocks of `block` places restart at every document; `offset_B` shifts their starts, so that the first block of a
    document has `offset` places (0: a whole one).
    """
    lead_B1 = ((block - offset_B) % block)[:, None]
    number_BM = (clean.order + lead_B1) // block
    starts_BM = torch.ones_like(clean.token, dtype=torch.bool)
    new_block = (number_BM[:, 1:] != number_BM[:, :-1]) | (clean.document[:, 1:] != clean.document[:, :-1])
    starts_BM[:, 1:] = new_block
    return Rows(
        token=torch.full_like(clean.token, mask_id),
        position=clean.position,
        order=clean.order,
        horizon=(number_BM * block - lead_B1).clamp(min=0),
        group=starts_BM.long().cumsum(dim=1),
        document=clean.document,
        label=clean.token,
        weight=(clean.document != PADDING).to(clean.weight.dtype),
        causal_in_group=clean.causal_in_group,
    )


def decoding_rows(clean: int, outcomes: Sequence[int], slots: int, mask_id: int) -> Rows:
    """One decoding forward (section 3.2) as relative rows [1, clean + len(outcomes) * slots], for a committed length
    of 0: add that to position, order and horizon, and fill in the clean tokens.

    First the clean rows, causal: drafted tokens to verify, or a piece of a prompt. Then for each outcome j a group of
    `slots` masks for the orders j.., which drafts as if the first j clean rows had been committed. TiDAR's own forward
    has clean = slots = B and the outcomes 1..B; plain AR decoding has one clean row and no outcome.
    """
    slot = torch.arange(slots)
    outcome = torch.tensor(outcomes, dtype=torch.int64).repeat_interleave(slots)
    order = torch.cat([torch.arange(clean), outcome + slot.repeat(len(outcomes))])
    group = torch.cat(
        [torch.zeros(clean, dtype=torch.int64), torch.arange(1, 1 + len(outcomes)).repeat_interleave(slots)]
    )
    horizon = torch.cat([torch.arange(1, clean + 1), outcome])
    token, zero = torch.full_like(order, mask_id), torch.zeros_like(order)
    rows = Rows(token, order, order, horizon, group, zero, zero, zero.float())
    return rows.map(lambda x_T: x_T[None])


def _random_blocks(group_M: Tensor, document_M: Tensor, slots: int, draw: torch.Generator) -> Tensor:
    """Places, in order, of whole blocks in a random priority, as many as fit into `slots`."""
    size_G = torch.bincount(group_M[document_M != PADDING], minlength=int(group_M.max()) + 1)
    priority_G = torch.randperm(len(size_G), generator=draw)
    fits_G = size_G[priority_G].cumsum(dim=0) <= slots
    kept_G = torch.zeros(len(size_G), dtype=torch.bool)
    kept_G[priority_G[fits_G]] = True
    return (kept_G[group_M] & (document_M != PADDING)).nonzero().squeeze(1)


def _pad(masks: Rows, slots: int) -> Rows:
    """Fills up to `slots` rows with padding that sees only itself and counts for nothing."""
    missing = slots - masks.shape[1]
    full = masks.map(lambda x: torch.cat([x, x.new_zeros(x.shape[0], missing)], dim=1))
    last = int(masks.group.max()) if masks.shape[1] else 0
    full.document[:, slots - missing :] = PADDING
    full.group[:, slots - missing :] = last + 1
    return full


def _ar_choice(rows: Rows, prediction_BT: Tensor, ahead: int) -> Tensor:
    """For every drafting row, what the clean half puts `ahead` places behind it (by the clean row before), [B, T]."""
    last = torch.iinfo(torch.int64).max
    is_text_BT = rows.is_clean & (rows.document != PADDING)
    document_BT = rows.document.where(is_text_BT, torch.full_like(rows.document, last))  # sorted: clean rows come first
    first_BT = torch.searchsorted(document_BT, rows.document.contiguous())
    before_BT = first_BT + rows.order + ahead - 1
    choice_BT = prediction_BT.gather(1, before_BT.clamp(0, rows.shape[1] - 1))
    return choice_BT.where(rows.order + ahead > 0, torch.full_like(choice_BT, -2))


METHOD = Tidar
