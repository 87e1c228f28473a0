"""Several folders as one stream: the shares of every stretch, each folder's own order, and training on a mixture."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.test_data_stream import LENGTH, prepared, same  # noqa: F401 - a fixture
from tests.test_main_job import CONFIG, interrupt, losses, make_corpus, metrics, tidar
from tidar_mega.config import ConfigError, DataConfig, load
from tidar_mega.data import DataError
from tidar_mega.data.mixture import Mixture, open_data
from tidar_mega.data.stream import open_stream

WEIGHTS = {"equal": [1, 1], "web, code, books": [0.7, 0.25, 0.05], "small": [3, 0.0001], "by size": None}


def mixture(folder: Path, weights: list[float] | None, split: str = "train") -> Mixture:
    """Of one folder under several names, so that the parts differ by their shares alone."""
    count = len(weights) if weights else 3
    return Mixture({f"part{i}": open_stream(folder, split, LENGTH, seed=i) for i in range(count)}, weights)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_every_stretch_holds_the_shares_and_every_folder_its_own_order(prepared, weights):  # noqa: F811
    mixed = mixture(prepared, weights)
    places = np.array([mixed.place(i) for i in range(210_000)])
    share = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    of_each = places[:, :1] == np.arange(len(share))
    so_far = of_each.cumsum(axis=0)
    off = np.abs(so_far - share * np.arange(1, len(places) + 1)[:, None])
    assert off.max() < len(share), "at every sample from the first on, so that any two of them have the shares between"
    for source in range(len(share)):
        own = places[of_each[:, source], 1]
        turn = -(-len(own) * 100_000 // 210_000)
        assert sorted(own) == list(range(len(own))) and abs(turn - share[source] * 100_000) < 2
    for ranks in (2, 3, 8, 16):  # which take samples in turn
        for rank in range(ranks):
            mine = of_each[rank::ranks].mean(axis=0)
            assert np.abs(mine - share).max() < 0.1, "no replica reads a folder of its own"


def test_a_sample_is_that_of_its_folder(prepared):  # noqa: F811
    mixed = mixture(prepared, [2, 1])
    alone = [open_stream(prepared, "train", LENGTH, seed=i) for i in range(2)]
    for i in (0, 1, 2, 50, 99_999, 100_000, 123_456):
        source, index = mixed.place(i)
        assert same(mixed.rows(i), alone[source].rows(index))


def test_epochs_are_those_of_each_folder(prepared):  # noqa: F811
    mixed, size = mixture(prepared, [3, 1]), open_stream(prepared, "train", LENGTH, 0).samples_per_epoch
    assert mixed.epochs(4 * size) == {"epoch": 3, "epoch/part0": 3, "epoch/part1": 1}


def test_parts_have_their_shares_but_one_at_least_and_no_more_than_all(prepared):  # noqa: F811
    assert [(name, count) for name, _, count in mixture(prepared, [3, 1]).parts(64)] == [("part0", 48), ("part1", 16)]
    assert [count for *_, count in mixture(prepared, [1, 0.0001]).parts(64)] == [64, 1]
    size = open_stream(prepared, "validation", LENGTH, 0).samples_per_epoch
    assert [count for *_, count in mixture(prepared, [3, 1], "validation").parts(10**6)] == [size, size]


def test_the_fingerprint_holds_folders_and_shares(prepared):  # noqa: F811
    found = [mixture(prepared, w).fingerprint for w in ([1, 1], [2, 2], [1, 2], [2, 1], [1, 1, 1])]
    assert found[0] == found[1] and len(set(found)) == 4


def test_names_are_short_where_they_can_be(prepared):  # noqa: F811
    streams = [open_stream(prepared, "train", LENGTH, seed=i) for i in range(2)]
    for folders, names in ((["a/web", "b/code"], ["web", "code"]), (["a/web", "b/web"], ["a/web", "b/web"])):
        mixed = Mixture(dict(zip(folders, streams, strict=True)), None)
        assert [name for name, *_ in mixed.parts(8)] == names


def test_a_share_too_small_for_a_sample_is_refused(prepared):  # noqa: F811
    with pytest.raises(DataError, match=r"data.weights = .1, 1e-07.: the share of part1 is below one sample in 100000"):
        mixture(prepared, [1, 1e-7])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=[]"], "data.path"),
        (["data.path=[a,a]"], "a folder, or a list of different ones"),
        (["data.path=[a,./a/]"], "a folder, or a list of different ones"),
        (["data.path=7"], "a folder, or a list of different ones"),
        (["data.weights=[1,2]"], "data.weights = .*: must be null where data.path is one folder"),
        (["data.path=[a,b]", "data.weights=[1]"], "must be 2 numbers above 0"),
        (["data.path=[a,b]", "data.weights=[1,0]"], "must be 2 numbers above 0"),
    ],
)
def test_bad_mixtures_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load(None, overrides)


def test_one_folder_is_a_plain_stream(prepared):  # noqa: F811
    alone = open_data(DataConfig(str(prepared), None, LENGTH), "train", 3)
    assert same(alone.rows(5), open_stream(prepared, "train", LENGTH, 3).rows(5))
    assert open_data(DataConfig([str(prepared)], [2.0], LENGTH), "train", 3).fingerprint == alone.fingerprint


# training

MIXED = ("data.path=[corpus,letters]", "data.weights=[0.75,0.25]")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Code and something unlike it, prepared with one tokenizer; and a run on both that was never interrupted."""
    folder = tmp_path_factory.mktemp("mixture")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    letters = "\n".join(json.dumps({"text": "abcdefghij " * (20 + i % 7)}) for i in range(200))
    (folder / "letters.jsonl").write_text(letters)
    prepare = ("prepare", "letters.jsonl", "--output", "letters", "--validation-fraction", "0.2")
    tidar(folder, *prepare, "--tokenizer", "corpus/tokenizer")
    tidar(folder, "pretrain", "run.yaml", "run_dir=whole", *MIXED)
    return folder


