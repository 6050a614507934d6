"""Ring attention against one float64 process: every placement, both methods, gradients, bytes, what overlaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm, plan
from seqpar.kernels.quantize import decode, encode
from seqpar.kv import StripedKV
from seqpar.layers import CachedKV, HeadParameter, RingAttention, sync_gradients
from seqpar.layers import ring as ring_module
from seqpar.partition import HeadMap, Placement, Striping, place_tokens
from seqpar.ragged import RaggedBatch
from tests.comm.fakes import Clock
from tests.kernels.own_errors import own_errors
from tests.layers.reference import attend
from tests.ranks import run_mesh

DIM = 4
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1), "fewer than ranks": (2, 1)}


@dataclass(frozen=True)
class Case:
    """Requests, heads, and where their new and cached tokens lie; ids read `zigzag-kv-gqa-w5-past`."""

    placement: Placement = "zigzag"
    method: str = "kv"
    heads: str = "gqa"
    q_lens: tuple[int, ...] = (13, 0, 1, 6)
    past: tuple[int, ...] = (0, 0, 0, 0)
    past_placement: Placement = "striped"
    interleave: int = 1
    window: int | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f"-w{self.window}"
        past = f"-{self.past_placement} past" if any(self.past) else ""
        tokens = "" if sum(self.q_lens) == 20 else f"-t{sum(self.q_lens)}"
        return f"{self.placement}{self.interleave}-{self.method}-{self.heads}{tokens}{window}{past}"


PAST = (5, 3, 0, 11)
CASES = [
    *(
        Case(placement, method, window=window)
        for placement in ("contiguous", "zigzag", "striped")
        for method in ("kv", "q")
        for window in (None, 5)
    ),
    *(Case("zigzag", method, past=PAST, window=window) for method in ("kv", "q") for window in (None, 9)),
    Case("contiguous", "kv", past=PAST, past_placement="contiguous"),
    Case("striped", "q", past=PAST, past_placement="zigzag", interleave=3, window=4),
    Case("striped", "kv", past=PAST, interleave=2),
    *(Case("zigzag", method, heads) for method in ("kv", "q") for heads in ("mha", "mqa", "fewer than ranks")),
    Case("zigzag", "kv", q_lens=(2, 1)),
    Case("zigzag", "q", q_lens=(0, 0)),
    Case("contiguous", "q", q_lens=(2, 1)),
    Case("striped", "kv", q_lens=(300, 5), window=200),
    Case("zigzag", "q", q_lens=(300, 5), window=90),
    Case("zigzag", "kv", q_lens=(1, 1, 1), past=(6, 0, 9)),
]


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[list[Tensor]], list[Tensor]]:
    """For each request q of its new tokens and k, v of all; and the gradient of its output."""
    torch.manual_seed(1)
    heads, kv_heads = HEADS[case.heads]
    full, seeds = [], []
    for new, old in zip(case.q_lens, case.past, strict=False):
        shapes = [(new, heads), (old + new, kv_heads), (old + new, kv_heads)]
        full.append([torch.randn(*shape, DIM, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes])
        seeds.append(torch.randn(new, heads, DIM, dtype=torch.float64).to(dtype))
    return full, seeds


def expected(case: Case, full: list[list[Tensor]], sinks: Tensor | None = None) -> list[Tensor]:
    """Attention of each request in one process; queries are those of its last tokens."""
    outs = []
    for q, k, v in full:
        old = len(k) - len(q)
        outs.append(attend(torch.cat([q.new_zeros(old, *q.shape[1:]), q]), k, v, case.window, sinks)[old:])
    return outs


def layer(case: Case, groups: comm.Groups, **options: Any) -> RingAttention:
    heads = HeadMap(*HEADS[case.heads])
    return RingAttention(
        heads,
        DIM,
        group=groups.sp,
        method=case.method,
        placement=case.placement,
        interleave=case.interleave,
        window=case.window,
        **options,
    )


def local(
    case: Case, core: RingAttention, full: list[list[Tensor]]
) -> tuple[RaggedBatch, list[Tensor], CachedKV | None]:
    """This rank's q, k, v, leaves of their own, and its cached keys and values."""
    past = case.past[: len(case.q_lens)]
    batch = RaggedBatch.build(case.q_lens, [a + b for a, b in zip(case.q_lens, past, strict=True)])
    rows, rank, ranks = core.rows(batch), core.group.rank(), core.group.size()
    new = [torch.cat([x[i][len(x[i]) - len(x[0]) :] for x in full]).detach()[rows] for i in range(3)]
    if not any(past):
        return batch, [x.requires_grad_() for x in new], None
    held = [
        place_tokens(n, ranks, case.past_placement, interleave=2 if case.past_placement == "striped" else 1)
        for n in past
    ]
    own = [[p for run in request[rank] for p in run.positions] for request in held]
    old = [torch.cat([x[i].detach()[p] for x, p in zip(full, own, strict=True)]).requires_grad_() for i in (1, 2)]
    width = 2 if case.past_placement == "striped" else 1
    return (
        batch,
        [x.requires_grad_() for x in new],
        CachedKV.placed(*old, past, ranks, case.past_placement, interleave=width),
    )


