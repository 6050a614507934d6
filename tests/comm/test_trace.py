"""Traces: every interval exactly in virtual time, on programs of fakes; their order on real ranks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import comm
from seqpar.comm.trace import current_trace
from tests.comm.fakes import Clock, FakeGroup
from tests.ranks import run_mesh

RATE = 4.0
Costs = list[tuple[int, int]]
"""For each step of a program: quarters of a second that it computes, and that its transfer takes."""


class World:
    """Programs in virtual time over one simulated link."""

    def __init__(self) -> None:
        self.clock, self.group = Clock(), FakeGroup()
        self.link = comm.SimulatedLink(0.0, RATE, clock=self.clock, sleep=self.clock.sleep)

    def launch(self, num_bytes: int, label: str = "") -> comm.Handle:
        x = torch.zeros(num_bytes, dtype=torch.uint8)
        sizes = [0, num_bytes]
        return comm.all_to_all_async(x, group=self.group, send_sizes=sizes, recv_sizes=sizes, label=label)

    def program(self, costs: Costs, name: str = "", marks: bool = False) -> comm.Steps[str]:
        for step, (compute, transfer) in enumerate(costs):
            if marks:
                yield comm.Mark(step)
            self.clock.advance(compute / RATE)
            yield self.launch(transfer, f"{name}{step}")
        return name


def spans(trace: comm.Trace, kind: str, *program: int) -> list[tuple[float, float]]:
    return [i.span for i in trace.intervals if i.kind == kind and i.program == program]


def recursion(costs: Sequence[tuple[int, int]], n: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Computes and transfers of n interleaved chunks: c_k waits for x_{k-n}, x_k for c_k, and each for its resource."""
    c: list[tuple[float, float]] = []
    x: list[tuple[float, float]] = []
    for k, (compute, transfer) in enumerate(costs):
        start = max(c[-1][1] if c else 0.0, x[k - n][1] if k >= n else 0.0)
        c.append((start, start + compute / RATE))
        start = max(c[-1][1], x[-1][1] if x else 0.0)
        x.append((start, start + transfer / RATE))
    return c, x


@st.composite
def equal_programs(draw: st.DrawFn) -> list[Costs]:
    """2 to 4 programs of as many steps each; a step takes what it will, but never nothing."""
    n, steps, cost = draw(st.integers(2, 4)), draw(st.integers(1, 6)), st.integers(1, 9)
    step = st.lists(st.tuples(cost, cost), min_size=steps, max_size=steps)
    return draw(st.lists(step, min_size=n, max_size=n))


@given(equal_programs(), st.booleans())
def test_an_interleave_on_a_link_is_the_recursion_of_the_model(programs: list[Costs], marks: bool) -> None:
    world, n = World(), len(programs)
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([world.program(costs, marks=marks) for costs in programs])
    c, x = recursion([step for steps in zip(*programs, strict=True) for step in steps], n)
    assert [i.span for i in t.intervals if i.kind == "compute"] == c
    assert [i.span for i in t.intervals if i.kind == "comm"] == x
    for index, costs in enumerate(programs):
        assert spans(t, "compute", index) == c[index::n] and spans(t, "comm", index) == x[index::n]
        assert len(costs) == len(c[index::n])
    assert world.clock.now_s == x[-1][1] == t.report().span_s
    assert t.report().compute_s == pytest.approx(sum(end - start for start, end in c), rel=1e-12)
    assert t.report().comm_s == pytest.approx(sum(end - start for start, end in x), rel=1e-12)


@given(equal_programs())
def test_slots_and_the_bound_are_those_of_the_model(programs: list[Costs]) -> None:
    """c_1 alone, then each c_{k+1} beside x_k, and x_K alone; two programs lose nothing in any slot."""
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([world.program(costs) for costs in programs])
    report, order = t.report(), [step for steps in zip(*programs, strict=True) for step in steps]
    c, x = [cost / RATE for cost, _ in order], [cost / RATE for _, cost in order]
    assert [slot.compute_s for slot in report.slots] == [*c, 0.0]
    assert [slot.comm_s for slot in report.slots] == [0.0, *x]
    assert sum(slot.measured_s for slot in report.slots) == report.span_s
    assert report.bound_s == max(sum(c) + x[-1], c[0] + sum(x)) <= report.span_s
    if len(programs) == 2:
        assert not report.worst() and all(slot.measured_s == slot.bound_s for slot in report.slots)


