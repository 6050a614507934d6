"""The RMS norm is Llama's: the definition bit for bit, the fast form within Llama's own rounding error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from seqpar.kernels import rms_norm
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = LlamaRMSNorm(x.shape[-1], EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 64), (3, 5, 16), (2, 4096), (1, 1), (0, 8)], ids=str)
def test_reference_is_llama(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, EPS, backend="reference"), llama(x, weight), rtol=0, atol=0)
    mixed = rms_norm(x, weight.float(), EPS, backend="reference")
    torch.testing.assert_close(mixed, llama(x, weight.float()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@given(rows=st.integers(0, 5), columns=st.sampled_from([1, 3, 64, 1000, 8192]), size=st.sampled_from([1e-4, 1, 1e3]))
@settings(max_examples=40, deadline=None)
def test_torch_rounds_no_worse_than_llama(dtype: torch.dtype, rows: int, columns: int, size: float) -> None:
    x = (torch.randn(rows, columns, dtype=torch.float64) * size).to(dtype)
    weight = torch.randn(columns).to(dtype)
    want = rms_norm(x.double(), weight.double(), EPS, backend="reference")
    got = rms_norm(x, weight, EPS, backend="torch")
    assert got.dtype == dtype
    # Three roundings (row, weight, result) at most, and as many again for the sum of squares, of the value's own size.
    bound = 6 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_do_not_round(backend: str) -> None:
    x = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    got = rms_norm(x, torch.tensor([1.0, 2.0, 0.0, -1.0]), 0.0 + 1e-45, backend=backend)
    want = [[1.0, -2.0, 0.0, -1.0], [0.0] * 4, [0.0, 4.0, 0.0, 0.0]]
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_promote(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = torch.randn(3, 8).to(dtypes[0]), torch.randn(8).to(dtypes[1])
    got = rms_norm(x, weight, EPS, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, llama(x, weight), rtol=1e-6 if dtypes[0] == torch.float32 else 2**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_in_place_and_not_written(backend: str) -> None:
    fused = torch.randn(5, 7, 16)
    x = fused[:, 2:5]
    before = fused.clone()
    torch.testing.assert_close(
        rms_norm(x, torch.ones(16), EPS, backend=backend),
        rms_norm(x.contiguous(), torch.ones(16), EPS, backend=backend),
    )
    assert torch.equal(fused, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, backend=backend), (x, weight))


@own_errors()
def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`weight` must have one entry per column of `x` \(8\), got \[7\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="`backend` must be one of"):
        rms_norm(torch.zeros(2, 8), torch.zeros(8), EPS, backend="flash")