def equal(mesh: comm.DeviceMesh, case: Case) -> None:
    compare(case, layer(case, comm.groups(mesh)))


def compare(case: Case, core: RingAttention, sinks: Tensor | None = None) -> None:
    """Output and all gradients but those of the sinks, which the oracle's are left in."""
    full, seeds = inputs(case)
    batch, new, cached = local(case, core, full)
    outs = expected(case, full, sinks)
    (torch.cat(outs) * torch.cat(seeds)).sum().backward()
    rows = core.rows(batch)
    out = core(*new, batch, cached)
    torch.testing.assert_close(out, torch.cat(outs)[rows], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(core(*new, batch, cached), out, rtol=0, atol=0)
    (out * torch.cat(seeds)[rows]).sum().backward()
    for mine, i in zip(new, range(3), strict=True):
        grad = torch.cat([x[i].grad[len(x[i]) - len(x[0]) :] for x in full])  # type: ignore[index]
        torch.testing.assert_close(mine.grad, grad[rows], rtol=1e-10, atol=1e-11)
    if cached is not None:
        own = [[p for run in request for p in run.positions] for request in cached.held[core.group.rank()]]
        for mine, i in ((cached.k, 1), (cached.v, 2)):
            grad = torch.cat([x[i].grad[p] for x, p in zip(full, own, strict=True)])  # type: ignore[index]
            torch.testing.assert_close(mine.grad, grad, rtol=1e-10, atol=1e-11)


def all_equal(mesh: comm.DeviceMesh, cases: list[Case]) -> None:
    for case in cases:
        try:
            equal(mesh, case)
        except Exception as error:
            error.add_note(str(case))
            raise


@pytest.mark.parametrize(
    ("ranks", "cases"), [(1, CASES[::8]), (2, CASES[::3]), (3, CASES[::2]), (4, CASES)], ids="1234"
)
def test_equals_one_process_forward_and_backward(ranks: int, cases: list[Case]) -> None:
    run_mesh((1, ranks), all_equal, cases)


def test_composes_with_tensor_parallel_heads() -> None:
    """Rank 1 of tp 2 has query heads 3 to 5, which read the KV heads 0, 1 and 1 of its own."""
    run_mesh((2, 2), sharded, "kv")
    run_mesh((2, 2), sharded, "q")


def sharded(mesh: comm.DeviceMesh, method: str) -> None:
    groups, case = comm.groups(mesh), Case(method=method)
    heads = HeadMap(6, 3, 2, 2)
    tp_rank = groups.tp.rank()
    core = RingAttention(heads, DIM, group=groups.sp, tp_rank=tp_rank, method=method)
    batch = RaggedBatch.prefill(case.q_lens)
    torch.manual_seed(2)
    q, k, v = (torch.randn(20, h, DIM, dtype=torch.float64) for h in (6, 3, 3))
    wanted = torch.cat([attend(*x, None) for x in zip(*(t.split(case.q_lens) for t in (q, k, v)), strict=True)])
    rows, own, kv = core.rows(batch), slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    out = core(q[rows, own], k[rows, kv], v[rows, kv], batch)
    torch.testing.assert_close(out, wanted[rows, own], rtol=1e-11, atol=1e-12)


def chunked(mesh: comm.DeviceMesh, method: str) -> None:
    """Prompts in chunks over a striped cache: a ring striped alike appends what it has, and reads its own share."""
    groups, window = comm.groups(mesh), 7 if method == "q" else None
    rank, striping = groups.sp.rank(), Striping(groups.sp.size(), 2)
    core = RingAttention(
        HeadMap(6, 2), DIM, group=groups.sp, method=method, placement="striped", interleave=2, window=window
    )
    kv = StripedKV(1, 12, striping.period * 2, 2, DIM, striping=striping, rank=rank, dtype=torch.float64)
    torch.manual_seed(3)
    lens = {"a": 17, "b": 9}
    full = {name: [torch.randn(n, h, DIM, dtype=torch.float64) for h in (6, 2, 2)] for name, n in lens.items()}
    wanted = {name: attend(*qkv, window) for name, qkv in full.items()}
    done = dict.fromkeys(lens, 0)
    for step in ({"a": 6, "b": 0}, {"b": 8, "a": 7}, {"a": 4, "b": 1}):
        batch, spans = kv.batch(list(step), list(step.values())), [(r, done[r], done[r] + n) for r, n in step.items()]
        rows = core.rows(batch)
        assert tuple(rows.tolist()) == kv.own(batch)
        q, k, v = (torch.cat([full[r][i][a:b] for r, a, b in spans])[rows] for i in range(3))
        kv.append_own(0, k, v, batch)
        old = [
            torch.cat([x[:n] for x, n in zip(shares, kv.context(batch), strict=True)]) for shares in of_each(kv, step)
        ]
        cached = CachedKV.placed(*old, [done[r] for r in step], striping.ranks, "striped", interleave=2)
        out = core(q, k, v, batch, cached)
        torch.testing.assert_close(out, torch.cat([wanted[r][a:b] for r, a, b in spans])[rows], rtol=1e-11, atol=1e-12)
        done.update({r: b for r, _, b in spans})


def of_each(kv: StripedKV, requests: Iterable[str]) -> list[tuple[Tensor, ...]]:
    """This rank's keys of each request, and its values."""
    return list(zip(*(kv.gather(0, [request]) for request in requests), strict=True))


def test_chunks_of_prompts_over_a_striped_cache() -> None:
    run_mesh((1, 3), chunked, "kv")
    run_mesh((1, 2), chunked, "q")


def low_precision(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    for method in ("kv", "q"):
        case = Case(method=method, q_lens=(70, 9))
        near(case, layer(case, comm.groups(mesh)), dtype)


def near(case: Case, core: RingAttention, dtype: torch.dtype) -> None:
    """Output and gradients no further from float64 than twice plain attention in the same dtype, and a rounding."""
    full, seeds = inputs(case, dtype)
    exact = [[x.detach().double().requires_grad_() for x in each] for each in full]
    batch, new, _ = local(case, core, full)
    rows, seed = core.rows(batch), torch.cat(seeds)
    found = []
    for each in (exact, full):
        out = torch.cat(expected(case, each))
        (out * seed).sum().backward()
        grads = [torch.cat([x[i].grad for x in each]) for i in range(3)]  # type: ignore[misc]
        found.append([x.detach()[rows].double() for x in (out, *grads)])
    out = core(*new, batch)
    (out * seed[rows]).sum().backward()
    for ours, plain, wanted in zip((out, *(x.grad for x in new)), found[1], found[0], strict=True):
        assert ours is not None and ours.dtype == dtype
        allowed = 2 * (plain - wanted).abs().max() + torch.finfo(dtype).eps * wanted.abs().max()
        assert (ours.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_low_precision_merges_in_float32(dtype: torch.dtype) -> None:
    run_mesh((1, 4), low_precision, dtype)


def volumes(mesh: comm.DeviceMesh, case: Case) -> tuple[int, int, int]:
    """Bytes that this rank sends forward, and backward, which must be what `plan` says; and calls forward."""
    groups = comm.groups(mesh)
    core = layer(case, groups)
    full, _ = inputs(case)
    batch, new, cached = local(case, core, full)
    with comm.record() as there:
        out = core(*new, batch, cached)
    with comm.record() as back:
        out.sum().backward()
    order = core.order(batch, cached)
    heads, kv_heads = HEADS[case.heads]
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": DIM, "itemsize": 8}
    rank = groups.sp.rank()
    assert there.total.num_bytes == plan.ring_volumes(order, case.method, **options)[rank]
    assert back.total.num_bytes == plan.ring_volumes(order, case.method, **options, backward=True)[rank]
    assert set(there.by_op()) == {"send_recv"}
    return there.total.num_bytes, back.total.num_bytes, there.total.calls


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 4, 6, 9, 14, 16)], ids=str)
def test_bytes_are_those_of_the_plan(case: Case) -> None:
    run_mesh((1, 3), volumes, case)


