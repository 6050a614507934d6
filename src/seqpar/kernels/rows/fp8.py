"""Keys and values in 8 bits: the definition.

Every token and KV head has float8_e4m3fn numbers and a scale that is a power of two, in a byte. A scale of its own is
what an append can write: that of a page would have to be known before its tokens are, or the page be encoded again when
a larger one comes. A power of two costs nothing, since the error of a float is relative to its own number whatever the
scale, and it makes numbers exact: those that are read are numbers of bfloat16, float16 and float32 alike, and encoded
again they stay what they are. At a head_dim of 128 the scales are 0.8 % of the bytes.

Where A is the largest magnitude of a row, its numbers x come back to within the greater of |x| / 16 and A / 229376. A
row with an infinity or a NaN becomes NaN as a whole; numbers within 1/16 of the largest of their dtype may overflow.

Sources: FP8 formats, arXiv:2209.05433; a scale for each token, as KIVI's of values (arXiv:2402.02750); scales that are
an exponent in a byte, as of the OCP Microscaling formats (arXiv:2310.10537).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

__all__ = ["FP8", "decode", "encode"]

FP8 = torch.float8_e4m3fn
BIAS = 127
"""Of a scale's exponent. 255 is that of rows that are not finite."""


def encode(x: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows d"], UInt8[Tensor, "*rows"]]:
    """The numbers as float8_e4m3fn, rounded to nearest even, and the exponents of the least scales that hold them."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest)  # the largest code is 0.875 * 2 ** 9
    scale = (exponent - 9 + (mantissa > 0.875) + BIAS).clamp(1, 254).masked_fill(largest == 0, 1)
    codes = (wide * _power(2 * BIAS - scale)[..., None]).to(FP8)
    return codes, scale.masked_fill(~largest.isfinite(), 255).to(torch.uint8)


def decode(
    codes: Float[Tensor, "*rows d"], scales: UInt8[Tensor, "*rows"], dtype: torch.dtype
) -> Float[Tensor, "*rows d"]:
    """The numbers, which are exact in a dtype of the range of those that were encoded."""
    scale = _power(scales.int()).masked_fill(scales == 255, torch.nan)
    return (codes.float() * scale[..., None]).to(dtype)


def _power(exponents: Int32[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """The powers of two of biased exponents from 1 to 254, by their bits."""
    return (exponents << 23).view(torch.float32)
