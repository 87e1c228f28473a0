"""The causal block of self-speculative masked diffusion (arXiv 2510.03929), the last layer of the backbone.

Its row for the place n = sigma(j+1) is made from the hidden state of n, and the hidden state and the token of the place
before it in the order, p = sigma(j). Both positions are encoded: a query asks from its own place n; half of the
frequencies of a key say where its token stands, p, the other half its own place. (With p in the queries, too, scores
would know how far two tokens are apart, but not how far a token is from the place to be predicted.) What comes out is
added to the hidden state of n (output residual) and goes through the same norm and head: target and draft begin alike.

Shape suffixes: B sequences, T rows of the forward (L of them on this sequence-parallel rank), K keys, D hidden width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from tidar_mega.model import rope
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.norm import Norm
from tidar_mega.parallel.context import Part, copies, gather_states
from tidar_mega.rows import place_before


class AnyOrderAttention:
    """The context of a forward over 2S rows (`methods/ssmd.py`), or this rank's part of them: of the first S for all
    layers but the last, and of the others for that one."""

    def __init__(self, part: Part, backend: str) -> None:
        first, self.part = copies(part, 2)
        self.noncausal = TrainingAttention(first, backend)
        # in a random order there are no tiles to leave out, and every sequence would need a plan of its own
        self.causal = TrainingAttention(self.part, "dense" if backend == "tiles" else backend)

    def attend(self, layer_number: int, q_TBHE: Tensor, k_TBGE: Tensor, v_TBGE: Tensor, scale: float) -> Tensor:
        return self.noncausal.attend(layer_number, q_TBHE, k_TBGE, v_TBGE, scale)

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """Which of the keys stands before each row in the order, int64 [B, T], and whether there is one, bool."""
        return place_before(self.part.rows, self.part.keys)

    def states_before(self, hidden_TBD: Tensor) -> Tensor:
        """Of every row, the hidden state of the place before it, 0 for the first; [T, B, D]. Collective, as `part`."""
        (before_BT, exists_BT), states_KBD = self.before, gather_states(hidden_TBD, self.part)
        index_TBD = before_BT.t()[..., None].expand(-1, -1, states_KBD.shape[-1])
        return states_KBD.gather(0, index_TBD) * exists_BT.t()[..., None]

    def positions(self) -> tuple[Tensor, Tensor]:
        """Of every row, the position of the place before it (its own for the first) and its own, int64 [B, T]."""
        (before_BT, exists_BT), own_BT = self.before, self.part.rows.position
        return self.part.keys.position.gather(1, before_BT).where(exists_BT, own_BT), own_BT


class CausalLayer(TransformerLayer):
    """A transformer layer with its own input and the output residual; [L, B, D] -> [2L, B, D], the hidden states that
    came in before those of the causal rows."""

    def __init__(self, config: TransformerConfig, *args, vocab_size: int, rotary_base: float, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.causal_input = CausalInput(config, vocab_size, self.pg_collection.tp)
        self.register_buffer("frequency", rope.frequencies(rotary_base, config.kv_channels), persistent=False)

    def forward(self, hidden_states: Tensor, attention_bias: AnyOrderAttention, **_) -> tuple[Tensor, None]:
        causal = self.causal(hidden_states, attention_bias)
        return torch.cat([hidden_states, causal]), None

    def causal(self, hidden_LBD: Tensor, context: AnyOrderAttention) -> Tensor:
        """What the causal rows come to, [L, B, D], from the hidden states of the layer before."""
        mixed_LBD = self.causal_input(hidden_LBD, context)
        before_BT, own_BT = context.positions()
        angles = rope.angles(own_BT, self.frequency), rope.angles_of_two(before_BT, own_BT, self.frequency)
        out_LBD, _ = super().forward(
            hidden_states=mixed_LBD, attention_mask=None, rotary_pos_emb=angles, attention_bias=context.causal
        )
        return out_LBD + hidden_LBD


class CausalInput(MegatronModule):
    """Hidden state of the place, hidden state and token of the place before: normalised, joined, projected to D."""

    def __init__(self, config: TransformerConfig, vocab_size: int, group) -> None:
        super().__init__(config)
        self.group, width = group, config.hidden_size
        self.tokens = VocabParallelEmbedding(
            vocab_size,
            width,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=group,
        )
        self.state_norm = Norm(config, width, config.layernorm_epsilon)
        self.token_norm = Norm(config, width, config.layernorm_epsilon)
        self.mix = nn.Linear(3 * width, width, bias=False, dtype=config.params_dtype)
        # rows are split over the tensor group, so that every rank has a part of this whole weight's gradient
        self.mix.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_LBD: Tensor, context: AnyOrderAttention) -> Tensor:
        normed_LBD = self.state_norm(hidden_LBD)
        joined = [normed_LBD, self._before(normed_LBD, context), self.token_norm(self._tokens(context))]
        return self.mix(torch.cat(joined, dim=-1))

    def _before(self, hidden_LBD: Tensor, context: AnyOrderAttention) -> Tensor:
        if not self.config.sequence_parallel:
            return context.states_before(hidden_LBD)
        hidden_TBD = gather_from_sequence_parallel_region(hidden_LBD, tensor_parallel_output_grad=True)
        return context.states_before(hidden_TBD).chunk(self.group.size())[self.group.rank()]

    def _tokens(self, context: AnyOrderAttention) -> Tensor:
        embedded = self.tokens(context.part.rows.token)
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1)
