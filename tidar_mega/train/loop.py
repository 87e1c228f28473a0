"""A training run from beginning to end: evaluate, save, stop check, one step, log."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tidar_mega import device, methods, plan
from tidar_mega.checkpoint import state as checkpoint_state
from tidar_mega.checkpoint import store
from tidar_mega.checkpoint.state import Progress, TrainState
from tidar_mega.checkpoint.store import CheckpointError, CheckpointStore
from tidar_mega.config import Config, UserError, to_tree
from tidar_mega.data.stream import Stream, open_stream
from tidar_mega.model import gpt
from tidar_mega.parallel.mesh import Mesh
from tidar_mega.train import optim
from tidar_mega.train.health import StopRequest
from tidar_mega.train.metrics import MetricsLog
from tidar_mega.train.step import Task, accumulate_gradients, load_micro_batches, summarise, validate


class TrainingError(UserError):
    """A run that must not go on, such as gradients that stay non-finite."""


def train(config: Config, mesh: Mesh, stop: StopRequest) -> Progress:
    """Runs, or resumes, until train.steps are done or a stop is requested; returns how far it came.

    Raises ConfigError, DataError, CheckpointError or TrainingError.
    """
    run = Run.start(config, mesh)
    log, progress = run.log, run.state.progress
    if progress.step >= config.train.steps:
        log.say(f"already done: {progress.step} steps; raise train.steps to go on")
        log.close()
        return progress
    while progress.step < config.train.steps:
        if run.is_due(config.train.eval_interval):
            log.validation(progress.step, validate(run.task, run.held_out, config.train.eval_sequences))
        if run.is_due(config.checkpoint.interval):
            run.save()
        if (signal := stop.agreed()) is not None:
            run.save()
            log.say(f"{signal}: stopped at step {progress.step}; the same command resumes here")
            log.close()
            return progress
        run.step()
    log.validation(progress.step, validate(run.task, run.held_out, None))
    log.say(f"done: {progress.step} steps; checkpoint {run.save()}")
    log.close()
    return progress


@dataclass
class Run:
    """The live parts of a run."""

    task: Task
    state: TrainState
    stream: Stream
    held_out: Stream
    checkpoints: CheckpointStore
    log: MetricsLog
    resumed_at: int
    window: Window = field(default_factory=lambda: Window())

    @classmethod
    def start(cls, config: Config, mesh: Mesh) -> Run:
        """Opens the data, builds the model and, if the run folder has a checkpoint, goes on from it."""
        stream, held_out = (
            open_stream(config.data.path, split, config.data.seq_length, config.train.seed)
            for split in ("train", "validation")
        )
        tokenizer = stream.tokenizer
        method = methods.load(config, tokenizer.mask)
        model = optim.wrap(config, gpt.build(config, tokenizer.vocab_size))
        optimizer = optim.build_optimizer(config, model)
        state = TrainState(model, optimizer, optim.build_scheduler(config, optimizer), Progress())
        checkpoints = CheckpointStore(Path(config.run_dir) / "checkpoints", config.checkpoint.keep_last)
        newest = checkpoints.newest()
        if newest is not None:
            resume(newest, config, stream, state)
        token_bytes = torch.as_tensor(tokenizer.token_bytes).to(device.device())
        task = Task(config, mesh, method, model, token_bytes)
        log = MetricsLog(config, mesh.is_main, state.progress.step)
        log.say(_describe(config, mesh, model, newest, state.progress))
        return cls(task, state, stream, held_out, checkpoints, log, state.progress.step)

    def is_due(self, interval: int) -> bool:
        step = self.state.progress.step
        return interval > 0 and step > self.resumed_at and step % interval == 0

    def save(self) -> Path:
        progress = self.state.progress
        path = self.checkpoints.folder / f"step_{progress.step:08d}"
        if path in self.checkpoints.published():
            return path
        meta = {
            "step": progress.step,
            "samples": progress.samples,
            "config": to_tree(self.task.config),
            "data_fingerprint": self.stream.fingerprint,
            "vocab_size": self.stream.tokenizer.vocab_size,
        }
        parts, size = checkpoint_state.sharded(self.state), checkpoint_state.size_bytes(self.state)
        tokenizer = self.stream.tokenizer_folder
        return self.checkpoints.save(self.task.mesh, progress.step, parts, meta, tokenizer, size)

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        config, progress = self.task.config, self.state.progress
        started = time.perf_counter()
        batch = load_micro_batches(self.task, self.stream, progress.samples, config.train.global_batch_size)
        sums = accumulate_gradients(self.task, batch)
        norm, applied = optim.update(self.state.optimizer, config.optimizer.clip_grad)
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.state.scheduler.step(1)
        progress.step += 1
        progress.samples += config.train.global_batch_size
        self.window.add(sums, time.perf_counter() - started, norm, lr)
        self._watch(applied, norm)
        if progress.step % config.log.interval == 0 or progress.step == config.train.steps:
            self.log.step(progress.step, self._figures())
            self.window = Window()

    def _watch(self, applied: bool, norm: float) -> None:
        """The NaN policy: a step with a non-finite gradient changes nothing; too many in a row end the run."""
        progress, limit = self.state.progress, self.task.config.train.nan_limit
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        progress.skipped_steps += not applied
        if not applied:
            self.log.say(f"step {progress.step}: gradient norm is {norm}; step skipped")
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"the gradient was not finite in {limit} steps in a row (train.nan_limit), last at step "
                f"{progress.step}; the newest checkpoint is from before: lower optimizer.lr or look at the data"
            )

    def _figures(self) -> dict[str, float]:
        config, window, progress = self.task.config, self.window, self.state.progress
        vocab = gpt.padded_vocab_size(config, self.stream.tokenizer.vocab_size)
        counts = [float(window.sums[f"count.{name}"]) for name in ("rows", "pairs", "head_rows")]
        flops = plan.training_flops(config, vocab, *counts)
        peak = device.peak_flops(config.precision.dtype) * self.task.mesh.world_size
        return {
            **summarise(self.task, window.sums),
            "grad_norm": window.norm,
            "lr": window.lr,
            "step_seconds": window.seconds / window.steps,
            "tokens_per_second": float(window.sums["count.tokens"]) / window.seconds,
            "model_flop_utilisation": flops / window.seconds / peak,
            "memory_gib": device.peak_memory_bytes() / 2**30,
            "samples": progress.samples,
            "epoch": progress.samples / self.stream.samples_per_epoch,
            "skipped_steps": progress.skipped_steps,
        }


@dataclass
class Window:
    """What happened since the last log line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    norm: float = 0.0
    lr: float = 0.0

    def add(self, sums: dict[str, Tensor], seconds: float, norm: float, lr: float) -> None:
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.seconds += seconds
        self.steps += 1
        self.norm, self.lr = norm, lr


