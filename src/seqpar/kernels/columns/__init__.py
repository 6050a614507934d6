"""The send buffer of an all-to-all over columns, with q/k norms and the rotary embedding on the way into it."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from seqpar.kernels.columns import reference
from seqpar.kernels.columns.plan import KEY, OTHER, QUERY, ColumnPlan
from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend

__all__ = ["KEY", "OTHER", "QUERY", "ColumnPlan", "Norm", "pack_columns", "pack_heads", "unpack_columns"]

Norm = tuple[Tensor, float]
"""The weight and the eps of an RMS norm."""


def pack_columns(x: Shaped[Tensor, "t c"], plan: ColumnPlan, *, backend: Backend = "auto") -> Shaped[Tensor, " packed"]:
    """Columns as an all-to-all sends them: the rows of one destination's block after those of another's.

    In:    x[T, C], C being all units of the plan, any strides.
    Out:   flat; a unit that several destinations get is there several times.
    Grad:  none.

    Raises:
        ValueError: units beyond the columns.
    """
    _check(x, plan)
    if _chosen(backend, x) == "triton":
        from seqpar.kernels.columns import triton

        return triton.pack_columns(x, plan)
    return reference.pack_columns(x.detach(), plan)


def unpack_columns(
    flat: Shaped[Tensor, " packed"], plan: ColumnPlan, rows: int, *, backend: Backend = "auto"
) -> Shaped[Tensor, "t c"]:
    """`pack_columns` undone, for what arrives in blocks.

    Raises:
        ValueError: a unit that goes to several destinations or to none, or a buffer of another size.
    """
    if not plan.tiles or flat.shape != (rows * plan.total * plan.unit,):
        raise ValueError(
            f"`flat` must be {rows} rows of the {plan.total} units of {plan.unit} columns of a plan that has each "
            f"once, got {list(flat.shape)} for {plan.blocks}"
        )
    if _chosen(backend, flat) == "triton":
        from seqpar.kernels.columns import triton

        return triton.unpack_columns(flat, plan, rows)
    return reference.unpack_columns(flat.detach(), plan, rows)


def pack_heads(
    x: Float[Tensor, "t c"],
    plan: ColumnPlan,
    *,
    cos: Float[Tensor, "t d"] | None = None,
    sin: Float[Tensor, "t d"] | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, " packed"]:
    """`pack_columns` of a fused projection whose query and key heads are normed and turned on the way.

    In:    x[T, C], heads of `plan.unit` columns, which `plan.kinds` tells apart; cos, sin of its tokens.
    Out:   flat, in the dtype of x. What several destinations get is computed once for each of them.
    Grad:  none.

    Raises:
        ValueError: kinds, tables or weights that do not fit the heads.
    """
    _check(x, plan)
    table, head = (len(x), plan.unit), (plan.unit,)
    tables = [t for t in (cos, sin) if t is not None]
    weights = [norm[0] for norm in (q_norm, k_norm) if norm is not None]
    if (cos is None) != (sin is None) or any(t.shape != table for t in tables):
        raise ValueError(
            f"`cos` and `sin` must be given together, {list(table)} each, got {[list(t.shape) for t in tables]}"
        )
    if any(weight.shape != head for weight in weights) or any(t.dtype != x.dtype for t in (*tables, *weights)):
        raise ValueError(
            f"`q_norm` and `k_norm` must have {plan.unit} weights, they and the tables in {x.dtype}, got "
            f"{[(list(t.shape), t.dtype) for t in (*weights, *tables)]}"
        )
    if len(plan.kinds) * plan.unit != x.shape[1] or plan.unit % 2:
        raise ValueError(
            f"`plan` must have a kind for each of {x.shape[1] // plan.unit} heads, which have an even number of dims, "
            f"got {plan.kinds} and {plan.unit} dims"
        )
    if _chosen(backend, x) == "triton":
        from seqpar.kernels.columns import triton

        return triton.pack_heads(x, plan, cos, sin, q_norm, k_norm)
    return reference.pack_heads(x.detach(), plan, cos, sin, q_norm, k_norm)


def _chosen(backend: Backend, x: Tensor) -> Backend:
    """The backend to run; PyTorch's form is the definition."""
    if backend == "auto":
        return choose_backend("columns", x.device, x.dtype)
    if backend not in ("torch", "reference", "triton"):
        raise unknown_backend(backend, "triton")
    return backend


def _check(x: Tensor, plan: ColumnPlan) -> None:
    units = x.shape[1] // plan.unit
    if x.shape[1] % plan.unit or any(not 0 <= unit < units for block in plan.blocks for unit in block):
        raise ValueError(
            f"`plan` must have units of {plan.unit} columns within the {x.shape[1]} of `x`, got {plan.blocks}"
        )
