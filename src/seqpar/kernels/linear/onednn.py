"""oneDNN's float32 product, which PyTorch carries beside MKL's but gives to `F.linear` for half types only.

On processors that are not Intel's MKL runs a slower path. One core of an AMD EPYC (AVX-512, November 2026), oneDNN's
time divided by `F.linear`'s, weights of 1536..5632 x 2048: 0.4-0.7 for 1 token, 0.7-0.85 for 8 and 64, 0.85 for 512,
0.9 for 2048. Packing the weights first gains little more and keeps a second copy of them. A weight with strided rows
takes seconds a call, and below 2**18 weights the 80 us that the operator costs (`F.linear`: 15 us) are more than it
saves.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad

__all__ = ["linear", "preferred", "takes"]

SMALLEST = 2**18
"""Weights from which it pays, see the module."""


def linear(
    x: Float[Tensor, "t m"], weight: Float[Tensor, "f m"], bias: Float[Tensor, " f"] | None = None
) -> Float[Tensor, "t f"]:
    """`torch.nn.functional.linear`, equal to it up to rounding."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operator is there and is right for this product."""
    return bool(
        x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and x.numel() > 0
        and weight.numel() > 0
        and weight.is_contiguous()
        and not wants_grad(x, weight, *(() if bias is None else (bias,)))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def preferred(weight: Tensor) -> bool:
    """Whether it is likely to be faster: a weight that is large enough, on a processor whose maker is not MKL's."""
    return weight.numel() >= SMALLEST and _not_intel()


@cache
def _not_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "GenuineIntel" not in info.read_text()
