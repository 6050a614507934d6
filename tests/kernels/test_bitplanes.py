"""Nested codes: what is sent in parts is what is sent at once, boxes hold their numbers, norms are from above."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import bitplanes

SHAPE = (2, 3, 5, 4)
BACKENDS = ["torch", "reference"]


def problem(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, bitplanes.Boxes]:
    """Numbers of streams, blocks, tokens and channels of several magnitudes; which are there; and their boxes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=rng, dtype=torch.float64) * torch.tensor([scale, 1e-3, 0.0, 40.0])
    x = x + torch.randn(SHAPE[0], SHAPE[1], 1, SHAPE[3], generator=rng, dtype=torch.float64)
    valid = torch.rand(SHAPE[1:3], generator=rng) < 0.8
    valid[:, 0] = True
    return x, valid, bitplanes.fit(x, valid)


def levels(seed: int) -> Tensor:
    return torch.randint(-3, 14, SHAPE[:3], generator=torch.Generator().manual_seed(seed)).int()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_bits_sent_in_parts_are_the_bits_sent_at_once(backend: str, seed: int) -> None:
    x, _, boxes = problem(seed)
    codes, first = bitplanes.encode(x, boxes), levels(seed)
    ends = [bitplanes.planes(boxes, level) for level in (first - 40, first, first + levels(seed + 1).clamp(min=0))]
    assert not ends[0].any() and (ends[2] >= ends[1]).all()
    known = torch.zeros_like(codes)
    for have, want in pairwise(ends):
        data = bitplanes.pack(codes, have, want, backend=backend)
        assert len(data) == bitplanes.packed_bytes(have, want)
        known = bitplanes.unpack(data, known, have, want, backend=backend)
        assert torch.equal(known, codes & ~((1 << bitplanes.PLANES - want) - 1))
    whole = bitplanes.pack(codes, ends[0], ends[2], backend=backend)
    assert torch.equal(whole, bitplanes.pack(codes, ends[0], ends[2], backend="reference"))
    assert torch.equal(bitplanes.unpack(whole, torch.zeros_like(codes), ends[0], ends[2], backend=backend), known)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 1.0, 3e4]))
@settings(max_examples=40, deadline=None)
def test_a_number_lies_in_its_cell_and_cells_are_as_wide_as_levels_say(seed: int, scale: float) -> None:
    x, valid, boxes = problem(seed, scale)
    level = levels(seed)
    held = bitplanes.planes(boxes, level)
    codes = bitplanes.encode(x, boxes) & ~((1 << bitplanes.PLANES - held) - 1)
    size = boxes.width.double() * boxes.unit.double()[:, None]
    cell = size[:, :, None] * 0.5 ** held.double()
    off = (x - bitplanes.decode(codes, held, boxes)).abs()
    assert (off <= cell / 2 * (1 + 1e-9) + 1e-300)[:, valid].all()
    free = (held > 0) & (held < bitplanes.PLANES)
    wide = cell * torch.exp2(level.double())[..., None]
    assert (wide[free] <= 2**0.5 * (1 + 1e-9)).all() and (wide[free] >= 0.5**0.5 * (1 - 1e-9)).all()
    assert (wide[held == 0] <= 2**0.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-12, 1.0, 1e9]))
@settings(max_examples=20, deadline=None)
def test_norms_are_from_above(backend: str, seed: int, scale: float) -> None:
    x, valid, _ = problem(seed, scale)
    level = levels(seed)
    row, whole = bitplanes.radii(x, level, valid, backend=backend).double()
    scaled = (x * torch.exp2(level.double())[..., None]).masked_fill(~valid[None, :, :, None], 0)
    assert (scaled.norm(dim=-1) <= row[..., None]).all()
    weight = torch.randn(SHAPE[:3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    combined = torch.einsum("cbm,cbmd->cbd", weight, scaled).norm(dim=-1)
    assert (combined <= weight.norm(dim=-1) * whole).all()
    exact = torch.linalg.matrix_norm(scaled, ord=2)
    assert (whole >= exact).all() and (whole <= exact * 1.03).all()
    assert (row <= scaled.norm(dim=-1).amax(-1) * 1.01).all()


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_rounding_is_up_and_to_the_next(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    up = bitplanes.round_up(x).double()
    assert (up >= x).all() and (up <= x * (1 + 2**-7) + 1e-37).all()


def test_what_is_not_finite_has_no_finite_norm() -> None:
    x, valid, _ = problem(0)
    x[0, 0, 0, 0] = torch.nan
    row, whole = bitplanes.radii(x, levels(0), valid)
    assert not row[0, 0].isfinite() and not whole[0, 0].isfinite()


def test_messages_of_another_size_are_refused() -> None:
    x, _, boxes = problem(0)
    codes, held = bitplanes.encode(x, boxes), bitplanes.planes(boxes, levels(0))
    with pytest.raises(ValueError, match="`data` must be"):
        bitplanes.unpack(torch.zeros(3, dtype=torch.uint8), codes, torch.zeros_like(held), held)
