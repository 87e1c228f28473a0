"""Context parallelism: who holds what, how evenly, and that the ranks together attend exactly as one process does."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import processes
from tests.test_attention import error, random_inputs, reference
from tests.test_rows import Case, cases, make_rows
from tidar_mega.model.attention import TrainingAttention, flex_rule
from tidar_mega.model.tile_plan import make_plan
from tidar_mega.parallel import context
from tidar_mega.parallel.balance import imbalance, mask_slots, tile_sizes
from tidar_mega.parallel.context import EMPTY, Part, restore, split, whole
from tidar_mega.rows import PADDING, Rows, concatenate, visible

SCALE = 0.3
FIELDS = ("token", "position", "order", "horizon", "group", "document", "label", "weight")


@dataclass(frozen=True)
class Seat:
    """A place in a group, for what needs no communication."""

    my_rank: int
    ranks: int

    def rank(self) -> int:
        return self.my_rank

    def size(self) -> int:
        return self.ranks


def parts_of(rows: Rows, ranks: int, block: int, multiple: int = 1) -> list[Part]:
    return [split(rows, Seat(rank, ranks), block, multiple) for rank in range(ranks)]


def dealable(case: Case, ranks: int) -> Case:
    """With as many padding rows behind as a context group asks for."""
    return replace(case, padding=case.padding + -case.size % (2 * ranks))


def numbered(rows: Rows) -> Rows:
    """Every row with a token, label and weight of its own."""
    number = torch.arange(1, 1 + rows.token.numel()).view(rows.shape)
    return replace(rows, token=number, label=number + 7, weight=number.float() / 3)


def lognormal(length: int, seed: int, median: int = 400) -> list[int]:
    """Documents of mixed lengths that fill a sequence."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < length:
        lengths.append(max(1, int(median * draw.lognormvariate(0, 1.2))))
    lengths[-1] -= sum(lengths) - length
    return lengths


def clean_rows_of(rows: Rows) -> int:
    return int(rows.is_clean[0].sum())


groups_of_ranks = st.tuples(cases(), st.sampled_from((2, 3, 4)), st.sampled_from((1, 2, 4)))


@settings(max_examples=60, deadline=None)
@given(groups_of_ranks)
def test_every_row_is_held_once_with_all_that_belongs_to_it(drawn):
    case, ranks, multiple = drawn
    rows = numbered(make_rows(dealable(case, ranks)))
    clean, total = clean_rows_of(rows), rows.shape[1]
    parts = parts_of(rows, ranks, case.block, multiple)
    needed = [t for t in range(total) if t < clean or rows.document[0, t] != PADDING]
    assert sorted(int(t) for part in parts for t in part.index[0] if t != EMPTY) == needed
    for part in parts:
        held = part.index[0] != EMPTY
        for name in FIELDS:
            assert torch.equal(getattr(part.rows, name)[0, held], getattr(rows, name)[0, part.index[0, held]]), name
        assert (part.rows.document[0, ~held] == PADDING).all()
        assert (part.rows.weight[0, ~held] == 0).all()
        assert (part.rows.group[0, ~held] > rows.group.max()).all()


