"""Placements and the order of a ring as laws, against brute force over every pair of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.partition import Held, Placement, Range, RingOrder, Run, gather_held, head_parts, place_tokens, ring_peers
from tests.kernels.own_errors import own_errors

RANKS = st.integers(1, 5)
Args = dict[str, Any]


@st.composite
def placements(draw: st.DrawFn) -> Args:
    """Arguments of `place_tokens` but for the number of tokens, the ranks and the first."""
    placement = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    return {"placement": placement, "interleave": draw(st.integers(1, 4)) if placement == "striped" else 1}


@st.composite
def runs(draw: st.DrawFn) -> Args:
    width = draw(st.integers(1, 4))
    first = draw(st.integers(0, 9))
    return {
        "first": first,
        "stop": first + draw(st.integers(0, 12)),
        "start": draw(st.integers(0, 5)),
        "step": width + draw(st.integers(0, 5)),
        "width": width,
    }


@given(runs(), st.integers(-3, 60))
def test_a_run_counts_what_lies_before_a_position(args: Args, position: int) -> None:
    run = Run(**args)
    assert list(run.positions) == sorted(set(run.positions)) and len(run.positions) == run.size
    assert run.below(position) == sum(p < position for p in run.positions)
    for start in range(run.size + 1):
        assert run.take(Range(start, run.size)).positions == run.positions[start:]


@given(st.integers(0, 40), RANKS, placements(), st.integers(0, 20))
def test_placements_tile_exactly_once_in_order(num_tokens: int, ranks: int, args: Args, first: int) -> None:
    held = place_tokens(num_tokens, ranks, first=first, **args)
    found = [[p for run in own for p in run.positions] for own in held]
    assert all(own == sorted(own) for own in found)
    assert sorted(p for own in found for p in own) == list(range(first, first + num_tokens))
    width = args["interleave"]
    if args["placement"] == "striped":
        assert all(p // width % ranks == rank for rank, own in enumerate(found) for p in own)
    sizes = [len(own) for own in found]
    assert max(sizes) - min(sizes) <= (2 if args["placement"] == "zigzag" else width)


@given(st.integers(0, 400), RANKS, st.integers(1, 5))
def test_causal_work_is_balanced_within_the_bound(num_tokens: int, ranks: int, interleave: int) -> None:
    def spread(placement: Placement, width: int) -> int:
        held = place_tokens(num_tokens, ranks, placement, interleave=width)
        work = [sum(p + 1 for run in own for p in run.positions) for own in held]
        return max(work) - min(work)

    assert spread("zigzag", 1) <= 2 * num_tokens
    assert spread("striped", interleave) <= 2 * interleave * num_tokens


def test_placements_by_hand() -> None:
    assert place_tokens(8, 2, "zigzag") == ((Run(0, 2), Run(6, 8)), (Run(2, 4), Run(4, 6)))
    assert place_tokens(5, 2, "contiguous", first=3) == ((Run(3, 6),), (Run(6, 8),))
    assert [r.positions for (r,) in place_tokens(6, 2, "striped", interleave=2)] == [(0, 1, 4, 5), (2, 3)]
    assert [ring_peers(rank, 3) for rank in range(3)] == [(1, 2), (2, 0), (0, 1)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((4, 2, "zig"), '`placement` must be one of "contiguous", "zigzag", "striped", got \'zig\''),
        ((4, 0, "zigzag"), "a placement must be of a count >= 0 over ranks >= 1, got 4 over 0"),
        ((-1, 2, "zigzag"), "a placement must be of a count >= 0 over ranks >= 1, got -1 over 2"),
    ],
)
def test_refusals(args: tuple[Any, ...], message: str) -> None:
    with own_errors(), pytest.raises(ValueError) as error:
        place_tokens(*args)
    assert str(error.value) == message


def test_an_interleave_is_of_stripes() -> None:
    with pytest.raises(ValueError, match="`interleave` must be at least 1, and 1 unless striped, got 2 for zigzag"):
        place_tokens(4, 2, "zigzag", interleave=2)
    with pytest.raises(ValueError, match="`interleave` must be at least 1"):
        place_tokens(4, 2, "striped", interleave=0)


@st.composite
def orders(draw: st.DrawFn) -> Args:
    """Requests over ranks, each with new tokens in one placement after cached ones in another."""
    ranks = draw(st.integers(1, 4))
    new, old = draw(placements()), draw(placements())
    count = draw(st.integers(1, 3))
    lens = draw(st.lists(st.integers(0, 14), min_size=count, max_size=count))
    past = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    return {
        "ranks": ranks,
        "new": new,
        "old": old,
        "lens": lens,
        "past": past,
        "window": draw(st.none() | st.integers(1, 9)),
    }


def order_of(args: Args) -> RingOrder:
    ranks = args["ranks"]
    new = [place_tokens(n, ranks, first=p, **args["new"]) for n, p in zip(args["lens"], args["past"], strict=True)]
    old = [place_tokens(p, ranks, **args["old"]) for p in args["past"]]
    q = tuple(tuple(request[rank] for request in new) for rank in range(ranks))
    kv = tuple(tuple((*a[rank], *b[rank]) for a, b in zip(old, new, strict=True)) for rank in range(ranks))
    return RingOrder(q, kv, args["window"])


def flat(requests: Any) -> list[tuple[int, int]]:
    return [(request, p) for request, own in enumerate(requests) for run in own for p in run.positions]


def pairs(order: RingOrder, q: list[tuple[int, int]], k: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows and keys of which the row sees the key."""
    window = order.window or 10**9
    return [
        (row, key)
        for row, (of_row, own) in enumerate(q)
        for key, (of_key, at) in enumerate(k)
        if of_row == of_key and own - window < at <= own
    ]


