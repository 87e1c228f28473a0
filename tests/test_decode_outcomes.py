"""How far to draft: the expected speed against a simulation, and choices that must follow from the curve."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.test_decode_requests import PROMPTS, SAMPLED, engine, model  # noqa: F401
from tidar_mega.config import UserError
from tidar_mega.decode import latency as latency_module
from tidar_mega.decode.latency import Curves, Latency
from tidar_mega.decode.outcomes import PRIOR, WORTH, Automatic, Drafting, _binomial, outcome_probabilities, speed
from tidar_mega.methods import IN_PLACE


def curve(per_row: float, fixed: float = 1.0, head: float = 0.01, sizes=(1, 4, 16)) -> Latency:
    """Straight lines: a forward of n requests of r rows costs fixed + per_row * n * r, a head row `head`."""
    rows = (1, 4, 16, 72, 272)
    heads = [(r, 0.05 + head * r) for r in rows]
    step = {n: [(r, fixed + per_row * n * r) for r in rows] for n in sizes}
    return Latency(step, step, heads, [(r, 2 * s) for r, s in heads], longest=16)


def simulate(drafting: Drafting, acceptance, latency: Latency, requests: int, steps: int = 20_000) -> float:
    """Tokens per second of requests that verify and catch up one after the other, step by step."""
    draw, B = random.Random(0), drafting.block
    has_draft, tokens, seconds = [True] * requests, 0, 0.0
    for _ in range(steps):
        rows = first = second = 0
        for i in range(requests):
            if not has_draft[i]:
                rows, first, second, tokens = rows + 1 + B, first + 1, second + B - 1, tokens + 1
                has_draft[i] = True
                continue
            r = 1
            while r < B and draw.random() < acceptance[r - 1]:
                r += 1
            has_draft[i] = r in drafting.outcomes
            rows, first, tokens = rows + B * (1 + len(drafting.outcomes)), first + B, tokens + r
            second += (B - 1) * has_draft[i]
        seconds += latency.seconds(requests, rows, first, second, False)
    return tokens / seconds


@pytest.mark.parametrize("requests", [1, 3, 16])
@pytest.mark.parametrize("outcomes", ["all", "last", "none", [1, 3]])
def test_the_expected_speed_is_that_of_a_simulation(requests, outcomes):
    acceptance, drafting, latency = [0.9, 0.6, 0.8], Drafting.of(4, outcomes), curve(0.03)
    expected = speed(drafting, acceptance, latency, requests, False)
    # where every outcome is followed by a catch-up, requests that start together stay in step; else it is exact
    tolerance = 0.02 if outcomes == "none" and requests > 1 else 0.01
    assert expected == pytest.approx(simulate(drafting, acceptance, latency, requests), rel=tolerance)


@pytest.mark.parametrize("limit", [16, 64])
@pytest.mark.parametrize("outcomes", ["all", "none"])
def test_what_is_drafted_beyond_the_limit_is_in_vain(outcomes, limit):
    """Where every forward takes a second, against the forwards of requests one by one, the prompt's among them."""
    acceptance, drafting, latency = [0.9, 0.8, 0.8], Drafting.of(4, outcomes), curve(0.0, head=0.0)
    second = latency.seconds(1, 1, 1, 1, False)
    draw, forwards = random.Random(0), 0
    for _ in range(4000):
        given, has_draft, forwards = 1, True, forwards + 1
        while given < limit:
            r = 1
            while has_draft and r < 4 and draw.random() < acceptance[r - 1]:
                r += 1
            given, forwards, has_draft = given + r, forwards + 1, not has_draft or r in drafting.outcomes
    expected = speed(drafting, acceptance, latency, 1, False, limit) * second
    assert expected == pytest.approx(4000 * limit / forwards, rel=0.02)


def test_plain_ar_is_one_row_of_each_request():
    assert speed(Drafting(1), [], curve(0.1), 4, False) == pytest.approx(4 / (1 + 0.4 + 0.05 + 0.04))
    assert speed(Drafting(1), [], curve(0.1), 4, True) == pytest.approx(4 / (1 + 0.4 + 2 * (0.05 + 0.04)))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_chances_of_many_requests_are_finite(p):
    found = [_binomial(5000, c, p) for c in range(5001)]
    assert sum(found) == pytest.approx(1) and sum(c * f for c, f in enumerate(found)) == pytest.approx(5000 * p)
    assert speed(Drafting.of(4, "last"), [0.9, 0.6, 0.8], curve(0.03), 5000, False) > 0


