"""`tidar prepare`: every kind of source, what the shards hold, and what happens when something goes wrong."""

from __future__ import annotations

import argparse
import errno
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
import torch
import webdataset
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pyarrow import parquet

from tidar_mega import cli
from tidar_mega.data import DataError, prepare, shards
from tidar_mega.data import corpus as corpus_module
from tidar_mega.data.sources import find
from tidar_mega.data.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "dog", "é", "日本", "def", "return", "self", "(x, y):", "01"]


def text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + f"\ndocument {seed}\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 12 text files, one of them in a folder of its own."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    for i in range(11):
        (folder / f"{i:02d}.txt").write_text(text(i), encoding="utf-8")
    (folder / "inner" / "11.py").write_text(text(11), encoding="utf-8")
    return folder


def run(output: Path, *arguments) -> dict:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    defaults = ["--output", str(output), "--workers", "1"]
    if "--tokenizer" not in arguments and "--vocab-size" not in arguments:
        defaults += ["--vocab-size", "300"]
    return prepare.run(parser.parse_args([*defaults, *map(str, arguments)]))


def decoded(folder: Path, split: str) -> list[str]:
    """The texts of a split, in order, read by webdataset itself."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    paths = [str(p) for p in sorted((folder / split).glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(len(samples))]
    for sample in samples:
        assert sample["npy"][-1] == tokenizer.eod
        assert tokenizer.eod not in sample["npy"][:-1]
    return [tokenizer.decode(s["npy"][:-1].tolist()) for s in samples]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_document_is_in_one_split_with_its_exact_text(corpus, tmp_path):
    figures = run(tmp_path / "out", corpus)
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) for i in range(12))
    assert (len(train), len(validation)) == (11, 1) == tuple(figures[s]["documents"] for s in shards.SPLITS)
    assert figures["train"]["text_bytes"] == sum(len(t.encode()) for t in train)
    assert train != sorted(train, key=[text(i) for i in range(12)].index)  # shuffled


def test_the_index_says_what_the_tars_hold(corpus, tmp_path):
    out = tmp_path / "out"
    run(out, corpus, "--shard-size", "2KB", "--validation-fraction", "0.3")
    index = shards.verify(out)
    for name, split in index.splits.items():
        starts, offsets = np.load(out / name / "documents.npy")
        assert starts[-1] == split.tokens == sum(s.tokens for s in split.shards)
        document = 0
        assert len(split.shards) > 1
        for shard in split.shards:
            path = out / name / shard.name
            with tarfile.open(path) as tar:
                members = tar.getmembers()
                assert len(members) == shard.documents
                for member in members:
                    ids = np.load(io.BytesIO(tar.extractfile(member).read()))
                    assert ids.dtype == index.dtype == "<u2"
                    direct = np.fromfile(path, index.dtype, len(ids), offset=int(offsets[document]))
                    assert (direct == ids).all()
                    assert starts[document + 1] - starts[document] == len(ids)
                    document += 1
        assert document == split.documents


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl_and_text_plain_and_compressed(tmp_path, suffix):
    lines = "".join(json.dumps({"body": text(i), "n": i}) + "\n" for i in range(8)) + "\n"
    lines += json.dumps({"body": "  "}) + "\n" + json.dumps({"body": text(99)}, ensure_ascii=False)
    one = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"data.jsonl{suffix}"
    half = len(lines.encode()) // 2
    path.write_bytes(one(lines.encode()[:half]) + one(lines.encode()[half:]))  # two streams in one file
    figures = run(tmp_path / "out", path, "--field", "body")
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) for i in [*range(8), 99])
    assert len(validation) == 1
    assert figures["left_out"] == {"empty": 1, "undecodable": 0}
    document = tmp_path / f"document.txt{suffix}"
    document.write_bytes(one(text(5).encode()))
    run(tmp_path / "both", path, document, "--field", "body", "--validation-fraction", "0.5")
    assert text(5) in sum((decoded(tmp_path / "both", split) for split in shards.SPLITS), [])


def parquet_file(path: Path, texts: list, kind=None) -> Path:
    table = pyarrow.table({"id": range(len(texts)), "body": pyarrow.array(texts, kind)})
    parquet.write_table(table, path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path, kind):
    texts = [text(i).encode() for i in range(12)] + [b" ", None]
    texts = texts if kind == pyarrow.binary() else [t and t.decode() for t in texts]
    figures = run(tmp_path / "out", parquet_file(tmp_path / "data.parquet", texts, kind), "--field", "body")
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) for i in range(12))
    assert figures["left_out"] == {"empty": 2, "undecodable": 0}


@pytest.mark.parametrize("small", [1 << 26, 1])
def test_of_files_with_many_documents_documents_are_held_out(tmp_path, monkeypatch, small, capsys):
    """By file it would be a third of the text."""
    monkeypatch.setattr(corpus_module, "_SMALL", small)
    for name in ("a", "b"):
        parquet_file(tmp_path / f"{name}.parquet", [text(i) + name for i in range(20)])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"body": text(i) + "c"}) + "\n" for i in range(20)))
    figures = run(tmp_path / "out", tmp_path, "--field", "body", "--validation-fraction", "0.1")
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) + name for i in range(20) for name in "abc")
    assert figures["validation"]["documents"] == 6 if small > 1 else 1 <= figures["validation"]["documents"] <= 14
    assert "sources: 2 parquet (such as " in capsys.readouterr().out


def test_a_tokenizer_learns_from_all_files(tmp_path):
    for name in "abc":
        lines = (json.dumps({"text": f"{name * 3} {i}"}) + "\n" for i in range(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = find([str(tmp_path)], [], "strict", "text")
    texts = list(corpus_module.Corpus(files, 0.1, 0).training_texts(limit=60))
    assert {t[:3] for t in texts} == {"aaa", "bbb", "ccc"}
    everything = list(corpus_module.Corpus(files, 0.1, 0).training_texts(limit=1 << 20))
    assert len(everything) == len(set(everything)) == 270


@pytest.mark.parametrize("name", ["c4.json.gz", "lines.ndjson"])
def test_lines_of_json_by_other_names(tmp_path, name):
    lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(6)) + json.dumps({"text": None})
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    figures = run(tmp_path / "out", tmp_path / name)
    assert sorted(sum((decoded(tmp_path / "out", split) for split in shards.SPLITS), [])) == sorted(map(text, range(6)))
    assert figures["left_out"]["empty"] == 1


def test_links_to_folders_are_followed_once(corpus, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "corpus").symlink_to(corpus)
    (corpus / "inner" / "back").symlink_to(corpus)
    figures = run(tmp_path / "out", tmp_path / "links")
    assert figures["train"]["documents"] + figures["validation"]["documents"] == 12


# Megatron's own data sets


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    Tokenizer.train(iter([text(i) for i in range(20)]), 300).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def megatron_dataset(prefix: Path, documents: list[list[list[int]]], dtype=np.int32) -> Path:
    """`documents`: the sequences of each, as Megatron's own tool writes them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor(sum(sequences, [])), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_ids_of_a_megatron_dataset_are_kept(tmp_path, tokenizer_folder, dtype):
    tokenizer = Tokenizer.load(tokenizer_folder)
    ids = [tokenizer.encode(text(i)) for i in range(12)]
    documents = [[i[:7], i[7:]] if n % 2 else [[*i, tokenizer.eod]] for n, i in enumerate(ids)]
    prefix = megatron_dataset(tmp_path / "corpus_text_document", [*documents, []], dtype)
    figures = run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) for i in range(12))
    assert figures["train"]["text_bytes"] == sum(len(t.encode()) for t in train)
    assert figures["left_out"]["empty"] == 1
    same = tmp_path / "same"  # as text of the same documents under the same names
    for source in (f"{prefix}.bin", f"{prefix}.idx", prefix):
        run(same, source, "--tokenizer", tokenizer_folder, "--overwrite")
        assert decoded(same, "train") == train


