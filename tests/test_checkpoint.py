"""Checkpoints: a resume is bit for bit the run that never stopped; damage is named; no half is published.

The starts of processes are most of the time of these tests, so those of one world size share one world where they can.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from tests import processes
from tests.steps import MASK, SEQUENCES, VOCAB, Text, settings
from tidar_mega import config as config_module
from tidar_mega.checkpoint import store, writing
from tidar_mega.checkpoint.store import CheckpointError, CheckpointStore
from tidar_mega.config import LostError
from tidar_mega.train import metrics
from tidar_mega.train.resume import _check_buckets

pytestmark = pytest.mark.distributed


class Trainer:
    """The parts of a run on a rank, stepping over endless text."""

    def __init__(self, config: config_module.Config, folder: Path, keep_last: int = 2) -> None:
        from tidar_mega import methods
        from tidar_mega.checkpoint.state import Progress, TrainState
        from tidar_mega.model import gpt
        from tidar_mega.parallel.mesh import build_mesh
        from tidar_mega.train import optim
        from tidar_mega.train.step import Task

        self.config, self.mesh = config, build_mesh(config)
        chunks = optim.wrap(config, gpt.build(config, VOCAB))
        optimizer = optim.build_optimizer(config, chunks)
        self.state = TrainState(chunks, optimizer, optim.build_scheduler(config, optimizer), Progress())
        self.task = Task(config, self.mesh, methods.load(config, MASK), chunks, torch.ones(VOCAB))
        self.folder = folder
        self.checkpoints = CheckpointStore(folder / "checkpoints", keep_last)

    def steps(self, count: int) -> list[tuple[float, float]]:
        from tidar_mega.train import optim
        from tidar_mega.train.step import accumulate_gradients, micro_batches, summarise

        figures = []
        for _ in range(count):
            progress = self.state.progress
            batch = list(micro_batches(self.task, Text, progress.samples, SEQUENCES))
            loss = summarise(self.task, accumulate_gradients(self.task, batch))["loss"]
            norm = optim.update(self.state.optimizer, self.config.optimizer.clip_grad)
            self.state.scheduler.step(1)
            progress.step += 1
            progress.samples += SEQUENCES
            figures.append((loss, norm))
        return figures

    def begin(self, check_size: bool = True) -> None:
        from tidar_mega.checkpoint import state

        meta = {"config": config_module.to_tree(self.config), "vocab_size": VOCAB}
        tokenizer = self.folder / "tokenizer"
        size = state.size_bytes(self.state) if check_size else 0
        step = self.state.progress.step
        parts = state.sharded(self.state, self.config.checkpoint.fully_reshardable)
        self.checkpoints.begin(self.mesh, step, parts, meta, tokenizer, size)

    def save(self, check_size: bool = True) -> Path:
        self.begin(check_size)
        return self.checkpoints.finish(self.mesh, wait=True)

    def load(self, path: Path) -> None:
        from tidar_mega.checkpoint import state

        saved = store.saved_config(path, store.read_meta(path))
        parts = state.template(self.state, saved.parallel == self.config.parallel, saved.checkpoint.fully_reshardable)
        state.restore(self.state, store.load(path, parts))

    @property
    def writer(self):
        """The process of this rank that writes."""
        return self.checkpoints._writer.calls.async_calls[0].async_caller.process


def in_turn(rank: int, jobs: list[tuple]) -> list:
    """Several test functions in one world: the results of (function, *arguments) for each."""
    return [function(rank, *arguments) for function, *arguments in jobs]


def run_in_turn(count: int, jobs: dict[str, tuple]) -> dict[str, list]:
    """name -> what the ranks returned."""
    ranks = processes.run(in_turn, count, list(jobs.values()), timeout_seconds=600)
    return {name: [results[i] for results in ranks] for i, name in enumerate(jobs)}


def make_folder(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path)


def layout(dtype="fp32", layers=2, fully_reshardable=True, **parallel):
    return settings(
        checkpoint={"fully_reshardable": fully_reshardable},
        model={"num_layers": layers},
        precision={"dtype": dtype},
        parallel=parallel,
        train={"micro_batch_size": 1},
        optimizer={"warmup_steps": 2},
    )


# Resumes


def save_in_the_middle(rank: int, config, folder: Path, before: int = 3):
    trainer = Trainer(config, folder)
    trainer.steps(before)
    return trainer.save(), trainer.steps(3)


def resume(rank: int, config, path: Path):
    """The figures of three steps after a load, and the step tensors of the optimizer: (how many, their values)."""
    trainer = Trainer(config, path.parent.parent)
    trainer.steps(1)  # a restart may have state that the load must replace
    trainer.load(path)
    figures = trainer.steps(3)
    inner = trainer.state.optimizer.chained_optimizers[0].optimizer
    counts = [state["step"] for state in inner.state.values()]
    return figures, len({c.data_ptr() for c in counts}) == len(counts), {int(c) for c in counts}


TWO_RANKS = {
    "fp32, data 2": layout(data=2),
    "bf16, data 2": layout("bf16", data=2),
    "bf16, data 2, plain optimizer": layout("bf16", data=2, distributed_optimizer=False),
    "bf16, tensor 2": layout("bf16", tensor=2),
    "bf16, data 2, overlapped": layout("bf16", data=2, overlap_grad_reduce=True, overlap_param_gather=True),
    "bf16, data 2, in buckets": layout("bf16", data=2, fully_reshardable=False),
    "fp32, context 2, in overlapped buckets": layout(
        fully_reshardable=False,
        context=2,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=2000,
    ),
    "bf16, four chunks, in buckets": layout("bf16", layers=4, pipeline=2, virtual_pipeline=2, fully_reshardable=False),
    "fp32, tensor 2": layout(tensor=2),
    "fp32, four chunks": layout(layers=4, pipeline=2, virtual_pipeline=2),
    "bf16, four chunks, plain optimizer": layout(
        "bf16", layers=4, pipeline=2, virtual_pipeline=2, distributed_optimizer=False
    ),
}
OTHER_LAYOUTS = {  # saved under, loaded under
    "data 2 -> 1": ("fp32, data 2", 1, layout()),
    "data 2 -> tensor 2": ("fp32, data 2", 2, layout(tensor=2)),
    "tensor 2 -> 1": ("fp32, tensor 2", 1, layout()),
    "tensor 2 -> data 2": ("fp32, tensor 2", 2, layout(data=2)),
    "in buckets, data 2 -> 1": ("bf16, data 2, in buckets", 1, layout("bf16")),
    "in buckets, context 2 -> data 2": (
        "fp32, context 2, in overlapped buckets",
        2,
        layout(data=2, overlap_grad_reduce=True, bucket_size=2000),
    ),
    "1 -> tensor 2": ("alone", 2, layout(tensor=2)),
    "1 -> data 2": ("alone", 2, layout(data=2)),
    "four chunks -> 1": ("fp32, four chunks", 1, layout(layers=4)),
    "four chunks -> two, tensor 1 -> 2": ("fp32, four chunks", 2, layout(layers=4, tensor=2)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, list]:
    """name -> (path, figures of the steps after it) of each rank."""
    where = {name: make_folder(tmp_path_factory.mktemp("saved")) for name in [*TWO_RANKS, "alone", "at step 0"]}
    jobs = {name: (save_in_the_middle, config, where[name]) for name, config in TWO_RANKS.items()}
    one = {
        "alone": (save_in_the_middle, layout(), where["alone"]),
        "at step 0": (save_in_the_middle, layout(), where["at step 0"], 0),
    }
    return {**run_in_turn(2, jobs), **run_in_turn(1, one)}


@pytest.fixture(scope="module")
def resumed(saved) -> dict[str, list]:
    jobs = {1: {"at step 0": (resume, layout(), saved["at step 0"][0][0])}, 2: {}}
    for name, config in TWO_RANKS.items():
        jobs[2][name] = (resume, config, saved[name][0][0])
    for name, (origin, count, config) in OTHER_LAYOUTS.items():
        jobs[count][name] = (resume, config, saved[origin][0][0])
    return {**run_in_turn(1, jobs[1]), **run_in_turn(2, jobs[2])}


@pytest.mark.parametrize("name", [*TWO_RANKS, "at step 0"])
def test_a_resume_is_bit_for_bit_the_run_that_never_stopped(name, saved, resumed):
    for (_, expected), (got, _, _) in zip(saved[name], resumed[name], strict=True):
        assert got == expected


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_any_layout_goes_on_from_any_other(name, saved, resumed):
    _, expected = saved[OTHER_LAYOUTS[name][0]][0]
    for got, _, _ in resumed[name]:
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", [*TWO_RANKS, *OTHER_LAYOUTS])
def test_after_a_load_every_parameter_counts_its_own_steps(name, resumed):
    """torch's AdamW would count a shared step once for each parameter."""
    for _, apart, counts in resumed[name]:
        assert apart and counts == {6}


