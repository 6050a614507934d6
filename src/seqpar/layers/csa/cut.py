"""What a rank's keys are to another rank: which travel whole, and in which blocks the rest may be thinned or left out.

Host integers alone, so that sender and receiver know the same without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from seqpar.kernels import BlockLists
from seqpar.layers.ring import run_positions
from seqpar.partition import Range, RingOrder, Run
from seqpar.ragged import RaggedBatch

__all__ = [
    "EVERYTHING",
    "Cut",
    "cut_keys",
    "everyone_but",
    "kept",
    "positions_of",
    "query_blocks",
    "request_lists",
]

T = TypeVar("T")

EVERYTHING = 1 << 62
"""More positions than any request has."""


class Cut(NamedTuple):
    """The keys of one rank that the queries of another one see; rows are the owner's, requests one after another.

    Attributes:
        whole: rows that travel in any case: sinks, and those near a query.
        whole_of: the part of `whole` that belongs to each request.
        rest: the other rows.
        blocks: the rest in blocks, none of which straddles two requests, or two runs of tokens.
        blocks_of: the blocks of each request.
    """

    whole: Tensor
    whole_of: tuple[Range, ...]
    rest: Tensor
    blocks: tuple[Range, ...]
    blocks_of: tuple[Range, ...]


def cut_keys(
    order: RingOrder, receiver: int, owner: int, *, size: int | None, sinks: int, recent: int, tails: bool
) -> Cut:
    """Cut the keys of `owner` that queries of `receiver` see.

    Args:
        order: who holds what.
        receiver: whose queries.
        owner: whose keys.
        size: tokens of a block; None for no rest: only what is whole.
        sinks: first tokens of a request that are whole.
        recent: positions up to each query, its own included, that are whole.
        tails: whether a last block of fewer tokens is one, or whole.
    """
    whole: list[Tensor] = []
    rest: list[Tensor] = []
    blocks: list[Range] = []
    whole_of, blocks_of = [], []
    row = whole_rows = rest_rows = 0
    for asked, held in zip(order.q[receiver], order.kv[owner], strict=True):
        queries, first_whole, first_block = positions_of(asked).sort().values, whole_rows, len(blocks)
        for run in held:
            some, others = _split(queries, positions_of((run,)), order.window, sinks, recent)
            some, others = some + row, others + row
            full = 0 if size is None else len(others) if tails else len(others) // size * size
            some, others = torch.cat([some, others[full:]]) if size is not None else some, others[:full]
            step = size or 1
            blocks += [Range(at, min(at + step, full)).shift(rest_rows) for at in range(0, full, step)]
            whole.append(some)
            rest.append(others)
            row, whole_rows, rest_rows = row + run.size, whole_rows + len(some), rest_rows + full
        whole_of.append(Range(first_whole, whole_rows))
        blocks_of.append(Range(first_block, len(blocks)))
    none = torch.empty(0, dtype=torch.int64)
    return Cut(torch.cat([none, *whole]), tuple(whole_of), torch.cat([none, *rest]), tuple(blocks), tuple(blocks_of))


def everyone_but(order: RingOrder, owner: int | None) -> RingOrder:
    """As if every rank had the queries of all ranks but one, as where they sit by heads."""
    others = [rank for rank in range(order.ranks) if rank != owner]
    q = tuple(
        tuple(run for runs in request for run in runs) for request in zip(*(order.q[r] for r in others), strict=True)
    )
    return RingOrder((q or tuple(() for _ in order.q[0]),) * order.ranks, order.kv, order.window)


def _split(queries: Tensor, keys: Tensor, window: int | None, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
    """Indices of the keys that some query sees: those that are whole, and the others; both positions increase."""
    after = torch.searchsorted(queries, keys)
    seen = after < len(queries)
    ahead = queries[after[seen]] - keys[seen]
    which = seen.nonzero()[:, 0]
    if window is not None:
        which, ahead = which[ahead < window], ahead[ahead < window]
    near = (ahead < recent) | (keys[which] < sinks)
    return which[near], which[~near]


def positions_of(runs: Iterable[Run]) -> Tensor:
    """Of the tokens of some runs, on the host."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *map(run_positions, runs)])


def query_blocks(order: RingOrder, rank: int) -> tuple[tuple[Range, int], ...]:
    """The queries of a rank as blocks of consecutive tokens: local rows, and whose request they are."""
    found, row = [], 0
    for request, runs in enumerate(order.q[rank]):
        for run in runs:
            if run.size:
                found.append((Range(row, row + run.size), request))
            row += run.size
    return tuple(found)


def request_lists(queries: Sequence[tuple[Range, int]], keys: Sequence[Sequence[Range]]) -> BlockLists:
    """Each block of queries with all keys of its request, which lie head after head: `keys[head][request]`."""
    blocks: list[Range] = []
    lists: list[list[tuple[int, ...]]] = [[] for _ in queries]
    for of_head in keys:
        first, done = len(blocks), blocks[-1].stop if blocks else 0
        blocks += [each.shift(done) for each in of_head]
        for found, (_, request) in zip(lists, queries, strict=True):
            found.append((first + request,))
    return BlockLists(tuple(rows for rows, _ in queries), tuple(blocks), tuple(map(tuple, lists)))


def kept(batch: RaggedBatch, key: Hashable, make: Callable[[], T]) -> T:
    """What is the same in every layer of the batch."""
    if key not in batch.plans:
        batch.plans[key] = make()
    found: T = batch.plans[key]
    return found
