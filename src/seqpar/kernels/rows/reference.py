"""The definition of moving rows: keys and values to their slots, runs of rows one after another."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

__all__ = ["append_rows", "copy_spans"]


def append_rows(
    keys: Float[Tensor, "slots g d"],
    values: Float[Tensor, "slots g d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    slots: Int64[Tensor, " t"],
) -> None:
    """Row i of k and v goes to row `slots[i]` of keys and values."""
    keys.index_copy_(0, slots, k)
    values.index_copy_(0, slots, v)


def copy_spans(
    target: Shaped[Tensor, "rows_to *row"],
    source: Shaped[Tensor, "rows_from *row"],
    spans: Sequence[tuple[int, int, int]],
) -> None:
    """Of each (from, to, count), in order: that many rows of the source over those of the target."""
    for start, to, count in spans:
        target[to : to + count] = source[start : start + count]
