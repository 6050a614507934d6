"""Ring attention in numbers: the bytes that each rank sends, exactly.

With L tokens evenly over N ranks, h query and g KV heads of size D and b bytes an element, at most

    pass-KV    (N - 1) * L/N * 2 g D * b
    pass-Q     (N - 1) * T/N * h * (D * b + D * b + 4)    queries there, outputs and log-sum-exps back; T new tokens

The mask leaves out some: of contiguous slices rank r sends those of ranks 0 to r alone, and the last one none.
"""

from __future__ import annotations

from typing import Literal

from seqpar.partition import RingOrder, Run

__all__ = ["ring_volumes"]


def ring_volumes(
    order: RingOrder,
    method: Literal["kv", "q"],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    backward: bool = False,
) -> tuple[int, ...]:
    """Bytes that each rank sends in the forward, or backward, of one `layers.RingAttention`.

    Args:
        order: what travels (`RingAttention.order`).
        method: what goes round in the forward.
        num_heads: h, of one tensor-parallel shard.
        num_kv_heads: g, likewise.
        head_dim: D.
        itemsize: b.
        backward: of the backward pass instead, the same for both methods.
    """
    ranks, lse = order.ranks, 8 if itemsize == 8 else 4
    keys, queries = 2 * num_kv_heads * head_dim, num_heads * head_dim
    found = []
    for rank in range(ranks):
        total = 0
        for hop in range(1, order.hops + 1):
            behind, ahead = (rank - hop) % ranks, (rank + hop) % ranks
            if backward or method == "kv":
                total += _tokens(order.keys_at((behind + 1) % ranks, hop)) * keys * itemsize
            if backward:
                total += _tokens(order.seen_at(behind, hop)) * keys * lse
            elif method == "q":
                total += _tokens(order.queries_at((ahead - 1) % ranks, hop)) * queries * itemsize
                total += _tokens(order.answered_at(ahead, hop)) * num_heads * (head_dim * itemsize + lse)
        found.append(total)
    return tuple(found)


def _tokens(held: tuple[tuple[Run, ...], ...]) -> int:
    return sum(run.size for runs in held for run in runs)
