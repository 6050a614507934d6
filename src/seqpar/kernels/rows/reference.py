"""The definition of moving rows: keys and values to their slots, runs of rows one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from seqpar.kernels.rows import fp8

__all__ = ["append_rows", "copy_spans"]


def append_rows(
    keys: Float[Tensor, "slots g d"],
    values: Float[Tensor, "slots g d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    slots: Int64[Tensor, " t"],
    scales: tuple[UInt8[Tensor, "slots g"], UInt8[Tensor, "slots g"]] | None = None,
) -> None:
    """Row i of k and v goes to row `slots[i]` of keys and values; with `scales` in 8 bits."""
    if scales is None:
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)
        return
    for rows, exponents, x in zip((keys, values), scales, (k, v), strict=True):
        codes, scale = fp8.encode(x)
        rows.view(torch.uint8).index_copy_(0, slots, codes.view(torch.uint8))
        exponents.index_copy_(0, slots, scale)


def copy_spans(
    target: Shaped[Tensor, "rows_to *row"],
    source: Shaped[Tensor, "rows_from *row"],
    spans: Sequence[tuple[int, int, int]],
) -> None:
    """Of each (from, to, count), in order: that many rows of the source over those of the target."""
    for start, to, count in spans:
        target[to : to + count] = source[start : start + count]
