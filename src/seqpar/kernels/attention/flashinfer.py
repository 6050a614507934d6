"""Attention by FlashInfer's wrappers for paged keys: decodes of one token each, and all else.

A wrapper plans on the host for one batch and serves all layers, as a batch's other plans do, and lives as long as the
batch: its workspace comes from PyTorch's allocator, which has it back for the next one. Keys that lie flat are pages of
one token. FlashInfer counts masses in base 2.

Source: FlashInfer, arXiv:2501.01005; its `BatchDecodeWithPagedKVCacheWrapper` and
`BatchPrefillWithPagedKVCacheWrapper` as of August 2026.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.ragged import PageCSR, RaggedBatch

__all__ = ["attention"]

WORKSPACE_BYTES = 128 << 20
"""As its documentation recommends."""

TENSOR_CORE_RATIO = 4
"""Query heads of a KV head from which its decodes are faster on tensor cores, as its documentation says."""


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
    kv_heads, dim = k.shape[-2:]
    key = ("attention.flashinfer", q.shape[1], kv_heads, dim, q.dtype, scale, window)
    wrapper = batch.plans.get(key)
    if wrapper is None:
        wrapper = batch.plans[key] = _planned(module, batch, q, kv_heads, scale, window)
    pages = (k, v) if batch.has_cache else (k[:, None], v[:, None])
    out, lse = wrapper.run(q, pages, return_lse=True)
    return out, lse * log(2)


def _planned(module: Any, batch: RaggedBatch, q: Tensor, kv_heads: int, scale: float, window: int | None) -> Any:
    """A wrapper that knows the batch; tables are given on the host, where it reads them."""
    heads, dim = q.shape[1:]
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    rule: dict[str, Any] = {
        "sm_scale": scale,
        "window_left": -1 if window is None else window - 1,
        "q_data_type": q.dtype,
        "kv_data_type": q.dtype,
    }
    table, page_size = _table(batch), batch.page_size or 1
    if set(batch.q_lens) == {1}:
        dense = heads // kv_heads >= TENSOR_CORE_RATIO
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=dense)
        wrapper.plan(*table, heads, kv_heads, dim, page_size, **rule)
        return wrapper
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    starts = torch.tensor(batch.q_starts, dtype=torch.int32)
    wrapper.plan(starts, *table, heads, kv_heads, dim, page_size, causal=True, **rule)
    return wrapper


def _table(batch: RaggedBatch) -> PageCSR:
    """Whose pages are whose, on the host; flat keys are a page each."""
    if batch.has_cache:
        return batch.host_csr
    starts = torch.tensor(batch.kv_starts, dtype=torch.int32)
    return PageCSR(starts, torch.arange(batch.kv_starts[-1], dtype=torch.int32), torch.ones_like(starts[1:]))
