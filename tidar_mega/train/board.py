"""TensorBoard: what is drawn, and `tidar board` that shows it. The only importer of tensorboard.

A run has two folders of events, as two processes write them: RUN_DIR/tensorboard/train and, of `tidar evaluate`,
RUN_DIR/tensorboard/evaluation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from tidar_mega.config import UserError
from tidar_mega.rows import PADDING, Rows, visible

_PLACES = 24  # of a document, in the picture of the mask
_PIXELS = 8  # a side of one pair
_UNSEEN, _CLEAN, _MASKS = (246, 246, 246), (33, 102, 172), (217, 95, 2)  # the key that is seen is clean, or a mask


class Board:
    """Events of one process. With `first_step`, it takes back what processes before it wrote behind that step."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=None if first_step is None else first_step + 1)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)  # as Markdown's plain text

    def scalars(self, step: int, kind: str, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def lengths(self, step: int, name: str, counts: Sequence[float]) -> None:
        """A histogram of whole numbers: `counts[n - 1]` is how often there was n."""
        values = np.arange(1, len(counts) + 1)
        counts = np.asarray(counts, dtype=np.float64)
        self._writer.add_histogram_raw(
            name,
            min=1,
            max=len(counts),
            num=counts.sum(),
            sum=(values * counts).sum(),
            sum_squares=(values**2 * counts).sum(),
            bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def image(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def mask_picture(rows: Rows) -> np.ndarray:
    """uint8 [height, width, 3]: which rows (down) see which (across) at the first places of a sequence, clean rows
    first. Made from the rule by which the model attends."""
    rows = rows.select(slice(0, 1))
    first = rows.document[0, 0]
    shown = (rows.document[0] == first) & (rows.order[0] < _PLACES) & (rows.document[0] != PADDING)
    part = rows.take(shown.nonzero().T)
    seen_QK = visible(part, part)[0].numpy()
    clean_K = part.is_clean[0].numpy()
    pixels = np.full((*seen_QK.shape, 3), _UNSEEN, dtype=np.uint8)
    pixels[seen_QK & clean_K] = _CLEAN
    pixels[seen_QK & ~clean_K] = _MASKS
    return pixels.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)


def evaluation(
    run: Path, step: int, figures: dict[str, float], accepted: Sequence[int], picture_HWC: np.ndarray
) -> None:
    """What `tidar evaluate` has found for the checkpoint of `step`."""
    board = Board(run / "tensorboard" / "evaluation")
    board.scalars(step, "evaluation", figures)
    board.lengths(step, "evaluation/accepted_length", accepted)
    board.image(step, "evaluation/decode_trace", picture_HWC)
    board.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder, or one that holds several")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=6006)


def serve(args: argparse.Namespace) -> NoReturn:
    """Becomes TensorBoard. Raises UserError."""
    if not any(args.run.rglob("events.out.tfevents.*")):
        raise UserError(
            f"{args.run}: there are no TensorBoard events in or below it; name the run_dir of a run with "
            "log.tensorboard=true"
        )
    folder = args.run / "tensorboard" if (args.run / "tensorboard").is_dir() else args.run
    options = ["--logdir", str(folder), "--host", args.host, "--port", str(args.port)]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *options])
