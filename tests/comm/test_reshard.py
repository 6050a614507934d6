"""Reshards between tokens and heads: the plan in one process, the exchange against slices of the global matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import comm
from seqpar.comm.reshard import Reshard
from seqpar.kernels import quantize
from seqpar.partition import HeadMap, Range, even_split
from tests.ranks import run_mesh

WORLD = (1, 2, 3, 4)
HEADS = ((12, 12), (12, 4), (12, 1), (12, 2), (5, 5), (7, 1), (28, 4))
"""Query and KV heads: MHA, GQA, MQA, fewer KV heads than ranks, and counts that do not divide."""


@st.composite
def plans(draw):
    """Any columns for each rank, in any order, overlapping or empty: the arguments of a plan.

    (The plan itself is made in the test: the annotation checker draws random numbers, which a strategy must not.)
    """
    p = draw(st.integers(1, 4))
    width = draw(st.integers(1, 9))
    bounds = st.tuples(st.integers(0, width), st.integers(0, width)).map(sorted)
    columns = tuple(tuple(Range(*r) for r in draw(st.lists(bounds, max_size=3))) for _ in range(p))
    return columns, tuple(draw(st.integers(0, 4)) for _ in range(p)), width


@st.composite
def tilings(draw):
    """Consecutive columns."""
    widths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    columns = tuple((Range(end - width, end),) for width, end in zip(widths, ends, strict=True))
    return columns, tuple(draw(st.integers(0, 4)) for _ in widths), sum(widths)


def position_coded(*shape):
    return torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).view(shape)


@given(plans() | tilings())
def test_pack_puts_the_columns_of_each_rank_one_block_after_another(args):
    plan = Reshard(*args)
    rows = plan.tokens[0]
    x = position_coded(rows, plan.width)
    packed = plan.pack(x)
    blocks = packed.split([rows * width for width in plan.widths])
    for block, ranges, width in zip(blocks, plan.columns, plan.widths, strict=True):
        wanted = [x[:, column] for r in ranges for column in range(*r)]
        assert torch.equal(block.view(rows, width), torch.stack(wanted, 1) if wanted else x[:, :0])


@given(plans() | tilings())
def test_unpack_is_the_adjoint_of_pack(args):
    plan = Reshard(*args)
    rows = plan.tokens[0]
    x, y = position_coded(rows, plan.width), 1 + position_coded(rows * sum(plan.widths))
    assert (plan.pack(x) * y).sum() == (x * plan.unpack(y, rows)).sum()


@given(tilings())
def test_unpack_inverts_pack_where_the_columns_tile(args):
    plan = Reshard(*args)
    x = position_coded(plan.tokens[0], plan.width)
    assert plan.tiles
    assert torch.equal(plan.unpack(plan.pack(x), len(x)), x)


@given(plans() | tilings())
def test_what_one_rank_sends_another_receives(args):
    plan = Reshard(*args)
    p = len(plan.tokens)
    for a in range(p):
        for b in range(p):
            assert plan.wide_sizes(a)[b] == plan.tall_sizes(b)[a]


def qkv(heads, kv_heads, p, head_dim):
    """The column ranges of the fused QKV of one tp rank, scaled to elements."""
    return tuple(tuple(r.scale(head_dim) for r in ranges) for ranges in HeadMap(heads, kv_heads, 1, p).columns(0))


def round_trip(mesh, heads, kv_heads, total):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    columns, tokens = qkv(heads, kv_heads, p, 3), even_split(total, p)
    width = HeadMap(heads, kv_heads, 1, p).width(0) * 3
    whole = position_coded(total, width)
    x = whole.split(tokens)[rank]
    for source in (x, x.clone().t().contiguous().t()):
        before = source.clone()
        out = comm.seq_to_heads(source, columns=columns, tokens=tokens, group=group)
        expected = torch.cat([whole[:, r.start : r.stop] for r in columns[rank]], 1)
        torch.testing.assert_close(out, expected, atol=0, rtol=0)
        assert torch.equal(source, before)
    # The way back: the query heads alone, as attention returns them.
    widths = [n * 3 for n in HeadMap(heads, kv_heads, 1, p).out_widths(0)]
    whole = position_coded(total, heads * 3)
    mine = whole.split(widths, 1)[rank]
    for source in (mine, mine.contiguous()):
        out = comm.heads_to_seq(source, widths=widths, tokens=tokens, group=group)
        torch.testing.assert_close(out, whole.split(tokens)[rank], atol=0, rtol=0)
        assert torch.equal(source, whole.split(widths, 1)[rank])


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_layout(p, heads):
    for total in (13, 2 * p, 1):
        run_mesh((1, p), round_trip, *heads, total)


def in_wire_format(mesh, heads, kv_heads, wire):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    columns, tokens = qkv(heads, kv_heads, p, 3), even_split(13, p)
    width = HeadMap(heads, kv_heads, 1, p).width(0) * 3
    whole = torch.randn(13, width, generator=torch.Generator().manual_seed(1))
    options = {"tokens": tokens, "group": group, "wire": wire, "head_dim": 3}

    def rounded(x):
        return quantize.decode(quantize.encode(x.reshape(-1, 3), wire), 3, x.dtype, wire).view(x.shape)

    x = whole.split(tokens)[rank].requires_grad_()
    with comm.record() as counts:
        out = comm.seq_to_heads(x, columns=columns, **options)
    expected = torch.cat([rounded(whole)[:, r.start : r.stop] for r in columns[rank]], 1)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    if p > 1:
        others = sum(r.size for i, ranges in enumerate(columns) if i != rank for r in ranges)
        assert counts.total.sent_bytes == tokens[rank] * others // 3 * 5
        (grad,) = torch.autograd.grad(out.sum(), x)
        (plain,) = torch.autograd.grad(comm.seq_to_heads(x, columns=columns, tokens=tokens, group=group).sum(), x)
        assert torch.equal(grad, plain)
    widths = [n * 3 for n in HeadMap(heads, kv_heads, 1, p).out_widths(0)]
    whole = whole[:, : heads * 3]
    back = comm.heads_to_seq(whole.split(widths, 1)[rank], widths=widths, **options)
    torch.testing.assert_close(back, rounded(whole).split(tokens)[rank] if p > 1 else whole, atol=0, rtol=0)


@pytest.mark.parametrize("heads", [(12, 2), (7, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("p", WORLD[1:], ids="p={}".format)
def test_a_wire_format_rounds_each_head_by_itself_wherever_it_goes(p, heads):
    run_mesh((1, p), in_wire_format, *heads, "int8")


def gradients(mesh, heads, kv_heads):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    columns, tokens = qkv(heads, kv_heads, p, 2), even_split(7, p)
    width = HeadMap(heads, kv_heads, 1, p).width(0) * 2

    def dot(a, b):
        return comm.all_reduce((a * b).sum().view(1), group=group)

    def adjoint(op, x):
        x.requires_grad_()
        out = op(x)
        y = position_coded(*out.shape) % 7 + rank
        kept = y.clone()
        (grad,) = torch.autograd.grad(out, x, y)
        assert torch.equal(y, kept)
        assert torch.equal(dot(out.detach(), y), dot(x.detach(), grad))
        expanded = torch.autograd.grad(op(x).sum(), x) + torch.autograd.grad(op(x), x, torch.ones_like(out))
        assert torch.equal(*expanded)

    x = position_coded(tokens[rank], width) % 11 - rank
    adjoint(lambda x: comm.seq_to_heads(x, columns=columns, tokens=tokens, group=group), x)
    widths = [n * 2 for n in HeadMap(heads, kv_heads, 1, p).out_widths(0)]
    y = position_coded(7, widths[rank]) % 11 - rank
    adjoint(lambda y: comm.heads_to_seq(y, widths=widths, tokens=tokens, group=group), y)


@pytest.mark.parametrize("heads", [(12, 12), (12, 2), (5, 1), (28, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_adjoint_law(p, heads):
    run_mesh((1, p), gradients, *heads)


def one_collective(mesh):
    """A fused QKV travels in one all-to-all each way, and its bytes are those of the plan."""
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    columns, tokens = qkv(8, 2, p, 4), even_split(9, p)
    widths = [sum(r.size for r in ranges) for ranges in columns]
    x = torch.ones(tokens[rank], HeadMap(8, 2, 1, p).width(0) * 4)
    with comm.record() as recorder:
        out = comm.seq_to_heads(x, columns=columns, tokens=tokens, group=group, label="in")
        comm.heads_to_seq(out[:, : 8 * 4 // p], widths=[8 * 4 // p] * p, tokens=tokens, group=group, label="out")
    sent_in = 4 * tokens[rank] * (sum(widths) - widths[rank])
    sent_out = 4 * (9 - tokens[rank]) * 8 * 4 // p
    assert recorder.counts == {
        ("all_to_all", "in"): comm.Count(1, sent_in, sent_in),
        ("all_to_all", "out"): comm.Count(1, sent_out, sent_out),
    }


@pytest.mark.parametrize("p", (2, 4), ids="p={}".format)
def test_one_collective_each_way(p):
    run_mesh((1, p), one_collective)


def size_one(mesh):
    group = comm.groups(mesh).sp
    x = torch.ones(3, 8).t()
    with comm.record() as recorder:
        assert comm.seq_to_heads(x, columns=[[Range(0, 3)]], tokens=[8], group=group) is x
        assert comm.heads_to_seq(x, widths=[3], tokens=[8], group=group) is x
    assert recorder.counts == {}
    picked = comm.seq_to_heads(position_coded(2, 4), columns=[[Range(2, 4), Range(0, 1)]], tokens=[2], group=group)
    assert picked.tolist() == [[2, 3, 0], [6, 7, 4]]


def test_a_group_of_one_copies_nothing():
    run_mesh((1, 1), size_one)


def bad_arguments(mesh):
    group = comm.groups(mesh).sp
    x, columns = torch.ones(2, 6), [[Range(0, 3)], [Range(3, 6)]]
    with pytest.raises(ValueError, match=r"`x` must be \[3, 6\] on rank \d of group `sp` \(ranks 0, 1\), got \[2, 6\]"):
        comm.seq_to_heads(x, columns=columns, tokens=[3, 3], group=group)
    with pytest.raises(ValueError, match="must have an entry for each rank of group `sp`"):
        comm.seq_to_heads(x, columns=columns[:1], tokens=[2, 2], group=group)
    with pytest.raises(ValueError, match=r"`columns` must lie within the columns of `x` \(6\)"):
        comm.seq_to_heads(x, columns=[[Range(0, 3)], [Range(3, 7)]], tokens=[2, 2], group=group)
    with pytest.raises(ValueError, match=r"`x` must be \[4, 3\]"):
        comm.heads_to_seq(x, widths=[3, 3], tokens=[2, 2], group=group)


def test_bad_arguments():
    run_mesh((1, 2), bad_arguments)
