"""The replay of schedules: real decoder stacks pass it, and every edge of a doctored trace is seen to break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.comm import Interval, check_schedule
from seqpar.hf import parallelize
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer, name_modules
from seqpar.partition import HeadMap, Interleave, ThreePhase, even_ranges
from tests.hf.tiny import tiny_model
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import run_mesh, thinned

DIM = 4


def stack(mesh: comm.DeviceMesh, cuts: Sequence[int], extra: int | None = None) -> comm.Trace:
    """Chunks of two prompts through two layers by turns; the program `extra` communicates more often than others."""
    groups, q_lens = comm.groups(mesh), (9, 5)
    torch.manual_seed(3)
    heads = HeadMap(8, 4, *groups.layout)
    model = torch.nn.Module()
    model.layers = layers = torch.nn.ModuleList(
        ParallelDecoderLayer.from_module(DecoderLayer(9, 8, 4, DIM, 14), groups=groups, heads=heads, layer_index=i)
        for i in range(2)
    )
    name_modules(model)
    kv = PagedKV(2, 6, 4, heads.kv_ranges[groups.flat.rank()].size, DIM, device="cpu")
    kv.reserve(dict(enumerate(q_lens)))
    batch = kv.batch([0, 1], q_lens)
    cos, sin = rope(batch.positions, DIM)
    cos, sin, x = cos.float(), sin.float(), torch.randn(14, 9)

    def chunk(index: int, start: int, part: Any) -> comm.Steps[torch.Tensor]:
        rows = slice(start, start + part.num_tokens)
        local = x[slice(*even_ranges(part.num_tokens, groups.sp.size())[groups.sp.rank()].shift(start))]
        for layer in layers:
            if index == extra:
                for _ in range(3):
                    yield from comm.all_reduce_steps(torch.ones(5), group=groups.flat, label="extra")
            local = yield from comm.call(layer, local, part, cos[rows], sin[rows], kv)
        return local

    starts = [0, *cuts]
    with torch.no_grad(), comm.trace() as t:
        comm.interleave([chunk(i, *step) for i, step in enumerate(zip(starts, batch.split(cuts), strict=True))])
    return t


CUTS = {2: (6,), 3: (3, 10), 4: (3, 4, 11)}


def passes(mesh: comm.DeviceMesh, cuts: Sequence[int], extra: int | None) -> None:
    t = stack(mesh, cuts, extra)
    check_schedule(t)
    whole = t.gather(group=comm.groups(mesh).flat)
    check_schedule(whole)
    assert {i.program for i in whole.intervals} - {()} == {(i,) for i in range(len(cuts) + 1)}


@pytest.mark.parametrize("n", CUTS)
@pytest.mark.parametrize(
    "layout",
    thinned([(1, 1), (2, 1), (3, 1), (1, 2), (1, 4), (2, 2)], ((2, 1), (1, 2), (2, 2)).__contains__),
    ids=name_of,
)
def test_interleaved_stacks_keep_every_edge(layout: tuple[int, int], n: int) -> None:
    run_mesh(layout, passes, CUTS[n], None)
    run_mesh(layout, passes, CUTS[n], n - 1)
    run_mesh(layout, passes, CUTS[n], 0)


def generates(mesh: comm.DeviceMesh, options: dict[str, Any]) -> None:
    """A prompt in chunks and decodes of one program each, in one trace."""
    model = tiny_model("llama", dtype=torch.float32)
    with parallelize(model, mesh, overlap=Interleave(3, min_tokens=4), **options), comm.trace() as t:
        model.generate(torch.arange(12)[None], max_new_tokens=4, do_sample=False)
    check_schedule(t.gather(group=comm.groups(mesh).flat))


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_generation_keeps_every_edge(layout: tuple[int, int]) -> None:
    run_mesh(layout, generates, {})
    run_mesh(layout, generates, {"wire": "int8", "pipeline": ThreePhase(2, 2), "sequence_sharded": layout[0] > 1})


def unrelated(mesh: comm.DeviceMesh) -> None:
    """Programs that need none of each other's appends may overtake."""
    group = comm.groups(mesh).tp

    def program(before: int) -> comm.Steps[None]:
        for _ in range(before):
            yield from comm.all_reduce_steps(torch.ones(3), group=group)
        yield comm.Mark(0)
        yield from comm.all_reduce_steps(torch.ones(3), group=group)

    with comm.trace() as t:
        comm.interleave([program(2), program(0)], ordered=False)
    check_schedule(t, ordered=False)
    with pytest.raises(AssertionError, match=r"attention after append: program 1 on rank \d must attend at Mark\(0\)"):
        check_schedule(t)


