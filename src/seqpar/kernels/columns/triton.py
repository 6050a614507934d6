"""Packing for an all-to-all in one pass, whatever goes where, and heads prepared on the way.

The send buffer is written anyhow; with the norms and the rotary embedding in that pass the received buffer is ready to
be attended to, and nothing else reads or writes queries and keys. A table of a few integers for each unit says where it
comes from and where it goes, so that replicated KV heads and uneven shares are the same kernel as an even split.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.columns.plan import ColumnPlan
from seqpar.kernels.dispatch import kernel_op, refuse_dtype
from seqpar.kernels.rotary.triton import normed_halves, turned_halves
from seqpar.kernels.targets import Variant

__all__ = ["pack_columns", "pack_heads", "unpack_columns", "variants"]


@triton.jit
def columns_kernel(
    from_ptr,
    to_ptr,
    table_ptr,
    tokens,
    total,
    unit,
    x_stride,
    PACK: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, i, j): units from `i * UNITS` on, of each the columns from `j * BLOCK` on."""
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    column = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    there = which < total
    source = tl.load(table_ptr + which, mask=there, other=0).to(tl.int64)
    before = tl.load(table_ptr + total + which, mask=there, other=0).to(tl.int64)
    width = tl.load(table_ptr + 2 * total + which, mask=there, other=0)
    place = tl.load(table_ptr + 3 * total + which, mask=there, other=0)
    tall = token * x_stride + source * unit
    flat = (before * tokens + token * width + place) * unit
    inside = there[:, None] & (column < unit)
    if PACK:
        moved = tl.load(from_ptr + tall[:, None] + column, mask=inside, eviction_policy="evict_first")
        tl.store(to_ptr + flat[:, None] + column, moved, mask=inside)
    else:
        moved = tl.load(from_ptr + flat[:, None] + column, mask=inside, eviction_policy="evict_first")
        tl.store(to_ptr + tall[:, None] + column, moved, mask=inside)


