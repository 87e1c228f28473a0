"""Fused decoding against AR decoding and against plain forwards without a cache, on a model that has learnt a little.

Shape suffixes: T rows, B sequences, N requests, D hidden width, V ids.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.plain_tidar import PlainTidar
from tidar_mega import device
from tidar_mega.config import from_tree, to_tree
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.forward import Plan, Work
from tidar_mega.decode.outcomes import Drafting
from tidar_mega.decode.sampling import Sampling, SamplingParams, choose
from tidar_mega.evaluation.acceptance import distinct_share
from tidar_mega.evaluation.likelihood import held_out_loss, score
from tidar_mega.losses import cross_entropy
from tidar_mega.methods.tidar import Tidar
from tidar_mega.model.attention import TrainingAttention
from tidar_mega.model.gpt import HybridGPT, build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.rows import Rows, concatenate

TRAINING_STEPS = 420  # about 20 seconds; not a time, so that every run has the same model
BLOCKS = (2, 4, 8)  # of training
OTHER_BLOCKS = (3, 12)
SETTINGS = {
    "greedy": SamplingParams(max_tokens=28),
    "t0.7": SamplingParams(max_tokens=28, temperature=0.7),
    "t1": SamplingParams(max_tokens=28, temperature=1.0),
    "t1-k20-p0.9": SamplingParams(max_tokens=28, temperature=1.0, top_k=20, top_p=0.9),
}


@dataclass(frozen=True)
class Bytes:
    """A tokenizer of bytes."""

    vocab_size: int = 259
    eod: int = 256
    pad: int = 257
    mask: int = 258
    not_text: frozenset[int] = frozenset({257, 258})


def tiny_config(**model):
    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    }
    tree = {"model": shape | model, "data": {"seq_length": 128}, "precision": {"dtype": "fp32"}, "train": {"block": 4}}
    return from_tree(tree)


@pytest.fixture(scope="module")
def world() -> None:
    device.start_alone()
    build_mesh(tiny_config())


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Bytes of the standard library's sources, in an order that is the same on every machine."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


def clean_rows(token_BS: torch.Tensor) -> Rows:
    order_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS)
    zero_BS = torch.zeros_like(token_BS)
    weight_BS = torch.ones(token_BS.shape)
    weight_BS[:, -1] = 0
    return Rows(token_BS, order_BS, order_BS, order_BS + 1, zero_BS, zero_BS, token_BS.roll(-1, dims=1), weight_BS)


@pytest.fixture(scope="module")
def trained(world, text) -> HybridGPT:
    """A model trained for some seconds, with blocks of all tested sizes in turn."""
    config = tiny_config()
    torch.manual_seed(0)
    (model,) = build(config, Bytes.vocab_size)
    methods = [Tidar(replace(config, train=replace(config.train, block=b)), Bytes.mask) for b in BLOCKS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    draw = torch.Generator().manual_seed(0)
    train_text = text[: len(text) * 9 // 10]
    for step in range(TRAINING_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 20) * (1.02 - step / TRAINING_STEPS)
        at_B = torch.randint(len(train_text) - 128, (8,), generator=draw)
        rows = methods[step % 3].training_rows(clean_rows(train_text[at_B[:, None] + torch.arange(128)]), at_B)
        hidden_TBD = model(rows=rows, context=TrainingAttention(rows, "dense"))
        losses = cross_entropy(hidden_TBD, model.head_weight, rows, None, 4096)
        optimizer.zero_grad()
        (losses.total / len(losses.loss)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    loss = validation_loss(model, text)
    print(f"\n{TRAINING_STEPS} steps; validation loss {loss:.2f} nats per byte")
    assert loss < 2.8, "the model has not learnt: its acceptance would mean nothing"
    return model


@torch.no_grad()
def validation_loss(model: HybridGPT, text: torch.Tensor) -> float:
    at_B = len(text) * 9 // 10 + torch.arange(16) * 1000
    rows = clean_rows(text[at_B[:, None] + torch.arange(128)])
    hidden_TBD = model(rows=rows, context=TrainingAttention(rows, "dense"))
    return float(cross_entropy(hidden_TBD, model.head_weight, rows, None, 4096).loss.mean())


@pytest.fixture(scope="module")
def prompts(text) -> list[list[int]]:
    """208 held-out pieces of 5 to 40 bytes."""
    start = len(text) * 9 // 10
    return [text[start + 500 * i : start + 500 * i + 5 + i * 7 % 36].tolist() for i in range(208)]


@pytest.fixture(scope="module")
def references(trained, prompts) -> dict[str, list]:
    engine = Engine(InferenceModel(trained), Bytes(), block=4, capacity=128)
    return {name: engine.generate(prompts, seeds(params, 208), mode="ar") for name, params in SETTINGS.items()}


def seeds(params: SamplingParams, count: int) -> list[SamplingParams]:
    return [params.for_request(i) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("block", [*BLOCKS, *OTHER_BLOCKS])
def test_fused_output_is_ar_output(trained, prompts, references, text, block, setting):
    engine = Engine(InferenceModel(trained), Bytes(), block=block, capacity=128, batch=128 // block)
    fused = engine.generate(prompts, seeds(SETTINGS[setting], 208), mode="fused")
    ar = references[setting]
    assert [g.tokens for g in fused] == [g.tokens for g in ar]
    assert [g.finish_reason for g in fused] == [g.finish_reason for g in ar]
    accepted = [r for g in fused for r in g.accepted]
    mean = sum(g.tokens_per_forward for g in fused) / len(fused)
    print(
        f"\nB = {block}, {setting}: {mean:.2f} tokens per forward, distinct 4-grams "
        f"{distinct_share([g.tokens for g in fused], 4):.2f}, validation loss {validation_loss(trained, text):.2f}"
    )
    longest = block if block in BLOCKS else 2
    assert min(accepted) == 1 and max(accepted) >= longest, "both rejected and wholly accepted drafts must occur"
    assert all(g.tokens_per_forward == 1 for g in ar)


@pytest.mark.parametrize("setting", ["greedy", "t1-k20-p0.9"])
def test_ar_output_is_that_of_plain_forwards_without_a_cache(trained, prompts, references, setting):
    for i in range(0, 208, 26):
        params = SETTINGS[setting].for_request(i)
        sampling = Sampling.of([params], [Bytes.pad, Bytes.mask, *range(259, 320)], 320)
        tokens = list(prompts[i])
        for _ in range(12):
            rows = clean_rows(torch.tensor([tokens]))
            with torch.no_grad():
                logits_V = trained.logits(trained(rows=rows, context=TrainingAttention(rows, "dense"))[-1, 0])
            if setting == "greedy":
                logits_V[257:] = -torch.inf
                tokens.append(int(logits_V.argmax()))
            else:
                tokens.append(int(choose(logits_V[None, None], torch.tensor([[len(tokens)]]), sampling)))
        assert references[setting][i].tokens[:12] == tokens[len(prompts[i]) :]


@pytest.mark.parametrize("chunk", [512, 3])
def test_batched_ragged_requests_are_decoded_as_alone(trained, prompts, references, chunk):
    """Neither the batch, nor other requests' parameters, nor the prompt's chunks matter."""
    names = list(SETTINGS)
    mixed = [replace(SETTINGS[names[i % 4]].for_request(i), max_tokens=5 + i % 20) for i in range(24)]
    expected = [references[names[i % 4]][i].tokens[: 5 + i % 20] for i in range(24)]
    for batch in (1, 7, 24):
        engine = Engine(InferenceModel(trained), Bytes(), block=4, capacity=128, batch=batch, prefill_chunk=chunk)
        for mode in ("fused", "ar"):
            assert [g.tokens for g in engine.generate(prompts[:24], mixed, mode)] == expected


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_one_forward_equals_separate_forwards_of_each_group(world, block):
    """In float64, through the pages: requests of several lengths and plans against dense forwards."""
    model = sharp_model()
    engine = Engine(InferenceModel(model), Bytes(), block=block, capacity=64, page=4)
    token_NT = torch.randint(256, (4, 40), generator=torch.Generator().manual_seed(1))
    every = tuple(range(1, block + 1))
    plans = [
        (7, Plan(block, block, every, block)),
        (3, Plan(1, 1, (1,), block)),
        (12, Plan(block, block, (block,), block + 1)),
        (0, Plan(9, 1, (9,), block)),
    ]
    works = []
    for n, (length, plan) in enumerate(plans):
        slots = engine.cache.take(40)
        if length:
            prompt = Work(Plan(length, 0), token_NT[n, :length].tolist(), slots, 0, SamplingParams())
            engine.forwards.run([prompt])
        tokens = token_NT[n, length : length + plan.clean].tolist()
        works.append(Work(plan, tokens, slots, length, SamplingParams()))
    with torch.no_grad():
        hidden_TD = engine.forwards.hidden(works)[:, 0]
        for n, (found_TD, work) in enumerate(zip(hidden_TD.split([w.plan.rows for w in works]), works, strict=True)):
            plan, whole_T = work.plan, token_NT[n, : work.length + work.plan.clean]
            rows = clean_rows(whole_T[None])
            clean_TD = model(rows=rows, context=TrainingAttention(rows, "dense"))[work.length :, 0]
            behind = [drafted_forward(model, whole_T[: work.length + j], plan.slots) for j in plan.outcomes]
            torch.testing.assert_close(found_TD, torch.cat([clean_TD, *behind]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [2, 4, 5])
def test_every_outcome_commits_and_drafts_what_separate_forwards_say(world, block):
    """A draft of AR's own tokens up to place r, then errors: for each r, what is accepted and drafted next."""
    model = sharp_model()
    engine = Engine(InferenceModel(model), Bytes(), block=block, capacity=64)
    run, drafting, params = engine.forwards.run, Drafting.of(block, "all"), SamplingParams()
    length, tokens = 6, [10, 20, 30, 40, 50, 60]
    with torch.no_grad():
        for _ in range(block + 1):
            rows = clean_rows(torch.tensor([tokens]))
            hidden_TD = model(rows=rows, context=TrainingAttention(rows, "dense"))[:, 0]
            tokens.append(int(model.logits(hidden_TD[-1])[:257].argmax()))
        behind = [drafted_forward(model, torch.tensor(tokens[: length + r]), block) for r in range(block + 1)]
        drafts = [model.logits(hidden_BD)[1:, :257].argmax(dim=-1).tolist() for hidden_BD in behind]
        for r in range(1, block + 1):
            slots = engine.cache.take(40)
            (first,) = run([Work(drafting.prompt(length, True), tokens[:length], slots, 0, params)])
            assert first.kept == length and first.draft == tokens[length : length + 1] + drafts[0]
            true = tokens[length : length + block]
            draft = true[:r] + [(t + 1) % 256 for t in true[r:]]
            for outcomes in ("all", "last", "none", [r]):
                plan = Drafting.of(block, outcomes).step(block)
                (step,) = run([Work(plan, draft, slots, length, params)])
                assert step.kept == r and step.tokens == tokens[length + 1 : length + 1 + r]
                assert step.draft == step.tokens[-1:] + (drafts[r] if r in plan.outcomes else [])
    assert len({tuple(d) for d in drafts}) > 1, "drafts that do not differ would prove nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_inference_model_computes_what_megatrons_does(world, dtype):
    model = sharp_model().to(dtype)
    fast = InferenceModel(model)
    rows = clean_rows(torch.randint(256, (3, 17), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        expected = model(rows=rows, context=TrainingAttention(rows, "dense"))
        got = fast(rows=rows, context=TrainingAttention(rows, "dense"))
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fast.logits(got), model.logits(expected).to(dtype), rtol=1e-4, atol=1e-4)


def sharp_model() -> HybridGPT:
    """A model in float64 with large weights, the same every time, whose rows all say something else."""
    (model,) = build(tiny_config(qk_layernorm=True, add_qkv_bias=True), Bytes.vocab_size)
    model = model.double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(float(p.ndim == 1) + 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model


def drafted_forward(model, token_T, block: int):
    """Hidden states of masks behind the tokens."""
    rows = concatenate_masks(token_T, block, Bytes.mask)
    return model(rows=rows, context=TrainingAttention(rows, "dense"))[len(token_T) :, 0]


def concatenate_masks(token_T, block: int, mask_id: int) -> Rows:
    """One sequence, and behind it one group of masks that see all of it."""
    order = len(token_T) + torch.arange(block)[None]
    zero = torch.zeros_like(order)
    mask, horizon = torch.full_like(order, mask_id), torch.full_like(order, len(token_T))
    masks = Rows(mask, order, order, horizon, zero + 1, zero, zero, zero.float())
    return concatenate([clean_rows(token_T[None]), masks], dim=1)


@dataclass(frozen=True)
class Pieces:
    """Seven held-out pieces of text, as a stream has them."""

    token_BS: torch.Tensor
    samples_per_epoch: int = 7

    def parts(self, count: int) -> list:
        return [("", self, count)]

    def rows(self, index: int) -> Rows:
        return clean_rows(self.token_BS[index : index + 1])


def test_the_held_out_loss_is_that_of_the_plain_model(trained, text):
    """Over sequences spread evenly, against float64, with ids of several bytes and of none."""
    pieces = Pieces(text[-7 * 96 :].view(7, 96))
    token_bytes = torch.arange(Bytes.vocab_size) % 4
    engine = Engine(InferenceModel(trained), Bytes(), block=4, capacity=128)
    found = held_out_loss(engine, pieces, token_bytes, sequences=3)

    weights = {name: weight.detach().double() for name, weight in trained.named_parameters()}
    plain = PlainTidar(weights, to_tree(tiny_config())["model"])
    chosen = pieces.token_BS[[0, 2, 4]]
    behind = torch.ones(1, dtype=torch.int64)  # of another document: the last token predicts nothing
    sequences = [(torch.cat([token_S, behind]), torch.cat([torch.zeros_like(token_S), behind])) for token_S in chosen]
    nats, _ = plain.losses(sequences, 4, Bytes.mask)
    assert found["validation_nats_per_token"] == pytest.approx(float(nats.mean()), rel=1e-5)
    length = int(token_bytes[chosen[:, 1:]].sum())
    assert found["validation_nats_per_byte"] == pytest.approx(float(nats.sum()) / length, rel=1e-5)


@pytest.mark.parametrize("rows", [4096, 90])
def test_scores_are_those_of_the_plain_model(trained, text, rows):
    """Continuations that share contexts, in one forward and in several, against a float64 forward for each."""
    engine = Engine(InferenceModel(trained), Bytes(), block=4, capacity=128)
    pieces = text[-600:].view(12, 50).tolist()
    cuts = ((1, 9), (20, 21), (20, 50), (40, 50))
    pairs = [(piece[:cut], piece[cut:end]) for piece in pieces[:4] for cut, end in cuts]
    pairs += [(pieces[5][:20], pieces[6][:n]) for n in (3, 1, 30)]
    pairs += [(pieces[7][:20], [5]), (pieces[5][:20], pieces[7][:4])]  # of one context, but not side by side
    greedy = engine.generate([piece[:30] for piece in pieces], SamplingParams(max_tokens=8))
    pairs += [(piece[:30], g.tokens) for piece, g in zip(pieces, greedy, strict=True)]
    pairs += [(piece[:30], [*g.tokens[:-1], (g.tokens[-1] + 1) % 256]) for piece, g in zip(pieces, greedy, strict=True)]
    found = score(engine, pairs, rows=rows)

    weights = {name: weight.detach().double() for name, weight in trained.named_parameters()}
    plain = PlainTidar(weights, to_tree(tiny_config())["model"])
    for (nats, _), (context, continuation) in zip(found, pairs, strict=True):
        token = torch.tensor([*context, *continuation])
        expected_N, _ = plain.losses([(token, torch.zeros_like(token))], 4, Bytes.mask)
        assert nats == pytest.approx(-float(expected_N[len(context) - 1 :].sum()), abs=1e-4)
    best = [is_best for _, is_best in found]
    assert all(best[-24:-12]) and not any(best[-12:])
