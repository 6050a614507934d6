"""The definition of packing columns for their destinations, and of the heads that are prepared on the way."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from seqpar.kernels.columns.plan import KEY, QUERY, ColumnPlan
from seqpar.kernels.rms_norm.reference import rms_norm
from seqpar.kernels.rotary.reference import rotary

__all__ = ["pack_columns", "pack_heads", "unpack_columns"]


def pack_columns(x: Shaped[Tensor, "t c"], plan: ColumnPlan) -> Shaped[Tensor, " packed"]:
    """Of each destination the rows of its block, one block after another, flat."""
    units = x.unflatten(1, (-1, plan.unit))
    return torch.cat([x.new_empty(0), *(units[:, list(block)].flatten() for block in plan.blocks)])


def unpack_columns(flat: Shaped[Tensor, " packed"], plan: ColumnPlan, rows: int) -> Shaped[Tensor, "t c"]:
    """`pack_columns` undone, where every unit goes to one destination."""
    out = flat.new_empty(rows, plan.total, plan.unit)
    parts = flat.split([rows * len(block) * plan.unit for block in plan.blocks])
    for block, part in zip(plan.blocks, parts, strict=True):
        out[:, list(block)] = part.view(rows, len(block), plan.unit)
    return out.flatten(1)


def pack_heads(
    x: Float[Tensor, "t c"],
    plan: ColumnPlan,
    cos: Float[Tensor, "t d"] | None,
    sin: Float[Tensor, "t d"] | None,
    q_norm: tuple[Tensor, float] | None,
    k_norm: tuple[Tensor, float] | None,
) -> Float[Tensor, " packed"]:
    """Queries and keys normed and turned, then packed."""
    heads = x.unflatten(1, (-1, plan.unit)).clone()
    for kind, norm in ((QUERY, q_norm), (KEY, k_norm)):
        mine = [unit for unit, found in enumerate(plan.kinds) if found == kind]
        part = heads[:, mine]
        part = part if norm is None else rms_norm(part, *norm)
        heads[:, mine] = part if cos is None or sin is None else rotary(part, cos, sin)
    return pack_columns(heads.flatten(1), plan)
