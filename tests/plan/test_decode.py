"""Where decodes are computed: the rule by hand and by brute force, bytes as counted, costs as measured."""

from __future__ import annotations

import re
from itertools import product
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import comm
from seqpar.comm import LinkCosts
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import QShipDecodeAttention, UlyssesAttention
from seqpar.partition import HeadMap, Layout, Striping, even_split
from seqpar.plan import (
    Curve,
    DecodeChoice,
    DecodeCosts,
    MethodCosts,
    Slot,
    calibrate_decode,
    consolidation_steps,
    decode,
    decode_costs,
    decode_volumes,
    exchange_from,
    makespan,
)
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8}
H100 = 3.35e12


def on_one_rank(link: LinkCosts, ranks: int = 4, **options: Any) -> DecodeCosts:
    heads = HeadMap(**LLAMA_8B, sp=ranks)
    return decode_costs(heads, 128, link=link, memory_bytes_per_s=H100, local="one", **options)


def test_the_example_of_the_dossier() -> None:
    """4 KiB a token at 3.35 TB/s: 128K tokens take 160 us on one rank, 40 on four: 120 us may go to the exchange."""
    free = on_one_rank(LinkCosts(0.0, inf))
    assert free.seconds("local", 1 << 17) == pytest.approx(160e-6, rel=2e-3)
    assert free.seconds("qship", 1 << 17) == pytest.approx(40e-6, rel=2e-3)
    for exchange_s, method in ((119e-6, "qship"), (121e-6, "local")):
        costs = on_one_rank(LinkCosts(exchange_s / 2, inf))
        assert decode(costs, 1 << 17).method == method
        assert decode(costs, 8192).method == "local"
    assert decode(on_one_rank(LinkCosts(10e-6, inf)), 8192).method == "local"  # never for latency: 10 us in all
    tokens = costs.crossover()
    assert tokens is not None and tokens * 4096 / H100 * 0.75 == pytest.approx(2 * 60.5e-6, rel=1e-4)


def test_a_cache_is_moved_back_for_its_exchanges_after_134_steps() -> None:
    steps = consolidation_steps(1 << 16, token_bytes=4096, bytes_per_s=50e9, saved_s=40e-6)
    assert steps == pytest.approx(134.2, abs=0.1)
    assert consolidation_steps(1, token_bytes=1, bytes_per_s=1.0, saved_s=0.0) == inf
    choice = decode(on_one_rank(LinkCosts(0.0, 50e9)), 1 << 17)  # three quarters of the tokens leave
    saved = choice.costs.saved_s(1 << 17)
    moved = consolidation_steps(3 << 15, token_bytes=4096, bytes_per_s=50e9, saved_s=saved)
    assert choice.method == "qship" and choice.payback_steps() == pytest.approx(moved)


def test_by_heads_there_is_something_to_save_only_where_kv_heads_are_replicated() -> None:
    link = LinkCosts(5e-6, 50e9)
    for ranks, shared in ((2, 1), (8, 1), (16, 2)):
        costs = decode_costs(HeadMap(**LLAMA_8B, sp=ranks), 128, link=link, memory_bytes_per_s=H100)
        reads = [costs.of(method).context[1](1 << 20) for method in ("local", "qship")]
        assert reads[0] == pytest.approx(shared * reads[1])
        assert (costs.crossover() is None) == (shared == 1)


def test_moving_a_cache_by_heads_takes_what_leaves_each_rank() -> None:
    """Four ranks with two KV heads each deal out three quarters of the tokens, 512 bytes a head."""
    link = LinkCosts(3e-6, 1e9)
    costs = decode_costs(HeadMap(**LLAMA_8B, sp=4), 128, link=link, memory_bytes_per_s=H100)
    assert costs.move is not None
    assert costs.move(1000) == pytest.approx(3e-6 + 0.75 * 1000 * 2 * 512 / 1e9)


def test_a_window_caps_what_can_be_saved() -> None:
    link = LinkCosts(20e-6, inf)
    crossover = on_one_rank(link).crossover()
    assert crossover is not None
    assert on_one_rank(link, window=crossover).crossover() is None
    assert on_one_rank(link, window=crossover + 1).crossover() == crossover
    seen = on_one_rank(link, window=100)
    assert seen.seconds("local", 5000) == seen.seconds("local", 99) > seen.seconds("local", 98)


