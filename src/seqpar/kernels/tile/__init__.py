"""Attention of some queries to some keys under one plain rule: the piece of which rings and shards are made.

`kernels.attention` is causal by the index in a request, which is what a cache needs. Where the keys of a request lie on
several ranks, a rank's queries see all of some keys, none of others, and of few a part that only positions tell. The
backward pass is not autograd's: partials are merged, and each tile needs the merged output and log-sum-exp, as
FlashAttention's backward pass does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar.kernels.attention.plan import head_runs
from seqpar.kernels.dispatch import Backend, auto_backend, unknown_backend, warn_of_reference
from seqpar.kernels.tile import pytorch, reference

__all__ = ["placed_attention", "tile_attention", "tile_gradients"]


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
    backend = auto_backend("tile", q.device, q.dtype) if backend == "auto" else backend
    if backend not in ("torch", "reference"):
        raise unknown_backend(backend)
    rule = softmax_scale, head_runs(kv_head_of), causal, mask
    if backend == "torch" and q.numel() and k.numel():
        return pytorch.tile_attention(q, k, v, *rule)
    return reference.tile_attention(q, k, v, *rule)


def placed_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    *,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    positions: tuple[Int[Tensor, " s"], Int[Tensor, " n"]],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    window: int | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """A tile for each request, whose queries see keys by position: any share of its keys, such as a rank's stripes.

    In:    q[S, H, D]; k, v[N, G, D]: the requests one after another, views with unit stride in D.
    Out:   out[S, H, D] in the dtype of q; lse[S, H], natural log, float32 (float64 for float64). (0, -inf) for a query
           that sees no key.
    Grad:  none.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_lens: Queries of each request.
        kv_lens: Keys of each request, maybe fewer.
        positions: Of the queries, and of the keys, increasing in each request: a query sees keys up to its own.
        softmax_scale: Factor on the scores.
        kv_head_of: KV head that each query head reads, non-decreasing.
        window: Positions that a query sees, its own included; None for all before it.
        backend: See `kernels.attention`. "triton" is one launch without a mask in memory, and takes what it takes
            there; the others are a tile with a mask for each request.

    Raises:
        ValueError: shapes, dtypes, lengths or positions contradict each other; what "triton" does not take.
    """
    _check(q, k, v, kv_head_of, False, None)
    _check_placed(q, k, q_lens, kv_lens, positions)
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1, since a token sees itself, got {window}; None is no window")
    backend = auto_backend("placed", q.device, q.dtype) if backend == "auto" else backend
    if backend == "triton":
        from seqpar.kernels.attention import launch

        launch.check_heads(q, k, v, softmax_scale=softmax_scale)
        rule = softmax_scale, head_runs(kv_head_of), window
        return launch.placed_attention(q, k, v, q_lens, kv_lens, positions, *rule)
    if backend not in ("torch", "reference"):
        raise unknown_backend(backend, "triton")
    parts = [(q[:0], q.new_empty(0, q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)))]
    own, others = positions
    for rows, keys in zip(_slices(q_lens), _slices(kv_lens), strict=True):
        age = own[rows, None] - others[keys].to(own.device)
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "kv_head_of": kv_head_of, "backend": backend}
        parts.append(tile_attention(q[rows], k[keys], v[keys], mask=seen.to(q.device), **options))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _slices(lens: Sequence[int]) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise((0, *accumulate(lens)))]


def _check_placed(
    q: Tensor, k: Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], positions: tuple[Tensor, Tensor]
) -> None:
    """Lengths, and on a host the order of positions, which a device is not asked for."""
    counts = (len(q), len(k)), (sum(q_lens), sum(kv_lens)), (len(positions[0]), len(positions[1]))
    if len(set(counts)) > 1 or len(q_lens) != len(kv_lens) or min((*q_lens, *kv_lens), default=0) < 0:
        raise ValueError(
            f"`q_lens`, `kv_lens` and `positions` must be those of {counts[0][0]} queries and {counts[0][1]} keys, got "
            f"{list(q_lens)}, {list(kv_lens)} and {counts[2]}"
        )
    for x, lens in zip(positions, (q_lens, kv_lens), strict=True):
        if x.is_cpu and any((x[those].diff() <= 0).any() for those in _slices(lens)):
            raise ValueError(f"`positions` must increase in each request, got {x.tolist()}")


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
        if backend == "reference":
            warn_of_reference("tile_gradients", q.device, q.dtype)
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
