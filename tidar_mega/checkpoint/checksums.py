"""The checksum of each file of a checkpoint: left beside it by its writer, and compared by those who read it."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch.distributed as dist

_BLOCK_BYTES = 1 << 24


def sum_beside(path: Path) -> Path:
    """Where the checksum of a file stands until the checkpoint is published, with all of them in its meta.json."""
    return path.with_name(f"{path.name}.crc32")


def checksum(path: Path) -> str:
    """CRC-32 of a file's contents, in hex."""
    total = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def take_sum(path: Path) -> str:
    """The checksum that its writer left beside a file, which is deleted; of the file as it is where there is none."""
    beside = sum_beside(path)
    try:
        found = beside.read_text()
        beside.unlink()
    except FileNotFoundError:  # a network file system may show it late
        return checksum(path)
    return found


def changed_files(folder: Path, sums: dict[str, str]) -> list[str]:
    """Collective. Those of the files named in `sums` that are not what was written; each rank reads some of them.

    Raises OSError on every rank if one cannot be read.
    """
    mine = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
    try:
        found: list[str] | OSError = [name for name in mine if checksum(folder / name) != sums[name]]
    except OSError as error:
        found = error
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    for fault in (f for f in ranks if isinstance(f, OSError)):
        raise fault
    return [name for names in ranks for name in names]
