"""Decoder layers train over an outer mesh axis, under PyTorch's FSDP2 or DDP, as one process trains on all data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from seqpar import comm
from seqpar.layers import (
    ColumnParallelLinear,
    OverlappedAttention,
    OverlappedMLP,
    ParallelAttention,
    ParallelDecoderLayer,
    ParallelLMHead,
    ParallelMLP,
    ParallelMoE,
    PlacedCore,
    RingAttention,
    RMSNorm,
    USPAttention,
    VocabParallelEmbedding,
    gather_state_dict,
    sync_gradients,
)
from seqpar.partition import HeadMap, ThreePhase
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.layers.test_decoder import HEAD_DIM, Case, my_tokens
from tests.ranks import run_ranks, thinned

Wrap = Literal["fsdp", "ddp"]
REPLICAS, LAYERS, STEPS, SIZE = 2, 2, 20, 11


class Stack(nn.Module):
    """Layers one after another, whatever they take besides the activations."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args)
        return x


def whole(case: Case) -> Stack:
    torch.manual_seed(3)
    sizes = (SIZE, case.num_heads, case.num_kv_heads, HEAD_DIM, case.hidden)
    return Stack([DecoderLayer(*sizes, bias=case.bias, qk_norm=case.qk_norm).double() for _ in range(LAYERS)])


def sliced(case: Case, groups: comm.Groups) -> Stack:
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    return Stack(
        [
            ParallelDecoderLayer.from_module(
                layer, groups=groups, heads=heads, layer_index=i, sequence_sharded=case.sequence_sharded
            )
            for i, layer in enumerate(whole(case).layers)
        ]
    )


def wrapped(stack: Stack, wrap: Wrap, mesh: comm.DeviceMesh) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(stack, process_group=mesh.get_group())
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    return stack


def data(case: Case) -> tuple[Tensor, Tensor]:
    """Activations and targets of every step and replica, [steps, replicas, T, M]."""
    torch.manual_seed(4)
    x, target = torch.randn(2, STEPS, REPLICAS, sum(case.q_lens), SIZE, dtype=torch.float64)
    return x, target


def error(out: Tensor, target: Tensor, tokens: int) -> Tensor:
    """This rank's share of a replica's mean squared error."""
    return (out - target).square().sum() / (tokens * SIZE)


def alone(case: Case) -> tuple[list[float], Stack]:
    """Losses and weights of one process that sees the data of all replicas."""
    stack, (xs, targets) = whole(case), data(case)
    cos, sin = rope(RaggedBatch.prefill(case.q_lens).positions, HEAD_DIM)
    optimizer, losses = torch.optim.AdamW(stack.parameters(), lr=1e-2), []
    for x, target in zip(xs, targets, strict=True):
        optimizer.zero_grad()
        parts = [error(stack(x[i], case.q_lens, cos, sin), target[i], x.shape[1]) for i in range(REPLICAS)]
        loss = torch.stack(parts).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, stack


def together(case: Case, wrap: Wrap, mesh: comm.DeviceMesh) -> tuple[list[float], Stack]:
    """The same of these ranks; a replica's loss is summed over the ranks that share its tokens."""
    groups = comm.groups(mesh["tp", "sp"])
    stack = sliced(case, groups)
    model, (xs, targets) = wrapped(stack, wrap, mesh["dp"]), data(case)
    mine, batch = my_tokens(case, groups, xs.shape[2]), RaggedBatch.prefill(case.q_lens)
    cos, sin = rope(batch.positions, HEAD_DIM)
    optimizer, losses = torch.optim.AdamW(stack.parameters(), lr=1e-2), []
    shares = (groups.sp, groups.tp) if case.sequence_sharded else (groups.sp,)
    for x, target in zip(xs[:, mesh.get_local_rank("dp")], targets[:, mesh.get_local_rank("dp")], strict=True):
        optimizer.zero_grad()
        loss = error(model(x[mine], batch, cos, sin), target[mine], len(x))
        loss.backward()
        sync_gradients(stack, groups)
        optimizer.step()
        total = loss.detach()
        for group in (*shares, mesh.get_group("dp")):
            total = comm.all_reduce(total, group=group)
        losses.append(total.item() / REPLICAS)
    return losses, stack


