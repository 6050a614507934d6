"""Rows on the move, as many at once as there are: bytes in, bytes out.

`append_rows` writes keys and values in one launch, straight from the views of a fused projection. `copy_spans` takes a
table of runs, so that what is gathered, moved or copied is one launch however many pages it lies in; numbers are moved
as integers of their size, so there is one kernel for a size and none for a dtype.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op, refuse_dtype
from seqpar.kernels.quantize.triton import _float8, _native
from seqpar.kernels.targets import Variant

__all__ = ["append_rows", "copy_spans", "variants"]

BYTES, WARPS = 8192, 4
"""What a program moves at a time: four times 16 bytes a thread."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MOST_SPANS = 65535
"""Of one launch; a limit of the second dimension of a grid."""


@triton.jit
def append_rows_kernel(
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    num_slots,
    heads,
    dim,
    cache_row,
    cache_head,
    k_row,
    k_head,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (token, i): heads from `i * HEADS` on."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    head, column = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < tl.where((slot >= 0) & (slot < num_slots), heads, 0)) & (column < dim)
    key = tl.load(k_ptr + token * k_row + head * k_head + column, mask=inside, eviction_policy="evict_first")
    value = tl.load(v_ptr + token * v_row + head * v_head + column, mask=inside, eviction_policy="evict_first")
    to = slot * cache_row + head * cache_head + column
    tl.store(keys_ptr + to, key, mask=inside)
    tl.store(values_ptr + to, value, mask=inside)


@triton.jit
def _put_encoded(x, codes_ptr, scales_ptr, to, at, inside, written, NATIVE: tl.constexpr):
    """Store rows [heads, numbers] as 8-bit floats at `to`, and their exponents at `at`; see `fp8`."""
    x = x.to(tl.float32)
    magnitude = tl.abs(x)
    # What is not a number must reach the scale; tl.max passes over it.
    largest = tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), axis=1)
    # The exponent of the least power of two times 448 that is not below: a mantissa beyond that of 448 carries.
    scale = tl.maximum((largest.to(tl.int32, bitcast=True) + 0x1FFFFF >> 23) - 8, 1)
    inverse = (254 - scale << 23).to(tl.float32, bitcast=True)
    scaled = x * inverse[:, None]
    if NATIVE:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = _float8(scaled).to(tl.uint8)
    tl.store(codes_ptr + to, codes, mask=inside)
    tl.store(scales_ptr + at, tl.where(largest < float("inf"), scale, 255).to(tl.uint8), mask=written)


