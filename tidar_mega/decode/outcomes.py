"""How far a request drafts: the draft's length B and the set G of outcomes behind which the next draft is made at once.

G is a subset of {1..B}: all of it is TiDAR, {B} the strided decoding of I-DLM, the empty set two-pass
self-speculation. An outcome without a draft costs one catch-up forward, a fused forward of one clean row and one
group: it commits one token itself and drafts behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tidar_mega.config import UserError
from tidar_mega.decode.forward import Plan
from tidar_mega.decode.latency import Curves, Latency, draft_lengths
from tidar_mega.methods import IN_PLACE, Drafter

TRIAL = 24  # whole drafts verified before a shorter one is thought of: they show the acceptance of every slot
EACH = 8  # of each request that runs, in this trial (at least) and in each later one: 24 of 16 requests are two places
AGAIN = 512  # plain steps of each request after which drafting is tried again
HOPE = 0.95  # acceptance of a slot with which it is tried, if drafting would pay with it
REMEMBERED = 64.0  # tests of a slot that a later trial has to outweigh
WORTH = 1.03  # drafting must promise this much over plain AR, the surest of all choices
PRIOR = (0.8, 4.0)  # acceptance of a slot before it was seen, and how many tests that counts for
RECHOOSE = 64  # drafts verified, of each request, between two choices
_NEGLIGIBLE = 1e-6  # chance
MEMORY = 0.998  # weight of the acceptance seen so far, for each further draft


@dataclass(frozen=True)
class Drafting:
    """block 1 is plain AR decoding. `outcomes` are those that get a group when a whole draft of `block` is verified;
    `drafter` says how the model's masks draft."""

    block: int
    outcomes: tuple[int, ...] = ()
    drafter: Drafter = IN_PLACE

    @classmethod
    def of(cls, block: int, outcomes: str | Sequence[int], drafter: Drafter = IN_PLACE) -> Drafting:
        """`outcomes`: all, last, none or a list of numbers 1..block. Raises UserError."""
        if drafter.depths:  # they draft behind the one actual outcome, whatever it is
            return cls(block, (), drafter)
        named = {"all": range(1, block + 1), "last": (block,), "none": ()}
        if isinstance(outcomes, str):
            if outcomes not in named:
                raise UserError(f"outcomes = {outcomes!r}: must be all, last, none or a list of numbers")
            outcomes = named[outcomes]
        wrong = [o for o in outcomes if not 1 <= o <= block]
        if wrong:
            raise UserError(f"outcomes = {list(outcomes)}: {wrong[0]} is not among 1 .. {block}, the draft length")
        return cls(block, tuple(sorted(set(outcomes))) if block > 1 else (), drafter)

    @property
    def masks(self) -> int:
        """Of a group."""
        return self.block - self.drafter.ahead

    def prompt(self, tokens: int, is_last: bool) -> Plan:
        """A piece of a prompt; behind the last piece the first draft is made."""
        return self._plan(tokens, int(is_last), (tokens,) if is_last else ())

    def step(self, draft: int) -> Plan:
        """The forward that verifies a draft of so many tokens."""
        if draft == 1:  # nothing is drafted: AR's own next token, and a draft behind it
            return self._plan(1, 1, (1,))
        return self._plan(draft, draft, tuple(o for o in self.outcomes if o <= draft))

    def _plan(self, clean: int, choosing: int, outcomes: tuple[int, ...]) -> Plan:
        if self.drafter.depths and self.block > 1:  # these follow a prompt from its start
            return Plan(clean, choosing, (), self.block, drafter=self.drafter)
        if self.block == 1 or not choosing:  # nothing is drafted
            return Plan(clean, choosing, drafter=self.drafter)
        return Plan(clean, choosing, outcomes, self.block, drafter=self.drafter)


class Fixed:
    """The same for every forward."""

    def __init__(self, drafting: Drafting) -> None:
        self.most = drafting

    def drafting(self, requests: int, sampled: bool, length: int, limit: int) -> Drafting:
        return self.most

    def observe(self, draft: int, accepted: int) -> None: ...


