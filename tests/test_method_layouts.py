"""Every other method, cut every way that TiDAR can be, against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.test_layouts import (
    ALONE,
    GRADIENT,
    LAYOUTS,
    LOSS,
    compare,
    load_and_go_on,
    packed_corpus,
    save_and_go_on,
    train,
)
from tests.test_layouts import settings as tidar_settings
from tidar_mega import config as config_module

pytestmark = pytest.mark.distributed
STEPS = 3
METHODS = ("ar", "block_diffusion", "idlm", "masked_diffusion", "ssmd", "mtp")


def settings(corpus: Path, layout: tuple, method: str, **more) -> config_module.Config:
    config = replace(tidar_settings(corpus, layout, 1.0, **more), method=method)
    if method == "mtp":
        config = replace(config, model=replace(config.model, mtp_num_layers=2))
    config_module.check(config)
    return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return packed_corpus(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(corpus) -> dict:
    configs = [settings(corpus, ALONE, method) for method in METHODS]
    return dict(zip(METHODS, processes.run(train, 1, configs, STEPS)[0], strict=True))


UNEVEN = {"last_stage_layers": 1}  # for a causal layer alone, or the head and the depths


@pytest.mark.parametrize(
    ("layout", "ends"), [*((layout, {}) for layout in LAYOUTS if layout != ALONE), ((1, 2, 1, 1, 1), UNEVEN)], ids=str
)
def test_a_layout_equals_one_process(layout, ends, corpus, alone):
    size = layout[0] * layout[1] * layout[3] * layout[4]
    configs = [settings(corpus, layout, method, **ends) for method in alone]
    results = zip(*processes.run(train, size, configs, STEPS), strict=True)
    for got, (method, expected) in zip(results, alone.items(), strict=True):
        figures, gradients = compare(got, [expected])
        assert figures < LOSS, method
        assert gradients < GRADIENT, method


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputing_and_overlap_change_nothing(recompute, corpus, alone):
    more = {"recompute": recompute, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 10_000}
    (got,) = zip(*processes.run(train, 2, [settings(corpus, (1, 1, 1, 1, 2), "ssmd", **more)], STEPS), strict=True)
    figures, gradients = compare(got, [alone["ssmd"]])
    assert figures < LOSS
    assert gradients < GRADIENT


@pytest.mark.parametrize(
    ("method", "tied", "first"),
    [("ssmd", False, (2, 1, 1, 1, 1)), ("mtp", False, (2, 1, 1, 1, 1)), ("mtp", True, (1, 2, 2, 1, 1))],
)
def test_a_checkpoint_goes_on_under_any_layout(method, tied, first, corpus, tmp_path):
    def config(layout: tuple) -> config_module.Config:
        found = settings(corpus, layout, method)
        return replace(found, model=replace(found.model, tie_embeddings=tied))

    ((path, expected), *_) = processes.run(save_and_go_on, 2, config(first), tmp_path)
    for layout in ((1, 2, 2, 1, 1), (1, 1, 1, 2, 1), ALONE):
        size = layout[1] * layout[3]
        got = torch.tensor(processes.run(load_and_go_on, size, config(layout), path)[0])
        error = float(((got - torch.tensor(expected)).abs() / torch.tensor(expected).abs().clamp(min=0.1)).max())
        assert error < LOSS
