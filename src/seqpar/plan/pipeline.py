"""Where the stages of a pipeline stand still: from the times of their micro-batches, or out of a trace.

Both give the same report, so what a pipeline does can be put beside what its times alone would make of it. What is left
between the two is the host's work between the micro-batches and the way of the messages.

With c the times, micro-batch m starts on stage s at

    start(m, s) = max(end(m-1, s), end(m, s-1) + send);  end = start + c(m, s)
    start(m, 0) >= end(m-depth, last) + back

A stage that waits for another's longer micro-batch has a bubble. SARATHI names its causes: prompts of different lengths
next to each other, prompts next to decodes, decodes of different contexts. Micro-batches that take alike have none but
where the pipeline fills and drains.

Source: SARATHI (arXiv:2308.16369), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, inf
from typing import NamedTuple

from seqpar.comm import Interval
from seqpar.comm.intervals import total, union

__all__ = ["PipelineTimes", "StageTimes", "measured_pipeline", "pipeline"]


class StageTimes(NamedTuple):
    """One stage, from the first stage's start to the last one's end.

    Attributes:
        busy_s: how long it computed.
        bubble_s: how long it did not.
        blocked_s: of that, how long it was held up by what it waited for; in a simulation all of it.
    """

    busy_s: float
    bubble_s: float
    blocked_s: float

    @property
    def bubble(self) -> float:
        """The share of the time in which it did not compute."""
        span_s = self.busy_s + self.bubble_s
        return self.bubble_s / span_s if span_s else 0.0


@dataclass(frozen=True)
class PipelineTimes:
    """A run of a pipeline.

    Attributes:
        span_s: from the first stage's start to the last one's end.
        stages: in order.
        gaps_s: for each micro-batch, how long stages that had computed before stood still until it came, over all
            stages. Nothing where it was measured.
        ends_s: when the last stage was done with each micro-batch. Nothing where it was measured.
    """

    span_s: float
    stages: tuple[StageTimes, ...]
    gaps_s: tuple[float, ...] = ()
    ends_s: tuple[float, ...] = ()

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they did not compute."""
        spans_s = self.span_s * len(self.stages)
        return fsum(stage.bubble_s for stage in self.stages) / spans_s if spans_s else 0.0

    def __str__(self) -> str:
        lines = [f"{self.span_s * 1e3:.3f} ms, bubbles {self.bubble:.1%}"]
        lines.append(f"{'stage':>5} {'busy ms':>10} {'bubble ms':>10} {'blocked ms':>10} {'bubble':>7}")
        for number, stage in enumerate(self.stages):
            ms = " ".join(f"{1e3 * seconds:10.3f}" for seconds in stage)
            lines.append(f"{number:5} {ms} {stage.bubble:7.1%}")
        return "\n".join(lines)


def pipeline(
    times: Sequence[Sequence[float]],
    depth: int,
    *,
    sends: Sequence[float] | None = None,
    back_s: float = 0.0,
) -> PipelineTimes:
    """What micro-batches of these times take in a pipeline, one after another on each stage.

    Args:
        times: seconds of each micro-batch on each stage, in the order in which they enter.
        depth: the most in flight; one enters when that many before it has left.
        sends: seconds of the way of each micro-batch's activations from a stage to the next; nothing by default. They
            keep no stage busy.
        back_s: seconds of the way of tokens from the last stage to the first.

    Raises:
        ValueError: a depth below 1; times that are negative, or not of the same stages for all; other sends than
            micro-batches.
    """
    if depth < 1:
        raise ValueError(f"`depth` must be at least 1, got {depth}")
    ways = [0.0] * len(times) if sends is None else list(sends)
    num_stages = len(times[0]) if times else 0
    if len(ways) != len(times) or any(len(row) != num_stages for row in times):
        raise ValueError(
            f"`times` and `sends` must have an entry for each micro-batch, of {num_stages} stages, got "
            f"{len(times)} and {len(ways)}, of {sorted({len(row) for row in times})} stages"
        )
    if not all(0 <= seconds < inf for seconds in (back_s, *ways, *[cell for row in times for cell in row])):
        raise ValueError("`times`, `sends` and `back_s` must be finite and >= 0, got others")
    free = [0.0] * num_stages  # when each stage is done with the micro-batch before
    ends: list[float] = []
    gaps: list[float] = []
    for number, (row, way) in enumerate(zip(times, ways, strict=True)):
        there = ends[number - depth] + back_s if number >= depth else 0.0
        gap = 0.0
        for stage, seconds in enumerate(row):
            start = max(free[stage], there)
            if number:
                gap += start - free[stage]
            free[stage] = start + seconds
            there = free[stage] + way
        ends.append(free[-1] if free else 0.0)
        gaps.append(gap)
    span = max(ends, default=0.0)
    busy = [fsum(column) for column in zip(*times, strict=True)]
    stages = tuple(StageTimes(seconds, span - seconds, span - seconds) for seconds in busy)
    return PipelineTimes(span, stages, tuple(gaps), tuple(ends))


def measured_pipeline(intervals: Sequence[Interval], num_stages: int) -> PipelineTimes:
    """What the stages did, by a trace of all their ranks (`comm.Trace.gather`); means over the ranks of a stage.

    A rank computes where a program of its does, so what the host does between programs is a bubble, and so are waits
    for collectives within a stage.

    Args:
        intervals: of all ranks, which are consecutive in a stage.
        num_stages: how many stages they are.

    Raises:
        ValueError: ranks that are not as many for each stage.
    """
    ranks = sorted({interval.rank for interval in intervals})
    if num_stages < 1 or len(ranks) % num_stages or not ranks:
        raise ValueError(f"`intervals` must be of as many ranks for each of {num_stages} stages, got ranks {ranks}")
    spans = {rank: union(i.span for i in intervals if i.rank == rank and i.kind == "compute") for rank in ranks}
    first = min((found[0][0] for found in spans.values() if found), default=0.0)
    last = max((found[-1][1] for found in spans.values() if found), default=0.0)
    blocked = {
        rank: total(
            union(
                (max(i.start_s, first), min(i.end_s, last))
                for i in intervals
                if i.rank == rank and i.kind == "wait" and i.start_s < last and i.end_s > first
            )
        )
        for rank in ranks
    }
    size = len(ranks) // num_stages
    stages = []
    for number in range(num_stages):
        mine = ranks[number * size : (number + 1) * size]
        busy_s = fsum(total(spans[rank]) for rank in mine) / size
        stages.append(StageTimes(busy_s, last - first - busy_s, fsum(blocked[rank] for rank in mine) / size))
    return PipelineTimes(last - first, tuple(stages))
