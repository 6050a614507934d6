"""The rotary embedding, and the norm of each head that some models have before it, in one pass over the heads.

A program has a token and some of its heads, so that it reads the token's angles once. The two halves of a head are two
loads, which meet in registers: nothing is exchanged between threads but the sums of squares.
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

__all__ = ["configuration", "norm_rotary", "normed_halves", "rotary", "turned_halves", "variants"]


@triton.jit
def weighted(x, scale, weight_ptr, at, inside):
    """Dims `at` of normed heads times the weight, rounded twice as Llama does."""
    dtype = weight_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def normed_halves(first, second, weight_ptr, half, dim, eps, HALF: tl.constexpr):
    """Heads of `dim` dims in two halves, normed."""
    pair = tl.arange(0, HALF)[None, :]
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / dim + eps)[:, None]
    first = weighted(first, scale, weight_ptr, pair, pair < half)
    return first, weighted(second, scale, weight_ptr, half + pair, pair < half)


@triton.jit
def turned_halves(first, second, cos_ptr, sin_ptr, half, HALF: tl.constexpr):
    """Pairs turned by the angles of one token, whose rows of the tables begin at the pointers."""
    pair = tl.arange(0, HALF)[None, :]
    inside = pair < half
    cos_first = tl.load(cos_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + half + pair, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + half + pair, mask=inside, other=0.0).to(tl.float32)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def norm_rotary_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    dim,
    half,
    x_token,
    x_head,
    cos_token,
    sin_token,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Program (token, i): heads from `i * HEADS` on; dims from `2 * half` on are not turned."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair, tail = tl.arange(0, HALF)[None, :], 2 * half + tl.arange(0, REST)[None, :]
    inside, beyond = (head < heads) & (pair < half), (head < heads) & (tail < dim)
    from_ptr = x_ptr + token * x_token + head * x_head
    first = tl.load(from_ptr + pair, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(from_ptr + half + pair, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    rest = tl.load(from_ptr + tail, mask=beyond, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / dim + eps)[:, None]
        first = weighted(first, scale, weight_ptr, pair, pair < half)
        second = weighted(second, scale, weight_ptr, half + pair, pair < half)
        rest = weighted(rest, scale, weight_ptr, tail, tail < dim)
    first, second = turned_halves(first, second, cos_ptr + token * cos_token, sin_ptr + token * sin_token, half, HALF)
    to_ptr = out_ptr + (token * heads + head) * dim
    tl.store(to_ptr + pair, first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(to_ptr + half + pair, second.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(to_ptr + tail, rest.to(out_ptr.dtype.element_ty), mask=beyond)


def configuration(heads: int, dim: int, half: int) -> tuple[int, int, int, int]:
    """HEADS, HALF, REST and warps: 16 numbers a thread, and of heads no more than there are."""
    half_block = triton.next_power_of_2(max(half, 1))
    rest_block = triton.next_power_of_2(max(dim - 2 * half, 1))
    per_program = min(triton.next_power_of_2(max(heads, 1)), max(1, 1024 // half_block))
    return per_program, half_block, rest_block, min(8, max(1, per_program * half_block // 256))


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for heads, dim, half in ((32, 128, 64), (8, 128, 64), (32, 64, 32), (16, 256, 64)):
            for norm in (False, True):
                if dtype == "fp16" and (heads, dim) != (32, 128):
                    continue
                per_program, half_block, rest_block, warps = configuration(heads, dim, half)
                turning = "" if 2 * half == dim else f"-turning {2 * half}"
                yield Variant(
                    f"{dtype}-{heads}x{dim}{turning}{'-norm' if norm else ''}",
                    norm_rotary_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "out_ptr"), f"*{dtype}"),
                        "heads": "i32",
                        **dict.fromkeys(("dim", "half", "x_token", "x_head", "cos_token", "sin_token"), "i32:16"),
                        "eps": "fp32",
                    },
                    {"NORM": norm, "HEADS": per_program, "HALF": half_block, "REST": rest_block},
                    warps,
                    1,
                )


def _launch(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    if not out.numel():
        return out
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    half = cos.shape[1] // 2
    per_program, half_block, rest_block, warps = configuration(heads, dim, half)
    norm_rotary_kernel[(tokens, triton.cdiv(heads, per_program))](
        x,
        x if weight is None else weight.contiguous(),
        cos,
        sin,
        out,
        heads,
        dim,
        half,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        eps,
        NORM=weight is not None,
        HEADS=per_program,
        HALF=half_block,
        REST=rest_block,
        num_warps=warps,
        num_stages=1,
    )
    return out


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(x, None, 0.0, cos, sin)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))


def _norm_fake(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return _fake(x, cos, sin)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, cos, sin = ctx.saved_tensors
    rotated = cos.shape[1]
    turned, kept = grad.split([rotated, grad.shape[2] - rotated], dim=2)
    first, second = (turned * sin[:, None]).chunk(2, dim=2)
    of_x = torch.cat((turned * cos[:, None] + torch.cat((second, -first), dim=2), kept), dim=2).to(x.dtype)
    of_cos = of_sin = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        left, right = x[..., :rotated].chunk(2, dim=2)
        of_cos = (turned * x[..., :rotated]).sum(1).to(cos.dtype)
        of_sin = (turned * torch.cat((-right, left), dim=2)).sum(1).to(sin.dtype)
    return of_x, of_cos, of_sin


_op = kernel_op(
    "rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotary, fake=_fake, setup=_setup, backward=_backward
)
_norm_op = kernel_op(
    "norm_rotary(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin) -> Tensor", _launch, fake=_norm_fake
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`seqpar.kernels.rotary.reference`, rounded once."""
    _check(x, cos, sin)
    out: Tensor = _op(x, cos, sin)
    return out


def norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference of the norm, then that of the rotary embedding, which is rounded once."""
    _check(x, cos, sin)
    out: Tensor = _norm_op(x, weight, eps, cos, sin)
    return out


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        refuse_dtype(name, tensor.dtype)
