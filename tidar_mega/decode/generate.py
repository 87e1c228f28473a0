"""`tidar generate`: a prompt in, a continuation out, printed as tokens are committed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tidar_mega.config import UserError
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode import trace
from tidar_mega.decode.load import load_engine
from tidar_mega.decode.requests import Commit, behind_the_prompt, mean_tokens, until_stop

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def run(path: Path, overrides: list[str], prompt: str, show_commits: bool, trace_to: Path | None = None) -> dict:
    """Prints the continuation; returns its text, tokens and what each forward committed.

    With `show_commits`, a bar stands behind the tokens of each forward. `trace_to` as in `trace.write`. Raises
    UserError.
    """
    loaded = load_engine(path, [*overrides, "decode.batch=1"])
    tokens = loaded.tokenizer.encode(prompt)
    if not tokens:
        raise UserError("the prompt is empty: there is nothing to continue; give --prompt some text")
    params = loaded.params
    mode = loaded.config.decode.mode
    if params.rule == "mixed" or mode == "blocks":
        setting = "decode.mode = blocks" if mode == "blocks" else f"decode.beta = {params.beta}"
        print(f"{setting}: the masks have a say, so this is not the AR half's own output", file=sys.stderr)
    printer = _Printer(loaded.tokenizer, prompt, params.stop_strings)
    started = time.perf_counter()
    commits = []
    for commit in loaded.engine.stream(tokens, params, mode):
        commits.append(commit)
        printer.add(commit)
        if show_commits:
            printer.mark()
    printer.end()
    seconds = time.perf_counter() - started
    if trace_to is not None and loaded.mesh.is_main:
        trace.write(commits, loaded.tokenizer.decode, trace_to)
    return _summary(printer.text, [commit.tokens for commit in commits], seconds, show_commits)


def _summary(text: str, commits: list[list[int]], seconds: float, show: bool) -> dict:
    counts = [len(tokens) for tokens in commits]
    per_forward = mean_tokens(behind_the_prompt(counts))
    if show:
        print(f"tokens of each forward: {' '.join(map(str, counts))}")
        totals = f"{sum(counts)} tokens, {len(counts)} forwards, {per_forward:.2f} tokens per forward"
        print(f"{totals}, {sum(counts) / seconds:.0f} tokens/s")
    return {"text": text, "commits": commits, "tokens_per_forward": per_forward, "seconds": seconds}


class _Printer:
    """Prints text as soon as it is certain: a token may end in the middle of a character, or of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.text = ""
        print(prompt, end="", flush=True)

    def add(self, commit: Commit) -> None:
        ended_by_token = commit.finished == "stop" and commit.tokens[-1] == self.tokenizer.eod
        self.tokens += commit.tokens[:-1] if ended_by_token else commit.tokens
        whole = self._whole()
        self._print(whole if commit.finished else self._certain(whole))

    def mark(self) -> None:
        print("\x1b[2m|\x1b[0m", end="", flush=True)

    def end(self) -> None:
        self._print(self._whole())
        print(flush=True)

    def _whole(self) -> str:
        return until_stop(self.tokenizer.decode(self.tokens), self.stops)

    def _certain(self, whole: str) -> str:
        whole = whole.rstrip(_UNFINISHED)
        begun = [n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return whole[: len(whole) - max(begun, default=0)]

    def _print(self, whole: str) -> None:
        print(whole[len(self.text) :], end="", flush=True)
        self.text = whole
