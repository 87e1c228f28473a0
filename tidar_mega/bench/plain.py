"""The peer of `bench train`: TiDAR training as one would write it in plain PyTorch, with the dense 2S x 2S mask.

Shape suffixes: B sequences, T rows, D hidden width, H heads, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_mega.config import ModelConfig
from tidar_mega.rows import Rows, visible


class PlainModel(nn.Module):
    """Shape and rows of the megatron model; SDPA with a boolean mask, logits of all rows, torch's cross entropy."""

    def __init__(self, shape: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.head = nn.Linear(shape.hidden_size, vocab_size, bias=False)
        self.base = shape.rotary_base
        self.width = shape.head_width

    def forward(self, rows: Rows) -> Tensor:
        """The weighted loss of `rows`, a scalar."""
        mask_B1TT = visible(rows, rows)[:, None]
        exponent = torch.arange(0, self.width, 2, device=rows.token.device) / self.width
        angle_B1TE = (rows.position[..., None].float() * self.base**-exponent)[:, None]
        x_BTD = self.embedding(rows.token)
        for layer in self.layers:
            x_BTD = layer(x_BTD, angle_B1TE.cos().to(x_BTD.dtype), angle_B1TE.sin().to(x_BTD.dtype), mask_B1TT)
        logits_BTV = self.head(self.norm(x_BTD)).float()
        loss_BT = F.cross_entropy(logits_BTV.flatten(0, 1), rows.label.flatten(), reduction="none").view(rows.shape)
        return (loss_BT * rows.weight).sum()


class _Layer(nn.Module):
    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.width = shape.num_attention_heads, shape.num_query_groups, shape.head_width
        size, inner = shape.hidden_size, shape.num_attention_heads * shape.head_width
        self.norm_attention, self.norm_mlp = (nn.RMSNorm(size, eps=shape.norm_epsilon) for _ in range(2))
        self.qkv = nn.Linear(size, inner + 2 * self.groups * self.width, bias=False)
        self.out = nn.Linear(inner, size, bias=False)
        self.gate_up = nn.Linear(size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, size, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_B1TT: Tensor) -> Tensor:
        heads = (self.heads, self.groups, self.groups)
        qkv_BTHE = self.qkv(self.norm_attention(x_BTD)).unflatten(-1, (sum(heads), self.width))
        q, k, v = (part.transpose(1, 2) for part in qkv_BTHE.split(heads, dim=2))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out_BHTE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT, enable_gqa=True)
        x_BTD = x_BTD + self.out(out_BHTE.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
