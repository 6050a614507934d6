"""Tiles: any cut of the keys merges to the whole, and their gradients add up to autograd's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import merge, tile_attention, tile_gradients
from tests.kernels.own_errors import own_errors

HEADS = {"mha": (0, 1, 2), "gqa": (0, 0, 1, 1), "mqa": (0, 0, 0), "uneven": (0, 1, 1, 1, 2), "unread": (0, 2)}
BACKENDS = ["torch", "reference"]
DIM = 4


def problem(rows: int, keys: int, heads: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as column slices of wider buffers, and a gradient."""
    rng = torch.Generator().manual_seed(seed)
    q, grad = (torch.randn(rows, len(heads) + 1, DIM, generator=rng, dtype=torch.float64)[:, 1:] for _ in range(2))
    pairs = torch.randn(keys, 3, 2, DIM, generator=rng, dtype=torch.float64)
    return q, pairs[:, :, 0], pairs[:, :, 1], grad.contiguous()


def whole(q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("shd,nhd->hsn", q, k[:, list(heads)]) * 0.3
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hsn,nhd->shd", scores.softmax(-1), v[:, list(heads)]), scores.logsumexp(-1).T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@given(rows=st.integers(0, 5), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_tiles_merge_to_the_whole_and_gradients_add_up(
    backend: str, heads: tuple[int, ...], rows: int, sizes: list[int], seed: int
) -> None:
    """Every second tile has a mask, through which some rows see nothing; a last key is seen by all."""
    sizes = [*sizes, 1]
    q, k, v, grad = problem(rows, sum(sizes), heads, seed)
    masked = [torch.rand(rows, n, generator=torch.Generator().manual_seed(seed + i)) < 0.5 for i, n in enumerate(sizes)]
    rules = [mask if i % 2 == 0 and i + 1 < len(sizes) else None for i, mask in enumerate(masked)]
    mask = torch.cat([torch.ones(rows, n).bool() if m is None else m for m, n in zip(rules, sizes, strict=True)], 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, mass = whole(*leaves, heads, mask)
    (expected * grad).sum().backward()
    options = {"softmax_scale": 0.3, "kv_head_of": heads, "backend": backend}
    parts = list(zip(k.split(sizes), v.split(sizes), rules, strict=True))
    tiles = [tile_attention(q, *kv, mask=rule, **options) for *kv, rule in parts]
    for (out, lse), rule in zip(tiles, rules, strict=True):
        blind = torch.zeros(rows).bool() if rule is None else ~rule.any(1)
        assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
    out, lse = merge(*zip(*tiles, strict=True))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, mass, rtol=1e-12, atol=1e-12)
    grads = [tile_gradients(grad, q, *kv, out, lse, mask=rule, **options) for *kv, rule in parts]
    to_q, to_k, to_v = sum(g[0] for g in grads), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])
    for got, leaf in zip((to_q, to_k, to_v), leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_causal_tiles(backend: str, rows: int) -> None:
    heads = HEADS["gqa"]
    q, k, v, grad = problem(rows, rows, heads, 1)
    mask = torch.ones(rows, rows).tril().bool()
    options = {"softmax_scale": 0.3, "kv_head_of": heads, "backend": backend}
    out, lse = tile_attention(q, k, v, causal=True, **options)
    for got, want in zip((out, lse), whole(q, k, v, heads, mask), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    causal = tile_gradients(grad, q, k, v, out, lse, causal=True, **options)
    explicit = tile_gradients(grad, q, k, v, out, lse, mask=mask, **{**options, "backend": "reference"})
    for got, want in zip(causal, explicit, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_refusals() -> None:
    q, k, v, _ = problem(2, 3, (0, 1, 2), 0)
    options = {"softmax_scale": 1.0, "kv_head_of": (0, 1, 2)}
    with own_errors():
        with pytest.raises(ValueError, match="`causal` must be of as many keys as queries and without `mask`, got 2 q"):
            tile_attention(q, k, v, causal=True, **options)
        with pytest.raises(ValueError, match=r"`mask` must be \[2, 3\] in torch.bool, got \[2, 3\] in torch.float32"):
            tile_attention(q, k, v, mask=torch.ones(2, 3), **options)
        with pytest.raises(ValueError, match="`kv_head_of` must give each of 3 query heads one of 3 KV heads"):
            tile_attention(q, k, v, softmax_scale=1.0, kv_head_of=(0, 1, 3))
        with pytest.raises(ValueError, match="`q`, `k`, `v` must be"):
            tile_attention(q, k.float(), v, **options)
