"""The MLP that hides its own sums: equal to the one that does not, with all parts in flight before the first wait."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqpar import comm
from seqpar.layers import OverlappedMLP, ParallelMLP
from tests.layers.reference import MLP, name_of
from tests.ranks import run_mesh


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
