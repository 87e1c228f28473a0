"""Masked diffusion and its self-speculative form: rows, draws, one step against plain float64, every layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests import processes
from tests.plain_ssmd import Document, PlainSsmd
from tests.steps import MASK, SEQUENCES, SETTINGS, assert_gradients, clean_rows, one_step
from tidar_mega import config as config_module
from tidar_mega import methods
from tidar_mega.methods.masked_diffusion import bound_weight
from tidar_mega.rows import PADDING, Rows, concatenate, visible, visible_pairs

METHODS = ("masked_diffusion", "ssmd")


def settings(method: str, **sections) -> config_module.Config:
    tree = {**SETTINGS, **{k: {**SETTINGS.get(k, {}), **v} for k, v in sections.items()}}
    return config_module.from_tree({**tree, "method": method})


def training_rows(method: str, samples: list[int], seed: int = 1234) -> Rows:
    config = settings(method, train={"seed": seed})
    clean = concatenate([clean_rows(i) for i in samples], dim=0)
    return methods.load(config, MASK).training_rows(clean, torch.tensor(samples))


def documents(samples: list[int], config: config_module.Config) -> list[Document]:
    """What the method drew, read from the rows that it made."""
    found = []
    rows = methods.load(replace(config, method="ssmd"), MASK).training_rows(
        concatenate([clean_rows(i) for i in samples], dim=0), torch.tensor(samples)
    )
    size = rows.shape[1] // 2
    for b in range(len(samples)):
        for number in rows.document[b].unique():
            at = (rows.document[b, :size] == number).nonzero().squeeze(1)
            revealed = int((rows.weight[b, at] == 0).sum())
            found.append(Document(rows.label[b, at], rows.order[b, size + at].argsort().tolist(), revealed))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_the_papers(seed):
    """The visibility of every pair of rows, and what they hold, from the statement of the method."""
    rows = training_rows("ssmd", [seed])
    size = rows.shape[1] // 2
    seen, order = visible(rows, rows)[0], rows.order[0]
    for q in range(2 * size):
        for k in range(2 * size):
            same = rows.document[0, q] == rows.document[0, k] and (q < size) == (k < size)
            assert seen[q, k] == (same and (q < size or order[k] <= order[q]))
    assert visible_pairs(rows) == int(seen.sum())
    for d, document in zip(rows.document[0].unique(), documents([seed], settings("ssmd")), strict=True):
        at = (rows.document[0, :size] == d).nonzero().squeeze(1)
        assert sorted(document.sigma) == list(range(len(at)))
        assert 0 <= document.revealed < len(at)
        assert torch.equal(rows.token[0, at], document.masked(MASK))
        before = [MASK] + [int(document.token[p]) for p in document.sigma[:-1]]
        assert [int(rows.token[0, size + at[p]]) for p in document.sigma] == before
        assert torch.equal(rows.weight[0, at] > 0, document.masked(MASK) == MASK)
    assert torch.equal(rows.weight[0, :size], rows.weight[0, size:])
    assert torch.equal(rows.position[0, :size], rows.position[0, size:])


def test_no_row_sees_the_token_that_it_must_predict():
    """Change one masked token: nothing that feeds its own row may change, in either half."""
    config, clean = settings("ssmd"), clean_rows(3)
    method, sample = methods.load(config, MASK), torch.tensor([3])
    before = method.training_rows(clean, sample)
    seen, size = visible(before, before)[0], before.shape[1] // 2
    for place in (before.weight[0, :size] > 0).nonzero().squeeze(1).tolist():
        token = clean.token.clone()
        token[0, place] = (token[0, place] + 1) % MASK
        after = method.training_rows(replace(clean, token=token), sample)
        changed = (after.token != before.token)[0]
        assert not (seen[[place, size + place]] & changed).any()


def test_draws_are_a_function_of_the_sample_and_uniform():
    assert torch.equal(training_rows("ssmd", [5, 9]).token[1], training_rows("ssmd", [9]).token[0])
    assert not torch.equal(training_rows("ssmd", [5]).order, training_rows("ssmd", [5], seed=1).order)
    method = methods.load(settings("ssmd"), MASK)
    size, samples = 3, 6000
    one = clean_rows(0).slice(0, size)
    one = replace(one, document=torch.zeros_like(one.document), order=torch.arange(size)[None])
    many = one.map(lambda x: x.expand(samples, -1))
    rows = method.training_rows(many, torch.arange(samples))
    revealed = (rows.weight[:, :size] == 0).sum(dim=1)
    cells = Counter(zip(map(tuple, rows.order[:, size:].tolist()), revealed.tolist(), strict=True))
    expected = samples / 18  # 3! orders x 3 numbers of revealed places
    assert len(cells) == 18
    assert sum((n - expected) ** 2 / expected for n in cells.values()) < 40.8  # chi-square, 17 degrees, p = 0.001


def test_the_weight_is_the_bounds():
    rows = training_rows("ssmd", list(range(4)))
    weight, size = bound_weight(rows), rows.shape[1] // 2
    for half in (slice(0, size), slice(size, 2 * size)):
        for b in range(4):
            for d in rows.document[b].unique():
                at = rows.document[b, half] == d
                masked = rows.weight[b, half][at] > 0
                assert torch.allclose(weight[b, half][at], torch.tensor(len(masked) / int(masked.sum())).double())


def test_padding_carries_no_weight():
    clean = clean_rows(0)
    document = clean.document.clone()
    document[0, 20:] = PADDING
    rows = methods.load(settings("ssmd"), MASK).training_rows(replace(clean, document=document), torch.tensor([0]))
    assert not (rows.weight[rows.document == PADDING] > 0).any()
    assert (rows.weight > 0).any()


@pytest.mark.parametrize(("override", "key"), [("model.num_layers=1", "num_layers"), ("train.focal_weight=1", "focal")])
def test_what_the_method_cannot_have_is_refused(override, key):
    with pytest.raises(config_module.ConfigError, match=f"{key}.*method = ssmd"):
        config_module.load(None, ["method=ssmd", override])


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_a_step_equals_the_plain_model(method, backend):
    config = settings(method, model={"attention": backend, "num_layers": 3, "tie_embeddings": backend == "tiles"})
    (got,) = processes.run(one_step, 1, config)
    weights = {n: w.double().requires_grad_() for n, w in got["weights"].items()}
    plain = PlainSsmd(weights, config_module.to_tree(config)["model"])
    drawn = documents(list(range(SEQUENCES)), config)
    noncausal, causal = plain.loss(drawn, MASK, has_causal=method == "ssmd")
    expected = {"loss": noncausal + causal, ("loss_noncausal" if method == "ssmd" else "loss_diffusion"): noncausal}
    expected |= {"loss_causal": causal} if method == "ssmd" else {}
    for name, value in expected.items():
        assert got["figures"][name] == pytest.approx(float(value), rel=1e-6), name
    assert_gradients(got["gradients"], noncausal + causal, weights)
