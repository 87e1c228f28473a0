"""Multi-token prediction (arXiv 2412.19437, section 2.2): its rows, a step against a plain float64 model, every layout
against one process, and self-speculation against plain AR decoding and against the training forward's predictions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests import processes
from tests.plain_tidar import PlainTidar
from tests.steps import IN_TWO, LENGTH, SEQUENCES, assert_gradients, assert_same_step, one_steps, settings
from tests.steps import text as documents
from tests.test_decode import Bytes, prompts, text, tiny_config, world  # noqa: F401
from tests.test_decode import clean_rows as rows_of_text
from tests.test_idlm import train
from tests.test_methods import packed
from tidar_mega import config as config_module
from tidar_mega import methods
from tidar_mega.config import ConfigError, ParallelConfig, UserError
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.losses import RowLosses
from tidar_mega.methods import Drafter
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.model.multi_token import MultiTokenAttention
from tidar_mega.parallel.context import whole
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.plan.work import sequence_work
from tidar_mega.rows import visible, visible_pairs

DEPTHS = 3


def mtp(train: dict | None = None, model: dict | None = None, **sections) -> config_module.Config:
    tree = config_module.to_tree(settings(model={"mtp_num_layers": 0, **(model or {})}, **sections))
    tree["model"]["mtp_num_layers"] = DEPTHS
    return config_module.from_tree({**tree, "method": "mtp", "train": {**tree["train"], **(train or {})}})


def method() -> methods.Method:
    tree = {"method": "mtp", "model": {"mtp_num_layers": DEPTHS}, "data": {"seq_length": 12}}
    return methods.load(config_module.from_tree(tree), 99)


# rows


@pytest.mark.parametrize("lengths", [[12], [5, 1, 6], [3, 9]])
def test_rows_take_the_token_ahead_and_predict_the_one_behind_it(lengths):
    clean = packed(lengths)
    rows = method().training_rows(clean, torch.tensor([0]))
    document, token, label = clean.document[0].tolist(), clean.token[0].tolist(), clean.label[0].tolist()
    for k in range(DEPTHS + 1):
        for i in range(12):
            there = k * 12 + i
            assert rows.position[0, there] == clean.position[0, i]
            if i + k < 12 and document[i + k] == document[i] and clean.weight[0, i + k] > 0:
                assert rows.weight[0, there] == 1
                assert (int(rows.token[0, there]), int(rows.label[0, there])) == (token[i + k], label[i + k])
            else:
                assert rows.weight[0, there] == 0
    below = torch.ones(12, 12).tril().bool() & (clean.document[0, :, None] == clean.document[0])
    assert torch.equal(visible(rows, rows)[0], torch.block_diag(*[below] * (DEPTHS + 1)))
    assert visible_pairs(rows) == int(below.sum()) * (DEPTHS + 1)


def test_the_planned_pairs_are_those_of_the_rows():
    config = mtp()
    rows = methods.load(config, 60).training_rows(packed([LENGTH]), torch.tensor([0]))
    work = sequence_work(config)
    assert (work.rows, work.pairs, work.head_rows) == (rows.shape[1], visible_pairs(rows), rows.shape[1])


def test_statistics_count_the_run_that_agrees_with_ar():
    rows = method().training_rows(packed([6]), torch.tensor([0]))
    index = rows.weight.nonzero(as_tuple=True)
    prediction = torch.zeros(1, 24, dtype=torch.int64)
    prediction[0, :6] = torch.arange(100, 106)  # what AR puts behind each place
    prediction[0, 6:12] = torch.tensor([101, 102, 0, 104, 0, 0])
    prediction[0, 12:18] = torch.tensor([102, 0, 104, 0, 0, 0])
    prediction[0, 18:24] = torch.tensor([103, 104, 105, 0, 0, 0])
    losses = RowLosses(torch.zeros(()), torch.zeros(len(index[0])), prediction[index], index)
    sums = method().statistics(rows, losses)
    # places 0 and 1 have all three depths: all agree; the first alone (the sixth token predicts nothing)
    assert sums["accepted_lengths"].tolist() == [0, 1, 0, 1]
    assert method().summary(sums)["expected_tokens_per_forward"] == 3


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"method": "mtp"}, "model.mtp_num_layers = 0: must be 1 or more with method = mtp"),
        ({"model": {"mtp_num_layers": 2}}, "model.mtp_num_layers = 2: must be 0 with method = tidar"),
        (
            {"method": "mtp", "model": {"mtp_num_layers": 1}, "parallel": {"recompute": "full"}},
            "parallel.recompute = full: must be none or selective with method = mtp",
        ),
        (
            {"method": "mtp", "model": {"mtp_num_layers": 1}, "train": {"chain_weight": 0.1}},
            "train.chain_weight = 0.1: must be 0 with method = mtp",
        ),
    ],
)
def test_what_the_method_cannot_have_is_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        config_module.from_tree(tree)


# one step


def plain_loss(weights: dict, config: config_module.Config) -> torch.Tensor:
    """Place by place from the paper's equations 21 to 25."""
    model = PlainTidar(weights, config_module.to_tree(config)["model"])
    losses = [[] for _ in range(DEPTHS + 1)]
    for sequence in range(SEQUENCES):
        token, document = documents(sequence)
        position = torch.zeros(LENGTH, dtype=torch.int64)
        for i in range(1, LENGTH):
            position[i] = position[i - 1] + 1 if document[i] == document[i - 1] else 0
        place = torch.arange(LENGTH)
        allowed = (place[:, None] >= place) & (document[:LENGTH, None] == document[:LENGTH])
        hidden = model.hidden(token[:LENGTH], position, allowed)
        for k in range(DEPTHS + 1):
            if k:
                ahead = torch.tensor([min(i + k, LENGTH) for i in range(LENGTH)])
                hidden = plain_depth(model, k, hidden, token[ahead], position, allowed)
            for i in range(LENGTH):
                if i + k + 1 <= LENGTH and document[i + k + 1] == document[i]:
                    losses[k].append(F.cross_entropy(model.logits(hidden[i]), token[i + k + 1]))
    ar, *depths = (torch.stack(found).mean() for found in losses)
    return ar + config.train.mtp_loss_scaling_factor * torch.stack(depths).mean()


