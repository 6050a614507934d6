"""Wire formats: the stated error bounds at every magnitude, rows on their own, and what is not a number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.kernels import quantize
from seqpar.kernels.quantize import decode, encode, encoded_width
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
WIRES = ["int8", "fp8"]
GROUP = {"int8": 32, "fp8": 64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize("wire", WIRES)


def error_bound(x: torch.Tensor, wire: str) -> torch.Tensor:
    """What the docstring allows, for each number, in float64."""
    largest = x.double().abs()
    for part in largest.split(GROUP[wire], 1) if x.numel() else ():
        part[:] = part.amax(1, keepdim=True)
    step = largest / 239 if wire == "int8" else torch.maximum(x.double().abs() / 16, largest / 456000)
    near = {"int8": 0.94, "fp8": 0.99}[wire] * torch.finfo(x.dtype).max
    step = torch.where(largest > near, 2 * step, step)
    eps, least = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return step + 2**-21 * largest + eps / 2 * (x.double().abs() + step) + least / 2 + 6e-39


def numbers(seed: int, rows: int, n: int, dtype: torch.dtype, exponents: tuple[int, int]) -> torch.Tensor:
    """Random numbers whose magnitudes vary from row to row over a range of powers of two, some zero, some the largest.

    What would be infinite becomes the largest number.
    """
    make = torch.Generator().manual_seed(seed)
    powers = torch.randint(*exponents, (rows, 1), generator=make).double().exp2()
    x = torch.randn(rows, n, generator=make, dtype=torch.float64) * powers
    x[torch.rand(rows, n, generator=make) < 0.1] = 0
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 3),
    n=st.integers(0, 200) | st.sampled_from([32, 64, 96, 128]),
    exponents=st.sampled_from([(-3, 3), (-149, -120), (-126, 126), (120, 128), (10, 17)]),
)
@settings(max_examples=80, deadline=None)
def test_errors_are_within_the_stated_bound(
    wire: str, dtype: torch.dtype, seed: int, rows: int, n: int, exponents: tuple[int, int]
) -> None:
    x = numbers(seed, rows, n, dtype, exponents)
    data, groups = encode(x, wire), -(-n // GROUP[wire])
    assert data.shape == (rows, encoded_width(n, wire))
    assert data.shape[1] == n + (2 * groups if wire == "fp8" else groups + (groups + 1) // 2)
    got = decode(data, n, dtype, wire)
    assert got.isfinite().all() and got.is_contiguous()
    assert ((got.double() - x.double()).abs() <= error_bound(x, wire)).all()
    # The backends agree byte for byte and bit for bit.
    assert torch.equal(encode(x, wire, backend="reference"), data)
    for wanted in DTYPES:
        reference = decode(data, n, wanted, wire, backend="reference")
        assert torch.equal(decode(data, n, wanted, wire), reference)


@every
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_encoded_by_itself_in_any_memory(wire: str, backend: str) -> None:
    x = torch.randn(3001, 150)  # several blocks of rows, the last ones not full
    data = encode(x, wire, backend=backend)
    for rows in (slice(0, 1), slice(7, 11), slice(3000, 3001)):
        assert torch.equal(encode(x[rows], wire, backend=backend), data[rows])
        assert torch.equal(
            decode(data[rows], 150, x.dtype, wire, backend=backend),
            decode(data, 150, x.dtype, wire, backend=backend)[rows],
        )
    assert torch.equal(encode(x.t().contiguous().t(), wire, backend=backend), data)
    wide = torch.zeros(3001, 300)
    wide[:, 1:300:2] = x
    assert torch.equal(encode(wide[:, 1:300:2], wire, backend=backend), data)


@every
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(wire: str, backend: str, bad: float) -> None:
    x = torch.randn(3, 150)
    want = decode(encode(x, wire), 150, x.dtype, wire)
    x[1, 70], x[2, 149] = bad, bad
    got = decode(encode(x, wire, backend=backend), 150, x.dtype, wire, backend=backend)
    want[1, 64 : 64 + GROUP[wire]], want[2, 128:] = torch.nan, torch.nan
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_codes_come_back_as_they_were(dtype: torch.dtype) -> None:
    whole = torch.arange(-127, 128).to(dtype).view(3, 85)
    x = torch.cat([whole, whole.new_full((3, 43), 127)], 1).view(6, 64)
    x[:, ::32] = 127  # every group's largest
    assert torch.equal(decode(encode(x, "int8"), 64, dtype, "int8"), x)
    for sixteenths in range(16, 32) if dtype == torch.float32 else ():  # every scale there is
        scaled = x * sixteenths
        assert torch.equal(decode(encode(scaled, "int8"), 64, dtype, "int8"), scaled)
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    x = codes.where(codes.isfinite(), 448).to(dtype).view(4, 64)
    x[:, 0] = 448
    assert torch.equal(decode(encode(x, "fp8"), 64, dtype, "fp8"), x)


@pytest.mark.parametrize(("wire", "most"), [("int8", 0.0057), ("fp8", 0.026)])
def test_normal_numbers_lose_half_a_percent_in_int8(wire: str, most: float) -> None:
    """A step is the largest of 32 in units of their standard deviation, 2.4 on average, over 127: squared, over 12."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    assert (decode(encode(x, wire), 4096, x.dtype, wire) - x).norm() < most * x.norm()


@every
def test_limits_keep_numbers_in_the_range_of_another_dtype(wire: str) -> None:
    """Sums are encoded from float32 and decoded to their own dtype."""
    x = torch.full((1, 64), 65504.0)
    assert decode(encode(x, wire, limit=torch.float16), 64, torch.float16, wire).isfinite().all()
    assert decode(encode(x + 100, wire, limit=torch.float16), 64, torch.float32, wire).isnan().all()


@every
def test_no_gradient_is_recorded(wire: str) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    assert not decode(encode(x, wire), 64, x.dtype, wire).requires_grad


@own_errors()
def test_bad_input_is_refused() -> None:
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r'`wire` must be "int8", "fp8" or None, got \'int4\''):
        encode(x, "int4")
    for dtype in (torch.float64, torch.int32, torch.complex64):
        with pytest.raises(ValueError, match=rf"`x` must be float32, bfloat16 or float16 .* got {dtype}; leave out"):
            encode(x.to(dtype), "int8")
    with pytest.raises(ValueError, match=r"`dtype` must be one of torch.float32, .*, got torch.float64"):
        decode(encode(x, "int8"), 64, torch.float64, "int8")
    with pytest.raises(ValueError, match=r"`data` must have 66 bytes a row for 63 numbers, got 67"):
        decode(encode(x, "int8"), 63, torch.float32, "int8")
    for call in (
        lambda: encode(x, "int8", backend="c"),
        lambda: decode(encode(x, "int8"), 64, x.dtype, "int8", backend="c"),
    ):
        with pytest.raises(ValueError, match=r"`backend` must be one of"):
            call()
    quantize.check_wire(None, x.double())
