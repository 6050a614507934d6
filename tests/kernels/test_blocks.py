"""Blocks of keys: balls that hold them, bounds of their scores, their masses, and the fewest that cover a softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tests.kernels.interpreter  # noqa: F401  puts bfloat16 right
from seqpar.kernels.blocks import block_balls, block_masses, block_means, score_bounds, smallest_cover
from seqpar.partition import Range
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "triton"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def ranges(sizes: list[int]) -> tuple[Range, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[1, 3, 2], [40, 33]])
def test_a_ball_holds_its_keys_and_bounds_their_scores(backend: str, sizes: list[int]) -> None:
    rng, dtype = torch.Generator().manual_seed(0), dtype_of(backend)
    k = torch.randn(sum(sizes), 3, 24, generator=rng, dtype=dtype)[:, 1:]
    q = torch.randn(17, 4, 24, generator=rng, dtype=dtype)[:, 1:]
    centre, radius = block_balls(k, ranges(sizes), backend=backend)
    assert centre.dtype == radius.dtype == dtype
    torch.testing.assert_close(centre, block_means(k, ranges(sizes)), rtol=1e-5, atol=1e-5)
    for block, keys in enumerate(k.split(sizes)):
        furthest = (keys - centre[block]).norm(dim=-1).amax(0)
        torch.testing.assert_close(radius[block], furthest, rtol=1e-5, atol=1e-6)
    heads = (0, 1, 1)
    bounds = score_bounds(q, centre, radius, softmax_scale=0.3, kv_head_of=heads, backend=backend)
    for head, kv_head in enumerate(heads):
        scores = [q[:, head] @ keys[:, kv_head].T * 0.3 for keys in k.split(sizes)]
        largest = torch.stack([part.amax(1) for part in scores], 1)
        assert (bounds[:, head] >= largest - 1e-4).all()
        plain = q[:, head] @ centre[:, kv_head].T + torch.outer(q[:, head].norm(dim=-1), radius[:, kv_head])
        torch.testing.assert_close(bounds[:, head], plain * 0.3, rtol=1e-5, atol=1e-5)
        single = [block for block, size in enumerate(sizes) if size == 1]
        torch.testing.assert_close(bounds[:, head, single], largest[:, single], rtol=1e-5, atol=1e-5)


def test_balls_of_half_precision_are_summed_in_float32() -> None:
    k = torch.randn(50, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, want = (block_balls(x, ranges([50]), backend=name) for x, name in ((k, "triton"), (k.double(), "torch")))
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sizes", "seed"), [([3, 0, 4, 1], 0), ([0], 1), ([70, 1], 2)])
def test_masses_are_sums_of_a_softmax(backend: str, sizes: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 1, sum(sizes), generator=rng, dtype=torch.float64) * 3
    scores = scores.masked_fill(torch.rand(scores.shape, generator=rng) < 0.2, -torch.inf)
    rest = torch.randn(2, 1, 4, generator=rng, dtype=torch.float64)
    dtype = dtype_of(backend)
    found, base = block_masses(scores.to(dtype), rest.logsumexp(-1).to(dtype), ranges(sizes), backend=backend)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    every = torch.cat([rest, scores], -1).softmax(-1)
    expected = torch.stack([part.sum(-1) for part in every.split([4, *sizes], -1)], -1)
    torch.testing.assert_close(base, expected[..., 0].to(dtype), **close)
    torch.testing.assert_close(found, expected[..., 1:].to(dtype), **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_cover(backend: str) -> None:
    mass = torch.tensor([[0.1, 0.3, 0.05, 0.15], [0.0, 0.0, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    base = torch.tensor([0.4, 0.4, 0.2, 1.0])
    expectations = [
        (0.39, ["....", "....", "x...", "...."]),
        (0.6, [".x..", "..x.", "xx..", "...."]),
        (0.84, [".x.x", "..x.", "xxxx", "...."]),
        (0.99, ["xxxx", "..xx", "xxxx", "...."]),
    ]
    for coverage, expected in expectations if backend == "torch" else expectations[1:2]:
        chosen = smallest_cover(mass, base, coverage, backend=backend)
        assert ["".join(".x"[int(some)] for some in row) for row in chosen.tolist()] == expected


@given(counts=st.lists(st.integers(0, 8), min_size=1, max_size=30), base=st.integers(0, 9), eighths=st.integers(0, 8))
@settings(max_examples=3)
@example(counts=[3, 1, 3, 0, 3, 2], base=1, eighths=4)
@example(counts=[0, 2, 2, 2], base=0, eighths=8)
@example(counts=[5, 1], base=9, eighths=2)
def test_triton_chooses_what_sorting_chooses(counts: list[int], base: int, eighths: int) -> None:
    """Whole numbers, whose sums are exact in any order, with many that are equal."""
    mass, before = torch.tensor([counts]).float(), torch.tensor([float(base)])
    found = smallest_cover(mass, before, eighths / 8, backend="triton")
    assert torch.equal(found, smallest_cover(mass, before, eighths / 8, backend="torch"))


K, WIDE = torch.zeros(4, 2, 16), torch.zeros(4, 2, 264)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_balls(K, (Range(0, 3),)), "`blocks` must have keys and tile the 4 that there are"),
        (lambda: block_balls(K, (Range(0, 4), Range(4, 4))), "`blocks` must have keys and tile the 4"),
        (lambda: block_masses(K, K[..., 0], (Range(0, 4),)), "`blocks` must tile the 16 keys that there are"),
        (lambda: block_balls(K.double(), (Range(0, 4),), backend="triton"), "must be float32, bfloat16 or float16"),
        (
            lambda: block_balls(WIDE, (Range(0, 4),), backend="triton"),
            "must have at most 256 numbers, with unit stride",
        ),
        (lambda: block_balls(K, (Range(0, 4),), backend="cuda"), '"reference", "triton", got'),
        (lambda: bounds(kv_head_of=(0, 2)), "must give each of 2 query heads one of 2, got"),
        (lambda: bounds(softmax_scale=-1.0), "and `softmax_scale` at least 0, got"),
        (lambda: bounds(radius=K[..., 0].double()), "`centre` and `radius` must be torch.float32"),
        (
            lambda: block_masses(torch.zeros(1, 2000), torch.zeros(1), (Range(0, 2000),), backend="triton"),
            "`blocks` must have at most 1024 keys",
        ),
        (
            lambda: smallest_cover(torch.zeros(1, 20000), torch.zeros(1), 0.5, backend="triton"),
            "`mass` must be float32 of at most 8192 blocks",
        ),
    ],
)
@own_errors()
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def bounds(**change: Any) -> Any:
    options = {"centre": K, "radius": K[..., 0], "softmax_scale": 1.0, "kv_head_of": (0, 1), **change}
    return score_bounds(K, options.pop("centre"), options.pop("radius"), **options)
