"""The definition of the certificate: attention over keys and values that are only known to lie near some numbers.

A true key's logit differs from that of k_i by eta_i, a true value from v_i by rho_i, of which `radii` say, each times
`reach` for keys: row 0 bounds |eta_i|; row 1 bounds eta over a block, row 2 over a span of blocks, in that no weights w
make |sum_i w_i eta_i| larger than the norm of w times the row. Rows 3, 4 and 5 say the same of the lengths of rho_i and
of sum_i w_i rho_i. With p_i the softmax weights of the numbers at hand and O their output, the true output is

    O* = O + sum_i p_i (e^eta_i - 1) (v*_i - P) / sum_j p_j e^eta_j + sum_i p_i rho_i,      P = sum_i p_i v*_i,

where |v*_i - P| <= |v_i - O| + |rho_i| + |P - O|, and |e^eta - 1| <= kappa |eta| for kappa = (e^delta - 1) / delta. So
each of the sums is one of errors with known weights: `spread` bounds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["certificate", "spread"]


def certificate(
    q: Float[Tensor, "r d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    radii: Float[Tensor, "6 n"],
    reach: Float[Tensor, " r"],
    seen: Bool[Tensor, "r n"],
    *,
    softmax_scale: float,
    block: int,
    own: int,
    spans: Sequence[int],
) -> tuple[Float[Tensor, "r d"], Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Output, lse and bound for each query, in exact arithmetic."""
    scores = (softmax_scale * q @ k.T).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[:, None]).exp()
    out = p @ v
    blocks = partial(spread, block=block, own=own, spans=spans)
    delta = reach[:, None] * radii[0]
    kappa = torch.where(delta > 0, delta.expm1() / delta.where(delta > 0, 1), 1)
    moved = blocks(p, radii[3:])
    far = (out[:, None] - v).norm(dim=-1) + radii[3] + moved[:, None]
    turned, thinned = (reach * blocks(weight, radii[:3]) for weight in (p * kappa * far, p * kappa))
    bound = turned / torch.maximum(1 - thinned, (p * (-delta).exp()).sum(-1)) + moved
    widest = out.norm(dim=-1) + (v.norm(dim=-1) + radii[3]).amax()
    return out, lse, torch.minimum(bound.nan_to_num(torch.inf), widest)


def spread(
    weight: Float[Tensor, "r n"], radii: Float[Tensor, "3 n"], *, block: int, own: int, spans: Sequence[int]
) -> Float[Tensor, " r"]:
    """How long the sum of errors with these weights can be.

    Block by block the errors add up row by row or as a whole, whichever is less. Over a span, heavy rows add up one by
    one and the others as a whole, and what is less than its blocks counts.
    """
    row, whole, span = radii
    total, at = weight.new_zeros(len(weight)), own * block
    for size in spans:
        tokens = slice(at, at + size * block)
        w, alone, together = weight[:, tokens], row[tokens], weight[:, tokens] * span[tokens]
        rows = (w * alone).unflatten(-1, (size, block)).sum(-1)
        blocks = (w * whole[tokens]).unflatten(-1, (size, block)).norm(dim=-1)
        light = together * span[tokens] <= 2 * alone * together.norm(dim=-1, keepdim=True)
        joint = (w * alone * ~light).sum(-1) + (together * light).norm(dim=-1)
        total = total + torch.minimum(torch.minimum(rows, blocks).sum(-1), joint)
        at += size * block
    return total
