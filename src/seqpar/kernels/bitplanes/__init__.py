"""Nested codes: numbers of which any number of leading bits are known, in boxes of a block of tokens each.

A sender encodes once. What it sends of a token is a range of bit-planes, so a coarse message can be refined token by
token, and what each token still lacks is known to both sides: the boxes and the tokens' levels say it. Residuals are
measured against what the receiver will decode, and their norms rounded up, so a bound made of them holds.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Bool, Float64, Int, Int32, UInt8
from torch import Tensor

from seqpar.kernels.bitplanes import pytorch, reference
from seqpar.kernels.bitplanes.pytorch import pack_bits, unpack_bits
from seqpar.kernels.bitplanes.reference import PLANES, Boxes, encode, finest, fit, planes, round_up
from seqpar.kernels.dispatch import Backend, unknown_backend

__all__ = [
    "PLANES",
    "Boxes",
    "decode",
    "encode",
    "finest",
    "fit",
    "pack",
    "pack_bits",
    "packed_bytes",
    "planes",
    "radii",
    "round_up",
    "unpack",
    "unpack_bits",
]

SLACK = 1 + 1e-9
"""On norms computed in float64, for the rounding of some hundred sums and products."""


def pack(
    codes: Int32[Tensor, "c b m d"],
    have: Int32[Tensor, "c b m d"],
    want: Int32[Tensor, "c b m d"],
    *,
    backend: Backend = "auto",
) -> UInt8[Tensor, " bytes"]:
    """Bits number `have` to `want` of every code, counted from its leading one.

    In:    codes of C streams (a head's keys or values), B blocks of M tokens, D channels; 0 <= have <= want <= PLANES.
    Out:   `packed_bytes(have, want)` bytes: code after code, eight bits a byte, zeros at the end.

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "reference":
        return reference.pack(codes, have, want)
    if backend not in ("auto", "torch"):
        raise unknown_backend(backend)
    return pytorch.pack(codes, have, want)


def unpack(
    data: UInt8[Tensor, " bytes"],
    codes: Int32[Tensor, "c b m d"],
    have: Int32[Tensor, "c b m d"],
    want: Int32[Tensor, "c b m d"],
    *,
    backend: Backend = "auto",
) -> Int32[Tensor, "c b m d"]:
    """The codes, known up to `have`, with the bits of `pack` put in.

    Raises:
        ValueError: another number of bytes than those bits take; an unknown backend.
    """
    if len(data) != packed_bytes(have, want):
        raise ValueError(f"`data` must be {packed_bytes(have, want)} bytes for those bits, got {len(data)}")
    if backend == "reference":
        return reference.unpack(data, codes, have, want)
    if backend not in ("auto", "torch"):
        raise unknown_backend(backend)
    return pytorch.unpack(data, codes, have, want)


def packed_bytes(have: Int32[Tensor, "c b m d"], want: Int32[Tensor, "c b m d"]) -> int:
    """How many bytes the bits between take."""
    return -(-int((want - have).sum()) // 8)


def decode(codes: Int32[Tensor, "c b m d"], held: Int32[Tensor, "c b m d"], boxes: Boxes) -> Float64[Tensor, "c b m d"]:
    """The middle of the cell in which each number lies, as far as its first `held` bits tell.

    In:    codes whose further bits are zero. Exact in float64 but for a last bit, so both sides see the same numbers.
    """
    return reference.decode(codes, held, boxes)


def radii(
    residual: Float64[Tensor, "c b m d"],
    level: Int[Tensor, "c b m"],
    valid: Bool[Tensor, "b m"],
    *,
    backend: Backend = "auto",
) -> BFloat16[Tensor, "two c b"]:
    """Bounds of a block's residuals R, rounded up, in units of 2 to minus each token's level.

    Out:   [0]: at least |2**level[i] R[i]| of every valid token i; [1]: at least |(2**level * w) R| for every vector w
           of norm 1 over the block, the spectral norm. One pair serves a block whose tokens have any levels.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("auto", "torch", "reference"):
        raise unknown_backend(backend)
    own = residual.masked_fill(~valid[None, :, :, None], 0)
    found = (reference if backend == "reference" else pytorch).radii(own, level)
    return round_up(torch.stack(found) * SLACK)
