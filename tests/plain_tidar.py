"""An independent TiDAR in plain PyTorch, written from the paper (arXiv 2511.08923, section 3.1), for comparison only.

It imports nothing of the package: its own layers, its own RoPE, its own mask over the doubled sequence, its own loss.
It takes its weights by megatron-core's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mask(document: torch.Tensor, block: int) -> torch.Tensor:
    """bool [2S, 2S] for one sequence whose places have the documents `document` [S] (contiguous, blocks restart)."""
    size = len(document)
    start = [0] * size
    for i in range(1, size):
        start[i] = start[i - 1] if document[i] == document[i - 1] else i
    allowed = torch.zeros(2 * size, 2 * size, dtype=torch.bool)
    for q in range(size):
        block_start = start[q] + (q - start[q]) // block * block
        for k in range(size):
            if document[q] != document[k]:
                continue
            allowed[q, k] = k <= q
            allowed[size + q, k] = k < block_start
            allowed[size + q, size + k] = block_start <= k < block_start + block
    return allowed


def rope(x: torch.Tensor, position: torch.Tensor, base: float) -> torch.Tensor:
    """Rotates x [heads, T, width] by `position` [T]; pairs are (i, i + width/2)."""
    width = x.shape[-1]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position.double()[:, None] * frequency.float().double()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PlainTidar:
    """`weights`: megatron's names -> tensors (any dtype); `shape`: a mapping with the model settings."""

    def __init__(self, weights: dict[str, torch.Tensor], shape: dict) -> None:
        self.w = weights
        self.shape = shape

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.shape["norm_epsilon"])
        return x * scale * self.w[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"])

    def hidden(self, token: torch.Tensor, position: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] after the final norm for one sequence of T rows."""
        x = self.w["embedding.word_embeddings.weight"][token]
        for i in range(self.shape["num_layers"]):
            p = f"decoder.layers.{i}."
            x = x + self.attention(self.norm(x, p + "input_layernorm"), p + "self_attention.", position, allowed)
            gate, up = self.linear(self.norm(x, p + "pre_mlp_layernorm"), p + "mlp.linear_fc1").chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, p + "mlp.linear_fc2")
        return self.norm(x, "decoder.final_layernorm")

    def attention(self, x: torch.Tensor, p: str, position: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        heads, groups = self.shape["num_attention_heads"], self.shape["num_query_groups"]
        size, share = x.shape[0], heads // groups
        qkv = self.linear(x, p + "linear_qkv").view(size, groups, share + 2, -1)
        q = qkv[:, :, :share].reshape(size, heads, -1)
        k, v = qkv[:, :, share], qkv[:, :, share + 1]
        if self.shape["qk_layernorm"]:
            q, k = self.norm(q, p + "q_layernorm"), self.norm(k, p + "k_layernorm")
        q = rope(q.transpose(0, 1), position, self.shape["rotary_base"])
        k = rope(k.transpose(0, 1), position, self.shape["rotary_base"]).repeat_interleave(share, dim=0)
        v = v.transpose(0, 1).repeat_interleave(share, dim=0)
        score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        out = score.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ v
        return self.linear(out.transpose(0, 1).reshape(size, -1), p + "linear_proj")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        name = "embedding.word_embeddings.weight" if self.shape["tie_embeddings"] else "output_layer.weight"
        return F.linear(hidden, self.w[name])

    def loss(self, sequences: list[tuple[torch.Tensor, torch.Tensor]], block: int, alpha: float, mask_id: int):
        """(loss, CE_AR, CE_draft) over sequences of (token [S + 1], document [S + 1]); the last is only a label."""
        ar, drafts = self.losses(sequences, block, mask_id)
        ce_ar, ce_draft = ar.mean(), torch.cat([ce for ce, _ in drafts]).mean()
        return (alpha * ce_ar + ce_draft) / (1 + alpha), ce_ar, ce_draft

    def losses(self, sequences: list[tuple[torch.Tensor, torch.Tensor]], block: int, mask_id: int):
        """Cross entropies of the clean rows; and of the slots of each block, with whether its best id is right."""
        ar, drafts = [], []
        for token, document in sequences:
            size = len(token) - 1
            position = torch.arange(size)
            for i in range(1, size):
                position[i] = position[i - 1] + 1 if document[i] == document[i - 1] else 0
            position[0] = 0
            doubled = torch.cat([token[:size], torch.full((size,), mask_id)])
            hidden = self.hidden(doubled, position.repeat(2), mask(document[:size], block))
            logits = self.logits(hidden)
            has_next = document[1:] == document[:-1]
            ar.append(F.cross_entropy(logits[:size][has_next], token[1:][has_next], reduction="none"))
            logits = logits[size:]
            ce, right = F.cross_entropy(logits, token[:size], reduction="none"), logits.argmax(-1) == token[:size]
            starts = [i for i in range(size) if position[i] % block == 0]
            drafts += [(ce[a:b], right[a:b]) for a, b in zip(starts, [*starts[1:], size], strict=True)]
        return torch.cat(ar), drafts
