"""SwiGLU in one pass: a program reads a run of a gate and of its up columns, and writes as much.

Sub-blocks of one size take one launch, so an even split takes two at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op, refuse_dtype
from seqpar.kernels.targets import Variant

__all__ = ["swiglu", "variants"]

BLOCK, WARPS = 2048, 4
"""Two loads of 16 bytes in flight a thread for each of gate and up, in 16 bits a number."""


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, x_stride, out_stride, size, chunks, BLOCK: tl.constexpr):
    """Program (token, i): chunk `i % chunks` of sub-block `i // chunks`, all of them `size` columns wide."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, column = which // chunks, which % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate_ptr = x_ptr + token * x_stride + 2 * block * size + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_ptr + size, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * out_stride + block * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        yield Variant(
            dtype,
            swiglu_kernel,
            {
                **dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}"),
                **dict.fromkeys(("x_stride", "out_stride", "size"), "i32:16"),
                "chunks": "i32",
            },
            {"BLOCK": BLOCK},
            WARPS,
            1,
        )


def _launch(gate_up: Tensor, blocks: Sequence[int]) -> Tensor:
    tokens, at = len(gate_up), 0
    out = gate_up.new_empty(tokens, sum(blocks))
    x = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    for size, same in groupby(blocks):
        count = len(list(same))
        if size and tokens:
            chunks = triton.cdiv(size, BLOCK)
            swiglu_kernel[(tokens, count * chunks)](
                x[:, 2 * at :],
                out[:, at:],
                x.stride(0),
                out.stride(0),
                size,
                chunks,
                BLOCK=BLOCK,
                num_warps=WARPS,
                num_stages=1,
            )
        at += size * count
    return out


def _fake(gate_up: Tensor, blocks: Sequence[int]) -> Tensor:
    return gate_up.new_empty(len(gate_up), sum(blocks))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.blocks = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (gate_up,) = ctx.saved_tensors
    pairs = gate_up.float().split([size for block in ctx.blocks for size in (block, block)], dim=1)
    parts = []
    for gate, up, back in zip(pairs[::2], pairs[1::2], grad.float().split(list(ctx.blocks), dim=1), strict=True):
        sigmoid = gate.sigmoid()
        parts += [back * up * sigmoid * (1 + gate * (1 - sigmoid)), back * gate * sigmoid]
    return torch.cat(parts, dim=1).to(gate_up.dtype), None


_op = kernel_op("swiglu(Tensor gate_up, int[] blocks) -> Tensor", _launch, fake=_fake, setup=_setup, backward=_backward)


def swiglu(gate_up: Tensor, blocks: Sequence[int]) -> Tensor:
    """`seqpar.kernels.swiglu.reference`, rounded once."""
    refuse_dtype("gate_up", gate_up.dtype)
    out: Tensor = _op(gate_up, list(blocks))
    return out
