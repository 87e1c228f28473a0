"""TiDAR's rows: the paper's mask, what no row may see, subsets and offsets of blocks, and the figures for the log."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from tests import processes
from tests.plain_tidar import mask as plain_mask
from tests.steps import MASK, VOCAB
from tests.steps import settings as model_settings
from tidar_mega import config as config_module
from tidar_mega import methods, plan
from tidar_mega.data.pack import pack
from tidar_mega.losses import RowLosses
from tidar_mega.methods.tidar import decoding_rows
from tidar_mega.rows import PADDING, concatenate, visible, visible_pairs

texts = st.lists(st.integers(1, 20), min_size=1, max_size=5)  # lengths of the documents of a row


def method(block: int = 4, fraction: float = 1.0, offset: bool = False, alpha: float = 1.0):
    train = {"block": block, "draft_fraction": fraction, "random_offset": offset, "alpha": alpha}
    return methods.load(config_module.from_tree({"train": train, "data": {"seq_length": block * 64}}), mask_id=99)


def packed(lengths: list[int], padding: int = 0):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    document = torch.cat([document, torch.full((padding + 1,), PADDING)])
    token = torch.randint(0, 90, document.shape, generator=torch.Generator().manual_seed(len(document)))
    return pack(token, document)


@settings(deadline=None, max_examples=60)
@given(texts, st.sampled_from([1, 2, 4, 8]))
def test_the_mask_is_the_papers(lengths, block):
    clean = packed(lengths)
    rows = method(block).training_rows(clean, torch.tensor([0]))
    size = clean.shape[1]
    assert torch.equal(visible(rows, rows)[0], plain_mask(clean.document[0], block))
    assert rows.token[0, size:].eq(99).all() and rows.label[0, size:].equal(clean.token[0])
    assert rows.position[0, size:].equal(clean.position[0]) and rows.weight[0, size:].eq(1).all()


@settings(deadline=None, max_examples=60)
@given(texts, st.sampled_from([1, 2, 4]), st.floats(0.1, 1), st.booleans(), st.integers(0, 9), st.integers(0, 1000))
def test_subsets_and_offsets_keep_whole_blocks_that_see_only_what_is_before_them(
    lengths, block, fraction, offset, padding, sample
):
    clean = packed(lengths, padding)
    rows = method(block, fraction, offset).training_rows(clean, torch.tensor([sample]))
    size = clean.shape[1]
    mask = visible(rows, rows)[0]
    starts = {}
    for q in range(size, rows.shape[1]):
        if rows.document[0, q] == PADDING:
            assert rows.weight[0, q] == 0 and not mask[q, :size][clean.document[0] != PADDING].any()
            continue
        key = (int(rows.document[0, q]), int(rows.horizon[0, q]))
        starts.setdefault(key, []).append(int(rows.order[0, q]))
        same_document = clean.document[0] == rows.document[0, q]
        assert torch.equal(mask[q, :size], same_document & (clean.order[0] < rows.horizon[0, q]))
        assert rows.order[0, q] >= rows.horizon[0, q]
    lengths = torch.bincount(clean.document[0][clean.document[0] >= 0]).tolist()
    shifts = set()
    for (document, horizon), orders in starts.items():
        end = min(lengths[document], horizon + (orders[-1] - horizon) + 1)
        assert orders == list(range(horizon, end)), "a block is contiguous and begins at its horizon"
        assert len(orders) <= block
        if horizon:
            shifts.add(horizon % block)
    assert len(shifts) <= 1, "one offset for a sequence"
    if not offset:
        assert shifts <= {0}
    if fraction == 1 and not padding:
        assert sum(map(len, starts.values())) == size
    assert int(visible_pairs(rows)) == int(mask[(rows.document[0] != PADDING)].sum())


def test_blocks_are_drawn_anew_for_each_sample_and_not_by_rank_or_time():
    clean = packed([64])
    both = concatenate([clean, clean], dim=0)
    chosen = method(4, 0.25).training_rows(both, torch.tensor([5, 6])).order[:, 64:]
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(method(4, 0.25).training_rows(clean, torch.tensor([6])).order[:, 64:], chosen[1:])
    firsts = {int(method(4, 1.0, True).training_rows(clean, torch.tensor([i])).horizon[0, 68]) for i in range(40)}
    assert firsts == {1, 2, 3, 4}


def leak(rank: int) -> list[str]:
    """Changes each clean token in turn and says which mask row's loss moved although it must not see it."""
    from tidar_mega.model import gpt
    from tidar_mega.model.attention import TrainingAttention
    from tidar_mega.parallel.mesh import build_mesh

    config = model_settings()
    build_mesh(config)
    (model,) = gpt.build(config, VOCAB)
    tidar = methods.load(config, MASK)
    clean = packed([9, 16, 7])
    clean = clean.map(lambda x: x % MASK if x is clean.token or x is clean.label else x)
    rows = tidar.training_rows(clean, torch.tensor([0]))
    size, found = clean.shape[1], []
    embedded = []
    hook = model.embedding.register_forward_hook(lambda *a: embedded.append(a[2]) or a[2].retain_grad())
    for backend in ("dense", "tiles"):
        hidden = model(rows=rows, context=TrainingAttention(rows, backend))
        losses = F.cross_entropy(model.logits(hidden[:, 0]), rows.label[0], reduction="none")
        for q in range(size, 2 * size):
            (gradient,) = torch.autograd.grad(losses[q], embedded[-1], retain_graph=True)
            moved = gradient[:, 0].abs().sum(-1) > 0
            may = visible(rows, rows)[0, q].clone()
            may_indirectly = visible(rows, rows)[0][may].any(0) | may
            if (moved & ~may_indirectly).any():
                found.append(f"{backend}: row {q} feels {(moved & ~may_indirectly).nonzero().flatten().tolist()}")
            future = (clean.document[0] == rows.document[0, q]) & (clean.order[0] >= rows.horizon[0, q])
            if moved[:size][future].any():
                found.append(f"{backend}: row {q} feels its own label or the future")
    hook.remove()
    return found


