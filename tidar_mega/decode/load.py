"""From a checkpoint on disk to an engine that decodes it, in whatever layout: not that of the training run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from tidar_mega import config as config_module
from tidar_mega import device, methods
from tidar_mega.checkpoint import convert, hugging_face, store
from tidar_mega.checkpoint.base import Base
from tidar_mega.checkpoint.state import fill, sharded_base, sharded_weights
from tidar_mega.config import Config, ConfigError, UserError
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode import latency
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.latency import PREFIXES, Curves
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.model import gpt
from tidar_mega.model.gpt import HybridGPT
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import Mesh, build_mesh


def sampling_params(config: Config) -> SamplingParams:
    """What `decode.*` says of how tokens are chosen. Raises ConfigError."""
    d = config.decode
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "acceptance", "beta", "threshold")
    try:
        return SamplingParams(**{name: getattr(d, name) for name in names}, stop_strings=tuple(d.stop))
    except UserError as error:
        raise ConfigError(f"decode.{error}") from None


@dataclass(frozen=True)
class Loaded:
    engine: Engine
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path
    mesh: Mesh

    @property
    def params(self) -> SamplingParams:
        return sampling_params(self.config)

    def latency(self, block: int) -> Curves:
        """The latency curves of this machine, as far as drafts of `block` tokens: the stored ones, or measured and
        stored now."""
        stored = self.mesh.same(latency.load(self.run_folder, latency.key(self.engine.forwards)))
        if stored is not None and stored.cover(self.config.decode.batch, block):
            return stored
        if self.mesh.is_main:
            print(f"measuring how long forwards take here, for {self.run_folder / latency.FILE}", file=sys.stderr)
        return self.measure_latency(block)[0]

    def measure_latency(
        self, block: int, prefixes: Sequence[int] = PREFIXES, repeats: int = 5
    ) -> tuple[Curves, Path | None]:
        """Measures the curves behind so many committed tokens and stores them in the run folder, if it can be written
        to; the path, or None. Collective."""
        e, d = self.engine, self.config.decode
        sizes = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < d.batch} | {d.batch})
        longest = max(prefixes) + latency.SPREAD + latency.most_rows(block)
        room = d.batch * (longest + e.cache.page)
        bare = Engine(e.model, self.tokenizer, block, longest, d.batch, cache_tokens=room, cuda_graphs=d.cuda_graphs)
        found = {
            prefix: latency.measure(bare.forwards, sizes, block, e.drafter, prefix, repeats) for prefix in prefixes
        }
        del bare
        gc.collect()  # its pages are real memory on a GPU, and its recordings hold it
        curves = self.mesh.same(Curves(found))
        path = None
        if self.mesh.is_main:
            try:
                path = latency.save(self.run_folder, latency.key(e.forwards), curves)
            except OSError as error:
                print(f"{self.run_folder / latency.FILE}: not kept ({error.strerror})", file=sys.stderr)
        return curves, path

    @property
    def run_folder(self) -> Path:
        """Of a Hugging Face model: its own."""
        parent = self.checkpoint.parent
        if self.step is None:
            return self.checkpoint
        return parent.parent if parent.name == "checkpoints" else parent

    @property
    def step(self) -> int | None:
        """None of a Hugging Face model."""
        return None if hugging_face.is_model(self.checkpoint) else store.read_meta(self.checkpoint)["step"]


def saved(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> tuple[Path, Config]:
    """The newest checkpoint of a run folder, the given one or a Hugging Face model, and its settings with `overrides`.
    Raises CheckpointError or ConfigError."""
    if hugging_face.is_model(Path(path)):
        about = hugging_face.Model(Path(path)).settings
        return Path(path), config_module.override(config_module.from_tree(about), overrides)
    checkpoint = store.resolve(Path(path))
    meta = store.read_meta(checkpoint)
    return checkpoint, config_module.override(store.saved_config(checkpoint, meta), overrides)


def tokenizer_of(checkpoint: Path) -> Path:
    """The folder of its tokenizer."""
    return checkpoint if hugging_face.is_model(checkpoint) else checkpoint / "tokenizer"


def sizes(config: Config) -> dict[str, int]:
    """The layout of decoding: its product is how many ranks decode together."""
    return {name: getattr(config.decode, name) for name in ("tensor", "pipeline", "data")}


def load_engine(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Loaded:
    """An engine for a checkpoint: in this process alone, or as one rank of the world that a launcher described.

    Raises CheckpointError or ConfigError.
    """
    checkpoint, config = saved(path, overrides)
    _check_left_to_right(config, path)
    sampling_params(config)  # refuses what cannot be, before anything is loaded
    if set(sizes(config).values()) == {1}:
        device.start_alone()
    else:
        device.start_process_group(config, int(os.environ.get("LOCAL_RANK", "0")))
        checkpoint, config = saved(_same(checkpoint), overrides)
    config = decoding_config(config)
    mesh = build_mesh(config)
    tokenizer = Tokenizer.load(tokenizer_of(checkpoint))
    model, d = InferenceModel(load_model(checkpoint, config, mesh)), config.decode
    drafter = methods.load(config, tokenizer.mask).drafter
    # nothing to choose: layers draft behind the actual outcome, and these settings fix how far is drafted
    settled = drafter.depths or d.mode != "fused" or d.beta < 1
    outcomes = "all" if settled and d.outcomes == "auto" else d.outcomes
    engine = Engine(
        model,
        tokenizer,
        d.block or drafter.length(config.train.block),
        d.capacity,
        batch=d.batch,
        prefill_chunk=d.prefill_chunk,
        outcomes="all" if outcomes == "auto" else outcomes,
        cache_tokens=d.cache_tokens,
        replicas=mesh.data if mesh.data_size > 1 else None,
        cuda_graphs=d.cuda_graphs,
        drafter=drafter,
    )
    loaded = Loaded(engine, tokenizer, config, checkpoint, mesh)
    if outcomes == "auto":
        engine.choose_outcomes(loaded.latency(engine.block))
    return loaded


def _same(checkpoint: Path) -> Path:
    """Collective. The main process's: while a run goes on, each would find another newest one."""
    box = [checkpoint]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def load_model(checkpoint: Path, config: Config, mesh: Mesh) -> HybridGPT:
    """This rank's part of the saved weights, in the layout and precision that `config` says. Adapters come over their
    base, which `train.init_from` names."""
    if hugging_face.is_model(checkpoint):
        (model,) = gpt.build(config, Tokenizer.load(checkpoint).vocab_size, training=False)
        fill(model, hugging_face.load(hugging_face.Model(checkpoint), sharded_base([model]))["model0"])
        return model
    meta = store.shared_meta(checkpoint, mesh)
    draw = config.lora.rank > 0  # a base may lack rows of the vocabulary, and the checkpoint has none
    (model,) = gpt.build(config, meta["vocab_size"], training=False, draw=draw)
    if config.lora.rank:
        base = Base.find(config, mesh, checkpoint)
        base.check_adapters(checkpoint, meta)
        base.load([model], config, mesh, meta["vocab_size"], checkpoint / "tokenizer")
    fill(model, store.load(checkpoint, sharded_weights(model))["model"])
    return model


