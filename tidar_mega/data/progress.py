"""A bar with an ETA on a terminal, plain lines with an ETA elsewhere."""

from __future__ import annotations

import sys
import time

from rich import progress as rich_progress

_LINE_SECONDS = 10.0  # between plain lines


class Progress:
    """`with Progress("reading", total, "B") as p: p.advance(n)`. `total` None: not known before."""

    def __init__(self, title: str, total: int | None, unit: str, silent: bool = False) -> None:
        self._title, self._total, self._unit, self._silent = title, total, unit, silent
        self._done, self._started = 0, time.monotonic()
        self._last_line = self._started
        self._bar = _make_bar(unit) if sys.stderr.isatty() and not silent else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif exception[0] is None and not self._silent:
            seconds = time.monotonic() - self._started
            print(f"{self._title}: {self._amount(self._done)}, {seconds:.1f} s", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif now - self._last_line >= _LINE_SECONDS and not self._silent:
            self._last_line = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        if not self._total:
            return f"{self._title}: {self._amount(self._done)}"
        share = self._done / self._total
        eta = seconds * (1 / share - 1) if share > 0 else float("inf")
        return f"{self._title}: {share:.0%} of {self._amount(self._total)} | eta {eta:.0f} s"

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:.1f} MB" if self._unit == "B" else f"{count} {self._unit}"


def _make_bar(unit: str) -> rich_progress.Progress:
    from rich.console import Console

    amount = rich_progress.DownloadColumn() if unit == "B" else rich_progress.MofNCompleteColumn()
    columns = (rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), amount)
    return rich_progress.Progress(*columns, rich_progress.TimeRemainingColumn(), console=Console(stderr=True))
