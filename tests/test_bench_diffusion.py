"""What judges samples, the ratio of forwards, and `tidar bench diffusion` on real runs."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.steps import VOCAB
from tests.steps import settings as model_settings
from tests.test_decode_commands import here
from tests.test_main_job import CONFIG, make_corpus, tidar
from tidar_mega import config as config_module
from tidar_mega.bench.diffusion import SPECULATIVE, STANDARD, Judge, ratios
from tidar_mega.decode.diffusion import load_denoiser
from tidar_mega.evaluation.samples import entropy, spelling_accuracy, words


def row(sampler: str, forwards: float, nll: float, spelling: float = 0.5) -> dict:
    return {"sampler": sampler, "forwards": forwards, "judge_nll": nll, "spelling_accuracy": spelling}


def test_the_ratio_is_read_between_the_curves():
    """nll = 6 - log2(forwards) / 2 for the standard sampler, the same with half the forwards for the other."""
    standard = [row(STANDARD, 2.0**k, 6 - k / 2, k / 10) for k in range(2, 8)]
    speculative = [row(SPECULATIVE, 2.0**k, 6 - (k + 1) / 2, (k + 1) / 10) for k in (1.5, 2.5, 3.5, 5.5)]
    found = ratios(standard + speculative)
    assert found["forwards_ratio_at_equal_nll"] == pytest.approx(0.5)
    assert found["forwards_ratio_at_equal_spelling"] == pytest.approx(0.5)
    worse = [row(STANDARD, 64, 9.0)]  # a noisy point that more forwards made worse changes nothing
    assert ratios(standard + speculative + worse)["forwards_ratio_at_equal_nll"] == pytest.approx(0.5)


def test_curves_without_a_common_level_give_no_ratio():
    found = ratios([row(STANDARD, 8, 5.0), row(STANDARD, 16, 4.0), row(SPECULATIVE, 8, 3.0), row(SPECULATIVE, 16, 2.0)])
    assert found["forwards_ratio_at_equal_nll"] is None


def test_words_entropy_and_spelling():
    assert words("ut the cat's paw, and 2 more: élan vi") == ["the", "cat's", "paw", "and", "more", "élan"]
    assert spelling_accuracy(["a the caat b", "x paw y"], {"the", "paw"}) == pytest.approx(2 / 3)
    assert spelling_accuracy([" "], {"the"}) == 0
    assert entropy([[1, 1, 1, 1], [1, 2, 3, 4]]) == pytest.approx(math.log(4) / 2)


def judged(rank: int, config: config_module.Config):
    from tidar_mega.evaluation.samples import judged_loss
    from tidar_mega.model import gpt
    from tidar_mega.model.inference import InferenceModel
    from tidar_mega.parallel.mesh import build_mesh

    build_mesh(config)
    (model,) = gpt.build(config, VOCAB, training=False)
    token = torch.randint(VOCAB, (40, 12), generator=torch.Generator().manual_seed(0))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return weights, token, judged_loss(InferenceModel(model), token)


@pytest.mark.distributed
def test_the_judges_loss_is_the_plain_models():
    config = model_settings()
    ((weights, token, loss),) = processes.run(judged, 1, config)
    plain = PlainTidar({n: w.double() for n, w in weights.items()}, config_module.to_tree(config)["model"])
    for b in (0, 39):
        hidden = plain.hidden(token[b], torch.arange(12), torch.ones(12, 12).tril().bool())
        expected = torch.nn.functional.cross_entropy(plain.logits(hidden[:-1]), token[b, 1:])
        assert float(loss[b]) == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    for method in ("ar", "ssmd", "masked_diffusion"):
        settings = (f"run_dir={method}", f"method={method}", "parallel.data=1", "train.steps=4", "precision.dtype=fp32")
        tidar(folder, "pretrain", "run.yaml", *settings)
    return folder


@pytest.mark.distributed
def test_the_bench_compares_the_samplers(work):
    few = ("--samples", "6", "--batch", "4", "--forwards", "4", "16", "--windows", "1:0.1", "8:0.3")
    command = ("bench", "diffusion", "ssmd", "--judge", "ar", "--baseline", "masked_diffusion", *few)
    here(work, *command, "--json", "bench.json", "--plot", "bench.png")
    figures = json.loads((work / "bench.json").read_text())
    text, *rows = figures["rows"]
    assert [(r["sampler"], r["setting"]) for r in rows] == [
        (STANDARD, "0.2500"),
        (STANDARD, "0.0625"),
        (SPECULATIVE, "1:0.1"),
        (SPECULATIVE, "8:0.3"),
    ]
    assert text["spelling_accuracy"] > 0.5  # of real held-out code
    assert rows[0]["forwards"] == pytest.approx(4, abs=1)
    for r in rows:
        assert 0 <= r["spelling_accuracy"] <= 1
        assert 1 <= r["forwards"] <= 64 * 2
        assert r["judge_nll"] > text["judge_nll"]  # four steps do not make a writer
    assert "forwards_ratio_at_equal_nll" in figures
    assert (work / "bench.png").stat().st_size > 1000


@pytest.mark.distributed
def test_a_corpus_shorter_than_the_window_of_the_vocabulary_is_read_as_a_whole(work, monkeypatch):
    with contextlib.chdir(work):
        of = load_denoiser("ssmd")
        expected = Judge(Path("ar"), of).known
        monkeypatch.setattr("tidar_mega.evaluation.samples.WINDOW", 1 << 40)
        found = Judge(Path("ar"), of).known
    assert len(expected) > 100 and len(found ^ expected) <= 0.01 * len(expected)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("generate", "ssmd", "--prompt", "x"), "tidar bench diffusion ssmd"),
        (("bench", "decode", "masked_diffusion"), "tidar bench diffusion masked_diffusion"),
        (("convert", "ssmd", "--to", "hf"), "method = ssmd"),
        (("bench", "diffusion", "ar", "--judge", "ar"), "tidar generate"),
        (("bench", "diffusion", "masked_diffusion", "--judge", "ar"), "must be a run of method = ssmd"),
        (("bench", "diffusion", "ssmd", "--judge", "ssmd"), "causal half"),
    ],
)
def test_what_cannot_be_decoded_says_what_can(work, command, says):
    said = here(work, *command, code=2)
    assert says in said
    assert "Traceback" not in said
