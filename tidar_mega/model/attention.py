"""Core attention: what replaces megatron's `core_attention` in the layer spec, and the training backends behind it.

Megatron hands one object of ours, the *context*, to every layer as `attention_bias`. The context decides what is
attended to: `TrainingAttention` here attends within the rows of the forward pass, decoding brings a context that also
reads and writes a cache. The layer itself knows nothing about masks.

    dense   reference: torch's scaled_dot_product_attention with the boolean [B, T, K] mask; any device, any type
    tiles   CPU: skips what the mask forbids (`tiles.py`); differentiable
    flex    CUDA: FlexAttention with a block mask; on CPU only its forward works

With context parallelism the rows of the forward are a part of the sequence's (`parallel/context.py`): their keys are
gathered first, and then every backend attends from T rows to K keys.

Shape suffixes: T rows of this rank, K keys they may look at, B sequences, H query heads, G key heads, E head width.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidar_mega.config import ConfigError
from tidar_mega.model.tile_plan import Structure, make_plan
from tidar_mega.model.tiles import tiled_attention
from tidar_mega.parallel.context import Part, gather_keys, whole
from tidar_mega.rows import Rows, rule, visible

BACKENDS = ("dense", "tiles", "flex")
FLEX_BLOCK = 128  # the block of FlexAttention's kernels on GPUs
# its other kernel, for few rows, does not exist where a key head's query rows are more than a block
FLEX_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


class AttentionContext(Protocol):
    """What every layer's core attention asks for its result. `all_clean`: there are no mask rows for adapters."""

    all_clean: bool

    def attend(self, layer_number: int, q_TBHE: Tensor, k_TBGE: Tensor, v_TBGE: Tensor, scale: float) -> Tensor:
        """Attention of the forward pass's rows in layer `layer_number` (from 1, as megatron counts over all stages).

        q [T, B, H, E] and k, v [T, B, G, E] are megatron's own layout, RoPE and q/k norm applied, key heads not
        repeated (query head h reads key head h // (H / G)); they may be strided views. Returns [T, B, H, E] in the
        type of q; contiguous is best, because the next layer flattens the heads. Scores are multiplied by `scale`.
        """
        ...


class HybridAttention(MegatronModule):
    """Core attention of megatron's layer spec that leaves masks and caches to the context (megatron-core 0.16+)."""

    def __init__(self, config, layer_number: int, softmax_scale: float | None = None, **_):
        super().__init__(config)
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: AttentionContext | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """query [T, B, H, E], key and value [T, B, G, E] -> [T, B, H * E]; `attention_bias` is the context."""
        assert attention_bias is not None, "the model must be given an attention context"
        assert packed_seq_params is None, "documents are kept apart by the rows, not by packed_seq_params"
        scale = self.scale if self.scale is not None else query.shape[-1] ** -0.5
        return attention_bias.attend(self.layer_number, query, key, value, scale).flatten(2)


class TrainingAttention:
    """The context of training and likelihood: the rows of the forward pass attend to one another, nothing is cached.

    `rows` are all rows of the sequences, or this rank's part of them. `backend` is a member of BACKENDS (see
    `choose_backend`). The mask or plan is made once, at the first layer."""

    def __init__(self, rows: Rows | Part, backend: str):
        assert backend in BACKENDS, backend
        self.part = whole(rows) if isinstance(rows, Rows) else rows
        self.queries, self.keys, self.backend = self.part.rows, self.part.keys, backend

    @property
    def all_clean(self) -> bool:
        return self.clean == self.queries.shape[1]

    @cached_property
    def clean(self) -> int:
        """How many rows of each sequence are clean: they come first. Adapters act behind them (`lora.py`)."""
        clean_B = self.queries.is_clean.long().cumprod(dim=1).sum(dim=1)
        assert torch.equal(clean_B, self.queries.is_clean.sum(dim=1)) and len(clean_B.unique()) == 1
        return int(clean_B[0])

    def attend(self, layer_number: int, q_TBHE: Tensor, k_TBGE: Tensor, v_TBGE: Tensor, scale: float) -> Tensor:
        k_KBGE, v_KBGE = gather_keys(k_TBGE, v_TBGE, self.part)
        if self.backend == "tiles":
            return tiled_attention(q_TBHE, k_KBGE, v_KBGE, scale, self._plan)
        q_BHTE, k_BGKE, v_BGKE = (x.permute(1, 2, 0, 3) for x in (q_TBHE, k_KBGE, v_KBGE))
        if self.backend == "dense":
            mask_B1TK = self._dense_mask[:, None]
            out_BHTE = scaled_dot_product_attention(q_BHTE, k_BGKE, v_BGKE, mask_B1TK, scale=scale, enable_gqa=True)
        else:
            if not torch.is_grad_enabled():  # on CPU flex refuses whatever requires a gradient, wanted or not
                q_BHTE, k_BGKE, v_BGKE = (x.detach() for x in (q_BHTE, k_BGKE, v_BGKE))
            flex = _flex_attention(q_TBHE.is_cuda)
            out_BHTE = flex(
                q_BHTE,
                k_BGKE,
                v_BGKE,
                block_mask=self.block_mask,
                scale=scale,
                enable_gqa=True,
                kernel_options=FLEX_OPTIONS,
            )
        return out_BHTE.permute(2, 0, 1, 3).contiguous()

    @cached_property
    def _dense_mask(self) -> Tensor:
        return visible(self.queries, self.keys)

    @cached_property
    def _plan(self) -> tuple[Structure, ...]:
        return make_plan(self.queries, self.keys)

    @cached_property
    def block_mask(self):
        """FlexAttention's BlockMask of these rows and keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        (B, T), K = self.queries.shape, self.keys.shape[1]
        device = self.queries.token.device
        # Compiled, the mask is made block by block; without a compiler (CPU tests) it is small anyway.
        mask_mod = flex_rule(self.queries, self.keys)
        compiled = device.type == "cuda"
        return create_block_mask(mask_mod, B, None, T, K, device=device, BLOCK_SIZE=FLEX_BLOCK, _compile=compiled)


def flex_rule(queries: Rows, keys: Rows | None = None):
    """The visibility rule as FlexAttention's `mask_mod(b, h, q_index, k_index)`; the default of `keys` is `queries`."""
    keys = queries if keys is None else keys
    q_fields = queries.document, queries.order, queries.horizon, queries.group
    k_fields = keys.document, keys.order, keys.group
    causal_in_group = queries.causal_in_group

    def mask_mod(b, h, q, k):
        return rule(*(x_BT[b, q] for x_BT in q_fields), *(x_BK[b, k] for x_BK in k_fields), causal_in_group)

    return mask_mod


def choose_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Resolves `model.attention`: 'auto' is flex on CUDA (dense for float64, which flex has no kernels for) and tiles
    on CPU. Raises ConfigError for a backend that cannot train on the device."""
    kind = torch.device(device).type
    if name == "auto":
        if kind == "cpu":
            return "tiles"
        return "dense" if dtype == torch.float64 else "flex"
    if name not in BACKENDS:
        raise ConfigError(f"model.attention: {name!r} is not one of auto, {', '.join(BACKENDS)}")
    if name == "tiles" and kind != "cpu":
        raise ConfigError(f"model.attention=tiles works on CPU, not on {kind}; use flex, dense or auto")
    if name == "flex" and kind == "cpu":
        raise ConfigError("model.attention=flex has no backward on CPU; use tiles, dense or auto")
    return name


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic=False: one kernel for each shape; a training run has one or two shapes.
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
