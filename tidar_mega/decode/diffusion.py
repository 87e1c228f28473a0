"""Sampling whole sequences from masked diffusion, with and without self-speculation (arXiv 2510.03929).

Both samplers reveal the D places of a sequence in a random order sigma. With i of them revealed, one forward of the
non-causal blocks drafts all others; what is revealed of them reaches to the end of a window of the cosine schedule.

    standard      every place of the window gets its draft: the places of a window are independent
    speculative   the causal block verifies the window's drafts in the order sigma: accept with min(1, p_c / p_nc), on a
                  rejection draw from norm(max(0, p_c - p_nc)) and verify what is behind it again, at most `verify`
                  times in all with the hidden states of the one forward. The first place of a window has nothing
                  drafted before it, and so nothing that the non-causal blocks have not seen: its target is its draft.

Forwards are counted as the paper counts them: a forward of the whole model is 1, with its first verification; every
further verification costs the causal block's share of the model, and a draft that nothing verifies is cheaper by it.

Randomness is a function of (seed, number of the sample). Shape suffixes: B sequences, S places, V vocabulary ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tidar_mega import device
from tidar_mega.config import Config, ConfigError, require
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode import load
from tidar_mega.methods import generator
from tidar_mega.methods.ssmd import causal_rows
from tidar_mega.model.any_order import AnyOrderAttention
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.gpt import HybridGPT
from tidar_mega.parallel.context import whole
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.rows import CLEAN, Rows, concatenate


class Denoiser(Protocol):
    """What the samplers ask of a model over sequences of `places` tokens."""

    places: int
    mask_id: int
    causal_share: float  # of a whole forward's work that the causal block does

    def draft(self, token_BS: Tensor) -> tuple[Tensor, object]:
        """Log probabilities of every place, float64 [B, S, V], with `mask_id` where nothing is revealed, each place
        independent of the others; and the states that `verify` starts from."""

    def verify(self, states: object, token_BS: Tensor, order_BS: Tensor) -> Tensor:
        """Log probabilities of every place given the tokens before it in its order, float64 [B, S, V]."""


@dataclass(frozen=True)
class Window:
    """`width` is d_tau of the cosine schedule; `verify` how often its drafts may be verified (0: never, the standard
    sampler). The paper's pairs are PAPER_WINDOWS."""

    verify: int
    width: float

    def end(self, revealed: int, places: int) -> int:
        """How many places are revealed at the end of the window that begins with `revealed` of them."""
        tau = 2 / math.pi * math.acos(1 - revealed / places)
        end = round(places * (1 - math.cos(math.pi / 2 * min(1.0, tau + self.width))))
        return min(max(end, revealed + 1), places)


PAPER_WINDOWS = tuple(Window(*pair) for pair in ((1, 0.002), (2, 0.005), (3, 0.01), (4, 0.02), (8, 0.04), (10, 0.083)))


@dataclass(frozen=True)
class Samples:
    """`token` int64 [B, S], and the forwards that each took, float64 [B]."""

    token: Tensor
    forwards: Tensor


@torch.inference_mode()
def sample(model: Denoiser, window: Window, numbers: Iterable[int], seed: int) -> Samples:
    """The sequences with these numbers, drawn together; each is the same in any company but for rounding."""
    state = _Sequences(model, [generator(seed, "diffusion", n) for n in numbers])
    while (active_B := state.revealed_B < model.places).any():
        state.advance(window, active_B.nonzero().squeeze(1))
    return Samples(state.token_BS, state.forwards_B)


