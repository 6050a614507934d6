"""Rows of numbers in 8 bits each, with a scale for every group: what travels where links are slow."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.quantize import pytorch, reference
from seqpar.kernels.quantize.reference import CODES, GROUP, Wire, encoded_width

__all__ = ["CODES", "GROUP", "Wire", "check_wire", "decode", "encode", "encoded_width"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    x: Float[Tensor, "rows n"], wire: Wire, *, limit: torch.dtype | None = None, backend: Backend = "auto"
) -> UInt8[Tensor, "rows bytes"]:
    """Rows as bytes: a code for each number, then a bfloat16 scale for each group of 64 numbers.

    In:    x[rows, n] in float32, bfloat16 or float16; the last group of a row may be short.
    Out:   [rows, n + 2 * ceil(n / 64)]; a row's bytes depend on that row alone.
    Grad:  none.

    With A the largest magnitude of a group, `decode` gives back its numbers x to within
      int8:  A / 253, half of a step;
      fp8:   the greater of |x| / 16 and A / 456000 (float8_e4m3fn, scaled so that A becomes its largest number),
    and a few float32 roundings of A and the one to the dtype asked for. Groups below 6e-36 may lose 6e-39 more; those
    within 1 % of the largest number of their dtype may lose twice as much, so that finite numbers stay finite. A group
    with an infinity or a NaN becomes NaN as a whole.

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

    In:    data[rows, n + 2 * ceil(n / 64)], as `encode` made it.
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
