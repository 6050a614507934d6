"""A rank that dies or stays away: the others get an error that names the collective and the group, and soon."""

import os
import re
import signal
import time
from functools import partial

import pytest
import torch

from seqpar import comm
from seqpar.partition import Range
from tests.ranks import run_ranks

TIMEOUT_S = 3.0


def launches(group):
    """Every kind of collective, for groups of three."""
    rank, x = group.rank(), torch.ones(6, 4)
    kw = {"group": group, "label": "layers.3.mlp"}
    return {
        "all_reduce": partial(comm.all_reduce, x, **kw),
        "all_reduce (large)": partial(comm.all_reduce, torch.ones(1 << 21), **kw),
        "all_gather": partial(comm.all_gather, x, **kw),
        "reduce_scatter": partial(comm.reduce_scatter, x, **kw),
        "all_to_all": partial(comm.all_to_all, x, send_sizes=[2] * 3, recv_sizes=[2] * 3, **kw),
        "broadcast": partial(comm.broadcast, x, src=2, **kw),
        "send_recv": partial(comm.send_recv, x, dst=(rank + 1) % 3, src=(rank - 1) % 3, **kw),
        "seq_to_heads": partial(
            comm.seq_to_heads, x, columns=[[Range(0, 1)], [Range(1, 2)], [Range(2, 4)]], tokens=[6] * 3, **kw
        ),
    }


def survive(rank, p, op, how):
    mesh = comm.init_mesh(1, 3, "cpu", timeout_s=TIMEOUT_S)
    group = comm.groups(mesh).sp
    launch = launches(group)[op]
    launch()  # all is well
    if rank == 2:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 * TIMEOUT_S)
        return None
    start = time.monotonic()
    with pytest.raises(comm.CommError) as info:
        launch()
        launch()  # what was already received from the dead is no failure
        launch()
    return str(info.value), time.monotonic() - start


SHORT = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "seq_to_heads")


@pytest.mark.parametrize("op", (*SHORT, "all_reduce (large)"))
def test_a_rank_that_dies_is_an_error_on_the_others(op):
    *others, dead = run_ranks(3, survive, op, "dies", isolated=True, may_die=[2])
    assert dead is None
    check(op, others)


def test_a_rank_that_stays_away_is_an_error_after_the_timeout():
    *others, _ = run_ranks(3, survive, "all_reduce", "sleeps", isolated=True)
    check("all_reduce", others)


def check(op, reports):
    name = {"all_reduce (large)": "all_reduce", "seq_to_heads": "all_to_all"}.get(op, op)
    for rank, (message, seconds) in enumerate(reports):
        expected = f"`{name}` of `layers.3.mlp` on rank {rank} of group `sp` (ranks 0, 1, 2) failed; a rank died"
        assert re.match(re.escape(expected), message), message
        assert seconds < 3 * TIMEOUT_S
