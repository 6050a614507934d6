"""Where things lie in the memory that the ranks of a sum share, and which rows are whose: integers only."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ALIGNMENT", "STAGES", "ArenaPlan"]

ALIGNMENT = 128
"""Bytes; a cache line, and a multiple of what any load needs."""

STAGES = 2
"""Meetings of a call at most: partials are staged, results are gathered."""


class ArenaPlan(NamedTuple):
    """The layout of one rank's arena, the same on all of them; offsets and sizes are in bytes.

    Each block has a counter of its calls, and for each stage and rank a flag, which that rank alone writes. Partials
    are staged in one of two halves by turns. What other ranks computed is gathered.

    Attributes:
        ranks: that share.
        blocks: programs of every call, however many rows it has: only so do their counters stay equal.
        capacity: of a half; the largest partial.
    """

    ranks: int
    blocks: int
    capacity: int

    def check(self) -> ArenaPlan:
        """This plan.

        Raises:
            ValueError: a size below 1.
        """
        for name, value in self._asdict().items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        return self

    @property
    def flags(self) -> int:
        """Where flags start, [stages, blocks, ranks] of 8 bytes; the counters stand before them."""
        return _aligned(8 * self.blocks)

    @property
    def staged(self) -> int:
        """Where the first half starts."""
        return self.flags + _aligned(8 * STAGES * self.blocks * self.ranks)

    @property
    def half(self) -> int:
        """From the first half to the second."""
        return _aligned(self.capacity)

    @property
    def gathered(self) -> int:
        """Where results are gathered."""
        return self.staged + 2 * self.half

    @property
    def num_bytes(self) -> int:
        """Of the whole arena."""
        return self.gathered + self.half


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
