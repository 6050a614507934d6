"""The choice of layouts: laws on random curves, exact borders against brute force, what it says, and what costs are."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.partition import Layout, Shift
from seqpar.plan import Curve, ShiftChoice, StepCosts, shift, undecided

SP, MIX, TP = Layout(1, 4), Layout(2, 2), Layout(4, 1)
NAMES = (SP, MIX, TP)

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True).map(sorted)
# Few distinct values, so that curves touch, coincide and vanish.
TIMES = st.one_of(st.sampled_from([0.0, 1.0, 1.05, 2.0, 3.0]), st.floats(1e-6, 10))


@st.composite
def random_curves(draw: st.DrawFn) -> list[tuple[list[int], list[float]]]:
    """Points of one to three curves."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(SIZES)
        found.append((tokens, draw(st.lists(TIMES, min_size=len(tokens), max_size=len(tokens)))))
    return found


def costs_of(curves: list[tuple[list[int], list[float]]], resolution: float) -> StepCosts:
    made = {layout: Curve(tuple(n), tuple(s)) for layout, (n, s) in zip(NAMES, curves, strict=False)}
    return StepCosts(made, "random", resolution)


def lines(resolution: float = 1e-3, **fixed_and_rate: tuple[float, float]) -> StepCosts:
    named = {"sp": SP, "mix": MIX, "tp": TP}
    return StepCosts({named[k]: Curve.line(*v) for k, v in fixed_and_rate.items()}, "made up", resolution)


def fewest_spans(costs: StepCosts, margin: float) -> int:
    """By trying every number of tokens: the longest runs that some layout may serve, one after another."""
    found, alive = 1, set(costs.curves)
    for n in range(*costs.sizes):
        best = min(curve(n) for curve in costs.curves.values())
        good = {layout for layout, curve in costs.curves.items() if curve(n) <= best * (1 + margin)}
        if not alive & good:
            found, alive = found + 1, set(costs.curves)
        alive &= good
    return found


@settings(max_examples=200, deadline=None)
@given(random_curves(), st.sampled_from([0.0, 0.05, 0.5]))
def test_the_choice_is_never_worse_than_the_best_by_more_than_the_margin_and_changes_least(
    curves: list[tuple[list[int], list[float]]], margin: float
) -> None:
    try:
        costs = costs_of(curves, margin)
    except ValueError as error:
        assert "in common" in str(error)
        return
    choice = shift(costs)
    for n in range(*costs.sizes):
        assert choice.regret(n) <= margin + 1e-9
    # Lines that run together may cross by rounding alone, where trying all numbers sees a change that there is not.
    assert len(choice.shift.spans) <= fewest_spans(costs, margin * (1 - 1e-9))
    assert len(choice.shift.spans) >= fewest_spans(costs, margin * (1 + 1e-9) + 1e-12)
    assert all(before != after for (_, before), (_, after) in pairwise(choice.shift.spans))
    assert shift(costs) == choice
    first, last = costs.sizes.start, costs.sizes.stop - 1
    assert choice.layout_of(1) == choice.layout_of(first) and choice.layout_of(last) == choice.layout_of(10**9)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.floats(0, 9), st.floats(1e-3, 9)), st.tuples(st.floats(0, 9), st.floats(1e-3, 9)))
def test_the_border_of_two_lines_is_where_they_cross(one: tuple[float, float], other: tuple[float, float]) -> None:
    """Up to a million tokens, by bisection; the first number at which the base is no slower, by the formula."""
    costs = lines(0.0, sp=one, tp=other)
    spans = shift(costs).shift.spans
    for first, _ in spans[1:]:
        exact = (other[0] - one[0]) / (one[1] - other[1])
        assert first - 1 - 1e-6 * first <= exact <= first + 1e-6 * first
        assert (costs.fastest(first - 1), costs.fastest(first)) == (spans[0][1], spans[1][1])


