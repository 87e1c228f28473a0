"""The norm of all layers."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class Norm(nn.RMSNorm):
    """RMSNorm whose gradient megatron sums over the tensor group if rows are split over it (its stock norm refuses)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
