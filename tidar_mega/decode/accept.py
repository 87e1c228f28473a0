"""Which drafted tokens are committed. Only exact rules live here: their output is that of plain AR decoding.

Notation of TiDAR's decoding: L committed tokens, d[0..B-1] the draft for orders L..L+B-1, where d[0] was already AR's
own choice; y_j, j = 1..B, what AR chooses for order L+j given d[0..j-1].

Shape suffixes: N requests, B draft slots.
"""

from __future__ import annotations

from torch import Tensor


def exact(draft_NB: Tensor, choice_NB: Tensor) -> Tensor:
    """How many draft tokens AR itself would have chosen, int64 [N], 1..B.

    `choice_NB[:, j - 1]` is y_j. The rule:

        r = 1;  while r < B and d[r] == y_r: r += 1

    d[0..r-1] are committed and y_r, AR's choice after them, becomes d[0] of the next draft. By induction every
    committed token is AR's choice given the tokens before it, so the output equals AR decoding, greedy or sampled, as
    long as `choice` is a function of the logits and the place alone. (TiDAR, arXiv 2511.08923, section 3.2, with AR's
    token always put first: the released code trusts the drafter there, which is not exact.)
    """
    agrees_NB = draft_NB[:, 1:] == choice_NB[:, :-1]
    return 1 + agrees_NB.long().cumprod(dim=1).sum(dim=1)
