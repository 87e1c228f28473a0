"""Checkpoints on disk: megatron's distributed format, written under a temporary name and published by a rename.

A published folder `step_00000100` holds megatron's shards, `tokenizer/` and `meta.json`, which lists every file with
its size. A folder without a published name was never finished and is removed by the next save.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from tidar_mega import config as config_module
from tidar_mega.checkpoint.state import SHARDING
from tidar_mega.config import Config, UserError
from tidar_mega.parallel.mesh import Mesh

FORMAT = 1
_META = "meta.json"
_MEGATRON_ERRORS = (Exception, CheckpointException)  # megatron, torch and pickle raise many; torch's is no Exception


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names the folder, the file and what to do."""


class CheckpointStore:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def published(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step_*") if (p / _META).is_file())

    def newest(self) -> Path | None:
        return next(reversed(self.published()), None)

    def save(self, mesh: Mesh, step: int, parts: dict, meta: dict, tokenizer: Path, size: int) -> Path:
        """Collective. Writes `parts` (of `state.sharded`, about `size` bytes) and publishes them whole or not at all.

        Raises CheckpointError on every rank, for example on a full disk; earlier checkpoints stay as they are.
        """
        final = self.folder / f"step_{step:08d}"
        draft = self.folder / f".{final.name}.unfinished"
        mesh.on_main(_on_disk(draft, lambda: _fresh_folder(self.folder, draft, size)))
        try:
            dist_checkpointing.save(parts, str(draft), content_metadata=SHARDING)
        except _MEGATRON_ERRORS as error:  # the writers' results are exchanged: every rank comes here
            mesh.on_main(functools.partial(_give_up, draft, error))  # the main rank was told why
        mesh.on_main(_on_disk(draft, lambda: self._publish(draft, final, meta, tokenizer)))
        return final

    def _publish(self, draft: Path, final: Path, meta: dict, tokenizer: Path) -> None:
        shutil.copytree(tokenizer, draft / "tokenizer")
        sizes = {str(p.relative_to(draft)): p.stat().st_size for p in sorted(draft.rglob("*")) if p.is_file()}
        (draft / _META).write_text(json.dumps({"format": FORMAT, **meta, "files": sizes}, indent=1))
        for path in [*draft.rglob("*"), draft]:
            _flush(path)
        assert not final.exists(), "a published checkpoint is never written again"
        draft.rename(final)
        _flush(self.folder)
        for old in self.published()[: -self.keep_last]:
            leftover = old.with_name(f".{old.name}.unfinished")  # a kill in the middle leaves no half checkpoint
            old.rename(leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of the run folder. Raises CheckpointError."""
    if (path / _META).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        newest = CheckpointStore(folder, keep_last=1).newest()
        if newest is not None:
            return newest
    raise CheckpointError(f"{path}: no checkpoint there; give a run folder or one of its checkpoints/step_* folders")


def read_meta(path: Path) -> dict:
    """`meta.json`, after every file that it lists was found with its size. Raises CheckpointError."""
    try:
        meta = json.loads((path / _META).read_text())
        files = meta["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / _META}: cannot be read ({error}); {_WAY_OUT}") from None
    if meta.get("format") != FORMAT:
        found = meta.get("format")
        raise CheckpointError(f"{path}: checkpoint format {found}, this version reads {FORMAT}; convert or retrain it")
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{file}: {state}; {_WAY_OUT}")
    return meta


def load(path: Path, parts: dict) -> dict:
    """Collective. Fills the template `parts` from the checkpoint at `path`. Raises CheckpointError."""
    try:
        return dist_checkpointing.load(parts, str(path))
    except _MEGATRON_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be loaded ({_first_line(error)}); {_WAY_OUT}") from error


def saved_config(meta: dict) -> Config:
    return config_module.from_tree(meta["config"])


_WAY_OUT = "the folder is damaged: delete it to go on from the checkpoint before it"


def _fresh_folder(folder: Path, draft: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.unfinished"):
        shutil.rmtree(leftover)
    if shutil.disk_usage(folder).free < size:  # said before any rank begins to write
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {size / 2**20:.0f} MiB are needed")
    draft.mkdir()


def _give_up(draft: Path, error: BaseException) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    raise CheckpointError(_cannot_write(draft, error)) from error


def _on_disk(draft: Path, action):
    """`action`, whose failures are a CheckpointError and leave no draft behind."""

    def guarded():
        try:
            action()
        except OSError as error:
            _give_up(draft, error)

    return guarded


def _cannot_write(draft: Path, error: BaseException) -> str:
    try:
        free = f"{shutil.disk_usage(draft.parent).free / 2**20:.0f} MiB free there"
    except OSError:
        free = "the folder cannot be read"
    return (
        f"{draft.parent}: the checkpoint could not be written ({_first_line(error)}; {free}); "
        "earlier checkpoints are whole; free space or change run_dir, then run the same command to resume"
    )


def _first_line(error: BaseException) -> str:
    """What went wrong, without the traces of other ranks that torch puts into its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Errno" in line or "Error:" in line]
    return (causes or lines or [type(error).__name__])[-1 if causes else 0]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
