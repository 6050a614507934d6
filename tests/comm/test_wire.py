"""Collectives in a wire format: each the same exchange of rounded rows, to the bit, counted in bytes that travel."""

from functools import partial

import pytest
import torch

from seqpar import comm
from seqpar.comm import SimulatedLink
from seqpar.kernels.quantize import decode, encode
from seqpar.partition import even_ranges, even_split
from tests.comm.fakes import FakeGroup
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

WORLD = (2, 3, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
worlds = pytest.mark.parametrize("p", WORLD, ids="p={}".format)
SIZE = {"int8": 67, "fp8": 66}  # bytes of 64 numbers
every = pytest.mark.parametrize("wire", ["int8", "fp8"])


def rough(rank, *shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(rank))
    return (x * torch.logspace(-3, 3, shape[-1])).to(dtype)


def rounded(x, wire, dtype=None):
    """`x` after one journey."""
    if not x.numel():
        return x.to(dtype or x.dtype)
    rows = encode(x.reshape(-1, x.shape[-1]), wire, limit=dtype or x.dtype)
    return decode(rows, x.shape[-1], dtype or x.dtype, wire).view(x.shape)


def summed(parts, wire):
    """The float32 sum, in rank order, of what the ranks sent."""
    total = rounded(parts[0].float(), wire)
    for part in parts[1:]:
        total = total + rounded(part.float(), wire)
    return total


def same_everywhere(x, group):
    return all(torch.equal(x, other) for other in comm.all_gather(x[None], group=group))


def sums(mesh, wire):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for dtype in DTYPES:
        # Few rows and many, one of them, a ragged last group, none, more dimensions
        for shape in ((1, 256), (2, 70), (40, 256), (3, 5, 7), (0, 64), (300,)):
            parts = [rough(r, *shape, dtype=dtype) for r in range(p)]
            total = summed(parts, wire)
            want = total.to(dtype) if p == 2 else rounded(total, wire, dtype)
            x, before = parts[rank].requires_grad_(), parts[rank].detach().clone()
            got = comm.all_reduce_async(x, group=group, wire=wire).wait()
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert same_everywhere(got, group) and torch.equal(x, before)
            out = comm.all_reduce(x, group=group, wire=wire)
            assert torch.equal(out, want)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
            assert torch.equal(grad, torch.ones_like(grad))
    # A sum at the end of its dtype's range stays in it
    x = torch.full((1, 64), [65504.0, 0.0, 0.0, 0.0][rank]).half()
    assert comm.all_reduce(x, group=group, wire=wire).isfinite().all()
    x = torch.full((1, 64), 40000.0).half()
    assert not comm.all_reduce(x, group=group, wire=wire).isfinite().any()
    # A row's result is its own, whatever travels with it; also where rows are shared out by groups
    parts = [rough(r, 40, 256) for r in range(p)]
    whole = comm.all_reduce(parts[rank], group=group, wire=wire)
    for rows in (slice(0, 1), slice(3, 30), slice(39, 40)):
        assert torch.equal(comm.all_reduce(parts[rank][rows], group=group, wire=wire), whole[rows])


@every
@worlds
def test_all_reduce(p, wire):
    run_mesh((1, p), sums, wire)


def scattered(mesh, wire):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for dtype in DTYPES:
        parts = [rough(r, 5, 11, 70, dtype=dtype) for r in range(p)]
        for dim in (0, 1, -2):
            want = summed(parts, wire).to(dtype)
            mine = even_ranges(want.shape[dim], p)[rank]
            got = comm.reduce_scatter(parts[rank], group=group, dim=dim, wire=wire)
            torch.testing.assert_close(got, want.narrow(dim, mine.start, mine.size), rtol=0, atol=0)
        # Along the last dim the rows are cut, and each part is a row of its own
        for x in (parts, [part[0, 0] for part in parts]):
            sizes = [0, *even_split(70, p - 1)]
            want = summed([part.split(sizes, -1)[rank] for part in x], wire).to(dtype)
            got = comm.reduce_scatter(x[rank], group=group, dim=-1, sizes=sizes, wire=wire)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@every
@worlds
def test_reduce_scatter(p, wire):
    run_mesh((1, p), scattered, wire)


def moved(mesh, wire):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    sizes = [3 * r % 4 for r in range(p)]
    for dtype in DTYPES:
        for dim in (0, 1, -1):
            shapes = [(s, 5, 70) if dim == 0 else (5, s, 70) if dim == 1 else (5, 3, s) for s in sizes]
            parts = [rough(r, *shape, dtype=dtype) for r, shape in enumerate(shapes)]
            want = torch.cat([rounded(part, wire) for part in parts], dim)
            got = comm.all_gather(parts[rank], group=group, dim=dim, sizes=sizes, wire=wire)
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert same_everywhere(got, group)
        vectors = [rough(r, 65 + r, dtype=dtype) for r in range(p)]
        got = comm.all_gather(vectors[rank], group=group, sizes=[65 + r for r in range(p)], wire=wire)
        assert torch.equal(got, torch.cat([rounded(vector, wire) for vector in vectors]))
        table = [[(2 * a + b) % 4 for b in range(p)] for a in range(p)]  # [from][to]
        sent = [rough(r, sum(table[r]), 2, 70, dtype=dtype) for r in range(p)]
        want = torch.cat([rounded(sent[r], wire).split(table[r])[rank] for r in range(p)])
        exchange = partial(
            comm.all_to_all, group=group, send_sizes=table[rank], recv_sizes=[row[rank] for row in table], wire=wire
        )
        assert torch.equal(exchange(sent[rank]), want)


@every
@worlds
def test_all_gather_and_all_to_all(p, wire):
    run_mesh((1, p), moved, wire)


def gradients(mesh, wire):
    """Those of the collective that rounds nothing."""
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    y = [rough(10 + r, 4 * p, 70) for r in range(p)]
    operations = (
        partial(comm.all_reduce, grad="partial"),
        comm.reduce_scatter,
        comm.all_gather,
        partial(comm.all_to_all, send_sizes=[4] * p, recv_sizes=[4] * p),
    )
    for operation in operations:
        grads = []
        for choice in (wire, None):
            x = rough(rank, 4 * p, 70).requires_grad_()
            out = operation(x, group=group, wire=choice)
            with comm.record() as counts:
                grads.append(torch.autograd.grad(out, x, y[rank].repeat(p, 1)[: len(out)])[0])
        assert torch.equal(*grads)
        assert counts.total.calls == 1  # and both of the same bytes, for the gradient travels as it is


@worlds
def test_gradients_travel_as_they_are(p):
    run_mesh((1, p), gradients, "int8")


def faces(group, x, p):
    """Each collective of `x[4p, 4096]`, and what a rank sends of it in numbers."""
    rows = len(x)
    columns = [[r] for r in even_ranges(4096, p)]
    tokens = [rows] * p
    share = 4096 // p * rows * (p - 1)
    return {
        "all_reduce": (partial(comm.all_reduce, x, group=group), 2 * rows * 4096 * (p - 1) // p),
        "reduce_scatter": (partial(comm.reduce_scatter, x, group=group), rows * 4096 * (p - 1) // p),
        "all_gather": (partial(comm.all_gather, x, group=group), rows * 4096 * (p - 1)),
        "all_to_all": (
            partial(comm.all_to_all, x, group=group, send_sizes=[4] * p, recv_sizes=[4] * p),
            share,
        ),
        "seq_to_heads": (
            partial(comm.seq_to_heads, x, columns=columns, tokens=tokens, head_dim=128, group=group),
            share,
        ),
        "heads_to_seq": (
            partial(
                comm.heads_to_seq,
                x.repeat(p, 1)[:, : 4096 // p],
                widths=[4096 // p] * p,
                tokens=tokens,
                head_dim=128,
                group=group,
            ),
            share,
        ),
    }


def traffic(mesh, wire):
    group = comm.groups(mesh).sp
    p = group.size()
    x = rough(group.rank(), 4 * p, 4096, dtype=torch.bfloat16)
    for name, (call, numbers) in faces(group, x, p).items():
        link = SimulatedLink(0.0, 1e12)
        booked = []
        link.book = lambda num_bytes, booked=booked: booked.append(num_bytes) or (0.0, 0.0)
        with comm.record() as plain:
            call()
        with comm.record() as counts, link.on(group):
            call(wire=wire)
        assert plain.total.num_bytes == 2 * numbers, name
        assert counts.total.num_bytes == counts.total.sent_bytes == numbers // 64 * SIZE[wire], name
        assert sum(booked) == counts.total.sent_bytes, name
        assert counts.total.sent_bytes <= 0.53 * plain.total.num_bytes, name
        assert counts.total.calls == 1, name


@every
@pytest.mark.parametrize("p", [2, 4], ids="p={}".format)
def test_what_travels_is_counted_and_a_link_carries_it(p, wire):
    run_mesh((1, p), traffic, wire)


def test_a_link_of_more_ranks_than_there_are_carries_the_bytes_of_the_format():
    """For rank 0 of eight: two steps of an all-reduce, and a reduce-scatter."""
    group, x, booked = FakeGroup(size=1), torch.zeros(64, 128), []
    link = SimulatedLink(0.0, 1e12, ranks=8)
    link.book = lambda num_bytes: booked.append(num_bytes) or (0.0, 0.0)
    with link.on(group):
        assert comm.all_reduce(x, group=group, wire="int8") is x
        assert comm.reduce_scatter(x, group=group, wire="fp8") is x
    assert booked == [56 * 134] * 2 + [56 * 132]


def phases(mesh):
    group = comm.groups(mesh).sp
    p = group.size()
    x = rough(group.rank(), 40, 256)
    steps, handles, value = comm.all_reduce_steps(x, group=group, wire="int8"), [], None
    try:
        while True:
            handles.append(steps.send(value))
            value = handles[-1].wait()
    except StopIteration as stop:
        assert torch.equal(stop.value, comm.all_reduce(x, group=group, wire="int8"))
    assert len(handles) == (1 if p == 2 else 2)
    # Under a schedule the two halves are what they are alone, and what they are at once
    halves = comm.interleave([comm.all_reduce_steps(half, group=group, wire="int8") for half in x.split([13, 27])])
    assert torch.equal(torch.cat(halves), comm.all_reduce(x, group=group, wire="int8"))


@worlds
def test_the_number_of_ranks_alone_decides_between_one_step_and_two(p):
    run_mesh((1, p), phases)


def within_bound(mesh, wire):
    """A sum errs by p roundings of a half step of the summands' largest, and one of the sum's where it is sent too."""
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for seed in range(20):
        parts = [rough(100 * seed + r, 4, 64).double() for r in range(p)]
        total = sum(parts)
        got = comm.all_reduce(parts[rank].float(), group=group, wire=wire).double()
        half_step = {"int8": lambda a: a / 239, "fp8": lambda a: a / 16}[wire]
        first = sum(half_step(part.abs().amax(1, keepdim=True)) for part in parts)
        bound = first + (half_step(total.abs().amax(1, keepdim=True) + first) if p > 2 else 0)
        assert ((got - total).abs() <= bound * (1 + 1e-5)).all()
        if p > 2:
            assert ((got - total).abs() > bound / 1000).any()


@every
@worlds
def test_errors_of_sums_add_up(p, wire):
    run_mesh((1, p), within_bound, wire)


def one_rank(mesh):
    group = comm.groups(mesh).sp
    x = rough(0, 3, 70)
    for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
        assert call(x, group=group, wire="int8") is x
    refusals(mesh)


def refusals(mesh):
    group = comm.groups(mesh).sp
    p = group.size()
    sizes = [2] * p
    x = torch.zeros(2 * p, 4 * p)
    calls = {
        "all_reduce": partial(comm.all_reduce, group=group),
        "all_gather": partial(comm.all_gather, group=group),
        "reduce_scatter": partial(comm.reduce_scatter, group=group),
        "all_to_all": partial(comm.all_to_all, group=group, send_sizes=sizes, recv_sizes=sizes),
        "seq_to_heads": partial(
            comm.seq_to_heads, columns=[[r] for r in even_ranges(4 * p, p)], tokens=[2 * p] * p, group=group
        ),
        "heads_to_seq": partial(comm.heads_to_seq, widths=[4 * p] * p, tokens=sizes, group=group),
    }
    with own_errors(), comm.record() as counts:
        for name, call in calls.items():
            with pytest.raises(ValueError, match=r"`x` must be float32, bfloat16 or float16 .* got torch.float64"):
                call(x.double(), wire="int8")
            with pytest.raises(ValueError, match=r'`wire` must be "int8", "fp8" or None, got \'int4\''):
                call(x, wire="int4")
            if "_to_" in name and name != "all_to_all":
                with pytest.raises(ValueError, match=r"`head_dim` must divide the columns of every rank .*, got 3"):
                    call(x, head_dim=3, wire="fp8")
        with pytest.raises(ValueError, match=r"`x` must have rows of several numbers .* got shape"):
            comm.all_to_all(x[:, 0], group=group, send_sizes=sizes, recv_sizes=sizes, wire="int8")
        for launch in (comm.all_reduce_async, comm.all_gather_async, comm.reduce_scatter_async):
            with pytest.raises(ValueError, match="leave out `wire`"):
                launch(x.int(), group=group, wire="fp8")
    assert counts.total.calls == 0


def mixed(mesh):
    group = comm.groups(mesh).sp
    formats = ["int8", "fp8", None][: group.size()]
    found = r"launched `all_reduce` of `mlp` \[4, 64\] (float8_e4m3fn|float32) at step 1"
    with pytest.raises(ValueError, match=found), comm.check():
        comm.all_reduce(rough(0, 4, 64), group=group, label="mlp", wire=formats[group.rank()])


@pytest.mark.parametrize("p", [2, 3], ids="p={}".format)
def test_ranks_in_different_formats_are_found_by_the_check(p):
    run_mesh((1, p), mixed)


def test_a_group_of_one_rounds_nothing_but_checks():
    run_mesh((1, 1), one_rank)


def test_bad_formats_are_refused_before_anything_is_sent():
    run_mesh((1, 2), refusals)
