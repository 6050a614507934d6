"""Which rows to make: the closed formulas of every split, and what decides between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seqpar.partition import GridOrder, HeadMap, RingOrder, gather_held, place_tokens
from seqpar.plan import RingCase, ring_costs, usp_costs, usp_volumes

LLAMA_8B = RingCase(131_072, 0, 16, 32, 8, 128)
NVLINK, NETWORK = 400e9, 25e9
HOSTS: dict[str, Any] = {
    "flops": 4e14, "bytes_per_s": NETWORK, "latency_s": 2e-5,
    "row_bytes_per_s": NVLINK, "row_latency_s": 1e-5, "row_ranks": 8,
}  # fmt: skip


def placed(case: RingCase, columns: int) -> GridOrder:
    """Contiguous tokens behind cached ones: every new one sees all of those."""
    new = tuple((runs,) for runs in place_tokens(case.new, case.ranks, "contiguous", first=case.cached))
    old = tuple((runs,) for runs in place_tokens(case.cached, case.ranks, "contiguous"))
    both = tuple(((*a, *b),) for (a,), (b,) in zip(gather_held(old, columns), gather_held(new, columns), strict=True))
    counts = [tuple(sum(run.size for run in runs) for (runs,) in held) for held in (new, old)]
    return GridOrder(RingOrder(gather_held(new, columns), both), *counts)


@pytest.mark.parametrize("cached", [0, 4096])
@pytest.mark.parametrize("columns", [1, 2, 4, 8, 16])
def test_bytes_of_a_split_are_those_of_the_formulas(columns: int, cached: int) -> None:
    """What divides: 16 ranks, 32 and 8 heads. The last row but one passes on the keys of all but the last."""
    case = RingCase(1024, cached, 16, 32, 8, 128)
    n, u, r, d = 16, columns, 16 // columns, 128 * 2
    copies = max(8, u)
    exchange = (u - 1) * (1024 * (32 + 2 * copies) + cached * 2 * copies + 1024 * 32) * d // (u * n)
    ring_kv = (r - 1) * (1024 + cached) * 2 * copies * d // n
    ring_q = (r - 1) * 1024 * 32 * (2 * d + 4) // n
    sent = usp_volumes(placed(case, u), "kv", heads=HeadMap(32, 8), head_dim=128)
    assert max(sent) == sent[max(r - 2, 0) * u] == exchange + ring_kv
    costs = {found.ulysses: found for found in usp_costs(case, **HOSTS)}
    assert sorted(costs) == [1, 2, 4, 8, 16] and costs[u].ring == r
    assert costs[u].exchange_bytes == exchange
    assert costs[u].ring_bytes == {"kv": ring_kv, "q": ring_q}[costs[u].method]
    if cached:  # every query sees cached keys in all rows
        assert max(usp_volumes(placed(case, u), "q", heads=HeadMap(32, 8), head_dim=128)) == exchange + ring_q


def test_a_row_of_one_rank_is_a_ring_and_more_rows_than_heads_are_none() -> None:
    case = RingCase(4096, 0, 16, 4, 2, 128)
    found = {costs.ulysses: costs for costs in usp_costs(case, flops=4e14, bytes_per_s=25e9)}
    assert sorted(found) == [1, 2, 4]
    assert found[1].exchange_bytes == 0
    assert found[1].seconds == min(ring_costs(case, flops=4e14, bytes_per_s=25e9))


def test_the_choice_is_one_of_time() -> None:
    """Rows span a host, which hides what goes between hosts; a whole prompt's ring hides everything by itself."""
    assert usp_costs(replace(LLAMA_8B, new=32_768), **HOSTS)[0].ulysses == 8
    assert usp_costs(replace(LLAMA_8B, new=2**20), **HOSTS)[0].ulysses == 1
    same = {**HOSTS, "row_bytes_per_s": None, "row_latency_s": None, "row_ranks": None}
    fast, slow = ({c.ulysses: c.seconds for c in usp_costs(LLAMA_8B, **options)} for options in (HOSTS, same))
    assert fast[8] < slow[8] and fast[16] == slow[16]  # a row over two hosts
    least = min(usp_costs(replace(LLAMA_8B, new=32_768), **same), key=lambda c: c.exchange_bytes + c.ring_bytes)
    assert least.ulysses == 8  # as many as there are KV heads
    # Few tokens behind a long prefix: its keys would be exchanged at every step, which only the links of a host bear.
    behind = RingCase(512, 131_072, 16, 32, 8, 128)
    assert usp_costs(behind, **HOSTS)[0][:3] == (8, 2, "q")
    assert usp_costs(behind, **same)[0][:3] == (1, 16, "q")


def test_uneven_heads_count_by_the_largest_part() -> None:
    case = RingCase(1000, 0, 2, 3, 1, 64)
    found = {costs.ulysses: costs for costs in usp_costs(case, flops=1e12, bytes_per_s=1e9)}[2]
    # The rank with one head sends two and the keys of both; the one with two returns two.
    assert found.exchange_bytes == 500 * ((2 + 2) + 2) * 128
