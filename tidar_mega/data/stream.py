"""Global sample index -> packed rows. The whole state of a data stream is that one integer.

Sample g of the training split is window p(g % n) of epoch g // n, where n is the number of windows of `seq_length`
tokens and p a permutation of them keyed by (seed, epoch) that needs no memory. A window is read from the shards
directly: a binary search for its first document, then only the bytes that it needs.

Shape suffixes: N = seq_length + 1 tokens of a window, with the one that the last row predicts.
"""

from __future__ import annotations

import bisect
import errno
import functools
import hashlib
import itertools
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from tidar_mega.config.errors import storage_error
from tidar_mega.data import DataError, shards
from tidar_mega.data.pack import pack
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.rows import PADDING, Rows

_OPEN_FILES = 256  # shards held open at once, by all streams of a process: it may have 1024 files in all
_ROUNDS = 8  # of the Feistel network
_WORD = (1 << 64) - 1
_NO_PLACE = (errno.EINVAL, errno.EOVERFLOW)  # of a file: the list of documents is damaged


def open_stream(folder: str | Path, split: str, seq_length: int, seed: int) -> Stream:
    """Opens the train or validation split of a folder made by `tidar prepare`.

    Args:
        seq_length: tokens of a window (S).
        seed: decides the order of the training windows; validation is in the order of the corpus.

    Raises DataError if a shard is missing or has not the size of the index, if the tokenizer is not the one that made
    the shards, or if the split is shorter than one window.
    """
    folder = Path(folder)
    if split not in shards.SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(shards.SPLITS)}")
    index = shards.read_index(folder)
    shards.check_sizes(folder, split, index)
    tokenizer = Tokenizer.load(folder / shards.TOKENIZER)
    if tokenizer.fingerprint != index.tokenizer:
        raise DataError(
            f"{folder / shards.TOKENIZER}: not the tokenizer that made the shards beside it "
            f"(fingerprint {tokenizer.fingerprint[:12]}, the index says {index.tokenizer[:12]}); "
            "put the right one back, or run `tidar prepare` again with --overwrite"
        )
    return Stream(folder, split, seq_length, seed, index, tokenizer)


