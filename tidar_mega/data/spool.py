"""The two parts of `tidar prepare` that run in many processes: encoding into a spool, and writing shards from it.

The spool holds the ids of all documents in the order of the sources, so that shards can be written from it in any
order. The results come back in the order of the work, so the number of workers changes no byte.

Shape suffixes: D documents of the corpus.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tidar_mega.data import DataError, shards
from tidar_mega.data.documents import Document, Tokens
from tidar_mega.data.tokenizer import Tokenizer

_IDS, _DOCUMENTS, _WHOLE = "ids.bin", "documents.npy", "whole"
_AHEAD = 4  # pieces of work per worker that wait or run at once


def ordered_map(open_tool: Callable, function: Callable, items: Iterable[tuple], workers: int) -> Iterator:
    """`function(tool, *item)` of every item, in order, where every process has its own `tool = open_tool()`.

    In this process if there is one worker, else in that many others.
    """
    if workers == 1:
        tool = open_tool()
        yield from (function(tool, *item) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe beside the threads of the tokenizer library
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (open_tool,))
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, function, item))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}  # the tool of a worker process; empty in any other


def _start_worker(open_tool: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["tool"] = open_tool()


def _call(function: Callable, item: tuple) -> Any:
    return function(_worker["tool"], *item)


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode(tokenizer: Tokenizer, dtype: np.dtype, documents: list[Document]) -> tuple[bytes, list[int], list[int]]:
    """(ids of all documents, each ended by end-of-document; tokens per document; UTF-8 bytes per document).

    Raises DataError for token ids that are not of this tokenizer.
    """
    texts = iter(tokenizer.encode_batch([d for d in documents if isinstance(d, str)]))
    ids = [next(texts) if isinstance(d, str) else _checked(tokenizer, d) for d in documents]
    arrays = [np.array([*i, tokenizer.eod], dtype=dtype) for i in ids]
    sizes = [
        len(d.encode("utf-8")) if isinstance(d, str) else int(tokenizer.token_bytes[i].sum())
        for d, i in zip(documents, ids, strict=True)
    ]
    return np.concatenate(arrays).tobytes(), [len(a) for a in arrays], sizes


def _checked(tokenizer: Tokenizer, document: Tokens) -> np.ndarray:
    """The ids of the text alone, without the end-of-document tokens that may stand around it."""
    ids = document.ids
    unknown = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(unknown):
        raise DataError(
            f"{document.where}: it has the id {unknown[0]}, but the tokenizer of --tokenizer has "
            f"{tokenizer.vocab_size}: give the one that made these ids"
        )
    text = np.flatnonzero(ids != tokenizer.eod)
    ids = ids[text[0] : text[-1] + 1] if len(text) else ids[:0]
    reserved = ids[np.isin(ids, (tokenizer.eod, tokenizer.pad, tokenizer.mask))]
    if len(reserved):
        raise DataError(
            f"{document.where}: it has the id {reserved[0]} where text should be, which the tokenizer of --tokenizer "
            "keeps for the end of a document, padding or the mask: give the one that made these ids, with the "
            "eos_token, pad_token and mask_token that are meant so"
        )
    return ids


class Spool:
    """Ids of all documents, one behind the other, and what each is."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype

    def is_whole(self) -> bool:
        return (self.folder / _WHOLE).is_file()

    def finish(self) -> None:
        """Marks the spool as whole."""
        with shards.publish(self.folder / _WHOLE):
            pass

    def write(self, parts: Iterable[tuple[bytes, list[int], list[int], list[int]]]) -> None:
        """`parts`: the ids of some documents, and their lengths, text bytes and splits."""
        self.folder.mkdir(exist_ok=True)
        rows: tuple[list[np.ndarray], ...] = ([], [], [])
        with shards.publish(self.folder / _IDS) as file:
            for ids, *columns in parts:
                file.write(ids)
                for row, column in zip(rows, columns, strict=True):
                    row.append(np.array(column, dtype=np.int64))
        table = np.stack([np.concatenate([np.zeros(0, dtype=np.int64), *row]) for row in rows])
        with shards.publish(self.folder / _DOCUMENTS) as file:
            np.save(file, table)

    @functools.cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [D] each: tokens, text bytes and split of the documents."""
        lengths_D, text_bytes_D, split_D = np.load(self.folder / _DOCUMENTS)
        return lengths_D, text_bytes_D, split_D

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of documents of these lengths, by the number of their first token."""
        if os.path.getsize(self.folder / _IDS) == 0:
            return
        ids = np.memmap(self.folder / _IDS, dtype=self.dtype, mode="r")
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            yield ids[start : start + length]


def write_shard(
    spool: Spool, path: Path, first: int, starts: np.ndarray, lengths: np.ndarray, size: int
) -> shards.Shard:
    """Writes the shard at `path`, or takes the one that an interrupted run of the same work has left there."""
    if path.is_file() and path.stat().st_size == size:
        return shards.Shard(path.name, len(lengths), int(lengths.sum()), size, shards.sha256(path))
    shard = shards.write_shard(path, first, spool.read(starts, lengths))
    assert shard.bytes == size, f"{path}: {shard.bytes} bytes instead of {size}: the layout of a tar has changed"
    return shard
