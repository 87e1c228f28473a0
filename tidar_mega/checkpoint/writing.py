"""Writing a checkpoint in a process beside the training, which goes on meanwhile.

megatron-core prepares a save as an `AsyncRequest`: what this rank writes, and what all ranks do once everyone has
written. A forked process writes: it has the memory of the moment of the fork, whatever the training changes later.
What is on a GPU is copied to the host before.
"""

from __future__ import annotations

import gc
import inspect
import os
import pickle
import queue
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import ProcessGroup

from tidar_mega.checkpoint.checksums import checksum, sum_beside
from tidar_mega.lifetime import end_with

_FORMAT = ("torch_dist", 1)
# from megatron-core 0.18 on it must be asked for by name; the other one writes through a package of its own
_OWN = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
_POLL_SECONDS = 0.05


class Writer:
    """The save in flight on this rank, if any."""

    def __init__(self) -> None:
        self.calls = AsyncCallsQueue()
        self.results: _Results | None = None

    def begin(self, parts: dict, folder: str, replicas: ProcessGroup) -> None:
        """Collective. Starts to write `parts` into `folder`; on return they may change.

        What several ranks hold is divided among them; `replicas` are the ranks that hold the same weights.
        """
        assert not self.calls.async_calls, "one save at a time"
        self.results = filesystem_async._results_queue = _Results()
        divided = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(*_FORMAT, thread_count=1), replicas)
        request = dist_checkpointing.save(parts, folder, divided, async_sharded_save=True, **_OWN)
        if request.async_fn is not None:  # else this rank has nothing to write
            # megatron's own function forks once more for each file, and hangs if one of those processes is killed
            transforms, _ = request.async_fn.args
            # the request keeps these copies until the end: freed earlier, their pinned memory could get other contents
            buckets = request.preload_fn()
            arguments = (os.getpid(), transforms, buckets, self.results)
            request = request._replace(async_fn=_write, async_fn_args=arguments, preload_fn=None)
        self.calls.schedule_async_request(request)

    def finish(self, wait: bool, waiting: Callable[[], None] = lambda: None) -> bool:
        """Collective, and cheap without `wait`: true once every rank has written its part, and megatron's index of
        them too. `waiting` is called again and again. Raises torch's CheckpointException on every rank if one could
        not write.
        """
        self._say_if_killed()
        while not self.calls.maybe_finalize_async_calls():
            if not wait:
                return False
            time.sleep(_POLL_SECONDS)  # many short exchanges between the ranks: a long one would time out
            waiting()
            self._say_if_killed()
        return True

    def _say_if_killed(self) -> None:
        process = self.calls.async_calls[0].async_caller.process
        if process is not None and process.exitcode:
            how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"code {process.exitcode}"
            self.results.put(ChildProcessError(f"ChildProcessError: the writing process was ended by {how}"))


def _write(parent: int, transforms: list, buckets: list, results) -> None:
    """In the writing process: the files of this rank, then what became of them."""
    end_with(parent)
    gc.disable()  # it would free the parent's CUDA tensors
    outcomes = [_write_file(transforms, index, bucket) for index, bucket in enumerate(buckets)]
    failure = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    results.put(of_disk(failure) if failure else dict(enumerate(outcomes)))


def _write_file(transforms: list, index: int, bucket) -> list | Exception:
    """megatron's writer of one file, which answers through queues; and beside the file, its checksum."""
    outcome, unfinished = queue.SimpleQueue(), queue.Queue()
    unfinished.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, unfinished, use_fsync=True)
    try:
        path = Path(bucket[0])
        sum_beside(path).write_text(checksum(path))
    except OSError as error:
        return error
    return outcome.get()[1]


def of_disk(error: BaseException) -> BaseException:
    """The error of the disk behind `error`, else itself: torch's serialisation covers a full disk with its own."""
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


class _Results:
    """How a writing process answers the one that it was forked from: through a file that both hold, which takes any
    size. megatron's own queue is a process more for each rank, and outlives a rank that is killed."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def put(self, result: object) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.file.write(pickle.dumps(result))

    def get_nowait(self) -> object:
        self.file.seek(0)
        answer = self.file.read()
        self.file.truncate(0)
        try:
            return pickle.loads(answer)
        except (EOFError, pickle.UnpicklingError):  # killed since `_say_if_killed`: no answer, or a part of one
            return ChildProcessError("ChildProcessError: the writing process ended before it had answered")
