"""The documents of all sources with the split of each."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from tidar_mega.data import DataError, documents
from tidar_mega.data.documents import Document
from tidar_mega.data.sources import SourceFile

TRAIN, VALIDATION = range(2)
_SMALL = 1 << 26  # bytes of sources that are read once more to hold out just the share that was asked for
_FILES_AT_ONCE = 32  # of which a tokenizer learns in turn


class Corpus:
    """Which documents train and which are held out is a pure function of their names and the seed."""

    def __init__(self, files: list[SourceFile], fraction: float, seed: int) -> None:
        """Raises DataError if there are not two documents to split."""
        self._files = [f for f in files if f.path.stat().st_size > 0]
        self._empty_files = len(files) - len(self._files)
        self._fraction, self._seed = fraction, seed
        if not self._files:
            raise DataError(f"empty corpus: none of the {len(files)} source files has any text")
        is_text = all(f.format == "text" for f in self._files)
        self._is_one_text = is_text and len(self._files) == 1
        self._held_out: set[str] | None = None  # names, of a corpus whose documents can be counted first
        if not self._is_one_text and (is_text or self.bytes <= _SMALL):
            self._held_out = self._draw([name for file in self._files for name in _names(file)])

    @property
    def bytes(self) -> int:
        return sum(f.path.stat().st_size for f in self._files)

    def documents(self, counts: Counter) -> Iterator[tuple[Document, int, int]]:
        """(document, split, bytes of the sources read so far); what is left out is counted."""
        counts["empty"] += self._empty_files
        before = 0
        for file in self._files:
            for document, split, position in self._documents_of(file, counts):
                yield document, split, before + position
            before += file.path.stat().st_size

    def training_texts(self, limit: int) -> Iterator[str]:
        """Texts of the training split alone, until they have `limit` bytes: of files in a random order, of some of them
        in turn, so that a tokenizer learns from more than the first."""
        order = np.argsort([self._rank(f.name) for f in self._files], kind="stable")
        waiting = (self._documents_of(self._files[i], Counter()) for i in order)
        readers, total = deque(itertools.islice(waiting, _FILES_AT_ONCE)), 0
        while readers and total < limit:
            reader = readers.popleft()
            text = next((document for document, split, _ in reader if split == TRAIN), None)
            if text is None:  # it has no more
                readers.extend(itertools.islice(waiting, 1))
                continue
            yield text
            total += len(text.encode("utf-8"))
            readers.append(reader)

    def _documents_of(self, file: SourceFile, counts: Counter) -> Iterator[tuple[Document, int, int]]:
        for number, (document, position) in enumerate(documents.read(file, counts)):
            if self._is_one_text:
                train, validation = _cut(file, document, self._fraction)
                yield train, TRAIN, position
                yield validation, VALIDATION, position
            else:
                yield document, self._split(_name(file, number)), position

    def _split(self, name: str) -> int:
        if self._held_out is not None:
            return VALIDATION if name in self._held_out else TRAIN
        return VALIDATION if self._rank(name) < self._fraction * 2**64 else TRAIN

    def _draw(self, names: list[str]) -> set[str]:
        """The share `fraction` of the names, at least one and never all."""
        if len(names) < 2:
            raise DataError(
                f"{self._files[0].path}: {len(names)} documents with text, but at least 2 are needed: one to train, "
                "one to validate"
            )
        count = min(max(1, round(self._fraction * len(names))), len(names) - 1)
        return set(sorted(names, key=self._rank)[:count])

    def _rank(self, name: str) -> int:
        """A random number below 2 ** 64 that is a function of the name and the seed."""
        digest = hashlib.sha256(f"{self._seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big")


def _names(file: SourceFile) -> list[str]:
    """Of all documents of a file."""
    if file.format == "text":
        return [file.name]
    return [_name(file, number) for number, _ in enumerate(documents.read(file, Counter()))]


def _name(file: SourceFile, number: int) -> str:
    return file.name if file.format == "text" else f"{file.name}:{number}"


def _cut(file: SourceFile, text: str, fraction: float) -> tuple[str, str]:
    """A corpus of one text: its last lines are held out."""
    border = text.rfind("\n", 0, max(1, int(len(text) * (1 - fraction)))) + 1
    if border == 0 or not text[:border].strip() or not text[border:].strip():
        raise DataError(
            f"{file.path}: a corpus of one text is cut at the end of a line, but this one has no line end near "
            f"{1 - fraction:.0%} of its length: give at least 2 files, or a .jsonl with at least 2 lines"
        )
    return text[:border], text[border:]
