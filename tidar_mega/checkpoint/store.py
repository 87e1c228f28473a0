"""Checkpoints on disk: megatron's distributed format, written under a temporary name and published by a rename.

A published folder `step_00000100` holds megatron's shards, `tokenizer/` and `meta.json`, which lists every file with
its size and checksum. A folder without a published name was never finished and is removed by the next save.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from tidar_mega import config as config_module
from tidar_mega.checkpoint.checksums import changed_files, checksum, take_sum
from tidar_mega.checkpoint.faults import by_rank, fault, first_line, is_of_content
from tidar_mega.checkpoint.state import RANDOM
from tidar_mega.checkpoint.writing import Writer
from tidar_mega.config import Config, UserError
from tidar_mega.config.errors import storage_error
from tidar_mega.parallel.failures import of_communication
from tidar_mega.parallel.mesh import Mesh

FORMAT = 1
_META = "meta.json"
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # what CIFS and some FUSE systems say to that of a folder
_LOOK_EVERY = 100  # waits between two looks at what is being written: 5 s or a little more
_MEGATRON_ERRORS = (Exception, CheckpointException)  # megatron, torch and pickle raise many; torch's is no Exception


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names the folder, the file and what to do."""


class CheckpointStore:
    """The checkpoints of one run, newest last. At most one is being written at a time."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last, self.keep_every = keep_last, keep_every
        self.latest: Path | None = None  # published or being written by this run, or the one it goes on from
        self._writer = Writer()
        self._draft: _Draft | None = None

    def published(self) -> list[Path]:
        """Those of this run, oldest first; a copy that somebody keeps beside them has another name."""
        ours = (p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name))
        return sorted((p for p in ours if (p / _META).is_file()), key=_step)

    def newest(self) -> Path | None:
        return next(reversed(self.published()), None)

    def open(self, mesh: Mesh) -> Path | None:
        """Collective. The newest checkpoint as the main rank sees it, to go on from: folders that are shared over a
        network do not show the same to every rank at once."""
        self.latest = mesh.same(self.newest() if mesh.is_main else None)
        return self.latest

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def begin(self, mesh: Mesh, step: int, parts: dict, meta: dict, tokenizer: Path, size: int) -> None:
        """Collective. Starts to write `parts` (of `state.sharded`, about `size` bytes), which may change on return.

        `finish` publishes them, whole or not at all. Raises CheckpointError on every rank, for example on a
        full disk, or LostError for a fault that may pass; earlier checkpoints stay as they are.
        """
        assert self._draft is None, "one save at a time"
        final = self.path(step)
        draft = _Draft(self.folder / f".{final.name}.unfinished", final, meta, tokenizer)
        mesh.on_main(_on_disk(draft.folder, lambda: _fresh_folder(self.folder, draft.folder, size)))
        try:
            self._writer.begin(parts, str(draft.folder), mesh.sharded_data)
        except _MEGATRON_ERRORS as error:  # of this rank alone, so nothing is exchanged; the launcher ends the others
            _give_up_alone(draft.folder, error)
        self._draft, self.latest = draft, final

    def finish(self, mesh: Mesh, wait: bool, progress: Callable[[], None] = lambda: None) -> Path | None:
        """Collective while a save is in flight, and then cheap: publishes it if all ranks have written their parts, or
        waits until they have. Returns the published folder, or None. `progress` is called while its files grow.

        Raises CheckpointError or LostError, as `begin`, on every rank if one could not write.
        """
        draft = self._draft
        if draft is None:
            return None
        try:
            if not self._writer.finish(wait, _Growth(mesh, draft.folder, progress).look):
                return None
        except CheckpointException as error:  # exchanged by megatron: every rank comes here, and the main one knows why
            self._draft = None
            mesh.on_main(functools.partial(_give_up, draft.folder, error))
        except Exception as error:  # of the main rank alone, which writes megatron's index of the files
            _give_up_alone(draft.folder, error)
        self._draft = None
        mesh.on_main(_on_disk(draft.folder, lambda: self._publish(draft)))
        return draft.final

    def _publish(self, draft: _Draft) -> None:
        folder = draft.folder
        copy_files(draft.tokenizer, folder / "tokenizer")
        sums = {path: take_sum(path) for path in sorted(folder.glob("*.distcp"))}
        flushed = {path: _flush(path) for path in sorted(folder.rglob("*"))}
        files = {str(path.relative_to(folder)): path for path in flushed if path.is_file()}
        about = {
            "files": {name: flushed[path] for name, path in files.items()},
            "crc32": {name: sums.get(path) or checksum(path) for name, path in files.items()},
        }
        (folder / _META).write_text(json.dumps({"format": FORMAT, **draft.meta, **about}, indent=1))
        _flush(folder / _META)
        _flush(folder)
        assert not (draft.final / _META).exists(), "a published checkpoint is never written again"
        if draft.final.exists():  # half deleted by somebody, so this run went on from an earlier one
            _take_away(draft.final)
        folder.rename(draft.final)
        _flush(self.folder)
        for old in self.published()[: -self.keep_last]:
            if not self.keep_every or _step(old) % self.keep_every:
                _take_away(old)


class _Growth:
    """Whether what is being written still grows: a big checkpoint takes long, and a dead disk for ever. The main rank
    looks and tells the others: the files are as many as the ranks, too many for each of them to ask for."""

    def __init__(self, mesh: Mesh, folder: Path, grown: Callable[[], None]) -> None:
        self.mesh, self.folder, self.grown = mesh, folder, grown
        self.size, self.waits = -1, 0

    def look(self) -> None:
        """Collective: all ranks wait equally often."""
        self.waits += 1
        if self.waits % _LOOK_EVERY:
            return
        size = self.mesh.same(self._measure() if self.mesh.is_main else None)
        if size != self.size:
            self.size = size
            self.grown()

    def _measure(self) -> int:
        with contextlib.suppress(OSError):  # a network file system may lose sight of a file: no reason to give up
            return sum(path.stat().st_size for path in self.folder.glob("*.distcp"))
        return self.size


@dataclass(frozen=True)
class _Draft:
    """A checkpoint that is being written: where, under which name it will be published, and what is added then."""

    folder: Path
    final: Path
    meta: dict
    tokenizer: Path


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of the run folder. Raises CheckpointError."""
    if (path / _META).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        newest = CheckpointStore(folder, keep_last=1).newest()
        if newest is not None:
            return newest
    raise CheckpointError(f"{path}: no checkpoint there; give a run folder or one of its checkpoints/step_* folders")


