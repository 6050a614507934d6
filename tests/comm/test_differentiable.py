"""Gradients of collectives: the adjoint law in exact arithmetic, and what autograd must not be told wrong."""

from functools import partial

import pytest
import torch

from seqpar import comm
from tests.ranks import run_mesh

WORLD = (1, 2, 3, 4)


def integers(seed, *shape):
    """Small integers in float64: sums of their products are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


def global_dot(a, b, group):
    return comm.all_reduce((a * b).sum().view(1), group=group)


def check_adjoint(op, x, back, group):
    """The sum over ranks of <C x, y> equals that of <x, C* y>, where C* is the gradient, or `back` of what it gets.

    Neither the argument nor the gradient of the output is written, and a sibling of the output keeps its gradient.
    """
    leaf = x.clone().requires_grad_()
    branch = leaf * 1
    out = op(branch)
    assert out.requires_grad
    y = integers(100 + group.rank(), *out.shape)
    sent, before = y.clone(), branch.detach().clone()
    (grad,) = torch.autograd.grad(out, branch, sent, retain_graph=True)
    assert torch.equal(sent, y)
    assert torch.equal(branch.detach(), before)
    assert torch.equal(global_dot(out.detach(), back(y), group), global_dot(x, grad, group))
    ((out * y).sum() + (branch * before).sum()).backward()
    assert torch.equal(leaf.grad, grad + before)
    # An expanded gradient, as that of `sum()`, is no special case.
    (ones,) = torch.autograd.grad(op(leaf).sum(), leaf)
    (same,) = torch.autograd.grad(op(leaf), leaf, torch.ones_like(out))
    assert torch.equal(ones, same)


def adjoints(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()

    def same(y):
        return y

    sizes = [r % 3 for r in range(p)]
    x = integers(rank, 6, 5)
    check_adjoint(partial(comm.all_reduce, group=group, grad="partial"), x, same, group)
    for dim in (0, 1):
        shard = integers(rank, *((sizes[rank], 5) if dim == 0 else (5, sizes[rank])))
        check_adjoint(partial(comm.all_gather, group=group, dim=dim, sizes=sizes), shard, same, group)
        check_adjoint(partial(comm.reduce_scatter, group=group, dim=dim), x, same, group)
        whole = integers(rank, *((sum(sizes), 5) if dim == 0 else (5, sum(sizes))))
        check_adjoint(partial(comm.reduce_scatter, group=group, dim=dim, sizes=sizes), whole, same, group)
    table = [[(a + 2 * b) % 3 for b in range(p)] for a in range(p)]  # [from][to]
    send, recv = table[rank], [row[rank] for row in table]
    exchange = partial(comm.all_to_all, group=group, send_sizes=send, recv_sizes=recv)
    check_adjoint(exchange, integers(rank, sum(send), 5), same, group)
    for src in range(p):
        check_adjoint(partial(comm.broadcast, src=src, group=group), x, same, group)
    shift = partial(comm.send_recv, dst=(rank + 1) % p, src=(rank - 1) % p, group=group)
    check_adjoint(partial(shift, recv_shape=((rank - 1) % p + 1, 3)), integers(rank, rank + 1, 3), same, group)


def megatron(mesh):
    """The conjugate pair f, g: a gradient that is replicated stays so and is not summed again."""
    group = comm.groups(mesh).tp
    p, rank = group.size(), group.rank()
    y = integers(7, 4, 5)  # the same on all ranks: the gradient of a replicated loss
    x = integers(rank, 4, 5).requires_grad_()
    (grad,) = torch.autograd.grad(comm.all_reduce(x, group=group), x, y)
    assert torch.equal(grad, y)
    gathered = comm.all_gather(x, group=group, dim=1, grad="replicate")
    (grad,) = torch.autograd.grad(gathered, x, torch.cat([y] * p, 1))
    assert torch.equal(grad, y)
    x = integers(7, 4, 5).requires_grad_()
    out = comm.reduce_grad(x, group=group)
    assert torch.equal(out, x)
    (grad,) = torch.autograd.grad(out, x, integers(rank, 4, 5))
    assert torch.equal(grad, sum(integers(r, 4, 5) for r in range(p)))


def slices_of_gathered_gradient(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    sizes = [r + 1 for r in range(p)]
    x = integers(rank, sizes[rank], 3).requires_grad_()
    y = integers(9, sum(sizes), 3)
    (grad,) = torch.autograd.grad(comm.all_gather(x, group=group, sizes=sizes, grad="replicate"), x, y)
    assert torch.equal(grad, y.split(sizes)[rank])


def second_derivatives(mesh):
    """The backward of a backward, through an all-gather and its reduce-scatter."""
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    parts = [integers(r, 4, 3) for r in range(p)]
    x = parts[rank].clone().requires_grad_()
    (first,) = torch.autograd.grad(comm.all_gather(x, group=group).pow(2).sum(), x, create_graph=True)
    assert torch.equal(first, 2 * p * parts[rank])
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    assert torch.equal(second, 8 * p * p * parts[rank])


def no_graph(mesh):
    group = comm.groups(mesh).sp
    x = torch.ones(4, 5, requires_grad=True)
    with torch.no_grad():
        assert not comm.all_reduce(x, group=group).requires_grad
    assert not comm.all_reduce(x.detach(), group=group).requires_grad


def results_are_the_callers(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    for op in (
        comm.all_reduce,
        comm.all_gather,
        comm.reduce_scatter,
        partial(comm.broadcast, src=0),
        partial(comm.send_recv, dst=(rank + 1) % p, src=(rank - 1) % p),
    ):
        x = torch.ones(p, 5, requires_grad=True)
        out = op(x * 1, group=group)
        out += 1
        out.sum().backward()
        assert torch.equal(x.detach(), torch.ones(p, 5))
        assert x.grad is not None
    out = comm.reduce_grad(x * 1, group=group)
    with pytest.raises(RuntimeError, match="is being modified inplace"):  # it is `x` itself
        out += 1


def yields(mesh):
    """The steps yield handles that name the collective, and return what the plain face returns."""
    group = comm.groups(mesh).sp
    steps = comm.all_reduce_steps(torch.ones(3), group=group, label="layer")
    handle = next(steps)
    assert (handle.op, handle.label) == ("all_reduce", "layer")
    with pytest.raises(StopIteration) as stop:
        steps.send(handle.wait())
    assert torch.equal(stop.value.value, torch.full((3,), float(group.size())))


def alone(mesh):
    """A group of one has nothing to yield, checks its arguments all the same, and returns `x` itself."""
    group, x = comm.groups(mesh).sp, torch.ones(3)
    for steps, good, bad in (
        (comm.all_reduce_steps, {}, None),
        (comm.all_gather_steps, {}, {"sizes": [2]}),
        (comm.reduce_scatter_steps, {}, {"sizes": [2]}),
        (comm.all_to_all_steps, {"send_sizes": [3], "recv_sizes": [3]}, {"send_sizes": [2], "recv_sizes": [2]}),
        (comm.broadcast_steps, {"src": 0}, {"src": 1}),
        (comm.send_recv_steps, {"dst": 0, "src": 0}, {"dst": 1, "src": 0}),
    ):
        with pytest.raises(StopIteration) as stop:
            next(steps(x, group=group, **good))
        assert stop.value.value is x
        if bad is not None:
            with pytest.raises(ValueError, match="must"):
                next(steps(x, group=group, **bad))


BODIES = (adjoints, megatron, slices_of_gathered_gradient, second_derivatives)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.parametrize("p", WORLD, ids="p={}".format)
def test_gradients(p, body):
    run_mesh((p, 1) if body is megatron else (1, p), body)


@pytest.mark.parametrize("body", [no_graph, results_are_the_callers], ids=lambda body: body.__name__)
@pytest.mark.parametrize("p", WORLD[1:], ids="p={}".format)
def test_results(p, body):
    run_mesh((1, p), body)


def test_steps_yield_named_handles():
    run_mesh((1, 2), yields)


def test_a_group_of_one_has_nothing_to_do():
    run_mesh((1, 1), alone)


def test_plain_faces_are_named():
    reshards = {"seq_to_heads", "heads_to_seq"}
    for name in {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"} | reshards:
        face = getattr(comm, name)
        assert face.__name__ == name
        assert face.__doc__ == getattr(comm, f"{name}_steps").__doc__
