"""The wire formats in blocks of rows that stay in a processor's cache, through one scratch buffer of float32.

Without blocks, each pass writes and reads a fresh buffer of twice to four times the size of `x`, whose pages cost more
to get than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.quantize.reference import FORMATS, Format, Wire, pack, scales, scales_of

__all__ = ["decode", "decode_sum", "encode", "recode_sum"]

BLOCK = 1 << 17
"""Numbers of a block on a CPU: 512 KB of float32."""


def encode(x: Float[Tensor, "rows n"], wire: Wire, limit: torch.dtype) -> UInt8[Tensor, "rows bytes"]:
    """`seqpar.kernels.quantize.reference`, byte for byte where `x` is finite."""
    form, x, n = FORMATS[wire], x.detach(), x.shape[1]
    data = x.new_empty(len(x), form.encoded_width(n), dtype=torch.uint8)
    codes, scale = data[:, :n].view(form.codes), x.new_empty(len(x), form.num_groups(n), dtype=torch.float32)
    for rows, columns, groups, scratch in _blocks(len(x), n, form, x.device):
        scratch.copy_(x[rows, columns].unflatten(1, scratch.shape[1:]))
        scale[rows, groups], inverse = scales(scratch.abs().amax(-1), form, limit)
        scratch.mul_(inverse[..., None])
        if wire == "int8":
            scratch.round_()
        codes[rows, columns].unflatten(1, scratch.shape[1:]).copy_(scratch)
    data[:, n:] = pack(scale, form)
    return data


def decode(data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire) -> Float[Tensor, "rows n"]:
    """`seqpar.kernels.quantize.reference`, bit for bit."""
    form = FORMATS[wire]
    out, codes, scale = data.new_empty(len(data), n, dtype=dtype), data[:, :n], scales_of(data, n, form)
    for rows, columns, groups, scratch in _blocks(len(data), n, form, data.device):
        block, factor = codes[rows, columns].unflatten(1, scratch.shape[1:]), scale[rows, groups]
        if wire == "fp8" and data.is_cpu:
            # PyTorch converts 8-bit floats one by one on a CPU, but float16 in vectors. Sign, exponent and mantissa
            # fit into one, whose exponent counts from 8 lower.
            half = block.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
            scratch.copy_(half.view(torch.float16))
            factor = factor * 256
        else:
            scratch.copy_(block.view(form.codes))
        out[rows, columns].unflatten(1, scratch.shape[1:]).copy_(scratch.mul_(factor[..., None]))
    return out


def decode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, dtype: torch.dtype, wire: Wire
) -> Float[Tensor, "rows n"]:
    """`seqpar.kernels.quantize.reference`, bit for bit."""
    return _total(parts, n, wire).to(dtype)


def recode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, limit: torch.dtype, wire: Wire
) -> UInt8[Tensor, "rows bytes"]:
    """`seqpar.kernels.quantize.reference`, byte for byte where the sums are finite."""
    return encode(_total(parts, n, wire), wire, limit)


def _total(parts: Sequence[Tensor], n: int, wire: Wire) -> Tensor:
    total = decode(parts[0], n, torch.float32, wire)
    for part in parts[1:]:
        total += decode(part, n, torch.float32, wire)
    return total


def _blocks(num_rows: int, n: int, form: Format, device: torch.device) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """A few rows at a time: of their whole groups, then of the short ones, the slices and room for the numbers."""
    whole, short = divmod(n, form.group)
    for columns, groups, size in (
        (slice(0, n - short), slice(0, whole), form.group),
        (slice(n - short, n), slice(whole, whole + 1), short),
    ):
        width = columns.stop - columns.start
        if width and num_rows:
            step = min(num_rows, max(1, BLOCK // width)) if device.type == "cpu" else num_rows
            scratch = torch.empty(step, width // size, size, device=device)
            for start in range(0, num_rows, step):
                rows = slice(start, min(start + step, num_rows))
                yield rows, columns, groups, scratch[: rows.stop - start]