def shared_meta(path: Path, mesh: Mesh) -> dict:
    """Collective. What `read_meta` gives the main rank: the files are as many as the ranks, too many for each to ask
    for."""
    return mesh.same(mesh.on_main(lambda: read_meta(path)))


def read_meta(path: Path) -> dict:
    """`meta.json`, after every file that it lists was found with its size. Raises CheckpointError, or LostError where
    the storage does not answer."""
    try:
        meta = _parse_meta(path)
        _check_files(path, meta["files"])
        return meta
    except OSError as error:
        said = f"{error.filename or path}: cannot be read ({error.strerror})"
        raise storage_error(error, CheckpointError, said, _READABLE) from None


def _parse_meta(path: Path) -> dict:
    try:
        meta = json.loads((path / _META).read_text())
        files = meta["files"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / _META}: cannot be read ({error}); {_WAY_OUT}") from None
    if meta.get("format") != FORMAT:
        found = meta.get("format")
        raise CheckpointError(f"{path}: checkpoint format {found}, this version reads {FORMAT}; convert or retrain it")
    if "common.pt" not in files and "common_strategy" in inspect.signature(dist_checkpointing.load).parameters:
        raise CheckpointError(
            f"{path}: written with a newer megatron-core than {version('megatron-core')}, which looks for a common.pt "
            "there; install megatron-core 0.19 (Python 3.12), which reads both kinds"
        )
    return meta


