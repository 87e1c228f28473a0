"""The backbone: megatron-core's GPTModel whose RoPE follows the rows' positions and whose attention follows the rows.

Shape suffixes: B sequences, T rows, D hidden width, N selected rows, V vocabulary ids of this tensor-parallel rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.device import has_cuda
from tidar_mega.model import lora, rope
from tidar_mega.model.any_order import AnyOrderAttention
from tidar_mega.model.attention import AttentionContext
from tidar_mega.model.multi_token import MultiTokenAttention
from tidar_mega.model.spec import block_spec, multi_token_spec, set_weight, transformer_config
from tidar_mega.rows import Rows


class HybridGPT(GPTModel):
    """A GPTModel that runs any `Rows`. `forward` stops after the final norm: the head is only computed where needed."""

    def __init__(self, *args, rotary_base: float, has_adapters: bool = False, **kwargs) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.has_adapters = has_adapters
        frequency = rope.frequencies(rotary_base, self.config.kv_channels)
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    def forward(self, rows: Rows, context: AttentionContext) -> Tensor:
        """Hidden states after the final norm, [T, B, D], identical on every tensor-parallel rank.

        The gradient that flows back into them is summed over the tensor-parallel group, as each rank's part of the
        head contributes its own. On an earlier pipeline stage: what the next stage takes, [T, B, D] or, with sequence
        parallelism, this rank's part of the T rows.
        """
        hidden = super().forward(
            input_ids=rows.token,
            position_ids=rows.position,
            attention_mask=None,
            extra_block_kwargs={"attention_bias": context},
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden)

    def _in_order(self, hidden_TBD: Tensor, copies: int) -> Tensor:
        """Hidden states of several rows for each place, one copy of all places behind the other: with sequence
        parallelism, each rank gave its places of the first copy, then those of the next."""
        if not (self.post_process and self.config.sequence_parallel):
            return hidden_TBD
        ranks = self.pg_collection.tp.size()
        return hidden_TBD.unflatten(0, (ranks, copies, -1)).transpose(0, 1).flatten(0, 2)

    @property
    def head_weight(self) -> Tensor:
        """Output weights of this rank's slice of the vocabulary, [V, D]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits over this rank's slice of the vocabulary, [N, V], float32."""
        return F.linear(hidden_ND, self.head_weight).float()

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple:
        # GPTModel's own RoPE ignores the positions that it is given; element 1 is where it hands on its angles
        embedded, no_rope, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        assert no_rope is None
        if self.has_adapters and embedded is not None and torch.is_grad_enabled():
            # a frozen embedding has no gradient, and what is recomputed behind it would then have none either
            embedded = embedded.detach().requires_grad_()
        return (embedded, rope.angles(position_ids, self.inverse_frequency), *rest)

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class AnyOrderGPT(HybridGPT):
    """The backbone with the causal block of self-speculative masked diffusion as its last layer (arXiv 2510.03929)."""

    def forward(self, rows: Rows, context: AnyOrderAttention) -> Tensor:
        """As in HybridGPT, for the 2S rows of `methods/ssmd.py`: the layers before the last run the first half, the
        last one makes the states of the other, [2S, B, D]."""
        return self._in_order(super().forward(rows.slice(0, rows.shape[1] // 2), context), copies=2)

    def noncausal(self, rows: Rows, context: AttentionContext) -> Tensor:
        """Hidden states behind the layers before the last, [S, B, D], of S rows; whole model in this process."""
        hidden = self.embedding(input_ids=rows.token, position_ids=rows.position)
        angles = rope.angles(rows.position, self.inverse_frequency)
        for layer in self.decoder.layers[:-1]:
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles, attention_bias=context)
        return hidden

    def causal(self, hidden_SBD: Tensor, context: AnyOrderAttention) -> Tensor:
        """Hidden states of the causal rows, [S, B, D], from what `noncausal` gave."""
        return self.decoder.layers[-1].causal(hidden_SBD, context)

    def speak(self, hidden_NBD: Tensor) -> Tensor:
        """Logits of either kind of hidden states, [N, B, V]."""
        return self.logits(self.decoder.final_layernorm(hidden_NBD))


class MultiTokenGPT(HybridGPT):
    """The backbone with megatron-core's block of multi-token prediction behind it (DeepSeek-V3, arXiv 2412.19437).

    megatron rolls the tokens of a sequence by one for each depth, across documents and between context-parallel ranks.
    Here the rows of a depth say which tokens they take (`methods/mtp.py`): its embedding gives these, nothing is sent.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.mtp.layers if self.mtp_process else ():
            layer.cp_group = None  # what it would exchange, the rows say
        if self.post_process and not self.pre_process and self.share_embeddings_and_output_weights:
            # the head is this stage's copy of the embedding; megatron makes another weight here, and cannot save it
            self.output_layer.weight = None

    def forward(self, rows: Rows, context: MultiTokenAttention) -> Tensor:
        """As in HybridGPT, for the rows of all depths: the backbone runs the first S, and each depth S more."""
        copies = 1 + self.config.mtp_num_layers
        return self._in_order(super().forward(rows.slice(0, rows.shape[1] // copies), context), copies)

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        rotary_pos_emb: Tensor,
        extra_block_kwargs: dict,
        **_,
    ) -> Tensor:
        if not self.mtp_process:
            return hidden_states
        tokens = iter(extra_block_kwargs["attention_bias"].tokens)

        def embedding(**_) -> Tensor:
            return self.embedding(input_ids=next(tokens), position_ids=position_ids)

        return self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=hidden_states,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            embedding=embedding,
            extra_block_kwargs=extra_block_kwargs,
        )


def build(
    config: Config,
    vocab_size: int,
    training: bool = True,
    draw: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> list[HybridGPT]:
    """This rank's part of the model, in `precision.dtype`, on its device: one chunk for each virtual pipeline stage.

    Needs megatron's groups to be initialised. The weights are a function of train.seed alone, equal for every layout;
    without `draw`, for a model that is loaded next, matrices are zero. `progress` is called with each that is drawn.
    """
    shape = transformer_config(config, training)
    parts = config.parallel.virtual_pipeline
    chunks = [_chunk(config, shape, vocab_size, part if parts > 1 else None) for part in range(parts)]
    if draw:
        initialise(chunks, config.train.seed, progress)
    if config.lora.rank:
        for chunk in chunks:
            lora.freeze(chunk)
    return [chunk.cuda(torch.cuda.current_device()) for chunk in chunks] if has_cuda() else chunks


def _chunk(config: Config, shape: TransformerConfig, vocab_size: int, vp_stage: int | None) -> HybridGPT:
    rank, last = parallel_state.get_pipeline_model_parallel_rank(), config.parallel.pipeline - 1
    ids, base = config.padded_vocab_size(vocab_size), config.model.rotary_base
    post_process = rank == last and vp_stage in (None, config.parallel.virtual_pipeline - 1)
    causal = {"vocab_size": ids, "rotary_base": base} if config.traits.has_causal_block and post_process else None
    spec = block_spec(shape, vp_stage, config.lora, causal)
    kind = AnyOrderGPT if config.traits.has_causal_block else MultiTokenGPT if config.traits.has_depths else HybridGPT
    return kind(
        config=shape,
        transformer_layer_spec=spec,
        mtp_block_spec=multi_token_spec(shape, spec, vp_stage) if config.traits.has_depths else None,
        vocab_size=ids,
        max_sequence_length=config.data.seq_length,
        pre_process=rank == 0 and vp_stage in (None, 0),
        post_process=post_process,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        rotary_base=base,
        has_adapters=config.lora.rank > 0,
        vp_stage=vp_stage,
    )


@torch.no_grad()
def initialise(chunks: list[HybridGPT], seed: int, progress: Callable[[], None]) -> None:
    """Draws every weight matrix from (seed, its name in the whole model) and keeps this tensor-parallel rank's part.

    Megatron would draw in the order of construction, which depends on the pipeline layout; biases and norms keep the
    constants that it gives them.
    """
    for name, weight, chunk in _matrices(chunks):
        progress()
        (_draw_adapter if lora.is_adapter(name) else _draw)(weight, chunk, seed, name)


def _matrices(chunks: list[HybridGPT]) -> Iterator[tuple[str, Tensor, HybridGPT]]:
    """(name in the whole model, weight, its chunk)"""
    for chunk in chunks:
        if chunk.pre_process or chunk.mtp_process:  # the depths of multi-token prediction have the embedding, too
            yield "word_embeddings", chunk.embedding.word_embeddings.weight, chunk
        if chunk.post_process:
            is_tied = chunk.share_embeddings_and_output_weights
            yield "word_embeddings" if is_tied else "output_layer", chunk.head_weight, chunk
        for layer in chunk.decoder.layers:
            for name, weight in layer.named_parameters():
                if weight.dim() == 2:
                    yield f"layer {layer.layer_number} {name}", weight, chunk
        for depth in chunk.mtp.layers if chunk.mtp_process else ():
            for name, weight in depth.named_parameters():
                if weight.dim() == 2:
                    name = name.replace("mtp_model_layer", "transformer_layer")  # as until megatron-core 0.16
                    yield f"depth {depth.layer_number} {name}", weight, chunk


def _draw(weight: Tensor, chunk: HybridGPT, seed: int, name: str) -> None:
    is_whole = "mix" in name  # on every rank
    writes_residual = "linear_proj" in name or "linear_fc2" in name  # split over its inputs
    scaled = math.sqrt(2 * chunk.config.num_layers) if writes_residual or is_whole else 1  # with depth
    dim = None if is_whole else 1 if writes_residual else 0
    # a rank's part of fc1 is a slice of the gate and a slice of the up projection
    pieces = 2 if "linear_fc1" in name else 1
    _set_part(weight, seed, name, chunk.config.init_method_std / scaled, dim, pieces)


def _draw_adapter(weight: Tensor, chunk: HybridGPT, seed: int, name: str) -> None:
    """a with a standard deviation of 1 / sqrt(inputs); b stays zero, so that an adapter begins with adding nothing."""
    if name.endswith(".a"):
        is_split = "linear_proj" in name or "linear_fc2" in name
        ranks = parallel_state.get_tensor_model_parallel_world_size() if is_split else 1
        _set_part(weight, seed, name, (weight.shape[1] * ranks) ** -0.5, dim=1 if is_split else None)


def _set_part(weight: Tensor, seed: int, name: str, std: float, dim: int | None, pieces: int = 1) -> None:
    """This tensor-parallel rank's part of the drawn matrix, which is split along `dim` (None: whole on every rank)."""
    group = parallel_state.get_tensor_model_parallel_group()
    shape = [size * group.size() if d == dim else size for d, size in enumerate(weight.shape)]
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    whole = torch.empty(shape).normal_(0.0, std, generator=draw)
    if dim is not None:
        mine = [piece.chunk(group.size(), dim)[group.rank()] for piece in whole.chunk(pieces, dim)]
        whole = torch.cat(mine, dim)
    set_weight(weight, whole)