def resume(path: Path, config: Config, stream: Stream, state: TrainState) -> None:
    """Fills `state` from the checkpoint at `path`; CheckpointError if that is damaged or of other data or shape."""
    meta = store.read_meta(path)
    if meta["data_fingerprint"] != stream.fingerprint:
        raise CheckpointError(
            f"data.path = {config.data.path}: its index or tokenizer is not the one that {path} was trained on; "
            "give back that corpus, or set another run_dir to start anew"
        )
    saved = store.saved_config(meta)
    for section, names in _FIXED.items():
        for name in names:
            was, now = (getattr(getattr(c, section), name) for c in (saved, config))
            if was != now:
                raise CheckpointError(
                    f"{section}.{name} = {now}: the checkpoint {path} was made with {was}; "
                    "set it back, or set another run_dir to start anew"
                )
    same_tensor_size = saved.parallel.tensor == config.parallel.tensor
    checkpoint_state.restore(state, store.load(path, checkpoint_state.template(state, same_tensor_size)))
    optim.apply_settings(config, state.optimizer)
    state.scheduler.step(0)


# Settings that a resume must not change: the shape of the weights and the meaning of the global sample index.
_FIXED = {
    "model": [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "qk_layernorm",
        "add_qkv_bias",
        "tie_embeddings",
        "rotary_base",
        "vocab_multiple",
    ],
    "data": ["seq_length"],
    "train": ["seed"],
    "precision": ["dtype"],
    "parallel": ["distributed_optimizer"],
}


def _describe(config: Config, mesh: Mesh, model, newest: Path | None, progress: Progress) -> str:
    parameters = sum(p.numel() for p in model.module.parameters())
    start = f"resumed from {newest}, step {progress.step}" if newest else "from scratch"
    where = f"{mesh.world_size} process(es) on {device.device().type}, data parallel {mesh.data_size}"
    return f"{config.method} | {parameters / 1e6:.2f}M parameters per rank | {where} | {start}"
