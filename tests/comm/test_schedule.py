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
from tests.comm.fakes import FakeGroup
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


Op = tuple[Any, ...]
GROUP = FakeGroup()  # rank 0 of two, of which the other sends what this one does


class Cache:
    """What programs append at their marks, and see of those before them."""

    def __init__(self, layers: int) -> None:
        self.appended: list[list[tuple[int, int]]] = [[] for _ in range(layers)]

    def append(self, layer: int, program: int, value: int) -> None:
        self.appended[layer].append((program, value))

    def seen(self, layer: int, program: int) -> int:
        """The sum of what this program and those before it have appended, all of them and nobody later."""
        programs, values = zip(*self.appended[layer], strict=True)
        assert sorted({*programs}) == list(range(program + 1)), (layer, program, programs)
        return sum(values)


def made_of(ops: list[Op], index: int, cache: Cache, layer: int = 0) -> Generator[Any, Any, int]:
    """A program of any operations on a number: compute, collectives by any algorithm, appends, schedules within."""
    state = index + 1
    for op, *args in ops:
        if op == "compute":
            state = state * 3 + args[0]
        elif op == "append":  # at one mark, or in parts between a mark that opens and one that closes
            for part in range(args[0]):
                yield Mark(layer, opens=part == 0, closes=part == args[0] - 1)
                cache.append(layer, index, state + part)
                if part < args[0] - 1:
                    state += yield from collective(args[1], state)
            state += cache.seen(layer, index)
            layer += 1
        elif op == "within":
            state += sum((yield from interleave_steps([made_of(part, index, cache, layer) for part in args[0]])))
        else:
            state = yield from collective(op, state)
        state %= 1009
    return state


def collective(op: str, state: int) -> Generator[Any, Any, int]:
    """A sum that each algorithm makes of one number on both ranks, in one handle, in two, or in none."""
    x = torch.tensor([state, 1])
    if op == "all_reduce":
        x = yield from comm.all_reduce_steps(x, group=GROUP)
    elif op == "two handles":
        part = yield from comm.reduce_scatter_steps(x, group=GROUP)
        x = yield from comm.all_gather_steps(part, group=GROUP)
    elif op == "all_to_all":
        x = yield from comm.all_to_all_steps(x, group=GROUP, send_sizes=[1, 1], recv_sizes=[1, 1])
    elif op == "broadcast":
        x = yield from comm.broadcast_steps(x, src=0, group=GROUP)
    return int(x.sum())


COLLECTIVES = ("all_reduce", "two handles", "all_to_all", "broadcast", "nothing sent")
compute = st.tuples(st.just("compute"), st.integers(0, 9))
sent = st.sampled_from(COLLECTIVES).map(lambda op: (op,))
plain = st.lists(compute | sent, max_size=4)
within = st.tuples(st.just("within"), st.lists(plain, min_size=2, max_size=3))
between = st.lists(compute | sent | within, max_size=4)
appends = st.tuples(st.just("append"), st.integers(1, 3), st.sampled_from(COLLECTIVES))


@st.composite
def batches(draw: st.DrawFn) -> list[list[Op]]:
    """Programs that append to the same layers, with anything before, between and after."""
    layers = draw(st.integers(0, 3))
    return [
        [op for _ in range(layers) for op in (*draw(between), draw(appends))] + draw(between)
        for _ in range(draw(st.integers(1, 4)))
    ]


@given(batches())
def test_any_programs_by_turns_give_what_they_give_one_after_another(programs: list[list[Op]]) -> None:
    """Whatever they do, however often they yield: the same results, the same appends, the same collectives."""
    layers = sum(op[0] == "append" for op in programs[0])
    found, counts, appended = [], [], []
    for drive in (interleave, lambda all_of_them: [run(each) for each in all_of_them]):
        cache = Cache(layers)
        with comm.record() as recorder:
            found.append(drive([made_of(ops, index, cache) for index, ops in enumerate(programs)]))
        counts.append(recorder.counts)
        appended.append(cache.appended)
    assert found[0] == found[1] and counts[0] == counts[1] and appended[0] == appended[1]


@given(batches(), batches())
def test_so_do_schedules_of_schedules(first: list[list[Op]], second: list[list[Op]]) -> None:
    """Two schedules as programs of one: the later sees in each layer what all of the earlier have appended."""
    layers = min(sum(op[0] == "append" for op in programs[0]) for programs in (first, second))
    programs = [only(ops, layers) for ops in [*first, *second]]
    found = []
    for nested in (True, False):
        cache = Cache(layers)
        runs = [made_of(ops, index, cache) for index, ops in enumerate(programs)]
        parts = [interleave_steps(runs[: len(first)]), interleave_steps(runs[len(first) :])]
        results = interleave(parts) if nested else [run(part) for part in parts]
        found.append(([*results[0], *results[1]], cache.appended))
    assert found[0] == found[1]


def only(ops: list[Op], layers: int) -> list[Op]:
    """The program up to its append to that many layers."""
    ends = [0, *(i + 1 for i, op in enumerate(ops) if op[0] == "append")]
    return ops[: ends[layers]]


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