def test_outcomes_are_a_distribution():
    assert outcome_probabilities([]) == [1.0]
    assert outcome_probabilities([0.5, 0.2]) == pytest.approx([0.5, 0.4, 0.1])
    assert sum(outcome_probabilities([0.3] * 7)) == pytest.approx(1)


def automatic(block: int, curves: Latency | Curves, acceptance: float) -> Automatic:
    """One that has seen drafts of which each slot passes with a chance of its own."""
    curves = curves if isinstance(curves, Curves) else Curves({64: curves})
    chooser, draw = Automatic(block, curves), random.Random(0)
    for _ in range(600):
        r = 1
        while r < block and draw.random() < acceptance:
            r += 1
        chooser.observe(block, r)
    return chooser


def test_the_choice_follows_the_curve():
    free, dear = curve(1e-6), curve(1.0, fixed=0.01)
    assert automatic(8, free, 0.7).drafting(1, False, 64, 4096) == Drafting.of(8, "all"), "rows cost nothing"
    assert automatic(8, dear, 0.7).drafting(1, False, 64, 4096) == Drafting(1), "every row costs a forward"
    nearly_always = automatic(8, curve(0.05), 0.99).drafting(1, False, 64, 4096)
    assert nearly_always.outcomes == (8,) and nearly_always.block == 8, "one outcome is nearly certain"
    hopeless = automatic(8, curve(0.05), 0.02).drafting(1, False, 64, 4096)
    assert hopeless == Drafting(1), "what is never kept is not worth its rows"
    # the same acceptance, more requests: a forward is no longer bound by its fixed cost, so less is drafted
    busy = automatic(8, curve(0.02), 0.7)
    assert busy.drafting(16, False, 64, 4096).block < busy.drafting(1, False, 64, 4096).block


def test_no_fixed_choice_is_better_than_the_automatic_one():
    for per_row in (1e-4, 0.01, 0.05, 0.3):
        for acceptance in (0.3, 0.7, 0.95):
            chooser, latency = automatic(8, curve(per_row), acceptance), curve(per_row)
            for requests in (1, 4, 16):
                choice = chooser.drafting(requests, False, 64, 4096)
                chosen = speed(choice, chooser.acceptance, latency, requests, False, 4096)
                for block in (1, 2, 4, 8):
                    for outcomes in ("all", "last", "none"):
                        fixed = Drafting.of(block, outcomes)
                        other = speed(fixed, chooser.acceptance, latency, requests, False, 4096)
                        assert chosen * (WORTH if choice.block == 1 else 1) >= other * (1 - 1e-9)


def test_acceptance_is_that_of_slots_that_were_tested():
    chooser = Automatic(4, Curves({64: curve(0.01)}))
    for _ in range(100):
        chooser.observe(4, 2)  # slot 1 passes, slot 2 fails, slot 3 is never tested
        chooser.observe(1, 1)  # a catch-up forward tests nothing
    first, second, third = chooser.acceptance[:3]
    assert first > 0.99 and second < 0.05 and third == PRIOR[0] and chooser.seen == 100


def live(chooser: Automatic, requests: int, steps: int, acceptance: float, drafts: list[int]) -> float:
    """Lets requests decode as the engine would; their steps that draft, as a share. `drafts` are the lengths that each
    verifies next."""
    draw, drafted = random.Random(1), 0
    for _ in range(steps):
        chosen = chooser.drafting(requests, False, 64, 4096)
        drafted += chosen.block > 1
        for i, length in enumerate(drafts):
            r = 1
            while r < length and draw.random() < acceptance:
                r += 1
            chooser.observe(length, r)
            drafts[i] = chosen.block if r in chosen.step(length).outcomes else 1
    return drafted / steps


@pytest.mark.parametrize("requests", [1, 16])
def test_drafting_is_tried_again_where_it_would_pay(requests):
    """Text whose drafts are never kept, and then text whose drafts are; a machine on which no draft can pay."""
    chooser, drafts = Automatic(8, Curves({64: curve(0.01)})), [1] * requests
    live(chooser, requests, 200, 0.0, drafts)
    assert live(chooser, requests, 8000, 0.0, drafts) < 0.035, "plain, but for the trials"
    live(chooser, requests, 4000, 0.9, drafts)
    assert live(chooser, requests, 1000, 0.9, drafts) == 1
    dear, drafts = Automatic(8, Curves({64: curve(1.0)})), [1] * requests
    live(dear, requests, 200, 0.9, drafts)
    assert live(dear, requests, 4000, 0.9, drafts) == 0


