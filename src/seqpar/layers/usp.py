"""Ulysses inside, a ring around it: sequence parallelism over more ranks than there are heads.

The sequence ranks are a grid (`comm.split_groups`). Neighbours, a row of it, exchange tokens for heads as in Ulysses;
then the rows are the ranks of a ring, in every column for the heads of that column. With rows of one rank it is
`RingAttention`, with a single row Ulysses.

Tokens lie over all ranks exactly as those of `RingAttention` over the same group do, and so do cached ones: what a rank
holds does not say how it will be attended to, and layers and steps can change the split. For that a row's tokens are
put in order after the exchange, one pass over them: neighbouring chunks, or stripes, of its ranks become one run, so a
row has no more tiles than a rank of a ring would (`partition.gather_held`). Tokens dealt out to rows first, and then
cut evenly within them, need no such pass, but neither a striped cache nor a ring would find those in place.

The exchange within a row is exposed: the ring needs its queries and keys before it can begin, and its output before it
can go back. The ring hides its own transfers under attention. So rows belong on the fast links, and the ring on the
slow ones. Cached keys are exchanged as well, at every step, since they lie by tokens.

KV heads that several ranks of a row need are copied in the send buffer, and travel round the ring once for each copy.
Heads that do not divide give the first ranks of a row one more.

Source: USP, arXiv:2405.07719; LoongTrain's 2D attention, arXiv:2406.18485, is the same split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar import comm
from seqpar.comm import SplitGroups, Steps
from seqpar.kernels.quantize import Wire
from seqpar.layers.heads import HeadParameter
from seqpar.layers.ring import (
    CachedKV,
    Method,
    RingAttention,
    RingCore,
    Runs,
    attend_steps,
    count_tokens,
    joined_held,
    run_positions,
)
from seqpar.partition import GridOrder, HeadMap, Placement, Range, RingOrder, gather_held, head_parts
from seqpar.ragged import RaggedBatch

__all__ = ["USPAttention"]

Columns = tuple[tuple[Range, ...], ...]
T = TypeVar("T")


class _Rows(NamedTuple):
    """Where the tokens of a row's ring lie in what the exchange brings; None for those that are in order."""

    q: Int64[Tensor, " t"] | None
    back: Int64[Tensor, " t"] | None
    """The order of `q` undone."""
    kv: Int64[Tensor, " n"] | None
    """In the cached tokens, and the new ones behind them."""


