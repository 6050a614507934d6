"""What a simulation found: a row for each request, percentiles, the cache over time, bubbles, what faults cost."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from seqpar.partition import Layout
from seqpar.plan.shift import name_of

__all__ = ["Metric", "Served", "Simulation", "Spent", "percentile"]

Metric = Literal["ttft", "tbt", "tpot"]
_METRICS: tuple[Metric, ...] = ("ttft", "tbt", "tpot")
_SHARES = (0.5, 0.9, 0.99, 1.0)
_NUMBERS = (
    "finished",
    "unfinished",
    "duration_s",
    "tokens_per_s",
    "throughput",
    "steps",
    "composed",
    "preempted",
    "computed_tokens",
    "redone_tokens",
    "lost_s",
    "bubble",
    "utilisation",
    "kv_most",
    "kv_mean",
)


class Served(NamedTuple):
    """What became of a request.

    Attributes:
        at_s: when it came.
        prompt_tokens: of its prompt.
        new_tokens: that it asked for.
        replica: where it ended; None where it never ran to its end.
        first_s: when its first token was there; None for never.
        end_s: when its last one was; None for never.
        preempted: how often it gave its pages back, or lost them with a rank.
    """

    at_s: float
    prompt_tokens: int
    new_tokens: int
    replica: int | None = None
    first_s: float | None = None
    end_s: float | None = None
    preempted: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Time of a token after the first one, on average; None where there is none."""
        if self.end_s is None or self.first_s is None or self.new_tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.new_tokens - 1)


class Spent(NamedTuple):
    """Steps under one layout, and their seconds of one replica."""

    steps: int
    seconds: float


def percentile(values: Sequence[float], share: float, weights: Sequence[int] | None = None) -> float:
    """The smallest value that at least that share of all do not exceed; 0 where there are none.

    >>> percentile((3.0, 1.0, 2.0), 0.5), percentile((1.0, 9.0), 0.5, weights=(1, 3))
    (2.0, 9.0)

    Args:
        values: in any order.
        share: in [0, 1].
        weights: how often each value counts; once by default.

    Raises:
        ValueError: a share outside of [0, 1], or weights that are negative or not one for each value.
    """
    return _percentiles(values, (share,), weights)[0]


