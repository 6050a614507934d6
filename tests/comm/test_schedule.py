"""Programs by turns: order, marks and overlap on fakes; results on real ranks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import comm
from seqpar.comm import Mark, interleave, interleave_steps, run
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import run_mesh

Event = tuple[str, int, int]


class Fake:
    """A collective that only writes down when it was launched and waited for."""

    def __init__(self, log: list[Event], program: int, number: int) -> None:
        self.log, self.event = log, (program, number)
        log.append(("launch", *self.event))

    def wait(self) -> int:
        self.log.append(("wait", *self.event))
        return self.event[1]


def program(log: list[Event], index: int, layers: list[tuple[int, int]]) -> Generator[Any, Any, int]:
    """For each layer: some collectives, the append to the cache at a mark, some more; sums what it was sent."""
    total = number = 0
    for layer, (before, after) in enumerate(layers):
        for position in range(before + after + 1):
            if position == before:
                yield Mark(layer)
                log.append(("append", index, layer))
                continue
            log.append(("compute", index, number))
            got = yield Fake(log, index, number)
            assert got == number
            total, number = total + got, number + 1
    return total


@st.composite
def shapes(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Collectives before and after the mark of each layer, for each program: any numbers, also none."""
    counts = st.tuples(st.integers(0, 3), st.integers(0, 3))
    layers = draw(st.integers(0, 4))
    return draw(st.lists(st.lists(counts, min_size=layers, max_size=layers), min_size=1, max_size=4))


@given(shapes())
def test_appends_are_in_causal_order_however_often_programs_yield(shape: list[list[tuple[int, int]]]) -> None:
    log: list[Event] = []
    results = interleave([program(log, index, layers) for index, layers in enumerate(shape)])
    assert results == [run(program([], index, layers)) for index, layers in enumerate(shape)]
    for index in range(1, len(shape)):
        for layer in range(len(shape[0])):
            assert log.index(("append", index - 1, layer)) < log.index(("append", index, layer))


@given(shapes())
def test_every_program_runs_in_its_own_order_and_waits_for_all_it_launched(shape: list[list[tuple[int, int]]]) -> None:
    log: list[Event] = []
    interleave([program(log, index, layers) for index, layers in enumerate(shape)])
    for index, layers in enumerate(shape):
        serial: list[Event] = []
        run(program(serial, index, layers))
        assert [event for event in log if event[1] == index] == serial


@pytest.mark.parametrize("n", [2, 3, 4])
def test_equal_programs_wait_after_all_the_others_have_computed(n: int) -> None:
    log: list[Event] = []
    interleave([program(log, index, [(1, 2)] * 5) for index in range(n)])
    launches = [event for event in log if event[0] == "launch"]
    for event in launches[: -2 * n]:
        start, stop = log.index(event), log.index(("wait", *event[1:]))
        others = {e[1] for e in log[start:stop] if e[0] == "compute"}
        assert others == set(range(n)) - {event[1]}


@given(shapes(), shapes())
def test_schedules_nest(first: list[list[tuple[int, int]]], second: list[list[tuple[int, int]]]) -> None:
    """Programs that are schedules themselves: results, and appends in causal order over all of them."""
    layers = min(len(first[0]), len(second[0]))
    log: list[Event] = []
    shape = [parts[:layers] for parts in [*first, *second]]
    programs = [program(log, index, parts) for index, parts in enumerate(shape)]
    outer = interleave([interleave_steps(programs[: len(first)]), interleave_steps(programs[len(first) :])])
    assert [*outer[0], *outer[1]] == [run(program([], index, parts)) for index, parts in enumerate(shape)]
    for index in range(1, len(shape)):
        for layer in range(layers):
            assert log.index(("append", index - 1, layer)) < log.index(("append", index, layer))


def test_an_error_closes_every_program_and_waits_for_what_is_in_flight() -> None:
    log: list[Event] = []
    closed: list[str] = []

    def bystander() -> Generator[Any, Any, None]:
        try:
            yield Fake(log, 0, 0)
            yield Fake(log, 0, 1)
        finally:
            closed.append("bystander")

    def failing() -> Generator[Any, Any, None]:
        yield Fake(log, 1, 0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        interleave([bystander(), failing()])
    assert closed == ["bystander"] and ("wait", 0, 1) in log


def chunks(mesh: comm.DeviceMesh, cuts: list[int], window: int | None) -> None:
    """ISO by hand: chunks of ragged prompts through three layers, by turns, equal the whole in float64."""
    groups, q_lens, dim = comm.groups(mesh), (7, 1, 5), 4
    torch.manual_seed(3)
    oracles = [DecoderLayer(9, 6, 2, dim, 14).double() for _ in range(3)]
    heads = HeadMap(6, 2, *groups.layout)
    stack = [
        ParallelDecoderLayer.from_module(oracle, groups=groups, heads=heads, layer_index=i, window=window)
        for i, oracle in enumerate(oracles)
    ]
    kv = PagedKV(3, 9, 4, heads.kv_ranges[groups.flat.rank()].size, dim, dtype=torch.float64, device="cpu")
    kv.reserve(dict(enumerate(q_lens)))
    batch = kv.batch([0, 1, 2], q_lens)
    cos, sin = rope(batch.positions, dim)
    x = expected = torch.randn(13, 9, dtype=torch.float64)
    for oracle in oracles:
        expected = oracle(expected, q_lens, cos, sin, window)

    def chunk(start: int, part: RaggedBatch) -> comm.Steps[torch.Tensor]:
        rows = slice(start, start + part.num_tokens)
        mine = even_ranges(part.num_tokens, groups.sp.size())[groups.sp.rank()].shift(start)
        local = x[slice(*mine)]
        for layer in stack:
            local = yield from comm.call(layer, local, part, cos[rows], sin[rows], kv)
        torch.testing.assert_close(local, expected[slice(*mine)], rtol=1e-10, atol=1e-12)
        return local

    bounds = [0, *cuts, 13]
    with torch.no_grad(), comm.record() as sent:
        parts = zip(bounds, batch.split(cuts), strict=False)
        interleave([chunk(start, part) for start, part in parts])
    if groups.layout.size > 1:
        per_layer = 2 * (groups.layout.tp > 1) + 2 * (groups.layout.sp > 1)
        assert sent.total.calls == 3 * per_layer * (len(cuts) + 1)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)], ids=name_of)
@pytest.mark.parametrize("cuts", [[6], [2, 7], [3, 3, 8], [1, 7, 12]], ids=str)
def test_interleaved_chunks_equal_the_whole_prompt(layout: tuple[int, int], cuts: list[int]) -> None:
    run_mesh(layout, chunks, cuts, None)
    run_mesh(layout, chunks, cuts, 3)
