"""The definition of nested codes: a box for every block and channel, and numbers as halvings of it.

The box of a block and channel is [low, low + width] units of the channel's own, which all blocks of a stream share.
A number is known by the leading bits of its place in the box: b bits say in which of 2**b equal cells it lies, and it
is read as the middle of that cell. More bits refine what is there; nothing is ever sent twice.

Tokens have levels. At level l the cells of every channel are about 2**-l wide, so a channel of a narrow box takes fewer
bits (or none) than one of a wide box: the reverse water-filling of rate-distortion theory, known to both sides from the
boxes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Float64, Int, Int8, Int32, UInt8
from torch import Tensor

__all__ = [
    "PLANES",
    "Boxes",
    "corners",
    "decode",
    "encode",
    "finest",
    "fit",
    "pack",
    "planes",
    "radii",
    "round_up",
    "unpack",
]

PLANES = 24
"""Bits of a whole code."""


class Boxes(NamedTuple):
    """Where the numbers of each block lie, as it is sent: 2 bytes for a block and channel, and 2 for a channel."""

    unit: BFloat16[Tensor, "c d"]
    low: Int8[Tensor, "c b d"]
    width: UInt8[Tensor, "c b d"]


def fit(x: Float64[Tensor, "c b m d"], valid: Bool[Tensor, "b m"]) -> Boxes:
    """The boxes around the valid tokens of each block, which has at least one."""
    there = valid[None, :, :, None]
    zero = x.new_zeros(len(x), 1, x.shape[-1])
    unit = round_up(torch.cat([zero, x.abs().masked_fill(~there, 0).flatten(1, 2)], 1).amax(1) / 127)
    least, most = x.masked_fill(~there, torch.inf).amin(2), x.masked_fill(~there, -torch.inf).amax(2)
    scale = unit.double()[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    low = (least / scale).floor().clamp(-128, 127)
    width = (most / scale - low).ceil().clamp(0, 255)
    return Boxes(unit, low.to(torch.int8), width.to(torch.uint8))


def corners(boxes: Boxes) -> tuple[Float32[Tensor, "c b 1 d"], Float32[Tensor, "c b 1 d"]]:
    """The low corner and the size of every box; products of a few bits, the same on every machine."""
    unit = boxes.unit.float()[:, None]
    return (boxes.low.float() * unit)[:, :, None], (boxes.width.float() * unit)[:, :, None]


def encode(x: Float64[Tensor, "c b m d"], boxes: Boxes) -> Int32[Tensor, "c b m d"]:
    """The whole code of every number, 0 to 2**PLANES - 1."""
    low, size = (part.double() for part in corners(boxes))
    inside = (x - low) / size.where(size > 0, 1) * 2**PLANES
    found: Tensor = inside.floor().nan_to_num(0).clamp(0, 2**PLANES - 1).to(torch.int32)
    return found


def planes(boxes: Boxes, level: Int[Tensor, "c b m"]) -> Int32[Tensor, "c b m d"]:
    """How many bits of each number its token's level holds; a level may be negative."""
    size = _magnitude(boxes)
    held: Tensor = (level[..., None].int() + size).clamp(0, PLANES).where(boxes.width[:, :, None] > 0, 0)
    return held


def finest(boxes: Boxes) -> Int32[Tensor, "c b"]:
    """The level from which on a block's widest channel has no more bits."""
    return PLANES - _magnitude(boxes)[:, :, 0].amax(-1)


def _magnitude(boxes: Boxes) -> Int32[Tensor, "c b 1 d"]:
    """The nearest integer to the logarithm of every box's size, without a logarithm that machines might round apart."""
    mantissa, exponent = torch.frexp(corners(boxes)[1])
    found: Tensor = exponent - (mantissa < 0.5**0.5).int()
    return found


def pack(
    codes: Int32[Tensor, "c b m d"], have: Int32[Tensor, "c b m d"], want: Int32[Tensor, "c b m d"]
) -> UInt8[Tensor, " bytes"]:
    """Bits number `have` to `want` of every code, counted from its leading one, code after code; zeros at the end."""
    bits: list[int] = []
    for code, first, stop in zip(
        codes.flatten().tolist(), have.flatten().tolist(), want.flatten().tolist(), strict=True
    ):
        bits += [code >> (PLANES - 1 - plane) & 1 for plane in range(first, stop)]
    bits += [0] * (-len(bits) % 8)
    packed = [sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    return torch.tensor(packed, dtype=torch.uint8)


def unpack(
    data: UInt8[Tensor, " bytes"],
    codes: Int32[Tensor, "c b m d"],
    have: Int32[Tensor, "c b m d"],
    want: Int32[Tensor, "c b m d"],
) -> Int32[Tensor, "c b m d"]:
    """The codes with those bits put in."""
    bits = iter([byte >> place & 1 for byte in data.tolist() for place in range(8)])
    found = codes.flatten().tolist()
    for i, (first, stop) in enumerate(zip(have.flatten().tolist(), want.flatten().tolist(), strict=True)):
        for plane in range(first, stop):
            found[i] |= next(bits) << PLANES - 1 - plane
    return torch.tensor(found, dtype=torch.int32).view(codes.shape)


def decode(codes: Int32[Tensor, "c b m d"], held: Int32[Tensor, "c b m d"], boxes: Boxes) -> Float64[Tensor, "c b m d"]:
    """The middle of the cell in which each number lies, as far as its first `held` bits tell."""
    low, size = (part.double() for part in corners(boxes))
    return low + size * (codes.double() * 0.5**PLANES + 0.5 ** (held + 1).double())


def radii(
    residual: Float64[Tensor, "c b m d"], level: Int[Tensor, "c b m"]
) -> tuple[Float[Tensor, "c b"], Float[Tensor, "c b"]]:
    """How long a token's residual is at most, and how long any combination of a block's, in units of 2**-level.

    The largest norm of a row of R, and the spectral norm of R: the residuals, each times 2 to its token's level.
    """
    scaled = residual * torch.exp2(level.double())[..., None]
    return scaled.norm(dim=-1).amax(-1), torch.linalg.matrix_norm(scaled, ord=2)


def round_up(x: Float[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """The least bfloat16 that is not below a number from 0 on."""
    near = x.float()
    above = near.where(near.double() >= x.double(), torch.nextafter(near, near.new_tensor(torch.inf)))
    bits = (above.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return bits.view(torch.float32).where(above.isfinite(), above).to(torch.bfloat16)
