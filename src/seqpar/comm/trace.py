"""When this rank computed, what was in flight meanwhile, and when it was blocked.

The drivers of programs (`run`, `interleave`) and the handles tell the trace in force; without one they read a context
variable and no more. Time is the host's: on a CPU that is when the work was done, on CUDA when it was issued.

* compute: from the resumption of a program to its next yield or end, less what it spent inside in a wait; and what
  turns received buffers into the result. A program is named by its index in its schedule, behind those of the schedules
  around it; one that `run` drives alone is `()`.
* comm: from launch to completion, which the backend's future reports; where there is none, to the end of the wait. On a
  simulated link, while the link carries it.
* wait: while the host is blocked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import fsum
from os import PathLike
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["Exposure", "Interval", "Trace", "TraceReport", "current_trace", "trace"]

Program = tuple[int, ...]
Span = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """Something that took time on one rank.

    Attributes:
        kind: computing, a collective under way, or blocked in a wait.
        op: the collective; for compute what the program did at the end: "launch", "mark", "end" or "finish".
        label: the layer whose collective it is, or, for compute, was launched (or made into a result) at the end.
        program: indices of the program in its schedules, outermost first.
        rank: in the world.
        start_s: of the trace's clock.
        end_s: of the trace's clock.
        launched_s: when the collective was launched: on a simulated link that is busy, before the start.
        num_bytes: sent by this rank in this launch.
        simulated: the end is that of a `SimulatedLink`.
    """

    kind: Literal["compute", "comm", "wait"]
    op: str
    label: str
    program: Program
    rank: int
    start_s: float
    end_s: float
    launched_s: float
    num_bytes: int = 0
    simulated: bool = False

    @property
    def span(self) -> Span:
        return self.start_s, self.end_s


@dataclass
class Transfer:
    """One launch, as far as it is known."""

    op: str
    label: str
    program: Program
    launched_s: float
    start_s: float
    end_s: float | None
    num_bytes: int
    simulated: bool

    def complete(self, now: float) -> None:
        """The backend was done at `now`, or before if that is known; a simulated link only ever adds to it."""
        if self.end_s is None or (self.simulated and now > self.end_s):
            self.end_s = now


class _Segment:
    """A program between its resumption and its next yield, less its waits."""

    __slots__ = ("pieces", "program", "since")

    def __init__(self, program: Program, now: float) -> None:
        self.program, self.since = program, now
        self.pieces: list[Span] = []

    def pause(self, now: float) -> None:
        if now > self.since:
            self.pieces.append((self.since, now))


class Trace:
    """What one `trace()` context saw; `gather` joins those of several ranks.

    Args:
        rank: this rank.
        clock: the time in seconds; ranks of one machine share the default one.
    """

    def __init__(self, rank: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rank = rank
        self.clock = clock
        self._intervals: list[Interval] = []
        self._transfers: list[Transfer] = []
        self._stack: list[_Segment] = []

    @property
    def intervals(self) -> list[Interval]:
        """Everything that has ended, by rank and start."""
        found = self._intervals + [
            Interval(
                "comm", t.op, t.label, t.program, self.rank, t.start_s, t.end_s, t.launched_s, t.num_bytes, t.simulated
            )
            for t in self._transfers
            if t.end_s is not None
        ]
        return sorted(found, key=lambda interval: (interval.rank, interval.start_s))

    @property
    def program(self) -> Program:
        """The program that computes now."""
        return self._stack[-1].program if self._stack else ()

    def begin(self, program: Program) -> None:
        """`program` computes from now on; what computed so far is interrupted."""
        now = self.clock()
        if self._stack:
            self._stack[-1].pause(now)
        self._stack.append(_Segment(program, now))

    def end(self, op: str, label: str = "") -> None:
        """The program of the last `begin` stops at `op` of `label`; the one that it interrupted goes on."""
        now = self.clock()
        segment = self._stack.pop()
        segment.pause(now)
        for start, stop in segment.pieces:
            self._intervals.append(Interval("compute", op, label, segment.program, self.rank, start, stop, start))
        if self._stack:
            self._stack[-1].since = now

    def add(self, transfer: Transfer) -> None:
        """A collective is under way."""
        self._transfers.append(transfer)

    @contextmanager
    def waiting(self, transfer: Transfer) -> Iterator[None]:
        """Blocked until `transfer` is done; what computed so far is interrupted."""
        start = self.clock()
        if self._stack:
            self._stack[-1].pause(start)
        try:
            yield
        finally:
            now = self.clock()
            if transfer.end_s is None:
                transfer.complete(now)
            t = transfer
            self._intervals.append(Interval("wait", t.op, t.label, t.program, self.rank, start, now, t.launched_s))
            if self._stack:
                self._stack[-1].since = now

    def gather(self, *, group: ProcessGroup) -> Trace:
        """The traces of all ranks of `group` in one, on each of them; the ranks share a machine, and so a clock.

        Comm:  the intervals, pickled.
        """
        parts: list[list[Interval]] = [[] for _ in range(group.size())]
        dist.all_gather_object(parts, self.intervals, group=group)
        whole = Trace(self.rank, self.clock)
        whole._intervals = [interval for part in parts for interval in part]
        return whole

    def report(self) -> TraceReport:
        """How much of the communication was hidden: means over the ranks of this trace."""
        ranks = sorted({interval.rank for interval in self.intervals})
        return _mean([_report([i for i in self.intervals if i.rank == rank]) for rank in ranks])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace events that chrome://tracing and ui.perfetto.dev open: a process for each rank."""
        with open(path, "w") as file:
            json.dump({"traceEvents": list(_events(self.intervals)), "displayTimeUnit": "ms"}, file)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the lanes of each rank, compute above communication, a colour for each program; needs matplotlib."""
        from matplotlib.figure import Figure

        intervals = self.intervals
        origin = min((i.start_s for i in intervals), default=0.0)
        programs = sorted({i.program for i in intervals})
        lanes = [(rank, kind) for rank in sorted({i.rank for i in intervals}) for kind in ("compute", "comm")]
        figure = Figure(figsize=(12, 1 + 0.5 * len(lanes)), layout="constrained")
        axes = figure.add_subplot()
        for number, program in enumerate(programs):
            for lane, key in enumerate(lanes):
                mine = [i for i in intervals if (i.rank, i.kind) == key and i.program == program]
                spans = [((i.start_s - origin) * 1e3, (i.end_s - i.start_s) * 1e3) for i in mine]
                axes.broken_barh(
                    spans, (lane - 0.4, 0.8), facecolor=f"C{number % 10}", edgecolor="white", linewidth=0.3
                )
            name = ".".join(map(str, program)) or "one"
            axes.broken_barh([], (0, 0), facecolor=f"C{number % 10}", label=f"program {name}")
        axes.set_yticks(range(len(lanes)), [f"rank {rank} {kind}" for rank, kind in lanes])
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_title("simulated link" if any(i.simulated for i in intervals) else "measured")
        if programs:
            figure.legend(loc="outside right upper")
        figure.savefig(path, dpi=120)


_TRACE: ContextVar[Trace | None] = ContextVar("seqpar_trace", default=None)


@contextmanager
def trace(*, clock: Callable[[], float] = time.perf_counter) -> Iterator[Trace]:
    """Trace what this thread computes and launches in the context; the innermost trace sees it.

    Args:
        clock: the time in seconds; that of the simulated links in force.
    """
    found = Trace(dist.get_rank() if dist.is_initialized() else 0, clock)
    token = _TRACE.set(found)
    try:
        yield found
    finally:
        _TRACE.reset(token)


def current_trace() -> Trace | None:
    """The trace in force."""
    return _TRACE.get()


class Exposure(NamedTuple):
    """The launches of one collective for one label: how many, how long under way, how long waited for."""

    calls: float
    comm_s: float
    exposed_s: float


@dataclass(frozen=True)
class TraceReport:
    """How much of the communication was hidden, in the mean over ranks.

    Attributes:
        span_s: from the first interval's start to the last one's end.
        compute_s: time with a program computing.
        comm_s: time with a collective under way.
        overlap_s: time with both.
        exposed_s: time blocked in waits.
        by_label: the same for each (collective, label), where times of several launches under way at once add up.
        num_ranks: how many ranks the means are over.
        simulated: some collective was on a `SimulatedLink`.
    """

    span_s: float
    compute_s: float
    comm_s: float
    overlap_s: float
    exposed_s: float
    by_label: Mapping[tuple[str, str], Exposure]
    num_ranks: int
    simulated: bool

    @property
    def overlap_ratio(self) -> float:
        """The share of the communication time in which a program computed; 0 without communication."""
        return self.overlap_s / self.comm_s if self.comm_s else 0.0

    @property
    def efficiency(self) -> float:
        """The time saved against one after the other, of all that could be: min(compute, comm). Idling lowers it."""
        most = min(self.compute_s, self.comm_s)
        return (self.compute_s + self.comm_s - self.span_s) / most if most else 0.0

    def __str__(self) -> str:
        ms = {name: f"{getattr(self, f'{name}_s') * 1e3:.3f} ms" for name in ("span", "compute", "comm", "exposed")}
        lines = [("collective", "label", "calls", "comm ms", "exposed ms")]
        for (op, label), e in sorted(self.by_label.items()):
            lines.append((op, label, f"{e.calls:g}", f"{e.comm_s * 1e3:.3f}", f"{e.exposed_s * 1e3:.3f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        form = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True))
        return "\n".join(
            [
                f"{ms['span']}: compute {ms['compute']}, communication {ms['comm']}"
                f"{' (simulated link)' if self.simulated else ''}, mean of {self.num_ranks} rank(s)",
                f"overlap ratio {self.overlap_ratio:.3f}, efficiency {self.efficiency:.3f}, exposed {ms['exposed']}",
                *(form.format(*line).rstrip() for line in lines),
            ]
        )


def _report(intervals: Sequence[Interval]) -> TraceReport:
    """The report of one rank."""
    compute, comm = (_union(i.span for i in intervals if i.kind == kind) for kind in ("compute", "comm"))
    keys = {(i.op, i.label) for i in intervals if i.kind == "comm"}
    return TraceReport(
        span_s=max(i.end_s for i in intervals) - min(i.start_s for i in intervals),
        compute_s=_total(compute),
        comm_s=_total(comm),
        overlap_s=_total(compute) + _total(comm) - _total(_union([*compute, *comm])),
        exposed_s=_total(i.span for i in intervals if i.kind == "wait"),
        by_label={key: _exposure([i for i in intervals if (i.op, i.label) == key]) for key in keys},
        num_ranks=1,
        simulated=any(i.simulated for i in intervals),
    )


def _exposure(intervals: Sequence[Interval]) -> Exposure:
    comm = [i.span for i in intervals if i.kind == "comm"]
    return Exposure(float(len(comm)), _total(comm), _total(i.span for i in intervals if i.kind == "wait"))


def _mean(reports: Sequence[TraceReport]) -> TraceReport:
    n, nothing = max(1, len(reports)), Exposure(0.0, 0.0, 0.0)
    keys = {key for report in reports for key in report.by_label}

    def exposure(key: tuple[str, str]) -> Exposure:
        columns = zip(*(report.by_label.get(key, nothing) for report in reports), strict=True)
        return Exposure(*(fsum(column) / n for column in columns))

    return TraceReport(
        span_s=fsum(report.span_s for report in reports) / n,
        compute_s=fsum(report.compute_s for report in reports) / n,
        comm_s=fsum(report.comm_s for report in reports) / n,
        overlap_s=fsum(report.overlap_s for report in reports) / n,
        exposed_s=fsum(report.exposed_s for report in reports) / n,
        by_label={key: exposure(key) for key in keys},
        num_ranks=len(reports),
        simulated=any(report.simulated for report in reports),
    )


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same times in disjoint spans."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _total(spans: Iterable[Span]) -> float:
    return fsum(end - start for start, end in spans)


def _events(intervals: Sequence[Interval]) -> Iterator[dict[str, Any]]:
    """Trace events in microseconds from the first start; what overlaps gets lanes of its own, as the format asks."""
    origin = min((i.start_s for i in intervals), default=0.0)
    simulated = {i.rank for i in intervals if i.simulated}
    free: dict[tuple[int, str], list[float]] = {}  # for each rank and kind: when its lanes are free
    for i in intervals:
        lanes = free.setdefault((i.rank, i.kind), [])
        lane = next((number for number, end in enumerate(lanes) if end <= i.start_s), len(lanes))
        lanes[lane : lane + 1] = [i.end_s]
        yield {
            "name": i.label or i.op,
            "cat": i.kind,
            "ph": "X",
            "pid": i.rank,
            "tid": _thread(i.kind, lane),
            "ts": (i.start_s - origin) * 1e6,
            "dur": (i.end_s - i.start_s) * 1e6,
            "args": {
                "op": i.op,
                "label": i.label,
                "program": list(i.program),
                "launched_us": (i.launched_s - origin) * 1e6,
                "bytes": i.num_bytes,
                "simulated": i.simulated,
            },
        }
    for (rank, kind), lanes in free.items():
        process = f"rank {rank} (simulated link)" if rank in simulated else f"rank {rank}"
        yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": process}}
        for lane in range(len(lanes)):
            name = f"{kind} {lane + 1}" if lane else kind
            yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": _thread(kind, lane), "args": {"name": name}}


def _thread(kind: str, lane: int) -> int:
    return {"compute": 0, "wait": 1, "comm": 2}[kind] + 3 * lane
