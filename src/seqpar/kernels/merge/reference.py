"""The definition of merging: partials weigh as much as the softmax mass that each of them saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["merge"]


def merge(
    outs: Sequence[Float[Tensor, "*rows d"]], lses: Sequence[Float[Tensor, "*rows"]]
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """The partial of the union of disjoint key sets, given the partial of each."""
    mass = torch.stack(tuple(lses))
    top = mass.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (mass - top).exp()
    total = weights.sum(0)
    seen = total > 0
    safe = total.where(seen, torch.ones_like(total))
    out = (torch.stack(tuple(outs)).to(mass.dtype) * (weights / safe)[..., None]).sum(0)
    return out.to(outs[0].dtype), (top + safe.log()).masked_fill(~seen, -torch.inf)
