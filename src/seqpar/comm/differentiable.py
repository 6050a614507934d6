"""Differentiable collectives: the `_steps` faces, and the plain ones, which run them at once.

A collective is linear, so its gradient is the adjoint collective, stated here by name. One autograd function hangs the
adjoint on a finished result; it is itself a plain collective, so second derivatives work. Backward passes launch
collectives in the order in which autograd visits them, which is the same on every rank where the graphs are: every
rank must use the result. Messages between two ranks (`send`, `recv`) have no gradient.

Results are new tensors, but for a collective that has nothing to do (a group of one, a send to oneself): its steps
yield nothing, and its result is `x` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.comm import collectives as raw
from seqpar.comm.check import current_check
from seqpar.comm.link import ranks_of
from seqpar.comm.steps import Steps, run
from seqpar.comm.wire import Wire, check_wire
from seqpar.partition import even_split

__all__ = [
    "all_gather",
    "all_gather_steps",
    "all_reduce",
    "all_reduce_steps",
    "all_to_all",
    "all_to_all_steps",
    "broadcast",
    "broadcast_steps",
    "recv",
    "recv_steps",
    "reduce_grad",
    "reduce_scatter",
    "reduce_scatter_steps",
    "send",
    "send_recv",
    "send_recv_steps",
    "send_steps",
]

P = ParamSpec("P")
T = TypeVar("T")
Placement = Literal["replicate", "partial"]
Adjoint = Callable[[Tensor], Tensor]


class _Adjoint(torch.autograd.Function):
    """Gives `result`, a linear function of `x` computed without autograd, its gradient.

    A result that autograd knew as a view, of an argument or of a buffer, could not be written to by its owner: so it
    comes in a tuple, and leaves as `data`. Only `x` itself stays a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: tuple[Tensor], adjoint: Adjoint) -> Tensor:
        ctx.adjoint = adjoint
        return x if result[0] is x else result[0].data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None


