"""The context of multi-token prediction (`methods/mtp.py`): every depth sees what the backbone's rows see."""

from __future__ import annotations

from tidar_mega.model.attention import TrainingAttention
from tidar_mega.parallel.context import Part, copies


class MultiTokenAttention(TrainingAttention):
    """The context of a forward over the (1 + depths) S rows of `methods/mtp.py`, or this rank's part of them: the
    attention of the first S, for all layers. `tokens` [B, S] are those of each depth."""

    def __init__(self, part: Part, backend: str, depths: int) -> None:
        first, *others = copies(part, 1 + depths)
        super().__init__(first, backend)
        self.tokens = [depth.rows.token for depth in others]
