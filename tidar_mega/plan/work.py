"""The work of a step: rows, visible pairs of the true mask, floating point operations."""

from __future__ import annotations

from dataclasses import dataclass

from tidar_mega.config import Config
from tidar_mega.plan.parameters import (
    causal_input_parameters,
    depth_parameters,
    head_parameters,
    layer_parameters,
)

ATTENTION_TILE = 128  # FlexAttention computes whole tiles of so many queries and keys (`model/attention.py`)


@dataclass(frozen=True)
class Work:
    """Of one sequence that is one document: packed documents see fewer pairs."""

    rows: int
    pairs: float  # (query, key) pairs that the mask allows
    tile_pairs: float  # pairs of one layer that kernels compute, which skip whole tiles only
    head_rows: float  # rows with a loss


def sequence_work(config: Config) -> Work:
    """A clean row sees itself and what is before it; a mask row what is before its block, and its block.

    Pairs: S (S + 1) / 2 for S clean rows; M (S + B) / 2 for M mask rows in blocks of B (TiDAR, arXiv 2511.08923,
    section 3.1), the mean over which blocks are drafted; (B - 1) / 2 fewer per mask where blocks are causal (I-DLM).
    """
    length, block, drafted = config.data.seq_length, config.train.block, config.drafted_rows
    if not config.traits.is_left_to_right:
        return _any_to_any_work(config)
    if config.traits.has_depths:
        return _multi_token_work(config)
    tile = min(ATTENTION_TILE, length)
    unseen = (block - 1) / 2 if config.traits.causal_in_group else 0
    masked = (block + 1) / (2 * block) if config.traits.masks_in_part else 1  # others have no loss
    below, own = (length + drafted) * (length + tile) / 2, drafted * max(tile, block)
    return Work(
        rows=config.forward_rows,
        pairs=length * (length + 1) / 2 + drafted * ((length + block) / 2 - unseen),
        tile_pairs=below + own,
        head_rows=length + round(drafted * masked),
    )


def _multi_token_work(config: Config) -> Work:
    """S causal rows in the backbone, and S more in each depth, which see what those see."""
    length, layers = config.data.seq_length, config.model.num_layers
    copies, tile = config.rows_per_place, min(ATTENTION_TILE, config.data.seq_length)
    seen = (layers + copies - 1) / layers * length * (length + tile) / 2  # as if the depths' were the backbone's
    return Work(length * copies, copies * length * (length + 1) / 2, seen, length * copies)


def _any_to_any_work(config: Config) -> Work:
    """Masked diffusion: every row sees every row, and (S + 1) / 2 of S are masked, the mean over how many are. A causal
    block has S rows of its own that see one another in a random order, so that no whole tile can be skipped."""
    length, halves = config.data.seq_length, 1 + config.traits.has_causal_block
    causal_pairs = length * (length + 1) / 2 if config.traits.has_causal_block else 0
    return Work(length * halves, length**2 + causal_pairs, float(length**2), halves * (length + 1) / 2)


def through_layers(config: Config, rows: float, pairs: float) -> tuple[float, float]:
    """Rows and visible pairs of a forward, added up over all layers.

    With multi-token prediction, a share of the rows and pairs goes through all layers, the others through a depth each.
    With a causal block, half of the rows go through all layers but the last, the others through that one. Documents of
    D rows have D^2 pairs in the former and D (D + 1) / 2 in the latter, which says how many of `pairs` are where.
    """
    layers = config.model.num_layers
    if config.traits.has_depths:
        per_row = (layers + config.model.mtp_num_layers) / config.rows_per_place
        return rows * per_row, pairs * per_row
    if not config.traits.has_causal_block:
        return rows * layers, pairs * layers
    noncausal = (2 * pairs - rows / 2) / 3
    return rows / 2 * layers, (layers - 1) * noncausal + (pairs - noncausal)


def _dense_flops(config: Config, layer_rows: float) -> float:
    """Forward of all matrices but the head, for rows added up over the layers."""
    m, layer = config.model, layer_parameters(config)
    if config.traits.has_depths:
        share = m.mtp_num_layers / (m.num_layers + m.mtp_num_layers)
        return 2 * (layer + share * (depth_parameters(config) - layer)) * layer_rows
    return 2 * layer * layer_rows + 2 * causal_input_parameters(config) * layer_rows / m.num_layers


def attention_flops(config: Config, pairs: float) -> float:
    """Forward of one layer: scores and weighted sum, two operations per multiply-add."""
    return 4.0 * config.model.num_attention_heads * config.model.head_width * pairs


def training_flops(config: Config, vocab_size: int, rows: float, pairs: float, head_rows: float) -> float:
    """Forward and backward of `rows` rows, `pairs` visible (query, key) pairs and `head_rows` rows with a loss.

    Counts two operations per multiply-add, the backward as twice the forward, and no recomputation. With adapters, the
    backward of the frozen weights is that of their inputs alone, and the adapters' own products are left out.
    """
    layer_rows, layer_pairs = through_layers(config, rows, pairs)
    dense, attention = _dense_flops(config, layer_rows), attention_flops(config, layer_pairs)
    head = 2 * head_parameters(config, vocab_size) * head_rows
    return matmul_passes(config) * (dense + head) + 3.0 * attention


def matmul_passes(config: Config) -> int:
    """How often a step multiplies with a weight: forward, for the gradient of the input and, unless it is frozen under
    adapters, for its own."""
    return 2 if config.lora.rank else 3


def model_flops(config: Config, vocab: int) -> float:
    """Of a whole step, as the model needs them: the numerator of the model FLOP utilisation."""
    work, count = sequence_work(config), config.train.global_batch_size
    return training_flops(config, vocab, work.rows * count, work.pairs * count, work.head_rows * count)


def hardware_flops(config: Config, vocab: int) -> float:
    """Of a whole step, as the GPUs do them: with whole tiles of attention, its scores made twice and recomputation.

    Flash-style kernels make the scores again in the backward: five products instead of four (FlashAttention-2, arXiv
    2307.08691, section 3.1).
    """
    work, m, count = sequence_work(config), config.model, config.train.global_batch_size
    dense = _dense_flops(config, through_layers(config, work.rows, work.pairs)[0])
    attention = attention_flops(config, work.tile_pairs) * m.num_layers
    head = 2 * head_parameters(config, vocab) * work.head_rows
    again_dense, again_attention = recomputed(config)
    often = matmul_passes(config)
    return count * ((often + again_dense) * dense + (3.5 + again_attention) * attention + often * head)


def recomputed(config: Config) -> tuple[int, int]:
    """How often the backward repeats a layer's forward, (matrix products, attention)."""
    return {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[config.parallel.recompute]
