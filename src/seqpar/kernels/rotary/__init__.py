"""Rotary position embedding and the tables of every rope type that the supported models use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend, wants_grad
from seqpar.kernels.rms_norm import check_weight, rms_norm
from seqpar.kernels.rotary import pytorch, reference
from seqpar.kernels.rotary.rope import RopeConfig, rope_table

__all__ = ["RopeConfig", "norm_rotary", "rope_table", "rotary"]


def rotary(
    x: Float[Tensor, "t h d"],
    cos: Float[Tensor, "t r"],
    sin: Float[Tensor, "t r"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "t h d"]:
    """Turn queries or keys by their positions, dims i and i + r / 2 of a head being one pair (Llama's layout).

    In:    x[T, H, D], any strides; cos, sin [T, r] from `rope_table`, r even, at most D. Dims from r on pass through.
    Out:   [T, H, D], contiguous; x is not written.
    Grad:  to x, cos and sin.

    Raises:
        ValueError: the tables do not fit x; for "triton" another dtype.
    """
    _check(x, cos, sin)
    if backend == "auto":
        backend = choose_backend("rotary", x.device, x.dtype)
    if backend == "triton":
        from seqpar.kernels.rotary import triton

        return triton.rotary(x, cos, sin)
    if backend == "torch":
        return pytorch.rotary(x, cos, sin)
    if backend == "reference":
        return reference.rotary(x, cos, sin)
    raise unknown_backend(backend, "triton")


def norm_rotary(
    x: Float[Tensor, "t h d"],
    weight: Float[Tensor, " d"],
    eps: float,
    cos: Float[Tensor, "t r"],
    sin: Float[Tensor, "t r"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "t h d"]:
    """Norm each head, then turn it: q/k norms and the rotary embedding, in one pass where there is a kernel for it.

    In:    x[T, H, D], any strides; weight[D]; cos, sin [T, r] as `rotary` takes them.
    Out:   [T, H, D], contiguous; `rotary(rms_norm(x, weight, eps), cos, sin)`.
    Grad:  to all of them, by the two of which it is made.

    Raises:
        ValueError: as `rms_norm` and `rotary`.
    """
    _check(x, cos, sin)
    if backend == "auto":
        backend = choose_backend("norm_rotary", x.device, x.dtype)
    if backend == "triton" and weight.dtype == x.dtype and not wants_grad(x, weight, cos, sin):
        from seqpar.kernels.rotary import triton

        check_weight(x, weight, eps)
        return triton.norm_rotary(x, weight, eps, cos, sin)
    return rotary(rms_norm(x, weight, eps, backend=backend), cos, sin, backend=backend)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, _, dim = x.shape
    rotated = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape != (tokens, rotated) or rotated > dim or rotated % 2:
        raise ValueError(
            f"`cos` and `sin` must be [{tokens} tokens, even number of dims <= {dim}], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
