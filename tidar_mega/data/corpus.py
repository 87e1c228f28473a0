"""The documents of all sources with the split of each: by file where there are several, else inside the one file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tidar_mega.data import DataError, sources
from tidar_mega.data.sources import SourceFile

TRAIN, VALIDATION = range(2)


class Corpus:
    """Which documents train and which are held out is a pure function of their names and the seed."""

    def __init__(self, files: list[SourceFile], fraction: float, seed: int) -> None:
        """Raises DataError if there are not two documents to split."""
        self._files = [f for f in files if f.path.stat().st_size > 0]
        self._empty_files = len(files) - len(self._files)
        self._fraction, self._seed = fraction, seed
        if not self._files:
            raise DataError(f"empty corpus: none of the {len(files)} source files has any text")
        if len(self._files) > 1:
            self._split_of_file = self._draw([f.name for f in self._files])
        elif self._files[0].is_jsonl:
            self._split_of_line = self._split_lines(self._files[0])

    @property
    def bytes(self) -> int:
        return sum(f.path.stat().st_size for f in self._files)

    def documents(self, counts: Counter) -> Iterator[tuple[str, int, int]]:
        """(text, split, bytes of the sources read so far); what is left out is counted."""
        counts["empty"] += self._empty_files
        if len(self._files) == 1:
            yield from self._documents_of_one(self._files[0], counts)
            return
        before = 0
        for file, split in zip(self._files, self._split_of_file, strict=True):
            for text, position in sources.documents(file, counts):
                yield text, int(split), before + position
            before += file.path.stat().st_size

    def training_texts(self, limit: int) -> Iterator[str]:
        """Texts of the training split alone, of files in a random order, until they have `limit` bytes."""
        total = 0
        for text in self._training_texts():
            yield text
            total += len(text.encode("utf-8"))
            if total >= limit:
                return

    def _training_texts(self) -> Iterator[str]:
        if len(self._files) == 1:
            yield from (text for text, split, _ in self.documents(Counter()) if split == TRAIN)
            return
        for i in np.argsort(self._ranks([f.name for f in self._files]), kind="stable"):
            if self._split_of_file[i] == TRAIN:
                yield from (text for text, _ in sources.documents(self._files[i], Counter()))

    def _documents_of_one(self, file: SourceFile, counts: Counter) -> Iterator[tuple[str, int, int]]:
        if file.is_jsonl:
            for split, (text, position) in zip(self._split_of_line, sources.documents(file, counts), strict=True):
                yield text, int(split), position
            return
        for text, position in sources.documents(file, counts):
            train, validation = _cut(file, text, self._fraction)
            yield train, TRAIN, position
            yield validation, VALIDATION, position

    def _split_lines(self, file: SourceFile) -> np.ndarray:
        count = sum(1 for _ in sources.documents(file, Counter()))
        if count < 2:
            raise DataError(
                f"{file.path}: {count} documents with text, but at least 2 are needed: one to train, one to validate"
            )
        return self._draw([f"{file.name}:{i}" for i in range(count)])

    def _draw(self, names: list[str]) -> np.ndarray:
        """int8 split of each name: the share `fraction`, at least one and never all, is held out."""
        held_out = min(max(1, round(self._fraction * len(names))), len(names) - 1)
        split = np.full(len(names), TRAIN, dtype=np.int8)
        split[np.argsort(self._ranks(names), kind="stable")[:held_out]] = VALIDATION
        return split

    def _ranks(self, names: list[str]) -> np.ndarray:
        digests = (hashlib.sha256(f"{self._seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in names)
        return np.fromiter((int.from_bytes(d[:8], "big") for d in digests), dtype=np.uint64, count=len(names))


def _cut(file: SourceFile, text: str, fraction: float) -> tuple[str, str]:
    """A corpus of one text: its last lines are held out."""
    border = text.rfind("\n", 0, max(1, int(len(text) * (1 - fraction)))) + 1
    if border == 0 or not text[:border].strip() or not text[border:].strip():
        raise DataError(
            f"{file.path}: a corpus of one text is cut at the end of a line, but this one has no line end near "
            f"{1 - fraction:.0%} of its length: give at least 2 files, or a .jsonl with at least 2 lines"
        )
    return text[:border], text[border:]