def trains(rank: int, p: int, layout: tuple[int, int], wrap: Wrap, case: Case) -> None:
    """Losses and weights are those of one process; gradients of Adam's size grow rounding by less than 1e3 a step."""
    mesh = init_device_mesh("cpu", (REPLICAS, *layout), mesh_dim_names=("dp", "tp", "sp"))
    losses, stack = together(case, wrap, mesh)
    expected, oracle = alone(case)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    for layer in stack.layers:
        if isinstance(layer, FSDPModule):
            layer.unshard()
    torch.testing.assert_close(
        gather_state_dict(stack), dict(oracle.named_parameters()), rtol=1e-8, atol=1e-9, check_stride=False
    )


BASE = Case(4, 2, hidden=10, q_lens=(4, 1))
CASES: list[tuple[Wrap, tuple[int, int], Case]] = [
    (wrap, layout, case)
    for wrap in ("fsdp", "ddp")
    for layout in ((2, 1), (1, 2))
    for case in (BASE, replace(BASE, num_kv_heads=1, bias=True, qk_norm=True), replace(BASE, sequence_sharded=True))
]


def _is_fast(case: tuple[Wrap, tuple[int, int], Case]) -> bool:
    return case in (("fsdp", (2, 1), CASES[1][2]), ("ddp", (1, 2), BASE))


@pytest.mark.parametrize("case", thinned(CASES, _is_fast), ids=lambda case: f"{case[0]}-{name_of(case[1])}-{case[2]}")
def test_twenty_steps_over_an_outer_axis_are_those_of_one_process(case: tuple[Wrap, tuple[int, int], Case]) -> None:
    wrap, layout, model = case
    run_ranks(4, trains, layout, wrap, model)


def refused(rank: int, p: int) -> None:
    """Between calls FSDP has the parameters: what would need them says so, and how it goes."""
    mesh = init_device_mesh("cpu", (p, 1, 1), mesh_dim_names=("dp", "tp", "sp"))
    stack = sliced(BASE, comm.groups(mesh["tp", "sp"]))
    (layer, _) = wrapped(stack, "fsdp", mesh["dp"]).layers
    batch = RaggedBatch.prefill(BASE.q_lens)
    x, (cos, sin) = torch.randn(5, SIZE, dtype=torch.float64), rope(batch.positions, HEAD_DIM)
    with comm.record() as sent:
        with pytest.raises(TypeError, match=r"`weight` must be this rank's own tensor, got a DTensor \(S\(0\)\); FSDP"):
            layer.mlp(x)
        with pytest.raises(TypeError, match=r"`self_attn.*weight` must be .* got a DTensor .* load and save weights"):
            layer.state_dict()
        with pytest.raises(TypeError, match=r"`.*weight` must be .* got a DTensor .* by `layer.unshard\(\)`"):
            gather_state_dict(layer)
    assert sent.total.calls == 0
    assert not comm.splits(layer)
    assert layer(x, batch, cos, sin).shape == x.shape


def test_what_needs_the_parameters_between_calls_is_refused() -> None:
    run_ranks(2, refused)


