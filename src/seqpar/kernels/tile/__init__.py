"""Attention of some queries to some keys under one plain rule: the piece of which rings and shards are made.

`kernels.attention` is causal by the index in a request, which is what a cache needs. Where the keys of a request lie on
several ranks, a rank's queries see all of some keys, none of others, and of few a part that only positions tell. The
backward pass is not autograd's: partials are merged, and each tile needs the merged output and log-sum-exp, as
FlashAttention's backward pass does.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar.kernels.attention.plan import head_runs
from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.tile import pytorch, reference

__all__ = ["tile_attention", "tile_gradients"]


def tile_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    *,
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    causal: bool = False,
    mask: Bool[Tensor, "s n"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """What each query gathers from the keys that it may see, and the mass it saw.

    In:    q[S, H, D]; k, v[N, G, D], views with unit stride in D.
    Out:   out[S, H, D] in the dtype of q; lse[S, H], natural log, float32 (float64 for float64). (0, -inf) for a query
           that sees no key.
    Grad:  none; see `tile_gradients`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        softmax_scale: Factor on the scores.
        kv_head_of: KV head that each query head reads, non-decreasing.
        causal: Query i sees keys up to i, of as many keys as queries.
        mask: Which keys each query sees; all by default.
        backend: See `kernels.attention`.

    Raises:
        ValueError: shapes, dtypes or the rule contradict each other.
    """
    _check(q, k, v, kv_head_of, causal, mask)
    backend = choose_backend("attention", q.device, q.dtype) if backend == "auto" else backend
    if backend not in ("torch", "reference"):
        raise unknown_backend(backend)
    rule = softmax_scale, head_runs(kv_head_of), causal, mask
    if backend == "torch" and q.numel() and k.numel():
        return pytorch.tile_attention(q, k, v, *rule)
    return reference.tile_attention(q, k, v, *rule)


def tile_gradients(
    grad: Float[Tensor, "s h d"],
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    out: Float[Tensor, "s h d"],
    lse: Float[Tensor, "s h"],
    *,
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    causal: bool = False,
    mask: Bool[Tensor, "s n"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "n g d"], Float[Tensor, "n g d"]]:
    """What a tile adds to the gradients of its queries, keys and values.

    In:    grad, out[S, H, D] and lse[S, H] of these queries over all their keys, of which the tile's are a part.
    Out:   of q, k and v, in their dtypes.

    Args:
        grad: Of `out`.
        q: Queries.
        k: Keys.
        v: Values.
        out: What all partials merge to.
        lse: The mass of all of them, finite.
        softmax_scale: As in `tile_attention`, like the rest.
        kv_head_of: Likewise.
        causal: Likewise.
        mask: Likewise.
        backend: "auto" is the fused operator on a CPU, and on CUDA the definition, which holds all scores of the tile.

    Raises:
        ValueError: shapes, dtypes or the rule contradict each other.
    """
    _check(q, k, v, kv_head_of, causal, mask)
    if backend == "auto":
        backend = "torch" if q.is_cpu else "reference"
    if backend not in ("torch", "reference"):
        raise unknown_backend(backend)
    rule = softmax_scale, head_runs(kv_head_of), causal, mask
    if backend == "torch" and q.numel() and k.numel():
        return pytorch.tile_gradients(grad, q, k, v, out, lse, *rule)
    return reference.tile_gradients(grad, q, k, v, out, lse, *rule)


def _check(q: Tensor, k: Tensor, v: Tensor, kv_head_of: tuple[int, ...], causal: bool, mask: Tensor | None) -> None:
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "`q`, `k`, `v` must be [s, h, d], [n, g, d], [n, g, d] of one dtype, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)} in {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if len(kv_head_of) != q.shape[1] or any(not 0 <= head < k.shape[1] for head in kv_head_of):
        raise ValueError(
            f"`kv_head_of` must give each of {q.shape[1]} query heads one of {k.shape[1]} KV heads, got {kv_head_of}"
        )
    if causal and (mask is not None or len(q) != len(k)):
        raise ValueError(
            f"`causal` must be of as many keys as queries and without `mask`, got {len(q)} queries, {len(k)} keys"
        )
    if mask is not None and (mask.shape != (len(q), len(k)) or mask.dtype != torch.bool):
        raise ValueError(f"`mask` must be [{len(q)}, {len(k)}] in torch.bool, got {list(mask.shape)} in {mask.dtype}")
