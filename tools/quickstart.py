"""The main job end to end, by the commands that a user would type; each is printed before it runs."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/quickstart.yaml"
DATA = Path("data/quickstart")
RUN = Path("runs/quickstart")
TIDAR = str(Path(sys.executable).with_name("tidar"))


def main() -> None:
    started = time.monotonic()
    tidar("prepare", "stdlib", "--output", str(DATA), "--vocab-size", "288", "--validation-fraction", "0.02")
    pretrain = ("pretrain", CONFIG, *layout())
    is_new = not metrics()
    if is_new:
        print("\nThis run is stopped half-way on purpose, to show a resume.")
        stop_half_way(*pretrain)
    tidar(*pretrain)
    tidar(
        "generate",
        str(RUN),
        "--prompt",
        "def read_lines(path",
        "--show-commits",
        "decode.max_tokens=200",
        "decode.temperature=1",
        "decode.outcomes=all",
    )
    decode = RUN / "bench_decode.json"
    few = ("--prompts", "12", "--repeats", "2", "--batches", "1", "--blocks", "4", "--no-peers")
    tidar("bench", "decode", str(RUN), *few, "--json", str(decode))
    figures = summary(json.loads(decode.read_text()), (time.monotonic() - started) / 60)
    if not is_new:
        print("\nAn earlier run was gone on with: `minutes` does not cover it.")
    (RUN / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    show(figures)
    check(figures)


def check(figures: dict) -> None:
    """Acceptance counts only beside the loss: an untrained model accepts everything."""
    wanted = {
        "at most 1.6 nats per byte on held-out files": figures["validation_nats_per_byte"] <= 1.6,
        "at least 1.5 tokens per forward at temperature 1": figures["tokens_per_forward_sampled"] >= 1.5,
        "every output identical to AR decoding": figures["identical_to_ar"] == 1,
    }
    missed = [text for text, met in wanted.items() if not met]
    if missed:
        sys.exit(f"The quickstart should reach {'; '.join(missed)}. See docs/log.md for what it reached elsewhere.")


def layout() -> list[str]:
    """Two processes on a CPU, in float32 where it has no bfloat16 units; with GPUs one process each, at most two."""
    import torch

    from tidar_mega.model.tiles import has_bfloat16_units

    gpus = torch.cuda.device_count()
    if gpus:
        return [f"parallel.data={min(gpus, 2)}"]
    return [] if has_bfloat16_units() else ["precision.dtype=fp32"]


def tidar(*arguments: str) -> None:
    announce(arguments)
    code = subprocess.run([TIDAR, *arguments]).returncode
    if code:
        sys.exit(code)


def stop_half_way(*arguments: str) -> None:
    """Sends SIGTERM, as a cluster would, when half of the steps are logged."""
    announce(arguments)
    process = subprocess.Popen([TIDAR, *arguments])
    half = total_steps() // 2
    while process.poll() is None and not any(line["step"] >= half for line in metrics()):
        time.sleep(0.5)
    if process.poll() is None:
        print(f"\n$ kill -TERM {process.pid}", flush=True)
        process.send_signal(signal.SIGTERM)
    if process.wait():
        sys.exit(process.returncode)


def announce(arguments: tuple[str, ...]) -> None:
    print(f"\n$ tidar {shlex.join(arguments)}", flush=True)


def metrics() -> list[dict]:
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}")]  # the last one may still be being written
    return [json.loads(line) for line in whole]


def total_steps() -> int:
    from tidar_mega import config

    return config.load(CONFIG).train.steps


def summary(decode: dict, minutes: float) -> dict:
    validation = [line for line in metrics() if line["kind"] == "validation"][-1]
    names = ("tokens_per_forward", "tokens_per_forward_sampled", "identical_to_ar", "speedup_vs_ar", "distinct_4gram")
    return {
        **{name: decode[name] for name in names},
        "validation_loss_ar": validation["loss_ar"],
        "validation_loss_draft": validation["loss_draft"],
        "validation_nats_per_byte": validation["nats_per_byte"],
        "parameters": decode["parameters"],
        "minutes": round(minutes, 2),
        "checkpoint": decode["checkpoint"],
    }


def show(figures: dict) -> None:
    print("\nSummary (also in runs/quickstart/summary.json)")
    for name, value in figures.items():
        print(f"  {name:28s} {value:.4g}" if isinstance(value, float) else f"  {name:28s} {value}")
    print(
        f"""
TensorBoard:      tidar board {RUN}
Sample at T = 1:  tidar generate {RUN} --prompt 'class Stack:' --show-commits decode.temperature=1
Train longer:     tidar pretrain {CONFIG} run_dir=runs/longer train.steps=5000
Another corpus:   tidar prepare FOLDER_OR_FILES --output data/mine
"""
    )


if __name__ == "__main__":
    main()