def test_a_folder_of_megatron_datasets_beside_text(tmp_path, tokenizer_folder, corpus):
    tokenizer = Tokenizer.load(tokenizer_folder)
    megatron_dataset(corpus / "ids", [[tokenizer.encode(text(i))] for i in range(20, 23)])
    run(tmp_path / "out", corpus, "--tokenizer", tokenizer_folder)
    train, validation = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert sorted(train + validation) == sorted(text(i) for i in [*range(12), *range(20, 23)])


def test_another_index_is_another_corpus(tmp_path, tokenizer_folder):
    ids = Tokenizer.load(tokenizer_folder).encode(text(0))
    prefix = megatron_dataset(tmp_path / "ids", [[ids[:9]], [ids[9:20]], [ids[20:]]])
    run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)
    megatron_dataset(prefix, [[ids[:5]], [ids[5:20]], [ids[20:]]])
    with pytest.raises(DataError, match="another corpus"):
        run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)


def test_a_single_text_is_cut_at_a_line(tmp_path):
    whole = "".join(text(i) for i in range(40))
    (tmp_path / "input.txt").write_text(whole, encoding="utf-8")
    run(tmp_path / "out", tmp_path / "input.txt", "--validation-fraction", "0.1")
    (train,), (validation,) = (decoded(tmp_path / "out", split) for split in shards.SPLITS)
    assert train + validation == whole
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(whole) < 0.2


