"""What a job asks of a cluster, and whether the run fits it and the cluster has it: all that can be refused before
anything waits in a queue."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidar_mega.config import Config, ConfigError, UserError, replicas
from tidar_mega.launch.slurm import ask

# options of sbatch that are made from the other fields, and those that the script needs as they are
_DECIDED = ("nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "time", "partition", "signal", "export")
# of a checkpoint, and where a run has those; of a Hugging Face model
_CHECKPOINTS = ("meta.json", "step_*/meta.json", "checkpoints/step_*/meta.json")
_WEIGHTS = {"init_from": ("config.json", *_CHECKPOINTS), "continue_from": _CHECKPOINTS}
_OWN_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "fuse-overlayfs"}


@dataclass(frozen=True)
class Resources:
    """`gpus` and `tasks` are per node; with GPUs, there is one task for each."""

    nodes: int = 1
    gpus: int = 0
    tasks: int | None = None  # processes of a node without GPUs
    cpus: int | None = None  # of a task
    time: str = "24:00:00"
    partition: str | None = None
    signal_seconds: int = 300  # so long before the time limit the run saves and goes back into the queue
    sbatch: Sequence[str] = ()  # more options of sbatch, such as --account=physics

    @property
    def tasks_per_node(self) -> int:
        return self.gpus or self.tasks or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def check(config: Config, r: Resources) -> None:
    """Whether the layout fits the processes. Raises ConfigError."""
    for name, value, least in (("--nodes", r.nodes, 1), ("--gpus", r.gpus, 0), ("--tasks", r.tasks_per_node, 1)):
        if value < least:
            raise ConfigError(f"{name} {value}: must be a number of {least} or more")
    if r.gpus and r.tasks not in (None, r.gpus):
        raise ConfigError(f"--tasks {r.tasks}: must be --gpus ({r.gpus}), one process per GPU; leave it out")
    for option in r.sbatch:
        name = option.removeprefix("--").partition("=")[0]
        if not option.startswith("--"):
            raise ConfigError(f"--sbatch={option}: must be a long option of sbatch, such as --sbatch=--account=physics")
        if name in _DECIDED:
            raise ConfigError(f"--sbatch={option}: --{name} is decided by the other options (tidar launch --help)")
    replicas(config, r.world_size, f"{r.world_size} processes ({r.nodes} nodes x {r.tasks_per_node})")
    if 60 * minutes(r.time) <= r.signal_seconds:
        raise ConfigError(f"--time {r.time}: must be more than the {r.signal_seconds} s kept for the last save")


def minutes(time: str) -> int:
    """Slurm's [days-]hours:minutes:seconds, days-hours, minutes:seconds or minutes, rounded up. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise ConfigError(f"--time {time}: must be minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, *rest = found.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None or found[4] is not None:
        seconds = 86400 * int(days or 0) + 3600 * first + 60 * second + third
    else:
        seconds = 60 * first + second
    return -(-seconds // 60)


def check_inputs(config: Config) -> None:
    """Whether the data and the weights to begin with are there, as far as their folders say. Raises ConfigError."""
    if not config.launch.check_shared:
        return
    elsewhere = "; or, if the nodes see it and this machine does not, launch.check_shared=false"
    for folder in config.data.folders:
        if not (Path(folder) / "index.json").is_file():
            raise ConfigError(
                f"data.path = {folder}: no index.json there, so it is not a finished folder of `tidar prepare`; run "
                f"that first, or name another folder{elsewhere}"
            )
    for key in ("init_from", "continue_from"):
        weights = getattr(config.train, key)
        if weights is not None and not any(next(Path(weights).glob(name), None) for name in _WEIGHTS[key]):
            model = "a folder of Hugging Face (with config.json), " if key == "init_from" else ""
            raise ConfigError(
                f"train.{key} = {weights}: must be {model}a run folder with a checkpoint, or one of its "
                f"checkpoints/step_* folders{elsewhere}"
            )


def check_cluster(config: Config, r: Resources) -> None:
    """Whether this cluster has such nodes, and they the run folder. Raises UserError."""
    for command in ("sbatch", "srun", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(
                f"{command} is not on PATH: no Slurm here; log in to the cluster, or train on this machine with "
                "`tidar pretrain`; --dry-run shows what would be submitted"
            )
    _check_shared(config, _check_nodes(r))


@dataclass(frozen=True)
class _Nodes:
    """A group of a partition's nodes that are alike, as `sinfo` says it."""

    partition: str
    is_default: bool
    count: int
    gpus: int
    limit: str  # of time


def _check_nodes(r: Resources) -> str | None:
    """The partitions that the job could be in, with commas, if they are known. Raises UserError if there is none."""
    known = _known()
    names = sorted({nodes.partition for nodes in known})
    where, found = "--partition", r.partition
    if found is None:  # sbatch reads it, too
        where, found = "SBATCH_PARTITION", os.environ.get("SBATCH_PARTITION")
    asked = found.split(",") if found else sorted({nodes.partition for nodes in known if nodes.is_default})
    for name in asked:
        if name not in names:
            raise UserError(f"{where} {name}: this cluster has {', '.join(names)}")
    refused = {name: _refusal(name, [nodes for nodes in known if nodes.partition == name], r) for name in asked}
    fitting = [name for name, refusal in refused.items() if refusal is None]
    if asked and not fitting:  # a job is never spread over several
        raise UserError("; ".join(refused.values()))
    return ",".join(fitting) or None


def fills_nodes(r: Resources) -> bool:
    """Whether the job takes all GPUs of the nodes that it may get: then it may have all else of them, too."""
    partitions = (_check_nodes(r) or "").split(",")
    here = [nodes.gpus for nodes in _known() if nodes.partition in partitions]
    return 0 < r.gpus >= max(here, default=math.inf)


def _known() -> list[_Nodes]:
    return [_parse(line) for line in ask(["sinfo", "-h", "-o", "%P|%D|%G|%l"]).splitlines()]


def _parse(line: str) -> _Nodes:
    name, count, gres, limit = line.split("|")
    return _Nodes(name.rstrip("*"), name.endswith("*"), int(count), gpus_of(gres), limit)


def _refusal(partition: str, groups: list[_Nodes], r: Resources) -> str | None:
    """Why a partition of these nodes never runs the job; None if it may."""
    limit = groups[0].limit
    if limit != "infinite" and minutes(r.time) > minutes(limit):  # Slurm would let it wait for ever
        return (
            f"--time {r.time}: partition {partition} allows {limit}; ask for less, as the run goes on in the next start"
        )
    count = sum(nodes.count for nodes in groups)
    if r.nodes > count:
        return f"--nodes {r.nodes}: partition {partition} has {count}; ask for fewer"
    with_gpus = sum(nodes.count for nodes in groups if nodes.gpus >= r.gpus)
    if r.nodes > with_gpus:
        return (
            f"--gpus {r.gpus}: of the {count} nodes of partition {partition}, {with_gpus} have so many; the most is "
            f"{max(nodes.gpus for nodes in groups)} GPUs per node; ask for more nodes of fewer GPUs"
        )
    return None


def _check_shared(config: Config, partitions: str | None) -> None:
    """Refuses a run folder on a disk that this machine has for itself, unless it is the one node of the partitions."""
    if not config.launch.check_shared:
        return
    where = ["-p", partitions] if partitions else []
    elsewhere = sorted({node for node in ask(["sinfo", "-h", "-N", "-o", "%o", *where]).split() if not _is_here(node)})
    mount, kind = mount_of(Path(config.run_dir), Path("/proc/mounts").read_text())
    if elsewhere and kind in _OWN_DISKS:
        raise UserError(
            f"run_dir = {config.run_dir}: lies on {mount}, a file system ({kind}) of this machine, and the nodes are "
            f"others ({', '.join(elsewhere[:3])}{', ..' if len(elsewhere) > 3 else ''}); set it to a folder that all "
            "share, or, if this machine lends that one to them, launch.check_shared=false"
        )


def _is_here(address: str) -> bool:
    """Whether that is an address of this machine: no other can be bound to."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def mount_of(folder: Path, mounts: str) -> tuple[str, str]:
    """(mount point, kind) of the file system on which `folder` is or would be, by the text of /proc/mounts."""
    known = {fields[1]: fields[2] for fields in (line.split() for line in mounts.splitlines())}  # the last one counts
    return next((str(p), known[str(p)]) for p in (folder.resolve(), *folder.resolve().parents) if str(p) in known)


def gpus_of(gres: str) -> int:
    """The GPUs of a node by Slurm's list of its generic resources, such as `gpu:a100:8(S:0-1),nvme:1`."""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
