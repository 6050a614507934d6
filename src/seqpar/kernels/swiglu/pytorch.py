"""SwiGLU on views: one for each run of sub-blocks of equal size, so mostly one, at most two for an even split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["swiglu"]


def swiglu(gate_up: Float[Tensor, "t c"], blocks: Sequence[int]) -> Float[Tensor, "t c//2"]:
    """`seqpar.kernels.swiglu.reference`, run by run."""
    runs = [(size, len(list(same))) for size, same in groupby(blocks)]
    if len(runs) == 1:
        return _equal(gate_up, *runs[0])
    cuts = gate_up.split([2 * size * count for size, count in runs], dim=1)
    return torch.cat([_equal(cut, *run) for cut, run in zip(cuts, runs, strict=True)], dim=1)


def _equal(gate_up: Tensor, size: int, count: int) -> Tensor:
    """`count` sub-blocks of one size."""
    gate, up = gate_up.unflatten(1, (count, 2, size)).unbind(2)
    hidden = F.silu(gate)
    hidden = hidden * up if hidden.requires_grad else hidden.mul_(up)
    return hidden.flatten(1)
