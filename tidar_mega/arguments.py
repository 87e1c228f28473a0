"""Options that several commands have: numbers that count something, and `--json`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tidar_mega.config import UserError

STDOUT = Path("-")


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an argument that counts something of which there must be so many."""

    def count(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number of {least} or more")
        return int(word)

    return count


positive, whole = at_least(1), at_least(0)


def above_zero(word: str) -> float:
    """The `type` of an argument that measures something."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word}: must be a number above 0")
    return value


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=file,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="also write the figures to this file; without one, print them alone and all else to stderr",
    )


def file(word: str) -> Path:
    """The value of an option that may also stand without one, which takes a setting behind it for its file."""
    if re.match(r"[a-z_]+(\.[a-z_0-9]+)?=", word):
        raise argparse.ArgumentTypeError(f"{word}: looks like a setting; name a file, or put the settings first")
    return Path(word)


def write_json(path: Path | None, figures: dict) -> None:
    text = json.dumps(figures, indent=1) + "\n"
    if path == STDOUT:
        print(text, end="", file=sys.__stdout__, flush=True)
    elif path is not None:
        path.write_text(text)


def check_file(option: str, path: Path | None) -> None:
    """Whether what `option` names can be written, before the work and not after it. Leaves no file, as the work may end
    by an error. Raises UserError."""
    try:
        if path not in (None, STDOUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            existed = path.exists()
            path.open("a").close()
            if not existed:
                path.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name a file that can") from None
