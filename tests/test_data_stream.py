"""The stream: packing, order, coverage of an epoch, resume by one integer, and damaged folders."""

from __future__ import annotations

import argparse
import errno
import io
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_mega.config import LostError
from tidar_mega.data import DataError, prepare, shards
from tidar_mega.data.pack import pack
from tidar_mega.data.stream import open_stream, permute
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.rows import PADDING, Rows, concatenate

LENGTH = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Documents of 1 to 90 words in several shards."""
    root = tmp_path_factory.mktemp("stream")
    draw = random.Random(5)
    (root / "corpus").mkdir()
    for i in range(60):
        words = (draw.choice(["a", "bc", "def", "  ghij", "é"]) for _ in range(draw.choice([1, 2, 10, 90])))
        (root / "corpus" / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    options = ["--output", str(root / "out"), "--vocab-size", "270", "--shard-size", "12KB", "--workers", "1"]
    prepare.run(parser.parse_args([str(root / "corpus"), *options, "--validation-fraction", "0.2"]))
    return root / "out"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def documents(folder: Path, split: str) -> list[np.ndarray]:
    """By a scan of the tars, without index or offsets."""
    found = []
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [np.load(io.BytesIO(tar.extractfile(member).read())).astype(np.int64) for member in tar]
    return found


def same(a: Rows, b: Rows) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in Rows.__dataclass_fields__ if f != "causal_in_group")


# packing


def plain_rows(lengths: list[int], tokens: list[int], padding: int) -> dict[str, list]:
    """Row by row, for documents of these lengths and then padding."""
    owner = [d for d, n in enumerate(lengths) for _ in range(n)] + [PADDING] * padding
    rows: dict[str, list] = {name: [] for name in ("order", "document", "label", "weight")}
    for i in range(len(owner) - 1):
        rows["order"].append(i - owner.index(owner[i]))
        rows["document"].append(owner[i])
        rows["label"].append(tokens[i + 1])
        rows["weight"].append(float(owner[i] == owner[i + 1] and owner[i] != PADDING))
    return rows


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=8), padding=st.integers(0, 5))
def test_packing_is_the_plain_rule(lengths, padding):
    count = sum(lengths) + padding
    if count < 2:
        return
    tokens = list(range(100, 100 + count))
    owner = torch.tensor([d for d, n in enumerate(lengths) for _ in range(n)] + [PADDING] * padding)
    rows = pack(torch.tensor(tokens), owner)
    expected = plain_rows(lengths, tokens, padding)
    assert rows.shape == (1, count - 1)
    assert rows.token[0].tolist() == tokens[:-1]
    assert rows.order[0].tolist() == rows.position[0].tolist() == expected["order"]
    assert rows.horizon[0].tolist() == [o + 1 for o in expected["order"]]
    assert rows.group[0].tolist() == [0] * (count - 1)
    assert rows.document[0].tolist() == expected["document"]
    assert rows.label[0].tolist() == expected["label"]
    assert rows.weight[0].tolist() == expected["weight"]
    assert rows.weight.dtype == torch.float32


# order


@given(count=st.integers(1, 400), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(count, seed, epoch):
    assert sorted(permute(i, count, seed, epoch) for i in range(count)) == list(range(count))


@settings(max_examples=20)
@given(count=st.integers(2**20, 2**45), seed=st.integers(0, 99))
def test_a_huge_order_needs_no_memory(count, seed):
    places = [permute(i, count, seed, 0) for i in range(50)]
    assert len(set(places)) == 50 and all(0 <= p < count for p in places)


def test_the_order_looks_random():
    count, seeds = 50, 400
    landed = np.zeros((count, count))
    for seed in range(seeds):
        for i in range(count):
            landed[i, permute(i, count, seed, 0)] += 1
    chi_squared = ((landed - seeds / count) ** 2 / (seeds / count)).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_seed_and_epoch_change_the_order():
    orders = {tuple(permute(i, 100, seed, epoch) for i in range(100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


# reading


def test_an_epoch_covers_every_token_once_but_the_tail(prepared):
    stream = open_stream(prepared, "train", LENGTH, seed=3)
    flat = np.concatenate(documents(prepared, "train"))
    n = stream.samples_per_epoch
    assert n == len(flat) // LENGTH > 20
    windows = [flat[i : i + LENGTH].tolist() for i in range(0, n * LENGTH, LENGTH)]
    epochs = [[stream.rows(e * n + i).token[0].tolist() for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(windows)
    assert epochs[0] != epochs[1] and epochs[0] != windows


def test_labels_and_documents_of_every_window(prepared):
    stream = open_stream(prepared, "train", LENGTH, seed=3)
    texts = documents(prepared, "train")
    flat = np.concatenate(texts)
    owner = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    for g in range(stream.samples_per_epoch):
        rows = stream.rows(g)
        place = permute(g, stream.samples_per_epoch, 3, 0) * LENGTH
        mine = owner[place : place + LENGTH + 1]
        follows = mine[1:] == mine[:-1]
        assert rows.document[0].tolist() == (mine - mine[0])[:LENGTH].tolist()
        assert rows.weight[0].tolist() == [*follows.astype(float).tolist(), 0.0][:LENGTH]
        expected = flat[place + 1 : place + LENGTH + 1]
        assert (rows.label[0].numpy()[: len(follows)] == expected)[follows].all()
        assert not rows.weight[0][rows.token[0] == stream.tokenizer.eod].any()


def test_validation_is_in_order_and_pads_the_tail(prepared):
    stream = open_stream(prepared, "validation", LENGTH, seed=3)
    flat = np.concatenate(documents(prepared, "validation"))
    n = stream.samples_per_epoch
    assert n == -(-len(flat) // LENGTH)
    rows = concatenate([stream.rows(i) for i in range(n)], dim=0)
    assert rows.shape == (n, LENGTH)
    real = rows.document != PADDING
    assert rows.token[real].tolist() == flat.tolist()
    assert (rows.token[~real] == stream.tokenizer.pad).all() and not rows.weight[~real].any()
    assert 0 < int((~real).sum()) < LENGTH
    assert same(stream.rows(n), stream.rows(0))


def test_a_window_longer_than_the_validation_split(prepared):
    stream = open_stream(prepared, "validation", 1 << 14, seed=0)
    assert stream.samples_per_epoch == 1
    assert int((stream.rows(0).document != PADDING).sum()) == sum(map(len, documents(prepared, "validation")))


def test_a_resume_is_the_next_index_and_nothing_else(prepared):
    whole = open_stream(prepared, "train", LENGTH, seed=3)
    samples = [whole.rows(g) for g in range(2 * whole.samples_per_epoch)]
    for stop in (0, 7, whole.samples_per_epoch + 2):
        again = open_stream(prepared, "train", LENGTH, seed=3)
        assert all(same(again.rows(g), samples[g]) for g in range(stop, min(stop + 9, len(samples))))


def test_few_open_files_are_enough(prepared, monkeypatch):
    monkeypatch.setattr("tidar_mega.data.stream._OPEN_FILES", 1)
    few, many = (open_stream(prepared, "train", LENGTH, seed=1) for _ in range(2))
    monkeypatch.undo()
    assert all(same(few.rows(g), many.rows(g)) for g in range(20))


# damaged folders


def test_the_fingerprint_follows_the_content(prepared, copy):
    kept = open_stream(prepared, "train", LENGTH, seed=1).fingerprint
    assert open_stream(copy, "validation", 2 * LENGTH, seed=2).fingerprint == kept
    tree = (copy / "index.json").read_text()
    digest = shards.read_index(copy).splits["train"].shards[0].sha256
    (copy / "index.json").write_text(tree.replace(digest, "0" * 64))
    assert open_stream(copy, "train", LENGTH, seed=1).fingerprint != kept


@pytest.mark.parametrize("name", ["shard-000001.tar", "documents.npy"])
def test_a_truncated_or_missing_file_is_named_at_the_opening(copy, name):
    path = copy / "train" / name
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=f"{path}: .*truncated or changed; the index says .* bytes"):
        open_stream(copy, "train", LENGTH, seed=1)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: missing"):
        open_stream(copy, "train", LENGTH, seed=1)
    open_stream(copy, "validation", LENGTH, seed=1)


def read_all(stream) -> None:
    for g in range(stream.samples_per_epoch):
        stream.rows(g)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(copy):
    stream = open_stream(copy, "train", LENGTH, seed=1)
    read_all(stream)
    path = copy / "train" / "shard-000001.tar"
    with open(path, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=f"{path}: damaged at byte"):
        read_all(stream)


@pytest.mark.parametrize("place", [3, 130, 512], ids=["name", "size", "npy"])
def test_a_damaged_header_is_an_error(copy, place):
    path = copy / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: damaged at byte 640"):
        read_all(open_stream(copy, "train", LENGTH, seed=1))


@pytest.mark.parametrize("place", [0, 135, -9], ids=["header", "start", "offset"])
def test_a_damaged_list_of_documents_is_an_error(copy, place):
    path = copy / "train" / "documents.npy"
    content = bytearray(path.read_bytes())
    content[place] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged|cannot be read at byte -"):
        read_all(open_stream(copy, "train", LENGTH, seed=1))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EIO, LostError), (errno.ESTALE, LostError), (errno.EACCES, DataError)],
    ids=["EIO", "ESTALE", "EACCES"],
)
def test_a_fault_of_storage_that_may_pass_is_no_fault_of_the_data(prepared, monkeypatch, code, kind):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    stream = open_stream(prepared, "train", LENGTH, seed=1)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(kind, match=f"shard-.*cannot be read at byte .*{os.strerror(code)}"):
        stream.rows(0)
    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(kind, match=f"tidar_tokenizer.json: cannot be read .*{os.strerror(code)}"):
        Tokenizer.load(prepared / "tokenizer")


def test_an_id_outside_the_vocabulary_is_an_error(copy):
    path = copy / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[641] = 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="has id 65.*the tokenizer has 270.*tidar doctor --data"):
        read_all(open_stream(copy, "train", LENGTH, seed=1))


def test_another_tokenizer_is_refused(copy):
    Tokenizer.train(iter(["other text, other merges"] * 5), 270).save(copy / "tokenizer")
    with pytest.raises(DataError, match="not the tokenizer that made the shards"):
        open_stream(copy, "train", LENGTH, seed=1)


def test_folders_without_a_whole_index_are_refused(copy, tmp_path):
    with pytest.raises(DataError, match="not a finished folder of `tidar prepare`"):
        open_stream(tmp_path, "train", LENGTH, seed=1)
    index = (copy / "index.json").read_text()
    for damaged in (index[:100], "[]", index.replace('"tokens"', '"token"')):
        (copy / "index.json").write_text(damaged)
        with pytest.raises(DataError, match="index.json: damaged"):
            open_stream(copy, "train", LENGTH, seed=1)
    (copy / "index.json").write_text(index.replace('"version": 1', '"version": 99'))
    with pytest.raises(DataError, match="version 99, but this program reads 1"):
        open_stream(copy, "train", LENGTH, seed=1)


def test_a_corpus_shorter_than_a_window_is_refused(prepared):
    with pytest.raises(DataError, match="fewer than one window; lower data.seq_length .now 100000"):
        open_stream(prepared, "train", 100_000, seed=1)
    with pytest.raises(DataError, match="split 'test': must be one of train, validation"):
        open_stream(prepared, "test", LENGTH, seed=1)
