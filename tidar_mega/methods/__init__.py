"""Training methods: one file each, found by its name. A method turns packed clean rows into the rows of a forward."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_mega.config import Config
from tidar_mega.losses import DraftTerms, RowLosses
from tidar_mega.rows import Rows


@dataclass(frozen=True)
class Term:
    """One term of a loss: the mean cross entropy of the rows that `share` (Rows -> float or bool [B, T]) counts, times
    `coefficient`. The mean is over the global batch, weighted by the shares and by the rows' weights.

    balances  the name of another term, to whose size this one is scaled: its mean is also multiplied by
              stopgrad(mean of that term / mean of this one), of the whole global batch
    """

    name: str
    coefficient: float
    share: Callable[[Rows], Tensor]
    balances: str | None = None


@dataclass(frozen=True)
class Drafter:
    """How a method drafts in decoding: by masks, in a group behind an outcome (`tidar.py`, `decoding_rows`), or by
    layers of its own, behind the actual outcome (`mtp.py`).

    ahead            a mask predicts the token so many places behind its own: 0 its own, 1 the next (shifted labels)
    causal_in_group  a mask sees those masks of its group alone that stand before it
    depths           layers that draft, one token each; 0: masks do
    """

    ahead: int = 0
    causal_in_group: bool = False
    depths: int = 0

    def length(self, block: int) -> int:
        """Tokens of a draft, AR's own counted, of a model that was trained with `block` masks."""
        return 1 + self.depths if self.depths else block + self.ahead


IN_PLACE = Drafter()  # TiDAR's: masks of a group see one another and predict their own places


class Method(ABC):
    """What a file of this folder provides under the name METHOD: a subclass, built from config and mask id."""

    terms: tuple[Term, ...]
    drafts = DraftTerms()  # losses of whole drafts, on top of the terms
    drafter: Drafter | None = None  # of a method that does not continue prompts (decode/diffusion.py samples it)

    @abstractmethod
    def training_rows(self, clean: Rows, sample: Tensor) -> Rows:
        """The rows of one forward. `clean` [B, S] is the packed text, `sample` int64 [B] its global sample indices."""

    def statistics(self, rows: Rows, losses: RowLosses) -> dict[str, Tensor]:
        """Sums (not means) that may be added over micro-batches and ranks, for `summary`."""
        return {}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Figures for logs from added-up `statistics`."""
        return {}


def load(config: Config, mask_id: int) -> Method:
    """The method that `config.method` names, which `config/checks.py` has found among the files of this folder."""
    return importlib.import_module(f"{__name__}.{config.method}").METHOD(config, mask_id)


def generator(seed: int, purpose: str, sample: int) -> torch.Generator:
    """Randomness as a pure function of (seed, purpose, global sample index): never of a rank or of a restart."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
