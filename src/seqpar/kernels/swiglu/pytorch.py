"""SwiGLU on views: one for each run of sub-blocks of equal size, so mostly one, at most two for an even split.

A projection that nobody needs afterwards is the room for its own result: the pages of a fresh 32 MB buffer cost more to
get (16 ms on a Xeon in a virtual machine, November 2026) than the values to compute (5 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate_up: Float[Tensor, "t c"], blocks: Sequence[int], *, consume: bool = False) -> Float[Tensor, "t c//2"]:
    """`seqpar.kernels.swiglu.reference`; with gradients, or for a compiler, which has ways of its own, that itself."""
    if wants_grad(gate_up) or torch.compiler.is_compiling():
        return reference.swiglu(gate_up, blocks)
    if consume and len(blocks) == 1:
        gate, up = gate_up.chunk(2, 1)
        return F.silu(gate, inplace=True).mul_(up)
    tokens, out, at = len(gate_up), gate_up.new_empty(len(gate_up), sum(blocks)), 0
    for size, same in groupby(blocks):
        count = len(list(same))
        width = size * count
        gate, up = gate_up.narrow(1, 2 * at, 2 * width).view(tokens, count, 2, size).unbind(2)
        hidden = out.narrow(1, at, width).view(tokens, count, size)
        torch.ops.aten.silu.out(gate, out=hidden).mul_(up)
        at += width
    return out
