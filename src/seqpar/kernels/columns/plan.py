"""Which columns of a token-sharded matrix go to whom, in units such as heads: integers, and their table on a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Int32
from torch import Tensor

__all__ = ["KEY", "OTHER", "QUERY", "ColumnPlan"]

OTHER, QUERY, KEY = 0, 1, 2
"""What a unit is: a value, or whatever is moved as it is; a query head; a key head."""


@dataclass(frozen=True)
class ColumnPlan:
    """The units of each destination, one block after another; a unit may go to several.

    Attributes:
        blocks: of each destination, the units that it gets, in order.
        unit: columns of a unit.
        kinds: of each unit of the matrix, what it is; empty where nobody asks.
    """

    blocks: tuple[tuple[int, ...], ...]
    unit: int
    kinds: tuple[int, ...] = ()
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Units of all blocks."""
        return sum(map(len, self.blocks))

    @property
    def tiles(self) -> bool:
        """Whether every unit goes to one destination."""
        return sorted(unit for block in self.blocks for unit in block) == list(range(self.total))

    def table(self, device: torch.device) -> Int32[Tensor, "five total"]:
        """What a kernel asks of each unit of the blocks.

        Its place in the matrix; units of the blocks before its own; units of its own block; its place there; its kind.
        """
        if device not in self._tables:
            before = [0, *accumulate(map(len, self.blocks))]
            rows = [
                (unit, before[i], len(block), j, self.kinds[unit] if self.kinds else OTHER)
                for i, block in enumerate(self.blocks)
                for j, unit in enumerate(block)
            ]
            with torch.inference_mode(False):
                made = torch.tensor(rows, dtype=torch.int32).view(-1, 5).t().contiguous().to(device)
            self._tables[device] = made
        return self._tables[device]
