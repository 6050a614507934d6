"""The product against float64, on whole weights and on views, by both libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.kernels import linear, linear_backend
from seqpar.kernels.linear import onednn

AVAILABLE = torch.backends.mkldnn.is_available()
BACKENDS = ["auto", "torch", *(["onednn"] if AVAILABLE else [])]


@pytest.mark.skipif(not AVAILABLE, reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("maker", [onednn.INTEL, onednn.OTHERS], ids=["Intel", "others"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 12, 15, 16, 17, 64, 65, 128, 129, 193])
@pytest.mark.parametrize("f", [64, 72])
def test_every_form_of_the_product_is_exact(
    maker: onednn._Pays, tokens: int, f: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_pays", lambda: maker)
    x, weight = torch.randint(-9, 10, (tokens, 48)).float(), torch.randint(-9, 10, (f, 48)).float()
    out = linear(x, weight, backend="onednn")
    assert torch.equal(out.double(), x.double() @ weight.double().T)
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["whole", "rows", "columns"]),
)
def test_integers_multiply_exactly(backend: str, tokens: int, m: int, f: int, with_bias: bool, view: str) -> None:
    stored = torch.randint(-9, 10, (f + 5, m + 7)).float()
    weight = {"whole": stored, "rows": stored[2 : 2 + f], "columns": stored[:, 3 : 3 + m]}[view]
    if backend == "onednn" and not weight.is_contiguous():
        weight = weight.contiguous()
    x = torch.randint(-9, 10, (tokens, weight.shape[1])).float()
    bias = torch.arange(weight.shape[0]).float() if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    kept = x.clone()
    assert torch.equal(linear(x, weight, bias, backend=backend).double(), expected)
    assert torch.equal(x, kept)


@pytest.mark.skipif(not AVAILABLE, reason="PyTorch was built without oneDNN")
def test_rounding_is_within_the_bound_of_any_order_of_summation() -> None:
    """A sum of n products in any order errs by at most n * 2**-24 * sum|x w| (+ second order); rms near PyTorch's."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(96, 512)
    exact = x.double() @ weight.double().T
    error = linear(x, weight, backend="onednn") - exact
    assert (error.abs() <= 513 * 2**-24 * (x.double().abs() @ weight.double().abs().T)).all()
    assert error.square().mean().sqrt() <= 2.5 * (F.linear(x, weight) - exact).square().mean().sqrt()


def test_auto_leaves_to_pytorch_what_the_other_cannot_do_well() -> None:
    x, weight = torch.randn(8, 512), torch.randn(512, 512)
    best = "onednn" if AVAILABLE else "torch"
    assert linear_backend(x, weight) == best
    assert linear_backend(x, weight.requires_grad_()) == "torch"
    with torch.no_grad():
        assert linear_backend(x, weight) == best
    weight = weight.detach()
    assert linear_backend(x, weight[:511]) == "torch"
    assert linear_backend(x[:0], weight) == "torch"
    assert linear_backend(x.double(), weight.double()) == "torch"
    assert linear_backend(x.bfloat16(), weight.bfloat16()) == "torch"
    assert linear_backend(x, torch.randn(1024, 1024)[:, :512]) == "torch"
    with pytest.raises(ValueError, match='`backend` must be "torch" for this product, got "onednn"'):
        linear(x.double(), weight.double(), backend="onednn")


def test_gradients_flow() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))
