"""SwiGLU over packed sub-blocks against the formula on separate matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.kernels import swiglu
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
uneven = st.lists(st.integers(0, 5), min_size=1, max_size=5)
even = st.builds(lambda size, more, rest: [size + 1] * more + [size] * rest, *[st.integers(0, 4)] * 3).filter(bool)


def packed(gate: torch.Tensor, up: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    pairs = zip(gate.split(blocks, 1), up.split(blocks, 1), strict=True)
    return torch.cat([part for pair in pairs for part in pair], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@given(blocks=uneven | even, tokens=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_every_column_meets_its_own(backend: str, dtype: torch.dtype, blocks: list[int], tokens: int) -> None:
    """Gates so large that silu leaves them as they are, position-coded."""
    place = torch.arange(tokens * sum(blocks)).view(tokens, sum(blocks))
    gate, up = (64 + place).to(dtype), (1 + place % 7).to(dtype)
    buffer = torch.cat([torch.randn(tokens, 3).to(dtype), packed(gate, up, blocks)], 1)  # a view of a wider one
    before = buffer.clone()
    out = swiglu(buffer[:, 3:], blocks, backend=backend)
    torch.testing.assert_close(out, gate * up, rtol=0, atol=0)
    assert out.is_contiguous() and torch.equal(buffer, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_are_those_of_the_formula(backend: str, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(2, 5, 37) * 4).to(dtype)
    want = F.silu(gate.double()) * up.double()
    got = swiglu(packed(gate, up, [19, 18]), [19, 18], backend=backend)
    # silu and the product round once each, exp and the quotient in silu's own precision
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("blocks", [[5], [3, 2]])
def test_a_consumed_projection_gives_the_same_values(blocks: list[int]) -> None:
    gate_up = torch.randn(4, 10)
    want = swiglu(gate_up.clone(), blocks)
    assert torch.equal(swiglu(gate_up, blocks, consume=True), want)
    trained = torch.randn(4, 10, requires_grad=True)
    kept = trained.detach().clone()
    swiglu(trained, blocks, consume=True).sum().backward()
    assert torch.equal(trained, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: swiglu(x, (3, 2, 2), backend=backend), (x,))


@pytest.mark.parametrize(("columns", "blocks"), [(8, (2, 1)), (6, (4, -1)), (0, ())])
@own_errors()
def test_bad_input_is_refused(columns: int, blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`gate_up` must have a gate and an up column .* got {columns} for blocks"):
        swiglu(torch.zeros(2, columns), blocks)
