"""`tidar generate`: a prompt in, a continuation out, printed as tokens are committed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tidar_mega.config import UserError
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode import trace
from tidar_mega.decode.load import load_engine

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
    printer = _Printer(loaded.tokenizer, prompt)
    started = time.perf_counter()
    commits = []
    for commit in loaded.engine.stream(tokens, params, mode):
        commits.append(commit)
        printer.add(commit.tokens[:-1] if commit.finished == "stop" else commit.tokens)
        if show_commits:
            printer.mark()
    printer.end()
    seconds = time.perf_counter() - started
    if trace_to is not None:
        trace.write(commits, loaded.tokenizer.decode, trace_to)
    return _summary(printer.text, [commit.tokens for commit in commits], seconds, show_commits)


def _summary(text: str, commits: list[list[int]], seconds: float, show: bool) -> dict:
    counts = [len(tokens) for tokens in commits]
    later = counts[1:]  # the prompt's forward always gives one token
    per_forward = sum(later) / len(later) if later else 1.0
    if show:
        print(f"tokens of each forward: {' '.join(map(str, counts))}")
        totals = f"{sum(counts)} tokens, {len(counts)} forwards, {per_forward:.2f} tokens per forward"
        print(f"{totals}, {sum(counts) / seconds:.0f} tokens/s")
    return {"text": text, "commits": commits, "tokens_per_forward": per_forward, "seconds": seconds}


class _Printer:
    """Prints text as soon as its bytes are whole: a token may end in the middle of a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        print(prompt, end="", flush=True)

    def add(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self._print(self.tokenizer.decode(self.tokens).rstrip(_UNFINISHED))

    def mark(self) -> None:
        print("\x1b[2m|\x1b[0m", end="", flush=True)

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.tokens))
        print(flush=True)

    def _print(self, whole: str) -> None:
        print(whole[len(self.text) :], end="", flush=True)
        self.text = whole