def _percentiles(values: Sequence[float], shares: Sequence[float], weights: Sequence[int] | None) -> list[float]:
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"`share` must be in [0, 1], got {', '.join(map(str, shares))}")
    if weights is not None and (len(weights) != len(values) or min(weights, default=0) < 0):
        raise ValueError(
            f"`weights` must be >= 0, one for each of the {len(values)} values, got {len(weights)}, the least "
            f"{min(weights, default=0)}"
        )
    if not values:
        return [0.0] * len(shares)
    if weights is None:
        ordered: list[float] = sorted(values)
        counts: Sequence[int] = range(1, len(ordered) + 1)
    else:
        order = sorted(range(len(values)), key=values.__getitem__)
        ordered, counts = [values[i] for i in order], list(accumulate(weights[i] for i in order))
    return [ordered[bisect_left(counts, share * counts[-1] * (1 - 1e-12))] for share in shares]


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found.

    Attributes:
        rows: of the requests, in the order of the trace.
        gaps_s: times between two tokens of one request.
        gap_counts: how many pairs of tokens each of them was between.
        refused: numbers of the requests that no cache of a replica could ever hold.
        steps: that were run.
        composed: of them, those that the policy was asked for; the others were like the step before.
        layouts: steps and seconds under each.
        kv: at some times, the share of all pages that was in use then.
        busy_s: of all stages of all replicas.
        span_s: of all stages, the time in which their replica had a step on its way.
        num_stages: of all replicas.
        computed_tokens: rows of all steps.
        redone_tokens: of them, those that had been computed before and were lost or given back.
        lost_s: spent on steps that a failed rank took with it.
    """

    rows: tuple[Served, ...]
    gaps_s: Sequence[float] = field(repr=False)
    gap_counts: Sequence[int] = field(repr=False)
    refused: tuple[int, ...]
    steps: int
    composed: int
    layouts: Mapping[Layout, Spent] = field(hash=False)
    kv: Sequence[tuple[float, float]] = field(repr=False)
    busy_s: float
    span_s: float
    num_stages: int
    computed_tokens: int
    redone_tokens: int
    lost_s: float

    def __post_init__(self) -> None:
        if len(self.gaps_s) != len(self.gap_counts) or min(self.gap_counts, default=0) < 0:
            raise ValueError(
                f"`gap_counts` must be >= 0, one for each of `gaps_s`, got {len(self.gap_counts)} for "
                f"{len(self.gaps_s)}"
            )

    @property
    def finished(self) -> int:
        """Requests that were served to their end."""
        return sum(row.end_s is not None for row in self.rows)

    @property
    def unfinished(self) -> int:
        """Requests that were taken, and that nobody was left to serve."""
        return len(self.rows) - self.finished - len(self.refused)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        ends = [row.end_s for row in self.rows if row.end_s is not None]
        return max(ends) - min(row.at_s for row in self.rows) if ends else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated for requests that ended, in a second."""
        return self._rate(sum(row.new_tokens for row in self.rows if row.end_s is not None))

    @property
    def throughput(self) -> float:
        """Tokens of prompts and generated, of requests that ended, in a second."""
        return self._rate(sum(row.prompt_tokens + row.new_tokens for row in self.rows if row.end_s is not None))

    @property
    def bubble(self) -> float:
        """Share of the stages' time that they stood still in, while their replica had a step on its way."""
        return max(0.0, 1 - self.busy_s / self.span_s) if self.span_s else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the whole time that stages were busy."""
        return self.busy_s / (self.num_stages * self.duration_s) if self.duration_s else 0.0

    @property
    def kv_most(self) -> float:
        """The most pages in use at a time, as a share of all."""
        return max((share for _, share in self.kv), default=0.0)

    @property
    def kv_mean(self) -> float:
        """Pages in use on average over time, as a share of all."""
        if len(self.kv) < 2 or self.kv[-1][0] == self.kv[0][0]:
            return 0.0
        area = sum(share * (after - at) for (at, share), (after, _) in zip(self.kv, self.kv[1:], strict=False))
        return area / (self.kv[-1][0] - self.kv[0][0])

    @property
    def preempted(self) -> int:
        """How often requests gave their pages back or lost them."""
        return sum(row.preempted for row in self.rows)

    def percentiles(self, metric: Metric, shares: Sequence[float] = _SHARES) -> tuple[float, ...]:
        """Seconds that such shares of the requests (of the pairs of tokens for "tbt") do not exceed; 0 for none.

        Raises:
            ValueError: an unknown metric, or a share outside of [0, 1].
        """
        if metric not in _METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(_METRICS)}, got {metric!r}")
        if metric == "tbt":
            return tuple(_percentiles(self.gaps_s, shares, self.gap_counts))
        values = [row.ttft_s if metric == "ttft" else row.tpot_s for row in self.rows]
        return tuple(_percentiles([value for value in values if value is not None], shares, None))

    def explain(self) -> str:
        """What happened, for people."""
        lines = [
            f"{self.finished:,} of {len(self.rows):,} requests in {self.duration_s:,.1f} s"
            + (f", {len(self.refused):,} refused: their tokens fit into no cache" if self.refused else "")
            + (f", {self.unfinished:,} left with nobody to serve them" if self.unfinished else ""),
            f"{'ms':>6} {'p50':>10} {'p90':>10} {'p99':>10} {'most':>10}",
        ]
        for metric in _METRICS:
            cells = " ".join(f"{1e3 * value:10,.1f}" for value in self.percentiles(metric))
            lines.append(f"{metric.upper():>6} {cells}")
        lines.append(f"{self.tokens_per_s:,.1f} tokens/s generated, {self.throughput:,.1f} with their prompts")
        total = sum(spent.seconds for spent in self.layouts.values()) or inf
        shares = (f"{name_of(layout)} {spent.seconds / total:.0%}" for layout, spent in self.layouts.items())
        lines.append(f"{self.steps:,} steps, {self.composed:,} composed; time by layout, tp x sp: {', '.join(shares)}")
        lines.append(f"cache at most {self.kv_most:.0%}, on average {self.kv_mean:.0%}; busy {self.utilisation:.0%}")
        if self.bubble > 1e-9:
            lines.append(f"bubbles: {self.bubble:.1%} of the stages' time while steps were on their way")
        if self.preempted:
            again = f"{self.redone_tokens:,} tokens computed again"
            lines.append(f"{self.preempted:,} times pages were given back or lost: {again}, {self.lost_s:.3g} s lost")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it but the gaps and the rows, as text."""
        return json.dumps(self._summary(), indent=1) + "\n"

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture of the times that requests saw, and of the cache over time; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        times, cache = figure.subplots(2)
        shares = [i / 200 for i in range(1, 201)]
        for metric in _METRICS:
            values = [1e3 * value for value in self.percentiles(metric, shares)]
            if values[-1]:
                times.step(values, shares, where="pre", label=metric.upper())
        times.set(xlabel="ms", ylabel="share", xscale="log")
        times.legend(frameon=False)
        cache.step([at for at, _ in self.kv], [100 * share for _, share in self.kv], where="post")
        cache.set(xlabel="s", ylabel="cache in use, %", ylim=(0, 100))
        figure.savefig(Path(path), dpi=120)

    def _rate(self, tokens: int) -> float:
        return tokens / self.duration_s if self.duration_s else 0.0

    def _summary(self) -> dict[str, Any]:
        shares = ("p50", "p90", "p99", "most")
        return {
            "requests": len(self.rows),
            "refused": len(self.refused),
            **{name: getattr(self, name) for name in _NUMBERS},
            **{f"{metric}_s": dict(zip(shares, self.percentiles(metric), strict=True)) for metric in _METRICS},
            "layouts": [
                {"tp": layout.tp, "sp": layout.sp, "steps": spent.steps, "seconds": spent.seconds}
                for layout, spent in self.layouts.items()
            ],
            "kv": [list(point) for point in self.kv],
        }
