"""Going on where a run ended: whose folder it is, and what of its checkpoint must not have changed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TextIO

from tidar_mega.checkpoint import state as checkpoint_state
from tidar_mega.checkpoint import store
from tidar_mega.checkpoint.base import SHAPE, Base, tokens
from tidar_mega.checkpoint.hugging_face import setting
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


_MAY_CHANGE = {"seq_length", "seed", "block", "rotary_base"}  # of these, where a new run goes on
_ORDER = ("data.seq_length", "train.seed")  # with the data, what a sample index means
_ANEW = "another run_dir, to start anew or with train.continue_from"


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
                f"give back that corpus, or set {_ANEW}"
            )
        raise CheckpointError(f"{now}: the checkpoint {path} was made with {was}; set them back, or set {_ANEW}")
    _require_same(path, saved, config, _FIXED)
    if base is not None:
        base.check_adapters(path, meta)
    _restore(path, saved, config, state)


def find_origin(config: Config, mesh: Mesh) -> Path | None:
    """Collective. The checkpoint that `train.continue_from` means, the same on every rank. Raises CheckpointError."""
    if config.train.continue_from is None:
        return None
    with _named(config):
        return mesh.same(mesh.on_main(lambda: store.resolve(Path(config.train.continue_from))))


def continue_from(path: Path, config: Config, mesh: Mesh, stream: Samples, state: TrainState) -> None:
    """Collective. As `resume`, for a new run whose data and sequences may be others: it then begins with their first
    sample, else it goes on behind those that the checkpoint was trained on."""
    with _named(config):
        meta = store.shared_meta(path, mesh)
        saved = store.saved_config(path, meta)
        if tokens(path / "tokenizer") != tokens(stream.tokenizer_folder):
            raise CheckpointError(
                f"its tokenizer is not that of data.path = {config.data.path}; prepare the text with it: "
                f"tidar prepare ... --tokenizer {path / 'tokenizer'}"
            )
        _require_same(path, saved, config, {section: set(names) - _MAY_CHANGE for section, names in _FIXED.items()})
        _restore(path, saved, config, state)
    is_same_text = meta["data_fingerprint"] == stream.fingerprint
    if not is_same_text or any(attrgetter(key)(saved) != attrgetter(key)(config) for key in _ORDER):
        state.progress.samples = 0
    state.window = {}  # a log line is of one run


@contextlib.contextmanager
def _named(config: Config) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"train.continue_from = {config.train.continue_from}: {error}") from None


def _require_same(path: Path, saved: Config, config: Config, fixed: dict[str, Iterable[str]]) -> None:
    if saved.method != config.method:
        raise CheckpointError(
            f"method = {config.method}: the checkpoint {path} was made with {saved.method}; set it back, or set "
            "another run_dir, and train.init_from to begin with these weights"
        )
    for section, names in fixed.items():
        for name in names:
            was, now = (getattr(getattr(c, section), name) for c in (saved, config))
            if was != now:
                raise CheckpointError(
                    f"{section}.{setting(name)} = {now}: the checkpoint {path} was made with {was}; "
                    f"set it back, or set {_ANEW}"
                )
    if saved.parallel.distributed_optimizer and not saved.checkpoint.fully_reshardable:
        _check_buckets(path, saved, config)


def _restore(path: Path, saved: Config, config: Config, state: TrainState) -> None:
    is_same_layout = _layout(saved) == _layout(config)
    parts = checkpoint_state.template(state, is_same_layout, saved.checkpoint.fully_reshardable)
    checkpoint_state.restore(state, store.load(path, parts))
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
