"""The definition of the wire formats."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["GROUP", "LARGEST", "TINY", "Wire", "decode", "encode", "encoded_width"]

Wire: TypeAlias = Literal["int8", "fp8"]
GROUP = 128
"""Numbers that share a scale."""
LARGEST: dict[Wire, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest code."""
CODES: dict[Wire, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TINY = torch.finfo(torch.float32).tiny
"""The smallest scale: its reciprocal is finite, which that of a smaller number may not be."""


def encoded_width(n: int) -> int:
    """Bytes of a row of `n` numbers."""
    return n + 4 * -(-n // GROUP)


def encode(x: Float[Tensor, "rows n"], wire: Wire) -> UInt8[Tensor, "rows bytes"]:
    """Codes, rounded to nearest, then the scales' bytes."""
    rows, n = x.shape
    groups = F.pad(x.float(), (0, -n % GROUP)).view(rows, -(-n // GROUP), GROUP)
    scale = scale_of(groups.abs().amax(-1), wire)
    scaled = groups * scale.reciprocal()[..., None]
    codes = (scaled.round() if wire == "int8" else scaled).to(CODES[wire])
    return torch.cat([codes.view(torch.uint8).flatten(1)[:, :n], scale.view(torch.uint8)], 1)


def decode(data: UInt8[Tensor, "rows bytes"], n: int, dtype: torch.dtype, wire: Wire) -> Float[Tensor, "rows n"]:
    """Codes times scales, in float32."""
    rows = len(data)
    codes = F.pad(data[:, :n], (0, -n % GROUP)).view(CODES[wire]).view(rows, -(-n // GROUP), GROUP)
    scale = (
        data[:, n:].clone(memory_format=torch.contiguous_format).view(-1).view(torch.float32).view(rows, -(-n // GROUP))
    )
    return (codes.float() * scale[..., None]).flatten(1)[:, :n].to(dtype).contiguous()


def scale_of(largest: Float[Tensor, "rows groups"], wire: Wire) -> Float[Tensor, "rows groups"]:
    """What a code of 1 stands for, given the groups' largest magnitudes; NaN where they are not finite."""
    most = LARGEST[wire]
    # The upper limit keeps `most` times a scale from rounding up to infinity.
    scale = (largest.float() / most).clamp(TINY, torch.finfo(torch.float32).max / most * (1 - 2**-23))
    return scale.masked_fill(~largest.isfinite(), torch.nan)
