"""The choice of algorithm, and sums in rank order."""

import random
from itertools import pairwise

import pytest
import torch

from seqpar import comm
from seqpar.comm import all_reduce_algorithm
from seqpar.comm.allreduce import sum_in_rank_order
from tests.ranks import run_mesh

SIZES = [1 << k for k in range(30)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_a_deterministic_group_never_uses_the_backend_and_small_goes_in_one_shot(p, device):
    chosen = [all_reduce_algorithm(size, p, True, device) for size in SIZES]
    assert set(chosen) == {"one_shot", "two_shot"}
    assert chosen == sorted(chosen)  # one threshold: "one_shot" < "two_shot"


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_small_sums_on_a_cpu_go_in_one_shot_and_on_cuda_by_nccl(p):
    assert all_reduce_algorithm(8192, p, False, "cpu") == "one_shot"
    assert {all_reduce_algorithm(size, p, False, "cuda") for size in SIZES} == {"backend"}


def test_half_precision_is_summed_in_float32_in_rank_order_and_rounded_once():
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0, -256.0)]
    assert sum_in_rank_order(parts).item() == 2.0  # bfloat16 would lose both ones
    parts = [torch.tensor([v]) for v in (1e8, 1.0, -1e8)]
    assert sum_in_rank_order(parts).item() == 0.0
    assert sum_in_rank_order([parts[0], parts[2], parts[1]]).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_halves_round_once(dtype):
    a, b = (torch.randn(10_000, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    assert torch.equal(sum_in_rank_order([a, b]), (a.float() + b.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_summands_stay(p, dtype):
    parts = [torch.full((3,), rank + 1).to(dtype) for rank in range(p)]
    total = sum_in_rank_order(parts)
    assert total.dtype == dtype
    assert total.tolist() == [p * (p + 1) // 2] * 3
    assert all(part.tolist() == [rank + 1] * 3 for rank, part in enumerate(parts))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_what_has_no_sum_is_refused(dtype):
    with pytest.raises(TypeError, match=f"to be summed, got {dtype}"):
        sum_in_rank_order([torch.zeros(2).to(dtype)] * 2)


def rows_by_chunks(mesh, dtype):
    """Sums of a tensor and of its chunks, so large that the whole goes in two phases and some of them in one."""
    group = comm.groups(mesh).tp
    p, draw = group.size(), random.Random(4)
    rows = ((9 << 20) if p == 2 else (600 << 10)) // (252 * dtype.itemsize)
    torch.manual_seed(group.rank())
    x = (torch.randn(rows, 252) * 2.0 ** torch.randint(-8, 9, (rows, 252))).to(dtype)
    whole = comm.all_reduce(x, group=group)
    assert all_reduce_algorithm(x.numel() * x.itemsize, p, True, "cpu") == "two_shot"
    for _ in range(3):
        cuts = sorted([draw.randint(1, rows // 3), *(draw.randint(0, rows) for _ in range(draw.randint(0, 2)))])
        assert all_reduce_algorithm(x[: cuts[0]].numel() * x.itemsize, p, True, "cpu") == "one_shot"
        sums = [comm.all_reduce(x[a:b], group=group) for a, b in pairwise((0, *cuts, rows))]
        torch.testing.assert_close(torch.cat(sums), whole, rtol=0, atol=0)
    mine = comm.reduce_scatter(x, group=group, dim=1)
    torch.testing.assert_close(comm.all_gather(mine, group=group, dim=1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_deterministic_sums_do_not_depend_on_where_a_row_lies(p, dtype):
    run_mesh((p, 1), rows_by_chunks, dtype, deterministic=True)
