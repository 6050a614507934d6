"""Temporal fusion: one loop whose every iteration runs all live requests in one forward, wherever each of them is.

Requests join at the next iteration, any number at a time, and leave when they are finished or cancelled, while the
others go on. The loop knows no model: it is given a function from a batch and its token ids to the logits of some rows,
and calls it once an iteration, whatever the mix of prompts and decodes.

What runs in an iteration is `compose`'s, a pure function, and what is drawn depends on a request's own seed, so ranks
that are told the same do the same without a word. Where only rank 0 hears of requests, it tells the others between the
iterations (`lead`). Flover's barriers between ranks, and its handshake for every request, are not needed.

A request's pages are freed when it leaves, and nothing else need move, for page tables say what lies where. With
`compaction` what is left is brought together: with one page for each request that is Flover's reordering of buffers.

With `share_prefixes` a request begins on the full pages that others, live or gone, have computed of an equal beginning.
Only full pages are shared, so what several hold is never written and nobody needs a page for a copy of one.

Source: Flover (arXiv:2305.13484).
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, islice
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.batching.compose import Budget, Policy, Room, Step, compose
from seqpar.batching.requests import Progress, Request
from seqpar.batching.sampling import sample
from seqpar.batching.sharing import share
from seqpar.batching.words import Words
from seqpar.comm import CommError, ProcessGroup
from seqpar.kv import PagedKV, SavedKV, page_keys
from seqpar.kv.compaction import Strategy
from seqpar.ragged import RaggedBatch

__all__ = ["Emitted", "Finish", "Generation", "Preemption", "StepFunction", "TemporalFusion"]

Preemption = Literal["recompute", "swap"]
Finish = Literal["length", "stop_token", "stop_string", "cancelled"]


@runtime_checkable
class StepFunction(Protocol):
    """A model, as far as the loop knows it."""

    def __call__(self, batch: RaggedBatch, tokens: Int64[Tensor, " t"], rows: Sequence[int]) -> Float[Tensor, "rows v"]:
        """Append the batch's tokens to the cache in every layer, and give the logits of some rows."""


class Emitted(NamedTuple):
    """One token of one request, or the word that it was cancelled.

    Attributes:
        id: the request's.
        token: the new one; None where the request was cancelled.
        finish: why it has ended; None where it goes on.
    """

    id: Hashable
    token: int | None
    finish: Finish | None


