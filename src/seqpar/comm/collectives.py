"""Raw collectives: each launches, and returns a `Handle`; no autograd, no write to an argument.

All but the backend's own all-reduce and broadcast are exchanges (`alltoall`; NCCL keeps its even gathers and
reduce-scatters): gloo's exchange is its fastest collective by two to four times, takes uneven sizes, which its gathers
do not, and moves no part that a rank keeps where that part lies at an end of the buffer (`_trim`). Sends and receives
lost: 20 % faster on an idle machine, but several times slower in the median on a busy one.

An exchange calls the process group's method, which `torch.distributed.all_to_all_single` and PyTorch's own functional
collectives end in; the wrapper doubles the host time of a launch, 3 to 6 us where this module adds about 10 (an AMD
EPYC, 2026-11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from seqpar.comm.allreduce import all_reduce_algorithm, check_summable, sum_in_rank_order
from seqpar.comm.failure import failure
from seqpar.comm.flight import announce, cross, depart, is_watched
from seqpar.comm.handle import Handle
from seqpar.comm.link import link_of, ranks_of
from seqpar.comm.mesh import describe, is_deterministic
from seqpar.comm.record import count
from seqpar.comm.wire import Code, Wire, check_wire
from seqpar.partition import even_split

__all__ = [
    "all_gather_async",
    "all_reduce_async",
    "all_to_all_async",
    "broadcast_async",
    "recv_async",
    "reduce_async",
    "reduce_scatter_async",
    "send_async",
    "send_recv_async",
]


def all_reduce_async(x: Tensor, *, group: ProcessGroup, label: str = "", wire: Wire | None = None) -> Handle:
    """Launch the sum of `x` over the ranks.

    In:    x{partial}, the same shape on every rank; not to be written until the wait.
    Out:   the sum, replicated, bitwise equal on all ranks.
    Comm:  by size, see `all_reduce_algorithm`; in a `wire` format in one shot for two ranks, else in two.

    Raises:
        TypeError: the dtype cannot be summed.
        ValueError: a wire format that is none, or that the dtype cannot take.
    """
    first, second = all_reduce_phases(x, group, label, wire)
    if second is None:
        return first
    # The second phase can only start when the first has ended: here that is in `wait`.
    return first.then(lambda part: second(part).wait())


Phase = Callable[[Tensor], Handle]


def all_reduce_phases(
    x: Tensor, group: ProcessGroup, label: str, wire: Wire | None = None
) -> tuple[Handle, Phase | None]:
    """Launch an all-reduce; and, if it takes two phases, how to launch the second with the result of the first."""
    op, p, n = "all_reduce", group.size(), x.numel()
    check_wire(wire, x)
    if p == 1:
        return _all_reduce_alone(op, label, group, x, wire)
    if wire is not None:
        return _encoded_all_reduce(op, label, group, x.detach(), Code.of_sum(x, wire, p))
    check_summable(x.dtype)
    x = x.detach()
    algorithm = all_reduce_algorithm(n * x.itemsize, p, is_deterministic(group), x.device.type)
    own = (n + p - 1 - group.rank()) // p  # this rank's part of an even split
    least = n + (p - 2) * own
    count(op, label, least * x.itemsize, ((p - 1) * n if algorithm == "one_shot" else least) * x.itemsize)
    if algorithm == "one_shot":
        flat = x.contiguous().view(-1)
        return _one_shot(op, label, group, flat, x.shape).then(lambda total: total.view(x.shape)), None
    if algorithm == "backend":
        out = x.clone(memory_format=torch.contiguous_format)  # gloo reduces only part of a strided tensor
        sent_bytes = least * x.itemsize
        launch = partial(group.allreduce, [out])
        return _launched(op, label, group, launch, lambda: out, (out,), sent_bytes, x.shape), None
    sizes = even_split(n, p)
    return (
        _reduce_parts(op, label, group, x.contiguous().view(-1), sizes, x.shape),
        lambda part: _gather_parts(op, label, group, part, sizes, lambda flat: flat.view(x.shape), x.shape),
    )


def all_gather_async(
    x: Tensor,
    *,
    group: ProcessGroup,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    label: str = "",
    wire: Wire | None = None,
) -> Handle:
    """Launch the concatenation of the ranks' `x` along `dim`.

    In:    x, sharded along `dim`; rank r has `sizes[r]` there (default: all as many as this rank).
    Out:   the whole, replicated.
    Comm:  each rank sends its shard to p-1 others.

    Raises:
        ValueError: `sizes` does not fit the group or `x`; a wire format that is none, or that the dtype cannot take.
    """
    op, p, rank = "all_gather", group.size(), group.rank()
    dim = _dim(x, dim)
    sizes = _sizes((x.shape[dim],) * p if sizes is None else sizes, "sizes", group)
    _check_rows(x.shape[dim], sizes[rank], f"`x.shape[{dim}]`", "this rank's entry of `sizes`")
    codes = _codes(x, dim, sizes, wire)
    if p == 1:
        return _alone(op, label, group, x, _rest(x, group), codes[0])
    x = x.detach()
    others = prod(x.shape[:dim] + x.shape[dim + 1 :])
    elements = [code.size(size * others) for code, size in zip(codes, sizes, strict=True)]

    def unpack(flat: Tensor) -> Tensor:
        if dim == 0 and len(set(codes)) == 1:
            return codes[0].decode(flat).view(sum(sizes), *x.shape[1:])
        parts = zip(codes, flat.split(elements), sizes, strict=True)
        shaped = [code.decode(part).view(*x.shape[:dim], size, *x.shape[dim + 1 :]) for code, part, size in parts]
        return torch.cat(shaped, dim)

    part = codes[rank].encode(x)
    count(op, label, (p - 1) * part.numel() * part.itemsize)
    return _gather_parts(op, label, group, part, elements, unpack, x.shape)


def reduce_scatter_async(
    x: Tensor,
    *,
    group: ProcessGroup,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    label: str = "",
    wire: Wire | None = None,
) -> Handle:
    """Launch the sum of `x` over the ranks, of which each rank gets its slice along `dim`.

    In:    x{partial}, the same shape on every rank.
    Out:   the sum, sharded along `dim`; rank r gets `sizes[r]` (default: an even split).
    Comm:  each rank sends all but its own slice.

    Raises:
        ValueError: `sizes` does not fit the group or `x`; a wire format that is none, or that the dtype cannot take.
        TypeError: the dtype cannot be summed.
    """
    op, p, rank = "reduce_scatter", group.size(), group.rank()
    dim = _dim(x, dim)
    sizes = _sizes(even_split(x.shape[dim], p) if sizes is None else sizes, "sizes", group)
    _check_rows(x.shape[dim], sum(sizes), f"`x.shape[{dim}]`", "the sum of `sizes`")
    codes = _codes(x, dim, sizes, wire)
    if p == 1:
        return _alone(op, label, group, x, _rest(x, group), codes[0])
    check_summable(x.dtype)
    x = x.detach()
    others = prod(x.shape[:dim] + x.shape[dim + 1 :])
    if dim == 0 and len(set(codes)) == 1:
        flat = codes[0].encode(x)
    else:
        flat = torch.cat([code.encode(part) for code, part in zip(codes, x.split(list(sizes), dim), strict=True)])
    elements = [code.size(size * others) for code, size in zip(codes, sizes, strict=True)]
    count(op, label, (flat.numel() - elements[rank]) * flat.itemsize)
    shape = (*x.shape[:dim], sizes[rank], *x.shape[dim + 1 :])
    add = sum_in_rank_order if wire is None else codes[rank].sum
    return _reduce_parts(op, label, group, flat, elements, x.shape, add).then(lambda part: part.view(shape))


def all_to_all_async(
    x: Tensor,
    *,
    group: ProcessGroup,
    send_sizes: Sequence[int],
    recv_sizes: Sequence[int],
    label: str = "",
    wire: Wire | None = None,
) -> Handle:
    """Launch an exchange of rows.

    In:    x[sum(send_sizes), ...]; the rows for rank 0 first, then those for rank 1, and so on.
    Out:   [sum(recv_sizes), ...]; the rows from rank 0 first.
    Comm:  each rank sends all rows but its own.

    Raises:
        ValueError: the sizes do not fit the group, each other or `x`; a wire format that is none, or that the dtype
            cannot take; one for rows that are single numbers.
    """
    op, p, rank = "all_to_all", group.size(), group.rank()
    send_sizes = _sizes(send_sizes, "send_sizes", group)
    recv_sizes = _sizes(recv_sizes, "recv_sizes", group)
    _check_rows(x.shape[0], sum(send_sizes), "`x.shape[0]`", "the sum of `send_sizes`")
    _check_rows(send_sizes[rank], recv_sizes[rank], "this rank's entry of `send_sizes`", "that of `recv_sizes`")
    code = Code.of(x, wire)
    if wire is not None and x.ndim < 2:
        raise ValueError(f"`x` must have rows of several numbers to travel in a wire format, got shape {list(x.shape)}")
    if p == 1:
        return _alone(op, label, group, x, _rest(x, group), code)
    row = prod(x.shape[1:])
    sent = code.encode(x.detach())
    send, received = ([code.size(size * row) for size in sizes] for sizes in (send_sizes, recv_sizes))
    count(op, label, (sent.numel() - send[rank]) * sent.itemsize)
    out = sent.new_empty(sum(received))
    shape = (sum(recv_sizes), *x.shape[1:])
    return exchange(
        op, label, group, (sent, send), (out, received), lambda: code.decode(out).view(shape), shape=x.shape
    )


def broadcast_async(x: Tensor, *, src: int, group: ProcessGroup, label: str = "") -> Handle:
    """Launch the copy of rank `src`'s `x` to all ranks.

    In:    x; on other ranks than `src` only its shape and dtype matter.
    Out:   the value at `src`, replicated; a new tensor on every rank of a group of several.
    Comm:  `src` sends p-1 times; counted there.

    Raises:
        ValueError: `src` is no rank of the group.
    """
    op, p = "broadcast", group.size()
    _check_rank(src, "src", group)
    if p == 1:
        return _alone(op, label, group, x, (ranks_of(group) - 1) * x.numel())
    x = x.detach()
    here = group.rank() == src
    sent_bytes = (p - 1) * x.numel() * x.itemsize if here else 0
    count(op, label, sent_bytes)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if here:
        out.copy_(x)
    launch = partial(group.broadcast, _as_bytes(out), src)
    return _launched(op, label, group, launch, lambda: out, (out,), sent_bytes, x.shape, src=src)


def reduce_async(x: Tensor, *, dst: int, group: ProcessGroup, label: str = "") -> Handle:
    """Launch the sum of `x` over the ranks for rank `dst`, in rank order; the others get zeros.

    In:    x{partial}, the same shape on every rank.
    Out:   the sum at `dst`, zeros elsewhere.
    Comm:  all but `dst` send `x`.

    Raises:
        ValueError: `dst` is no rank of the group.
        TypeError: the dtype cannot be summed.
    """
    op, p, rank, n = "reduce", group.size(), group.rank(), x.numel()
    _check_rank(dst, "dst", group)
    if p == 1:
        return _alone(op, label, group, x, 0)
    check_summable(x.dtype)
    flat = x.detach().contiguous().view(-1)
    count(op, label, 0 if rank == dst else n * x.itemsize)
    if rank != dst:
        nothing = flat.new_empty(0), [0] * p
        send = flat, _only(dst, n, p)
        return exchange(op, label, group, send, nothing, lambda: torch.zeros_like(flat).view(x.shape), shape=x.shape)
    recv = flat.new_empty((p - 1) * n)
    return exchange(
        op,
        label,
        group,
        (flat[:0], [0] * p),
        (recv, _all_but(rank, n, p)),
        lambda: _sum_with_own(recv, flat, p, rank).view(x.shape),
        (flat,),
        x.shape,
    )


def send_recv_async(
    x: Tensor,
    *,
    dst: int,
    src: int,
    group: ProcessGroup,
    recv_shape: Sequence[int] | None = None,
    tag: int = 0,
    label: str = "",
) -> Handle:
    """Launch a send of `x` to rank `dst`, and a receive from rank `src`.

    In:    x, any shape.
    Out:   what `src` sent, of shape `recv_shape` (default: that of `x`).
    Comm:  each rank sends `x`; a rank that sends to itself only passes `x` through.

    Raises:
        ValueError: `dst` or `src` is no rank of the group, or just one of them is this rank.
    """
    op, rank = "send_recv", group.rank()
    _check_rank(dst, "dst", group)
    _check_rank(src, "src", group)
    if (dst == rank) != (src == rank):
        raise ValueError(f"`dst` and `src` must both be this rank ({rank}) or neither, got {dst} and {src}")
    if dst == rank:
        announce(op, label, group, x, x.shape, ([0] * group.size(),) * 2)  # the others count this rank in
        return Handle.finished(op, label, group, x)
    x = x.detach().contiguous()
    sent_bytes = x.numel() * x.itemsize
    count(op, label, sent_bytes)
    out = x.new_empty(x.shape if recv_shape is None else tuple(recv_shape))
    ops = [
        dist.P2POp(dist.isend, _as_bytes(x), group=group, tag=tag, group_peer=dst),
        dist.P2POp(dist.irecv, _as_bytes(out), group=group, tag=tag, group_peer=src),
    ]
    launch = partial(dist.batch_isend_irecv, ops)
    sizes = _only(dst, x.numel(), group.size()), _only(src, out.numel(), group.size())
    return _launched(op, label, group, launch, lambda: out, (x, out), sent_bytes, x.shape, sizes)


def send_async(x: Tensor, *, dst: int, group: ProcessGroup, label: str = "") -> Handle:
    """Launch a message to one other rank, which receives it by `recv_async`; the others of the group are not asked.

    Messages between two ranks are received in the order in which they were sent. A receiver may be needed for the wait
    to end, never for the launch to return.

    In:    x, any shape; not to be written until the wait.
    Out:   x itself.
    Comm:  `x`, to `dst`; a message of no elements does not travel.

    Raises:
        ValueError: `dst` is no other rank of the group; the group is on a simulated link.
    """
    _check_peer(dst, "dst", group)
    x = x.detach()
    return _message("send", label, group, x.contiguous(), dst, lambda: x)


def recv_async(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    src: int,
    group: ProcessGroup,
    device: torch.device | str = "cpu",
    label: str = "",
) -> Handle:
    """Launch the receipt of a message from one other rank; see `send_async`.

    Out:   what `src` sent, a new tensor.
    Comm:  nothing is sent.

    Args:
        shape: of the message.
        dtype: of it.
        src: who sends.
        group: both are in it.
        device: where it goes.
        label: names it.

    Raises:
        ValueError: `src` is no other rank of the group, a negative size; the group is on a simulated link.
    """
    _check_peer(src, "src", group)
    if min(shape, default=0) < 0:
        raise ValueError(f"`shape` must have sizes >= 0, got {list(shape)}")
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    return _message("recv", label, group, out, src, lambda: out)


def _message(op: str, label: str, group: ProcessGroup, x: Tensor, peer: int, finish: Callable[[], Tensor]) -> Handle:
    """One half of a message, in `x`, which the other half is with `peer`."""
    sends = op == "send"
    num_bytes = x.numel() * x.itemsize * sends
    count(op, label, num_bytes)
    flight, agreement = cross(op, label, group, x, num_bytes, peer) if is_watched() else (None, ())
    works: list[Work | None] = []
    if x.numel():
        try:
            if sends:
                works.append(dist.isend(_as_bytes(x), group=group, group_dst=peer))
            else:
                works.append(dist.irecv(_as_bytes(x), group=group, group_src=peer))
        except RuntimeError as error:
            raise failure(op, label, group, error) from error
    return Handle(op, label, group, (*agreement, *filter(None, works)), finish, (x,), flight)


def _check_peer(rank: int, name: str, group: ProcessGroup) -> None:
    _check_rank(rank, name, group)
    if rank == group.rank():
        raise ValueError(f"`{name}` must be another rank of the group, got {rank}, which is this one")
    if link_of(group) is not None:
        raise ValueError(
            f"messages must be sent over the group's own link, got a simulated one for {describe(group)}; its ends "
            "would not meet; leave out `link.on`"
        )


def _alone(op: str, label: str, group: ProcessGroup, x: Tensor, elements: int, code: Code | None = None) -> Handle:
    """A collective of one rank, whose link may have it take the time of sending `elements`, encoded by `code`."""
    num_bytes = elements * x.itemsize if code is None else code.num_bytes(elements)
    flight = depart(op, label, group, x, num_bytes, x.shape) if ranks_of(group) > 1 else None
    return Handle.finished(op, label, group, x, flight)


def _rest(x: Tensor, group: ProcessGroup) -> int:
    """Elements of `x` outside of the first rank's part of an even split."""
    return x.numel() - even_split(x.numel(), ranks_of(group))[0]