@settings(max_examples=60, deadline=None)
@given(groups_of_ranks)
def test_ranks_have_equal_shapes_and_whole_groups(drawn):
    case, ranks, multiple = drawn
    rows = make_rows(dealable(case, ranks))
    clean = clean_rows_of(rows)
    masks = rows.shape[1] - clean
    owner = {}
    for rank, part in enumerate(parts_of(rows, ranks, case.block, multiple)):
        here = part.index[0, : part.clean]
        assert part.clean == clean // ranks
        assert (here.diff() > 0).all()
        assert (here < clean).all()
        length = clean // ranks + mask_slots(clean, masks, ranks, case.block, multiple)
        assert part.rows.shape == (1, length)
        assert part.keys.shape == (1, clean + length - clean // ranks)
        assert length % multiple == 0
        assert length - clean // ranks < -(-masks // ranks) + case.block + multiple
        for t in part.index[0, part.clean :].tolist():
            if t != EMPTY:
                unit = (int(rows.document[0, t]), int(rows.group[0, t]))
                assert owner.setdefault(unit, rank) == rank


@settings(max_examples=40, deadline=None)
@given(groups_of_ranks)
def test_the_keys_of_the_ranks_make_up_the_dense_mask(drawn):
    """Plans and masks of the parts, put back to the places of the whole rows."""
    case, ranks, multiple = drawn
    rows = make_rows(dealable(case, ranks))
    clean, total = clean_rows_of(rows), rows.shape[1]
    found = torch.zeros(total, total, dtype=torch.bool)
    for part in parts_of(rows, ranks, case.block, multiple):
        mask = visible(part.rows, part.keys)[0]
        (structure,) = make_plan(part.rows, part.keys)
        assert torch.equal(structure.visible(), mask)
        at = torch.arange(part.rows.shape[1])[:, None], torch.arange(part.keys.shape[1])
        assert torch.equal(flex_rule(part.rows, part.keys)(0, 0, *at), mask)
        assert mask.any(dim=1).all()  # a softmax over nothing is not a number
        held = part.index[0] != EMPTY
        key_place = torch.cat([torch.arange(clean), part.index[0, part.clean :]])
        assert not mask[held][:, key_place == EMPTY].any()
        part_found = torch.zeros(int(held.sum()), total, dtype=torch.bool)
        part_found[:, key_place[key_place != EMPTY]] = mask[held][:, key_place != EMPTY]
        found[part.index[0, held]] = part_found
    real = (rows.document[0] != PADDING) | (torch.arange(total) < clean)
    assert torch.equal(found[real], visible(rows, rows)[0][real])


def test_the_assignment_is_a_function_of_the_sequence_alone():
    """Equal on every rank and in every call, and not touched by the other sequences of the batch."""
    lengths = (lognormal(512, 1, 60), lognormal(512, 2, 60), [512])
    several = [make_rows(Case(tuple(n), 0, 8, offset=3)) for n in lengths]
    batch = concatenate(several, dim=0)
    parts = parts_of(batch, 4, 8)
    for part in parts[1:]:
        assert torch.equal(part.places, parts[0].places)
    assert torch.equal(split(batch, Seat(0, 4), 8).places, parts[0].places)
    for b, rows in enumerate(several):
        assert torch.equal(split(rows, Seat(0, 4), 8).places[:, 0], parts[0].places[:, b])


def test_one_process_holds_everything_without_copies():
    rows = make_rows(Case((40,), 0, 4))
    for part in (whole(rows), split(rows, None, 4), split(rows, Seat(0, 1), 4)):
        assert part.rows is rows and part.keys is rows
        assert part.index.tolist() == [list(range(80))]
        k, v = torch.randn(2, 80, 1, 1, 4)
        assert context.gather_keys(k, v, part)[0] is k
        values = torch.randn(1, 80)
        assert restore(values, part, 80) is values


def test_unpacked_rows_are_dealt_in_zig_zag():
    """The assignment of ring attention: tile i goes together with tile 2 R - 1 - i (of R ranks)."""
    rows, ranks = make_rows(Case((1024,), 0, 8)), 4
    for part in parts_of(rows, ranks, 8):
        tiles = (part.index[0, : part.clean] // 128).unique().tolist()
        assert sum(tiles) == 2 * ranks - 1
        masks = part.index[0, part.clean :]
        assert ((masks[masks != EMPTY] - 1024) // 128).unique().tolist() == tiles


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_attention_work_is_balanced(length, ranks):
    for block in (4, 8, 16):
        assert imbalance([length], block, ranks) < 1.001
        assert imbalance([length], block, ranks, fraction=0.5) < 1.01
        for seed in range(4):
            assert imbalance(lognormal(length, seed), block, ranks) < 1.015
            assert imbalance(lognormal(length, seed), block, ranks, fraction=0.5) < 1.02
    for seed in range(4):
        assert imbalance(lognormal(length, seed), 1, ranks, fraction=0) < 1.02


@pytest.mark.parametrize(
    "case",
    [
        Case((2048,), 0, 8, offset=5),
        Case(tuple(lognormal(2000, 3)), 48, 16, offset=3),
        Case(tuple(lognormal(2048, 4)), 0, 8, fraction=0.5),
        Case(tuple(lognormal(2048, 5, median=20)), 0, 16),
        Case(tuple(lognormal(2048, 6)), 0, 4, masks=False),
    ],
    ids=["one", "padded", "half", "short", "ar"],
)
def test_the_true_masks_of_the_ranks_are_balanced(case):
    """Counted in the masks themselves, not in what the balance believes."""
    for ranks in (2, 8):
        parts = parts_of(make_rows(case), ranks, case.block)
        pairs = [int(visible(part.rows, part.keys)[:, part.index[0] != EMPTY].sum()) for part in parts]
        assert max(pairs) / np.mean(pairs) < 1.02


def test_tiles_divide_the_rows_of_a_rank():
    assert tile_sizes(4096) == [128, 64, 32, 16, 8]
    assert tile_sizes(200) == [100, 50, 25, 10, 8]
    assert tile_sizes(2 * 131) == [2]
    assert tile_sizes(1) == [1]


def test_the_computed_pairs_stay_near_the_true_ones():
    for case, most in ((Case((2048,), 0, 8), 1.12), (Case(tuple(lognormal(2048, 1)), 0, 8, offset=3), 1.45)):
        rows = make_rows(case)
        true = int(visible(rows, rows).sum())
        for ranks in (2, 4):
            pairs = [make_plan(part.rows, part.keys)[0].pairs for part in parts_of(rows, ranks, 8)]
            assert sum(pairs) < most * true
            assert max(pairs) < 1.08 * np.mean(pairs)


def test_more_than_a_block_in_a_group_is_a_mistake():
    rows = make_rows(Case((64,), 0, 32))
    with pytest.raises(AssertionError, match="larger than a block"):
        split(rows, Seat(0, 4), block=2)


# Real processes

ATTENTION = {
    "packed": [Case((70, 3, 55), 0, 8, offset=5), Case((128,), 0, 8)],
    "half": [Case((100, 28), 0, 4, fraction=0.5, offset=1), Case((60, 58), 10, 4, fraction=0.5, offset=1, seed=3)],
    "causal in group": [Case((90, 35), 3, 8, causal_in_group=True)],
    "ar": [Case((50, 78), 0, 4, masks=False)],
}
WAYS = {  # backend and type, with the error that they may have
    ("dense", torch.float64): 1e-12,
    ("tiles", torch.float64): 1e-12,
    ("tiles", torch.float32): 2e-6,
    ("tiles", torch.bfloat16): 2e-2,
}
HEADS = {"packed": (4, 2), "half": (2, 2), "causal in group": (3, 1), "ar": (4, 2)}


def batch_of(name: str) -> Rows:
    return concatenate([make_rows(case) for case in ATTENTION[name]], dim=0)


def inputs_of(name: str, dtype: torch.dtype) -> tuple:
    rows = batch_of(name)
    return rows, *random_inputs(rows.shape[1], rows.shape[0], dtype, heads=HEADS[name])


def held(x_TBHE: torch.Tensor, part: Part) -> torch.Tensor:
    """This rank's rows of a tensor over the whole rows; 0 for padding."""
    at_LB = part.index.t()
    taken_LBHE = x_TBHE.detach()[at_LB.clamp(min=0), torch.arange(at_LB.shape[1])]
    return taken_LBHE * (at_LB != EMPTY)[..., None, None]


def attend_together(rank: int) -> dict:
    """Of each way and case, this rank's index and [output, dq, dk, dv]; and what flex and the traffic were like."""
    ways = {way: {name: attend_in_part(name, *way) for name in ATTENTION} for way in WAYS}
    return {"flex": flex_in_part(), "traffic": traffic(), **ways}


def attend_in_part(name: str, backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rows, *qkv, grad = inputs_of(name, dtype)
    part = split(rows, dist.group.WORLD, ATTENTION[name][0].block, multiple=2)
    q, k, v = (held(x, part).requires_grad_() for x in qkv)
    out = TrainingAttention(part, backend).attend(1, q, k, v, SCALE)
    gradients = torch.autograd.grad(out, (q, k, v), held(grad, part))
    everywhere = torch.arange(rows.shape[1]).expand(rows.shape)
    is_needed = rows.is_clean | (rows.document != PADDING)
    for dtype in (torch.int64, torch.float32):
        places = restore(part.index.to(dtype), part, rows.shape[1], fill=-7)
        assert torch.equal(places, everywhere.where(is_needed, -7).to(dtype))
    return part.index, [out.detach(), *gradients]


def flex_in_part() -> float:
    """Error of flex, which has only a forward on CPU, against dense."""
    rows, q, k, v, _ = inputs_of("packed", torch.float32)
    part = split(rows, dist.group.WORLD, 8)
    with torch.no_grad():
        q, k, v = (held(x, part) for x in (q, k, v))
        flex, dense = (TrainingAttention(part, name).attend(1, q, k, v, SCALE) for name in ("flex", "dense"))
    return error(flex, dense.double())


def traffic() -> dict[str, list[int]]:
    """Elements that this rank hands to each collective from the whole rows to the gradients."""
    sent: dict[str, list[int]] = {}

    def counted(name: str):
        collective = getattr(dist, name)

        def call(*args, **kwargs):
            sent.setdefault(name, []).append(args[1].numel())
            return collective(*args, **kwargs)

        return call

    names = ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor", "all_reduce", "all_gather")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counted(name))
        attend = TrainingAttention(split(batch_of("packed"), dist.group.WORLD, 8), "dense")
        assert not sent  # who holds what is known without a word
        _, *qkv, grad = inputs_of("packed", torch.float32)
        q, k, v = (held(x, attend.part).requires_grad_() for x in qkv)
        torch.autograd.grad(attend.attend(1, q, k, v, SCALE), (q, k, v), held(grad, attend.part))
    return sent


@pytest.fixture(scope="module", params=[2, 4])
def together(request) -> list[dict]:
    """What every rank of a group of 2 or 4 real processes found."""
    return processes.run(attend_together, request.param)


def put_together(results: list[tuple], which: int, like: torch.Tensor) -> torch.Tensor:
    whole_TBHE = torch.zeros_like(like)
    for index_BL, tensors in results:
        for b, index_L in enumerate(index_BL):
            is_held = index_L != EMPTY
            whole_TBHE[index_L[is_held], b] = tensors[which][is_held, b].to(like.dtype)
    return whole_TBHE


@pytest.mark.distributed
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{way[1]}".replace("torch.", ""))
def test_ranks_together_attend_as_one_process(together, way, name):
    rows, *inputs = inputs_of(name, way[1])
    is_real_TB = (rows.document != PADDING).t()
    inputs[-1] = inputs[-1] * is_real_TB[..., None, None]  # padding weighs nothing, and its masks are left out
    for which, exact in enumerate(reference(rows, *inputs, SCALE)):
        found = put_together([result[way][name] for result in together], which, exact)
        assert error(found[is_real_TB], exact[is_real_TB]) < WAYS[way], which


@pytest.mark.distributed
def test_flex_takes_other_keys_than_queries(together):
    assert max(result["flex"] for result in together) < 2e-6


@pytest.mark.distributed
def test_only_clean_keys_and_values_travel(together):
    batch, key_heads, width, clean, ranks = 2, 2, 16, 128, len(together)
    share = 2 * clean // ranks * batch * key_heads * width  # keys and values of a rank's clean rows
    for result in together:
        assert result["traffic"] == {"all_gather_into_tensor": [share], "all_to_all_single": [ranks * share]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: flex trains only there")
@pytest.mark.parametrize("name", ATTENTION)
def test_flex_on_a_gpu(name, monkeypatch):
    """The ranks one after the other, with keys that need not be gathered."""
    rows, *inputs = inputs_of(name, torch.bfloat16)
    clean = clean_rows_of(rows)
    monkeypatch.setattr("tidar_mega.model.attention.gather_keys", lambda k, v, part: (k, v))
    exact = reference(rows, *inputs, SCALE)[0]
    for part in parts_of(rows, 4, ATTENTION[name][0].block):
        q, *keys = (x.detach() for x in inputs[:3])
        k, v = (torch.cat([x[:clean], held(x, part)[part.clean :]]).cuda().requires_grad_() for x in keys)
        q = held(q, part).cuda().requires_grad_()
        results = []
        for backend in ("flex", "dense"):
            out = TrainingAttention(part.to("cuda"), backend).attend(1, q, k, v, SCALE)
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
        for flex, dense in zip(*results, strict=True):
            assert error(flex, dense.double()) < 2e-2
        is_held = (part.index.t() != EMPTY).cuda()
        assert error(results[0][0][is_held].cpu(), held(exact, part)[is_held.cpu()]) < 2e-2
