"""oneDNN's float32 product, which PyTorch carries beside MKL's but gives to `F.linear` for half types only.

MKL is slow for few tokens, and on processors that are not Intel's for many as well. Time of one layer's products of a
rank (weights of 1536, 8192 x 2048, 2048 x 1024, 4096), two processes at once, in ms (November 2026); "swapped" gives
the weights as the tokens and the tokens, filled up to 16, as the weights:

| tokens | Xeon: `F.linear` / plain / swapped | EPYC: `F.linear` / plain |
|---|---|---|
| 1 | 7.2 / 7.9 / 11.6 | 6.3 / 6.3 |
| 4 | 14.9 / 10.7 / 11.2 | |
| 8 | 22.7 / 12.1 / 11.3 | 20 / 12.6 |
| 16 | 24.0 / 15.4 / 11.6 | |
| 24 | 23.2 / 17.7 / 14.8 | |
| 64 | 34.9 / 30.1 / 24.9 | 58 / 41 |
| 128 | 55 / 50 / 48 | |
| 256 | 95 / 92 / 95 | |
| 512 | 180 / 183 / 195 | plain 0.85 of `F.linear`; 0.9 at 2048 |

On the EPYC swapping gains 7 to 20 % more for 12 to 64 tokens, in multiples of 16. Packing the weights first gains
little and keeps a second copy of them. A weight with strided rows takes seconds a call, and below 2**18 weights the
80 us that the operator costs (`F.linear`: 15 us) are more than it saves.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import wants_grad

__all__ = ["linear", "preferred", "takes"]

SMALLEST = 2**18
"""Weights from which it pays, see the module."""


TILE = 16
"""Tokens that a swapped product computes at once."""


class _Pays(NamedTuple):
    """For how many tokens the operator is faster than `F.linear`, and its swapped form than the plain one."""

    onednn: range
    swapped: range


INTEL = _Pays(onednn=range(4, 193), swapped=range(5, 129))
OTHERS = _Pays(onednn=range(1, sys.maxsize), swapped=range(12, 65))


def linear(
    x: Float[Tensor, "t m"], weight: Float[Tensor, "f m"], bias: Float[Tensor, " f"] | None = None
) -> Float[Tensor, "t f"]:
    """`torch.nn.functional.linear`, equal to it up to rounding."""
    tokens, x = len(x), x.contiguous()
    if bias is not None or tokens not in _pays().swapped or weight.shape[0] % TILE:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    filled = F.pad(x, (0, 0, 0, -tokens % TILE))
    out = torch.ops.mkldnn._linear_pointwise(weight, filled, None, "none", [], "")
    return out[:, :tokens].t().contiguous()


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


def preferred(tokens: int, weight: Tensor) -> bool:
    """Whether it is likely to be faster, by the measurements above."""
    return weight.numel() >= SMALLEST and tokens in _pays().onednn


@cache
def _pays() -> _Pays:
    info = Path("/proc/cpuinfo")
    return OTHERS if info.exists() and "GenuineIntel" not in info.read_text() else INTEL