def load_as_megatron_would(rank: int, path: Path) -> str:
    from megatron.core import dist_checkpointing

    from tidar_mega.checkpoint import state

    trainer = Trainer(layout(), path.parent.parent)
    loaded = dist_checkpointing.load(state.template(trainer.state, True, True), str(path))
    try:
        trainer.state.optimizer.load_state_dict(loaded["optimizer"])
    except KeyError as error:
        return str(error)
    counts = [s["step"] for s in trainer.state.optimizer.chained_optimizers[0].optimizer.state.values()]
    return f"{len({c.data_ptr() for c in counts})} of {len(counts)}"


def refuse(rank: int, path: Path, model: dict) -> str:
    """What is said when a checkpoint is loaded into another model."""
    from tidar_mega.checkpoint import state

    config = config_module.from_tree({**config_module.to_tree(layout()), "model": model})
    trainer = Trainer(config, path.parent.parent)
    with pytest.raises(CheckpointError) as error:
        store.load(path, state.template(trainer.state, True, True))
    return str(error.value)


def weights_alone(rank: int, path: Path) -> bool:
    """What decoding does: the optimizer of the checkpoint is left there."""
    from tidar_mega.checkpoint import state

    trainer = Trainer(layout(), path.parent.parent)
    (chunk,) = trainer.state.chunks
    before = {n: p.detach().clone() for n, p in chunk.module.named_parameters()}
    loaded = store.load(path, state.sharded_weights(chunk.module))["model"]
    assert all(not torch.equal(loaded[n], p) for n, p in before.items() if p.dim() > 1)
    trainer.load(path)
    return all(torch.equal(loaded[n], p) for n, p in chunk.module.named_parameters())


