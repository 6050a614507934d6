"""Attention on CUDA in half precision: PyTorch's FlashAttention over ragged or paged keys, one call per head run.

The operator of PyTorch 2.11 shares KV heads without being asked and reads no pages: there they are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.attention.plan import head_runs
from seqpar.ragged import RaggedBatch

__all__ = ["attention", "key_addresses", "serves"]

PAGE_MULTIPLE = 256
"""FlashAttention-2 reads pages in place only when their size is a multiple of this."""


def serves(q: Tensor) -> bool:
    """Whether the operator takes this device, dtype and head dim."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
    in_place: bool,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Causal attention; `in_place` allows reading pages where they lie, which has no gradient."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    known = _options(varlen_attn)
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if batch.has_cache and in_place and batch.page_size % PAGE_MULTIPLE == 0 and "block_table" in known:
        options |= {"block_table": batch.page_table, "seqused_k": batch.cu_kv.diff()}
    elif batch.has_cache:
        addresses = key_addresses(batch)
        k, v = (x.flatten(0, 1)[addresses] for x in (k, v))
    outs, lses = [], []
    for run in head_runs(kv_head_of):
        out, lse = varlen_attn(
            q[:, run.q_start : run.q_stop],
            k[..., run.kv_start : run.kv_stop, :],
            v[..., run.kv_start : run.kv_stop, :],
            batch.cu_q,
            batch.cu_kv,
            max(batch.q_lens),
            max(batch.kv_lens),
            return_aux=AuxRequest(lse=True),
            scale=softmax_scale,
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
        outs.append(out)
        lses.append(lse.transpose(0, 1))  # the operator gives [h, t]
    return torch.cat(outs, 1), torch.cat(lses, 1).contiguous()


@cache
def _options(operator: Callable[..., Any]) -> frozenset[str]:
    """The arguments that this PyTorch's operator takes."""
    return frozenset(signature(operator).parameters)


def key_addresses(batch: RaggedBatch) -> Int64[Tensor, " keys"]:
    """Flat cache address of every key of every request, request after request; worked out once per batch."""
    found: Tensor | None = batch.plans.get("attention.addresses")
    if found is None:
        total = batch.kv_starts[-1]
        with torch.inference_mode(False):  # later calls on the batch may want a gradient
            request = torch.repeat_interleave(batch.cu_kv.diff(), output_size=total)
            index = torch.arange(total, device=batch.device) - batch.cu_kv[request]
            page = batch.page_table[request, index // batch.page_size].long()
            found = batch.plans["attention.addresses"] = page * batch.page_size + index % batch.page_size
    return found
