"""The visibility rule against an independent statement of each method's mask, one pair of rows at a time.

The masks here are written from the papers: TiDAR training (arXiv 2511.08923, section 3.1), TiDAR decoding (section
3.2), I-DLM's causal mask blocks (arXiv 2604.11035). `Case` and `make_rows` are used by the attention tests too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_mega.rows import PADDING, Rows, concatenate, visible


@dataclass(frozen=True)
class Case:
    """Training rows of one sequence: documents by length, `padding` clean rows after them, blocks cut at `offset`."""

    documents: tuple[int, ...]
    padding: int
    block: int
    offset: int = 0
    fraction: float = 1.0
    masks: bool = True
    causal_in_group: bool = False
    seed: int = 0

    @property
    def size(self) -> int:
        return sum(self.documents) + self.padding


@dataclass(frozen=True)
class Row:
    kind: str  # clean, mask or padding
    document: int = PADDING
    place: int = 0  # inside the document
    block: tuple[int, int] = (0, 0)  # the places [first, end) drafted together with this one


def list_rows(case: Case) -> list[Row]:
    clean = [Row("clean", d, i) for d, length in enumerate(case.documents) for i in range(length)]
    clean += [Row("padding")] * case.padding
    if not case.masks:
        return clean
    blocks = []
    for d, length in enumerate(case.documents):
        cuts = sorted({0, length, *range(case.offset, length, case.block)})
        blocks += [(d, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    slots = round(case.fraction * case.size)
    kept, order = [], random.Random(case.seed).sample(range(len(blocks)), len(blocks))
    for i in order if case.fraction < 1 else range(len(blocks)):
        if sum(b - a for _, a, b in (blocks[j] for j in kept)) + blocks[i][2] - blocks[i][1] <= slots:
            kept.append(i)
    masks = [Row("mask", d, p, (a, b)) for d, a, b in (blocks[i] for i in sorted(kept)) for p in range(a, b)]
    return clean + masks + [Row("padding")] * (slots - len(masks))


def sees(q: Row, k: Row, causal_in_group: bool) -> bool:
    if q.document != k.document:
        return False
    if k.kind == "clean":
        return k.place <= q.place if q.kind == "clean" else k.place < q.block[0]
    return q.kind == "mask" and q.block == k.block and (not causal_in_group or k.place <= q.place)


def make_rows(case: Case) -> Rows:
    """What the product's builders make of a case, in the plainest way: [1, T]."""
    fields: dict[str, list[int]] = {name: [] for name in ("order", "horizon", "group", "document")}
    groups: dict[tuple, int] = {}
    for i, row in enumerate(list_rows(case)):
        fields["document"].append(row.document)
        fields["order"].append(row.place)
        if row.kind == "mask":
            fields["horizon"].append(row.block[0])
            fields["group"].append(groups.setdefault((row.document, row.block), 1 + len(groups)))
        else:
            is_mask_slot = row.kind == "padding" and i >= case.size
            fields["horizon"].append(0 if is_mask_slot else row.place + 1)
            fields["group"].append(100_000 if is_mask_slot else 0)
    order, horizon, group, document = (torch.tensor([fields[n]]) for n in ("order", "horizon", "group", "document"))
    zero = torch.zeros_like(order)
    return Rows(zero, order, order, horizon, group, document, zero, zero.float(), case.causal_in_group)


@st.composite
def cases(draw, most: int = 40) -> Case:
    documents = draw(st.lists(st.integers(1, most), min_size=1, max_size=5))
    block = draw(st.sampled_from((1, 2, 3, 4, 8, 16)))
    return Case(
        documents=tuple(documents),
        padding=draw(st.sampled_from((0, 0, 1, 5))),
        block=block,
        offset=draw(st.integers(0, block - 1)),
        fraction=draw(st.sampled_from((1.0, 1.0, 0.5, 0.3))),
        masks=draw(st.sampled_from((True, True, True, False))),
        causal_in_group=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_training_mask_is_the_methods_mask(case):
    rows, found = list_rows(case), visible(make_rows(case), make_rows(case))[0]
    for q, row in enumerate(rows):
        if row.kind != "padding":
            assert found[q].tolist() == [sees(row, other, case.causal_in_group) for other in rows]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_padding_is_apart(case):
    rows = make_rows(case)
    real = rows.document[0] >= 0
    mask = visible(rows, rows)[0]
    assert not mask[real][:, ~real].any()
    assert not mask[~real][:, real].any()


def test_the_papers_own_picture():
    """One document without offset: the four lines of the doubled sequence's definition."""
    S, B = 24, 4
    mask = visible(*[make_rows(Case((S,), 0, B))] * 2)[0]
    for q in range(S):
        for k in range(S):
            assert mask[q, k] == (k <= q)
            assert not mask[q, S + k]
            assert mask[S + q, k] == (k < B * (q // B))
            assert mask[S + q, S + k] == (k // B == q // B)


def test_no_mask_row_sees_its_own_answer_or_the_future():
    rows = make_rows(Case((17, 9, 30), 2, 8, offset=3))
    mask = visible(rows, rows)[0]
    masks = (rows.group[0] > 0) & (rows.document[0] >= 0)
    same = rows.document[0][:, None] == rows.document[0]
    later = rows.order[0] >= rows.order[0][:, None]
    assert not (mask & same & later & (rows.group[0] == 0))[masks].any()


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7])
def test_decoding_rows(block, length):
    """verify i sees the prefix and d[0..i]; slot i of group j sees the prefix, d[0..j-1] and its own group."""
    place = torch.arange(length + block)[None]
    zero = torch.zeros_like(place)
    clean = Rows(zero, place, place, place + 1, zero, zero, zero, zero.float())
    groups = []
    for j in range(1, block + 1):
        slot = length + j + torch.arange(block)[None]
        z = torch.zeros_like(slot)
        groups.append(Rows(z, slot, slot, z + length + j, z + j, z, z, z.float()))
    keys = concatenate([clean, *groups], dim=1)
    mask = visible(keys.slice(length, keys.shape[1]), keys)[0]
    prefix = set(range(length))
    for i in range(block):
        assert set(mask[i].nonzero().flatten().tolist()) == prefix | {length + x for x in range(i + 1)}
    for j in range(1, block + 1):
        own = {length + block + (j - 1) * block + x for x in range(block)}
        for i in range(block):
            seen = set(mask[block + (j - 1) * block + i].nonzero().flatten().tolist())
            assert seen == prefix | {length + x for x in range(j)} | own


def test_rows_of_different_in_group_rules_do_not_mix():
    a, b = make_rows(Case((8,), 0, 4)), make_rows(Case((8,), 0, 4, causal_in_group=True))
    with pytest.raises(AssertionError):
        concatenate([a, b], dim=1)


def test_take_gives_each_sequence_rows_of_its_own():
    rows = concatenate([make_rows(Case((5, 3), 0, 4)), make_rows(Case((8,), 0, 4))], dim=0)
    index = torch.tensor([[7, 0, 12], [3, 3, 15]])
    taken = rows.take(index)
    for b in range(2):
        for field in ("order", "horizon", "group", "document"):
            assert getattr(taken, field)[b].tolist() == [int(getattr(rows, field)[b, t]) for t in index[b]]
    assert taken.causal_in_group == rows.causal_in_group
