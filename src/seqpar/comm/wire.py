"""Wire formats: what a collective sends in 8 bits a number instead of as it is.

Rows are encoded before the launch and decoded in the wait (`seqpar.kernels.quantize`), so what travels is bytes, whose
exchange is that of any other tensor, and schedules, links, traces and counts see them as such. Errors:

* all_gather, all_to_all, the reshards: one rounding of each number.
* reduce_scatter: the sum of the roundings of the p summands; they are added in float32, in rank order.
* all_reduce of two ranks: the same, for each sends the other all that it has. Of more: rows are summed where
  reduce_scatter would put them, and the sums rounded once more to be gathered.

What a rank keeps is rounded like what it sends. So ranks agree bit for bit, and a row's result depends on that row
alone: not on the rows that travel with it, on how many, or on which rank holds it. A prompt in chunks is the prompt at
once. That is also why the number of ranks alone decides between the two forms of all_reduce, where one without a wire
format goes by size.

Gradients are those of the same collective without a wire format, and travel as they are: rounding has a derivative of
zero almost everywhere, and what trains through it is the straight-through estimate. A group of one sends nothing, and
rounds nothing.

Rounding to nearest, with the error left where it falls, is the whole method: what other work adds (a rotation before,
a sparse part at full precision, errors carried to the next step) costs bytes, compute or state.

Source: two-step reduction in low precision is Flash Communication's (arXiv:2412.04964); ISO (arXiv:2409.11155) sends
int8 between cards without a fast link.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.quantize import (
    FORMATS,
    PIECE,
    Wire,
    check_wire,
    decode,
    decode_sum,
    encode,
    encoded_width,
    recode_sum,
)

__all__ = ["Code", "Wire", "check_wire"]


class Code(NamedTuple):
    """How the numbers of a tensor travel: as they are, or encoded in rows of `unit`."""

    wire: Wire | None
    unit: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, wire: Wire | None, unit: int | None = None) -> Code:
        """The code of `x`, whose rows are its last dimension.

        Raises:
            ValueError: an unknown format, or a dtype that it does not take.
        """
        check_wire(wire, x)
        return cls(wire, max(1, (x.shape[-1] if x.ndim else 1) if unit is None else unit), x.dtype)

    @classmethod
    def of_sum(cls, x: Tensor, wire: Wire | None, p: int) -> Code:
        """The code of a tensor whose rows are shared out to `p` ranks: in pieces where there are few rows.

        The bytes of a piece are the same in both.
        """
        code = cls.of(x, wire)
        few = code.unit % PIECE == 0 and x.numel() < 8 * p * code.unit
        return code._replace(unit=PIECE) if few else code

    def size(self, numel: int) -> int:
        """Elements of the buffer that carries so many numbers."""
        return numel if self.wire is None else numel // self.unit * encoded_width(self.unit, self.wire)

    def num_bytes(self, numel: int) -> int:
        """Bytes of that buffer."""
        return self.size(numel) * (self.dtype.itemsize if self.wire is None else 1)

    def encode(self, x: Tensor) -> Tensor:
        """The flat buffer that travels; the memory of `x` itself where that is contiguous and travels as it is."""
        flat = x.contiguous().view(-1)
        if self.wire is None:
            return flat
        rows = encode(flat.view(-1, self.unit), self.wire, limit=self.dtype)
        return rows.view(-1).view(FORMATS[self.wire].codes)  # so that ranks in different formats do not look alike

    def decode(self, flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, flat."""
        if self.wire is None:
            return flat
        (rows,) = self._rows([flat])
        return decode(rows, self.unit, dtype or self.dtype, self.wire).view(-1)

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum in float32 of encoded tensors, from left to right, rounded to the dtype."""
        assert self.wire is not None
        return decode_sum(self._rows(parts), self.unit, self.dtype, self.wire).view(-1)

    def sum_encoded(self, parts: Sequence[Tensor]) -> Tensor:
        """That sum, encoded before it is rounded."""
        assert self.wire is not None
        rows = recode_sum(self._rows(parts), self.unit, self.dtype, self.wire)
        return rows.view(-1).view(FORMATS[self.wire].codes)

    def _rows(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert self.wire is not None
        width = encoded_width(self.unit, self.wire)
        return [part.view(torch.uint8).view(-1, width) for part in parts]
