"""The definition of a mixture of experts over rows: choose, sort, compute, and sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.swiglu import reference as activation

__all__ = ["combine", "experts", "route", "sort_by_expert"]


def route(
    logits: Float[Tensor, "t e"], top_k: int, *, renormalise: bool
) -> tuple[Float[Tensor, "t k"], Int64[Tensor, "t k"]]:
    """The largest probabilities of every token, and whose they are."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights, ids = logits.softmax(-1, dtype=wide).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), ids


def sort_by_expert(
    ids: Int64[Tensor, "*rows"], num_experts: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " {num_experts}"]]:
    """The places of all entries, sorted by expert, and how many each expert has.

    Raises:
        ValueError: on a CPU, an expert that there is not.
    """
    flat = ids.flatten()
    if num_experts < 0:
        raise ValueError(f"`num_experts` must be at least 0, got {num_experts}")
    if flat.is_cpu and len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < num_experts:
        raise ValueError(f"`ids` must lie in [0, {num_experts}), got {int(flat.min())} to {int(flat.max())}")
    counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))  # `bincount` waits for the GPU
    return flat.argsort(stable=True), counts


def experts(
    x: Float[Tensor, "r m"],
    gate_up: Float[Tensor, "e g m"],
    down: Float[Tensor, "e m f"],
    counts: Int64[Tensor, " e"],
    blocks: Sequence[int],
) -> Float[Tensor, "r m"]:
    """Each run of rows through its own gated MLP."""
    out = [
        activation.swiglu(rows @ up.T, blocks) @ back.T
        for rows, up, back in zip(x.split(counts.tolist()), gate_up, down, strict=True)
    ]
    return torch.cat([x[:0], *out])


def combine(
    rows: Float[Tensor, "n m"], weights: Float[Tensor, "t k"], order: Int64[Tensor, " n"]
) -> Float[Tensor, "t m"]:
    """The weighted sum of each token's rows, one after another."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    found = rows.index_select(0, places).unflatten(0, weights.shape)
    total = rows.new_zeros(len(weights), rows.shape[1], dtype=wide)
    for k in range(weights.shape[1]):
        total = total + found[:, k].to(wide) * weights[:, k, None].to(wide)
    return total.to(rows.dtype)
