"""What TensorBoard is given, read back by its own reader, and its pages in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import CHROMIUM, Browser
from tests.test_main_job import CONFIG, command, environment, interrupt, make_corpus, metrics, tidar
from tidar_mega import config
from tidar_mega.launch.local import _free_port
from tidar_mega.methods import load
from tidar_mega.rows import Rows
from tidar_mega.train.board import Board, mask_picture

SMALL = ("--prompts=2", "--prompt-tokens=8", "--max-tokens=12", "--sequences=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run that was killed behind its newest checkpoint, has been resumed, and was evaluated."""
    folder = tmp_path_factory.mktemp("board")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    assert interrupt(folder, "run", 7, signal.SIGKILL) == -signal.SIGKILL
    time.sleep(1.0)  # the ranks die with their parent
    assert "resumed from" in tidar(folder, "pretrain", "run.yaml", "run_dir=run")
    tidar(folder, "evaluate", "run", "--watch", "--period=1", *SMALL)
    return folder


def events(work: Path, name: str) -> EventAccumulator:
    return EventAccumulator(
        str(work / "run" / "tensorboard" / name), size_guidance={"tensors": 0, "histograms": 0}
    ).Reload()


@pytest.mark.distributed
def test_a_resumed_run_has_no_step_twice_and_the_values_of_its_metrics(work):
    board = events(work, "train")
    found = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert [step for step, _ in found] == list(range(1, 17))
    told = metrics(work, "run")
    assert all(value == pytest.approx(told[step]["loss"], rel=1e-6) for step, value in found)
    assert [e.step for e in board.Histograms("train/accepted_length")] == list(range(1, 17))


@pytest.mark.distributed
def test_texts_histograms_and_pictures_are_there(work):
    board = events(work, "train")
    texts = {
        name: board.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("config", "layout")
    }
    assert "num_layers: 2" in texts["config"] and "data 2" in texts["layout"]
    accepted = board.Histograms("train/accepted_length")[-1]
    told = metrics(work, "run")[accepted.step]["expected_tokens_per_forward"]
    value = accepted.histogram_value
    assert value.num > 0 and value.sum / value.num == pytest.approx(told)
    assert board.Images("mask")[-1].width == board.Images("mask")[-1].height == 8 * 2 * 24
    evaluated = events(work, "evaluation")
    (line,) = [x for x in (work / "run" / "evaluations.jsonl").read_text().splitlines() if '"step": 16' in x]
    share = float(re.search(r'"tokens_per_forward": ([\d.]+)', line)[1])
    last = evaluated.Scalars("evaluation/tokens_per_forward")[-1]
    assert (last.step, last.value) == (16, pytest.approx(share))
    assert evaluated.Histograms("evaluation/accepted_length")[-1].step == 16
    assert evaluated.Images("evaluation/decode_trace")[-1].width == 1000


@pytest.mark.distributed
def test_a_watch_evaluates_each_checkpoint_once(work):
    steps = re.findall(r'"step": (\d+)', (work / "run" / "evaluations.jsonl").read_text())
    kept = sorted(int(p.name[5:]) for p in (work / "run" / "checkpoints").glob("step_*"))
    assert sorted(map(int, steps)) == kept == [15, 16]
    said = tidar(work, "evaluate", "run", "--watch")
    assert "is finished, and its last checkpoint is evaluated" in said and "evaluation of step" not in said
    assert "there is no such run folder" in tidar(work, "evaluate", "nowhere", "--watch", code=2)


@pytest.mark.distributed
def test_a_watch_stands_copies_and_torn_lines_and_does_nothing_twice(work):
    run = work / "again"
    shutil.copytree(work / "run", run)
    newest = max((run / "checkpoints").glob("step_*"))
    shutil.copytree(newest, newest.with_suffix(".bak"))
    file = run / "evaluations.jsonl"
    whole = file.read_text().splitlines()
    file.write_text(whole[0] + "\n" + whole[1][:40])  # what a killed process left of the newest one's
    said = tidar(work, "evaluate", "again", "--watch", *SMALL)
    assert said.count("evaluation of step") == 1 and "its last checkpoint is evaluated" in said
    first, torn, last = file.read_text().splitlines()
    assert (first, torn) == (whole[0], whole[1][:40])
    assert json.loads(last)["step"] == 16 and json.loads(last)["mode"] == "fused"
    file.unlink()
    file.mkdir()  # nothing can be kept in it
    (run / "tensorboard" / "evaluation").rename(run / "events")
    (run / "tensorboard" / "evaluation").touch()
    said = tidar(work, "evaluate", "again", "--watch", *SMALL, code=2)
    assert said.count("evaluation of step") == 1 and "evaluations.jsonl: the evaluation of" in said
    assert "evaluations.jsonl: not kept" in said and "tensorboard: not kept" in said
    tidar(work, "evaluate", "again", *SMALL, "decode.mode=blocks", "--json", "blocks.json")
    figures = json.loads((work / "blocks.json").read_text())
    assert figures["mode"] == "blocks" and not any(figures["acceptance_histogram"])


