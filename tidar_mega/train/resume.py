"""Going on where a run ended: whose folder it is, and what of its checkpoint must not have changed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TextIO

from tidar_mega.checkpoint import state as checkpoint_state
from tidar_mega.checkpoint import store
from tidar_mega.checkpoint.base import SHAPE, Base, setting
from tidar_mega.checkpoint.state import TrainState
from tidar_mega.checkpoint.store import CheckpointError
from tidar_mega.config import Config, LostError, UserError
from tidar_mega.data.stream import Samples
from tidar_mega.parallel.mesh import Mesh
from tidar_mega.train import optim

# Settings that a resume must not change: the shape of the weights and the meaning of the global sample index.
_FIXED = {
    "model": (*SHAPE, "mtp_num_layers"),
    "lora": ["rank", "alpha", "targets"],
    "data": ["seq_length"],
    "train": ["seed", "block"],
    "precision": ["dtype"],
    "parallel": ["distributed_optimizer"],
}


# What decides the order of the weights on a rank, and where they are cut.
_BUCKETS = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "parallel.overlap_grad_reduce",
    "parallel.bucket_size",
    "precision.layers",
    "precision.fp8",
    "precision.fp8_param_gather",
)


def lock_folder(folder: Path, patience_seconds: float = 0.0, waiting: Callable[[], None] = lambda: None) -> TextIO:
    """Held until this process ends: two runs in one folder would delete each other's checkpoints.

    A job that has lost a node may start again while a rank of its own still lives there: it waits for that, and calls
    `waiting` now and then. Raises UserError, or after a wait in vain LostError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"run_dir = {folder}: cannot be written ({error.strerror}); set it to a folder that can"
        ) from None
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(1.0)
                waiting()
                continue
            lock.seek(0)
            used = f"run_dir = {folder}: another run is using it ({lock.read().strip() or 'it does not say which'})"
            if patience_seconds:
                raise LostError(f"{used}, still after {patience_seconds:.0f} s; end that process") from None
            raise UserError(f"{used}; wait for it, end it, or set another") from None
        except OSError as error:  # such as Lustre without -o flock
            print(f"run_dir = {folder}: no locks there ({error.strerror}); see that no second run uses it", flush=True)
            return lock
    with contextlib.suppress(OSError):  # a full disk is told of where it matters
        lock.truncate(0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def resume(
    path: Path, config: Config, mesh: Mesh, stream: Samples, state: TrainState, base: Base | None = None
) -> None:
    """Collective. Fills `state` from the checkpoint at `path`; CheckpointError if that is damaged or of other data or
    shape, or holds adapters of another `base`."""
    meta = store.shared_meta(path, mesh)
    saved = store.saved_config(path, meta)
    if meta["data_fingerprint"] != stream.fingerprint:
        was, now = (f"data.path = {c.data.path}, data.weights = {c.data.weights}" for c in (saved, config))
        if len(config.data.folders) == len(saved.data.folders) == 1 or was == now:
            raise CheckpointError(
                f"data.path = {config.data.path}: its index or tokenizer is not the one that {path} was trained on; "
                "give back that corpus, or set another run_dir to start anew"
            )
        raise CheckpointError(
            f"{now}: the checkpoint {path} was made with {was}; set them back, or set another run_dir, and "
            "train.init_from to begin with these weights"
        )
    if saved.method != config.method:
        raise CheckpointError(
            f"method = {config.method}: the checkpoint {path} was made with {saved.method}; set it back, or set "
            "another run_dir, and train.init_from to begin with these weights"
        )
    for section, names in _FIXED.items():
        for name in names:
            was, now = (getattr(getattr(c, section), name) for c in (saved, config))
            if was != now:
                raise CheckpointError(
                    f"{section}.{setting(name)} = {now}: the checkpoint {path} was made with {was}; "
                    "set it back, or set another run_dir to start anew"
                )
    if base is not None:
        base.check_adapters(path, meta)
    is_reshardable = saved.checkpoint.fully_reshardable
    if saved.parallel.distributed_optimizer and not is_reshardable:
        _check_buckets(path, saved, config)
    same_layout = _layout(saved) == _layout(config)
    checkpoint_state.restore(state, store.load(path, checkpoint_state.template(state, same_layout, is_reshardable)))
    optim.apply_settings(config, state.optimizer)
    state.scheduler.step(0)


def _check_buckets(path: Path, saved: Config, config: Config) -> None:
    """Optimizer state that was saved as the buckets of the distributed optimizer must meet the same buckets."""
    for key in _BUCKETS:
        was, now = (attrgetter(key)(c) for c in (saved, config))
        if was != now:
            raise CheckpointError(
                f"{key} = {now}: the checkpoint {path} was made with {was}, and with checkpoint.fully_reshardable = "
                "false, which loads with another number of replicas alone; set it back, and to change it let the run "
                "save once with checkpoint.fully_reshardable=true before"
            )


def _layout(config: Config) -> tuple[int, int]:
    return config.parallel.pipeline, config.parallel.tensor
