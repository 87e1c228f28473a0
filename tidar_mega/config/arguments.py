"""Numbers on a command line."""

from __future__ import annotations

import argparse


def positive(word: str) -> int:
    """The `type` of an argument that counts something."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a whole number of 1 or more")
    return int(word)
