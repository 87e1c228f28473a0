"""`tidar prepare`: text -> tokenizer, and train and validation shards with an index.

The order of the work, each part resumable: list and hash the sources; train or take the tokenizer; encode every
document into a spool; shuffle the documents of each split by the seed and write them as shards; write the index last.
Every byte of the result is a pure function of the sources and the settings, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from tidar_mega.data import DataError, shards, sources
from tidar_mega.data.corpus import Corpus
from tidar_mega.data.documents import Document
from tidar_mega.data.progress import Progress
from tidar_mega.data.sources import SourceFile
from tidar_mega.data.spool import Spool, encode, ordered_map, write_shard
from tidar_mega.data.tokenizer import SPECIALS_FILE, Tokenizer, check_vocab_size

WORK = ".work"  # spool of encoded documents; removed at the end
_BATCH = 1 << 20  # characters or tokens that a worker encodes at once
_ENCODED, _WRITTEN = 1 << 22, 1 << 28  # bytes of sources and of shards that are worth another process
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder, text or .jsonl file (.gz .xz .zst too), .parquet, Megatron's .bin with .idx, or `stdlib`",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="where the prepared folder goes")
    add("--vocab-size", type=int, default=4096, help="entries of a new tokenizer, at least 259 (default 4096)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="an existing tokenizer (Hugging Face files) instead")
    add("--tokenizer-sample", default="128MB", metavar="SIZE", help="text that trains a new tokenizer (default 128MB)")
    add(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="of the documents (default 0.05)",
    )
    add(
        "--field",
        default="text",
        help="field of .jsonl lines or column of .parquet files that holds the text (default text)",
    )
    add("--exclude", action="append", default=[], metavar="PATTERN", help="leave out such files (repeatable)")
    add("--errors", choices=sources.ERRORS, default="strict", help="what to do with invalid UTF-8 (default strict)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    add("--shard-size", default="64MB", metavar="SIZE", help="largest shard (default 64MB)")
    add("--seed", type=int, default=0, help="of the split and of the shuffle (default 0)")
    add("--overwrite", action="store_true", help="replace a folder that holds another preparation")


def run(args: argparse.Namespace) -> dict:
    """Makes the folder, or recognises that it is made already. Returns the figures. Raises DataError."""
    started = time.monotonic()
    settings = _check(args)
    try:
        files = sources.find(args.sources, args.exclude, args.errors, args.field, args.output)
        _check_formats(files, args.tokenizer)
        _show_formats(files)
        args.output.mkdir(parents=True, exist_ok=True)
        with _lock(args.output):
            figures = Job(args.output, settings, files, args.workers, args.tokenizer).run(args.overwrite)
    except BrokenProcessPool:
        raise DataError("a worker process was killed, most often for lack of memory: lower --workers") from None
    except OSError as error:
        raise _disk_error(args.output, error) from error
    figures["seconds"] = round(time.monotonic() - started, 2)
    _show(figures)
    return figures


@dataclass(frozen=True)
class Settings:
    """What decides the result, besides the sources."""

    vocab_size: int | None
    tokenizer: str | None  # fingerprint of the given one
    tokenizer_sample: int
    validation_fraction: float
    field: str
    errors: str
    shard_bytes: int
    seed: int


def _check(args: argparse.Namespace) -> Settings:
    if not 0 < args.validation_fraction < 1:
        raise DataError(f"--validation-fraction {args.validation_fraction}: must be above 0 and below 1")
    if args.workers < 1:
        raise DataError(f"--workers {args.workers}: must be at least 1")
    if args.tokenizer is None:
        check_vocab_size(args.vocab_size)
    given = Tokenizer.load(args.tokenizer).fingerprint if args.tokenizer else None
    return Settings(
        None if given else args.vocab_size,
        given,
        _size(args.tokenizer_sample, "--tokenizer-sample"),
        args.validation_fraction,
        args.field,
        args.errors,
        _size(args.shard_size, "--shard-size"),
        args.seed,
    )


def _check_formats(files: list[SourceFile], tokenizer: Path | None) -> None:
    encoded = next((f for f in files if f.format == "megatron"), None)
    if encoded and tokenizer is None:
        raise DataError(
            f"{encoded.path}: it holds token ids: name the tokenizer that made them with --tokenizer FOLDER"
        )


def _show_formats(files: list[SourceFile]) -> None:
    """So that a stray file which is taken for a text is seen."""
    found = Counter(f.format for f in files)
    first = {f.format: f.name for f in reversed(files)}
    print("sources: " + ", ".join(f"{count} {name} (such as {first[name]})" for name, count in found.most_common()))


def _size(text: str, option: str) -> int:
    digits = text.rstrip("kKmMgGiIbB ")
    unit = text[len(digits) :].strip().upper()
    if unit not in _UNITS or not digits.replace(".", "", 1).isdigit() or float(digits) <= 0:
        raise DataError(f"{option} {text}: must be a size such as 64MB, 512KiB or 1GB")
    return int(float(digits) * _UNITS[unit])


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # no locks there, or a finished folder that is read-only
            _take(held.enter_context(open(folder / ".lock", "a")), folder)  # noqa: SIM115 - NFS locks what it can write
        yield


def _take(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder}: another `tidar prepare` is at work there; wait for it or stop it") from None


def _disk_error(output: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{output}: the disk is full; no shard is half written and there is no index. The work needs about twice "
            "the room of the finished shards: free some, then run the same command again"
        )
    return DataError(f"{error.filename or output}: {error.strerror or error}")


@dataclass
class Job:
    output: Path
    settings: Settings
    files: list[SourceFile]
    workers: int
    tokenizer_folder: Path | None

    def run(self, overwrite: bool) -> dict:
        request = self._request()
        if self._is_finished(request, overwrite):
            shutil.rmtree(self.output / WORK, ignore_errors=True)  # of a run that was killed just after the index
            return self._figures(shards.verify(self.output), reused=True)
        _remove_temporary(self.output)
        corpus = Corpus(self.files, self.settings.validation_fraction, self.settings.seed)
        tokenizer = self._make_tokenizer(corpus)
        spool = Spool(self.output / WORK, shards.token_dtype(tokenizer.vocab_size))
        with _freed_if_full(spool):
            left_out = self._encode(corpus, spool)
        splits = {name: self._write_split(name, number, spool) for number, name in enumerate(shards.SPLITS)}
        index = shards.Index(spool.dtype.str, tokenizer.fingerprint, _fingerprint(request), left_out, splits)
        shards.write_index(self.output, index)
        shutil.rmtree(self.output / WORK)
        return self._figures(index, reused=False)

    def _request(self) -> dict:
        """The settings, and the content of every source."""
        parts = [(*part, file.errors) for file in self.files for part in file.parts]
        sizes = [path.stat().st_size for _, path, _ in parts]
        entries = []
        with Progress("reading the sources", sum(sizes), "B") as progress, ThreadPoolExecutor(self.workers) as pool:
            digests = pool.map(shards.sha256, (path for _, path, _ in parts))
            for (name, _, errors), size, digest in zip(parts, sizes, digests, strict=True):
                entries.append({"name": name, "bytes": size, "sha256": digest, "errors": errors})
                progress.advance(size)
        return {"version": shards.VERSION, "settings": asdict(self.settings), "sources": entries}

    def _is_finished(self, request: dict, overwrite: bool) -> bool:
        """Whether the folder holds just this already; else makes it ready: emptied, or as this same work left it."""
        path = self.output / shards.REQUEST
        has_index = (self.output / shards.INDEX).is_file()
        if has_index and not overwrite:
            if shards.read_index(self.output).request == _fingerprint(request):
                return True
            raise DataError(
                f"--output {self.output}: it holds another corpus or other settings (see {path}); "
                "choose another folder, or replace it with --overwrite"
            )
        if not path.is_file() and any(not p.name.startswith(".") for p in self.output.iterdir()):
            raise DataError(f"--output {self.output}: it has files that are not of `tidar prepare`; choose another one")
        if (overwrite and has_index) or not _is_same(path, request):
            _empty(self.output)
            shards.write_json(path, request)
        return False

    def _make_tokenizer(self, corpus: Corpus) -> Tokenizer:
        folder = self.output / shards.TOKENIZER
        if (folder / SPECIALS_FILE).is_file():  # left by an interrupted run of the same work
            return Tokenizer.load(folder)
        if self.tokenizer_folder is not None:
            tokenizer = Tokenizer.load(self.tokenizer_folder)
        else:
            with Progress("training the tokenizer", None, "B") as progress:
                texts = _counted(corpus.training_texts(self.settings.tokenizer_sample), progress)
                tokenizer = Tokenizer.train(texts, self.settings.vocab_size)
        tokenizer.save(folder)
        return tokenizer

    def _encode(self, corpus: Corpus, spool: Spool) -> dict[str, int]:
        """Fills the spool. Returns how many documents were left out, by the reason."""
        path = spool.folder / "left_out.json"
        if not spool.is_whole():
            counts: Counter = Counter()
            with Progress("encoding", corpus.bytes, "B") as progress:
                spool.write(self._encoded(corpus, spool.dtype, counts, progress))
            shards.write_json(path, {name: counts[name] for name in ("empty", "undecodable")})
            spool.finish()
        left_out = json.loads(path.read_text())
        for number, name in enumerate(shards.SPLITS):
            if not (spool.columns[2] == number).any():
                reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
                raise DataError(
                    f"empty corpus: the {name} split has no document with text (left out: {reasons}); give more "
                    "files, or another --seed for another choice of held-out files"
                )
        return left_out

    def _encoded(self, corpus: Corpus, dtype, counts: Counter, progress: Progress) -> Iterator[tuple]:
        folder = self.output / shards.TOKENIZER
        notes: deque[tuple[list[int], int]] = deque()  # what the workers need not know of each batch

        def work() -> Iterator[tuple]:
            for documents, splits, position in _batches(corpus.documents(counts)):
                notes.append((splits, position))
                yield dtype, documents

        before = 0
        load = partial(Tokenizer.load, folder)
        for ids, lengths, text_bytes in ordered_map(load, encode, work(), self._processes(corpus.bytes, _ENCODED)):
            splits, position = notes.popleft()
            progress.advance(position - before)
            before = position
            yield ids, lengths, text_bytes, splits

    def _processes(self, size: int, worth: int) -> int:
        """Starting a process takes longer than `worth` bytes of the work do."""
        return min(self.workers, 1 + size // worth)

    def _write_split(self, name: str, number: int, spool: Spool) -> shards.Split:
        folder = self.output / name
        folder.mkdir(exist_ok=True)
        lengths_D, text_bytes_D, split_D = spool.columns
        documents = np.flatnonzero(split_D == number)
        key = hashlib.sha256(f"{self.settings.seed}/{name}".encode()).digest()
        np.random.Generator(np.random.PCG64(int.from_bytes(key))).shuffle(documents)
        starts, lengths = (np.cumsum(lengths_D) - lengths_D)[documents], lengths_D[documents]
        layout = shards.lay_out(lengths, spool.dtype.itemsize, self.settings.shard_bytes)
        made = []
        with Progress(f"writing {name}", len(layout.sizes), "shards") as progress:
            work = _shard_work(folder, starts, lengths, layout)
            processes = min(len(layout.sizes), self._processes(sum(layout.sizes), _WRITTEN))
            for shard in ordered_map(partial(Spool, spool.folder, spool.dtype), write_shard, work, processes):
                made.append(shard)
                progress.advance(1)
        digest = shards.write_documents(folder / shards.DOCUMENTS, layout)
        return shards.Split(len(documents), int(lengths.sum()), int(text_bytes_D[documents].sum()), digest, tuple(made))

    def _figures(self, index: shards.Index, reused: bool) -> dict:
        figures: dict = {"output": str(self.output), "reused": reused}
        figures["vocab_size"] = Tokenizer.load(self.output / shards.TOKENIZER).vocab_size
        for name, split in index.splits.items():
            figures[name] = {
                "documents": split.documents,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
                "bytes_per_token": round(split.text_bytes / split.tokens, 3),
                "shards": len(split.shards),
                "shard_bytes": sum(s.bytes for s in split.shards),
            }
        figures["left_out"] = index.left_out
        return figures


@contextlib.contextmanager
def _freed_if_full(spool: Spool) -> Iterator[None]:
    """What is encoded already is kept, also on a full disk; half a spool is of no use to the next run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not spool.is_whole():
            shutil.rmtree(spool.folder, ignore_errors=True)
        raise


