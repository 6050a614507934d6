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

Sinks rescale the result, which needs no gradient through `lse` either: where one is wanted, each row is the work of one
call, and the operator's own backward pass, given the rescaled `out` and `lse`, is that of attention with sinks
(`_WithSinks`). Composing it of differentiable parts lost: the gradient of `lse` is a second call with v = k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.attention import varlen
from seqpar.kernels.attention.plan import Group, HeadRun, head_runs, make_groups
from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.merge import merge
from seqpar.kernels.merge.sinks import weigh
from seqpar.ragged import RaggedBatch

__all__ = ["attention"]

Partial = tuple[Tensor, Tensor]

_cpu_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cuda_op = torch.ops.aten._scaled_dot_product_efficient_attention.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

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
    sinks: Float[Tensor, " h"] | None = None,
    deterministic: bool = False,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """Causal attention with `seqpar.kernels.attention.reference`'s meaning."""
    grad = wants_grad(q, k, v, *(() if sinks is None else (sinks,)))
    if varlen.serves(q) and (sinks is None or not grad):
        out, lse = varlen.attention(
            q, k, v, batch, softmax_scale=softmax_scale, window=window, kv_head_of=kv_head_of, in_place=not grad
        )
    else:
        call = _Call(batch, softmax_scale, window, grad, deterministic, sinks if grad else None)
        q = q if q.stride(2) == 1 else q.contiguous()
        k, v = _addressable(k), _addressable(v)
        groups, runs = _plan(batch, window, kv_head_of)
        parts = [_cat([_attend(q, k, v, group, run, call) for run in runs], 1) for group in groups]
        out, lse = (x.contiguous() for x in _cat(parts, 0))  # they mostly are
    if grad:
        return out, _OutOnly.apply(lse, out)  # type: ignore[no-untyped-call]
    if sinks is not None:
        share, lse = weigh(lse, sinks)
        out.mul_(share[..., None])
    return out, lse


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
    sinks: Tensor | None
    """Those that the operator's calls must know, since gradients are wanted."""

    def sinks_of(self, run: HeadRun) -> Tensor | None:
        """Those of a run of heads, one a row of [h, 1]."""
        return None if self.sinks is None else self.sinks[run.q_start : run.q_stop, None]


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
    k, v, sinks = _keys(k, group, run), _keys(v, group, run), call.sinks_of(run)
    token, head, _ = q.stride()
    if group.q_len == 1:  # the query heads of a KV head are the rows
        shape, strides = (group.requests, k.shape[1], ratio, q.shape[2]), (token, ratio * head, head, 1)
        rows = _from(q, group.row, run.q_start, shape, strides)
        out, lse = _fused(rows, k, v, call.scale, sinks=_packed(sinks, k))
        return out.reshape(group.requests, -1, q.shape[2]), lse.reshape(group.requests, -1)
    shape = (group.requests, run.q_stop - run.q_start, group.q_len, q.shape[2])
    q = _from(q, group.row, run.q_start, shape, (group.q_len * token, head, token, 1))
    hidden = call.window is not None and call.window < group.kv_len
    if hidden or call.deterministic or (group.prefix and call.grad):
        out, lse = _band(q, k, v, group.prefix, call, sinks)
    elif group.prefix:
        out, lse = _chunk(q, k, v, group.prefix, call.scale)
    else:
        out, lse = _causal(q, k, v, call.scale, call.grad, sinks)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _keys(x: Tensor, group: Group, run: HeadRun) -> Tensor:
    """The keys (or values) of a group [b, g, n, d]: a view, but for scattered pages."""
    if group.pages:
        x = x[list(group.pages)]
    token, head, _ = x.stride()[-3:]
    shape = (group.requests, run.kv_stop - run.kv_start, group.kv_len, x.shape[-1])
    return _from(x, group.start, run.kv_start, shape, (group.stride * token, head, token, 1))


