"""Raw collectives: layout, exactly, against a slice of the global result; arguments untouched; ranks bitwise equal."""

import re
from functools import partial

import pytest
import torch

from seqpar import comm
from seqpar.comm import collectives
from seqpar.partition import even_ranges
from tests.ranks import run_mesh

WORLD = (1, 2, 3, 4)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


def coded(rank, *shape, dtype=torch.float64):
    """A value that says which rank it is of and where it lay."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) + 1000 * rank).to(dtype).view(shape)


def strided(x):
    """The same values in memory that is not contiguous."""
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x) if x.ndim else x


def check(launch, x, expected):
    """The collective of `x` is `expected`, whatever the memory of `x`, and writes nothing."""
    for source in (x, strided(x)):
        before = source.clone()
        source = source.requires_grad_(source.is_floating_point())
        handle = launch(source)
        out = handle.wait()
        assert handle.wait() is out
        assert out is source or not out.requires_grad
        torch.testing.assert_close(out.detach(), expected, atol=0, rtol=0)
        torch.testing.assert_close(source.detach(), before, atol=0, rtol=0)


def gather_layout(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for sizes in ([3] * p, [2 * r + 1 for r in range(p)], [0, *[2] * (p - 1)], [0] * p):
        for dim in (0, 1, -1):
            shapes = [(s, 5, 7) if dim == 0 else (5, s, 7) if dim == 1 else (5, 7, s) for s in sizes]
            parts = [coded(r, *shape) for r, shape in enumerate(shapes)]
            expected = torch.cat(parts, dim)
            check(
                lambda x, d=dim, s=sizes: comm.all_gather_async(x, group=group, dim=d, sizes=s), parts[rank], expected
            )
    equal = torch.cat([coded(r, 3, 5) for r in range(p)])
    check(lambda x: comm.all_gather_async(x, group=group), coded(rank, 3, 5), equal)


def reduce_scatter_layout(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    total = sum(coded(r, 5, 11, 7) for r in range(p))
    for dim in (0, 1, 2, -3):
        n = total.shape[dim]
        for sizes in (None, [0] * (p - 1) + [n], [n] + [0] * (p - 1)):
            ranges = even_ranges(n, p) if sizes is None else None
            start = ranges[rank].start if ranges else sum(sizes[:rank])
            length = ranges[rank].size if ranges else sizes[rank]
            expected = total.narrow(dim, start, length)
            check(
                lambda x, d=dim, s=sizes: comm.reduce_scatter_async(x, group=group, dim=d, sizes=s),
                coded(rank, 5, 11, 7),
                expected,
            )


def all_to_all_layout(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for size in (lambda a, b: 3, lambda a, b: 2 * a + b + 1, lambda a, b: (a + b) % 2, lambda a, b: 0):
        table = [[size(a, b) for b in range(p)] for a in range(p)]  # [from][to]
        sent = [coded(r, sum(table[r]), 5) for r in range(p)]
        expected = torch.cat([sent[r].split(table[r])[rank] for r in range(p)])
        check(
            lambda x, t=table: comm.all_to_all_async(
                x, group=group, send_sizes=t[rank], recv_sizes=[row[rank] for row in t]
            ),
            sent[rank],
            expected,
        )


def broadcast_and_reduce_layout(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    total = sum(coded(r, 5, 7) for r in range(p))
    for root in range(p):
        check(lambda x, r=root: comm.broadcast_async(x, src=r, group=group), coded(rank, 5, 7), coded(root, 5, 7))
        expected = total if rank == root else torch.zeros_like(total)
        check(lambda x, r=root: collectives.reduce_async(x, dst=r, group=group), coded(rank, 5, 7), expected)


def send_recv_layout(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for shift in range(-p, p + 1):
        dst, src = (rank + shift) % p, (rank - shift) % p
        check(
            lambda x, d=dst, s=src: comm.send_recv_async(x, dst=d, src=s, group=group),
            coded(rank, 5, 7),
            coded(src, 5, 7),
        )
        if p > 1 and shift % p:  # every rank another shape
            shape = (src + 1, 3)
            handle = comm.send_recv_async(coded(rank, rank + 1, 3), dst=dst, src=src, group=group, recv_shape=shape)
            torch.testing.assert_close(handle.wait(), coded(src, *shape), atol=0, rtol=0)


LAYOUTS = (
    gather_layout,
    reduce_scatter_layout,
    all_to_all_layout,
    broadcast_and_reduce_layout,
    send_recv_layout,
)


@pytest.mark.parametrize("body", LAYOUTS, ids=lambda body: body.__name__)
@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_layout(p, body):
    run_mesh((1, p), body)


def sums(mesh, dtype):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for shape in ((), (1,), (2, 3), (5, 7), (0, 3), (130, 257)):
        parts = [(coded(r, *shape) % 16).to(dtype) for r in range(p)]
        total = sum(part.double() for part in parts).to(dtype)  # small integers: every order and dtype is exact
        check(lambda x: comm.all_reduce_async(x, group=group), parts[rank], total)
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "deterministic"])
@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_all_reduce_is_the_sum(p, dtype, deterministic):
    run_mesh((1, p), sums, dtype, deterministic=deterministic)


def large_sums(mesh):
    """As large as needed for every algorithm."""
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    seen = set()
    for n in (1 << 10, 1 << 17, 1 << 18, (1 << 19) + 1, (1 << 21) + 3):
        seen.add(comm.all_reduce_algorithm(4 * n, p, comm.is_deterministic(group), "cpu"))
        x = (torch.arange(n) % 1021 + rank).float()
        total = (p * (torch.arange(n) % 1021) + p * (p - 1) // 2).float()
        out = comm.all_reduce_async(x.view(1, n), group=group).wait()
        assert torch.equal(out, total.view(1, n))
        assert torch.equal(x, (torch.arange(n) % 1021 + rank).float())
        columns = x[: n // 2 * 2].view(-1, 2).t()  # dense, but not contiguous
        out = comm.all_reduce_async(columns, group=group).wait()
        assert torch.equal(out, total[: n // 2 * 2].view(-1, 2).t())
    return seen


@pytest.mark.parametrize("p", (2, 3, 4), ids="p={}".format)
def test_every_algorithm_gives_the_sum(p):
    assert {name for seen in run_mesh((1, p), large_sums) for name in seen} >= {"one_shot", "backend"}
    assert run_mesh((1, p), large_sums, deterministic=True) == [{"one_shot", "two_shot"}] * p


def rough(rank, n, dtype):
    """Values whose sum depends on order and rounding."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)).to(dtype)


