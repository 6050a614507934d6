"""Keys and values in 8 bits: what is lost, that nothing else is, and every backend over what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import attention
from seqpar.kernels.rows import FP8, append_rows
from seqpar.kernels.rows.fp8 import decode, encode
from seqpar.ragged import RaggedBatch
from tests.kernels.cases import Case
from tests.kernels.own_errors import own_errors
from tests.kernels.test_triton_attention import GQA, LSE_ATOL, MQA, OUT_ATOL, UNEVEN
from tests.kernels.tiles import small_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


# The definition.


@given(size=st.sampled_from([1e-30, 1e-6, 1.0, 447.0, 1e4]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_numbers_come_back_to_within_what_is_said(size: float, dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, 16, generator=rng) * torch.logspace(-8, 0, 16)
    x = (x * size).to(dtype)
    codes, scales = encode(x)
    assert codes.dtype == FP8 and scales.dtype == torch.uint8 and scales.shape == (7, 3)
    back, largest = decode(codes, scales, torch.float64), x.double().abs().amax(-1, keepdim=True)
    bound = torch.maximum(x.double().abs() / 16, largest / 229376)
    assert ((back - x.double()).abs() <= bound).all()
    if size >= 1:  # below float16 has few bits itself
        assert ((back - x.double()).abs() > bound / 2).any()  # and that is what may be lost
    assert torch.equal(decode(codes, scales, dtype).double(), back)  # numbers of the dtype
    assert torch.equal(decode(*encode(decode(codes, scales, dtype)), torch.float64), back)  # again, nothing is lost
    power = torch.exp2(scales.double() - 127)[..., None]
    assert (largest <= 448 * power).all() and ((largest > 224 * power) | (scales[..., None] == 1)).all()


def test_the_ends_of_the_range() -> None:
    """448 times a power of two needs that power; the next number the one above; zeros, denormals and infinities."""
    x = torch.tensor([448.0, 448.0001, 224.0, 0.0, 1e-45, 3e38, torch.inf, torch.nan])[:, None] * torch.ones(2)
    x[6:, 1] = 1.0
    codes, scales = encode(x)
    assert scales.tolist() == [127, 128, 126, 1, 1, 247, 255, 255]
    assert bits(codes)[:4].tolist() == [[0x7E] * 2, [0x76] * 2, [0x7E] * 2, [0] * 2]
    back = decode(codes, scales, torch.float32)
    assert back[6:].isnan().all() and back[:6].isfinite().all() and (back[3:5] == 0).all()


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 4),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 16, 40]),
    size=st.sampled_from([1e-38, 0.0, 1.0, 300.0]),
)
@settings(max_examples=8)
@example(dtype=torch.bfloat16, tokens=3, heads=9, dim=256, size=1.0)
def test_appending_by_triton_is_the_definition_byte_for_byte(
    dtype: torch.dtype, tokens: int, heads: int, dim: int, size: float
) -> None:
    rng = torch.Generator().manual_seed(tokens + heads)
    fused = (torch.randn(tokens, heads, 2, dim, generator=rng) * size).to(dtype)
    if tokens:
        fused[0, 0, 0, -1] = torch.nan
        fused[-1, -1, 1, 0] = -torch.inf
    k, v = fused.unbind(2)
    slots = torch.randperm(9, generator=rng)[:tokens]
    found = []
    for backend in ("reference", "triton"):
        stores = [torch.full((9, heads + 1, dim), 77, dtype=torch.uint8)[:, 1:].view(FP8) for _ in range(2)]
        scales = [torch.full((9, heads + 1), 77, dtype=torch.uint8)[:, 1:] for _ in range(2)]
        append_rows(*stores, k, v, slots, scales=(scales[0], scales[1]), backend=backend)
        found.append((*stores, *scales))
    for ours, exact in zip(found[1], found[0], strict=True):
        finite = found[0][2 if ours is found[1][0] else 3] != 255  # codes that nobody reads may be any
        if ours.dtype == FP8:
            ours, exact = bits(ours)[finite], bits(exact)[finite]
        assert torch.equal(ours, exact)
    assert ((found[0][2] == 255).sum(), (found[0][3] == 255).sum()) == (tokens > 0, tokens > 0)


def test_a_slot_that_is_not_there_is_not_written() -> None:
    stores = [torch.full((4, 1, 16), 77, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.full((4, 1), 77, dtype=torch.uint8) for _ in range(2)]
    x, slots = torch.ones(2, 1, 16), torch.tensor([-1, 4])
    append_rows(stores[0].view(FP8), stores[1].view(FP8), x, x, slots, scales=(scales[0], scales[1]), backend="triton")
    assert all((x == 77).all() for x in (*stores, *scales))


# Attention.


@pytest.fixture(scope="module")
def _small() -> Iterator[None]:
    with small_tiles():
        yield


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case((1, 3, 0), (40, 4, 7), *GQA, 16, None, 5, 1), torch.float16),
        (Case((20, 1), (11, 30), *UNEVEN, 32, 20, 16, 1), torch.bfloat16),
        (Case((17, 2), (0, 0), *MQA, 48, None, 0, 0), torch.float16),
    ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_over_what_is_stored(case: Case, dtype: torch.dtype, sinks: bool) -> None:
    """The definition over the decoded numbers exactly; Triton has the bits that it has over those."""
    q, k, v, batch = case.inputs(dtype)
    (k_codes, k_scales), (v_codes, v_scales) = encode(k.nan_to_num(1.0)), encode(v.nan_to_num(1.0))
    if batch.has_cache:
        nobody = k.isnan().any(-1)
        k_scales[nobody] = v_scales[nobody] = 255  # nothing but what was written is read
    scales = k_scales, v_scales
    options: dict[str, Any] = {"window": case.window, "kv_head_of": case.kv_head_of}
    if sinks:
        options["sinks"] = torch.linspace(-2, 3, q.shape[1])
    exact = {name: x.double() if name == "sinks" else x for name, x in options.items()}
    wide = (decode(x, scale, torch.float64) for x, scale in zip((k_codes, v_codes), scales, strict=True))
    want = attention(q.double(), *wide, batch, backend="reference", **exact)
    found = attention(q.double(), k_codes, v_codes, batch, scales=scales, backend="reference", **exact)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    for backend in ("torch", "triton"):
        out, lse = attention(q, k_codes, v_codes, batch, scales=scales, backend=backend, **options)
        assert out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), want[0], rtol=0, atol=2 * OUT_ATOL[dtype])
        mass_atol = LSE_ATOL if backend == "triton" else 20 * LSE_ATOL  # PyTorch's own is of rounded scores
        torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=mass_atol)
    stored = (decode(x, scale, dtype) for x, scale in zip((k_codes, v_codes), scales, strict=True))
    same = attention(q, *stored, batch, backend="triton", **options)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


Q, X = torch.zeros(4, 2, 16), torch.zeros(4, 1, 16)
CODES, SCALES = X.to(FP8), torch.zeros(4, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("k", "scales", "options", "message"),
    [
        (X, (SCALES, SCALES), {}, "`k` and `v` must be torch.float8_e4m3fn with `scales`, got torch.float32 and torch"),
        (
            CODES,
            (SCALES, SCALES[:3]),
            {},
            r"`scales` must be two of \[4, 1\] in torch.uint8 on cpu, got \[\[4, 1\], \[3",
        ),
        (CODES, (SCALES.int(), SCALES), {}, r"in \[torch.int32, torch.uint8\] on"),
        (CODES, None, {}, "`q`, `k`, `v` must have one floating dtype, got torch.float32, torch.float8_e4m3fn"),
        (
            CODES,
            (SCALES, SCALES),
            {"backend": "triton"},
            "`q` must be bfloat16 or float16 with a head_dim of at most 128",
        ),
        (CODES, (SCALES, SCALES), {"backend": "flash_attn"}, "must be on a GPU|`scales` must be None"),
        (
            CODES[..., :8],
            (SCALES, SCALES),
            {"backend": "triton"},
            "head_dim that is a multiple of 16, from 16 to 256, f",
        ),
    ],
)
@own_errors()
def test_what_does_not_fit_is_refused(k: Tensor, scales: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(Q[..., : k.shape[2]], k, k, RaggedBatch.prefill([4]), scales=scales, **options)


@own_errors()
def test_what_cannot_be_appended_is_refused() -> None:
    slots = torch.arange(4)
    with pytest.raises(
        ValueError, match=r"`keys` and `values` must be torch.float8_e4m3fn with `scales`, and `k` and `v`"
    ):
        append_rows(X, X, X, X, slots, scales=(SCALES, SCALES))
    with pytest.raises(ValueError, match=r"got torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float64, torch.float64"):
        append_rows(CODES, CODES, X.double(), X.double(), slots, scales=(SCALES, SCALES))
    with pytest.raises(
        ValueError, match=r"`scales` must be two of \[4, 1\] in torch.uint8, of heads of at least 1, got"
    ):
        append_rows(CODES, CODES, X, X, slots, scales=(SCALES, SCALES[:2]))
    with pytest.raises(ValueError, match="`scales` must have the same strides, 1 along heads"):
        wide = torch.zeros(4, 2, dtype=torch.uint8)[:, :1]
        append_rows(CODES, CODES, X, X, slots, scales=(SCALES, wide), backend="triton")
