"""The definition of attention over a ragged batch, request by request, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.ragged import RaggedBatch

__all__ = ["attention"]


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
    sinks: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Causal attention in at least float32, a sink being one more column; gradients flow through both results."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = torch.tensor(kv_head_of, dtype=torch.int64, device=q.device)
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=dtype)]
    for request in range(batch.num_requests):
        rows = slice(*batch.q_starts[request : request + 2])
        keys, values = (request_keys(x, batch, request)[:, heads].to(dtype) for x in (k, v))
        scores = torch.einsum("shd,nhd->hsn", q[rows].to(dtype), keys) * softmax_scale
        scores = scores.masked_fill(~visible(batch, request, window).to(q.device), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()[..., : len(values)]
        outs.append(torch.einsum("hsn,nhd->shd", weights, values).to(q.dtype))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def request_keys(x: Float[Tensor, "*keys g d"], batch: RaggedBatch, request: int) -> Float[Tensor, "n g d"]:
    """The keys (or values) of one request and nothing else: unwritten memory of its last page is cut off."""
    if not batch.has_cache:
        return x[slice(*batch.kv_starts[request : request + 2])]
    return x[list(batch.pages[request])].flatten(0, 1)[: batch.kv_lens[request]]


def visible(batch: RaggedBatch, request: int, window: int | None) -> Tensor:
    """Which keys [n] each new token [s] of a request sees."""
    new, keys = batch.q_lens[request], batch.kv_lens[request]
    own, key = torch.arange(keys - new, keys)[:, None], torch.arange(keys)
    return (key <= own) & (key > own - (window or keys))
