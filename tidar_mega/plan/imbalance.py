"""How evenly the attention work falls on the ranks of a context-parallel group (`parallel/balance.py`)."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from tidar_mega.config import Config

SIGMA = 1.0  # of the logarithm of document lengths
SEQUENCES = 16  # packed sequences that are looked at


@dataclass(frozen=True)
class Packed:
    """Of sequences packed with documents of lognormal length: the most loaded rank's work over the mean."""

    mean: float
    worst: float
    pairs: float  # visible pairs of clean rows, as a share of those of one long document


def whole_sequence(config: Config) -> float:
    """The most loaded rank's work over the mean, for a sequence that is one document."""
    return _imbalance((config.data.seq_length,), *_setting(config))


def packed(config: Config, document_tokens: float) -> Packed:
    """For documents of `document_tokens` tokens on average, cut where a sequence ends. The same draw every time."""
    length, draw = config.data.seq_length, random.Random(0)
    sequences = [_documents(length, document_tokens, draw) for _ in range(SEQUENCES)]
    values = [_imbalance(tuple(lengths), *_setting(config)) for lengths in sequences]
    seen = sum(n * (n + 1) / 2 for lengths in sequences for n in lengths)
    return Packed(sum(values) / SEQUENCES, max(values), seen / (SEQUENCES * length * (length + 1) / 2))


def _documents(length: int, mean: float, draw: random.Random) -> list[int]:
    lengths, left = [], length
    while left:
        # the mean of a lognormal distribution is exp(mu + sigma^2 / 2)
        lengths.append(min(left, max(1, round(mean * draw.lognormvariate(-(SIGMA**2) / 2, SIGMA)))))
        left -= lengths[-1]
    return lengths


def _setting(config: Config) -> tuple[int, int, float]:
    fraction = config.train.draft_fraction if config.traits.drafts_blocks else 0.0
    return config.train.block, config.parallel.context, fraction


@functools.cache
def _imbalance(lengths: tuple[int, ...], block: int, ranks: int, fraction: float) -> float:
    if ranks == 1:
        return 1.0
    from tidar_mega.parallel.balance import imbalance

    return imbalance(list(lengths), block, ranks, fraction)
