"""What a trace is made of: something that took time on one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum
from typing import Literal

__all__ = ["Interval", "Program", "Span", "total", "union"]

Program = tuple[int, ...]
Span = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """Something that took time on one rank.

    Attributes:
        kind: computing, a collective under way, or blocked in a wait.
        op: the collective; for compute what the program did at the end: "launch", "mark" (`Mark.kind`), "end", "finish"
            of a result, "return" from a program that it ran by itself; "part" before a wait or a run of its own.
        label: the layer whose collective it is, or, for compute, was launched (or made into a result) at the end.
        program: indices of the program in its schedules, outermost first.
        rank: in the world.
        start_s: of the trace's clock.
        end_s: of the trace's clock.
        launched_s: when the collective was launched: on a simulated link that is busy, before the start.
        num_bytes: sent by this rank in this launch.
        simulated: the end is that of a `SimulatedLink`.
        number: which launch of the rank this is, or waits for; for compute, that at which it stopped or that it made
            into a result. -1 for none.
        after: for compute, the launch of its program that had last been waited for when it began. -1 for none.
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
    number: int = -1
    after: int = -1

    @property
    def span(self) -> Span:
        return self.start_s, self.end_s


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times in disjoint spans."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def total(spans: Iterable[Span]) -> float:
    return fsum(end - start for start, end in spans)
