"""Requests that join and leave: pages, admission, cancellation, and that nobody changes what another gets."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_decode import Bytes
from tests.test_decode_requests import PROMPTS, SAMPLED, engine, model  # noqa: F401
from tidar_mega.config import UserError
from tidar_mega.decode import graphs, latency
from tidar_mega.decode.cache import PagedAttention, PagedCache, Pages, Part, Slots
from tidar_mega.decode.flex import FlexPagedAttention, _page_mask
from tidar_mega.decode.forward import Plan, Result, Work
from tidar_mega.decode.graphs import Recorder
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.methods import IN_PLACE


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=60))
@settings(deadline=None)
def test_pages_are_never_lost_nor_given_twice(orders):
    pages, held = Pages(20), []
    for is_take, number in orders:
        if is_take:
            runs = pages.take(number)
            free = 20 - sum(len(r) for h in held for r in h)
            assert (runs is None) == (number > free)
            if runs is not None:
                assert sum(map(len, runs)) == number
                held.append(runs)
        elif held:
            pages.give_back(held.pop(number % len(held)))
        owned = [page for runs in held for run in runs for page in run]
        assert len(set(owned)) == len(owned) and pages.free == 20 - len(owned)
    for runs in held:
        pages.give_back(runs)
    assert pages.take(20) == [range(20)], "neighbours that are free must be one run again"


def test_pages_come_in_as_few_runs_as_there_are():
    pages = Pages(10)
    a, b, c = pages.take(3), pages.take(2), pages.take(5)
    pages.give_back(a), pages.give_back(c)
    assert pages.take(3) == [range(3)], "the tightest run"
    assert pages.take(4) == [range(5, 9)]
    pages.give_back(b)
    assert pages.take(3) == [range(3, 5), range(9, 10)] and pages.take(1) is None
    with pytest.raises(AssertionError, match="twice"):
        pages.give_back([range(3, 4)]), pages.give_back([range(3, 4)])


def test_slots_are_found_across_runs():
    slots = Slots([range(2, 4), range(7, 8), range(1)], page=10)
    assert slots.of(0, 5) == [range(20, 25)]
    assert slots.of(18, 33) == [range(38, 40), range(70, 80), range(3)]
    assert slots.of(20, 30) == [range(70, 80)] and slots.of(4, 4) == []
    with pytest.raises(AssertionError):
        slots.of(35, 41)


def joined(count: int, draw: random.Random) -> list[tuple[list[int], SamplingParams, str]]:
    requests = []
    for i in range(count):
        prompt = [draw.randrange(256) for _ in range(draw.randrange(1, 25))]
        temperature, top_p = draw.choice([(0.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.0, 1.0)])
        params = SamplingParams(draw.randrange(1, 30), temperature, top_p=top_p, seed=i, stop_tokens=())
        requests.append((prompt, params, draw.choice(["fused", "fused", "ar"])))
    return requests


@pytest.mark.parametrize("outcomes", ["all", "last", "none", [1, 3]])
def test_requests_that_join_and_leave_get_what_they_get_alone(model, outcomes):  # noqa: F811
    """Batches of up to 16 of different ages, few pages of few tokens, prompts in pieces, some given up on the way."""
    draw = random.Random(0)
    requests = joined(60, draw)
    alone = engine(model)
    expected = [alone.generate([prompt], params, "ar")[0].tokens for prompt, params, _ in requests]
    e = engine(model, batch=16, cache_tokens=420, page=4, prefill_chunk=11, outcomes=outcomes)
    todo, live, sizes, waited = list(enumerate(requests)), {}, set(), False
    while todo or not e.is_idle:
        for i, (prompt, params, mode) in todo[: draw.randrange(4)]:
            live[i] = e.add(prompt, params, mode)
            todo.pop(0)
        if live and draw.random() < 0.05:
            e.cancel(live[draw.choice(list(live))])
        e.step()
        sizes.add(len(e.running))
        waited |= bool(e.waiting) and len(e.running) < 16
    assert max(sizes) > 8 and waited, "pages must have been short"
    assert e.cache.pages.free == e.cache.pages.count
    cancelled = [r for r in live.values() if r.result.finish_reason == "cancelled"]
    assert 0 < len(cancelled) < 30
    for i, request in live.items():
        found = request.result.tokens
        if request in cancelled:
            assert found == expected[i][: len(found)]
        else:
            assert found == expected[i] and request.result.finish_reason == "length"


def test_a_thousand_requests_leak_no_page(model):  # noqa: F811
    draw = random.Random(1)
    e = engine(model, batch=8, cache_tokens=300, page=8)
    e.forwards.run = lambda works: [anything(work, draw) for work in works]
    live = []
    for prompt, params, mode in joined(1000, draw):
        live.append(e.add(prompt, params, mode))
        for _ in range(draw.randrange(4)):
            e.step()
        if draw.random() < 0.2:
            e.cancel(draw.choice(live))
        held = [page for r in e.running for run in r.slots.runs for page in run]
        assert len(set(held)) == len(held) == e.cache.pages.count - e.cache.pages.free
    while not e.is_idle:
        e.step()
    assert e.cache.pages.free == e.cache.pages.count
    assert {r.result.finish_reason for r in live} == {"length", "cancelled"}


def anything(work, draw: random.Random):
    """A forward's result without the forward: only the bookkeeping is tested."""
    from tidar_mega.decode.forward import Result

    plan = work.plan
    if not plan.choosing:
        return Result(plan.clean, [], [])
    accepted = draw.randrange(1, plan.choosing + 1)
    tokens = [draw.randrange(256) for _ in range(accepted)]
    kept = plan.clean - plan.choosing + accepted
    return Result(kept, tokens, [tokens[-1], *[1] * (plan.slots - 1 if kept in plan.outcomes else 0)])