def _from(x: Tensor, token: int, head: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A view of rows [n, h, d], or of pages of them, from a token and a head on.

    What is traced has no storage offset to ask for, and takes a view of a slice.
    """
    if torch.compiler.is_compiling():
        flat = x if x.dim() == 3 else x.flatten(0, 1)
        return flat[token:, head:].as_strided(shape, strides)
    at = x.storage_offset() + token * x.stride(-3) + head * x.stride(-2)
    return x.as_strided(shape, strides, at)


def _chunk(q: Tensor, k: Tensor, v: Tensor, prefix: int, scale: float) -> Partial:
    """New tokens after cached ones."""
    packed = q.reshape(len(q), k.shape[1], -1, q.shape[3]) if q.shape[2] <= PACKED_ROWS else q
    out, lse = _fused(packed, k[:, :, :prefix], v[:, :, :prefix], scale)
    own = _causal(q, k[:, :, prefix:], v[:, :, prefix:], scale)
    return merge((own[0], out.reshape(q.shape)), (own[1], lse.reshape(q.shape[:3])))  # in the layout of the first


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: bool = False, sinks: Tensor | None = None) -> Partial:
    """New tokens among themselves."""
    if grad or not q.is_cpu or q.shape[2] <= TRIANGLE_ROWS:
        return _fused(q, k, v, scale, causal=True, sinks=sinks)
    wide = torch.promote_types(q.dtype, torch.float32)
    b, h, s, d = q.shape
    # Each triangle and square reads its keys again: head by head they lie together (3 % at 2048 tokens, 8 % at 512, for
    # slices of a fused projection on one Xeon core).
    k, v = k.contiguous(), v.contiguous()
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


def _band(q: Tensor, k: Tensor, v: Tensor, prefix: int, call: _Call, sinks: Tensor | None) -> Partial:
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
            packed = rows.reshape(len(q), k.shape[1], -1, q.shape[3])
            out, lse = _fused(packed, k[:, :, keys], v[:, :, keys], call.scale, sinks=_packed(sinks, k))
            out, lse = out.reshape(rows.shape), lse.reshape(rows.shape[:3])
        else:
            part = mask[: stop - start, before - (prefix + start - first) : before + stop - start]
            out, lse = _fused(rows, k[:, :, keys], v[:, :, keys], call.scale, mask=part, sinks=sinks)
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


def _packed(sinks: Tensor | None, k: Tensor) -> Tensor | None:
    """Sinks [h, 1] of the query heads that are the rows of their KV head, as they are for a single token."""
    return None if sinks is None else sinks.view(k.shape[1], -1)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Partial:
    """One dense call on [b, h, s, d] and [b, g, n, d], neither s nor n zero; sinks broadcast to [b, h, s].

    The operator for CUDA knows no shared KV heads, wants the rows of a mask aligned, and pads those of lse.
    """
    if not q.is_cpu:
        ratio = q.shape[1] // k.shape[1]
        if ratio > 1:
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        if mask is not None:
            mask = F.pad(mask, (0, -mask.shape[1] % 16))[:, : mask.shape[1]].expand(*q.shape[:3], -1)
    if sinks is not None:
        out, lse = _WithSinks.apply(q, k, v, sinks, mask, scale, causal)  # type: ignore[no-untyped-call]
        return out, lse
    out, lse, *_ = _operator(q, k, v, mask, scale, causal)
    return out, lse if q.is_cpu else lse[:, :, : q.shape[2]]


def _operator(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, *tuple[Tensor, ...]]:
    """What the device's operator returns: out, lse, and on CUDA two more for its backward pass."""
    if q.is_cpu:
        found: tuple[Tensor, Tensor] = _cpu_op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return found
    more: tuple[Tensor, Tensor, Tensor, Tensor] = _cuda_op(q, k, v, mask, True, 0.0, causal, scale=scale)
    return more


class _WithSinks(torch.autograd.Function):
    """A call of the operator with sinks, of which only `out` is differentiable.

    With p = exp(score - lse) and delta = sum(out * grad) the backward pass of the softmax is p * (v @ grad - delta), as
    the operator computes it from `out` and `lse`. A sink is one more column with v = 0: those of the keys are the same
    formula with its `out` and `lse`, and its own is -p * delta.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Partial:
        out, lse, *rng = _operator(q, k, v, mask, scale, causal)
        rows = lse[:, :, : q.shape[2]]
        share, total = weigh(rows, sinks)
        rows.copy_(total)  # in place, since the operator needs its own padding back
        out = (out * share[..., None]).to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks, mask, out, lse, *rng)
        ctx.scale, ctx.causal = scale, causal
        ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v, sinks, mask, out, lse, *rng = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            options: dict[str, Any] = {"scale": ctx.scale}
            if q.is_cpu:
                grads = _cpu_backward(grad, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, **options)
            else:
                wanted = [True, True, True, False]
                grads = _cuda_backward(grad, q, k, v, mask, out, lse, *rng, 0.0, wanted, ctx.causal, **options)[:3]
        to_sinks = None
        if ctx.needs_input_grad[3]:
            delta = (grad.to(lse.dtype) * out).sum(-1)
            own = (sinks.to(lse.dtype) - lse[:, :, : q.shape[2]]).exp()
            to_sinks = -(own * delta).sum_to_size(sinks.shape).to(sinks.dtype)
        return *grads, to_sinks, None, None, None


def _cat(parts: list[Partial], dim: int) -> Partial:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)
