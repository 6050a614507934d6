"""The definition of the RMS norm, as Llama has it: half types are normalised in float32 and cast before the weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Float[Tensor, "*rows m"], weight: Float[Tensor, " m"], eps: float) -> Float[Tensor, "*rows m"]:
    """Rows scaled to a mean square of one, then column by column by the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: Float[Tensor, "*rows m"], more: Float[Tensor, "*rows m"], weight: Float[Tensor, " m"], eps: float
) -> tuple[Float[Tensor, "*rows m"], Float[Tensor, "*rows m"]]:
    """The norm of the sum, and the sum."""
    total = x + more
    return rms_norm(total, weight, eps), total