def _all_reduce_alone(
    op: str, label: str, group: ProcessGroup, x: Tensor, wire: Wire | None
) -> tuple[Handle, Phase | None]:
    """`_alone` in the phases that the ranks set by the link would need, each of which sends what rank 0 would."""
    p, n, code = ranks_of(group), x.numel(), Code.of(x, wire)
    rest = _rest(x, group)
    gathered = (p - 1) * (n - rest)
    algorithm = all_reduce_algorithm(n * x.itemsize, p, is_deterministic(group), x.device.type)
    if wire is not None:
        algorithm = "one_shot" if p == 2 else "two_shot"
    if algorithm == "two_shot":
        return _alone(op, label, group, x, rest, code), lambda part: _alone(op, label, group, part, gathered, code)
    return _alone(op, label, group, x, (p - 1) * n if algorithm == "one_shot" else rest + gathered, code), None


Part = tuple[Tensor, list[int]]
"""A flat buffer, and how many of its elements belong to each rank."""


def exchange(
    op: str,
    label: str,
    group: ProcessGroup,
    send: Part,
    recv: Part,
    finish: Callable[[], Tensor],
    held: tuple[Tensor, ...] = (),
    shape: Sequence[int] | None = None,
) -> Handle:
    """Launch the exchange that all others are made of, of flat contiguous buffers in rank order.

    `held` is what `finish` reads besides them, `shape` that of the tensor that the caller was given.
    """
    (source, send_sizes), (target, recv_sizes) = send, recv
    flight = None
    if is_watched():
        sent_bytes = (sum(send_sizes) - send_sizes[group.rank()]) * source.itemsize
        flight = depart(op, label, group, source, sent_bytes, shape, (send_sizes, recv_sizes))
    sent, received = source, target
    if source.dtype not in _MOVED_AS_THEY_ARE:
        sent, received = _as_bytes(source), _as_bytes(target)
        send_sizes = [size * source.itemsize for size in send_sizes]
        recv_sizes = [size * source.itemsize for size in recv_sizes]
    try:
        work = group.alltoall_base(received, sent, recv_sizes, send_sizes)
    except RuntimeError as error:
        raise failure(op, label, group, error) from error
    return Handle(op, label, group, (work,), finish, (target, source, *held), flight)


