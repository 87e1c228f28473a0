"""Requests: their ends, their errors, and hostile cases, on an untrained model, which commits anything."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from tests.test_decode import Bytes, tiny_config
from tidar_mega import device
from tidar_mega.config import UserError
from tidar_mega.decode import trace
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.requests import Commit
from tidar_mega.decode.rules import accepted
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.evaluation.acceptance import distinct_share, held_out_prompts
from tidar_mega.model.gpt import build
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import build_mesh
from tidar_mega.rows import Rows

PROMPTS = [[65], [1, 2, 3, 4, 5], [200] * 30, list(range(100, 117))]
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def model():
    device.start_alone()
    build_mesh(tiny_config())
    (model,) = build(tiny_config(), Bytes.vocab_size)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # far from its start, where all ids are equally likely
            p.add_(0.15 * torch.randn(p.shape, generator=draw))
    return InferenceModel(model)


def engine(model, **changes) -> Engine:
    return Engine(model, **({"specials": Bytes(), "block": 4, "capacity": 128} | changes))


class Spoiled(Engine):
    """An engine that verifies other drafts than the model's."""

    def __init__(self, model, spoil) -> None:
        super().__init__(model, Bytes(), 4, 128)
        self.spoil = spoil

    def next_draft(self, request, result):
        return result.draft[:1] + self.spoil(request, result)[1:]


def plain_rule(draft: list[int], choice: list[int]) -> int:
    r = 1
    while r < len(draft) and draft[r] == choice[r - 1]:
        r += 1
    return r


def test_acceptance_is_the_rule_in_words():
    """On all agreements and disagreements of six slots, agreements behind an error among them."""
    draft = torch.arange(64)[:, None].bitwise_right_shift(torch.arange(6)) & 1
    for choice in (torch.zeros(64, 6, dtype=torch.long), torch.ones(64, 6, dtype=torch.long), draft.flip(1)):
        expected = [plain_rule(d, c) for d, c in zip(draft.tolist(), choice.tolist(), strict=True)]
        assert accepted(draft[:, 1:] == choice[:, :-1]).tolist() == expected
    assert accepted(torch.zeros(1, 0, dtype=torch.bool)).tolist() == [1]


@pytest.mark.parametrize("mode", ["fused", "ar"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 40])
def test_length_and_stop_tokens_cut_the_same_sequence(model, mode, max_tokens):
    whole = engine(model).generate(PROMPTS, replace(SAMPLED, stop_tokens=()), "ar")
    stop = whole[0].tokens[5]
    for n, full in enumerate(whole):
        for stops in ((), (stop,), (stop, full.tokens[2]), (full.tokens[0],)):
            params = replace(SAMPLED, max_tokens=max_tokens, stop_tokens=stops)
            (got,) = engine(model).generate([PROMPTS[n]], params, mode)
            ends = [i + 1 for i, t in enumerate(full.tokens[:max_tokens]) if t in stops]
            assert got.tokens == full.tokens[: min(ends, default=max_tokens)]
            assert got.finish_reason == ("stop" if ends else "length")
            assert got.text_tokens == (got.tokens[:-1] if ends else got.tokens)
            assert sum(got.commits) == len(got.tokens) and got.commits[0] == 1 and min(got.commits) >= 1
            assert len(got.accepted) == got.forwards - 1


def test_end_of_document_stops_unless_told_otherwise(model):
    loud = build_with_loud_eod(model)
    (stopped,) = engine(loud).generate([[65]], SamplingParams(max_tokens=20))
    assert stopped.tokens == [Bytes.eod] and stopped.finish_reason == "stop" and stopped.text_tokens == []
    (endless,) = engine(loud).generate([[65]], SamplingParams(max_tokens=20, stop_tokens=()))
    assert endless.tokens == [Bytes.eod] * 20 and endless.finish_reason == "length"
    assert endless.tokens_per_forward > 3