class _Sequences:
    """Sequences in work: `order_BS` is each place's in sigma, and the places of the orders below `revealed_B` are."""

    def __init__(self, model: Denoiser, draws: list[torch.Generator]) -> None:
        self.model, self.draws = model, draws
        self.order_BS = torch.stack([torch.randperm(model.places, generator=draw) for draw in draws])
        self.token_BS = torch.full_like(self.order_BS, model.mask_id)
        self.revealed_B = torch.zeros(len(draws), dtype=torch.int64)
        self.forwards_B = torch.zeros(len(draws), dtype=torch.float64)

    def advance(self, window: Window, at: Tensor) -> None:
        """One forward of the sequences `at`, and what it reveals."""
        order, revealed = self.order_BS[at], self.revealed_B[at]
        ends = torch.tensor([window.end(i, self.model.places) for i in revealed.tolist()])
        log_draft, states = self.model.draft(self.token_BS[at])
        drafted = draw(log_draft.exp(), self._uniform(at))
        token = torch.where(order < revealed[:, None], self.token_BS[at], drafted)
        repeats = torch.zeros_like(revealed)
        if window.verify:
            token, ends, repeats = self._verify(window.verify, at, states, log_draft, token, ends)
        is_revealed = order < ends[:, None]
        self.token_BS[at] = token.where(is_revealed, torch.full_like(token, self.model.mask_id))
        self.revealed_B[at] = ends
        self.forwards_B[at] += (1 if window.verify else 1 - self.model.causal_share) + self.model.causal_share * repeats

    def _verify(self, most: int, at: Tensor, states, log_draft: Tensor, token: Tensor, ends: Tensor):
        """Tokens after at most `most` verifications, how far they are revealed, and the repeats beyond the first."""
        order, known = self.order_BS[at], self.revealed_B[at] + 1
        passes = torch.zeros_like(known)
        for _ in range(most):
            if not (pending := known < ends).any():
                break
            log_target = self.model.verify(states, token, order)
            waits = (order >= known[:, None]) & (order < ends[:, None])
            uniform = self._uniform(at), self._uniform(at)
            token, decided = verify_window(log_draft, log_target, token, order, waits, *uniform)
            known = decided.where(pending, known)
            passes += pending
        return token, known, (passes - 1).clamp(min=0)

    def _uniform(self, at: Tensor) -> Tensor:
        """float64 [B, S] in [0, 1)."""
        return torch.stack([torch.rand(self.model.places, generator=self.draws[b], dtype=torch.float64) for b in at])


def verify_window(
    log_draft_BSV: Tensor,
    log_target_BSV: Tensor,
    token_BS: Tensor,
    order_BS: Tensor,
    waits_BS: Tensor,
    accept_BS: Tensor,
    again_BS: Tensor,
) -> tuple[Tensor, Tensor]:
    """One verification of the drafts that wait, in their order: the tokens, with the first rejected one drawn again,
    and the order behind the last one that is now decided, int64 [B] (0 where none waits).

    `accept_BS` and `again_BS` are uniform in [0, 1), for the acceptance and for the draw after a rejection.
    """
    places = token_BS.shape[1]
    rejected_BS = waits_BS & (accept_BS >= acceptance(log_draft_BSV, log_target_BSV, token_BS))
    first_B1 = order_BS.where(rejected_BS, places).min(dim=1, keepdim=True).values
    is_first_BS = order_BS == first_B1
    residual_BSV = (log_target_BSV.exp() - log_draft_BSV.exp()).clamp(min=0)
    token_BS = torch.where(is_first_BS, draw(residual_BSV, again_BS), token_BS)
    last_B = order_BS.where(waits_BS, -1).max(dim=1).values
    return token_BS, torch.minimum(first_B1[:, 0], last_B) + 1


def acceptance(log_draft_BSV: Tensor, log_target_BSV: Tensor, token_BS: Tensor) -> Tensor:
    """min(1, p_c / p_nc) of the drafted tokens, [B, S]."""
    of_token_BS = (log_target_BSV - log_draft_BSV).gather(2, token_BS[..., None]).squeeze(2)
    return of_token_BS.clamp(max=0).exp()


