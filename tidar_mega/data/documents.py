"""The documents of a source file: text, .jsonl, .parquet, or token ids of a Megatron dataset.

Text and .jsonl may be compressed with gzip, xz or zstandard. All checks of what a file holds are here, and name the
place of the damage.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from tidar_mega.data import DataError
from tidar_mega.data.sources import SourceFile

_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)
_PARQUET_ROWS = 1024  # read at once


@dataclass(frozen=True)
class Tokens:
    """A document that is token ids already. `where` names it in errors."""

    ids: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.ids)


Document = str | Tokens


def read(file: SourceFile, counts: Counter) -> Iterator[tuple[Document, int]]:
    """(document, bytes of the file read so far) of every document that is not empty; what is left out is counted.

    Raises DataError, which names the file and the place of the damage.
    """
    reader = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "megatron": _megatron}[file.format]
    for document, position in reader(file):
        if document is None:
            counts["undecodable"] += 1
        elif not (document.strip() if isinstance(document, str) else len(document)):
            counts["empty"] += 1
        else:
            yield document, position


def _text(file: SourceFile) -> Iterator[tuple[str | None, int]]:
    with open(file.path, "rb") as raw:
        try:
            content = _decompress(file.path, raw).read()
        except _DAMAGE as error:
            raise _damaged(file.path, error) from None
    yield _decode(file, content), file.path.stat().st_size


def _jsonl(file: SourceFile) -> Iterator[tuple[str | None, int]]:
    with open(file.path, "rb") as raw:
        stream = _decompress(file.path, raw)
        offset, number = 0, 0
        while True:
            try:
                line = stream.readline()
            except _DAMAGE as error:
                raise _damaged(file.path, error) from None
            if not line:
                return
            number += 1
            if line.strip():
                yield _json_text(file, line, offset, number), raw.tell()
            offset += len(line)


def _json_text(file: SourceFile, line: bytes, offset: int, number: int) -> str | None:
    text = _decode(file, line, offset=offset)
    if text is None:
        return None
    where = f"{file.path}, line {number}"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        if file.errors == "skip":
            return None
        raise DataError(f"{where}: not valid JSON ({error}); mend the file or use --errors skip") from None
    if isinstance(record, dict) and file.field in record and record[file.field] is None:
        return ""
    if not isinstance(record, dict) or not isinstance(record.get(file.field), str):
        found = f"has {', '.join(sorted(record)) or 'no field'}" if isinstance(record, dict) else "is no JSON object"
        raise DataError(f"{where}: no text in field {file.field!r}; the line {found}; name the right one with --field")
    return _without_surrogates(file, record[file.field], where)


def _without_surrogates(file: SourceFile, text: str, where: str) -> str | None:
    """JSON can spell half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if file.errors == "strict":
            raise DataError(
                f"{where}: invalid Unicode at character {error.start} (half of a surrogate pair); "
                "mend the file, or use --errors replace or --errors skip"
            ) from None
        return None if file.errors == "skip" else text.encode("utf-8", "replace").decode("utf-8")
    return text


def _decode(file: SourceFile, content: bytes, where: str = "", offset: int = 0) -> str | None:
    """`offset`: where `content` begins in `where`, by default the (decompressed) file. None if it is to be skipped."""
    bom = len(b"\xef\xbb\xbf") if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0
    try:
        return content[bom:].decode("utf-8", "replace" if file.errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        if file.errors == "skip":
            return None
        place, byte = offset + bom + error.start, content[bom + error.start]
        raise DataError(
            f"{where or file.path}: invalid UTF-8 at byte {place} (0x{byte:02x}: {error.reason}); "
            "convert the file, leave it out with --exclude, or use --errors replace or --errors skip"
        ) from None


def _parquet(file: SourceFile) -> Iterator[tuple[str | None, int]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{file.path}: .parquet files are read by pyarrow, which is missing: pip install pyarrow"
        ) from None
    size = file.path.stat().st_size
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_column(file, table.schema_arrow)
            total, number = table.metadata.num_rows, 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[file.field]):
                for value in batch.column(0).cast(pa.large_binary()):
                    number += 1
                    text = _decode(file, value.as_py() or b"", f"{file.path}, row {number}")
                    yield text, size * number // total
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file.path, error) from None


def _check_column(file: SourceFile, schema) -> None:
    found = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    if found.get(file.field) not in ("string", "large_string", "binary", "large_binary"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in found.items())
        raise DataError(
            f"{file.path}: no text in column {file.field!r}; the file has {columns}; name the right one with --field"
        )


def _megatron(file: SourceFile) -> Iterator[tuple[Tokens, int]]:
    """A document is one or several sequences of the index (Megatron's tools/preprocess_data.py, --split-sentences)."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        dataset = IndexedDataset(str(file.path.with_suffix("")))
    except Exception as error:  # assertions, struct.error, ValueError
        raise _damaged(file.path.with_suffix(".idx"), error) from None
    index = dataset.index
    size, itemsize = file.path.stat().st_size, np.dtype(index.dtype).itemsize
    expected = int(index.sequence_lengths.sum(dtype=np.int64)) * itemsize
    if size != expected or not np.issubdtype(index.dtype, np.integer):
        found = f"{size} bytes of {np.dtype(index.dtype)}, but {expected} by the .idx beside it"
        raise DataError(f"{file.path}: {found}: the two are not of one dataset, or the copy of one is not whole")
    borders, position = dataset.document_indices, 0
    for number, (first, last) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        ids = np.concatenate([np.zeros(0, index.dtype), *(dataset[i] for i in range(first, last))])
        position += len(ids) * itemsize
        yield Tokens(ids, f"{file.path}, document {number}"), position


def _decompress(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw))
    return raw


def _new_frame():
    # as much as `zstd --ultra --long=31` writes; by default it reads 128 MiB
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _ZstdFile(io.RawIOBase):
    """zstandard's own reader takes a cut file for a finished one; this one does not."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw, self._ready = raw, b""
        self._frame = _new_frame()
        self._in_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._raw.read(1 << 17)
            if not chunk:
                if self._in_frame:
                    raise EOFError("the last zstandard frame is cut short")
                return 0
            self._ready = self._inflate(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _inflate(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            parts.append(self._frame.decompress(chunk))
            self._in_frame = not self._frame.eof
            chunk = self._frame.unused_data
            if self._frame.eof:
                self._frame = _new_frame()
        return b"".join(parts)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: damaged or truncated file ({error or type(error).__name__})")