def test_the_standard_library(tmp_path):
    """Through the command line, as in the quickstart, but only a corner of the library."""
    figures = tmp_path / "figures.json"
    arguments = ["prepare", "stdlib", "--output", str(tmp_path / "out"), "--vocab-size", "259", "--json", str(figures)]
    code = cli.main([*arguments, "--exclude", "stdlib/[!j]*"])
    assert code == 0
    sources = json.loads((tmp_path / "out" / "prepare.json").read_text())["sources"]
    assert "stdlib/json/decoder.py" in [s["name"] for s in sources]
    assert not any("test" in s["name"].split("/")[1:-1] for s in sources)
    assert json.loads(figures.read_text())["vocab_size"] == 259
    everything = "".join(sum((decoded(tmp_path / "out", split) for split in shards.SPLITS), []))
    assert json.JSONDecoder.__doc__ in everything


def test_excluded_and_hidden_files_are_left_out(corpus, tmp_path):
    (corpus / ".hidden").write_bytes(b"\xff")
    (corpus / "picture.png").write_bytes(b"\xff\x00")
    figures = run(tmp_path / "out", corpus, "--exclude", "*.png", "--exclude", "inner/*")
    assert figures["train"]["documents"] + figures["validation"]["documents"] == 11


def test_an_existing_tokenizer_is_kept(corpus, tmp_path):
    tokenizer = Tokenizer.train(iter([text(3)] * 3), 280)
    tokenizer.save(tmp_path / "mine")
    run(tmp_path / "out", corpus, "--tokenizer", tmp_path / "mine")
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint == tokenizer.fingerprint
    assert shards.read_index(tmp_path / "out").tokenizer == tokenizer.fingerprint


def test_a_large_vocabulary_needs_four_bytes():
    assert shards.token_dtype(1 << 16) == np.uint16
    assert shards.token_dtype((1 << 16) + 1) == np.uint32


def test_the_tokenizer_never_sees_the_held_out_files(corpus, tmp_path):
    run(tmp_path / "one", corpus)
    (held_out,) = decoded(tmp_path / "one", "validation")
    path = next(p for p in corpus.rglob("*.*") if p.read_text(encoding="utf-8") == held_out)
    path.write_text("zzzz" * 500, encoding="utf-8")
    run(tmp_path / "two", corpus)
    prints = [Tokenizer.load(tmp_path / name / "tokenizer").fingerprint for name in ("one", "two")]
    assert prints[0] == prints[1]