def draw(weight_BSV: Tensor, uniform_BS: Tensor) -> Tensor:
    """Ids in proportion to `weight_BSV` (it need not sum to 1), by inversion of a uniform number each."""
    sum_BSV = weight_BSV.cumsum(dim=-1)
    id_BS = torch.searchsorted(sum_BSV, (uniform_BS * sum_BSV[..., -1])[..., None], right=True).squeeze(-1)
    # rounding may take the number to the very end, behind the last id with weight
    last_BS = weight_BSV.shape[-1] - 1 - (weight_BSV > 0).flip(-1).long().argmax(dim=-1)
    return torch.minimum(id_BS, last_BS)


class Backbone:
    """A trained model of `method: ssmd` or `masked_diffusion` as a Denoiser."""

    def __init__(self, model: HybridGPT, config: Config, tokenizer: Tokenizer) -> None:
        self.model, self.config = model.eval(), config
        self.places, self.mask_id = config.data.seq_length, tokenizer.mask
        self.device = next(model.parameters()).device
        self._never = [*sorted(tokenizer.not_text), *range(tokenizer.vocab_size, model.vocab_size)]
        self.causal_share = _causal_share(model) if config.traits.has_causal_block else 0.0

    def draft(self, token_BS: Tensor) -> tuple[Tensor, tuple[Rows, Tensor]]:
        rows = self._rows(token_BS)
        context = TrainingAttention(rows, "dense")
        if self.config.traits.has_causal_block:
            hidden_SBD = self.model.noncausal(rows, context)
            return self._log(self.model.speak(hidden_SBD)), (rows, hidden_SBD)
        hidden_SBD = self.model(rows, context)
        return self._log(self.model.logits(hidden_SBD)), (rows, hidden_SBD)

    def verify(self, states: tuple[Rows, Tensor], token_BS: Tensor, order_BS: Tensor) -> Tensor:
        rows, hidden_SBD = states
        causal = causal_rows(rows, order_BS.to(self.device), token_BS.to(self.device), self.mask_id)
        context = AnyOrderAttention(whole(concatenate([rows, causal], dim=1)), "dense")
        return self._log(self.model.speak(self.model.causal(hidden_SBD, context)))

    def _log(self, logits_SBV: Tensor) -> Tensor:
        logits_BSV = logits_SBV.transpose(0, 1).double().cpu()
        logits_BSV[..., self._never] = float("-inf")
        return logits_BSV.log_softmax(dim=-1)

    def _rows(self, token_BS: Tensor) -> Rows:
        token_BS = token_BS.to(self.device)
        order_BS = torch.arange(self.places, device=self.device).expand_as(token_BS)
        zero = torch.zeros_like(token_BS)
        horizon = torch.full_like(token_BS, self.places)
        return Rows(token_BS, order_BS, order_BS, horizon, zero + CLEAN, zero, zero, zero.float(), causal_in_group=True)


def _causal_share(model: HybridGPT) -> float:
    """The causal block's share of the weights that each place is multiplied with, the head not counted."""
    layers = [dict(layer.named_parameters()) for layer in model.decoder.layers]
    sizes = [sum(w.numel() for name, w in layer.items() if "tokens" not in name) for layer in layers]
    return sizes[-1] / sum(sizes)


@dataclass(frozen=True)
class Loaded:
    denoiser: Backbone
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path


def load_denoiser(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Loaded:
    """A checkpoint of masked diffusion, in this process alone. Raises CheckpointError or ConfigError."""
    checkpoint, config = load.saved(path, overrides)
    if config.traits.is_left_to_right:
        raise ConfigError(
            f"method = {config.method}: {path} is not a masked diffusion run; name one of method ssmd or "
            "masked_diffusion, or decode this one with `tidar generate`"
        )
    for name, size in load.sizes(config).items():
        require(size == 1, f"decode.{name}", size, "1 for masked diffusion, which is sampled in one process")
    config = load.decoding_config(config)
    device.start_alone()
    mesh, tokenizer = build_mesh(config), Tokenizer.load(checkpoint / "tokenizer")
    denoiser = Backbone(load.load_model(checkpoint, config, mesh), config, tokenizer)
    return Loaded(denoiser, tokenizer, config, checkpoint)
