"""Several prepared folders as one stream, each with a share of the samples.

As with one folder, a sample is a function of its global index: within every `_TURN` samples each folder gives as many
as its share says, spread evenly, so that any stretch of samples holds close to the right shares, a batch included. A
folder's own samples come in its own order, whatever is mixed with it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from tidar_mega.config import DataConfig
from tidar_mega.data import DataError
from tidar_mega.data.stream import Samples, Stream, mix, open_stream
from tidar_mega.rows import Rows

_TURN = 100_000  # samples in which every folder has its share; none can be smaller than one of them


def open_data(data: DataConfig, split: str, seed: int, seq_length: int | None = None) -> Samples:
    """The train or validation split of `data.path`, one folder or several; `seq_length`: instead of data.seq_length.

    Raises DataError as `open_stream`, and if folders have different tokenizers.
    """
    streams = {folder: open_stream(folder, split, seq_length or data.seq_length, seed) for folder in data.folders}
    return Mixture(streams, data.weights) if len(streams) > 1 else streams[data.folders[0]]


class Mixture:
    """`Samples` of two or more streams. `weights` are in their order; None: by their sizes."""

    def __init__(self, streams: dict[str, Stream], weights: list[float] | None) -> None:
        (first, one), *others = streams.items()
        for folder, stream in others:
            if stream.tokenizer.fingerprint != one.tokenizer.fingerprint:
                raise DataError(
                    f"data.path: {folder} was not prepared with the tokenizer of {first}; run `tidar prepare` again "
                    f"with --tokenizer {one.tokenizer_folder}"
                )
        self._streams = list(streams.values())
        self._names = _names(list(streams))
        sizes = [stream.samples_per_epoch for stream in self._streams]
        self._counts = _counts(np.asarray(weights or sizes, dtype=np.float64))
        if 0 in self._counts:
            folder = list(streams)[self._counts.index(0)]
            raise DataError(
                f"data.weights = {weights}: the share of {folder} is below one sample in {_TURN}; give it a larger "
                "one (null: by their sizes), or leave the folder out"
            )
        number = np.concatenate([np.arange(count) for count in self._counts])
        source = np.repeat(np.arange(len(sizes)), self._counts)
        # sample n of the c of a folder stands somewhere in the n-th of c pieces of the turn. Not always at the same
        # place, or replicas, which take samples in turn, could each read a folder of their own
        within = mix((source * _TURN + number).astype(np.uint64)) / 2.0**64
        at = (number + within) / np.repeat(self._counts, self._counts)
        order = at.argsort(kind="stable")
        self._source, self._number = source[order], number[order]
        self.tokenizer, self.tokenizer_folder = one.tokenizer, one.tokenizer_folder
        parts = [(c, stream.fingerprint) for c, stream in zip(self._counts, self._streams, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def place(self, global_index: int) -> tuple[int, int]:
        """Of which folder a sample is, and which of that folder's samples."""
        turn, at = divmod(global_index, _TURN)
        source = int(self._source[at])
        return source, turn * self._counts[source] + int(self._number[at])

    def rows(self, global_index: int) -> Rows:
        source, index = self.place(global_index)
        return self._streams[source].rows(index)

    def parts(self, count: int) -> list[tuple[str, Stream, int]]:
        shares = [max(1, round(count * c / _TURN)) for c in self._counts]
        triples = zip(self._names, self._streams, shares, strict=True)
        return [(name, stream, min(share, stream.samples_per_epoch)) for name, stream, share in triples]

    def epochs(self, samples: int) -> dict[str, float]:
        """`epoch` is that of the folder that is read most."""
        rounds = [samples * c / _TURN / s.samples_per_epoch for c, s in zip(self._counts, self._streams, strict=True)]
        return {"epoch": max(rounds), **{f"epoch/{name}": n for name, n in zip(self._names, rounds, strict=True)}}


def _counts(weights: np.ndarray) -> list[int]:
    """Samples of a turn for each, by the largest remainders: their sum is a whole turn."""
    exact = weights / weights.sum() * _TURN
    counts = np.floor(exact).astype(int)
    missing = _TURN - counts.sum()
    counts[(counts - exact).argsort(kind="stable")[:missing]] += 1
    return counts.tolist()


def _names(folders: list[str]) -> list[str]:
    """The last parts of the paths, or the paths where these are not unlike."""
    short = [Path(folder).name for folder in folders]
    return short if len(set(short)) == len(short) else folders
