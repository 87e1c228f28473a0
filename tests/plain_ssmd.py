"""An independent self-speculative masked diffusion in plain PyTorch (arXiv 2510.03929), for comparison only.

Written as the paper has it: the rows of the causal block stand in the order sigma, with an ordinary triangular mask,
one document at a time. It imports nothing of the package and takes its weights by megatron-core's names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.plain_tidar import PlainTidar, rope


@dataclass(frozen=True)
class Document:
    """`token` [D]; `sigma`, the places in their order; the first `revealed` of them are not masked."""

    token: torch.Tensor
    sigma: list[int]
    revealed: int

    def masked(self, mask_id: int) -> torch.Tensor:
        token = self.token.clone()
        token[self.sigma[self.revealed :]] = mask_id
        return token


class PlainSsmd(PlainTidar):
    def layer(self, x, i, turn, allowed):
        p = f"decoder.layers.{i}."
        x = x + self.turned_attention(self.norm(x, p + "input_layernorm"), p + "self_attention.", turn, allowed)
        gate, up = F.linear(self.norm(x, p + "pre_mlp_layernorm"), self.w[p + "mlp.linear_fc1.weight"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.w[p + "mlp.linear_fc2.weight"])

    def turned_attention(self, x, p, turn, allowed):
        heads, groups, size = self.shape["num_attention_heads"], self.shape["num_query_groups"], len(x)
        share = heads // groups
        qkv = F.linear(x, self.w[p + "linear_qkv.weight"]).view(size, groups, share + 2, -1)
        q, k, v = qkv[:, :, :share].reshape(size, heads, -1), qkv[:, :, share], qkv[:, :, share + 1]
        if self.shape["qk_layernorm"]:
            q, k = self.norm(q, p + "q_layernorm"), self.norm(k, p + "k_layernorm")
        turn_q, turn_k = turn
        q, k = turn_q(q.transpose(0, 1)), turn_k(k.transpose(0, 1)).repeat_interleave(share, dim=0)
        v = v.transpose(0, 1).repeat_interleave(share, dim=0)
        score = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
        return F.linear((score.softmax(-1) @ v).transpose(0, 1).reshape(size, -1), self.w[p + "linear_proj.weight"])

    def one_position(self, position):
        return (lambda x: rope(x, position, self.shape["rotary_base"]),) * 2

    def two_positions(self, before, own):
        """Queries turn by their own place; keys at frequencies 0, 2, .. by that of their token, the place before."""

        def turn(x):
            by_before, by_own = (rope(x, position, self.shape["rotary_base"]) for position in (before, own))
            frequency = torch.arange(x.shape[-1]) % (x.shape[-1] // 2)
            return torch.where(frequency % 2 == 0, by_before, by_own)

        return self.one_position(own)[0], turn

    def noncausal(self, token: torch.Tensor, layers: int) -> torch.Tensor:
        x, size = self.w["embedding.word_embeddings.weight"][token], len(token)
        for i in range(layers):
            x = self.layer(x, i, self.one_position(torch.arange(size)), torch.ones(size, size, dtype=torch.bool))
        return x

    def causal(self, hidden: torch.Tensor, token: torch.Tensor, sigma: list[int], mask_id: int) -> torch.Tensor:
        """States in the order sigma: the one of step j speaks of the place sigma[j]."""
        last = self.shape["num_layers"] - 1
        p = f"decoder.layers.{last}.causal_input."
        states, inputs = self.norm(hidden, p + "state_norm"), []
        for j, place in enumerate(sigma):
            held = token[sigma[j - 1]] if j else torch.tensor(mask_id)
            before = states[sigma[j - 1]] if j else torch.zeros_like(states[0])
            embedded = self.norm(self.w[p + "tokens.weight"][held], p + "token_norm")
            inputs.append(F.linear(torch.cat([states[place], before, embedded]), self.w[p + "mix.weight"]))
        own = torch.tensor(sigma)
        before = torch.tensor([sigma[max(j - 1, 0)] for j in range(len(sigma))])
        triangle = torch.ones(len(sigma), len(sigma)).tril().bool()
        out = self.layer(torch.stack(inputs), last, self.two_positions(before, own), triangle)
        return out + hidden[own]

    def speak(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(hidden, "decoder.final_layernorm"))

    def loss(self, documents: list[Document], mask_id: int, has_causal: bool = True):
        """(noncausal, causal) bounds in nats per token: sums of D / (D - i) * CE over all documents' masked places."""
        noncausal, causal, size = 0.0, 0.0, sum(len(d.token) for d in documents)
        layers = self.shape["num_layers"] - has_causal
        for d in documents:
            hidden, hidden_places = self.noncausal(d.masked(mask_id), layers), d.sigma[d.revealed :]
            weight, label = len(d.token) / len(hidden_places), d.token[hidden_places]
            draft = self.speak(hidden[hidden_places])
            noncausal = noncausal + weight * F.cross_entropy(draft, label, reduction="sum")
            if has_causal:
                target = self.speak(self.causal(hidden, d.token, d.sigma, mask_id)[d.revealed :])
                causal = causal + weight * F.cross_entropy(target, label, reduction="sum")
        return noncausal / size, causal / size
