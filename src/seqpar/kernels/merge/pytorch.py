"""Merging with few passes over memory: running sums, and a single interpolation for two partials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.merge import reference

__all__ = ["merge"]


def merge(
    outs: Sequence[Float[Tensor, "*rows d"]], lses: Sequence[Float[Tensor, "*rows"]]
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """`seqpar.kernels.merge.reference` with its stack of partials never built; with gradients, that itself."""
    if wants_grad(*outs, *lses):
        return reference.merge(outs, lses)
    lse = lses[0]
    for other in lses[1:]:
        lse = torch.logaddexp(lse, other)
    top = lse.masked_fill(lse == -torch.inf, 0)  # a row that nobody saw weighs 0, not NaN
    if len(outs) == 2:
        first, second = (out.to(lse.dtype) for out in outs)
        out = torch.lerp(first, second, (lses[1] - top).exp()[..., None])
    else:
        out = outs[0].to(lse.dtype) * (lses[0] - top).exp()[..., None]
        for partial, mass in zip(outs[1:], lses[1:], strict=True):
            out = torch.addcmul(out, partial.to(lse.dtype), (mass - top).exp()[..., None])
    return out.to(outs[0].dtype), lse