def test_the_first_trial_is_of_some_drafts_of_every_request():
    chooser = Automatic(4, Curves({64: curve(1.0)}))
    for seen in range(16 * 8):
        assert chooser.drafting(16, False, 64, 4096).block == 4, seen
        chooser.observe(4, 1)
    assert chooser.drafting(16, False, 64, 4096) == Drafting(1)


@pytest.mark.parametrize("per_row", [1e-6, 0.02, 0.2])
def test_an_engine_that_chooses_by_itself_gives_ar_output(model, per_row):  # noqa: F811
    """The draft's length and the outcomes change in the middle of requests."""
    params = [replace(SAMPLED, seed=i, stop_tokens=(), max_tokens=20 + 5 * i) for i in range(12)]
    prompts = [PROMPTS[i % 4] for i in range(12)]
    expected = [g.tokens for g in engine(model).generate(prompts, params, "ar")]
    automatic = engine(model, block=8, batch=5)
    automatic.choose_outcomes(Curves({64: curve(per_row)}))
    used, drafting = set(), automatic.policy.drafting

    def seen(*state) -> Drafting:
        used.add(drafting(*state))
        return drafting(*state)

    automatic.policy.drafting = seen
    for _ in range(2):
        assert [g.tokens for g in automatic.generate(prompts, params)] == expected
    assert len(used) > (1 if per_row > 1e-6 else 0), used


def test_a_curve_is_measured_and_kept(model, tmp_path):  # noqa: F811
    e = engine(model, cache_tokens=400)
    free = e.cache.pages.free
    found = latency_module.measure(e.forwards, [1, 2], block=4, drafter=IN_PLACE, prefix=16, repeats=1)
    assert e.cache.pages.free == free
    assert [r for r, _ in found.step[2]] == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    # drafts of 2 and 4 behind all outcomes, the last, and in a catch-up forward
    assert [r for r, _ in found.fused[1]] == [3, 4, 5, 6, 8, 20]
    assert [r for r, _ in found.fused[2]] == [2.5, 3.5, 4.5, 6, 6.5, 20], "one of the two catches up"
    measured = [*found.step.values(), *found.fused.values(), found.head, found.sampled]
    assert all(s >= 0 for points in measured for _, s in points)
    name = latency_module.key(e.forwards)
    assert "2 layers of 64, float32, tensor 1, pipeline 1" in name
    assert latency_module.load(tmp_path, name) is None
    latency_module.save(tmp_path, "another machine", Curves({16: found}))
    latency_module.save(tmp_path, name, Curves({16: found}))
    stored = latency_module.load(tmp_path, name)
    assert stored.at(16).seconds(2, 40, 8, 6, True) == found.seconds(2, 40, 8, 6, True)
    (tmp_path / latency_module.FILE).write_text("{")
    assert latency_module.load(tmp_path, name) is None, "a damaged file is measured again"
    assert stored.cover(2, 4) and not stored.cover(3, 4) and not stored.cover(2, 5)


def test_a_curve_between_two_lengths():
    near, far = curve(0.1), curve(0.3, fixed=2.0)
    curves = Curves({100: near, 300: far})
    for length, share in ((0, 0.0), (100, 0.0), (150, 0.25), (300, 1.0), (500, 2.0)):
        expected = (1 - share) * near.seconds(4, 40, 8, 0, False) + share * far.seconds(4, 40, 8, 0, False)
        assert curves.at(length).seconds(4, 40, 8, 0, False) == pytest.approx(expected)


def test_the_choice_follows_the_length():
    """Rows are dear behind few tokens and free behind many, where the forward itself takes long."""
    chooser = automatic(8, Curves({64: curve(1.0, fixed=0.01), 1024: curve(1e-6)}), 0.7)
    assert chooser.drafting(1, False, 64, 4096) == Drafting(1)
    assert chooser.drafting(1, False, 1024, 4096) == Drafting.of(8, "all")


def test_impossible_outcomes_are_refused(model):  # noqa: F811
    with pytest.raises(UserError, match=r"outcomes = \[0, 2\]: 0 is not among 1 .. 4"):
        engine(model, outcomes=[0, 2])
    with pytest.raises(UserError, match="outcomes = 'most': must be all, last, none or a list"):
        engine(model, outcomes="most")
