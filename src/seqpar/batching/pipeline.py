"""Temporal fusion through a pipeline: the loop of `fusion`, with as many steps in flight as the stages can be given.

Every rank of every stage runs the same loop: it composes the same steps, finds the same pages in the cache of its own
layers, and learns the same tokens, which the last stage draws and tells the others. What differs is what a rank
computes of a step, so no stage asks another what comes next.

An iteration lets one step enter, and once the queue is full waits for the oldest one's tokens. Before that this stage
computes its part of the steps in flight, in their order. Where there are more of them than stages, it leaves the newest
for the next iteration: their activations travel meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from seqpar import comm
from seqpar.batching.compose import Budget, Policy, Step
from seqpar.batching.fusion import Emitted, Generation, Preemption, StepFunction, TemporalFusion
from seqpar.batching.microbatches import MicroBatchQueue, Spread
from seqpar.batching.sampling import sample
from seqpar.comm import Handle, ProcessGroup, Stages, Steps
from seqpar.kv import PagedKV
from seqpar.ragged import RaggedBatch

__all__ = ["PipelineFusion", "StageFunction"]


@runtime_checkable
class StageFunction(StepFunction, Protocol):
    """One stage of a model, as far as the loop knows it.

    Attributes:
        stages: the ranks.
    """

    stages: Stages

    def steps(self, batch: RaggedBatch, tokens: Int64[Tensor, " t"], rows: Sequence[int]) -> Steps[Tensor | Handle]:
        """This stage's part of a step: logits of some rows from the last, else the handle of what is handed over."""


@dataclass
class _Flight:
    """One step on this stage.

    Attributes:
        ready: requests that it generates a token for.
        program: what this stage is to compute of it; None once it has.
        answer: the tokens, on their way from the last stage; None on the last stage, and where there are none.
        tokens: those drawn here.
        sent: messages on their way from here.
    """

    ready: list[Generation]
    program: Steps[None] | None = None
    answer: Handle | None = None
    tokens: list[int] = field(default_factory=list)
    sent: list[Handle] = field(default_factory=list)