class USPAttention(RingAttention):
    """`RingAttention` over a grid of ranks, whose rows split the heads between them, and whose columns are rings.

    Args:
        heads: who owns which heads. The layer takes all of one tensor-parallel shard, so any sp will do; there must be
            as many query heads in it as ranks in a row.
        head_dim: D.
        groups: the sequence ranks and their split, made by `comm.split_groups` once for all layers.
        tp_rank, sinks, method, placement, interleave, window, softmax_scale: as `RingAttention` takes them, of the
            whole group.
        wire: the format of the exchanges, and of the ring after them, so that numbers may be rounded twice each way.

    Raises:
        ValueError: more ranks in a row than query heads, or what `RingAttention` refuses.
    """

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        groups: SplitGroups,
        tp_rank: int = 0,
        sinks: HeadParameter | None = None,
        method: Method = "kv",
        placement: Placement = "zigzag",
        interleave: int = 1,
        window: int | None = None,
        softmax_scale: float | None = None,
        wire: Wire | None = None,
    ) -> None:
        super().__init__(
            heads,
            head_dim,
            group=groups.whole,
            tp_rank=tp_rank,
            sinks=sinks,
            method=method,
            placement=placement,
            interleave=interleave,
            window=window,
            softmax_scale=softmax_scale,
            wire=wire,
        )
        columns = groups.inner.size()
        if columns > self.num_heads:
            raise ValueError(
                f"`groups` must have rows of at most as many ranks as the shard has query heads ({self.num_heads}), "
                f"got {columns}; split into shorter rows"
            )
        self.groups = groups
        parts = [
            part._replace(q=part.q.shift(-self.q_shard.start), kv=part.kv.shift(-self.kv_shard.start))
            for part in head_parts(self.q_shard, heads.group_size, columns)
        ]
        mine = parts[groups.inner.rank()]
        self.own_heads = mine.q
        self.own_kv_head_of = tuple(head - mine.kv.start for head in self.kv_head_of[slice(*mine.q)])
        self.widths = tuple(part.q.size * head_dim for part in parts)
        h, g = self.num_heads, self.num_kv_heads
        self.new_columns = self._columns(*((p.q, p.kv.shift(h), p.kv.shift(h + g)) for p in parts))
        self.cached_columns = self._columns(*((p.kv, p.kv.shift(g)) for p in parts))

    def grid(self, batch: RaggedBatch, cached: CachedKV | None = None) -> GridOrder:
        """What is exchanged within rows, and what goes round between them; the same on every rank."""
        held, columns = None if cached is None else cached.held, self.groups.inner.size()
        key = ("usp", self.group.size(), columns, self.placement, self.interleave, self.window, held)
        if key not in batch.plans:
            own = self._held(batch)
            new = gather_held(own, columns)
            kv = new if held is None else joined_held(gather_held(held, columns), new)
            tokens = tuple(map(count_tokens, own))
            olds = (0,) * len(own) if held is None else tuple(map(count_tokens, held))
            batch.plans[key] = GridOrder(RingOrder(new, kv, self.window), tokens, olds)
        grid: GridOrder = batch.plans[key]
        return grid

    def order(self, batch: RaggedBatch, cached: CachedKV | None = None) -> RingOrder:
        """What travels between rows and what is computed for a batch; the same on every rank."""
        return self.grid(batch, cached).ring

    def steps(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Steps[Float[Tensor, "t_local h d"]]:
        """See `RingAttention.forward`; yields at the exchanges of new and cached tokens, at every hop, and at the end.

        Comm:  within rows of U ranks an all-to-all of q, k and v, one of cached k and v where there are any, and one of
               the output: (U-1)/U of them, or more where KV heads are copied. Between rows what `RingAttention` sends
               over as many ranks as there are rows, of this column's heads. `plan.usp_volumes` has the bytes.
        """
        self._check(q, k, v, batch, cached)
        grid, rows = self.grid(batch, cached), self._rows(batch, cached)
        dim, width = self.head_dim, self.own_heads.size * self.head_dim
        new = comm.start(self._exchange(torch.cat((q, k, v), 1), self.new_columns, self._of_row(grid.tokens)))
        old = comm.start(self._exchange_cached(cached, grid))
        try:
            mine = yield from new
            kv = mine[:, width:].unflatten(1, (2, -1, dim))
            past = yield from old
        finally:
            new.close()
            old.close()
        kv = kv if past is None else torch.cat((past.unflatten(1, (2, -1, dim)), kv))
        kv, queries = _take(kv, rows.kv), _take(mine[:, :width].unflatten(1, (-1, dim)), rows.q)
        out = yield from attend_steps(self.ring_core(), queries, kv, grid.ring, batch, self._own_sinks_steps())
        back: Tensor = yield from comm.heads_to_seq_steps(
            _take(out, rows.back).flatten(1),
            widths=self.widths,
            tokens=self._of_row(grid.tokens),
            group=self.groups.inner,
            **self._wire,
        )
        return back.view(len(back), self.num_heads, dim)

    def ring_core(self) -> RingCore:
        return super().ring_core()._replace(group=self.groups.outer, kv_head_of=self.own_kv_head_of)

    @property
    def _wire(self) -> dict[str, Any]:
        return {"label": self.label or "usp", "wire": self.wire, "head_dim": self.head_dim}

    def _columns(self, *ranks: Sequence[Range]) -> Columns:
        return tuple(tuple(heads.scale(self.head_dim) for heads in each) for each in ranks)

    def _of_row(self, ranks: Sequence[T]) -> Sequence[T]:
        """The entries of the ranks of this row."""
        columns = self.groups.inner.size()
        first = self.groups.outer.rank() * columns
        return ranks[first : first + columns]

    def _exchange(self, x: Tensor, columns: Columns, tokens: Sequence[int]) -> Steps[Tensor]:
        """This rank's heads of all tokens of its row."""
        inner = self.groups.inner
        return comm.seq_to_heads_steps(x.flatten(1), columns=columns, tokens=tokens, group=inner, **self._wire)

    def _exchange_cached(self, cached: CachedKV | None, grid: GridOrder) -> Steps[Tensor | None]:
        if cached is None:
            return None
        kv = torch.cat((cached.k, cached.v), 1)
        return (yield from self._exchange(kv, self.cached_columns, self._of_row(grid.cached)))

    def _own_sinks_steps(self) -> Steps[Tensor | None]:
        sinks = yield from self._sinks_steps()
        return None if sinks is None else sinks[slice(*self.own_heads)]

    def _rows(self, batch: RaggedBatch, cached: CachedKV | None) -> _Rows:
        held, columns, rank = None if cached is None else cached.held, self.groups.inner.size(), self.group.rank()
        key = ("usp.rows", self.group.size(), columns, rank, self.placement, self.interleave, held)
        if key not in batch.plans:
            ring, row, length = self.grid(batch, cached).ring, self.groups.outer.rank(), max(batch.kv_lens, default=0)
            new = _names(self._of_row(self._held(batch)), length)
            old = new[:0] if held is None else _names(self._of_row(held), length)
            q = _index(new, _names([ring.q[row]], length), batch.device)
            kv = _index(torch.cat((old, new)), _names([ring.kv[row]], length), batch.device)
            batch.plans[key] = _Rows(q, None if q is None else q.argsort(), kv)
        found: _Rows = batch.plans[key]
        return found


def _names(ranks: Sequence[Runs], length: int) -> Int64[Tensor, " t"]:
    """A number for each token that some ranks hold, of requests of at most `length` tokens, rank after rank."""
    each = [run_positions(run) + request * length for own in ranks for request, runs in enumerate(own) for run in runs]
    return torch.cat([torch.empty(0, dtype=torch.int64), *each])


def _index(have: Tensor, want: Tensor, device: torch.device) -> Int64[Tensor, " t"] | None:
    """Which of the tokens that there are to take for those that are wanted; None for all in order."""
    order = have.argsort()
    found = order[torch.searchsorted(have[order], want)]
    return None if torch.equal(found, torch.arange(len(have))) else found.to(device)


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)
