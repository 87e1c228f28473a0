"""What clusters do to a run, done to real jobs on a real Slurm (`make test-slurm`), and what becomes of them: the table
of docs/faults.md is made here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.test_main_job import losses, metrics, tidar
from tests.test_slurm import ROOT, TWO_TASKS, end, make_work, rank_process, reached, restarted, sbatch, soon
from tidar_mega.launch import slurm

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("TIDAR_SLURM" not in os.environ, reason="needs a Slurm: make test-slurm starts one"),
]

DOCS = ROOT / "docs" / "faults.md"
INTERVAL = 5  # steps between checkpoints
# Python runs this at the start of every process that has it on its path. On a signal, the gradient of one weight of
# that rank becomes NaN, by a hook of torch: in one backward, or in all that come. On another, its backwards take long.
NAN = """
import gc, signal, time

def hook(action):
    import torch
    weight = next(o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and o.dim() == 2)
    weight.register_hook(action)

def spoil(backwards):
    left = [backwards]
    def action(gradient):
        left[0] -= 1
        return gradient * float("nan") if left[0] >= 0 else gradient
    hook(action)

signal.signal(signal.SIGRTMIN, lambda *_: spoil(1))
signal.signal(signal.SIGRTMIN + 1, lambda *_: spoil(10**9))
signal.signal(signal.SIGRTMIN + 2, lambda *_: hook(lambda gradient: time.sleep(0.5)))
"""
TABLE: dict[str, tuple[str, int, str, int]] = {}  # fault -> (what becomes of the job, restarts, steps lost, minutes)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = make_work(tmp_path_factory.mktemp("faults"), "$PWD/nan")
    (folder / "nan").mkdir()
    (folder / "nan" / "sitecustomize.py").write_text(NAN)
    return folder


@pytest.fixture(scope="module")
def unharmed(work) -> dict:
    """The losses of the same run without any fault."""
    tidar(work, "pretrain", "run.yaml", "run_dir=unharmed", "parallel.data=2")
    return losses(work, "unharmed")


class Harmed:
    """A job of two nodes to which something is done once it has made `step` steps."""

    def __init__(self, work: Path, run: str, *settings: str, step: int = 7) -> None:
        self.work, self.run = work, run
        self.job = sbatch(work, f"run_dir={run}", *settings, options=TWO_TASKS)
        reached(work, run, step)

    def rank(self, number: int) -> psutil.Process:
        return rank_process(self.run, number)

    def end(self, minutes: int, state: str = "COMPLETED", restarts: int = 1) -> str:
        """All that was said; the job must be over, in that state, within so many minutes from now."""
        said = end(self.work, self.job, state, 60 * minutes)
        assert restarted(self.job) == restarts, said
        return said

    def resumed_at(self, said: str) -> int:
        return int(re.findall(rf"resumed from {self.run}/checkpoints/step_\d+, step (\d+)", said)[-1])


def killed(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def write_down(fault: str, outcome: str, restarts: int, lost: str, minutes: int) -> None:
    TABLE[fault] = (outcome, restarts, lost, minutes)


def test_a_killed_rank(work, unharmed):
    harmed = Harmed(work, "rank_killed")
    killed(harmed.rank(1))
    before = max(metrics(work, "rank_killed"))
    said = harmed.end(8)
    assert "task 1: Killed" in said and f"job {harmed.job} is requeued, restart 1" in said
    assert harmed.resumed_at(said) >= before - 1 - INTERVAL
    assert losses(work, "rank_killed") == unharmed
    lost = "since the newest checkpoint"
    write_down("SIGKILL of a rank", "the other ranks end, the job is requeued and finishes", 1, lost, 8)


def test_a_rank_killed_while_a_checkpoint_is_written_beside_the_training(work, unharmed):
    harmed = Harmed(work, "save_killed", "checkpoint.asynchronous=true", step=6)
    drafts = work / "save_killed" / "checkpoints"
    deadline, unfinished = time.monotonic() + 120, 0
    while unfinished <= INTERVAL:  # the first is whole before the second is begun
        assert time.monotonic() < deadline
        unfinished = max((int(re.sub(r"\D", "", p.name)) for p in drafts.glob(".step_*.unfinished")), default=0)
    killed(harmed.rank(1))
    said = harmed.end(8)
    assert harmed.resumed_at(said) >= unfinished - INTERVAL
    assert losses(work, "save_killed") == unharmed
    assert not list(drafts.glob(".step_*")), "what was half-written is gone"
    lost = "since the newest whole checkpoint"
    write_down("SIGKILL of a rank during an asynchronous save", "requeued, finishes; no half checkpoint", 1, lost, 8)


def test_a_slurmd_killed(work, unharmed):
    """Its ranks lose their peers and end; Slurm sees the node down, requeues, and starts when it is back."""
    harmed = Harmed(work, "node_lost")
    cluster, folder = ROOT / "tests" / "slurm" / "cluster.sh", Path(os.environ["TIDAR_SLURM_FOLDER"])
    orphan = harmed.rank(1)
    step = orphan.parent()
    assert step.name() == "slurmstepd"
    orphan.send_signal(signal.SIGRTMIN + 2)  # the run must go on for longer than SlurmdTimeout
    killed(psutil.Process(int((folder / "pid" / "slurmd.2").read_text())))
    before = max(metrics(work, "node_lost"))
    soon(lambda: restarted(harmed.job) == 1, 240)
    # A slurmd that finds a step of the first start revokes the job's credential, and so also ends the second start.
    soon(lambda: gone(orphan) and gone(step), 120)
    subprocess.run([cluster, "node", "2"], check=True)
    said = harmed.end(8)
    assert harmed.resumed_at(said) >= before - 1 - INTERVAL
    assert losses(work, "node_lost") == unharmed
    outcome = "Slurm requeues the job once SlurmdTimeout is over; it starts on nodes that are there, and finishes"
    write_down("SIGKILL of a node's slurmd", outcome, 1, "since the newest checkpoint", 13)


def test_a_rank_that_hangs(work, unharmed):
    harmed = Harmed(work, "hangs", "health.hang_minutes=1")
    harmed.rank(1).send_signal(signal.SIGSTOP)
    before = max(metrics(work, "hangs"))
    said = harmed.end(8)
    assert "no progress for 1 minutes (health.hang_minutes)" in said
    assert "rank 1 did not take part: stopped, dead or unreachable; rank 1 was last heard of at step" in said
    assert "[rank 0] the stacks of all threads" in said
    assert f"job {harmed.job} is requeued, restart 1" in said
    assert harmed.resumed_at(said) >= before - 1 - INTERVAL
    assert losses(work, "hangs") == unharmed
    outcome = "after `health.hang_minutes` the rank is named, all stacks are shown; requeued, finishes"
    write_down("SIGSTOP of a rank", outcome, 1, "since the newest checkpoint", 8)


def test_a_full_disk(work, unharmed):
    """A small file system of its own that holds two checkpoints and not three; then a larger one."""
    folder = work / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        job = sbatch(work, "run_dir=full", options=TWO_TASKS)
        said = end(work, job, "FAILED", 300)
        assert "No space left on device" in said and "earlier checkpoints are whole" in said
        assert slurm.show(job)["ExitCode"] == "2:0" and restarted(job) == 0
        whole = sorted((folder / "checkpoints").glob("step_*"))
        assert whole and not list((folder / "checkpoints").glob(".step_*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        said = end(work, sbatch(work, "run_dir=full", options=TWO_TASKS), "COMPLETED", 300)
        assert f"resumed from full/checkpoints/{whole[-1].name}" in said
        assert losses(work, "full") == unharmed
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    outcome = (
        "ends with what is full and what to do (code 2, not requeued); the same command goes on once there is room"
    )
    write_down("A full disk of checkpoints", outcome, 0, "since the newest checkpoint", 5)


def test_a_gradient_that_is_nan_on_one_rank_in_one_step(work):
    harmed = Harmed(work, "nan_once")
    harmed.rank(1).send_signal(signal.SIGRTMIN)
    said = harmed.end(5, restarts=0)
    assert len(re.findall(r"step \d+: gradient norm is nan; step skipped", said)) == 1
    last = metrics(work, "nan_once")[30]
    assert last["skipped_steps"] == 1 and last["loss"] < metrics(work, "nan_once")[1]["loss"]
    write_down("NaN in one rank's gradient, once", "all ranks skip that update; finishes", 0, "that update", 5)


def test_a_gradient_that_stays_nan_on_one_rank(work):
    harmed = Harmed(work, "nan_always")
    harmed.rank(1).send_signal(signal.SIGRTMIN + 1)
    said = harmed.end(5, "FAILED", restarts=0)
    assert "the gradient was not finite in 3 steps in a row (train.nan_limit)" in said
    newest = max(int(p.name[5:]) for p in (work / "nan_always" / "checkpoints").glob("step_*"))
    meta = json.loads((work / "nan_always" / "checkpoints" / f"step_{newest:08d}" / "meta.json").read_text())
    assert meta["step"] == newest
    outcome = "ends after `train.nan_limit` steps and says so (code 2, not requeued)"
    write_down("NaN in one rank's gradient, always", outcome, 0, "since the newest checkpoint", 5)


def test_the_table_is_that_of_the_docs():
    """Writes docs/faults.md anew where it is not what happened."""
    if len(TABLE) < 7:
        pytest.skip("not all faults were tried")
    head = DOCS.read_text().split("| fault |")[0]
    lines = [
        "| fault | what becomes of the job | restarts | steps computed again | over within |",
        "| --- |" + " --- |" * 4,
    ]
    lines += [f"| {fault} | {what} | {n} | {lost} | {m} min |" for fault, (what, n, lost, m) in TABLE.items()]
    text = head + "\n".join(lines) + "\n"
    if text != DOCS.read_text():
        DOCS.write_text(text)
        pytest.fail(f"{DOCS.name} was not the table of what happened; it is now")
