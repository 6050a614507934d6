"""Layouts toggled at random from step to step, over one cache and one copy of the weights.

Two decoder layers run ragged steps (prompts, chunks of prompts after cached ones, decodes), each step under whichever
reachable layout a random schedule says. Their outputs are one process's, and the caches are those of pure tensor
parallelism: bit for bit for a model in which nothing rounds, within rounding for any other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seqpar import comm, kernels
from seqpar.kv import PagedKV
from seqpar.layers import (
    OverlappedAttention,
    OverlappedMLP,
    ParallelAttention,
    ParallelDecoderLayer,
    ParallelMLP,
    PipelinedUlysses,
    RMSNorm,
    UlyssesAttention,
)
from seqpar.partition import HeadMap, Layout, Range, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, rope
from tests.ranks import run_mesh, run_ranks

SIZE, DIM, LAYERS, REQUESTS = 9, 4, 2, 3
Steps = tuple[tuple[tuple[int, ...], int], ...]
"""For each step the new tokens of every request, and a number that picks its layout."""


@dataclass(frozen=True)
class Model:
    """One shape, and how its layers run; ids read `h8g2` for 8 query and 2 KV heads.

    Attributes:
        exact: numbers for which nothing rounds, in whatever order they are summed.
        how: "pipelined" cores, layers "overlapped" within themselves, or chunks "by turns".
    """

    num_heads: int
    num_kv_heads: int
    hidden: int = 13
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    sequence_sharded: bool = False
    exact: bool = False
    dtype: torch.dtype = torch.float64
    how: str = "plain"

    def __str__(self) -> str:
        flags = [f for f in ("bias", "qk_norm", "window", "sequence_sharded", "exact") if getattr(self, f)]
        dtype = [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float64)
        return "-".join([f"h{self.num_heads}g{self.num_kv_heads}", *flags, *dtype, *[self.how] * (self.how != "plain")])


CASES = {
    2: [Model(2, 2, qk_norm=True), Model(5, 1, bias=True, window=3), Model(8, 4, exact=True, window=2)],
    3: [Model(5, 5, bias=True, window=2, exact=True), Model(6, 2, sequence_sharded=True, qk_norm=True)],
    4: [
        Model(8, 2, hidden=3, dtype=torch.float32),
        Model(14, 2, bias=True, exact=True, window=2),
        Model(8, 8, sequence_sharded=True, bias=True),
        Model(8, 4, qk_norm=True, how="pipelined"),
        Model(5, 5, window=3, how="overlapped"),
        Model(6, 3, bias=True, how="by turns"),
        Model(6, 1, sequence_sharded=True, window=4, how="by turns"),
    ],
    6: [Model(14, 2, exact=True, window=2), Model(12, 4, bias=True, qk_norm=True)],
    8: [Model(28, 4, bias=True, qk_norm=True, window=5), Model(8, 1, exact=True, window=2), Model(8, 8)],
}


def oracles(model: Model) -> list[DecoderLayer]:
    torch.manual_seed(11)
    options = {"bias": model.bias, "qk_norm": model.qk_norm}
    layers = [
        DecoderLayer(SIZE, model.num_heads, model.num_kv_heads, DIM, model.hidden, **options) for _ in range(LAYERS)
    ]
    for layer in layers:
        layer.to(model.dtype).requires_grad_(False)
        if model.exact:
            round_nothing(layer)
    return layers


def round_nothing(layer: DecoderLayer) -> None:
    """Whole numbers; queries of zeros, which weigh two visible keys by a half each; gates far from where SiLU bends."""
    for name, param in layer.named_parameters():
        whole = torch.randint(-1, 2, param.shape) * (torch.rand(param.shape) < 0.4)
        scales = {"q_proj": 0.0, "gate_proj": 2.0**14, "down_proj.weight": 2.0**-14}
        param.copy_(whole * next((scale for part, scale in scales.items() if part in name), 1.0))
    layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()


@cache
def layouts_of(base: Layout) -> dict[Layout, comm.Groups]:
    """The groups of a mesh and of all that it reaches, made once in every rank."""
    return comm.layout_groups(comm.groups(comm.init_mesh(*base, device="cpu")))


@cache
def stack(model: Model, base: Layout) -> list[ParallelDecoderLayer]:
    """The layers as `base` stores them, with every layout that it reaches."""
    layouts = layouts_of(base)
    layers = []
    for index, oracle in enumerate(oracles(model)):
        layer = shard(model, oracle, layouts[base], index)
        for layout, groups in layouts.items():
            if layout != base:
                layer.add_layout(layout, groups=groups)
        layers.append(layer)
    return layers


def shard(model: Model, oracle: DecoderLayer, groups: comm.Groups, index: int = 0) -> ParallelDecoderLayer:
    """One layer, put together of the parts that the model asks for."""
    pipeline = {"pipelined": ThreePhase(2, 2, 0), "overlapped": ThreePhase(1, 2, 0)}.get(model.how)
    attention, mlp = (
        (OverlappedAttention, OverlappedMLP) if model.how == "overlapped" else (ParallelAttention, ParallelMLP)
    )
    cut = {"sequence_sharded": model.sequence_sharded}
    return ParallelDecoderLayer(
        attention.from_module(
            oracle.self_attn,
            groups=groups,
            heads=HeadMap(model.num_heads, model.num_kv_heads, *groups.layout),
            layer_index=index,
            window=model.window,
            pipeline=pipeline,
            **cut,
        ),
        mlp.from_module(oracle.mlp, group=groups.tp, sp=groups.layout.sp, **cut),
        *(
            nn.Identity() if model.exact else RMSNorm.from_module(norm)
            for norm in (oracle.input_layernorm, oracle.post_attention_layernorm)
        ),
        groups=groups,
        **cut,
    )


def tables(model: Model, positions: Tensor) -> tuple[Tensor, Tensor]:
    if not model.exact:
        return tuple(table.to(model.dtype) for table in rope(positions, DIM))
    quarter = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=model.dtype)  # quarter turns
    return quarter[positions % 4][:, None].expand(-1, DIM), quarter[(positions + 3) % 4][:, None].expand(-1, DIM)


def inputs(model: Model, steps: Steps) -> list[Tensor]:
    """All tokens of each request."""
    totals = [sum(lens[r] for lens, _ in steps) for r in range(REQUESTS)]
    torch.manual_seed(3)
    if model.exact:
        return [torch.randint(-1, 2, (n, SIZE)).to(model.dtype) for n in totals]
    return [torch.randn(n, SIZE).to(model.dtype) for n in totals]


def expected(model: Model, xs: Sequence[Tensor]) -> list[Tensor]:
    """What one process makes of whole requests, in float64."""
    layers = [layer.double() for layer in oracles(model)]
    outs = []
    for x in xs:
        cos, sin = (table.double() for table in tables(model, torch.arange(len(x))))
        out = x.double()
        for layer in layers:
            out = layer(out, (len(x),), cos, sin, model.window)
        outs.append(out)
    return outs


def held(model: Model, num_tokens: int, groups: comm.Groups) -> Range:
    """The rows of a step that this rank holds."""
    mine = even_ranges(num_tokens, groups.sp.size())[groups.sp.rank()]
    if model.sequence_sharded:
        mine = even_ranges(mine.size, groups.tp.size())[groups.tp.rank()].shift(mine.start)
    return mine


def program(
    layers: Sequence[ParallelDecoderLayer], x: Tensor, batch: RaggedBatch, kv: PagedKV, model: Model, layout: Layout
) -> comm.Steps[Tensor]:
    cos, sin = tables(model, batch.positions)
    for layer in layers:
        x = yield from comm.call(layer, x, batch, cos, sin, kv, layout=layout)
    return x


Drive = Callable[[Sequence[comm.Steps[Tensor]]], list[Tensor]]


def serve(
    model: Model, base: Layout, steps: Steps, xs: Sequence[Tensor], drive: Drive = comm.interleave
) -> tuple[list[list[tuple[slice, Tensor]]], PagedKV]:
    """Run the steps: for each the rows of it that this rank holds, chunk by chunk, with their outputs; and the cache."""
    layouts, layers = layouts_of(base), stack(model, base)
    kv = PagedKV(LAYERS, 40, 3, layers[0].self_attn.core.num_kv_heads, DIM, dtype=model.dtype)
    done = []
    for (lens, pick), x in zip(steps, step_rows(steps, xs), strict=True):
        layout = base.reachable[pick % len(base.reachable)]
        batch = kv.batch(range(REQUESTS), lens)
        cuts = [(len(x) + 1) // 2] if model.how == "by turns" else []
        rows = [
            held(model, stop - start, layouts[layout]).shift(start)
            for start, stop in pairwise([0, *cuts, len(x)])
        ]
        chunks = zip(rows, batch.split(cuts), strict=True)
        with torch.no_grad():
            outs = drive([program(layers, x[slice(*own)], part, kv, model, layout) for own, part in chunks])
        done.append([(slice(*own), out) for own, out in zip(rows, outs, strict=True)])
    return done, kv


def step_rows(steps: Steps, xs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The rows of each step, request after request, out of those of each request."""
    left = list(xs)
    for lens, _ in steps:
        yield torch.cat([rows[:n] for rows, n in zip(left, lens, strict=True)])
        left = [rows[n:] for rows, n in zip(left, lens, strict=True)]