_MOVED_AS_THEY_ARE = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8}
)


def _as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor in the dtype that every backend moves (8-bit floats, for one, they do not)."""
    return x.view(-1).view(torch.uint8)


def _launched(
    op: str,
    label: str,
    group: ProcessGroup,
    launch: Callable[[], Work | list[Work]],
    finish: Callable[[], Tensor],
    buffers: Sequence[Tensor],
    sent_bytes: int,
    shape: Sequence[int] | None = None,
    sizes: tuple[Sequence[int], Sequence[int]] | None = None,
    src: int | None = None,
) -> Handle:
    flight = depart(op, label, group, buffers[0], sent_bytes, shape, sizes, src)
    try:
        works = launch()
    except RuntimeError as error:
        raise failure(op, label, group, error) from error
    return Handle(op, label, group, works if isinstance(works, list) else (works,), finish, buffers, flight)


Sum = Callable[[Sequence[Tensor]], Tensor]
"""The sum of what the ranks sent, in rank order."""


def _encoded_all_reduce(op: str, label: str, group: ProcessGroup, x: Tensor, code: Code) -> tuple[Handle, Phase | None]:
    """`all_reduce_phases` in a wire format, whose summands are rounded, and the sum too where it takes two phases."""
    p, rows = group.size(), x.numel() // code.unit
    flat = code.encode(x)
    sizes = [code.size(size * code.unit) for size in even_split(rows, p)]
    count(op, label, flat.numel() + (p - 2) * sizes[group.rank()])
    if p == 2:
        return _one_shot(op, label, group, flat, x.shape, code.sum).then(lambda total: total.view(x.shape)), None
    return (
        _reduce_parts(op, label, group, flat, sizes, x.shape, code.sum_encoded),
        lambda part: _gather_parts(
            op, label, group, part, sizes, lambda sent: code.decode(sent).view(x.shape), x.shape
        ),
    )


def _one_shot(
    op: str,
    label: str,
    group: ProcessGroup,
    flat: Tensor,
    shape: Sequence[int] | None = None,
    add: Sum = sum_in_rank_order,
) -> Handle:
    """Everything to everyone, then the sum here. With two ranks the buffers are `flat` and the result's summand."""
    p, rank, n = group.size(), group.rank(), flat.numel()
    sizes = _all_but(rank, n, p)
    recv = flat.new_empty((p - 1) * n)
    return exchange(
        op,
        label,
        group,
        (flat if p == 2 else flat.repeat(p - 1), sizes),
        (recv, sizes),
        lambda: _sum_with_own(recv, flat, p, rank, add),
        (flat,),
        shape,
    )


