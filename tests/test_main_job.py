"""The main job through its commands: prepare, pretrain in two processes, interruptions, resume, generate."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tidar_mega.config import LostError
from tidar_mega.train.resume import lock_folder

pytestmark = pytest.mark.distributed

CONFIG = """
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}
data: {path: corpus, seq_length: 64}
train: {steps: 16, global_batch_size: 8, micro_batch_size: 2, block: 4, eval_interval: 8, eval_sequences: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 2}
parallel: {data: 2}
precision: {dtype: bf16}
checkpoint: {interval: 5}
log: {interval: 1}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tidar_mega.cli", *arguments]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def tidar(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path, run: str, kind: str = "train") -> dict[int, dict]:
    """step -> line; fails where a step was logged twice."""
    path = folder / run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    steps = [line["step"] for line in lines if line["kind"] == kind]
    assert len(steps) == len(set(steps)), f"steps logged twice: {steps}"
    return {line["step"]: line for line in lines if line["kind"] == kind}


NOT_TIMES = ("loss", "loss_ar", "loss_draft", "grad_norm", "lr", "samples", "draft_accuracy")


def losses(folder: Path, run: str) -> dict[int, tuple]:
    return {step: tuple(line[name] for name in NOT_TIMES) for step, line in metrics(folder, run).items()}


def make_corpus(folder: Path) -> None:
    """Prepares some real source code as `corpus`."""
    source = folder / "source"
    source.mkdir()
    for name in ("argparse", "ast", "calendar", "configparser", "dataclasses", "difflib", "fractions", "inspect"):
        shutil.copy(__import__(name).__file__, source)
    tidar(folder, "prepare", "source", "--output", "corpus", "--vocab-size", "320", "--validation-fraction", "0.2")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a corpus of real source code, a config, and a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("work")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    tidar(folder, "pretrain", "run.yaml", "run_dir=whole")
    return folder


def interrupt(folder: Path, run: str, after: int, how, *overrides: str) -> int:
    """Starts a run and, once step `after` is logged, sends it the signal `how` or calls it; returns the exit code.

    What it says is in `run`.log.
    """
    with (folder / f"{run}.log").open("w") as log:
        process = subprocess.Popen(
            command("pretrain", "run.yaml", f"run_dir={run}", *overrides),
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 600
        while after not in metrics(folder, run):
            assert process.poll() is None, "ended too early"
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.02)
        how(process) if callable(how) else process.send_signal(how)
        return process.wait(timeout=300)


def test_a_trace_of_some_steps_is_recorded(work):
    overrides = ("log.profile_step=4", "log.profile_steps=2", "log.profile_ranks=[0,1]")
    said = tidar(work, "pretrain", "run.yaml", "run_dir=traced", *overrides)
    assert "trace of steps 4 to 5: traced/profile/step_4_rank_0.json.gz" in said
    for rank in (0, 1):
        with gzip.open(work / "traced" / "profile" / f"step_4_rank_{rank}.json.gz") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
        assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 2
        assert "aten::mm" in names and any("all_reduce" in name or "reduce_scatter" in name for name in names)
    for step, figures in losses(work, "traced").items():
        assert figures == losses(work, "whole")[step], "a recorded step is the same step"
    said = tidar(work, "pretrain", "run.yaml", "run_dir=x", "log.profile_step=1", code=2)
    assert "log.profile_step = 1: must be null, or a step from 2" in said
    said = tidar(work, "pretrain", "run.yaml", "run_dir=x", "log.profile_step=2", "log.profile_ranks=[2]", code=2)
    assert "log.profile_ranks = [2]: must be below the number of ranks (2)" in said


def test_training_learns_and_says_so(work):
    lines = metrics(work, "whole")
    assert sorted(lines) == list(range(1, 17))
    assert lines[16]["loss"] < lines[1]["loss"] - 0.3
    assert {"tokens_per_second", "model_flop_utilisation", "memory_gib", "expected_tokens_per_forward"} <= set(lines[1])
    assert {f"draft_accuracy/slot_{k}" for k in range(4)} <= set(lines[1])
    validation = metrics(work, "whole", "validation")
    assert sorted(validation) == [8, 16]
    assert 0.5 < validation[16]["nats_per_byte"] < 5


