"""RMS norm over the last dimension."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.rms_norm import pytorch, reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Tensor, "*rows m"], weight: Float[Tensor, " m"], eps: float, *, backend: Backend = "auto"
) -> Float[Tensor, "*rows m"]:
    """Scale each row to a mean square of one, then each column by `weight`, as Llama does.

    In:    x[..., M], any strides; weight[M].
    Out:   the shape of x; the dtype is what `weight * x` has.
    Grad:  to x and weight.

    Raises:
        ValueError: `weight` does not have one entry per column.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"`weight` must have one entry per column of `x` ({x.shape[-1]}), got {list(weight.shape)}")
    if backend == "auto":
        backend = choose_backend("rms_norm", x.device, x.dtype)
    if backend == "torch":
        return pytorch.rms_norm(x, weight, eps)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    raise unknown_backend(backend)