def test_programs_without_an_order_may_overtake() -> None:
    run_mesh((2, 1), unrelated)


def recorded(mesh: comm.DeviceMesh) -> list[Interval]:
    return stack(mesh, CUTS[2]).gather(group=comm.groups(mesh).flat).intervals


@pytest.fixture(scope="module")
def trace() -> list[Interval]:
    """Two chunks through two layers on two ranks, with ISO's order: a_0 a_1 m_0 m_1."""
    return run_mesh((2, 1), recorded)[0]


Doctor = Callable[[list[Interval]], list[Interval]]
A, B = "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"


def find(intervals: list[Interval], kind: str, program: int, label: str, rank: int = 0) -> Interval:
    wanted = (kind, (program,), label, rank)
    ops = ("launch", "mark", "all_reduce")
    return next(i for i in intervals if (i.kind, i.program, i.label, i.rank) == wanted and i.op in ops)


def changed(intervals: list[Interval], *pairs: tuple[Interval, Interval | None]) -> list[Interval]:
    new = {id(old): after for old, after in pairs}
    return [after for i in intervals if (after := new.get(id(i), i)) is not None]


def swapped(intervals: list[Interval], one: Interval, other: Interval) -> list[Interval]:
    """Each at the time of the other."""
    times = [{"start_s": i.start_s, "end_s": i.end_s, "launched_s": i.launched_s} for i in (other, one)]
    return changed(intervals, (one, replace(one, **times[0])), (other, replace(other, **times[1])))


def swap_blocks_of_a_chunk(t: list[Interval]) -> list[Interval]:
    return swapped(t, find(t, "compute", 0, A), find(t, "compute", 0, B))


def swap_mlps_of_chunks(t: list[Interval]) -> list[Interval]:
    return swapped(t, find(t, "compute", 0, B), find(t, "compute", 1, B))


def sum_before_its_block(t: list[Interval]) -> list[Interval]:
    x, early = find(t, "comm", 1, A), find(t, "compute", 1, A).start_s - 1e-6
    return changed(t, (x, replace(x, launched_s=early, start_s=early)))


def sum_after_its_users(t: list[Interval]) -> list[Interval]:
    x, m = find(t, "comm", 1, A), find(t, "compute", 1, B)
    return changed(t, (x, replace(x, end_s=m.end_s)))


def compute_before_its_sum(t: list[Interval]) -> list[Interval]:
    """The MLP of chunk 1 begins while its attention's sum is under way, when chunk 0 has launched its own."""
    wait, m = find(t, "wait", 1, A), find(t, "compute", 1, B)
    between = [i for i in t if i.kind == "compute" and i.rank == 0 and wait.start_s < i.start_s < m.start_s]
    early = replace(m, start_s=wait.start_s, end_s=wait.end_s)
    return changed(t, (m, early), *((i, None) for i in between))


def chunks_in_the_other_order(t: list[Interval]) -> list[Interval]:
    return [replace(i, program=(1 - i.program[0],)) if i.rank == 1 and i.program else i for i in t]


def no_append(t: list[Interval]) -> list[Interval]:
    return changed(t, (find(t, "compute", 0, "Mark(1)", 1), None))


def wait_at_once(t: list[Interval]) -> list[Interval]:
    """As a serial schedule would."""
    x, wait = find(t, "comm", 0, A), find(t, "wait", 0, A)
    at = find(t, "compute", 0, A).end_s
    return changed(t, (x, replace(x, end_s=at)), (wait, replace(wait, start_s=at)))


def no_wait(t: list[Interval]) -> list[Interval]:
    return changed(t, (find(t, "wait", 1, B), None))


def wait_too_early(t: list[Interval]) -> list[Interval]:
    wait, x = find(t, "wait", 0, B), find(t, "comm", 0, B)
    return changed(t, (wait, replace(wait, start_s=x.launched_s - 1e-6)))


