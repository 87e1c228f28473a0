"""A decode to look at: of each forward the draft, what was accepted of it and what AR put behind that."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from tidar_mega.decode.requests import Commit

TERMINAL = Path("-")
_STYLES = {"accepted": "green", "rejected": "red strike", "ar": "bold cyan", "drawn": "magenta"}
_COLOURS = {
    "accepted": "#1a7f37",
    "rejected": "#b42318; text-decoration: line-through",
    "ar": "#0550ae; font-weight: bold",
    "drawn": "#8250df",
}


@dataclass(frozen=True)
class Piece:
    """One token of a forward: "accepted" from the draft, "rejected" (shown, not output), "ar", AR's own choice, or
    "drawn" by the masks themselves (mode "blocks")."""

    kind: str
    text: str


def lines(commits: Sequence[Commit], decode: Callable[[list[int]], str]) -> list[list[Piece]]:
    """One line for each forward: the accepted draft, AR's token behind it, then the rest of the draft.

    What lies behind the end of the output is left out of the accepted tokens, as it is of the output.
    """
    found = []
    for commit in commits:
        drafted = commit.draft[1:]
        kept = max(commit.accepted - 1, 0)
        kinds = ["accepted"] * kept + ["ar"]
        if not commit.draft:  # the prompt's forward, or a block of masks, whose tokens AR has not seen
            kinds = ["ar" if len(commit.tokens) == 1 else "drawn"] * len(commit.tokens)
        output = [(kind, token) for kind, token in zip(kinds, commit.tokens, strict=False)]
        rest = [("rejected", token) for token in drafted[kept:]]
        found.append([Piece(kind, decode([token])) for kind, token in output + rest])
    return found


def write(commits: Sequence[Commit], decode: Callable[[list[int]], str], path: Path) -> None:
    """Prints the lines (`TERMINAL`), or writes a page of HTML that needs nothing else."""
    told = lines(commits, decode)
    if path == TERMINAL:
        _print(told)
    else:
        path.write_text(_page(told), encoding="utf-8")


def picture(commits: Sequence[Commit], decode: Callable[[list[int]], str], most: int = 40) -> np.ndarray:
    """The first `most` lines as an image, uint8 [height, width, 3]."""
    told = lines(commits, decode)[:most]
    figure = Figure(figsize=(10, 0.6 + 0.22 * len(told)), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for number, pieces in enumerate(told):
        y, column = 1 - (number + 1) / (len(told) + 1), 0
        for piece in [Piece("number", f"{number:3d} "), *pieces]:
            colour = _COLOURS.get(piece.kind, "#666666").split(";")[0]
            text = _visible(piece.text)
            place = 0.01 + 0.0085 * column, y
            figure.text(*place, text, color=colour, family="monospace", size=9, va="center", parse_math=False)
            column += len(text) + 1
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _print(told: list[list[Piece]]) -> None:
    console = Console()
    console.print(
        Text.assemble("accepted", style="green"),
        Text("AR's own", style="bold cyan"),
        Text("rejected", style="red strike"),
        Text("drawn by masks", style="magenta"),
    )
    for number, pieces in enumerate(told):
        line = Text(f"{number:4d}  ")
        for piece in pieces:
            line.append(_visible(piece.text), style=_STYLES[piece.kind])
            line.append(" ")
        console.print(line, soft_wrap=True)


def _page(told: list[list[Piece]]) -> str:
    styles = "\n".join(f".{kind} {{ color: {colour}; }}" for kind, colour in _COLOURS.items())
    rows = []
    for number, pieces in enumerate(told):
        spans = "".join(f'<span class="{p.kind}">{html.escape(_visible(p.text))}</span> ' for p in pieces)
        rows.append(f"<tr><td>{number}</td><td>{sum(p.kind != 'rejected' for p in pieces)}</td><td>{spans}</td></tr>")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>A decode, forward by forward</title>
<style>body {{ font: 14px/1.5 monospace; margin: 2em; }} td {{ padding: 0 1em 0 0; vertical-align: top; }}
{styles}</style>
<p><span class="accepted">accepted</span> <span class="ar">AR's own</span> <span class="rejected">rejected</span> \
<span class="drawn">drawn by masks</span></p>
<table><tr><th>forward</th><th>tokens</th><th></th></tr>
{chr(10).join(rows)}
</table></html>
"""


def _visible(text: str) -> str:
    """Spaces and line ends that can be seen."""
    return (
        text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        .replace("\t", "\N{RIGHTWARDS ARROW}")
        .replace(" ", "\N{OPEN BOX}")
    )