def save_often(rank: int, folder: Path):
    trainer = Trainer(layout(), folder)
    paths = []
    for _ in range(4):
        trainer.steps(1)
        paths.append(trainer.save())
    return [p.exists() for p in paths]


def save_often_beside_the_training(rank: int, folder: Path):
    """A save at every step: which of the four folders are there after each."""
    trainer = Trainer(layout(), folder)
    seen = []
    for _ in range(4):
        trainer.steps(1)
        trainer.checkpoints.finish(trainer.mesh, wait=True)
        trainer.begin()
        seen.append([int(p.name[-1]) for p in trainer.checkpoints.published()])
    trainer.checkpoints.finish(trainer.mesh, wait=True)
    return [*seen, [int(p.name[-1]) for p in trainer.checkpoints.published()]]


def flip(data: bytes) -> bytes:
    """With one bit in the middle turned."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGED = {  # files, what becomes of their contents, and words of the message
    "empty shard": ("*.distcp", lambda data: bytes(len(data)), "not what was written there, its checksum is another"),
    "a turned bit": ("*.distcp", flip, "not what was written there, its checksum is another"),
    "damaged index": (".metadata", lambda data: bytes(len(data)), "cannot be loaded"),
}


def damaged(path: Path, folder: Path, what: str) -> Path:
    """A copy of a checkpoint in which files have their sizes and other contents."""
    path = Path(shutil.copytree(path, folder / what / path.name))
    files, change, _ = DAMAGED[what]
    for victim in path.glob(files):
        victim.write_bytes(change(victim.read_bytes()))
    return path


@pytest.fixture(scope="module")
def alone(saved, tmp_path_factory) -> dict[str, list]:
    """What one process does besides: all in one world."""
    path = saved["alone"][0][0]
    model = config_module.to_tree(layout())["model"]
    often, beside = (make_folder(tmp_path_factory.mktemp("often")) for _ in range(2))
    leftover = often / "checkpoints" / ".step_00000002.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half a shard")
    jobs = {
        # first, as the first load of `torch_adam` mends megatron
        "megatron": (load_as_megatron_would, path),
        "more tensors": (refuse, path, {**model, "add_qkv_bias": True}),
        "fewer tensors": (refuse, path, {**model, "qk_layernorm": False}),
        "another shape": (refuse, path, {**model, "ffn_hidden_size": 128}),
        **{name: (refuse, damaged(path, often, name), model) for name in DAMAGED},
        "weights": (weights_alone, path),
        "often": (save_often, often),
        "beside": (save_often_beside_the_training, beside),
    }
    return {**run_in_turn(1, jobs), "leftover": [leftover.exists()]}


def test_megatrons_own_load_of_adamw_still_needs_mending(alone):
    assert alone["megatron"] == ["'step'"]


def test_missing_and_unexpected_tensors_are_named_and_counted(alone):
    (more,), (fewer,) = alone["more tensors"], alone["fewer tensors"]
    # a bias, and three tensors of the optimizer for it
    assert "4 (decoder.layers.self_attention.linear_qkv.bias, optimizer.state.exp_avg.decoder.layers" in more
    assert "missing in the checkpoint, none that the model does not have" in more
    assert "none missing in the checkpoint, 8 (decoder.layers.self_attention.k_layernorm.weight, " in fewer
    assert "give back the model settings" in more and "give back the model settings" in fewer


def test_another_shape_is_one_clear_error(alone):
    (said,) = alone["another shape"]
    assert "shape mismatch" in said.lower() and "linear_fc" in said


@pytest.mark.parametrize("what", DAMAGED)
def test_what_a_damaged_file_holds_is_called_so(what, alone):
    (said,) = alone[what]
    assert DAMAGED[what][2] in said and "delete it to go on from the checkpoint before it" in said


def test_weights_load_without_the_optimizer(alone):
    assert alone["weights"] == [True]


def test_only_the_last_checkpoints_are_kept_and_leftovers_go(alone):
    assert alone["often"] == [[False, False, True, True]]
    assert alone["leftover"] == [False]


def test_a_save_waits_for_the_one_before_it_and_the_last_ones_are_kept(alone):
    assert alone["beside"] == [[[], [1], [1, 2], [2, 3], [3, 4]]]


# Damage


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    path = saved["alone"][0][0]
    return Path(shutil.copytree(path, tmp_path / "checkpoints" / path.name))


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("*.distcp")), key=lambda p: p.stat().st_size)


def test_a_truncated_file_is_named_with_its_sizes(copy):
    victim = largest(copy)
    size = victim.stat().st_size
    os.truncate(victim, size // 2)
    with pytest.raises(CheckpointError, match=rf"{victim.name}: has {size // 2} bytes instead of {size}"):
        store.read_meta(copy)


def test_a_missing_file_and_a_foreign_format_are_named(copy):
    meta = copy / "meta.json"
    text = meta.read_text()
    meta.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99"):
        store.read_meta(copy)
    meta.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"meta\.json: cannot be read"):
        store.read_meta(copy)
    meta.write_text(text)
    largest(copy).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        store.read_meta(copy)


def test_a_checkpoint_of_a_newer_megatron_is_not_called_damaged(copy):
    if not (copy / "common.pt").exists():
        pytest.skip("this megatron-core reads both kinds")
    (copy / "common.pt").unlink()
    meta = json.loads((copy / "meta.json").read_text())
    del meta["files"]["common.pt"]
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"written with a newer megatron-core than 0\.16"):
        store.read_meta(copy)


def test_resolve_takes_a_run_its_checkpoints_or_one_of_them(copy, tmp_path):
    (tmp_path / "checkpoints" / ".step_00000009.unfinished").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", copy):
        assert store.resolve(path) == copy
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        store.resolve(tmp_path / "none")


# Writing beside the training


@contextmanager
def held_writers(release: Path):
    """The writers that are forked in here wait for `release` to be made; stopping them from outside could be late."""

    def write(*args):
        while not release.exists():
            time.sleep(0.01)
        return write_file(*args)

    write_file = writing._write_file
    with mock.patch.object(writing, "_write_file", write):
        yield


def train_during_a_write(rank: int, config, folder: Path):
    """Three steps while the writers of step 3 are held: (figures, what was published meanwhile, in the end)."""
    trainer = Trainer(config, folder)
    trainer.steps(3)
    release = folder / "release"
    with held_writers(release):
        trainer.begin()
    figures, meanwhile = [], []
    for _ in range(3):
        meanwhile.append(trainer.checkpoints.finish(trainer.mesh, wait=False))
        figures += trainer.steps(1)
    meanwhile += trainer.checkpoints.published()
    dist.barrier()
    release.touch()
    return figures, meanwhile, trainer.checkpoints.finish(trainer.mesh, wait=True)


def kill_a_writer(rank: int, folder: Path):
    trainer = Trainer(layout(data=2), folder)
    trainer.steps(1)
    first = trainer.save()
    trainer.steps(1)
    release = folder / "release"
    with held_writers(release):
        trainer.begin()
    if rank == 1:
        os.kill(trainer.writer.pid, signal.SIGKILL)
    dist.barrier()
    release.touch()
    with pytest.raises(LostError) as error:
        trainer.checkpoints.finish(trainer.mesh, wait=True)
    store.read_meta(first)
    return str(error.value), [p.name for p in (folder / "checkpoints").iterdir()]


def watch_a_write(rank: int, folder: Path):
    """How often this rank has looked at the files, and how often it was told that they had grown."""
    looks, told = [], []
    growth = store._Growth(Trainer(layout(data=2), folder).mesh, folder, lambda: told.append(rank))
    measure = growth._measure
    growth._measure = lambda: looks.append(rank) or measure()
    for size in (1, 2, 2, 3):
        if rank == 0:
            (folder / "__1_0.distcp").write_bytes(bytes(size))
        for _ in range(store._LOOK_EVERY):
            growth.look()
    return len(looks), len(told)


DURING = ("fp32, data 2", "bf16, data 2", "bf16, data 2, plain optimizer", "bf16, tensor 2", "fp32, four chunks")


@pytest.fixture(scope="module")
def during(tmp_path_factory) -> dict[str, list]:
    where = {name: make_folder(tmp_path_factory.mktemp("during")) for name in [*DURING, "killed", "watched"]}
    jobs = {name: (train_during_a_write, TWO_RANKS[name], where[name]) for name in DURING}
    jobs["watched"] = (watch_a_write, where["watched"])
    return run_in_turn(2, {**jobs, "killed": (kill_a_writer, where["killed"])})


@pytest.fixture(scope="module")
def after(during) -> dict[str, list]:
    return run_in_turn(2, {name: (resume, TWO_RANKS[name], during[name][0][2]) for name in DURING})


@pytest.mark.parametrize("name", DURING)
def test_training_goes_on_during_a_write_which_holds_the_step_at_which_it_began(name, during, after, saved):
    for (figures, meanwhile, path), (got, _, _) in zip(during[name], after[name], strict=True):
        assert meanwhile == [None, None, None] and path.name == "step_00000003"
        assert got == figures
    assert [figures for figures, _, _ in during[name]] == [figures for _, figures in saved[name]]


def test_a_killed_writer_is_an_error_on_every_rank_and_costs_nothing(during):
    for said, left in during["killed"]:
        assert "ended by SIGKILL" in said and "earlier checkpoints are whole" in said and "is requeued" in said
        assert left == ["step_00000001"]


def test_one_rank_looks_whether_a_checkpoint_grows_and_all_are_told(during):
    assert during["watched"] == [(4, 3), (0, 3)]


# A full disk


def fill_the_disk(rank: int, folder: Path, how: str):
    """Saves once, then again with no room left; returns what was said, and if the first is all that is published."""
    trainer = Trainer(layout(data=2), folder)
    trainer.steps(1)
    first = trainer.save()
    if rank == 0:
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(b"\0" * max(0, free - 100_000))
    dist.barrier()
    trainer.steps(1)
    try:
        trainer.begin(check_size=how == "seen before")
        while how == "met beside the training" and trainer.checkpoints.finish(trainer.mesh, wait=False) is None:
            trainer.steps(1)
        trainer.checkpoints.finish(trainer.mesh, wait=True)
    except CheckpointError as error:
        store.read_meta(first)  # raises if a file is not whole
        said, published = str(error), trainer.checkpoints.published() == [first]
        dist.barrier()
        if rank == 0:
            shutil.rmtree(first)
            (folder / "ballast").unlink()
        dist.barrier()
        return said, published
    return "nothing was said", False


HOW = ("seen before", "met while writing", "met beside the training")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    small = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        make_folder(small)
        results = run_in_turn(2, {how: (fill_the_disk, small, how) for how in HOW})
        yield results, [p.name for p in (small / "checkpoints").iterdir()]
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("how", HOW)
def test_a_full_disk_is_one_clear_error_on_every_rank_and_costs_nothing(how, full):
    results, left = full
    for said, intact in results[how]:
        assert "No space left on device" in said and "earlier checkpoints are whole" in said
        assert intact
    assert left == []


# Faults of storage


LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
PASSING = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOENT)


def fault(code: int) -> OSError:
    return OSError(code, os.strerror(code), "a file")


def fails(error: BaseException):
    def action(*args, **kwargs):
        raise error

    return action


def of_another_rank(error: BaseException) -> CheckpointException:
    """How megatron hands on what a writing process of rank 1 has met: only its text is left."""
    return CheckpointException("write", {1: (RuntimeError(f"Worker failure: {error}"), None)})


def say(action) -> CheckpointError | LostError:
    with pytest.raises((CheckpointError, LostError)) as error:
        action()
    assert isinstance(error.value, LostError) == ("is requeued" in str(error.value))
    return error.value


@pytest.mark.parametrize("code", [*LASTING, *PASSING], ids=errno.errorcode.get)
def test_only_a_fault_that_may_pass_lets_the_run_start_again(code, tmp_path, monkeypatch):
    expected = CheckpointError if code in LASTING else LostError
    draft = tmp_path / ".step_00000001.unfinished"
    assert type(say(store._on_disk(draft, fails(fault(code))))) is expected
    assert type(say(lambda: store._give_up(draft, of_another_rank(fault(code))))) is expected
    monkeypatch.setattr(store, "_match", lambda path, parts: None)
    for error in (fault(code), CheckpointException("read", {0: (fault(code), None)})):
        monkeypatch.setattr(store.dist_checkpointing, "load", fails(error))
        said = say(lambda: store.load(tmp_path, {}))
        assert type(said) is expected and "damaged" not in str(said)
    with pytest.raises(config_module.UserError, match=os.strerror(code)) as error, metrics._writing(tmp_path):
        raise fault(code)
    assert isinstance(error.value, LostError) == (code in PASSING)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_checkpoint_that_the_storage_does_not_give_is_not_called_damaged(code, copy, monkeypatch):
    monkeypatch.setattr(Path, "read_text", fails(fault(code)))
    said = say(lambda: store.read_meta(copy))
    assert isinstance(said, LostError) == (code == errno.EIO) and "damaged" not in str(said)


OTHERS = {
    "out of a GPU's memory": torch.OutOfMemoryError("CUDA out of memory"),
    "out of memory": MemoryError(),
    "CUDA": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "NCCL": RuntimeError("NCCL error: unhandled system error"),
    "a mistake of ours": AttributeError("no attribute"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_matter_of_the_files_passes_a_load_unchanged(name, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_match", lambda path, parts: None)
    for error in (OTHERS[name], CheckpointException("read", {0: (KeyError("x"), None), 1: (OTHERS[name], None)})):
        monkeypatch.setattr(store.dist_checkpointing, "load", fails(error))
        with pytest.raises(type(error)) as raised:
            store.load(tmp_path, {})
        assert raised.value is error
    for error in (CheckpointingException("x"), pickle.UnpicklingError("x"), RuntimeError("PytorchStreamReader failed")):
        monkeypatch.setattr(store.dist_checkpointing, "load", fails(error))
        with pytest.raises(CheckpointError, match="the folder is damaged"):
            store.load(tmp_path, {})


def test_a_writer_that_is_killed_before_or_in_its_answer_is_lost(tmp_path):
    results = writing._Results()
    results.put({0: ["x" * 100]})
    os.truncate(results.file.fileno(), 50)
    for said in (results.get_nowait(), results.get_nowait()):  # a part, nothing
        assert isinstance(said, ChildProcessError)
        assert isinstance(say(lambda said=said: store._give_up(tmp_path / "draft", of_another_rank(said))), LostError)


def draft_of(folder: Path, step: int) -> store._Draft:
    """A checkpoint in `folder`/checkpoints as it is when all ranks have written."""
    final = folder / "checkpoints" / f"step_{step:08d}"
    draft = store._Draft(final.with_name(f".{final.name}.unfinished"), final, {}, folder / "tokenizer")
    store._fresh_folder(draft.folder.parent, draft.folder, 0)
    (draft.folder / "__0_0.distcp").write_bytes(b"123")
    return draft


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def save_as_nobody(folder: Path) -> None:
    os.setuid(65534)
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1)
    for step in (1, 2, 3):
        checkpoints._publish(draft_of(folder, step))
    assert names(folder)[-1] == "step_00000003" and len(names(folder)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_read_only_corpus_and_a_leftover_that_cannot_be_deleted_end_no_run():
    with tempfile.TemporaryDirectory() as name:  # those of pytest are root's alone
        folder = make_folder(Path(name))
        (folder / "tokenizer").chmod(0o555)
        locked = folder / "checkpoints" / ".step_00000002.unfinished" / "tokenizer"
        locked.mkdir(parents=True)
        (locked / "tokenizer.json").touch()
        for path in (folder, folder / "checkpoints", locked.parent):
            os.chown(path, 65534, 65534)
        process = multiprocessing.get_context("fork").Process(target=save_as_nobody, args=(folder,))
        process.start()
        process.join(60)
        assert process.exitcode == 0


def test_the_sizes_of_a_checkpoint_are_those_of_the_open_files(folder, monkeypatch):
    draft, stat = draft_of(folder, 1), Path.stat

    def old(path, **kwargs):
        """As NFS may show what another node has written."""
        found = stat(path, **kwargs)
        return os.stat_result((*found[:6], 1, *found[7:10])) if path.suffix == ".distcp" else found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", old)
        CheckpointStore(folder / "checkpoints", keep_last=1)._publish(draft)
    files = json.loads((draft.final / "meta.json").read_text())["files"]
    assert files == {"__0_0.distcp": 3, "tokenizer/tokenizer.json": 2}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_fsync_folders_is_good_enough(code, folder, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: fails(fault(code))() if os.path.isdir(file) else fsync(file))
    CheckpointStore(folder / "checkpoints", keep_last=1)._publish(draft_of(folder, 1))
    assert names(folder) == ["step_00000001"]
    monkeypatch.setattr(os, "fsync", fails(fault(code)))
    with pytest.raises(OSError, match=os.strerror(code)):
        store._flush(folder / "tokenizer" / "tokenizer.json")


def test_a_half_deleted_checkpoint_gives_way_to_the_new_one_of_its_step(folder):
    half = folder / "checkpoints" / "step_00000002"
    half.mkdir(parents=True)
    (half / "__1_0.distcp").write_bytes(b"old")
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=2)
    for step in (1, 2):
        checkpoints._publish(draft_of(folder, step))
    assert names(folder) == ["step_00000001", "step_00000002"] and not (half / "__1_0.distcp").exists()
    with pytest.raises(AssertionError, match="never written again"):
        checkpoints._publish(draft_of(folder, 2))


def test_a_copy_that_somebody_keeps_is_no_checkpoint_of_the_run(folder):
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1)
    checkpoints._publish(draft_of(folder, 1))
    for name in ("step_00000001.best", "step_00000001_backup"):
        shutil.copytree(folder / "checkpoints" / "step_00000001", folder / "checkpoints" / name)
    assert checkpoints.newest().name == "step_00000001"
    checkpoints._publish(draft_of(folder, 2))
    assert names(folder) == ["step_00000001.best", "step_00000001_backup", "step_00000002"]


@pytest.mark.parametrize("change", [{"tensor": 2}, {"overlap_grad_reduce": True, "bucket_size": 2000}])
def test_buckets_load_into_the_same_buckets_alone(change, tmp_path):
    saved = layout(fully_reshardable=False)
    key = next(iter(change))
    with pytest.raises(CheckpointError, match=f"parallel.{key} = .*fully_reshardable=true before"):
        _check_buckets(tmp_path, saved, layout(fully_reshardable=True, **change))
    _check_buckets(tmp_path, saved, layout(data=2, context=2))


def test_every_so_many_steps_one_is_kept(folder):
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1, keep_every=4)
    for step in range(2, 12, 2):
        checkpoints._publish(draft_of(folder, step))
    assert names(folder) == ["step_00000004", "step_00000008", "step_00000010"]


def test_steps_of_more_digits_are_newer(folder):
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=2)
    for step in (99_999_999, 100_000_000):
        checkpoints._publish(draft_of(folder, step))
    assert [p.name for p in checkpoints.published()] == ["step_99999999", "step_100000000"]


def test_settings_of_another_version_name_the_checkpoint(copy):
    meta = store.read_meta(copy)
    meta["config"]["train"]["unheard_of"] = 1
    with pytest.raises(CheckpointError, match=rf"{copy}/meta.json: it has settings of another version.*unheard_of"):
        store.saved_config(copy, meta)


def test_weights_that_a_model_keeps_in_fp8_are_read_in_high_precision(tmp_path, monkeypatch):
    """megatron-core 0.19 would read into them: each half of a gated MLP's weight with a scale that belongs to both."""
    from megatron.core import fp8_utils
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda x: x.dtype == torch.float8_e4m3fn)  # in Transformer Engine
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", lambda x: x.to(torch.bfloat16))
    monkeypatch.setattr(store, "_match", lambda path, parts: None)
    monkeypatch.setattr(store.dist_checkpointing, "load", lambda parts, path: parts)
    weight = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    found = store.load(tmp_path, {"model": {"w": ShardedTensor.from_rank_offsets("w", weight)}})["model"]["w"].data
    assert found.dtype == torch.bfloat16 and found.tolist() == [[1.0, 2.0]]
