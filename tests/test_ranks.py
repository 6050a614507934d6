"""The pool of ranks: it says who failed, died or hung, and works again afterwards."""

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from tests.ranks import LAYOUTS, RankError, run_mesh, run_ranks


def who(rank, p):
    return rank, p, os.getpid()


def test_results_come_in_rank_order_from_processes_that_stay():
    first, again = run_ranks(3, who), run_ranks(3, who)
    assert [(rank, p) for rank, p, _ in first] == [(0, 3), (1, 3), (2, 3)]
    assert first == again
    assert len({pid for _, _, pid in first}) == 3


def raise_on(rank, p, bad):
    if rank == bad:
        raise RuntimeError("this rank is bad")


def test_a_failing_rank_is_named_with_its_traceback_and_the_next_run_works():
    with pytest.raises(
        RankError, match=r"rank 1 failed\n--- rank 1 ---\n(.|\n)*raise_on(.|\n)*this rank is bad"
    ) as info:
        run_ranks(2, raise_on, 1)
    assert list(info.value.failures) == [1]
    assert [rank for rank, _, _ in run_ranks(2, who)] == [0, 1]


def die_on(rank, p, bad):
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_dead_rank_is_named_with_its_signal():
    with pytest.raises(RankError, match=r"rank 2 failed\n--- rank 2 ---\ndied \(SIGKILL\)"):
        run_ranks(3, die_on, 2, isolated=True)


def test_a_rank_may_be_allowed_to_die():
    assert run_ranks(2, die_on, 0, isolated=True, may_die=[0]) == [None, "alive"]


def hang_on(rank, p, bad):
    if rank == bad:
        time.sleep(60)


def test_a_hung_rank_is_named_with_its_stack():
    with pytest.raises(RankError, match=r"rank 0 failed\n--- rank 0 ---\nhung for 0.5 s in\n(.|\n)*in hang_on"):
        run_ranks(2, hang_on, 0, isolated=True, timeout_s=0.5)


def wait_for_a_failed_rank(rank, p):
    if rank == 1:
        raise RuntimeError("the cause")
    dist.barrier()


def test_ranks_that_wait_for_the_failed_one_are_shown_beside_it():
    with pytest.raises(RankError, match="the cause") as info:
        run_ranks(2, wait_for_a_failed_rank, isolated=True)
    assert list(info.value.failures) == [1, 0]
    assert "hung while another rank had failed" in info.value.failures[0]


def warn(rank, p):
    warnings.warn("look", stacklevel=1)


def test_a_warning_in_a_rank_is_an_error():
    with pytest.raises(RankError, match="UserWarning: look"):
        run_ranks(1, warn, isolated=True)


def surroundings(rank, p):
    poisoned = bool(torch.empty(64).isnan().all())
    return poisoned, torch.get_num_threads(), os.environ["TRITON_INTERPRET"]


def test_ranks_are_poisoned_single_threaded_and_interpret_triton():
    assert run_ranks(1, surroundings) == [(True, 1, "1")]
    assert surroundings(0, 1) == (True, 1, "1")


def wrong_type(rank, p):
    comm.describe("no group")


def test_ranks_check_annotations():
    with pytest.raises(RankError, match="violates type hint"):
        run_ranks(1, wrong_type, isolated=True)


def mesh_and_args(mesh, a, b):
    return comm.groups(mesh).layout, a + b


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_run_mesh_passes_the_mesh_of_the_layout(layout):
    assert run_mesh(layout, mesh_and_args, 1, 2) == [(layout, 3)] * (layout[0] * layout[1])
