"""Attention by block lists: what is in the lists and not after the query, whatever the blocks, heads and positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import BlockLists, sparse_attention
from seqpar.kernels.sparse import decode_sketch, encode_sketch, sketch_bytes
from seqpar.partition import Range
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
DIM = 4


def ranges(sizes: list[int]) -> tuple[Range, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    positions: tuple[Tensor, Tensor],
    heads: tuple[int, ...],
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """All scores, of which a mask leaves those of listed keys that the query may see."""
    listed = torch.zeros(len(heads), len(q), len(k), dtype=torch.bool)
    for rows, of_heads in zip(lists.rows, lists.lists, strict=True):
        for head, kv_head in enumerate(heads):
            for block in of_heads[kv_head]:
                listed[head, slice(*rows), slice(*lists.keys[block])] = True
    age = positions[0][:, None] - positions[1]
    listed &= (age >= 0) & (age < (window or 10**9))
    scores = (torch.einsum("shd,nd->hsn", q, k) * 0.3).masked_fill(~listed, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("hsn,nd->shd", weights, v), lse.T


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_attends_to_the_listed_blocks_that_are_not_later(backend: str, data: st.DataObject, seed: int) -> None:
    heads = data.draw(st.sampled_from([(0, 1), (0, 0, 1, 1), (0, 0, 0), (0, 1, 1)]))
    row_sizes = data.draw(st.lists(st.integers(0, 4), max_size=3))
    key_sizes = data.draw(st.lists(st.integers(0, 3), max_size=5))
    window = data.draw(st.sampled_from([None, 1, 6]))
    blocks = st.lists(st.integers(0, len(key_sizes) - 1), unique=True) if key_sizes else st.just([])
    of_heads = st.tuples(*[blocks.map(tuple) for _ in range(max(heads) + 1)])
    lists = BlockLists(ranges(row_sizes), ranges(key_sizes), tuple(data.draw(of_heads) for _ in row_sizes))
    rng = torch.Generator().manual_seed(seed)
    rows, keys = sum(row_sizes) + 1, sum(key_sizes) + 1  # the last query is in no block
    q = torch.randn(rows, len(heads) + 1, DIM, generator=rng, dtype=torch.float64)[:, 1:]
    k, v = torch.randn(keys, 2, DIM, generator=rng, dtype=torch.float64).unbind(1)
    positions = torch.randint(0, 12, (rows,), generator=rng), torch.randint(0, 12, (keys,), generator=rng)
    found = sparse_attention(
        q,
        k,
        v,
        lists,
        q_positions=positions[0],
        k_positions=positions[1],
        softmax_scale=0.3,
        kv_head_of=heads,
        window=window,
        backend=backend,
    )
    for got, want in zip(found, dense(q, k, v, lists, positions, heads, window), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_long_blocks_in_low_precision(dtype: torch.dtype) -> None:
    """300 queries along the diagonal: in the middle of each block of 128 some see keys that others do not."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, DIM, generator=rng).to(dtype) for shape in ((300, 2), (400,), (400,)))
    positions = torch.arange(100, 400), torch.arange(400)
    lists = BlockLists((Range(0, 300),), (Range(0, 250), Range(300, 400)), (((0, 1),),))
    rule = {"q_positions": positions[0], "k_positions": positions[1], "softmax_scale": 0.3, "kv_head_of": (0, 0)}
    exact, mass = dense(q.double(), k.double(), v.double(), lists, positions, (0, 0), 70)
    plain = sparse_attention(q, k, v, lists, **rule, window=70, backend="reference")[0].double()
    out, lse = sparse_attention(q, k, v, lists, **rule, window=70)
    assert out.dtype == dtype and lse.dtype == torch.float32
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), mass, rtol=1e-5, atol=1e-5)


def sketched(keys: int, dim: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of two heads far from the origin, that vary less and less, queries of three, and the keys as sketched."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, dim, dim, generator=rng) / dim**0.5 * 0.85 ** torch.arange(dim)[:, None]
    k = torch.einsum("ngd,gde->nge", torch.randn(keys, 2, dim, generator=rng), mix) * spread + 3
    q = torch.randn(50, 3, dim, generator=rng)
    scales, codes = encode_sketch(k, q, (0, 0, 1))
    coordinates, key = sketch_bytes(dim)
    assert scales.shape == (2, coordinates) and codes.shape == (keys, 2, key)
    return k, q, decode_sketch(scales, codes, dim)


@pytest.mark.parametrize(("dim", "share"), [(64, 8e-4), (32, 56e-4), (8, 0.09), (5, 0.15), (1, 0.125)])
def test_a_sketch_tells_scores_apart_in_two_bits_a_number(dim: int, share: float) -> None:
    """Two bits of every channel lose 12 % of a normal variance; shared out they lose the less the less alike they are.

    Of 64 that fade by 15 % each 0.04 % is lost, 0.11 % if queries did not count, 1.2 % with equal shares.
    """
    k, q, found = sketched(600, dim, 3)
    assert sketch_bytes(dim)[1] == -(-2 * dim // 8)
    for head, own in ((0, slice(0, 2)), (1, slice(2, 3))):
        scores, estimates = (torch.einsum("shd,nd->shn", q[:, own], x[:, head]) for x in (k, found))
        lost, whole = (x.var(-1, correction=0).sum() for x in (scores - estimates, scores))
        assert lost / whole < share


@pytest.mark.parametrize(("keys", "spread"), [(1, 1.0), (0, 1.0), (7, 0.0)])
def test_sketches_of_few_or_equal_keys(keys: int, spread: float) -> None:
    k, _, found = sketched(keys, 8, 0, spread)
    assert found.shape == k.shape and found.isfinite().all()
    if keys and not spread:
        torch.testing.assert_close(found, k, rtol=2**-10, atol=1e-4)
    scales, codes = encode_sketch(k, k[:0], (0, 1))
    assert decode_sketch(scales, codes, 8).isfinite().all()


def test_refusals() -> None:
    with own_errors():
        with pytest.raises(ValueError, match="`lists` must have an entry for each of 1 blocks of queries, each of as"):
            BlockLists((Range(0, 1),), (), ())
        with pytest.raises(ValueError, match="`lists` must name blocks of the 1 that there are"):
            BlockLists((Range(0, 1),), (Range(0, 1),), (((1,),),))
        lists = BlockLists((Range(0, 2),), (Range(0, 3),), (((0,),),))
        q, k, at = torch.ones(2, 1, DIM), torch.ones(3, DIM), torch.arange(3)
        rule = {"q_positions": at[:2], "k_positions": at, "softmax_scale": 1.0, "kv_head_of": (0,)}
        with pytest.raises(ValueError, match="`q`, `k`, `v` must be"):
            sparse_attention(q, k, k[:2], lists, **rule)
        with pytest.raises(
            ValueError, match="`k_positions` must have an entry for each of 2 queries and 3 keys, got 2"
        ):
            sparse_attention(q, k, k, lists, **(rule | {"k_positions": at[:2]}))
        with pytest.raises(ValueError, match="`kv_head_of` must give each of 1 query heads one of 1 KV heads, got"):
            sparse_attention(q, k, k, lists, **(rule | {"kv_head_of": (1,)}))
        with pytest.raises(ValueError, match="`backend` must be one of"):
            sparse_attention(q, k, k, lists, **rule, backend="cuda")
