"""Pipelines in virtual time against their definition and closed forms; reports read out of traces."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar import plan
from seqpar.comm import Interval
from tests.kernels.own_errors import own_errors

seconds = st.integers(0, 9).map(float)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[float]], list[float], int, float]:
    stages, count = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    times = [[draw(seconds) for _ in range(stages)] for _ in range(count)]
    return times, [draw(seconds) for _ in range(count)], draw(st.integers(1, 6)), draw(seconds)


@given(runs())
def test_follows_its_definition(run: tuple[list[list[float]], list[float], int, float]) -> None:
    times, sends, depth, back_s = run
    last = len(times[0]) - 1 if times else 0

    @cache
    def start(m: int, s: int) -> float:
        waits = [0.0]
        if m:
            waits.append(end(m - 1, s))
        if s:
            waits.append(end(m, s - 1) + sends[m])
        if s == 0 and m >= depth:
            waits.append(end(m - depth, last) + back_s)
        return max(waits)

    def end(m: int, s: int) -> float:
        return start(m, s) + times[m][s]

    found = plan.pipeline(times, depth, sends=sends, back_s=back_s)
    assert found.ends_s == tuple(end(m, last) for m in range(len(times)))
    assert found.span_s == max(found.ends_s, default=0.0)
    gaps = [sum(start(m, s) - end(m - 1, s) for s in range(last + 1)) if m else 0.0 for m in range(len(times))]
    assert found.gaps_s == tuple(gaps)
    for s, stage in enumerate(found.stages):
        assert stage.busy_s == sum(row[s] for row in times)
        assert stage.bubble_s == stage.blocked_s == found.span_s - stage.busy_s >= 0
    assert 0 <= found.bubble <= 1


@pytest.mark.parametrize(("stages", "count"), [(1, 5), (2, 3), (4, 9)])
def test_equal_micro_batches_have_bubbles_at_the_ends_alone(stages: int, count: int) -> None:
    times = [[2.0] * stages] * count
    found = plan.pipeline(times, stages)
    assert found.span_s == 2 * (count + stages - 1) and sum(found.gaps_s) == 0
    assert found.bubble == pytest.approx((stages - 1) / (count + stages - 1))
    serial = plan.pipeline(times, 1)
    assert serial.span_s == 2 * count * stages and serial.bubble == pytest.approx(1 - 1 / stages)


def test_bubbles_of_prompts_beside_decodes() -> None:
    """SARATHI's second cause: a long micro-batch lets the stage behind it wait, and the one before it."""
    even = plan.pipeline([[5.0, 5.0]] * 4, 2)
    uneven = plan.pipeline([[9.0, 9.0], [1.0, 1.0]] * 2, 2)
    assert sum(stage.busy_s for stage in even.stages) == sum(stage.busy_s for stage in uneven.stages)
    assert (even.bubble, uneven.bubble) == (pytest.approx(1 / 5), pytest.approx(1 - 20 / 37))


def test_what_is_refused() -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: plan.pipeline([[1.0]], 0), "`depth` must be at least 1, got 0"),
        (lambda: plan.pipeline([[1.0, 2.0], [1.0]], 1), r"of 2 stages, got 2 and 2, of \[1, 2\] stages"),
        (lambda: plan.pipeline([[1.0]], 1, sends=[]), "`times` and `sends` must have an entry for each micro-batch"),
        (lambda: plan.pipeline([[-1.0]], 1), "`times`, `sends` and `back_s` must be finite and >= 0, got others"),
        (lambda: plan.measured_pipeline([], 1), r"as many ranks for each of 1 stages, got ranks \[\]"),
        (lambda: plan.measured_pipeline([of(0, "compute", 0, 1)], 2), r"for each of 2 stages, got ranks \[0\]"),
    ]
    for call, message in cases:
        with own_errors(), pytest.raises(ValueError, match=message):
            call()


def of(rank: int, kind: Any, start: float, end: float) -> Interval:
    return Interval(kind, "op", "", (), rank, float(start), float(end), float(start))


def test_a_report_is_read_out_of_a_trace() -> None:
    intervals = [
        of(0, "compute", 10, 12),
        of(0, "compute", 11, 13),  # a program within a program
        of(0, "wait", 13, 17),
        of(0, "compute", 17, 18),
        of(1, "compute", 10, 14),
        of(2, "wait", 5, 13),  # before anybody computes nothing counts
        of(2, "compute", 13, 20),
        of(2, "comm", 9, 19),
        of(3, "compute", 13, 16),
        of(3, "wait", 19, 25),
    ]
    found = plan.measured_pipeline(intervals, 2)
    assert found.span_s == 10 and found.gaps_s == ()
    assert found.stages == (plan.StageTimes(4.0, 6.0, 2.0), plan.StageTimes(5.0, 5.0, 2.0))
    assert found.bubble == 0.55 and found.stages[0].bubble == 0.6
    assert str(found).splitlines()[0] == "10000.000 ms, bubbles 55.0%" and len(str(found).splitlines()) == 4
