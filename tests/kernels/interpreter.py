"""Triton's interpreter for tests: bfloat16 as GPUs have it, and `backend="auto"` that means Triton on a CPU too.

The interpreter keeps bfloat16 as the integers of its bits. It truncates where hardware rounds to nearest even, and it
adds and multiplies the integers. Importing this module repairs that, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from seqpar.kernels import dispatch

__all__ = ["interpreted"]

BITS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


@contextmanager
def interpreted(*ops: str) -> Iterator[None]:
    """Within it, "auto" means Triton for these operations on a CPU too; numpy's warnings are no errors."""
    with (
        patch.object(dispatch, "TRITON_OPS", dispatch.TRITON_OPS & set(ops)),
        patch.object(dispatch, "TRITON_DEVICES", frozenset({"cpu", "cuda"})),
        np.errstate(all="ignore"),
    ):
        yield


def widened(bits: np.ndarray) -> np.ndarray:
    """Float32 numbers of the bits of bfloat16 ones."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 numbers, ties to even; not-a-number stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def is_bf16(x: TensorHandle) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def wide(x: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(x.data), tl.float32) if is_bf16(x) else x


def repair(builder: type[InterpreterBuilder]) -> None:
    """Put the operations on bfloat16 right; all others stay what they are."""
    cast, convert, binary, unary, dot = (
        getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot")
    )

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if is_bf16(src) == (dst_type.scalar == tl.bfloat16):
            return cast(self, src, dst_type)
        if is_bf16(src):
            return cast(self, wide(src), dst_type) if dst_type.scalar != tl.float32 else wide(src)
        return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if not (is_bf16(lhs) and is_bf16(rhs)) or op in BITS:
            return binary(self, lhs, rhs, op)
        out = op(widened(lhs.data), widened(rhs.data))
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else TensorHandle(rounded(out), tl.bfloat16)

    def unary_op(self: Any, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if not is_bf16(arg):
            return unary(self, arg, op)
        return TensorHandle(rounded(op(widened(arg.data))), tl.bfloat16)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: Any) -> TensorHandle:
        return dot(self, wide(a), wide(b), d, *how)

    builder.cast_impl, builder.create_fp_to_fp, builder.binary_op = cast_impl, create_fp_to_fp, binary_op
    builder.unary_op, builder.create_dot = unary_op, create_dot


def repair_sum(ops: type[ReduceOps]) -> None:
    add = ops.sum

    def sum_(self: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return add(self, x)
        total = np.sum(widened(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(rounded(total), x.dtype)

    ops.sum = sum_


repair(InterpreterBuilder)
repair_sum(ReduceOps)
