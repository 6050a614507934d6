"""Ulysses in rows and a ring between them, in numbers: the bytes of every rank, exactly, and which split to take.

Of N = U * R ranks in R rows of U, with T new tokens behind P cached ones, L in all, h query and g KV heads of size D, b
bytes an element and c = max(g, U), since KV heads that are too few are copied, each rank sends at most

    exchange in    (U-1)/U * (T/N * (h + 2 c) + P/N * 2 c) * D * b
    exchange back  (U-1)/U * T/N * h * D * b
    ring, keys     (R-1) * L/N * 2 c * D * b
    ring, queries  (R-1) * T/N * h * (2 D * b + 4)

Bytes alone are for long rows, of about as many ranks as there are KV heads: a token then goes once instead of round.
But an exchange is exposed, whereas a ring hides under attention where that is long enough, and rows that span hosts
take the slow links for it. So the choice is one of time (`usp_costs`), with a rate for each kind of link.

Source: USP, arXiv:2405.07719.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from seqpar.kernels.quantize import Wire, check_wire, encoded_width
from seqpar.partition import GridOrder, HeadMap, HeadPart, Range, head_parts
from seqpar.plan.ring import Method, RingCase, check_order, check_rates, ring_costs, ring_volumes

__all__ = ["USPCosts", "usp_costs", "usp_volumes"]


def usp_volumes(
    grid: GridOrder,
    method: Method,
    *,
    heads: HeadMap,
    head_dim: int,
    tp_rank: int = 0,
    itemsize: int = 2,
    wire: Wire | None = None,
    backward: bool = False,
) -> tuple[int, ...]:
    """Bytes that each rank sends in the forward, or backward, of one `layers.USPAttention`, but for sinks.

    Args:
        grid: what is exchanged and what travels (`USPAttention.grid`).
        method: what goes round in the forward.
        heads: of the model.
        head_dim: D.
        tp_rank: which tensor-parallel shard of the heads.
        itemsize: b.
        wire: the layer's format.
        backward: of the backward pass instead, to the cached tokens too.

    Raises:
        ValueError: an unknown method or format, a grid that is none, a `tp_rank` that there is not, heads too few.
    """
    check_order(grid.ring)
    check_wire(wire)
    if not 0 <= tp_rank < heads.tp:
        raise ValueError(f"`tp_rank` must be in [0, {heads.tp}), got {tp_rank}")
    if len(grid.tokens) != len(grid.cached) or not grid.columns or len(grid.tokens) % grid.ring.ranks:
        raise ValueError(
            f"`grid` must have tokens and cached ones of as many ranks, a multiple of its {grid.ring.ranks} rows, got "
            f"{len(grid.tokens)} and {len(grid.cached)}"
        )
    parts = head_parts(heads.q_shard(tp_rank), heads.group_size, grid.columns)
    plain = head_dim * itemsize
    sent = plain if wire is None else encoded_width(head_dim, wire)
    rings = [
        ring_volumes(
            grid.ring,
            method,
            num_heads=part.q.size,
            num_kv_heads=part.kv.size,
            head_dim=head_dim,
            itemsize=itemsize,
            wire=wire,
            backward=backward,
        )
        for part in parts
    ]
    found = []
    for rank, (tokens, cached) in enumerate(zip(grid.tokens, grid.cached, strict=True)):
        row, column = divmod(rank, grid.columns)
        mine, others = parts[column], [part for at, part in enumerate(parts) if at != column]
        first = rank - column
        further = sum(grid.tokens[first : first + grid.columns]) - tokens
        earlier = sum(grid.cached[first : first + grid.columns]) - cached
        if backward:
            out = tokens * sum(part.q.size for part in others)
            exchanged = (out + further * _width(mine) + earlier * 2 * mine.kv.size) * plain
        else:
            there = sum(tokens * _width(part) + cached * 2 * part.kv.size for part in others)
            exchanged = (there + further * mine.q.size) * sent
        found.append(exchanged + rings[column][row])
    return tuple(found)


def _width(part: HeadPart) -> int:
    return part.q.size + 2 * part.kv.size


class USPCosts(NamedTuple):
    """What one split of the ranks takes.

    Attributes:
        ulysses: ranks of a row.
        ring: rows.
        method: what goes round between them, the faster one.
        exchange_bytes: that the busiest rank sends within its row.
        ring_bytes: that it sends between rows.
        seconds: of one layer's attention.
    """

    ulysses: int
    ring: int
    method: Method
    exchange_bytes: int
    ring_bytes: int
    seconds: float


def usp_costs(
    case: RingCase,
    *,
    flops: float,
    bytes_per_s: float,
    latency_s: float = 0.0,
    row_bytes_per_s: float | None = None,
    row_latency_s: float | None = None,
    row_ranks: int | None = None,
) -> tuple[USPCosts, ...]:
    """Every split of the ranks that the heads allow, the fastest first, the longer rows first where two take as long.

    Args:
        case: the request; its ranks are all that there are.
        flops: of attention on one rank, a second.
        bytes_per_s: that one rank sends; of the slowest hop of a ring through all ranks.
        latency_s: of a message, or a collective.
        row_bytes_per_s: that one rank sends to those beside it, on the same host say; `bytes_per_s` by default.
        row_latency_s: likewise.
        row_ranks: how many ranks those are; longer rows are as slow as the ring. All by default.

    Raises:
        ValueError: a rate that is not positive, a negative latency, or `row_ranks` below 1.
    """
    row_rate = bytes_per_s if row_bytes_per_s is None else row_bytes_per_s
    check_rates(latency_s, flops=flops, bytes_per_s=bytes_per_s, row_bytes_per_s=row_rate)
    if (row_latency_s or 0.0) < 0 or (row_ranks is not None and row_ranks < 1):
        raise ValueError(
            f"`row_latency_s` must be >= 0 and `row_ranks` at least 1, got {row_latency_s} and {row_ranks}"
        )
    slow = (bytes_per_s, latency_s)
    fast = (row_rate, latency_s if row_latency_s is None else row_latency_s)
    splits = [n for n in range(1, min(case.ranks, case.num_heads) + 1) if case.ranks % n == 0]
    found = [_split(case, n, flops, slow, fast if n <= (row_ranks or case.ranks) else slow) for n in splits]
    return tuple(sorted(found, key=lambda costs: (costs.seconds, -costs.ulysses)))


def _split(
    case: RingCase, columns: int, flops: float, ring_link: tuple[float, float], row_link: tuple[float, float]
) -> USPCosts:
    """Rows of so many ranks; of uneven parts the one with most heads counts."""
    parts = head_parts(Range(0, case.num_heads), -(-case.num_heads // case.num_kv_heads), columns)
    rows, head_bytes = case.ranks // columns, case.head_dim * case.itemsize
    most, kv = max(part.q.size for part in parts), max(part.kv.size for part in parts)
    new, old = -(-case.new // case.ranks), -(-case.cached // case.ranks)
    others = [(sum(map(_width, parts)) - _width(p), 2 * (sum(q.kv.size for q in parts) - p.kv.size)) for p in parts]
    there, past = max(new * w for w, _ in others), max(old * w for _, w in others)
    back = (columns - 1) * new * most
    exchanges = [n * head_bytes for n in (there, past, back) if n]
    bytes_per_s, latency_s = row_link
    exposed = sum(latency_s + n / bytes_per_s for n in exchanges)
    ring = replace(case, ranks=rows, num_heads=most, num_kv_heads=kv)
    costs = ring_costs(ring, flops=flops, bytes_per_s=ring_link[0], latency_s=ring_link[1])
    hop = ring.kv_bytes if costs.method == "kv" else ring.q_bytes + ring.answer_bytes
    return USPCosts(columns, rows, costs.method, sum(exchanges), (rows - 1) * hop, exposed + min(costs))
