"""Decodes that ship queries over a striped cache, and its conversions, against attention in one float64 process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.kernels.quantize import decode, encode
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import (
    HeadParameter,
    ParallelAttention,
    QShipDecodeAttention,
    RingAttention,
    RMSNorm,
    UlyssesAttention,
    heads_to_stripes,
    stripes_to_heads,
    tokens_to_stripes,
)
from seqpar.partition import HeadMap, Layout, Placement, Range, Striping, even_ranges, place_tokens
from tests.kernels.own_errors import own_errors
from tests.layers.reference import Attention, name_of, rope
from tests.ranks import LAYOUTS, run_mesh

DIM = 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}
STEPS = ((5, 0, 9, 1), (1, 1, 1, 1), (3, 1, 2, 1), (0, 4, 1, 0), *[(1, 1, 1, 1)] * 5)
"""New tokens of each request: prompts, decodes, drafts, requests that pause or come late, then over every border."""


@dataclass(frozen=True)
class Case:
    """Ids read `h8g2` for 8 query and 2 KV heads."""

    num_heads: int
    num_kv_heads: int
    interleave: int = 1
    window: int | None = None
    sinks: bool = False
    whole: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("sinks", "whole") if getattr(self, name))
        return f"h{self.num_heads}g{self.num_kv_heads}-i{self.interleave}{flags}" + f"-w{self.window}" * bool(
            self.window
        )


CASES = [
    Case(8, 2),
    Case(4, 4, interleave=2, window=3),
    Case(6, 1, interleave=3, sinks=True),
    Case(5, 5, window=7, sinks=True, whole=True),
    Case(14, 2, interleave=2, whole=True),
]


SOME = [(1, 3), (2, 2)]
PAIRS = [(CASES[0], layout) for layout in LAYOUTS] + [(case, layout) for case in CASES[1:] for layout in SOME]


class History:
    """Queries, keys and values of all tokens so far, and what attention makes of them."""

    def __init__(self, case: Case, requests: int, seed: int = 1) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.window, self.sinks = case.window, None
        self.sizes = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        if case.sinks:
            self.sinks = 2 * torch.randn(case.num_heads, dtype=torch.float64, generator=self.random)
        self.tokens = [[torch.empty(0, h, DIM, dtype=torch.float64) for h in self.sizes] for _ in range(requests)]

    def add(self, q_lens: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """New tokens, flat, and their outputs."""
        new = [torch.randn(sum(q_lens), h, DIM, dtype=torch.float64, generator=self.random) for h in self.sizes]
        outs = []
        for request, parts in enumerate(zip(*(x.split(q_lens) for x in new), strict=True)):
            self.tokens[request] = [torch.cat(both) for both in zip(self.tokens[request], parts, strict=True)]
            outs.append(self.attend(*self.tokens[request])[len(self.tokens[request][0]) - q_lens[request] :])
        return new, torch.cat(outs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ratio = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        age = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (age < 0) | (age >= (self.window or len(q) + 1))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5).masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None, None].expand(-1, len(q), 1)], -1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(q)], v)


def pack(heads: HeadMap, tp_rank: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused projection of a shard, from the tensors of all heads."""
    columns = []
    for kind, r in heads.storage(tp_rank):
        rows = q if kind == "q" else torch.stack([k, v], 2)
        columns.append(rows[:, r.start : r.stop].flatten(1))
    return torch.cat(columns, 1)


def make(groups: comm.Groups, case: Case, pages: int = 12, **options: Any) -> tuple[QShipDecodeAttention, StripedKV]:
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    sinks = History(case, 0).sinks
    if sinks is not None:
        sinks = HeadParameter.from_tensor("sinks", sinks, heads=heads, group=groups.flat)
    tp_rank = groups.tp.rank()
    core = QShipDecodeAttention(
        heads, DIM, group=groups.sp, tp_rank=tp_rank, window=case.window, sinks=sinks, **options
    )
    striping = Striping(groups.sp.size(), case.interleave)
    shard, rank = heads.kv_shard(tp_rank).size, groups.sp.rank()
    kv = StripedKV(1, pages, 2 * striping.period, shard, DIM, striping=striping, rank=rank, dtype=torch.float64)
    return core, kv


