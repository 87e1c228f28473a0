"""The decoding engine: prompts in, exact continuations out, several tokens per forward.

Requests join and leave between forwards (continuous batching). Every step is one forward of all running requests: those
that decode verify their drafts, those that have just joined encode the next pieces of their prompts. Every request has
its own length, draft, acceptance and end; none changes what another gets. Mode "ar" runs the same steps with one row
per request: the baseline that fused decoding must equal and beat. Mode "blocks" is block diffusion, the paper's other
comparison.

Every rank of a tensor-parallel and pipeline layout runs the same engine with the same calls; the schedule is a function
of the calls and of the forwards' results alone. Replicas (data parallel) divide the prompts of `generate`.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch.distributed as dist

from tidar_mega.config import UserError
from tidar_mega.decode import blocks
from tidar_mega.decode.cache import PagedCache
from tidar_mega.decode.flex import PAGE
from tidar_mega.decode.forward import Forwards, Plan, Result, Work
from tidar_mega.decode.graphs import Recorder
from tidar_mega.decode.latency import Curves
from tidar_mega.decode.outcomes import Automatic, Drafting, Fixed
from tidar_mega.decode.requests import Commit, Generation, Request
from tidar_mega.decode.sampling import SamplingParams
from tidar_mega.methods import IN_PLACE, Drafter
from tidar_mega.model.inference import InferenceModel
from tidar_mega.parallel.mesh import share_out

MODES = ("fused", "ar", "blocks")


class Specials(Protocol):
    """What the engine asks of a tokenizer: ids 0 .. vocab_size - 1, but for `not_text` all of which may be read and
    written, and, for stop strings and texts, `decode`."""

    vocab_size: int
    eod: int
    mask: int

    @property
    def not_text(self) -> frozenset[int]: ...


class Engine:
    """Decodes with a trained model.

    model          on its device, in the dtype to decode in (only float32 keeps near-ties out of the kernels' hands)
    specials       a tokenizer, or anything with its vocab_size, eod, mask and not_text
    block          draft length; with 1, fused decoding is plain AR
    capacity       most tokens of a prompt and its continuation together
    batch          most requests decoded at once; more wait
    prefill_chunk  prompt tokens encoded by one forward, of all joining requests together
    outcomes       behind which outcomes the next draft is made at once: all, last, none or a list of 1..block; see
                   `choose_outcomes`
    cache_tokens   what the pages of keys and values hold, of all requests together; None: `batch` times `capacity`
    page           tokens of a page; None: what suits the device
    replicas       data-parallel group, whose members divide the prompts of `generate`; None: alone
    cuda_graphs    on a GPU, steps of decoding are recorded once and replayed (`graphs.py`)
    drafter        how the masks draft, as the method of the training says; the default is TiDAR's
    """

    def __init__(
        self,
        model: InferenceModel,
        specials: Specials,
        block: int,
        capacity: int,
        batch: int = 16,
        prefill_chunk: int = 512,
        outcomes: str | Sequence[int] = "all",
        cache_tokens: int | None = None,
        page: int | None = None,
        replicas: dist.ProcessGroup | None = None,
        cuda_graphs: bool = True,
        drafter: Drafter = IN_PLACE,
    ) -> None:
        page = page or (PAGE if model.device.type == "cuda" else 64)
        given = {"block": block, "batch": batch, "prefill_chunk": prefill_chunk, "page": page}
        for name, value in given.items():
            if value < 1:
                raise UserError(f"{name} = {value}: must be 1 or more")
        if capacity < 2:
            raise UserError(f"capacity = {capacity}: must be 2 or more, a prompt token and a new one")
        if drafter.depths and block > 1 + drafter.depths:
            raise UserError(
                f"block = {block}: must be at most {1 + drafter.depths}, AR's own token and one of each of the model's "
                f"{drafter.depths} layers of multi-token prediction"
            )
        self.model, self.specials, self.replicas = model, specials, replicas
        self.block, self.capacity, self.batch, self.prefill_chunk = block, capacity, batch, prefill_chunk
        self.drafter = drafter
        self.policy: Fixed | Automatic = Fixed(Drafting.of(block, outcomes, drafter))
        pages = batch * -(-(capacity + block - 1) // page) if cache_tokens is None else -(-cache_tokens // page)
        heads, width = model.key_heads, model.config.kv_channels
        self.cache = PagedCache(model.layer_numbers, heads, width, pages, page, model.dtype, model.device)
        forbidden = [*sorted(specials.not_text), *range(specials.vocab_size, model.vocab * model.tensor.size())]
        self.forwards = Forwards(model, self.cache, specials.mask, forbidden)
        speculates = drafter.depths > 0 and block > 1  # how many rows a depth runs is known on the host alone
        if cuda_graphs and model.device.type == "cuda" and not speculates:
            self.forwards.recorder = Recorder(self.forwards, self.cache.pages_of(capacity + block - 1))
        self._drafts_all = self.policy.most == Drafting.of(block, "all", drafter)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def choose_outcomes(self, curves: Curves) -> None:
        """From now on the fastest draft length up to `block` and outcomes, by the machine's latency curves, for however
        many requests run. Raises UserError for layers of multi-token prediction, which have no outcomes to choose."""
        if self.drafter.depths:
            raise UserError("outcomes = auto: multi-token prediction drafts behind the actual outcome; use all")
        self.policy = Automatic(self.block, curves, self.drafter)
        self._drafts_all = True

    # whole continuations

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], mode: str = "fused"
    ) -> list[Generation]:
        """Continues every prompt; `params` for all, or one each. Modes "fused" and "ar" give the same tokens (see
        Generation.exact).

        A prompt is one document from its start, positions from 0. Raises UserError on a prompt that is empty, holds
        ids that are no text, leaves no room for a token or can never fit the pages, before anything is computed.
        """

        def work(requests: list[Request]) -> list[Generation]:
            for _ in self._run(requests):
                pass
            return [request.result for request in requests]

        return share_out(self._requests(prompts, params, mode), work, self.replicas)

    def stream(self, prompt: Sequence[int], params: SamplingParams, mode: str = "fused") -> Iterator[Commit]:
        """Continues one prompt, yielding what each forward gives as soon as it is known. Raises as `generate`."""
        return self._run(self._requests([prompt], params, mode))

    def _run(self, requests: list[Request]) -> Iterator[Commit]:
        """Until these are finished; given up half-way, they leave the engine."""
        for request in requests:
            request.unread = deque()
        self.waiting.extend(requests)
        live = list(requests)
        try:
            while live:
                if not any(request.unread for request in live):
                    self.step()
                for request in live:  # also what another's step has given it
                    while request.unread:
                        yield request.unread.popleft()
                live = [request for request in live if not request.finished or request.unread]
        finally:
            for request in requests:
                self.cancel(request)

    # requests that join and leave

    def add(self, prompt: Sequence[int], params: SamplingParams, mode: str = "fused") -> Request:
        """Queues a request, to be carried on by `step`. Raises UserError as `generate`."""
        (request,) = self._requests([prompt], params, mode)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now, waiting or running; does nothing to one that has ended."""
        if request.finished:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        self._end(request, "cancelled")

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def step(self) -> list[tuple[Request, Commit]]:
        """One forward of everything that runs, after admitting what fits; what it gave, empty if nothing runs."""
        self._admit()
        assert self.running or not self.waiting, "pages were lost: nothing runs, and what waits does not fit"
        turns = self._turns()
        results = self.forwards.run([work for _, work in turns]) if turns else []
        commits = []
        for (request, _), result in zip(turns, results, strict=True):
            verified, request.draft = request.draft, self.next_draft(request, result)
            request.proposal_SV = result.proposal_SV
            request.length += result.kept
            if verified and request.mode == "fused":
                self.policy.observe(len(verified), len(result.tokens))
            if result.tokens:
                commits.append((request, self._commit(request, result, verified)))
        return commits

    def _admit(self) -> None:
        """In order of arrival: who must wait for pages lets nobody past, so that everybody's turn comes."""
        while self.waiting and len(self.running) < self.batch:
            request = self.waiting[0]
            slots = self.cache.take(self._need(request))
            if slots is None:
                return
            request.slots, request.admitted = slots, time.perf_counter()
            self.running.append(self.waiting.popleft())

    def _need(self, request: Request) -> int:
        """Rows that a request may write: the last forward starts before the end, and verifies a whole draft."""
        return len(request.prompt) + request.limit + (1 if request.mode == "ar" else self.block) - 1

    def _drafting(self, request: Request, length: int, limit: int) -> Drafting:
        """How far a request drafts now; `length` and `limit` are the means of all that run."""
        if request.mode == "ar":
            return Drafting(1, drafter=self.drafter)
        if request.params.rule == "mixed":
            return Drafting.of(self.block, "all", self.drafter)
        return self.policy.drafting(len(self.running), not request.params.is_greedy, length, limit)

    def _turns(self) -> list[tuple[Request, Work]]:
        """What each running request does next; joining ones share the prompt tokens of a forward in their order."""
        budget, turns, count = self.prefill_chunk, [], len(self.running) or 1
        means = sum(r.length for r in self.running) // count, sum(r.limit for r in self.running) // count
        for r in self.running:
            if r.prompt_left and not budget:
                continue
            if r.mode == "blocks":
                plan, tokens, drawn = blocks.turn(r, self.block, budget)
            else:
                plan, tokens, drawn = self._turn(r, budget, self._drafting(r, *means))
            budget -= len(tokens) if r.prompt_left else 0
            following = r.prompt[r.length + len(tokens)] if r.prompt_left > len(tokens) else None
            turns.append((r, Work(plan, tokens, r.slots, r.length, r.params, r.proposal_SV, drawn, following)))
        return turns

    def _turn(
        self, request: Request, budget: int, drafting: Drafting
    ) -> tuple[Plan, Sequence[int], Sequence[int | None]]:
        if not request.prompt_left:
            return drafting.step(len(request.draft)), request.draft, ()
        tokens = request.prompt[request.length : request.length + budget]
        return drafting.prompt(len(tokens), len(tokens) == request.prompt_left), tokens, ()

    def next_draft(self, request: Request, result: Result) -> list[int]:
        """What the request verifies next."""
        return result.draft

    def _commit(self, request: Request, result: Result, verified: list[int]) -> Commit:
        given = blocks.fill(request, result) if request.mode == "blocks" else result.tokens
        tokens, finished = request.cut(given)
        accepted = len(result.tokens) if verified else 0
        logprobs = result.logprobs[: len(tokens)] if request.params.logprobs else []
        commit = Commit(request.number, tokens, verified, accepted, finished, logprobs, request.draft)
        request.result.add(commit)
        if request.unread is not None:
            request.unread.append(commit)
        if finished:
            self._end(request, finished)
        return commit

    def _end(self, request: Request, reason: str) -> None:
        request.result.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
            self.cache.give_back(request.slots)
            request.result.seconds = time.perf_counter() - request.admitted
        if request.decode_text is not None:
            request.result.text = request.text()

    # checks

    def _requests(self, prompts, params, mode: str) -> list[Request]:
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if mode not in MODES:
            raise UserError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")
        if len(all_params) != len(prompts):
            raise UserError(f"{len(all_params)} sampling parameters for {len(prompts)} prompts: give one, or one each")
        pairs = enumerate(zip(prompts, all_params, strict=True))
        return [self._request(number, prompt, own, mode) for number, (prompt, own) in pairs]

    def _request(self, number: int, prompt: Sequence[int], params: SamplingParams, mode: str) -> Request:
        prompt = self._checked(number, prompt)
        decode = getattr(self.specials, "decode", None)
        if params.stop_strings and decode is None:
            raise UserError("stop_strings: the engine was given no tokenizer that can decode; use stop_tokens")
        if mode == "blocks" and (self.block == 1 or params.rule == "mixed" or params.logprobs):
            raise UserError("mode = blocks: needs a block of 2 or more, beta = 1 and no logprobs (there is no AR half)")
        if params.rule == "mixed" and (mode == "ar" or self.block == 1 or not self._drafts_all):
            raise UserError(
                f"beta = {params.beta}: mixed verification reads the masks behind every outcome; "
                "use mode = fused, outcomes = all and a block of 2 or more, or beta = 1"
            )
        if self.drafter.ahead and (mode == "blocks" or params.rule == "mixed"):
            asked = "mode = blocks" if mode == "blocks" else f"beta = {params.beta}"
            raise UserError(f"{asked}: this model's masks predict the next place; use mode = fused and beta = 1")
        if self.drafter.depths and (mode == "blocks" or params.rule != "coupled"):
            asked = f"beta = {params.beta}" if params.rule == "mixed" else f"acceptance = {params.rule}"
            raise UserError(
                f"{'mode = blocks' if mode == 'blocks' else asked}: layers of multi-token prediction draft; use mode = "
                "fused, beta = 1 and acceptance = coupled"
            )
        stops = {self.specials.eod} if params.stop_tokens is None else set(params.stop_tokens)
        limit = min(params.max_tokens, self.capacity - len(prompt))
        request = Request(number, prompt, params, mode, limit, frozenset(stops), decode)
        request.result.exact = params.rule != "mixed" and mode != "blocks"
        held = self.cache.pages.count * self.cache.page
        if self.cache.pages_of(self._need(request)) > self.cache.pages.count:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and may get {limit} more: the engine's pages hold {held} "
                "tokens in all; lower max_tokens or raise cache_tokens"
            )
        return request

    def _checked(self, number: int, prompt: Sequence[int]) -> tuple[int, ...]:
        """A copy, as the caller may go on with his. Raises UserError."""
        s = self.specials
        try:
            prompt = tuple(map(operator.index, prompt))
        except TypeError:
            raise UserError(
                f"prompt {number} is {str(prompt)[:40]!r}: must be token ids, whole numbers; encode the text first"
            ) from None
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty: there is nothing to continue; give at least one token")
        if len(prompt) >= self.capacity:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: at most {self.capacity - 1} leave room for a new one "
                f"within the engine's capacity of {self.capacity}; shorten it or raise the capacity"
            )
        bad = [i for i in prompt if not 0 <= i < s.vocab_size or i in s.not_text]
        if bad:
            reserved = ", ".join(map(str, sorted(s.not_text)))
            raise UserError(
                f"prompt {number} holds id {bad[0]}: must be a text token, 0 .. {s.vocab_size - 1} without "
                f"padding and mask ({reserved})"
            )
        return prompt