def with_adjoint(x: Tensor, result: Tensor, adjoint: Adjoint) -> Tensor:
    """`result` with `adjoint` as the way back to `x`, where a gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Adjoint.apply(x, (result,), adjoint)  # type: ignore[no-untyped-call]
        return out
    return result


def all_reduce_steps(
    x: Tensor,
    *,
    group: ProcessGroup,
    grad: Placement = "replicate",
    label: str = "",
    wire: Wire | None = None,
) -> Steps[Tensor]:
    """The sum of `x` over the ranks.

    In:    x{partial}, the same shape on every rank.
    Out:   the sum, replicated, bitwise equal on all ranks.
    Grad:  of the output: `grad`. "replicate" (every rank computes the same loss of it, Megatron's g): passed through.
           "partial" (every rank has its share of the loss): all-reduced.
    Comm:  by size, see `all_reduce_algorithm`; one or two handles. In a `wire` format one for two ranks, else two.

    Raises:
        TypeError: the dtype cannot be summed.
        ValueError: a wire format that is none, or that the dtype cannot take.
    """
    check_wire(wire, x)
    if ranks_of(group) == 1:
        return x
    first, second = raw.all_reduce_phases(x, group, label, wire)
    result = yield first
    if second is not None:
        result = yield second(result)
    back: Adjoint = _same if grad == "replicate" else partial(all_reduce, group=group, grad=grad, label=_back(label))
    return with_adjoint(x, result, back)


def reduce_grad(x: Tensor, *, group: ProcessGroup, label: str = "") -> Tensor:
    """`x` itself, whose gradient is summed over the ranks (Megatron's f).

    In:    x, replicated.
    Out:   x, a view of it.
    Grad:  partial; all-reduced to replicated.
    """
    if ranks_of(group) == 1:
        return x
    return with_adjoint(x, x, partial(all_reduce, group=group, grad="partial", label=_back(label)))


def all_gather_steps(
    x: Tensor,
    *,
    group: ProcessGroup,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    grad: Placement = "partial",
    label: str = "",
    wire: Wire | None = None,
) -> Steps[Tensor]:
    """The concatenation of the ranks' `x` along `dim`.

    In:    x, sharded along `dim`; rank r has `sizes[r]` there (default: all as many as this rank).
    Out:   the whole, replicated.
    Grad:  of the output: `grad`. "partial": reduce-scattered. "replicate": this rank's slice.
    Comm:  each rank sends its shard to p-1 others.

    Raises:
        ValueError: `sizes` does not fit the group or `x`; a wire format that is none, or that the dtype cannot take.
    """
    handle = raw.all_gather_async(x, group=group, dim=dim, sizes=sizes, label=label, wire=wire)
    if ranks_of(group) == 1:
        return x
    result = yield handle
    sizes = (x.shape[dim],) * group.size() if sizes is None else tuple(sizes)
    if grad == "partial":
        return with_adjoint(x, result, partial(reduce_scatter, group=group, dim=dim, sizes=sizes, label=_back(label)))
    start, length = sum(sizes[: group.rank()]), sizes[group.rank()]
    return with_adjoint(x, result, lambda g: g.narrow(dim, start, length))


def reduce_scatter_steps(
    x: Tensor,
    *,
    group: ProcessGroup,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    label: str = "",
    wire: Wire | None = None,
) -> Steps[Tensor]:
    """The sum of `x` over the ranks, of which each rank gets its slice along `dim`.

    In:    x{partial}, the same shape on every rank.
    Out:   the sum, sharded along `dim`; rank r gets `sizes[r]` (default: an even split).
    Grad:  of the output: sharded; all-gathered to replicated.
    Comm:  each rank sends all but its own slice.

    Raises:
        ValueError: `sizes` does not fit the group or `x`; a wire format that is none, or that the dtype cannot take.
        TypeError: the dtype cannot be summed.
    """
    handle = raw.reduce_scatter_async(x, group=group, dim=dim, sizes=sizes, label=label, wire=wire)
    if ranks_of(group) == 1:
        return x
    result = yield handle
    sizes = even_split(x.shape[dim], group.size()) if sizes is None else tuple(sizes)
    return with_adjoint(x, result, partial(all_gather, group=group, dim=dim, sizes=sizes, label=_back(label)))


def all_to_all_steps(
    x: Tensor,
    *,
    group: ProcessGroup,
    send_sizes: Sequence[int],
    recv_sizes: Sequence[int],
    label: str = "",
    wire: Wire | None = None,
) -> Steps[Tensor]:
    """An exchange of rows.

    In:    x[sum(send_sizes), ...]; the rows for rank 0 first, then those for rank 1, and so on.
    Out:   [sum(recv_sizes), ...]; the rows from rank 0 first.
    Grad:  the exchange back.
    Comm:  each rank sends all rows but its own.

    Raises:
        ValueError: the sizes do not fit the group, each other or `x`; a wire format that is none, or that the dtype
            cannot take; one for rows that are single numbers.
    """
    handle = raw.all_to_all_async(x, group=group, send_sizes=send_sizes, recv_sizes=recv_sizes, label=label, wire=wire)
    if ranks_of(group) == 1:
        return x
    result = yield handle
    back = partial(all_to_all, group=group, send_sizes=recv_sizes, recv_sizes=send_sizes, label=_back(label))
    return with_adjoint(x, result, back)


def broadcast_steps(x: Tensor, *, src: int, group: ProcessGroup, label: str = "") -> Steps[Tensor]:
    """Rank `src`'s `x` on all ranks.

    In:    x; on other ranks than `src` only its shape and dtype matter.
    Out:   the value at `src`, replicated.
    Grad:  of the output: partial; summed at `src`, zeros elsewhere.
    Comm:  `src` sends p-1 times.

    Raises:
        ValueError: `src` is no rank of the group.
    """
    handle = raw.broadcast_async(x, src=src, group=group, label=label)
    if ranks_of(group) == 1:
        return x
    result = yield handle
    return with_adjoint(x, result, partial(_reduce, dst=src, group=group, label=_back(label)))


def send_recv_steps(
    x: Tensor,
    *,
    dst: int,
    src: int,
    group: ProcessGroup,
    recv_shape: Sequence[int] | None = None,
    tag: int = 0,
    label: str = "",
) -> Steps[Tensor]:
    """Send `x` to rank `dst` and receive from rank `src`, such as a shift around a ring.

    In:    x, any shape.
    Out:   what `src` sent, of shape `recv_shape` (default: that of `x`).
    Grad:  goes the other way.
    Comm:  each rank sends `x`; a rank that sends to itself only passes `x` through.

    Raises:
        ValueError: `dst` or `src` is no rank of the group, or just one of them is this rank.
    """
    handle = raw.send_recv_async(x, dst=dst, src=src, group=group, recv_shape=recv_shape, tag=tag, label=label)
    back = partial(send_recv, dst=src, src=dst, group=group, recv_shape=x.shape, tag=tag, label=_back(label))
    if dst == group.rank():  # a check counts all ranks in, on the way back too
        return x if current_check() is None else with_adjoint(x, x, back)
    result = yield handle
    return with_adjoint(x, result, back)


def send_steps(x: Tensor, *, dst: int, group: ProcessGroup, label: str = "") -> Steps[Tensor]:
    """Send `x` to one other rank, which receives it (`recv_steps`); the others of the group are not asked.

    `comm.start` it and go on, to wait for it later: its memory is in use until then.

    In:    x, any shape; not to be written until the wait.
    Out:   x itself.
    Grad:  none: a rank that only receives has no graph that could send one back. `send_recv` has.
    Comm:  `x`, to `dst`.

    Raises:
        ValueError: `dst` is no other rank of the group, `x` needs a gradient; the group is on a simulated link.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("`x` must need no gradient to be sent, got one that does; use torch.no_grad(), or `send_recv`")
    yield raw.send_async(x, dst=dst, group=group, label=label)
    return x


def recv_steps(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    src: int,
    group: ProcessGroup,
    device: torch.device | str = "cpu",
    label: str = "",
) -> Steps[Tensor]:
    """Receive what one other rank sends (`send_steps`).

    Out:   a new tensor of that shape and dtype.
    Grad:  none.
    Comm:  nothing is sent.

    Raises:
        ValueError: `src` is no other rank of the group, a negative size; the group is on a simulated link.
    """
    result: Tensor = yield raw.recv_async(shape, dtype, src=src, group=group, device=device, label=label)
    return result


def _reduce_steps(x: Tensor, *, dst: int, group: ProcessGroup, label: str = "") -> Steps[Tensor]:
    """The adjoint of a broadcast."""
    result = yield raw.reduce_async(x, dst=dst, group=group, label=label)
    return with_adjoint(x, result, partial(broadcast, src=dst, group=group, label=_back(label)))


def _same(grad: Tensor) -> Tensor:
    return grad


def _back(label: str) -> str:
    return f"{label} (backward)" if label else ""


def _plain(steps: Callable[P, Steps[T]]) -> Callable[P, T]:
    """The face that runs the steps at once."""

    @wraps(steps)
    def face(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(steps(*args, **kwargs))

    face.__name__ = steps.__name__.removesuffix("_steps")
    return face


all_reduce = _plain(all_reduce_steps)
all_gather = _plain(all_gather_steps)
reduce_scatter = _plain(reduce_scatter_steps)
all_to_all = _plain(all_to_all_steps)
broadcast = _plain(broadcast_steps)
send_recv = _plain(send_recv_steps)
send = _plain(send_steps)
recv = _plain(recv_steps)
_reduce = _plain(_reduce_steps)