def covered(order: RingOrder, q: Any, k: Any) -> list[tuple[int, int]]:
    """The pairs that the tiles of a hop compute."""
    found, rows, keys = [], flat(q), flat(k)
    for tile in order.tiles(q, k):
        block = [(row, key) for row in range(*tile.rows) for key in range(*tile.keys)]
        if tile.kind == "causal":
            block = [(row, key) for row, key in block if key - tile.keys.start <= row - tile.rows.start]
        if tile.kind == "masked":
            assert tile.q.positions == tuple(p for _, p in rows[slice(*tile.rows)])
            assert tile.k.positions == tuple(p for _, p in keys[slice(*tile.keys)])
            window = order.window or 10**9
            block = [(row, key) for row, key in block if rows[row][1] - window < keys[key][1] <= rows[row][1]]
        found += block
    return found


@given(orders())
@settings(max_examples=40, deadline=None)
def test_every_pair_is_computed_once_whichever_goes_round(args: Args) -> None:
    order = order_of(args)
    for rank in range(order.ranks):
        mine, seen_by_keys, seen_by_queries = flat(order.q[rank]), [], []
        for hop in range(order.hops + 1):
            owner = (rank - hop) % order.ranks
            block = order.keys_at(owner, hop)
            keys = flat(block)
            computed = covered(order, order.q[rank], block)
            assert sorted(computed) == pairs(order, mine, keys)
            seen_by_keys += [(mine[row], keys[key]) for row, key in computed]
            owner = (rank + hop) % order.ranks
            rows, own = flat(order.queries_at(owner, hop)), flat(order.kv[rank])
            computed = covered(order, order.queries_at(owner, hop), order.kv[rank])
            assert sorted(computed) == pairs(order, rows, own)
            seen_by_queries += [(rows[row], own[key]) for row, key in computed]
        everything = [token for other in range(order.ranks) for token in flat(order.kv[other])]
        wanted = [(mine[row], everything[key]) for row, key in pairs(order, mine, everything)]
        assert sorted(seen_by_keys) == sorted(wanted)
        queries = [token for other in range(order.ranks) for token in flat(order.q[other])]
        wanted = [(queries[row], own[key]) for row, key in pairs(order, queries, own)]
        assert sorted(seen_by_queries) == sorted(wanted)


@given(orders())
@settings(max_examples=40, deadline=None)
def test_what_travels_on_is_part_of_what_arrived_and_is_needed(args: Args) -> None:
    order = order_of(args)
    for owner in range(order.ranks):
        for at, answered, other in ((order.keys_at, order.seen_at, 1), (order.queries_at, order.answered_at, -1)):
            for hop in range(1, order.ranks):
                here, before = flat(at(owner, hop)), flat(at(owner, hop - 1))
                assert set(flat(answered(owner, hop))) <= set(here) <= set(before)
                assert hop <= order.hops or not here
                assert (owner + other * hop) % order.ranks != owner


