"""Helix in numbers: what its one exchange a layer sends, whatever the context.

Its overlap (HOP-B) is a schedule as any other: `makespan` of one program for each request.

Source: Helix Parallelism, arXiv:2507.07120.
"""

from __future__ import annotations

from fractions import Fraction

__all__ = ["helix_volume"]


def helix_volume(
    tokens: int, *, num_heads: int, head_dim: int, kvp: int, tpa: int, itemsize: int = 2, lse_itemsize: int = 4
) -> Fraction | int:
    """Bytes that each rank sends in the attention of one layer: outputs, and log-sum-exps, of the others' query heads.

    That is what `layers.QShipDecodeAttention` sends with `whole=True`, where heads divide.

    Args:
        tokens: of the step, over all requests.
        num_heads: of the model.
        head_dim: D.
        kvp: ranks that the context is split over.
        tpa: ranks that KV heads are split over.
        itemsize: bytes of an element.
        lse_itemsize: of a log-sum-exp.

    Raises:
        ValueError: a size that is none.
    """
    if min(num_heads, head_dim, kvp, tpa, itemsize, lse_itemsize) < 1 or tokens < 0:
        raise ValueError(
            "sizes must be at least 1, and `tokens` at least 0, got "
            f"{(tokens, num_heads, head_dim, kvp, tpa, itemsize, lse_itemsize)}"
        )
    sent = (kvp - 1) * tokens * Fraction(num_heads, kvp * tpa) * (head_dim * itemsize + lse_itemsize)
    return int(sent) if sent.denominator == 1 else sent
