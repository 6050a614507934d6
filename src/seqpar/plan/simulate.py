"""A fleet of replicas that serves a trace in virtual time: what users would see on ranks that are not at hand.

The policies are the real ones: `compose` is called with how far requests are, as the loop calls it, and what it says is
carried out. Only the model is missing, in whose place a function says how long a step takes. So what is simulated is
what would run: admission, preemption, chunks of prompts, pages, layouts by the number of tokens, micro-batches in the
stages of a pipeline, slow ranks, and ranks that fail and take their replica's cache with them.

Time goes from event to event: an arrival, the end of a step, a fault. Replicas meet only where a request is sent to
the one with the fewest tokens ahead of it, so an event costs what one replica's requests cost. Most steps of a server
are like the step before: all that run decode, and nobody comes or ends. Such steps are not composed again but repeated,
up to the next end, arrival or fault; where somebody waits, once a second step has come out like the first, since a
policy may take turns. Of up to 64 of them the cost is asked of the first and the last, with a straight line between.
`repeat=False` composes and asks every one, for the same result in four times the time (20,000 requests on 128 replicas,
November 2026). Under a pipeline nothing is repeated, since micro-batches of different requests take turns.

A pipeline's stage begins a micro-batch when it is done with the one before and has what the stage before it sends; at
most as many are on their way as there are stages. So all times of a micro-batch are known when it sets out.

Sources: profiles in the place of devices as in Vidur (arXiv:2405.05465) and SARATHI's simulation of pipelines
(arXiv:2308.16369).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, count, pairwise
from math import inf
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from seqpar.partition import Layout, Shift
from seqpar.plan.costs import Curve
from seqpar.plan.model import StepWork
from seqpar.plan.simulation import Served, Simulation, Spent
from seqpar.plan.traffic import Arrival

__all__ = ["Composed", "Composer", "Failure", "Fleet", "Live", "Place", "StepCost", "Straggler", "simulate"]

_ONE = Layout(1, 1)
_RUN = 64  # like steps in a row that are costed by their first and last
_POINTS = 1000  # of the cache over time that are kept


StepCost: TypeAlias = Callable[[Layout, StepWork], float]
"""Seconds of a step of the whole model on one replica, from its layout and what it has to do."""


@runtime_checkable
class Live(Protocol):
    """How far a request has come, as the policies know it (`batching.Progress`)."""

    id: Any
    tokens: int
    limit: int
    scheduled: int
    computed: int
    served: int


@runtime_checkable
class Composed(Protocol):
    """Who runs in a step, and who joins and leaves before it (`batching.Step`)."""

    @property
    def ids(self) -> tuple[Any, ...]: ...
    @property
    def q_lens(self) -> tuple[int, ...]: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def preempted(self) -> tuple[Any, ...]: ...
    @property
    def admitted(self) -> tuple[Any, ...]: ...


@runtime_checkable
class Composer(Protocol):
    """What decides about steps (`batching.Composer`)."""

    def begin(self, id: int, tokens: int, limit: int) -> Live:
        """A request of which nothing is computed."""

    def __call__(self, running: Sequence[Any], waiting: Sequence[Any], page_size: int, free_pages: int) -> Composed:
        """The next step; empty only where nothing can run."""


class Place(NamedTuple):
    """Where a rank works."""

    replica: int
    stage: int


@dataclass(frozen=True)
class Fleet:
    """The ranks, and what each replica of the model holds.

    Ranks are numbered by replicas, in them by stages, in them as `tp` x `sp` meshes are.

    Args:
        num_pages: of the cache of each replica, over all ranks: pages of whole tokens.
        layout: of each stage; a `Shift` says which one by the tokens of a step.
        replicas: of the whole model, that share the requests.
        stages: of each replica's pipeline, the share of a step's time that each takes; they need not be equal.
        page_size: tokens in a page.
        hop: seconds that a micro-batch takes from one stage to the next, by its tokens; None for nothing.

    Raises:
        ValueError: no pages, replicas or stages, sizes below 1, shares that are not positive or do not add up to 1.
    """

    num_pages: int
    layout: Layout | Shift = _ONE
    replicas: int = 1
    stages: tuple[float, ...] = (1.0,)
    page_size: int = 16
    hop: Curve | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if min(self.num_pages, self.replicas, self.page_size) < 1:
            raise ValueError(
                "`num_pages`, `replicas` and `page_size` must be at least 1, got "
                f"{self.num_pages}, {self.replicas} and {self.page_size}"
            )
        if not self.stages or not all(share > 0 for share in self.stages) or abs(sum(self.stages) - 1) > 1e-6:
            raise ValueError(f"`stages` must be positive shares that add up to 1, got {self.stages}")

    @property
    def rule(self) -> Shift:
        """Which layout a step runs under."""
        return self.layout if isinstance(self.layout, Shift) else Shift(((1, self.layout),))

    @property
    def ranks(self) -> int:
        """Of all replicas."""
        return self.replicas * len(self.stages) * self.rule.layouts[0].size

    def place(self, rank: int) -> Place:
        """Where a rank works.

        Raises:
            ValueError: it is none of the fleet's.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"`rank` must be in [0, {self.ranks}), got {rank}")
        stage = rank // self.rule.layouts[0].size
        return Place(*divmod(stage, len(self.stages)))


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow for a while; whoever it computes with waits for it.

    Args:
        rank: of the fleet.
        factor: what it takes longer by; 1 for nothing.
        from_s: when that begins.
        until_s: when it is over.

    Raises:
        ValueError: a factor below 1, or times that are not in order.
    """

    rank: int
    factor: float
    from_s: float = 0.0
    until_s: float = inf

    def __post_init__(self) -> None:
        if not (1 <= self.factor < inf and 0 <= self.from_s < self.until_s):
            raise ValueError(
                "`factor` must be at least 1 and 0 <= `from_s` < `until_s`, got "
                f"{self.factor}, {self.from_s} and {self.until_s}"
            )


@dataclass(frozen=True)
class Failure:
    """A rank that dies: its replica loses the step on its way and its cache, and its requests go to others.

    Tokens that were generated are known to whoever asked, so they are not generated again, but their keys are computed
    again where the request goes on.

    Args:
        rank: of the fleet.
        at_s: when it dies.
        back_s: how long its replica is away, to find a rank and load the weights; never back by default.

    Raises:
        ValueError: a negative time.
    """

    rank: int
    at_s: float
    back_s: float = inf

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < inf or not self.back_s >= 0:
            raise ValueError(f"`at_s` must be finite and both times >= 0, got {self.at_s} and {self.back_s}")


def simulate(
    trace: Iterable[Arrival],
    step_s: StepCost,
    compose: Composer,
    fleet: Fleet,
    *,
    faults: Iterable[Straggler | Failure] = (),
    repeat: bool = True,
) -> Simulation:
    """Serve a trace in virtual time.

    Args:
        trace: requests; see `read_trace` and `make_trace`.
        step_s: seconds of a step of the whole model on one replica, from its layout and what it has to do.
        compose: what decides about steps, the same for every replica, and without a memory of its own.
        fleet: the ranks, and their caches.
        faults: slow ranks, and ranks that fail.
        repeat: take steps like the one before, of all that run, without asking the policy again; see the module.

    Returns:
        What was found. A request that fits into no cache is refused, as a loop would, and the others are served.

    Raises:
        ValueError: no requests, a rank that is none of the fleet's, a step of negative or no finite time, or a policy
            that finds nothing to do although requests are there.
    """
    arrivals = tuple(trace)
    if not arrivals:
        raise ValueError("`trace` must hold at least one request, got none")
    run = _Run(arrivals, step_s, compose, fleet, repeat)
    for fault in faults:
        run.plan(fault)
    run.run()
    return run.found()


_FAULT, _ARRIVAL, _END, _KICK = range(4)  # of events at the same time, in this order


@dataclass(slots=True, eq=False)
class _Flight:
    """A step on its way, or a run of like steps of all that run.

    Attributes:
        start_s: when the first one set out.
        ends: when each of them ends; of a pipeline, in its last stage.
        busy_s: of all stages.
        layout: that it runs under.
        parts: who takes part with how many tokens, decodes first; None for a run.
    """

    start_s: float
    ends: list[float]
    busy_s: float
    layout: Layout
    parts: list[tuple[Any, int]] | None = None


@dataclass(slots=True, eq=False)
class _Replica:
    """What one replica does; `load` is tokens, of prompts and to be generated, of all requests that it has."""

    number: int
    free_s: list[float]  # when each stage is done with what it has
    free_pages: int
    slow: list[list[float]]  # factors in force, of each stage
    running: list[Any] = field(default_factory=list)
    waiting: deque[Any] = field(default_factory=deque)
    flights: deque[_Flight] = field(default_factory=deque)
    load: int = 0
    steps: int = 0
    failures: int = 0  # that it is not back from
    kicked: bool = False
    like: bool = False  # the step before was of all that run, and nobody has come or gone since
    since_s: float = 0.0  # when the oldest of the steps on their way set out

    def factor(self, stage: int) -> float:
        return max(self.slow[stage], default=1.0)


class _Run:
    """The events, and what they change."""

    def __init__(
        self, arrivals: tuple[Arrival, ...], step_s: StepCost, compose: Composer, fleet: Fleet, repeat: bool
    ) -> None:
        self.arrivals, self.step_s, self.compose, self.fleet = arrivals, step_s, compose, fleet
        self.rule, self.size, stages = fleet.rule, fleet.page_size, len(fleet.stages)
        self.repeat = repeat and stages == 1
        self.replicas = [
            _Replica(number, [0.0] * stages, fleet.num_pages, [[] for _ in fleet.stages])
            for number in range(fleet.replicas)
        ]
        self.alive = list(self.replicas)
        self.heap: list[tuple[float, int, int, _Replica, Any]] = []
        self.order = count()
        self.live: list[Any] = [None] * len(arrivals)
        self.first_s: list[float | None] = [None] * len(arrivals)
        self.last_s, self.end_s = [0.0] * len(arrivals), list(self.first_s)
        self.ended_at: list[int | None] = [None] * len(arrivals)
        self.preempted = [0] * len(arrivals)
        self.refused: list[int] = []
        self.parked: deque[Any] = deque()  # with nobody to go to
        self.gaps, self.counts = array("d"), array("q")
        self.used, self.kv = 0, [(min(each.at_s for each in arrivals), 0)]
        self.layouts: dict[Layout, list[float]] = {}
        self.composed = self.computed = self.redone = 0
        self.busy_s = self.span_s = self.lost_s = 0.0

    def plan(self, fault: Straggler | Failure) -> None:
        """Let a fault happen at its time."""
        replica, stage = self.fleet.place(fault.rank)
        if isinstance(fault, Failure):
            self._push(fault.at_s, _FAULT, self.replicas[replica], fault)
            return
        self._push(fault.from_s, _FAULT, self.replicas[replica], (stage, fault.factor, True))
        if fault.until_s < inf:
            self._push(fault.until_s, _FAULT, self.replicas[replica], (stage, fault.factor, False))

    def run(self) -> None:
        """Event by event, until nobody has anything to do."""
        order = sorted(range(len(self.arrivals)), key=lambda i: self.arrivals[i].at_s)
        heap, at = self.heap, 0
        while at < len(order) or heap:
            due = self.arrivals[order[at]].at_s if at < len(order) else inf
            if at < len(order) and (not heap or (due, _ARRIVAL) < heap[0][:2]):
                self._arrive(order[at], due)
                at += 1
                continue
            now, kind, _, replica, what = heappop(heap)
            if kind == _END:
                if replica.flights and replica.flights[0] is what and what.ends[-1] == now:
                    self._end(replica, what, now)  # else it was cut short, or lost
            elif kind == _KICK:
                replica.kicked = False
                self._launch(replica, now)
            elif what is None:
                self._return(replica, now)
            elif isinstance(what, Failure):
                self._fail(replica, now, what.back_s)
            else:
                self._slow_down(replica, now, *what)

    def found(self) -> Simulation:
        """All of it."""
        return Simulation(
            rows=tuple(map(self._row, range(len(self.arrivals)))),
            gaps_s=self.gaps,
            gap_counts=self.counts,
            refused=tuple(self.refused),
            steps=sum(replica.steps for replica in self.replicas),
            composed=self.composed,
            layouts={layout: Spent(int(n), seconds) for layout, (n, seconds) in sorted(self.layouts.items())},
            kv=_thinned(self.kv, self.fleet.replicas * self.fleet.num_pages),
            busy_s=self.busy_s,
            span_s=self.span_s,
            num_stages=self.fleet.replicas * len(self.fleet.stages),
            computed_tokens=self.computed,
            redone_tokens=self.redone,
            lost_s=self.lost_s,
        )

    def _row(self, number: int) -> Served:
        asked = self.arrivals[number]
        return Served(
            asked.at_s,
            asked.prompt_tokens,
            asked.new_tokens,
            self.ended_at[number],
            self.first_s[number],
            self.end_s[number],
            self.preempted[number],
        )

    # Requests come, and replicas are told

    def _arrive(self, number: int, now: float) -> None:
        arrival = self.arrivals[number]
        if -(-arrival.most_cached // self.size) > self.fleet.num_pages:
            self.refused.append(number)
            return
        live = self.live[number] = self.compose.begin(number, arrival.prompt_tokens, arrival.most_cached)
        self._send(live, now, first=False)

    def _send(self, live: Any, now: float, *, first: bool) -> None:
        """To the replica with the fewest tokens ahead."""
        replica = min(self.alive, key=_load, default=None)
        queue = self.parked if replica is None else replica.waiting
        (queue.appendleft if first else queue.append)(live)
        if replica is not None:
            replica.load += live.limit + 1
            self._wake(replica, now)

    def _wake(self, replica: _Replica, now: float) -> None:
        """Something has changed: a run of like steps ends with the one on its way, others set out as soon as may be."""
        self._cut(replica, now)
        replica.like = False
        if not replica.kicked and not replica.failures and len(replica.flights) < len(replica.free_s):
            replica.kicked = True
            self._push(max(now, replica.free_s[0]), _KICK, replica, None)

    def _cut(self, replica: _Replica, now: float) -> None:
        flight = replica.flights[0] if replica.flights else None
        if flight is not None and flight.parts is None and now < flight.ends[-1]:
            kept = bisect_left(flight.ends, now) + 1
            if kept < len(flight.ends):
                self._shorten(flight, kept)
                replica.free_s[0] = flight.ends[-1]
                self._push(flight.ends[-1], _END, replica, flight)

    def _shorten(self, flight: _Flight, kept: int) -> None:
        flight.busy_s = flight.ends[kept - 1] - flight.start_s if kept else 0.0
        del flight.ends[kept:]

    # Steps set out

    def _launch(self, replica: _Replica, now: float) -> None:
        """Compose a step and let it set out, unless there is none."""
        if replica.failures or len(replica.flights) == len(replica.free_s) or not (replica.running or replica.waiting):
            return
        step = self.compose(replica.running, replica.waiting, self.size, replica.free_pages)
        if not step.ids:
            if not replica.flights:
                raise ValueError(
                    f"`compose` must find a step for {len(replica.running)} running and {len(replica.waiting)} waiting "
                    "requests, got an empty one"
                )
            return
        self.composed += 1
        all_decode = step.num_decodes == len(step.ids) == len(replica.running) and not step.preempted
        if self.repeat and all_decode:
            self._repeat(replica, now, _RUN if replica.like or not replica.waiting else 1)
            return
        for request in step.preempted:
            self._preempt(replica, self.live[request])
        for _ in step.admitted:
            replica.running.append(replica.waiting.popleft())
        parts = [(self.live[request], new) for request, new in zip(step.ids, step.q_lens, strict=True)]
        work, pages = _work(parts, step.num_decodes, self.size)
        replica.free_pages -= pages
        self.used += pages
        for live, new in parts:
            live.scheduled += new
        layout = self.rule.layout_of(work.tokens)
        seconds = self._cost(layout, work)
        end_s, busy_s = self._through_stages(replica, now, seconds, work.tokens)
        self._set_out(replica, _Flight(now, [end_s], busy_s, layout, parts))
        if len(replica.free_s) > 1:
            self._wake(replica, now)

    def _through_stages(self, replica: _Replica, now: float, seconds: float, tokens: int) -> tuple[float, float]:
        """When a step leaves the last stage, and how long all stages work on it."""
        hop_s = self.fleet.hop(tokens) if self.fleet.hop is not None else 0.0
        ready_s, busy_s = now, 0.0
        for stage, share in enumerate(self.fleet.stages):
            took = seconds * share * replica.factor(stage)
            done_s = replica.free_s[stage] = max(ready_s, replica.free_s[stage]) + took
            busy_s += took
            ready_s = done_s + hop_s
        return done_s, busy_s

    def _repeat(self, replica: _Replica, now: float, most: int = _RUN) -> None:
        """Let steps of all that run set out, up to the first that ends, or as long as pages last for certain."""
        running = replica.running
        n = len(running)
        cached = sum([live.scheduled for live in running]) + n
        least = min([live.limit - live.tokens for live in running]) + 1
        steps = max(1, min(least, most, replica.free_pages // n * self.size))
        layout, factor = self.rule.layout_of(n), replica.factor(0)
        first_s = self._cost(layout, StepWork(n, cached=cached, decodes=n, rows=n)) * factor
        more_s = 0.0
        if steps > 1:
            last_s = self._cost(layout, StepWork(n, cached=cached + n * (steps - 1), decodes=n, rows=n)) * factor
            more_s = (last_s - first_s) / (steps - 1)
        ends = list(accumulate([now + first_s, *[first_s + more_s * i for i in range(1, steps)]]))
        replica.free_s[0] = ends[-1]
        self._set_out(replica, _Flight(now, ends, ends[-1] - now, layout))

    def _set_out(self, replica: _Replica, flight: _Flight) -> None:
        if not replica.flights:
            replica.since_s = flight.start_s
        replica.flights.append(flight)
        self._push(flight.ends[-1], _END, replica, flight)

    def _cost(self, layout: Layout, work: StepWork) -> float:
        seconds = self.step_s(layout, work)
        if not 0 <= seconds < inf:
            raise ValueError(f"`step_s` must give a finite time >= 0, got {seconds} for {work}")
        return seconds

    def _preempt(self, replica: _Replica, live: Any) -> None:
        """Take a request's pages, and let it wait at the head of the queue."""
        replica.running.remove(live)
        pages = self._pages(live.scheduled)
        replica.free_pages += pages
        self.used -= pages
        self._forget(live)
        replica.waiting.appendleft(live)

    def _forget(self, live: Any) -> None:
        """What was computed of a request is lost."""
        if live.computed:
            self.preempted[live.id] += 1
            self.redone += live.computed
        live.scheduled = live.computed = 0

    # Steps end

    def _end(self, replica: _Replica, flight: _Flight, now: float) -> None:
        self._land(replica, flight)
        if flight.parts is None:
            before = len(replica.running)
            self._advance(replica, flight.start_s, flight.ends)
            replica.like = len(replica.running) == before
            again = not replica.waiting and 0 < len(replica.running) <= replica.free_pages
        else:
            self._deal(replica, flight.parts, flight.start_s, now)
            replica.like = again = False
        self.kv.append((now, self.used))
        if again:
            self._repeat(replica, now)
        elif len(replica.free_s) == 1:
            self._launch(replica, now)
        else:
            self._wake(replica, now)

    def _land(self, replica: _Replica, flight: _Flight) -> None:
        """Take a flight off and count it."""
        replica.flights.remove(flight)
        replica.steps += len(flight.ends)
        spent = self.layouts.setdefault(flight.layout, [0, 0.0])
        spent[0] += len(flight.ends)
        spent[1] += flight.busy_s
        self.busy_s += flight.busy_s
        if not replica.flights and flight.ends:
            self.span_s += (flight.ends[-1] - replica.since_s) * len(replica.free_s)

    def _advance(self, replica: _Replica, start_s: float, ends: list[float]) -> None:
        """All that run have a token of each of some steps."""
        running, size, now, steps = replica.running, self.size, ends[-1], len(ends)
        first_s, last_s, before = self.first_s, self.last_s, 0
        self.computed += steps * len(running)
        for live in running:
            if last_s[live.id] == start_s:
                before += 1
            elif first_s[live.id] is None:  # the last token of a prompt counts as a decode
                first_s[live.id] = ends[0]
            else:
                self._gap(ends[0] - last_s[live.id], 1)
            last_s[live.id] = now
            live.tokens += steps
            live.scheduled += steps
            live.computed, live.served = live.scheduled, replica.steps
        if before:
            self._gap(ends[0] - start_s, before)
        for a, b in pairwise(ends):
            self._gap(b - a, len(running))
        used = sum([-(-live.scheduled // size) for live in running])
        self.used += used - (self.fleet.num_pages - replica.free_pages)
        replica.free_pages = self.fleet.num_pages - used
        self._finish(replica, [live for live in running if live.tokens > live.limit], now)

    def _deal(self, replica: _Replica, parts: list[tuple[Any, int]], start_s: float, now: float) -> None:
        """A step's tokens are computed, and those that are at their end have one more."""
        first_s, last_s, before, ended = self.first_s, self.last_s, 0, []
        for live, new in parts:
            live.computed += new
            live.served = replica.steps
            self.computed += new
            if live.computed < live.tokens:
                continue
            number = live.id
            if first_s[number] is None:
                first_s[number] = now
            elif last_s[number] == start_s:
                before += 1
            else:
                self._gap(now - last_s[number], 1)
            last_s[number] = now
            live.tokens += 1
            if live.tokens > live.limit:
                ended.append(live)
        if before:
            self._gap(now - start_s, before)
        self._finish(replica, ended, now)

    def _finish(self, replica: _Replica, ended: list[Any], now: float) -> None:
        if not ended:
            return
        self.kv.append((now, self.used))  # the most, before pages are free
        gone = set()
        for live in ended:
            gone.add(live.id)
            self.end_s[live.id], self.ended_at[live.id] = now, replica.number
            replica.load -= live.limit + 1
            pages = self._pages(live.scheduled)
            replica.free_pages += pages
            self.used -= pages
        replica.running = [live for live in replica.running if live.id not in gone]

    def _gap(self, seconds: float, times: int) -> None:
        self.gaps.append(seconds)
        self.counts.append(times)

    # Faults

    def _slow_down(self, replica: _Replica, now: float, stage: int, factor: float, begins: bool) -> None:
        """Begin or end to be slow, from the next step on."""
        if begins:
            replica.slow[stage].append(factor)
        else:
            replica.slow[stage].remove(factor)
        self._cut(replica, now)

    def _fail(self, replica: _Replica, now: float, back_s: float) -> None:
        """Lose what is on its way and the cache, and send the requests elsewhere."""
        replica.failures += 1
        if back_s < inf:
            self._push(now + back_s, _FAULT, replica, None)
        if replica.failures > 1:
            return
        for flight in tuple(replica.flights):
            done = bisect_right(flight.ends, now)
            self.lost_s += now - max([flight.start_s, *flight.ends[:done]])
            if flight.parts is None and done:
                self._shorten(flight, done)
                self._land(replica, flight)
                self._advance(replica, flight.start_s, flight.ends)
        if replica.flights:
            self.span_s += (now - replica.since_s) * len(replica.free_s)
            self.busy_s += min(sum(flight.busy_s for flight in replica.flights), now - replica.since_s)
        self.used -= self.fleet.num_pages - replica.free_pages
        self.kv.append((now, self.used))
        ran, waited = replica.running, replica.waiting
        replica.running, replica.waiting, replica.flights, replica.load = [], deque(), deque(), 0
        replica.free_pages, replica.free_s = self.fleet.num_pages, [now] * len(replica.free_s)
        self.alive.remove(replica)
        for live in ran:
            self._forget(live)
        for live in reversed(ran):  # the oldest goes first of all
            self._send(live, now, first=True)
        for live in waited:
            self._send(live, now, first=False)

    def _return(self, replica: _Replica, now: float) -> None:
        replica.failures -= 1
        if replica.failures:
            return
        self.alive.append(replica)
        self.alive.sort(key=_number)
        parked, self.parked = self.parked, deque()
        for live in parked:
            self._send(live, now, first=False)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _push(self, at_s: float, kind: int, replica: _Replica, what: Any) -> None:
        heappush(self.heap, (at_s, kind, next(self.order), replica, what))


def _load(replica: _Replica) -> int:
    return replica.load


def _number(replica: _Replica) -> int:
    return replica.number


def _work(parts: list[tuple[Any, int]], num_decodes: int, size: int) -> tuple[StepWork, int]:
    """What a step has to do, and the pages that it needs."""
    tokens = pairs = cached = keys = rows = pages = 0
    for at, (live, new) in enumerate(parts):
        before = live.scheduled
        tokens += new
        if at < num_decodes:
            cached += before + 1
            pages += before % size == 0
        else:
            pairs += new * before + new * (new + 1) // 2
            keys += before + new
            rows += before + new == live.tokens
            pages += -(-(before + new) // size) - -(-before // size)
    return StepWork(tokens, pairs, cached, keys, num_decodes, num_decodes + rows), pages


def _thinned(points: list[tuple[float, int]], most: int) -> tuple[tuple[float, float], ...]:
    """At most so many points over time, each the highest of those that it stands for, as shares."""
    every = -(-len(points) // _POINTS)
    kept = [max(points[at : at + every], key=lambda point: point[1]) for at in range(0, len(points), every)]
    return tuple((at_s, used / most) for at_s, used in kept)
