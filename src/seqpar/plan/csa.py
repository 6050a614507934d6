"""Sparse attention in numbers: the bytes that each rank sends where positions alone decide, exactly.

With s tokens a rank of one prompt in contiguous slices, h query and g KV heads of size D, b bytes an element, a rank
sends to every later one with which it shares a group at degree r, but for sinks and recent keys,

    repaired    s/r * 2 g D * b

and in the form of the authors' code, inside each group of n ranks, whether they come before it or after it,

    faithful    (n-1)/n * s/r * ((h + 2 g) D * b + h (D * b + 2))      samples there; outputs and denominators back

which is 1/r of Ulysses, and the denominators.
"""

from __future__ import annotations

from seqpar.layers import Strided
from seqpar.partition import HeadMap, RingOrder

__all__ = ["strided_volumes"]


def strided_volumes(
    policy: Strided, order: RingOrder, *, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int = 2
) -> tuple[int, ...]:
    """Bytes that each rank sends in one `layers.CSAAttention` with that policy.

    Args:
        policy: which keys travel.
        order: who holds what (`CSAAttention.order`).
        num_heads: h, of one tensor-parallel shard.
        num_kv_heads: g, likewise.
        head_dim: D.
        itemsize: b.

    Raises:
        ValueError: of a faithful policy, heads that its groups cannot split.
    """
    if policy.faithful:
        samples = [[sum(run.size for run in runs) for runs in requests] for requests in order.q]
        widths = (head_dim * itemsize, head_dim * itemsize + 2)
        return tuple(
            sum(_level_volume(samples, rank, level, num_heads, num_kv_heads, widths) for level in policy.levels)
            for rank in range(order.ranks)
        )
    found = []
    for rank in range(order.ranks):
        cuts = [policy.cut(order, other, rank) for other in range(order.ranks) if other != rank]
        keys = sum(len(cut.whole) + len(cut.blocks) for cut in cuts)
        found.append(keys * 2 * num_kv_heads * head_dim * itemsize)
    return tuple(found)


def _level_volume(
    lens: list[list[int]],
    rank: int,
    level: tuple[int, int],
    num_heads: int,
    num_kv_heads: int,
    widths: tuple[int, int],
) -> int:
    """What a rank sends in one level: its samples of the others' heads, and their outputs of its heads."""
    group, degree = level
    first = rank // group * group
    counts = [sum(length // degree for length in lens[member]) for member in range(first, first + group)]
    heads = HeadMap(num_heads, num_kv_heads, 1, group)
    others = [place for place in range(group) if place != rank - first]
    there = sum(heads.q_ranges[place].size + 2 * heads.kv_ranges[place].size for place in others)
    back = sum(counts[place] for place in others) * heads.q_ranges[rank - first].size
    return counts[rank - first] * there * widths[0] + back * widths[1]