def export(path: Path, overrides: list[str] | tuple[str, ...], folder: Path) -> Path:
    """Writes a checkpoint as a Hugging Face model, in the type in which its weights were trained, or `decode.dtype` of
    the overrides. Raises CheckpointError, ConfigError, UserError."""
    checkpoint, config = saved(path)
    if hugging_face.is_model(checkpoint):
        raise UserError(f"{checkpoint}: is a Hugging Face model already")
    alone = ("decode.tensor=1", "decode.pipeline=1", "decode.data=1")
    config = config_module.override(config, [f"decode.dtype={config.precision.dtype}", *overrides, *alone])
    _check_left_to_right(config, path)
    config = decoding_config(config)
    if config.lora.rank:
        raise UserError(
            f"{checkpoint}: its adapters act on mask rows alone, which a Hugging Face model does not have, and merged "
            f"into the weights they would change what the model says; convert its base: {config.train.init_from}"
        )
    device.start_alone()
    return write_transformers(checkpoint, config, folder, build_mesh(config))


def write_transformers(checkpoint: Path, config: Config, folder: Path, mesh: Mesh) -> Path:
    """As `export`, inside a world of one process."""
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    model, about = load_model(checkpoint, config, mesh), tokenizer.transformers_config
    return convert.export(model, config, checkpoint / "tokenizer", about, tokenizer.eod, folder)


def _check_left_to_right(config: Config, path: str | Path) -> None:
    if not config.traits.is_left_to_right:
        raise ConfigError(
            f"method = {config.method}: {path} has no causal half that could continue a prompt or be exported; sample "
            f"it with `tidar bench diffusion {path} --judge RUN_OF_METHOD_AR`, or from Python with "
            "tidar_mega.decode.diffusion"
        )


def decoding_config(config: Config) -> Config:
    """Decoding has its own precision and its own layout; of the layers it wants only the weights."""
    d, timeout = config.decode, config.parallel.timeout_minutes
    return replace(
        config,
        parallel=config_module.ParallelConfig(**sizes(config), timeout_minutes=timeout),
        precision=config_module.PrecisionConfig(dtype=d.dtype, layers="local"),
        train=replace(config.train, global_batch_size=d.data, micro_batch_size=1),
    )
