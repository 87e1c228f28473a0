"""Writing a checkpoint in a process beside the training, which goes on meanwhile.

megatron-core prepares a save as an `AsyncRequest`: what this rank writes, and what all ranks do once everyone has
written. A forked process writes: it has the memory of the moment of the fork, whatever the training changes later.
What is on a GPU is copied to the host before.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import queue
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import SyncManager

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from tidar_mega.lifetime import end_with

_POLL_SECONDS = 0.05


class Writer:
    """The save in flight on this rank, if any."""

    def __init__(self) -> None:
        self.calls = AsyncCallsQueue()
        self.results = None

    def begin(self, parts: dict, folder: str, metadata: dict) -> None:
        """Collective. Starts to write `parts` into `folder`; on return they may change."""
        assert not self.calls.async_calls, "one save at a time"
        _share_results()
        request = dist_checkpointing.save(parts, folder, content_metadata=metadata, async_sharded_save=True)
        if request.async_fn is not None:  # else this rank has nothing to write
            transforms, _ = request.async_fn.args  # megatron's function forks once more, and hangs if that one is killed
            _, _, self.results = request.async_fn_args
            # the request keeps these copies until the end: freed earlier, their pinned memory could get other contents
            buckets = request.preload_fn()
            arguments = (os.getpid(), transforms, buckets, self.results)
            request = request._replace(async_fn=_write, async_fn_args=arguments, preload_fn=None)
        self.calls.schedule_async_request(request)

    def poll(self) -> bool:
        """Collective, and cheap: true once every rank has written its part and megatron's index of them is there.

        Raises torch's CheckpointException on every rank if one could not write.
        """
        self._say_if_killed()
        return bool(self.calls.maybe_finalize_async_calls())

    def wait(self) -> None:
        """Collective. As `poll`, until it is true; no single exchange between the ranks lasts long."""
        while not self.poll():
            time.sleep(_POLL_SECONDS)

    def _say_if_killed(self) -> None:
        process = self.calls.async_calls[0].async_caller.process
        if process is not None and process.exitcode:
            how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"code {process.exitcode}"
            self.results.put(ChildProcessError(f"ChildProcessError: the writing process was ended by {how}"))


def _write(parent: int, transforms: list, buckets: list, results) -> None:
    """In the writing process: all files of this rank at once, then what became of them."""
    end_with(parent)
    gc.disable()  # it would free the parent's CUDA tensors
    with ThreadPoolExecutor(len(buckets)) as threads:
        outcomes = list(threads.map(functools.partial(_write_file, transforms), range(len(buckets)), buckets))
    failure = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    results.put(failure or dict(enumerate(outcomes)))


def _write_file(transforms: list, index: int, bucket) -> list | Exception:
    """megatron's writer of one file, which answers through queues."""
    outcome, unfinished = queue.SimpleQueue(), queue.Queue()
    unfinished.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, unfinished, use_fsync=True)
    return outcome.get()[1]


@functools.cache
def _share_results() -> SyncManager:
    """The queue by which megatron's writers answer, in a helper process that ends with this one; megatron's own helper
    would outlive a rank that is killed."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_prepare_helper, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    return manager


def _prepare_helper(parent: int) -> None:
    end_with(parent)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # a stop request may be sent to all processes
        signal.signal(number, signal.SIG_IGN)
