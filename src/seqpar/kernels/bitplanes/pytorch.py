"""Nested codes without a loop over numbers, and spectral norms without a decomposition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int32, UInt8
from torch import Tensor

from seqpar.kernels.bitplanes.reference import PLANES

__all__ = ["pack", "radii", "unpack"]

SQUARINGS = 6
"""Of the Gram matrix G: the spectral norm is overestimated by at most d**(1 / 2**7), 2.8 % for d = 32."""


def pack(
    codes: Int32[Tensor, "c b m d"], have: Int32[Tensor, "c b m d"], want: Int32[Tensor, "c b m d"]
) -> UInt8[Tensor, " bytes"]:
    """`seqpar.kernels.bitplanes.reference`, byte for byte; one stream at a time, since every bit takes a byte."""
    bits = [_bits(code)[_wanted(*ends)] for code, *ends in zip(codes, have, want, strict=True)]
    return pack_bits(torch.cat([codes.new_empty(0, dtype=torch.uint8), *bits]))


def unpack(
    data: UInt8[Tensor, " bytes"],
    codes: Int32[Tensor, "c b m d"],
    have: Int32[Tensor, "c b m d"],
    want: Int32[Tensor, "c b m d"],
) -> Int32[Tensor, "c b m d"]:
    """`seqpar.kernels.bitplanes.reference`, bit for bit."""
    bits, found = unpack_bits(data), []
    for code, *ends in zip(codes, have, want, strict=True):
        wanted = _wanted(*ends)
        size = int(wanted.sum())
        planes = torch.zeros(wanted.shape, dtype=torch.uint8, device=data.device)
        planes[wanted] = bits[:size]
        bits = bits[size:]
        found.append(code | (planes.int() << _places(codes)).sum(-1, dtype=torch.int32))
    return torch.stack(found) if found else codes


def radii(
    residual: Float64[Tensor, "c b m d"], level: Int[Tensor, "c b m"]
) -> tuple[Float[Tensor, "c b"], Float[Tensor, "c b"]]:
    """`seqpar.kernels.bitplanes.reference`; the spectral norm from above, by (tr G**n)**(1 / 2n)."""
    scaled = residual * torch.exp2(level.double())[..., None]
    rows = scaled.square().sum(-1).amax(-1).sqrt()
    gram = scaled.transpose(-1, -2) @ scaled
    total = gram.new_ones(gram.shape[:2])
    for turn in range(SQUARINGS + 1):
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        total = total * trace.pow(0.5 ** (turn + 1))
        gram = gram / trace.where(trace > 0, 1)[..., None, None]
        gram = gram @ gram
    return rows, total


def pack_bits(bits: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Eight bits a byte, the first of them least; zeros at the end."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (F.pad(bits, (0, -len(bits) % 8)).view(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(data: UInt8[Tensor, " bytes"]) -> UInt8[Tensor, " n"]:
    """The bits of `pack_bits`, those at the end too."""
    return (data[:, None] >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1).flatten()


def _bits(code: Tensor) -> Tensor:
    return (code[..., None] >> _places(code) & 1).to(torch.uint8)


def _wanted(have: Tensor, want: Tensor) -> Tensor:
    plane = torch.arange(PLANES, dtype=torch.int32, device=have.device)
    return (plane >= have[..., None]) & (plane < want[..., None])


def _places(code: Tensor) -> Tensor:
    return torch.arange(PLANES - 1, -1, -1, dtype=torch.int32, device=code.device)
