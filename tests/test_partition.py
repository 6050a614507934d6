"""The ownership rule as laws: every map is checked against brute force over all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.partition import (
    HeadMap,
    Interleave,
    Layout,
    Range,
    Shift,
    Striping,
    ThreePhase,
    block_ranges,
    even_ranges,
    even_split,
    piece_ranges,
    ring_peers,
    shard_range,
    union,
)
from tests.kernels.own_errors import own_errors


@st.composite
def head_maps(draw: st.DrawFn) -> HeadMap:
    tp, sp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kv, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    if kv * group < tp * sp:
        group = -(-tp * sp // kv)
    return HeadMap(kv * group, kv, tp, sp)


def label_columns(heads: HeadMap, tp_rank: int) -> list[tuple[str, int]]:
    """What each head-sized column of the fused projection holds, read off `storage` by hand."""
    labels: list[tuple[str, int]] = []
    for segment in heads.storage(tp_rank):
        for head in range(*segment.heads):
            labels += [("q", head)] if segment.kind == "q" else [("k", head), ("v", head)]
    return labels


def wanted_columns(heads: HeadMap, rank: int) -> list[tuple[str, int]]:
    """Query heads of a flat rank, then k, v of every KV head that one of them reads."""
    queries = list(range(*heads.q_ranges[rank]))
    kv = sorted({head // heads.group_size for head in queries})
    return [("q", head) for head in queries] + [(which, head) for head in kv for which in "kv"]


@given(st.integers(0, 1000), st.integers(1, 17))
def test_even_split_tiles_once_and_is_balanced(total: int, parts: int) -> None:
    ranges = even_ranges(total, parts)
    assert [i for r in ranges for i in range(*r)] == list(range(total))
    assert tuple(r.size for r in ranges) == even_split(total, parts)
    assert max(even_split(total, parts)) - min(even_split(total, parts)) <= 1


@given(st.integers(0, 300), st.integers(1, 6), st.integers(1, 6))
def test_a_tp_shard_is_the_union_of_its_sequence_blocks(total: int, tp: int, sp: int) -> None:
    flat = even_ranges(total, tp * sp)
    for t in range(tp):
        assert block_ranges(total, Layout(tp, sp), t) == flat[t * sp : (t + 1) * sp]
        rows = [i for r in flat[t * sp : (t + 1) * sp] for i in range(*r)]
        assert list(range(*shard_range(total, Layout(tp, sp), t))) == rows


@given(head_maps())
def test_query_heads_tile_once_and_read_owned_kv_heads(heads: HeadMap) -> None:
    assert [h for r in heads.q_ranges for h in range(*r)] == list(range(heads.num_heads))
    for rank, (q, kv) in enumerate(zip(heads.q_ranges, heads.kv_ranges, strict=True)):
        reads = [head * heads.num_kv_heads // heads.num_heads for head in range(*q)]
        assert [kv.start + local for local in heads.kv_head_of(rank)] == reads
        assert sorted(set(reads)) == list(range(*kv))
        assert all((rank in heads.kv_owners[head]) == (head in reads) for head in range(heads.num_kv_heads))


@given(head_maps())
def test_every_factorisation_gives_each_rank_the_same_heads(heads: HeadMap) -> None:
    for tp in (d for d in range(1, heads.size + 1) if heads.size % d == 0):
        other = heads.on(Layout(tp, heads.size // tp))
        assert other.q_ranges == heads.q_ranges and other.kv_ranges == heads.kv_ranges
        for rank in range(heads.size):
            labels = label_columns(other, rank // other.sp)
            columns = other.columns(rank // other.sp)[rank % other.sp]
            assert [labels[i] for r in columns for i in range(*r)] == wanted_columns(heads, rank)


@given(head_maps())
def test_split_sizes_count_the_columns(heads: HeadMap) -> None:
    for t in range(heads.tp):
        assert heads.width(t) == len(label_columns(heads, t))
        ranks = range(t * heads.sp, (t + 1) * heads.sp)
        assert heads.qkv_widths(t) == tuple(len(wanted_columns(heads, rank)) for rank in ranks)
        assert heads.out_widths(t) == tuple(heads.q_ranges[rank].size for rank in ranks)


@given(head_maps(), st.data())
def test_larger_tp_is_views_of_the_stored_rows(heads: HeadMap, data: st.DataObject) -> None:
    factor = data.draw(st.sampled_from([d for d in range(1, heads.sp + 1) if heads.sp % d == 0]))
    layout = Layout(heads.tp * factor, heads.sp // factor)
    for other_rank in range(layout.tp):
        t = other_rank // factor
        views = heads.views(t, layout, other_rank)
        labels = label_columns(heads, t)
        assert [labels[i] for r in views for i in range(*r)] == label_columns(heads.on(layout), other_rank)
        assert len(views) <= (1 if heads.blocked else 2)


@given(head_maps(), st.integers(1, 5))
def test_pieces_place_every_row_of_the_unsharded_projections(heads: HeadMap, head_dim: int) -> None:
    for t in range(heads.tp):
        rows = [(which, head * head_dim + d) for which, head in label_columns(heads, t) for d in range(head_dim)]
        placed = {}
        for which in ("q", "k", "v"):
            for piece in heads.pieces(t, which, head_dim):
                assert piece.local.size == piece.full.size and piece.dim == 0
                placed.update({piece.local.start + i: (which, piece.full.start + i) for i in range(piece.local.size)})
        assert [placed[i] for i in range(len(rows))] == rows and len(placed) == len(rows)


@given(head_maps(), st.integers(1, 5))
def test_parts_tile_the_heads_of_every_rank_and_their_columns(heads: HeadMap, count: int) -> None:
    parts = heads.parts(count)
    assert {len(each) for each in parts} == {min(count, max(kv.size for kv in heads.kv_ranges))}
    for rank, each in enumerate(parts):
        assert [h for part in each for h in range(*part.q)] == list(range(*heads.q_ranges[rank]))
        assert [h for part in each for h in range(*part.kv)] == list(range(*heads.kv_ranges[rank]))
        assert all(head // heads.group_size in range(*part.kv) for part in each for head in range(*part.q))
        sizes = [part.kv.size for part in each]
        assert max(sizes) - min(sizes) <= 1
    for tp_rank in range(heads.tp):
        labels = label_columns(heads, tp_rank)
        for index, columns in enumerate(heads.part_columns(tp_rank, count)):
            for s in range(heads.sp):
                part = parts[tp_rank * heads.sp + s][index]
                for which, own in (("q", part.q), ("k", part.kv), ("v", part.kv)):
                    found = [labels[at] for r in columns[which][s] for at in range(*r)]
                    assert found == [(which, head) for head in range(*own)]


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 6))
def test_pieces_tile_every_slice_and_are_of_one_size(total: int, ranks: int, pieces: int) -> None:
    cut = piece_ranges(total, ranks, pieces)
    assert len(cut) == pieces and {len(each) for each in cut} == {ranks}
    for rank, own in enumerate(even_ranges(total, ranks)):
        assert [i for each in cut for i in range(*each[rank])] == list(range(*own))
    assert all(max(r.size for r in each) - min(r.size for r in each) <= 1 for each in cut)


def test_a_pipeline_of_one_part_is_refused() -> None:
    assert ThreePhase(1, 2) and ThreePhase(2, 1)
    for counts in ((1, 1), (0, 2), (2, 0)):
        with pytest.raises(
            ValueError, match=r"and one of them 2, got \d and \d; to cut nothing, leave the pipeline out"
        ):
            ThreePhase(*counts)


def test_known_maps() -> None:
    uneven = HeadMap(28, 4, 2, 4)
    assert [r.size for r in uneven.q_ranges] == [4, 4, 4, 4, 3, 3, 3, 3]
    assert uneven.kv_head_of(1) == (0, 0, 0, 1)
    assert [r.size for r in HeadMap(5, 5, 2, 1).q_ranges] == [3, 2]
    qwen = HeadMap(32, 4, 1, 8)  # each of the 4 KV heads goes to 2 of 8 destinations
    assert [len(owners) for owners in qwen.kv_owners] == [2] * 4 and not qwen.blocked
    assert HeadMap(8, 2, 1, 2).columns(0) == ((Range(0, 6),), (Range(6, 12),))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_divisible_heads_are_blocked_into_one_view(p: int) -> None:
    heads = HeadMap(lcm(p, 4) * 2, lcm(p, 4), 1, p)
    assert heads.blocked and all(len(heads.views(0, Layout(p, 1), t)) == 1 for t in range(p))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 4, 1, 1), "`num_heads` must be a multiple of `num_kv_heads`, got 6 and 4"),
        ((8, 0, 1, 1), "`num_heads` must be a multiple of `num_kv_heads`, got 8 and 0"),
        ((2, 2, 2, 2), r"`num_heads` must be at least the number of ranks \(4\), got 2; use a smaller tp or sp"),
        ((8, 2, 0, 2), "`tp` and `sp` must be at least 1, got tp=0, sp=2"),
    ],
)
def test_maps_that_cannot_be_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadMap(*arguments)


@given(st.integers(1, 6), st.integers(1, 24))
def test_reachable_layouts_are_those_that_reach_says(tp: int, sp: int) -> None:
    every = [Layout(t, tp * sp // t) for t in range(1, tp * sp + 1) if tp * sp % t == 0]
    assert list(Layout(tp, sp).reachable) == [layout for layout in every if Layout(tp, sp).reaches(layout)]


@given(st.lists(st.integers(2, 300), unique=True, max_size=3), st.integers(1, 400))
def test_the_last_span_that_has_begun_is_the_steps_layout(firsts: list[int], tokens: int) -> None:
    layouts = Layout(1, 8).reachable[: len(firsts) + 1]
    spans = tuple(zip([1, *sorted(firsts)], layouts, strict=True))
    assert Shift(spans).layout_of(tokens) == [layout for first, layout in spans if first <= tokens][-1]
    assert Shift(spans).layouts == layouts


def test_the_papers_rule_is_full_tensor_parallelism_up_to_the_threshold() -> None:
    rule = Shift.threshold(256, Layout(2, 4))
    assert [rule.layout_of(n) for n in (0, 1, 256, 257, 9999)] == [(8, 1), (8, 1), (8, 1), (2, 4), (2, 4)]
    assert Shift.threshold(0, Layout(2, 4)).layouts == (Layout(2, 4),)
    assert Shift.threshold(256, Layout(8, 1)) == Shift(((1, Layout(8, 1)),))


def test_spans_that_leave_a_step_without_a_layout_are_refused() -> None:
    for spans in ((), ((2, Layout(1, 2)),), ((1, Layout(1, 2)), (1, Layout(2, 1)))):
        with pytest.raises(ValueError, match="`spans` must begin at 1 token and increase, got"):
            Shift(spans)
    with pytest.raises(ValueError, match=r"`spans` must have layouts of the same ranks, got layouts of \[2, 4\]"):
        Shift(((1, Layout(1, 2)), (7, Layout(2, 2))))
    with pytest.raises(ValueError, match="`tokens` must be at least 0, got -1"):
        Shift.threshold(-1, Layout(1, 2))


def test_unreachable_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="`layout` must have the same ranks"):
        HeadMap(8, 2, 2, 2).views(0, Layout(1, 4), 0)


@given(st.integers(1, 5000), st.integers(2, 9), st.integers(2, 2000))
def test_chunks_tile_a_step_above_the_gate(num_tokens: int, chunks: int, min_tokens: int) -> None:
    cuts = Interleave(chunks, min_tokens=min_tokens).cuts_of(num_tokens)
    if num_tokens < min_tokens:
        assert cuts == ()
    else:
        sizes = [b - a for a, b in zip((0, *cuts), (*cuts, num_tokens), strict=True)]
        assert tuple(sizes) == even_split(num_tokens, min(chunks, num_tokens))


def test_given_cuts_are_taken_as_they_are_or_refused() -> None:
    assert Interleave(cuts=[3, 7], min_tokens=2).cuts_of(8) == (3, 7)
    assert Interleave(cuts=(3, 7), min_tokens=20).cuts_of(8) == ()
    with pytest.raises(ValueError, match=r"`cuts` must lie within the step's 7 tokens, got \[3, 7\]"):
        Interleave(cuts=(3, 7), min_tokens=2).cuts_of(7)
    for cuts in ([], [0, 3], [3, 3], [5, 2]):
        with pytest.raises(ValueError, match="`cuts` must be positive and increasing"):
            Interleave(cuts=cuts)
    with pytest.raises(ValueError, match="`chunks` and `min_tokens` must be at least 2, got 1 and 1024"):
        Interleave(1)


stripings = st.tuples(st.integers(1, 6), st.integers(1, 5))


@given(stripings, st.integers(0, 200), st.data())
def test_striping_is_what_dealing_out_runs_gives(sizes: tuple[int, int], length: int, data: st.DataObject) -> None:
    ranks, run = sizes
    striping = Striping(ranks, run)
    held: list[list[int]] = [[] for _ in range(ranks)]
    for token in range(length):
        rank = (token // run) % ranks
        assert striping.owner(token) == rank and striping.local_offset(token) == len(held[rank])
        held[rank].append(token)
    start = data.draw(st.integers(0, length))
    for rank, tokens in enumerate(held):
        assert striping.local_len(length, rank) == len(tokens)
        assert striping.tokens(0, length, rank) == tuple(tokens)
        assert striping.tokens(start, length, rank) == tuple(t for t in tokens if t >= start)
        assert tokens[slice(*striping.local_range(start, length, rank))] == [t for t in tokens if t >= start]
    shares = [len(tokens) for tokens in held]
    assert sum(shares) == length and max(shares) - min(shares) <= run


@given(stripings, st.integers(1, 4), st.integers(0, 100))
def test_a_token_has_one_page_on_every_rank(sizes: tuple[int, int], rounds: int, token: int) -> None:
    """Its place in a page of the request is that of the page's own striping, so slots need no request."""
    striping = Striping(*sizes)
    page, offset = divmod(token, striping.period * rounds)
    local = striping.interleave * rounds
    assert striping.owner(token) == striping.owner(offset)
    assert striping.local_offset(token) == page * local + striping.local_offset(offset)


