"""The algebra of partials: exact laws first, then splits of real attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import merge
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
INF = torch.inf


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The partial [t, h] of one key set that every query sees; of no keys, the identity."""
    if not len(k):
        return torch.zeros_like(q), q.new_full(q.shape[:2], -INF)
    scores = torch.einsum("thd,nhd->thn", q, k)
    return torch.einsum("thn,nhd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def problem(keys: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 2, 3, generator=rng, dtype=torch.float64) for n in (4, keys, keys))
    return q * scale, k, v


splits = st.lists(st.integers(0, 4), min_size=1, max_size=5)
scales = st.sampled_from([0.0, 1.0, 30.0, 300.0])
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@given(sizes=splits, scale=scales, seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_any_split_merges_to_the_whole(backend: str, sizes: list[int], scale: float, seed: int) -> None:
    q, k, v = problem(sum(sizes), scale, seed)
    parts = [attend(q, *kv) for kv in zip(k.split(sizes), v.split(sizes), strict=True)]
    for got, want in zip(merge(*zip(*parts, strict=True), backend=backend), attend(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@backends
@given(sizes=st.tuples(*[st.integers(0, 3)] * 3), scale=scales, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_order_and_grouping_do_not_matter(backend: str, sizes: tuple[int, ...], scale: float, seed: int) -> None:
    q, k, v = problem(sum(sizes), scale, seed)
    a, b, c = (attend(q, *kv) for kv in zip(k.split(sizes), v.split(sizes), strict=True))

    def both(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return merge((x[0], y[0]), (x[1], y[1]), backend=backend)

    for got, same in ((both(a, both(b, c)), both(both(a, b), c)), (both(a, b), both(b, a))):
        for x, y in zip(got, same, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_identity_changes_no_bit(backend: str, dtype: torch.dtype, place: int) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.randn(5, 2, 3).to(dtype)
    lse = torch.tensor([0.0, -80.0, 300.0, 1e4, -INF], dtype=wide)[:, None].repeat(1, 2)
    out[4] = 0
    outs, lses = [torch.zeros_like(out)] * 2, [torch.full_like(lse, -INF)] * 2
    outs.insert(place, out)
    lses.insert(place, lse)
    for count in (2, 3):
        keep = slice(0, count) if place < 2 else slice(3 - count, 3)
        for got, want in zip(merge(outs[keep], lses[keep], backend=backend), (out, lse), strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@backends
def test_stacked_is_the_same_as_a_sequence_and_one_is_itself(backend: str) -> None:
    outs, lses = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2)
    for x, y in zip(merge(outs, lses, backend=backend), merge(list(outs), list(lses), backend=backend), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    for x, y in zip(merge(outs[:1], lses[:1], backend=backend), (outs[0], lses[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_half_partials_are_summed_in_float32(count: int) -> None:
    outs, lses = torch.randn(count, 50, 2, 16).bfloat16(), torch.randn(count, 50, 2)
    got, _ = merge(outs, lses)
    want, _ = merge(outs.double(), lses.double(), backend="reference")
    torch.testing.assert_close(
        got, want.float().bfloat16(), rtol=2**-8, atol=1e-5
    )  # rounded once, at most the next value
    assert (got == want.float().bfloat16()).float().mean() > 0.99


@backends
@pytest.mark.parametrize("n", [2, 3])
def test_gradients_reach_partials_through_both_results(backend: str, n: int) -> None:
    rng = torch.Generator().manual_seed(0)
    outs = torch.randn(n, 3, 2, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(n, 3, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda o, m: merge(o, m, backend=backend), (outs, lses))


@backends
def test_gradients_of_empty_partials_are_numbers(backend: str) -> None:
    """Row 0 nobody saw, row 1 only the first partial; the gradient of the rest is that of the rest alone."""
    outs = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    lses = torch.randn(2, 3, 1, dtype=torch.float64)
    lses[:, 0], lses[1, 1], outs[:, 0], outs[1, 1] = -INF, -INF, 0, 0
    outs.requires_grad_(), lses.requires_grad_()
    out, lse = merge(outs, lses, backend=backend)
    grads = torch.autograd.grad(out.sum() + lse[1:].sum(), (outs, lses))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0, 1] == 1).all() and grads[1][0, 1] == 1 and grads[1][1, 1] == 0


@backends
def test_arguments_are_not_written(backend: str) -> None:
    outs, lses = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2)
    before = outs.clone(), lses.clone()
    merge(outs[:2], lses[:2], backend=backend), merge(outs, lses, backend=backend)
    assert torch.equal(outs, before[0]) and torch.equal(lses, before[1])


OUT, LSE = torch.zeros(2, 1, 3), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "`lses` must have one entry per partial, at least one, got 0 for 0"),
        ([OUT], [LSE, LSE], "`lses` must have one entry per partial, at least one, got 2 for 1"),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], r"partials must have one shape, \[..., d\] and \[...\], got"),
        ([OUT], [LSE.half()], r"`lses` must all be float32 or all float64, got \[torch.float16\]"),
        (
            [OUT, OUT],
            [LSE, LSE.double()],
            r"`lses` must all be float32 or all float64, got \[torch.float32, torch.float64\]",
        ),
    ],
)
@own_errors()
def test_bad_input_is_refused(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(outs, lses)
