"""Block diffusion: the noise of a block, its evidence bound, a step against a plain float64 model, and both ways to
decode; and a method that is one new file."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.plain_tidar import mask as plain_mask
from tests.steps import LENGTH, MASK, SEQUENCES, assert_gradients, clean_rows, one_step, settings
from tests.test_decode import Bytes, prompts, text, tiny_config, world  # noqa: F401
from tests.test_idlm import train
from tests.test_methods import packed
from tidar_mega import config as config_module
from tidar_mega import methods
from tidar_mega.config import ConfigError
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.methods.block_diffusion import masked, share
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.rows import concatenate, visible


def diffusion(**sections) -> config_module.Config:
    return config_module.from_tree({**config_module.to_tree(settings(**sections)), "method": "block_diffusion"})


def test_every_number_and_place_of_masks_is_equally_likely():
    group = torch.arange(6000).repeat_interleave(4)
    is_masked = masked(group, torch.Generator().manual_seed(0)).view(6000, 4)
    numbers = torch.bincount(is_masked.sum(dim=1), minlength=5).tolist()
    assert numbers[0] == 0 and all(abs(n - 1500) < 5 * math.sqrt(1500) for n in numbers[1:])
    by_place = is_masked.sum(dim=0)  # k / 4 on average: 0.625 of the blocks
    assert ((by_place - 3750).abs() < 5 * math.sqrt(6000 * 0.625 * 0.375)).all()


def test_a_block_sees_its_revealed_tokens_and_its_weights_sum_to_its_size():
    clean = packed([9, 16, 7])
    method = methods.load(replace(config_module.from_tree({"data": {"seq_length": 32}}), method="block_diffusion"), 99)
    rows = method.training_rows(clean, torch.tensor([3]))
    assert torch.equal(visible(rows, rows)[0], plain_mask(clean.document[0], 4))
    is_masked = rows.token[0, 32:] == 99
    assert torch.equal(rows.weight[0, 32:] > 0, is_masked) and 0 < int(is_masked.sum()) < 32
    assert torch.equal(rows.token[0, 32:][~is_masked], clean.token[0][~is_masked])
    assert torch.equal(rows.label[0, 32:], clean.token[0])
    weight = share(rows)[0, 32:]
    for group in rows.group[0, 32:].unique():
        of_block = rows.group[0, 32:] == group
        masks = int((is_masked & of_block).sum())
        assert weight[of_block & is_masked].eq(int(of_block.sum()) / masks).all() and masks > 0
        assert float(weight[of_block].sum()) == pytest.approx(int(of_block.sum()))
    assert share(rows)[0, :32].eq(0).all()
    assert not torch.equal(method.training_rows(clean, torch.tensor([4])).token, rows.token)


def test_the_weights_make_the_evidence_bound():
    """Over all sets of masks, of a model that says anything: the mean of sum_masked (n / k) CE is the mean over all
    orders of the chain rule's sum (arXiv 2110.02037)."""
    from itertools import combinations, permutations

    n, draw = 4, torch.Generator().manual_seed(0)
    subsets = [frozenset(c) for k in range(1, n + 1) for c in combinations(range(n), k)]
    ce = {(s, i): float(torch.rand((), generator=draw)) for s in subsets for i in s}  # given what is not in s
    by_size = [[s for s in subsets if len(s) == k] for k in range(1, n + 1)]
    ours = sum(sum(n / len(s) * sum(ce[s, i] for i in s) for s in of_size) / len(of_size) for of_size in by_size) / n
    orders = list(permutations(range(n)))
    chain = sum(sum(ce[frozenset(order[j:]), order[j]] for j in range(n)) for order in orders) / len(orders)
    assert ours == pytest.approx(chain)


@pytest.mark.distributed
def test_a_step_equals_the_plain_model():
    config = diffusion()
    (got,) = processes.run(one_step, 1, config)
    weights = {n: w.double().requires_grad_() for n, w in got["weights"].items()}
    model = PlainTidar(weights, config_module.to_tree(config)["model"])
    method, clean_losses, noisy_loss, places = methods.load(config, MASK), [], 0.0, 0
    for sequence in range(SEQUENCES):
        rows = method.training_rows(clean_rows(sequence), torch.tensor([sequence])).select(0)
        logits = model.logits(model.hidden(rows.token, rows.position, plain_mask(rows.document[:LENGTH], 4)))
        ce = F.cross_entropy(logits, rows.label, reduction="none")
        clean_losses.append(ce[:LENGTH][rows.weight[:LENGTH] > 0])
        for group in rows.group[LENGTH:].unique():
            block = [i for i in range(LENGTH, 2 * LENGTH) if rows.group[i] == group]
            masks = [i for i in block if rows.token[i] == MASK]
            noisy_loss = noisy_loss + len(block) / len(masks) * sum(ce[i] for i in masks)
            places += len(block)
    loss = (config.train.alpha * torch.cat(clean_losses).mean() + noisy_loss / places) / (1 + config.train.alpha)
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert_gradients(got["gradients"], loss, weights)