class Samples(Protocol):
    """What training and evaluations ask of a Stream, or of several (`mixture.py`)."""

    tokenizer: Tokenizer
    tokenizer_folder: Path
    fingerprint: str  # of the corpus and its tokenizer; what is trained on does not change under a run

    def rows(self, global_index: int) -> Rows:
        """Clean rows [1, S] (CPU) of one sample. Raises DataError if a shard is damaged there, LostError if the storage
        does not give it."""

    def parts(self, count: int) -> list[tuple[str, Stream, int]]:
        """(name, folder, its share of `count` samples): at least one, at most all it has."""

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` go through the corpus, `epoch`, and through each folder."""


class Stream:
    """Rows by global sample index; see `open_stream`."""

    def __init__(
        self,
        folder: Path,
        split: str,
        seq_length: int,
        seed: int,
        index: shards.Index,
        tokenizer: Tokenizer,
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer_folder = folder / shards.TOKENIZER
        self.fingerprint = index.fingerprint
        self.seq_length = seq_length
        self.is_train = split == "train"
        self._seed = seed
        self._tokens = index.splits[split].tokens
        self._reader = Reader(folder / split, index, split)
        self.samples_per_epoch = self._count_samples()
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{folder}: the {split} split has {self._tokens} tokens, fewer than one window; "
                f"lower data.seq_length (now {seq_length}) or prepare a larger corpus"
            )

    def _count_samples(self) -> int:
        """Training drops the window that the corpus ends in; validation pads it."""
        if not self.is_train:
            return -(-self._tokens // self.seq_length)
        return self._tokens // self.seq_length

    def rows(self, global_index: int) -> Rows:
        first = self._first_token(global_index)
        token_N, document_N = self._reader.window(first, self.seq_length + 1)
        found = len(token_N)
        token = torch.full((self.seq_length + 1,), self.tokenizer.pad, dtype=torch.int64)
        document = torch.full_like(token, PADDING)
        token[:found] = torch.from_numpy(token_N)
        document[:found] = torch.from_numpy(document_N)
        if int(token.max()) >= self.tokenizer.vocab_size:
            raise DataError(
                f"{self._reader.folder}: sample {global_index} has id {int(token.max())}, but the tokenizer has "
                f"{self.tokenizer.vocab_size}: a shard is damaged; check all with `tidar doctor --data`"
            )
        return pack(token, document)

    def parts(self, count: int) -> list[tuple[str, Stream, int]]:
        return [("", self, min(count, self.samples_per_epoch))]

    def epochs(self, samples: int) -> dict[str, float]:
        return {"epoch": samples / self.samples_per_epoch}

    def _first_token(self, global_index: int) -> int:
        epoch, place = divmod(global_index, self.samples_per_epoch)
        if not self.is_train:
            return place * self.seq_length
        return permute(place, self.samples_per_epoch, self._seed, epoch) * self.seq_length


class Reader:
    """Random access to the tokens of one split, by their number."""

    def __init__(self, folder: Path, index: shards.Index, split: str) -> None:
        self.folder = folder
        self._dtype = np.dtype(index.dtype)
        part = index.splits[split]
        self._names = [shard.name for shard in part.shards]
        self._first_documents = [0, *itertools.accumulate(shard.documents for shard in part.shards)]
        self._starts, self._offsets = self._load_documents(part.tokens)

    def _load_documents(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.folder / shards.DOCUMENTS
        try:
            starts, offsets = np.load(path, mmap_mode="r", allow_pickle=False)
            if starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) <= 0).any():
                raise ValueError("the first tokens of the documents do not rise from 0 to the tokens of the split")
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); {shards.RESTORE}") from None
        except OSError as error:
            raise shards.unreadable(path, error) from None
        return np.asarray(starts), np.asarray(offsets)  # plain views of the map are faster to index

    def window(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens first..first + count - 1, fewer at the end of the split, as (ids, running document number), int64."""
        end = min(first + count, int(self._starts[-1]))
        begin, stop = np.searchsorted(self._starts, [first, end - 1], side="right").tolist()
        starts = self._starts[begin - 1 : stop + 1].tolist()
        ids = []
        for i, document in enumerate(range(begin - 1, stop)):
            start, following = starts[i : i + 2]
            ids.append(self._read(document, following - start, max(first - start, 0), min(end, following) - start))
        return np.concatenate(ids).astype(np.int64), np.repeat(np.arange(len(ids)), [len(part) for part in ids])

    def _read(self, document: int, length: int, first: int, stop: int) -> np.ndarray:
        """Ids first..stop-1 of a document of `length` tokens. `pread`, as a cut file would kill a reader of a map."""
        shard = bisect.bisect_right(self._first_documents, document) - 1
        offset, itemsize = int(self._offsets[document]), self._dtype.itemsize
        try:
            file = _open(self, shard)
            header = os.pread(file.number, shards.HEADERS, offset - shards.HEADERS)
            is_there = _is_header(header, document, length * itemsize)
            content = os.pread(file.number, (stop - first) * itemsize, offset + first * itemsize) if is_there else b""
        except (OSError, OverflowError) as error:
            said = f"{self.path(shard)}: cannot be read at byte {offset} ({error})"
            if isinstance(error, OverflowError) or error.errno in _NO_PLACE:
                raise DataError(f"{said}: {self.folder / shards.DOCUMENTS} is damaged; {shards.RESTORE}") from None
            raise storage_error(error, DataError, said, "make it readable for this user") from None
        if not is_there or len(content) != (stop - first) * itemsize:
            raise DataError(
                f"{self.path(shard)}: damaged at byte {offset}: document {document} with {length} "
                f"tokens is not there; {shards.RESTORE}"
            )
        return np.frombuffer(content, dtype=self._dtype)

    def path(self, shard: int) -> Path:
        return self.folder / self._names[shard]


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open(reader: Reader, shard: int) -> _File:
    return _File(reader.path(shard))


class _File:
    """A file descriptor that is closed with the last user of this object."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # opened at all
            os.close(self.number)


def _is_header(header: bytes, document: int, size: int) -> bool:
    """Whether these are the tar and npy headers of `document` with `size` bytes of ids."""
    name = f"{shards.key(document)}.npy".encode() + b"\0"
    octal = b"%011o\0" % (shards.NPY_HEADER + size)
    magic = header[shards.TAR_BLOCK : shards.TAR_BLOCK + 6]
    return header.startswith(name) and header[124:136] == octal and magic == b"\x93NUMPY"


def permute(place: int, count: int, seed: int, epoch: int) -> int:
    """Where `place` of 0..count-1 goes in a pseudo-random permutation keyed by (seed, epoch); O(1) memory.

    A Feistel network over the next power of four, walked until it falls inside (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002, section 4).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    assert 0 <= place < count
    while True:
        place = _feistel(place, half, keys)
        if place < count:
            return place


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for round_key in keys:
        left, right = right, left ^ (mix(right ^ round_key) & mask)
    return left << half | right


def mix(x: int) -> int:
    """The finaliser of splitmix64, of an int or an array of uint64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(_keyed(seed, f"round {i}", epoch) for i in range(_ROUNDS))


def _keyed(seed: int, purpose: str, epoch: int) -> int:
    """64 bits that are a pure function of the arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:8], "little")