def test_a_serial_run() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.run(world.program([(4, 8), (2, 0), (0, 4)], "mlp"))
    assert spans(t, "compute") == [(0.0, 1.0), (3.0, 3.5)]
    assert spans(t, "comm") == [(1.0, 3.0), (3.5, 3.5), (3.5, 4.5)]
    assert spans(t, "wait") == spans(t, "comm")
    assert [(i.op, i.label) for i in t.intervals if i.kind == "compute"] == [("launch", "mlp0"), ("launch", "mlp1")]
    assert [i.num_bytes for i in t.intervals if i.kind == "comm"] == [8, 0, 4]
    assert t.report().overlap_ratio == t.report().efficiency == 0.0


def test_the_last_piece_of_a_program_ends_it_and_marks_are_seen() -> None:
    clock = Clock()

    def program() -> comm.Steps[None]:
        clock.advance(1.0)
        yield comm.Mark(3)
        clock.advance(2.0)

    with comm.trace(clock=clock) as t:
        comm.interleave([program()])
    assert [(i.op, i.label, i.span) for i in t.intervals] == [("mark", "Mark(3)", (0.0, 1.0)), ("end", "", (1.0, 3.0))]


def test_nested_schedules_charge_the_program_that_computed() -> None:
    world = World()
    costs: dict[tuple[int, ...], Costs] = {(0, 0): [(1, 2), (3, 4)], (0, 1): [(5, 1)], (1,): [(7, 3), (2, 2), (1, 1)]}
    program = {path: world.program(cost) for path, cost in costs.items()}
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([comm.interleave_steps([program[0, 0], program[0, 1]]), program[1,]])
    for path, cost in costs.items():
        assert [(end - start) * RATE for start, end in spans(t, "compute", *path)] == [c for c, _ in cost]
        assert [(end - start) * RATE for start, end in spans(t, "comm", *path)] == [x for _, x in cost]
        assert len(spans(t, "wait", *path)) == len(cost)
    assert {i.program for i in t.intervals} == set(costs)


def test_a_run_inside_a_program_is_its_compute_but_not_while_it_waits() -> None:
    world = World()

    def program() -> comm.Steps[None]:
        world.clock.advance(1.0)
        comm.run(world.program([(4, 8)], "inner"))
        world.clock.advance(1.0)
        world.launch(4, "raw").wait()
        yield world.launch(4, "own")

    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([program()])
    assert spans(t, "compute", 0) == [(0.0, 1.0), (1.0, 2.0), (4.0, 5.0)]
    assert spans(t, "wait", 0) == [(2.0, 4.0), (5.0, 6.0), (6.0, 7.0)]
    assert [i.label for i in t.intervals if i.kind == "compute"] == ["own", "inner0", "own"]


def test_making_the_result_is_compute_of_the_program_that_launched() -> None:
    world = World()

    def finish(out: torch.Tensor) -> torch.Tensor:
        world.clock.advance(0.5)
        return out

    def program() -> comm.Steps[None]:
        yield world.launch(4, "sum").then(finish)

    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([program()])
    assert [(i.op, i.label, i.span) for i in t.intervals if i.kind == "compute"] == [("finish", "sum", (1.0, 1.5))]
    assert spans(t, "compute", 0) == [(1.0, 1.5)]


def test_without_a_link_the_end_is_that_of_the_future_or_else_of_the_wait() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t:
        world.group.future = torch.futures.Future()
        handle = world.launch(4)
        world.clock.advance(2.0)
        assert [i.kind for i in t.intervals] == []  # still under way
        world.group.future.set_result(None)
        world.clock.advance(3.0)
        handle.wait()
        world.group.future = None
        handle = world.launch(4)
        world.clock.advance(1.0)
        handle.wait()
    assert spans(t, "comm") == [(0.0, 2.0), (5.0, 6.0)]
    assert not any(i.simulated for i in t.intervals) and not t.report().simulated


def test_a_real_transfer_slower_than_its_link_ends_when_it_ends() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        world.group.future = torch.futures.Future()
        handle = world.launch(4)
        world.clock.advance(2.0)
        world.group.future.set_result(None)
        handle.wait()
    assert spans(t, "comm") == [(0.0, 2.0)]


def test_a_real_transfer_faster_than_its_link_ends_with_the_link() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        world.group.future = torch.futures.Future()
        handle = world.launch(4)
        world.clock.advance(0.5)
        world.group.future.set_result(None)
        handle.wait()
    assert spans(t, "comm") == [(0.0, 1.0)] and spans(t, "wait") == [(0.5, 1.0)]


