"""Sparse attention in numbers: the bytes that each rank sends where positions alone decide, exactly.

With s tokens a rank of one prompt in contiguous slices, h query and g KV heads of size D, b bytes an element, a rank
sends to every later one with which it shares a group at degree r, but for sinks and recent keys,

    repaired    s/r * 2 g D * b

and in the form of the authors' code, inside each group of n ranks, whether they come before it or after it,

    faithful    (n-1)/n * s/r * ((h + 2 g) D * b + h (D * b + 2))      samples there; outputs and denominators back

which is 1/r of Ulysses, and the denominators. The repaired form with queries that travel to their heads sends to each
other one of all N ranks

    by heads    s/N * (h D * b + h (D * b + 4) + 2 g D * b / r)     queries there and keys; outputs and masses back

and its sinks and near keys, where N divides g (others read a KV head in several places) and later queries see its keys.
"""

from __future__ import annotations

from seqpar.layers import Strided
from seqpar.layers.csa.core import Exchange
from seqpar.partition import HeadMap, Range, RingOrder
from seqpar.plan.ring import check_order

__all__ = ["strided_volumes"]


def strided_volumes(
    policy: Strided,
    order: RingOrder,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    exchange: Exchange = "ring",
) -> tuple[int, ...]:
    """Bytes that each rank sends in one `layers.CSAAttention` with that policy.

    Args:
        policy: which keys travel.
        order: who holds what (`CSAAttention.order`).
        num_heads: h, of one tensor-parallel shard.
        num_kv_heads: g, likewise.
        head_dim: D.
        itemsize: b.
        exchange: that of the layer; a faithful policy has its own.

    Raises:
        ValueError: groups that do not divide the ranks, an order whose ranks do not hold the same requests; heads that
            the ranks, or a faithful policy's groups, cannot split.
    """
    check_order(order)
    largest = policy.levels[-1][0]
    if order.ranks % largest:
        raise ValueError(f"`policy` must have groups that divide the {order.ranks} ranks, got one of {largest}")
    if min(num_heads, num_kv_heads, head_dim, itemsize) < 1:
        raise ValueError(
            "`num_heads`, `num_kv_heads`, `head_dim` and `itemsize` must be at least 1, got "
            f"{num_heads}, {num_kv_heads}, {head_dim} and {itemsize}"
        )
    if policy.faithful:
        samples = [[sum(run.size for run in runs) for runs in requests] for requests in order.q]
        widths = (head_dim * itemsize, head_dim * itemsize + 2)
        return tuple(
            sum(_level_volume(samples, rank, level, num_heads, num_kv_heads, widths) for level in policy.levels)
            for rank in range(order.ranks)
        )
    found, whole = [], [Range(0, num_kv_heads)] * order.ranks
    heads = HeadMap(num_heads, num_kv_heads, 1, order.ranks) if exchange == "ulysses" else None
    for rank in range(order.ranks):
        volume = 0 if heads is None else _query_volume(order, rank, heads, head_dim, itemsize)
        for other, kv_heads in enumerate(whole if heads is None else heads.kv_ranges):
            if other != rank:
                cut = policy.cut(order, other, rank, exchange)
                volume += (len(cut.whole) + len(cut.blocks)) * 2 * kv_heads.size * head_dim * itemsize
        found.append(volume)
    return tuple(found)


def _query_volume(order: RingOrder, rank: int, heads: HeadMap, head_dim: int, itemsize: int) -> int:
    """What a rank sends of its queries to the ranks of their heads, and of outputs and masses of its heads back."""
    tokens = [sum(run.size for runs in requests for run in runs) for requests in order.q]
    there = tokens[rank] * (heads.num_heads - heads.q_ranges[rank].size)
    back = (sum(tokens) - tokens[rank]) * heads.q_ranges[rank].size
    return there * head_dim * itemsize + back * (head_dim * itemsize + max(4, itemsize))


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
