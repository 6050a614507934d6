"""Experts on sorted rows against one product per token and expert, and the route there and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import combine, experts, route, sort_by_expert
from seqpar.kernels.experts import pytorch, reference
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def packed(gate: Tensor, up: Tensor, blocks: list[int]) -> Tensor:
    """gate0 | up0 | gate1 | up1 ... along dim 1, of [E, F, M] each."""
    pairs = zip(gate.split(blocks, 1), up.split(blocks, 1), strict=True)
    return torch.cat([part for pair in pairs for part in pair], 1)


def mixture(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The formula, token by token."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            out[t] += weights[t, k] * (down[e] @ (F.silu(gate[e] @ x[t]) * (up[e] @ x[t])))
    return out


def whole(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, blocks: list[int], backend: str
) -> Tensor:
    """All parts one after another, as a layer has them."""
    order, counts = sort_by_expert(ids, len(down))
    rows = experts(x[order // ids.shape[1]], gate_up, down, counts, blocks, backend=backend)
    return combine(rows, weights, order)


@backends
@given(
    tokens=st.integers(0, 7),
    count=st.integers(1, 6),
    data=st.data(),
    blocks=st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_row_meets_its_expert(
    backend: str, tokens: int, count: int, data: st.DataObject, blocks: list[int]
) -> None:
    """Integers that no dtype rounds: also no tokens, all of one expert, experts without rows, K = E, and F = 0."""
    top_k = data.draw(st.integers(1, count))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    skew = data.draw(st.sampled_from([0.0, 9.0]))  # the first experts are everybody's
    ids = (torch.rand(tokens, count, generator=rng) + skew * (torch.arange(count) < top_k)).topk(top_k).indices
    width = sum(blocks)
    x, weights = torch.randint(1, 3, (tokens, 2), generator=rng), torch.randint(1, 4, ids.shape, generator=rng)
    gate, up = 64 * torch.ones(count, width, 2), torch.randint(0, 3, (count, width, 2), generator=rng)
    down = torch.randint(-2, 3, (count, 2, width), generator=rng)
    x, gate, up, down, weights = (t.double() for t in (x, gate, up, down, weights))
    found = whole(x, packed(gate, up, blocks), down, ids, weights, blocks, backend)
    assert torch.equal(found, mixture(x, gate, up, down, ids, weights))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_those_of_the_formula(backend: str, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest number of each row, on views of rows and columns too."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(5, 7, 6) / 3, torch.randn(5, 7, 6) / 3, torch.randn(5, 6, 7) / 3
    x, ids = torch.randn(9, 6), torch.rand(9, 5).topk(3).indices
    weights = torch.rand(9, 3)
    x, gate, up, down = (t.to(dtype) for t in (x, gate, up, down))
    want = mixture(x.double(), gate.double(), up.double(), down.double(), ids, weights.double())
    blocks = [4, 3]
    found = whole(x, packed(gate, up, blocks), down, ids, weights, blocks, backend)
    assert found.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps * want.abs().amax(1, keepdim=True)
    assert ((found.double() - want).abs() <= bound).all()
    view = torch.cat([down[:, :, :2], down], 2)[:, :, 2:]
    assert not view.is_contiguous()
    assert torch.equal(whole(x, packed(gate, up, blocks), view, ids, weights, blocks, backend), found)


def test_grouped_products_are_one_for_each_expert() -> None:
    """What runs on CUDA, where PyTorch has it on a CPU: experts without rows, columns of wider weights, gradients."""
    torch.manual_seed(2)
    wide = torch.randn(4, 16, 48)
    gate_up, down = torch.randn(4, 32, 16) / 4, wide[:, :, 16:32]
    x, counts = torch.randn(7, 16), torch.tensor([0, 4, 0, 3])
    results = []
    for run in (pytorch.grouped, reference.experts):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate_up, wide)]
        out = run(leaves[0], leaves[1], leaves[2][:, :, 16:32], counts, [8, 8])
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(pytorch.grouped(x, gate_up, down, counts, [8, 8]), results[1][0])


@backends
def test_gradients(backend: str) -> None:
    torch.manual_seed(1)
    x, gate_up, down, weights = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (3, 4, 3), (3, 3, 2), (4, 2))
    )
    ids = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2]])  # nobody takes expert 1
    torch.autograd.gradcheck(lambda *args: whole(*args[:3], ids, args[3], [2], backend), (x, gate_up, down, weights))


@backends
def test_no_rows_leave_a_way_back(backend: str) -> None:
    """A rank that receives nothing must still take part in the others' backward."""
    x, gate_up, down = (torch.ones(shape, requires_grad=True) for shape in ((0, 2), (3, 4, 2), (3, 2, 2)))
    out = experts(x, gate_up, down, torch.zeros(3, dtype=torch.int64), [2], backend=backend)
    assert out.shape == (0, 2) and out.requires_grad
    out.sum().backward()
    assert x.grad is not None and not gate_up.grad.any() and not down.grad.any()


def test_the_route_is_a_softmax_and_its_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, -1.0, 5.0]], dtype=torch.bfloat16)
    for renormalise in (True, False):
        weights, ids = route(logits, 2, renormalise=renormalise)
        assert weights.dtype == torch.float32 and ids[0].tolist() == [1, 3] and set(ids[1].tolist()) == {0, 3}
        probs = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
        want = probs.gather(1, ids)
        want = want / want.sum(1, keepdim=True) if renormalise else want
        torch.testing.assert_close(weights.double(), want, rtol=1e-6, atol=0)
    assert route(logits.double(), 4)[0].dtype == torch.float64
    assert route(logits[:0], 3)[1].shape == (0, 3)


def test_sums_are_in_float32() -> None:
    """256 + 1 + 1 in bfloat16 steps would stay 256; the order is that of the experts, and the rounding one."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    out = combine(rows, torch.ones(1, 3), torch.tensor([0, 1, 2]))
    assert out.dtype == torch.bfloat16 and out.item() == 258


def test_sorting_keeps_the_order_of_tokens() -> None:
    order, counts = sort_by_expert(torch.tensor([[2, 0], [0, 2], [2, 1]]), 4)
    assert order.tolist() == [1, 2, 5, 0, 3, 4] and counts.tolist() == [2, 1, 3, 0]


@own_errors()
def test_bad_input_is_refused() -> None:
    x, gate_up, down, counts = torch.ones(2, 3), torch.ones(4, 10, 3), torch.ones(4, 3, 5), torch.tensor([2, 0, 0, 0])
    with pytest.raises(ValueError, match=r"`gate_up` and `down` must have shapes \[4, 8, 3\] and \[4, 3, 4\], got"):
        experts(x, gate_up, down, counts, [4])
    with pytest.raises(ValueError, match=r"`counts` must sum to the rows of `x` \(2\), got 3"):
        experts(x, gate_up, down, counts + torch.tensor([0, 1, 0, 0]), [5])
    with pytest.raises(ValueError, match='`backend` must be one of "auto", "torch", "reference", got \'triton\''):
        experts(x, gate_up, down, counts, [5], backend="triton")  # type: ignore[arg-type]
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=rf"`top_k` must lie in \[1, 4\] \(the experts\), got {top_k}"):
            route(torch.ones(2, 4), top_k)
    with pytest.raises(ValueError, match=r"`rows` and `order` must have one entry for each of `weights` \(6\), got 2"):
        combine(x, torch.ones(2, 3), torch.arange(6))