def test_commits_and_ends_move_no_keys(model):  # noqa: F811
    """The pages stay where they are in memory, and what one request has committed is untouched by all others."""
    e = engine(model, batch=4, page=4)
    keys = [*e.cache.k.values(), *e.cache.v.values()]
    addresses = [x.data_ptr() for x in keys]
    first = e.add(PROMPTS[1], replace(SAMPLED, stop_tokens=()))
    kept, held = {}, {}
    for step in range(12):
        if step % 2:
            e.add(PROMPTS[step % 4], replace(SAMPLED, max_tokens=3, stop_tokens=()))
        if step == 7:
            e.cancel(e.running[-1])
        e.step()
        for request in e.running:
            assert held.setdefault(request, list(request.slots.runs)) == request.slots.runs, "whoever else has ended"
        slots = [slot for run in first.slots.of(0, first.length) for slot in run]
        for slot in slots:
            now = [x[:, slot].clone() for x in keys]
            assert all(torch.equal(a, b) for a, b in zip(kept.setdefault(slot, now), now, strict=True))
    assert len(kept) > 12 and [x.data_ptr() for x in keys] == addresses


def test_what_can_never_fit_is_refused_while_the_others_go_on(model):  # noqa: F811
    e = engine(model, cache_tokens=64, page=8)
    running = e.add(PROMPTS[1], replace(SAMPLED, stop_tokens=()))
    e.step()
    with pytest.raises(UserError, match=r"prompt 0 has 30 tokens and may get 40 more: the engine's pages hold 64"):
        e.add(PROMPTS[2], SAMPLED)
    waiting = e.add([7] * 20, replace(SAMPLED, stop_tokens=()))
    e.step()
    assert e.running == [running] and list(e.waiting) == [waiting]
    while not e.is_idle:
        e.step()
    assert len(running.result.tokens) == len(waiting.result.tokens) == 40
    assert waiting.result.tokens == engine(model).generate([[7] * 20], replace(SAMPLED, stop_tokens=()), "ar")[0].tokens


