"""What is watched while a run trains: losses that jump, ranks that are slow. (Hangs: test_failures.py.)"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.test_main_job import CONFIG, command, environment, make_corpus, metrics
from tidar_mega.checkpoint.state import Progress
from tidar_mega.train.health import spike
from tidar_mega.train.stragglers import OwnWork

# Python runs this at the start of every process that has it on its path. On the first signal a rank becomes slow, on
# the second its weights, and so its losses, become others: at the start of a module's forward, as an optimizer that is
# about to hand out the weights would undo it.
HARM = """
import gc, signal, time

def weights():
    import torch
    return [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and o.dim() == 2]

def slow(*_):
    weights()[0].register_hook(lambda gradient: time.sleep(0.3))

def other(*_):
    from torch.nn.modules.module import register_module_forward_pre_hook

    def harm(*_):
        once.remove()
        for weight in weights():
            weight.data.mul_(16)

    once = register_module_forward_pre_hook(harm)

signal.signal(signal.SIGRTMIN, slow)
signal.signal(signal.SIGRTMIN + 1, other)
"""


def test_a_loss_far_above_the_recent_ones_is_a_spike():
    draw, progress, seen = random.Random(7), Progress(), []
    for _ in range(300):
        loss = 3 + draw.gauss(0, 0.1)
        assert spike(progress, loss, 6.0) is None
        seen.append(loss)
    # plain: the first 50 steps have equal weights, later ones 2% for the newest
    weights = [1.0]
    for n in range(2, 301):
        newest = max(0.02, 1 / n)
        weights = [w * (1 - newest) for w in weights] + [newest]
    mean = sum(w * x for w, x in zip(weights, seen, strict=True))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, seen, strict=True))
    assert progress.loss_mean == pytest.approx(mean, rel=1e-12)
    assert progress.loss_variance == pytest.approx(variance, rel=1e-9)
    sigma = math.sqrt(variance)
    assert spike(Progress(**vars(progress)), mean + 5.9 * sigma, 6.0) is None
    assert spike(Progress(**vars(progress)), mean - 50 * sigma, 6.0) is None, "a fall is none"
    assert spike(Progress(**vars(progress)), mean + 50 * sigma, 0.0) is None, "0 is off"
    assert spike(progress, math.nan, 6.0) is None and math.isfinite(progress.loss_mean)
    assert spike(progress, mean + 6.1 * sigma, 6.0) == pytest.approx(6.1) and progress.spikes == 1


def test_a_lasting_rise_is_a_spike_only_a_few_times():
    draw, progress = random.Random(7), Progress()
    for _ in range(200):
        spike(progress, 3 + draw.gauss(0, 0.1), 6.0)
    found = [spike(progress, 5 + draw.gauss(0, 0.1), 6.0) is not None for _ in range(50)]
    assert 1 <= sum(found) <= 5 and not any(found[5:])


def slow_rank(rank: int) -> tuple[dict, list[str | None]]:
    work, warnings = OwnWork(3.0), []
    for step in range(8):
        work.begin()
        work.end()
        work.add(1.2 if rank == 2 and step >= 2 else 0.2)
        figures, warning = work.report()
        warnings.append(warning)
    return figures, warnings


@pytest.mark.distributed
def test_a_slow_rank_is_named_once_after_three_reports():
    everybody = processes.run(slow_rank, 3)
    for figures, warnings in everybody:
        assert figures == everybody[0][0] and figures["slowest_rank"] == 2
        assert figures["rank_seconds_slowest"] > 1.2 > 3 * figures["rank_seconds_median"]
        told = [i for i, warning in enumerate(warnings) if warning and "rank 2 on" in warning]
        assert told == [4], warnings


@pytest.mark.distributed
def test_a_run_tells_of_a_slow_rank_and_of_a_spike_and_leaves_its_update_out(tmp_path: Path):
    make_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "sitecustomize.py").write_text(HARM)
    settings = ("run_dir=run", "train.steps=90", "health.skip_spikes=true", "checkpoint.interval=1000")
    process = subprocess.Popen(
        command("pretrain", "run.yaml", *settings),
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path / "harm")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def when(step: int, number: int, victims: str) -> None:
        deadline = time.monotonic() + 300
        while step not in metrics(tmp_path, "run"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for rank in psutil.Process(process.pid).children(recursive=True):
            if rank.environ().get("RANK", "-") in victims:
                os.kill(rank.pid, number)

    when(30, signal.SIGRTMIN + 1, "01")
    when(45, signal.SIGRTMIN, "1")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "standard deviations above the recent mean" in said and "update skipped (health.skip_spikes)" in said
    last = metrics(tmp_path, "run")[90]
    assert 1 <= last["spikes"] <= 5 and last["skipped_steps"] == 0
    assert "warning: slow against the median of the ranks" in said and "rank 1 on" in said
    assert last["slowest_rank"] == 1 and last["rank_seconds_slowest"] > 0.3 * 2, (
        "two micro-batches of a step, each 0.3 s"
    )
