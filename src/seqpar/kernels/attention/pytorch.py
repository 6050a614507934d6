"""Attention by PyTorch's fused operators, a call for each group of requests of one shape.

The operators know dense batches and a causal mask that starts at the first key, so a ragged batch is served as
- a decode: the query heads that share a KV head become query rows, so that its keys are read once for all of them;
- a whole prompt: the causal operator;
- a prompt chunk over cached keys: all of those without a mask, the chunk causally, and the merge of both, which beats one call
  with a mask by a quarter (45 ms against 62 ms at 2 x 1024 tokens; one Xeon core, November 2026);
- a window: blocks of queries with the keys they can see and an additive mask, the same for all inner blocks.
The operators give no gradient through `lse`. Where one is wanted through `out`, a chunk is served as a window that is
never full; asking for one through `lse` is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.attention import varlen
from seqpar.kernels.attention.plan import Group, head_runs, make_groups
from seqpar.kernels.merge import merge
from seqpar.ragged import RaggedBatch

__all__ = ["attention"]

Partial = tuple[Tensor, Tensor]

_cpu_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cuda_op = torch.ops.aten._scaled_dot_product_efficient_attention.default

BAND_ROWS = 256
"""Query rows of a block under a window: larger ones waste more masked work, smaller ones more calls."""


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Causal attention with `seqpar.kernels.attention.reference`'s meaning."""
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if varlen.serves(q):
        out, lse = varlen.attention(
            q, k, v, batch, softmax_scale=softmax_scale, window=window, kv_head_of=kv_head_of, paged=not wants_grad
        )
    else:
        call = _Call(batch, softmax_scale, window, kv_head_of, wants_grad)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        parts = [call.group(q, k, v, group) for group in call.groups]
        out, lse = parts[0] if len(parts) == 1 else _cat(parts, 0)
    return (out, _OutOnly.apply(lse, out)) if wants_grad else (out, lse)


class _OutOnly(torch.autograd.Function):
    """Make a gradient through `lse` an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, out: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError('`lse` must not be differentiated with backend="torch"; use backend="reference"')


class _Call:
    """One attention call: the plan of the batch and the options that every group needs."""

    __slots__ = ("batch", "grad", "groups", "runs", "scale", "window")

    def __init__(
        self, batch: RaggedBatch, scale: float, window: int | None, kv_head_of: tuple[int, ...], grad: bool
    ) -> None:
        key = ("attention.groups", window, kv_head_of)
        plan = batch.plans.get(key)
        if plan is None:
            plan = batch.plans[key] = make_groups(batch, window), head_runs(kv_head_of)
        self.groups, self.runs = plan
        self.batch, self.scale, self.window, self.grad = batch, scale, window, grad

    def group(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Partial:
        """The rows of one group: out [rows, h, d], lse [rows, h]."""
        rows = group.count * group.q_len
        if rows != len(q):
            q = q.narrow(0, group.row, rows)
        q = q.unflatten(0, (group.count, group.q_len))
        k, v = self.keys(k, group), self.keys(v, group)
        if len(self.runs) == 1 and self.runs[0].kv_stop == k.shape[2]:
            out, lse = self.heads(q, k, v, group)
        else:
            cut = [(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]) for a, b, c, d in self.runs]
            out, lse = _cat([self.heads(*qkv, group) for qkv in cut], 2)
        return out.flatten(0, 1), lse.flatten(0, 1).contiguous()

    def keys(self, x: Tensor, group: Group) -> Tensor:
        """The keys (or values) of a group [b, n, g, d]: a view, but for scattered pages."""
        n, size = group.kv_len, self.batch.page_size
        if group.pages:
            x = x[list(group.pages)]
        if size:
            x = x.view(-1, *x.shape[2:])
        if group.count == 1:
            return x.narrow(0, group.start, n).unsqueeze(0)
        if group.stride == n:
            return x.narrow(0, group.start, n * group.count).unflatten(0, (group.count, n))
        token, head, _ = x.stride()
        shape, strides = (group.count, n, *x.shape[1:]), (group.stride * token, token, head, 1)
        return x.as_strided(shape, strides, x.storage_offset() + group.start * token)

    def heads(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Partial:
        """Query heads and KV heads in one ratio: out [b, s, h, d], lse [b, s, h]."""
        if group.q_len == 1:
            return self.decode(q, k, v)
        hidden = self.window is not None and self.window < group.kv_len
        if hidden or (group.prefix and self.grad):
            return self.band(q, k, v, group)
        if group.prefix:
            n = group.prefix
            outs, lses = zip(
                _fused(q, k[:, :n], v[:, :n], self.scale),
                _fused(q, k[:, n:], v[:, n:], self.scale, causal=True),
                strict=True,
            )
            return merge(outs, lses)
        return _fused(q, k, v, self.scale, causal=True)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """One query row that sees every key: the query heads of a KV head are its rows."""
        b, _, h, d = q.shape
        packed = q.view(b, k.shape[2], -1, d).transpose(1, 2)
        out, lse = _fused(packed, k, v, self.scale)
        return out.transpose(1, 2).reshape(b, 1, h, d), lse.transpose(1, 2).reshape(b, 1, h)

    def band(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Partial:
        """Blocks of query rows, each over the keys that some of its rows see."""
        parts = []
        for start in range(0, group.q_len, BAND_ROWS):
            stop = min(start + BAND_ROWS, group.q_len)
            own = group.prefix + start
            first = max(0, own - (self.window or group.kv_len) + 1)
            last = group.prefix + stop
            mask = self.mask(stop - start, last - first, own - first, q)
            parts.append(_fused(q[:, start:stop], k[:, first:last], v[:, first:last], self.scale, mask=mask))
        return parts[0] if len(parts) == 1 else _cat(parts, 1)

    def mask(self, rows: int, columns: int, own: int, like: Tensor) -> Tensor:
        """0 where row i sees column j and -inf elsewhere; row i's own key is column own + i."""
        key = ("attention.mask", rows, columns, own, self.window, like.dtype)
        mask: Tensor | None = self.batch.plans.get(key)
        if mask is None:
            row = own + torch.arange(rows, device=like.device)[:, None]
            column = torch.arange(-(-columns // 16) * 16, device=like.device)  # aligned rows, as CUDA demands
            seen = (column <= row) & (column > row - (self.window or columns))
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
            mask = self.batch.plans[key] = mask[:, :columns]
        return mask


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None) -> Partial:
    """One dense call on [b, s, h, d] and [b, n, g, d], neither s nor n zero."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        out, lse = _cpu_op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        if k.shape[1] != q.shape[1]:
            ratio = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        bias = None if mask is None else mask.expand(*q.shape[:3], mask.shape[1])
        out, lse, _, _ = _cuda_op(q, k, v, bias, True, 0.0, causal, scale=scale)
        lse = lse[:, :, : q.shape[2]]  # the operator pads rows
    return out.transpose(1, 2), lse.transpose(1, 2)


def _cat(parts: list[Partial], dim: int) -> Partial:
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)
