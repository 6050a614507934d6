"""DTensors at the boundary: layers refuse them by name and take and give what one rank holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from seqpar import comm
from seqpar.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    ParallelMLP,
    ParallelMoE,
    PlacedCore,
    RingAttention,
    RMSNorm,
    RowParallelLinear,
    UlyssesAttention,
    VocabParallelEmbedding,
)
from seqpar.partition import HeadMap
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.test_decoder import Case, inputs, my_tokens, parallel, reference
from tests.ranks import run_mesh

HEADS, HEAD_DIM, SIZE = 4, 2, 8


def calls(mesh: comm.DeviceMesh) -> dict[str, Callable[[], Tensor]]:
    """Every layer with a DTensor for what the tokens are in."""
    groups = comm.groups(mesh)
    batch, heads = RaggedBatch.prefill((4,)), HeadMap(HEADS, HEADS, *groups.layout)
    x = DTensor.from_local(torch.randn(2, SIZE), mesh["sp"], [Shard(0)])
    qkv = DTensor.from_local(torch.randn(2, 3 * SIZE), mesh["sp"], [Shard(0)])
    q = DTensor.from_local(torch.randn(2, HEADS, HEAD_DIM), mesh["sp"], [Shard(0)])
    ids = DTensor.from_local(torch.arange(2), mesh["sp"], [Shard(0)])
    core, ring = UlyssesAttention(heads, HEAD_DIM, group=groups.sp), RingAttention(heads, HEAD_DIM, group=groups.sp)
    mixture = ParallelMoE(SIZE, 4, 4, 2, groups=groups)
    layers: dict[str, tuple[nn.Module, tuple[object, ...]]] = {
        "x of a column linear": (ColumnParallelLinear(SIZE, 6, group=groups.tp), (x,)),
        "x of a row linear": (RowParallelLinear(SIZE, 6, group=groups.tp), (x,)),
        "x of an MLP": (ParallelMLP(SIZE, 12, group=groups.tp), (x,)),
        "x of a mixture": (mixture, (x,)),
        "x of a norm": (RMSNorm(SIZE), (x,)),
        "x of a head": (ParallelLMHead(SIZE, 9, group=groups.flat, seq_group=groups.sp), (x,)),
        "ids of an embedding": (VocabParallelEmbedding(9, SIZE, group=groups.tp), (ids,)),
        "qkv of an attention": (core, (qkv, batch)),
        "qkv of a placed attention": (PlacedCore(ring, beside=core), (qkv, batch)),
        "q of a ring": (ring, (q, q.to_local(), q.to_local(), batch)),
    }
    case = Case(8, 2)
    layer, (rows, tokens, cos, sin) = parallel(case, mesh, reference(case)), inputs(case)
    placed = DTensor.from_local(rows[my_tokens(case, groups, len(rows))], mesh["sp"], [Shard(0)])
    layers["x of a decoder layer"] = (layer, (placed, tokens, cos, sin))
    layers["x of an attention block"] = (layer.self_attn, (placed, tokens, cos, sin))
    return {name: lambda layer=layer, args=args: layer(*args) for name, (layer, args) in layers.items()}


def refused(mesh: comm.DeviceMesh) -> None:
    for what, call in calls(mesh).items():
        name = what.split()[0]
        with comm.record() as sent, own_errors():
            match = rf"`{name}` must be this rank's own tensor, got a DTensor \(S\(0\)\); pass `.to_local\(\)`"
            with pytest.raises(TypeError, match=match):
                call()
        assert sent.total.calls == 0, what


def test_a_dtensor_is_refused_by_name_before_anything_is_sent() -> None:
    run_mesh((1, 2), refused)


def weights(mesh: comm.DeviceMesh) -> None:
    group, linear = comm.groups(mesh).tp, nn.Linear(SIZE, 6, bias=False)
    whole = linear.weight.detach().clone()
    linear.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
    layer = ColumnParallelLinear(SIZE, 6, group=group, bias=False)
    with own_errors():
        with pytest.raises(TypeError, match=r"`weight` must be .*, got a DTensor \(S\(0\)\); pass `.full_tensor\(\)`"):
            ColumnParallelLinear.from_linear(linear, group=group)
        with pytest.raises(TypeError, match=r"`weight` must be .*, got a DTensor \(S\(0\)\); pass `.full_tensor\(\)`"):
            layer.load_state_dict({"weight": linear.weight})
    layer.load_state_dict({"weight": linear.weight.full_tensor()})
    mine = 3 * group.rank()
    torch.testing.assert_close(layer.weight, whole[mine : mine + 3], rtol=0, atol=0)


def test_weights_of_a_dtensor_are_given_whole() -> None:
    run_mesh((2, 1), weights)


def recipe(mesh: comm.DeviceMesh) -> None:
    """In by `to_local`, out by `from_local`: values and gradients are those of the layer on plain tensors."""
    groups = comm.groups(mesh)
    mlp = ParallelMLP(SIZE, 12, group=groups.tp)
    whole = torch.randn(4, SIZE)
    x = distribute_tensor(whole, mesh, [Replicate(), Shard(0)]).requires_grad_()
    out = DTensor.from_local(mlp(x.to_local()), mesh, x.placements)
    out.square().sum().backward()
    mine = slice(2 * groups.sp.rank(), 2 * groups.sp.rank() + 2)
    plain = whole[mine].clone().requires_grad_()
    mlp(plain).square().sum().backward()
    assert x.grad is not None and plain.grad is not None and x.grad.placements == x.placements
    torch.testing.assert_close(x.grad.to_local(), plain.grad, rtol=0, atol=0)
    torch.testing.assert_close(out.full_tensor()[mine], mlp(whole[mine]), rtol=0, atol=0)


def test_in_and_out_by_two_lines() -> None:
    run_mesh((2, 2), recipe)


def on_parts(mesh: comm.DeviceMesh) -> None:
    """Shards of an uneven DTensor are changed in place of it, and a whole is sliced as it was."""
    values = torch.arange(10.0).view(5, 2)
    x = distribute_tensor(values, mesh["tp"], [Shard(0)])
    doubled = comm.on_shards(x, lambda shard: 2 * shard)
    turned = comm.on_whole(x, lambda whole: whole.flip(0))
    assert doubled.placements == turned.placements == x.placements and doubled.shape == turned.shape == x.shape
    torch.testing.assert_close(doubled.full_tensor(), 2 * values, rtol=0, atol=0)
    torch.testing.assert_close(turned.full_tensor(), values.flip(0), rtol=0, atol=0)
    for plain in (comm.on_shards(values, torch.neg), comm.on_whole(values, torch.neg)):
        assert torch.equal(plain, -values)


def test_parts_and_wholes() -> None:
    run_mesh((2, 1), on_parts)
