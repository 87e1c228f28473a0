"""Checkpoints: a resume is bit for bit the run that never stopped; damage is named; no half is published."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.test_training_step import MASK, SEQUENCES, VOCAB, Text, settings
from tidar_mega import config as config_module
from tidar_mega.checkpoint import store
from tidar_mega.checkpoint.store import CheckpointError, CheckpointStore


class Trainer:
    """The parts of a run on a rank, stepping over endless text."""

    def __init__(self, config: config_module.Config) -> None:
        from tidar_mega import methods
        from tidar_mega.checkpoint.state import Progress, TrainState
        from tidar_mega.model import gpt
        from tidar_mega.parallel.mesh import build_mesh
        from tidar_mega.train import optim
        from tidar_mega.train.step import Task

        self.config, self.mesh = config, build_mesh(config)
        (model,) = optim.wrap(config, gpt.build(config, VOCAB))
        optimizer = optim.build_optimizer(config, [model])
        self.state = TrainState([model], optimizer, optim.build_scheduler(config, optimizer), Progress())
        self.task = Task(config, self.mesh, methods.load(config, MASK), [model], torch.ones(VOCAB))

    def steps(self, count: int) -> list[tuple[float, float]]:
        from tidar_mega.train import optim
        from tidar_mega.train.step import accumulate_gradients, micro_batches, summarise

        figures = []
        for _ in range(count):
            progress = self.state.progress
            batch = list(micro_batches(self.task, Text, progress.samples, SEQUENCES))
            loss = summarise(self.task, accumulate_gradients(self.task, batch))["loss"]
            norm, _ = optim.update(self.state.optimizer, self.config.optimizer.clip_grad)
            self.state.scheduler.step(1)
            progress.step += 1
            progress.samples += SEQUENCES
            figures.append((loss, norm))
        return figures

    def save(self, folder: Path, check_size: bool = True) -> Path:
        from tidar_mega.checkpoint import state

        meta = {"config": config_module.to_tree(self.config), "vocab_size": VOCAB}
        parts = state.sharded(self.state)
        checkpoints = CheckpointStore(folder / "checkpoints", keep_last=2)
        size = state.size_bytes(self.state) if check_size else 0
        checkpoints.begin(
            self.mesh, checkpoints.path(self.state.progress.step), parts, meta, folder / "tokenizer", size
        )
        return checkpoints.finish(self.mesh, wait=True)

    def load(self, path: Path) -> None:
        from tidar_mega.checkpoint import state

        saved = store.saved_config(store.read_meta(path))
        same = saved.parallel == self.config.parallel
        state.restore(self.state, store.load(path, state.template(self.state, same)))


def save_in_the_middle(rank: int, config, folder: Path):
    trainer = Trainer(config)
    before = trainer.steps(3)
    path = trainer.save(folder)
    return before, path, trainer.steps(3)


def resume(rank: int, config, path: Path):
    trainer = Trainer(config)
    trainer.steps(1)  # a restart may have state that the load must replace
    trainer.load(path)
    return trainer.steps(3)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path


def layout(dtype="fp32", **parallel):
    return settings(
        precision={"dtype": dtype}, parallel=parallel, train={"micro_batch_size": 1}, optimizer={"warmup_steps": 2}
    )


SAME = {
    "fp32, data 2": (2, layout(data=2)),
    "bf16, data 2": (2, layout("bf16", data=2)),
    "bf16, data 2, plain optimizer": (2, layout("bf16", data=2, distributed_optimizer=False)),
    "bf16, tensor 2": (2, layout("bf16", tensor=2)),
    "bf16, data 2, overlapped": (2, layout("bf16", data=2, overlap_grad_reduce=True, overlap_param_gather=True)),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAME)
def test_a_resume_is_bit_for_bit_the_run_that_never_stopped(name, folder):
    count, config = SAME[name]
    saved = processes.run(save_in_the_middle, count, config, folder)
    again = processes.run(resume, count, config, saved[0][1])
    for (_, _, expected), got in zip(saved, again, strict=True):
        assert got == expected


@pytest.mark.distributed
def test_a_checkpoint_of_two_ranks_goes_on_in_other_layouts(folder):
    saved = processes.run(save_in_the_middle, 2, layout(data=2), folder)
    expected = saved[0][2]
    for count, parallel in ((1, {}), (2, {"tensor": 2})):
        for got in processes.run(resume, count, layout(**parallel), saved[0][1]):
            for a, b in zip(got, expected, strict=True):
                assert a == pytest.approx(b, rel=1e-4)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return processes.run(save_in_the_middle, 1, layout(), folder)[0][1]


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "checkpoints" / published.name))


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("*.distcp")), key=lambda p: p.stat().st_size)


@pytest.mark.distributed
def test_a_truncated_file_is_named_with_its_sizes(copy):
    victim = largest(copy)
    size = victim.stat().st_size
    os.truncate(victim, size // 2)
    with pytest.raises(CheckpointError, match=rf"{victim.name}: has {size // 2} bytes instead of {size}"):
        store.read_meta(copy)


@pytest.mark.distributed
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


@pytest.mark.distributed
def test_resolve_takes_a_run_its_checkpoints_or_one_of_them(copy, tmp_path):
    (tmp_path / "checkpoints" / ".step_00000009.unfinished").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", copy):
        assert store.resolve(path) == copy
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        store.resolve(tmp_path / "none")


def save_often(rank: int, config, folder: Path):
    trainer = Trainer(config)
    paths = []
    for _ in range(4):
        trainer.steps(1)
        paths.append(trainer.save(folder))
    return [p.exists() for p in paths]


@pytest.mark.distributed
def test_only_the_last_checkpoints_are_kept_and_leftovers_go(folder):
    leftover = folder / "checkpoints" / ".step_00000002.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half a shard")
    assert processes.run(save_often, 1, layout(), folder)[0] == [False, False, True, True]
    assert not leftover.exists()


def fill_the_disk(rank: int, config, folder: Path, check_size: bool):
    """Saves once, then again with no room left; returns what was said and what is published."""
    trainer = Trainer(config)
    trainer.steps(1)
    first = trainer.save(folder)
    if rank == 0:
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(b"\0" * max(0, free - 100_000))
    torch.distributed.barrier()
    trainer.steps(1)
    try:
        trainer.save(folder, check_size)
    except CheckpointError as error:
        store.read_meta(first)  # raises if a file is not whole
        return str(error), CheckpointStore(folder / "checkpoints", 2).published() == [first]
    return "nothing was said", False


@pytest.mark.distributed
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("check_size", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk_is_one_clear_error_on_every_rank_and_costs_nothing(tmp_path, check_size):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        (small / "tokenizer").mkdir()
        (small / "tokenizer" / "tokenizer.json").write_text("{}")
        for said, intact in processes.run(fill_the_disk, 2, layout(data=2), small, check_size, timeout_seconds=120):
            assert "No space left on device" in said and "earlier checkpoints are whole" in said
            assert intact
        assert not list((small / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
