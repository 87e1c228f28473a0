"""When one rank fails, all end within seconds, and what is said first is what went wrong and on which rank."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from tidar_mega import device
from tidar_mega.config import Config, LostError, UserError
from tidar_mega.parallel.failures import of_communication
from tidar_mega.train.health import anywhere
from tidar_mega.train.roll_call import GRACE_SECONDS, Note, RollCall, Survey, say


def join(config: Config, local_rank: int) -> None:
    """Joins the process group that the launcher described. Raises LostError if not all processes come."""
    _record_collectives(config)
    try:
        device.start_process_group(config, local_rank)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostError(
            f"WORLD_SIZE = {os.environ.get('WORLD_SIZE')}: not all processes met at {where} within "
            f"{config.parallel.timeout_minutes:g} minutes, parallel.timeout_minutes ({_first_line(error)}); "
            "look at the logs of the others, and whether they can reach that address"
        ) from error


def _record_collectives(config: Config) -> None:
    """With NCCL, a collective that times out ends its process, and leaves a record of the last ones in the run folder:
    torch reads this from the environment."""
    for name, value in {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{config.run_dir}/nccl_trace_rank_",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def opened(config: Config, note_exit: Callable[[int], None] = lambda code: None) -> Iterator[RollCall]:
    """After `join`. An exception inside is reported, and ends this process and, within seconds, all others.

    `note_exit` is called with the exit code, of which a launcher may see only that of another rank that it has killed.
    """
    limits = {"health.hang_minutes": 60 * config.health.hang_minutes or float("inf")}
    if dist.get_backend() == "nccl":  # which ends the process from a thread of its own: who is missing is said before
        limits["0.9 of parallel.timeout_minutes"] = 0.9 * 60 * config.parallel.timeout_minutes
    limit = min(limits, key=limits.get)
    roll_call = RollCall(dist.get_rank(), dist.get_world_size(), _store_of_the_launcher, limits[limit], limit)
    try:
        yield roll_call
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        _end(roll_call, error, config.parallel.timeout_minutes, note_exit)
    anywhere(False)  # all are done
    roll_call.stop()
    anywhere(False)  # no rank talks to the store any more, which may live in one of them


def _store_of_the_launcher() -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((address, port), GRACE_SECONDS).close()  # torch would say at length that nobody is there
    timeout = timedelta(seconds=GRACE_SECONDS)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"roll call {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _end(roll_call: RollCall, error: BaseException, timeout_minutes: float, note_exit: Callable) -> NoReturn:
    """Tells of `error` and ends this process, not through Python's exit: that waits for the writers of checkpoints and
    for process groups with lost ranks."""
    roll_call.ending = True
    code = 1
    try:
        sys.stdout.flush()
        code = _tell(roll_call, error, timeout_minutes)
        note_exit(code)
        if roll_call.rank == 0 and roll_call.world_size > 1:
            time.sleep(GRACE_SECONDS)  # the store may end with this process: the others must have read the note
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _tell(roll_call: RollCall, error: BaseException, timeout_minutes: float) -> int:
    """Says what has failed first, here or on another rank; the exit code."""
    rank = roll_call.rank
    text, shown, code = _own_failure(roll_call, error)
    note, answers = None, True
    if of_communication(error):  # another rank is to blame
        answer = roll_call.ask()
        if isinstance(answer, Note):
            note = answer
        else:
            answers = answer is not None
            text = _missing(roll_call, error, timeout_minutes, answer)
            shown, code = f"[rank {rank}] error: {text}", LostError.exit_code
    if note is None:
        note = roll_call.leave(code, text) if answers else Note(rank, code, text)
    if note.rank == rank and note.stacks:
        return note.code  # the watchdog has said it
    if note.rank == rank:
        say(shown)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows the first one at the end
            with contextlib.suppress(OSError):
                get_error_handler().record_exception(error)
    elif of_communication(error):
        say(note.consequence(rank))
    elif note.text != text:
        say(f"[rank {rank}] after rank {note.rank} had failed:\n{shown}")
    return note.code


def _own_failure(roll_call: RollCall, error: BaseException) -> tuple[str, str, int]:
    """(one line for other ranks, what to print, exit code)"""
    if isinstance(error, UserError):
        prefix = f"[rank {roll_call.rank}] " if roll_call.rank else ""
        return str(error), f"{prefix}error: {error}", error.exit_code
    trace = "".join(traceback.format_exception(error))
    text = f"{type(error).__name__}: {_first_line(error)}"
    return text, f"[rank {roll_call.rank}] failed at {roll_call.place}:\n{trace}", 1


def _missing(roll_call: RollCall, error: BaseException, timeout_minutes: float, survey: Survey | None) -> str:
    """Who did not take part in the operation that has failed, and where they were."""
    limit = f" within {timeout_minutes:g} minutes (parallel.timeout_minutes)" if "imed out" in str(error) else ""
    if survey is None:
        who = "rank 0 did not take part, and the store that it holds is gone"
    else:
        who = survey.blame() or f"all ranks answer, so look at the network ({_first_line(error)})"
    return (
        f"{_operation(error)} did not come to its end{limit} at {roll_call.place}: {who}; "
        "look at its log and its machine; the same command resumes from the newest checkpoint"
    )


def _operation(error: BaseException) -> str:
    """Which call has failed, and where in our code: the first of torch.distributed's own functions in the trace."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    ours = [f for f in frames if Path(f.filename).is_relative_to(package) and f.filename != __file__]
    torchs = [f.name for f in frames if "/torch/distributed/" in f.filename and f.name != "wrapper"]
    name = torchs[0] if torchs else frames[-1].line
    return f"{name} ({Path(ours[-1].filename).relative_to(package)}:{ours[-1].lineno})" if ours else str(name)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
