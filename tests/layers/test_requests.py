"""Two sets of requests as two programs: bit for bit the serial run, each set's exchanges under the other's compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import run_mesh, thinned

DIM, LAYERS = 4, 2
Step = dict[str, int]

# What two sets of requests do in one step after their prompts: decode, a prompt chunk beside decodes, or rest.
PROMPTS: tuple[Step, Step] = ({"a": 7, "b": 2}, {"c": 5, "d": 1, "e": 3})
STEPS: dict[str, tuple[Step, Step]] = {
    "decode": ({"a": 1, "b": 1}, {"c": 1, "d": 1, "e": 1}),
    "mixed": ({"a": 1, "f": 6, "b": 1}, {"c": 4, "e": 1}),
    "one": ({"a": 1}, {"e": 1}),
}


class Model:
    """A stack of decoder layers over one cache."""

    def __init__(self, mesh: comm.DeviceMesh, pipeline: ThreePhase | None = None) -> None:
        self.groups = comm.groups(mesh)
        self.heads = HeadMap(6, 3, *self.groups.layout)
        torch.manual_seed(3)
        oracles = [DecoderLayer(9, 6, 3, DIM, 14).double() for _ in range(LAYERS)]
        self.layers = [
            ParallelDecoderLayer.from_module(
                oracle, groups=self.groups, heads=self.heads, layer_index=i, pipeline=pipeline
            )
            for i, oracle in enumerate(oracles)
        ]
        kv_heads = self.heads.kv_ranges[self.groups.flat.rank()].size
        self.kv = PagedKV(LAYERS, 24, 3, kv_heads, DIM, dtype=torch.float64)

    def batch(self, step: Step) -> RaggedBatch:
        return self.kv.batch(list(step), list(step.values()))

    def steps(self, x: Tensor, batch: RaggedBatch) -> comm.Steps[Tensor]:
        """This rank's tokens of a batch through the stack."""
        tables = rope(batch.positions, DIM)
        local = x[slice(*even_ranges(len(x), self.groups.sp.size())[self.groups.sp.rank()])]
        for layer in self.layers:
            local = yield from comm.call(layer, local, batch, *tables, self.kv)
        return local


def serially(programs: list[comm.Steps[Tensor]]) -> list[Tensor]:
    return [comm.run(program) for program in programs]


def by_turns(programs: list[comm.Steps[Tensor]]) -> list[Tensor]:
    return comm.interleave(programs)


def unordered(programs: list[comm.Steps[Tensor]]) -> list[Tensor]:
    return comm.interleave(programs, ordered=False)


def outputs(
    mesh: comm.DeviceMesh, schedule: Callable[[list[comm.Steps[Tensor]]], list[Tensor]], kind: str, pipelined: bool
) -> list[Tensor]:
    """Prompts, then two steps of the same kind, each as two programs; everything that came out, and the cache."""
    model = Model(mesh, ThreePhase(2, 2, 0) if pipelined else None)
    out = []
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for pair in (PROMPTS, STEPS[kind], STEPS[kind]):
            xs = [torch.randn(sum(step.values()), 9, generator=generator, dtype=torch.float64) for step in pair]
            batches = [model.batch(step) for step in pair]
            out += schedule([model.steps(x, batch) for x, batch in zip(xs, batches, strict=True)])
    return out + [x.nan_to_num(-9.0) for layer in range(LAYERS) for x in model.kv.layer(layer)]


def same(mesh: comm.DeviceMesh, kind: str, pipelined: bool) -> None:
    expected = outputs(mesh, serially, kind, pipelined)
    for schedule in (by_turns, unordered):
        found = outputs(mesh, schedule, kind, pipelined)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", thinned([(2, 1), (1, 2), (2, 2), (1, 3)], ((2, 2),).__contains__), ids=name_of)
@pytest.mark.parametrize("kind", STEPS)
def test_two_batches_by_turns_equal_one_after_the_other_bit_for_bit(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, same, kind, False)
    if layout[1] > 1:
        run_mesh(layout, same, kind, True)


def turns(mesh: comm.DeviceMesh) -> list[tuple[int, ...]]:
    """Whose collectives a decode over a cache with heads sharded over sp launches, in order."""
    model = Model(mesh)
    with torch.no_grad():
        for step in PROMPTS:
            comm.run(model.steps(torch.ones(sum(step.values()), 9, dtype=torch.float64), model.batch(step)))
        batches = [model.batch(step) for step in STEPS["decode"]]
        with comm.trace() as t:
            unordered([model.steps(torch.ones(b.num_tokens, 9, dtype=torch.float64), b) for b in batches])
    sent = sorted((i.launched_s, i.program) for i in t.intervals if i.kind == "comm")
    waits = sorted((i.start_s, i.program) for i in t.intervals if i.kind == "wait")
    for launched, program in sent[:-1]:  # every exchange but the last has the other set's compute before its wait
        until = next(start for start, who in waits if who == program and start > launched)
        others = [i for i in t.intervals if i.kind == "compute" and i.program not in (program, ())]
        assert any(launched <= i.start_s < until for i in others)
    return [program for _, program in sent]


def test_one_sets_exchange_is_under_way_while_the_other_computes() -> None:
    """Two all-to-alls a layer for each set, in turns."""
    assert run_mesh((1, 2), turns) == [[(0,), (1,)] * 2 * LAYERS] * 2


def out_of_order(mesh: comm.DeviceMesh, pipelined: bool) -> None:
    """The second chunk of a prompt before the first: no key is read that is not there, on any rank."""
    model = Model(mesh, ThreePhase(2, 2, 0) if pipelined else None)
    first, second = model.batch({"a": 9}).split([4])
    x = torch.ones(5, 9, dtype=torch.float64)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"layer 0, request 'a': \d tokens promised\), got 0 appended; run programs in"),
    ):
        comm.run(model.steps(x, second))
    with torch.no_grad():
        outs = comm.interleave([model.steps(x[:4], first), model.steps(x, second)])
    assert all(out.isfinite().all() for out in outs)


def test_a_schedule_that_is_not_causal_is_refused() -> None:
    for pipelined in (False, True):
        run_mesh((1, 2), out_of_order, pipelined)
    run_mesh((2, 1), out_of_order, False)


def program(log: list[str], name: str, yields: int) -> comm.Steps[None]:
    class Ready:
        def wait(self) -> None:
            pass

    for layer in range(2):
        for _ in range(yields):
            log.append(name)
            yield Ready()  # type: ignore[misc]
        yield comm.Mark(layer)


def test_unrelated_programs_are_not_held_back() -> None:
    ordered: list[str] = []
    comm.interleave([program(ordered, "A", 4), program(ordered, "B", 1)])
    free: list[str] = []
    comm.interleave([program(free, "A", 4), program(free, "B", 1)], ordered=False)
    assert "".join(ordered) == "ABAAAABAAA" and "".join(free) == "ABABAAAAAA"


def test_unrelated_programs_open_and_close_marks_for_an_outer_schedule() -> None:
    """The set opens with whichever comes first and closes with whichever comes last, layer by layer."""
    items = [comm.Mark(0)] * 0
    steps = comm.interleave_steps([program([], "A", 3), program([], "B", 1)], ordered=False)
    value = None
    try:
        while True:
            item = steps.send(value)
            value = item.wait()
            if isinstance(item, comm.Mark):
                items.append(item)
    except StopIteration:
        pass
    assert [(m.layer, m.opens, m.closes) for m in items] == [
        (0, True, False),
        (1, True, False),
        (0, False, True),
        (1, False, True),
    ]
