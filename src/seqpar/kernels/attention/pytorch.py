"""Attention by PyTorch's fused operators, a call for each group of requests of one shape.

The operators know dense batches and a causal mask that starts at the first key, so a ragged batch is served as
- a decode: the query heads that share a KV head become query rows, so that its keys are read once for all of them;
- a whole prompt: the causal operator; on a CPU only for triangles along the diagonal, since it skips keys in steps of
  512: the squares below them have no mask and fold in by their log-sum-exp (`_triangle`);
- a prompt chunk over cached keys: all of those without a mask, the chunk causally, and the merge of both. Time divided
  by one call with a mask, 16 / 4 heads of 64: 0.8 at 1024 tokens over 1024, 1.1 at 256 over 256, in float32 (one AMD
  EPYC core, November 2026);
- a window: blocks of queries with the keys they can see and an additive mask, slices of one. So is any causal prompt
  that is to have the same bits in chunks: what a block computes does not depend on the rows after it, nor, but for its
  keys, on those before.
The operators give no gradient through `lse`. Where one is wanted through `out`, a chunk is served as a window that is
never full; asking for one through `lse` is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.attention import varlen
from seqpar.kernels.attention.plan import Group, HeadRun, head_runs, make_groups
from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.merge import merge
from seqpar.ragged import RaggedBatch

__all__ = ["attention"]

Partial = tuple[Tensor, Tensor]

_cpu_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cuda_op = torch.ops.aten._scaled_dot_product_efficient_attention.default

BAND_ROWS = 64
"""Query rows of a block under a window: larger ones waste more masked work, smaller ones more calls."""

TRIANGLE_ROWS = 128
"""Rows of the triangles that the causal operator is left with on a CPU; see `_triangle`."""

PACKED_ROWS = 16
"""A chunk this short has its query heads packed over cached keys, as a decode has: 2.9 times faster with 2 tokens, 1.1
with 16 (2048 cached, 16 / 4 heads; one AMD EPYC core, November 2026)."""


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
    deterministic: bool = False,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Causal attention with `seqpar.kernels.attention.reference`'s meaning."""
    grad = wants_grad(q, k, v)
    if varlen.serves(q):
        out, lse = varlen.attention(
            q, k, v, batch, softmax_scale=softmax_scale, window=window, kv_head_of=kv_head_of, in_place=not grad
        )
    else:
        call = _Call(batch, softmax_scale, window, grad, deterministic)
        q = q if q.stride(2) == 1 else q.contiguous()
        k, v = _addressable(k), _addressable(v)
        groups, runs = _plan(batch, window, kv_head_of)
        parts = [_cat([_attend(q, k, v, group, run, call) for run in runs], 1) for group in groups]
        out, lse = (x.contiguous() for x in _cat(parts, 0))  # they mostly are
    return (out, _OutOnly.apply(lse, out)) if grad else (out, lse)  # type: ignore[no-untyped-call]


class _OutOnly(torch.autograd.Function):
    """Make a gradient through `lse` an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, out: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError('`lse` must not be differentiated with backend="torch"; use backend="reference"')


class _Call(NamedTuple):
    """What every group of one attention call needs to know."""

    batch: RaggedBatch
    scale: float
    window: int | None
    grad: bool
    deterministic: bool


def _plan(
    batch: RaggedBatch, window: int | None, kv_head_of: tuple[int, ...]
) -> tuple[tuple[Group, ...], tuple[HeadRun, ...]]:
    key = ("attention.plan", window, kv_head_of)
    plan: tuple[tuple[Group, ...], tuple[HeadRun, ...]] | None = batch.plans.get(key)
    if plan is None:
        plan = batch.plans[key] = make_groups(batch, window), head_runs(kv_head_of)
    return plan


def _addressable(x: Tensor) -> Tensor:
    """Keys of which token i lies i token strides after the first, over all pages."""
    paged_evenly = x.dim() == 3 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if x.stride(-1) == 1 and paged_evenly else x.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, group: Group, run: HeadRun, call: _Call) -> Partial:
    """The rows of one group for one run of heads: out [rows, h, d], lse [rows, h]."""
    ratio = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
    k, v = _keys(k, group, run), _keys(v, group, run)
    token, head, _ = q.stride()
    at = q.storage_offset() + group.row * token + run.q_start * head
    if group.q_len == 1:  # the query heads of a KV head are the rows
        shape, strides = (group.requests, k.shape[1], ratio, q.shape[2]), (token, ratio * head, head, 1)
        out, lse = _fused(q.as_strided(shape, strides, at), k, v, call.scale)
        return out.reshape(group.requests, -1, q.shape[2]), lse.reshape(group.requests, -1)
    shape = (group.requests, run.q_stop - run.q_start, group.q_len, q.shape[2])
    q = q.as_strided(shape, (group.q_len * token, head, token, 1), at)
    hidden = call.window is not None and call.window < group.kv_len
    if hidden or call.deterministic or (group.prefix and call.grad):
        out, lse = _band(q, k, v, group.prefix, call)
    elif group.prefix:
        out, lse = _chunk(q, k, v, group.prefix, call.scale)
    else:
        out, lse = _causal(q, k, v, call.scale, call.grad)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _keys(x: Tensor, group: Group, run: HeadRun) -> Tensor:
    """The keys (or values) of a group [b, g, n, d]: a view, but for scattered pages."""
    if group.pages:
        x = x[list(group.pages)]
    token, head, _ = x.stride()[-3:]
    at = x.storage_offset() + group.start * token + run.kv_start * head
    shape = (group.requests, run.kv_stop - run.kv_start, group.kv_len, x.shape[-1])
    return x.as_strided(shape, (group.stride * token, head, token, 1), at)


def _chunk(q: Tensor, k: Tensor, v: Tensor, prefix: int, scale: float) -> Partial:
    """New tokens after cached ones."""
    packed = q.reshape(len(q), k.shape[1], -1, q.shape[3]) if q.shape[2] <= PACKED_ROWS else q
    out, lse = _fused(packed, k[:, :, :prefix], v[:, :, :prefix], scale)
    own = _causal(q, k[:, :, prefix:], v[:, :, prefix:], scale)
    return merge((own[0], out.reshape(q.shape)), (own[1], lse.reshape(q.shape[:3])))  # in the layout of the first


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: bool = False) -> Partial:
    """New tokens among themselves."""
    if grad or not q.is_cpu or q.shape[2] <= TRIANGLE_ROWS:
        return _fused(q, k, v, scale, causal=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    b, h, s, d = q.shape
    out, lse = q.new_empty(b, s, h, d, dtype=wide).transpose(1, 2), q.new_empty(b, h, s, dtype=wide)
    _triangle(q, k, v, scale, out, lse)
    return out.to(q.dtype), lse


def _triangle(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Causal attention into `out` and `lse`, by halves: two triangles, and the square between them.

    The operator masks keys above the diagonal but computes them, up to 512 a row: at 512 tokens half of its work. The
    square takes the query heads of a KV head as rows of one product. Time divided by one causal call, 16 / 4 heads of
    64: 0.75 at 512 tokens, 0.9 at 1024 and 2048 (one AMD EPYC core, November 2026).
    """
    rows = q.shape[2]
    if rows <= TRIANGLE_ROWS:
        own_out, own_lse = _fused(q, k, v, scale, causal=True)
        out.copy_(own_out)
        lse.copy_(own_lse)
        return
    half = rows // 2
    early, late = slice(half), slice(half, rows)
    for part in (early, late):
        _triangle(q[:, :, part], k[:, :, part], v[:, :, part], scale, out[:, :, part], lse[:, :, part])
    packed = q[:, :, late].reshape(len(q), k.shape[1], -1, q.shape[3])
    seen_out, seen_lse = _fused(packed, k[:, :, early], v[:, :, early], scale)
    _fold(out[:, :, late], lse[:, :, late], seen_out.view_as(out[:, :, late]), seen_lse.reshape(lse[:, :, late].shape))


