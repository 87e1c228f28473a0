"""`tidar bench methods`: every method has as many rows in a step, and real runs of some fill the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_main_job import CONFIG, make_corpus, tidar
from tidar_mega import config as config_module
from tidar_mega.bench import methods
from tidar_mega.plan.work import sequence_work

SHARED = Path(__file__).parent.parent / "configs" / "methods.yaml"


def test_every_method_has_drafts_as_long_and_as_many_rows_in_a_step():
    shared = config_module.load(SHARED)
    found = {name: methods._config(shared, name, 1, Path("runs")) for name in methods.METHODS}
    assert {methods.draft_length(c) for c in found.values() if c.traits.drafts_blocks} == {shared.train.block}
    rows = {name: c.train.global_batch_size * sequence_work(c).rows for name, c in found.items()}
    layers = shared.model.num_layers
    # half of the rows of ssmd go through all layers but the last, the other half through that one
    passes = {
        "ssmd": layers / 2,
        "mtp": 2 * layers / (1 + layers),
    }  # of mtp, S rows go through the layers and each depth
    through = {name: n * passes.get(name, layers) for name, n in rows.items()}
    assert set(through.values()) == {shared.train.global_batch_size * 2 * shared.data.seq_length * layers}
    assert len({c.run_dir for c in found.values()}) == len(found)


def test_the_mean_over_seeds_has_its_spread():
    rows = [{"method": "ar", "seed": s, "loss": s * 1.0, "none": None} for s in (1, 2, 3)]
    assert methods.means(rows) == {"ar": {"loss": 2.0, "spread": {"loss": 1.0}}}


@pytest.mark.distributed
@pytest.mark.slow
def test_methods_are_trained_decoded_and_put_side_by_side(tmp_path):
    make_corpus(tmp_path)
    text = CONFIG.replace("seq_length: 64", "seq_length: 60").replace("parallel: {data: 2}", "parallel: {data: 1}")
    (tmp_path / "run.yaml").write_text(text)
    few = ["--prompts", "2", "--prompt-tokens", "16", "--max-tokens", "8", "--samples", "2"]
    named = [
        "--methods",
        "ar",
        "mtp",
        "tidar_left_to_right",
        "idlm",
        "ssmd",
        "--json",
        "found.json",
        "--plot",
        "found.png",
    ]
    said = tidar(tmp_path, "bench", "methods", "run.yaml", "train.steps=6", *few, *named)
    found = json.loads((tmp_path / "found.json").read_text())["methods"]
    assert list(found) == ["ar", "mtp", "tidar_left_to_right", "idlm", "ssmd"]
    for name in ("ar", "mtp", "tidar_left_to_right", "idlm"):
        figures = found[name]
        assert figures["identical_to_ar"] == 1 and figures["tokens_per_forward"] >= 1
        assert figures["validation_loss_ar"] > 0 and figures["training_flops_per_token"] > 0
    assert found["ar"]["tokens"] == 2 * found["idlm"]["tokens"]
    assert found["ar"]["training_flops_per_token"] < found["idlm"]["training_flops_per_token"]
    assert found["ssmd"]["validation_loss"] > 0 and "tokens_per_forward" not in found["ssmd"]
    assert (tmp_path / "found.png").stat().st_size > 0 and "$ tidar bench diffusion" in said
    again = tidar(tmp_path, "bench", "methods", "run.yaml", "train.steps=6", *few, "--methods", "ar")
    assert "already done: 6 steps" in again
