"""How many copies of the model a number of processes holds, and whether these can share the global batch."""

from __future__ import annotations

from tidar_mega.config.errors import ConfigError, require
from tidar_mega.config.settings import Config


def replicas(config: Config, processes: int, what: str) -> int:
    """How many copies of the model `processes` hold, which are told as `what`; each gets its share of the global batch.

    Raises ConfigError if the layout or the batch does not fit them.
    """
    p = config.parallel
    product = f"parallel.tensor x pipeline x context = {p.tensor} x {p.pipeline} x {p.context}"
    if processes % p.model_size:
        raise ConfigError(f"{product}: must divide the {what}; lower one of them, or take a multiple of {p.model_size}")
    data = processes // p.model_size
    if p.data not in (None, data):
        raise ConfigError(
            f"parallel.data = {p.data}: {what} / ({product}) make {data} replicas; set it to {data} or to null, "
            "or take another number of them"
        )
    check_batch(config, data)
    return data


def check_batch(config: Config, data_parallel: int) -> None:
    """The global batch must be whole micro-batches on each of `data_parallel` replicas. Raises ConfigError."""
    t, p = config.train, config.parallel
    unit = t.micro_batch_size * data_parallel
    allowed = f"a multiple of train.micro_batch_size x parallel.data ({t.micro_batch_size} x {data_parallel})"
    if p.virtual_pipeline > 1:  # the interleaved schedule takes micro-batches in turns of one for each stage
        unit *= p.pipeline
        allowed = f"a multiple of train.micro_batch_size x parallel.data x parallel.pipeline ({unit})"
    require(
        t.global_batch_size % unit == 0,
        "train.global_batch_size",
        t.global_batch_size,
        allowed,
        f"for example {max(unit, t.global_batch_size // unit * unit)}",
    )
