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
from itertools import pairwise

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
    RMSNorm,
    ShardedModule,
    name_modules,
)
from seqpar.partition import HeadMap, Layout, Range, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch, Tail
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import run_ranks

SIZE, DIM, LAYERS, REQUESTS = 9, 4, 2, 3
Steps = tuple[tuple[tuple[int, ...], int], ...]
"""For each step the new tokens of every request, and a number that picks its layout."""


@dataclass(frozen=True)
class Model:
    """One shape, and how its layers run; ids read `h8g2` for 8 query and 2 KV heads.

    Attributes:
        exact: numbers for which nothing rounds, in whatever order they are summed.
        how: "pipelined" cores, layers "overlapped" within themselves, chunks "by turns", or in the last layer the
            "tail" of a step alone.
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


TURNS = Model(6, 3, bias=True, sequence_sharded=True, window=4, how="by turns")
CASES = {
    2: [TURNS, Model(2, 2, qk_norm=True), Model(5, 1, bias=True, window=3), Model(8, 4, exact=True, window=2)],
    3: [Model(5, 5, bias=True, window=2, exact=True), Model(6, 2, sequence_sharded=True, qk_norm=True, how="tail")],
    4: [
        Model(8, 2, hidden=3, dtype=torch.float32),
        Model(14, 2, bias=True, exact=True, window=2),
        Model(8, 8, sequence_sharded=True, bias=True),
        Model(8, 4, qk_norm=True, how="pipelined"),
        Model(5, 5, window=3, how="overlapped"),
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
    layers: Sequence[ParallelDecoderLayer],
    x: Tensor,
    batch: RaggedBatch,
    kv: PagedKV,
    model: Model,
    layout: Layout,
    tail: Tail | None,
) -> comm.Steps[Tensor]:
    cos, sin = tables(model, batch.positions)
    for layer in layers:
        options = {"tail": tail} if tail is not None and layer is layers[-1] else {}
        x = yield from comm.call(layer, x, batch, cos, sin, kv, layout=layout, **options)
    return x


Drive = Callable[[Sequence[comm.Steps[Tensor]]], list[Tensor]]


def serve(
    model: Model, base: Layout, steps: Steps, xs: Sequence[Tensor], drive: Drive = comm.interleave
) -> tuple[list[list[tuple[list[int], Tensor]]], PagedKV]:
    """Run the steps: for each the rows of it that this rank holds, by chunks, with their outputs; and the cache."""
    layouts, layers = layouts_of(base), stack(model, base)
    kv = PagedKV(LAYERS, 40, 3, layers[0].self_attn.core.num_kv_heads, DIM, dtype=model.dtype)
    done = []
    for (lens, pick), x in zip(steps, step_rows(steps, xs), strict=True):
        layout = base.reachable[pick % len(base.reachable)]
        batch = kv.batch(range(REQUESTS), lens)
        cuts = [(len(x) + 1) // 2] if model.how == "by turns" else []
        rows = [held(model, stop - start, layouts[layout]).shift(start) for start, stop in pairwise([0, *cuts, len(x)])]
        tail = batch.tail([len(x) - 1, pick % len(x)]) if model.how == "tail" else None
        chunks = zip(rows, batch.split(cuts) if cuts else [batch], strict=True)
        with torch.no_grad():
            outs = drive([program(layers, x[slice(*own)], part, kv, model, layout, tail) for own, part in chunks])
        found = [list(range(*own) if tail is None else tail.within(*own)) for own in rows]
        done.append(list(zip(found, outs, strict=True)))
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
    bases = Layout(1, p).reachable if model.how == "plain" else (Layout(1, p), Layout(p, 1))
    for base in reversed(bases):
        outs, kv = serve(model, base, steps, xs)
        pure = pure or kv
        for chunks, whole in zip(outs, step_rows(steps, wanted), strict=True):
            for rows, out in chunks:
                same(model, out, whole[rows])
        for ours, theirs in zip(pages(kv), pages(pure), strict=True):
            same(model, ours, theirs)


LENGTHS = st.sampled_from([1, 0, 1, 2, 3, 5, 9])
STEP = st.tuples(st.tuples(*[LENGTHS] * REQUESTS).filter(any), st.integers(0, 11))
MIXED: Steps = (((9, 0, 5), 0), ((3, 1, 1), 1), ((1, 7, 0), 2), ((1, 1, 1), 0), ((0, 1, 0), 3))
"""Prompts; a chunk of one and decodes; a decode and a prompt; decodes; a single token."""


def is_quick(p: int, model: Model) -> bool:
    return p < 6 or model.num_heads in (12, 28)


@pytest.mark.parametrize(
    ("p", "model"),
    [
        pytest.param(p, model, marks=() if is_quick(p, model) else pytest.mark.slow)
        for p, models in CASES.items()
        for model in models
    ],
    ids=str,
)
def test_any_layout_serves_any_step(p: int, model: Model) -> None:
    @settings(max_examples=2 if p < 4 else 1)
    @example(steps=MIXED)
    @given(steps=st.lists(STEP, min_size=1, max_size=6).map(tuple))
    def check(steps: Steps) -> None:
        xs = inputs(model, steps)
        run_ranks(p, toggled, model, steps, xs, expected(model, xs))

    check()


def turns(rank: int, p: int, model: Model) -> None:
    xs = inputs(model, MIXED)
    runs = [serve(model, Layout(1, p), MIXED, xs, drive) for drive in (comm.interleave, in_turn)]
    for one, two in zip(*(outs for outs, _ in runs), strict=True):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*(pages(kv) for _, kv in runs), strict=True))


def test_chunks_by_turns_are_the_chunks_one_after_another_in_any_layout() -> None:
    run_ranks(4, turns, TURNS)


# One copy of the weights.


def footprint() -> int:
    """Bytes of all tensors of this process."""
    tensors = [x.untyped_storage() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


@contextmanager
def factors(layer: nn.Module) -> Iterator[set[str]]:
    """In whose storage the weights and biases lie by which the context multiplies."""
    own = {param.untyped_storage().data_ptr(): name for name, param in layer.named_parameters()}
    linear, seen = kernels.linear, set[str]()

    def spy(x: Tensor, *params: Tensor | None) -> Tensor:
        seen.update(own[param.untyped_storage().data_ptr()] for param in params if param is not None)
        return linear(x, *params)

    kernels.linear = spy
    try:
        yield seen
    finally:
        kernels.linear = linear


def one_copy(rank: int, p: int, base: Layout, model: Model) -> None:
    layouts = layouts_of(base)
    layer = shard(model, oracles(model)[0], layouts[base])
    before = footprint()
    for layout in base.reachable[1:]:
        layer.add_layout(layout, groups=layouts[layout])
    assert footprint() == before
    row_biases = ("o_proj.bias", "down_proj.bias")  # added to the sum
    linears = {name for name, _ in layer.named_parameters() if "proj" in name and not name.endswith(row_biases)}
    batch = RaggedBatch.prefill((7, 2))
    cos, sin = tables(model, batch.positions)
    for layout in base.reachable:
        x = torch.randn(held(model, 9, layouts[layout]).size, SIZE, dtype=model.dtype)
        with factors(layer) as used:
            layer(x, batch, cos, sin, layout=layout)
        assert used == linears
        for module in layer.modules():
            if isinstance(module, ShardedModule):
                stored = {param.untyped_storage().data_ptr() for param in module.parameters(recurse=False)}
                assert {view.untyped_storage().data_ptr() for view in module.weights(layout)} == stored


@pytest.mark.parametrize("model", [Model(8, 4), Model(6, 3, bias=True)], ids=str)
def test_every_layout_multiplies_by_views_of_one_storage(model: Model) -> None:
    """Where KV heads are shared between ranks, the fused projection is two views."""
    run_ranks(4, one_copy, Layout(1, 4), model)


# Wire formats.


def coded(rank: int, p: int, wire: comm.Wire) -> None:
    """A layer shifted to a layout, one built for it, and one without a format: errors, and what is sent."""
    torch.manual_seed(7)
    source = DecoderLayer(128, 8, 4, 16, 96).requires_grad_(False)
    layouts = layouts_of(Layout(1, p))
    batch = RaggedBatch.prefill((19, 1, 8))
    cos, sin = (table.float() for table in rope(batch.positions, 16))
    x = torch.randn(28, 128)
    exact = source(x, (19, 1, 8), cos, sin)

    def built(base: Layout) -> ParallelDecoderLayer:
        layer = ParallelDecoderLayer.from_module(source, groups=layouts[base], heads=HeadMap(8, 4, *base), wire=wire)
        name_modules(layer)
        return layer

    shifted, limit = built(Layout(1, p)), {"int8": 0.02, "fp8": 0.08}[wire]
    for layout in Layout(1, p).reachable[1:]:
        shifted.add_layout(layout, groups=layouts[layout])
    for layout in Layout(1, p).reachable:
        rows = slice(*even_ranges(28, layout.sp)[layouts[layout].sp.rank()])
        with comm.record() as ours:
            out = shifted(x[rows], batch, cos, sin, layout=layout)
        with comm.record() as theirs:
            own = built(layout)(x[rows], batch, cos, sin)
        assert ours.counts == theirs.counts and ours.total.calls > 0
        assert 0 < error(out, exact[rows]) < limit
        assert error(out, own) < limit / 4  # but for codes at which a sum in another order rounds to the next


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_wire_formats_err_as_much_in_a_layout_that_was_added(wire: comm.Wire) -> None:
    run_ranks(4, coded, wire)


# What is refused.


@own_errors()
def refusals(rank: int, p: int) -> None:
    model, base = Model(8, 4, bias=True), Layout(2, 2)
    layouts = layouts_of(base)
    layer = shard(model, oracles(model)[0], layouts[base])
    attention, mlp = layer.self_attn, layer.mlp
    missing = Layout(1, 4)
    others = layouts_of(missing)[missing]
    reachable = r"reachable are \(2, 2\), \(4, 1\)"
    with pytest.raises(ValueError, match=reachable):
        comm.layout_groups(layouts[base], [missing])
    for part in (layer, attention):
        with pytest.raises(ValueError, match=reachable):
            part.add_layout(missing, groups=others)
    for part in (attention.qkv_proj, attention.o_proj, mlp, mlp.gate_up_proj, mlp.down_proj):
        for layout in (missing, Layout(3, 1), Layout(4, 2), Layout(0, 4)):
            with pytest.raises(ValueError, match=reachable):
                part.add_layout(layout, group=others.tp)
    for layout, group in ((Layout(3, 1), others.tp), (Layout(4, 0), others.tp), (Layout(4, 1), others.sp)):
        with pytest.raises(ValueError, match=r"layouts of these ranks are \(1, 4\), \(2, 2\), \(4, 1\)"):
            attention.core.add_layout(layout, group=group)
    with pytest.raises(ValueError, match=reachable):
        layer.add_layout(Layout(4, 1), groups=layouts[base])  # groups of another layout
    assert set(layer.ranks) == set(attention.tp_groups) == set(attention.core.exchanges) == {None, base}

    batch = RaggedBatch.prefill((4,))
    cos, sin = tables(model, batch.positions)
    x = torch.randn(4, SIZE, dtype=model.dtype)
    rows = x[slice(*held(model, 4, layouts[base]))]
    known = r"`layout` must be one of \(2, 2\), got Layout\(tp=4, sp=1\); see add_layout"
    qkv = torch.empty(2, attention.qkv_proj.weight.shape[0], dtype=model.dtype)
    with comm.record() as sent:
        for run in (
            lambda **layout: layer(rows, batch, cos, sin, **layout),
            lambda **layout: attention(rows, batch, cos, sin, **layout),
            lambda **layout: attention.core(qkv, batch, cos, sin, **layout),
            lambda **layout: attention.qkv_proj(rows, **layout),
            lambda **layout: mlp(rows, **layout),
        ):
            with pytest.raises(ValueError, match=known):
                run(layout=Layout(4, 1))
    assert sent.total.calls == 0
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    with pytest.raises(
        TypeError, match="`down_proj` must be a RowParallelLinear to run in other layouts, got Sequential"
    ):
        layer.add_layout(Layout(4, 1), groups=layouts_of(base)[Layout(4, 1)])


def test_layouts_that_cannot_be_are_refused_on_all_ranks_by_those_that_can() -> None:
    run_ranks(4, refusals)


@own_errors()
def disagreeing(rank: int, p: int, layout: Layout) -> str:
    """A step of which the last rank has one token more than the others; the ranks work afterwards."""
    model, base = Model(8, 4), Layout(1, p)
    layer, groups = stack(model, base)[0], layouts_of(base)[layout]
    name_modules(layer)

    def step(num_tokens: int) -> None:
        batch = RaggedBatch.prefill((num_tokens,))
        x = torch.randn(held(model, num_tokens, groups).size, SIZE, dtype=model.dtype)
        with comm.check(timeout_s=20.0):
            layer(x, batch, *tables(model, batch.positions), layout=layout)

    with pytest.raises(ValueError, match="rank") as raised:
        step(5 + (rank == p - 1))
    step(5)
    return str(raised.value)


HEADS = "launched `all_to_all` of `self_attn.core` "
SUM = "launched `all_reduce` of `self_attn.o_proj` "
DISAGREEMENTS = {
    (1, 2): f"rank 1 {HEADS}[3, 64] float64 at step 1 of group `sp` (ranks 0, 1) and sends 96 elements to rank 0, "
    "which awaits 64",
    (2, 1): f"rank 1 {SUM}[6, 9] float64 at step 1 of group `sp` (ranks 0, 1), where rank 0 {SUM}[5, 9] float64",
    (1, 4): f"rank 3 {HEADS}[1, 64] float64 at step 1 of group `sp` (ranks 0, 1, 2, 3) and awaits 32 elements of "
    "rank 1, which sends 16",
    (2, 2): f"rank 1 {HEADS}[3, 32] float64 at step 1 of group `sp of 2x2` (ranks 2, 3) and sends 48 elements to "
    "rank 0, which awaits 32",
    (4, 1): f"rank 3 {SUM}[6, 9] float64 at step 1 of group `sp` (ranks 0, 1, 2, 3), where rank 0 {SUM}[5, 9] float64",
}


@pytest.mark.parametrize("layout", DISAGREEMENTS, ids=name_of)
def test_ranks_that_disagree_on_the_number_of_tokens_are_named(layout: tuple[int, int]) -> None:
    """In the group that finds it first, whose error all ranks raise."""
    (error,) = set(run_ranks(layout[0] * layout[1], disagreeing, Layout(*layout)))
    assert error.removesuffix("; ranks must launch the same collectives in the same order") == DISAGREEMENTS[layout]


def torn(rank: int, p: int) -> str:
    """The last rank takes the step for one of another layout, as no rule of the number of tokens alone would."""
    model, base = Model(8, 4), Layout(1, p)
    layer, layout = stack(model, base)[0], base if rank == p - 1 else Layout(p, 1)
    name_modules(layer)
    batch = RaggedBatch.prefill((5,))
    x = torch.randn(held(model, 5, layouts_of(base)[layout]).size, SIZE, dtype=model.dtype)
    with own_errors(), pytest.raises(ValueError, match="rank") as raised, comm.check(timeout_s=20.0):
        layer(x, batch, *tables(model, batch.positions), layout=layout)
    return str(raised.value)


@pytest.mark.parametrize("p", [2, 4])
def test_ranks_that_disagree_on_the_layout_are_named(p: int) -> None:
    (error,) = set(run_ranks(p, torn))
    assert error.startswith(f"rank {p - 1} {HEADS}") and f", where rank 0 {SUM}[5, 9] float64" in error
