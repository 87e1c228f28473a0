"""Every attention backend against the rule's dense mask and against an explicit softmax in float64."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_rows import Case, cases, make_rows
from tidar_mega.model import flash_tiles, tiles
from tidar_mega.model.attention import HybridAttention, TrainingAttention, choose_backend, flex_rule
from tidar_mega.model.tile_plan import make_plan
from tidar_mega.rows import Rows, concatenate, visible

H, G, E, SCALE = 4, 2, 16, 0.3
TYPICAL = (
    Case((192,), 0, 8),
    Case((70, 3, 100), 5, 8, offset=5),
    Case((150, 60), 0, 4, fraction=0.5, offset=1),
    Case((90, 75), 10, 4, causal_in_group=True),
    Case((200,), 0, 4, masks=False),
    Case((40, 30, 20, 10), 0, 16),
)
TILES = (  # algorithm, type, and the error that it may have
    ("flash", torch.float64, 1e-12),
    ("flash", torch.float32, 5e-6),
    ("flash", torch.bfloat16, 3e-2),  # rows of three keys round as coarsely
    ("products", torch.bfloat16, 3e-2),
)
BY_TILES = pytest.mark.parametrize(("algorithm", "dtype", "tolerance"), TILES)
BY_NAME = pytest.mark.parametrize("case", TYPICAL, ids=lambda c: f"{'+'.join(map(str, c.documents))}-B{c.block}")


def stack(*cases: Case) -> Rows:
    return concatenate([make_rows(c) for c in cases], dim=0)


def random_inputs(
    T: int, B: int, dtype: torch.dtype, seed: int = 0, heads=(H, G), width: int = E, device="cpu", K=None
):
    """q, k, v and the gradient of the output: T query rows, K keys (as many as rows, if not given)."""
    draw, K = torch.Generator().manual_seed(seed), K or T
    shapes = [(T, B, heads[0], width), (K, B, heads[1], width), (K, B, heads[1], width), (T, B, heads[0], width)]
    q, k, v, grad = (torch.randn(s, generator=draw).to(device, dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def reference(rows: Rows, q, k, v, grad, scale: float = SCALE, keys: Rows | None = None):
    """(out, dq, dk, dv) in float64, written out; rows that see nothing give 0. Without `keys`, of rows to rows."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    per_key = q.shape[2] // k.shape[2]
    scores = torch.einsum("qbhe,kbhe->bhqk", q, k.repeat_interleave(per_key, dim=2)) * scale
    weights = scores.masked_fill(~visible(rows, keys or rows)[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bhqk,kbhe->qbhe", weights.nan_to_num(0.0), v.repeat_interleave(per_key, dim=2))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def attend(backend: str, rows: Rows, q, k, v, grad, scale: float = SCALE):
    out = TrainingAttention(rows, backend).attend(1, q, k, v, scale)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def attend_in_tiles(algorithm: str, plan, q, k, v, grad, scale: float = SCALE):
    out = tiles.tiled_attention(q, k, v, scale, plan, algorithm)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def error(found, exact) -> float:
    """Relative Frobenius error; gradients near 0 (of rows that see one key) compare with a usual one."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(0.1 * exact.numel() ** 0.5))


def effective_mask(backend: str, rows: Rows) -> torch.Tensor:
    """Which keys each query really averages: equal scores and one-hot values, one width of keys at a time."""
    zero, values = equal_scores_and_one_hot_values(rows)
    with torch.no_grad():
        out = TrainingAttention(rows, backend).attend(1, zero, zero, values, 1.0)
    return out[:, :, 0].transpose(0, 1) > 1e-5


def equal_scores_and_one_hot_values(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    B, T = rows.shape
    return torch.zeros(T, B, 1, T), torch.eye(T)[:, None, None].expand(T, B, 1, T).contiguous()


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from((4, 16, 64)))
def test_plan_is_the_dense_mask(case, chunk):
    rows = make_rows(case)
    (structure,) = make_plan(rows, rows, chunk)
    assert torch.equal(structure.visible(), visible(rows, rows)[0])
    assert structure.row_order.sort().values.tolist() == list(range(rows.shape[1]))


@pytest.mark.parametrize("algorithm", ["flash", "products"])
@settings(max_examples=25, deadline=None)
@given(case=cases(most=60))
def test_tiles_attend_to_the_dense_mask(algorithm, case):
    rows = make_rows(case)
    zero, values = (x.bfloat16() for x in equal_scores_and_one_hot_values(rows))
    with torch.no_grad():
        out = tiles.tiled_attention(zero, zero, values, 1.0, make_plan(rows), algorithm)
    assert torch.equal(out[:, :, 0].transpose(0, 1) > 1e-5, visible(rows, rows))


@settings(max_examples=60, deadline=None)
@given(cases(most=90), st.sampled_from((16, 128)), st.sampled_from((1, 32)), st.sampled_from((40, 768)))
@example(Case((48, 48), 0, 4, masks=False), 16, 1, 768)  # tiles of two documents side by side, both with free keys
def test_the_flash_kernels_pieces_make_up_the_plan(case, chunk, few, band):
    """Every pair is in one piece at most, each visible one in exactly one, and all rows are in the first of a band."""
    rows = make_rows(case)
    (structure,) = make_plan(rows, chunk=chunk)
    times = torch.zeros(structure.visible().shape, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_tiles, "FEW", few)
        patch.setattr(flash_tiles, "BAND", band)
        for band_rows, pieces, sees_R in flash_tiles._bands(structure, torch.float32):
            place = structure.row_order[band_rows]
            assert len(place[pieces[0].rows]) == len(place)
            for piece in pieces:
                keys = torch.cat([torch.arange(a, b) for a, b in piece.keys])
                sees = torch.ones(len(place[piece.rows]), len(keys), dtype=torch.bool)
                if piece.bias_RL is not None:
                    sees &= piece.bias_RL == 0
                if sees_R is not None:
                    sees &= sees_R[:, None] > 0
                times[place[piece.rows][:, None], keys] += sees
    assert torch.equal(times, structure.visible().long())


@settings(max_examples=6, deadline=None)
@given(cases())
def test_flex_attends_to_the_dense_mask(case):
    rows = make_rows(case)
    assert torch.equal(effective_mask("flex", rows), visible(rows, rows))


@settings(max_examples=25, deadline=None)
@given(cases())
def test_flex_rule_and_block_mask_cover_the_dense_mask(case):
    rows, T = make_rows(case), make_rows(case).shape[1]
    index = torch.arange(T)
    assert torch.equal(flex_rule(rows)(0, 0, index[:, None], index), visible(rows, rows)[0])
    blocks = TrainingAttention(rows, "flex").block_mask.to_dense()[0, 0].bool()
    wide = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:T, :T]
    assert not (visible(rows, rows)[0] & ~wide).any()


def test_tiles_do_not_read_what_no_row_sees():
    """A key that the rule hides from all rows may hold anything."""
    rows = make_rows(Case((100, 30), 6, 8))
    q, k, v, _ = random_inputs(rows.shape[1], 1, torch.float32)
    unseen = ~visible(rows, rows)[0][rows.document[0] >= 0].any(0)
    assert unseen.any()
    before = TrainingAttention(rows, "tiles").attend(1, q, k, v, SCALE)
    after = TrainingAttention(rows, "tiles").attend(1, q, k + 1e4 * unseen[:, None, None, None], v, SCALE)
    real = rows.document[0] >= 0
    assert torch.equal(before[real], after[real])


@BY_NAME
@pytest.mark.parametrize("backend", ["dense", "tiles"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_results_and_gradients(case, backend, dtype, tolerance):
    rows = make_rows(case)
    inputs = random_inputs(rows.shape[1], 1, dtype)
    for found, exact in zip(attend(backend, rows, *inputs), reference(rows, *inputs), strict=True):
        assert found.dtype == dtype
        assert error(found, exact) < tolerance


several_cases = st.lists(cases(), min_size=2, max_size=3)
groupings = st.sampled_from(((4, 2), (2, 2), (3, 1)))


@BY_TILES
@settings(max_examples=20, deadline=None)
@given(several=several_cases, heads=groupings, small=st.booleans())
def test_tiles_of_any_batch(algorithm, dtype, tolerance, several, heads, small):
    """Different structures in one batch, padded to one length; with many small pieces and with few large ones."""
    length = max(make_rows(c).shape[1] for c in several)
    parts = [_padded(make_rows(c), length, several[0].causal_in_group) for c in several]
    rows = concatenate([*parts, parts[0]], dim=0)
    inputs = random_inputs(length, len(parts) + 1, dtype, heads=heads)
    plan = make_plan(rows, chunk=16 if small else 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SCRATCH", 1 if small else 1 << 20)
        patch.setattr(flash_tiles, "FEW", 1 if small else 32)
        found = attend_in_tiles(algorithm, plan, *inputs)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, reference(rows, *inputs), strict=True):
        assert a.dtype == dtype and error(a, b) < tolerance, name


@BY_TILES
@settings(max_examples=20, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000), chunk=st.sampled_from((16, 128)))
def test_tiles_of_any_queries_and_keys(algorithm, dtype, tolerance, case, seed, chunk):
    """Some rows ask some others, in any order: several of them see nothing."""
    rows = make_rows(case)
    total = rows.shape[1]
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    queries, keys = shuffled[: total // 2 + 1], shuffled[total // 3 :]
    queries, keys = rows.map(lambda x: x[:, queries]), rows.map(lambda x: x[:, keys])
    inputs = random_inputs(queries.shape[1], 1, dtype, K=keys.shape[1])
    found = attend_in_tiles(algorithm, make_plan(queries, keys, chunk), *inputs)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, reference(queries, *inputs, keys=keys), strict=True):
        assert error(a, b) < tolerance, name


@BY_TILES
def test_tiles_of_long_rows(algorithm, dtype, tolerance):
    """Long enough for bands of several tiles and for both kinds of rows that see none of a piece's keys."""
    rows = stack(Case((700, 100), 0, 8, offset=3), Case((333, 467), 0, 8, offset=1))
    inputs = random_inputs(rows.shape[1], 2, dtype)
    plan = make_plan(rows)
    assert len(plan) == 2
    assert any(len(pieces) > 2 for s in plan for _, pieces, _ in flash_tiles._bands(s, dtype))
    for a, b in zip(attend_in_tiles(algorithm, plan, *inputs), reference(rows, *inputs), strict=True):
        assert error(a, b) < tolerance


def test_choice_of_algorithm():
    assert {tiles.choose_algorithm(x) for x in (torch.float32, torch.float64, torch.float16)} == {"flash"}
    assert tiles.choose_algorithm(torch.bfloat16) == ("products" if tiles.has_bfloat16_units() else "flash")


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs x86 Linux")
def test_bfloat16_units_are_those_of_the_processor():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert tiles.has_bfloat16_units() == ("avx512_bf16" in flags.split())


def _padded(rows: Rows, length: int, causal_in_group: bool) -> Rows:
    """Rows that see nothing at all are put behind, as badly built padding would be."""
    names = ("token", "position", "order", "horizon", "group", "document", "label", "weight")
    more = length - rows.shape[1]
    fill = {"document": -2, "group": 0, "horizon": 0}
    parts = {n: torch.nn.functional.pad(getattr(rows, n), (0, more), value=fill.get(n, 0)) for n in names}
    return Rows(**parts, causal_in_group=causal_in_group)


def test_rows_that_see_nothing_do_no_harm():
    rows = _padded(make_rows(Case((60,), 0, 4)), 130, False)
    assert not visible(rows, rows)[0, -1].any()
    inputs = random_inputs(130, 1, torch.float32)
    for found, exact in zip(attend("tiles", rows, *inputs), reference(rows, *inputs), strict=True):
        assert torch.isfinite(found).all()
        assert error(found, exact) < 2e-6


def test_a_mask_rows_gradient_reaches_only_what_it_sees():
    case = Case((50, 40), 0, 8, offset=3)
    rows = make_rows(case)
    mask, T = visible(rows, rows)[0], rows.shape[1]
    for row in (95, 120, 150, 179):
        q, k, v, grad = random_inputs(T, 1, torch.float32)
        only = torch.zeros_like(grad)
        only[row] = grad[row]
        _, dq, dk, dv = attend("tiles", rows, q, k, v, only)
        for gradient in (dk, dv):
            assert torch.equal(gradient[:, 0].abs().sum((1, 2)) > 0, mask[row])
        assert dq[torch.arange(T) != row].abs().sum() == 0


def test_tiles_pass_gradcheck():
    rows = make_rows(Case((9, 6), 1, 4, offset=1))
    q, k, v, _ = random_inputs(rows.shape[1], 1, torch.float64, heads=(2, 1), width=3)
    context = TrainingAttention(rows, "tiles")
    assert torch.autograd.gradcheck(lambda *x: context.attend(1, *x, SCALE), (q, k, v))


@pytest.mark.parametrize("algorithm", ["flash", "products"])
@pytest.mark.parametrize("size", [1.0, 4.0, 12.0])
def test_bfloat16_is_no_less_accurate_than_torchs_flash_kernel(size, algorithm):
    """Whatever the size of the scores."""
    rows = make_rows(Case((512,), 0, 8))
    q, k, v, grad = random_inputs(1024, 1, torch.bfloat16, heads=(4, 1), width=64)
    q = (q.detach() * size).requires_grad_()
    exact = reference(rows, q, k, v, grad, 64**-0.5)
    ours = attend_in_tiles(algorithm, make_plan(rows), q, k, v, grad, 64**-0.5)
    theirs = attend("dense", rows, q, k, v, grad, 64**-0.5)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) <= 1.02 * error(b, c)


def test_tiles_leave_the_process_wide_precision_alone():
    rows = make_rows(Case((16,), 0, 4))
    for before in ("highest", "high"):
        torch.set_float32_matmul_precision(before)
        attend_in_tiles("products", make_plan(rows), *random_inputs(32, 1, torch.bfloat16))
        assert torch.get_float32_matmul_precision() == before
    torch.set_float32_matmul_precision("highest")


def test_strided_inputs_and_unusual_width():
    """Megatron's v is a slice of the fused projection."""
    rows = make_rows(Case((70,), 0, 4))
    fused = torch.randn(140, 1, G, 3 * 24)
    q, k, v = fused[..., :24].repeat_interleave(2, dim=2), fused[..., 24:48], fused[..., 48:]
    grad = torch.randn(140, 1, 2 * G, 24)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    for found, exact in zip(attend("tiles", rows, *inputs, grad), reference(rows, *inputs, grad), strict=True):
        assert error(found, exact) < 2e-6


def test_work_is_close_to_the_true_mask():
    for case, most in ((Case((1024,), 0, 8), 1.2), (Case((300, 500, 224), 0, 8, offset=3), 1.8)):
        rows = make_rows(case)
        (structure,) = make_plan(rows)
        assert structure.pairs <= most * int(visible(rows, rows).sum())


@BY_NAME
def test_flex_forward(case):
    rows = make_rows(case)
    inputs = random_inputs(rows.shape[1], 1, torch.float32)
    with torch.no_grad():
        out = TrainingAttention(rows, "flex").attend(1, *inputs[:3], SCALE)
    assert error(out, reference(rows, *inputs)[0]) < 2e-6


def test_choice_of_backend():
    assert choose_backend("auto", "cpu", torch.bfloat16) == "tiles"
    assert choose_backend("auto", "cuda", torch.bfloat16) == "flex"
    assert choose_backend("auto", "cuda:1", torch.float64) == "dense"
    assert choose_backend("dense", "cpu", torch.float32) == "dense"
    for name, device in (("flex", "cpu"), ("tiles", "cuda"), ("fast", "cpu")):
        with pytest.raises(ValueError, match="model.attention"):
            choose_backend(name, device, torch.float32)


def test_layer_hands_its_inputs_to_the_context():
    from megatron.core.transformer import TransformerConfig

    rows = stack(Case((20,), 0, 4), Case((12, 8), 0, 4))
    q, k, v, _ = random_inputs(40, 2, torch.float32)
    config = TransformerConfig(num_layers=1, hidden_size=H * E, num_attention_heads=H, num_query_groups=G)
    context = TrainingAttention(rows, "tiles")
    for scale in (None, 0.1):
        layer = HybridAttention(config=config, layer_number=1, attn_mask_type=None, softmax_scale=scale)
        out = layer(q, k, v, None, attention_bias=context)
        assert torch.equal(out, context.attend(1, q, k, v, scale or E**-0.5).flatten(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: flex trains only there")
@BY_NAME
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
def test_flex_on_a_gpu(case, dtype, tolerance):
    rows = make_rows(case)
    inputs = random_inputs(rows.shape[1], 1, dtype, width=64, device="cuda")
    exact = reference(rows.to("cuda"), *inputs)
    for backend in ("dense", "flex"):
        for found, right in zip(attend(backend, rows.to("cuda"), *inputs), exact, strict=True):
            assert error(found, right) < tolerance