def test_the_papers_rule_comes_out_of_two_lines() -> None:
    costs = lines(sp=(3.0, 0.01), tp=(1.0, 0.02))
    choice = shift(costs)
    assert choice.shift == Shift(((1, TP), (200, SP)))  # equal at 200, where the base is preferred
    assert [choice.layout_of(n) for n in (1, 199, 200, 10**7)] == [TP, TP, SP, SP]
    assert choice.regret(1) == 0


def test_a_layout_between_may_win_near_the_crossing() -> None:
    costs = lines(sp=(3.0, 0.01), mix=(1.8, 0.014), tp=(1.0, 0.02))
    assert shift(costs).shift.spans == ((1, TP), (134, MIX), (300, SP))


def test_more_than_one_crossing_of_the_same_two() -> None:
    sp = Curve((1, 10, 20, 30), (2.0, 2.0, 9.0, 9.0))
    costs = StepCosts({SP: sp, TP: Curve((1, 30), (1.0, 6.8))})
    assert [layout for _, layout in shift(costs).shift.spans] == [TP, SP, TP]


def test_what_costs_cannot_tell_apart_is_no_reason_to_change() -> None:
    """Noise of 1 % around one line: one span, of the layout that is faster over all."""
    noisy = Curve((1, 2, 4, 8, 16), (1.0, 1.01, 1.0, 1.01, 1.0))
    other = Curve((1, 2, 4, 8, 16), (1.005, 1.0, 1.01, 1.005, 1.01))
    costs = StepCosts({SP: noisy, TP: other}, resolution=0.02)
    assert shift(costs).shift.spans == ((1, SP),)
    assert len(shift(costs, margin=0.0).shift.spans) > 2
    clear = StepCosts({SP: replace(noisy, seconds=(2.0, *noisy.seconds[1:])), TP: other}, resolution=0.02)
    assert shift(clear).shift.spans == ((1, TP),)  # which no later difference is worth leaving


def test_equal_layouts_are_the_base() -> None:
    same = Curve((1, 64), (1.0, 2.0))
    assert shift(StepCosts({TP: same, MIX: same, SP: same})).shift.spans == ((1, SP),)
    slow = Curve((1, 64), (3.0, 4.0))
    assert shift(StepCosts({TP: same, MIX: same, SP: slow})).shift.spans == ((1, MIX),)


def test_a_border_lies_at_the_crossing_and_not_where_staying_ceases_to_be_tolerable() -> None:
    costs = lines(0.2, sp=(3.0, 0.01), tp=(1.0, 0.02))
    assert shift(costs).shift.spans == ((1, TP), (200, SP))
    assert len(shift(costs, margin=5.0).shift.spans) == 1


def test_sizes_in_doubt_are_those_between_unlike_or_close_ends() -> None:
    known = (1, 2, 4, 8, 16, 32, 64)
    one, other = (10, 10, 10, 10, 20, 20, 20), (20, 20, 20, 20, 21.9, 10, 10)
    costs = costs_of([(list(known), list(map(float, one))), (list(known), list(map(float, other)))], 0.0)
    assert undecided(costs) == (12, 24)  # close at 16, and another one is the fastest at 32
    assert undecided(costs, band=0.09) == (24,)
    assert undecided(costs, band=1.0) == (3, 6, 12, 24, 48)  # nothing lies between 1 and 2
    assert undecided(costs, finest=2.1) == ()
    assert undecided(costs_of([([1, 64], [1.0, 2.0])], 0.0)) == ()  # nothing to choose
    with pytest.raises(ValueError, match=re.escape("`band` must be >= 0 and `finest` >= 1, both finite, got -1")):
        undecided(costs, band=-1.0)


def test_nothing_is_decided_beyond_what_was_measured() -> None:
    """The base gains on pure tensor parallelism, but is not ahead at the last size."""
    costs = StepCosts({SP: Curve((4, 100), (2.0, 2.0)), TP: Curve((1, 90), (1.0, 1.9))})
    assert tuple(costs.sizes) == (4, 91)
    assert shift(costs).shift.spans == ((1, TP),)