def test_the_number_of_workers_changes_no_byte(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH", 200)
    monkeypatch.setattr(prepare.Job, "_processes", lambda self, *_: self.workers)
    options = (corpus, "--shard-size", "4KB")
    run(tmp_path / "one", *options)
    run(tmp_path / "two", *options, "--workers", "2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_seed_changes_the_split_and_the_order(corpus, tmp_path):
    run(tmp_path / "a", corpus)
    run(tmp_path / "b", corpus, "--seed", "1")
    assert decoded(tmp_path / "a", "train") != decoded(tmp_path / "b", "train")


# run again


def test_a_finished_preparation_is_recognised(corpus, tmp_path, capsys):
    run(tmp_path / "out", corpus)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert run(tmp_path / "out", corpus)["reused"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert "already there" in capsys.readouterr().out


def test_another_corpus_is_refused_unless_overwritten(corpus, tmp_path):
    run(tmp_path / "out", corpus)
    before = contents(tmp_path / "out")
    (corpus / "00.txt").write_text("changed text", encoding="utf-8")
    with pytest.raises(DataError, match="another corpus or other settings.*--overwrite"):
        run(tmp_path / "out", corpus)
    assert contents(tmp_path / "out") == before
    assert not run(tmp_path / "out", corpus, "--overwrite")["reused"]
    run(tmp_path / "fresh", corpus)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_folder_of_other_files_is_refused_even_to_overwrite(corpus, tmp_path):
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(DataError, match="files that are not of `tidar prepare`"):
            run(corpus, corpus, *overwrite)
    assert len(list(corpus.glob("*.txt"))) == 11
    website = tmp_path / "website"
    (website / "train").mkdir(parents=True)
    (website / "index.json").write_text("{}")
    with pytest.raises(DataError, match="files that are not of `tidar prepare`"):
        run(website, corpus, "--overwrite")
    assert (website / "train").is_dir()


def test_the_output_may_lie_inside_the_source(corpus):
    run(corpus / "out", corpus)
    assert run(corpus / "out", corpus)["reused"]


def test_killed_after_the_index_the_work_folder_goes(corpus, tmp_path):
    run(tmp_path / "out", corpus)
    (tmp_path / "out" / ".work").mkdir()
    assert run(tmp_path / "out", corpus)["reused"]
    assert not (tmp_path / "out" / ".work").exists()


def test_a_damaged_folder_is_not_taken_for_finished(corpus, tmp_path):
    run(tmp_path / "out", corpus)
    whole = contents(tmp_path / "out")
    path = tmp_path / "out" / "train" / "shard-000000.tar"
    damaged = bytearray(path.read_bytes())
    damaged[700] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"{path}: its sha256.*--overwrite"):
        run(tmp_path / "out", corpus)
    run(tmp_path / "out", corpus, "--overwrite")
    assert contents(tmp_path / "out") == whole


def test_two_at_once_are_refused(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    with prepare._lock(tmp_path / "out"), pytest.raises(DataError, match="another `tidar prepare` is at work"):
        run(tmp_path / "out", corpus)


def big_corpus(tmp_path) -> Path:
    folder = tmp_path / "big"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(text(i, 3000), encoding="utf-8")
    return folder


SLOW = """
import sys
from tidar_mega import cli
from tidar_mega.data import prepare
prepare._BATCH, prepare._ENCODED = 1 << 14, 1 << 16
sys.exit(cli.main(["prepare", *sys.argv[1:], "--vocab-size", "300", "--shard-size", "50KB", "--workers", "2"]))
"""


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL)


def test_killed_at_any_moment_it_can_be_run_again(tmp_path):
    corpus = big_corpus(tmp_path)
    assert start(corpus, "--output", tmp_path / "whole").wait() == 0
    out = tmp_path / "out"
    stages = [out / ".work" / ".ids.bin.tmp", out / "train" / "shard-000002.tar", out / "validation"]
    workers = []
    for stage in stages:
        process = start(corpus, "--output", out)
        while process.poll() is None and not stage.exists():
            time.sleep(0.002)
        workers += psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in out.rglob("*.tar"):  # whatever has its name is whole
            assert (tmp_path / "whole" / path.relative_to(out)).read_bytes() == path.read_bytes()
    assert workers
    psutil.wait_procs(workers, timeout=60)
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)  # none left behind
    assert start(corpus, "--output", out).wait() == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_an_unfinished_preparation_of_another_corpus_is_started_anew(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Job, "_write_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", corpus)
    assert (tmp_path / "out" / ".work").is_dir()
    (corpus / "00.txt").write_text("changed text", encoding="utf-8")
    run(tmp_path / "out", corpus)
    run(tmp_path / "fresh", corpus)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_is_encoded_is_kept_for_the_next_run_also_of_an_overwrite(corpus, tmp_path, monkeypatch, stopped_by):
    def stop(*_):
        raise stopped_by

    run(tmp_path / "out", corpus)
    again = (tmp_path / "out", corpus, "--seed", "1", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Job, "_write_split", stop)
        with pytest.raises(KeyboardInterrupt if isinstance(stopped_by, KeyboardInterrupt) else DataError):
            run(*again)
    monkeypatch.setattr(prepare.Job, "_encoded", stop)
    run(*again)
    assert shards.verify(tmp_path / "out").splits["train"].documents == 11


# what cannot be prepared


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [100, 330], ids=["in the spool", "in the shards"])
def test_a_full_disk_leaves_nothing_half_written(small_disk, tmp_path, room):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(text(i, 3000), encoding="utf-8")
    whole = tmp_path / "whole"
    run(whole, folder, "--shard-size", "20KB", "--vocab-size", "259")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((512 - room) * 1024))
    out = small_disk / "out"
    with pytest.raises(DataError, match="the disk is full.*free some"):
        run(out, folder, "--shard-size", "20KB", "--vocab-size", "259")
    assert not (out / "index.json").exists()
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp") or p.name == ".work"]
    for path in out.rglob("*.tar"):
        assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes()
    assert ballast.stat().st_size == (512 - room) * 1024


