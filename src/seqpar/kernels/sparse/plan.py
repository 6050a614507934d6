"""Which blocks of keys each block of queries attends to: host integers."""

from __future__ import annotations

from dataclasses import dataclass

from seqpar.partition import Range

__all__ = ["BlockLists"]


@dataclass(frozen=True)
class BlockLists:
    """For each block of queries and each KV head the blocks of keys that its queries attend to.

    Blocks may be of any size, so requests, slices and shorter last blocks need no padding. Keys lie as rows of any
    head: a block belongs to the heads that list it, and heads need not list equally many.

    Args:
        rows: the queries of each block.
        keys: the keys of each block.
        lists: entry [block of queries][KV head] has indices of blocks of keys.

    Raises:
        ValueError: lists that are not one for each block of queries, all of as many heads, or of blocks that are not
            there.
    """

    rows: tuple[Range, ...]
    keys: tuple[Range, ...]
    lists: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        heads = {len(lists) for lists in self.lists}
        if len(self.lists) != len(self.rows) or len(heads) > 1:
            raise ValueError(
                f"`lists` must have an entry for each of {len(self.rows)} blocks of queries, each of as many KV heads, "
                f"got {len(self.lists)} of {sorted(heads)}"
            )
        if any(not 0 <= block < len(self.keys) for lists in self.lists for blocks in lists for block in blocks):
            raise ValueError(f"`lists` must name blocks of the {len(self.keys)} that there are, got {self.lists}")

    def spans(self, query_block: int, head: int) -> tuple[Range, ...]:
        """The keys that a block of queries attends to in one KV head, neighbours joined.

        Raises:
            ValueError: a block or a head that there is not.
        """
        heads = len(self.lists[0]) if self.lists else 0
        if not (0 <= query_block < len(self.lists) and 0 <= head < heads):
            raise ValueError(
                f"`query_block` and `head` must lie below {len(self.lists)} and {heads}, got {query_block} and {head}"
            )
        found: list[Range] = []
        for block in self.lists[query_block][head]:
            keys = self.keys[block]
            if found and found[-1].stop == keys.start:
                found[-1] = Range(found[-1].start, keys.stop)
            elif keys.size:
                found.append(keys)
        return tuple(found)