def test_losses_of_whole_drafts_are_refused():
    with pytest.raises(ConfigError, match="train.focal_weight = 0.3: must be 0 with method = block_diffusion"):
        config_module.from_tree({"method": "block_diffusion", "train": {"focal_weight": 0.3}})


@pytest.mark.slow
def test_it_decodes_by_drafts_exactly_and_by_denoising(world, text, prompts):  # noqa: F811
    config = config_module.override(tiny_config(), ["method=block_diffusion"])
    torch.manual_seed(0)
    (model,) = build(config, Bytes.vocab_size)
    method = methods.load(config, Bytes.mask)
    train(model, method, text, 150, length=128)
    engine = Engine(InferenceModel(model), Bytes(), 4, 128, drafter=method.drafter)
    params = [SamplingParams(24, 0.7, seed=i) for i in range(20)]
    fused, ar, blocks = (engine.generate(prompts[:20], params, mode) for mode in ("fused", "ar", "blocks"))
    assert [g.tokens for g in fused] == [g.tokens for g in ar]
    assert sum(g.tokens_per_forward for g in fused) > 20
    assert all(len(g.tokens) == 24 or g.finish_reason == "stop" for g in blocks)


# a new method is one file

TOY = '''
"""Masks for every other block, and a loss of them alone."""

import torch

from tidar_mega.methods import IN_PLACE, Term
from tidar_mega.losses import DraftTerms
from tidar_mega.methods.tidar import mask_rows
from tidar_mega.rows import concatenate


class Toy:
    drafter = IN_PLACE

    def __init__(self, config, mask_id):
        self.block, self.mask_id = config.train.block, mask_id
        self.terms = (Term("draft", 1.0, lambda rows: ~rows.is_clean),)
        self.drafts = DraftTerms()

    def training_rows(self, clean, sample):
        masks = mask_rows(clean, self.mask_id, self.block, torch.zeros_like(sample))
        masks.weight[:, :] *= masks.group % 2
        clean.weight.zero_()
        return concatenate([clean, masks], dim=1)

    def statistics(self, rows, losses):
        return {"toy": losses.loss.sum()}

    def summary(self, sums):
        return {"toy": float(sums["toy"])}


METHOD = Toy
'''


def toy_step(rank: int, folder: Path) -> dict:
    """A step of a whole training, and a decode, with nothing added to the project but the file."""
    methods.__path__.append(str(folder))
    config = config_module.from_tree({**config_module.to_tree(settings()), "method": "toy"})
    found = one_step(rank, config)
    (model,) = build(config, Bytes.vocab_size)
    engine = Engine(InferenceModel(model), Bytes(), 4, 64, drafter=methods.load(config, Bytes.mask).drafter)
    texts = {mode: engine.generate([[1, 2, 3]], SamplingParams(8), mode)[0].tokens for mode in ("fused", "ar")}
    return {"figures": found["figures"], "norm": found["norm"], "texts": texts}


@pytest.mark.distributed
def test_a_new_method_is_one_file(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (got,) = processes.run(toy_step, 1, tmp_path)
    assert got["figures"]["loss"] == got["figures"]["loss_draft"] > 0 and got["figures"]["toy"] > 0
    assert got["norm"] > 0 and got["texts"]["fused"] == got["texts"]["ar"]
    assert "toy" not in sys.modules
    with pytest.raises(ConfigError, match="method = toy: must be one of ar, block_diffusion, idlm"):
        config_module.override(tiny_config(), ["method=toy"])


def test_subsets_of_blocks_keep_their_noise():
    config = diffusion(train={"draft_fraction": 0.5, "random_offset": True})
    clean = concatenate([clean_rows(0), clean_rows(1)], dim=0)
    rows = methods.load(config, MASK).training_rows(clean, torch.tensor([0, 1]))
    weight = share(rows)
    noisy = (rows.document >= 0) & ~rows.is_clean
    assert rows.shape[1] == LENGTH * 3 // 2
    assert float(weight.sum()) == pytest.approx(int(noisy.sum()))
