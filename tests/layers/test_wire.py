"""Layers that send in a wire format: all their collectives do, results stay near, gradients are straight through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.layers import (
    ColumnParallelLinear,
    OverlappedMLP,
    ParallelDecoderLayer,
    ParallelMLP,
    RowParallelLinear,
    UlyssesAttention,
    name_modules,
)
from seqpar.partition import HeadMap, even_ranges, even_split
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import MLP, DecoderLayer, name_of, rope
from tests.ranks import run_mesh

HEADS, KV_HEADS, HEAD_DIM, SIZE = 4, 2, 64, 256


def decoder(mesh: comm.DeviceMesh, sequence_sharded: bool, wire: comm.Wire | None) -> ParallelDecoderLayer:
    torch.manual_seed(7)
    source = DecoderLayer(SIZE, HEADS, KV_HEADS, HEAD_DIM, 320)
    groups = comm.groups(mesh)
    layer = ParallelDecoderLayer.from_module(
        source,
        groups=groups,
        heads=HeadMap(HEADS, KV_HEADS, *groups.layout),
        sequence_sharded=sequence_sharded,
        wire=wire,
    )
    name_modules(layer)
    return layer


def passes(layer: ParallelDecoderLayer, mesh: comm.DeviceMesh) -> tuple[Tensor, Tensor, comm.Recorder, comm.Recorder]:
    """The output, the gradient of the input, and what travelled forward and backward."""
    groups = comm.groups(mesh)
    batch = RaggedBatch.prefill((23, 1, 16), device="cpu")
    cos, sin = (table.float() for table in rope(batch.positions, HEAD_DIM))
    mine = even_ranges(40, groups.sp.size())[groups.sp.rank()]
    if layer.sequence_sharded:
        mine = even_ranges(mine.size, groups.tp.size())[groups.tp.rank()].shift(mine.start)
    x = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(1))[slice(*mine)].requires_grad_()
    with comm.record() as forward:
        out = layer(x, batch, cos, sin)
    with comm.record() as backward:
        out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, forward, backward


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def near(mesh: comm.DeviceMesh, sequence_sharded: bool, wire: comm.Wire) -> None:
    plain, coded = (decoder(mesh, sequence_sharded, choice) for choice in (None, wire))
    out, grad, forward, backward = passes(plain, mesh)
    out8, grad8, forward8, backward8 = passes(coded, mesh)
    limit = {"int8": 0.02, "fp8": 0.08}[wire]
    assert 0 < error(out8, out) < limit
    assert 0 < error(grad8, grad) < limit
    # Every collective of the layer, and none of its backward pass, sends 67 (fp8: 66) bytes for 64 numbers of four
    size = {"int8": 67, "fp8": 66}[wire]
    assert forward8.counts == {
        key: comm.Count(count.calls, count.num_bytes * size // 256, count.num_bytes * size // 256)
        for key, count in forward.counts.items()
    }
    assert backward8.counts == backward.counts and backward.total.calls > 0


@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_a_decoder_layer_sends_all_in_the_format(layout: tuple[int, int], wire: str) -> None:
    run_mesh(layout, near, False, wire)
    if layout[0] > 1:
        run_mesh(layout, near, True, wire)


def overlapped(mesh: comm.DeviceMesh) -> None:
    group = comm.groups(mesh).tp
    torch.manual_seed(4)
    source = MLP(SIZE, 320, bias=True)
    plain = ParallelMLP.from_module(source, group=group, wire="int8")
    ours = OverlappedMLP.from_module(source, group=group, wire="int8", chunks=3)
    built = OverlappedMLP(SIZE, 320, group=group, wire="int8")
    assert ours.wire == built.wire == built.down_proj.wire == "int8"
    x = torch.randn(40, SIZE)
    with torch.no_grad(), comm.record() as counts:
        assert torch.equal(ours(x), torch.cat([plain(part) for part in x.split(even_split(40, 3))]))
    assert counts.total.sent_bytes == 2 * 40 * SIZE // 64 * 67


def test_the_overlapped_mlp_is_the_plain_one_on_its_parts() -> None:
    run_mesh((2, 1), overlapped)


@own_errors()
def refusals(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    unknown = r'`wire` must be "int8", "fp8" or None, got \'int4\''
    for layer in (ColumnParallelLinear, RowParallelLinear, ParallelMLP, OverlappedMLP):
        with pytest.raises(ValueError, match=unknown):
            layer(8, 8, group=groups.tp, wire="int4")
        with pytest.raises(ValueError, match=r"`weight` must be float32, .* got torch.float64; leave out `wire`"):
            layer(8, 8, group=groups.tp, wire="int8", dtype=torch.float64)
    with pytest.raises(ValueError, match=unknown):
        UlyssesAttention(HeadMap(4, 2, 1, 1), 8, group=groups.sp, wire="int4")


def test_bad_formats_are_refused_at_construction() -> None:
    run_mesh((1, 1), refusals)
