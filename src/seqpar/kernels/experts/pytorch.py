"""Experts on sorted rows: one product for each expert that has rows, or one grouped product where that is fast.

The grouped product (bfloat16 on CUDA of compute capability 8.0 and up) reads the counts on the device, so the host need
not wait for them. It has been tried on a CPU, where PyTorch has a slow one, and not on a GPU.
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
    if x.is_cuda and _takes(x, gate_up, down):
        return grouped(x, gate_up, down, counts, blocks)
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


def grouped(
    x: Float[Tensor, "r m"],
    gate_up: Float[Tensor, "e g m"],
    down: Float[Tensor, "e m f"],
    counts: Int64[Tensor, " e"],
    blocks: Sequence[int],
) -> Float[Tensor, "r m"]:
    """`seqpar.kernels.experts.reference` by grouped products."""
    ends = counts.cumsum(0).to(torch.int32)
    hidden = swiglu(F.grouped_mm(x, gate_up.mT, offs=ends), blocks, consume=True)
    return F.grouped_mm(hidden, down.mT, offs=ends)


def _takes(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the grouped product takes these: bfloat16 rows, with sizes and strides that are multiples of 16 bytes."""
    return (
        len(x) > 0
        and all(t.dtype == torch.bfloat16 for t in (x, gate_up, down))
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(t.stride(-1) == 1 and t.data_ptr() % 16 == 0 for t in (x, gate_up, down))
        and all(n % 8 == 0 for n in (*gate_up.shape[1:], *down.shape[1:]))
        and all(n % 8 == 0 for t in (x, gate_up, down) for n in t.stride()[:-1])
    )
