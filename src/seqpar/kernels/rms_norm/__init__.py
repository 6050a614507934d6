"""RMS norm over the last dimension, and of a sum that is kept."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.rms_norm import pytorch, reference

__all__ = ["add_rms_norm", "check_eps", "check_weight", "rms_norm"]


def rms_norm(
    x: Float[Tensor, "*rows m"], weight: Float[Tensor, " m"], eps: float, *, backend: Backend = "auto"
) -> Float[Tensor, "*rows m"]:
    """Scale each row to a mean square of one, then each column by `weight`, as Llama does.

    In:    x[..., M], any strides; weight[M].
    Out:   the shape of x; the dtype is what `weight * x` has.
    Grad:  to x and weight.

    Raises:
        ValueError: `weight` does not have one entry per column, or `eps` is not positive; for "triton" another dtype,
            or more columns than a block holds.
    """
    check_weight(x, weight, eps)
    if backend == "auto":
        backend = choose_backend("rms_norm", x.device, x.dtype)
    if backend == "triton":
        from seqpar.kernels.rms_norm import triton

        return triton.rms_norm(x, weight, eps)
    if backend == "torch":
        return pytorch.rms_norm(x, weight, eps)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    raise unknown_backend(backend, "triton")


def add_rms_norm(
    x: Float[Tensor, "*rows m"],
    more: Float[Tensor, "*rows m"],
    weight: Float[Tensor, " m"],
    eps: float,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*rows m"], Float[Tensor, "*rows m"]]:
    """The norm of a sum, and the sum: what stands between two parts of a pre-norm layer, in one pass.

    In:    x, more [..., M] in one dtype, any strides; weight[M].
    Out:   `rms_norm(x + more)`, then `x + more`, rounded to the dtype before it is normed.
    Grad:  to x, more and weight.

    Raises:
        ValueError: shapes or dtypes differ, or as `rms_norm`.
    """
    check_weight(x, weight, eps)
    if x.shape != more.shape or x.dtype != more.dtype:
        raise ValueError(
            f"`more` must have the shape and dtype of `x` ({list(x.shape)}, {x.dtype}), "
            f"got {list(more.shape)}, {more.dtype}"
        )
    if backend == "auto":
        backend = choose_backend("rms_norm", x.device, x.dtype)
    if backend == "triton":
        from seqpar.kernels.rms_norm import triton

        return triton.add_rms_norm(x, more, weight, eps)
    if backend == "torch":
        total = x + more
        return pytorch.rms_norm(total, weight, eps), total
    if backend == "reference":
        return reference.add_rms_norm(x, more, weight, eps)
    raise unknown_backend(backend, "triton")


def check_weight(x: Tensor, weight: Tensor, eps: float) -> None:
    """Raise ValueError unless a weight has one entry per column, and rows of zeros a norm."""
    check_eps(eps)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"`weight` must have one entry per column of `x` ({x.shape[-1]}), got {list(weight.shape)}")


def check_eps(eps: float) -> None:
    """Raise ValueError unless something positive is added to a mean square."""
    if not 0 < eps < math.inf:
        raise ValueError(f"`eps` must be positive and finite, got {eps}")
