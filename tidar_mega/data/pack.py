"""Tokens with document ids -> clean rows, the plain form from which every method makes its training rows.

Shape suffixes: S rows of one sequence, N = S + 1 tokens of its window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidar_mega.rows import PADDING, Rows


def pack(token_N: Tensor, document_N: Tensor) -> Rows:
    """Clean rows [1, S] of a window of S tokens and the token after it.

    Positions restart at every document (at the window's start for one that began before it), and no row predicts
    a token of another document.

    Args:
        token_N: int64 ids.
        document_N: int64, the running number 0, 1, 2, ... of each token's document; PADDING where there is no token.
    """
    place_N = torch.arange(len(token_N))
    starts_N = torch.ones_like(document_N, dtype=torch.bool)
    starts_N[1:] = document_N[1:] != document_N[:-1]
    start_N = torch.where(starts_N, place_N, 0).cummax(dim=0).values
    order_S = (place_N - start_N)[:-1]
    is_predicted_S = (document_N[1:] == document_N[:-1]) & (document_N[1:] != PADDING)
    rows = Rows(
        token=token_N[:-1],
        position=order_S,
        order=order_S,
        horizon=order_S + 1,
        group=torch.zeros_like(order_S),
        document=document_N[:-1],
        label=token_N[1:],
        weight=is_predicted_S.float(),
    )
    return rows.map(lambda x_S: x_S[None])
