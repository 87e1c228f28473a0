"""Before the first step: does every node have what the others have, and do all ranks share one folder and one config?

Each rank says what it sees; all ranks get all of it and come to the same verdict, so that no rank goes on alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tidar_mega import device
from tidar_mega.config import Config, LostError, UserError, to_tree
from tidar_mega.data.shards import INDEX

_SKEW_SECONDS = 30.0  # beyond it, logs of several nodes cannot be read together
_LOW_DISK_GIB = 5.0
_SLOW = 0.5  # of the median speed


class NodeError(LostError):
    """Some nodes, `nodes`, are not fit for this run; others would be."""

    def __init__(self, message: str, nodes: list[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


@dataclass(frozen=True)
class Facts:
    """What one rank sees from its node."""

    host: str
    gpus: str  # how many, of which kind
    versions: str
    config: str  # hash of all settings
    data: str  # the size of the corpus's index
    clock: float  # seconds, all read within a moment
    free_gib: float  # on the disk of the run folder
    cannot_write: str  # there, and why; empty if it can
    shares_folder: bool  # it reads there what rank 0 has written
    computes: bool  # a matrix product came out right
    exchanges: bool  # and a sum over all ranks
    products_per_second: float


def check_gpu(local_rank: int, note_bad_nodes: Callable[[list[str]], None]) -> None:
    """Before joining: whether this node shows the GPU that Slurm has given to this rank. Raises NodeError.

    A build of torch without CUDA trains on CPUs, whatever a node has.
    """
    found = torch.cuda.device_count()
    if torch.version.cuda and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) and local_rank >= found:
        host = _host()
        note_bad_nodes([host])
        raise NodeError(
            f"preflight: {host}: process {local_rank} of this node has no GPU ({found} can be used); see nvidia-smi",
            [host],
        )


def check(config: Config, note_bad_nodes: Callable[[list[str]], None]) -> str:
    """Collective, after joining the process group; a line for the log that says how all nodes are.

    Raises NodeError for nodes that the caller may replace (`note_bad_nodes` is called before, on rank 0), and
    UserError for what would be the same on any node: a run folder that is not shared, or unequal settings.
    """
    rank = dist.get_rank()
    shared = _shares_folder(Path(config.run_dir), rank)
    right, bandwidth = _exchange(numbers=64 * 2**20 if device.has_cuda() else 2**20)
    dist.barrier()
    own = _facts(config, shared, right, time.time())
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    try:
        verdict(everybody, config.run_dir)
    except NodeError as error:
        if rank == 0:
            note_bad_nodes(error.nodes)
        dist.barrier()  # noted before any rank ends
        raise
    return describe(everybody, bandwidth, config.run_dir)


def verdict(everybody: list[Facts], run_dir: str) -> None:
    """Raises NodeError or UserError if these ranks must not start."""
    hosts = {facts.host for facts in everybody}
    apart = sorted({f.host for f in everybody if not f.shares_folder and not f.cannot_write})
    if apart and not everybody[0].cannot_write:  # else there was nothing to be seen
        said = (
            f"run_dir = {run_dir}: what rank 0 writes there is not seen on {', '.join(apart)}; it must be on a file "
            "system that all nodes share"
        )
        if 2 * len(apart) < len(hosts) - 1:  # of the hosts other than rank 0's: these lack what most others have
            raise NodeError(said, apart)
        raise UserError(said)
    if odd := _odd(everybody, "config"):
        raise UserError(f"the settings on {', '.join(odd)} are not those of the other nodes; share the config file")
    refused = {f.host: f.cannot_write for f in everybody if f.cannot_write}
    wrong = {f.host: "a product came out wrong" for f in everybody if not f.computes}
    astray = {f.host: "a sum over all ranks came out wrong" for f in everybody if not f.exchanges}
    if set(astray) == hosts and len(hosts) > 1 and not wrong:  # one spoils it for all
        raise LostError(
            f"preflight: a sum over all ranks came out wrong on {', '.join(sorted(hosts))}: one of them or its network "
            "is not fit; run NCCL's tests on each, and leave it out with sbatch --exclude"
        )
    wrong = wrong or astray
    other = {host: f"GPUs: {found}" for host, found in _odd(everybody, "gpus").items()}
    newer = {host: f"versions: {found}" for host, found in _odd(everybody, "versions").items()}
    text = {host: f"data.path: {found}" for host, found in _odd(everybody, "data").items()}
    bad = {**newer, **text, **other, **wrong, **refused}
    if bad and set(refused) == hosts:
        raise UserError(f"run_dir = {run_dir}: cannot be written on any node ({next(iter(refused.values()))})")
    if bad:
        said = "; ".join(f"{host}: {why}" for host, why in sorted(bad.items()))
        raise NodeError(f"preflight: not fit, and unlike the other nodes: {said}", sorted(bad))


def describe(everybody: list[Facts], bandwidth: float, run_dir: str) -> str:
    """One line on all nodes, and a warning for each thing that is only odd."""
    hosts = Counter(f.host for f in everybody)
    clocks, speeds = sorted(f.clock for f in everybody), sorted(f.products_per_second for f in everybody)
    free = min(f.free_gib for f in everybody)
    skew = clocks[-1] - clocks[0]
    lines = [
        f"preflight: {len(everybody)} ranks on {len(hosts)} node(s), {everybody[0].gpus}; all sums are right, "
        f"{bandwidth / 1e9:.2f} GB/s; clocks within {skew:.1f} s; {free:.0f} GiB free for {run_dir}"
    ]
    median = clocks[len(clocks) // 2]
    if skew > _SKEW_SECONDS:
        worst = max(everybody, key=lambda f: abs(f.clock - median))
        lines.append(f"warning: the clock of {worst.host} is {worst.clock - median:+.0f} s off: see its time service")
    slow = sorted({f.host for f in everybody if f.products_per_second < _SLOW * speeds[len(speeds) // 2]})
    if slow:
        lines.append(f"warning: {', '.join(slow)}: less than half as fast as the median of the ranks")
    if free < _LOW_DISK_GIB:
        lines.append(f"warning: {free:.1f} GiB are free for {run_dir}: fewer checkpoint.keep_last, or another disk")
    return "\n".join(lines)


def _odd(everybody: list[Facts], name: str) -> dict[str, str]:
    """host -> value, where it is not what most ranks have."""
    values = [getattr(f, name) for f in everybody]
    most = Counter(values).most_common(1)[0][0]
    return {f.host: value for f, value in zip(everybody, values, strict=True) if value != most}


def _facts(config: Config, shared: bool, right: bool, clock: float) -> Facts:
    product, speed = _product()
    free, refused = _disk(Path(config.run_dir))
    settings = json.dumps(to_tree(config), sort_keys=True, default=str)
    return Facts(
        host=_host(),
        gpus=f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device.has_cuda() else "no GPU",
        versions=_versions(),
        config=hashlib.sha256(settings.encode()).hexdigest(),
        data=", ".join(_size(Path(folder) / INDEX) for folder in config.data.folders),
        clock=clock,
        free_gib=free,
        cannot_write=refused,
        shares_folder=shared,
        computes=product,
        exchanges=right,
        products_per_second=speed,
    )


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes in {file}"
    except OSError as error:
        return f"no {file} ({error.strerror})"


def _versions() -> str:
    names = ("torch", "megatron-core")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return f"Python {platform.python_version()}, {packages}, tidar_mega {code.hexdigest()[:8]}"


def _shares_folder(folder: Path, rank: int) -> bool:
    """Collective. Whether this rank reads in `folder` what rank 0 has written there."""
    path = folder / ".preflight"
    word = [os.urandom(8).hex()]
    dist.broadcast_object_list(word, src=0, device=device.device())
    if rank == 0:
        with contextlib.suppress(OSError):  # `_disk` says so
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(word[0])
    dist.barrier()
    seen = _reads(path, word[0])
    dist.barrier()
    if rank == 0:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return seen


def _reads(path: Path, word: str, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds  # a network file system shows new files late
    while True:
        try:
            if path.read_text() == word:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _disk(folder: Path) -> tuple[float, str]:
    """(free GiB, why it cannot be written or nothing)"""
    path = folder / f".preflight_{dist.get_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1 << 20))
        path.unlink()
        return shutil.disk_usage(folder).free / 2**30, ""
    except OSError as error:
        return 0.0, f"{folder} cannot be written ({error.strerror})"


def _exchange(numbers: int) -> tuple[bool, float]:
    """Collective. Whether a sum over all ranks is right, and at how many bytes per second one rank exchanges."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    small = torch.arange(numbers, device=device.device()) % 64  # float32 could not count so far, nor add so many ranks
    expected = (small * ranks + sum(r % 64 for r in range(ranks))).float()
    seconds, right = [], True
    for _ in range(3):
        values = (small + rank % 64).float()
        seconds.append(device.seconds(functools.partial(dist.all_reduce, values)))
        total = values.sum(dtype=torch.float64).item()
        right = right and torch.equal(values, expected) and total == expected.sum(dtype=torch.float64).item()
    return right, 2 * (ranks - 1) / ranks * 4 * numbers / min(seconds)


def _product() -> tuple[bool, float]:
    """Whether a product of small whole numbers is right, and how many are made per second."""
    size = 2048 if device.has_cuda() else 128
    ones = torch.ones(size, size, device=device.device())
    seconds, right = [], True
    for _ in range(4):  # the first also loads the library
        started = time.perf_counter()
        right = bool(torch.all(ones @ ones == size)) and right
        seconds.append(time.perf_counter() - started)
    return right, 1 / min(seconds)
