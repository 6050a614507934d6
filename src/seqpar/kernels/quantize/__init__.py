"""Rows of numbers in 8 bits each, with a scale for every group: what travels where links are slow."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.quantize import pytorch, reference
from seqpar.kernels.quantize.reference import FORMATS, PIECE, Wire

__all__ = ["FORMATS", "PIECE", "Wire", "check_wire", "decode", "encode", "encoded_width"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    x: Float[Tensor, "rows n"], wire: Wire, *, limit: torch.dtype | None = None, backend: Backend = "auto"
) -> UInt8[Tensor, "rows bytes"]:
    """Rows as bytes: a code for each number, then a scale for each group of 32 (int8) or 64 (fp8) numbers.

    In:    x[rows, n] in float32, bfloat16 or float16; the last group of a row may be short.
    Out:   [rows, encoded_width(n)]; a row's bytes depend on that row alone.
    Grad:  none.

    With A the largest magnitude of a group, `decode` gives back its numbers x to within
      int8:  A / 239, half of a step, which is A / 127 rounded up to 4 bits of mantissa;
      fp8:   the greater of |x| / 16 and A / 456000 (float8_e4m3fn, scaled so that A becomes its largest number),
    and a few float32 roundings of A and the one to the dtype asked for. Groups below 6e-36 may lose 6e-39 more; those
    within 6 % (fp8: 1 %) of the largest number of their dtype may lose twice as much, so that finite numbers stay
    finite. A group with an infinity or a NaN becomes NaN as a whole.

    Args:
        x: the rows.
        wire: the format.
        limit: the dtype in whose range the numbers stay, larger ones being infinite; by default that of `x`.
        backend: which implementation.

    Raises:
        ValueError: an unknown format, or another dtype.
    """
    check_wire(wire, x)
    if backend == "auto":
        backend = choose_backend("quantize", x.device, x.dtype)
    if backend == "torch":
        return pytorch.encode(x, wire, limit or x.dtype)
    if backend == "reference":
        return reference.encode(x, wire, limit or x.dtype)
    raise unknown_backend(backend)


def decode(
    data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire, *, backend: Backend = "auto"
) -> Float[Tensor, "rows n"]:
    """The numbers of encoded rows.

    In:    data[rows, encoded_width(n)], as `encode` made it.
    Out:   [rows, n] in `dtype`, rounded once from the float32 products of codes and scales.

    Raises:
        ValueError: an unknown format or dtype, or rows of another width.
    """
    check_wire(wire)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    width = encoded_width(n, wire)
    if data.shape[1] != width:
        raise ValueError(f"`data` must have {width} bytes a row for {n} numbers, got {data.shape[1]}")
    if backend == "auto":
        backend = choose_backend("quantize", data.device, dtype)
    if backend == "torch":
        return pytorch.decode(data, n, dtype, wire)
    if backend == "reference":
        return reference.decode(data, n, dtype, wire)
    raise unknown_backend(backend)


def encoded_width(n: int, wire: Wire) -> int:
    """Bytes of a row of `n` numbers.

    int8: n + g + ceil(g / 2) for g = ceil(n / 32) groups, whose scales take 12 bits; 67 for 64 numbers.
    fp8:  n + 2 g for g = ceil(n / 64) groups, whose scales take 16 bits; 66 for 64 numbers.
    """
    return FORMATS[wire].encoded_width(n)


def check_wire(wire: Wire | None, x: Tensor | None = None, name: str = "x") -> None:
    """Raise ValueError where `wire` is no wire format, or `x` of a dtype that takes none; None is always taken."""
    if wire is None:
        return
    if wire not in get_args(Wire):
        raise ValueError(f'`wire` must be "int8", "fp8" or None, got {wire!r}')
    if x is not None and x.dtype not in DTYPES:
        raise ValueError(
            f"`{name}` must be float32, bfloat16 or float16 to travel in a wire format, got {x.dtype}; leave out `wire`"
        )