class PipelineFusion(TemporalFusion):
    """The loop over one stage of a model; every rank of every stage runs it.

    Requests and steps are as under `TemporalFusion`, whose other methods these are. Of a request that is cancelled
    while something of it is in flight, that much is still computed, and a token that it gives is still emitted. A model
    that raises ends the loop, and the other ranks' by their timeout.

    Args:
        model: this rank's stage; see `StageFunction`. It appends to `kv`.
        kv: the cache of its layers, with the same pages on every stage.
        vocab_size: ids that the model knows.
        policy: what a step is made of; each gets its share of the decodes (`Spread`).
        budget: bounds of a step, and of the requests in all steps in flight.
        depth: the most steps in flight; by default as many as there are stages.
        preemption: see `TemporalFusion`. There is no `compaction`: steps in flight know where their pages lie.
        share_prefixes: see `TemporalFusion`; what is in flight is found once its tokens are back.
        text: see `TemporalFusion`.
        lead: see `TemporalFusion`: `Stages.whole`, or None.

    Raises:
        ValueError: a depth below 1.
    """

    def __init__(
        self,
        model: StageFunction,
        kv: PagedKV,
        *,
        vocab_size: int,
        policy: Policy,
        budget: Budget,
        depth: int | None = None,
        preemption: Preemption = "recompute",
        share_prefixes: bool = False,
        text: Callable[[Sequence[int]], str] | None = None,
        lead: ProcessGroup | None = None,
    ) -> None:
        self.stages = model.stages
        self.queue = MicroBatchQueue(self.stages.pp.size() if depth is None else depth)
        super().__init__(
            model,
            kv,
            vocab_size=vocab_size,
            policy=Spread(policy, self.queue.depth),
            budget=budget,
            preemption=preemption,
            share_prefixes=share_prefixes,
            text=text,
            lead=lead,
        )
        self._stage = model
        self._flights: deque[_Flight] = deque()

    def _iterate(self) -> tuple[Emitted, ...]:
        """Let a step enter; where no other may, compute, and give what the oldest one generated.

        Comm:  the stage's, messages of activations and tokens; a broadcast where a rank leads.
        """
        emitted: list[Emitted] = []
        began = False
        if self.queue.is_ready:
            held = self._hold_back()
            orders = self._orders()
            self._leaving = held
            self._leave(orders.leaving)
            if orders.plan.ids:
                self._rearrange(orders.plan)
                self._begin(orders.plan)
                began = True
        if self._flights and not (began and self.queue.is_ready):
            self._compute()
            emitted = self._end()
        emitted, self._left = self._left + emitted, []
        return tuple(emitted)

    def close(self) -> None:
        """Let the ranks that follow return, once nothing is in flight; what is live is cancelled."""
        if not self._closed:
            self._leaving = list(self._live)
            while self._flights:
                self.step()
            super().close()

    def _hold_back(self) -> list[Hashable]:
        """Of the requests that are to leave, those that something in flight still writes for: they leave later."""
        if not self._leaving:
            return []
        busy = self.queue.ids
        held = [request for request in self._leaving if request in busy]
        for request in held:
            progress = self._progress[request]
            progress.tokens = progress.scheduled  # so that no further step is composed of it
        self._leaving = [request for request in self._leaving if request not in busy]
        return held

    def _begin(self, plan: Step) -> None:
        """Find room for a step, and let this stage ask for what it needs of the stage before."""
        batch = plan.build(self.kv)
        tokens: list[int] = []
        rows: list[int] = []
        flight = _Flight([])
        for (request, new), end in zip(plan.items, accumulate(plan.q_lens), strict=True):
            progress, generation = self._progress[request], self._live[request]
            tokens += generation.known(progress.scheduled, progress.scheduled + new)
            if progress.scheduled + new == progress.tokens:
                rows.append(end - 1)
                flight.ready.append(generation)
        self.queue.push(plan, self._progress)
        self.latest, self.steps = plan, self.steps + 1
        pp, device = self.stages.pp, self.kv.device
        if rows and pp.rank() < pp.size() - 1:
            flight.answer = comm.recv_async(
                (len(rows),), torch.int64, src=pp.size() - 1, group=pp, device=device, label="tokens"
            )
        flight.program = comm.start(self._program(flight, batch, torch.tensor(tokens, device=device), rows))
        self._flights.append(flight)

    def _program(self, flight: _Flight, batch: RaggedBatch, tokens: Tensor, rows: list[int]) -> Steps[None]:
        """This stage's part of a step, to the launch of what it hands over; the last one draws and tells the others."""
        out = yield from self._stage.steps(batch, tokens, rows)
        if isinstance(out, Handle):
            flight.sent.append(out)
        elif rows:
            how = [each.request.sampling for each in flight.ready]
            flight.tokens = sample(out, how, [len(each.tokens) for each in flight.ready])
            drawn, pp = torch.tensor(flight.tokens, device=out.device), self.stages.pp
            flight.sent += [comm.send_async(drawn, dst=dst, group=pp, label="tokens") for dst in range(pp.size() - 1)]

    def _compute(self) -> None:
        """Run this stage's part of the steps in flight but for the newest, as many as there are beyond the stages."""
        newest = max(0, len(self._flights) - self.stages.pp.size())
        for flight in list(self._flights)[: len(self._flights) - newest]:
            if flight.program is not None:
                comm.run(flight.program)
                flight.program = None

    def _end(self) -> list[Emitted]:
        """Take the tokens of the oldest step, and deal them out."""
        flight = self._flights.popleft()
        tokens: list[int] = flight.tokens if flight.answer is None else flight.answer.wait().tolist()
        for handle in flight.sent:
            handle.wait()
        for request, new in self.queue.complete().items:
            progress = self._progress[request]
            self._offer(progress, progress.computed - new)
        chosen = [each.go_on(token, self.text) for each, token in zip(flight.ready, tokens, strict=True)]
        emitted = self._deal(flight.ready, chosen)
        self._leaving = [request for request in self._leaving if request in self._live]
        return emitted
