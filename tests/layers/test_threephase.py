"""The three-phase pipeline against plain Ulysses and one float64 process; what is in flight when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import PipelinedUlysses, UlyssesAttention
from seqpar.partition import HeadMap, Layout, even_ranges
from seqpar.ragged import RaggedBatch
from tests.comm.fakes import Clock
from tests.kernels.own_errors import own_errors
from tests.layers.reference import attend, name_of, rope, rotate
from tests.ranks import SMALL, run_mesh, thinned

DIM = 4


@dataclass(frozen=True)
class Case:
    """Heads, parts and requests; ids read `h8g2-2x3` for 8 query and 2 KV heads in 2 groups by 3 chunks."""

    num_heads: int
    num_kv_heads: int
    head_groups: int = 2
    query_chunks: int = 2
    q_lens: tuple[int, ...] = (9, 0, 1, 5)
    window: int | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f"-w{self.window}"
        return (
            f"h{self.num_heads}g{self.num_kv_heads}-{self.head_groups}x{self.query_chunks}-t{sum(self.q_lens)}{window}"
        )


CASES = [
    Case(8, 8),
    Case(8, 4, 4, 3),
    Case(6, 1, 2, 4, window=3),
    Case(5, 5, 2, 1),
    Case(14, 2, 3, 2, q_lens=(3, 0, 4)),
    Case(8, 4, 2, 5, q_lens=(1, 1)),
    Case(12, 6, 1, 3, q_lens=(7, 8), window=5),
]
LAYOUTS = [(1, 2), (1, 3), (2, 2), (1, 4), (2, 1)]


def cores(case: Case, groups: comm.Groups, **options: Any) -> tuple[PipelinedUlysses, UlyssesAttention, HeadMap]:
    """The pipeline and the plain layer."""
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    options |= {"group": groups.sp, "tp_rank": groups.tp.rank(), "window": case.window}
    ours = PipelinedUlysses(heads, DIM, head_groups=case.head_groups, query_chunks=case.query_chunks, **options)
    return ours, UlyssesAttention(heads, DIM, **options), heads


def tensors(case: Case, total: int) -> list[Tensor]:
    return [torch.randn(total, h, DIM, dtype=torch.float64) for h in (case.num_heads, *[case.num_kv_heads] * 2)]


def trained(mesh: comm.DeviceMesh, case: Case) -> None:
    """Outputs and gradients without a cache, with rotary embedding and q/k norms, against one process."""
    groups = comm.groups(mesh)
    torch.manual_seed(1)
    norms = {name: nn.RMSNorm(DIM, dtype=torch.float64) for name in ("q_norm", "k_norm")}
    ours, _, heads = cores(case, groups, **norms)
    total = sum(case.q_lens)
    full = [x.requires_grad_() for x in tensors(case, total)]
    seed = torch.randn(total, case.num_heads, DIM, dtype=torch.float64)
    batch = RaggedBatch.prefill(case.q_lens)
    cos, sin = rope(batch.positions, DIM)
    tokens = slice(*even_ranges(total, groups.sp.size())[groups.sp.rank()])
    tp_rank = groups.tp.rank()
    q_rows, kv_rows = slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    q, k = (rotate(norms[f"{name}_norm"](x), cos, sin) for name, x in zip("qk", full, strict=False))
    parts = zip(*(x.split(case.q_lens) for x in (q, k, full[2])), strict=True)
    expected = torch.cat([attend(*part, case.window) for part in parts])
    (expected[:, q_rows] * seed[:, q_rows]).sum().backward()
    rows = (q_rows, kv_rows, kv_rows)
    local = [x.detach()[tokens, r].clone().requires_grad_() for x, r in zip(full, rows, strict=True)]
    out = ours(ours.pack(*local), batch, cos, sin)
    torch.testing.assert_close(out, expected[tokens, q_rows].flatten(1), rtol=1e-11, atol=1e-12)
    (out * seed[tokens, q_rows].flatten(1)).sum().backward()
    for mine, theirs, r in zip(local, full, rows, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad[tokens, r], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_forward_and_backward(case: Case, layout: tuple[int, int]) -> None:
    if case.num_heads >= layout[0] * layout[1]:
        run_mesh(layout, trained, case)


def cached(mesh: comm.DeviceMesh, case: Case, other: tuple[int, int] | None) -> None:
    """Ragged steps over a paged cache, prefixes and decodes mixed: the same output and the same cache as plain."""
    groups = comm.groups(mesh)
    ours, plain, heads = cores(case, groups, layer_index=1)
    layout = None
    if other is not None:
        layout, groups = Layout(*other), comm.groups(comm.init_mesh(*other, device="cpu"))
        for core in (ours, plain):
            core.add_layout(layout, group=groups.sp)
        heads = heads.on(layout)
    size = heads.kv_ranges[groups.flat.rank()].size
    caches = [PagedKV(2, 24, 3, size, DIM, dtype=torch.float64) for _ in range(2)]
    tp_rank, width = groups.tp.rank(), heads.width(groups.tp.rank()) * DIM
    torch.manual_seed(2)
    for step in (case.q_lens, (3, 2, 0, 1)[: len(case.q_lens)], (1,) * len(case.q_lens)):
        qkv = torch.randn(sum(step), heads.tp, width, dtype=torch.float64)[:, tp_rank]
        mine = slice(*even_ranges(sum(step), groups.sp.size())[groups.sp.rank()])
        outs = []
        for core, kv in zip((ours, plain), caches, strict=True):
            batch = kv.batch(range(len(step)), step)
            cos, sin = rope(batch.positions, DIM)
            with torch.no_grad():
                outs.append(core(qkv[mine], batch, cos, sin, kv, layout=layout))
            kv.read(1, batch)
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)
    for a, b in zip(caches[0].layer(1), caches[1].layer(1), strict=True):
        assert torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_plain_ulysses_over_a_cache(case: Case, layout: tuple[int, int]) -> None:
    if case.num_heads >= layout[0] * layout[1]:
        run_mesh(layout, cached, case, None)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_other_layouts_of_the_same_ranks(case: Case) -> None:
    run_mesh((1, 4), cached, case, (2, 2))
    run_mesh((1, 2), cached, case, (2, 1))


def order(mesh: comm.DeviceMesh) -> tuple[list[str], int, int]:
    """What is launched before anything is waited for, as heads x tokens received; yields in all; collectives."""
    groups = comm.groups(mesh)
    core, _, _ = cores(Case(8, 4, 2, 2), groups)
    batch = RaggedBatch.prefill([12])
    qkv = torch.randn(6, 16 * DIM)
    launched: list[str] = []
    with comm.record() as sent, comm.trace() as t, torch.no_grad():
        program = core.steps(qkv, batch)
        item = next(program)
        first = sent.total.calls
        launched = [f"{i.num_bytes // 4 // DIM}" for i in t._transfers]  # type: ignore[attr-defined]
        items = [item]
        try:
            while True:
                items.append(program.send(items[-1].wait()))
        except StopIteration:
            pass
    marks = [i for i in items if isinstance(i, comm.Mark)]
    assert [(m.opens, m.closes) for m in marks] == [(True, False), (False, True)]
    assert sent.total.calls == 8 + 4 and len(items) == 12 + 2
    return launched, first, len(items)


def test_all_ways_in_are_launched_at_once_keys_first() -> None:
    """Of 6 local tokens: K and V of one head to the other rank, two query heads of 3 tokens a chunk."""
    assert run_mesh((1, 2), order) == [(["6", "6", "6", "6"] * 2, 8, 14)] * 2


def counts(mesh: comm.DeviceMesh, head_groups: int, heads: tuple[int, int], tokens: int) -> int:
    core, _, _ = cores(Case(*heads, head_groups, 2), comm.groups(mesh))
    core.pipeline = type(core.pipeline)(head_groups, 2, min_tokens=8)
    width = HeadMap(*heads, *comm.groups(mesh).layout).width(0) * DIM
    mine = even_ranges(tokens, 3)[comm.groups(mesh).sp.rank()].size
    with comm.record() as sent, torch.no_grad():
        core(torch.randn(mine, width), RaggedBatch.prefill([tokens]))
    return sent.total.calls


def test_every_rank_launches_as_many_collectives_whatever_heads_it_has() -> None:
    """5 heads on 3 ranks: the last has one KV head, and sends and receives nothing for its second part."""
    assert run_mesh((1, 3), counts, 2, (5, 5), 9) == [2 * (2 + 2 + 2)] * 3
    assert run_mesh((1, 3), counts, 4, (6, 1), 9) == [2 + 2 + 2] * 3
    assert run_mesh((1, 3), counts, 2, (5, 5), 7) == [2] * 3  # below the gate


def interleaved(mesh: comm.DeviceMesh, cuts: list[int]) -> None:
    """Chunks of a ragged step as programs by turns, each of them a pipeline: what plain Ulysses gives for the whole."""
    groups = comm.groups(mesh)
    ours, plain, heads = cores(Case(8, 4, 2, 2), groups)
    q_lens, size = (7, 1, 6), heads.kv_ranges[groups.flat.rank()].size
    caches = [PagedKV(1, 9, 4, size, DIM, dtype=torch.float64) for _ in range(2)]
    torch.manual_seed(3)
    first, second = (torch.randn(n, heads.width(groups.tp.rank()) * DIM, dtype=torch.float64) for n in (3, 14))
    split = even_ranges(3, groups.sp.size())[groups.sp.rank()]
    with torch.no_grad():
        for core, kv in zip((ours, plain), caches, strict=True):
            core(first[slice(*split)], kv.batch(["a", "b"], [2, 1]), kv=kv)
        batch, bounds = caches[0].batch(["a", "b", "c"], q_lens), [0, *cuts, 14]
        programs = []
        for start, part in zip(bounds, batch.split(cuts), strict=False):
            rows = even_ranges(part.num_tokens, groups.sp.size())[groups.sp.rank()].shift(start)
            programs.append(ours.steps(second[slice(*rows)], part, kv=caches[0]))
        outs = comm.interleave(programs)
        mine = slice(*even_ranges(14, groups.sp.size())[groups.sp.rank()])
        expected = plain(second[mine], caches[1].batch(["a", "b", "c"], q_lens), kv=caches[1])
    whole = comm.all_gather(expected, group=groups.sp, sizes=[r.size for r in even_ranges(14, groups.sp.size())])
    for out, start, stop in zip(outs, bounds, bounds[1:], strict=False):
        rows = even_ranges(stop - start, groups.sp.size())[groups.sp.rank()].shift(start)
        torch.testing.assert_close(out, whole[slice(*rows)], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cuts", [[7], [2, 9], [1, 7, 13]], ids=str)
def test_pipelines_nest_in_schedules(cuts: list[int]) -> None:
    run_mesh((1, 2), interleaved, cuts)
    run_mesh((2, 2), interleaved, cuts)


def wired(mesh: comm.DeviceMesh) -> None:
    """Every head is encoded by itself, so parts are rounded as the whole is."""
    groups = comm.groups(mesh)
    heads = HeadMap(8, 4, *groups.layout)
    both = [cls(heads, 32, group=groups.sp, wire="int8") for cls in (PipelinedUlysses, UlyssesAttention)]
    qkv = torch.randn(8, 16 * 32)
    with torch.no_grad():
        outs = [core(qkv, RaggedBatch.prefill([9, 7])) for core in both]
    torch.testing.assert_close(outs[0], outs[1], rtol=0.02, atol=0.02)


def test_wire_formats_apply_to_parts() -> None:
    run_mesh((1, 2), wired)


class Costly(nn.Module):
    """A norm that changes nothing and takes time for every head of every token: attention, as the clock sees it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.advance(float(x.shape[0] * x.shape[1]))
        return x


