"""Documents from text files, source files and .jsonl, plain or compressed with gzip, xz or zstandard."""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tidar_mega.data import DataError

COMPRESSIONS = (".gz", ".xz", ".zst")
ERRORS = ("strict", "replace", "skip")
STDLIB = "stdlib"

_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)
_NOT_OF_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus. `name` is the same wherever the corpus lies; `errors` is one of ERRORS."""

    name: str
    path: Path
    errors: str
    field: str

    @property
    def is_jsonl(self) -> bool:
        return _inner_suffix(self.path) == ".jsonl"


def find(
    sources: Iterable[str], exclude: Iterable[str], errors: str, field: str, output: Path | None = None
) -> list[SourceFile]:
    """All files of the sources, those of a folder sorted by name; hidden files of a folder are left out.

    Args:
        sources: files, folders, or `stdlib` for the sources of the running Python's own standard library.
        exclude: shell patterns, matched against a file's name and against its path inside the source.
        errors: what to do with bytes that are not UTF-8: strict | replace | skip.
        field: the text field of .jsonl files.
        output: a folder that may lie inside a source, but is no part of it.

    Raises DataError if a source does not exist or no file is left.
    """
    sources, patterns = list(sources), list(exclude)
    is_inside = output is not None and any(Path(s).resolve() in output.resolve().parents for s in sources)
    inner_output = output.resolve() if is_inside else None
    found: dict[Path, SourceFile] = {}
    for source in sources:
        for file in _expand(source, errors, field):
            path = file.path.resolve()
            if not _matches(file.name, patterns) and inner_output not in path.parents:
                found.setdefault(path, file)
    if not found:
        raise DataError(f"{' '.join(map(str, sources))}: no file found (folders are searched, hidden files left out)")
    return list(found.values())


def documents(file: SourceFile, counts: Counter) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read so far) of every document that is not empty; what is left out is counted.

    A .jsonl file has a document on every line, any other file is one document.
    Raises DataError, which names the file and the place of the damage.
    """
    reader = _jsonl_documents if file.is_jsonl else _text_document
    for text, position in reader(file):
        if text is None:
            counts["undecodable"] += 1
        elif not text.strip():
            counts["empty"] += 1
        else:
            yield text, position


def _expand(source: str, errors: str, field: str) -> Iterator[SourceFile]:
    if source == STDLIB:
        yield from _stdlib(field)
        return
    path = Path(source)
    if path.is_file():
        yield SourceFile(path.name, path, errors, field)
    elif path.is_dir():
        for inner in _walk(path):
            yield SourceFile(f"{path.resolve().name}/{inner.relative_to(path).as_posix()}", inner, errors, field)
    else:
        raise DataError(f"source {source}: no such file or folder (`{STDLIB}` means Python's standard library)")


def _stdlib(field: str) -> Iterator[SourceFile]:
    """Python's own library without its tests; the few files of other encodings are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, _NOT_OF_STDLIB):
        if path.suffix == ".py":
            yield SourceFile(f"{STDLIB}/{path.relative_to(root).as_posix()}", path, "skip", field)


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    files = []
    for folder, inner_folders, names in os.walk(root):
        inner_folders[:] = [n for n in inner_folders if n[0] != "." and n != "__pycache__" and n not in left_out]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted((f for f in files if f.is_file()), key=lambda f: f.relative_to(root).as_posix())


def _matches(name: str, patterns: list[str]) -> bool:
    inner = name.partition("/")[2] or name
    return any(fnmatch.fnmatch(n, p) for p in patterns for n in (name, inner, name.rpartition("/")[2]))


def _inner_suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix in COMPRESSIONS else path).suffix


def _text_document(file: SourceFile) -> Iterator[tuple[str | None, int]]:
    with open(file.path, "rb") as raw:
        try:
            content = _decompress(file.path, raw).read()
        except _DAMAGE as error:
            raise _damaged(file, error) from None
    yield _decode(file, content, 0), file.path.stat().st_size


def _jsonl_documents(file: SourceFile) -> Iterator[tuple[str | None, int]]:
    with open(file.path, "rb") as raw:
        stream = _decompress(file.path, raw)
        offset, number = 0, 0
        while True:
            try:
                line = stream.readline()
            except _DAMAGE as error:
                raise _damaged(file, error) from None
            if not line:
                return
            number += 1
            if line.strip():
                yield _json_text(file, line, offset, number), raw.tell()
            offset += len(line)


def _json_text(file: SourceFile, line: bytes, offset: int, number: int) -> str | None:
    text = _decode(file, line, offset)
    if text is None:
        return None
    where = f"{file.path}, line {number}"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        if file.errors == "skip":
            return None
        raise DataError(f"{where}: not valid JSON ({error}); mend the file or use --errors skip") from None
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


def _decode(file: SourceFile, content: bytes, offset: int) -> str | None:
    """`offset`: where `content` begins in the (decompressed) file. None if it is to be skipped."""
    bom = len(b"\xef\xbb\xbf") if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0
    try:
        return content[bom:].decode("utf-8", "replace" if file.errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        if file.errors == "skip":
            return None
        place = offset + bom + error.start
        raise DataError(
            f"{file.path}: invalid UTF-8 at byte {place} (0x{content[bom + error.start]:02x}: {error.reason}); "
            "convert the file, leave it out with --exclude, or use --errors replace or --errors skip"
        ) from None


def _decompress(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw))
    return raw


class _ZstdFile(io.RawIOBase):
    """zstandard's own reader takes a cut file for a finished one; this one does not."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
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
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(parts)


def _damaged(file: SourceFile, error: Exception) -> DataError:
    return DataError(f"{file.path}: damaged or truncated compressed file ({error or type(error).__name__})")
