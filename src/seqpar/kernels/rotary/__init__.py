"""Rotary position embedding and the tables of every rope type that the supported models use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.rotary import pytorch, reference
from seqpar.kernels.rotary.rope import RopeConfig, rope_table

__all__ = ["RopeConfig", "rope_table", "rotary"]


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
        ValueError: the tables do not fit x.
    """
    tokens, _, dim = x.shape
    rotated = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape != (tokens, rotated) or rotated > dim or rotated % 2:
        raise ValueError(
            f"`cos` and `sin` must be [{tokens} tokens, even number of dims <= {dim}], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if backend == "auto":
        backend = choose_backend("rotary", x.device, x.dtype)
    if backend == "torch":
        return pytorch.rotary(x, cos, sin)
    if backend == "reference":
        return reference.rotary(x, cos, sin)
    raise unknown_backend(backend)