def timed(mesh: comm.DeviceMesh, rate: float) -> tuple[float, float]:
    """Seconds of virtual time of the plain layer and of the pipeline, on a link of no latency.

    On each of two ranks attention takes 8 tokens * 4 heads = 32 s; at a rate of one head of one token a second the
    link takes 4 * (4 + 2 + 2) = 32 s for the ways in and 16 s for the ways back.
    """
    groups, seconds = comm.groups(mesh), []
    for cls in (UlyssesAttention, PipelinedUlysses):
        clock = Clock()
        link = comm.SimulatedLink(0.0, rate * DIM * 4, clock=clock, sleep=clock.sleep)
        core = cls(HeadMap(8, 4, *groups.layout), DIM, group=groups.sp, q_norm=Costly(clock))
        with torch.no_grad(), link.on(groups.sp):
            core(torch.randn(4, 16 * DIM), RaggedBatch.prefill([8]))
        seconds.append(clock.now_s)
    return seconds[0], seconds[1]


def test_overlap_reaches_the_bound_in_virtual_time() -> None:
    """4 parts, each 8 s of attention; ways in of 4 (K), 4 (Q), 4 (V), 4 (Q) tokens * heads, ways back of 4."""
    cases = {
        48 / 32: (64, 8 / 1.5 + 32 + 4 / 1.5),  # the first K and Q, all attention, the last way back
        48 / 64: (96, 64),  # a slow link hides all attention but its own last part's: it is never idle
        15.0: (32 + 3.2, 8 / 15 + 32 + 4 / 15),  # a fast one leaves its ends exposed alone
    }
    for rate, expected in cases.items():
        assert run_mesh((1, 2), timed, rate) == [pytest.approx(expected)] * 2