def deterministic_sums(mesh, dtype):
    group = comm.groups(mesh).sp
    p, rank, n = group.size(), group.rank(), 5003
    parts = [rough(r, n, dtype) for r in range(p)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    expected = total.to(dtype)
    x = parts[rank]
    assert torch.equal(comm.all_reduce_async(x, group=group).wait(), expected)
    assert torch.equal(collectives._one_shot("all_reduce", "", group, x).wait(), expected)
    mine = even_ranges(n, p)[rank]
    sizes = [r.size for r in even_ranges(n, p)]
    part = collectives._reduce_parts("all_reduce", "", group, x, sizes).wait()
    assert torch.equal(part, expected[mine.start : mine.stop])
    assert torch.equal(collectives._gather_parts("all_reduce", "", group, part, sizes, lambda f: f).wait(), expected)
    assert torch.equal(comm.reduce_scatter_async(x, group=group).wait(), part)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("p", (2, 3, 4, 8), ids="p={}".format)
def test_deterministic_sums_are_in_rank_order_in_float32_and_rounded_once(p, dtype):
    run_mesh((1, p), deterministic_sums, dtype, deterministic=True)


def equal_everywhere(mesh):
    group = comm.groups(mesh).sp
    outs = []
    for n in (1000, 300_001, 1_200_001):
        for dtype in (torch.float32, torch.bfloat16):
            outs.append(comm.all_reduce_async(rough(group.rank(), n, dtype), group=group).wait())
    return outs


@pytest.mark.parametrize("p", (2, 3, 4), ids="p={}".format)
def test_all_ranks_get_the_same_bits_also_without_determinism(p):
    first, *others = run_mesh((1, p), equal_everywhere)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def many_in_flight(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    handles = []
    for i in range(12):
        handles.append(comm.all_reduce_async(torch.full((100 + i,), float(rank + i)), group=group))
        handles.append(comm.all_gather_async(torch.full((i,), float(rank)), group=group))
        if p > 1:
            handles.append(
                comm.send_recv_async(torch.full((i,), float(rank)), dst=(rank + 1) % p, src=(rank - 1) % p, group=group)
            )
    for handle in reversed(handles):
        handle.wait()
    sums = [h.wait() for h in handles if h.op == "all_reduce"]
    for i, out in enumerate(sums):
        assert torch.equal(out, torch.full((100 + i,), float(p * i + p * (p - 1) // 2)))


@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_many_in_flight_waited_for_in_reverse(p):
    run_mesh((1, p), many_in_flight)


def size_one(mesh):
    group = comm.groups(mesh).sp
    x = torch.ones(3, 4).t()
    with comm.record() as recorder:
        for handle in (
            comm.all_reduce_async(x, group=group),
            comm.all_gather_async(x, group=group, dim=1),
            comm.reduce_scatter_async(x, group=group),
            comm.all_to_all_async(x, group=group, send_sizes=[4], recv_sizes=[4]),
            comm.broadcast_async(x, src=0, group=group),
            comm.send_recv_async(x, dst=0, src=0, group=group),
        ):
            assert isinstance(handle, comm.Handle)
            assert handle.done()
            assert handle.wait() is x
    assert recorder.counts == {}


def test_a_group_of_one_passes_its_argument_through_and_counts_nothing():
    run_mesh((1, 1), size_one)
    run_mesh((2, 1), size_one)


def bad_arguments(mesh):
    group = comm.groups(mesh).sp
    rank = group.rank()
    x = torch.ones(4, 6)
    gather, scatter = partial(comm.all_gather_async, group=group), partial(comm.reduce_scatter_async, group=group)
    exchange, shift = partial(comm.all_to_all_async, group=group), partial(comm.send_recv_async, group=group)
    cases = [
        (lambda: gather(x, dim=2), ValueError, "`dim` must be a dimension of `x` (ndim 2), got 2"),
        (lambda: gather(x, sizes=[4]), ValueError, "one size >= 0 for each rank of group `sp` (ranks 0, 1), got (4,)"),
        (lambda: gather(x, sizes=[5, 5]), ValueError, "`x.shape[0]` must be this rank's entry of `sizes` (5), got 4"),
        (lambda: scatter(x, sizes=[5, -1]), ValueError, "`sizes` must be one size >= 0"),
        (lambda: scatter(x, sizes=[2, 3]), ValueError, "`x.shape[0]` must be the sum of `sizes` (5), got 4"),
        (lambda: exchange(x, send_sizes=[1, 2], recv_sizes=[1, 2]), ValueError, "the sum of `send_sizes` (3), got 4"),
        (
            lambda: exchange(x, send_sizes=[2, 2], recv_sizes=[3, 3]),
            ValueError,
            "must be that of `recv_sizes` (3), got 2",
        ),
        (
            lambda: comm.broadcast_async(x, src=2, group=group),
            ValueError,
            "`src` must be a rank of the group (below 2)",
        ),
        (lambda: shift(x, dst=rank, src=1 - rank), ValueError, "`dst` and `src` must both be this rank"),
        (lambda: comm.all_reduce_async(x > 0, group=group), TypeError, "to be summed, got torch.bool"),
        (lambda: comm.all_reduce_async(x.to(torch.float8_e4m3fn), group=group), TypeError, "got torch.float8_e4m3fn"),
        (lambda: scatter(x > 0), TypeError, "to be summed, got torch.bool"),
    ]
    for launch, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            launch()
    comm.all_reduce_async(x, group=group).wait()


def test_bad_arguments_are_refused_before_anything_is_sent():
    run_mesh((1, 2), bad_arguments)


def any_dtype_moves(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for dtype in (torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.int16, torch.complex64):
        parts = [(coded(r, 3, 4, dtype=torch.float32) % 5).to(dtype) for r in range(p)]
        gathered = comm.all_gather_async(parts[rank], group=group).wait()
        assert gathered.dtype == dtype
        assert torch.equal(gathered.view(torch.uint8), torch.cat([part.view(torch.uint8) for part in parts]))
        last = comm.broadcast_async(parts[rank], src=p - 1, group=group).wait()
        assert torch.equal(last.view(torch.uint8), parts[-1].view(torch.uint8))
        before = comm.send_recv_async(parts[rank], dst=(rank + 1) % p, src=(rank - 1) % p, group=group).wait()
        assert torch.equal(before.view(torch.uint8), parts[rank - 1].view(torch.uint8))


@pytest.mark.parametrize("p", (2, 3), ids="p={}".format)
def test_any_dtype_can_be_moved(p):
    run_mesh((1, p), any_dtype_moves)


def in_inference_mode(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    weight = torch.ones(3, 4, requires_grad=True)
    with torch.inference_mode():
        x = weight * (rank + 1)
        assert torch.equal(comm.all_reduce(x, group=group), torch.full((3, 4), p * (p + 1) / 2))
        assert torch.equal(comm.all_gather(x, group=group)[-1], torch.full((4,), float(p)))
        assert torch.equal(comm.reduce_scatter(x, group=group, dim=1)[0, :1], torch.full((1,), p * (p + 1) / 2))
        assert torch.equal(comm.broadcast(x, src=p - 1, group=group), torch.full((3, 4), float(p)))


@pytest.mark.parametrize("p", (2, 3), ids="p={}".format)
def test_collectives_work_in_inference_mode(p):
    run_mesh((1, p), in_inference_mode)
