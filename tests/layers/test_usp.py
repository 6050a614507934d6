"""Rows of Ulysses in a ring against one float64 process: every split of up to four ranks, bytes, what overlaps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from seqpar import comm, plan
from seqpar.kv import StripedKV
from seqpar.layers import CachedKV, RingAttention, USPAttention
from seqpar.partition import HeadMap, Striping
from seqpar.ragged import RaggedBatch
from tests.comm.fakes import Clock
from tests.kernels.own_errors import own_errors
from tests.layers.reference import attend
from tests.layers.test_ring import (
    DIM,
    HEADS,
    PAST,
    Case,
    Timed,
    compare,
    inputs,
    local,
    near,
    of_each,
    sinks_of,
    with_sinks,
)
from tests.ranks import run_mesh, thinned

CASES = [
    *(Case(placement, method) for placement in ("contiguous", "zigzag", "striped") for method in ("kv", "q")),
    Case("zigzag", "kv", "mha", past=PAST, window=9),
    Case("zigzag", "q", past=PAST, past_placement="contiguous"),
    Case("striped", "kv", past=PAST, interleave=2),
    Case("striped", "q", "mha", past=PAST, past_placement="zigzag", interleave=3, window=4),
    Case("zigzag", "kv", "mqa"),
    Case("contiguous", "q", "mqa", q_lens=(2, 1)),
    Case("zigzag", "kv", "fewer than ranks"),
    Case("striped", "q", "fewer than ranks", past=PAST),
    Case("zigzag", "q", q_lens=(0, 0)),
    Case("zigzag", "kv", q_lens=(1, 1, 1), past=(6, 0, 9)),
    Case("zigzag", "kv", q_lens=(300, 5), window=90),
]


@cache
def split(group: comm.ProcessGroup, columns: int) -> comm.SplitGroups:
    return comm.split_groups(group, columns)


def layer(case: Case, groups: comm.Groups, columns: int, **options: object) -> USPAttention:
    return USPAttention(
        HeadMap(*HEADS[case.heads]),
        DIM,
        groups=split(groups.sp, columns),
        method=case.method,
        placement=case.placement,
        interleave=case.interleave,
        window=case.window,
        **options,
    )


def all_equal(mesh: comm.DeviceMesh, columns: int, cases: list[Case]) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        if columns <= HEADS[case.heads][0]:
            try:
                compare(case, layer(case, groups, columns))
            except Exception as error:
                error.add_note(str(case))
                raise


GRIDS = [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4), (4, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(
    "grid", thinned(GRIDS, lambda grid: grid in ((1, 1), (3, 3), (4, 2))), ids=lambda g: f"{g[0]}by{g[1]}"
)
def test_equals_one_process_forward_and_backward(grid: tuple[int, int]) -> None:
    run_mesh((1, grid[0]), all_equal, grid[1], CASES if grid == (4, 2) else CASES[::2])


def low_precision(mesh: comm.DeviceMesh) -> None:
    for method in ("kv", "q"):
        case = Case(method=method, q_lens=(70, 9))
        near(case, layer(case, comm.groups(mesh), 2), torch.bfloat16)


def test_low_precision_merges_in_float32() -> None:
    run_mesh((1, 4), low_precision)


def as_a_ring(mesh: comm.DeviceMesh) -> None:
    """Rows of one rank are a ring, bit for bit; and tokens and cached ones lie as they do there in any split."""
    groups = comm.groups(mesh)
    for case in (Case(), Case("striped", "q", past=PAST, interleave=2)):
        core = layer(case, groups, 1)
        ring = RingAttention(
            HeadMap(6, 2),
            DIM,
            group=groups.sp,
            method=case.method,
            placement=case.placement,
            interleave=case.interleave,
        )
        batch, new, cached = local(case, core, inputs(case)[0])
        assert torch.equal(core(*new, batch, cached), ring(*new, batch, cached))
        assert torch.equal(layer(case, groups, 2).rows(batch), ring.rows(batch))
        assert core.order(batch, cached) == ring.order(batch, cached)


def test_rows_of_one_rank_are_a_ring() -> None:
    run_mesh((1, 2), as_a_ring)


def sharded(mesh: comm.DeviceMesh) -> None:
    """Rank 1 of tp 2 has query heads 3 to 5 and KV heads 1 and 2; a row of two ranks splits them 2 to 1."""
    groups = comm.groups(mesh)
    heads, tp_rank = HeadMap(6, 3, 2, 1), groups.tp.rank()
    core = USPAttention(heads, DIM, groups=split(groups.sp, 2), tp_rank=tp_rank)
    batch = RaggedBatch.prefill((13, 0, 7))
    torch.manual_seed(2)
    q, k, v = (torch.randn(20, h, DIM, dtype=torch.float64) for h in (6, 3, 3))
    wanted = torch.cat([attend(*x, None) for x in zip(*(t.split((13, 0, 7)) for t in (q, k, v)), strict=True)])
    rows, own, kv = core.rows(batch), slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    with comm.record() as sent:
        out = core(q[rows, own], k[rows, kv], v[rows, kv], batch)
    torch.testing.assert_close(out, wanted[rows, own], rtol=1e-11, atol=1e-12)
    volumes = plan.usp_volumes(core.grid(batch), "kv", heads=heads, head_dim=DIM, tp_rank=tp_rank, itemsize=8)
    assert sent.total.num_bytes == volumes[groups.sp.rank()]


def test_composes_with_tensor_parallel_heads() -> None:
    run_mesh((2, 2), sharded)


def volumes(mesh: comm.DeviceMesh, columns: int, cases: list[Case]) -> list[tuple[int, int]]:
    """Bytes that this rank sends forward and backward, which must be what `plan` says."""
    groups, found = comm.groups(mesh), []
    for case in cases:
        core = layer(case, groups, columns)
        batch, new, cached = local(case, core, inputs(case)[0])
        with comm.record() as there:
            out = core(*new, batch, cached)
        with comm.record() as back:
            out.sum().backward()
        options = {"heads": HeadMap(*HEADS[case.heads]), "head_dim": DIM, "itemsize": 8}
        grid = core.grid(batch, cached)
        for sent, backward in ((there, False), (back, True)):
            wanted = plan.usp_volumes(grid, case.method, **options, backward=backward)
            assert sent.total.num_bytes == wanted[groups.sp.rank()], (case, backward)
        found.append((there.by_op()["all_to_all"].num_bytes, there.by_op().get("send_recv", comm.Count()).num_bytes))
    return found


def test_bytes_are_those_of_the_plan() -> None:
    run_mesh((1, 4), volumes, 2, [CASES[i] for i in (0, 3, 5, 7, 9, 11, 13)])
    run_mesh((1, 3), volumes, 3, [CASES[i] for i in (2, 7, 10)])


def test_bytes_are_those_of_the_formulas() -> None:
    """24 tokens in 2 rows of 2: 6 a rank; 4 heads of 4 numbers in 8 bytes, two of them to the other rank of the row."""
    case = Case("contiguous", "kv", "mha", q_lens=(24,))
    unit = DIM * 8
    for rank, [(exchanged, ring)] in enumerate(run_mesh((1, 4), volumes, 2, [case])):
        assert exchanged == 6 * (2 + 2 * 2) * unit + 6 * 2 * unit
        assert ring == (12 * 2 * 2 * unit if rank < 2 else 0)  # the second row's keys are seen by nobody else


def drained(mesh: comm.DeviceMesh, columns: int) -> None:
    groups = comm.groups(mesh)
    for case in (Case(past=PAST), Case("striped", "q", window=5)):
        for flat in (True, False):
            oracle, sinks = sinks_of(case, groups, flat)
            with_sinks(case, layer(case, groups, columns, sinks=sinks), oracle, groups)


def test_sinks_are_added_once_with_gradients() -> None:
    run_mesh((1, 4), drained, 2)
    run_mesh((1, 2), drained, 2)


def coded(mesh: comm.DeviceMesh, wire: comm.Wire) -> None:
    """Near the plain layer, its bytes those of the plan, gradients of inputs that were rounded."""
    groups = comm.groups(mesh)
    for method in ("kv", "q"):
        case, sides = Case(method=method, past=PAST), []
        full, seeds = inputs(case, torch.float32)
        for choice in (wire, None):
            core = layer(case, groups, 2, wire=choice)
            batch, new, cached = local(case, core, full)
            with comm.record() as sent:
                out = core(*new, batch, cached)
            options = {"heads": HeadMap(6, 2), "head_dim": DIM, "itemsize": 4, "wire": choice}
            assert (
                sent.total.num_bytes == plan.usp_volumes(core.grid(batch, cached), method, **options)[groups.sp.rank()]
            )
            (out * torch.cat(seeds)[core.rows(batch)]).sum().backward()
            sides.append([out.detach(), *(x.grad for x in new)])
        for ours, plain in zip(*sides, strict=True):
            assert ours is not None and plain is not None
            assert 0 < float((ours - plain).norm() / plain.norm()) < {"int8": 0.03, "fp8": 0.12}[wire]


def test_a_wire_format_is_that_of_all_that_travels_forward() -> None:
    run_mesh((1, 4), coded, "int8")
    run_mesh((1, 4), coded, "fp8")


def chunked(mesh: comm.DeviceMesh) -> None:
    """A striped cache over the grid: what the layer's rows are it takes, and each chunk's prefix is read from it."""
    groups = comm.groups(mesh)
    striping = Striping(groups.sp.size(), 2)
    core = layer(Case("striped", "kv", interleave=2), groups, 2)
    kv = StripedKV(1, 12, striping.period * 2, 2, DIM, striping=striping, rank=groups.sp.rank(), dtype=torch.float64)
    torch.manual_seed(3)
    lens = {"a": 17, "b": 9}
    full = {name: [torch.randn(n, h, DIM, dtype=torch.float64) for h in (6, 2, 2)] for name, n in lens.items()}
    wanted = {name: attend(*qkv, None) for name, qkv in full.items()}
    done = dict.fromkeys(lens, 0)
    for step in ({"a": 6, "b": 0}, {"b": 8, "a": 7}, {"a": 4, "b": 1}):
        batch, spans = kv.batch(list(step), list(step.values())), [(r, done[r], done[r] + n) for r, n in step.items()]
        rows = core.rows(batch)
        q, k, v = (torch.cat([full[r][i][a:b] for r, a, b in spans])[rows] for i in range(3))
        kv.append_own(0, k, v, batch)
        old = [torch.cat([x[:n] for x, n in zip(each, kv.context(batch), strict=True)]) for each in of_each(kv, step)]
        cached = CachedKV.placed(*old, [done[r] for r in step], striping.ranks, "striped", interleave=2)
        out = core(q, k, v, batch, cached)
        torch.testing.assert_close(out, torch.cat([wanted[r][a:b] for r, a, b in spans])[rows], rtol=1e-11, atol=1e-12)
        done.update({r: b for r, _, b in spans})


def test_chunks_of_prompts_over_a_striped_cache() -> None:
    run_mesh((1, 4), chunked)


def overlapped(mesh: comm.DeviceMesh) -> tuple[float, float]:
    """Virtual seconds in all, and of compute: 32 tokens in 4 rows of one rank and in 2 rows of 2."""
    groups, found = comm.groups(mesh), []
    for columns in (1, 2):
        clock, case = Clock(), Case("zigzag", "kv", "mha", q_lens=(32,))
        link = comm.SimulatedLink(0.0, 100.0, clock=clock, sleep=clock.sleep)
        core = layer(case, groups, columns)
        batch, new, _ = local(case, core, inputs(case)[0])
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            Timed(clock, patch)
            with comm.trace(clock=clock) as t, link.on(core.groups.outer):
                core(*new, batch)
        found.append(clock.now_s - t.report().compute_s)
    return found[0], found[1]


def test_the_ring_between_rows_hides_under_attention() -> None:
    assert run_mesh((1, 4), overlapped) == [(0.0, 0.0)] * 4


def refusals(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    few = r"`groups` must have rows of at most as many ranks as the shard has query heads \(1\), got 2"
    with own_errors(), pytest.raises(ValueError, match=few):
        USPAttention(HeadMap(1, 1), DIM, groups=split(groups.sp, 2))
    with own_errors(), pytest.raises(ValueError, match=r"`window` must be at least 1 key or None, got 0"):
        USPAttention(HeadMap(4, 2), DIM, groups=split(groups.sp, 2), window=0)
    core = USPAttention(HeadMap(4, 2), DIM, groups=split(groups.sp, 2))
    q, kv = torch.ones(4, 4, DIM), torch.ones(4, 2, DIM)
    past = torch.ones(1, 2, DIM)
    with own_errors(), comm.record() as sent:
        with pytest.raises(ValueError, match=r"`q`, `k`, `v` must be \[4, 4, 4\], \[4, 2, 4\], \[4, 2, 4\]"):
            core(q[:3], kv, kv, RaggedBatch.prefill([8]))
        with pytest.raises(ValueError, match=r"`cached.held` must have the runs of 1 requests for each of 2 ranks"):
            core(q, kv, kv, RaggedBatch.build([8], [10]), CachedKV.placed(past, past, [2], 1, "contiguous"))
    assert sent.total.calls == 0


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_mesh((1, 2), refusals)


def broken(mesh: comm.DeviceMesh) -> None:
    """A program that is dropped in flight leaves nothing behind: the groups serve the next call."""
    groups = comm.groups(mesh)
    case = replace(CASES[8], heads="mha")
    core = layer(case, groups, 2)
    batch, new, cached = local(case, core, inputs(case)[0])
    with torch.no_grad():
        wanted = core(*new, batch, cached)
        for stop in range(4):
            program = core.steps(*new, batch, cached)
            item = next(program)
            for _ in range(stop):
                item = program.send(item.wait())
            program.close()
        assert torch.equal(core(*new, batch, cached), wanted)


def test_a_closed_program_leaves_nothing_in_flight() -> None:
    run_mesh((1, 4), broken)