@pytest.mark.parametrize("mode", ["fused", "ar"])
def test_an_end_of_document_that_is_also_the_padding_is_text(model, mode):
    qwen = engine(build_with_loud_eod(model), specials=Bytes(pad=Bytes.eod, not_text=frozenset({Bytes.mask})))
    (found,) = qwen.generate([[65, Bytes.eod, 66]], SamplingParams(max_tokens=20), mode)
    assert found.tokens == [Bytes.eod] and found.finish_reason == "stop"


def build_with_loud_eod(model, ids=(Bytes.eod,)):
    """A model that wants nothing but the given ids."""
    loud = copy.copy(model)

    def logits(hidden_ND):
        found = torch.zeros_like(model.logits(hidden_ND))
        found[..., list(ids)] += 100
        return found

    loud.logits = logits
    return loud


@pytest.mark.parametrize("mode", ["fused", "ar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_wants_masks_and_padding_still_writes_text(model, mode, temperature):
    greedy_for_nothing = build_with_loud_eod(model, ids=[Bytes.pad, Bytes.mask, *range(259, 320)])
    params = SamplingParams(max_tokens=20, temperature=temperature)
    (got,) = engine(greedy_for_nothing).generate([[65, 66]], params, mode)
    assert max(got.tokens) <= Bytes.eod


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.5, 0.9)])
@pytest.mark.parametrize("block", [2, 4, 7])
def test_a_drafter_that_thinks_as_ar_does_is_never_rejected(model, block, temperature, top_p):
    """With equal logits everywhere, only the places' noise decides: AR and draft must use the same."""
    same = build_with_loud_eod(model, ids=[])
    plain, spread_V = same.logits, torch.randn(320, generator=torch.Generator().manual_seed(0))
    same.logits = lambda hidden: plain(hidden) + spread_V
    params = [SamplingParams(max_tokens=50, temperature=temperature, top_p=top_p, seed=i) for i in range(4)]
    found = engine(same, block=block).generate(PROMPTS, params)
    assert all(r == block for g in found for r in g.accepted)
    assert all(len(set(g.tokens)) > 10 or temperature == 0 for g in found)


def test_bfloat16_decodes_in_both_modes(model):
    (half,) = build(tiny_config(), Bytes.vocab_size)
    half = InferenceModel(half.bfloat16())
    for mode in ("fused", "ar"):
        found = engine(half).generate(PROMPTS, replace(SAMPLED, stop_tokens=()), mode)
        assert [len(g.tokens) for g in found] == [40] * 4


@pytest.mark.parametrize("capacity, length", [(31, 30), (33, 30), (128, 30), (40, 39)])
def test_the_capacity_cuts_both_modes_alike(model, capacity, length):
    prompt = [(7 * i) % 250 for i in range(length)]
    outputs = [
        engine(model, capacity=capacity, batch=b).generate(
            [prompt, [3]], replace(SAMPLED, max_tokens=500, stop_tokens=()), m
        )
        for b in (1, 2)
        for m in ("fused", "ar")
    ]
    assert [len(g.tokens) for g in outputs[0]] == [capacity - length, capacity - 1]
    assert all(g.finish_reason == "length" for g in outputs[0])
    assert all([g.tokens for g in o] == [g.tokens for g in outputs[0]] for o in outputs)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
def test_any_block_gives_ar_output(model, block):
    """Blocks that no model was trained for, ends in the middle of a block, and requests that end at different times."""
    params = [replace(SAMPLED, seed=i, max_tokens=5 + 9 * i, temperature=0.4 * i) for i in range(4)]
    ar = engine(model).generate(PROMPTS, params, "ar")
    fused = engine(model, block=block, batch=4).generate(PROMPTS, params, "fused")
    assert [g.tokens for g in fused] == [g.tokens for g in ar]
    if block == 1:
        assert all(g.tokens_per_forward == 1 for g in fused)


