"""Experts on sorted rows: one product for each expert that has rows, or one grouped product where PyTorch has it.

The grouped product (bfloat16 on CUDA of compute capability 8.0 and up) reads the counts on the device, so the host need
not wait for them; it has been read about and not been run here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.linear import linear
from seqpar.kernels.swiglu import swiglu

__all__ = ["experts"]


def experts(
    x: Float[Tensor, "r m"],
    gate_up: Float[Tensor, "e g m"],
    down: Float[Tensor, "e m f"],
    counts: Int64[Tensor, " e"],
    blocks: Sequence[int],
) -> Float[Tensor, "r m"]:
    """`seqpar.kernels.experts.reference`."""
    if len(x) and x.is_cuda and _takes(x, gate_up, down):
        ends = counts.cumsum(0).to(torch.int32)
        hidden = swiglu(F.grouped_mm(x, gate_up.mT, offs=ends), blocks, consume=True)
        return F.grouped_mm(hidden, down.mT, offs=ends)
    sizes = counts.tolist()
    busy = [expert for expert, size in enumerate(sizes) if size]
    if not busy:
        return x.clone() + gate_up[:0].sum() + down[:0].sum()  # no rows, but a way back to all that was given
    # The gradient of `unbind` is one stack; that of each index would be as large as all experts.
    ups, downs = (w.unbind() if wants_grad(w) else w for w in (gate_up, down))
    rows = x.split([sizes[expert] for expert in busy])
    out = [
        linear(swiglu(linear(part, ups[expert]), blocks, consume=True), downs[expert])
        for part, expert in zip(rows, busy, strict=True)
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def _takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the grouped product takes these: bfloat16, rows that begin at multiples of 16 bytes."""
    return (
        hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(w.dtype == x.dtype == torch.bfloat16 for w in weights)
        and all(
            t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in (*t.shape[-2:], *t.stride()[:-1]))
            for t in weights
        )
    )
