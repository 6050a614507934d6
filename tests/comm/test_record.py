"""Counts of calls and bytes, against the volumes of the textbook."""

import threading

import pytest
import torch

from seqpar import comm
from seqpar.comm import Count
from seqpar.partition import even_split
from tests.ranks import run_mesh


def volumes(mesh):
    group = comm.groups(mesh).sp
    p, rank = group.size(), group.rank()
    x = torch.ones(7, 5)  # 140 bytes
    own = even_split(35, p)[rank]
    rows = even_split(7, p)[rank]
    with comm.record() as recorder:
        for _ in range(2):
            comm.all_reduce(x, group=group, label="a")
        comm.all_gather(x, group=group, label="b")
        comm.reduce_scatter(x.double(), group=group, label="b")
        comm.all_to_all(torch.ones(2 * p, 5), group=group, send_sizes=[2] * p, recv_sizes=[2] * p)
        comm.broadcast(x, src=0, group=group)
        comm.send_recv(x, dst=(rank + 1) % p, src=(rank - 1) % p, group=group)
    best = 4 * ((35 - own) + (p - 1) * own)
    expected = {
        ("all_reduce", "a"): Count(2, 2 * best, 2 * 140 * (p - 1)),
        ("all_gather", "b"): Count(1, 140 * (p - 1), 140 * (p - 1)),
        ("reduce_scatter", "b"): Count(1, 40 * (7 - rows), 40 * (7 - rows)),
        ("all_to_all", ""): Count(1, 40 * (p - 1), 40 * (p - 1)),
        ("broadcast", ""): Count(1, 140 * (p - 1) * (rank == 0), 140 * (p - 1) * (rank == 0)),
        ("send_recv", ""): Count(1, 140, 140),
    }
    assert recorder.counts == expected
    assert recorder.total.calls == 7
    assert recorder.by_op()["all_reduce"] == expected["all_reduce", "a"]
    b = expected["all_gather", "b"].plus(expected["reduce_scatter", "b"])
    assert recorder.by_label()["b"] == b
    return recorder.total.num_bytes


@pytest.mark.parametrize("p", (2, 3, 4), ids="p={}".format)
def test_volumes(p):
    run_mesh((1, p), volumes)


def two_shot_and_backward(mesh):
    group = comm.groups(mesh).sp
    x = torch.ones(1 << 20, requires_grad=True)
    with comm.record() as recorder:
        out = comm.all_reduce(x, group=group, grad="partial", label="l")
        with comm.record() as inner:
            out.sum().backward()
    n = 4 * 2 * (1 << 20) * (group.size() - 1) // group.size()
    assert recorder.counts == {("all_reduce", "l"): Count(1, n, n)}
    assert inner.counts == {("all_reduce", "l (backward)"): Count(1, n, n)}


def test_a_two_shot_sum_is_one_call_and_the_backward_pass_has_its_own_label():
    run_mesh((1, 2), two_shot_and_backward, deterministic=True)
    run_mesh((1, 4), two_shot_and_backward)


def test_the_innermost_context_of_the_thread_counts():
    with comm.record() as outer:
        with comm.record() as inner:
            count("a")
            thread = threading.Thread(target=count, args=("other thread",))
            thread.start()
            thread.join()
        count("b")
    count("c")
    assert list(inner.counts) == [("a", "")]
    assert list(outer.counts) == [("b", "")]


def count(op):
    from seqpar.comm.record import count

    count(op, "", 1)


def test_the_table():
    recorder = comm.Recorder()
    recorder.add("all_reduce", "layers.0.mlp", 1000, 2000)
    recorder.add("all_reduce", "layers.0.mlp", 234, 234)
    recorder.add("all_gather", "", 1, 1)
    assert recorder.table().splitlines() == [
        "collective  label         calls  bytes   sent",
        "all_gather                    1      1      1",
        "all_reduce  layers.0.mlp      2  1,234  2,234",
        "total                         3  1,235  2,235",
    ]
