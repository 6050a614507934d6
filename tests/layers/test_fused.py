"""A decoder layer whose attention is summed on symmetric memory, together with the residual and the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seqpar import comm
from seqpar.comm import DeviceMesh
from seqpar.layers import ParallelAttention, ParallelDecoderLayer, name_modules
from seqpar.partition import HeadMap, Layout
from seqpar.ragged import RaggedBatch
from tests.comm.test_symmetric import mapped_files
from tests.layers.reference import DecoderLayer, rope
from tests.ranks import run_mesh, thinned

WIDTH, HEAD_DIM = 16, 6


def parallel(mesh: DeviceMesh, **options: Any) -> ParallelDecoderLayer:
    torch.manual_seed(3)
    groups = comm.groups(mesh)
    bias = options.pop("bias", False)
    layer = DecoderLayer(WIDTH, 4, 2, HEAD_DIM, 24, bias=bias)
    heads = HeadMap(4, 2, *groups.layout)
    new = ParallelDecoderLayer.from_module(layer, groups=groups, heads=heads, **options)
    name_modules(nn.ModuleDict({"layer": new}))
    return new


def fused(mesh: DeviceMesh, folder: str) -> None:
    """The same up to the norm's rounding; one launch instead of a sum. With hooks, and without memory, bit for bit."""
    groups = comm.groups(mesh)
    layer = parallel(mesh)
    batch = RaggedBatch.prefill((5, 2), device="cpu")
    cos, sin = (table.float() for table in rope(batch.positions, HEAD_DIM))
    x, tail = torch.randn(7, WIDTH), batch.tail((4, 6))
    with torch.no_grad(), mapped_files(folder):
        before, last = layer(x, batch, cos, sin), layer(x, batch, cos, sin, tail=tail)
        memory = comm.SymmetricMemory(7 * WIDTH * 4, group=groups.tp, device="cpu", blocks=2)
        layer.fuse(memory)
        for layout in (None, groups.layout):
            with comm.record() as counts:
                torch.testing.assert_close(layer(x, batch, cos, sin, layout=layout), before)
            assert sorted(counts.counts) == [
                ("all_reduce", "layer.mlp.down_proj"),
                ("all_reduce_norm", "layer.self_attn.o_proj"),
            ]
        torch.testing.assert_close(layer(x, batch, cos, sin, tail=tail), last)
        hook = layer.self_attn.o_proj.register_forward_hook(lambda *_: None)
        assert torch.equal(layer(x, batch, cos, sin), before)
        hook.remove()
        layer.fuse(None)
        assert torch.equal(layer(x, batch, cos, sin), before)
        layer.fuse(memory)
    with pytest.raises(ValueError, match="must need no gradient with `memory`"):
        layer(x.requires_grad_(), batch, cos, sin)
    refusals(mesh, layer, memory, Path(folder) / str(groups.tp.rank()))


def refusals(mesh: DeviceMesh, layer: ParallelDecoderLayer, memory: comm.SymmetricMemory, folder: Path) -> None:
    folder.mkdir()
    with mapped_files(str(folder)):
        other = comm.SymmetricMemory(100, group=comm.groups(mesh).sp, device="cpu")
    for options in ({"sequence_sharded": True}, {"wire": "int8"}, {"bias": True}):
        with pytest.raises(
            ValueError, match="`fuse` must be asked of layers whose activations are not sequence-sharded"
        ):
            parallel(mesh, **options).fuse(memory)
    other_kind = parallel(mesh)
    other_kind.self_attn.__class__ = type("Another", (ParallelAttention,), {})
    with pytest.raises(TypeError, match="`self_attn` must be a ParallelAttention to be fused, got Another"):
        other_kind.fuse(memory)
    with pytest.raises(ValueError, match=r"`layout` must be one of"):
        layer.fuse(memory, layout=Layout(1, 2))
    with pytest.raises(ValueError, match="`memory` must be of group"):
        layer.fuse(other)
    layer.post_attention_layernorm = nn.LayerNorm(WIDTH)
    with pytest.raises(ValueError, match=r"`post_attention_layernorm` must be an RMSNorm, got LayerNorm"):
        layer.fuse(memory)


@pytest.mark.parametrize("tp", thinned([2, 3], lambda tp: tp == 2))
def test_a_layer_on_symmetric_memory(tp: int, tmp_path: Path) -> None:
    run_mesh((tp, 1), fused, str(tmp_path), deterministic=True)
