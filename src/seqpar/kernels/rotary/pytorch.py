"""The rotary embedding with three passes over memory and no copy of the rotated half."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.rotary import reference

__all__ = ["rotary"]


def rotary(x: Float[Tensor, "t h d"], cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"]) -> Float[Tensor, "t h d"]:
    """`seqpar.kernels.rotary.reference`, equal to it up to rounding; with gradients, that itself."""
    if wants_grad(x, cos, sin):
        return reference.rotary(x, cos, sin)
    r = cos.shape[1]
    if r < x.shape[2]:
        return torch.cat((rotary(x[..., :r], cos, sin), x[..., r:]), dim=2)
    out = x * cos.unsqueeze(1)
    (first, second), (to_first, to_second) = x.split(r // 2, 2), out.split(r // 2, 2)
    sin_first, sin_second = sin.unsqueeze(1).split(r // 2, 2)
    to_first.addcmul_(second, sin_first, value=-1)
    to_second.addcmul_(first, sin_second)
    return out
