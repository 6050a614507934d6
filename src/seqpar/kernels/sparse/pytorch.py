"""Attention by block lists as few tiles: keys that all rows of a block see need no mask, those that none sees no work.

KV heads whose lists lead to the same positions share a call, which is all of them where nothing was left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.sparse.plan import BlockLists
from seqpar.kernels.tile import tile_attention
from seqpar.partition import TILE_ROWS, Range

__all__ = ["sparse_attention"]


def sparse_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    lists: BlockLists,
    q_positions: Int64[Tensor, " s"],
    k_positions: Int64[Tensor, " n"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    window: int | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """`seqpar.kernels.sparse.reference`, each query attended with once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for block, rows in enumerate(lists.rows):
        spans = [lists.spans(block, head) for head in range(len(lists.lists[block]))]
        positions = [_take(k_positions, each) for each in spans]
        for heads in _alike(positions):
            own = [head for head, kv_head in enumerate(kv_head_of) if heads.start <= kv_head < heads.stop]
            if not own or not rows.size:
                continue
            keys, values = (torch.stack([_take(x, spans[head]) for head in range(*heads)], 1) for x in (k, v))
            read = tuple(kv_head_of[head] - heads.start for head in own)
            columns = slice(own[0], own[-1] + 1)
            for part, seen, mask in _parts(q_positions, rows, positions[heads.start], window):
                there = slice(*part), columns
                out[there], lse[there] = tile_attention(
                    q[there],
                    keys if seen is None else keys[seen.to(k.device)],
                    values if seen is None else values[seen.to(k.device)],
                    softmax_scale=softmax_scale,
                    kv_head_of=read,
                    mask=None if mask is None else mask.to(q.device),
                    backend="torch",
                )
    return out, lse


def _parts(
    q_positions: Tensor, rows: Range, keys: Tensor, window: int | None
) -> Iterator[tuple[Range, Tensor | None, Tensor | None]]:
    """Rows, which keys some of them may see (None for all), and their mask where not all of them see all of those."""
    own = q_positions[slice(*rows)]
    low, high = int(own.min()), int(own.max())
    some, every = keys <= high, keys <= low
    if window is not None:
        some &= keys > low - window
        every &= keys > high - window
    if not some.any():
        return
    seen = None if some.all() else some.nonzero()[:, 0]
    if every[some].all():
        yield rows, seen, None
    elif rows.size <= TILE_ROWS:
        age = own[:, None] - (keys if seen is None else keys[seen])
        yield rows, seen, (age >= 0) if window is None else (age >= 0) & (age < window)
    else:
        for start in range(rows.start, rows.stop, TILE_ROWS):
            yield from _parts(q_positions, Range(start, min(start + TILE_ROWS, rows.stop)), keys, window)


def _alike(positions: Sequence[Tensor]) -> list[Range]:
    """All heads together where their keys have the same positions, otherwise each alone."""
    if all(torch.equal(positions[0], other) for other in positions[1:]):
        return [Range(0, len(positions))]
    return [Range(head, head + 1) for head in range(len(positions))]


def _take(x: Tensor, spans: Sequence[Range]) -> Tensor:
    """Those rows of x, a view where they are one span."""
    if len(spans) == 1:
        return x[slice(*spans[0])]
    return torch.cat([x[:0], *(x[slice(*span)] for span in spans)])
