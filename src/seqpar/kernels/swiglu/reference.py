"""The definition of SwiGLU over packed sub-blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["swiglu"]


def swiglu(gate_up: Float[Tensor, "t c"], blocks: Sequence[int]) -> Float[Tensor, "t c//2"]:
    """silu(gate) * up of each sub-block, side by side."""
    pairs = gate_up.split([size for block in blocks for size in (block, block)], dim=1)
    return torch.cat([F.silu(gate) * up for gate, up in zip(pairs[::2], pairs[1::2], strict=True)], dim=1)
