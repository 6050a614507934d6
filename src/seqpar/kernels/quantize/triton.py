"""The wire formats in one pass each: encode, decode, and decode with the sum of several and its encoding.

A program has runs of 64 numbers, whose scales fill whole bytes in every format: of int8 two groups, of fp8 one.
Numbers, codes and scales meet in registers; a sum of p ranks' parts reads each byte once and is never written wide.

Bytes are those of the definition: arithmetic is float32 with every operation rounded, so nothing may be fused, and
quotients are divided exactly. 8-bit floats are made by the hardware where it has them (sm_89 on), by integer
arithmetic elsewhere; they are read through float16, whose exponent counts from 8 lower, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op, refuse_dtype
from seqpar.kernels.quantize.reference import FORMATS, PIECE, Format, Wire
from seqpar.kernels.targets import Variant

__all__ = ["decode", "decode_sum", "encode", "recode_sum", "variants"]

RUNS, WARPS = 16, 4
"""Runs of 64 numbers of a program: eight numbers a thread."""

UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def _encoded(x, steps, end, LARGEST: tl.constexpr, STEP: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """Codes as int32 [runs, groups, numbers] and the bits of their scales [runs, groups]."""
    magnitude = tl.abs(x)
    # What is not a number must reach the scale; tl.max passes over it.
    largest = tl.max(tl.where(magnitude <= end, magnitude, float("inf")), axis=2)
    dropped: tl.constexpr = (1 << (23 - MANTISSA)) - 1
    added: tl.constexpr = dropped if MANTISSA == 4 else dropped // 2
    least = tl.maximum(largest * (1.0 / LARGEST), 1.1754943508222875e-38)
    bits = (least.to(tl.int32, bitcast=True) + added) & ~dropped
    inverse = tl.div_rn(1.0, bits.to(tl.float32, bitcast=True))
    most = tl.div_rn((tl.floor(inverse * steps) + 0.49) * STEP, largest)
    inverse = tl.where(largest > 0, tl.minimum(inverse, most), inverse)
    scaled = x * inverse[:, :, None]
    if MANTISSA == 4:
        codes = (scaled + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23: the low bits are the rounded number
    elif NATIVE:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        codes = _float8(scaled)
    return codes, tl.where(largest <= end, bits, 0x7FC00000)


@triton.jit
def _float8(x):
    """The bits of float8_e4m3fn, rounded to nearest even, of numbers of at most 464."""
    bits = x.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(magnitude < 0x3C800000, small, normal)  # below 2^-6 in steps of 2^-9


@triton.jit
def _places(rows, num_runs, width, GROUP: tl.constexpr, RUNS: tl.constexpr):
    """Of each run its row and its number in it, of its groups their numbers, of each number its column; what exists."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    row, run = run // num_runs, (run % num_runs).to(tl.int32)
    group = run[:, None] * (64 // GROUP) + tl.arange(0, 64 // GROUP)[None, :]
    column = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = (row[:, None] < rows) & (group * GROUP < width)
    return row, run, group, column, there, (row[:, None, None] < rows) & (column < width)


@triton.jit
def _decoded(data_ptr, row, group, column, there, inside, n, groups, stride, GROUP: tl.constexpr):
    """Float32 numbers of encoded runs."""
    row_ptr = data_ptr + row * stride
    code = tl.load(row_ptr[:, None, None] + column, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
    exponent = tl.load(row_ptr[:, None] + n + group, mask=there, other=0).to(tl.int32)
    if GROUP == 32:  # int8
        pair = tl.load(row_ptr[:, None] + n + groups + group // 2, mask=there, other=0).to(tl.int32)
        mantissa = (pair >> (group % 2 * 4) & 15) << 19
        x = (code << 24 >> 24).to(tl.float32)
    else:
        mantissa = tl.load(row_ptr[:, None] + n + groups + group, mask=there, other=0).to(tl.int32) << 16
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return x * ((exponent << 23) | mantissa).to(tl.float32, bitcast=True)[:, :, None]


@triton.jit
def _put(data_ptr, codes, bits, rows, row, run, group, column, there, inside, n, groups, stride, GROUP: tl.constexpr):
    """Store codes and scales of encoded runs."""
    row_ptr = data_ptr + row * stride
    tl.store(row_ptr[:, None, None] + column, codes.to(tl.uint8), mask=inside)
    tl.store(row_ptr[:, None] + n + group, (bits >> 23 & 0xFF).to(tl.uint8), mask=there)
    if GROUP == 32:
        # Of an odd number of groups the last has no neighbour, whose half of the byte is 0.
        nibble = tl.where(there, bits >> 19 & 15, 0) << (tl.arange(0, 2) * 4)[None, :]
        tl.store(row_ptr + n + groups + run, tl.sum(nibble, axis=1).to(tl.uint8), mask=row < rows)
    else:
        tl.store(row_ptr[:, None] + n + groups + group, (bits >> 16 & 0x7F).to(tl.uint8), mask=there)


@triton.jit
def encode_kernel(
    x_ptr,
    data_ptr,
    rows,
    n,
    groups,
    num_runs,
    x_stride,
    stride,
    steps,
    end,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    STEP: tl.constexpr,
    MANTISSA: tl.constexpr,
    NATIVE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Program i: runs of 64 numbers from `i * RUNS` on, counted over all rows."""
    row, run, group, column, there, inside = _places(rows, num_runs, n, GROUP, RUNS)
    from_ptr = x_ptr + row[:, None, None] * x_stride + column
    x = tl.load(from_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    codes, bits = _encoded(x, steps, end, LARGEST, STEP, MANTISSA, NATIVE)
    _put(data_ptr, codes, bits, rows, row, run, group, column, there, inside, n, groups, stride, GROUP)


@triton.jit
def decode_sum_kernel(
    data_ptr,
    own_ptr,
    out_ptr,
    parts,
    part_stride,
    own,
    rows,
    n,
    groups,
    num_runs,
    stride,
    steps,
    end,
    OWN: tl.constexpr,
    ENCODE: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    STEP: tl.constexpr,
    MANTISSA: tl.constexpr,
    NATIVE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The sum of `parts` encoded matrices, in their order, in the dtype of out or encoded.

    With OWN another one lies elsewhere, and is added before the one with the number `own`.
    """
    row, run, group, column, there, inside = _places(rows, num_runs, n, GROUP, RUNS)
    total = tl.full((RUNS, 64 // GROUP, GROUP), -0.0, tl.float32)  # -0 + x is x, also where that is -0
    for part in range(own):
        part_ptr = data_ptr + part * part_stride
        total += _decoded(part_ptr, row, group, column, there, inside, n, groups, stride, GROUP)
    if OWN:
        total += _decoded(own_ptr, row, group, column, there, inside, n, groups, stride, GROUP)
    for part in range(own, parts):
        part_ptr = data_ptr + part * part_stride
        total += _decoded(part_ptr, row, group, column, there, inside, n, groups, stride, GROUP)
    if ENCODE:
        codes, bits = _encoded(total, steps, end, LARGEST, STEP, MANTISSA, NATIVE)
        _put(out_ptr, codes, bits, rows, row, run, group, column, there, inside, n, groups, stride, GROUP)
    else:
        to_ptr = out_ptr + row[:, None, None] * n + column
        tl.store(to_ptr, total.to(out_ptr.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    lengths = {"rows": "i32", "n": "i32:16", "groups": "i32", "num_runs": "i32", "stride": "i32:16"}
    for wire in FORMATS:
        for native in (False, True) if wire == "fp8" else (False,):
            targets = ("sm_90", "sm_100") if native else ("sm_80", "sm_90", "sm_100", "gfx942")
            constants = {**_constants(wire, native), "RUNS": RUNS}
            name = f"{wire}{'-native' if native else ''}"
            for dtype in ("bf16", "fp16", "fp32"):
                pointers = {"x_ptr": f"*{dtype}", "data_ptr": "*u8"}
                signature = {**pointers, **lengths, "x_stride": "i32:16", "steps": "fp32", "end": "fp32"}
                yield Variant(f"{dtype}-{name}", encode_kernel, signature, constants, WARPS, 1, UNFUSED, targets)
            for dtype in ("u8",) if native else ("bf16", "fp16", "fp32", "u8"):
                pointers = {"data_ptr": "*u8", "own_ptr": "*u8", "out_ptr": f"*{dtype}"}
                counts = {"parts": "i32", "part_stride": "i64:16", "own": "i32"}
                signature = {**pointers, **counts, **lengths, "steps": "fp32", "end": "fp32"}
                fixed = {**constants, "OWN": True, "ENCODE": dtype == "u8"}
                yield Variant(f"{dtype}-{name}", decode_sum_kernel, signature, fixed, WARPS, 1, UNFUSED, targets)


def _form(wire: str) -> Format:
    return FORMATS[cast(Wire, wire)]


def _constants(wire: str, native: bool) -> dict[str, object]:
    form = _form(wire)
    return {
        "GROUP": form.group,
        "LARGEST": form.largest,
        "STEP": form.step,
        "MANTISSA": form.mantissa,
        "NATIVE": native,
    }


def _native(wire: str, device: torch.device) -> bool:
    """Whether a device makes 8-bit floats itself."""
    return wire == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _limits(wire: str, limit: torch.dtype) -> tuple[float, float]:
    """`steps` and `end` of the kernels: how many steps of the largest codes a dtype holds, and its largest number."""
    end = torch.finfo(limit).max
    return end / _form(wire).step, end


def _encode(x: Tensor, wire: str, limit: torch.dtype) -> Tensor:
    form = _form(wire)
    rows, n = x.shape
    data = torch.empty(rows, form.encoded_width(n), dtype=torch.uint8, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    runs = triton.cdiv(n, PIECE)
    if rows and n:
        encode_kernel[(triton.cdiv(rows * runs, RUNS),)](
            x,
            data,
            rows,
            n,
            form.num_groups(n),
            runs,
            x.stride(0),
            data.stride(0),
            *_limits(wire, limit),
            **_constants(wire, _native(wire, x.device)),
            RUNS=RUNS,
            num_warps=WARPS,
            num_stages=1,
            **UNFUSED,
        )
    return data


def _decode_sum(
    data: Tensor, own: Tensor | None, at: int, n: int, dtype: torch.dtype, wire: str, encoded: bool
) -> Tensor:
    """The sum of `data` [parts, rows, bytes] and of `own`, which comes before number `at` of them.

    It is of a dtype, or encoded within the range of one.
    """
    form = _form(wire)
    parts, rows, width = data.shape
    out = data.new_empty(rows, width) if encoded else data.new_empty(rows, n, dtype=dtype)
    runs = triton.cdiv(n, PIECE)
    if rows and n:
        decode_sum_kernel[(triton.cdiv(rows * runs, RUNS),)](
            data,
            data if own is None else own,
            out,
            parts,
            data.stride(0),
            at,
            rows,
            n,
            form.num_groups(n),
            runs,
            width,
            *_limits(wire, dtype),
            **_constants(wire, encoded and _native(wire, data.device)),
            OWN=own is not None,
            ENCODE=encoded,
            RUNS=RUNS,
            num_warps=WARPS,
            num_stages=1,
            **UNFUSED,
        )
    return out


def _encode_fake(x: Tensor, wire: str, limit: torch.dtype) -> Tensor:
    return x.new_empty(len(x), _form(wire).encoded_width(x.shape[1]), dtype=torch.uint8)


def _decode_sum_fake(
    data: Tensor, own: Tensor | None, at: int, n: int, dtype: torch.dtype, wire: str, encoded: bool
) -> Tensor:
    return data.new_empty(data.shape[1:]) if encoded else data.new_empty(data.shape[1], n, dtype=dtype)


_encode_op = kernel_op(
    "encode(Tensor x, str wire, ScalarType limit) -> Tensor",
    _encode,
    fake=_encode_fake,
)
_decode_sum_op = kernel_op(
    "decode_sum(Tensor data, Tensor? own, int at, int n, ScalarType dtype, str wire, bool encoded) -> Tensor",
    _decode_sum,
    fake=_decode_sum_fake,
)


def encode(x: Tensor, wire: Wire, limit: torch.dtype) -> Tensor:
    """`seqpar.kernels.quantize.reference`, byte for byte where `x` is finite."""
    refuse_dtype("x", x.dtype)
    data: Tensor = _encode_op(x.detach(), wire, limit)
    return data


def decode(data: Tensor, n: int, dtype: torch.dtype, wire: Wire) -> Tensor:
    """`seqpar.kernels.quantize.reference`, bit for bit."""
    out: Tensor = _decode_sum_op(data.contiguous()[None], None, 0, n, dtype, wire, False)
    return out


def decode_sum(parts: Sequence[Tensor], n: int, dtype: torch.dtype, wire: Wire) -> Tensor:
    """`seqpar.kernels.quantize.reference`, bit for bit."""
    out: Tensor = _decode_sum_op(*_laid_out(parts), n, dtype, wire, False)
    return out


def recode_sum(parts: Sequence[Tensor], n: int, limit: torch.dtype, wire: Wire) -> Tensor:
    """`seqpar.kernels.quantize.reference`, byte for byte where the sums are finite."""
    data: Tensor = _decode_sum_op(*_laid_out(parts), n, limit, wire, True)
    return data


def _laid_out(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, int]:
    """Parts as one tensor and the one beside it: views where all but one lie evenly in one buffer.

    That is how collectives deliver them: what came from others in one buffer, the rank's own where it was.
    """
    if not torch.compiler.is_compiling() and all(part.is_contiguous() for part in parts):
        whole = _evenly(parts)
        if whole is not None:
            return whole, None, 0
        for at, own in enumerate(parts):
            rest = _evenly([part for i, part in enumerate(parts) if i != at])
            if rest is not None:
                return rest, own, at
    return torch.stack(list(parts)), None, 0


def _evenly(parts: Sequence[Tensor]) -> Tensor | None:
    """Contiguous parts as a view, if they lie at even distances in one buffer."""
    first, size = parts[0], parts[0].numel()
    distance = parts[1].storage_offset() - first.storage_offset() if len(parts) > 1 else size
    same = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    even = all(part.storage_offset() == first.storage_offset() + i * distance for i, part in enumerate(parts))
    if not (same and even and distance >= size):
        return None
    return first.as_strided((len(parts), *first.shape), (distance, *first.stride()))