def decodes(mesh: comm.DeviceMesh, case: Case) -> None:
    """Every step under another layout of the ranks, all over one cache."""
    groups = comm.groups(mesh)
    core, kv = make(groups, case, pages=40)
    every = comm.layout_groups(groups)
    for layout, other in every.items():
        core.add_layout(layout, group=other.sp)
    history = History(case, len(STEPS[0]))
    layouts = list(every.items())
    for number, q_lens in enumerate(STEPS):
        layout, other = layouts[number % len(layouts)]
        heads, tp_rank = core.heads.on(layout), other.tp.rank()
        new, expected = history.add(q_lens)
        batch = kv.batch(range(len(q_lens)), q_lens)
        tokens = slice(*even_ranges(batch.num_tokens, layout.sp)[other.sp.rank()])
        if case.whole:
            qkv = pack(core.heads, groups.tp.rank(), *new)
        else:
            qkv = pack(heads, tp_rank, *(x[tokens] for x in new))
        before = qkv.clone()
        core.exchange = ("ag_rs", "a2a", 4)[number // len(layouts) % 3]
        reduces = core.exchange == "ag_rs" or (core.exchange == 4 and batch.num_tokens >= 4)
        with comm.record() as sent:
            out = core(qkv, batch, kv=kv, layout=layout, whole=case.whole)
        torch.testing.assert_close(out, expected[tokens, slice(*heads.q_shard(tp_rank))].flatten(1), **EXACT)
        assert torch.equal(qkv, before)
        assert sent.total.calls == (groups.sp.size() > 1) * ((not case.whole) + 1 + reduces)
    for request, (_, k, v) in enumerate(history.tokens):
        own = list(kv.striping.tokens(0, len(k), kv.rank))
        shard = slice(*core.kv_shard)
        torch.testing.assert_close(kv.gather(0, [request]), (k[own][:, shard], v[own][:, shard]), rtol=0, atol=0)


@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=[f"{case}-{name_of(layout)}" for case, layout in PAIRS])
def test_decodes_equal_one_process(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, decodes, case)


def drafts(mesh: comm.DeviceMesh, case: Case) -> None:
    """Random steps, of which some tokens are taken back; requests that end, fork and come again."""
    groups = comm.groups(mesh)
    core, kv = make(groups, case, pages=60)
    history, choose = History(case, 3), random.Random(5)
    for _ in range(12):
        q_lens = tuple(choose.choice((0, 1, 1, 4)) for _ in range(3))
        new, expected = history.add(q_lens)
        batch = kv.batch(range(3), q_lens)
        tokens = slice(*even_ranges(batch.num_tokens, core.heads.sp)[groups.sp.rank()])
        with torch.inference_mode(), comm.check():
            out = core(pack(core.heads, groups.tp.rank(), *(x[tokens] for x in new)), batch, kv=kv)
        torch.testing.assert_close(out, expected[tokens, slice(*core.q_shard)].flatten(1), **EXACT)
        request, other = choose.sample(range(3), 2)
        keep = max(0, kv.length(request) - choose.randrange(4))
        kv.truncate(request, keep)
        history.tokens[request] = [x[:keep] for x in history.tokens[request]]
        if choose.random() < 0.3:
            kv.select({other: request})
            history.tokens[other] = history.tokens[request]
        elif choose.random() < 0.2:
            kv.free(other)
            history.tokens[other] = [x[:0] for x in history.tokens[other]]
    kv.integrity()


@pytest.mark.parametrize("layout", SOME, ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 2, interleave=2), Case(6, 3, window=5, sinks=True)], ids=str)
def test_drafts_are_taken_back(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, drafts, case)