def test_samples_per_line_are_the_global_index(work):
    assert [line["samples"] for line in metrics(work, "whole").values()] == [8 * step for step in range(1, 17)]


def while_saving(folder: Path, run: str):
    """Waits until a checkpoint is being written, then kills."""

    def kill(process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while not list((folder / run / "checkpoints").glob(".step_*.unfinished")):
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()

    return kill


@pytest.mark.parametrize("moment", ["between", "while saving"])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(work, moment):
    run = f"killed_{moment.replace(' ', '_')}"
    how = signal.SIGKILL if moment == "between" else while_saving(work, run)
    assert interrupt(work, run, 7, how) == -signal.SIGKILL
    assert 7 <= max(metrics(work, run)) < 16
    time.sleep(1.0)  # the ranks die with their parent
    out = tidar(work, "pretrain", "run.yaml", f"run_dir={run}")
    assert "resumed from" in out
    assert losses(work, run) == losses(work, "whole")


ASYNCHRONOUS = ("checkpoint.asynchronous=true", "checkpoint.interval=2")


def stopped_writers(process: subprocess.Popen) -> list[psutil.Process]:
    """Waits until a process that a rank has forked is writing, and stops it in the middle."""
    ranks = psutil.Process(process.pid).children()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        forked = " ".join(Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text() for rank in ranks)
        caught = []
        for pid in map(int, forked.split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                writer = psutil.Process(pid)
                writer.suspend()
                if any(file.path.endswith(".distcp") for file in writer.open_files()):
                    caught.append(writer)
                else:
                    writer.resume()
        if caught:
            return caught
    raise AssertionError("no writer was met")


def two_more_steps(folder: Path, run: str) -> None:
    """Behind the step whose save was met; the next save, two steps later, waits for it."""
    (draft,) = (folder / run / "checkpoints").glob(".step_*.unfinished")
    saving, deadline = int(re.sub(r"\D", "", draft.name)), time.monotonic() + 120
    while max(metrics(folder, run)) < saving + 2:
        assert time.monotonic() < deadline, "training waits for the writers"
        time.sleep(0.02)


def test_killed_during_an_asynchronous_save_it_goes_on_bit_for_bit_from_the_one_before(work):
    """The writers are stopped, so that the kill finds them at work; they must not outlive their run, nor its lock."""
    checkpoints = work / "killed_asynchronous" / "checkpoints"
    before = []

    def kill(process: subprocess.Popen) -> None:
        writers = stopped_writers(process)
        before.extend(sorted(p.name for p in checkpoints.glob("step_*")))
        two_more_steps(work, "killed_asynchronous")
        process.kill()
        assert psutil.wait_procs(writers, timeout=10)[1] == []

    assert interrupt(work, "killed_asynchronous", 5, kill, *ASYNCHRONOUS) == -signal.SIGKILL
    assert before and sorted(p.name for p in checkpoints.glob("step_*")) == before
    assert list(checkpoints.glob(".step_*.unfinished"))
    out = tidar(work, "pretrain", "run.yaml", "run_dir=killed_asynchronous", *ASYNCHRONOUS)
    assert f"resumed from killed_asynchronous/checkpoints/{before[-1]}" in out
    assert losses(work, "killed_asynchronous") == losses(work, "whole")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_00000014", "step_00000016"]


def test_training_goes_on_during_an_asynchronous_save_and_a_stop_waits_for_it(work):
    def stop(process: subprocess.Popen) -> None:
        writers = stopped_writers(process)
        two_more_steps(work, "asynchronous")
        process.send_signal(signal.SIGTERM)
        time.sleep(2.0)
        assert process.poll() is None
        for writer in writers:
            writer.resume()

    assert interrupt(work, "asynchronous", 3, stop, *ASYNCHRONOUS) == 0
    stopped_at = max(metrics(work, "asynchronous"))
    assert (work / "asynchronous" / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    lines = (work / "asynchronous.log").read_text().splitlines()
    most = 0
    for path in [line.split()[1] for line in lines if line.startswith("writing ")]:
        during = lines[lines.index(f"writing {path} while training goes on") : lines.index(f"published {path}")]
        most = max(most, sum(line.startswith("step ") for line in during))
    assert most >= 2
    tidar(work, "pretrain", "run.yaml", "run_dir=asynchronous", *ASYNCHRONOUS)
    assert losses(work, "asynchronous") == losses(work, "whole")


def catches(rank: psutil.Process, number: int) -> bool:
    """Whether a rank has a handler for a signal, and not only that of the process which it is still a copy of."""
    if "RANK" not in rank.environ():
        return False
    status = Path(f"/proc/{rank.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_stop_signal_during_the_imports_is_not_lost(work):
    """As soon as each rank has its handler, which is seconds before its first step."""
    process = subprocess.Popen(
        command("pretrain", "run.yaml", "run_dir=early"), cwd=work, env=environment(), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        ranks = psutil.Process(process.pid).children()
        if len(ranks) == 2 and all(catches(rank, signal.SIGTERM) for rank in ranks):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "SIGTERM: stopped at step 0" in out


def test_a_run_killed_before_its_last_validation_makes_it(work):
    shutil.copytree(work / "whole", work / "unvalidated")
    (work / "unvalidated" / "finished.json").unlink()
    path = work / "unvalidated" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "validation"
    path.write_text("".join(lines[:-1]))
    out = tidar(work, "pretrain", "run.yaml", "run_dir=unvalidated")
    assert "done: 16 steps" in out and "already done" not in out
    assert metrics(work, "unvalidated", "validation") == metrics(work, "whole", "validation")
    assert "already done" in tidar(work, "pretrain", "run.yaml", "run_dir=unvalidated")


def test_a_stop_signal_saves_and_the_same_command_goes_on(work):
    assert interrupt(work, "stopped", 7, signal.SIGTERM) == 0
    stopped_at = max(metrics(work, "stopped"))
    assert stopped_at < 16
    assert (work / "stopped" / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    tidar(work, "pretrain", "run.yaml", "run_dir=stopped")
    assert losses(work, "stopped") == losses(work, "whole")
    assert "already done" in tidar(work, "pretrain", "run.yaml", "run_dir=stopped")


def test_a_log_line_that_spans_a_restart_is_that_of_the_whole_run(work):
    """Lines at 6, 12 and 16, checkpoints at 5, 10 and 15: a restart always falls between two lines."""
    every = "log.interval=6"
    tidar(work, "pretrain", "run.yaml", "run_dir=lines", every)
    interrupt(work, "spanned", 6, signal.SIGKILL, every)
    time.sleep(1.0)
    assert "resumed from" in tidar(work, "pretrain", "run.yaml", "run_dir=spanned", every)
    assert losses(work, "spanned") == losses(work, "lines")


def test_two_runs_do_not_share_a_folder(work):
    with lock_folder(work / "locked"):
        out = tidar(work, "pretrain", "run.yaml", "run_dir=locked", code=2)
    assert f"another run is using it (process {os.getpid()} on " in out and "Traceback" not in out


def test_a_job_that_starts_again_waits_for_what_is_left_of_its_last_start(tmp_path):
    orphan = lock_folder(tmp_path)
    with pytest.raises(LostError, match="still after 1 s"):
        lock_folder(tmp_path, patience_seconds=1.0)
    threading.Timer(1.5, orphan.close).start()
    lock_folder(tmp_path, patience_seconds=60.0).close()


@pytest.mark.parametrize("setting, said", [("method=idlm", "method = idlm"), ("train.block=8", "train.block = 8")])
def test_a_resume_with_another_method_or_block_is_refused(work, setting, said):
    out = tidar(work, "pretrain", "run.yaml", "run_dir=whole", setting, "train.steps=20", code=2)
    assert said in out and "was made with" in out and "Traceback" not in out


def test_a_new_run_goes_on_from_another_also_on_other_sequences(work):
    """With its weights, optimizer and schedule: the same steps as the run itself would have made."""
    source = "train.continue_from=whole/checkpoints/step_00000015"
    out = tidar(work, "pretrain", "run.yaml", "run_dir=forked", source)
    assert "goes on from whole/checkpoints/step_00000015, step 15, behind its samples" in out
    assert losses(work, "forked") == {16: losses(work, "whole")[16]}
    longer = ("train.continue_from=whole", "data.seq_length=128", "model.rotary_base=5.0e4", "train.steps=18")
    out = tidar(work, "pretrain", "run.yaml", "run_dir=longer", *longer)
    assert "step 16, from the first sample of data.path" in out
    assert [(step, line["samples"]) for step, line in metrics(work, "longer").items()] == [(17, 8), (18, 16)]
    learnt, before = (metrics(work, "whole")[step]["loss"] for step in (16, 1))
    for line in metrics(work, "longer").values():
        assert abs(line["loss"] - learnt) < (before - learnt) / 2
    assert "already done" in tidar(work, "pretrain", "run.yaml", "run_dir=longer", *longer)


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.continue_from=nowhere", "train.continue_from = nowhere: .*no checkpoint there"),
        ("model.num_layers=4", "train.continue_from = whole: model.num_layers = 4: the checkpoint .* was made with 2"),
        ("train.init_from=whole", "train.continue_from = whole: must be null with"),
    ],
)
def test_a_run_that_cannot_go_on_from_another_is_refused(work, override, said):
    out = tidar(work, "pretrain", "run.yaml", "run_dir=refused", "train.continue_from=whole", override, code=2)
    assert re.search(said, out) and "Traceback" not in out


def test_one_killed_rank_ends_the_run_in_seconds_and_nothing_is_lost(work):
    """The other rank waits in a collective that would only time out after minutes."""

    def kill_a_rank(process: subprocess.Popen) -> None:
        ranks = [c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1"]
        assert len(ranks) == 1
        ranks[0].kill()
        killed.append(time.monotonic())

    killed: list[float] = []
    assert interrupt(work, "one_rank", 7, kill_a_rank) == 128 + signal.SIGKILL
    assert time.monotonic() - killed[0] < 30
    log = (work / "one_rank.log").read_text()
    assert "Traceback" not in log and "\nrank 1 was ended by SIGKILL (most often for lack of memory)" in log
    assert not [p for p in psutil.process_iter(["cmdline"]) if "run_dir=one_rank" in (p.info["cmdline"] or [])]
    tidar(work, "pretrain", "run.yaml", "run_dir=one_rank")
    assert losses(work, "one_rank") == losses(work, "whole")


def test_another_number_of_replicas_goes_on_with_the_same_samples(work):
    """In float32, as the order of a sum over ranks changes the last bits."""
    tidar(work, "pretrain", "run.yaml", "run_dir=fp32", "precision.dtype=fp32")
    interrupt(work, "fewer", 6, signal.SIGTERM, "precision.dtype=fp32")
    assert max(metrics(work, "fewer")) < 16
    out = tidar(work, "pretrain", "run.yaml", "run_dir=fewer", "precision.dtype=fp32", "parallel.data=1")
    assert "resumed from" in out and "1 process" in out
    whole, fewer = losses(work, "fp32"), losses(work, "fewer")
    assert whole.keys() == fewer.keys()
    for step, figures in whole.items():
        assert fewer[step] == pytest.approx(figures, rel=2e-4, abs=2e-3), step


def test_tensorboard_has_every_step_once(work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(work / "killed_between" / "tensorboard" / "train")).Reload()
    events = board.Scalars("train/loss")
    assert [e.step for e in events] == list(range(1, 17))
    expected = {step: line["loss"] for step, line in metrics(work, "whole").items()}
    assert all(e.value == pytest.approx(expected[e.step], rel=1e-6) for e in events)
    assert {"train/grad_norm", "train/lr", "validation/nats_per_byte"} <= set(board.Tags()["scalars"])


def test_generate_streams_the_same_text_in_both_modes(work):
    texts = []
    for mode in ("fused", "ar"):
        arguments = ("--prompt", "def main(", "--json", f"{mode}.json", f"decode.mode={mode}", "decode.max_tokens=24")
        out = tidar(work, "generate", "whole", *arguments)
        figures = json.loads((work / f"{mode}.json").read_text())
        assert "def main(" + figures["text"] in out
        texts.append([t for commit in figures["commits"] for t in commit])
    assert texts[0] == texts[1]


def test_print_config_is_a_config(work):
    out = tidar(work, "pretrain", "run.yaml", "--print-config", "train.seed=9")
    (work / "printed.yaml").write_text(out)
    assert tidar(work, "pretrain", "printed.yaml", "--print-config") == out
    assert "seed: 9" in out


REFUSED = {
    "an unknown key": (["pretrain", "run.yaml", "train.stepz=3"], "did you mean train.steps"),
    "no config": (["pretrain", "none.yaml"], "none.yaml does not exist"),
    "no method": (
        ["pretrain", "run.yaml", "method=none", "run_dir=x1"],
        "method = none: must be one of ar, ",
    ),
    "no corpus": (["pretrain", "run.yaml", "data.path=none", "run_dir=x2"], "none"),
    "another shape": (["pretrain", "run.yaml", "run_dir=whole", "train.steps=20", "model.num_layers=3"], "num_layers"),
    "another optimizer": (
        ["pretrain", "run.yaml", "run_dir=whole", "train.steps=20", "parallel.distributed_optimizer=false"],
        "parallel.distributed_optimizer = False: the checkpoint whole/checkpoints/step_00000016 was made with True",
    ),
    "a folder that is a file": (["pretrain", "run.yaml", "run_dir=run.yaml"], "run_dir = run.yaml: cannot be written"),
    "a result that cannot be written": (["doctor", "--json", "run.yaml/x.json"], "--json run.yaml/x.json"),
    "no checkpoint": (["generate", "none", "--prompt", "x"], "no checkpoint there"),
    "no prompt": (["generate", "whole", "--prompt", ""], "prompt is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_clear_error(work, name):
    arguments, said = REFUSED[name]
    out = tidar(work, *arguments, code=2)
    assert said in out and "Traceback" not in out


def test_a_run_refuses_another_corpus(work):
    tidar(work, "prepare", "source", "--output", "other", "--vocab-size", "300", "--validation-fraction", "0.2")
    out = tidar(work, "pretrain", "run.yaml", "run_dir=whole", "data.path=other", "train.steps=20", code=2)
    assert "data.path = other" in out and "not the one that" in out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_works(work):
    shutil.copytree(work / "whole", work / "damaged")
    newest = sorted((work / "damaged" / "checkpoints").glob("step_*"))[-1]
    victim = max(newest.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(victim, 100)
    out = tidar(work, "pretrain", "run.yaml", "run_dir=damaged", "train.steps=17", code=2)
    assert victim.name in out and "delete it to go on from the checkpoint before it" in out
    shutil.rmtree(newest)
    assert "step_00000015" in tidar(work, "pretrain", "run.yaml", "run_dir=damaged")


def test_gradients_that_stay_nan_end_the_run_and_keep_the_checkpoint(work):
    shutil.copytree(work / "whole", work / "nan")
    bad = ("run_dir=nan", "train.steps=40", "optimizer.lr=1e30", "optimizer.min_lr=1e30", "optimizer.clip_grad=0")
    out = tidar(work, "pretrain", "run.yaml", *bad, code=2)
    assert "step skipped" in out and "train.nan_limit" in out
    assert (work / "nan" / "checkpoints" / "step_00000016").is_dir()