def test_the_report() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([world.program([(4, 8), (4, 8)], "a"), world.program([(4, 8), (4, 8)], "b")])
    report = t.report()
    # compute 0-1, 1-2, 3-4, 5-6; transfers 1-3, 3-5, 5-7, 7-9
    assert (report.span_s, report.compute_s, report.comm_s, report.overlap_s) == (9.0, 4.0, 8.0, 3.0)
    assert report.overlap_ratio == 3 / 8 and report.efficiency == 3 / 4
    assert report.exposed_s == 1.0 + 1.0 + 1.0 + 2.0
    assert report.by_label["all_to_all", "b1"] == comm.Exposure(1.0, 2.0, 2.0)
    assert str(report).splitlines() == [
        "9000.000 ms: compute 4000.000 ms, communication 8000.000 ms (simulated link), mean of 1 rank(s)",
        "overlap ratio 0.375, efficiency 0.750, exposed 5000.000 ms",
        "at least 9000.000 ms on one compute stream and one link; 0.0% beyond it",
        "collective  label  calls   comm ms  exposed ms",
        "all_to_all  a0         1  2000.000    1000.000",
        "all_to_all  a1         1  2000.000    1000.000",
        "all_to_all  b0         1  2000.000    1000.000",
        "all_to_all  b1         1  2000.000    2000.000",
    ]


def test_the_report_of_a_serial_run_names_the_slots_that_hide_nothing() -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.run(world.program([(2, 1), (3, 2), (8, 8), (4, 1)], "mlp"))
    report = t.report()
    assert [(slot.label, slot.lost_s) for slot in report.worst(2)] == [("mlp2", 1.0), ("mlp1", 0.5)]
    assert (report.bound_s, report.tax) == (4.5, 7.25 / 4.5 - 1)
    assert str(report).splitlines()[2] == "at least 4500.000 ms on one compute stream and one link; 61.1% beyond it"
    assert str(report).splitlines()[-4:] == [
        "rank  program  slot beside  label  compute ms   comm ms  longer ms   took ms",
        "   0           all_to_all   mlp2     1000.000  2000.000   2000.000  3000.000",
        "   0           all_to_all   mlp1     2000.000   500.000   2000.000  2500.000",
        "   0           all_to_all   mlp0      750.000   250.000    750.000  1000.000",
    ]


def test_an_empty_trace_has_a_report_and_a_file(tmp_path: Path) -> None:
    with comm.trace() as t:
        pass
    report = t.report()
    assert (report.span_s, report.overlap_ratio, report.efficiency, report.num_ranks) == (0.0, 0.0, 0.0, 0)
    t.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["traceEvents"] == []


def test_the_file_for_trace_viewers(tmp_path: Path) -> None:
    world = World()
    with comm.trace(clock=world.clock) as t:  # without a link: transfers overlap until their waits
        comm.interleave([world.program([(4, 8)] * 2, name) for name in "abc"])
    t.save(tmp_path / "x.json")
    events = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    drawn = [e for e in events if e["ph"] == "X"]
    assert len(drawn) == len(t.intervals) and {e["pid"] for e in drawn} == {0}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0"}
    first = next(e for e in drawn if e["cat"] == "comm")
    assert (first["name"], first["ts"], first["dur"]) == ("a0", 1e6, 2e6)
    assert first["args"] == {
        "op": "all_to_all",
        "label": "a0",
        "program": [0],
        "launched_us": 1e6,
        "bytes": 8,
        "simulated": False,
    }
    for e in drawn:
        assert names[e["pid"], e["tid"]].startswith(e["cat"])
        lane = [o for o in drawn if o is not e and (o["pid"], o["tid"]) == (e["pid"], e["tid"])]
        assert all(o["ts"] + o["dur"] <= e["ts"] or e["ts"] + e["dur"] <= o["ts"] for o in lane)
    assert {"comm", "comm 2"} <= set(names.values())


def test_a_queued_transfer_knows_when_it_was_launched(tmp_path: Path) -> None:
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        handles = [world.launch(8, "a"), world.launch(4, "b")]
        for handle in handles:
            handle.wait()
    assert [(i.launched_s, *i.span) for i in t.intervals if i.kind == "comm"] == [(0.0, 0.0, 2.0), (0.0, 2.0, 3.0)]
    t.save(tmp_path / "x.json")
    events = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0 (simulated link)"}


