"""Which tokens are worth more bits: the least cost at which the bounds of many queries fall below their budgets.

A query's bound is about the sum of its pressures times the tokens' radii, and one more bit halves a radius. So the
problem is a geometric program: minimise sum_i cost_i log2(1 / r_i) under sum_i a_qi r_i <= budget_q and r_i no larger
than now. Its optimum is r_i = cost_i / sum_q weight_q a_qi, with a weight for every query that is zero where the budget
does not bind. The weights are found by multiplying each by what its query lacks, with the radii rounded to whole bits
inside the loop, so that the last turns repair what rounding broke.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

__all__ = ["raises"]

TURNS = 16
REPAIRS = 12
MOST = 12
"""Bits that a token may gain at once."""


def raises(
    pressure: Float[Tensor, "r n"],
    radius: Float[Tensor, " n"],
    cost: Float[Tensor, " n"],
    budget: Float[Tensor, " r"],
) -> Int32[Tensor, " n"]:
    """How many bits each token should gain.

    Args:
        pressure: What a unit of a token's radius adds to a query's bound.
        radius: Of each token now.
        cost: Of one more bit of it; positive.
        budget: What each query's bound may be, positive.
    """
    weight = cost.sum() / (max(len(budget), 1) * budget)
    scaled = pressure * radius
    for turn in range(TURNS + REPAIRS):
        gain = _bits(scaled, weight, cost)
        ratio = (scaled @ torch.exp2(-gain)) / budget
        if turn < TURNS:
            weight = weight * ratio.clamp(0.1, 4.0).pow(0.7)
        elif (ratio <= 1).all():
            break
        else:
            weight = weight * torch.where(ratio > 1, 1.3, 1.0)
    return _bits(scaled, weight, cost).to(torch.int32)


def _bits(scaled: Tensor, weight: Tensor, cost: Tensor) -> Tensor:
    return ((weight @ scaled) / cost).clamp(min=1).log2().round().clamp(max=MOST)
