"""Every layer in every floating dtype errs about as much as PyTorch's own operators do in that dtype on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.kernels import attention
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import (
    CSAAttention,
    OverlappedAttention,
    OverlappedMLP,
    ParallelDecoderLayer,
    ParallelLMHead,
    PipelinedUlysses,
    PipelineStage,
    PlacedCore,
    QShipDecodeAttention,
    RingAttention,
    Strided,
    UlyssesAttention,
    USPAttention,
    VocabParallelEmbedding,
)
from seqpar.partition import HeadMap, Striping, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of
from tests.layers.test_decoder import HEAD_DIM, Case, inputs, my_tokens, parallel, reference
from tests.layers.test_moe import Mixture
from tests.ranks import SMALL, run_mesh, thinned

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TIMES = 3.0
"""What a sum over ranks, in another order and rounded between them, may add to the error of one process."""

by_dtype = pytest.mark.parametrize("dtype", thinned(DTYPES.values(), lambda dtype: dtype == torch.bfloat16), ids=DTYPES)
by_layout = pytest.mark.parametrize("layout", thinned(SMALL, (2, 2).__eq__), ids=name_of)


def error(found: Tensor, exact: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - exact).abs().mean())


def compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Of each tensor: our mean error against what one process makes in that dtype."""
    for mine, theirs, wanted in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(wanted.abs().mean())
        assert error(mine, wanted) <= TIMES * error(theirs, wanted) + rounding, (error(mine, wanted), rounding)


def decoder(case: Case, mixture: bool) -> DecoderLayer:
    layer = reference(case)
    if mixture:
        torch.manual_seed(2)
        layer.mlp = Mixture(5, 2, 7).double()
    return layer


def ran(layer: nn.Module, x: Tensor, weights: Tensor, *args: Any) -> list[Tensor]:
    """Output, and the gradient of the input."""
    local = x.clone().requires_grad_()
    out = layer(local, *args)
    (out * weights).sum().backward()
    assert local.grad is not None
    return [out.detach(), local.grad]


def layers(mesh: comm.DeviceMesh, dtype: torch.dtype, case: Case, mixture: bool) -> None:
    groups = comm.groups(mesh)
    rounded = decoder(case, mixture).to(dtype)
    exact = decoder(case, mixture)
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    layer = parallel(case, mesh, rounded)
    x, batch, cos, sin = inputs(case)
    x, weights = x.to(dtype), torch.randn_like(x).to(dtype)
    cos, sin = cos.to(dtype), sin.to(dtype)
    mine = my_tokens(case, groups, len(x))
    wanted = ran(exact, x.double(), weights.double(), case.q_lens, cos.double(), sin.double())
    plain = ran(rounded, x, weights, case.q_lens, cos, sin)
    ours = ran(layer, x[mine], weights[mine], batch, cos, sin)
    compare(ours, [t[mine] for t in plain], [t[mine] for t in wanted], dtype)


@by_dtype
@by_layout
def test_decoder_layers(layout: tuple[int, int], dtype: torch.dtype) -> None:
    for case, mixture in ((Case(8, 2, bias=True, qk_norm=True), False), (Case(8, 2), True)):
        run_mesh(layout, layers, dtype, case, mixture)