def curves(points: int) -> st.SearchStrategy[tuple[tuple[int, ...], tuple[float, ...]]]:
    sizes = st.lists(st.integers(1, 60), min_size=points, max_size=points, unique=True).map(sorted)
    seconds = st.lists(st.integers(0, 20), min_size=points, max_size=points).map(sorted)
    return st.tuples(
        sizes.map(lambda tokens: (0, *tokens)), seconds.map(lambda values: (0.0, *(float(value) for value in values)))
    )


@given(curves(4), curves(3), st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.none() | st.integers(1, 70))
def test_the_crossover_is_the_first_context_from_which_on_shipping_is_faster(
    local: Any, qship: Any, fixed: int, more: int, batch: int, window: int | None
) -> None:
    costs = DecodeCosts(
        MethodCosts(Curve.line(float(fixed), 0.0), {1: Curve(*local), 3: Curve(*qship)}),
        MethodCosts(Curve.line(float(more), 0.0), {1: Curve(*qship)}),
        window=window,
    )
    most = max(local[0][-1], qship[0][-1])
    faster = [costs.saved_s(n, batch) > 0 for n in range(most + 1)]
    expected = next((n for n in range(most + 1) if all(faster[n:])), None)
    choice = decode(costs, most, batch)
    assert choice.crossover_tokens == expected
    border = most + 1 if expected is None else expected
    for n in {0, max(border - 1, 0), border, most, most + 9}:
        assert choice.method_of(n, batch) == ("qship" if expected is not None and n >= expected else "local")


def test_between_two_numbers_of_requests_costs_go_straight() -> None:
    costs = MethodCosts(Curve.line(0.0, 0.0), {5: Curve((0, 40), (0.0, 120.0)), 1: Curve((0, 10), (0.0, 10.0))})
    assert [costs.seconds(n, 10) for n in (1, 2, 4, 5, 9)] == [10.0, 15.0, 25.0, 30.0, 30.0]
    assert list(costs.context) == [1, 5]
    both = DecodeCosts(costs, MethodCosts(Curve.line(1.0, 0.0), {1: Curve((0, 3), (0.0, 0.0))}))
    assert both.longest == 10  # forty tokens of five requests are eight of each
    assert DecodeCosts.from_json(both.to_json()) == both


def test_a_choice_says_why_and_reads_what_it_wrote() -> None:
    choice = decode(on_one_rank(LinkCosts(20e-6, 50e9), window=1 << 19), 1 << 17, 2)
    assert DecodeChoice.from_json(choice.to_json()) == choice
    assert DecodeCosts.from_json(choice.costs.to_json()) == choice.costs
    text = choice.explain()
    tokens = choice.crossover_tokens
    assert tokens is not None and f"crossover at {tokens:,} tokens: local " in text
    assert "2 request(s) over 131,072 cached tokens each, window of 524,288: ship queries" in text
    assert "moving the cache from the other placement pays after" in text and "50 GB/s and 20 us of link" in text
    assert re.search(r"131,072 +321 us +\d+ us +qship +\+\d", text)
    never = decode(decode_costs(HeadMap(8, 8, sp=2), 64, link=LinkCosts(0.0, 1e9), memory_bytes_per_s=1e12), 5)
    assert "crossover: none; shipping is slower, or no faster, at the longest context" in never.explain()
    always = DecodeCosts(*(MethodCosts(Curve.line(s, 0.0), {1: Curve.line(0.0, 1e-9)}) for s in (2e-6, 1e-6)))
    assert "crossover: none; shipping is faster at every context" in decode(always, 5).explain()
    assert decode(always, 5).crossover_tokens == 0 and decode(always, 5).payback_steps() == inf


def test_costs_are_saved(tmp_path: Any) -> None:
    costs = on_one_rank(LinkCosts(1e-6, 1e9))
    costs.save(tmp_path / "costs.json")
    assert DecodeCosts.load(tmp_path / "costs.json") == costs
    (tmp_path / "costs.json").write_text('{"local": 3}')
    with own_errors(), pytest.raises(ValueError, match="`path` must hold decode costs as `save` writes them"):
        DecodeCosts.load(tmp_path / "costs.json")


