"""The definition of attention by block lists: each query head over the keys that its block's list has and it sees."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.sparse.plan import BlockLists

__all__ = ["sparse_attention"]


def sparse_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    lists: BlockLists,
    q_positions: Int64[Tensor, " s"],
    k_positions: Int64[Tensor, " n"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    window: int | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """In at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for block, rows in enumerate(lists.rows):
        for head, kv_head in enumerate(kv_head_of):
            keys = [row for span in lists.spans(block, kv_head) for row in range(*span)]
            age = q_positions[slice(*rows), None] - k_positions[keys]
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            scores = q[slice(*rows), head].to(dtype) @ k[keys].to(dtype).T * softmax_scale
            scores = scores.masked_fill(~seen.to(q.device), -torch.inf)
            mass = scores.logsumexp(-1)
            weights = (scores - mass.masked_fill(mass == -torch.inf, 0)[:, None]).exp()
            out[slice(*rows), head] = (weights @ v[keys].to(dtype)).to(q.dtype)
            lse[slice(*rows), head] = mass
    return out, lse
