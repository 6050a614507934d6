"""A mixture of experts over rows: which experts a token takes, the experts themselves, the sum of what they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.experts import pytorch, reference
from seqpar.kernels.experts.reference import sort_by_expert

__all__ = ["combine", "experts", "route", "sort_by_expert"]


def route(
    logits: Float[Tensor, "t e"], top_k: int, *, renormalise: bool = True
) -> tuple[Float[Tensor, "t k"], Int64[Tensor, "t k"]]:
    """The experts of every token and what each counts for: the `top_k` largest of the softmax of its logits.

    In:    logits[T, E].
    Out:   weights[T, K], falling, in float32 (float64 for float64 logits, which Transformers rounds); ids[T, K].
    Grad:  to the logits, through the weights.

    Args:
        logits: the router's.
        top_k: K, at most E.
        renormalise: the weights of a token sum to one; else they are its probabilities.

    Raises:
        ValueError: more experts to take than there are, or none.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"`top_k` must lie in [1, {logits.shape[1]}] (the experts), got {top_k}")
    return reference.route(logits, top_k, renormalise=renormalise)


def experts(
    x: Float[Tensor, "r m"],
    gate_up: Float[Tensor, "e g m"],
    down: Float[Tensor, "e m f"],
    counts: Int64[Tensor, " e"],
    blocks: Sequence[int],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "r m"]:
    """The gated MLP of its expert for every row.

    In:    x[R, M], the rows of expert 0 first, then those of expert 1; gate_up[E, 2F, M], rows gate0 | up0 | gate1 ...,
           sub-block i `blocks[i]` wide, as `swiglu` takes them; down[E, M, F]; counts[E] of rows, that sum to R.
    Out:   [R, M], down(silu(gate(x)) * up(x)) of each row, in its place.
    Grad:  to x, gate_up and down; also where there are no rows, so that every rank's graph is alike.

    The weights may be views of some rows of `gate_up` and some columns of `down`.

    Args:
        x: rows, sorted by expert.
        gate_up: fused projections.
        down: projections back.
        counts: rows of each expert; on CUDA read by the device where there is a grouped product, else by the host.
        blocks: widths of the sub-blocks.
        backend: which implementation.

    Raises:
        ValueError: shapes that do not fit each other; on a CPU also counts that are not those of `x`.
    """
    size, width = x.shape[1], sum(blocks)
    shapes = [(len(counts), 2 * width, size), (len(counts), size, width)]
    if [tuple(gate_up.shape), tuple(down.shape)] != shapes:
        raise ValueError(
            f"`gate_up` and `down` must have shapes {list(shapes[0])} and {list(shapes[1])}, "
            f"got {list(gate_up.shape)} and {list(down.shape)}"
        )
    if counts.is_cpu and int(counts.sum()) != len(x):
        raise ValueError(f"`counts` must sum to the rows of `x` ({len(x)}), got {int(counts.sum())}")
    if backend == "auto":
        backend = choose_backend("experts", x.device, x.dtype)
    if backend == "torch":
        return pytorch.experts(x, gate_up, down, counts, blocks)
    if backend == "reference":
        return reference.experts(x, gate_up, down, counts, blocks)
    raise unknown_backend(backend)


def combine(
    rows: Float[Tensor, "n m"], weights: Float[Tensor, "t k"], order: Int64[Tensor, " n"]
) -> Float[Tensor, "t m"]:
    """Each token's rows, weighted and summed from its first expert to its last.

    In:    rows[T*K, M], row i that of entry `order[i]` of weights[T, K] (`sort_by_expert`).
    Out:   [T, M] in the dtype of `rows`, summed in float32 (float64 for float64) and rounded once.
    Grad:  to rows and weights.

    Raises:
        ValueError: not one row for each weight; on a CPU, an order that is none.
    """
    if not len(rows) == weights.numel() == len(order):
        raise ValueError(
            f"`rows` and `order` must have one entry for each of `weights` ({weights.numel()}), "
            f"got {len(rows)} and {len(order)}"
        )
    if order.is_cpu and not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"`order` must name each of {len(order)} entries once, got {order.tolist()[:8]} ...")
    return reference.combine(rows, weights, order)
