"""A linear product on an ordinary weight, by the faster of the libraries that PyTorch carries."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.linear import onednn

__all__ = ["linear", "linear_backend"]


def linear(
    x: Float[Tensor, "t m"],
    weight: Float[Tensor, "f m"],
    bias: Float[Tensor, " f"] | None = None,
    *,
    backend: Literal["auto", "torch", "onednn"] = "auto",
) -> Float[Tensor, "t f"]:
    """Multiply x by the transposed weight and add the bias: `torch.nn.functional.linear`, which is also its definition.

    In:    x[T, M]; weight[F, M], also a view of rows or columns; bias[F].
    Out:   [T, F].
    Grad:  to all three with backend "torch", which "auto" takes where gradients are wanted.

    Raises:
        ValueError: shapes or dtypes that do not fit each other; `backend="onednn"` for what it cannot do.
    """
    if x.shape[-1] != weight.shape[-1] or (bias is not None and len(bias) != len(weight)):
        shapes = [list(weight.shape), None if bias is None else list(bias.shape)]
        raise ValueError(f"`weight` and `bias` must be [f, {x.shape[-1]}] and [f], got {shapes[0]} and {shapes[1]}")
    mixed = x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)
    if mixed and not torch.is_autocast_enabled(x.device.type):
        dtypes = f"{weight.dtype}" if bias is None else f"{weight.dtype} and {bias.dtype}"
        raise ValueError(f"`weight` and `bias` must have the dtype of `x` ({x.dtype}), got {dtypes}")
    if backend == "auto":
        backend = linear_backend(x, weight, bias)
    elif backend == "onednn" and not onednn.takes(x, weight, bias):
        raise ValueError(
            '`backend` must be "torch" for this product, got "onednn", which takes contiguous float32 weights on CPUs, '
            "without gradients"
        )
    if backend == "onednn":
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_backend(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Literal["torch", "onednn"]:
    """The backend that `backend="auto"` stands for: oneDNN for float32 inference where MKL is slow."""
    if (
        x.is_cpu
        and onednn.preferred(len(x), weight)
        and onednn.takes(x, weight, bias)
        and not torch.compiler.is_compiling()
    ):
        return "onednn"
    return "torch"