def plain_depth(model: PlainTidar, k: int, hidden, token, position, allowed) -> torch.Tensor:
    p = f"mtp.layers.{k - 1}."
    embedded = model.norm(model.w["embedding.word_embeddings.weight"][token], p + "enorm")
    x = model.linear(torch.cat([embedded, model.norm(hidden, p + "hnorm")], dim=-1), p + "eh_proj")
    p += "transformer_layer."
    x = x + model.attention(model.norm(x, p + "input_layernorm"), p + "self_attention.", position, allowed)
    gate, up = model.linear(model.norm(x, p + "pre_mlp_layernorm"), p + "mlp.linear_fc1").chunk(2, -1)
    x = x + model.linear(F.silu(gate) * up, p + "mlp.linear_fc2")
    return model.norm(x, f"mtp.layers.{k - 1}.final_layernorm")


VARIANTS = {
    "dense": {"model": {"attention": "dense"}},
    "tiles": {"model": {"attention": "tiles"}, "train": {"mtp_loss_scaling_factor": 0.7}},
    "tied": {"model": {"tie_embeddings": True}},
    "selective": {"parallel": {"recompute": "selective"}},
}


def divided(tied: bool, **parallel) -> config_module.Config:
    return mtp({"micro_batch_size": 1}, {"tie_embeddings": tied}, parallel=parallel)


@pytest.fixture(scope="module")
def alone() -> dict:
    configs = {name: mtp(**variant) for name, variant in VARIANTS.items()}
    return processes.run(one_steps, 1, configs | {tied: divided(tied) for tied in (True, False)})[0]


@pytest.fixture(scope="module")
def in_layouts() -> list[dict]:
    pairs = [(layout, tied) for layout in IN_TWO for tied in (True, False)]
    return processes.run(one_steps, 2, {(layout, tied): divided(tied, **IN_TWO[layout]) for layout, tied in pairs})


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_the_plain_model(variant, alone):
    got = alone[variant]
    named = {n.replace("mtp_model_layer", "transformer_layer"): n for n in got["weights"]}  # as until 0.16
    weights = {name: got["weights"][n].double().requires_grad_() for name, n in named.items()}
    loss = plain_loss(weights, mtp(**VARIANTS[variant]))
    assert got["figures"]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert_gradients({name: got["gradients"][n] for name, n in named.items()}, loss, weights)


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", IN_TWO)
def test_every_layout_equals_one_process(layout, tied, alone, in_layouts):
    results, expected = [result[layout, tied] for result in in_layouts], alone[tied]
    assert_same_step(results, expected, IN_TWO[layout])
    if IN_TWO[layout].get("pipeline"):  # the copy of the embedding follows the first stage's
        name = "embedding.word_embeddings.weight"
        assert torch.equal(results[0]["after"][name], results[1]["after"][name])
        assert (results[0]["after"][name] - expected["after"][name]).abs().max() < 1e-6


# decoding

STEPS = 300
SETTINGS = {
    "greedy": SamplingParams(max_tokens=24),
    "t0.7": SamplingParams(max_tokens=24, temperature=0.7, seed=1),
    "t1-p0.9": SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=3),
}


def decoding_config(**model) -> config_module.Config:
    config = tiny_config(mtp_num_layers=0, **model)
    config = replace(config, method="mtp", model=replace(config.model, mtp_num_layers=DEPTHS))
    return replace(config, train=replace(config.train, mtp_loss_scaling_factor=1.0))


@pytest.fixture(scope="module")
def trained(world, text):  # noqa: F811
    """A model trained for some seconds on source code."""
    torch.manual_seed(0)
    (model,) = build(decoding_config(), Bytes.vocab_size)
    context = partial(MultiTokenAttention, depths=DEPTHS)
    train(model, methods.load(decoding_config(), Bytes.mask), text, STEPS, context=context)
    return model