@pytest.mark.distributed
def test_no_mask_row_feels_its_label_the_future_or_another_document():
    assert processes.run(leak, 1)[0] == []


@pytest.mark.parametrize(
    "clean, outcomes, slots", [(1, (), 1), (4, (1, 2, 3, 4), 4), (4, (4,), 8), (5, (0, 2), 3), (3, (), 2)]
)
def test_decoding_rows_are_separate_drafts_behind_each_outcome(clean, outcomes, slots):
    rows = decoding_rows(clean, outcomes, slots, 99)
    mask = visible(rows, rows)[0]
    assert rows.shape == (1, clean + len(outcomes) * slots)
    for i in range(clean):
        assert mask[i].nonzero().flatten().tolist() == list(range(i + 1))
        assert int(rows.position[0, i]) == i
    for g, j in enumerate(outcomes):
        group = range(clean + g * slots, clean + (g + 1) * slots)
        for i, q in enumerate(group):
            assert mask[q].nonzero().flatten().tolist() == [*range(j), *group]
            assert int(rows.position[0, q]) == j + i and int(rows.token[0, q]) == 99


def test_statistics_count_the_run_of_drafts_that_ar_would_accept():
    clean = packed([8])
    tidar = method(4)
    rows = tidar.training_rows(clean, torch.tensor([0]))
    index = rows.weight.nonzero(as_tuple=True)
    prediction = torch.zeros(1, 16, dtype=torch.int64)
    prediction[0, :8] = torch.arange(100, 108)  # AR's choice for place p + 1 is 100 + p
    #                               slot 0 is replaced; 1 agrees, 2 not, 3 agrees -> 2 | 1, 2, 3 agree -> 4
    prediction[0, 8:] = torch.tensor([0, 100, 0, 102, 0, 104, 105, 106])
    losses = RowLosses(torch.zeros(()), torch.zeros(len(index[0])), prediction[index], index)
    sums = tidar.statistics(rows, losses)
    figures = tidar.summary(sums)
    assert figures["expected_tokens_per_forward"] == (2 + 4) / 2
    prediction[0, 8:] = rows.label[0, 8:]
    prediction[0, 9] += 1
    losses = RowLosses(torch.zeros(()), torch.zeros(len(index[0])), prediction[index], index)
    figures = tidar.summary(tidar.statistics(rows, losses))
    assert [figures[f"draft_accuracy/slot_{k}"] for k in range(4)] == [1, 0.5, 1, 1]


def test_weights_of_the_terms_follow_alpha():
    ar, draft = method(alpha=3.0).terms
    assert (ar.coefficient, draft.coefficient) == (0.75, 0.25)


def test_flops_count_every_product_of_the_true_mask():
    config = config_module.from_tree({"model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16,
                                                "num_attention_heads": 2, "num_query_groups": 1}})  # fmt: skip
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, out, gate up down
    forward = 2 * weights * 10 + 2 * 2 * 8 * 30 + 2 * 8 * 50 * 6
    assert plan.training_flops(config, 50, rows=10, pairs=30, head_rows=6) == 3 * forward