def test_the_picture(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    world = World()
    with comm.trace(clock=world.clock) as t, world.link.on(world.group):
        comm.interleave([world.program([(4, 8), (4, 1)], f"layers.{name}.mlp.", marks=True) for name in (3, 7)])
    t.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # so that its text can be read
        t.plot(tmp_path / "x.svg", title="Two layers")
    text = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "x.svg").read_text())
    assert {"Two layers (simulated link)", "rank 0  compute", "rank 0  comm", "program 0", "program 1"} <= set(text)
    assert {" layer 3", " layer 7", "waiting", "all_to_all 0"} <= set(text)


def test_the_picture_of_an_empty_trace_and_of_a_measured_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    world = World()
    with comm.trace(clock=world.clock) as t:
        t.plot(tmp_path / "empty.png")
        comm.run(world.program([(4, 8)]))
    t.plot(tmp_path / "x.svg")


def test_the_innermost_trace_sees_and_an_error_leaves_it_whole() -> None:
    world = World()

    def failing() -> comm.Steps[None]:
        world.clock.advance(1.0)
        yield world.launch(4)
        world.clock.advance(1.0)
        raise ValueError("broken")

    with comm.trace(clock=world.clock) as outer:
        with comm.trace(clock=world.clock) as inner, pytest.raises(ValueError, match="broken"):
            comm.interleave([failing()])
        assert inner.program == () and current_trace() is outer
    assert current_trace() is None and outer.intervals == []
    assert spans(inner, "compute", 0) == [(0.0, 1.0), (1.0, 2.0)]


def two_programs(mesh: comm.DeviceMesh) -> tuple[comm.TraceReport, comm.TraceReport]:
    """Two real programs under 20 ms links: traced by rank, hidden where they computed, gathered on all ranks."""
    group = comm.groups(mesh).tp

    def program(name: str) -> comm.Steps[torch.Tensor]:
        x = torch.ones(3)
        for step in range(2):
            until = time.perf_counter() + 0.03
            while time.perf_counter() < until:
                x = x * 1.0
            x = yield from comm.all_reduce_steps(x, group=group, label=f"{name}{step}")
        return x

    link = comm.SimulatedLink(0.02, 1e9)
    with comm.trace() as t, link.on(group):
        results = comm.interleave([program("a"), program("b")])
    assert all(result.tolist() == [4.0] * 3 for result in results)
    whole = t.gather(group=group)
    assert {i.rank for i in whole.intervals} == {0, 1} and {i.rank for i in t.intervals} == {group.rank()}
    found = [i for i in t.intervals if i.kind == "comm"]
    assert [(i.program, i.label) for i in found] == [((0,), "a0"), ((1,), "b0"), ((0,), "a1"), ((1,), "b1")]
    assert all(i.simulated and i.num_bytes == 12 and i.end_s - i.start_s >= 0.02 - 1e-9 for i in found)
    report = whole.report()
    assert report.num_ranks == 2 and report.simulated
    assert report.compute_s >= 4 * 0.03 and report.comm_s >= 4 * 0.02 - 1e-9
    assert report.overlap_s >= 2 * 0.02  # at least what b0 and a1 compute beside, were all else unlucky
    return t.report(), report


def real_ends(mesh: comm.DeviceMesh) -> None:
    """Without a link a transfer ends when the slower rank has come, not when it is waited for."""
    group = comm.groups(mesh).tp
    comm.all_reduce(torch.ones(3), group=group)
    with comm.trace() as t:
        if group.rank() == 1:
            time.sleep(0.05)
        handle = comm.all_reduce_async(torch.ones(3), group=group, label="sum")
        until = time.monotonic() + 20
        while group.rank() == 0 and not handle.done() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)  # let the backend's thread say so
        handle.wait()
    (found,) = [i for i in t.intervals if i.kind == "comm"]
    (wait,) = [i for i in t.intervals if i.kind == "wait"]
    assert not found.simulated and found.start_s < found.end_s
    if group.rank() == 0:
        assert found.end_s < wait.start_s


def test_real_programs_on_a_simulated_link() -> None:
    (first, whole), (second, same) = run_mesh((2, 1), two_programs)
    assert whole == same
    for name in ("span_s", "compute_s", "comm_s", "overlap_s", "exposed_s"):
        mean = (getattr(first, name) + getattr(second, name)) / 2
        assert getattr(whole, name) == pytest.approx(mean, rel=1e-12)


def test_the_end_of_a_real_transfer_is_seen_without_waiting() -> None:
    run_mesh((2, 1), real_ends)
