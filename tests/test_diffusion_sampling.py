"""The samplers of masked diffusion: their law against enumeration, the acceptance rule, windows, counted forwards."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests import processes
from tests.plain_ssmd import PlainSsmd
from tests.steps import MASK, VOCAB
from tests.test_ssmd import settings
from tidar_mega import config as config_module
from tidar_mega.decode.diffusion import PAPER_WINDOWS, Window, acceptance, draw, sample, verify_window

V, D = 3, 3
NEVER = 1e-9  # a width that makes every window one place


@dataclass
class Tables:
    """A model over V ids and D places that is nothing but random tables: each answer depends on all that it may see."""

    seed: int
    places: int = D
    mask_id: int = V
    causal_share: float = 0.25

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(self.seed)
        contexts = (V + 1) ** D
        self.nc = (2 * torch.randn(contexts, D, V, generator=draws, dtype=torch.float64)).log_softmax(-1)
        self.c = (2 * torch.randn(contexts, contexts, D, V, generator=draws, dtype=torch.float64)).log_softmax(-1)

    def code(self, token_BS):
        return (token_BS * (V + 1) ** torch.arange(D)).sum(dim=-1)

    def draft(self, token_BS):
        return self.nc[self.code(token_BS)], self.code(token_BS)

    def verify(self, states, token_BS, order_BS):
        seen = [token_BS.where(order_BS < order_BS[:, n : n + 1], V) for n in range(D)]
        return torch.stack([self.c[states, self.code(seen[n]), n] for n in range(D)], dim=1)


def exact_law(model: Tables, window: Window) -> dict[tuple, float]:
    """P(sequence) of the method, from its statement, over all orders, drafts, acceptances and rejections."""
    law: Counter = Counter()
    nc, c = model.nc.exp().tolist(), model.c.exp().tolist()  # plain numbers: many small steps

    def code(token: tuple) -> int:
        return sum(x * (V + 1) ** place for place, x in enumerate(token))

    def forward(token: tuple, sigma: tuple, i: int, p: float) -> None:
        if i == D:
            law[token] += p
            return
        base, end = code(token), window.end(i, D)
        if not window.verify:
            for drafts in itertools.product(range(V), repeat=end - i):
                new, q = list(token), p
                for place, x in zip(sigma[i:end], drafts, strict=True):
                    new[place] = x
                    q *= nc[base][place][x]
                forward(tuple(new), sigma, end, q)
            return
        for x in range(V):
            new = put(token, sigma[i], x)
            go_on(new, sigma, base, i + 1, end, 1, p * nc[base][sigma[i]][x])

    def go_on(token: tuple, sigma: tuple, base, d: int, end: int, passes: int, p: float) -> None:
        """The place sigma[d] comes next, in verification number `passes` of this forward."""
        if d == end:
            return forward(token, sigma, d, p)
        target, draft = c[base][code(token)][sigma[d]], nc[base][sigma[d]]
        for x in range(V):
            new = put(token, sigma[d], x)
            accepted, rejected = min(target[x], draft[x]), max(target[x] - draft[x], 0)
            go_on(new, sigma, base, d + 1, end, passes, p * accepted)
            if passes == window.verify:
                forward(new, sigma, d + 1, p * rejected)
            else:
                go_on(new, sigma, base, d + 1, end, passes + 1, p * rejected)
        return None

    for sigma in itertools.permutations(range(D)):
        forward((V,) * D, sigma, 0, 1 / 6)
    return law


def chi_square_999(degrees: int) -> float:
    """The 99.9% quantile (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def put(token: tuple, place: int, x: int) -> tuple:
    return (*token[:place], x, *token[place + 1 :])


@pytest.mark.parametrize("window", [Window(0, 0.6), Window(1, 1.0), Window(2, 1.0), Window(8, 0.6), Window(1, NEVER)])
def test_the_law_is_the_methods(window):
    model, count = Tables(7), 20_000
    law = exact_law(model, window)
    assert sum(law.values()) == pytest.approx(1)
    found = Counter(map(tuple, sample(model, window, range(count), seed=3).token.tolist()))
    cells = [(found[s], count * p) for s, p in law.items() if count * p >= 5]
    rest = count - sum(n for n, _ in cells), count - sum(e for _, e in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    assert statistic < chi_square_999(len(cells) - 1)


def test_the_laws_differ_so_that_the_test_above_can_fail():
    laws = [exact_law(Tables(7), w) for w in (Window(0, 1.0), Window(1, 1.0), Window(8, 1.0), Window(0, NEVER))]
    for a, b in itertools.combinations(laws, 2):
        assert sum((20_000 * (a[s] - b[s])) ** 2 / (20_000 * b[s]) for s in b) > 200


def test_windows_of_one_place_are_the_standard_sampler():
    model = Tables(1)
    standard, speculative = (sample(model, Window(n, NEVER), range(200), seed=5) for n in (0, 8))
    assert torch.equal(standard.token, speculative.token)
    assert (standard.forwards == 0.75 * D).all()  # without the causal block
    assert (speculative.forwards == D).all()


def test_acceptance_is_the_ratio_and_the_residual_is_drawn():
    draft, target = torch.tensor([[[0.5, 0.3, 0.2]]]).log(), torch.tensor([[[0.2, 0.6, 0.2]]]).log()
    for x, expected in enumerate((0.4, 1.0, 1.0)):
        assert float(acceptance(draft, target, torch.tensor([[x]]))) == pytest.approx(expected)
    order, waits = torch.tensor([[0]]), torch.tensor([[True]])
    for uniform, expected in ((0.39, 0), (0.41, 1)):  # the residual of these two has mass on id 1 alone
        accept = torch.full((1, 1), uniform, dtype=torch.float64)
        token, known = verify_window(draft, target, torch.tensor([[0]]), order, waits, accept, accept)
        assert token.tolist() == [[expected]]
        assert known.tolist() == [1]


def test_draws_are_in_proportion_and_never_of_weight_0():
    weight = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert draw(weight.expand(1, 4, 4), uniform[None]).tolist() == [[1, 1, 2, 2]]


def test_windows_follow_the_cosine():
    for window in PAPER_WINDOWS:
        ends, i = [], 0
        while i < 1024:
            i = window.end(i, 1024)
            ends.append(i)
        sizes = [b - a for a, b in itertools.pairwise([0, *ends])]
        assert min(sizes[:-1]) >= 1
        assert len(ends) <= 1.1 / window.width
        if window.width > 0.01:  # later windows are larger
            assert sizes[0] < sizes[len(sizes) // 2] <= max(sizes)
    assert Window(1, 1.0).end(0, 100) == 100
    assert Window(1, 0.5).end(0, 100) == 29  # 100 (1 - cos(pi / 4))


def test_forwards_are_counted_by_the_share_of_the_causal_block():
    """With a target that forbids every draft each verification decides one place, and a repeat costs 0.25."""

    class Contrary(Tables):
        def draft(self, token_BS):
            log, states = super().draft(token_BS)
            log = torch.full_like(log, float("-inf"))
            log[..., 0] = 0
            return log, states

        def verify(self, states, token_BS, order_BS):
            log = torch.full((*token_BS.shape, V), float("-inf"), dtype=torch.float64)
            log[..., 2] = 0
            return log

    all_at_once = sample(Contrary(0), Window(8, 1.0), range(4), seed=0)
    assert (all_at_once.forwards == 1.25).all()  # one place for nothing, two verifications
    assert all((row == 2).sum() == 2 and (row == 0).sum() == 1 for row in all_at_once.token)
    once = sample(Contrary(0), Window(1, 1.0), range(4), seed=0)
    assert (once.forwards == 2).all()  # two places, then the last


def test_a_sample_is_a_function_of_its_number():
    model = Tables(2)
    together = sample(model, Window(2, 0.6), range(10), seed=1).token
    assert torch.equal(sample(model, Window(2, 0.6), [3, 7], seed=1).token, together[[3, 7]])
    assert not torch.equal(sample(model, Window(2, 0.6), range(10), seed=2).token, together)


def backbone(rank: int, config: config_module.Config):
    from tidar_mega.decode.diffusion import Backbone
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh

    build_mesh(config)
    (model,) = gpt.build(config, VOCAB, training=False)
    tokenizer = SimpleNamespace(mask=MASK, not_text=frozenset({MASK, MASK - 1}), vocab_size=VOCAB)
    denoiser = Backbone(model, config, tokenizer)
    draws = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(denoiser.places, generator=draws) for _ in range(3)])
    token = torch.randint(MASK - 1, order.shape, generator=draws)
    with torch.inference_mode():
        log_draft, states = denoiser.draft(token.masked_fill(order >= 5, MASK))
        log_target = denoiser.verify(states, token, order)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return weights, order, token, log_draft, log_target, denoiser.causal_share


@pytest.mark.distributed
def test_a_trained_models_drafts_and_targets_are_the_plain_ones():
    config = settings("ssmd", model={"num_layers": 3}, data={"seq_length": 12})
    ((weights, order, token, log_draft, log_target, share),) = processes.run(backbone, 1, config)
    plain = PlainSsmd({n: w.double() for n, w in weights.items()}, config_module.to_tree(config)["model"])
    for b in range(3):
        sigma = order[b].argsort().tolist()
        hidden = plain.noncausal(token[b].masked_fill(order[b] >= 5, MASK), layers=2)
        target = plain.speak(plain.causal(hidden, token[b], sigma, MASK))[order[b]]
        for got, expected in ((log_draft[b], plain.speak(hidden)), (log_target[b], target)):
            expected[:, [MASK, MASK - 1, *range(VOCAB, expected.shape[1])]] = float("-inf")
            assert torch.allclose(got.exp(), expected.softmax(-1), atol=1e-5)
    layer = 2 * 64 + 2 * 16 + 64 * 64 * 3 + 3 * 64 * 96  # norms, attention with 2 of 4 key heads, mlp
    mix = 3 * 64 * 64 + 2 * 64
    assert share == pytest.approx((layer + mix) / (3 * layer + mix))
