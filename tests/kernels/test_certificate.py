"""The certificate: no error beyond it, whatever the residuals, scales and masks; the plan meets its budgets cheaply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import bitplanes
from seqpar.kernels.certificate import Terms, raises, reference

BLOCK, OWN, SPANS, DIM, QUERIES = 4, 1, (2, 3), 3, 12
KEYS = BLOCK * (OWN + sum(SPANS))


def spread_out(seed: int, sharp: float, wide: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values in float32, and which keys are seen; some queries see only keys that are not exact."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, DIM, generator=rng) for n in (QUERIES, KEYS, KEYS))
    seen = torch.rand(QUERIES, KEYS, generator=rng) < 0.7
    seen[0, :-1], seen[1, BLOCK:] = False, False
    seen[:, -1] |= ~seen.any(1)
    return q * sharp, k, v * wide, seen


def norms(residual: Tensor) -> Tensor:
    """The three radii of every token, alone, in its block, in its span; zero for own ones."""
    zero = torch.zeros(3, OWN * BLOCK)
    found, at = [zero], OWN * BLOCK
    for size in SPANS:
        part = residual[at : at + size * BLOCK].double().view(1, size, BLOCK, DIM)
        valid = torch.ones(size, BLOCK, dtype=torch.bool)
        row, block = bitplanes.radii(part, torch.zeros(1, size, BLOCK).int(), valid).float()
        span = bitplanes.radii(part.flatten(1, 2)[:, None], torch.zeros(1, 1, size * BLOCK).int(), valid.view(1, -1))[1]
        each = torch.stack([row[0], block[0], span[0].float().expand(size)])
        found.append(each.repeat_interleave(BLOCK, 1))
        at += size * BLOCK
    return torch.cat(found, 1)


def residuals(q: Tensor, v: Tensor, kind: str, off: tuple[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Of keys and values: at random, or as somebody who means harm to the first query would have them."""
    rng = torch.Generator().manual_seed(seed + 1)
    if kind == "random":
        to_k, to_v = (torch.randn(KEYS, DIM, generator=rng) * size for size in off)
    else:
        along = q[2] / q[2].norm().clamp(min=1e-20)
        away = v - v.mean(0)
        sign = (away @ away[-1]).sign()[:, None]
        to_k, to_v = sign * along * off[0], (away[-1] / away[-1].norm().clamp(min=1e-20)).expand(KEYS, -1) * off[1]
        if kind == "one":
            to_k, to_v = (torch.where(torch.arange(KEYS)[:, None] == KEYS - 1, x, 0) for x in (to_k, to_v))
    here = (torch.arange(KEYS) >= OWN * BLOCK)[:, None]
    return to_k * here, to_v * here


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = (q.double() @ k.double().T * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("kind", ["random", "harm", "one"])
@given(
    seed=st.integers(0, 10**6),
    sharp=st.sampled_from([0.0, 0.1, 1.0, 8.0, 60.0]),
    wide=st.sampled_from([1e-4, 1.0, 1e4]),
    off=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.3, 3.0]),
    off_v=st.sampled_from([0.0, 1e-5, 0.01, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_no_error_exceeds_the_bound(kind: str, seed: int, sharp: float, wide: float, off: float, off_v: float) -> None:
    """12 queries in each of 300 cases, of float32 outputs against float64."""
    q, k, v, seen = spread_out(seed, sharp, wide)
    to_k, to_v = residuals(q, v, kind, (off, off_v * wide), seed)
    near_k, near_v = k + to_k, v + to_v
    radii = torch.cat([norms(near_k.double() - k.double()), norms(near_v.double() - v.double())])
    reach = q.norm(dim=-1) * 0.5 * (1 + 1e-6)
    options = {"softmax_scale": 0.5, "block": BLOCK, "own": OWN, "spans": SPANS}
    terms = Terms(q, near_k, near_v, radii, reach, seen, **options)
    bound, wanted = terms.bound(), exact(q, k, v, seen, 0.5)
    error = (terms.out.double() - wanted).norm(dim=-1)
    assert (error <= bound.double()).all()
    assert (bound <= 2.01 * (near_v.norm(dim=-1) + radii[3]).amax() * (1 + 1e-4)).all()
    double = [x.double() for x in (q, near_k, near_v, radii, reach)]
    out, lse, least = reference.certificate(*double, seen, **options)
    if off * sharp < 10:  # else e^delta times what float64 drops is no longer small
        assert ((out - wanted).norm(dim=-1) <= least * (1 + 1e-9) + 1e-12 * wide).all()
    # A distance is not known better than to 0.003 of the longest value, and counts as much as logits are off.
    room = 3e-3 * least + 1e-2 * near_v.norm(dim=-1).amax() * (reach.double() * radii[0].amax() + 1e-2)
    if off * sharp < 0.3 and sharp < 60:
        assert (bound >= least * (1 - 1e-4)).all() and (bound <= least + room).all()
    torch.testing.assert_close(terms.lse.double(), lse, rtol=1e-4, atol=1e-3)


def test_a_span_counts_heavy_rows_one_by_one() -> None:
    """Weights of several magnitudes, over spans whose norm is small: as the definition adds them up."""
    q, k, v, seen = spread_out(5, 3.0, 1.0)
    radii = torch.rand(6, KEYS, generator=torch.Generator().manual_seed(5)) * torch.tensor([[1.0], [2], [0.7]] * 2)
    radii[:, : OWN * BLOCK] = 0
    options = {"block": BLOCK, "own": OWN, "spans": SPANS}
    terms = Terms(q, k, v, radii, q.norm(dim=-1), seen, softmax_scale=1.0, **options)
    wanted = reference.spread(terms.p.double(), radii[3:].double(), **options)
    torch.testing.assert_close(terms.moved.double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_query_that_sees_nothing_is_nothing() -> None:
    q, k, v, seen = spread_out(0, 1.0, 1.0)
    seen[3] = False
    terms = Terms(
        q, k, v, torch.zeros(6, KEYS), q.norm(dim=-1), seen, softmax_scale=1.0, block=BLOCK, own=OWN, spans=SPANS
    )
    assert terms.bound()[3] == 0 and (terms.out[3] == 0).all() and terms.lse[3] == -torch.inf


def test_without_errors_the_bound_is_that_of_float32() -> None:
    q, k, v, seen = spread_out(0, 1.0, 1.0)
    terms = Terms(
        q, k, v, torch.zeros(6, KEYS), q.norm(dim=-1), seen, softmax_scale=1.0, block=BLOCK, own=OWN, spans=SPANS
    )
    assert (terms.bound() < 1e-4 * v.norm(dim=-1).amax()).all()


@given(seed=st.integers(0, 10**6), sharp=st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=30, deadline=None)
def test_more_bits_are_as_they_were_foreseen(seed: int, sharp: float) -> None:
    """Halving every radius of a token is what `sharpened` takes a bit for; pressures add up to the linear bound."""
    q, k, v, seen = spread_out(seed, sharp, 1.0)
    to_k, to_v = residuals(q, v, "random", (0.05, 0.05), seed)
    radii = torch.cat([norms(to_k), norms(to_v)])
    options = {"softmax_scale": 0.5, "block": BLOCK, "own": OWN, "spans": SPANS}
    here = (q, k + to_k, v + to_v)
    terms = Terms(*here, radii, q.norm(dim=-1) * 0.5, seen, **options)
    gain = torch.randint(0, 4, (2, KEYS - OWN * BLOCK), generator=torch.Generator().manual_seed(seed)).float()
    whole = torch.cat([torch.zeros(2, OWN * BLOCK), gain], 1)
    halved = radii * torch.exp2(-whole).repeat_interleave(3, 0)
    wanted = Terms(*here, halved, q.norm(dim=-1) * 0.5, seen, **options).bound()
    torch.testing.assert_close(terms.sharpened(gain).bound(), wanted, rtol=1e-5, atol=1e-4)
    _, values = terms.pressures()
    torch.testing.assert_close(values @ radii[3, OWN * BLOCK :], terms.moved, rtol=1e-3, atol=1e-6)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_plans_meet_their_budgets_at_less_than_the_cost_of_equal_bits(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    pressure = torch.rand(10, 40, generator=rng).pow(8)
    radius, cost = torch.rand(40, generator=rng) + 0.1, torch.randint(1, 30, (40,), generator=rng).float()
    budget = (pressure @ radius) * torch.rand(10, generator=rng).clamp(min=0.02)
    gain = raises(pressure, radius, cost, budget).float()
    assert (pressure @ (radius * torch.exp2(-gain)) <= budget * 1.0001).all()
    need = ((pressure @ radius) / budget).log2().ceil().max()
    assert (gain * cost).sum() <= need * cost.sum()
