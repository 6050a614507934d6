"""The merge kernel in Triton's interpreter: partials wherever they lie, in the order in which they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tests.kernels.interpreter  # noqa: F401  puts bfloat16 right
from seqpar.kernels import merge
from seqpar.kernels.merge import triton
from tests.kernels.own_errors import own_errors

INF = torch.inf


def partials(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Some of which have seen nothing, and are NaN there; others have much more mass than the rest."""
    rng = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(count, *shape, generator=rng).to(dtype), torch.randn(count, *shape[:-1], generator=rng)
    lses *= torch.tensor([1.0, 100.0])[torch.randint(0, 2, lses.shape, generator=rng)]
    lses[torch.rand(lses.shape, generator=rng) < 0.3] = -INF
    return outs, lses


def check(found: tuple[Tensor, Tensor], outs: Tensor, lses: Tensor, sinks: Tensor | None = None) -> None:
    """At most one rounding of the result away from the definition."""
    wide = None if sinks is None else sinks.double()
    want_out, want_lse = merge(outs.double(), lses.double(), sinks=wide, backend="reference")
    assert found[0].dtype == outs.dtype and found[1].dtype == torch.float32
    step = torch.finfo(outs.dtype).eps
    torch.testing.assert_close(found[0].double(), want_out, rtol=step, atol=1e-5)
    torch.testing.assert_close(found[1].double(), want_lse, rtol=1e-6, atol=1e-5)


@given(
    count=st.integers(1, 4),
    shape=st.sampled_from([(3, 2, 5), (0, 2, 4), (7, 1, 16), (70, 2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sinks=st.booleans(),
    apart=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_any_partials(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, sinks: bool, apart: bool, seed: int
) -> None:
    outs, lses = partials(count, shape, dtype, seed)
    added = torch.linspace(-1, 2, shape[1]) if sinks else None
    given_outs, given_lses = outs.masked_fill(lses[..., None] == -INF, torch.nan), lses
    if apart:
        given_outs, given_lses = [x.clone() for x in given_outs], [x.clone() for x in lses]
    check(merge(given_outs, given_lses, sinks=added, backend="triton"), outs, lses, added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_message_of_rows_with_their_mass_beside_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `QShipDecodeAttention` receives them, read in place, with this rank's own partial before."""
    outs, lses = partials(4, (6, 2, 8), dtype, 3)
    mass = lses[1:, ..., None].clone().view(dtype)
    rows = torch.cat([outs[1:], mass], -1).flatten(0, 2)
    read, beside = rows[:, :8].unflatten(0, (3, 6, 2)), rows.view(torch.float32)[:, -1].unflatten(0, (3, 6, 2))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", None)  # nothing is copied
        found = merge((outs[0], *read), (lses[0], *beside), backend="triton")
    check(found, outs, lses)


def test_empty_partials_and_other_rows_change_no_bit() -> None:
    outs, lses = partials(3, (40, 2, 8), torch.float32, 1)
    out, lse = merge(outs, lses, backend="triton")
    more = torch.cat([outs, torch.full((2, 40, 2, 8), torch.nan)]), torch.cat([lses, torch.full((2, 40, 2), -INF)])
    some = merge(more[0][:, 5:9], more[1][:, 5:9], backend="triton")
    assert torch.equal(some[0], out[5:9]) and torch.equal(some[1], lse[5:9])


def test_rows_go_where_they_belong_and_nowhere_else() -> None:
    outs, lses = partials(2, (4 * 3, 8), torch.float32, 0)
    before = torch.full((7, 5, 8), 7.0), torch.full((7, 5), 7.0)  # the row before is no one's
    out, lse = before[0][1:], before[1][1:]
    where = torch.tensor([5, -1, 0, 2], dtype=torch.int32)
    triton.merge_into(out[:, 1:4], lse[:, 1:4], outs, lses, None, None, None, where)
    merged = merge(outs.view(2, 4, 3, 8), lses.view(2, 4, 3), backend="reference")
    want_out, want_lse = torch.full((6, 5, 8), 7.0), torch.full((6, 5), 7.0)
    for token, row in enumerate(where.tolist()):
        if row >= 0:
            want_out[row, 1:4], want_lse[row, 1:4] = merged[0][token], merged[1][token]
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    assert (before[0][0] == 7).all() and (before[1][0] == 7).all()


@pytest.mark.slow
def test_the_operator_is_what_pytorch_asks_for() -> None:
    outs, lses = partials(2, (6, 4), torch.float32, 0)
    out, lse = torch.empty(3, 2, 4), torch.empty(3, 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.seqpar.merge, (out, lse, outs, lses, None, None, None, None), test_utils=tests)


OUT, LSE = torch.zeros(2, 1, 3), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([OUT.double()], [LSE], "`outs` must be float32, bfloat16 or float16 for"),
        (
            [OUT],
            [LSE.double()],
            '`lses` must be float32 and need no gradient for backend="triton", got torch.float64; ',
        ),
        ([OUT], [LSE.clone().requires_grad_()], 'got torch.float32 and a gradient wanted; backend="torch" takes it'),
        ([OUT, OUT.half()], [LSE, LSE], "`outs` must have one dtype for"),
    ],
)
@own_errors()
def test_what_the_kernel_does_not_take_is_refused(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError) as error:
        merge(outs, lses, backend="triton")
    assert message in str(error.value)