@pytest.fixture(scope="module")
def untrained(world):  # noqa: F811
    (model,) = build(decoding_config(init_std=0.2), Bytes.vocab_size)
    return model


def engine(model, block: int = 1 + DEPTHS, **more) -> Engine:
    return Engine(InferenceModel(model), Bytes(), block=block, capacity=128, drafter=Drafter(depths=DEPTHS), **more)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_self_speculation_is_ar_decoding(trained, untrained, prompts, setting):  # noqa: F811
    """Drafts of every length, batches of one and of many, prompts in pieces."""
    for model, count in ((trained, 200), (untrained, 24)):
        params = [SETTINGS[setting].for_request(i) for i in range(count)]
        expected = [g.tokens for g in engine(model).generate(prompts[:count], params, "ar")]
        for block in range(1, 2 + DEPTHS):
            found = engine(model, block, batch=7, prefill_chunk=5).generate(prompts[:count], params)
            assert [g.tokens for g in found] == expected, block
        accepted = [r for g in found for r in g.accepted]
        (one,) = engine(model, batch=1).generate([prompts[3]], [params[3]])
        assert one.tokens == expected[3]
        if model is trained:
            assert min(accepted) == 1 and max(accepted) == 1 + DEPTHS, "both outcomes of a test must occur"
            share = sum(g.tokens_per_forward for g in found) / count
            print(f"\n{setting}: tokens per forward {share:.2f}")
            assert share > 1.3


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("weights", ["trained", "untrained"])
def test_drafts_are_what_the_training_forward_predicts(trained, untrained, prompts, weights, chunk):  # noqa: F811
    """Behind every step of a greedy run, through pages and states that were kept, against dense forwards of all rows
    that take the drafted tokens one after another. In float64: no near-ties. Large random weights draft by all that
    they see, and so show a wrong state that a trained model makes nothing of."""
    model = (trained if weights == "trained" else untrained).double()
    e = engine(model, batch=3, prefill_chunk=chunk, page=4)
    committed = {number: list(prompt) for number, prompt in enumerate(prompts[:3])}
    requests = [e.add(prompt, SamplingParams(max_tokens=40)) for prompt in committed.values()]
    by_request, compared = {r: n for n, r in enumerate(requests)}, 0
    while not e.is_idle:
        for request, commit in e.step():
            tokens = committed[by_request[request]]
            tokens += commit.tokens
            if not commit.finished:
                assert commit.proposed == [tokens[-1], *predicted(model, tokens)]
                compared += 1
    model.float()
    assert compared > 20


@torch.no_grad()
def predicted(model, tokens: list[int]) -> list[int]:
    found = []
    for k in range(1, 1 + DEPTHS):
        rows = methods.load(decoding_config(), Bytes.mask).training_rows(
            rows_of_text(torch.tensor([[*tokens, *found]])), torch.tensor([0])
        )
        context = MultiTokenAttention(whole(rows), "dense", DEPTHS)
        hidden = model(rows=rows, context=context)[k * rows.shape[1] // (1 + DEPTHS) :, 0]
        # the row of the last place that AR verified takes the newest token at depth k
        logits = model.logits(hidden[len(tokens) - 2])
        logits[[Bytes.pad, Bytes.mask]] = -torch.inf
        found.append(int(logits[: Bytes.vocab_size].argmax()))
    return found


def test_what_layers_cannot_do_is_refused(untrained):
    with pytest.raises(UserError, match="block = 5: must be at most 4"):
        engine(untrained, 5)
    with pytest.raises(UserError, match="mode = blocks: layers of multi-token prediction draft"):
        engine(untrained).generate([[1]], SamplingParams(), "blocks")
    with pytest.raises(UserError, match="acceptance = rejection: layers of multi-token prediction draft"):
        engine(untrained).generate([[1]], SamplingParams(acceptance="rejection", temperature=1.0))
    with pytest.raises(UserError, match="outcomes = auto: multi-token prediction drafts behind the actual outcome"):
        engine(untrained).choose_outcomes(None)


PROMPTS = [[65], [1, 2, 3, 4, 5], [200] * 30, list(range(100, 117))]


def _decode(rank: int, tensor: int, pipeline: int) -> dict[str, list]:
    config = replace(decoding_config(init_std=0.2), parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    build_mesh(config)
    (model,) = build(config, Bytes.vocab_size, training=False)
    params = [*SETTINGS.values(), SamplingParams(max_tokens=24)]
    found = {mode: engine(model, prefill_chunk=9).generate(PROMPTS, params, mode) for mode in ("fused", "ar")}
    return {mode: [(g.tokens, g.accepted if mode == "fused" else []) for g in found[mode]] for mode in found}


@pytest.mark.distributed
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
def test_parallel_ranks_decode_what_one_process_decodes(tensor, pipeline):
    (expected,) = processes.run(_decode, 1, 1, 1)
    assert [tokens for tokens, _ in expected["fused"]] == [tokens for tokens, _ in expected["ar"]]
    for found in processes.run(_decode, 2, tensor, pipeline):
        assert found == expected
