"""Temporal fusion: one loop whose every iteration runs all live requests in one forward, wherever each of them is.

Requests join at the next iteration, any number at a time, and leave when they are finished or cancelled, while the
others go on. The loop knows no model: it is given a function from a batch and its token ids to the logits of some rows,
and calls it once an iteration, whatever the mix of prompts and decodes.

What runs in an iteration is `compose`'s, a pure function, and what is drawn depends on a request's own seed, so ranks
that are told the same do the same without a word. Where only rank 0 hears of requests, it tells the others between the
iterations (`lead`). Flover's barriers between ranks, and its handshake for every request, are not needed.

A request's pages are freed when it leaves, and nothing else need move, for page tables say what lies where. With
`compaction` what is left is brought together: with one page for each request that is Flover's reordering of buffers.

Source: Flover (arXiv:2305.13484).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.batching.compose import Budget, Policy, Room, Step, compose
from seqpar.batching.requests import Progress, Request
from seqpar.batching.sampling import sample
from seqpar.batching.sharing import share
from seqpar.comm import CommError, ProcessGroup
from seqpar.kv import PagedKV, SavedKV
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

    Iterated over, it gives the tokens one after another, and runs the loop where the next one is not there yet.

    Attributes:
        request: as it was added.
        tokens: generated so far, first those that the request came with.
        finish: why it has ended; None while it is live.
    """

    def __init__(self, request: Request, loop: TemporalFusion) -> None:
        self.request = request
        self.tokens: list[int] = list(request.generated)
        self.finish: Finish | None = None
        self._known = list(request.known)
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

    def known(self, start: int, stop: int) -> list[int]:
        """Tokens of the prompt and of what was generated."""
        return self._known[start:stop]

    def finish_with(self, token: int, text: Callable[[Sequence[int]], str] | None) -> Finish | None:
        """Why the request ends with this token; None if it goes on."""
        request = self.request
        if token in request.stop_tokens:
            return "stop_token"
        if text is not None and request.stop_strings and self._has_stop(token, text):
            return "stop_string"
        return "length" if len(self.tokens) + 1 == request.max_new_tokens else None

    def accept(self, token: int, finish: Finish | None) -> None:
        """Take the next token."""
        self.tokens.append(token)
        self._known.append(token)
        self.finish = finish

    def _has_stop(self, token: int, text: Callable[[Sequence[int]], str]) -> bool:
        """Whether there is a stop string near the end of the text: earlier ones have been looked for before."""
        longest = max(len(stop.encode()) for stop in self.request.stop_strings)
        end = text([*self.tokens[-longest - _MARGIN :], token])  # a token is at least a byte
        return any(stop in end for stop in self.request.stop_strings)


_MARGIN = 4  # tokens before a stop string, which some tokenizers need to see to write its first one as they would


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
        text: what tokens say, for `stop_strings`; the same on every rank.
        lead: ranks of which only rank 0 is told of requests, and composes the steps for all; None where all ranks are
            called alike, or there is one.

    Attributes:
        kv: the cache.
        steps: iterations that ran the model.
        latest: the last step.
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
        text: Callable[[Sequence[int]], str] | None = None,
        lead: ProcessGroup | None = None,
    ) -> None:
        if preemption not in get_args(Preemption):
            raise ValueError(f'`preemption` must be "recompute" or "swap", got {preemption!r}')
        if compaction not in get_args(Strategy):
            raise ValueError(f"`compaction` must be one of {', '.join(get_args(Strategy))}, got {compaction!r}")
        self.kv, self.policy, self.budget = kv, policy, budget
        self.steps = 0
        self.latest: Step | None = None
        self.preemption, self.compaction = preemption, compaction
        self._model, self._vocab_size, self._text, self._lead = model, vocab_size, text, lead
        self._saved: dict[Hashable, SavedKV] = {}
        self._live: dict[Hashable, Generation] = {}
        self._progress: dict[Hashable, Progress] = {}
        self._running: dict[Hashable, Progress] = {}
        self._waiting: deque[Progress] = deque()
        self._joining: list[Request] = []
        self._leaving: list[Hashable] = []
        self._closed = False

    def add(self, request: Request) -> Generation:
        """Let a request join at the next iteration.

        Raises:
            ValueError: it can never run here, or its id is taken; then nothing has changed for the others. Or this is
                not the rank that leads.
        """
        self._check_leads("add")
        self._check(request)
        self._live[request.id] = generation = Generation(request, self)
        self._joining.append(request)
        return generation

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
        emitted = self._leave(orders.leaving)
        if orders.plan.ids:
            self._rearrange(orders.plan)
            emitted += self._advance(orders.plan)
        if not before <= self._running.keys():
            self.kv.compact(self.compaction)
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
        if request.stop_strings and self._text is None:
            raise ValueError(f"`stop_strings` must be empty for a loop without `text`, got some for request {name}")

    def _orders(self) -> _Orders:
        """What this iteration does, decided here or by the rank that leads."""
        if self._lead is not None and self._lead.rank():
            orders: _Orders = share(None, group=self._lead)
            self._join(orders.joining)
            self._closed = orders.closed
            return orders
        joining, leaving = self._joining, self._leaving
        self._joining, self._leaving = [], []
        self._join(joining)
        stay = [each for each in self._running.values() if each.id not in leaving]
        queue = [each for each in self._waiting if each.id not in leaving] if leaving else self._waiting
        freed = sum(len(self.kv.pages(each)) for each in leaving if each in self._running)
        room = Room(self.kv.page_size, self.kv.free_pages + freed)
        orders = _Orders(joining, leaving, compose(stay, queue, self.budget, self.policy, room), self._closed)
        if self._lead is not None:
            share(orders, group=self._lead)
        return orders

    def _join(self, requests: list[Request]) -> None:
        for request in requests:
            self._live.setdefault(request.id, Generation(request, self))
            progress = Progress(request.id, len(request.known), request.most_cached)
            self._progress[request.id] = progress
            self._waiting.append(progress)

    def _leave(self, requests: list[Hashable]) -> list[Emitted]:
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
        return [Emitted(request, None, "cancelled") for request in requests]

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
            self.kv.free(request)
            self._waiting.appendleft(progress)
        for request in plan.admitted:
            progress = self._waiting.popleft()
            assert progress.id == request
            if request in self._saved:
                self._saved.pop(request).restore(self.kv, request)
            self._running[request] = progress

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
            progress.computed, progress.served = progress.scheduled, self.steps
        return self._deal(ready, chosen)

    def _draw(self, logits: Float[Tensor, "rows v"], ready: list[Generation]) -> list[tuple[int, Finish | None]]:
        """A token for each request that is ready for one, and whether it is the last."""
        if not ready:
            return []
        tokens = sample(logits, [each.request.sampling for each in ready], [len(each.tokens) for each in ready])
        return [(token, each.finish_with(token, self._text)) for each, token in zip(ready, tokens, strict=True)]

    def _deal(self, ready: list[Generation], chosen: list[tuple[int, Finish | None]]) -> list[Emitted]:
        """Give each request its token, and free those that it ends."""
        emitted = []
        for generation, (token, finish) in zip(ready, chosen, strict=True):
            request = generation.request.id
            generation.accept(token, finish)
            self._progress[request].tokens += 1
            emitted.append(Emitted(request, token, finish))
            if finish is not None:
                self.kv.free(request)
                del self._running[request]
                self._forget(request)
        return emitted
