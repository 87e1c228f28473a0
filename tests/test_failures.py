"""One rank fails, hangs or is killed, by real causes: all end in time, and what is said first names it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import FileStore

from tests.test_main_job import CONFIG, command, environment, make_corpus
from tidar_mega.config import LostError
from tidar_mega.train import roll_call
from tidar_mega.train.roll_call import Note, RollCall, Survey

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "hanging").mkdir()
    (folder / "hanging" / "sitecustomize.py").write_text(HANGING)
    return folder


class Output:
    """Lines of a process with the seconds at which they came, read as they come."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def wait_for(self, start: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not any(line.startswith(start) for _, line in self.lines):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def after(self, moment: float) -> str:
        """What came since, save for the lines of a run that goes well."""
        return "".join(t for at, t in self.lines if at > moment and not re.match("step |validation |writing |publ", t))


# What Python itself runs at the start of a process that has this on its path: signals on which the main thread hangs
# or raises, wherever it is.
HANGING = """
import ctypes, signal, time
def no_more_memory(*_):
    raise MemoryError("std::bad_alloc")
signal.signal(signal.SIGRTMIN, lambda *_: time.sleep(3600))  # other threads go on
signal.signal(signal.SIGRTMIN + 1, lambda *_: ctypes.PyDLL(None).sleep(3600))  # it keeps Python's lock
signal.signal(signal.SIGRTMIN + 2, no_more_memory)
"""


def fail(folder: Path, run: str, victim: int, how, *overrides: str, launcher: tuple[str, ...] = ()):
    """Runs until step 3, then does `how` to the process of rank `victim`; (what was said, seconds, exit code)."""
    line = command("pretrain", "run.yaml", f"run_dir={run}", "train.steps=1000", "checkpoint.interval=1000", *overrides)
    process = subprocess.Popen(
        [*launcher, *line[len(launcher) and 1 :]],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(folder / "hanging")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = Output(process)
    output.wait_for("step 3/")
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)}
    started = time.monotonic()
    how(ranks[str(victim)])
    code = process.wait(timeout=180)
    output.thread.join(10)
    assert not [p for p in psutil.process_iter(["cmdline"]) if f"run_dir={run}" in (p.info["cmdline"] or [])]
    return output.after(started), time.monotonic() - started, code


def no_more_files(rank: psutil.Process) -> None:
    rank.rlimit(psutil.RLIMIT_NOFILE, (3, 3))


def no_more_memory(rank: psutil.Process) -> None:
    rank.send_signal(signal.SIGRTMIN + 2)


def test_an_exception_on_one_rank_is_told_first_with_its_trace_and_ends_all(work):
    told, seconds, code = fail(work, "exception", 1, no_more_files)
    lines = told.splitlines()
    assert re.fullmatch(r"\[rank 1\] failed at step \d+, .*:", lines[0]), told
    assert lines[1] == "Traceback (most recent call last):" and told.count("Traceback") == 1
    assert any(line.startswith("OSError: [Errno 24] Too many open files") for line in lines), told
    assert lines[-1].startswith("[rank 0] ended because rank 1 had failed: OSError"), told
    assert code == 1 and seconds < 30


def test_a_failure_of_rank_0_reaches_the_others_although_it_holds_the_store(work):
    told, seconds, code = fail(work, "rank_0", 0, no_more_files, "log.tensorboard=false")
    assert re.search(r"^(\[rank 0\] failed at|error: run_dir)", told.splitlines()[0]), told
    assert "[rank 1] ended because rank 0 had failed" in told
    assert code in (1, LostError.exit_code) and seconds < 30


def stop(rank: psutil.Process) -> None:
    rank.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_hangs_is_named_with_the_operation_when_the_time_is_over(work, victim):
    told, seconds, code = fail(work, f"hangs_{victim}", victim, stop, "parallel.timeout_minutes=0.5")
    first = told.splitlines()[0]
    assert first.startswith(f"[rank {1 - victim}] error: "), told
    assert re.search(r"\w+ \(\w+/\w+\.py:\d+\) did not come to its end within 0.5 minutes \(parallel.timeout", first)
    assert f"rank {victim} did not take part" in first and "at step " in first
    assert "Traceback" not in told
    assert code == LostError.exit_code and 30 <= seconds < 120