def _reduce_parts(
    op: str,
    label: str,
    group: ProcessGroup,
    flat: Tensor,
    sizes: Sequence[int],
    shape: Sequence[int] | None = None,
    add: Sum = sum_in_rank_order,
) -> Handle:
    """The flat sum over the ranks of this rank's part of `flat`, whose parts are of `sizes`."""
    p, rank, mine = group.size(), group.rank(), sizes[group.rank()]
    if flat.is_cuda and add is sum_in_rank_order and not is_deterministic(group) and len(set(sizes)) == 1:
        out = flat.new_empty(mine)
        return _launched(
            op,
            label,
            group,
            lambda: group._reduce_scatter_base(out, flat, dist.ReduceScatterOptions()),
            lambda: out,
            (out, flat),
            (flat.numel() - mine) * flat.itemsize,
            shape,
        )
    send, send_sizes, trimmed = _trim(flat, sizes, rank)
    recv = flat.new_empty((p - trimmed) * mine)

    def finish() -> Tensor:
        if trimmed:
            return _sum_with_own(recv, flat[_own(sizes, rank)], p, rank, add)
        return add(recv.view(p, mine).unbind(0))

    recv_sizes = _all_but(rank, mine, p) if trimmed else [mine] * p
    return exchange(op, label, group, (send, send_sizes), (recv, recv_sizes), finish, shape=shape)


