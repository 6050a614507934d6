"""The definition of the wire formats: 8-bit codes, and a scale for every 32 (int8) or 64 (fp8) of them.

A format is judged by its bytes for 64 numbers, for which bfloat16 takes 128, and by the error of the bundled model's
sums of activations, relative to their norm, in the worst layer, over 2 and 4 ranks (2026-11):

| int8: groups of | scales | bytes | 2 ranks | 4 ranks |
|---:|---|---:|---:|---:|
| 128 | float32 | 66 | 0.97 % | |
| 64 | bfloat16 | 66 | 0.79 % | 1.17 % |
| 32 | powers of two | 66 | 0.94 % | 1.42 % |
| 16 | powers of two | 68 | 0.77 % | 1.15 % |
| 32 | 8 bits beside an exponent for 128 numbers | 66.5 | 0.66 % | 0.96 % |
| 32 | 12 bits: an exponent, 4 bits of mantissa | 67 | 0.66 % | 0.96 % |
| 32 | bfloat16 | 68 | 0.64 % | 0.93 % |

The last but one is taken: the one before saves half a byte, but lets the error of a group depend on its neighbours.
Scales below A / 127, which clip where squared errors gain by it, gain less than 0.01 points. Not to round what a rank
keeps gains 5 % of the error, and makes a row's sum depend on which rank adds it up.

An error of fp8 is relative to its own number, so smaller groups gain nothing. Scales of 4 bits of mantissa would no
longer leave a group's largest number nearly as it is: 2.60 % instead of 2.50 % over 2 ranks.

Heads are encoded one by one, since keys and values differ in magnitude and must not share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = [
    "FORMATS",
    "PIECE",
    "Format",
    "Wire",
    "decode",
    "decode_sum",
    "encode",
    "pack",
    "recode_sum",
    "scales",
    "scales_of",
]

Wire: TypeAlias = Literal["int8", "fp8"]


class Format(NamedTuple):
    """What a wire format is made of."""

    codes: torch.dtype
    largest: float
    """The largest code."""
    step: float
    """From the code below to that one."""
    group: int
    """Numbers that share a scale."""
    mantissa: int
    """Bits of a scale's mantissa, beside 8 of its exponent: a byte for each scale, or 4 bits and two in a byte."""
    round_up: bool
    """Whether scales are rounded up and not to nearest, since steps at the largest code bear no numbers beyond it."""

    def num_groups(self, n: int) -> int:
        """Groups of a row of `n` numbers, of which the last may be short."""
        return -(-n // self.group)

    def encoded_width(self, n: int) -> int:
        """Bytes of a row of `n` numbers: a code for each, then the scales."""
        groups = self.num_groups(n)
        return n + groups + -(-groups // (2 if self.mantissa == 4 else 1))


FORMATS: dict[Wire, Format] = {
    "int8": Format(torch.int8, largest=127.0, step=1.0, group=32, mantissa=4, round_up=True),
    "fp8": Format(torch.float8_e4m3fn, largest=448.0, step=32.0, group=64, mantissa=7, round_up=False),
}
PIECE = 64
"""Numbers whose scales fill whole bytes in every format: a row cut at multiples of it takes as many bytes as whole."""


def encode(x: Float[Tensor, "rows n"], wire: Wire, limit: torch.dtype) -> UInt8[Tensor, "rows bytes"]:
    """Codes, rounded to nearest, then the scales."""
    form, n = FORMATS[wire], x.shape[1]
    groups = F.pad(x.float(), (0, -n % form.group)).unflatten(1, (form.num_groups(n), form.group))
    scale, inverse = scales(groups.abs().amax(-1), form, limit)
    scaled = groups * inverse[..., None]
    codes = (scaled.round() if wire == "int8" else scaled).to(form.codes)
    return torch.cat([codes.view(torch.uint8).flatten(1)[:, :n], pack(scale, form)], 1)


def decode(data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire) -> Float[Tensor, "rows n"]:
    """Codes times scales, in float32."""
    form = FORMATS[wire]
    codes = F.pad(data[:, :n], (0, -n % form.group)).view(form.codes).unflatten(1, (form.num_groups(n), form.group))
    x: Tensor = (codes.float() * scales_of(data, n, form)[..., None]).flatten(1)[:, :n]
    return x.to(dtype).contiguous()


def decode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, dtype: torch.dtype, wire: Wire
) -> Float[Tensor, "rows n"]:
    """The sum in float32 of decoded rows, from left to right, rounded to a dtype."""
    total = decode(parts[0], n, torch.float32, wire)
    for part in parts[1:]:
        total = total + decode(part, n, torch.float32, wire)
    return total.to(dtype)


def recode_sum(
    parts: Sequence[UInt8[Tensor, "rows bytes"]], n: int, limit: torch.dtype, wire: Wire
) -> UInt8[Tensor, "rows bytes"]:
    """That sum, encoded from float32."""
    return encode(decode_sum(parts, n, torch.float32, wire), wire, limit)


def pack(scale: Float[Tensor, "rows groups"], form: Format) -> UInt8[Tensor, "rows bytes"]:
    """Scales as bytes: their exponents, then their mantissas."""
    bits = scale.view(torch.int32) >> 23 - form.mantissa
    mantissas = bits & (1 << form.mantissa) - 1
    if form.mantissa == 4:
        mantissas = F.pad(mantissas, (0, bits.shape[1] % 2))
        mantissas = mantissas[:, ::2] | mantissas[:, 1::2] << 4
    return torch.cat([bits >> form.mantissa, mantissas], 1).to(torch.uint8)


def scales_of(data: UInt8[Tensor, "rows bytes"], n: int, form: Format) -> Float[Tensor, "rows groups"]:
    """The scales at the end of encoded rows."""
    groups = form.num_groups(n)
    exponents, mantissas = data[:, n:].int().tensor_split([groups], 1)
    if form.mantissa == 4:
        mantissas = torch.stack([mantissas & 15, mantissas >> 4], 2).flatten(1)[:, :groups]
    return (exponents << 23 | mantissas << 23 - form.mantissa).view(torch.float32)


def scales(
    largest: Float[Tensor, "*groups"], form: Format, limit: torch.dtype
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """What a code of 1 stands for, and what to multiply numbers by to get codes, given the groups' largest magnitudes.

    A scale is a float32 of few bits of mantissa. It is NaN where the group's numbers are not finite in the dtype
    `limit`, and never below float32's smallest normal number, so that its inverse is finite.
    """
    tiny, end = torch.finfo(torch.float32).tiny, torch.finfo(limit).max
    # Times the inverse: what a library makes of a quotient depends on the device. One of 4 bits stays what it is.
    bits = (largest * (1 / form.largest)).clamp_(min=tiny).view(torch.int32)
    dropped = (1 << 23 - form.mantissa) - 1
    scale = bits.add_(dropped if form.round_up else dropped // 2).bitwise_and_(~dropped).view(torch.float32)
    inverse = scale.reciprocal()
    # Where the largest code would stand for an infinity, the largest number gets the largest code that does not.
    steps = (inverse * (end / form.step)).floor_()
    inverse = torch.minimum(inverse, steps.add_(0.49).mul_(form.step).div_(largest))
    return scale.where(largest <= end, torch.nan), inverse
