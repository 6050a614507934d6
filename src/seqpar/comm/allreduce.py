"""Which algorithm sums a tensor over the ranks, and the sums themselves.

one_shot: every rank sends all of its tensor to every other and sums what it has. One latency, (p-1)*n elements sent.
two_shot: rank r sums part r of an even split, then the parts are gathered. Two latencies, 2*n*(p-1)/p sent.
backend:  what gloo or NCCL does. Its order of summation is its own, and gloo adds half precision in half precision.

The first two add in float32 in rank order and round once, so they agree bit for bit, at any p, for any cut of the
tensor; a deterministic group uses only them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Algorithm", "all_reduce_algorithm", "sum_in_rank_order"]

Algorithm = Literal["one_shot", "two_shot", "backend"]


def all_reduce_algorithm(num_bytes: int, p: int, deterministic: bool, device_type: str) -> Algorithm:
    """The algorithm for a tensor of `num_bytes` over `p` ranks; the same answer on every rank."""
    if device_type == "cuda" and not deterministic:
        return "backend"
    if num_bytes <= (256 << 10 if p > 2 else 1 << 20):
        return "one_shot"
    return "two_shot" if deterministic or num_bytes <= 1 << 20 else "backend"


def sum_in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of equal-shaped tensors from left to right, half precision in float32 and rounded once.

    Raises:
        TypeError: the dtype has no sum (bool, 8-bit floats).
    """
    dtype = parts[0].dtype
    check_summable(dtype)
    if len(parts) == 2:  # adding two halves rounds once as it is
        return parts[0] + parts[1]
    total = parts[0].to(torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def check_summable(dtype: torch.dtype) -> None:
    """Raise TypeError where a sum over ranks of this dtype is not defined, or wrong in a backend."""
    if dtype not in _SUMMABLE:
        raise TypeError(f"`x` must have a real dtype of at least 16 bits, or an integer one, to be summed, got {dtype}")


_SUMMABLE = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
)
