"""The rotary embedding with three passes over memory and no copy of the rotated half."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.rotary import reference

__all__ = ["rotary"]


def rotary(x: Float[Tensor, "t h d"], cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"]) -> Float[Tensor, "t h d"]:
    """`seqpar.kernels.rotary.reference`, equal to it up to rounding; with gradients, that itself."""
    if torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
        return reference.rotary(x, cos, sin)
    r = cos.shape[1]
    if r < x.shape[2]:
        return torch.cat((rotary(x[..., :r], cos, sin), x[..., r:]), dim=2)
    first, second = x.unflatten(2, (2, r // 2)).unbind(2)
    sin_first, sin_second = sin.view(-1, 1, 2, r // 2).unbind(2)
    out = x * cos[:, None]
    turned = out.view(*x.shape[:2], 2, r // 2)
    turned[:, :, 0].addcmul_(second, sin_first, value=-1)
    turned[:, :, 1].addcmul_(first, sin_second)
    return out
