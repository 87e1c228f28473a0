"""What a run tells: the log line, `metrics.jsonl` and TensorBoard; one history across restarts.

On a resume, what was logged after the checkpoint's step is dropped, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tidar_mega.config import Config, UserError, to_yaml
from tidar_mega.config.errors import storage_error
from tidar_mega.rows import Rows
from tidar_mega.train.board import Board, mask_picture


class MetricsLog:
    """Writes on the main process only; elsewhere every call does nothing."""

    def __init__(self, config: Config, enabled: bool, first_step: int) -> None:
        self.enabled = enabled
        self.config = config
        self.started = time.monotonic()
        self.first_step = first_step
        self.board: Board | None = None
        if not enabled:
            return
        self.folder = Path(config.run_dir)
        self.path = self.folder / "metrics.jsonl"
        with _writing(self.folder):
            self._open()

    def _open(self) -> None:
        text = to_yaml(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        _drop_after(self.path, self.first_step)
        (self.folder / "config.yaml").write_text(text)
        if self.config.log.tensorboard:
            self.board = Board(self.folder / "tensorboard" / "train", self.first_step)
            self.board.texts(self.first_step, {"config": text})

    def start(self, layout: str, rows: Rows | None) -> None:
        """What the run is, in a line; and one of its sequences, of which the mask is drawn."""
        self.say(layout)
        if self.board is not None:
            with _writing(self.folder):
                self.board.texts(self.first_step, {"layout": layout.replace(" | ", "\n")})
                if rows is not None:
                    self.board.image(self.first_step, "mask", mask_picture(rows))

    def accepted(self, step: int, counts: Sequence[float]) -> None:
        """How many drafts would have been accepted up to their first, second, .. token, since the last call."""
        if self.board is not None:
            with _writing(self.folder):
                self.board.lengths(step, "train/accepted_length", counts)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a training step (means since the last call)."""
        if self.enabled:
            print(self._line(step, figures), flush=True)
            self._write(step, "train", figures)

    def validation(self, step: int, figures: dict[str, float]) -> None:
        if self.enabled:
            shown = " | ".join(f"{k} {v:.4f}" for k, v in figures.items() if "/" not in k)
            print(f"validation at step {step} | {shown}", flush=True)
            self._write(step, "validation", figures)

    def has_validation(self, step: int) -> bool:
        """True on the main process if a validation at `step` is in the file, perhaps from before a restart."""
        if not self.enabled or not self.path.is_file():
            return False
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return any(line["kind"] == "validation" and line["step"] == step for line in lines)

    def say(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        with _writing(self.folder):
            self._append(step, kind, figures)

    def _append(self, step: int, kind: str, figures: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        if self.board is not None:
            self.board.scalars(step, kind, figures)

    def _line(self, step: int, figures: dict[str, float]) -> str:
        total = self.config.train.steps
        spent = (time.monotonic() - self.started) / max(1, step - self.first_step)
        parts = [f"step {step}/{total}", f"loss {figures['loss']:.4f}"]
        parts += [f"{k.removeprefix('loss_')} {v:.4f}" for k, v in figures.items() if k.startswith("loss_")]
        if "draft_accuracy" in figures:
            parts.append(f"draft_acc {figures['draft_accuracy']:.3f}")
        parts.append(f"grad_norm {figures['grad_norm']:.2f}")
        parts.append(f"lr {figures['lr']:.2e}")
        parts.append(f"tok/s {figures['tokens_per_second']:,.0f}")
        parts.append(f"mfu {figures['model_flop_utilisation']:.1%}")
        parts.append(f"eta {_duration(spent * (total - step))}")
        return " | ".join(parts)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the metrics could not be written ({error.strerror or error}); checkpoints are whole"
        mend = "free space or change run_dir, then run the same command to resume"
        raise storage_error(error, UserError, f"run_dir = {folder}: {what}", mend) from error


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step`; a line cut short by a kill goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept))
    os.replace(draft, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
