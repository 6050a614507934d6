"""The definition of a sum over ranks that is added to the residual and normed, on a list of the ranks' partials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.rms_norm import reference

__all__ = ["all_reduce_norm"]


def all_reduce_norm(
    partials: Sequence[Float[Tensor, "t m"]], residual: Float[Tensor, "t m"], weight: Float[Tensor, " m"], eps: float
) -> tuple[Float[Tensor, "t m"], Float[Tensor, "t m"]]:
    """The norm of residual plus sum, and that total: half types are summed in float32 in rank order, rounded once."""
    total = partials[0].to(torch.promote_types(residual.dtype, torch.float32))
    for partial in partials[1:]:
        total = total + partial
    return reference.add_rms_norm(residual, total.to(residual.dtype), weight, eps)
