"""Merge of attention partials: exact, associative, with the identity (0, -inf)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, refuse_dtype, unknown_backend, wants_grad
from seqpar.kernels.merge import pytorch, reference
from seqpar.kernels.merge.sinks import add_sinks, check_sinks

__all__ = ["add_sinks", "merge"]


def merge(
    outs: Float[Tensor, "n *rows d"] | Sequence[Float[Tensor, "*rows d"]],
    lses: Float[Tensor, "n *rows"] | Sequence[Float[Tensor, "*rows"]],
    *,
    sinks: Float[Tensor, " h"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """The attention over a union of disjoint key sets, from the attention over each.

    In:    n partials, stacked or in a sequence: outs[T, H, D], lses[T, H] in natural log, float32 or float64.
           A partial that saw no key is (0, -inf). Triton reads partials of any strides in place, also of a sequence
           if they lie evenly in one buffer, but perhaps for the first.
    Out:   out[T, H, D] in the dtype of `outs`, computed in that of `lses`; lse[T, H]. (0, -inf) where no partial saw
           a key.
    Grad:  to all partials and the sinks, through both results; none with backend="triton".

    Args:
        outs: Outputs of the partials.
        lses: What mass of the softmax each of them saw.
        sinks: To be added to the whole, as by `add_sinks`; of no partial then.
        backend: "torch", "reference" (the definition), "triton" (on a GPU, no float64), or "auto", see
            `choose_backend`.

    Raises:
        ValueError: no partials, shapes and dtypes that contradict each other, or what "triton" does not take.
    """
    outs, lses = tuple(outs), tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"`lses` must have one entry per partial, at least one, got {len(lses)} for {len(outs)}")
    if any(out.shape[:-1] != lse.shape or out.shape != outs[0].shape for out, lse in zip(outs, lses, strict=True)):
        shapes = [(list(out.shape), list(lse.shape)) for out, lse in zip(outs, lses, strict=True)]
        raise ValueError(f"partials must have one shape, [..., d] and [...], got {shapes}")
    if any(lse.dtype not in (torch.float32, torch.float64) or lse.dtype != lses[0].dtype for lse in lses):
        raise ValueError(f"`lses` must all be float32 or all float64, got {[lse.dtype for lse in lses]}")
    if sinks is not None:
        check_sinks(sinks, outs[0])
    grad = wants_grad(*outs, *lses, *(() if sinks is None else (sinks,)))
    if backend == "auto":
        wide = lses[0].dtype == torch.float64
        backend = "torch" if grad or wide else choose_backend("merge", outs[0].device, outs[0].dtype)
    if backend == "triton":
        return _by_triton(outs, lses, sinks, grad)
    if backend not in ("torch", "reference"):
        raise unknown_backend(backend, "triton")
    found = pytorch.merge(outs, lses) if backend == "torch" else reference.merge(outs, lses)
    return found if sinks is None else add_sinks(*found, sinks)


def _by_triton(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], sinks: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor]:
    refuse_dtype("outs", outs[0].dtype)
    if lses[0].dtype != torch.float32 or grad:
        raise ValueError(
            f'`lses` must be float32 and need no gradient for backend="triton", got {lses[0].dtype}'
            f'{" and a gradient wanted" if grad else ""}; backend="torch" takes it'
        )
    if any(out.dtype != outs[0].dtype for out in outs):
        raise ValueError(
            f'`outs` must have one dtype for backend="triton", got {[out.dtype for out in outs]}; '
            'backend="torch" takes them'
        )
    from seqpar.kernels.merge import triton

    return triton.merge(outs, lses, sinks)
