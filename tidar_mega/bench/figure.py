"""What `--plot` draws, as a file."""

from __future__ import annotations

from pathlib import Path

from tidar_mega.config import UserError


def save(figure, path: Path) -> None:
    """Writes a figure of matplotlib in the format that the name says. Raises UserError."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: no such format
        raise UserError(f"--plot {path}: cannot be written ({error}); name a .png, .svg or .pdf that can") from None