def _gather_parts(
    op: str,
    label: str,
    group: ProcessGroup,
    part: Tensor,
    sizes: Sequence[int],
    unpack: Callable[[Tensor], Tensor],
    shape: Sequence[int] | None = None,
) -> Handle:
    """The ranks' flat parts, of `sizes`, one after another, through `unpack`."""
    p, rank = group.size(), group.rank()
    out = part.new_empty(sum(sizes))
    if part.is_cuda and len(set(sizes)) == 1:
        return _launched(
            op,
            label,
            group,
            lambda: group._allgather_base(_as_bytes(out), _as_bytes(part)),
            lambda: unpack(out),
            (out, part),
            (p - 1) * part.numel() * part.itemsize,
            shape,
        )
    recv, recv_sizes, trimmed = _trim(out, sizes, rank)
    copies = p - trimmed
    send_sizes = _all_but(rank, part.numel(), p) if trimmed else [part.numel()] * p
    send = part if copies == 1 else part.repeat(copies)
    if trimmed and part.is_cuda:
        out[_own(sizes, rank)] = part  # before the launch, which orders every stream that waits after it
    handle = exchange(op, label, group, (send, send_sizes), (recv, recv_sizes), lambda: unpack(out), shape=shape)
    if trimmed and not part.is_cuda:
        out[_own(sizes, rank)] = part  # while the others' parts are under way
    return handle


