"""Arithmetic of a run: parameters and floating point operations. Pure Python, no torch."""

from __future__ import annotations

from tidar_mega.config import Config


def layer_parameters(config: Config) -> int:
    """Weights of one transformer layer that are multiplied with every row."""
    m = config.model
    attention = m.hidden_size * m.head_width * (2 * m.num_attention_heads + 2 * m.num_query_groups)
    return attention + 3 * m.hidden_size * m.ffn_hidden_size


def head_parameters(config: Config, vocab_size: int) -> int:
    return config.model.hidden_size * vocab_size


def training_flops(config: Config, vocab_size: int, rows: float, pairs: float, head_rows: float) -> float:
    """Forward and backward of `rows` rows, `pairs` visible (query, key) pairs and `head_rows` rows with a loss.

    Counts two operations per multiply-add, the backward as twice the forward, and no recomputation.
    """
    m = config.model
    dense = 2 * layer_parameters(config) * m.num_layers * rows
    attention = 4 * m.num_attention_heads * m.head_width * m.num_layers * pairs
    head = 2 * head_parameters(config, vocab_size) * head_rows
    return 3.0 * (dense + attention + head)
