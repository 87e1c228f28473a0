"""Which files a corpus has, and the format of each."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tidar_mega.data import DataError

COMPRESSIONS = (".gz", ".xz", ".zst")
ERRORS = ("strict", "replace", "skip")
STDLIB = "stdlib"

_NOT_OF_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus. `name` is the same wherever the corpus lies; `errors` is one of ERRORS."""

    name: str
    path: Path
    errors: str
    field: str

    @property
    def format(self) -> str:
        """jsonl | parquet | megatron (token ids) | text; all but text have many documents."""
        if _has_index(self.path):
            return "megatron"
        is_packed = self.path.suffix in COMPRESSIONS
        suffix = Path(self.path.stem).suffix if is_packed else self.path.suffix
        if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and is_packed):  # as C4 and Dolma name their lines
            return "jsonl"
        return "parquet" if suffix == ".parquet" else "text"

    @property
    def parts(self) -> list[tuple[str, Path]]:
        """(name, path) of everything that is read: a file of token ids has an index beside it."""
        parts = [(self.name, self.path)]
        if self.format == "megatron":
            parts.append((self.name.removesuffix(".bin") + ".idx", self.path.with_suffix(".idx")))
        return parts


def find(
    sources: Iterable[str], exclude: Iterable[str], errors: str, field: str, output: Path | None = None
) -> list[SourceFile]:
    """All files of the sources, those of a folder sorted by name; hidden files of a folder are left out.

    Args:
        sources: files, folders, or `stdlib` for the sources of the running Python's own standard library; an indexed
            dataset of Megatron may be named as Megatron names it, without .bin and .idx.
        exclude: shell patterns, matched against a file's name and against its path inside the source.
        errors: what to do with bytes that are not UTF-8: strict | replace | skip.
        field: the text field of .jsonl and .parquet files.
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


def _expand(source: str, errors: str, field: str) -> Iterator[SourceFile]:
    if source == STDLIB:
        yield from _stdlib(field)
        return
    path = Path(source)
    if path.suffix == ".idx" or not path.exists():
        data = path.with_suffix(".bin") if path.suffix == ".idx" else path.with_name(f"{path.name}.bin")
        path = data if _has_index(data) else path
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
    files, seen = [], set()
    for folder, inner_folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it
            inner_folders.clear()
            continue
        seen.add(real)
        inner_folders[:] = [n for n in inner_folders if n[0] != "." and n != "__pycache__" and n not in left_out]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    files = [f for f in files if f.is_file() and not (f.suffix == ".idx" and _has_index(f.with_suffix(".bin")))]
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def _matches(name: str, patterns: list[str]) -> bool:
    inner = name.partition("/")[2] or name
    return any(fnmatch.fnmatch(n, p) for p in patterns for n in (name, inner, name.rpartition("/")[2]))


def _has_index(path: Path) -> bool:
    return path.suffix == ".bin" and path.is_file() and path.with_suffix(".idx").is_file()