def in_turn(programs: Sequence[comm.Steps[Tensor]]) -> list[Tensor]:
    return [comm.run(each) for each in programs]


def pages(kv: PagedKV) -> list[Tensor]:
    """All that a cache holds; what was never written is NaN (`tests.ranks.poison`)."""
    return [x for layer in range(LAYERS) for x in kv.layer(layer)]


def same(model: Model, ours: Tensor, theirs: Tensor) -> None:
    """Equal: bit for bit where nothing rounds, else up to rounding."""
    rtol, atol = (0.0, 0.0) if model.exact else (1e-10, 1e-11) if model.dtype == torch.float64 else (2e-4, 2e-5)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol, equal_nan=True)


@own_errors()  # the shape checker would take two thirds of the time
def toggled(rank: int, p: int, model: Model, steps: Steps, xs: list[Tensor], wanted: list[Tensor]) -> None:
    """Every factorisation as the one that stores the weights, against pure tensor parallelism and one process."""
    pure = None
    for base in reversed(Layout(1, p).reachable):
        outs, kv = serve(model, base, steps, xs)
        pure = pure or kv
        for chunks, whole in zip(outs, step_rows(steps, wanted), strict=True):
            for rows, out in chunks:
                same(model, out, whole[rows])
        for ours, theirs in zip(pages(kv), pages(pure), strict=True):
            same(model, ours, theirs)
        if model.how == "by turns":
            again, other = serve(model, base, steps, xs, in_turn)
            for one, two in zip(outs, again, strict=True):
                assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(pages(kv), pages(other), strict=True))


LENGTHS = st.sampled_from([1, 0, 1, 2, 3, 5, 9])
STEP = st.tuples(st.tuples(*[LENGTHS] * REQUESTS).filter(any), st.integers(0, 11))
MIXED: Steps = (((9, 0, 5), 0), ((3, 1, 1), 1), ((1, 7, 0), 2), ((1, 1, 1), 3), ((0, 1, 0), 0), ((1, 0, 0), 1))
"""Prompts; a chunk of one and decodes; a decode and a prompt; decodes; single tokens."""


@pytest.mark.parametrize(("p", "model"), [(p, m) for p, models in CASES.items() for m in models], ids=str)
def test_any_layout_serves_any_step(p: int, model: Model) -> None:
    @settings(max_examples=3 if p < 6 else 2)
    @example(steps=MIXED)
    @given(steps=st.lists(STEP, min_size=1, max_size=6).map(tuple))
    def check(steps: Steps) -> None:
        xs = inputs(model, steps)
        run_ranks(p, toggled, model, steps, xs, expected(model, xs))

    check()
