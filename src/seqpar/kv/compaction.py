"""Moving what lies in slots together, so that one run of slots holds all that lives.

When the requests of a batch end in any order, holes remain among the slots of fixed size that they had. A step over one
run of slots (one pointer and one count for every kernel and collective) either computes on the holes or has them
filled. `plan` says which slots are to move, out of which are occupied; `CompactionPlan.apply` moves them, in any tensor
that has one place for each slot.

The order of requests matters to nobody, so the fewest moves win: of all runs as long as there are live slots "window"
takes the one that holds the most of them, and moves those outside into its holes. That takes as many moves as live
slots lie outside, and no way of making a run takes fewer, since each of them must move at least once. No slot is both
left and filled, so the moves are independent of one another and need no scratch memory. What it gains over filling
holes from the end ("tail") is a few hundredths of the moves in serving; over keeping the order ("stable") a factor.

Caches need no compaction where a page table says what lies where. It serves buffers without one, and those who want
the requests of a step as views.

Source: Flover, arXiv:2305.13484 ("window"); `condense` of vLLM's persistent batch ("tail").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from seqpar.kernels.rows import copy_spans

__all__ = ["CompactionPlan", "Strategy", "plan"]

T = TypeVar("T")

Strategy = Literal["none", "tail", "window", "stable"]
"""How slots are brought together; see `plan`."""


@dataclass(frozen=True)
class CompactionPlan:
    """Which slots move where; afterwards all that lives is in the slots [start, start + size).

    Attributes:
        start: the first slot of the run.
        moves: (from, to) of each slot that moves, in an order in which they may be done one by one, in place.
        size: slots of the run.
        num_slots: slots in all.
    """

    start: int
    moves: tuple[tuple[int, int], ...]
    size: int
    num_slots: int

    def apply(self, tensor: Tensor, dim: int = 0, lengths: Sequence[int] | None = None) -> None:
        """Move the slots of a tensor, in place; what they leave behind stays there and means nothing.

        With `lengths` no memory is taken: each slot's used part is copied by itself. Without, the slots that move are
        gathered and then put down, two kernels for however many, through a copy of them.

        Args:
            tensor: with one place for each slot along `dim`.
            dim: which dimension that is.
            lengths: how much of each slot is used, before the moves, along the dimension after `dim`; the rest is not
                copied. None copies whole slots.

        Raises:
            ValueError: the tensor has another number of slots, or `lengths` are not as many as those or longer than
                they are; then nothing was moved.
        """
        dim = dim % tensor.dim()
        if tensor.shape[dim] != self.num_slots:
            raise ValueError(f"`tensor` must have {self.num_slots} slots along dim {dim}, got {list(tensor.shape)}")
        if lengths is None:
            self._move_whole(tensor, dim)
            return
        room = tensor.shape[dim + 1] if dim + 1 < tensor.dim() else 0
        if len(lengths) != self.num_slots or not all(0 <= length <= room for length in lengths):
            raise ValueError(
                f"`lengths` must be {self.num_slots} numbers, one a slot, of 0 to {room} (the size of dim {dim + 1}), "
                f"got {list(lengths)}"
            )
        if dim == 0 and tensor.dim() > 1 and tensor.is_contiguous():
            spans = [(source * room, target * room, lengths[source]) for source, target in self.moves]
            copy_spans(tensor.flatten(0, 1), tensor.flatten(0, 1), spans)
            return
        for source, target in self.moves:
            used = lengths[source]
            tensor.select(dim, target).narrow(dim, 0, used).copy_(tensor.select(dim, source).narrow(dim, 0, used))

    def reorder(self, items: Sequence[T]) -> list[T]:
        """A list with one item for each slot, moved likewise.

        Raises:
            ValueError: another number of items.
        """
        if len(items) != self.num_slots:
            raise ValueError(f"`items` must have one for each of {self.num_slots} slots, got {len(items)}")
        moved = list(items)
        for source, target in self.moves:
            moved[target] = items[source]
        return moved

    def follow(self, slot: int) -> int:
        """The slot in which lies what was in `slot`."""
        return self._targets.get(slot, slot)

    @cached_property
    def _targets(self) -> dict[int, int]:
        return dict(self.moves)

    def _move_whole(self, tensor: Tensor, dim: int) -> None:
        if self.moves:
            sources, targets = torch.tensor(self.moves, device=tensor.device).unbind(1)
            tensor.index_copy_(dim, targets, tensor.index_select(dim, sources))


def plan(occupied: Sequence[bool], strategy: Strategy = "window") -> CompactionPlan:
    """Which slots to move, so that the occupied ones form one run.

    "none": nothing moves; the run is the shortest that has all of them, holes included.
    "tail": the run begins at slot 0; the last occupied slots go to its first holes.
    "window": the run that holds the most occupied slots already, the first of such; the fewest moves there can be.
    "stable": the order of the slots stays as it is; the fewest moves under that condition.

    Args:
        occupied: of each slot, whether something that lives is in it.
        strategy: which of them.

    Raises:
        ValueError: another strategy.

    >>> plan([True, False, True, True, False, True], "window")
    CompactionPlan(start=0, moves=((5, 1),), size=4, num_slots=6)
    >>> plan([True, False, True, True, False, True], "stable")
    CompactionPlan(start=1, moves=((5, 4), (0, 1)), size=4, num_slots=6)
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"`strategy` must be one of {', '.join(map(repr, get_args(Strategy)))}, got {strategy!r}")
    live = [slot for slot, taken in enumerate(occupied) if taken]
    start, size, moves = 0, len(live), []
    if strategy == "none" and live:
        start, size = live[0], live[-1] + 1 - live[0]
    elif strategy == "tail":
        moves = list(zip(reversed(live), _holes(occupied, 0, size), strict=False))
    elif strategy == "window":
        start = _fullest(occupied, size)
        outside = [slot for slot in live if not start <= slot < start + size]
        moves = list(zip(outside, _holes(occupied, start, size), strict=True))
    elif strategy == "stable" and live:
        start, moves = _in_order(live)
    return CompactionPlan(start, tuple(moves), size, len(occupied))


def _holes(occupied: Sequence[bool], start: int, size: int) -> list[int]:
    return [slot for slot in range(start, start + size) if not occupied[slot]]


def _fullest(occupied: Sequence[bool], size: int) -> int:
    """The first of the runs of `size` slots that have the most occupied ones."""
    before = list(accumulate(occupied, initial=0))
    inside = [last - first for first, last in zip(before, before[size:], strict=False)]
    return inside.index(max(inside))


def _in_order(live: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Where the run begins that most slots of a list are at their places of already, and the moves of the others.

    Slots before those that stay move up, the last of them first; those after move down, the first of them first. So
    none is filled that is yet to be left.
    """
    holes = [slot - rank for rank, slot in enumerate(live)]  # before each slot
    start = Counter(holes).most_common(1)[0][0]
    moves = [(slot, start + rank) for rank, slot in enumerate(live)]
    down = [(slot, target) for slot, target in moves if target < slot]
    up = [(slot, target) for slot, target in reversed(moves) if target > slot]
    return start, down + up