def test_an_evaluation_in_two_stages_says_what_one_process_says(work):
    """Also of a checkpoint under another name."""
    found = {}
    checkpoint = max((work / "run" / "checkpoints").glob("step_*"))
    shutil.copytree(checkpoint, work / "copied")
    for stages in (1, 2):
        small = ("--prompts=2", "--prompt-tokens=8", "--max-tokens=8", "--sequences=2", f"decode.pipeline={stages}")
        tidar(work, "evaluate", "copied", *small, "--json", "figures.json")
        found[stages] = json.loads((work / "figures.json").read_text())
    one, two = found[1], found[2]
    for exact in ("acceptance_histogram", "mode"):
        assert one.pop(exact) == two.pop(exact)
    assert two == pytest.approx(one, rel=1e-5)
    assert one["step"] == int(checkpoint.name[5:]) and one["validation_nats_per_byte"] > 0


def test_a_histogram_of_lengths_holds_their_counts(tmp_path):
    board = Board(tmp_path)
    board.lengths(3, "lengths", [5, 0, 2, 1])
    board.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("lengths")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.min, value.max) == (3, 8, 5 + 6 + 4, 1, 4)
    assert list(zip(value.bucket_limit, value.bucket, strict=True)) == [(1.5, 5), (2.5, 0), (3.5, 2), (4.5, 1)]


def test_the_picture_of_the_mask_is_the_mask():
    """One document of 8 places, blocks of 4: clean rows see what is before, masks their block and all before it."""
    settings = config.load(None, ["data.seq_length=8", "train.block=4"])
    place = torch.arange(8)[None]
    zero = torch.zeros_like(place)
    clean = Rows(place, place, place, place + 1, zero, zero, zero, zero.float())
    rows = load(settings, 300).training_rows(clean, torch.tensor([0]))
    pixels = mask_picture(rows)[::8, ::8]
    expected = np.full((16, 16, 3), (246, 246, 246), dtype=np.uint8)
    for q in range(8):
        for k in range(8):
            if k <= q:
                expected[q, k] = (33, 102, 172)
            if k < q // 4 * 4:
                expected[8 + q, k] = (33, 102, 172)
            if k // 4 == q // 4:
                expected[8 + q, 8 + k] = (217, 95, 2)
    assert np.array_equal(pixels, expected)


def test_a_folder_without_events_is_refused(tmp_path):
    assert "there are no TensorBoard events" in tidar(tmp_path, "board", str(tmp_path), code=2)


@pytest.fixture
def address(work):
    """`tidar board`, running."""
    port = _free_port()
    log = (work / "board.log").open("w")
    served = subprocess.Popen(
        command("board", "run", f"--port={port}"), cwd=work, env=environment(), stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        try:
            runs = urllib.request.urlopen(f"{address}/data/runs", timeout=5).read()
            if b"train" in runs:
                break
        except OSError:
            pass
        assert served.poll() is None and time.monotonic() < deadline, (work / "board.log").read_text()
        time.sleep(0.5)
    yield address
    served.terminate()
    served.wait(30)


@pytest.mark.distributed
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_panels_of_the_run(work, address):
    with Browser(work / "profile") as browser:
        browser.open(f"{address}/#timeseries")
        browser.wait_for(["/accepted_length", "/decode_trace", "mask", "train", "validation"])
        picture = browser.screenshot()
        browser.open(f"{address}/#text")
        browser.wait_for(
            ["config/text_summary", "num_layers: 2", "layout/text_summary", "2 process(es) on cpu, data 2"]
        )
        browser.open(f"{address}/#images")
        assert {8 * 2 * 24, 1000} <= set(browser.wait_for(["mask", "evaluation/decode_trace"], pictures=2)["widths"])
        browser.open(f"{address}/#histograms")
        browser.wait_for(["train/accepted_length", "evaluation/accepted_length"])
    (work / "board.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000, "not an empty page"
