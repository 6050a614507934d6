"""How a ragged batch becomes few calls of a dense attention operator: pure planning on host integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from seqpar.ragged import RaggedBatch

__all__ = ["Group", "HeadRun", "head_runs", "make_groups", "make_tiles"]


class HeadRun(NamedTuple):
    """Consecutive query heads that share consecutive KV heads in one ratio."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


class Group(NamedTuple):
    """Neighbouring requests of one shape whose keys lie evenly spaced: one call serves them all.

    Keys that no query sees because of the window are already left out, so `prefix` + `q_len` keys remain.
    """

    row: int
    requests: int
    q_len: int
    prefix: int
    start: int
    """Address of the first request's first key, in tokens; relative to the gathered pages where there are some."""
    stride: int
    """Tokens from one request's first key to the next request's."""
    pages: tuple[int, ...] = ()
    """Pages to gather first, where one request's keys are scattered."""

    @property
    def kv_len(self) -> int:
        return self.prefix + self.q_len


def head_runs(kv_head_of: tuple[int, ...]) -> tuple[HeadRun, ...]:
    """Cut the local heads where the ratio of query to KV heads changes, or where a KV head is left out.

    >>> head_runs((0, 0, 1, 1))
    (HeadRun(q_start=0, q_stop=4, kv_start=0, kv_stop=2),)
    >>> head_runs((0, 1, 1, 1, 2, 2, 2))
    (HeadRun(q_start=0, q_stop=1, kv_start=0, kv_stop=1), HeadRun(q_start=1, q_stop=7, kv_start=1, kv_stop=3))
    """
    runs: list[HeadRun] = []
    at = 0
    for kv_head, same in groupby(kv_head_of):
        ratio = len(list(same))
        last = runs[-1] if runs else None
        if last and last.kv_stop == kv_head and last.q_stop - last.q_start == ratio * (kv_head - last.kv_start):
            runs[-1] = last._replace(q_stop=at + ratio, kv_stop=kv_head + 1)
        else:
            runs.append(HeadRun(at, at + ratio, kv_head, kv_head + 1))
        at += ratio
    return tuple(runs)


def make_groups(batch: RaggedBatch, window: int | None) -> tuple[Group, ...]:
    """Cover all rows of the batch, in order, with as few groups as joining neighbours allows."""
    groups: list[Group] = []
    for item in _requests(batch, window):
        joined = _join(groups[-1], item) if groups else None
        if joined is None:
            groups.append(item)
        else:
            groups[-1] = joined
    return tuple(groups)


def make_tiles(
    q_lens: Sequence[int], kv_lens: Sequence[int], requests: Iterable[int], ratio: int, rows: int
) -> list[tuple[int, int]]:
    """Tiles of so many rows, `ratio` of them a token, of some requests: (request, number), those of most keys first."""
    found = []
    for request in requests:
        new, old = q_lens[request], max(0, kv_lens[request] - q_lens[request])
        found += [(old + (at + rows) // ratio, request, at // rows) for at in range(0, new * ratio, rows)]
    return [(request, number) for _, request, number in sorted(found, key=lambda tile: -tile[0])]


def _requests(batch: RaggedBatch, window: int | None) -> Iterator[Group]:
    """Each request that has new tokens, alone."""
    for request, (new, keys) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
        if new == 0:
            continue
        hidden = max(0, keys - new + 1 - (window or keys))
        start, pages = _locate(batch, request, hidden)
        yield Group(batch.q_starts[request], 1, new, keys - new - hidden, start, 0, pages)


def _locate(batch: RaggedBatch, request: int, first: int) -> tuple[int, tuple[int, ...]]:
    """Where a request's keys lie from key `first` on: an address, and the pages to gather unless adjacent."""
    if not batch.has_cache:
        return batch.kv_starts[request] + first, ()
    skipped, offset = divmod(first, batch.page_size)
    pages = batch.pages[request][skipped:]
    if all(b == a + 1 for a, b in pairwise(pages)):
        return pages[0] * batch.page_size + offset, ()
    return offset, pages


def _join(group: Group, item: Group) -> Group | None:
    """`group` with one more request, when that one has its shape and keeps its spacing."""
    stride = item.start - group.start - (group.requests - 1) * group.stride
    alike = (item.q_len, item.prefix) == (group.q_len, group.prefix) and not (item.pages or group.pages)
    even = stride >= 0 and (group.requests == 1 or stride == group.stride)
    return group._replace(requests=group.requests + 1, stride=stride) if alike and even else None
