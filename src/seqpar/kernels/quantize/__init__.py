"""Rows of numbers in 8 bits each, with a float32 scale for every group: what travels where links are slow."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.quantize import pytorch, reference
from seqpar.kernels.quantize.reference import GROUP, Wire, encoded_width

__all__ = ["GROUP", "Wire", "check_wire", "decode", "encode", "encoded_width"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(x: Float[Tensor, "rows n"], wire: Wire, *, backend: Backend = "auto") -> UInt8[Tensor, "rows bytes"]:
    """Rows as bytes: a code for each number, then a float32 scale for each group of 128 numbers.

    In:    x[rows, n] in float32, bfloat16 or float16; the last group of a row may be short.
    Out:   [rows, n + 4 * ceil(n / 128)]; a row's bytes depend on that row alone.

    With A the largest magnitude of a group, `decode` gives back each number x of it up to
      int8:  A / 254 (half of the step A / 127);
      fp8:   the greater of |x| / 16 and A / 458752 (float8_e4m3fn, scaled so that A is its largest number, 448),
    to within a few float32 roundings of A and the rounding to the dtype asked for; where A is below 1.5e-36 (int8) or
    5.3e-36 (fp8), to within 6e-39. Finite numbers stay finite; a group with an infinity or a NaN becomes NaN
    throughout.

    Raises:
        ValueError: an unknown format, or another dtype.
    """
    check_wire(wire, x)
    if backend == "auto":
        backend = choose_backend("quantize", x.device, x.dtype)
    if backend == "torch":
        return pytorch.encode(x, wire)
    if backend == "reference":
        return reference.encode(x, wire)
    raise unknown_backend(backend)


def decode(
    data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire, *, backend: Backend = "auto"
) -> Float[Tensor, "rows n"]:
    """The numbers of encoded rows.

    In:    data[rows, n + 4 * ceil(n / 128)], as `encode` made it.
    Out:   [rows, n] in `dtype`, rounded once from the float32 products of codes and scales.

    Raises:
        ValueError: an unknown format or dtype, or rows of another width.
    """
    check_wire(wire)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if data.shape[1] != encoded_width(n):
        raise ValueError(f"`data` must have {encoded_width(n)} bytes a row for {n} numbers, got {data.shape[1]}")
    if backend == "auto":
        backend = choose_backend("quantize", data.device, dtype)
    if backend == "torch":
        return pytorch.decode(data, n, dtype, wire)
    if backend == "reference":
        return reference.decode(data, n, dtype, wire)
    raise unknown_backend(backend)


def check_wire(wire: Wire | None, x: Tensor | None = None) -> None:
    """Raise ValueError where `wire` is no wire format, or `x` of a dtype that takes none; None is always taken."""
    if wire is None:
        return
    if wire not in get_args(Wire):
        raise ValueError(f'`wire` must be "int8", "fp8" or None, got {wire!r}')
    if x is not None and x.dtype not in DTYPES:
        raise ValueError(
            f"`x` must be float32, bfloat16 or float16 to travel in a wire format, got {x.dtype}; leave out `wire`"
        )
