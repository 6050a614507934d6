"""What the parts of a layer take on one rank, measured by size: what stands in the place of an accelerator's rates.

Rates and tiles are a good account of a device whose data sheet is known. On the machine at hand there is a better one:
each product at the sizes that it was run with, attention by the pairs that it multiplies, and what is left of whole
layers of this library under each layout (norms, rotary embedding, packing, launches, the host). So what is measured
adds up to layers that were timed, and what is told apart can be told of other numbers of tokens, layouts and models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log
from typing import Any, NamedTuple

from seqpar.partition import Layout
from seqpar.plan.costs import Curve, curve_of

__all__ = ["Around", "Operators", "Product"]

SLOTS = 4  # of a layer: projections, attention, output projection, MLP


class Product(NamedTuple):
    """A matrix product [rows, inner] x [inner, columns], by rows."""

    columns: int
    inner: int
    seconds: Curve


class Around(NamedTuple):
    """What a layout takes beside products and attention, by the step's tokens.

    Attributes:
        layout: that was measured.
        slots: of a layer, one curve for each.
        ends: embedding and final norm.
    """

    layout: Layout
    slots: tuple[Curve, ...]
    ends: Curve


@dataclass(frozen=True)
class Operators:
    """Seconds of one rank's work, by operator and size.

    Args:
        products: that were measured; others take what the one nearest in shape does, by their work.
        prompts: attention of new tokens among themselves, by pairs x query heads x head_dim.
        behind: the same of new tokens behind cached ones.
        decode_s: of each decoding request in one layer's attention.
        key_s: of each cached key x query head x head_dim that decodes read.
        around: under each layout that was measured; others take what the nearest does.
        width: hidden size of the layers that `around` is of; wider ones take in proportion.
        itemsize: bytes of a number.

    Raises:
        ValueError: nothing measured, sizes below 1, negative times.
    """

    products: tuple[Product, ...]
    prompts: Curve
    behind: Curve
    decode_s: float
    key_s: float
    around: tuple[Around, ...]
    width: int
    itemsize: int

    def __post_init__(self) -> None:
        if not self.products or not self.around or any(len(each.slots) != SLOTS for each in self.around):
            raise ValueError(
                f"`products` and `around` must not be empty, of {SLOTS} slots each, got {len(self.products)} and "
                f"{[len(each.slots) for each in self.around]}"
            )
        sizes = (self.width, self.itemsize, *(size for each in self.products for size in each[:2]))
        if min(sizes) < 1 or not (0 <= self.decode_s < inf and 0 <= self.key_s < inf):
            raise ValueError(
                "sizes must be at least 1 and seconds finite and >= 0, got "
                f"{min(sizes)}, {self.decode_s} and {self.key_s}"
            )

    def product_s(self, rows: int, columns: int | float, inner: int | float) -> float:
        """A product of so many rows: its own curve, or the nearest one's for as much work."""
        near = min(self.products, key=lambda each: _distance(each.columns, columns) + _distance(each.inner, inner))
        return near.seconds(rows) * (columns * inner) / (near.columns * near.inner)

    def prompts_s(self, work: int | float, *, cached: bool) -> float:
        """Attention of prompts of so many pairs x query heads x head_dim."""
        return (self.behind if cached else self.prompts)(round(work))

    def decodes_s(self, requests: int, work: int | float) -> float:
        """Attention of decodes that read so many keys x query heads x head_dim."""
        return requests * self.decode_s + work * self.key_s

    def around_s(self, layout: Layout, tokens: int, width: int) -> tuple[float, ...]:
        """Of each slot, under the nearest layout that splits the same axes, at as many elements for each rank."""
        near, alike = self._alike(layout, tokens, width)
        return tuple(slot(alike) for slot in near.slots)

    def ends_s(self, layout: Layout, tokens: int, width: int) -> float:
        """Embedding and final norm, likewise."""
        near, alike = self._alike(layout, tokens, width)
        return near.ends(alike)

    def _alike(self, layout: Layout, tokens: int, width: int) -> tuple[Around, int]:
        """The nearest layout, and how many tokens are as many elements there."""
        near = min(self.around, key=lambda each: self._apart(each.layout, layout))
        return near, max(1, round(tokens * near.layout.sp / layout.sp * width / self.width))

    @staticmethod
    def _apart(one: Layout, other: Layout) -> tuple[int, float]:
        axes = ((one.tp > 1) != (other.tp > 1)) + ((one.sp > 1) != (other.sp > 1))
        return axes, _distance(one.tp, other.tp) + _distance(one.sp, other.sp)

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Operators:
        """Of what `dataclasses.asdict` and JSON make of it.

        Raises:
            ValueError: another content.
        """
        try:
            return cls(
                tuple(Product(columns, inner, curve_of(**curve)) for columns, inner, curve in content["products"]),
                curve_of(**content["prompts"]),
                curve_of(**content["behind"]),
                content["decode_s"],
                content["key_s"],
                tuple(
                    Around(Layout(*layout), tuple(curve_of(**slot) for slot in slots), curve_of(**ends))
                    for layout, slots, ends in content["around"]
                ),
                content["width"],
                content["itemsize"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"`content` must be what `dataclasses.asdict` makes of operators, got {error!r}") from None


def _distance(one: int | float, other: int | float) -> float:
    return abs(log(one / other))