def test_one_layout_and_one_size() -> None:
    costs = StepCosts({TP: Curve((8,), (1.0,))})
    choice = shift(costs)
    assert choice.shift.spans == ((1, TP),) and choice.regret(3) == 0
    assert "4x1 always" in choice.explain()


def test_no_time_at_all() -> None:
    costs = StepCosts({SP: Curve((1, 9), (0.0, 1.0)), TP: Curve((1, 9), (0.5, 0.5))}, resolution=0.0)
    choice = shift(costs)
    assert choice.shift.spans == ((1, SP), (6, TP)) and choice.regret(1) == 0
    assert replace(choice, shift=Shift(((1, TP),))).regret(1) == inf


def test_explain() -> None:
    sp, tp = Curve((1, 64, 4096), (3e-3, 3.1e-3, 0.2)), Curve((1, 64, 4096), (1e-3, 2e-3, 0.4))
    choice = shift(StepCosts({SP: sp, TP: tp}, "measured", 0.01))
    text = choice.explain()
    border = choice.shift.spans[1][0]
    assert text.splitlines()[0] == f"4 ranks, 2 layout(s) of tp x sp: 4x1 up to {border - 1} tokens, then 1x4"
    assert "costs: measured; within 0.01 of the fastest counts as equal" in text
    assert re.search(rf"crossing at {border} tokens: 4x1 4\.\d+ ms, 1x4 4\.\d+ ms", text)
    assert re.search(r"4,096 +200\.0 ms +400\.0 ms +1x4 +\+100\.0%", text)
    assert re.search(r" 1 +3 ms +1 ms +4x1 +\+200\.0%", text)
    assert text.endswith("beyond 4,096 tokens nothing was measured, and the last choice holds")


def test_plot(tmp_path: Path) -> None:
    shift(lines(sp=(3.0, 0.01), mix=(1.8, 0.014), tp=(1.0, 0.02))).plot(tmp_path / "curves.png")
    shift(StepCosts({TP: Curve((8,), (1.0,))})).plot(tmp_path / "one.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_costs_are_kept(tmp_path: Path) -> None:
    costs = lines(0.01, sp=(3.0, 0.01), tp=(1.0, 1 / 3))
    costs.save(tmp_path / "costs.json")
    loaded = StepCosts.load(tmp_path / "costs.json")
    assert loaded == costs and list(loaded.curves) == [SP, TP] and shift(loaded) == shift(costs)
    assert isinstance(shift(loaded), ShiftChoice) and hash(costs) == hash(loaded)
    for content in ("{}", "no", '{"curves": [{"tp": 1}], "source": "", "resolution": 0.1}', '{"curves": 3}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"`path` must hold step costs as `save` writes them, got .*bad\.json"):
            StepCosts.load(tmp_path / "bad.json")


def test_refusals() -> None:
    some = Curve((1, 8), (1.0, 2.0))
    with pytest.raises(ValueError, match="`curves` must have at least one layout, got none"):
        StepCosts({})
    message = r"must be of layouts that 2x3 reaches, got 3x2; reachable are 2x3, 6x1"
    with pytest.raises(ValueError, match=message):
        StepCosts({Layout(3, 2): some, Layout(2, 3): some})
    with pytest.raises(ValueError, match="reaches, got 4x1"):
        StepCosts({Layout(1, 2): some, TP: some})
    with pytest.raises(ValueError, match="in common, got 1x4 from 1 to 8, 4x1 from 9 to 10"):
        StepCosts({SP: some, TP: Curve((9, 10), (1.0, 2.0))})
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"`resolution` must be in \[0, 1\)"):
            StepCosts({SP: some}, resolution=share)
    for margin in (-0.1, inf):
        with pytest.raises(ValueError, match="`margin` must be finite and >= 0"):
            shift(StepCosts({SP: some}), margin=margin)