@triton.jit
def append_encoded_kernel(
    keys_ptr,
    values_ptr,
    k_scales_ptr,
    v_scales_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    num_slots,
    heads,
    dim,
    cache_row,
    cache_head,
    scale_row,
    k_row,
    k_head,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """`append_rows_kernel`, in 8 bits: a row of a head is read once, and is in one program whole."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM)[None, :]
    written = head < tl.where((slot >= 0) & (slot < num_slots), heads, 0)
    inside = written[:, None] & (column < dim)
    key = tl.load(k_ptr + token * k_row + head[:, None] * k_head + column, mask=inside, other=0.0)
    value = tl.load(v_ptr + token * v_row + head[:, None] * v_head + column, mask=inside, other=0.0)
    to = slot * cache_row + head[:, None] * cache_head + column
    at = slot * scale_row + head
    _put_encoded(key, keys_ptr, k_scales_ptr, to, at, inside, written, NATIVE)
    _put_encoded(value, values_ptr, v_scales_ptr, to, at, inside, written, NATIVE)


@triton.jit
def copy_spans_kernel(target_ptr, source_ptr, spans_ptr, width, BLOCK: tl.constexpr):
    """Program (i, span): from element `i * BLOCK` of a run on, of rows of `width` elements."""
    span_ptr = spans_ptr + tl.program_id(1) * 3
    start, to, count = tl.load(span_ptr), tl.load(span_ptr + 1), tl.load(span_ptr + 2)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count * width
    moved = tl.load(source_ptr + start * width + at, mask=inside, eviction_policy="evict_first")
    tl.store(target_ptr + to * width + at, moved, mask=inside)


def configuration(heads: int, dim: int) -> tuple[int, int, int]:
    """HEADS, DIM and warps: 16 numbers a thread, and of heads no more than there are."""
    block = triton.next_power_of_2(max(dim, 1))
    per_program = min(triton.next_power_of_2(max(heads, 1)), max(1, 2048 // block))
    return per_program, block, min(8, max(1, per_program * block // 512))


def variants() -> Iterator[Variant]:
    for type_ in ("i16", "i32"):
        for heads, dim in ((8, 128), (1, 128), (8, 64), (8, 256)):
            per_program, block, warps = configuration(heads, dim)
            strides = ("cache_row", "cache_head", "k_row", "k_head", "v_row", "v_head")
            yield Variant(
                f"{type_}-{heads}x{dim}",
                append_rows_kernel,
                {
                    **dict.fromkeys(("keys_ptr", "values_ptr", "k_ptr", "v_ptr"), f"*{type_}"),
                    "slots_ptr": "*i64",
                    **dict.fromkeys(("num_slots", "heads"), "i32"),
                    **dict.fromkeys(("dim", *strides), "i32:16"),
                },
                {"HEADS": per_program, "DIM": block},
                warps,
                1,
            )
        yield Variant(
            type_,
            copy_spans_kernel,
            {"target_ptr": f"*{type_}", "source_ptr": f"*{type_}", "spans_ptr": "*i64", "width": "i32:16"},
            {"BLOCK": BYTES // int(type_[1:]) * 8},
            WARPS,
            1,
        )
    yield from encoded_variants()


def encoded_variants() -> Iterator[Variant]:
    strides = ("cache_row", "cache_head", "k_row", "k_head", "v_row", "v_head")
    for native in (False, True):
        targets = ("sm_90", "sm_100") if native else ("sm_80", "sm_90", "sm_100", "gfx942")
        for type_ in ("bf16", "fp16", "fp32"):
            for heads, dim in ((8, 128), (1, 128), (8, 256)) if type_ == "bf16" else ((8, 128),):
                per_program, block, warps = configuration(heads, dim)
                bytes_ = ("keys_ptr", "values_ptr", "k_scales_ptr", "v_scales_ptr")
                yield Variant(
                    f"{type_}{'-native' if native else ''}-{heads}x{dim}",
                    append_encoded_kernel,
                    {
                        **dict.fromkeys(bytes_, "*u8"),
                        **dict.fromkeys(("k_ptr", "v_ptr"), f"*{type_}"),
                        "slots_ptr": "*i64",
                        **dict.fromkeys(("num_slots", "heads", "scale_row"), "i32"),
                        **dict.fromkeys(("dim", *strides), "i32:16"),
                    },
                    {"HEADS": per_program, "DIM": block, "NATIVE": native},
                    warps,
                    1,
                    {},
                    targets,
                )


def _append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    tokens, heads, dim = k.shape
    if not k.numel():
        return
    integer = INTEGERS[keys.itemsize]
    keys, values, k, v = (x.view(integer) for x in (keys, values, k, v))
    per_program, block, warps = configuration(heads, dim)
    append_rows_kernel[(tokens, triton.cdiv(heads, per_program))](
        keys,
        values,
        k,
        v,
        slots,
        len(keys),
        heads,
        dim,
        *keys.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=per_program,
        DIM=block,
        num_warps=warps,
        num_stages=1,
    )


def _append_encoded(
    keys: Tensor, values: Tensor, k_scales: Tensor, v_scales: Tensor, k: Tensor, v: Tensor, slots: Tensor
) -> None:
    tokens, heads, dim = k.shape
    if not k.numel():
        return
    per_program, block, warps = configuration(heads, dim)
    append_encoded_kernel[(tokens, triton.cdiv(heads, per_program))](
        keys,
        values,
        k_scales,
        v_scales,
        k,
        v,
        slots,
        len(keys),
        heads,
        dim,
        *keys.stride()[:2],
        k_scales.stride(0),
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=per_program,
        DIM=block,
        NATIVE=_native("fp8", k.device),
        num_warps=warps,
        num_stages=1,
    )


def _copy(target: Tensor, source: Tensor, spans: Tensor, longest: int) -> None:
    width = target[0].numel()
    integer = INTEGERS[target.itemsize]
    block = BYTES // target.itemsize
    copy_spans_kernel[(triton.cdiv(longest * width, block), len(spans))](
        target.view(integer), source.view(integer), spans, width, BLOCK=block, num_warps=WARPS, num_stages=1
    )


def _append_fake(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    return None


def _copy_fake(target: Tensor, source: Tensor, spans: Tensor, longest: int) -> None:
    return None


_append_op = kernel_op(
    "append_rows(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()",
    _append,
    fake=_append_fake,
    mutates=("keys", "values"),
)
_append_encoded_op = kernel_op(
    "append_encoded(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor k, Tensor v, "
    "Tensor slots) -> ()",
    _append_encoded,
    fake=lambda *args: None,
    mutates=("keys", "values", "k_scales", "v_scales"),
)
_copy_op = kernel_op(
    "copy_spans(Tensor(a!) target, Tensor source, Tensor spans, int longest) -> ()",
    _copy,
    fake=_copy_fake,
    mutates=("target",),
)


def append_rows(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: tuple[Tensor, Tensor] | None = None
) -> None:
    """`seqpar.kernels.rows.reference`."""
    if keys.stride() != values.stride() or (keys.numel() and keys.stride(2) != 1):
        raise ValueError(
            f"`keys` and `values` must have the same strides, 1 along a head, got {keys.stride()} and {values.stride()}"
        )
    k, v = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (k, v))
    if scales is None:
        _append_op(keys, values, k, v, slots)
        return
    refuse_dtype("k", k.dtype)
    if scales[0].stride() != scales[1].stride() or (keys.numel() and scales[0].stride(1) != 1):
        raise ValueError(
            f"`scales` must have the same strides, 1 along heads, got {scales[0].stride()} and {scales[1].stride()}"
        )
    _append_encoded_op(keys.view(torch.uint8), values.view(torch.uint8), *scales, k, v, slots)


def copy_spans(target: Tensor, source: Tensor, spans: Sequence[tuple[int, int, int]]) -> None:
    """`seqpar.kernels.rows.reference`."""
    if not (target.is_contiguous() and source.is_contiguous()):
        raise ValueError(
            f"`target` and `source` must be contiguous, got strides {target.stride()} and {source.stride()}"
        )
    moved = [span for span in spans if span[2]]
    if not target.numel() or not moved:
        return
    batches = [moved] if _apart(moved, in_place=target.data_ptr() == source.data_ptr()) else [[span] for span in moved]
    for batch in batches:
        for at in range(0, len(batch), MOST_SPANS):
            part = batch[at : at + MOST_SPANS]
            table = torch.tensor(part, dtype=torch.int64).to(target.device, non_blocking=True)
            _copy_op(target, source, table, max(count for _, _, count in part))


def _apart(spans: Sequence[tuple[int, int, int]], *, in_place: bool) -> bool:
    """Whether spans may be copied in any order: none writes what another one writes, or, in place, reads."""
    targets = sorted((to, to + count) for _, to, count in spans)
    if any(stop > start for (_, stop), (start, _) in pairwise(targets)):
        return False
    starts = [start for start, _ in targets]
    for start, to, count in spans if in_place else ():
        at = bisect_left(starts, start + count) - 1  # the last target that begins before this source ends
        if at >= 0 and targets[at][1] > start and targets[at] != (to, to + count):
            return False
    return True
