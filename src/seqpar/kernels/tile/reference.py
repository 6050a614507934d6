"""The definition of a tile: masked scores, their softmax, and the gradients of a softmax over more than the tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar.kernels.attention.plan import HeadRun

__all__ = ["tile_attention", "tile_gradients"]


def tile_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    softmax_scale: float,
    runs: Sequence[HeadRun],
    causal: bool,
    mask: Bool[Tensor, "s n"] | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """In at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q, k, softmax_scale, runs, causal, mask, dtype)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("hsn,nhd->shd", weights, _per_query_head(v, runs).to(dtype))
    return out.to(q.dtype), lse.T.contiguous()


def tile_gradients(
    grad: Float[Tensor, "s h d"],
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    out: Float[Tensor, "s h d"],
    lse: Float[Tensor, "s h"],
    softmax_scale: float,
    runs: Sequence[HeadRun],
    causal: bool,
    mask: Bool[Tensor, "s n"] | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "n g d"], Float[Tensor, "n g d"]]:
    """With p = exp(score - lse), the gradient of a score is p * (v @ grad - sum(out * grad))."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide, keys, values = grad.to(dtype), _per_query_head(k, runs).to(dtype), _per_query_head(v, runs).to(dtype)
    weights = (_scores(q, k, softmax_scale, runs, causal, mask, dtype) - lse.T[..., None]).exp()
    delta = (wide * out.to(dtype)).sum(-1).T[..., None]
    inner = weights * (torch.einsum("shd,nhd->hsn", wide, values) - delta) * softmax_scale
    to_q = torch.einsum("hsn,nhd->shd", inner, keys)
    to_k = torch.einsum("hsn,shd->nhd", inner, q.to(dtype))
    to_v = torch.einsum("hsn,shd->nhd", weights, wide)
    return to_q.to(q.dtype), _per_kv_head(to_k, k, runs), _per_kv_head(to_v, v, runs)


def _scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    runs: Sequence[HeadRun],
    causal: bool,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    scores = torch.einsum("shd,nhd->hsn", q.to(dtype), _per_query_head(k, runs).to(dtype)) * scale
    if causal:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _per_query_head(x: Tensor, runs: Sequence[HeadRun]) -> Tensor:
    """[n, g, d] to [n, h, d]."""
    heads = [head for run in runs for head in _kv_heads(run)]
    return x[:, torch.tensor(heads, dtype=torch.int64, device=x.device)]


def _per_kv_head(x: Tensor, like: Tensor, runs: Sequence[HeadRun]) -> Tensor:
    """The sum over the query heads of each KV head, [n, h, d] to [n, g, d]."""
    heads = torch.tensor([head for run in runs for head in _kv_heads(run)], dtype=torch.int64, device=x.device)
    return x.new_zeros(like.shape).index_add_(1, heads, x).to(like.dtype)


def _kv_heads(run: HeadRun) -> list[int]:
    ratio = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
    return [head for head in range(run.kv_start, run.kv_stop) for _ in range(ratio)]