@pytest.mark.parametrize(
    "number, victim, blame",
    [
        (signal.SIGRTMIN, 1, r"rank 1 did not take part: rank 1 is still at step \d+, \w+"),
        (signal.SIGRTMIN + 1, 1, "rank 1 did not take part: stopped, dead or unreachable"),
        (signal.SIGSTOP, 0, "rank 0 did not take part, and the store that it holds does not answer"),
    ],
    ids=["hangs in Python", "hangs with Python's lock", "rank 0 is stopped"],
)
def test_the_watchdog_names_the_rank_that_hangs_and_shows_all_stacks(work, number, victim, blame):
    """Long before a collective gives up (parallel.timeout_minutes is 10)."""
    run = f"watchdog_{number - signal.SIGSTOP}"
    told, seconds, code = fail(work, run, victim, lambda rank: rank.send_signal(number), "health.hang_minutes=0.75")
    error = next(line for line in told.splitlines() if "error:" in line)
    assert told.count("error:") == 1 and "Traceback" not in told, told
    assert "no progress for 0.75 minutes (health.hang_minutes) at step" in error and re.search(blame, error), told
    waiting = told.split(f"[rank {1 - victim}] the stacks of all threads")[1]
    assert "[rank" in waiting and re.search(r"/tidar_mega/train/\w+\.py", waiting), told
    if number == signal.SIGRTMIN:
        stack = told.split("[rank 1] the stacks of all threads")[1]
        assert re.search(r"sitecustomize.py\", line \d+, in <lambda>", stack), told
    if number == signal.SIGRTMIN + 1:  # it cannot say so in Python
        assert "Timeout (" in told, told
        stack = told.split("Timeout (")[1]
        assert re.search(r"sitecustomize.py\", line \d+ in <lambda>", stack), told
    assert code == LostError.exit_code and 45 <= seconds < 150


def test_torchrun_ends_all_and_shows_the_rank_that_failed_first(work):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    told, seconds, code = fail(work, "torchrun", 1, no_more_memory, launcher=torchrun)
    assert told.startswith("[rank 1] failed at step"), told
    cause = told[told.index("Root Cause") :]
    assert re.search(r"rank +: 1", cause) and "Traceback (most recent call last)" in cause, told
    assert code == 1 and seconds < 90


# The roll call by itself: several ranks in one process, on a store in a file


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(roll_call, "SURVEY_SECONDS", 2.0)
    started = [RollCall(rank, 3, lambda: FileStore(str(tmp_path / "store"), 3)) for rank in range(3)]
    yield started
    for rank in started:
        rank.stop()


def at_the_same_place(ranks: list[RollCall], step: int, doing: str) -> None:
    for rank in ranks:
        rank.at(step, doing)
    time.sleep(0.3)


def test_a_survey_tells_who_is_silent_and_who_is_behind(ranks):
    at_the_same_place(ranks, 7, "update")
    found = ranks[0].ask()
    assert isinstance(found, Survey) and found.silent == set() and found.blame() is None
    ranks[2].at(6, "reading samples")
    time.sleep(0.3)
    assert ranks[0].ask().blame() == "rank 2 did not take part: rank 2 is still at step 6, reading samples"
    assert ranks[2].ask().blame() == ranks[0].ask().blame(), "the one that hangs comes to the same"
    ranks[1].stop()
    ranks[2].stop()
    assert ranks[0].ask().blame() == (
        "ranks 1, 2 did not take part: stopped, dead or unreachable; rank 1 was last heard of at step 7, update; "
        "rank 2 was last heard of at step 6, reading samples"
    )


def test_a_rank_that_waits_for_one_at_work_is_not_stuck(tmp_path, monkeypatch):
    """As when one rank reads its part of a checkpoint longer than the others."""
    monkeypatch.setattr(roll_call, "PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(roll_call, "SURVEY_SECONDS", 0.5)
    ended = []
    monkeypatch.setattr(roll_call.os, "_exit", ended.append)
    started = [RollCall(rank, 2, lambda: FileStore(str(tmp_path / "store"), 2), 1.0) for rank in range(2)]
    at_the_same_place(started, 0, "reading the newest checkpoint")
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with started[1].reading():
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            for _ in range(2):
                (tmp_path / "file").read_bytes()
            time.sleep(0.05)
        assert not any(rank._note for rank in started)
    while time.monotonic() < deadline + 10 and not all(rank._note for rank in started):
        time.sleep(0.1)
    assert "no progress for 0.0166667 minutes" in started[0]._note.text  # once nobody works
    for rank in started:
        rank.ending = True
        rank.stop()


def test_the_first_note_is_the_one_that_all_see(ranks):
    for rank in ranks:
        rank.ending = True
    assert ranks[2].leave(1, "first") == Note(2, 1, "first")
    assert ranks[1].leave(2, "second") == Note(2, 1, "first")
    assert ranks[0].ask() == Note(2, 1, "first")


def test_no_answer_of_the_store_is_no_answer(monkeypatch):
    monkeypatch.setattr(roll_call, "GRACE_SECONDS", 0.2)

    def nobody():
        raise ConnectionError("nobody there")

    lost = RollCall(1, 2, nobody)
    assert lost.ask() is None
    assert lost.leave(1, "alone") == Note(1, 1, "alone")


DONE = """
import atexit, sys
import torch.distributed as dist
from tidar_mega import cli

class Last:
    def __del__(self):
        print("taken down")

last = Last()
def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "at exit")
    return int(sys.argv[1])

cli.main = main
cli.entry_point()
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_is_done_ends_without_taking_python_down(code):
    """A thread of gloo that lets go of a tensor meanwhile would end the process by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", DONE, str(code)], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "at exit\n")


def test_health_and_roll_call_import_no_torch():
    """A stop signal that comes during that import must find its handler."""
    code = "import sys, tidar_mega.train.health, tidar_mega.train.roll_call; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