def test_bytes_are_those_of_the_formulas() -> None:
    """24 tokens on 4 ranks: slices of 6, chunks of 3; a token's key and value 2 * 2 * 4 * 8 bytes."""
    pair, q, back = 2 * 2 * DIM * 8, 6 * DIM * 8, 6 * (DIM * 8 + 8)
    sent = [n for n, *_ in run_mesh((1, 4), volumes, Case("contiguous", "kv", q_lens=(24,)))]
    assert sent == [6 * pair, 12 * pair, 18 * pair, 0]
    sent = [n for n, *_ in run_mesh((1, 4), volumes, Case("contiguous", "kv", q_lens=(24,), window=4))]
    assert sent == [3 * pair, 3 * pair, 3 * pair, 0]  # the next rank alone sees the last window - 1 keys
    # Zig-zag: rank r sends all blocks but that of r + 1; nobody else needs the last chunk of all, which is rank 0's.
    sent = [n for n, *_ in run_mesh((1, 4), volumes, Case("zigzag", "kv", q_lens=(24,)))]
    assert sent == [(18 - 3) * pair] * 3 + [18 * pair]
    # Behind a cached prefix on every rank all queries go all the way round, and are answered by every other rank.
    sent = run_mesh((1, 4), volumes, Case("zigzag", "q", q_lens=(24,), past=(16,), past_placement="contiguous"))
    assert [n for n, *_ in sent] == [18 * (q + back)] * 4 and {calls for *_, calls in sent} == {6}


