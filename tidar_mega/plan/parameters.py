"""Counts of weights, of the whole model and of one rank."""

from __future__ import annotations

from tidar_mega.config import Config


def layer_parameters(config: Config) -> int:
    """Weights of one transformer layer that are multiplied with every row."""
    m = config.model
    attention = m.hidden_size * m.head_width * (2 * m.num_attention_heads + 2 * m.num_query_groups)
    return attention + 3 * m.hidden_size * m.ffn_hidden_size


def causal_input_parameters(config: Config) -> int:
    """Weights before the causal layer of self-speculative masked diffusion that are multiplied with every row."""
    return 3 * config.model.hidden_size**2 if config.traits.has_causal_block else 0


def depth_parameters(config: Config) -> int:
    """Weights of one layer of multi-token prediction that are multiplied with every row."""
    return layer_parameters(config) + 2 * config.model.hidden_size**2


def head_parameters(config: Config, vocab_size: int) -> int:
    return config.model.hidden_size * vocab_size


def norm_parameters(config: Config) -> int:
    """Weights of a layer that every tensor-parallel rank holds whole: two norms, and those of q and k."""
    m = config.model
    return 2 * m.hidden_size + (2 * m.head_width if m.qk_layernorm else 0)


def bias_parameters(config: Config) -> int:
    m = config.model
    return m.head_width * (m.num_attention_heads + 2 * m.num_query_groups) if m.add_qkv_bias else 0


def adapter_parameters(config: Config, tensor: int = 1) -> int:
    """Weights of a layer's adapters (`model/lora.py`) on one of `tensor` ranks: [rank, inputs] and [outputs, rank], of
    which the side that the layer splits is split."""
    m, rank = config.model, config.lora.rank
    queries, keys = m.head_width * m.num_attention_heads, m.head_width * m.num_query_groups
    column = {"linear_qkv": queries + 2 * keys, "linear_fc1": 2 * m.ffn_hidden_size}  # their outputs are split
    row = {"linear_proj": queries, "linear_fc2": m.ffn_hidden_size}  # their inputs are
    sides = column | row
    return rank * sum(m.hidden_size + sides[name] // tensor for name in config.lora.targets) if rank else 0


def total_parameters(config: Config, vocab: int) -> int:
    """All weights of the model, tied ones once. `vocab` is the padded size."""
    layer = layer_parameters(config) + norm_parameters(config) + bias_parameters(config) + adapter_parameters(config)
    tables = (1 if config.model.tie_embeddings else 2) + config.traits.has_causal_block
    own = config.model.num_layers * layer + causal_input_parameters(config) + _causal_norms(config)
    own += mtp_depths(config) * (layer + depth_parameters(config) - layer_parameters(config) + _depth_norms(config))
    return own + config.model.hidden_size + tables * head_parameters(config, vocab)


def _causal_norms(config: Config) -> int:
    return 2 * config.model.hidden_size if config.traits.has_causal_block else 0


def mtp_depths(config: Config) -> int:
    return config.model.mtp_num_layers if config.traits.has_depths else 0


def _depth_norms(config: Config) -> int:
    """Beside those of its layer: of the state, of the token, and the last."""
    return 3 * config.model.hidden_size


def stage_parameters(config: Config, vocab: int, stage: int) -> int:
    """Weights that one rank of a pipeline stage holds.

    Tensor parallelism divides matrices and their biases, not norms. Tied weights are one table on a single stage, and
    a copy each on the first and the last stage otherwise (Megatron keeps them equal by summing their gradients).
    """
    m, p = config.model, config.parallel
    split = layer_parameters(config) + bias_parameters(config)
    layer = split // p.tensor + norm_parameters(config) + adapter_parameters(config, p.tensor)
    total = config.stage_layers[stage] * layer
    table = head_parameters(config, vocab) // p.tensor
    is_first, is_last = stage == 0, stage == p.pipeline - 1
    if is_first:
        total += table
    if is_last:
        is_same_table = is_first and m.tie_embeddings
        total += m.hidden_size + (0 if is_same_table else table)
        if config.traits.has_causal_block:
            total += causal_input_parameters(config) + _causal_norms(config) + table
        split = depth_parameters(config) + bias_parameters(config)
        norms = norm_parameters(config) + _depth_norms(config)
        total += mtp_depths(config) * (split // p.tensor + norms)
        if config.traits.has_depths and not is_first and not m.tie_embeddings:
            total += table  # a copy of the embedding
    return total