def vocabulary(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    groups, table = comm.groups(mesh), nn.Embedding(13, 8).to(dtype)
    embedding = VocabParallelEmbedding.from_module(table, group=groups.tp, sp=groups.layout.sp)
    ids = torch.tensor([3, 12, 0, 7])
    torch.testing.assert_close(embedding(ids), table(ids), rtol=0, atol=0)
    linear = nn.Linear(8, 13, bias=False).to(dtype)
    head, x = ParallelLMHead.from_linear(linear, groups=groups), torch.randn(4, 8).to(dtype)
    weights = torch.randn(4, 13).to(dtype)
    exact = nn.Linear(8, 13, bias=False).double()
    exact.load_state_dict({"weight": linear.weight.double()})
    wanted, plain = ran(exact, x.double(), weights.double()), ran(linear, x, weights)
    compare(ran(head, x, weights), plain, wanted, dtype)


@by_dtype
@by_layout
def test_embedding_and_head(layout: tuple[int, int], dtype: torch.dtype) -> None:
    run_mesh(layout, vocabulary, dtype)


def cores(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    """What attends, given the same rounded queries, keys and values."""
    groups = comm.groups(mesh)
    heads = HeadMap(8, 2, *groups.layout)
    options: dict[str, Any] = {"group": groups.sp, "tp_rank": groups.tp.rank()}
    beside = UlyssesAttention(heads, HEAD_DIM, **options)
    rows_of_one = comm.split_groups(groups.sp, groups.sp.size())
    shard = HeadMap(8, 2, groups.layout.tp, 1)
    policy = Strided(((groups.sp.size(), 1),))  # which leaves nothing out
    made = {
        "ulysses": beside,
        "pipelined": PipelinedUlysses(heads, HEAD_DIM, min_tokens=1, **options),
        "ring": PlacedCore(RingAttention(shard, HEAD_DIM, **options), beside=beside),
        "usp": PlacedCore(USPAttention(shard, HEAD_DIM, groups=rows_of_one, tp_rank=groups.tp.rank()), beside=beside),
        "csa": PlacedCore(CSAAttention(shard, HEAD_DIM, policy=policy, **options), beside=beside),
    }
    batch = RaggedBatch.prefill((7, 1, 12))
    whole = [torch.randn(20, h, HEAD_DIM).to(dtype) for h in (8, 2, 2)]
    mine = slice(*heads.q_shard(groups.tp.rank()))

    def one_process(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, batch)[0][:, mine].flatten(1)

    plain, wanted = one_process(*whole), one_process(*(x.double() for x in whole))
    for name, core in made.items():
        slices = slice(*even_ranges(20, groups.sp.size())[groups.sp.rank()])
        rows = core.rows(batch) if isinstance(core, PlacedCore) else slices
        q, k, v = (x[rows] for x in whole)
        own = slice(*heads.kv_shard(groups.tp.rank()))
        qkv = beside.pack(q[:, mine], k[:, own], v[:, own])
        with torch.no_grad():
            out = core(qkv, batch)
        try:
            compare([out], [plain[rows]], [wanted[rows]], dtype)
        except AssertionError as error:
            raise AssertionError(name) from error


@by_dtype
@by_layout
def test_attention(layout: tuple[int, int], dtype: torch.dtype) -> None:
    run_mesh(layout, cores, dtype)


def shipped(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    """Decodes over a striped cache which a ring has filled."""
    groups = comm.groups(mesh)
    heads, rank, tp_rank = HeadMap(8, 2, *groups.layout), groups.sp.rank(), groups.tp.rank()
    options: dict[str, Any] = {"group": groups.sp, "tp_rank": tp_rank}
    beside = UlyssesAttention(heads, HEAD_DIM, **options)
    ring = PlacedCore(RingAttention(heads, HEAD_DIM, **options), beside=beside)
    ship = QShipDecodeAttention(heads, HEAD_DIM, **options)
    mine, own = slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    striping = Striping(groups.layout.sp)
    shape = (1, 40, 2 * striping.period, own.stop - own.start, HEAD_DIM)
    kv = StripedKV(*shape, striping=striping, rank=rank, dtype=dtype)
    caches = [PagedKV(1, 40, 4, 2, HEAD_DIM, dtype=kind) for kind in (dtype, torch.float64)]
    for q_lens in ((7, 1, 12), (1, 1, 1)):
        batch = kv.batch("abc", q_lens)
        new = [torch.randn(batch.num_tokens, h, HEAD_DIM).to(dtype) for h in (8, 2, 2)]
        found = []
        for cache in caches:
            q, k, v = (x.to(cache.layer(0)[0].dtype) for x in new)
            every = cache.batch("abc", q_lens)
            cache.append(0, k, v, every)
            found.append(attention(q, *cache.read(0, every), every)[0][:, mine].flatten(1))
        plain, wanted = found
        decode = max(q_lens) == 1
        rows = torch.arange(batch.num_tokens).tensor_split(striping.ranks)[rank] if decode else ring.rows(batch)
        q, k, v = (x[rows] for x in new)
        with torch.no_grad():
            out = (ship if decode else ring)(beside.pack(q[:, mine], k[:, own], v[:, own]), batch, kv=kv)
        if len(rows):
            compare([out], [plain[rows]], [wanted[rows]], dtype)


@by_dtype
@by_layout
def test_decodes_that_ship_queries(layout: tuple[int, int], dtype: torch.dtype) -> None:
    run_mesh(layout, shipped, dtype)


def own_tokens(case: Case, mesh: comm.DeviceMesh, layer: DecoderLayer, **options: Any) -> ParallelDecoderLayer:
    """A decoder layer whose attention and MLP cut their tokens and hide their own collectives."""
    groups = comm.groups(mesh)
    made = parallel(case, mesh, layer)
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    cut = ThreePhase(1, 2, 0)
    made.self_attn = OverlappedAttention.from_module(
        layer.self_attn, groups=groups, heads=heads, pipeline=cut, **options
    )
    made.mlp = OverlappedMLP.from_module(layer.mlp, group=groups.tp, sp=heads.sp, **options)
    return made


def cuts(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    case, groups = Case(8, 2), comm.groups(mesh)
    rounded, exact = decoder(case, False).to(dtype), decoder(case, False)
    exact.load_state_dict({name: value.double() for name, value in rounded.state_dict().items()})
    x, batch, cos, sin = inputs(case)
    x, weights, cos, sin = (each.to(dtype) for each in (x, torch.randn_like(x), cos, sin))
    mine = my_tokens(case, groups, len(x))
    wanted = ran(exact, x.double(), weights.double(), case.q_lens, cos.double(), sin.double())
    plain = ran(rounded, x, weights, case.q_lens, cos, sin)
    ours = ran(own_tokens(case, mesh, rounded), x[mine], weights[mine], batch, cos, sin)
    compare(ours, [each[mine] for each in plain], [each[mine] for each in wanted], dtype)


@by_dtype
@by_layout
def test_layers_that_cut_their_own_tokens(layout: tuple[int, int], dtype: torch.dtype) -> None:
    run_mesh(layout, cuts, dtype)


@torch.no_grad()
def cuts_elsewhere(mesh: comm.DeviceMesh) -> None:
    case, groups = Case(8, 2), comm.groups(mesh)
    layer = own_tokens(case, mesh, reference(case))
    x, batch, cos, sin = inputs(case)
    expected = reference(case)(x, case.q_lens, cos, sin)
    for layout, other in comm.layout_groups(groups).items():
        if layout != groups.layout:
            layer.add_layout(layout, groups=other)
        mine = my_tokens(case, other, len(x))
        found = layer(x[mine], batch, cos, sin, layout=layout)
        torch.testing.assert_close(found, expected[mine], rtol=1e-10, atol=1e-12)


def test_layers_that_cut_their_own_tokens_in_other_layouts() -> None:
    run_mesh((1, 4), cuts_elsewhere)


@torch.no_grad()
def cuts_rounded(mesh: comm.DeviceMesh) -> None:
    """What travels in 8 bits differs, and by no more than a few of its steps."""
    case = Case(8, 2)
    rounded = reference(case, torch.float32)
    x, batch, cos, sin = (each.float() if isinstance(each, Tensor) else each for each in inputs(case))
    mine = my_tokens(case, comm.groups(mesh), len(x))
    plain, coded = (own_tokens(case, mesh, rounded, **options) for options in ({}, {"wire": "int8"}))
    want, got = (layer(x[mine], batch, cos, sin) for layer in (plain, coded))
    assert not torch.equal(got, want)
    assert float((got - want).abs().max()) < 0.1 * float(want.abs().max())


def test_layers_that_cut_their_own_tokens_in_a_wire_format() -> None:
    run_mesh((2, 2), cuts_rounded)


@torch.no_grad()
def staged(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    """Activations travel between stages as they are: bit for bit what the layers give one after another."""
    stages = comm.stages(mesh)
    case = Case(8, 2)
    whole = [parallel(case, mesh["tp", "sp"], decoder(case, False).to(dtype)) for _ in range(2)]
    table = nn.Embedding(5, 11, dtype=dtype, _weight=torch.linspace(-1, 1, 55).view(5, 11).to(dtype))
    head = ParallelLMHead(11, 5, group=stages.groups.flat, seq_group=stages.groups.sp, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.weight.numel()).view_as(head.weight))
    embed = VocabParallelEmbedding.from_module(table, group=stages.groups.tp)
    first, last = stages.pp.rank() == 0, stages.pp.rank() == 1
    parts: dict[str, Any] = {"embed_tokens": embed} if first else {"norm": nn.Identity(), "lm_head": head}
    for module in (*whole, embed, head):
        module.requires_grad_(False)
    stage = PipelineStage(
        [whole[stages.pp.rank()]], stages=stages, hidden_size=11, first_layer=stages.pp.rank(), **parts
    )
    _, batch, cos, sin = inputs(case)
    cos, sin, ids = cos.to(dtype), sin.to(dtype), torch.arange(batch.num_tokens) % 5
    found = stage(ids, batch, cos, sin, rows=[0, 9])
    if last:
        x = table(ids)
        for layer in whole:
            x = layer(x, batch, cos, sin)
        assert found.dtype == dtype and torch.equal(found, head(x, rows=[0, 9], num_tokens=len(x)))


@by_dtype
def test_stages(dtype: torch.dtype) -> None:
    run_mesh((2, 1, 1), staged, dtype)
