"""SwiGLU over a packed projection."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.swiglu import pytorch, reference

__all__ = ["swiglu"]


def swiglu(
    gate_up: Float[Tensor, "t c"], blocks: Sequence[int], *, consume: bool = False, backend: Backend = "auto"
) -> Float[Tensor, "t c//2"]:
    """silu(gate) * up, the activation of a gated MLP.

    In:    gate_up[T, 2 * sum(blocks)], columns gate0 | up0 | gate1 | up1 ..., sub-block i `blocks[i]` wide.
    Out:   [T, sum(blocks)], columns in the order of the sub-blocks.
    Grad:  to gate_up.

    Args:
        gate_up: the packed projection.
        blocks: widths of the sub-blocks.
        consume: gate_up may be overwritten, and the result may be a view of it, where no gradient is wanted.
        backend: which implementation.

    Raises:
        ValueError: the columns are not two of each sub-block; for "triton" another dtype.
    """
    if gate_up.shape[1] != 2 * sum(blocks) or not blocks or any(block < 0 for block in blocks):
        raise ValueError(
            f"`gate_up` must have a gate and an up column for each of `blocks` ({2 * sum(blocks)} columns), "
            f"got {gate_up.shape[1]} for blocks {tuple(blocks)}"
        )
    if backend == "auto":
        backend = choose_backend("swiglu", gate_up.device, gate_up.dtype)
    if backend == "triton":
        from seqpar.kernels.swiglu import triton

        return triton.swiglu(gate_up, blocks)
    if backend == "torch":
        return pytorch.swiglu(gate_up, blocks, consume=consume)
    if backend == "reference":
        return reference.swiglu(gate_up, blocks)
    raise unknown_backend(backend, "triton")
