"""Into how many parts the keys of decodes are split: host integers."""

from __future__ import annotations

__all__ = ["MAX_QUERIES", "MAX_SPLITS", "SPLIT_KEYS", "split_count"]

MAX_QUERIES = 8
"""New tokens of a request up to which it is a decode."""

SPLIT_KEYS = 1024
"""Keys of a part where parts are to depend on nothing else."""

MAX_SPLITS = 128
START_BLOCKS = 2.0
"""What a part costs beside its blocks of keys, in blocks: its launch, its queries, and a pipeline to fill."""
MERGE_BLOCKS = 0.125
"""What each part adds to merging, in blocks."""


def split_count(tiles: int, blocks: int, slots: int) -> int:
    """The number of parts of each request's keys with which a launch ends soonest.

    Blocks of a wave run side by side, so the time is that of the waves, each as long as a part, and of merging. With as
    many requests and KV heads as slots nothing is split; with one of each, keys are spread over all processors.

    >>> split_count(tiles=264, blocks=512, slots=264), split_count(tiles=8, blocks=512, slots=264)
    (1, 32)
    >>> split_count(tiles=8, blocks=1, slots=264)
    1

    Args:
        tiles: requests times KV heads.
        blocks: of keys that the longest request has.
        slots: blocks of threads that the device runs at a time.
    """
    if tiles < 1 or blocks < 1:
        return 1

    def cost(splits: int) -> float:
        waves, each = -(-tiles * splits // slots), -(-blocks // splits)
        return waves * (each + START_BLOCKS) + (MERGE_BLOCKS * splits if splits > 1 else 0)

    return min(range(1, min(blocks, MAX_SPLITS) + 1), key=cost)