class Generation:
    """A request that was added: what has been generated, and why it ended.

    Iterated over, it gives the tokens one after another, and runs the loop where the next one is not there yet; `texts`
    does the same with their text.

    Attributes:
        request: as it was added.
        tokens: generated so far, first those that the request came with.
        finish: why it has ended; None while it is live.
        reused: tokens whose keys were found in the cache instead of computed, over all times that it was admitted.
    """

    def __init__(self, request: Request, loop: TemporalFusion) -> None:
        self.request = request
        self.tokens: list[int] = list(request.generated)
        self.finish: Finish | None = None
        self.reused = 0
        self._known = list(request.known)
        self._keys: list[bytes] = []
        self._words = Words(tuple(request.stop_strings))
        self._loop = loop

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            yield from self.tokens[given:]
            given = len(self.tokens)
            if self.finish is not None:
                return
            while given == len(self.tokens) and self.finish is None:
                self._loop.step()

    @property
    def text(self) -> str:
        """What the tokens say, as far as it is decided.

        While the request is live, an end that is no whole character, or that a stop string may begin with, is missing.
        Neither the stop string or stop token that ends it nor what follows is ever part of it.

        Raises:
            ValueError: the loop has no `text`.
        """
        decode = self._loop.text
        if decode is None:
            raise ValueError("`text` must be given to the loop for the text of a request, got a loop without it")
        words = self._said(decode)
        return (words if self.finish is None else words.end()).told

    def texts(self) -> Iterator[str]:
        """The text piece by piece, as it is decided.

        Raises:
            ValueError: the loop has no `text`.
        """
        given = 0
        while True:
            ended = self.finish is not None
            if new := self.text[given:]:
                yield new
                given += len(new)
            elif ended:
                return
            else:
                self._loop.step()

    def known(self, start: int, stop: int) -> list[int]:
        """Tokens of the prompt and of what was generated."""
        return self._known[start:stop]

    def keys(self, page_size: int) -> Sequence[bytes]:
        """By what the full pages of what is known are found."""
        rest = self._known[len(self._keys) * page_size :]
        self._keys += page_keys(rest, page_size, self._keys[-1] if self._keys else b"")
        return self._keys

    def _said(self, decode: Callable[[Sequence[int]], str]) -> Words:
        """The text of the tokens so far, but for a stop token."""
        for token in self.tokens[self._words.count : len(self.tokens) - (self.finish == "stop_token")]:
            self._words = self._words.add(token, decode)
        return self._words

    def go_on(self, token: int, decode: Callable[[Sequence[int]], str] | None) -> _Next:
        """What becomes of the request with this token; nothing changes yet."""
        request, words = self.request, self._words
        if token in request.stop_tokens:
            return _Next(token, "stop_token", words)
        is_last = len(self.tokens) + 1 == request.max_new_tokens
        if decode is not None and request.stop_strings:
            words = self._said(decode).add(token, decode)
            words = words.end() if is_last else words
            if words.stopped:
                return _Next(token, "stop_string", words)
        return _Next(token, "length" if is_last else None, words)

    def accept(self, following: _Next) -> None:
        """Take the next token."""
        self.tokens.append(following.token)
        self._known.append(following.token)
        self.finish, self._words = following.finish, following.words


class _Next(NamedTuple):
    """The next token of a request, whether it is the last, and the text with it."""

    token: int
    finish: Finish | None
    words: Words


class _Orders(NamedTuple):
    """What happens before and in an iteration; rank 0's where it leads."""

    joining: list[Request]
    leaving: list[Hashable]
    plan: Step
    closed: bool


