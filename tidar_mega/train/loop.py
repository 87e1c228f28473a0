"""A training run from beginning to end: evaluate, save, stop check, one step, log."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from tidar_mega import device, methods, plan
from tidar_mega.checkpoint import state as checkpoint_state
from tidar_mega.checkpoint.base import Base
from tidar_mega.checkpoint.state import Progress, TrainState
from tidar_mega.checkpoint.store import CheckpointStore
from tidar_mega.config import Config, UserError, to_tree
from tidar_mega.data.mixture import open_data
from tidar_mega.data.stream import Samples
from tidar_mega.model import gpt
from tidar_mega.parallel.mesh import Mesh
from tidar_mega.rows import Rows
from tidar_mega.train import optim
from tidar_mega.train.health import StopRequest, anywhere, spike
from tidar_mega.train.metrics import MetricsLog
from tidar_mega.train.profiler import Profiler
from tidar_mega.train.resume import continue_from, find_origin, lock_folder, resume
from tidar_mega.train.roll_call import NoRollCall, RollCall
from tidar_mega.train.step import Sums, Task, accumulate_gradients, micro_batches, summarise, validate
from tidar_mega.train.stragglers import OwnWork


class TrainingError(UserError):
    """A run that must not go on, such as gradients that stay non-finite."""


def train(
    config: Config, mesh: Mesh, stop: StopRequest, roll_call: RollCall | None = None, lock_seconds: float = 0.0
) -> Progress:
    """Runs, or resumes, until train.steps are done or a stop is requested; returns how far it came. Waits up to
    `lock_seconds` for another process to leave the run folder.

    Raises ConfigError, DataError, CheckpointError or TrainingError.
    """
    run = Run.start(config, mesh, roll_call or NoRollCall(), lock_seconds)
    log, progress = run.log, run.state.progress
    if progress.step >= config.train.steps and anywhere(log.has_validation(progress.step)):
        log.say(f"already done: {progress.step} steps; raise train.steps to go on")
        log.close()
        return progress
    while progress.step < config.train.steps:
        run.at("between steps")
        run.publish()
        if run.is_due(config.train.eval_interval):
            run.at("validation")
            log.validation(progress.step, validate(run.task, run.held_out, config.train.eval_sequences))
        if run.is_due(config.checkpoint.interval):
            run.save(wait=not config.checkpoint.asynchronous)
        if (signal := stop.agreed()) is not None:
            run.save()
            run.profiler.close(progress.step)
            log.say(f"{signal}: stopped at step {progress.step}; the same command resumes here")
            log.close()
            return progress
        run.step()
    log.say(f"done: {progress.step} steps; checkpoint {run.save()}")
    run.at("validation")
    log.validation(progress.step, validate(run.task, run.held_out, config.train.final_eval_sequences))
    log.close()
    return progress


@dataclass
class Run:
    """The live parts of a run."""

    task: Task
    state: TrainState
    stream: Samples
    held_out: Samples
    checkpoints: CheckpointStore
    log: MetricsLog
    resumed_at: int
    lock: TextIO | None
    work: OwnWork
    profiler: Profiler
    roll_call: RollCall | NoRollCall
    base: Base | None = None  # the frozen weights under adapters
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "samples"))
    next_samples: Future[list[Rows]] | None = None  # being read
    speed: Speed = field(default_factory=lambda: Speed())

    def at(self, doing: str) -> None:
        """Where this rank is, for the others to know if it does not answer."""
        self.roll_call.at(self.state.progress.step, doing)

    @classmethod
    def start(cls, config: Config, mesh: Mesh, roll_call: RollCall | NoRollCall, lock_seconds: float) -> Run:
        """Opens the data, builds the model and, if the run folder has a checkpoint, goes on from it; else begins from
        `train.init_from` or from random weights."""
        roll_call.at(0, "locking the run folder")
        lock = mesh.on_main(lambda: lock_folder(Path(config.run_dir), lock_seconds, roll_call.progress))
        roll_call.at(0, "building the model")
        stream, held_out = (open_data(config.data, split, config.train.seed) for split in ("train", "validation"))
        tokenizer = stream.tokenizer
        method = methods.load(config, tokenizer.mask)
        work = OwnWork(config.health.straggler_factor)

        def before_exchange() -> None:
            work.end()
            roll_call.at(roll_call.place.step, "exchange of gradients and update")

        kept = config.checkpoint.keep_last, config.checkpoint.keep_every
        checkpoints = CheckpointStore(Path(config.run_dir) / "checkpoints", *kept)
        newest = checkpoints.open(mesh)
        origin = newest or find_origin(config, mesh)
        # the base of adapters may lack rows of the vocabulary, which no checkpoint has
        draw = origin is None or config.lora.rank > 0
        models = gpt.build(config, tokenizer.vocab_size, draw=draw, progress=roll_call.progress)
        base = Base.find(config, mesh, newest) if config.lora.rank or newest is None else None
        roll_call.at(0, "reading the newest checkpoint")
        if base is not None:  # before the optimizer makes its float32 copies
            with roll_call.reading():
                base.load(models, config, mesh, tokenizer.vocab_size, stream.tokenizer_folder)
        chunks = optim.wrap(config, models, before_exchange)
        optimizer = optim.build_optimizer(config, chunks)
        state = TrainState(chunks, optimizer, optim.build_scheduler(config, optimizer), Progress())
        if origin is not None:
            with roll_call.reading():
                if newest is not None:
                    resume(newest, config, mesh, stream, state, base)
                else:
                    continue_from(origin, config, mesh, stream, state)
        token_bytes = torch.as_tensor(tokenizer.token_bytes).to(device.device())
        task = Task(config, mesh, method, chunks, token_bytes, roll_call.progress)
        log = MetricsLog(config, mesh.is_main, state.progress.step)
        drawn = next(micro_batches(task, stream, 0, 1)) if mesh.is_main else None
        log.start(_describe(config, mesh, chunks, newest, origin, state.progress, base), drawn)
        frozen = base if config.lora.rank else None
        profiler, step = Profiler(config, mesh), state.progress.step
        return cls(task, state, stream, held_out, checkpoints, log, step, lock, work, profiler, roll_call, frozen)

    def is_due(self, interval: int) -> bool:
        step = self.state.progress.step
        return interval > 0 and step > self.resumed_at and step % interval == 0

    def save(self, wait: bool = True) -> Path:
        """The checkpoint of this step, published; without `wait`, it may still be in the hands of its writers."""
        self.at("saving a checkpoint")
        self.publish(wait=True)
        path = self.checkpoints.path(self.state.progress.step)
        if path != self.checkpoints.latest:
            self._begin_to_save()
            if not wait:
                self.log.say(f"writing {path} while training goes on")
        if wait:
            self.publish(wait=True)
        return path

    def publish(self, wait: bool = False) -> None:
        """Collective while a save is in flight: publishes it once all ranks have written it, or waits for that."""
        published = self.checkpoints.finish(self.task.mesh, wait, self.task.progress)
        if published and self.task.config.checkpoint.asynchronous:
            self.log.say(f"published {published}")

    def _begin_to_save(self) -> None:
        progress = self.state.progress
        meta = {
            "step": progress.step,
            "samples": progress.samples,
            "config": to_tree(self.task.config),
            "data_fingerprint": self.stream.fingerprint,
            "vocab_size": self.stream.tokenizer.vocab_size,
        }
        if self.base is not None:
            meta["base"] = self.base.meta
        parts = checkpoint_state.sharded(self.state, self.task.config.checkpoint.fully_reshardable)
        size = checkpoint_state.size_bytes(self.state)
        tokenizer = self.stream.tokenizer_folder
        self.checkpoints.begin(self.task.mesh, progress.step, parts, meta, tokenizer, size)

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        config, progress = self.task.config, self.state.progress
        self.profiler.before(progress.step + 1)
        self.at("reading samples")
        started = time.perf_counter()
        batch = self._samples()
        self.work.add(time.perf_counter() - started)
        self.at("forward and backward")
        sums = accumulate_gradients(self.task, batch, self.work.begin)
        wanted = self._judge(sums)
        norm = optim.update(self.state.optimizer, config.optimizer.clip_grad, wanted)
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.state.scheduler.step(1)
        progress.step += 1
        progress.samples += config.train.global_batch_size
        self.speed.add(sums, time.perf_counter() - started)
        window = self.state.window
        self.state.window = {name: window[name] + value if name in window else value for name, value in sums.items()}
        self._watch(norm)
        if progress.step % config.log.interval == 0 or progress.step == config.train.steps:
            slow, warning = self.work.report()
            self.log.step(progress.step, {**self._figures(norm, lr), **slow})
            if warning:
                self.log.say(warning)
            if "accepted_lengths" in self.state.window:
                self.log.accepted(progress.step, self.state.window["accepted_lengths"].tolist())
            self.state.window, self.speed = {}, Speed()
        self.profiler.after(progress.step)

    def _samples(self) -> list[Rows]:
        """The rows of this step; those of the next are read beside it, as storage may take as long as a forward."""
        count, steps = self.task.config.train.global_batch_size, self.task.config.train.steps
        first, following = self.state.progress.samples, self.state.progress.samples + count

        def read(first: int) -> list[Rows]:
            return list(micro_batches(self.task, self.stream, first, count))

        batch = self.next_samples.result() if self.next_samples else read(first)
        is_last = self.state.progress.step + 1 == steps
        self.next_samples = None if is_last else self.reader.submit(read, following)
        return batch

    def _judge(self, sums: Sums) -> bool:
        """The spike policy: a loss that jumps is told and counted. Whether the update is to be made."""
        health, loss = self.task.config.health, summarise(self.task, sums)["loss"]
        mean = self.state.progress.loss_mean
        height = spike(self.state.progress, loss, health.spike_sigmas)
        if height is None:
            return True
        what = "update skipped (health.skip_spikes)" if health.skip_spikes else "update made"
        self.log.say(
            f"step {self.state.progress.step + 1}: loss {loss:.4f} is {height:.1f} standard deviations above the "
            f"recent mean {mean:.4f}; {what}; spike {self.state.progress.spikes}"
        )
        return not health.skip_spikes

    def _watch(self, norm: float) -> None:
        """The NaN policy: a step with a non-finite gradient changes nothing; too many in a row end the run."""
        progress, limit = self.state.progress, self.task.config.train.nan_limit
        is_finite = math.isfinite(norm)
        progress.skipped_in_a_row = 0 if is_finite else progress.skipped_in_a_row + 1
        progress.skipped_steps += not is_finite
        if not is_finite:
            self.log.say(f"step {progress.step}: gradient norm is {norm}; step skipped")
        if progress.skipped_in_a_row >= limit:
            self.publish(wait=True)
            raise TrainingError(
                f"the gradient was not finite in {limit} steps in a row (train.nan_limit), last at step "
                f"{progress.step}; the newest checkpoint is from before: lower optimizer.lr or look at the data"
            )

    def _figures(self, norm: float, lr: float) -> dict[str, float]:
        config, speed, progress = self.task.config, self.speed, self.state.progress
        vocab = config.padded_vocab_size(self.stream.tokenizer.vocab_size)
        flops = plan.training_flops(config, vocab, speed.rows, speed.pairs, speed.head_rows)
        peak = device.peak_flops(config.precision.dtype) * self.task.mesh.world_size
        return {
            **summarise(self.task, self.state.window),
            "grad_norm": norm,
            "lr": lr,
            "step_seconds": speed.seconds / speed.steps,
            "tokens_per_second": speed.tokens / speed.seconds,
            "model_flop_utilisation": flops / speed.seconds / peak,
            "memory_gib": device.peak_memory_bytes() / 2**30,
            "samples": progress.samples,
            **self.stream.epochs(progress.samples),
            "skipped_steps": progress.skipped_steps,
            "spikes": progress.spikes,
        }


@dataclass
class Speed:
    """Work and time since the last log line or the start of this process."""

    seconds: float = 0.0
    steps: int = 0
    tokens: float = 0.0
    rows: float = 0.0
    pairs: float = 0.0
    head_rows: float = 0.0

    def add(self, sums: Sums, seconds: float) -> None:
        self.seconds += seconds
        self.steps += 1
        for name in ("tokens", "rows", "pairs", "head_rows"):
            setattr(self, name, getattr(self, name) + float(sums[f"count.{name}"]))


def _describe(
    config: Config,
    mesh: Mesh,
    chunks: list,
    newest: Path | None,
    origin: Path | None,
    progress: Progress,
    base: Base | None,
) -> str:
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    start = f"resumed from {newest}, step {progress.step}" if newest else "from scratch"
    if origin is not None and newest is None:
        text = "behind its samples" if progress.samples else "from the first sample of data.path"
        start = f"goes on from {origin}, step {progress.step}, {text}"
    if base is not None:
        over = f"over the frozen {base.path}"
        start = (f"{start} {over}" if newest else over) if config.lora.rank else f"from {base.path}"
    sizes = {name: getattr(mesh, name).size() for name in ("tensor", "pipeline", "context", "data")}
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")
    where = f"{mesh.world_size} process(es) on {device.device().type}, {layout}"
    return f"{config.method} | {parameters / 1e6:.2f}M parameters per rank | {where} | {start}"
