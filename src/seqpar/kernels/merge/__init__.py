"""Merge of attention partials: exact, associative, with the identity (0, -inf)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.merge import pytorch, reference
from seqpar.kernels.merge.sinks import add_sinks

__all__ = ["add_sinks", "merge"]


def merge(
    outs: Float[Tensor, "n *rows d"] | Sequence[Float[Tensor, "*rows d"]],
    lses: Float[Tensor, "n *rows"] | Sequence[Float[Tensor, "*rows"]],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """The attention over a union of disjoint key sets, from the attention over each.

    In:    n partials, stacked or in a sequence: outs[T, H, D], lses[T, H] in natural log, float32 or float64.
           A partial that saw no key is (0, -inf).
    Out:   out[T, H, D] in the dtype of `outs`, computed in that of `lses`; lse[T, H]. (0, -inf) where no partial saw
           a key.
    Grad:  to all partials, through both results.

    Raises:
        ValueError: no partials, or shapes and dtypes that contradict each other.
    """
    outs, lses = tuple(outs), tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"`lses` must have one entry per partial, at least one, got {len(lses)} for {len(outs)}")
    if any(out.shape[:-1] != lse.shape or out.shape != outs[0].shape for out, lse in zip(outs, lses, strict=True)):
        shapes = [(list(out.shape), list(lse.shape)) for out, lse in zip(outs, lses, strict=True)]
        raise ValueError(f"partials must have one shape, [..., d] and [...], got {shapes}")
    if any(lse.dtype not in (torch.float32, torch.float64) or lse.dtype != lses[0].dtype for lse in lses):
        raise ValueError(f"`lses` must all be float32 or all float64, got {[lse.dtype for lse in lses]}")
    if backend == "auto":
        backend = choose_backend("merge", outs[0].device, outs[0].dtype)
    if backend == "torch":
        return pytorch.merge(outs, lses)
    if backend == "reference":
        return reference.merge(outs, lses)
    raise unknown_backend(backend)
