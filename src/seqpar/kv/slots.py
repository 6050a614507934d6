"""Rows for what is kept of each request: a request has one row until it is released, and rows never move."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

from seqpar.kv.compaction import CompactionPlan

__all__ = ["SlotTable"]


class SlotTable:
    """Which request has which row of tensors that hold something for every request.

    The rows of others stay as they are when one comes or goes, so state is written once, and a step gathers what it
    needs by `rows`. The lowest free row is handed out. Whoever wants the rows in one run instead moves the tensors by a
    plan, `compaction.plan(table.occupied)`, and tells the table by `follow`.

    Args:
        num_rows: the most requests at a time.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, num_rows: int) -> None:
        if num_rows < 0:
            raise ValueError(f"`num_rows` must be at least 0, got {num_rows}")
        self.num_rows = num_rows
        self._free = list(range(num_rows))  # a heap
        self._rows: dict[Hashable, int] = {}

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The requests that have a row, oldest first."""
        return tuple(self._rows)

    @property
    def num_free(self) -> int:
        """Rows that no request has."""
        return len(self._free)

    @property
    def occupied(self) -> tuple[bool, ...]:
        """Of each row, whether a request has it."""
        taken = set(self._rows.values())
        return tuple(row in taken for row in range(self.num_rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, request: Hashable) -> bool:
        return request in self._rows

    def row(self, request: Hashable) -> int:
        """The row of a request.

        Raises:
            ValueError: it has none.
        """
        if request not in self._rows:
            raise ValueError(f"`request` must have a row, got {request!r}")
        return self._rows[request]

    def rows(self, requests: Sequence[Hashable]) -> tuple[int, ...]:
        """The rows of requests, in their order."""
        return tuple(map(self.row, requests))

    def acquire(self, request: Hashable) -> int:
        """Give a request the lowest free row.

        Raises:
            ValueError: it has one already, or none is free; then nothing has changed.
        """
        if request in self._rows:
            raise ValueError(f"`request` must have no row yet, got {request!r} in row {self._rows[request]}")
        if not self._free:
            raise ValueError(f"`request` must find a free row (0 of {self.num_rows}), got {request!r}; release another")
        row = self._rows[request] = heapq.heappop(self._free)
        return row

    def release(self, request: Hashable) -> int:
        """Take a request's row back, and say which it was.

        Raises:
            ValueError: it has none.
        """
        row = self.row(request)
        del self._rows[request]
        heapq.heappush(self._free, row)
        return row

    def follow(self, plan: CompactionPlan) -> None:
        """Rename the rows as a plan has moved them, made from `occupied` as it is now.

        Raises:
            ValueError: the plan is of another number of rows, or moves what no request has or to where one is; then
                nothing has changed.
        """
        rows = {request: plan.follow(row) for request, row in self._rows.items()}
        before, taken = set(self._rows.values()), set(rows.values())
        left = {source for source, _ in plan.moves}
        if plan.num_slots != self.num_rows or not left <= before or len(taken) != len(rows):
            raise ValueError(
                f"`plan` must be made of the table's occupied rows ({self.num_rows} in all), got {plan} for "
                f"{sorted(before)}"
            )
        self._rows = rows
        self._free = [row for row in range(self.num_rows) if row not in taken]
