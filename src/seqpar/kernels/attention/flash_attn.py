"""Attention by the package flash-attn: requests of equally many new tokens over pages as a batch, all else ragged.

The first form splits the keys of few queries over the processors; the other takes requests of any length, over pages or
over keys that lie flat. Both count masses in base e, heads first.

Source: FlashAttention-2, arXiv:2307.08691; `flash_attn_with_kvcache` and `flash_attn_varlen_func` of flash-attn 2.8.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from seqpar.ragged import RaggedBatch

__all__ = ["attention"]


def attention(
    module: Any,
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Heads that share KV heads in one ratio."""
    rule: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    if batch.has_cache and len(set(batch.q_lens)) == 1:
        out, lse = module.flash_attn_with_kvcache(
            q.unflatten(0, (batch.num_requests, -1)),
            k,
            v,
            cache_seqlens=batch.cu_kv.diff(),
            block_table=batch.page_table,
            return_softmax_lse=True,
            **rule,
        )
        return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    # Where at most one token is new it takes every request to have one; with 2 as the bound it looks.
    longest = max(2, *batch.q_lens) if 0 in batch.q_lens else max(batch.q_lens)
    out, lse, _ = module.flash_attn_varlen_func(
        q,
        k,
        v,
        batch.cu_q,
        batch.cu_kv,
        longest,
        max(batch.kv_lens),
        return_attn_probs=True,
        block_table=batch.page_table if batch.has_cache else None,
        **rule,
    )
    return out, lse.transpose(0, 1)
