"""The RMS norm, and the sum that usually stands before it, in one pass: a row is read once and kept in registers.

A program takes as many rows as make up its tile, several of a head's width or one of a model's. The weight is the same
for all of them and stays in the first-level cache; the rows pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op, refuse_dtype
from seqpar.kernels.targets import Variant

__all__ = ["LONGEST", "add_rms_norm", "rms_norm", "variants"]

LONGEST = 1 << 15
"""Numbers of a row that fit into the registers of a block."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    more_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    inner,
    x_outer,
    x_inner,
    more_stride,
    width,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows `i` of x lie at `i // inner * x_outer + i % inner * x_inner`.

    With ADD the other summand of each is at `i * more_stride`; the sum, rounded to its dtype, is normed and kept.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    at = row // inner * x_outer + row % inner * x_inner + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if ADD:
        more = tl.load(more_ptr + row * more_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
        rounded = (x + more.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    normed = (x * scale[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)  # as Llama rounds it before the weight
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0, eviction_policy="evict_last")
    out = normed * weight.to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def configuration(width: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps for rows of `width` numbers: 16 numbers a thread, as long as there are threads."""
    block = triton.next_power_of_2(max(width, 16))
    rows = max(1, 1024 // block)
    return rows, block, min(32 if block == LONGEST else 16, max(1, rows * block // 512))


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (128, 4096, 8192, LONGEST):
            for add in (False, True):
                if (dtype == "fp16" and width != 4096) or (add and width == 128):
                    continue
                rows, block, warps = configuration(width)
                yield Variant(
                    f"{dtype}-{width}{'-add' if add else ''}",
                    rms_norm_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "more_ptr", "weight_ptr", "out_ptr", "total_ptr"), f"*{dtype}"),
                        **dict.fromkeys(("rows", "inner"), "i32"),
                        **dict.fromkeys(("x_outer", "x_inner", "more_stride", "width"), "i32:16"),
                        "eps": "fp32",
                    },
                    {"ADD": add, "ROWS": rows, "BLOCK": block},
                    warps,
                    1,
                )


def _launch(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=torch.promote_types(weight.dtype, x.dtype), device=x.device)
    total = out if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    if not x.numel():
        return out, total
    rows = x.numel() // width
    x, inner, outer_stride, inner_stride = _in_two_levels(x)
    if more is not None:
        more = more.reshape(rows, width)
        more = more if more.stride(1) == 1 else more.contiguous()
    weight = weight.contiguous()
    per_program, block, warps = configuration(width)
    rms_norm_kernel[(triton.cdiv(rows, per_program),)](
        x,
        x if more is None else more,
        weight,
        out,
        total,
        rows,
        inner,
        outer_stride,
        inner_stride,
        0 if more is None else more.stride(0),
        width,
        eps,
        ADD=more is not None,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
        num_stages=1,
    )
    return out, total


def _in_two_levels(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Rows of x as a count of inner ones and two strides; a copy where they have more levels or gaps within."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.shape[1], x.stride(0), x.stride(1)
    if x.dim() == 2 and x.stride(1) == 1:
        return x, 1, x.stride(0), 0
    flat = x.contiguous()
    return flat, 1, x.shape[-1], 0


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)[0]


def _add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(x, more, weight, eps)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(weight.dtype, x.dtype))


def _add_fake(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake(x, weight, eps), x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *_gradients(x, weight, ctx.eps, grad), None


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight = ctx.saved_tensors
    of_total, of_weight = _gradients(total, weight, ctx.eps, grad)
    of_total = of_total + kept
    return of_total, of_total, of_weight, None


def _gradients(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """To x and the weight, in float32 and rounded once."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, grad = wide * scale, grad.float()
    weighted = grad * weight.float()
    of_x = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    of_weight = (grad * normed).flatten(0, -2).sum(0) if x.dim() > 1 else grad * normed
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


_op = kernel_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
_add_op = kernel_op(
    "add_rms_norm(Tensor x, Tensor more, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    fake=_add_fake,
    setup=_add_setup,
    backward=_add_backward,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`seqpar.kernels.rms_norm.reference`, equal to it up to rounding."""
    _check(x, weight)
    normed: Tensor = _op(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`seqpar.kernels.rms_norm.reference`: the normed sum up to rounding, the sum exactly."""
    _check(x, weight)
    normed, total = _add_op(x, more, weight, eps)
    return normed, total


def _check(x: Tensor, weight: Tensor) -> None:
    refuse_dtype("x", x.dtype)
    refuse_dtype("weight", weight.dtype)
    if x.shape[-1] > LONGEST:
        raise ValueError(
            f'`x` must have at most {LONGEST} columns for backend="triton", got {x.shape[-1]}; backend="torch" takes it'
        )