def test_a_run_on_a_mixture_says_what_each_folder_gives(work):
    (line,) = (line for step, line in metrics(work, "whole", "validation").items() if step == 16)
    assert line["loss/letters"] < line["loss/corpus"] - 0.5, "it is soon known by heart"
    assert line["loss/letters"] < line["loss"] < line["loss/corpus"]
    assert line["nats_per_byte/letters"] < line["nats_per_byte"] < line["nats_per_byte/corpus"]
    last = metrics(work, "whole")[16]
    assert last["epoch"] == max(last["epoch/corpus"], last["epoch/letters"]) > 0


def test_a_resume_of_a_mixture_goes_on_with_the_next_sample(work):
    assert interrupt(work, "killed", 7, signal.SIGKILL, *MIXED) == -signal.SIGKILL
    tidar(work, "pretrain", "run.yaml", "run_dir=killed", *MIXED)
    assert losses(work, "killed") == losses(work, "whole")
    other = (MIXED[0], "data.weights=[1,1]", "train.steps=20")
    said = tidar(work, "pretrain", "run.yaml", "run_dir=killed", *other, code=2)
    assert "data.weights = [1.0, 1.0]: the checkpoint" in said and "data.weights = [0.75, 0.25]; set them back" in said


def test_every_folder_is_looked_at_by_an_evaluation(work):
    from tidar_mega.evaluation.acceptance import held_out_prompts
    from tidar_mega.evaluation.samples import vocabulary

    folders = [str(work / "corpus"), str(work / "letters")]  # of very unlike sizes
    stream = open_data(DataConfig(folders, [0.5, 0.5], 64), "validation", 0)
    prompts = [stream.tokenizer.decode(prompt) for prompt in held_out_prompts(stream, 40, 16)]
    of_letters = [set(text) <= set("abcdefghij ") for text in prompts]
    assert 0 < sum(of_letters) < 40
    assert {"abcdefghij", "the", "self"} <= vocabulary(stream)
    small = ("--prompts=2", "--prompt-tokens=8", "--max-tokens=8", "--sequences=4")
    assert "validation_nats_per_byte" in tidar(work, "evaluate", "whole", *small)


def test_folders_of_unlike_tokenizers_are_refused(work):
    tidar(work, "prepare", "letters.jsonl", "--output", "other", "--vocab-size", "300", "--validation-fraction", "0.2")
    said = tidar(work, "pretrain", "run.yaml", "run_dir=x", "data.path=[corpus,other]", code=2)
    assert "data.path: other was not prepared with the tokenizer of corpus" in said and "--tokenizer corpus" in said
    said = tidar(work, "pretrain", "run.yaml", "run_dir=x", "data.path=[corpus,nowhere]", code=2)
    assert "nowhere" in said
