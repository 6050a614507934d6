"""Attention to some blocks of keys: a list of them for each block of queries and KV head."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.dispatch import Backend, auto_backend, unknown_backend
from seqpar.kernels.sparse import pytorch, reference
from seqpar.kernels.sparse.plan import BlockLists
from seqpar.kernels.sparse.select import decode_sketch, encode_sketch, sketch_bytes

__all__ = ["BlockLists", "decode_sketch", "encode_sketch", "sketch_bytes", "sparse_attention"]


def sparse_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    lists: BlockLists,
    *,
    q_positions: Int64[Tensor, " s"],
    k_positions: Int64[Tensor, " n"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    window: int | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """What each query gathers from the keys in its block's lists that are not after it, and the mass it saw.

    In:    q[S, H, D]; k, v[N, D]: keys as rows, of whichever KV head lists them.
    Out:   out[S, H, D] in the dtype of q; lse[S, H], natural log, float32 (float64 for float64). (0, -inf) for a query
           that is in no block, or sees none of its keys.
    Grad:  none.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        lists: Which keys they attend to; a query is in one block at most.
        q_positions: Of the queries, on the host, as the plan is made there.
        k_positions: Of the keys, likewise; a query sees those up to its own.
        softmax_scale: Factor on the scores.
        kv_head_of: KV head that each query head reads, non-decreasing.
        window: Positions that a query sees, its own included; None for all before it.
        backend: See `kernels.attention`, whose bounds "triton" has here too.

    Raises:
        ValueError: shapes, dtypes or lists contradict each other.
    """
    if k.shape != v.shape or q.shape[2:] != k.shape[1:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "`q`, `k`, `v` must be [s, h, d], [n, d], [n, d] of one dtype, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)} in {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if len(q_positions) != len(q) or len(k_positions) != len(k):
        raise ValueError(
            f"`q_positions` and `k_positions` must have an entry for each of {len(q)} queries and {len(k)} keys, got "
            f"{len(q_positions)} and {len(k_positions)}"
        )
    heads = len(lists.lists[0]) if lists.lists else None
    if len(kv_head_of) != q.shape[1] or (heads is not None and any(not 0 <= head < heads for head in kv_head_of)):
        raise ValueError(
            f"`kv_head_of` must give each of {q.shape[1]} query heads one of {heads} KV heads, got {kv_head_of}"
        )
    backend = auto_backend("sparse", q.device, q.dtype) if backend == "auto" else backend
    rule = q_positions, k_positions, softmax_scale, kv_head_of, window
    if backend == "triton":
        from seqpar.kernels.attention import launch
        from seqpar.kernels.sparse import triton

        launch.check_heads(q, k, v, softmax_scale=softmax_scale)
        _check_rows(lists, len(q), len(k))
        return triton.sparse_attention(q, k, v, lists, *rule)
    if backend == "torch":
        return pytorch.sparse_attention(q, k, v, lists, *rule)
    if backend == "reference":
        return reference.sparse_attention(q, k, v, lists, *rule)
    raise unknown_backend(backend, "triton")


def _check_rows(lists: BlockLists, queries: int, keys: int) -> None:
    """Refuse blocks that a device would read past its memory for."""
    for name, blocks, count in (("rows", lists.rows, queries), ("keys", lists.keys, keys)):
        ends = max((block.stop for block in blocks), default=0)
        if ends > count or any(block.start < 0 for block in blocks):
            raise ValueError(f"`lists.{name}` must lie in the {count} that there are, got {blocks}")