class TemporalFusion:
    """The loop over a cache and a model.

    Args:
        model: computes a step; see `StepFunction`. It appends to `kv`.
        kv: whose pages requests are given; nobody else frees or adds any meanwhile.
        vocab_size: ids that the model knows.
        policy: what a step is made of.
        budget: bounds of a step.
        preemption: what becomes of the keys of a request that gives way: computed again, or kept in host memory.
        compaction: how pages are brought together after requests have left; see `kv.compaction.plan`.
        share_prefixes: whether requests begin on pages that the cache has of an equal beginning of others, and of those
            who gave way. What a token's keys are must then depend on the tokens before it alone.
        text: what tokens say, for `stop_strings` and `Generation.text`; the same on every rank.
        lead: ranks of which only rank 0 is told of requests, and composes the steps for all; None where all ranks are
            called alike, or there is one.

    Attributes:
        kv: the cache.
        steps: iterations that ran the model.
        latest: the last step.
        reused: tokens that were found in the cache instead of computed.

    Raises:
        ValueError: another kind of preemption or compaction.
    """

    def __init__(
        self,
        model: StepFunction,
        kv: PagedKV,
        *,
        vocab_size: int,
        policy: Policy,
        budget: Budget,
        preemption: Preemption = "recompute",
        compaction: Strategy = "none",
        share_prefixes: bool = False,
        text: Callable[[Sequence[int]], str] | None = None,
        lead: ProcessGroup | None = None,
    ) -> None:
        if preemption not in get_args(Preemption):
            raise ValueError(f'`preemption` must be "recompute" or "swap", got {preemption!r}')
        if compaction not in get_args(Strategy):
            raise ValueError(f"`compaction` must be one of {', '.join(get_args(Strategy))}, got {compaction!r}")
        self.kv, self.policy, self.budget = kv, policy, budget
        self.steps = self.reused = 0
        self.latest: Step | None = None
        self.preemption, self.compaction, self.text = preemption, compaction, text
        self._model, self._vocab_size, self._lead, self._shares = model, vocab_size, lead, share_prefixes
        self._saved: dict[Hashable, SavedKV] = {}
        self._live: dict[Hashable, Generation] = {}
        self._progress: dict[Hashable, Progress] = {}
        self._running: dict[Hashable, Progress] = {}
        self._waiting: deque[Progress] = deque()
        self._joining: list[Request] = []
        self._leaving: list[Hashable] = []
        self._left: list[Emitted] = []  # not said yet
        self._closed = False

    def add(self, request: Request) -> Generation:
        """Let a request join at the next iteration.

        Raises:
            ValueError: it can never run here, or its id is taken; then nothing has changed for the others. Or this is
                not the rank that leads.
        """
        self._check_leads("add")
        self._check(request)
        self._join(request)
        self._joining.append(request)
        return self._live[request.id]

    def cancel(self, request: Hashable) -> None:
        """Let a request leave at the next iteration; its tokens stay with its `Generation`.

        Raises:
            ValueError: it is not live, or has been cancelled before.
        """
        self._check_leads("cancel")
        if request not in self._live or request in self._leaving:
            raise ValueError(f"`request` must be the id of a live request, got {request!r}")
        self._leaving.append(request)

    @property
    def live(self) -> tuple[Hashable, ...]:
        """Requests that have been added and have not ended."""
        return tuple(self._live)

    @property
    def running(self) -> tuple[Progress, ...]:
        """How far the requests are that hold pages, oldest first."""
        return tuple(self._running.values())

    @property
    def waiting(self) -> tuple[Progress, ...]:
        """The queue."""
        return tuple(self._waiting)

    def step(self) -> tuple[Emitted, ...]:
        """Run one iteration: let requests leave and join, compute, give what was generated.

        Comm:  the model's, on every rank; a broadcast where one leads.

        Raises:
            CommError: another rank died, raised or did not come; what is computed and generated is as before the step.
        """
        try:
            return self._iterate()
        except CommError as error:
            raise CommError(f"step {self.steps + 1} of the loop: {error}") from error

    def _iterate(self) -> tuple[Emitted, ...]:
        orders = self._orders()
        before = set(self._running)
        self._leave(orders.leaving)
        emitted: list[Emitted] = []
        if orders.plan.ids:
            self._rearrange(orders.plan)
            emitted = self._advance(orders.plan)
        if not before <= self._running.keys():
            self.kv.compact(self.compaction)
        emitted, self._left = self._left + emitted, []
        return tuple(emitted)

    def run(self) -> Iterator[Emitted]:
        """Iterate until no request is live; more may be added meanwhile."""
        while self._live:
            yield from self.step()

    def follow(self) -> None:
        """Iterate as rank 0 says, until it closes the loop: what the other ranks do where one leads.

        Raises:
            ValueError: no rank leads, or this one does.
        """
        if self._lead is None or self._lead.rank() == 0:
            raise ValueError("`follow` must be called where another rank leads, got a rank that decides for itself")
        while not self._closed:
            self.step()

    def close(self) -> None:
        """Let the ranks that follow return; what is live is cancelled."""
        if not self._closed:
            self._leaving = list(self._live)
            self._closed = True
            self.step()

    def __enter__(self) -> TemporalFusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._lead is None or self._lead.rank() == 0):
            self.close()

    def _check_leads(self, what: str) -> None:
        if self._lead is not None and self._lead.rank():
            raise ValueError(f"`{what}` must be called on the rank that leads (0), got {self._lead.rank()}")
        if self._closed:
            raise ValueError(f"`{what}` must be called before the loop is closed, got a closed one")

    def _check(self, request: Request) -> None:
        """Refuse a request that would fail later, when others run beside it."""
        kv, name = self.kv, repr(request.id)
        if request.id in self._live or request.id in kv:
            raise ValueError(f"`id` must be of no other live request, got {name} again")
        if max(request.known) >= self._vocab_size:
            raise ValueError(
                f"`prompt` must hold ids below {self._vocab_size}, got {max(request.known)} for request {name}"
            )
        pages = -(-request.most_cached // kv.page_size)
        most = kv.num_pages if kv.pages_per_request is None else min(kv.num_pages, kv.pages_per_request)
        if pages > most:
            raise ValueError(
                f"`prompt` and `max_new_tokens` must fit into the cache ({most * kv.page_size} tokens for a request), "
                f"got {len(request.prompt)} and {request.max_new_tokens} for request {name}; grow the cache"
            )
        if request.stop_strings and self.text is None:
            raise ValueError(f"`stop_strings` must be empty for a loop without `text`, got some for request {name}")
        if self._lead is not None and not _travels(request.id):
            raise ValueError(f"`id` must be equal to its copy on another rank where one leads, got {name}")

    def _orders(self) -> _Orders:
        """What this iteration does, decided here or by the rank that leads."""
        if self._lead is not None and self._lead.rank():
            orders: _Orders = share(None, group=self._lead)
            self._closed = orders.closed
            for request in orders.joining:
                self._join(request)
            return orders
        orders = _Orders(self._joining, self._leaving, self._compose(self._leaving), self._closed)
        if self._lead is not None:
            share(orders, group=self._lead)
        self._joining, self._leaving = [], []
        return orders

    def _compose(self, leaving: list[Hashable]) -> Step:
        """The next step, once some have left; nothing changes but what is known of the queue."""
        gone = set(leaving)
        stay = [each for each in self._running.values() if each.id not in gone]
        queue = [each for each in self._waiting if each.id not in gone] if gone else self._waiting
        dropped = [request for request in leaving if request in self._running]
        room = Room(self.kv.page_size, self.kv.free_pages + sum(self.kv.given_back(dropped)))
        if self._shares:
            self._look_up(islice(queue, max(0, self.budget.max_requests - len(stay))), dropped)
        plan = compose(stay, queue, self.budget, self.policy, room)
        if plan.preempted and self._shares:  # who gives how many pages back is counted only where it matters
            self._count_shared(stay, dropped)
            plan = compose(stay, queue, self.budget, self.policy, room)
        return plan

    def _look_up(self, queue: Iterator[Progress], dropped: list[Hashable]) -> None:
        """See how much of those that may join is in the cache, and how much of that with others that stay."""
        leaving = Counter(page for request in dropped for page in self.kv.pages(request))
        for each in queue:
            if each.id not in self._saved:
                pages = self._found(each)
                each.scheduled = each.computed = len(pages) * self.kv.page_size
                each.shared = sum([self.kv.holders(page) > leaving[page] for page in pages])

    def _found(self, each: Progress) -> tuple[int, ...]:
        """The full pages that are there of a request, but for its last token, whose logits are wanted."""
        size = self.kv.page_size
        return self.kv.find(self._live[each.id].keys(size)[: (each.tokens - 1) // size])

    def _count_shared(self, running: list[Progress], dropped: list[Hashable]) -> None:
        """See how many pages each request has that an older one has too: who gives way is the newest."""
        newest = running[::-1]
        given = self.kv.given_back([*dropped, *[each.id for each in newest]])[len(dropped) :]
        for each, pages in zip(newest, given, strict=True):
            each.shared = len(self.kv.pages(each.id)) - pages

    def _join(self, request: Request) -> None:
        self._live[request.id] = Generation(request, self)
        self._progress[request.id] = progress = Progress(request.id, len(request.known), request.most_cached)
        self._waiting.append(progress)

    def _leave(self, requests: list[Hashable]) -> None:
        """Drop the cancelled ones."""
        for request in requests:
            if request in self._running:
                self.kv.free(request)
                del self._running[request]
            else:
                self._waiting.remove(self._progress[request])
                self._saved.pop(request, None)
            self._live[request].finish = "cancelled"
            self._forget(request)
            self._left.append(Emitted(request, None, "cancelled"))

    def _forget(self, request: Hashable) -> None:
        del self._live[request], self._progress[request]

    def _rearrange(self, plan: Step) -> None:
        """Take pages from those that a step preempts, and let others join."""
        for request in plan.preempted:
            progress = self._running.pop(request)
            if self.preemption == "swap":
                self._saved[request] = SavedKV.of(self.kv, request)
            else:
                progress.scheduled = progress.computed = 0
            progress.shared = 0
            self.kv.free(request)
            self._waiting.appendleft(progress)
        admitted = [self._waiting.popleft() for _ in plan.admitted]
        assert tuple(each.id for each in admitted) == plan.admitted
        for each in admitted:  # before others are restored, which may take the pages that these were to find
            if each.id not in self._saved:
                self._place(each)
            self._running[each.id] = each
        for each in admitted:
            if each.id in self._saved:
                self._saved.pop(each.id).restore(self.kv, each.id)

    def _place(self, each: Progress) -> None:
        """Give a request its place in the cache, with what is there of it."""
        if not self._shares:
            self.kv.reserve({each.id: 0})
            return
        generation = self._live[each.id]
        found = len(self._found(each)) * self.kv.page_size
        each.scheduled = each.computed = self.kv.reuse(each.id, generation.known(0, found + 1))
        generation.reused += each.computed
        self.reused += each.computed

    def _advance(self, plan: Step) -> list[Emitted]:
        """Compute a step and deal out its tokens; where that fails, everything is as it was before."""
        batch = plan.build(self.kv)
        parts = [(self._progress[request], self._live[request]) for request in plan.ids]
        tokens: list[int] = []
        rows: list[int] = []
        ready: list[Generation] = []
        for (progress, generation), new, end in zip(parts, plan.q_lens, accumulate(plan.q_lens), strict=True):
            before = progress.scheduled
            progress.scheduled = before + new
            tokens += generation.known(before, before + new)
            if progress.scheduled == progress.tokens:
                rows.append(end - 1)
                ready.append(generation)
        try:
            logits = self._model(batch, torch.tensor(tokens, device=self.kv.device), rows)
            chosen = self._draw(logits, ready)
        except BaseException:
            for progress, _ in parts:
                progress.scheduled = progress.computed
                self.kv.truncate(progress.id, progress.computed)
            raise
        self.latest, self.steps = plan, self.steps + 1
        for progress, _ in parts:
            before, progress.computed, progress.served = progress.computed, progress.scheduled, self.steps
            self._offer(progress, before)
        return self._deal(ready, chosen)

    def _offer(self, progress: Progress, before: int) -> None:
        """Let others find the pages of a request that are full now, and were not with `before` tokens computed."""
        size = self.kv.page_size
        if self._shares and progress.computed // size > before // size:
            self.kv.share(progress.id, self._live[progress.id].known(0, progress.computed))

    def _draw(self, logits: Float[Tensor, "rows v"], ready: list[Generation]) -> list[_Next]:
        """A token for each request that is ready for one, and whether it is the last."""
        if not ready:
            return []
        tokens = sample(logits, [each.request.sampling for each in ready], [len(each.tokens) for each in ready])
        return [each.go_on(token, self.text) for each, token in zip(ready, tokens, strict=True)]

    def _deal(self, ready: list[Generation], chosen: list[_Next]) -> list[Emitted]:
        """Give each request its token, and free those that it ends."""
        emitted = []
        for generation, following in zip(ready, chosen, strict=True):
            request = generation.request.id
            generation.accept(following)
            self._progress[request].tokens += 1
            emitted.append(Emitted(request, following.token, following.finish))
            if following.finish is not None:
                self.kv.free(request)
                del self._running[request]
                self._forget(request)
        return emitted


def _travels(name: Hashable) -> bool:
    """Whether what another rank unpickles is the same name."""
    try:
        copy = pickle.loads(pickle.dumps(name))
        return bool(copy == name) and hash(copy) == hash(name)
    except Exception:  # whatever a class of somebody else's raises
        return False