def test_a_full_disk_then_room_then_the_same_command(small_disk, tmp_path, corpus):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500 * 1024))
    with pytest.raises(DataError, match="the disk is full"):
        run(small_disk / "out", corpus)
    ballast.unlink()
    run(small_disk / "out", corpus)
    run(tmp_path / "fresh", corpus)
    assert contents(small_disk / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["bad.txt", "bad.txt.gz", "bad.jsonl"])
def test_invalid_utf8_names_the_file_and_the_byte(corpus, tmp_path, name):
    content = '{"text": "é'.encode() + b'a\xff"}\n'
    place = len('{"text": "é'.encode()) + 1
    if name.endswith(".jsonl"):
        first = b'{"text": "good"}\n'
        content, place = first + content, len(first) + place
    (corpus / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"{name}: invalid UTF-8 at byte {place} .0xff.*--errors"):
        run(tmp_path / "out", corpus)
    assert not (tmp_path / "out" / "index.json").exists()
    skipped = run(tmp_path / "skip", corpus, "--errors", "skip")
    assert skipped["left_out"]["undecodable"] == 1
    run(tmp_path / "replace", corpus, "--errors", "replace")
    everything = "".join(sum((decoded(tmp_path / "replace", split) for split in shards.SPLITS), []))
    assert "éa\ufffd" in everything