def test_a_hostile_draft_changes_nothing_but_the_speed(model):
    """Whatever the drafter says, right, wrong or absurd, the output stays AR's."""
    expected = [g.tokens for g in engine(model).generate(PROMPTS, SAMPLED, "ar")]
    draw = torch.Generator().manual_seed(0)
    spoilers = {
        "random": lambda _, result: torch.randint(256, (4,), generator=draw).tolist(),
        "mask": lambda _, result: [Bytes.mask] * 4,
        "repeat": lambda _, result: result.draft[:1] * 4,
        "now and then": lambda _, result: result.draft if torch.randint(2, (), generator=draw) else [0] * 4,
        "short": lambda _, result: result.draft[: 1 + len(result.tokens) % 4],
    }
    for spoil in spoilers.values():
        assert [g.tokens for g in Spoiled(model, spoil).generate(PROMPTS, SAMPLED)] == expected

    def oracle(request, result):  # the draft that AR will confirm
        place = len(request.result.tokens) + len(result.tokens) - 1
        return (expected[request.number] + [0] * 9)[place : place + 4]

    perfect = Spoiled(model, oracle).generate(PROMPTS, SAMPLED)
    assert [g.tokens for g in perfect] == expected
    assert all(r == 4 for g in perfect for r in g.accepted[:-1])


def test_nothing_is_left_behind_between_requests(model):
    """The same engine, other requests before, one given up half-way: the same output."""
    e = engine(model)
    first = [g.tokens for g in e.generate(PROMPTS, SAMPLED)]
    abandoned = e.stream(PROMPTS[2], SAMPLED)
    next(abandoned), next(abandoned)
    assert len(e.running) == 1
    abandoned.close()
    assert e.is_idle and e.cache.pages.free == e.cache.pages.count
    assert [g.tokens for g in e.generate(PROMPTS, SAMPLED)] == first


def test_the_stream_yields_what_generate_gives(model):
    commits = list(engine(model).stream(PROMPTS[3], SAMPLED))
    (whole,) = engine(model).generate([PROMPTS[3]], SAMPLED)
    assert [t for c in commits for t in c.tokens] == whole.tokens
    assert [len(c.tokens) for c in commits] == whole.commits
    assert [c.accepted for c in commits[1:]] == whole.accepted and commits[0].draft == []
    assert all(c.finished is None for c in commits[:-1]) and commits[-1].finished == whole.finish_reason
    output = whole.tokens
    for before, commit in enumerate(commits[1:], start=1):
        place = sum(len(c.tokens) for c in commits[:before])
        assert commit.draft[0] == output[place - 1], "the draft starts with AR's own last choice"


def test_streams_side_by_side_lose_nothing(model):
    """Each steps the engine, and so the other's request."""
    e = engine(model, batch=2)
    expected = e.generate(PROMPTS[2:4], SAMPLED)
    streams = [e.stream(prompt, SAMPLED) for prompt in PROMPTS[2:4]]
    found = [[next(stream)] for stream in streams]
    e.generate([PROMPTS[0]], SAMPLED)
    for commits, stream in zip(found, streams, strict=True):
        commits += stream
    assert [[t for c in commits for t in c.tokens] for commits in found] == [g.tokens for g in expected]
    assert [commits[-1].finished for commits in found] == [g.finish_reason for g in expected]