def _check_files(path: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{file}: {state}; {_WAY_OUT}")


def load(path: Path, parts: dict) -> dict:
    """Collective. Fills the template `parts` from the checkpoint at `path`. Raises CheckpointError if it is damaged or
    another model's, LostError where the storage does not give it; what is no matter of its files passes unchanged.

    Every tensor of `parts` must be in the checkpoint, and every weight of the checkpoint (with optimizer state in
    `parts`: every tensor) must be asked for by some rank. With optimizer state, nearly all is read, and the checksums
    of all files are compared.
    """
    try:
        if _match(path, parts):
            for name in changed_files(path, _parse_meta(path).get("crc32", {})):  # none from before they were kept
                raise CheckpointError(f"{path / name}: not what was written there, its checksum is another; {_WAY_OUT}")
        with torch.no_grad():  # else megatron-core 0.19 reads into the FP8 weights themselves, piece by piece
            force_all_tensors_to_non_fp8(parts)
        return dist_checkpointing.load(parts, str(path))
    except _MEGATRON_ERRORS as error:
        causes = by_rank(error)
        if isinstance(error, UserError) or any(map(of_communication, causes)):
            raise
        if (found := fault(error)) is not None:
            said = f"{path}: cannot be read ({first_line(error)})"
            raise storage_error(found, CheckpointError, said, _READABLE) from error
        if not all(map(is_of_content, causes)):
            raise
        raise CheckpointError(f"{path}: cannot be loaded ({first_line(error)}); {_WAY_OUT}") from error


def _match(path: Path, parts: dict) -> bool:
    """Raises CheckpointError on every rank if the tensors on disk are not those of `parts`; says if optimizer state is
    among them. Takes out of `parts` the FP8 states that the checkpoint of a model without FP8 lacks."""
    ranks = [None] * dist.get_world_size()
    tensors, _ = extract_sharded_base(load_preprocess(parts)[0])
    dist.all_gather_object(ranks, {part.key for part in nested_values(tensors)})
    wanted = set().union(*ranks)
    found = {part.key for part in load_sharded_metadata(str(path)).values()}
    absent = wanted - found
    for name, weights in parts.items():
        if name.startswith("model"):
            parts[name] = {k: w for k, w in weights.items() if not (_is_fp8_state(w.key) and w.key in absent)}
    absent = {key for key in absent if not _is_fp8_state(key)}
    has_optimizer = any(key.startswith(_OPTIMIZER) for key in wanted)
    surplus = {
        key
        for key in found - wanted
        if key not in (RANDOM, _COMMON) and not _is_fp8_state(key) and (has_optimizer or not key.startswith(_OPTIMIZER))
    }
    if absent or surplus:
        raise CheckpointError(
            f"{path}: its tensors are not those of this model: {_some(absent)} missing in the checkpoint, "
            f"{_some(surplus)} that the model does not have; give back the model settings that it was made with "
            "(config.yaml of its run), or set another run_dir to start anew"
        )
    return has_optimizer


_OPTIMIZER = "optimizer."
_COMMON = "common_state"  # what is no tensor; a file of its own with megatron-core before 0.19


def _is_fp8_state(key: str) -> bool:
    return key.endswith("._extra_state")


def _some(keys: set[str], most: int = 3) -> str:
    named = ", ".join(sorted(keys)[:most])
    return f"{len(keys)} ({named}{', ...' if len(keys) > most else ''})" if keys else "none"


def saved_config(path: Path, meta: dict) -> Config:
    """The settings that the checkpoint at `path` was made with. Raises CheckpointError."""
    try:
        return config_module.from_tree(meta["config"])
    except config_module.ConfigError as error:
        raise CheckpointError(f"{path / _META}: it has settings of another version of tidar_mega: {error}") from None


_WAY_OUT = "the folder is damaged: delete it to go on from the checkpoint before it"
_READABLE = "make it readable for this user"


def copy_files(source: Path, target: Path) -> None:
    """Contents without modes: in a copy of a read-only folder that shutil.copytree makes, nothing can be deleted."""
    target.mkdir()
    for path in source.iterdir():
        (copy_files if path.is_dir() else shutil.copyfile)(path, target / path.name)


def _take_away(folder: Path) -> None:
    """Deletes a folder, first renamed: a kill in the middle leaves no half checkpoint. What cannot be deleted stays
    under a name that the next save tries again."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.{time.time_ns()}.unfinished")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _fresh_folder(folder: Path, draft: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)  # one that stays costs room, and no run
    if draft.exists():
        _take_away(draft)
    if shutil.disk_usage(folder).free < size:  # said before any rank begins to write
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {size / 2**20:.0f} MiB are needed")
    draft.mkdir()


def _give_up(draft: Path, error: BaseException) -> NoReturn:
    shutil.rmtree(draft, ignore_errors=True)
    said = _cannot_write(draft, error)
    mend = "free space or change run_dir, then run the same command to resume"
    raise storage_error(fault(error), CheckpointError, said, mend) from error


def _give_up_alone(draft: Path, error: BaseException) -> NoReturn:
    """On a rank that meets `error` while the others know nothing of it."""
    if fault(error) is not None or "PytorchStreamWriter" in str(error):  # torch's own writer does not say why
        _give_up(draft, error)
    raise error


def _on_disk(draft: Path, action):
    """`action`, whose failures are a CheckpointError or LostError and leave no draft behind."""

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
        f"{draft.parent}: the checkpoint could not be written ({first_line(error)}; {free}); "
        "earlier checkpoints are whole"
    )


def _flush(path: Path) -> int:
    """Returns the size in bytes of the open file: by name, NFS may tell an older one of what another node wrote."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FSYNC or not path.is_dir():
                raise
        return os.fstat(handle).st_size
    finally:
        os.close(handle)
