"""The check against products and attention of other random values than it tried."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from seqpar.kernels import attention, invariance, is_cut_invariant, is_row_invariant, linear
from seqpar.partition import even_split
from seqpar.ragged import RaggedBatch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("features", [5, 64, 300, 512])
@pytest.mark.parametrize(("tokens", "cuts"), [(7, (1, 6)), (96, (32, 80)), (96, (33,)), (40, ())])
@pytest.mark.parametrize("sp", [1, 3])
def test_what_it_says_of_products_holds_for_other_values(
    tokens: int, cuts: tuple[int, ...], features: int, sp: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(11)
    weight, x = (torch.randn(rows, features, dtype=torch.float64).to(dtype) for rows in (48, tokens))

    def shared_out(rows: Tensor) -> list[Tensor]:
        return [linear(part.clone(), weight) for part in rows.split(even_split(len(rows), sp))]

    chunks = [out for a, b in pairwise((0, *cuts, tokens)) for out in shared_out(x[a:b])]
    equal = torch.equal(torch.cat(chunks), torch.cat(shared_out(x)))
    found = is_row_invariant(weight, tokens, cuts, sp=sp)
    assert equal or not found
    assert found or cuts


def test_products_that_depend_on_the_number_of_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine: a library that rounds an addition otherwise in products of few rows."""
    plain = invariance.linear
    monkeypatch.setattr(invariance, "linear", lambda x, *rest: plain(x, *rest) + (len(x) < 9) * 2.0**-22)
    weight = torch.randn(32, 16)
    assert not is_row_invariant(weight, 64, (8,))
    assert not is_row_invariant(weight, 64, (17,), sp=2, bias=torch.ones(32))


@DTYPES
@pytest.mark.parametrize(("window", "deterministic"), [(None, False), (None, True), (33, False), (33, True)])
@pytest.mark.parametrize("q_lens", [(64, 32, 97), (193,)], ids=str)
@pytest.mark.parametrize("cuts", [(64,), (64, 128), (64, 192), (50,), (0, 193)], ids=str)
def test_what_it_says_of_attention_holds_for_other_values(
    cuts: tuple[int, ...], q_lens: tuple[int, ...], window: int | None, deterministic: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(11)
    options = {"window": window, "deterministic": deterministic}
    batch = RaggedBatch.build(q_lens, q_lens, [[i] for i in range(len(q_lens))], 193)
    q, k, v = torch.randn(193, 4, 8).to(dtype), *torch.randn(2, 3 * 193, 2, 8).to(dtype)
    pages = [x[: 193 * len(q_lens)].view(-1, 193, 2, 8) for x in (k, v)]
    bounds = pairwise((0, *cuts, 193))
    whole = attention(q, k[batch.slots], v[batch.slots], batch.without_cache, **options)[0]
    chunks = []
    for (a, b), part in zip(bounds, batch.split(cuts), strict=True):
        keys, over = pages, part
        if part.kv_lens == part.q_lens:
            keys, over = [x[part.slots] for x in (k, v)], part.without_cache
        chunks.append(attention(q[a:b], *keys, over, **options)[0])
    found = is_cut_invariant(batch, cuts, num_heads=4, num_kv_heads=2, head_dim=8, dtype=dtype, **options)
    assert found == torch.equal(torch.cat(chunks), whole)
    into = [min(cut - start for start in batch.q_starts if start <= cut) for cut in cuts]  # its request
    assert found or any(into)
    if deterministic or window is not None:
        assert found or any(tokens % 64 for tokens in into)


def test_cuts_must_lie_in_order_within_the_step() -> None:
    for cuts in ((3, 2), (9,), (-1,)):
        with pytest.raises(ValueError, match=r"`cuts` must be in order and lie in \[0, 8\], got"):
            is_row_invariant(torch.ones(2, 2), 8, cuts)
        with pytest.raises(ValueError, match=r"`cuts` must be in order and lie in \[0, 8\], got"):
            is_cut_invariant(
                RaggedBatch.prefill([8]), cuts, num_heads=1, num_kv_heads=1, head_dim=8, dtype=torch.float32
            )
