"""The definition of the rotary embedding in Llama's half-rotation form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rotary"]


def rotary(x: Float[Tensor, "t h d"], cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"]) -> Float[Tensor, "t h d"]:
    """The first r dims of each head, as r / 2 pairs (i, i + r / 2), turned by the token's angles; the rest as it is."""
    turned, rest = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], dim=2)
    first, second = turned.chunk(2, dim=2)
    quarter = torch.cat((-second, first), dim=2)
    return torch.cat((turned * cos[:, None] + quarter * sin[:, None], rest), dim=2)