def no_sum(t: list[Interval]) -> list[Interval]:
    return changed(t, (find(t, "comm", 0, B), None))


def no_compute(t: list[Interval]) -> list[Interval]:
    return changed(t, (find(t, "compute", 0, B), None))


def late_launch(t: list[Interval]) -> list[Interval]:
    """In the compute of the other chunk."""
    x, late = find(t, "comm", 0, A), find(t, "compute", 1, A).start_s
    return changed(t, (x, replace(x, launched_s=late, start_s=late, end_s=max(late, x.end_s))))


def computes_overlap(t: list[Interval]) -> list[Interval]:
    one, other = find(t, "compute", 0, A), find(t, "compute", 1, A)
    return changed(t, (one, replace(one, end_s=other.end_s)))


def another_order_on_rank_1(t: list[Interval]) -> list[Interval]:
    one, other = find(t, "comm", 0, A, 1), find(t, "comm", 1, A, 1)
    return changed(t, (one, replace(one, label=B)), (other, replace(other, label=A)))


def one_launch_less_on_rank_1(t: list[Interval]) -> list[Interval]:
    last = max(i.number for i in t)
    return [i for i in t if i.rank == 0 or last not in (i.number, i.after)]


EDGES: dict[Doctor, str] = {
    swap_blocks_of_a_chunk: r"compute after its collective: .*`layers.1.mlp.down_proj` of program 0 on rank 0",
    swap_mlps_of_chunks: r"compute after its collective: .*`layers.1.mlp.down_proj` of program 1 on rank 0",
    sum_before_its_block: r"launch after compute: .*`layers.1.self_attn.o_proj`.* of program 1 on rank 0",
    sum_after_its_users: r"wait until the end: `all_reduce` of `layers.1.self_attn.o_proj`.* of program 1 on rank 0",
    compute_before_its_sum: r"compute after its collective: compute up to launch `layers.1.mlp.down_proj` of program "
    r"1 on rank 0 must go on after `all_reduce` of `layers.1.self_attn.o_proj` \(launch \d+\) has arrived",
    chunks_in_the_other_order: r"attention after append: program 1 on rank 1 must attend at Mark\(0\) after program 0",
    no_append: r"attention after append: program 1 on rank 1 must attend at Mark\(1\) after program 0 has appended",
    wait_at_once: r"launch before the others' compute: `all_reduce` of `layers.1.self_attn.o_proj` \(launch \d+\) of "
    r"program 0 on rank 0 must be in flight while program 1 computes",
    no_wait: r"wait for every launch: `all_reduce` of `layers.1.mlp.down_proj` \(launch \d+\) of program 1 on rank 0",
    wait_too_early: r"wait after launch: `all_reduce` of `layers.1.mlp.down_proj` .* of program 0 on rank 0",
    no_sum: r"wait after launch: `all_reduce` of `layers.1.mlp.down_proj` .* of program 0 on rank 0 must be launched",
    no_compute: r"launch after compute: `all_reduce` of `layers.1.mlp.down_proj` .* of program 0 on rank 0",
    late_launch: r"launch after compute: `all_reduce` of `layers.1.self_attn.o_proj` .* of program 0 on rank 0",
    computes_overlap: r"one compute at a time: .* on rank 0 must go on after compute .*`layers.1.self_attn.o_proj`",
    another_order_on_rank_1: r"one order on all ranks: launch \d+ must be the same on rank 0 and rank 1, got "
    r"`all_reduce` of `layers.1.self_attn.o_proj` .* and `all_reduce` of `layers.1.mlp.down_proj`",
    one_launch_less_on_rank_1: r"one order on all ranks: launch \d+ must be the same .* of program 1 and nothing",
}


def trace_of(intervals: list[Interval]) -> comm.Trace:
    found = comm.Trace()
    found._intervals = intervals
    return found


@pytest.mark.parametrize("doctor", EDGES, ids=lambda doctor: doctor.__name__)
def test_an_edge_that_does_not_hold_is_named(trace: list[Interval], doctor: Doctor) -> None:
    check_schedule(trace_of(trace))
    with pytest.raises(AssertionError, match=EDGES[doctor]):
        check_schedule(trace_of(doctor(trace)))
