"""Threshold block diffusion: the comparison that the paper makes with its own checkpoints. Not AR's output.

A block of masks behind the text is drawn in several forwards: each keeps every slot whose chosen token has at least the
threshold's probability, and the surest one in any case (Fast-dLLM, arXiv 2505.22618, confidence-aware decoding; TiDAR,
arXiv 2511.08923, section 4). What has been drawn stands in its slot in the next forward. A whole block becomes clean
rows of the forward that starts the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tidar_mega.decode.forward import Plan, Result
from tidar_mega.decode.requests import Request


def turn(request: Request, slots: int, budget: int) -> tuple[Plan, Sequence[int], Sequence[int | None]]:
    """The next forward of a request: its plan, the clean tokens and what its block already holds."""
    if request.prompt_left:
        tokens = request.prompt[request.length : request.length + budget]
        if len(tokens) < request.prompt_left:
            return Plan(len(tokens), 0), tokens, ()
        return Plan(len(tokens), 0, (len(tokens),), slots, denoises=True), tokens, ()
    if None in request.block:
        return Plan(0, 0, (0,), slots, denoises=True), (), request.block
    return Plan(slots, 0, (slots,), slots, denoises=True), request.block, ()


def fill(request: Request, result: Result) -> list[int]:
    """Keeps what is sure enough; the block's tokens once it is whole, else none."""
    if result.kept:
        request.block = [None] * len(result.tokens)
    left = [slot for slot, token in enumerate(request.block) if token is None]
    surest, least = max(left, key=lambda slot: result.logprobs[slot]), math.log(request.params.threshold)
    for slot in left:
        if slot == surest or result.logprobs[slot] >= least:
            request.block[slot] = result.tokens[slot]
    return [] if None in request.block else list(request.block)
