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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from seqpar.comm.intervals import Interval, Program
from seqpar.comm.picture import draw
from seqpar.comm.report import TraceReport, report_of

__all__ = ["Trace", "Transfer", "current_trace", "trace"]


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
    number: int = -1
    landed: bool = False

    def complete(self, now: float) -> None:
        """The backend was done at `now`, or before if that is known; a simulated link only ever adds to it.

        What comes after the wait is the backend's thread being late.
        """
        if not self.landed and (self.end_s is None or (self.simulated and now > self.end_s)):
            self.end_s = now


class _Segment:
    """A program between its resumption and its next yield, less its waits."""

    __slots__ = ("after", "pieces", "program", "since")

    def __init__(self, program: Program, now: float, after: int) -> None:
        self.program, self.since, self.after = program, now, after
        self.pieces: list[tuple[float, float, int]] = []

    def pause(self, now: float) -> None:
        if now > self.since:
            self.pieces.append((self.since, now, self.after))

    def go_on(self, now: float, after: int) -> None:
        self.since, self.after = now, after


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
        self._landed: dict[Program, int] = {}  # the last launch of each program that was waited for

    @property
    def intervals(self) -> list[Interval]:
        """Everything that has ended, by rank and start."""
        found = self._intervals + [
            Interval(
                "comm",
                t.op,
                t.label,
                t.program,
                self.rank,
                t.start_s,
                t.end_s,
                t.launched_s,
                t.num_bytes,
                t.simulated,
                t.number,
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
        self._stack.append(_Segment(program, now, self._landed.get(program, -1)))

    def end(self, op: str, label: str = "", number: int = -1) -> None:
        """The program of the last `begin` stops at `op` of `label`; the one that it interrupted goes on."""
        now = self.clock()
        segment = self._stack.pop()
        segment.pause(now)
        program = segment.program
        if op == "end" and self._stack and self._stack[-1].program == program:
            op = "return"
        for piece, (start, stop, after) in enumerate(segment.pieces, 1):
            what = op if piece == len(segment.pieces) else "part"
            self._intervals.append(
                Interval("compute", what, label, program, self.rank, start, stop, start, number=number, after=after)
            )
        self._go_on(now)

    def add(self, transfer: Transfer) -> None:
        """A collective is under way."""
        transfer.number = len(self._transfers)
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
            t = transfer
            if t.end_s is None:
                t.complete(now)
            t.landed = True
            self._intervals.append(
                Interval("wait", t.op, t.label, t.program, self.rank, start, now, t.launched_s, number=t.number)
            )
            self._landed[t.program] = t.number
            self._go_on(now)

    def _go_on(self, now: float) -> None:
        if self._stack:
            segment = self._stack[-1]
            segment.go_on(now, self._landed.get(segment.program, -1))

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
        return report_of(self.intervals)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace events that chrome://tracing and ui.perfetto.dev open: a process for each rank."""
        with open(path, "w") as file:
            json.dump({"traceEvents": list(_events(self.intervals)), "displayTimeUnit": "ms"}, file)

    def plot(self, path: str | PathLike[str], *, title: str = "") -> None:
        """Draw two lanes for each rank, compute above communication, a colour for each program; needs matplotlib.

        Waits are hatched, collectives named where there is room, layers told apart by faint lines.

        Args:
            path: of the picture; its suffix says the format.
            title: goes before what the picture says of itself, which is whether links are simulated.
        """
        draw(self.intervals, path, title)


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