def test_contiguous_keys_stop_at_the_last_rank_and_at_the_window() -> None:
    def order(window: int | None) -> RingOrder:
        return RingOrder(
            tuple(((r,)) for r in place_tokens(16, 4, "contiguous")),
            *[tuple(((r,)) for r in place_tokens(16, 4, "contiguous"))],
            window,
        )

    def sizes(window: int | None) -> list[list[int]]:
        return [[len(flat(order(window).keys_at(owner, hop))) for hop in (1, 2, 3)] for owner in range(4)]

    assert sizes(None) == [[4, 4, 4], [4, 4, 0], [4, 0, 0], [0, 0, 0]]
    assert sizes(3) == [[2, 0, 0], [2, 0, 0], [2, 0, 0], [0, 0, 0]] and order(3).hops == 1
    assert sizes(7) == [[4, 2, 0], [4, 2, 0], [4, 0, 0], [0, 0, 0]] and order(7).hops == 2


def test_zigzag_without_a_window_needs_no_mask() -> None:
    new = [place_tokens(n, 4, "zigzag") for n in (64, 0, 13)]
    held = tuple(tuple(request[rank] for request in new) for rank in range(4))
    order = RingOrder(held, held)
    for rank in range(4):
        tiles = [order.tiles(held[rank], order.keys_at((rank - hop) % 4, hop)) for hop in range(4)]
        assert {tile.kind for each in tiles for tile in each} <= {"full", "causal"}
        assert [len(order.tiles(held[rank][:1], order.keys_at((rank - hop) % 4, hop)[:1])) for hop in range(1, 4)] == [
            1
        ] * 3


@given(orders(), st.integers(1, 3))
@settings(deadline=None)
def test_rows_hold_what_their_ranks_hold(args: Args, columns: int) -> None:
    """Cached tokens of one placement and new ones of another, of rows of so many ranks."""
    order = order_of({**args, "ranks": args["ranks"] * columns})
    rows = gather_held(order.kv, columns)
    assert len(rows) == args["ranks"]
    for row, requests in enumerate(rows):
        for request, runs in enumerate(requests):
            ranks = order.kv[row * columns : (row + 1) * columns]
            wanted = sorted(p for own in ranks for run in own[request] for p in run.positions)
            assert sorted(p for run in runs for p in run.positions) == wanted
            assert len(runs) <= sum(len(own[request]) for own in ranks)


def over(num_tokens: int, ranks: int, placement: Placement, interleave: int = 1) -> Held:
    return tuple((runs,) for runs in place_tokens(num_tokens, ranks, placement, interleave=interleave))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_rows_are_placed_as_ranks_of_a_smaller_ring(columns: int) -> None:
    for placement, width in (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 2)):
        even = 12 * columns * 3
        rows = gather_held(over(even, 3 * columns, placement, width), columns)
        held = over(even, 3, placement, width * columns if placement == "striped" else 1)
        assert [[flat([runs]) for runs in row] for row in rows] == [[flat([runs]) for runs in row] for row in held]
        assert all(len(row[0]) <= len(own[0]) for row, own in zip(rows, held, strict=True))
    later = [place_tokens(9, 4, "striped", first=5)[rank] for rank in range(4)]
    twice = tuple(((*own[0], *more),) for own, more in zip(over(5, 4, "striped"), later, strict=True))
    assert [len(row[0]) for row in gather_held(twice, 2)] == [1, 1]  # chunks of stripes join, too


def test_runs_that_do_not_touch_stay_apart() -> None:
    """Stripes 0 and 2 of 6, which have as many tokens as 0 and 1 would; and one that ends before its neighbour does."""
    first, third, second = Run(0, 2, 0, 6), Run(0, 1, 2, 6), Run(0, 1, 1, 6)
    assert gather_held((((first,),), ((third,),)), 2) == (((first, third),),)
    assert gather_held((((first,),), ((second,),)), 2) == (((Run(0, 3, 0, 6, 2),),),)
    longer = Run(0, 3, 0, 6)
    assert gather_held((((longer,),), ((second,),)), 2) == (((longer, second),),)


def test_heads_in_parts_by_hand() -> None:
    parts = head_parts(Range(0, 6), 4, 4)  # 6 heads of 4 to a KV head
    assert [(tuple(p.q), tuple(p.kv)) for p in parts] == [
        ((0, 2), (0, 1)),
        ((2, 4), (0, 1)),
        ((4, 5), (1, 2)),
        ((5, 6), (1, 2)),
    ]
    assert [tuple(p.kv) for p in head_parts(Range(3, 6), 2, 2)] == [(1, 3), (2, 3)]
    with own_errors(), pytest.raises(ValueError, match=r"`parts` must be at least 1 and at most .* \(2\), got 3"):
        head_parts(Range(0, 2), 1, 3)