def _fold(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add a partial to `out` and `lse` in place; both sides have seen a key in every row."""
    total = torch.logaddexp(lse, more_lse)
    keep, add = (lse - total).exp_().unsqueeze(-1), (more_lse - total).exp_().unsqueeze(-1)
    out.mul_(keep).addcmul_(more.to(out.dtype), add)
    lse.copy_(total)


def _band(q: Tensor, k: Tensor, v: Tensor, prefix: int, call: _Call) -> Partial:
    """Blocks of query rows, each over the keys that some of its rows see."""
    length = q.shape[2]
    window = min(call.window or k.shape[2], k.shape[2])
    before = window - 1  # keys that a row may see before its own
    mask = _mask(min(length, BAND_ROWS), window, q, call.batch)
    parts = []
    for start in range(0, length, BAND_ROWS):
        stop = min(start + BAND_ROWS, length)
        first, last = max(0, prefix + start - before), prefix + stop
        rows, keys = q[:, :, start:stop], slice(first, last)
        if stop - start == 1:  # sees them all: as a decode, which is what a chunk of this token alone looks like
            out, lse = _fused(
                rows.reshape(len(q), k.shape[1], -1, q.shape[3]), k[:, :, keys], v[:, :, keys], call.scale
            )
            out, lse = out.reshape(rows.shape), lse.reshape(rows.shape[:3])
        else:
            part = mask[: stop - start, before - (prefix + start - first) : before + stop - start]
            out, lse = _fused(rows, k[:, :, keys], v[:, :, keys], call.scale, mask=part)
        parts.append((out.transpose(1, 2), lse.transpose(1, 2)))  # rows outermost, as the result is to lie
    out, lse = _cat(parts, 1)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _mask(rows: int, window: int, like: Tensor, batch: RaggedBatch) -> Tensor:
    """0 where row i sees column j, that is from i to i + window - 1, and -inf elsewhere; blocks take slices."""
    key = ("attention.mask", rows, window, like.dtype)
    if key not in batch.plans:
        with torch.inference_mode(False):  # later calls on the batch may want a gradient
            row, column = torch.arange(rows)[:, None], torch.arange(rows + window - 1)
            hidden = (column < row) | (column >= row + window)
            mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
            batch.plans[key] = mask.to(like.device)
    kept: Tensor = batch.plans[key]
    return kept


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None) -> Partial:
    """One dense call on [b, h, s, d] and [b, g, n, d], neither s nor n zero.

    The operator for CUDA knows no shared KV heads, wants the rows of a mask aligned, and pads those of lse.
    """
    if q.is_cpu:
        out, lse = _cpu_op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    ratio = q.shape[1] // k.shape[1]
    if ratio > 1:
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    bias = None if mask is None else F.pad(mask, (0, -mask.shape[1] % 16))[:, : mask.shape[1]].expand(*q.shape[:3], -1)
    out, lse, _, _ = _cuda_op(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _cat(parts: list[Partial], dim: int) -> Partial:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)
