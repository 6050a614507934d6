import os, signal, time
import pytest, torch
from seqpar import comm
from tests.ranks import RankError, run_mesh, run_ranks


def _sum(mesh, n):
    g = comm.groups(mesh)
    x = torch.arange(n, dtype=torch.float64)
    y = comm.all_reduce(x, group=g.flat)
    torch.testing.assert_close(y, x * g.layout.size)
    return g.flat.rank()


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 4)])
def test_sum(layout):
    assert run_mesh(layout, _sum, 10) == list(range(layout[0] * layout[1]))
