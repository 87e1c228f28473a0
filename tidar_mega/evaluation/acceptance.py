"""Tokens per forward by real decoding: fused against AR on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidar_mega.checkpoint.base import tokens
from tidar_mega.config import UserError
from tidar_mega.data import DataError
from tidar_mega.data.mixture import open_data
from tidar_mega.data.stream import Samples, Stream
from tidar_mega.decode.load import Loaded, tokenizer_of
from tidar_mega.decode.requests import Generation, mean_tokens

MOST_WINDOWS = 4096  # of a validation stream, which may be large, are looked at for prompts


def held_out_text(loaded: Loaded) -> Samples:
    """The validation text of `data.path`. Raises DataError if its ids are not those of the model."""
    stream = open_data(loaded.config.data, "validation", loaded.config.train.seed)
    of_model = tokenizer_of(loaded.checkpoint)
    if tokens(stream.tokenizer_folder) != tokens(of_model):
        raise DataError(
            f"data.path = {loaded.config.data.path}: its tokenizer is not that of {loaded.checkpoint}; name a folder "
            f"that was prepared with it: tidar prepare ... --tokenizer {of_model}"
        )
    return stream


def held_out_prompts(stream: Samples, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens from (at most MOST_WINDOWS) windows spread evenly over a validation stream, or
    over each of several, always the same.

    Each is the start of the longest piece of one document in its window. Raises UserError if too few windows have a
    piece that long.
    """
    pieces = [
        _longest_piece(part, i)
        for _, part, most in stream.parts(MOST_WINDOWS)
        for i in range(0, part.samples_per_epoch, -(-part.samples_per_epoch // most))
    ]
    long_enough = [piece[:length] for piece in pieces if len(piece) >= length]
    if len(long_enough) < count:
        raise UserError(
            f"{count} held-out prompts of {length} tokens wanted, {len(long_enough)} found: lower either, "
            "or prepare more text"
        )
    return [long_enough[i * len(long_enough) // count] for i in range(count)]


def _longest_piece(stream: Stream, index: int) -> list[int]:
    rows = stream.rows(index)
    document_S = rows.document[0]
    size = torch.bincount(document_S[document_S >= 0])
    return rows.token[0, document_S == size.argmax()].tolist() if len(size) else []


def summarise(block: int, fused: Sequence[Generation], ar: Sequence[Generation]) -> dict:
    """What fused decoding (or another mode) gave, beside AR decoding of the same prompts.

    tokens_per_forward    output tokens per fused forward behind the prompt's, over all prompts
    identical_to_ar       share of prompts whose fused output equals AR's, token for token
    distinct_4gram        share of distinct 4-grams within an output, over all prompts: loops are accepted easily
    acceptance_histogram  forwards that confirmed 1, 2, .. B draft tokens; in mode "blocks" nothing is confirmed
    tokens                output tokens of the fused run
    """
    histograms = [g.acceptance_histogram(block) for g in fused]
    return {
        "tokens_per_forward": tokens_per_forward(fused),
        "identical_to_ar": sum(f.tokens == a.tokens for f, a in zip(fused, ar, strict=True)) / max(len(fused), 1),
        "distinct_4gram": distinct_share([g.tokens for g in fused], 4),
        "acceptance_histogram": [sum(column) for column in zip(*histograms, strict=True)] or [0] * block,
        "tokens": sum(len(g.tokens) for g in fused),
    }


def tokens_per_forward(generations: Sequence[Generation]) -> float:
    """Output tokens per forward behind the prompts' own, all requests pooled; 1 where there was none."""
    return mean_tokens([count for g in generations for count in g.later])


def distinct_share(outputs: Sequence[Sequence[int]], length: int) -> float:
    """Share of an output's n-grams that are distinct, pooled over outputs (each counted for itself); 1 without any."""
    grams = [[tuple(t[i : i + length]) for i in range(len(t) - length + 1)] for t in outputs]
    total = sum(len(g) for g in grams)
    return sum(len(set(g)) for g in grams) / total if total else 1.0
