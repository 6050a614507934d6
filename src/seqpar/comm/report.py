"""What a trace amounts to: how much of the communication was hidden, and in which slots it was not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import fsum
from typing import NamedTuple

from seqpar.comm.intervals import Interval, Program, Span, total, union

__all__ = ["Exposure", "TraceReport", "TraceSlot", "report_of"]


class Exposure(NamedTuple):
    """The launches of one collective for one label: how many, how long under way, how long waited for."""

    calls: float
    comm_s: float
    exposed_s: float


class TraceSlot(NamedTuple):
    """From the start of a rank's collective to that of the next one: what was computed beside it, how long both took.

    Where turns fit, a slot takes as long as the longer of the two; one that takes their sum hides nothing. The first
    slot of a rank has the compute before its first collective.

    Attributes:
        rank: in the world.
        op: the collective; empty for the first slot.
        label: the layer whose collective it is.
        program: whose collective it is.
        compute_s: what this rank computed between this launch and the next one.
        comm_s: how long the collective was under way.
        measured_s: how long the slot took.
    """

    rank: int
    op: str
    label: str
    program: Program
    compute_s: float
    comm_s: float
    measured_s: float

    @property
    def bound_s(self) -> float:
        """The longer of the two."""
        return max(self.compute_s, self.comm_s)

    @property
    def lost_s(self) -> float:
        """What the slot took beyond that."""
        return self.measured_s - self.bound_s


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
        bound_s: the least that one compute stream and one link could take: no collective is hidden before the first
            launch, and no compute behind the last.
        slots: what ran beside each collective, of one rank after another.
    """

    span_s: float
    compute_s: float
    comm_s: float
    overlap_s: float
    exposed_s: float
    by_label: Mapping[tuple[str, str], Exposure]
    num_ranks: int
    simulated: bool
    bound_s: float = 0.0
    slots: tuple[TraceSlot, ...] = field(default=(), repr=False)

    @property
    def overlap_ratio(self) -> float:
        """The share of the communication time in which a program computed; 0 without communication."""
        return self.overlap_s / self.comm_s if self.comm_s else 0.0

    @property
    def efficiency(self) -> float:
        """The time saved against one after the other, of all that could be: min(compute, comm). Idling lowers it."""
        most = min(self.compute_s, self.comm_s)
        return (self.compute_s + self.comm_s - self.span_s) / most if most else 0.0

    @property
    def tax(self) -> float:
        """The time taken beyond `bound_s`, as a share of it."""
        return self.span_s / self.bound_s - 1 if self.bound_s else 0.0

    def worst(self, count: int = 3) -> list[TraceSlot]:
        """The slots that lost most, most first."""
        return sorted((slot for slot in self.slots if slot.lost_s > 0), key=lambda slot: -slot.lost_s)[:count]

    def __str__(self) -> str:
        names = ("span", "compute", "comm", "exposed", "bound")
        ms = {name: f"{getattr(self, f'{name}_s') * 1e3:.3f} ms" for name in names}
        calls = [
            (op, label, f"{e.calls:g}", *_ms(e.comm_s, e.exposed_s)) for (op, label), e in sorted(self.by_label.items())
        ]
        worst = [
            (f"{slot.rank}", ".".join(map(str, slot.program)), slot.op, slot.label, *_ms(*_times(slot)))
            for slot in self.worst()
        ]
        lines = [
            f"{ms['span']}: compute {ms['compute']}, communication {ms['comm']}"
            f"{' (simulated link)' if self.simulated else ''}, mean of {self.num_ranks} rank(s)",
            f"overlap ratio {self.overlap_ratio:.3f}, efficiency {self.efficiency:.3f}, exposed {ms['exposed']}",
            f"at least {ms['bound']} on one compute stream and one link; {self.tax:.1%} beyond it",
            *_table(("collective", "label", "calls", "comm ms", "exposed ms"), calls, "<<>>>"),
        ]
        if worst:
            header = ("rank", "program", "slot beside", "label", "compute ms", "comm ms", "longer ms", "took ms")
            lines += ["", *_table(header, worst, "><<<>>>>")]
        return "\n".join(lines)


def _times(slot: TraceSlot) -> tuple[float, ...]:
    return slot.compute_s, slot.comm_s, slot.bound_s, slot.measured_s


def _ms(*seconds: float) -> tuple[str, ...]:
    return tuple(f"{value * 1e3:.3f}" for value in seconds)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*line).rstrip() for line in lines]


def report_of(intervals: Sequence[Interval]) -> TraceReport:
    """The report of all ranks that these intervals are of."""
    ranks = sorted({interval.rank for interval in intervals})
    return _mean([_report([i for i in intervals if i.rank == rank]) for rank in ranks])


def _report(intervals: Sequence[Interval]) -> TraceReport:
    """The report of one rank."""
    compute, comm = (union(i.span for i in intervals if i.kind == kind) for kind in ("compute", "comm"))
    slots = _slots(intervals, compute)
    last = slots[-1]
    keys = {(i.op, i.label) for i in intervals if i.kind == "comm"}
    return TraceReport(
        span_s=max(i.end_s for i in intervals) - min(i.start_s for i in intervals),
        compute_s=total(compute),
        comm_s=total(comm),
        overlap_s=total(compute) + total(comm) - total(union([*compute, *comm])),
        exposed_s=total(i.span for i in intervals if i.kind == "wait"),
        by_label={key: _exposure([i for i in intervals if (i.op, i.label) == key]) for key in keys},
        num_ranks=1,
        simulated=any(i.simulated for i in intervals),
        bound_s=max(total(compute) - last.compute_s + last.bound_s, slots[0].compute_s + total(comm)),
        slots=tuple(slots),
    )


def _slots(intervals: Sequence[Interval], compute: Sequence[Span]) -> list[TraceSlot]:
    """The slots of one rank, whose time computing is `compute`."""
    comm = sorted((i for i in intervals if i.kind == "comm"), key=lambda i: i.launched_s)
    starts, ends = min(i.start_s for i in intervals), max(i.end_s for i in intervals)
    cuts = list(accumulate((starts, *(i.start_s for i in comm), ends), max))  # on two links the later may start first
    computed = [_before(compute, at) for at in (starts, *(i.launched_s for i in comm), ends)]
    rank = intervals[0].rank
    keys = [(rank, "", "", (), 0.0), *((rank, i.op, i.label, i.program, i.end_s - i.start_s) for i in comm)]
    return [
        TraceSlot(*key[:4], compute_s=after - before, comm_s=key[4], measured_s=stop - start)
        for key, (before, after), (start, stop) in zip(keys, pairwise(computed), pairwise(cuts), strict=True)
    ]


def _before(spans: Sequence[Span], at: float) -> float:
    """How much of the disjoint `spans`, in order, lies before `at`."""
    return fsum(min(end, at) - start for start, end in spans[: bisect_left(spans, (at,))])


def _exposure(intervals: Sequence[Interval]) -> Exposure:
    comm = [i.span for i in intervals if i.kind == "comm"]
    return Exposure(float(len(comm)), total(comm), total(i.span for i in intervals if i.kind == "wait"))


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
        bound_s=fsum(report.bound_s for report in reports) / n,
        slots=tuple(slot for report in reports for slot in report.slots),
    )
