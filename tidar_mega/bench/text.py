"""Something to train on where only the speed counts."""

from __future__ import annotations

import torch

from tidar_mega.rows import Rows


class RandomText:
    """One document of random tokens for each global sample index."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length

    def rows(self, index: int) -> Rows:
        token = torch.randint(self.vocab, (1, self.length + 1), generator=torch.Generator().manual_seed(index))
        order = torch.arange(self.length)[None]
        zero = torch.zeros_like(order)
        weight = torch.ones(1, self.length)
        return Rows(token[:, :-1], order, order, order + 1, zero, zero, token[:, 1:], weight)
