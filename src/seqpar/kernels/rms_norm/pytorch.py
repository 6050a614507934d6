"""The RMS norm by PyTorch's own operator where that has Llama's order of casts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(x: Float[Tensor, "*rows m"], weight: Float[Tensor, " m"], eps: float) -> Float[Tensor, "*rows m"]:
    """`seqpar.kernels.rms_norm.reference`, equal to it up to rounding."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return weight * F.rms_norm(x.to(wide), weight.shape, None, eps).to(x.dtype)
