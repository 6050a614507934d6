"""Wire formats: what a collective sends in 8 bits instead of as it is.

Rows are encoded before the launch and decoded in the wait (`seqpar.kernels.quantize`), so what travels is bytes, and
its exchange is the one of any other tensor. A row's bytes depend on that row alone, and so does its result: not on the
rows that travel with it, nor on which rank holds it, for the own part is rounded like the others'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.quantize import Wire, check_wire, decode, encode, encoded_width

__all__ = ["RowCode", "Wire"]


class RowCode(NamedTuple):
    """How the rows of a flat tensor, `unit` numbers each, are encoded; and what dtype they had."""

    wire: Wire
    unit: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, wire: Wire | None, unit: int | None) -> RowCode | None:
        """The code of `x`; None where it travels as it is.

        Raises:
            ValueError: an unknown format, or a dtype that it does not take.
        """
        check_wire(wire, x)
        return None if wire is None or unit is None else cls(wire, unit, x.dtype)

    def num_bytes(self, numel: int) -> int:
        """Bytes of so many numbers, in whole rows."""
        return numel // self.unit * encoded_width(self.unit)

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes of rows, flat."""
        return encode(flat.view(-1, self.unit), self.wire).view(-1)

    def decode(self, data: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of encoded rows, flat."""
        rows = data.view(-1, encoded_width(self.unit))
        return decode(rows, self.unit, dtype or self.dtype, self.wire).view(-1)
