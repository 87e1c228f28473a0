"""Decoding on a tensor-parallel model: every rank takes the same decisions, which are those of one process."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import pytest

from tests import processes
from tests.test_decode import Bytes, tiny_config
from tidar_mega.config import ParallelConfig
from tidar_mega.decode import latency
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.methods import IN_PLACE
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh

PROMPTS = [[65], [1, 2, 3, 4, 5], [200] * 30, list(range(100, 117)), [7, 8]]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=30, temperature=1.0, seed=1),
    SamplingParams(max_tokens=9, temperature=0.7, seed=2),
    SamplingParams(max_tokens=30, temperature=1.0, top_k=20, seed=3),
    SamplingParams(max_tokens=30, temperature=1.0, top_k=90, top_p=0.9, seed=4),
]


def _decode(rank: int, tensor: int, pipeline: int, data: int = 1) -> dict[str, list[tuple]]:
    """What came out, and what was accepted on the way: a draft that is wrong would cost speed alone."""
    config = tiny_config()
    # weights are cut from one full draw, so they are equal in every layout; large, so that ids differ in likelihood
    config = replace(
        config, parallel=ParallelConfig(tensor=tensor, pipeline=pipeline), model=replace(config.model, init_std=0.2)
    )
    mesh = build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    engine = Engine(InferenceModel(model), Bytes(), block=4, capacity=128, replicas=mesh.data if data > 1 else None)
    found = {mode: [(g.tokens, g.accepted) for g in engine.generate(PROMPTS, PARAMS, mode)] for mode in ("fused", "ar")}
    alone = [engine.generate([p], s)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)] if data == 1 else []
    return found | {"alone": [(g.tokens, g.accepted) for g in alone]}


@functools.cache
def one_process() -> dict[str, list[tuple]]:
    (found,) = processes.run(_decode, 1, 1, 1)
    tokens, accepted = zip(*found["fused"], strict=True)
    assert list(tokens) == [ar for ar, _ in found["ar"]]
    assert len({tuple(t) for t in tokens}) == 5 and len(set(tokens[1])) > 5
    assert {1} < {r for of_one in accepted for r in of_one}, "some drafts are kept, some are not"
    return found


def _measure(rank: int, tensor: int, pipeline: int) -> bool:
    """The second rank is slow, and would run fewer forwards than the first in the time of a burst."""
    config = replace(tiny_config(), parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    engine = Engine(InferenceModel(model), Bytes(), block=2, capacity=128)
    forwards, run = engine.forwards, engine.forwards.run

    def slow(works):
        time.sleep(0.002 * rank)
        return run(works)

    forwards.run = slow
    latency.BURST_SECONDS = 0.01
    found = latency.measure(forwards, [1, 2], block=2, drafter=IN_PLACE, prefix=8, repeats=2)
    return all(len(points) > 1 for points in found.step.values())


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_ranks_measure_as_often_as_one_another(tensor, pipeline):
    assert all(processes.run(_measure, 2, tensor, pipeline))


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_parallel_ranks_decode_what_one_process_decodes(tensor, pipeline):
    expected = one_process()
    assert expected["fused"] == expected["alone"]
    for found in processes.run(_decode, 2, tensor, pipeline):
        assert found == expected


@pytest.mark.distributed
def test_replicas_divide_the_prompts_and_give_all_of_them_in_order():
    """Five prompts over two."""
    expected = one_process()
    for found in processes.run(_decode, 2, 1, 1, 2):
        assert found == expected | {"alone": []}
