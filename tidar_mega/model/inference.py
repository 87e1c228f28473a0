"""The backbone without megatron's Python: the forward of decoding, from the weights of a HybridGPT.

`HybridGPT` is the reference; this gives the same numbers from the same `Rows` and attention context in a tenth of the
Python, and on a CPU through weights that oneDNN has packed for its kernels once. Adapters (`lora.py`) act on the mask
rows of the forward, wherever they stand. There is no backward. Every pipeline
and tensor-parallel layout works; rows are never split (no sequence or context parallelism).

Shape suffixes: T rows, B sequences, D hidden width, H query heads, G key heads (of this tensor-parallel rank), J = H/G
query heads of one key head, E head width, N selected rows, V vocabulary ids of this rank.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tidar_mega.model.attention import AttentionContext
from tidar_mega.model.gpt import HybridGPT
from tidar_mega.rows import Rows


class InferenceModel:
    """Weights of a HybridGPT, ready to run. On a GPU they are shared with it; on a CPU packed copies.

    config      megatron's description of the backbone
    dtype       of the weights and of all activations; device  where they are
    tensor      tensor-parallel group; pipeline  pipeline group
    vocab       logits of this tensor-parallel rank; key_heads  its key heads
    layer_numbers  of this pipeline stage, from 1; the depths' come behind the backbone's
    depths  the layers of multi-token prediction, on the stage that has them; else empty
    """

    def __init__(self, model: HybridGPT) -> None:
        self.config = model.config
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.tensor, self.pipeline = model.pg_collection.tp, model.pg_collection.pp
        self.vocab = model.vocab_size // self.tensor.size()
        self.inverse_frequency = model.inverse_frequency
        self.is_first, self.is_last = model.pre_process, model.post_process
        self.has_adapters = model.has_adapters
        self.layers = [_Layer(layer, self.tensor) for layer in model.decoder.layers]
        self.depths = [_Depth(depth, self.tensor) for depth in model.mtp.layers] if model.mtp_process else []
        self.layer_numbers = [layer.number for layer in (*self.layers, *(depth.layer for depth in self.depths))]
        self.key_heads = self.layers[0].key_heads
        if self.is_first or self.depths:
            self.embedding = model.embedding.word_embeddings.weight.detach()
            self.first_id = self.tensor.rank() * self.vocab
        if self.is_last:
            self.final_norm, self.head = _Norm(model.decoder.final_layernorm), _Linear(model.head_weight)

    def __call__(self, rows: Rows, context: AttentionContext) -> Tensor | None:
        """Hidden states after the final norm, [T, B, D]; None on pipeline stages before the last."""
        hidden_TBD = self._embed(rows.token) if self.is_first else self._receive(rows.token.shape)
        rotation = self._rotation(rows.position)
        masks = Masks.of(rows) if self.has_adapters and not context.all_clean else None
        for layer in self.layers:
            hidden_TBD = layer(hidden_TBD, rotation, context, masks)
        if self.is_last:
            return self.final_norm(hidden_TBD)
        dist.send(hidden_TBD, group=self.pipeline, group_dst=self.pipeline.rank() + 1)
        return None

    def depth(
        self, depth: int, state_TD: Tensor, token_T: Tensor, position_T: Tensor, context: AttentionContext
    ) -> Tensor:
        """What depth 1.. makes of the states of the depth before and of the tokens that follow, [T, D]."""
        rotation, tokens_T1D = self._rotation(position_T[None]), self._embed(token_T[None])
        return self.depths[depth - 1](state_TD[:, None], tokens_T1D, rotation, context)[:, 0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over this rank's slice of the vocabulary, [N, V], float32 (float64 of float64 states)."""
        return self.head(hidden_ND).to(torch.promote_types(hidden_ND.dtype, torch.float32))

    def _embed(self, token_BT: Tensor) -> Tensor:
        token_TB = token_BT.t()
        if self.tensor.size() == 1:
            return F.embedding(token_TB, self.embedding)
        local_TB = token_TB - self.first_id
        foreign_TB = (local_TB < 0) | (local_TB >= self.vocab)
        hidden_TBD = F.embedding(local_TB.masked_fill(foreign_TB, 0), self.embedding)
        hidden_TBD = hidden_TBD.masked_fill(foreign_TB[..., None], 0)
        dist.all_reduce(hidden_TBD, group=self.tensor)
        return hidden_TBD

    def _receive(self, shape_BT: torch.Size) -> Tensor:
        B, T = shape_BT
        hidden_TBD = torch.empty(T, B, self.config.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden_TBD, group=self.pipeline, group_src=self.pipeline.rank() - 1)
        return hidden_TBD

    def _rotation(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's cosines, and its sines with the sign of the half that they are multiplied into, [T, B, 1, 1, E]."""
        angle_TBe = position_BT.t().float()[..., None] * self.inverse_frequency
        cos_TBe, sin_TBe = angle_TBe.cos(), angle_TBe.sin()
        cos_TBE, sin_TBE = torch.cat([cos_TBe, cos_TBe], dim=-1), torch.cat([-sin_TBe, sin_TBe], dim=-1)
        return cos_TBE[:, :, None, None].to(self.dtype), sin_TBE[:, :, None, None].to(self.dtype)


class Masks:
    """Which rows of a forward the adapters act on."""

    def __init__(self, is_mask_TB: Tensor) -> None:
        self.is_mask_TB1 = is_mask_TB[..., None]
        # on a GPU, all rows are computed and chosen from: their number would have to be known on the host
        self.index = None if is_mask_TB.is_cuda else is_mask_TB.nonzero(as_tuple=True)

    @classmethod
    def of(cls, rows: Rows) -> Masks:
        return cls(~rows.is_clean.t())

    def add(self, output_TBO: Tensor, input_TBI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """`output_TBO`, which may be overwritten, with the adapter's part on the mask rows; other rows stay as they
        are, bit by bit."""
        if self.index is None:
            adapted_TBO = output_TBO + F.linear(F.linear(input_TBI, a_RI), b_OR)
            return torch.where(self.is_mask_TB1, adapted_TBO, output_TBO)
        if len(self.index[0]):
            output_TBO[self.index] += F.linear(F.linear(input_TBI[self.index], a_RI), b_OR)
        return output_TBO


class _Layer:
    """One transformer layer of a tensor-parallel rank."""

    def __init__(self, layer, group: dist.ProcessGroup) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.number, self.group = layer.layer_number, group
        self.width = attention.hidden_size_per_attention_head
        self.key_heads = attention.num_query_groups_per_partition
        self.heads_per_key = attention.num_attention_heads_per_partition // self.key_heads
        self.attention_norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        self.normalises = layer.config.qk_layernorm
        if self.normalises:
            self.q_norm, self.k_norm = _Norm(attention.q_layernorm), _Norm(attention.k_layernorm)
        self.qkv, self.projection = _Adapted(attention.linear_qkv), _Adapted(attention.linear_proj)
        self.up, self.down = _Adapted(mlp.linear_fc1), _Adapted(mlp.linear_fc2)

    def __call__(self, x_TBD: Tensor, rotation: tuple, context: AttentionContext, masks: Masks | None) -> Tensor:
        x_TBD = x_TBD + self._attention(self.attention_norm(x_TBD), rotation, context, masks)
        gate, up = self.up(self.mlp_norm(x_TBD), masks).chunk(2, dim=-1)
        return x_TBD + self._sum(self.down(F.silu(gate).mul_(up), masks))

    def _attention(self, x_TBD: Tensor, rotation: tuple, context: AttentionContext, masks: Masks | None) -> Tensor:
        (T, B, _), G, J, E = x_TBD.shape, self.key_heads, self.heads_per_key, self.width
        # megatron's order: a key head's queries, key and value
        mixed_TBGJE = self.qkv(x_TBD, masks).view(T, B, G, J + 2, E)
        if self.normalises:
            q_TBGJE, k_TBG1E = self.q_norm(mixed_TBGJE[..., :J, :]), self.k_norm(mixed_TBGJE[..., J : J + 1, :])
            turned_TBGJE = _rotate(torch.cat([q_TBGJE, k_TBG1E], dim=3), *rotation)
        else:
            turned_TBGJE = _rotate(mixed_TBGJE[..., : J + 1, :], *rotation)
        q_TBHE = turned_TBGJE[..., :J, :].reshape(T, B, G * J, E)
        out_TBHE = context.attend(self.number, q_TBHE, turned_TBGJE[..., J, :], mixed_TBGJE[..., J + 1, :], E**-0.5)
        return self._sum(self.projection(out_TBHE.flatten(2), masks))

    def _sum(self, x_TBD: Tensor) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(x_TBD, group=self.group)
        return x_TBD


class _Depth:
    """A layer of megatron-core's multi-token prediction, of a tensor-parallel rank."""

    def __init__(self, depth, group: dist.ProcessGroup) -> None:
        self.group = group
        self.token_norm, self.state_norm = _Norm(depth.enorm), _Norm(depth.hnorm)
        self.join, self.norm = _Linear(depth.eh_proj.weight), _Norm(depth.final_layernorm)
        # its name until megatron-core 0.16, and since
        layer = depth.transformer_layer if hasattr(depth, "transformer_layer") else depth.mtp_model_layer
        self.layer = _Layer(layer, group)
        self.layer.number = layer.config.num_layers + depth.layer_number  # megatron-core 0.19 begins anew

    def __call__(self, state_TBD: Tensor, token_TBD: Tensor, rotation: tuple, context: AttentionContext) -> Tensor:
        joined_TBD = self.join(torch.cat([self.token_norm(token_TBD), self.state_norm(state_TBD)], dim=-1))
        if self.group.size() > 1:
            parts = [torch.empty_like(joined_TBD) for _ in range(self.group.size())]
            dist.all_gather(parts, joined_TBD, group=self.group)
            joined_TBD = torch.cat(parts, dim=-1)
        return self.norm(self.layer(joined_TBD, rotation, context, None))


class _Norm:
    def __init__(self, norm: torch.nn.RMSNorm) -> None:
        self.weight, self.epsilon = norm.weight.detach(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        # torch's own rms_norm makes the same of twice as many operations on a CPU
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self.epsilon).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the two halves of each head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1).mul_(sin).addcmul_(x, cos)


class _Linear:
    """x -> x W^T + b. On a CPU through weights that oneDNN has packed for its kernels, save where the plain product is
    faster for a single row: that depends on the processor, so each shape is measured once, and the plain AR step, which
    is what fused decoding is compared with, gets the faster one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        packs = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        self.packed = None
        if packs and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.plain_row = _plain_is_faster(self)
            if not self.plain_row:
                self.weight = None  # one copy is enough

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None or (self.plain_row and x.numel() == x.shape[-1]):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class _Adapted:
    """A linear layer of the model with its adapter, if it has one. Of inputs that are split over the tensor group, the
    adapter's part is a summand of the layer's own sum."""

    def __init__(self, linear) -> None:
        self.linear, adapter = _Linear(linear.weight, linear.bias), getattr(linear, "lora", None)
        self.adapter = None if adapter is None else (adapter.a.detach(), adapter.b.detach() * adapter.scale)

    def __call__(self, x: Tensor, masks: Masks | None) -> Tensor:
        output = self.linear(x)
        return output if self.adapter is None or masks is None else masks.add(output, x, *self.adapter)


_FASTER: dict[tuple, bool] = {}  # by shape, type and threads


def _plain_is_faster(linear: _Linear) -> bool:
    """For one row, by the medians of some products of both kinds in turn."""
    weight = linear.weight
    key = (*weight.shape, weight.dtype, torch.get_num_threads())
    if key not in _FASTER:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        row = weight[:1] * 1
        for _ in range(9):
            for kind, found in seconds.items():
                linear.plain_row = kind
                started = time.perf_counter()
                linear(row)
                found.append(time.perf_counter() - started)
        _FASTER[key] = statistics.median(seconds[True]) < statistics.median(seconds[False])
    return _FASTER[key]