class Automatic:
    """Chooses B and G for the number of requests that run, and the means of their lengths and of the tokens that they
    may give: the most expected tokens per second, from the machine's latency curves and the running acceptance of each
    slot. B goes up to `block`, and down to 1, AR.

    Plain steps verify nothing, so what was seen before the first of them would decide for good: a hard first prompt
    would take drafting from all later ones. After AGAIN of them a few drafts are made as if most were kept, if it would
    pay then, and what was seen before must give way to what these show.

    A function of what it was told alone, so that all ranks choose alike.
    """

    def __init__(self, block: int, curves: Curves, drafter: Drafter = IN_PLACE) -> None:
        self.most, self.curves = Drafting.of(block, "all", drafter), curves
        self.tested, self.passed = [0.0] * (block + 1), [0.0] * (block + 1)  # by slot, from 1
        self.seen = 0
        self.plain = 0  # tokens, of all requests, since the last draft was verified
        self.tried = -math.inf  # what was seen when drafting was tried again
        self.chosen: dict[tuple[int, bool, int, int, bool, bool], tuple[int, Drafting]] = {}

    def observe(self, draft: int, accepted: int) -> None:
        """Of a draft of `draft` tokens, `accepted` (1..draft) were kept: that many slots but one passed their test."""
        if draft < 2:
            self.plain += 1
            return
        self.seen, self.plain = self.seen + 1, 0
        for slot in range(1, min(accepted + 1, draft)):
            self.tested[slot] = MEMORY * self.tested[slot] + 1
            self.passed[slot] = MEMORY * self.passed[slot] + (slot < accepted)

    def drafting(self, requests: int, sampled: bool, length: int, limit: int) -> Drafting:
        if self.plain >= AGAIN * requests:
            self._try_again()
        is_first, is_again = self.seen < max(TRIAL, EACH * requests), self.seen < self.tried + EACH * requests
        key = (requests, sampled, length.bit_length(), limit.bit_length(), is_first, is_again)
        when, drafting = self.chosen.get(key, (0, None))
        if drafting is None or self.seen >= when + RECHOOSE * requests:
            block = self.most.block
            lengths = [block] if is_first else [1, *draft_lengths(block)]
            acceptance = [max(a, HOPE) if is_again else a for a in self.acceptance]
            drafting = self._best(requests, sampled, self.curves.at(length), limit, lengths, acceptance)
            self.chosen[key] = self.seen, drafting
        return drafting

    def _try_again(self) -> None:
        self.plain, self.tried = 0, self.seen
        self.chosen.clear()
        for slot, tested in enumerate(self.tested):
            kept = min(1.0, REMEMBERED / max(tested, 1.0))
            self.tested[slot], self.passed[slot] = kept * tested, kept * self.passed[slot]

    def _best(
        self,
        requests: int,
        sampled: bool,
        latency: Latency,
        limit: int,
        sizes: list[int],
        acceptance: list[float],
    ) -> Drafting:
        choices = []
        for size in sizes:
            outcome = outcome_probabilities(acceptance[: size - 1])
            likeliest = sorted(range(1, size + 1), key=lambda r, p=outcome: -p[r - 1])
            counts = range(size + 1) if size > 1 else [0]
            choices += [Drafting(size, tuple(sorted(likeliest[:count])), self.most.drafter) for count in counts]

        def promise(drafting: Drafting) -> float:
            worth = WORTH if drafting.block == 1 else 1.0
            return worth * speed(drafting, acceptance, latency, requests, sampled, limit)

        return max(choices, key=promise)

    @property
    def acceptance(self) -> list[float]:
        """Of slots 1..: the share that passed among those whose predecessors had."""
        share, weight = PRIOR
        pairs = zip(self.passed[1:], self.tested[1:], strict=True)
        return [(passed + share * weight) / (tested + weight) for passed, tested in pairs]


def outcome_probabilities(acceptance: Sequence[float]) -> list[float]:
    """Of the outcomes 1..B, from the acceptance of slots 1..B-1."""
    found, reached = [], 1.0
    for a in acceptance:
        found.append(reached * (1 - a))
        reached *= a
    return [*found, reached]


def speed(
    drafting: Drafting,
    acceptance: Sequence[float],
    latency: Latency,
    requests: int,
    sampled: bool,
    limit: float = math.inf,
) -> float:
    """Expected tokens per second of `requests` requests together, of which each is to give `limit` tokens.

    A request verifies a draft, and where the outcome has no group it then makes one catch-up forward; in the long run a
    share of the requests is catching up in each forward, independently of one another. Its prompt gives one token, and
    what its last forward confirms beyond the limit is in vain: by renewal theory E[r^2] / 2 E[r] - 1/2 tokens.
    """
    n, B = requests, drafting.block
    if B == 1:
        return n / latency.seconds(n, n, n, 0, sampled)
    outcome = outcome_probabilities(acceptance[: B - 1])
    drafted = sum(outcome[o - 1] for o in drafting.outcomes)
    catching = (1 - drafted) / (2 - drafted)
    tokens, squares = (
        (1 - catching) * sum(r**power * p for r, p in enumerate(outcome, start=1)) + catching for power in (1, 2)
    )
    if limit < math.inf:
        tokens = limit / (1 + (limit - 1 + (squares / tokens - 1) / 2) / tokens)
    seconds = 0.0
    for c in range(n + 1):  # requests that catch up
        share = _binomial(n, c, catching)
        if share < _NEGLIGIBLE:
            continue
        rows = (n - c) * (B + len(drafting.outcomes) * drafting.masks) + c * (1 + drafting.masks)
        any_draft = 1.0 if c else 1 - (1 - drafted) ** n
        second = ((n - c) * drafted + c) * (B - 1) / any_draft if any_draft else 0.0
        with_second = latency.seconds(n, rows, (n - c) * B + c, second, sampled)
        without = latency.seconds(n, rows, (n - c) * B + c, 0, sampled)
        seconds += share * (any_draft * with_second + (1 - any_draft) * without)
    return n * tokens / seconds


def _binomial(n: int, k: int, p: float) -> float:
    """The chance of k of n; by logarithms, as the coefficients of many requests are beyond a float."""
    if not 0 < p < 1:  # rounding may lead a little beyond
        return float(k == (n if p >= 1 else 0))
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))
