"""What lies behind the errors of megatron-core and torch for a checkpoint: storage, damaged contents, or neither."""

from __future__ import annotations

import pickle
import re

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from tidar_mega.checkpoint.writing import of_disk

# what damaged files lead to, unless it names what is no file
_OF_CONTENT = (CheckpointingException, pickle.UnpicklingError, EOFError, LookupError, ValueError, RuntimeError)
_OF_MACHINE = re.compile("CUDA|NCCL|can't allocate memory")


def by_rank(error: BaseException) -> list[BaseException]:
    """What each rank met, where torch has put that together."""
    return [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def fault(error: BaseException) -> OSError | None:
    """The fault of storage behind `error`, if that is known. Of what another process met, only the text is left."""
    for part in by_rank(error):
        cause = of_disk(part)
        if isinstance(cause, OSError):
            return cause
        if found := re.search(r"\[Errno (\d+)\] (.*)", str(part)):
            return OSError(int(found[1]), found[2])
    return None


def is_of_content(error: BaseException) -> bool:
    """Whether `error` comes of what the files hold, and not of this machine's memory or devices."""
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, _OF_CONTENT) and not is_memory and not _OF_MACHINE.search(str(error))


def first_line(error: BaseException) -> str:
    """What went wrong, without the traces of other ranks that torch puts into its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Errno" in line or re.match(r"[\w.]+(Error|Exception): ", line)]
    return (causes or lines or [type(error).__name__])[-1 if causes else 0]
