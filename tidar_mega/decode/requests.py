"""A request from its prompt to its end: what is asked, what each forward gave, and what became of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tidar_mega.decode.cache import Slots
from tidar_mega.decode.sampling import SamplingParams


@dataclass(frozen=True)
class Commit:
    """What one forward gave one request.

    request   its number among the prompts
    tokens    new output, cut at a stop token, a stop string or the longest length
    draft     the tokens that the forward verified; the first is the last output token (empty: the prompt's forward)
    accepted  how many of them were confirmed, the first included, before any cut (0: the prompt's forward)
    finished  "stop" or "length" on the last commit of a request
    logprobs  of `tokens`, if the request wants them
    proposed  what was drafted to follow, the last new token first
    """

    request: int
    tokens: list[int]
    draft: list[int]
    accepted: int
    finished: str | None
    logprobs: list[float] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)


@dataclass
class Generation:
    """One request's continuation.

    tokens         with the stop token that ended it, if one did
    commits        tokens that each forward gave, from the prompt's last on
    accepted       draft tokens that each later forward confirmed (1..B), before a cut at the end
    logprobs       of the tokens, if the request wants them
    finish_reason  "stop", "length" or "cancelled"
    seconds        from its admission to its end
    exact          False if a setting (mixed verification, mode "blocks") made the output something else than AR's
    text           of `text_tokens`, up to the first stop string; empty without a tokenizer that decodes
    """

    tokens: list[int] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    seconds: float = 0.0
    exact: bool = True
    text: str = ""
    ended_by_token: bool = False

    def add(self, commit: Commit) -> None:
        self.tokens += commit.tokens
        self.logprobs += commit.logprobs
        self.commits.append(len(commit.tokens))
        if commit.draft:
            self.accepted.append(commit.accepted)

    @property
    def forwards(self) -> int:
        """All forwards that gave tokens, the prompt's last included."""
        return len(self.commits)

    @property
    def tokens_per_forward(self) -> float:
        """Of `later` (1 in AR decoding; 1 where there was none)."""
        return mean_tokens(self.later)

    @property
    def later(self) -> list[int]:
        """`commits` behind the prompt's forward, which gives one token; in mode "blocks" it draws like any other."""
        return behind_the_prompt(self.commits)

    @property
    def text_tokens(self) -> list[int]:
        """`tokens` without the stop token."""
        return self.tokens[:-1] if self.ended_by_token else self.tokens

    def acceptance_histogram(self, block: int) -> list[int]:
        """How many forwards confirmed 1, 2, .. `block` draft tokens."""
        return [self.accepted.count(r) for r in range(1, block + 1)]


def behind_the_prompt(commits: list[int]) -> list[int]:
    return commits[1:] if commits[:1] == [1] else commits


def mean_tokens(commits: Sequence[int]) -> float:
    return sum(commits) / len(commits) if commits else 1.0


def until_stop(text: str, strings: Sequence[str]) -> str:
    """Up to the first stop string in it."""
    ends = [text.find(s) for s in strings if s in text]
    return text[: min(ends, default=len(text))]


@dataclass(eq=False)
class Request:
    """A live request. It holds `slots` from its admission to its end.

    limit     most new tokens: what it asks for, or what the engine's capacity leaves
    length    rows committed; while below the prompt's, the prompt is being encoded
    draft     tokens to verify next, the first of them the last output
    block     mode "blocks": what the block behind the committed rows holds; None is a slot still to be drawn
    unread    commits that its stream has not yielded; None: it is not streamed
    """

    number: int
    prompt: Sequence[int]
    params: SamplingParams
    mode: str
    limit: int
    stops: frozenset[int]
    decode_text: Callable[[list[int]], str] | None
    result: Generation = field(default_factory=Generation)
    slots: Slots | None = None
    length: int = 0
    draft: list[int] = field(default_factory=list)
    proposal_SV: Tensor | None = None
    block: list[int | None] = field(default_factory=list)
    admitted: float = 0.0
    unread: deque[Commit] | None = None

    @property
    def prompt_left(self) -> int:
        return max(len(self.prompt) - self.length, 0)

    @property
    def finished(self) -> bool:
        return bool(self.result.finish_reason)

    def cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """What of a forward's tokens belongs to the output, and why it ends there, if it does."""
        tokens = tokens[: self.limit - len(self.result.tokens)]
        finished = "length" if len(self.result.tokens) + len(tokens) == self.limit else None
        stop = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        if stop is not None:
            tokens, finished = tokens[: stop + 1], "stop"
        until = self._stop_string(tokens)
        if until is not None:
            return tokens[:until], "stop"
        self.result.ended_by_token = stop is not None
        return tokens, finished

    def text(self) -> str:
        """The output, without the stop string that ended it."""
        return until_stop(self.decode_text(self.result.text_tokens), self.params.stop_strings)

    def _stop_string(self, tokens: list[int]) -> int | None:
        """How many of the tokens complete the first stop string, if one is complete."""
        strings = self.params.stop_strings
        if not strings:
            return None
        longest = max(map(len, strings))
        tail = self.result.tokens[-4 * longest :]  # a token is at least a quarter of a character
        whole = self.decode_text([*tail, *tokens])
        if not any(s in whole for s in strings):
            return None
        counts = range(1, len(tokens) + 1)
        return next(n for n in counts if any(s in self.decode_text([*tail, *tokens[:n]]) for s in strings))
