"""Without a launcher, `tidar pretrain` starts its own processes on this machine."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time

from tidar_mega.config import Config, ConfigError, UserError, replicas
from tidar_mega.lifetime import STOP_SIGNALS, end_with

_LOOPBACK = "127.0.0.1"
_PORTS = range(20000, 30000)  # those of Slurm jobs are below (slurm.py)
_HINTS = {
    signal.SIGKILL: " (most often for lack of memory)",
    signal.SIGABRT: " (NCCL does that when a collective times out; what it said is above)",
}


def local_processes(config: Config, gpus: int) -> int:
    """How many processes to start on this machine, at most one per GPU where there are GPUs. Raises ConfigError,
    also where the batch cannot be shared out among them."""
    p = config.parallel
    data = p.data or max(1, gpus // p.model_size)
    sizes = {"tensor": p.tensor, "pipeline": p.pipeline, "context": p.context, "data": data}
    processes = processes_of("parallel", sizes, gpus)
    replicas(config, processes, f"{processes} processes")
    return processes


def processes_of(section: str, sizes: dict[str, int], gpus: int) -> int:
    """The product of a layout's `sizes`, settings of `section`. Raises ConfigError if there are GPUs, but fewer."""
    processes = math.prod(sizes.values())
    if 0 < gpus < processes:
        raise ConfigError(
            f"{section}.{' x '.join(sizes)} = {' x '.join(map(str, sizes.values()))}: this machine has {gpus} GPU(s), "
            "one per process; lower one of them, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    return processes


def run_local(arguments: list[str], processes: int, gpus: int) -> int:
    """Runs `tidar <arguments>` in `processes` local ranks and returns the exit code.

    Signals are forwarded to every rank; a second Ctrl-C ends them at once. When one rank fails, the others are ended
    and its code is returned.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # at a failure it would warn at length of every lost socket
    if not gpus:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "tidar_mega.cli", *arguments]
    ranks: list[subprocess.Popen] = []

    received: list[int] = []

    def forward_signal(number: int, _frame) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL if again else number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward_signal)
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # a session of its own: Ctrl-C reaches a rank through `forward_signal` only, once
        started = subprocess.Popen(
            command,
            env={**environment, **place},
            start_new_session=True,
            preexec_fn=functools.partial(end_with, os.getpid()),
        )
        ranks.append(started)
        for number in received:  # before it was there to be sent to
            started.send_signal(number)
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            killed = {rank: -code for rank, code in failed.items() if code < 0}
            for rank, number in killed.items():  # it could not say so itself
                how = signal.Signals(number).name + _HINTS.get(number, "")
                print(f"rank {rank} was ended by {how}; the same command resumes", file=sys.stderr, flush=True)
            _end(ranks)
            return 128 + next(iter(killed.values())) if killed else next(iter(failed.values()))
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen], grace_seconds: float = 5.0) -> None:
    """The failing rank has said why; the others wait in a collective that will never complete."""
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)  # an error that all ranks share ends them all by itself
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def _free_port() -> int:
    """A free port outside the system's range for outgoing connections, of which gloo opens many: one of that range can
    be taken before rank 0 listens to it."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's own will listen
            probe.bind((_LOOPBACK, port))
            return port
    raise UserError(f"no port of {_PORTS[0]} to {_PORTS[-1]} is free on {_LOOPBACK}: look at `ss -ltn`")
