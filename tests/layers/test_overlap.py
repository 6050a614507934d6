"""Layers that hide their own collectives: equal to those that do not, and launched before the others are waited for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import OverlappedAttention, OverlappedMLP, ParallelAttention, ParallelMLP
from seqpar.partition import HeadMap, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import MLP, Attention, name_of, rope
from tests.ranks import run_mesh, thinned


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, dtype=torch.float64)


def linear_gate(mlp: MLP) -> MLP:
    """Integer weights and a gate so large that SiLU is the identity: no rounding, so that results compare exactly."""
    with torch.no_grad():
        for param in mlp.parameters():
            param.copy_(integers(*param.shape))
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(64.0)
    return mlp


def equal(mesh: comm.DeviceMesh, tokens: int, chunks: int) -> None:
    groups = comm.groups(mesh)
    torch.manual_seed(4)
    source = linear_gate(MLP(6, 9, bias=True).double())
    plain = ParallelMLP.from_module(source, group=groups.tp, sp=groups.layout.sp)
    ours = OverlappedMLP.from_module(source, group=groups.tp, sp=groups.layout.sp, chunks=chunks)
    x, seed = integers(tokens, 6), integers(tokens, 6)
    grads = []
    for mlp in (plain, ours):
        local = x.clone().requires_grad_()
        out = mlp(local)
        (out * seed).sum().backward()
        grads.append((out, local.grad, mlp.down_proj.weight.grad, mlp.gate_up_proj.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert all(torch.equal(a, b) for a, b in zip(*(each[1:3] for each in grads), strict=True))
    torch.testing.assert_close(grads[0][3], grads[1][3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (3, 1), (2, 2)], ids=name_of)
@pytest.mark.parametrize(("tokens", "chunks"), [(8, 2), (7, 3), (1, 2), (0, 2), (5, 4)])
def test_equals_the_mlp_that_does_not_overlap_exactly(layout: tuple[int, int], tokens: int, chunks: int) -> None:
    run_mesh(layout, equal, tokens, chunks)


def in_flight(mesh: comm.DeviceMesh) -> tuple[int, int]:
    """Sums launched when the first one is handed out to be waited for, and in all."""
    group = comm.groups(mesh).tp
    steps = OverlappedMLP(6, 9, group=group, chunks=3).steps(torch.ones(9, 6))
    with comm.record() as sent, torch.no_grad():
        handle = next(steps)
        launched = sent.total.calls
        try:
            while True:
                handle = steps.send(handle.wait())
        except StopIteration:
            return launched, sent.total.calls


def test_every_part_is_in_flight_before_the_first_is_waited_for() -> None:
    assert run_mesh((2, 1), in_flight) == [(3, 3), (3, 3)]


def refusals(mesh: comm.DeviceMesh) -> None:
    group = comm.groups(mesh).tp
    with pytest.raises(ValueError, match="`chunks` must be at least 2, got 1; ParallelMLP does not cut"):
        OverlappedMLP(4, 6, group=group, chunks=1)
    with pytest.raises(ValueError, match="`sequence_sharded` must be False for a layer that cuts its own tokens"):
        OverlappedMLP.from_module(MLP(4, 6, bias=False), group=group, sequence_sharded=True)
    mlp = OverlappedMLP(4, 6, group=group)
    mlp.down_proj.register_forward_hook(lambda *_: None)
    with comm.record() as sent, pytest.raises(ValueError, match="`down_proj` must be callable in steps, got hooks"):
        mlp(torch.ones(4, 4))
    mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match="`down_proj` must be callable in steps"):
        mlp(torch.ones(4, 4))
    assert sent.total.calls == 0


def test_what_would_not_overlap_is_refused() -> None:
    run_mesh((2, 1), refusals)


def attentions(
    mesh: comm.DeviceMesh, source: Attention, chunks: int, window: int | None
) -> tuple[ParallelAttention, ParallelAttention]:
    """The layer that does not overlap and the one that does, of the same weights."""
    groups = comm.groups(mesh)
    heads = HeadMap(source.num_heads, source.num_kv_heads, *groups.layout)
    plain = ParallelAttention.from_module(source, groups=groups, heads=heads, window=window)
    ours = OverlappedAttention.from_module(
        source, groups=groups, heads=heads, window=window, pipeline=ThreePhase(1, chunks, 0)
    )
    return plain, ours


def attends(mesh: comm.DeviceMesh, q_lens: tuple[int, ...], chunks: int, window: int | None) -> None:
    """Outputs and gradients without a cache, then ragged steps over one."""
    groups = comm.groups(mesh)
    torch.manual_seed(5)
    source = Attention(10, 6, 3, 4, bias=True, qk_norm=True).double()
    layers = attentions(mesh, source, chunks, window)
    total = sum(q_lens)
    x, seed = torch.randn(2, total, 10, dtype=torch.float64)
    mine = slice(*even_ranges(total, groups.sp.size())[groups.sp.rank()])
    found = []
    for layer in layers:
        local = x[mine].clone().requires_grad_()
        batch = RaggedBatch.prefill(q_lens)
        out = layer(local, batch, *rope(batch.positions, 4))
        (out * seed[mine]).sum().backward()
        found.append([out, local.grad, *(param.grad for _, param in sorted(layer.named_parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    caches = [PagedKV(1, 20, 3, layer.core.num_kv_heads, 4, dtype=torch.float64) for layer in layers]
    for step in (q_lens, (2, 1, 3)[: len(q_lens)], (1,) * len(q_lens)):
        x = torch.randn(sum(step), 10, dtype=torch.float64)
        mine = slice(*even_ranges(len(x), groups.sp.size())[groups.sp.rank()])
        outs = []
        for layer, kv in zip(layers, caches, strict=True):
            batch = kv.batch(range(len(step)), step)
            with torch.no_grad():
                outs.append(layer(x[mine], batch, *rope(batch.positions, 4), kv))
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layout",
    thinned([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)], ((2, 1), (1, 2), (2, 2)).__contains__),
    ids=name_of,
)
@pytest.mark.parametrize(
    ("q_lens", "chunks", "window"), [((9,), 2, None), ((5, 0, 6), 3, 4), ((1, 1), 2, None), ((2, 7, 1), 4, None)]
)
def test_attention_equals_the_one_that_does_not_overlap(
    layout: tuple[int, int], q_lens: tuple[int, ...], chunks: int, window: int | None
) -> None:
    run_mesh(layout, attends, q_lens, chunks, window)


def exactly(mesh: comm.DeviceMesh, chunks: int) -> None:
    """Integer weights, and scores so far apart that every token reads one key alone: no rounding."""
    groups = comm.groups(mesh)
    torch.manual_seed(6)
    source = Attention(5, 4, 2, 4, bias=True).double()
    with torch.no_grad():
        for param in source.parameters():
            param.copy_(integers(*param.shape))
        source.q_proj.weight.zero_()
        source.q_proj.bias.fill_(0).view(4, 4)[:, 0] = 4096.0  # head dim 4: scores differ by 2048 or more
        source.k_proj.weight.zero_()
        source.k_proj.weight.view(2, 4, 5)[:, 0, 0] = 1.0
    x = integers(13, 5)
    x[:, 0] = torch.randperm(13).double()  # whose key is read is no matter of order
    mine = slice(*even_ranges(13, groups.sp.size())[groups.sp.rank()])
    with torch.no_grad():
        plain, ours = (layer(x[mine], RaggedBatch.prefill([8, 5])) for layer in attentions(mesh, source, chunks, None))
    assert torch.equal(plain, ours) and torch.equal(plain, plain.round())


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=name_of)
def test_attention_equals_exactly_where_nothing_rounds(layout: tuple[int, int]) -> None:
    run_mesh(layout, exactly, 2)
    run_mesh(layout, exactly, 3)


def attention_in_flight(mesh: comm.DeviceMesh) -> str:
    """Launches (L) and waits (W) in order, by the number of the launch."""
    source = Attention(8, 8, 4, 4, bias=False)
    _, ours = attentions(mesh, source, 3, None)
    with torch.no_grad(), comm.trace() as t:
        ours(torch.ones(12 // comm.groups(mesh).layout.sp, 8), RaggedBatch.prefill([12]))
    sent = sorted(i.launched_s for i in t.intervals if i.kind == "comm")
    events = [(launched, f"L{n}") for n, launched in enumerate(sent)]
    events += [(i.start_s, f"W{sent.index(i.launched_s)}") for i in t.intervals if i.kind == "wait"]
    return " ".join(what for _, what in sorted(events))


def test_attention_launches_before_it_waits() -> None:
    """With tp, all three sums before the first wait. With sp, K Q V Q Q, then each way back before it is asked for."""
    assert run_mesh((2, 1), attention_in_flight)[0] == "L0 L1 L2 W0 W1 W2"
    ways_in, sums = "L0 L1 L2 L3 L4 W0 W1 W2", "W7 W9 W10"
    assert run_mesh((2, 2), attention_in_flight)[0] == f"{ways_in} L5 W3 L6 W5 L7 W4 L8 W6 L9 W8 L10 {sums}"


def attention_refusals(mesh: comm.DeviceMesh) -> None:
    groups, source = comm.groups(mesh), Attention(6, 4, 4, 4, bias=False)
    heads = HeadMap(4, 4, *groups.layout)
    for pipeline in (None, ThreePhase(2, 2)):
        with pytest.raises(ValueError, match="`core` must be a PipelinedUlysses of one head group, got"):
            OverlappedAttention.from_module(source, groups=groups, heads=heads, pipeline=pipeline)
    with pytest.raises(ValueError, match="`sequence_sharded` must be False for a layer that cuts its own tokens"):
        OverlappedAttention.from_module(
            source, groups=groups, heads=heads, pipeline=ThreePhase(1, 2), sequence_sharded=True
        )
    _, ours = attentions(mesh, source, 2, None)
    ours.o_proj.register_forward_hook(lambda *_: None)
    with comm.record() as sent, pytest.raises(ValueError, match="`o_proj` must be callable in steps, got hooks"):
        ours(torch.ones(4, 6), RaggedBatch.prefill([4]))
    assert sent.total.calls == 0


def test_attention_that_would_not_overlap_is_refused() -> None:
    run_mesh((2, 1), attention_refusals)