def each_layer(groups: comm.Groups) -> dict[str, tuple[nn.Module, tuple[object, ...], dict[str, object]]]:
    """Layers with parameters, and calls of them: every rank has its tokens of one batch."""
    case = replace(BASE, qk_norm=True)
    sp, tp_rank = groups.sp, groups.tp.rank()
    batch = RaggedBatch.prefill(case.q_lens)
    cos, sin = rope(batch.positions, HEAD_DIM)
    torch.manual_seed(6)
    x = torch.randn(5, SIZE, dtype=torch.float64)[my_tokens(case, groups, 5)]
    shared: dict[str, Any] = {"group": groups.tp, "dtype": torch.float64}
    layer = sliced(case, groups).layers[0]
    core, heads = layer.self_attn.core, HeadMap(case.num_heads, case.num_kv_heads, groups.layout.tp, 1)
    split = comm.split_groups(sp, sp.size())
    inner = {
        "RingAttention": RingAttention(heads, HEAD_DIM, group=sp, tp_rank=tp_rank, placement="contiguous"),
        "USPAttention": USPAttention(heads, HEAD_DIM, groups=split, tp_rank=tp_rank, placement="contiguous"),
    }
    for name, placed in inner.items():
        layer.self_attn.add_core(name, PlacedCore(placed, beside=core))
    cut = ThreePhase(1, 2, 0)
    source = whole(case).layers[0]
    split_heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    made: dict[str, tuple[nn.Module, tuple[object, ...], dict[str, object]]] = {
        "RMSNorm": (RMSNorm(SIZE, dtype=torch.float64), (x,), {}),
        "ColumnParallelLinear": (ColumnParallelLinear(SIZE, 6, **shared), (x,), {}),
        "ParallelMLP": (ParallelMLP(SIZE, 10, **shared), (x,), {}),
        "OverlappedMLP": (OverlappedMLP(SIZE, 10, **shared), (x,), {}),
        "ParallelMoE": (ParallelMoE(SIZE, 4, 4, 2, groups=groups, dtype=torch.float64), (x,), {}),
        "VocabParallelEmbedding": (VocabParallelEmbedding(9, SIZE, **shared), (torch.arange(len(x)),), {}),
        "ParallelLMHead": (
            ParallelLMHead(SIZE, 9, group=groups.flat, seq_group=sp, dtype=torch.float64),
            (torch.ones(3, SIZE, dtype=torch.float64),),
            {},
        ),
        "OverlappedAttention": (
            OverlappedAttention.from_module(source.self_attn, groups=groups, heads=split_heads, pipeline=cut),
            (x, batch, cos, sin),
            {},
        ),
        "PipelinedUlysses": (
            ParallelAttention.from_module(source.self_attn, groups=groups, heads=split_heads, pipeline=cut),
            (x, batch, cos, sin),
            {},
        ),
    }
    return made | {name: (layer, (x, batch, cos, sin), {"core": name}) for name in inner}


def twins(rank: int, p: int, layout: tuple[int, int]) -> None:
    """On replicas with the same tokens, the mean of gradients that FSDP keeps is the gradient without it."""
    mesh = init_device_mesh("cpu", (REPLICAS, *layout), mesh_dim_names=("dp", "tp", "sp"))
    groups = comm.groups(mesh["tp", "sp"])
    torch.manual_seed(8)
    plain = each_layer(groups)
    torch.manual_seed(8)
    shared = each_layer(groups)
    for name, (alone, args, options) in plain.items():
        sharded = shared[name][0]
        if not isinstance(sharded, FSDPModule):
            fully_shard(sharded, mesh=mesh["dp"])
        for module in (alone, sharded):
            module.zero_grad()
            out = module(*args, **options)
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
            sync_gradients(module, groups)
        for (path, mine), theirs in zip(sharded.named_parameters(), alone.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            found = mine.grad.full_tensor()
            torch.testing.assert_close(
                found, theirs.grad, rtol=1e-12, atol=1e-13, msg=lambda text, at=f"{name}.{path}": f"{at}: {text}"
            )


@pytest.mark.parametrize("layout", thinned([(2, 1), (1, 2)], (1, 2).__eq__), ids=name_of)
def test_every_layer_with_parameters_is_sharded_over_an_outer_axis(layout: tuple[int, int]) -> None:
    run_ranks(4, twins, layout)
