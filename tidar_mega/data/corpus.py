"""The documents of all sources with the split of each: by file, or by document where the files are too few."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tidar_mega.data import DataError, documents
from tidar_mega.data.documents import Document
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
        is_text = all(f.format == "text" for f in self._files)
        self._is_one_text = is_text and len(self._files) == 1
        self._is_by_file = len(self._files) > 1 and (is_text or round(fraction * len(self._files)) >= 1)
        if not self._is_one_text:  # of two large files, half of the text would be held out
            names = [f.name for f in self._files] if self._is_by_file else self._document_names()
            self._splits = self._draw(names)

    @property
    def bytes(self) -> int:
        return sum(f.path.stat().st_size for f in self._files)

    def documents(self, counts: Counter) -> Iterator[tuple[Document, int, int]]:
        """(document, split, bytes of the sources read so far); what is left out is counted."""
        counts["empty"] += self._empty_files
        before, number = 0, 0
        for place, file in enumerate(self._files):
            for document, position in documents.read(file, counts):
                if self._is_one_text:
                    train, validation = _cut(file, document, self._fraction)
                    yield train, TRAIN, position
                    yield validation, VALIDATION, position
                else:
                    yield document, int(self._splits[place if self._is_by_file else number]), before + position
                number += 1
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
        if not self._is_by_file:
            yield from (text for text, split, _ in self.documents(Counter()) if split == TRAIN)
            return
        for i in np.argsort(self._ranks([f.name for f in self._files]), kind="stable"):
            if self._splits[i] == TRAIN:
                yield from (text for text, _ in documents.read(self._files[i], Counter()))

    def _document_names(self) -> list[str]:
        names = [f"{f.name}:{i}" for f in self._files for i, _ in enumerate(documents.read(f, Counter()))]
        if len(names) < 2:
            raise DataError(
                f"{self._files[0].path}: {len(names)} documents with text, but at least 2 are needed: one to train, "
                "one to validate"
            )
        return names

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
