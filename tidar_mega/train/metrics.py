"""What a run tells: the log line, `metrics.jsonl` and TensorBoard; one history across restarts.

On a resume, what was logged after the checkpoint's step is dropped, so that no step appears twice.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tidar_mega.config import Config, to_yaml


class MetricsLog:
    """Writes on the main process only; elsewhere every call does nothing."""

    def __init__(self, config: Config, enabled: bool, first_step: int) -> None:
        self.enabled = enabled
        self.config = config
        self.started = time.monotonic()
        self.first_step = first_step
        self.board: SummaryWriter | None = None
        if not enabled:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _drop_after(self.path, first_step)
        (folder / "config.yaml").write_text(to_yaml(config))
        if config.log.tensorboard:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
            self.board.add_text("config", f"```yaml\n{to_yaml(config)}\n```", first_step)

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

    def say(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

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