def bits(mesh: comm.DeviceMesh, dtype: torch.dtype, window: int | None) -> None:
    """Pieces of 64 tokens and more, without a cache and after a cached prefix, against the plain layer."""
    groups = comm.groups(mesh)
    heads = HeadMap(8, 4, *groups.layout)
    both = [
        UlyssesAttention(heads, 16, group=groups.sp, window=window),
        PipelinedUlysses(heads, 16, group=groups.sp, head_groups=2, query_chunks=2, window=window),
    ]
    torch.manual_seed(4)
    steps = [torch.randn(n, heads.width(0) * 16, dtype=dtype) for n in (256, 512)]
    outs = []
    for core in both:
        kv = PagedKV(1, 4, 256, core.num_kv_heads, 16, dtype=dtype)
        for qkv in steps:
            mine = slice(*even_ranges(len(qkv), groups.sp.size())[groups.sp.rank()])
            with torch.no_grad():
                outs.append(core(qkv[mine], kv.batch(["a"], [len(qkv)]), kv=kv))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_bits_on_a_deterministic_mesh(dtype: torch.dtype) -> None:
    run_mesh((1, 2), bits, dtype, None, deterministic=True)
    run_mesh((1, 2), bits, dtype, 100, deterministic=True)


def broken(mesh: comm.DeviceMesh) -> None:
    """An error midway, or a closed program, leaves nothing in flight: the group serves the next call."""
    groups = comm.groups(mesh)
    core, plain, _ = cores(Case(8, 4, 2, 2), groups)
    batch, qkv = RaggedBatch.prefill([12]), torch.randn(6, 16 * DIM)
    waited: list[str] = []
    for failing in (True, False):
        with torch.no_grad(), comm.trace() as t:
            program = core.steps(qkv, batch)
            item = next(program)
            if failing:
                core.window = 0
                with pytest.raises(ValueError, match="`window` must be at least 1") as error:
                    while True:
                        item = program.send(item.wait())
                core.window = None
            else:
                program.close()
            waited = [i.op for i in t.intervals if i.kind == "wait"]
        assert len(waited) == 8
        assert not failing or error.tb  # which keeps alive what the program held: nothing is closed by being dropped
    with torch.no_grad():
        torch.testing.assert_close(core(qkv, batch), plain(qkv, batch))


def test_nothing_stays_in_flight_after_an_error() -> None:
    run_mesh((1, 2), broken)


def refusals(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    heads = HeadMap(4, 4, *groups.layout)
    for wrong in ({"head_groups": 0}, {"head_groups": 1, "query_chunks": 1}, {"query_chunks": -2}):
        with pytest.raises(ValueError, match="`head_groups` and `query_chunks` must be at least 1, and one of them 2"):
            PipelinedUlysses(heads, DIM, group=groups.sp, **wrong)
    core = PipelinedUlysses(heads, DIM, group=groups.sp)
    batch = RaggedBatch.prefill([8])
    with own_errors(), comm.record() as sent:
        with pytest.raises(ValueError, match=r"`qkv` must have shape \[4, 48\]"):
            core(torch.ones(3, 48), batch)
        with pytest.raises(ValueError, match=r"`layout` must be one of \(.*, got"):
            core(torch.ones(4, 48), batch, layout=Layout(2, 1))
        with pytest.raises(ValueError, match="`cos` and `sin` must be given together"):
            core(torch.ones(4, 48), batch, cos=torch.ones(8, DIM))
    assert sent.total.calls == 0


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_mesh((1, 2), refusals)
