"""From a checkpoint on disk to an engine that decodes it, whatever layout it was trained in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tidar_mega import config as config_module
from tidar_mega import device
from tidar_mega.checkpoint import store
from tidar_mega.checkpoint.state import sharded_weights
from tidar_mega.config import Config
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.model import gpt
from tidar_mega.parallel.mesh import build_mesh


@dataclass(frozen=True)
class Loaded:
    engine: Engine
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters that `decode.*` says."""
        d = self.config.decode
        return SamplingParams(d.max_tokens, d.temperature, d.top_k, d.top_p, d.seed)

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(p.numel() for p in self.engine.model.parameters())


def load_engine(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Loaded:
    """The newest checkpoint of a run folder, or the given one, on this process alone.

    The settings are those of the checkpoint with `overrides`. Raises CheckpointError or ConfigError.
    """
    checkpoint = store.resolve(path)
    meta = store.read_meta(checkpoint)
    config = _for_one_process(config_module.override(store.saved_config(meta), overrides))
    device.start_alone()
    build_mesh(config)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    (model,) = gpt.build(config, meta["vocab_size"])
    parts = store.load(checkpoint, sharded_weights(model))
    model.load_state_dict(parts["model"], strict=True)
    model.eval()
    engine = Engine(model, tokenizer, config.decode.block or config.train.block, config.decode.capacity)
    return Loaded(engine, tokenizer, config, checkpoint)


def _for_one_process(config: Config) -> Config:
    """Decoding has its own precision, and its layout is not that of the training run."""
    return replace(
        config,
        parallel=config_module.ParallelConfig(),
        precision=config_module.PrecisionConfig(dtype=config.decode.dtype),
        train=replace(config.train, global_batch_size=1, micro_batch_size=1),
    )