class Text(Bytes):
    """Bytes that decode."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("latin-1")


@pytest.mark.parametrize("mode", ["fused", "ar"])
def test_stop_strings_end_with_the_token_that_completes_them(model, mode):  # noqa: F811
    e = engine(model, specials=Text())
    (whole,) = e.generate([PROMPTS[1]], replace(SAMPLED, stop_tokens=()), "ar")
    for start, stop in ((3, 4), (0, 1), (5, 9), (30, 40)):
        target = Text().decode(whole.tokens[start:stop])
        params = replace(SAMPLED, stop_tokens=(), stop_strings=("never there", target))
        (got,) = e.generate([PROMPTS[1]], params, mode)
        at = whole.text.index(target)
        assert got.tokens == whole.tokens[: at + len(target)] and got.finish_reason == "stop"
        assert got.text == whole.text[:at]
    with pytest.raises(UserError, match="stop_strings: the engine was given no tokenizer"):
        engine(model).generate([[1]], replace(SAMPLED, stop_strings=("a",)))
    with pytest.raises(UserError, match="stop_strings = 'abc'"):
        SamplingParams(stop_strings="abc")


def test_logprobs_are_those_of_the_ar_half_in_both_modes(model):  # noqa: F811
    params = [replace(SAMPLED, logprobs=True, temperature=t, top_p=p) for t, p in ((0.0, 1.0), (1.0, 0.8), (0.7, 1.0))]
    for prompt in PROMPTS[:2]:
        ar = engine(model).generate([prompt] * 3, params, "ar")
        fused = engine(model).generate([prompt] * 3, params, "fused")
        for a, f in zip(ar, fused, strict=True):
            assert f.tokens == a.tokens and len(f.logprobs) == len(f.tokens)
            torch.testing.assert_close(torch.tensor(f.logprobs), torch.tensor(a.logprobs), rtol=1e-4, atol=1e-4)
    (plain,) = engine(model).generate([PROMPTS[0]], SAMPLED)
    assert plain.logprobs == []
    expected = torch.tensor(
        forced_logprobs(model, PROMPTS[0], engine(model).generate([PROMPTS[0]], params[1])[0].tokens)
    )
    got = torch.tensor(engine(model).generate([PROMPTS[0]], params[1])[0].logprobs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def forced_logprobs(model, prompt, tokens) -> list[float]:  # noqa: F811
    """By one dense forward over the whole sequence."""
    from tests.test_decode import clean_rows
    from tidar_mega.model.attention import TrainingAttention

    rows = clean_rows(torch.tensor([[*prompt, *tokens]]))
    logits_TV = model.logits(model(rows, TrainingAttention(rows, "dense"))[:, 0]).double()
    logits_TV[:, 257:] = -torch.inf
    logprob_TV = logits_TV.log_softmax(dim=-1)
    return [float(logprob_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("mode", ["fused", "ar"])
def test_the_attention_of_gpus_gives_the_same(model, mode):  # noqa: F811
    """FlexAttention over pages, merged by log-sum-exp: here without its kernels, through the same tables and masks."""
    params = [replace(SAMPLED, seed=i, stop_tokens=(), max_tokens=12) for i in range(4)]
    expected = engine(model, prefill_chunk=9).generate(PROMPTS, params, mode)
    e = engine(model, page=16, cache_tokens=320, prefill_chunk=9)
    e.forwards.attention = FlexPagedAttention
    found = e.generate(PROMPTS, params, mode)
    assert [(g.tokens, g.accepted) for g in found] == [(g.tokens, g.accepted) for g in expected]


@pytest.mark.parametrize("outcomes", ["all", [1, 3]])
@pytest.mark.parametrize("sampling", [SAMPLED, SamplingParams(logprobs=True)])
def test_recorded_forwards_give_the_same(model, outcomes, sampling):  # noqa: F811
    """What a GPU replays as a CUDA graph, run here from the same buffers: three requests in the room of four."""
    params = [replace(sampling, seed=i, stop_tokens=(), max_tokens=9 + 4 * i) for i in range(3)]
    plain = engine(model, prefill_chunk=9, outcomes=outcomes)
    e = engine(model, page=16, cache_tokens=320, prefill_chunk=9, outcomes=outcomes)
    e.forwards.attention, e.forwards.recorder = FlexPagedAttention, Recorder(e.forwards, e.cache.pages_of(131))
    for _ in range(2):  # the second time with other pages, lengths and seeds in the same buffers
        found, expected = (x.generate(PROMPTS[:3], params, "fused") for x in (e, plain))
        assert [(g.tokens, g.accepted) for g in found] == [(g.tokens, g.accepted) for g in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        params = params[::-1]
    kinds = set(e.forwards.recorder.recordings)
    assert any(kind.requests == 4 for each in kinds for kind in each)
    assert outcomes == "all" or any(len({kind.plan for kind in each}) == 2 for each in kinds)


def test_only_steps_of_decoding_are_recorded(model):  # noqa: F811
    e = engine(model, page=16)
    e.forwards.attention, e.forwards.recorder = FlexPagedAttention, Recorder(e.forwards, e.cache.pages_of(131))
    e.generate(PROMPTS[:2], SamplingParams(8, 1.0, acceptance="rejection", stop_tokens=()), "fused")
    assert not e.forwards.recorder.recordings


def test_the_attention_of_gpus_has_the_same_numbers(model):  # noqa: F811
    plain, flex = mixed_hidden(engine(model, page=4, cache_tokens=200), lengths=(7, 0, 8, 3, 12, 5))
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, length", [(PagedAttention, 0), (PagedAttention, 40), (FlexPagedAttention, 0)])
def test_scores_of_bfloat16_are_not_rounded(kind, length):
    """Large ones, against float64; what is left are the weights and the output, of 8 bits each."""
    T, E, dtype = 24, 64, torch.bfloat16
    cache, draws = PagedCache([1], 1, E, 8, 16, dtype, torch.device("cpu")), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length + T, 1, 1, E, generator=draws).mul_(size).to(dtype) for size in (3, 2, 1))
    slots = cache.take(length + T)
    bias = torch.full((T, T), -torch.inf, dtype=dtype).triu_(1)
    for run in slots.of(0, length):  # all of them, or none
        cache.k[1][0, run.start : run.stop], cache.v[1][0, run.start : run.stop] = k[:length, 0, 0], v[:length, 0, 0]
    attention = kind.of(cache, [Part(range(T), T, slots, length, bias)])
    found = attention.attend(1, q[length:], k[length:], v[length:], E**-0.5)
    hidden = torch.ones(length + T, length + T, dtype=torch.bool).triu_(1)
    scores = (q[:, 0, 0].double() @ k[:, 0, 0].double().T * E**-0.5).masked_fill_(hidden, -torch.inf)
    expected = (scores.softmax(-1) @ v[:, 0, 0].double())[length:]
    assert (found[:, 0, 0].double() - expected).norm() / expected.norm() < 0.003


def test_the_kernels_of_gpus_visit_the_pages_of_each_request():
    """What FlexAttention does on a GPU and not on a CPU: it visits the listed pages, and finds the lines of both lists
    by the strides of the partial one (torch/_inductor/kernel/flex/templates)."""
    lengths, pages = (5, 32, 40, 0, 17), torch.tensor([[4, 9, 2], [7, 3, 8], [0, 5, 6], [1, 10, 11], [12, 13, 14]])
    cache = PagedCache([1], 1, 16, 15, 16, torch.float32, torch.device("cpu"))
    mask = _page_mask(cache, torch.tensor(lengths), pages, rows=130)
    assert mask.kv_indices.is_contiguous() and mask.full_kv_indices.is_contiguous()
    partial, whole = mask.kv_indices.flatten(), mask.full_kv_indices.flatten()
    for n, length in enumerate(lengths):
        for block in range(2):
            at = n * mask.kv_indices.stride(0) + block * mask.kv_indices.stride(2)
            visited = whole[at : at + int(mask.full_kv_num_blocks[n, 0, block])].tolist()
            assert visited == pages[n, : length // 16].tolist()
            looked_at = partial[at : at + int(mask.kv_num_blocks[n, 0, block])].tolist()
            assert looked_at == (pages[n, length // 16 :][:1].tolist() if length % 16 else [])
            seen = [mask.mask_mod(n, 0, 0, page * 16 + torch.arange(16)).tolist() for page in looked_at]
            assert seen == [[slot < length % 16 for slot in range(16)] for _ in looked_at]


def mixed_hidden(e, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Hidden states by both attentions, of requests of several lengths and plans, over scattered pages."""
    held = [e.cache.take(e.cache.page) for _ in range(e.cache.pages.count)]
    for slots in held[::2]:  # every other page: no two of a request are neighbours
        e.cache.give_back(slots)
    every = Plan(3, 3, (1, 2, 3), 3)
    plans = every, every, every, Plan(1, 1), Plan(1, 1), Plan(6, 1, (6,), 4)
    works = []
    for length, plan in zip(lengths, plans, strict=True):
        slots = e.cache.take(length + plan.clean)
        if length:
            e.forwards.run([Work(Plan(length, 0), [i % 256 for i in range(length)], slots, 0, SAMPLED)])
        works.append(Work(plan, list(range(40, 40 + plan.clean)), slots, length, SAMPLED))
    found = []
    for kind in (PagedAttention, FlexPagedAttention):
        e.forwards.attention = kind
        with torch.inference_mode():
            found.append(e.forwards.hidden(works))
    return found


def test_what_a_measurement_of_latencies_records_is_kept_until_it_ends(model, monkeypatch):  # noqa: F811
    """It goes round its forwards again and again: with one too few recordings kept, each would be made anew. Only their
    number matters here, so nothing is computed."""

    def nothing(batches, _):
        return [[Result(0, [], []) for _ in batch] for batch in batches]

    made = []
    monkeypatch.setattr(graphs, "Recording", lambda *kind: made.append(kind) or SimpleNamespace(run=nothing))
    e = engine(model, batch=16, cache_tokens=16 * 512)
    e.forwards.attention, e.forwards.recorder = FlexPagedAttention, Recorder(e.forwards, e.cache.pages_of(512))
    for _ in range(2):
        latency.measure(e.forwards, [1, 2, 4, 8, 16], block=16, drafter=IN_PLACE, prefix=8, repeats=1)
    assert len(made) == len(e.forwards.recorder.recordings) > 64
