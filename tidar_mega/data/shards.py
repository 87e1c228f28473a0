"""Prepared folders: webdataset tar shards, one document per sample, and the index that makes them random-access.

    FOLDER/index.json               what is in the folder; written last, so a folder with an index is whole
    FOLDER/prepare.json             the request that made it: settings, and every source file with its sha256
    FOLDER/tokenizer/               the tokenizer that made the ids
    FOLDER/{train,validation}/shard-000000.tar ...    samples `{document:09d}.npy`: ids of one document and its
                                    end-of-document token, uint16 or uint32
    FOLDER/{train,validation}/documents.npy           int64 [2, documents + 1]: number of each document's first token
                                    in the split, and the byte in its shard where that token lies

Any document can be read by (shard, byte, length) without a scan. Every file appears under its name only when whole:
it is written beside, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidar_mega.config.errors import UserError, storage_error
from tidar_mega.data import DataError

VERSION = 1
SPLITS = ("train", "validation")
INDEX, REQUEST, DOCUMENTS, TOKENIZER = "index.json", "prepare.json", "documents.npy", "tokenizer"
TAR_BLOCK, TAR_RECORD = 512, 10240
NPY_HEADER = 128  # bytes before the ids: numpy pads the header of any 1-d array to this
HEADERS = TAR_BLOCK + NPY_HEADER


@dataclass(frozen=True)
class Shard:
    name: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    documents: int
    tokens: int
    text_bytes: int  # UTF-8 bytes of the texts that became these tokens
    documents_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """All of index.json. `tokenizer` and `request` are the fingerprints of what made the ids."""

    dtype: str
    tokenizer: str
    request: str
    left_out: dict[str, int]  # documents without text, and those that could not be decoded
    splits: dict[str, Split]
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the index, and so of every token and of the tokenizer."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def publish(path: Path) -> Iterator[io.BufferedWriter]:
    """A binary file that appears as `path` when the block ends, and not at all if the block fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # CIFS and some FUSE systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, tree: dict) -> None:
    with publish(path) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())


def write_index(folder: Path, index: Index) -> None:
    write_json(folder / INDEX, asdict(index))


def read_index(folder: str | Path) -> Index:
    """Raises DataError if the folder has no index, or one that is damaged or of another version."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise DataError(
            f"{folder}: no {INDEX} there, so it is not a finished folder of `tidar prepare`; run that first"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["version"] != VERSION:
            raise DataError(f"{path}: version {tree['version']}, but this program reads {VERSION}; prepare it again")
        splits = {}
        for name in SPLITS:
            split = tree["splits"][name]
            shards = tuple(Shard(**shard) for shard in split["shards"])
            splits[name] = Split(**{**split, "shards": shards})
        return Index(**{**tree, "splits": splits})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); run `tidar prepare` again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> UserError:
    """DataError, or LostError for what may pass."""
    said = f"{path}: cannot be read ({error.strerror})"
    return storage_error(error, DataError, said, "make it readable for this user")


def check_sizes(folder: Path, split: str, index: Index) -> None:
    """Raises DataError, naming the file, if a file of the split is missing or has not the size it had."""
    part = index.splits[split]
    sizes = {shard.name: shard.bytes for shard in part.shards}
    sizes[DOCUMENTS] = NPY_HEADER + 2 * 8 * (part.documents + 1)
    for name, expected in sizes.items():
        path = folder / split / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "missing" if found is None else f"{found} bytes, truncated or changed"
            raise DataError(f"{path}: {state}; the index says {expected} bytes; {RESTORE}")


RESTORE = "restore the file, or run `tidar prepare` again with --overwrite"


def verify(folder: str | Path) -> Index:
    """Checks every shard against the sha256 in the index. Raises DataError naming the first file that differs."""
    folder = Path(folder)
    index = read_index(folder)
    for name, split in index.splits.items():
        check_sizes(folder, name, index)
        expected = {shard.name: shard.sha256 for shard in split.shards} | {DOCUMENTS: split.documents_sha256}
        for file, digest in expected.items():
            if sha256(folder / name / file) != digest:
                raise DataError(f"{folder / name / file}: its sha256 is not that of the index: damaged; {RESTORE}")
    return index


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def key(document: int) -> str:
    """The webdataset key of a document, by its number in the split."""
    return f"{document:09d}"


def member_bytes(lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """Bytes that documents of these many tokens take in a tar: headers and ids, padded to whole blocks."""
    return TAR_BLOCK - (-(NPY_HEADER + lengths * itemsize) // TAR_BLOCK) * TAR_BLOCK


@dataclass(frozen=True)
class Layout:
    """Where every document of a split lies, known before anything is written.

    starts   int64 [documents + 1]: number of the first token of each document; the last entry is the total
    offsets  int64 [documents + 1]: byte of that token in the shard; the last entry is unused
    borders  first document of each shard, and the number of documents
    sizes    bytes of each shard
    """

    starts: np.ndarray
    offsets: np.ndarray
    borders: list[int]
    sizes: list[int]


def lay_out(lengths: np.ndarray, itemsize: int, shard_bytes: int) -> Layout:
    """Fills shard after shard up to `shard_bytes` (at least one document each)."""
    ends = np.cumsum(member_bytes(lengths, itemsize))
    begins = ends - member_bytes(lengths, itemsize)
    borders, sizes = [0], []
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    while borders[-1] < len(lengths):
        first, base = borders[-1], begins[borders[-1]]
        last = max(first + 1, int(np.searchsorted(ends, base + shard_bytes - 2 * TAR_BLOCK, side="right")))
        offsets[first:last] = begins[first:last] - base + HEADERS
        borders.append(last)
        sizes.append(-(-int(ends[last - 1] - base + 2 * TAR_BLOCK) // TAR_RECORD) * TAR_RECORD)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Layout(starts, offsets, borders, sizes)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, first: int, documents: Iterable[np.ndarray]) -> Shard:
    """Writes documents `first`, `first` + 1, ... as one tar; the same bytes every time."""
    from webdataset import TarWriter  # imports torch, which nothing else here needs

    count = tokens = 0
    with publish(path) as file, TarWriter(file, mtime=0, encoder=False) as tar:
        for ids in documents:
            tar.write({"__key__": key(first + count), "npy": _npy(ids)})
            count += 1
            tokens += len(ids)
    return Shard(path.name, count, tokens, path.stat().st_size, sha256(path))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    assert buffer.tell() == NPY_HEADER + array.nbytes, "numpy has changed the size of its header"
    return buffer.getvalue()


def write_documents(path: Path, layout: Layout) -> str:
    """Writes documents.npy; returns its sha256."""
    with publish(path) as file:
        file.write(_npy(np.stack([layout.starts, layout.offsets])))
    return sha256(path)
