"""I-DLM (arXiv 2604.11035): its rows, a step against a plain float64 model, every layout against one process, and
introspective strided decoding against plain AR decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.plain_tidar import mask as tidar_mask
from tests.steps import (
    IN_TWO,
    LENGTH,
    MASK,
    SEQUENCES,
    TOKEN_BYTES,
    VOCAB,
    Text,
    assert_gradients,
    assert_same_step,
    one_steps,
    settings,
)
from tests.steps import text as documents
from tests.test_decode import Bytes, prompts, text, tiny_config, world  # noqa: F401
from tests.test_decode import clean_rows as rows_of_text
from tests.test_left_to_right import ALL
from tests.test_methods import packed
from tidar_mega import config as config_module
from tidar_mega import methods, plan
from tidar_mega.config import ConfigError, ParallelConfig, UserError
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.forward import Plan, Work
from tidar_mega.decode.latency import Curves
from tidar_mega.decode.outcomes import Drafting
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.losses import RowLosses, cross_entropy
from tidar_mega.methods.idlm import IntrospectiveDiffusion
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.context import whole
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.rows import PADDING, Rows, concatenate, visible, visible_pairs

DRAFTER = IntrospectiveDiffusion.drafter


def idlm(train: dict | None = None, **sections) -> config_module.Config:
    tree = config_module.to_tree(settings(train={"block": 2}, **sections))
    return config_module.from_tree({**tree, "method": "idlm", "train": {**tree["train"], **(train or {})}})


# rows


def plain_mask(document: torch.Tensor, block: int) -> torch.Tensor:
    """The paper's mask: TiDAR's, and inside a block nobody sees a later mask."""
    size = len(document)
    allowed = tidar_mask(document, block)
    later = torch.arange(size)[:, None] < torch.arange(size)
    allowed[size:, size:] &= ~later
    return allowed


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[12], [5, 1, 6], [3, 9]])
def test_the_mask_is_the_papers_and_labels_are_shifted_on_both_halves(block, lengths):
    config = config_module.from_tree({"method": "idlm", "train": {"block": block}, "data": {"seq_length": 12}})
    clean = packed(lengths)
    rows = methods.load(config, 99).training_rows(clean, torch.tensor([0]))
    assert torch.equal(visible(rows, rows)[0], plain_mask(clean.document[0], block))
    assert rows.token[0, 12:].eq(99).all()
    for half in (slice(0, 12), slice(12, 24)):
        assert rows.label[0, half].equal(clean.label[0]) and rows.weight[0, half].equal(clean.weight[0])
        assert rows.position[0, half].equal(clean.position[0])
    assert visible_pairs(rows) == int(visible(rows, rows).sum())


def test_the_planned_pairs_are_those_of_the_mask():
    config = config_module.from_tree({"method": "idlm", "train": {"block": 4}, "data": {"seq_length": 32}})
    rows = methods.load(config, 99).training_rows(packed([32]), torch.tensor([0]))
    from tidar_mega.plan.work import sequence_work

    assert sequence_work(config).pairs == visible_pairs(rows)
    assert plan.training_flops(config, 64, 1, 1, 1) > 0


def test_statistics_count_ars_own_token_and_the_run_of_drafts_behind_it():
    config = config_module.from_tree({"method": "idlm", "train": {"block": 3}, "data": {"seq_length": 12}})
    method = methods.load(config, 99)
    rows = method.training_rows(packed([7]), torch.tensor([0]))
    index = rows.weight.nonzero(as_tuple=True)
    prediction = torch.zeros(1, 14, dtype=torch.int64)
    prediction[0, :7] = torch.arange(100, 107)  # what AR puts behind each place
    prediction[0, 7:] = torch.tensor([100, 101, 0, 0, 104, 105, 106])  # 2 agree; none, then two that are lost
    losses = RowLosses(torch.zeros(()), torch.zeros(len(index[0])), prediction[index], index)
    figures = method.summary(method.statistics(rows, losses))
    assert figures["expected_tokens_per_forward"] == ((1 + 2) + 1) / 2


# one step


def plain_losses(weights: dict, config: config_module.Config) -> tuple[torch.Tensor, list]:
    """Cross entropies of the clean rows; and of the masks of each block, with whether the best id is right."""
    model, block = PlainTidar(weights, config_module.to_tree(config)["model"]), config.train.block
    clean, drafts = [], []
    for sequence in range(SEQUENCES):
        token, document = documents(sequence)
        position = torch.zeros(LENGTH, dtype=torch.int64)
        for i in range(1, LENGTH):
            position[i] = position[i - 1] + 1 if document[i] == document[i - 1] else 0
        doubled = torch.cat([token[:LENGTH], torch.full((LENGTH,), MASK)])
        logits = model.logits(model.hidden(doubled, position.repeat(2), plain_mask(document[:LENGTH], block)))
        ce = F.cross_entropy(logits, token[1:].repeat(2), reduction="none")
        has_next = document[1:] == document[:-1]
        clean.append(ce[:LENGTH][has_next])
        right = logits[LENGTH:].argmax(dim=-1) == token[1:]
        starts = [i for i in range(LENGTH) if position[i] % block == 0]
        for a, b in zip(starts, [*starts[1:], LENGTH], strict=True):
            kept = has_next[a:b]
            drafts.append((ce[LENGTH + a : LENGTH + b][kept], right[a:b][kept]))
    return torch.cat(clean), drafts


def plain_loss(weights: dict, config: config_module.Config) -> torch.Tensor:
    clean, drafts = plain_losses(weights, config)
    t, noisy = config.train, torch.cat([ce for ce, _ in drafts])
    weight = (noisy.mean() / clean.mean()).detach() if t.balance_clean else t.clean_weight
    loss = noisy.mean() + weight * clean.mean()
    shares = torch.cat([torch.exp(-torch.arange(len(ce)) / t.position_gamma) for ce, _ in drafts])
    loss = loss + t.position_weight * (shares * noisy).sum() / shares.sum()
    whole = [(ce, right) for ce, right in drafts if len(ce)]
    for ce, right in whole:
        wrong = (~right).nonzero().flatten().tolist()
        loss = loss + t.focal_weight * (ce[wrong[0]] if wrong else 0.0) / len(whole)
        loss = loss - t.chain_weight * sum((-ce[: k + 1].sum()).exp() for k in range(len(ce))) / len(whole)
    return loss


LOSSES = {"fixed": {}, "weight 0.7": {"clean_weight": 0.7}, "balanced": {"balance_clean": True}, "left-to-right": ALL}
VARIANTS = {
    "balanced": {"balance_clean": True, **ALL},
    "subset": {"draft_fraction": 0.5, "random_offset": True, "balance_clean": True},
}


@pytest.fixture(scope="module")
def alone() -> dict:
    """Steps of one process: of every loss with both backends, and of what the layouts divide."""
    backends = [(name, backend) for name in LOSSES for backend in ("dense", "tiles")]
    configs = {(name, backend): idlm(LOSSES[name], model={"attention": backend}) for name, backend in backends}
    return processes.run(one_steps, 1, configs | {variant: divided(variant) for variant in VARIANTS})[0]


def divided(variant: str, **parallel) -> config_module.Config:
    return idlm({"micro_batch_size": 1, **VARIANTS[variant]}, parallel=parallel)


@pytest.fixture(scope="module")
def in_layouts() -> list[dict]:
    """The same steps of two processes, by rank."""
    pairs = [(layout, variant) for layout in IN_TWO for variant in VARIANTS]
    return processes.run(one_steps, 2, {(layout, v): divided(v, **IN_TWO[layout]) for layout, v in pairs})


@pytest.mark.distributed
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("backend", ["dense", "tiles"])
def test_a_step_equals_the_plain_model(losses, backend, alone):
    config, got = idlm(LOSSES[losses], model={"attention": backend}), alone[losses, backend]
    weights = {n: w.double().requires_grad_() for n, w in got["weights"].items()}
    loss = plain_loss(weights, config)
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert_gradients(got["gradients"], loss, weights)


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", IN_TWO)
def test_every_layout_equals_one_process(layout, variant, alone, in_layouts):
    results, expected = [result[layout, variant] for result in in_layouts], alone[variant]
    assert_same_step(results, expected, IN_TWO[layout])


def step_with_a_nan(rank: int) -> tuple[float, float]:
    """Loss and gradient norm of a balanced step of a model with a NaN in it."""
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    config = idlm({"balance_clean": True, "micro_batch_size": 1})
    mesh = build_mesh(config)
    chunks = optim.wrap(config, build(config, VOCAB))
    with torch.no_grad():
        next(chunks[0].module.parameters())[0, 0] = float("nan")
    optimizer = optim.build_optimizer(config, chunks)
    task = Task(config, mesh, methods.load(config, MASK), chunks, TOKEN_BYTES)
    sums = accumulate_gradients(task, list(micro_batches(task, Text, 0, SEQUENCES)))
    return summarise(task, sums)["loss"], optim.update(optimizer, clip=1.0)


@pytest.mark.distributed
def test_a_balanced_step_that_is_not_finite_is_one_to_skip():
    ((loss, norm),) = processes.run(step_with_a_nan, 1)
    assert math.isnan(loss) and math.isnan(norm)


def test_a_balanced_loss_needs_the_method_that_has_it():
    with pytest.raises(ConfigError, match=r"train.balance_clean = True: must be false with method = tidar"):
        config_module.from_tree({"train": {"balance_clean": True}})


# decoding

TRAINED = 3  # masks of a block in training: the trained stride is 4
STEPS = 300
SETTINGS = {
    "greedy": SamplingParams(max_tokens=24),
    "t0.7": SamplingParams(max_tokens=24, temperature=0.7, seed=1),
    "t1": SamplingParams(max_tokens=24, temperature=1.0, seed=2),
    "t1-p0.9": SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=3),
    "t0.7-other-seed": SamplingParams(max_tokens=24, temperature=0.7, seed=1234567),
}


@pytest.fixture(scope="module")
def trained(world, text):  # noqa: F811
    """A model trained for some seconds on source code."""
    config = config_module.override(tiny_config(), ["method=idlm", f"train.block={TRAINED}", "data.seq_length=126"])
    torch.manual_seed(0)
    (model,) = build(config, Bytes.vocab_size)
    train(model, methods.load(config, Bytes.mask), text, STEPS)
    return model


def train(model, method, text, steps: int, length: int = 126, context=TrainingAttention) -> float:  # noqa: F811
    """Plain training of whatever is trainable; the last loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    draw, pieces = torch.Generator().manual_seed(0), text[: len(text) * 9 // 10]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 20) * (1.02 - step / steps)
        at_B = torch.randint(len(pieces) - length, (8,), generator=draw)
        rows = method.training_rows(rows_of_text(pieces[at_B[:, None] + torch.arange(length)]), at_B)
        hidden_TBD = model(rows=rows, context=context(whole(rows), "dense"))
        losses = cross_entropy(hidden_TBD, model.head_weight, rows, None, 4096)
        optimizer.zero_grad()
        (losses.total / len(losses.loss)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return float(losses.loss.mean())


@pytest.fixture(scope="module")
def untrained(world):  # noqa: F811
    (model,) = build(replace(tiny_config(init_std=0.2), method="idlm"), Bytes.vocab_size)
    return model


def engine(model, block: int = TRAINED + 1, outcomes="last", **more) -> Engine:
    fast = model if isinstance(model, InferenceModel) else InferenceModel(model)
    return Engine(fast, Bytes(), block=block, capacity=128, outcomes=outcomes, drafter=DRAFTER, **more)


def seeds(name: str, count: int) -> list[SamplingParams]:
    return [SETTINGS[name].for_request(i) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_strided_decoding_is_ar_decoding(trained, untrained, prompts, setting):  # noqa: F811
    """Strides other than the trained one, every choice of outcomes, batches of one and of many."""
    for model, count in ((trained, 200), (untrained, 24)):
        params = seeds(setting, count)
        expected = [g.tokens for g in engine(model).generate(prompts[:count], params, "ar")]
        per_forward = {}
        for block, outcomes in ((2, "last"), (4, "last"), (4, "all"), (4, "none"), (7, [2, 7])):
            found = engine(model, block, outcomes, batch=13, prefill_chunk=17).generate(prompts[:count], params)
            assert [g.tokens for g in found] == expected, (block, outcomes)
            accepted = [r for g in found for r in g.accepted]
            per_forward[block, str(outcomes)] = sum(g.tokens_per_forward for g in found) / count
            if model is trained:
                assert min(accepted) == 1 and max(accepted) >= min(block, 4), "both outcomes of a test must occur"
        for i in range(0, count, 8):
            (one,) = engine(model, batch=1).generate([prompts[i]], [params[i]])
            assert one.tokens == expected[i]
        if model is trained:
            print(f"\n{setting}: tokens per forward {per_forward}")
            assert per_forward[4, "all"] > 1.2


def test_a_strided_forward_has_2n_minus_1_rows_and_a_cold_start_n():
    drafting = Drafting.of(4, "last", DRAFTER)
    assert drafting.step(4).rows == 7 and drafting.step(1).rows == 4 and drafting.prompt(9, True).rows == 9 + 3
    assert Drafting.of(4, "last").step(4).rows == 8, "TiDAR has a mask for the first slot, too"


def test_every_outcome_drafts_what_separate_causal_forwards_say(world):  # noqa: F811
    """In float64, through the pages, against dense forwards of the prefix with masks behind it."""
    (model,) = build(tiny_config(init_std=0.2), Bytes.vocab_size)
    model = model.double()
    token_T = torch.randint(256, (20,), generator=torch.Generator().manual_seed(1))
    e, length, block = engine(model, block=4, page=4), 9, 4
    slots = e.cache.take(40)
    e.forwards.run([Work(Plan(length, 0, drafter=DRAFTER), token_T[:length].tolist(), slots, 0, SamplingParams())])
    step = Drafting.of(block, "all", DRAFTER).step(block)
    work = Work(step, token_T[length : length + block].tolist(), slots, length, SamplingParams())
    with torch.no_grad():
        found_TD = e.forwards.hidden([work])[:, 0]
        clean = rows_of_text(token_T[None, : length + block])
        expected = [model(rows=clean, context=TrainingAttention(clean, "dense"))[length:, 0]]
        for kept in step.outcomes:
            rows = masks_behind(token_T[: length + kept], block - 1)
            expected.append(model(rows=rows, context=TrainingAttention(rows, "dense"))[length + kept :, 0])
        torch.testing.assert_close(found_TD, torch.cat(expected), rtol=1e-10, atol=1e-10)


def masks_behind(token_T, masks: int) -> Rows:
    """One sequence, and one group of causal masks behind it."""
    order = len(token_T) + torch.arange(masks)[None]
    zero = torch.zeros_like(order)
    group = Rows(zero + Bytes.mask, order, order, zero + len(token_T), zero + 1, zero, zero, zero.float())
    joined = concatenate([rows_of_text(token_T[None]), group], dim=1)
    assert int(joined.document.min()) > PADDING
    return replace(joined, causal_in_group=True)


def test_drafts_are_the_masks_choices_of_the_next_places(trained, prompts):  # noqa: F811
    """The first draft behind each prompt, against plain forwards: d[0] is AR's, d[k] that of the mask of slot k - 1."""
    e = engine(trained, outcomes="all")
    for prompt in prompts[:10]:
        slots = e.cache.take(64)
        (found,) = e.forwards.run([Work(e.policy.most.prompt(len(prompt), True), prompt, slots, 0, SamplingParams())])
        rows = masks_behind(torch.tensor(prompt), TRAINED)
        with torch.no_grad():
            hidden_TD = trained(rows=rows, context=TrainingAttention(rows, "dense"))[:, 0]
            logits_TV = trained.logits(hidden_TD)[len(prompt) - 1 :, :257]
        assert found.draft == logits_TV.argmax(dim=-1).tolist()
        e.cache.give_back(slots)


def test_the_engine_may_choose_stride_and_outcomes_itself(trained, prompts):  # noqa: F811
    from tests.test_decode_outcomes import curve

    params = seeds("t1", 12)
    expected = [g.tokens for g in engine(trained).generate(prompts[:12], params, "ar")]
    for per_row in (1e-6, 0.05):
        e = engine(trained, block=5, batch=5)
        e.choose_outcomes(Curves({64: curve(per_row)}))
        assert [g.tokens for g in e.generate(prompts[:12], params)] == expected


def test_what_needs_the_masks_own_place_is_refused(untrained):
    with pytest.raises(UserError, match="mode = blocks: this model's masks predict the next place"):
        engine(untrained).generate([[1]], SamplingParams(), "blocks")
    with pytest.raises(UserError, match="beta = 0.5: this model's masks predict the next place"):
        engine(untrained, outcomes="all").generate([[1]], SamplingParams(beta=0.5))


PROMPTS = [[65], [1, 2, 3, 4, 5], [200] * 30, list(range(100, 117)), [7, 8]]


def _decode(rank: int, tensor: int, pipeline: int) -> dict[str, list[list[int]]]:
    config = tiny_config(init_std=0.2)
    config = replace(config, parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    params = list(SETTINGS.values())
    return {mode: [g.tokens for g in engine(model).generate(PROMPTS, params, mode)] for mode in ("fused", "ar")}


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_parallel_ranks_decode_what_one_process_decodes(tensor, pipeline):
    (expected,) = processes.run(_decode, 1, 1, 1)
    assert expected["fused"] == expected["ar"] and len(set(expected["ar"][2])) > 5
    for found in processes.run(_decode, 2, tensor, pipeline):
        assert found == expected