@pytest.mark.parametrize("cuts", [[1] * 9, [3, 3, 3], [9]])
def test_what_is_printed_stops_at_a_stop_string_and_never_takes_back(capsys, cuts):
    """Pieces of text for tokens, of which one completes the stop string in its middle."""
    from tidar_mega.decode.generate import _Printer

    pieces = ["ab", "c<", "d<", "/", "s", ">", "x", "y", "<"]

    class Pieces:
        eod = 99
        decode = staticmethod(lambda tokens: "".join(pieces[t] for t in tokens))

    def commits(last: int):
        """Of all tokens up to `last`, in forwards of the given sizes."""
        at = 0
        for size in cuts:
            tokens = list(range(at, min(at + size, last)))
            at += size
            if tokens:
                yield Commit(0, tokens, [], 0, "stop" if at >= last else None)

    printer = _Printer(Pieces, "", ("</s>",))
    for commit in commits(6):
        printer.add(commit)
        assert "</" not in printer.text
    printer.end()
    assert printer.text == "abc<d" and capsys.readouterr().out == "abc<d\n"
    printer = _Printer(Pieces, "", ("</s>",))
    for commit in commits(3):
        printer.add(commit)
    printer.end()
    assert printer.text == "abc<d<" and capsys.readouterr().out == "abc<d<\n"


def test_a_picture_shows_formulas_as_they_are_written():
    """matplotlib would read what stands between two dollars as TeX, and refuse what is none."""
    commits = [Commit(0, [0, 1], [], 0, None), Commit(0, [2], [1, 0], 1, "length")]
    image = trace.picture(commits, lambda tokens: ["$$", r"$\x^$", "a"][tokens[0]])
    assert image.min() < 255


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[]], "prompt 0 is empty"),
        ([[1] * 128], "at most 127"),
        ([[1, 259]], "prompt 0 holds id 259"),
        ([[-1]], "holds id -1"),
        (["def f"], "prompt 0 is 'def f': must be token ids"),
        ([[1.5]], "must be token ids"),
        ([[Bytes.mask]], "mask"),
        ([[Bytes.pad]], "padding"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_impossible_prompts_are_refused_before_anything_runs(model, prompts, message, call):
    with pytest.raises(UserError, match=message):
        if call == "generate":
            engine(model).generate(prompts, SAMPLED)
        else:
            for prompt in prompts:
                engine(model).stream(prompt, SAMPLED)


def test_a_prompt_that_its_caller_goes_on_with_is_the_requests_own(model):
    e, prompt = engine(model), [1, 2, 3, 4, 5]
    (expected,) = e.generate([prompt], SAMPLED)
    request = e.add(prompt, SAMPLED)
    prompt += [6] * 200
    while not request.finished:
        e.step()
    assert request.result.tokens == expected.tokens


def test_impossible_engines_and_calls_are_refused(model):
    for bad in ({"block": 0}, {"capacity": 1}, {"batch": 0}, {"prefill_chunk": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            engine(model, **bad)
    with pytest.raises(UserError, match="mode = 'turbo': must be one of fused, ar"):
        engine(model).generate([[1]], SAMPLED, "turbo")
    with pytest.raises(UserError, match="1 sampling parameters for 2 prompts"):
        engine(model).generate([[1], [2]], [SAMPLED])
    assert engine(model).generate([], SAMPLED) == []


def test_distinct_share_counts_each_output_for_itself():
    assert distinct_share([[1, 1, 1, 1, 1]], 4) == 0.5
    assert distinct_share([[1, 2, 3, 4], [1, 2, 3, 4]], 4) == 1
    assert distinct_share([[1, 2]], 4) == 1


@dataclass
class Windows:
    """A validation stream of packed documents."""

    samples_per_epoch: int = 6

    def parts(self, count: int) -> list:
        return [("", self, min(count, 6))]

    def rows(self, index: int) -> Rows:
        document = torch.tensor([[0] * 3 + [1] * 5 + [2] * 2 + [-1] * 2]) if index % 2 else torch.full((1, 12), -1)
        token = torch.arange(12)[None] + 20 * index
        return Rows(*[token] * 5, document, token, token.float())


def test_prompts_are_the_starts_of_the_longest_pieces():
    assert held_out_prompts(Windows(), 3, 4) == [[23, 24, 25, 26], [63, 64, 65, 66], [103, 104, 105, 106]]
    with pytest.raises(UserError, match="3 found"):
        held_out_prompts(Windows(), 4, 4)