def _counted(texts: Iterator[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        progress.advance(len(text))
        yield text


def _batches(documents: Iterator[tuple[Document, int, int]]) -> Iterator[tuple[list[Document], list[int], int]]:
    """(documents, splits, bytes of the sources read so far), about `_BATCH` characters or tokens at once."""
    batch, splits, size, position = [], [], 0, 0
    for document, split, position in documents:
        batch.append(document)
        splits.append(split)
        size += len(document)
        if size >= _BATCH:
            yield batch, splits, position
            batch, splits, size = [], [], 0
    if batch:
        yield batch, splits, position


def _shard_work(folder: Path, starts: np.ndarray, lengths: np.ndarray, layout: shards.Layout) -> Iterator[tuple]:
    for number, size in enumerate(layout.sizes):
        first, last = layout.borders[number : number + 2]
        path = folder / shards.shard_name(number)
        yield path, first, starts[first:last], lengths[first:last], size


def _fingerprint(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _is_same(path: Path, request: dict) -> bool:
    try:
        return _fingerprint(json.loads(path.read_text(encoding="utf-8"))) == _fingerprint(request)
    except (OSError, ValueError):
        return False


def _empty(folder: Path) -> None:
    """Removes what `prepare` has made, the index first: from then on nobody takes the folder for a whole one."""
    (folder / shards.INDEX).unlink(missing_ok=True)
    for name in (*shards.SPLITS, shards.TOKENIZER, WORK):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / shards.REQUEST).unlink(missing_ok=True)


def _remove_temporary(folder: Path) -> None:
    """Half files of a run that was killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def _show(figures: dict) -> None:
    state = "is already there, unchanged" if figures["reused"] else f"made in {figures['seconds']} s"
    print(f"{figures['output']}: {state}; vocabulary {figures['vocab_size']}")
    for name in shards.SPLITS:
        f = figures[name]
        print(
            f"  {name:10s} {f['documents']} documents, {f['tokens']} tokens, {f['text_bytes'] / 1e6:.1f} MB of text "
            f"({f['bytes_per_token']} bytes per token), {f['shards']} shards"
        )
    if any(figures["left_out"].values()):
        print("  left out:  " + ", ".join(f"{count} {reason}" for reason, count in figures["left_out"].items()))