def _trim(buffer: Tensor, sizes: Sequence[int], rank: int) -> tuple[Tensor, list[int], bool]:
    """`buffer` and its sizes without the part of this rank, and whether it could be left out: only at an end."""
    rest = list(sizes)
    if 0 < rank < len(sizes) - 1:
        return buffer, rest, False
    rest[rank] = 0
    return (buffer[sizes[0] :] if rank == 0 else buffer[: sum(rest)]), rest, True


def _own(sizes: Sequence[int], rank: int) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def _sum_with_own(others: Tensor, own: Tensor, p: int, rank: int, add: Sum = sum_in_rank_order) -> Tensor:
    """The sum in rank order of p parts, of which `others` holds all but this rank's; `others` may be written."""
    if p == 2 and add is sum_in_rank_order:
        return others.add_(own)  # one rounding, and the order of two does not matter
    parts = list(others.view(p - 1, own.numel()).unbind(0))
    parts.insert(rank, own)
    return add(parts)


def _all_but(rank: int, size: int, p: int) -> list[int]:
    sizes = [size] * p
    sizes[rank] = 0
    return sizes


def _only(rank: int, size: int, p: int) -> list[int]:
    sizes = [0] * p
    sizes[rank] = size
    return sizes


def _codes(x: Tensor, dim: int, sizes: Sequence[int], wire: Wire | None) -> list[Code]:
    """The code of each rank's part of `x` along `dim`; all are one, but where it is the rows that are cut."""
    if wire is None or dim != x.ndim - 1:
        return [Code.of(x, wire)] * len(sizes)
    return [Code.of(x, wire, size) for size in sizes]


def _dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"`dim` must be a dimension of `x` (ndim {x.ndim}), got {dim}")
    return dim % x.ndim


def _sizes(sizes: Sequence[int], name: str, group: ProcessGroup) -> Sequence[int]:
    if len(sizes) != group.size() or min(sizes) < 0:
        raise ValueError(f"`{name}` must be one size >= 0 for each rank of {describe(group)}, got {tuple(sizes)}")
    return sizes


def _check_rows(actual: int, wanted: int, name: str, bound: str) -> None:
    if actual != wanted:
        raise ValueError(f"{name} must be {bound} ({wanted}), got {actual}")


def _check_rank(rank: int, name: str, group: ProcessGroup) -> None:
    if not 0 <= rank < group.size():
        raise ValueError(f"`{name}` must be a rank of the group (below {group.size()}), got {rank}")
