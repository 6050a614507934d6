"""Tiles on PyTorch's fused operators, one call for each run of heads.

Without a mask the query heads of a KV head are rows of one product, so that no key is read twice. A query that sees no
key through its mask is given all of them, since the operators would divide by nothing; its result is put aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar.kernels.attention.plan import HeadRun
from seqpar.kernels.attention.pytorch import _causal, _cpu_backward, _fused

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
    """`seqpar.kernels.tile.reference` with its scores never stored."""
    added, seen = None, None
    if mask is not None:
        seen = mask.any(1)
        added = _added(mask | ~seen[:, None], q)
    outs, lses = [], []
    for run in runs:
        own, keys, values = _heads(q, run.q_start, run.q_stop), *(_heads(x, run.kv_start, run.kv_stop) for x in (k, v))
        if causal:
            out, lse = _causal(own, keys, values, softmax_scale)
        elif added is None:
            packed = own.reshape(1, keys.shape[1], -1, q.shape[2])
            out, lse = _fused(packed, keys, values, softmax_scale)
            out, lse = out.reshape(own.shape), lse.reshape(own.shape[:3])
        else:
            out, lse = _fused(own, keys, values, softmax_scale, mask=added)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
    out, lse = torch.cat(outs, 1), torch.cat(lses, 1)
    if seen is not None:
        out, lse = out.masked_fill(~seen[:, None, None], 0), lse.masked_fill(~seen[:, None], -torch.inf)
    return out, lse


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
    """The operator's own backward pass on a CPU, which asks for no more than the merged `out` and `lse`."""
    added = None if mask is None else _added(mask, q)
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for run in runs:
        own, kv = slice(run.q_start, run.q_stop), slice(run.kv_start, run.kv_stop)
        keys, values = (_heads(x, run.kv_start, run.kv_stop) for x in (k, v))
        rows = [_heads(x, run.q_start, run.q_stop) for x in (grad, q, out)]
        mass = lse[:, own].T[None]
        if not causal and added is None:
            shape = (1, keys.shape[1], -1, q.shape[2])
            rows, mass = [x.reshape(shape) for x in rows], mass.reshape(shape[:3])
        found = _cpu_backward(
            rows[0],
            rows[1],
            keys,
            values,
            rows[2],
            mass.contiguous(),
            0.0,
            causal,
            attn_mask=added,
            scale=softmax_scale,
        )
        to_q[:, own] = found[0].reshape(1, run.q_stop - run.q_start, len(q), -1)[0].transpose(0, 1)
        to_k[:, kv] = found[1][0].transpose(0, 1)
        to_v[:, kv] = found[2][0].transpose(0, 1)
    return to_q, to_k, to_v


def _heads(x: Tensor, start: int, stop: int) -> Tensor:
    """Some heads of x[n, h, d] as [1, heads, n, d]."""
    return x[:, start:stop].transpose(0, 1)[None]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)