SINKS = [
    Case("zigzag", "kv", past=PAST),
    Case("striped", "q", window=5, interleave=2),
    Case("contiguous", "q", "mqa", q_lens=(2, 1)),
]


def sinks_of(case: Case, groups: comm.Groups, flat: bool) -> tuple[Tensor, HeadParameter]:
    """The oracle's, and ours: stored by the flat map, which needs a head for every rank, or by the ranks of tp."""
    torch.manual_seed(4)
    oracle = (2 * torch.randn(HEADS[case.heads][0], dtype=torch.float64)).requires_grad_()
    heads = HeadMap(*HEADS[case.heads], groups.layout.tp, groups.layout.sp if flat else 1)
    return oracle, HeadParameter.from_tensor("sinks", oracle, heads=heads, group=groups.flat if flat else groups.tp)


def drained(mesh: comm.DeviceMesh, cases: list[Case]) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        for flat in (True, False):
            oracle, sinks = sinks_of(case, groups, flat)
            with_sinks(case, layer(case, groups, sinks=sinks), oracle, groups)


def with_sinks(case: Case, core: RingAttention, oracle: Tensor, groups: comm.Groups) -> None:
    """Gradients of the sinks need no sum where they are stored once, and one over sp where every rank has them."""
    compare(case, core, oracle)
    assert core.sinks is not None and list(core.state_dict()) == ["sinks"]
    flat = core.sinks.heads.sp == groups.layout.sp
    with comm.record() as sent:
        sync_gradients(core.sinks, groups)
    assert (sent.total.calls == 0) == (flat or groups.layout.sp == 1)
    own, grad = core.sinks.heads.q_ranges[core.sinks.group.rank()], oracle.grad
    assert grad is not None
    torch.testing.assert_close(core.sinks.weight.grad, grad[slice(*own)], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sinks_are_added_once_with_gradients(ranks: int) -> None:
    run_mesh((1, ranks), drained, SINKS)


def coded(mesh: comm.DeviceMesh, wire: comm.Wire) -> None:
    """Keys in a wire format are keys that were rounded before; queries too, but for what the answers lose."""
    groups = comm.groups(mesh)
    for method in ("kv", "q"):
        case = Case(method=method, past=PAST, heads="gqa")
        full, seeds = inputs(case, torch.float32)
        cores = [layer(case, groups, wire=choice) for choice in (wire, None)]
        batch, new, cached = local(case, cores[0], full)
        assert cached is not None
        seed, sides = torch.cat(seeds)[cores[0].rows(batch)], []
        for core in cores:
            mine = [x.detach().clone() for x in (*new, cached.k, cached.v)]
            if core.wire is None and groups.layout.sp > 1:
                mine = [x if (i == 0) == (method == "kv") else rounded(x, wire) for i, x in enumerate(mine)]
            mine = [x.requires_grad_() for x in mine]
            with comm.record() as sent:
                out = core(*mine[:3], batch, cached._replace(k=mine[3], v=mine[4]))
            with comm.record() as back:
                (out * seed).sum().backward()
            sides.append([out.detach(), *(x.grad for x in mine)])
            options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": DIM, "itemsize": 4, "wire": core.wire}
            order = core.order(batch, cached)
            for found, backward in ((sent, False), (back, True)):
                volumes = plan.ring_volumes(order, method, **options, backward=backward)
                assert found.total.num_bytes == volumes[groups.sp.rank()]
        exact = method == "kv" or groups.layout.sp == 1
        for i, (ours, plain) in enumerate(zip(*sides, strict=True)):
            assert ours is not None and plain is not None
            error = float((ours - plain).norm() / plain.norm()) if plain.norm() else 0.0
            no_answer = exact or i in (3, 5)  # gradients of values need log-sum-exps alone
            assert error == 0 if no_answer else error < {"int8": 0.02, "fp8": 0.08}[wire]
        assert exact or not torch.equal(sides[0][0], sides[1][0])


def rounded(x: Tensor, wire: comm.Wire) -> Tensor:
    rows = x.detach().reshape(-1, DIM)
    return decode(encode(rows, wire), DIM, x.dtype, wire).view_as(x)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_wire_formats_round_what_travels_and_send_fewer_bytes(wire: comm.Wire, ranks: int) -> None:
    run_mesh((1, ranks), coded, wire)


class Timed:
    """`tile_attention` and `attention` that take a second for every query and key in virtual time."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("attention", "tile_attention"):
            monkeypatch.setattr(ring_module, name, self.wrap(clock, getattr(ring_module, name)))

    def wrap(self, clock: Clock, inner: Any) -> Any:
        def timed(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
            clock.advance(float(len(q) * len(k)) / (2 if inner.__name__ == "attention" else 1))
            return inner(q, k, *args, **options)

        return timed


def overlapped(mesh: comm.DeviceMesh, method: str, rate: float) -> tuple[float, float, float]:
    """Virtual seconds in all, of compute and of transfers: 32 tokens on 4 ranks, whose every hop is 32 s of compute."""
    groups, clock = comm.groups(mesh), Clock()
    case = Case("zigzag", method, "mha", q_lens=(32,))
    link = comm.SimulatedLink(0.0, rate, clock=clock, sleep=clock.sleep)
    core, (full, _) = layer(case, groups), inputs(case)
    batch, new, _ = local(case, core, full)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        Timed(clock, patch)
        with comm.trace(clock=clock) as t, link.on(groups.sp):
            core(*new, batch)
    report = t.report()
    return clock.now_s, report.compute_s, report.comm_s


def test_transfers_hide_under_attention() -> None:
    """A hop of keys is 2 * 4 heads * 4 * 8 bytes for each of 8 tokens, rank 0's but 4; an answer at most 8 * 4 * 40."""
    for now_s, compute_s, _ in run_mesh((1, 4), overlapped, "kv", 100.0):
        assert now_s == compute_s == 128  # nothing is exposed
    for now_s, compute_s, comm_s in run_mesh((1, 4), overlapped, "kv", 10.0):
        assert now_s == pytest.approx(comm_s + compute_s / 4)  # a slow link is never idle until the last block
    for now_s, compute_s, comm_s in run_mesh((1, 4), overlapped, "q", 100.0):
        assert now_s - compute_s - 1e-9 <= 8 * 4 * 40 / 100 < comm_s / 2  # the last answer alone


def refusals(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    heads = HeadMap(4, 2)
    others = HeadParameter("sinks", HeadMap(6, 2), group=groups.tp)
    for options, message in (
        ({"method": "v"}, None),
        ({"window": 0}, "`window` must be at least 1 key or None, got 0"),
        ({"tp_rank": 1}, r"`tp_rank` must lie in \[0, 1\), got 1"),
        ({"interleave": 2}, "`interleave` must be at least 1, and 1 unless striped, got 2 for zigzag"),
        ({"wire": "int4"}, None),
        ({"sinks": others}, r"`sinks` must be a number for each of the heads \[0, 4\] of tp rank 0 of HeadMap"),
    ):
        with pytest.raises(Exception, match=message):
            RingAttention(heads, DIM, group=groups.sp, **options)
    core = RingAttention(heads, DIM, group=groups.sp)
    batch, longer = RaggedBatch.prefill([8]), RaggedBatch.build([8], [10])
    q, kv = torch.ones(4, 4, DIM), torch.ones(4, 2, DIM)
    past = torch.ones(1, 2, DIM)
    cached = CachedKV.placed(past, past, [2], 2, "contiguous")
    with own_errors(), comm.record() as sent:
        with pytest.raises(ValueError, match=r"`q`, `k`, `v` must be \[4, 4, 4\], \[4, 2, 4\], \[4, 2, 4\]"):
            core(q[:3], kv, kv, batch)
        with pytest.raises(
            ValueError, match=r"`cached` must be given for a batch with cached tokens \(\(2,\)\), got None"
        ):
            core(q, kv, kv, longer)
        with pytest.raises(ValueError, match=r"`cached.held` must place the 0 cached tokens of request 0 once each"):
            core(q, kv, kv, batch, cached)
        with pytest.raises(ValueError, match=r"`cached.held` must have the runs of 1 requests for each of 2 ranks"):
            core(q, kv, kv, longer, CachedKV.placed(past, past, [2], 1, "contiguous"))
        with pytest.raises(ValueError, match=r"`cached.k` and `cached.v` must be \[1, 2, 4\] in torch.float32"):
            core(q, kv, kv, longer, cached._replace(k=past[:, :1]))
        with pytest.raises(ValueError, match="`q` must be float32, bfloat16 or float16 to travel in a wire format"):
            RingAttention(heads, DIM, group=groups.sp, wire="int8")(q.double(), kv.double(), kv.double(), batch)
    assert sent.total.calls == 0


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_mesh((1, 2), refusals)


def broken(mesh: comm.DeviceMesh) -> None:
    """A program that is dropped in flight leaves nothing behind: the group serves the next call."""
    groups = comm.groups(mesh)
    for method in ("kv", "q"):
        case = Case(method=method)
        core, (full, _) = layer(case, groups), inputs(case)
        batch, new, _ = local(case, core, full)
        with torch.no_grad():
            wanted = core(*new, batch)
            for stop in range(2):
                program = core.steps(*new, batch)
                item = next(program)
                for _ in range(stop):
                    item = program.send(item.wait())
                program.close()
            assert torch.equal(core(*new, batch), wanted)


def test_a_closed_program_leaves_nothing_in_flight() -> None:
    run_mesh((1, 3), broken)