def shipped(mesh: comm.DeviceMesh, case: Case, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of one decode over a context of these lengths, and what the formula says."""
    groups = comm.groups(mesh)
    core, kv = make(groups, case, pages=400)
    heads, p = core.heads, groups.sp.size()
    prompt = kv.batch(range(len(lengths)), lengths)
    kv.append(0, *torch.randn(2, prompt.num_tokens, kv.num_kv_heads, DIM, dtype=torch.float64), prompt)
    batch = kv.batch(range(len(lengths)), [2] + [1] * (len(lengths) - 1))
    rows = even_ranges(batch.num_tokens, p)[groups.sp.rank()].size
    with comm.record() as sent:
        core(torch.randn(rows, heads.width(groups.tp.rank()) * DIM, dtype=torch.float64), batch, kv=kv)
    q, kv_heads = core.q_shard.size, core.kv_shard.size
    wanted = (p - 1) * rows * (q + 2 * kv_heads) * DIM * 8 + (batch.num_tokens - rows) * q * (DIM + 1) * 8
    return sent.total.num_bytes, wanted * (p > 1)


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (1, 3), (2, 2)], ids=name_of)
def test_bytes_are_the_formula_and_independent_of_the_context(layout: tuple[int, int]) -> None:
    counted = [run_mesh(layout, shipped, CASES[0], lengths) for lengths in ((1, 2, 0), (90, 40, 250))]
    assert counted[0] == counted[1]
    assert all(got == wanted for got, wanted in counted[0])


def narrow(mesh: comm.DeviceMesh, exchange: Any) -> None:
    """Half precision and scores about 100: the merge is right only with the whole float32 LSE."""
    groups, case = comm.groups(mesh), Case(4, 2)
    heads, striping = HeadMap(4, 2, *groups.layout), Striping(groups.sp.size())
    core = QShipDecodeAttention(heads, DIM, group=groups.sp, exchange=exchange)
    options: dict[str, Any] = {"striping": striping, "rank": groups.sp.rank(), "dtype": torch.bfloat16}
    kv = StripedKV(1, 8, 12, 2, DIM, **options)
    history = History(case, 2)
    for q_lens in ((7, 9), (1, 0), (2, 1)):
        new, _ = history.add(q_lens)
        new = [x.bfloat16() for x in new]
        for x in new[:2]:
            x[..., 0] = 14
        flat = [x.double() for x in new]
        for request, parts in enumerate(zip(*(x.split(q_lens) for x in flat), strict=True)):
            kept = [x[: len(x) - q_lens[request]] for x in history.tokens[request]]
            history.tokens[request] = [torch.cat(both) for both in zip(kept, parts, strict=True)]
        expected = torch.cat([history.attend(*t)[len(t[0]) - n :] for t, n in zip(history.tokens, q_lens, strict=True)])
        batch = kv.batch([0, 1], q_lens)
        tokens = slice(*even_ranges(batch.num_tokens, groups.sp.size())[groups.sp.rank()])
        out = core(pack(heads, 0, *(x[tokens] for x in new)), batch, kv=kv)
        torch.testing.assert_close(out.double(), expected[tokens].flatten(1), rtol=0, atol=0.03)


@pytest.mark.parametrize(("p", "exchange"), [(1, "a2a"), (2, "a2a"), (2, "ag_rs"), (3, "a2a")])
def test_the_lse_travels_in_full_precision(p: int, exchange: str) -> None:
    run_mesh((1, p), narrow, exchange)


def coarse(mesh: comm.DeviceMesh) -> None:
    """In a wire format, against attention with the q, k and v that arrive: then `out` alone is rounded, once.

    Partials are rounded to within a share of their largest number, at most the largest of v, and weigh 1 in all.
    """
    groups, q_lens_of = comm.groups(mesh), ((7, 9), (1, 0), (2, 1))
    heads, p, rank = HeadMap(4, 2, *groups.layout), groups.sp.size(), groups.sp.rank()
    for wire, share in (("int8", 1 / 239), ("fp8", 1 / 16)):
        for exchange in ("a2a", "ag_rs"):
            options: dict[str, Any] = {"exchange": exchange, "wire": wire}
            core = QShipDecodeAttention(heads, DIM, group=groups.sp, **options)
            kv = StripedKV(1, 8, 4 * p, 2, DIM, striping=Striping(p), rank=rank)
            history = History(Case(4, 2), 2)
            for q_lens in q_lens_of:
                torch.manual_seed(sum(q_lens))
                new = [torch.randn(sum(q_lens), h, DIM) for h in history.sizes]
                arrived = [_rounded(x, wire) if p > 1 else x.double() for x in new]
                outs = []
                for request, parts in enumerate(zip(*(x.split(q_lens) for x in arrived), strict=True)):
                    history.tokens[request] = [
                        torch.cat(both) for both in zip(history.tokens[request], parts, strict=True)
                    ]
                    tokens = history.tokens[request]
                    outs.append(history.attend(*tokens)[len(tokens[0]) - q_lens[request] :])
                batch = kv.batch([0, 1], q_lens)
                mine = slice(*even_ranges(batch.num_tokens, p)[rank])
                out = core(pack(heads, 0, *(x[mine] for x in new)), batch, kv=kv)
                largest = max(float(tokens[2].abs().max()) for tokens in history.tokens)
                bound = largest * share if p > 1 else 0.0
                error = (out.double() - torch.cat(outs)[mine].flatten(1)).abs()
                assert not len(error) or float(error.max()) <= bound + 1e-5
            held = kv.gather(0, [0, 1])
            wanted = [
                torch.cat([t[at][list(kv.striping.tokens(0, len(t[at]), rank))] for t in history.tokens])
                for at in (1, 2)
            ]
            torch.testing.assert_close([x.double() for x in held], wanted, rtol=0, atol=0)


def _rounded(x: Tensor, wire: Any) -> Tensor:
    """As it arrives."""
    rows = encode(x.flatten(0, 1), wire)
    return decode(rows, DIM, x.dtype, wire).view(x.shape).double()


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_wire_format_rounds_what_travels_once(p: int) -> None:
    run_mesh((1, p), coarse)


def moved(mesh: comm.DeviceMesh, case: Case, lengths: tuple[int, ...]) -> None:
    """There and back, beside caches that were filled in place."""
    groups, layers = comm.groups(mesh), 3
    heads, tp_rank, rank = (
        HeadMap(case.num_heads, case.num_kv_heads, *groups.layout),
        groups.tp.rank(),
        groups.sp.rank(),
    )
    mine, shard = heads.kv_ranges[tp_rank * heads.sp + rank], heads.kv_shard(tp_rank)
    striping = Striping(heads.sp, case.interleave)

    def by_heads(page_size: int) -> PagedKV:
        return PagedKV(layers, 60, page_size, mine.size, DIM, dtype=torch.float64)

    def by_tokens() -> StripedKV:
        sizes = (layers, 60, 2 * striping.period, shard.size, DIM)
        return StripedKV(*sizes, striping=striping, rank=rank, dtype=torch.float64)

    def fill(kv: PagedKV, own: Range) -> PagedKV:
        torch.manual_seed(1)
        for step in (lengths[::-1], lengths):
            batch = kv.batch(range(len(step)), step)
            for layer in range(layers):
                k, v = torch.randn(2, batch.num_tokens, case.num_kv_heads, DIM, dtype=torch.float64)
                kv.append(layer, k[:, own.start : own.stop], v[:, own.start : own.stop], batch)
        return kv

    source, direct = fill(by_heads(3), mine), fill(by_tokens(), shard)
    target, back = by_tokens(), by_heads(5)
    assert isinstance(direct, StripedKV)
    some = [*range(len(lengths))][::-1]
    with comm.record() as sent:
        heads_to_stripes(source, target, some, heads=heads, group=groups.sp, tp_rank=tp_rank, label="kv")
    counts = [
        len(striping.tokens(0, source.length(r), to)) * len(heads.kv_routes(tp_rank)[rank][to])
        for r in some
        for to in range(heads.sp)
        if to != rank
    ]
    if heads.sp > 1:
        assert sent.counts["all_to_all", "kv"][:2] == (layers, layers * sum(counts) * 2 * DIM * 8)
    stripes_to_heads(target, back, some, heads=heads, group=groups.sp, tp_rank=tp_rank)
    for layer in range(layers):
        for request in some:
            same = {"rtol": 0, "atol": 0}
            torch.testing.assert_close(target.gather(layer, [request]), direct.gather(layer, [request]), **same)
            torch.testing.assert_close(back.gather(layer, [request]), source.gather(layer, [request]), **same)


@pytest.mark.parametrize("layout", [(1, 1), (1, 3), (1, 4), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 2), Case(5, 5, interleave=3), Case(6, 1), Case(14, 2, interleave=2)], ids=str)
def test_conversions_are_exact(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, moved, case, (7, 0, 1, 12))


def dealt(mesh: comm.DeviceMesh, kind: str) -> None:
    """Steps whose tokens lie in slices, in chunks from both ends, or anywhere, some ranks with none."""
    groups, case, choose = comm.groups(mesh), Case(8, 2, interleave=2), random.Random(3)
    rank, p = groups.sp.rank(), groups.sp.size()
    torch.manual_seed(4)
    direct, kv = make(groups, case)[1], make(groups, case)[1]
    for q_lens in ((7, 0, 12), (1, 1, 1), (0, 5, 2)):
        batch, same = direct.batch(range(3), q_lens), kv.batch(range(3), q_lens)
        k, v = torch.randn(2, batch.num_tokens, kv.num_kv_heads, DIM, dtype=torch.float64)
        direct.append(0, k, v, batch)
        rows = [list(range(*r)) for r in even_ranges(batch.num_tokens, p)]
        if kind == "zigzag":
            halves = [list(range(*r)) for r in even_ranges(batch.num_tokens, 2 * p)]
            rows = [halves[i] + halves[-1 - i] for i in range(p)]
        if kind == "anywhere":
            places = [choose.randrange(p) for _ in range(batch.num_tokens)]
            rows = [[row for row, place in enumerate(places) if place == i] for i in range(p)]
            for those in rows:
                choose.shuffle(those)
        with comm.record() as sent:
            mine = rows[rank]
            tokens_to_stripes(k[mine], v[mine], same, kv, layer_index=0, rows=rows, group=groups.sp)
        away = set(rows[rank]) - set(kv.own(same))
        assert sent.total[:2] == ((1, len(away) * 2 * kv.num_kv_heads * DIM * 8) if p > 1 else (0, 0))
    for request in range(3):
        torch.testing.assert_close(kv.gather(0, [request]), direct.gather(0, [request]), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [(1, 1), (1, 3), (2, 2)], ids=name_of)
@pytest.mark.parametrize("kind", ["slices", "zigzag", "anywhere"])
def test_tokens_are_dealt_out_exactly(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, dealt, kind)


def prefilled(mesh: comm.DeviceMesh) -> None:
    """Prompts under Ulysses, then the same decodes over the heads' cache and, converted, over the tokens'."""
    groups, case = comm.groups(mesh), Case(8, 2, interleave=2)
    ship, stripes = make(groups, case)
    heads, tp_rank = ship.heads, groups.tp.rank()
    ulysses = UlyssesAttention(heads, DIM, group=groups.sp, tp_rank=tp_rank)
    kv = PagedKV(1, 40, 4, ulysses.num_kv_heads, DIM, dtype=torch.float64)
    history = History(case, 3)
    for number, q_lens in enumerate(((6, 1, 9), (2, 2, 0), (1, 1, 1), (1, 3, 1), (1, 1, 1))):
        new, expected = history.add(q_lens)
        if number == 2:
            heads_to_stripes(kv, stripes, [0, 1, 2], heads=heads, group=groups.sp, tp_rank=tp_rank)
        batch = kv.batch([0, 1, 2], q_lens)
        tokens = slice(*even_ranges(batch.num_tokens, heads.sp)[groups.sp.rank()])
        qkv = pack(heads, tp_rank, *(x[tokens] for x in new))
        out = ulysses(qkv, batch, kv=kv)
        if number >= 2:
            again = ship(qkv, stripes.batch([0, 1, 2], q_lens), kv=stripes)
            torch.testing.assert_close(again, out, **EXACT)
            torch.testing.assert_close(again, expected[tokens, slice(*heads.q_shard(tp_rank))].flatten(1), **EXACT)


@pytest.mark.parametrize("layout", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=name_of)
def test_a_prefill_under_ulysses_decodes_the_same_once_converted(layout: tuple[int, int]) -> None:
    run_mesh(layout, prefilled)


def ringed(mesh: comm.DeviceMesh, placement: Placement) -> None:
    """Prompts round a ring, their keys to the stripes (in place already where the ring was striped), then decodes."""
    groups, case = comm.groups(mesh), Case(8, 2, interleave=2)
    ship, kv = make(groups, case)
    heads, rank, q_lens = ship.heads, groups.sp.rank(), (6, 1, 9)
    interleave = case.interleave if placement == "striped" else 1
    options: dict[str, Any] = {"placement": placement, "interleave": interleave}
    ring = RingAttention(heads, DIM, group=groups.sp, tp_rank=groups.tp.rank(), **options)
    history, batch = History(case, 3), kv.batch([0, 1, 2], q_lens)
    new, expected = history.add(q_lens)
    q, k, v = new[0][:, slice(*ship.q_shard)], *(x[:, slice(*ship.kv_shard)] for x in new[1:])
    placed = [place_tokens(length, heads.sp, placement, interleave=interleave) for length in q_lens]
    rows = [
        [
            start + p
            for start, runs in zip(batch.q_starts, placed, strict=False)
            for run in runs[to]
            for p in run.positions
        ]
        for to in range(heads.sp)
    ]
    mine = rows[rank]
    assert mine == ring.rows(batch).tolist()
    out = ring(q[mine], k[mine], v[mine], batch)
    torch.testing.assert_close(out, expected[mine][:, slice(*ship.q_shard)], **EXACT)
    if placement == "striped":
        assert tuple(mine) == kv.own(batch)
        kv.append_own(0, k[mine], v[mine], batch)
    else:
        tokens_to_stripes(k[mine], v[mine], batch, kv, layer_index=0, rows=rows, group=groups.sp)
    for q_lens in ((1, 1, 1), (2, 1, 0)):
        new, expected = history.add(q_lens)
        batch = kv.batch([0, 1, 2], q_lens)
        tokens = slice(*even_ranges(batch.num_tokens, heads.sp)[rank])
        out = ship(pack(heads, groups.tp.rank(), *(x[tokens] for x in new)), batch, kv=kv)
        torch.testing.assert_close(out, expected[tokens, slice(*ship.q_shard)].flatten(1), **EXACT)


@pytest.mark.parametrize("layout", SOME, ids=name_of)
@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "striped"])
def test_a_prefill_round_a_ring_decodes_over_stripes(placement: Placement, layout: tuple[int, int]) -> None:
    run_mesh(layout, ringed, placement)


def block(mesh: comm.DeviceMesh, form: str) -> None:
    """In a `ParallelAttention`, with rotary embedding, norms and biases; the tail of a last layer too."""
    groups, lengths = comm.groups(mesh), [0, 0, 0]
    torch.manual_seed(2)
    oracle = Attention(7, 8, 2, DIM, bias=True, qk_norm=True).double()
    core, kv = make(
        groups,
        Case(8, 2),
        q_norm=RMSNorm.from_module(oracle.q_norm, over_tp=True),
        k_norm=RMSNorm.from_module(oracle.k_norm, over_tp=True),
    )
    plain = ParallelAttention.from_module(oracle, groups=groups, heads=core.heads)
    ours = ParallelAttention(plain.qkv_proj, core, plain.o_proj)
    every = comm.layout_groups(groups)
    for layout, other in every.items():
        ours.add_layout(layout, groups=other)
    layout = list(every)[-1] if form in ("tensor", "helix") else groups.layout
    histories = [torch.empty(0, 7, dtype=torch.float64) for _ in lengths]
    for q_lens in ((6, 1, 4), (1, 1, 1), (1, 3, 0), (1, 1, 1)):
        x = torch.randn(sum(q_lens), 7, dtype=torch.float64)
        histories = [torch.cat(both) for both in zip(histories, x.split(q_lens), strict=True)]
        lengths = [len(h) for h in histories]
        expected = torch.cat(
            [
                oracle(h, (len(h),), *rope(torch.arange(len(h)), DIM), None)[len(h) - new :]
                for h, new in zip(histories, q_lens, strict=True)
            ]
        )
        batch = kv.batch([0, 1, 2], q_lens)
        cos, sin = rope(batch.positions, DIM)
        tokens = even_ranges(batch.num_tokens, layout.sp)[every[layout].sp.rank()]
        options: dict[str, Any] = {}
        rows = list(range(*tokens))
        with torch.no_grad():
            if form == "tail":
                ends = list(accumulate(q_lens))
                options["tail"] = batch.tail([end - 1 for end, new in zip(ends, q_lens, strict=True) if new])
                rows = [row for row in rows if row in options["tail"].rows]
            if form == "helix":
                qkv = plain.qkv_proj(x)
                out = plain.o_proj(core(qkv, batch, cos, sin, kv, layout=layout, whole=True), layout=layout)
            else:
                out = ours(x[slice(*tokens)], batch, cos, sin, kv, layout=layout, **options)
            torch.testing.assert_close(out, expected[rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [(1, 1), (1, 3), (2, 2), (1, 4)], ids=name_of)
@pytest.mark.parametrize("form", ["stored", "tensor", "helix", "tail"])
def test_it_stands_in_an_attention_block(form: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, block, form)


def chunks(mesh: comm.DeviceMesh) -> None:
    """Programs that take turns: one for each half of the requests, and one for each chunk of a request."""
    groups, case = comm.groups(mesh), Case(8, 2, interleave=2)
    core, kv = make(groups, case)
    history = History(case, 2)
    for q_lens, cuts in (((9, 2), [4]), ((1, 1), [1]), ((3, 4), [2, 5])):
        new, expected = history.add(q_lens)
        parts = kv.batch([0, 1], q_lens).split(cuts)
        bounds, programs, wanted = [0, *cuts, sum(q_lens)], [], []
        for part, start in zip(parts, bounds, strict=False):
            tokens = slice(*even_ranges(part.num_tokens, core.heads.sp)[groups.sp.rank()].shift(start))
            qkv = pack(core.heads, groups.tp.rank(), *(x[tokens] for x in new))
            programs.append(core.steps(qkv, part, kv=kv))
            wanted.append(expected[tokens, slice(*core.q_shard)].flatten(1))
        for out, want in zip(comm.interleave(programs), wanted, strict=True):
            torch.testing.assert_close(out, want, **EXACT)


@pytest.mark.parametrize("layout", [(1, 2), (2, 2)], ids=name_of)
def test_parts_of_a_step_overlap(layout: tuple[int, int]) -> None:
    run_mesh(layout, chunks)


def halves(mesh: comm.DeviceMesh, exchange: Any) -> None:
    """Two halves of the requests by turns: a program computes under every exchange of the other (Helix's HOP-B)."""
    groups, case = comm.groups(mesh), Case(8, 2, interleave=2)
    core, kv = make(groups, case, exchange=exchange)
    history = History(case, 4)
    for q_lens in ((5, 2, 3, 4), (1, 1, 1, 1)):
        new, expected = history.add(q_lens)
        programs, wanted, start = [], [], 0
        for requests in ((0, 1), (2, 3)):
            batch = kv.batch(requests, [q_lens[request] for request in requests])
            tokens = slice(*even_ranges(batch.num_tokens, groups.sp.size())[groups.sp.rank()].shift(start))
            qkv = pack(core.heads, groups.tp.rank(), *(x[tokens] for x in new))
            programs.append(core.steps(qkv, batch, kv=kv))
            wanted.append(expected[tokens, slice(*core.q_shard)].flatten(1))
            start += batch.num_tokens
        with comm.trace() as seen:
            outs = comm.interleave(programs, ordered=False)
        torch.testing.assert_close(outs, wanted, **EXACT)
    trace = seen.gather(group=groups.flat)
    comm.check_schedule(trace, ordered=False)
    mine = [interval for interval in trace.intervals if interval.rank == 0]
    launched = [interval.program for interval in mine if interval.kind == "comm"]
    assert launched == [(0,), (1,)] * (3 if exchange == "ag_rs" else 2)
    for flight in (interval for interval in mine if interval.kind == "comm" and interval.program == (0,)):
        landed = next(i.start_s for i in mine if i.kind == "wait" and i.number == flight.number)
        under = [i for i in mine if i.kind == "compute" and flight.launched_s <= i.start_s and i.end_s <= landed]
        assert any(interval.program == (1,) for interval in under)


@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
def test_halves_of_the_requests_hide_each_others_exchanges(exchange: str) -> None:
    run_mesh((1, 2), halves, exchange)


def yields(mesh: comm.DeviceMesh) -> list[str]:
    """What a step stops at, with the keys of the layer still missing where its mark is."""
    core, kv = make(comm.groups(mesh), CASES[0])
    batch = kv.batch([0], [2])
    steps = core.steps(torch.zeros(1, 12 * DIM, dtype=torch.float64), batch, kv=kv)
    seen: list[str] = []
    value = None
    while True:
        try:
            item = steps.send(value)
        except StopIteration:
            return seen
        seen.append(type(item).__name__)
        if isinstance(item, comm.Mark):
            with pytest.raises(ValueError, match="after their keys are appended"):
                kv.check_appended(0, [0])
        value = item.wait()


def test_a_step_marks_its_append() -> None:
    assert run_mesh((1, 2), yields) == [["Handle", "Mark", "Handle"]] * 2


class Watched(QShipDecodeAttention):
    """Knows how many collectives were launched when it began to attend among the step's own tokens."""

    launched = 0

    def _attend_current(self, *args: Any) -> Any:
        self.launched = self.counted.total.calls
        return super()._attend_current(*args)


def under_way(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    for exchange, calls in (("a2a", 2), ("ag_rs", 3)):
        core = Watched(HeadMap(8, 2, 1, 2), DIM, group=groups.sp, exchange=exchange)
        kv = make(groups, CASES[0])[1]
        with comm.record() as core.counted:
            core(torch.zeros(1, 12 * DIM, dtype=torch.float64), kv.batch([0], [2]), kv=kv)
        assert (core.launched, core.counted.total.calls) == (2, calls)


def test_current_tokens_are_attended_to_while_partials_travel() -> None:
    run_mesh((1, 2), under_way)


def refusals(mesh: comm.DeviceMesh) -> None:
    """All by name, on all ranks, and nothing is sent."""
    groups = comm.groups(mesh)
    core, kv = make(groups, CASES[0])
    heads, rank = core.heads, groups.sp.rank()
    ulysses = UlyssesAttention(heads, DIM, group=groups.sp)
    whole = PagedKV(1, 4, 4, ulysses.num_kv_heads, DIM, dtype=torch.float64)
    batch = kv.batch(["a"], [2])
    qkv = torch.zeros(1, 12 * DIM, dtype=torch.float64)

    def stripes(ranks: int = 2, own: int = rank, **options: Any) -> StripedKV:
        sizes = options.pop("sizes", (1, 4, 4, 2, DIM))
        return StripedKV(*sizes, striping=Striping(ranks), rank=own, dtype=torch.float64, **options)

    with comm.record() as sent:
        with pytest.raises(ValueError, match=r"`kv` must be the `StripedKV` of rank . of the group's 2, got PagedKV"):
            core(qkv, batch, kv=whole)
        with pytest.raises(ValueError, match=r"of the group's 2, got NoneType"):
            core(qkv, batch)
        with pytest.raises(ValueError, match=r"of the group's 2, got rank . of 4"):
            core(qkv, batch, kv=stripes(4))
        with pytest.raises(ValueError, match="`kv` must hold the KV heads of this tp shard"):
            core(qkv, batch, kv=stripes(sizes=(1, 4, 4, 1, DIM)))
        with pytest.raises(ValueError, match="`batch` must have the cache's page size"):
            core(qkv, batch, kv=stripes(sizes=(1, 4, 8, 2, DIM)))
        for whole_qkv in (False, True):
            coded = QShipDecodeAttention(heads, DIM, group=groups.sp, wire="int8")
            rows = qkv.repeat(2, 1) if whole_qkv else qkv
            with pytest.raises(ValueError, match="`qkv` must be float32, bfloat16 or float16 to travel in a wire"):
                coded(rows, batch, kv=kv, whole=whole_qkv)
        with pytest.raises(ValueError, match="`kv` must hold whole sequences of this rank's heads"):
            ulysses(qkv, batch, kv=kv)
        with pytest.raises(ValueError, match="`qkv` must need no gradient"):
            core(qkv.clone().requires_grad_(), batch, kv=kv)
        with pytest.raises(ValueError, match="`qkv` must have shape"):
            core(qkv[:, 1:], batch, kv=kv)
        k = torch.zeros(1, 2, DIM, dtype=torch.float64)
        options: dict[str, Any] = {"layer_index": 0, "group": groups.sp}
        with pytest.raises(ValueError, match=r"`rows` must have each of the batch's 2 tokens on one of the group's 2"):
            tokens_to_stripes(k, k, batch, kv, rows=[[0], [0]], **options)
        with pytest.raises(ValueError, match=r"`k` and `v` must be \[1, 2, 4\] in torch.float64"):
            tokens_to_stripes(k[:, :1], k[:, :1], batch, kv, rows=[[0], [1]], **options)
        with pytest.raises(
            ValueError, match=r"`kv` must be the `StripedKV` of rank . of the group's 2, got rank . of 4"
        ):
            tokens_to_stripes(k, k, batch, stripes(4), rows=[[0], [1]], **options)
    assert sent.total.calls == 0

    def refused(match: str, source: PagedKV, target: PagedKV, requests: list[str]) -> None:
        move = stripes_to_heads if isinstance(source, StripedKV) else heads_to_stripes
        before = (target.ids, target.free_pages)
        with pytest.raises(ValueError, match=match):
            move(source, target, requests, heads=heads, group=groups.sp)  # type: ignore[arg-type]
        assert (target.ids, target.free_pages) == before

    prompt = whole.batch(["a", "b"], [3, 9])
    refused("must be read after their keys are appended", whole, stripes(), ["a"])
    whole.append(0, *torch.zeros(2, 12, ulysses.num_kv_heads, DIM, dtype=torch.float64), prompt)
    refused(r"`requests` must not be in the target yet, got \['a'\]", whole, kv, ["a", "b"])
    refused("out of pages", whole, stripes(sizes=(1, 2, 4, 2, DIM)), ["a", "b"])
    refused("`request` must be held", whole, stripes(), ["c"])
    refused("caches must be a `PagedKV` and a `StripedKV` of rank", whole, stripes(4), ["a"])
    refused("caches must hold 1 KV heads by heads and 2 by tokens", whole, stripes(sizes=(2, 4, 4, 2, DIM)), ["a"])
    only_one = stripes(sizes=(1, 2 if rank else 8, 4, 2, DIM))
    refused("out of pages", whole, only_one, ["a", "b"])


def test_bad_input_is_refused_on_all_ranks() -> None:
    run_mesh((1, 2), refusals)


def foreign_layout(mesh: comm.DeviceMesh) -> None:
    for exchange in ("ag", 0, True):
        text = '`exchange` must be "a2a", "ag_rs" or a number of queries of at least 1'
        with own_errors(), pytest.raises(ValueError, match=text):
            make(comm.groups(mesh), CASES[0], exchange=exchange)
    core, _ = make(comm.groups(mesh), CASES[0])
    with pytest.raises(ValueError, match=r"must keep the tokens of a step within the group that holds its context"):
        core.add_layout(Layout(1, 4), group=comm.groups(mesh).flat)


def test_a_layout_that_would_move_tokens_between_contexts_is_refused() -> None:
    run_mesh((2, 2), foreign_layout)