@given(head_maps())
def test_kv_routes_bring_every_head_to_every_rank_once(heads: HeadMap) -> None:
    for tp_rank in range(heads.tp):
        routes = heads.kv_routes(tp_rank)
        for target in range(heads.sp):
            arriving = [head for each in routes for head in each[target]]
            assert sorted(arriving) == list(range(*heads.kv_shard(tp_rank)))
        for source, targets in enumerate(routes):
            own = range(*heads.kv_ranges[tp_rank * heads.sp + source])
            assert targets[source] == tuple(own)
            assert all(head in own for route in targets for head in route)


@pytest.mark.parametrize(("ranks", "interleave"), [(0, 1), (2, 0)])
def test_a_striping_of_nothing_is_refused(ranks: int, interleave: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, got ranks={ranks}, interleave={interleave}"):
        Striping(ranks, interleave)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even_ranges(4, 0), "a split must be of a count >= 0 over parts >= 1, got 4 over 0"),
        (lambda: piece_ranges(4, 2, 0), "a split must be of a count >= 0 over parts >= 1, got 2 over 0"),
        (lambda: block_ranges(4, Layout(2, 1), 2), "`tp_rank` must be a rank (below 2), got 2"),
        (lambda: shard_range(4, Layout(2, 0), 0), "`tp` and `sp` must be at least 1, got tp=2, sp=0"),
        (lambda: Layout(0, 0).reaches(Layout(0, 0)), "`tp` and `sp` must be at least 1, got tp=0, sp=0"),
        (lambda: HeadMap(4, 2, 2, 1).q_shard(-1), "`tp_rank` must be a rank (below 2), got -1"),
        (lambda: HeadMap(4, 2, 2, 1).kv_head_of(2), "`rank` must be a rank (below 2), got 2"),
        (lambda: ring_peers(0, 0), "`rank` must be a rank (below 0), got 0"),
        (lambda: union([]), "`ranges` must be at least one, got none"),
    ],
)
def test_ranks_and_parts_that_there_are_not(call: Callable[[], object], message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=re.escape(message)):
        call()
