"""Which layout a step runs under, by how many tokens it has.

Few tokens are a matter of reading weights, which tensor parallelism splits over all ranks; many are one of sending
activations, of which Ulysses sends a p-th. So curves of seconds by tokens cross, once or several times, and a layout
between the two ends may be the fastest near a crossing. The choice follows the fastest, with as few changes as can be:
layouts that costs cannot tell apart count as equally fast, or noise would have neighbouring spans take turns.

The borders are exact. Between measured sizes curves are straight, so of any two the one is faster up to some number of
tokens and the other from there on, which a bisection finds. Every stretch between such numbers has one order, and the
best sequence of layouts over the stretches is a shortest path. A greedy choice lost: it stays with a layout as long as
that is tolerable and so is slower than need be before every border.

Source: the rule of Shift Parallelism (arXiv:2509.16495) has one threshold, found by profiling offline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, permutations
from math import inf, nan
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from seqpar.partition import Layout, Range, Shift
from seqpar.plan.costs import Curve

__all__ = ["ShiftChoice", "StepCosts", "shift", "undecided"]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one step by its number of tokens, over all requests and ranks, for each layout.

    Args:
        curves: one for each layout. They share some sizes: nothing is decided beyond what all have.
        source: where the numbers are from.
        resolution: what predictions from them are worth, as a share: layouts that differ by less are equally fast.

    Raises:
        ValueError: no curve, no sizes in common, layouts that the one with the smallest tp does not reach, or a
            resolution that is no share.
    """

    curves: Mapping[Layout, Curve] = field(hash=False)
    source: str = ""
    resolution: float = 2e-3

    def __post_init__(self) -> None:
        curves = {Layout(*layout).check(): curve for layout, curve in sorted(self.curves.items())}
        object.__setattr__(self, "curves", curves)
        if not curves:
            raise ValueError("`curves` must have at least one layout, got none")
        others = [layout for layout in curves if not self.base.reaches(layout)]
        if others:
            raise ValueError(
                f"`curves` must be of layouts that {name_of(self.base)} reaches, got {name_of(others[0])}; reachable "
                f"are {', '.join(map(name_of, self.base.reachable))}"
            )
        if self.sizes.size < 1:
            ends = ", ".join(f"{name_of(k)} from {c.tokens[0]} to {c.tokens[-1]}" for k, c in curves.items())
            raise ValueError(f"`curves` must have numbers of tokens in common, got {ends}")
        if not 0 <= self.resolution < 1:
            raise ValueError(f"`resolution` must be in [0, 1), got {self.resolution}")

    @property
    def base(self) -> Layout:
        """The layout that reaches all others."""
        return next(iter(self.curves))

    @property
    def sizes(self) -> Range:
        """The numbers of tokens that all layouts have costs for."""
        first = max(1, *(curve.tokens[0] for curve in self.curves.values()))
        return Range(first, min(curve.tokens[-1] for curve in self.curves.values()) + 1)

    def seconds(self, layout: Layout, num_tokens: int) -> float:
        """A step of that many tokens under a layout.

        Raises:
            ValueError: a layout without costs.
        """
        curve = self.curves.get(layout)
        if curve is None:
            known = ", ".join(map(name_of, self.curves))
            raise ValueError(f"`layout` must be one of those with costs ({known}), got {name_of(layout)}")
        return curve(num_tokens)

    def fastest(self, num_tokens: int) -> Layout:
        """The layout of the least time; of equal ones that with the smallest tp."""
        return min(self.curves, key=lambda layout: self.seconds(layout, num_tokens))

    def to_json(self) -> str:
        """The costs as text."""
        curves = [
            {"tp": layout.tp, "sp": layout.sp, "tokens": curve.tokens, "seconds": curve.seconds}
            for layout, curve in self.curves.items()
        ]
        return json.dumps({"curves": curves, "source": self.source, "resolution": self.resolution}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StepCosts:
        """Read what `to_json` gave.

        Raises:
            ValueError: the text does not hold such costs.
        """
        try:
            content = json.loads(text)
            curves = {
                Layout(each["tp"], each["sp"]): Curve(tuple(each["tokens"]), tuple(each["seconds"]))
                for each in content["curves"]
            }
            return cls(curves, content["source"], content["resolution"])
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"`text` must hold step costs as `to_json` gives them, got {error!r}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> StepCosts:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold such costs.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"`path` must hold step costs as `save` writes them, got {path}: {error}") from None


@dataclass(frozen=True)
class ShiftChoice:
    """What `shift` decided, with the numbers that it decided by.

    Attributes:
        shift: the rule.
        costs: of each layout.
        margin: layouts within this share of the fastest counted as equally fast.
    """

    shift: Shift
    costs: StepCosts
    margin: float

    def layout_of(self, num_tokens: int) -> Layout:
        """The layout of a step of that many tokens, over all requests and ranks."""
        return self.shift.layout_of(num_tokens)

    def regret(self, num_tokens: int) -> float:
        """How much longer than the fastest layout the chosen one is predicted to take, as a share."""
        best = self.costs.seconds(self.costs.fastest(num_tokens), num_tokens)
        return _excess(self.costs.seconds(self.layout_of(num_tokens), num_tokens), best)

    def explain(self) -> str:
        """Why, for people: the spans with their crossings, then the times of each layout at the measured sizes."""
        spans, costs = self.shift.spans, self.costs
        lines = [f"{costs.base.size} ranks, {len(costs.curves)} layout(s) of tp x sp: {_verdict(self.shift)}"]
        lines.append(f"costs: {costs.source or 'given'}; within {self.margin:.2g} of the fastest counts as equal")
        for (_, before), (first, after) in pairwise(spans):
            times = (f"{name_of(layout)} {_ms(costs.seconds(layout, first))}" for layout in (before, after))
            lines.append(f"crossing at {first:,} tokens: {', '.join(times)}")
        lines += _table(self)
        lines.append(f"beyond {costs.sizes.stop - 1:,} tokens nothing was measured, and the last choice holds")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture of the curves over the chosen spans; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        sizes = self.costs.sizes
        colours = {layout: f"C{number}" for number, layout in enumerate(self.costs.curves)}
        for layout, curve in self.costs.curves.items():
            for tokens, style in ((_between(_breaks(self.costs)), "-"), (_breaks(self.costs), "o")):
                label = name_of(layout) if style == "-" else None
                ms = [curve(n) * 1e3 or nan for n in tokens]
                axes.plot(tokens, ms, style, markersize=3, color=colours[layout], label=label)
        firsts = [*(max(sizes.start, first) for first, _ in self.shift.spans), max(sizes.stop - 1, sizes.start + 1)]
        for (a, b), (_, layout) in zip(pairwise(firsts), self.shift.spans, strict=True):
            axes.axvspan(a, b, color=colours[layout], alpha=0.12, linewidth=0)
            axes.text(a, 0.98, f" {name_of(layout)}", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(firsts[0], firsts[-1])
        axes.set_xlabel("tokens of a step")
        axes.set_ylabel("ms")
        axes.set_title(self.costs.source, fontsize=9, loc="left")
        axes.legend(fontsize=8, frameon=False, loc="lower right", title="tp x sp", title_fontsize=8)
        figure.savefig(path, dpi=120)


def shift(costs: StepCosts, *, margin: float | None = None) -> ShiftChoice:
    """Choose the layout for every number of tokens.

    Of all rules under which no step is slower than under its fastest layout by more than the margin, it is one with
    the fewest spans, and of those the one whose steps are fastest; of equal ones the one that stays nearest to the
    base. Below and above the sizes that all curves have, the choice at their ends holds.

    Args:
        costs: of each layout; see `calibrate_layouts`.
        margin: layouts within this share of the fastest are equally fast; the costs' resolution by default.

    Raises:
        ValueError: a negative margin.
    """
    margin = costs.resolution if margin is None else margin
    if not 0 <= margin < inf:
        raise ValueError(f"`margin` must be finite and >= 0, got {margin}")
    stretches = [_Stretch.of(costs, span, margin) for span in _spans(costs, margin)]
    spans: list[tuple[int, Layout]] = []
    for stretch, layout in zip(stretches, _path(stretches, tuple(costs.curves)), strict=True):
        if not spans or spans[-1][1] != layout:
            spans.append((stretch.span.start if spans else 1, layout))
    return ShiftChoice(Shift(tuple(spans)), costs, margin)


def undecided(costs: StepCosts, *, band: float = 0.1, finest: float = 1.2) -> tuple[int, ...]:
    """Numbers of tokens halfway between known ones where knowing the times could change what is chosen.

    That is where the fastest layout is another at one end than at the other, or where at an end a second one comes
    within a band of it: times between two sizes need not lie on a straight line.

    Args:
        costs: of each layout.
        band: how far behind the fastest a layout may be to be in question, as a share.
        finest: the least ratio of two known sizes between which it is worth while to look.

    Raises:
        ValueError: a negative band, or a ratio below 1.
    """
    if not 0 <= band < inf or not 1 <= finest < inf:
        raise ValueError(f"`band` must be >= 0 and `finest` >= 1, both finite, got {band} and {finest}")
    breaks = _breaks(costs)
    close = {n for n in breaks if _is_close(costs, band, n)}
    return tuple(
        (a + b) // 2
        for a, b in pairwise(breaks)
        if b - a > 1 and b >= finest * a and (a in close or b in close or costs.fastest(a) != costs.fastest(b))
    )


def _is_close(costs: StepCosts, band: float, num_tokens: int) -> bool:
    """Whether a second layout comes within the band of the fastest."""
    times = sorted(costs.seconds(layout, num_tokens) for layout in costs.curves)
    return len(times) > 1 and times[1] <= times[0] * (1 + band)


class _Stretch(NamedTuple):
    """Numbers of tokens over which the order of the layouts is the same, and what each that will do loses there."""

    span: Range
    losses: dict[Layout, float]

    @classmethod
    def of(cls, costs: StepCosts, span: Range, margin: float) -> _Stretch:
        ends = (span.start, span.stop - 1)
        best = [min(curve(n) for curve in costs.curves.values()) for n in ends]
        weight = span.size / (span.start + span.stop)  # about half the logarithm of stop / start, but alike everywhere
        losses = {
            layout: weight * sum(_excess(curve(n), least) for n, least in zip(ends, best, strict=True))
            for layout, curve in costs.curves.items()
            if all(_will_do(curve, other, margin, span.start) for other in costs.curves.values())
        }
        return cls(span, losses)


class _Cost(NamedTuple):
    """Compared in this order."""

    changes: int
    loss: float
    tp: int


def _path(stretches: list[_Stretch], layouts: tuple[Layout, ...]) -> list[Layout]:
    """The layout of every stretch: fewest changes, then least loss, then least tp."""
    nothing = _Cost(0, 0.0, 0)
    costs = dict.fromkeys(layouts, nothing)
    choices: list[dict[Layout, Layout]] = []
    for number, stretch in enumerate(stretches):
        after, came = {}, {}
        for layout, loss in stretch.losses.items():
            arrived = {
                before: _Cost(cost.changes + (number > 0 and before != layout), cost.loss + loss, cost.tp + layout.tp)
                for before, cost in costs.items()
            }
            came[layout] = min(arrived, key=lambda before: (arrived[before], before != layout))
            after[layout] = arrived[came[layout]]
        costs, choices = after, [*choices, came]
    path = [min(costs, key=lambda layout: costs[layout])]
    for came in reversed(choices[1:]):
        path.append(came[path[-1]])
    return path[::-1]


def _spans(costs: StepCosts, margin: float) -> Iterator[Range]:
    """The stretches of the sizes in which no curve bends, and none crosses another or the margin above it."""
    breaks = _breaks(costs)
    firsts = set(breaks)
    for one, other in permutations(costs.curves.values(), 2):
        for relation in (partial(_is_faster, one, other), partial(_will_do, one, other, margin)):
            firsts.update(_first_change(relation, a, b) for a, b in pairwise(breaks))
    for first, after in pairwise(sorted({*firsts, costs.sizes.stop})):
        yield Range(first, after)


def _breaks(costs: StepCosts) -> list[int]:
    """The ends of the sizes, and every number of tokens between them at which a curve bends."""
    sizes = costs.sizes
    bends = (n for curve in costs.curves.values() for n in curve.tokens if sizes.start < n < sizes.stop)
    return sorted({sizes.start, sizes.stop - 1, *bends})


def _between(breaks: list[int]) -> list[int]:
    """Sizes as dense on a logarithmic axis as a picture needs to show straight lines bent."""
    steps = (round(a * (b / a) ** (i / 16)) for a, b in pairwise(breaks) for i in range(16))
    return sorted({*steps, *breaks})


def _first_change(holds: Callable[[int], bool], start: int, stop: int) -> int:
    """The first number in (start, stop] that differs from `start` in what holds, which changes once; or `start`."""
    before = holds(start)
    if holds(stop) == before:
        return start
    while stop - start > 1:
        middle = (start + stop) // 2
        if holds(middle) == before:
            start = middle
        else:
            stop = middle
    return stop


def _is_faster(one: Curve, other: Curve, num_tokens: int) -> bool:
    return one(num_tokens) < other(num_tokens)


def _will_do(one: Curve, other: Curve, margin: float, num_tokens: int) -> bool:
    """Whether the one is slower than the other by no more than the margin."""
    return one(num_tokens) <= other(num_tokens) * (1 + margin)


def _excess(seconds: float, best: float) -> float:
    """By which share the one is more than the other."""
    if seconds == best:
        return 0.0
    return seconds / best - 1 if best else inf


def _verdict(rule: Shift) -> str:
    """The spans in words."""
    names = [name_of(layout) for _, layout in rule.spans]
    ends = [f"up to {first - 1:,} tokens" for first, _ in rule.spans[1:]]
    last = f"then {names[-1]}" if ends else f"{names[-1]} always"
    return ", ".join([*(f"{name} {end}" for name, end in zip(names[:-1], ends, strict=True)), last])


def _table(choice: ShiftChoice) -> list[str]:
    """A line for each measured size: the layouts' times, the choice, and what the best of the others takes more."""
    costs = choice.costs
    rows = [("tokens", *map(name_of, costs.curves), "chosen", "next")]
    for n in _breaks(costs):
        chosen = choice.layout_of(n)
        times = {layout: costs.seconds(layout, n) for layout in costs.curves}
        rest = [seconds for layout, seconds in times.items() if layout != chosen]
        more = f"{_excess(min(rest), times[chosen]):+.1%}" if rest else ""
        rows.append((f"{n:,}", *map(_ms, times.values()), name_of(chosen), more))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def name_of(layout: Layout) -> str:
    """A layout for people: tp x sp."""
    return f"{layout.tp}x{layout.sp}"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.1f} ms" if abs(ms) >= 100 else f"{ms:.3g} ms"
