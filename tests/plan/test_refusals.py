"""What the numbers of `plan` refuse, and what they give where there is nothing to divide by."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from seqpar.layers import Strided
from seqpar.partition import GridOrder, HeadMap, Layout, RingOrder, Run, Shift
from seqpar.plan import (
    Candidate,
    Curve,
    Grid,
    Operators,
    Options,
    OverlapChoice,
    Plan,
    RingCase,
    ShiftChoice,
    Simulation,
    StepCosts,
    percentile,
    ring_costs,
    ring_method,
    ring_volumes,
    strided_volumes,
    usp_costs,
    usp_volumes,
)
from tests.kernels.own_errors import own_errors

HELD = tuple(((Run(0, 4, rank * 4),),) for rank in range(2))  # two ranks, one request, four tokens each
ORDER = RingOrder(HELD, HELD)
GRID = GridOrder(ORDER, (4, 4), (0, 0))
HEADS = HeadMap(4, 2)
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CASE = RingCase(8, 8, 2, 4, 2, 8)
RATES = {"flops": 1e9, "bytes_per_s": 1e6}
PLAN = Plan(Grid(), 1, Options(), 8, 1.0, 0.5, 3.0, 10.0, 0.5, 2, 1e9)
STEPS = StepCosts({Layout(1, 2): Curve((1, 8), (1.0, 2.0))})
FOUND = Simulation((), (1.0, 2.0), (3, 1), (), 4, 4, {}, (), 1.0, 1.0, 1, 4, 0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PLAN.value("speed"), r"`objective` must be one of latency, .*, got 'speed'"),  # type: ignore[arg-type]
        (lambda: percentile((1.0,), 1.5), r"`share` must be in \[0, 1\], got 1.5"),
        (lambda: percentile((1.0,), float("nan")), r"`share` must be in \[0, 1\], got nan"),
        (lambda: percentile((1.0, 2.0), 0.5, (1,)), r"`weights` must be >= 0, one for each of the 2 values, got 1"),
        (lambda: percentile((1.0,), 0.5, (-1,)), r"`weights` must be >= 0, .*, got 1, the least -1"),
        (lambda: FOUND.percentiles("tbt", (2.0,)), r"`share` must be in \[0, 1\], got 2.0"),
        (lambda: replace(FOUND, gap_counts=(1,)), r"`gap_counts` must be >= 0, one for each of `gaps_s`, got 1 for 2"),
        (lambda: replace(FOUND, gap_counts=array("q", (1, -1))), r"`gap_counts` must be >= 0"),
        (lambda: ring_volumes(ORDER, "k", **SIZES), r"`method` must be \"kv\" or \"q\", got 'k'"),  # type: ignore[arg-type]
        (lambda: ring_volumes(ORDER, "kv", **SIZES, wire="int3"), r"`wire` must be .*, got 'int3'"),  # type: ignore[arg-type]
        (lambda: ring_volumes(RingOrder(HELD, HELD[:1]), "kv", **SIZES), r"`order` must say .*, got 2 and 1 ranks"),
        (lambda: ring_volumes(RingOrder(HELD, ((), ())), "kv", **SIZES), r"`order` must say .* of \[0, 1\] requests"),
        (
            lambda: ring_volumes(ORDER, "kv", **{**SIZES, "head_dim": 0}),
            r"`head_dim` and `itemsize` must be at least 1",
        ),
        (lambda: strided_volumes(Strided([(4, 2)]), ORDER, **SIZES), r"`policy` must have groups that divide the 2"),
        (
            lambda: strided_volumes(Strided([(2, 2)], faithful=True), RingOrder(HELD, HELD[:1]), **SIZES),
            r"`order` must say of at least one rank",
        ),
        (lambda: strided_volumes(Strided([(2, 2)]), ORDER, **{**SIZES, "num_heads": 0}), r"must be at least 1, got 0"),
        (lambda: usp_volumes(GRID, "kv", heads=HEADS, head_dim=8, wire="int3"), r"`wire` must be"),  # type: ignore[arg-type]
        (lambda: usp_volumes(GRID, "kv", heads=HEADS, head_dim=8, tp_rank=1), r"`tp_rank` must be in \[0, 1\), got 1"),
        (
            lambda: usp_volumes(GRID._replace(cached=(0,)), "kv", heads=HEADS, head_dim=8),
            r"`grid` must have tokens and cached ones of as many ranks, a multiple of its 2 rows, got 2 and 1",
        ),
        (
            lambda: usp_volumes(GRID._replace(tokens=(), cached=()), "kv", heads=HEADS, head_dim=8),
            r"`grid` must have tokens and cached ones",
        ),
        (lambda: usp_costs(CASE, **{**RATES, "flops": 0.0}), r"`flops` and `bytes_per_s` and .* must be > 0"),
        (lambda: usp_costs(CASE, **RATES, row_bytes_per_s=0.0), r"must be > 0 and latencies >= 0, got .* 0.0 and 0.0"),
        (lambda: usp_costs(CASE, **RATES, row_ranks=0), r"`row_ranks` at least 1, got None and 0"),
        (lambda: ring_costs(CASE, **{**RATES, "bytes_per_s": 0.0}), r"`bytes_per_s` must be > 0"),
        (lambda: ring_method(CASE, **{**RATES, "flops": float("nan")}, rule="meta-1"), r"`flops` and `bytes_per_s`"),
        (lambda: STEPS.seconds(Layout(2, 1), 4), r"`layout` must be one of those with costs \(1x2\), got 2x1"),
        (lambda: ShiftChoice(Shift(((1, Layout(2, 1)),)), STEPS, 0.0).regret(4), r"`layout` must be one of those"),
        (lambda: Operators.from_content({"products": []}), r"`content` must be what .*, got KeyError\('prompts'\)"),
    ],
)
def test_is_refused_in_a_line(call: Callable[[], Any], message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_what_is_sound_has_a_result() -> None:
    assert PLAN.value("throughput") == -10.0 and FOUND.percentiles("tbt", (0.0, 0.75, 1.0)) == (1.0, 1.0, 2.0)
    assert percentile((), 0.5) == 0.0 and percentile((4.0, 2.0), 0.5, (0, 0)) == 2.0
    assert "TBT" in FOUND.explain() and '"p50"' in FOUND.to_json()
    assert len(ring_volumes(ORDER, "kv", **SIZES)) == len(strided_volumes(Strided([(2, 2)]), ORDER, **SIZES)) == 2
    assert usp_costs(CASE, **RATES)[0].seconds > 0 and len(usp_volumes(GRID, "kv", heads=HEADS, head_dim=8)) == 2


def test_a_choice_of_nothing_is_explained() -> None:
    """No time at all, and still candidates, as costs of zeros give them."""
    free = Candidate((4,), 0.0, 0.0, 0.0, 0.0)
    choice = OverlapChoice((4,), 8, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (free,), 0.03)
    assert choice.reduction == 0.0 and "2 chunks, cut at 4" in choice.explain()
