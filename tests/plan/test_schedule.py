"""Virtual time: the real schedule, the recursion, the closed form and the bounds agree on random slots."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar import comm
from seqpar.plan import Slot, bound, makespan, repeated_makespan

SECONDS = st.integers(0, 40).map(lambda tenths: tenths / 10)
SHARES = st.sampled_from([0.0, 0.05, 0.25, 0.6])
Chunks = list[list[Slot]]


def slot(compute: st.SearchStrategy[float], comm_: st.SearchStrategy[float]) -> st.SearchStrategy[Slot]:
    return st.builds(Slot, compute, comm_)


@st.composite
def layers(draw: st.DrawFn, most: int = 4) -> Chunks:
    """The slots of one layer for 1 to `most` chunks; some slots send nothing, in all chunks alike."""
    sends = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    comms = [st.integers(1, 40).map(lambda tenths: tenths / 10) if x else st.just(0.0) for x in sends]
    layer = st.tuples(*(slot(SECONDS, x) for x in comms)).map(list)
    return draw(st.lists(layer, min_size=1, max_size=most))


def repeated(layer: Chunks, times: int) -> Chunks:
    return [chunk * times for chunk in layer]


@given(layers(), st.integers(1, 9), SHARES, SHARES)
def test_the_recursion_is_the_schedule(layer: Chunks, times: int, loss: float, link_loss: float) -> None:
    rates = {"contention": loss, "link_contention": link_loss}
    expected = makespan(repeated(layer, times), **rates).total_s
    assert repeated_makespan([(layer, times)], **rates) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(layers(), layers(), st.integers(0, 5), st.integers(1, 5))
def test_the_recursion_takes_phases(first: Chunks, second: Chunks, a: int, b: int) -> None:
    n = min(len(first), len(second))
    programs = [x * a + y * b for x, y in zip(first[:n], second[:n], strict=True)]
    found = repeated_makespan([(first[:n], a), (second[:n], b)])
    assert found == pytest.approx(makespan(programs).total_s, rel=1e-9, abs=1e-9)


def test_many_layers_cost_no_more_than_few() -> None:
    """A million layers are extrapolated, not walked through."""
    layer = [[Slot(1.0, 2.0), Slot(3.0, 1.0)], [Slot(1.5, 2.0), Slot(2.5, 1.0)]]
    few, many = (repeated_makespan([(layer, times)]) for times in (10, 1_000_000))
    per_layer = repeated_makespan([(layer, 11)]) - few
    assert many == pytest.approx(few + per_layer * (1_000_000 - 10), rel=1e-9)


@given(st.lists(st.tuples(*(slot(SECONDS, st.integers(1, 40).map(float)),) * 2), min_size=1, max_size=9))
def test_two_chunks_in_closed_form(pairs: list[tuple[Slot, Slot]]) -> None:
    """c_1 + sum max(c_{k+1}, x_k) + x_K, over both chunks in the order of their turns."""
    order = [slot for pair in pairs for slot in pair]
    closed = order[0].compute_s + order[-1].comm_s
    closed += sum(max(after.compute_s, before.comm_s) for before, after in pairwise(order))
    found = makespan([[first for first, _ in pairs], [second for _, second in pairs]])
    assert found.total_s == pytest.approx(closed)


@given(st.lists(st.lists(slot(SECONDS, SECONDS), max_size=6), max_size=4), SHARES, SHARES)
def test_bounds_hold_for_any_programs(programs: Chunks, loss: float, link_loss: float) -> None:
    found = makespan(programs, contention=loss, link_contention=link_loss)
    assert bound(programs) <= found.total_s * (1 + 1e-12) + 1e-12
    assert found.total_s >= max(found.compute_s, found.comm_s) * (1 - 1e-12)
    if not loss and not link_loss:
        assert found.total_s <= (found.compute_s + found.comm_s) * (1 + 1e-12)
        assert found.total_s == pytest.approx(found.compute_s + found.exposed_s)


@given(layers(), st.integers(1, 6))
def test_no_more_is_saved_than_the_smaller_share(layer: Chunks, times: int) -> None:
    """The reduction is at most min(f, 1 - f) against the same slots one after another."""
    found = makespan(repeated(layer, times))
    serial = found.compute_s + found.comm_s
    assert serial - found.total_s <= min(found.compute_s, found.comm_s) + 1e-9
    assert found.efficiency <= 1 + 1e-9


@given(
    *(st.floats(0.01, 10) for _ in range(4)),
    st.integers(1, 5),
    st.floats(0.05, 0.95),
)
def test_there_is_no_gain_without_the_necessary_condition(
    fixed: float, rate: float, alpha: float, beta: float, times: int, cut: float
) -> None:
    """Per layer C = c0 + c1 N and X = alpha + beta N, two of each: a gain needs c0 < 2 X and 2 alpha < C."""
    n = 10.0
    compute, sends = (lambda m: fixed + rate * m), (lambda m: alpha + beta * m)
    chunks = [[Slot(compute(m) / 2, sends(m))] * 2 * times for m in (n * cut, n * (1 - cut))]
    serial = times * (compute(n) + 2 * sends(n))
    if fixed >= 2 * sends(n) or 2 * alpha >= compute(n):
        assert makespan(chunks).total_s >= serial * (1 - 1e-12)


def test_contention_is_paid_while_both_are_busy() -> None:
    """Compute-bound slots: t = c + rho x. Link-bound ones: t = x + (1 - r_x) c / r_c."""
    slots = [[Slot(4.0, 1.0)], [Slot(4.0, 0.0)]]
    assert makespan(slots, contention=0.25).total_s == pytest.approx(4 + 4 + 0.25 * 1.0)
    slots = [[Slot(1.0, 8.0)], [Slot(3.0, 0.0)]]
    found = makespan(slots, contention=0.25, link_contention=0.2)
    assert found.total_s == pytest.approx(1 + 8 + 0.2 * 3 / 0.75)


def test_one_program_alone_is_serial() -> None:
    found = makespan([[Slot(1.0, 2.0), Slot(3.0, 0.0), Slot(1.0, 0.5)]])
    assert (found.total_s, found.compute_s, found.comm_s, found.exposed_s) == (7.5, 5.0, 2.5, 2.5)
    assert found.efficiency == 0 and makespan([]).efficiency == 0


def test_a_trace_in_force_does_not_see_virtual_time() -> None:
    with comm.trace() as seen:
        makespan([[Slot(1.0, 1.0)]] * 2)
    assert not seen.intervals


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"slots must be finite and >= 0, got \(-1.0, 0.0\) in program 1"):
        makespan([[], [Slot(-1.0, 0.0)]])
    with pytest.raises(ValueError, match=r"`contention` must lie in \[0, 1\), got 1.0"):
        makespan([], contention=1.0)
    with pytest.raises(ValueError, match=r"`link_contention` must lie in \[0, 1\), got -0.1"):
        makespan([], link_contention=-0.1)
