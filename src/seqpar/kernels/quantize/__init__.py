"""Rows of numbers in 8 bits each, with a scale for every group: what travels where links are slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.quantize import pytorch, reference
from seqpar.kernels.quantize.reference import FORMATS, PIECE, Wire

__all__ = ["FORMATS", "PIECE", "Wire", "check_wire", "decode", "decode_sum", "encode", "encoded_width", "recode_sum"]

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
    if backend == "triton":
        from seqpar.kernels.quantize import triton

        return triton.encode(x, wire, limit or x.dtype)
    if backend == "torch":
        return pytorch.encode(x, wire, limit or x.dtype)
    if backend == "reference":
        return reference.encode(x, wire, limit or x.dtype)
    raise unknown_backend(backend, "triton")


def decode(
    data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire, *, backend: Backend = "auto"
) -> Float[Tensor, "rows n"]:
    """The numbers of encoded rows.

    In:    data[rows, encoded_width(n)], as `encode` made it.
    Out:   [rows, n] in `dtype`, rounded once from the float32 products of codes and scales.

    Raises:
        ValueError: an unknown format or dtype, or rows of another width.
    """
    _check_encoded("data", [data], n, dtype, wire)
    if backend == "auto":
        backend = choose_backend("quantize", data.device, dtype)
    if backend == "triton":
        from seqpar.kernels.quantize import triton

        return triton.decode(data, n, dtype, wire)
    if backend == "torch":
        return pytorch.decode(data, n, dtype, wire)
    if backend == "reference":
        return reference.decode(data, n, dtype, wire)
    raise unknown_backend(backend, "triton")


def decode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, dtype: torch.dtype, wire: Wire, *, backend: Backend = "auto"
) -> Float[Tensor, "rows n"]:
    """The sum of encoded rows, what a rank makes of the parts that the others sent.

    In:    parts of [rows, encoded_width(n)] each, in the order in which they are added.
    Out:   [rows, n]: added in float32 and rounded once to `dtype`.

    Raises:
        ValueError: no part, or as `decode`, or parts of different shapes.
    """
    backend = _check_parts(parts, n, dtype, wire, backend)
    if backend == "triton":
        from seqpar.kernels.quantize import triton

        return triton.decode_sum(parts, n, dtype, wire)
    if backend == "torch":
        return pytorch.decode_sum(parts, n, dtype, wire)
    return reference.decode_sum(parts, n, dtype, wire)


def recode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, limit: torch.dtype, wire: Wire, *, backend: Backend = "auto"
) -> UInt8[Tensor, "rows bytes"]:
    """`encode` of that sum in float32, within the range of the dtype `limit`.

    Raises:
        ValueError: as `decode_sum`.
    """
    backend = _check_parts(parts, n, limit, wire, backend)
    if backend == "triton":
        from seqpar.kernels.quantize import triton

        return triton.recode_sum(parts, n, limit, wire)
    if backend == "torch":
        return pytorch.recode_sum(parts, n, limit, wire)
    return reference.recode_sum(parts, n, limit, wire)


def _check_parts(parts: Sequence[Tensor], n: int, dtype: torch.dtype, wire: Wire, backend: Backend) -> Backend:
    """The backend that adds encoded parts, once they fit."""
    if not parts or any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"`parts` must be one or more of one shape, got {[list(part.shape) for part in parts]}")
    _check_encoded("parts", parts, n, dtype, wire)
    if backend == "auto":
        return choose_backend("quantize", parts[0].device, dtype)
    if backend not in ("torch", "reference", "triton"):
        raise unknown_backend(backend, "triton")
    return backend


def _check_encoded(name: str, data: Sequence[Tensor], n: int, dtype: torch.dtype, wire: Wire) -> None:
    check_wire(wire)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    width = encoded_width(n, wire)
    if data[0].shape[1] != width:
        raise ValueError(f"`{name}` must have {width} bytes a row for {n} numbers, got {data[0].shape[1]}")


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
