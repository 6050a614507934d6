"""Rows of a cache on the move: new keys and values to their slots, runs of rows from page to page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import Backend, choose_backend, unknown_backend
from seqpar.kernels.rows import reference
from seqpar.kernels.rows.fp8 import FP8

__all__ = ["FP8", "FP8_DTYPES", "Scales", "Span", "append_rows", "copy_spans"]

FP8_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of rows that are stored in 8 bits; see `fp8`."""

Scales = tuple[UInt8[Tensor, "*keys g"], UInt8[Tensor, "*keys g"]]
"""Those of keys and of values: an exponent for each token and KV head."""

Span = tuple[int, int, int]
"""(from, to, count): rows of a source, and the first of as many of a target."""


def append_rows(
    keys: Float[Tensor, "slots g d"],
    values: Float[Tensor, "slots g d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    slots: Int64[Tensor, " t"],
    *,
    scales: tuple[UInt8[Tensor, "slots g"], UInt8[Tensor, "slots g"]] | None = None,
    backend: Backend = "auto",
) -> None:
    """Write the keys and values of new tokens to their slots, in one launch.

    In:    k, v [T, G, D], any strides, such as views of a fused projection; keys, values [S, G, D], views of a cache.
    Out:   nothing; keys and values are written. The slots are distinct and of 0 to S - 1; on a GPU nobody looks, and
        a token of another slot is not written.

    Args:
        keys: Of a cache.
        values: Likewise.
        k: Of the new tokens.
        v: Likewise.
        slots: Where they go.
        scales: Those of keys and values in float8_e4m3fn, written as well (`fp8`); None for others, which are copied.
        backend: "torch", "reference", "triton" (on a GPU), or "auto", see `choose_backend`.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    shape = (len(slots), *keys.shape[1:])
    if keys.shape != values.shape or k.shape != shape or v.shape != shape:
        raise ValueError(
            f"`k` and `v` must be {list(shape)} (a row for each slot, the heads of the cache), "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if scales is not None:
        _check_scales(keys, values, k, v, scales)
    elif not keys.dtype == values.dtype == k.dtype == v.dtype:
        raise ValueError(f"`k` and `v` must be {keys.dtype}, as the cache, got {k.dtype} and {v.dtype}")
    if backend == "auto":
        backend = choose_backend("rows", keys.device, k.dtype)
    if backend == "triton":
        from seqpar.kernels.rows import triton

        triton.append_rows(keys, values, k, v, slots, scales)
    elif backend in ("torch", "reference"):  # PyTorch's own operator is the definition
        reference.append_rows(keys, values, k, v, slots, scales)
    else:
        raise unknown_backend(backend, "triton")


def _check_scales(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor]) -> None:
    """Refuse what is not written as numbers of 8 bits with a scale for each row of a head."""
    if keys.dtype != FP8 or values.dtype != FP8 or k.dtype != v.dtype or k.dtype not in FP8_DTYPES:
        raise ValueError(
            f"`keys` and `values` must be {FP8} with `scales`, and `k` and `v` of one of {list(map(str, FP8_DTYPES))}, "
            f"got {keys.dtype}, {values.dtype}, {k.dtype}, {v.dtype}"
        )
    if any(x.shape != keys.shape[:2] or x.dtype != torch.uint8 for x in scales) or not keys.shape[2]:
        raise ValueError(
            f"`scales` must be two of {list(keys.shape[:2])} in torch.uint8, of heads of at least 1, got "
            f"{[list(x.shape) for x in scales]} in {[x.dtype for x in scales]}"
        )


def copy_spans(
    target: Shaped[Tensor, "rows_to *row"],
    source: Shaped[Tensor, "rows_from *row"],
    spans: Sequence[Span],
    *,
    backend: Backend = "auto",
) -> None:
    """Copy runs of rows: selected blocks together, pages to where there is room, a page that is shared.

    In:    source, and target, which may be the same: contiguous, with rows of one shape. Spans are host integers.
    Out:   nothing; the target is written, as by one copy after another. Those that touch no rows of each other are one
        launch.

    Raises:
        ValueError: rows of another shape or dtype, spans out of range, or one that overlaps itself.
    """
    if target.shape[1:] != source.shape[1:] or target.dtype != source.dtype:
        raise ValueError(
            f"`target` must have rows as `source` has ({list(source.shape[1:])}, {source.dtype}), "
            f"got {list(target.shape[1:])}, {target.dtype}"
        )
    same = target.data_ptr() == source.data_ptr()
    for start, to, count in spans:
        inside = 0 <= start <= start + count <= len(source) and 0 <= to <= to + count <= len(target)
        if not inside or (same and start != to and abs(start - to) < count):
            raise ValueError(
                f"`spans` must lie within {len(source)} rows and {len(target)}, apart from themselves, "
                f"got {(start, to, count)}"
            )
    if backend == "auto":
        backend = choose_backend("rows", target.device, target.dtype)
    if backend == "triton":
        from seqpar.kernels.rows import triton

        triton.copy_spans(target, source, spans)
    elif backend in ("torch", "reference"):
        reference.copy_spans(target, source, spans)
    else:
        raise unknown_backend(backend, "triton")
