"""All layouts of a number of GPUs: which are allowed, which fit, and which is predicted to be the fastest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tidar_mega import config as config_module
from tidar_mega.config import Config, ConfigError
from tidar_mega.plan.hardware import Hardware
from tidar_mega.plan.imbalance import whole_sequence
from tidar_mega.plan.layout import Layout
from tidar_mega.plan.memory import Memory, fullest_stage
from tidar_mega.plan.parameters import head_parameters, layer_parameters, mtp_depths
from tidar_mega.plan.timing import Timing, predict
from tidar_mega.plan.work import sequence_work

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", "full")  # the cheapest that fits is taken
MEMORY = "memory"


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    memory: Memory
    timing: Timing


@dataclass
class Found:
    """`best` first by tokens per second. `refused`: how many layouts each setting rules out; `MEMORY`: those that even
    full recomputation does not fit. `nearest` is the one of these that needs the least."""

    best: list[Candidate] = field(default_factory=list)
    refused: Counter = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    nearest: tuple[Layout, Memory] | None = None

    def refuse(self, error: ConfigError) -> None:
        key = str(error).split(" = ")[0]
        self.refused[key] += 1
        self.reasons.setdefault(key, str(error))

    def too_large(self, layout: Layout, memory: Memory) -> None:
        self.refused[MEMORY] += 1
        if self.nearest is None or memory.total < self.nearest[1].total:
            self.nearest = (layout, memory)


def search(config: Config, vocab_size: int, gpus: int, hardware: Hardware) -> Found:
    """Tries tensor (inside a node), pipeline, layers of its last stage, virtual pipeline, context, micro-batch and
    recompute for `config`."""
    found, vocab = Found(), config.padded_vocab_size(vocab_size)
    for shape in _shapes(config, vocab, gpus, int(hardware.gpus_per_node)):
        data = gpus // shape.parallel.model_size
        for size in MICRO_BATCHES:
            candidate = replace(shape, train=replace(shape.train, micro_batch_size=size))
            try:
                config_module.check(candidate)
                config_module.check_batch(candidate, data)
            except ConfigError as error:
                found.refuse(error)
                continue
            _consider(candidate, vocab, data, hardware, found)
    found.best.sort(key=lambda c: -c.timing.tokens_per_second)
    return found


def _shapes(config: Config, vocab: int, gpus: int, node: int) -> Iterator[Config]:
    """Combinations of tensor, pipeline and its stages, virtual pipeline and context; parallel.data is what is left."""
    for tensor in (t for t in _powers(min(gpus, node)) if gpus % t == 0):
        for pipeline in _divisors(gpus // tensor):
            for last, virtual in _stages(config, vocab, pipeline):
                for context in _divisors(gpus // tensor // pipeline):
                    parallel = replace(
                        config.parallel,
                        tensor=tensor,
                        sequence=tensor > 1,
                        pipeline=pipeline,
                        first_stage_layers=None,
                        last_stage_layers=last,
                        virtual_pipeline=virtual,
                        context=context,
                        data=None,
                        recompute="none",
                    )
                    yield replace(config, parallel=parallel)


def _consider(config: Config, vocab: int, data: int, hardware: Hardware, found: Found) -> None:
    for recompute in RECOMPUTE:
        parallel = replace(config.parallel, recompute=recompute, recompute_layers=1)
        layout = Layout(replace(config, parallel=parallel), vocab, data)
        try:
            config_module.check(layout.config)
        except ConfigError:  # such as full recomputation of multi-token prediction
            continue
        _, memory = fullest_stage(layout)
        if memory.total <= hardware.usable_bytes:
            found.best.append(Candidate(layout, memory, predict(layout, hardware, whole_sequence(layout.config))))
            return
    found.too_large(layout, memory)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _stages(config: Config, vocab: int, pipeline: int) -> Iterator[tuple[int | None, int]]:
    """Ways to divide the layers: those of the last stage where it has others than the rest (None: as many), and the
    equal chunks of each stage.

    The last stage also has the head and the depths: it is tried with the number of layers by which the slowest stage
    has the least to do.
    """
    layers, others = config.model.num_layers, pipeline - 1
    even, uneven = layers // pipeline, layers % pipeline
    yield from ((None, virtual) for virtual in ([1] if pipeline == 1 or uneven else _divisors(even)))
    work = sequence_work(config)
    head = head_parameters(config, vocab) / layer_parameters(config) * work.head_rows / work.rows + mtp_depths(config)
    possible = [last for last in range(1, even + bool(uneven)) if pipeline > 1 and (layers - last) % others == 0]
    if possible:
        last = min(possible, key=lambda last: max((layers - last) // others, last + head))
        yield from ((last, virtual) for virtual in _divisors(math.gcd(last, (layers - last) // others)))


def overrides(layout: Layout) -> list[str]:
    """The settings that make this layout, for a command line."""
    p = layout.config.parallel
    settings = {
        "parallel.tensor": p.tensor,
        "parallel.sequence": str(p.sequence).lower(),
        "parallel.pipeline": p.pipeline,
        "parallel.first_stage_layers": "null" if p.first_stage_layers is None else p.first_stage_layers,
        "parallel.last_stage_layers": "null" if p.last_stage_layers is None else p.last_stage_layers,
        "parallel.virtual_pipeline": p.virtual_pipeline,
        "parallel.context": p.context,
        "parallel.data": layout.data,
        "parallel.recompute": p.recompute,
        "train.micro_batch_size": layout.config.train.micro_batch_size,
    }
    if p.recompute == "full":
        settings["parallel.recompute_layers"] = p.recompute_layers
    return [f"{key}={value}" for key, value in settings.items()]