def test_refusals() -> None:
    costs = on_one_rank(LinkCosts(1e-6, 1e9))
    with own_errors():
        with pytest.raises(ValueError, match="`context_tokens` must be at least 0 and `batch` at least 1, got 5, 0"):
            decode(costs, 5, 0)
        for tokens, seconds in (((1, 2), (0.0, 1.0)), ((0, 2), (0.5, 1.0)), ((0, 1, 2), (0.0, 1.0, 0.5))):
            with pytest.raises(ValueError, match="`context` must start with 0 seconds for 0 tokens and never fall"):
                MethodCosts(Curve.line(0.0, 0.0), {1: Curve(tokens, seconds)})
        with pytest.raises(ValueError, match=r"`context` must be for numbers of requests of at least 1, got \[\]"):
            MethodCosts(Curve.line(0.0, 0.0), {})
        with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
            on_one_rank(LinkCosts(1e-6, 1e9), window=0)
        with pytest.raises(ValueError, match="rates must be positive, latencies >= 0 and `queries` at least 1"):
            on_one_rank(LinkCosts(1e-6, 0.0))
        with pytest.raises(ValueError, match="`text` must hold a decode choice"):
            DecodeChoice.from_json("{}")


@pytest.mark.parametrize("layout", [None, Layout(4, 1)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_on_the_way_pay_from_some_queries_on(ranks: int, layout: Layout | None) -> None:
    """A fabric whose sums arrive at N times the rate: the gather of the LSE and its latency are soon made up for."""
    heads = HeadMap(**LLAMA_8B, sp=ranks)
    layout = layout and Layout(ranks, 1)
    link, adding = LinkCosts(10e-6, 10e9), LinkCosts(10e-6, ranks * 10e9)
    found = exchange_from(heads, 128, link=link, adding=adding, layout=layout)
    assert found is not None

    def seconds(queries: int, exchange: str) -> float:
        per_query = 32 * 256 / ranks * (ranks - 1), 32 * 4 * (ranks - 1)
        if exchange == "a2a":
            return 10e-6 + queries * (per_query[0] + per_query[1] / ranks) / 10e9
        return 20e-6 + queries * (per_query[0] / ranks + per_query[1]) / 10e9

    whole = -(-found // ranks) * ranks  # where queries divide, the formula is the bytes of every rank
    assert seconds(whole + ranks, "ag_rs") < seconds(whole + ranks, "a2a")
    assert seconds(whole - 2 * ranks, "ag_rs") > seconds(whole - 2 * ranks, "a2a")
    assert exchange_from(heads, 128, link=link, adding=link, layout=layout) is None


def test_helix_example_of_overlap_per_request() -> None:
    """Eight requests of 2 units of attention and 1.2 of exchange: 25.6 one after another, 17 by turns."""
    alone = makespan([[Slot(2.0, 1.2)] * 8]).total_s
    by_turns = makespan([[Slot(2.0, 1.2)] for _ in range(8)]).total_s
    assert (alone, by_turns) == (pytest.approx(25.6), pytest.approx(8 * 2 + 1.2))


FORMS = list(product(("local", "qship"), ("a2a", "ag_rs"), (False, True), (None, "int8")))


def sent(mesh: comm.DeviceMesh, num_heads: int, num_kv_heads: int) -> None:
    """Steps of several numbers of tokens in every form and layout."""
    groups = comm.groups(mesh)
    heads = HeadMap(num_heads, num_kv_heads, *groups.layout)
    tp_rank, dim = groups.tp.rank(), 6
    every = comm.layout_groups(groups)
    for method, exchange, whole, wire in FORMS:
        options: dict[str, Any] = {"group": groups.sp, "tp_rank": tp_rank, "wire": wire}
        if method == "local" and (whole or exchange == "ag_rs"):
            continue
        if method == "local":
            layer: UlyssesAttention = UlyssesAttention(heads, dim, **options)
            kv = PagedKV(1, 9, 8, layer.num_kv_heads, dim)
        else:
            layer = QShipDecodeAttention(heads, dim, exchange=exchange, **options)
            shard, striping = heads.kv_shard(tp_rank).size, Striping(heads.sp)
            kv = StripedKV(1, 9, 4 * heads.sp, shard, dim, striping=striping, rank=groups.sp.rank())
        for layout, other in every.items():
            layer.add_layout(layout, group=other.sp)
        for q_lens, (layout, other) in zip(((1, 5), (1, 0), (3, 1), (2, 2)), 2 * list(every.items()), strict=False):
            batch = kv.batch([0, 1], q_lens)
            there, at = (heads, tp_rank) if whole else (heads.on(layout), other.tp.rank())
            tokens = batch.num_tokens if whole else even_split(batch.num_tokens, layout.sp)[other.sp.rank()]
            more: dict[str, Any] = {"whole": True} if whole else {}
            with comm.record() as counted:
                layer(torch.randn(tokens, there.width(at) * dim), batch, kv=kv, layout=layout, **more)
            volume = decode_volumes(
                heads,
                batch.num_tokens,
                method,
                head_dim=dim,
                itemsize=4,
                layout=layout,
                exchange=exchange,
                whole=whole,
                wire=wire,
            )[groups.flat.rank()]
            by_op = {op: count.num_bytes for op, count in counted.by_op().items() if count.num_bytes}
            assert by_op == {op: size for op, size in volume._asdict().items() if size}, (method, exchange, layout)


@pytest.mark.parametrize(("layout", "heads"), [((1, 2), (8, 2)), ((1, 3), (7, 1)), ((2, 2), (10, 2))], ids=str)
def test_bytes_are_those_counted(layout: tuple[int, int], heads: tuple[int, int]) -> None:
    run_mesh(layout, sent, *heads)


ALPHA_S = 0.005


def measured(mesh: comm.DeviceMesh, stored: bool, whole: bool, launches: int) -> Any:
    groups = comm.groups(mesh)
    under = groups if stored else comm.layout_groups(groups)[Layout(groups.flat.size(), 1)]
    told: list[tuple[int, int]] = []
    heads = HeadMap(4, 1, *groups.layout)
    link = comm.SimulatedLink(ALPHA_S, 1e12)
    sizes: dict[str, Any] = {"contexts": (40, 120), "batches": (1, 3), "rounds": 1}
    with link.on(groups.sp), comm.record() as counted:
        costs = calibrate_decode(
            heads, 8, groups=groups, under=under, whole=whole, progress=lambda *n: told.append(n), **sizes
        )
    assert told == [(i, 12) for i in range(1, 13)]
    # Each time a step of two layers either way; twice for each of the six cases the move of two layers.
    assert counted.by_label()[""].calls == 12 * 2 * launches + 6 * 2 * 2
    refused: dict[str, tuple[str, dict[str, Any]]] = {
        "heads": (r"`heads` must be over the mesh of `groups` \(1, 2\), got \(2, 1\)", {"heads": HeadMap(4, 1, 2, 1)}),
        "contexts": (r"`contexts` must be at least 1 and increasing, got \[3, 3\]", {"contexts": (3, 3)}),
        "batches": (r"`batches` must be at least 1 and increasing, got \[\]", {"batches": ()}),
        "rounds": ("`rounds` must be at least 1, got 0", {"rounds": 0}),
    }
    for text, wrong in refused.values():
        with own_errors(), pytest.raises(ValueError, match=text):
            calibrate_decode(**{"heads": heads, "head_dim": 8, "groups": groups, **sizes, **wrong})
    return costs


@pytest.mark.parametrize(
    ("stored", "whole", "launches"), [(True, False, (2, 2)), (False, False, (0, 2)), (False, True, (0, 1))]
)
def test_decodes_are_measured_alike_on_all_ranks(stored: bool, whole: bool, launches: tuple[int, int]) -> None:
    first, second = run_mesh((1, 2), measured, stored, whole, sum(launches))
    assert first == second
    for costs, count in zip((first.local, first.qship), launches, strict=True):
        assert costs.step.tokens == (1, 3)
        assert {n: curve.tokens for n, curve in costs.context.items()} == {1: (0, 40, 120), 3: (0, 120)}
        for batch in (1, 3):
            assert costs.step(batch) >= count * ALPHA_S
    assert first.move is not None and first.move(40) >= ALPHA_S


def test_tensor_parallel_shards_are_measured_too() -> None:
    costs = run_mesh((2, 2), sharded)
    assert all(other == costs[0] for other in costs)


def sharded(mesh: comm.DeviceMesh) -> Any:
    groups = comm.groups(mesh)
    sizes: dict[str, Any] = {"contexts": (20,), "batches": (2,), "rounds": 1, "window": 8, "exchange": 2}
    costs = calibrate_decode(HeadMap(6, 3, *groups.layout), 4, groups=groups, dtype=torch.bfloat16, **sizes)
    assert costs.window == 8
    return costs