@pytest.mark.parametrize("files", [{}, {"a.txt": ""}, {"a.txt": " \n", "b.txt": "\n\n"}, {"a.jsonl": '{"text": ""}\n'}])
def test_an_empty_corpus_is_refused(tmp_path, files):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(DataError, match="no file found|empty corpus|at least 2 are needed"):
        run(tmp_path / "out", folder)
    assert not (tmp_path / "out" / "index.json").exists()


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "all there is"}\n')
    with pytest.raises(DataError, match="1 documents with text, but at least 2"):
        run(tmp_path / "out", tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("a text of one line")
    with pytest.raises(DataError, match="at least 2 files"):
        run(tmp_path / "out", tmp_path / "a.txt")


BROKEN = {
    "a.jsonl": (b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
    "b.jsonl": (b'{"body": "x", "title": "y"}\n', "b.jsonl, line 1: no text in field 'text'.*body, title.*--field"),
    "c.jsonl": (b"[1]\n", "c.jsonl, line 1: .*no JSON object"),
    "d.jsonl": (b'{"text": "a\\ud800"}\n', "d.jsonl, line 1: invalid Unicode.*surrogate"),
    "e.txt.gz": (gzip.compress(b"text" * 999)[:-20], "e.txt.gz: damaged or truncated"),
    "f.txt.xz": (lzma.compress(b"text" * 999)[:-20], "f.txt.xz: damaged or truncated"),
    "g.txt.zst": (zstandard.compress(os.urandom(9999))[:-20], "g.txt.zst: damaged or truncated"),
    "h.jsonl.gz": (b"no gzip at all", "h.jsonl.gz: damaged or truncated"),
    "i.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "i.jsonl, line 1: not valid JSON"),
    "i.parquet": (b"no parquet at all", "i.parquet: damaged or truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(corpus, tmp_path, name):
    content, message = BROKEN[name]
    (corpus / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", corpus)


def test_broken_parquet_files_are_named(tmp_path):
    path = parquet_file(tmp_path / "a.parquet", [text(i).encode() for i in range(7)] + [b"a\xff"], pyarrow.binary())
    with pytest.raises(DataError, match=r"a.parquet: no text in column 'id'; the file has id \(int64\), body"):
        run(tmp_path / "out", path, "--field", "id")
    with pytest.raises(DataError, match="a.parquet, row 8: invalid UTF-8 at byte 1 .0xff.*--errors"):
        run(tmp_path / "out", path, "--field", "body")
    skipped = run(tmp_path / "skip", path, "--field", "body", "--errors", "skip")
    assert skipped["left_out"]["undecodable"] == 1
    page = parquet.read_metadata(path).row_group(0).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[page : page + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet: damaged or truncated"):
        run(tmp_path / "out", path, "--field", "body")


def test_token_ids_must_be_of_the_tokenizer(tmp_path, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    good = tokenizer.encode(text(0))
    tests = {
        "no_tokenizer": ([good], (), "it holds token ids.*--tokenizer FOLDER"),
        "unknown": ([[*good, 300]], ("--tokenizer", tokenizer_folder), "document 1: it has the id 300, but .* has 300"),
        "mask": ([[1, tokenizer.mask, 2]], ("--tokenizer", tokenizer_folder), f"the id {tokenizer.mask} where text"),
        "end": ([[1, tokenizer.eod, 2]], ("--tokenizer", tokenizer_folder), f"the id {tokenizer.eod} where text"),
    }
    for name, (document, options, message) in tests.items():
        prefix = megatron_dataset(tmp_path / name, [[good], document])
        with pytest.raises(DataError, match=f"{name}.bin.*{message}"):
            run(tmp_path / "out", prefix, *options)
        assert not (tmp_path / "out" / "index.json").exists()


def test_a_megatron_dataset_must_be_whole(tmp_path, tokenizer_folder):
    ids = Tokenizer.load(tokenizer_folder).encode(text(0))
    prefix = megatron_dataset(tmp_path / "ids", [[ids], [ids]])
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(DataError, match="ids.bin: .* bytes of int32, but .* by the .idx"):
        run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)
    index.write_bytes(index.read_bytes()[:30])
    with pytest.raises(DataError, match="ids.idx: damaged or truncated"):
        run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)
    index.unlink()
    with pytest.raises(DataError, match="ids: no such file or folder"):
        run(tmp_path / "out", prefix, "--tokenizer", tokenizer_folder)


OPTIONS = {
    "--vocab-size=100": "--vocab-size 100: at least 259",
    "--validation-fraction=1": "--validation-fraction 1.0: must be",
    "--workers=0": "--workers 0: must be",
    "--shard-size=many": "--shard-size many: must be a size",
    "--tokenizer=nowhere": "tokenizer folder nowhere: no such folder",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_impossible_options_are_refused_before_anything_is_written(corpus, tmp_path, option, capsys):
    out = tmp_path / "out"
    assert cli.main(["prepare", str(corpus), "--output", str(out), option]) == 2
    assert OPTIONS[option] in capsys.readouterr().err
    assert not out.exists()


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match="source nowhere: no such file or folder"):
        run(tmp_path / "out", "nowhere")
    assert not (tmp_path / "out").exists()


def test_every_shard_is_checked(corpus, tmp_path):
    out = tmp_path / "out"
    run(out, corpus, "--shard-size", "2KB")
    shards.verify(out)
    path = sorted((out / "train").glob("*.tar"))[-1]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=str(path)):
        shards.verify(out)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: missing"):
        shards.verify(out)
