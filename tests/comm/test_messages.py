"""Messages between two ranks: what arrives, in which order, what is counted, traced and checked, what is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned


def group_of(mesh: comm.DeviceMesh) -> ProcessGroup:
    return comm.groups(mesh).tp


def goes_round(mesh: comm.DeviceMesh) -> None:
    """Everyone sends to everyone, several messages each, of other shapes and dtypes; they arrive as they were sent."""
    group = group_of(mesh)
    p, rank = group.size(), group.rank()

    def message(src: int, dst: int, number: int) -> Tensor:
        x = torch.arange(2 * 3 * (number + 1)).view(2, 3, number + 1) + 100 * src + 10 * dst
        return x.to([torch.float64, torch.bfloat16, torch.int64][number]).transpose(0, 1)

    others = [other for other in range(p) if other != rank]
    mine = [message(rank, dst, number) for number in range(3) for dst in others]
    before = [x.clone() for x in mine]
    with comm.record() as sent, comm.trace() as seen, comm.check():
        sends = [
            comm.send_async(mine[i], dst=others[i % len(others)], group=group, label="out") for i in range(len(mine))
        ]
        awaited = [(message(src, rank, number), src) for number in range(3) for src in others]
        recvs = [comm.recv_async(x.shape, x.dtype, src=src, group=group, label="in") for x, src in awaited]
        for handle, (expected, _) in reversed(list(zip(recvs, awaited, strict=True))):
            assert torch.equal(handle.wait(), expected) and torch.equal(handle.wait(), expected)
        for handle, x, old in zip(sends, mine, before, strict=True):
            assert handle.wait() is handle.wait() and torch.equal(handle.wait(), old) and torch.equal(x, old)
    total = sum(x.numel() * x.itemsize for x in mine)
    assert sent.counts == {
        ("send", "out"): comm.Count(len(mine), total, total),
        ("recv", "in"): comm.Count(len(mine), 0, 0),
    }
    kinds = [(i.kind, i.op, i.label) for i in seen.intervals]
    for key in (("comm", "send", "out"), ("comm", "recv", "in"), ("wait", "send", "out"), ("wait", "recv", "in")):
        assert kinds.count(key) == len(mine)
    assert sum(i.num_bytes for i in seen.intervals if i.kind == "comm") == total


@pytest.mark.parametrize("p", thinned([2, 3, 4], lambda p: p == 2))
def test_messages_arrive_in_order(p: int) -> None:
    run_mesh((p, 1), goes_round)


def under_way(mesh: comm.DeviceMesh) -> None:
    """A launch waits for nobody, and what was asked for arrives without anybody waiting for it; or this hangs."""
    group, like = group_of(mesh), torch.empty(0)
    x = torch.arange(1 << 21, dtype=torch.float32)  # more than sockets hold
    if group.rank() == 0:
        sending = comm.start(comm.send_steps(x, dst=1, group=group))
        meet(group)
        assert comm.run(sending) is x
        comm.send(-x, dst=1, group=group)
        meet(group)
    else:
        meet(group)  # before anything is asked for
        assert torch.equal(comm.recv(x.shape, like.dtype, src=0, group=group), x)
        asked = comm.recv_async(x.shape, like.dtype, src=0, group=group)
        meet(group)  # once the other rank has waited
        assert torch.equal(asked.wait(), -x)


def meet(group: ProcessGroup) -> None:
    comm.all_reduce(torch.zeros(1), group=group)


def test_a_launch_waits_for_nobody() -> None:
    run_mesh((2, 1), under_way)


def nothing(mesh: comm.DeviceMesh) -> None:
    """Messages of no elements, among others."""
    group = group_of(mesh)
    for rows in (0, 2, 0):
        if group.rank() == 0:
            comm.send(torch.full((rows, 3), 7.0), dst=1, group=group)
        else:
            assert torch.equal(comm.recv((rows, 3), torch.float32, src=0, group=group), torch.full((rows, 3), 7.0))


def test_messages_of_nothing() -> None:
    run_mesh((2, 1), nothing)


def refuses(mesh: comm.DeviceMesh) -> None:
    group = group_of(mesh)
    rank, x = group.rank(), torch.zeros(2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: comm.send(x, dst=2, group=group), r"`dst` must be a rank of the group \(below 2\), got 2"),
        (lambda: comm.send(x, dst=-1, group=group), "`dst` must be a rank of the group .*, got -1"),
        (lambda: comm.send(x, dst=rank, group=group), f"`dst` must be another rank of the group, got {rank}, which is"),
        (lambda: comm.recv((2,), x.dtype, src=rank, group=group), f"`src` must be another rank .*, got {rank}"),
        (
            lambda: comm.recv((2, -1), x.dtype, src=1 - rank, group=group),
            r"`shape` must have sizes >= 0, got \[2, -1\]",
        ),
        (
            lambda: comm.send(torch.zeros(2, requires_grad=True), dst=1 - rank, group=group),
            "`x` must need no gradient to be sent, got one that does; use torch.no_grad",
        ),
    ]
    for call, message in cases:
        with own_errors(), pytest.raises(ValueError, match=message):
            call()
    link = comm.SimulatedLink(alpha_s=0.0, bytes_per_s=1e9)
    with link.on(group), pytest.raises(ValueError, match="messages must be sent over the group's own link, got a sim"):
        comm.send(x, dst=1 - rank, group=group)
    goes_round(mesh)


def test_what_is_refused() -> None:
    run_mesh((2, 1), refuses)


def other_shape(group: ProcessGroup) -> None:
    send_then_receive(group, (3, 2), torch.float32)


def other_dtype(group: ProcessGroup) -> None:
    send_then_receive(group, (2, 3), torch.float64)


def send_then_receive(group: ProcessGroup, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if group.rank() == 0:
        comm.send(torch.zeros(2, 3), dst=1, group=group, label="mine")
    else:
        comm.recv(shape, dtype, src=0, group=group, label="yours")


def never_received(group: ProcessGroup) -> None:
    if group.rank() == 0:
        comm.send(torch.zeros(2, 3), dst=1, group=group, label="mine")


def never_sent(group: ProcessGroup) -> None:
    if group.rank() == 1:
        comm.recv((2, 3), torch.float32, src=0, group=group, label="yours")
    else:
        time.sleep(1.5)


WHERE = r"message 1 from rank 0 to rank 1 of group `tp` \(ranks 0, 1\)"
DIFFERENCES: dict[Callable[[ProcessGroup], None], str] = {
    other_shape: rf"rank \d launched `(send|recv)` of `\w+` \[\d, \d\] float32 as {WHERE}, where rank \d launched "
    r"`(send|recv)` of `\w+` \[\d, \d\] float32; both must have one shape and dtype",
    other_dtype: rf"rank \d launched .* as {WHERE}, where rank \d launched .*; both must have one shape and dtype",
    never_received: rf"rank 1 left `comm.check\(\)` before {WHERE}, where rank 0 launched `send` of `mine` \[2, 3\] "
    "float32; rank 1 launched nothing",
    never_sent: rf"rank 0 did not come within 0.5 s to {WHERE}, where rank 1 launched `recv` of `yours` \[2, 3\] "
    "float32; rank 0 launched nothing",
}


def differ(mesh: comm.DeviceMesh, number: int) -> str:
    """The error on this rank, where there is one."""
    body = list(DIFFERENCES)[number]
    with own_errors(), pytest.raises(ValueError) as raised, comm.check(timeout_s=0.5 if body is never_sent else 20.0):
        body(group_of(mesh))
    return str(raised.value)


@pytest.mark.parametrize("body", DIFFERENCES, ids=lambda body: body.__name__)
def test_halves_that_differ_are_an_error_on_both_ranks(body: Callable[[ProcessGroup], None]) -> None:
    errors = run_mesh((2, 1), differ, list(DIFFERENCES).index(body), isolated=True)
    assert len(set(errors)) == 1, errors
    assert re.fullmatch(DIFFERENCES[body], errors[0]), errors[0]
