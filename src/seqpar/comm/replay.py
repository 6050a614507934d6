"""Whether what ran was a right schedule: a trace, replayed edge by edge.

For chunk i of a prompt in layer l, with its attention block a_i and MLP m_i and the collectives A_i and B_i that they
launch (and whatever more a layout or an algorithm needs, each under the same rules):

* A_i is launched in a_i, and B_i in m_i, before any other program computes;
* m_i goes on after A_i has arrived, and a_i of the next layer after B_i;
* attention of a later chunk comes after the append of the earlier one, in each layer;
* another program computes before a collective is waited for, unless all others have ended or stand at a mark;
* every launch is waited for, once, and all ranks launch the same in the same order.

Source: the edges of ISO's schedule (arXiv:2409.11155).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from typing import NamedTuple, NoReturn

from seqpar.comm.intervals import Interval, Program
from seqpar.comm.trace import Trace

__all__ = ["check_schedule"]

Schedule = dict[int, list[Interval]]
"""One run of `interleave`: what each program computed."""


def check_schedule(trace: Trace, *, ordered: bool = True) -> None:
    """Replay a trace of interleaved programs, of one rank or gathered, and assert every edge of the schedule.

    The clock must go on while programs compute. A collective that a program waits for by itself, as in a child that is
    called as a whole, is one that nothing hides, and so it is refused.

    Args:
        trace: what ran.
        ordered: as `interleave` was told; False for programs that need none of each other's appends.

    Raises:
        AssertionError: an edge does not hold; it names the edge, the rank, the program and the layer.
    """
    intervals = trace.intervals
    origin_s = min((i.start_s for i in intervals), default=0.0)
    replays = [_Replay(rank, intervals, origin_s) for rank in sorted({i.rank for i in intervals})]
    for replay in replays:
        replay.check(ordered)
    for first, other in pairwise(replays):
        first.compare(other)


class _Visit(NamedTuple):
    """A program in a layer, from its first append to the cache to its last."""

    mark: str
    start_s: float
    end_s: float


class _Replay:
    """What one rank did."""

    def __init__(self, rank: int, intervals: Sequence[Interval], origin_s: float) -> None:
        self.rank, self._origin_s = rank, origin_s
        mine = [i for i in intervals if i.rank == rank]
        self.compute = sorted((i for i in mine if i.kind == "compute"), key=lambda i: i.start_s)
        self.launches = {i.number: i for i in mine if i.kind == "comm"}
        self.waits = {i.number: i for i in mine if i.kind == "wait"}

    def check(self, ordered: bool) -> None:
        for before, after in pairwise(self.compute):
            if after.start_s < before.end_s:
                self._fail("one compute at a time", after, f"go on after {_name(before)}", before.end_s, after.start_s)
        self._check_waits()
        self._check_results()
        self._check_launches()
        for schedule, path in _schedules(self.compute, ()):
            if ordered:
                self._check_appends(schedule, path)
            self._check_hidden(schedule, path)

    def compare(self, other: _Replay) -> None:
        """The same launches in the same order on two ranks."""
        for number in range(max(len(self.launches), len(other.launches))):
            mine, theirs = (replay.launches.get(number) for replay in (self, other))
            if mine is None or theirs is None or _key(mine) != _key(theirs):
                said = [f"{_name(x)} of program {_dots(x.program)}" if x else "nothing" for x in (mine, theirs)]
                raise AssertionError(
                    f"one order on all ranks: launch {number} must be the same on rank {self.rank} and rank "
                    f"{other.rank}, got {said[0]} and {said[1]}"
                )

    def _check_waits(self) -> None:
        for number, wait in self.waits.items():
            x = self.launches.get(number)
            if x is None or wait.start_s < x.launched_s:
                at_s = None if x is None else x.launched_s
                self._fail("wait after launch", wait, "be launched before it is waited for", at_s, wait.start_s)
        for number, x in self.launches.items():
            if number not in self.waits:
                self._fail("wait for every launch", x, "be waited for")
            if self.waits[number].end_s < x.end_s:
                self._fail("wait until the end", x, "be waited for until its end", x.end_s, self.waits[number].end_s)

    def _check_launches(self) -> None:
        """A_i after a_i, and before others compute."""
        by_program = defaultdict(list)
        first: dict[int, Interval] = {}
        for c in self.compute:
            by_program[c.program].append(c)
            if c.op == "launch":
                first.setdefault(c.number, c)
        for number, x in self.launches.items():
            own = by_program[x.program]
            around = bisect_right(own, x.launched_s, key=lambda c: c.start_s) - 1
            inside = around >= 0 and x.launched_s <= own[around].end_s
            late = number in first and first[number].start_s > x.launched_s
            if x.program and (not inside or late or x.start_s < x.launched_s):  # `()` may be no program at all
                self._fail("launch after compute", x, "be launched in the compute that leads to it", None, x.launched_s)
        for number, c in first.items():
            if number >= 0 and number not in self.launches:
                self._fail("launch after compute", c, "launch a collective that the trace has")

    def _check_results(self) -> None:
        """m_i after A_i, and a_i of the next layer after B_i."""
        for c in self.compute:
            if c.after < 0:
                continue
            x, wait = self.launches.get(c.after), self.waits.get(c.after)
            if x is None or wait is None or c.start_s < wait.end_s:
                what = f"launch {c.after}" if x is None else _name(x)
                at_s = None if wait is None else wait.end_s
                self._fail("compute after its collective", c, f"go on after {what} has arrived", at_s, c.start_s)

    def _check_appends(self, schedule: Schedule, path: Program) -> None:
        """Attention of a later program after the append of the earlier one."""
        for before, after in pairwise(sorted(schedule)):
            earlier: dict[tuple[str, int], _Visit] = dict(_numbered(_visits(schedule[before], (*path, before))))
            ended = [c.end_s for c in schedule[before] if c.program == (*path, before) and c.op == "end"]
            for key, visit in _numbered(_visits(schedule[after], (*path, after))):
                if key not in earlier and any(end_s <= visit.start_s for end_s in ended):
                    continue
                if key not in earlier or visit.start_s < earlier[key].end_s:
                    at_s = earlier[key].end_s if key in earlier else None
                    programs = f"program {_dots((*path, after))} on rank {self.rank}"
                    raise AssertionError(
                        f"attention after append: {programs} must attend at {visit.mark} after program "
                        f"{_dots((*path, before))} has appended there{self._at(at_s)}, got compute from "
                        f"{self._ms(visit.start_s)}"
                    )

    def _check_hidden(self, schedule: Schedule, path: Program) -> None:
        """Others compute between a launch and its wait."""
        depth = len(path)
        first_s, last_s = (f(c.start_s for part in schedule.values() for c in part) for f in (min, max))
        for number, x in self.launches.items():
            if x.program[:depth] != path or len(x.program) == depth or not first_s <= x.launched_s <= last_s:
                continue
            for index, computes in schedule.items():
                after = bisect_right(computes, x.launched_s, key=lambda c: c.start_s)
                past = next((c for c in reversed(computes[:after]) if c.op != "finish"), None)
                if index == x.program[depth] or (past and _rests(past, (*path, index))):
                    continue
                if after == len(computes) or computes[after].start_s > self.waits[number].start_s:
                    self._fail(
                        "launch before the others' compute",
                        x,
                        f"be in flight while program {_dots((*path, index))} computes",
                        None if after == len(computes) else computes[after].start_s,
                        self.waits[number].start_s,
                    )

    def _fail(
        self, edge: str, interval: Interval, must: str, at_s: float | None = None, got_s: float | None = None
    ) -> NoReturn:
        got = "" if got_s is None else f", got {self._ms(got_s)}"
        raise AssertionError(
            f"{edge}: {_name(interval)} of program {_dots(interval.program)} on rank {self.rank} must {must}"
            f"{self._at(at_s)}{got}"
        )

    def _at(self, at_s: float | None) -> str:
        return "" if at_s is None else f" (at {self._ms(at_s)})"

    def _ms(self, at_s: float) -> str:
        return f"{(at_s - self._origin_s) * 1e3:.3f} ms"


def _rests(last: Interval, program: Program) -> bool:
    """Whether a program has ended, or stands at a mark, after this last compute of it."""
    return last.op in ("mark", "open") or (last.op == "end" and last.program == program)


def _schedules(compute: Sequence[Interval], path: Program) -> Iterator[tuple[Schedule, Program]]:
    """All runs of `interleave` directly below `path`, and those within them."""
    for schedule in _runs(compute, path):
        yield schedule, path
        for index, computes in schedule.items():
            yield from _schedules(computes, (*path, index))


def _runs(compute: Sequence[Interval], path: Program) -> list[Schedule]:
    """What lies below `path`, run by run: a program that has ended comes again only in a new one."""
    found: list[Schedule] = [defaultdict(list)]
    ended: set[int] = set()
    for c in compute:
        if len(c.program) == len(path):
            continue
        index = c.program[len(path)]
        if index in ended:
            found.append(defaultdict(list))
            ended.clear()
        found[-1][index].append(c)
        if c.op == "end" and len(c.program) == len(path) + 1:
            ended.add(index)
    return [schedule for schedule in found if schedule]


def _visits(compute: Sequence[Interval], path: Program) -> list[_Visit]:
    """Where a program goes to the cache; one that is a schedule does so in the visits of its programs."""
    found: list[_Visit] = []
    busy = []
    for schedule in _runs(compute, path):
        busy.append((min(c[0].start_s for c in schedule.values()), max(c[-1].end_s for c in schedule.values())))
        parts = [_visits(computes, (*path, index)) for index, computes in schedule.items()]
        for same in zip(*(part for part in parts if part), strict=False):
            found.append(_Visit(same[0].mark, min(v.start_s for v in same), max(v.end_s for v in same)))
    own = [c for c in compute if c.program == path and c.op != "finish"]
    own = [c for c in own if not any(start <= c.start_s < end for start, end in busy)]  # marks of its programs pass it
    opened_s = None
    for place, c in enumerate(own):
        append = own[place + 1 :]
        if c.op in ("mark", "open") and append:
            opened_s = append[0].start_s
        if c.op in ("mark", "close") and append and opened_s is not None:
            end = next((a for a in append if a.op != "part"), append[-1])
            found.append(_Visit(c.label, opened_s, end.end_s))
    return sorted(found, key=lambda visit: visit.start_s)


def _numbered(visits: Sequence[_Visit]) -> Iterator[tuple[tuple[str, int], _Visit]]:
    """Visits by their mark, and how often the program has been there."""
    seen: dict[str, count[int]] = defaultdict(count)
    for visit in visits:
        yield (visit.mark, next(seen[visit.mark])), visit


def _key(x: Interval) -> tuple[str, str, Program]:
    return x.op, x.label, x.program


def _name(i: Interval) -> str:
    """An interval for people."""
    if i.kind == "compute":
        return f"compute up to {i.op} {f'`{i.label}`' if i.label else ''}".rstrip()
    return f"`{i.op}`{f' of `{i.label}`' if i.label else ''} (launch {i.number})"


def _dots(program: Program) -> str:
    return ".".join(map(str, program)) or "()"