@triton.jit
def heads_kernel(
    x_ptr,
    to_ptr,
    table_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    tokens,
    total,
    dim,
    half,
    x_stride,
    cos_token,
    sin_token,
    q_eps,
    k_eps,
    TURN: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program (token, i): heads from `i * HEADS` on, of `dim` columns in two halves."""
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair, there = tl.arange(0, HALF)[None, :], which < total
    source = tl.load(table_ptr + which, mask=there, other=0).to(tl.int64)
    before = tl.load(table_ptr + total + which, mask=there, other=0).to(tl.int64)
    width = tl.load(table_ptr + 2 * total + which, mask=there, other=0)
    place = tl.load(table_ptr + 3 * total + which, mask=there, other=0)
    kind = tl.load(table_ptr + 4 * total + which, mask=there, other=0)[:, None]
    inside = there[:, None] & (pair < half)
    from_ptr = x_ptr + (token * x_stride + source * dim)[:, None] + pair
    first = tl.load(from_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(from_ptr + half, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if Q_NORM:
        one, two = normed_halves(first, second, q_weight_ptr, half, dim, q_eps, HALF)
        first, second = tl.where(kind == 1, one, first), tl.where(kind == 1, two, second)
    if K_NORM:
        one, two = normed_halves(first, second, k_weight_ptr, half, dim, k_eps, HALF)
        first, second = tl.where(kind == 2, one, first), tl.where(kind == 2, two, second)
    if TURN:
        one, two = turned_halves(first, second, cos_ptr + token * cos_token, sin_ptr + token * sin_token, half, HALF)
        first, second = tl.where(kind > 0, one, first), tl.where(kind > 0, two, second)
    out_ptr = to_ptr + ((before * tokens + token * width + place) * dim)[:, None] + pair
    tl.store(out_ptr, first.to(to_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + half, second.to(to_ptr.dtype.element_ty), mask=inside)


def configuration(total: int, unit: int) -> tuple[int, int, int]:
    """UNITS, BLOCK and warps: 16 numbers a thread, no more units than there are, up to 1024 columns at a time."""
    block = min(1024, triton.next_power_of_2(max(unit, 1)))
    units = min(triton.next_power_of_2(max(total, 1)), max(1, 2048 // block))
    return units, block, min(4, max(1, units * block // 512))


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for total, unit in ((48, 128), (8, 1024), (48, 64)):
            units, block, warps = configuration(total, unit)
            for pack in (True, False):
                yield Variant(
                    f"{dtype}-{total}x{unit}{'' if pack else '-back'}",
                    columns_kernel,
                    {
                        **dict.fromkeys(("from_ptr", "to_ptr"), f"*{dtype}"),
                        "table_ptr": "*i32",
                        **dict.fromkeys(("tokens", "total"), "i32"),
                        **dict.fromkeys(("unit", "x_stride"), "i32:16"),
                    },
                    {"PACK": pack, "UNITS": units, "BLOCK": block},
                    warps,
                    1,
                )
        for dim in (128, 64):
            for norm in (False, True):
                heads, half, warps = configuration(48, dim // 2)
                pointers = ("x_ptr", "to_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr")
                yield Variant(
                    f"{dtype}-48x{dim}{'-norm' if norm else ''}",
                    heads_kernel,
                    {
                        **dict.fromkeys(pointers, f"*{dtype}"),
                        "table_ptr": "*i32",
                        **dict.fromkeys(("tokens", "total"), "i32"),
                        **dict.fromkeys(("dim", "half", "x_stride", "cos_token", "sin_token"), "i32:16"),
                        **dict.fromkeys(("q_eps", "k_eps"), "fp32"),
                    },
                    {"TURN": True, "Q_NORM": norm, "K_NORM": norm, "HEADS": heads, "HALF": half},
                    warps,
                    1,
                )


def _columns(source: Tensor, table: Tensor, unit: int, rows: int, columns: int, pack: bool) -> Tensor:
    """Pack a matrix of `columns` columns, or unpack into one."""
    total = table.shape[1]
    to = source.new_empty(rows * total * unit) if pack else source.new_empty(rows, columns)
    if to.numel():
        units, block, warps = configuration(total, unit)
        columns_kernel[(rows, triton.cdiv(total, units), triton.cdiv(unit, block))](
            source,
            to,
            table,
            rows,
            total,
            unit,
            source.stride(0) if pack else columns,
            PACK=pack,
            UNITS=units,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
        )
    return to


def _heads(
    x: Tensor,
    table: Tensor,
    dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
) -> Tensor:
    total, tokens = table.shape[1], len(x)
    to = x.new_empty(tokens * total * dim)
    if to.numel():
        heads, half_block, warps = configuration(total, dim // 2)
        heads_kernel[(tokens, triton.cdiv(total, heads))](
            x,
            to,
            table,
            x if cos is None else cos,
            x if sin is None else sin,
            x if q_weight is None else q_weight,
            x if k_weight is None else k_weight,
            tokens,
            total,
            dim,
            dim // 2,
            x.stride(0),
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            q_eps,
            k_eps,
            TURN=cos is not None,
            Q_NORM=q_weight is not None,
            K_NORM=k_weight is not None,
            HEADS=heads,
            HALF=half_block,
            num_warps=warps,
            num_stages=1,
        )
    return to


def _columns_fake(source: Tensor, table: Tensor, unit: int, rows: int, columns: int, pack: bool) -> Tensor:
    return source.new_empty(rows * table.shape[1] * unit) if pack else source.new_empty(rows, columns)


def _heads_fake(
    x: Tensor,
    table: Tensor,
    dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
) -> Tensor:
    return x.new_empty(len(x) * table.shape[1] * dim)


_columns_op = kernel_op(
    "columns(Tensor source, Tensor table, int unit, int rows, int columns, bool pack) -> Tensor",
    _columns,
    fake=_columns_fake,
)
_heads_op = kernel_op(
    "pack_heads(Tensor x, Tensor table, int dim, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, "
    "float q_eps, float k_eps) -> Tensor",
    _heads,
    fake=_heads_fake,
)


def pack_columns(x: Tensor, plan: ColumnPlan) -> Tensor:
    """`seqpar.kernels.columns.reference`."""
    refuse_dtype("x", x.dtype)
    x = _rows(x)
    packed: Tensor = _columns_op(x, plan.table(x.device), plan.unit, len(x), x.shape[1], True)
    return packed


def unpack_columns(flat: Tensor, plan: ColumnPlan, rows: int) -> Tensor:
    """`seqpar.kernels.columns.reference`."""
    refuse_dtype("flat", flat.dtype)
    flat = flat.detach().contiguous()
    x: Tensor = _columns_op(flat, plan.table(flat.device), plan.unit, rows, plan.total * plan.unit, False)
    return x


def pack_heads(
    x: Tensor,
    plan: ColumnPlan,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: tuple[Tensor, float] | None,
    k_norm: tuple[Tensor, float] | None,
) -> Tensor:
    """`seqpar.kernels.columns.reference`, rounded where the norm is and at the end."""
    refuse_dtype("x", x.dtype)
    x = _rows(x)
    cos, sin = (None if t is None else _rows(t) for t in (cos, sin))
    (q_weight, q_eps), (k_weight, k_eps) = (
        (None, 0.0) if norm is None else (norm[0].detach().contiguous(), norm[1]) for norm in (q_norm, k_norm)
    )
    packed: Tensor = _heads_op(x, plan.table(x.device), plan.unit, cos, sin, q_weight, k_weight, q_eps, k_eps)
    return packed


def _rows(x: Tensor) -> Tensor:
    return x.detach() if x.stride(1) == 1 else x.detach().contiguous()
