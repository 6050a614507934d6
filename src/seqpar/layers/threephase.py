"""Three-phase pipelining of Ulysses attention: parts travel in, are attended with and travel back at the same time.

A part is a group of KV heads with a chunk of the queries that read them. All the ways in are launched at once, in the
order K of group 0, Q of its first chunk, V of group 0, its other Q, then group 1: keys come first, since their norm and
rotary embedding can be computed while the queries travel, and those of the queries while the values do. As soon as a
part's attention is done its way back is launched; the ways back are waited for at the end. With parts of attention
time c_i, ways in of x_i and ways back of y_i over one link, no schedule is faster than the largest of x_0 + sum c +
y_last, sum x + c_last + y_last, and sum x + sum y.

A chunk of queries is cut from the same place of every rank's own token slice, so that all ranks send as much at any
time and the chunks cost about the same under the causal mask. It is a few runs of consecutive tokens, one for each
rank, and each attends to its prefix. Consecutive chunks of all tokens lost: they lie on one rank after another, which
leaves the other ranks' links idle, and the last one costs the most.

Programs under `interleave`, one for each part, lost too: each would wait for the first of its own collectives in turn,
and so the second for its Q before the first has computed with a V that is there. Here one program starts them all.

Source: CSPS, arXiv:2409.15104v1; its released code has the parts and their order, with collectives that are waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar import comm
from seqpar.comm import Mark, ProcessGroup, Steps
from seqpar.kernels import attention
from seqpar.kv import PagedKV
from seqpar.layers.base import find_layout
from seqpar.layers.ulysses import UlyssesAttention, uniform
from seqpar.partition import HeadMap, Layout, Range, ThreePhase, even_ranges, piece_ranges
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["AttentionParts", "PipelinedUlysses"]

Columns = tuple[tuple[Range, ...], ...]


class _Part(NamedTuple):
    """A group of KV heads: the columns in which it travels, and what of it this rank computes."""

    columns: dict[Literal["q", "k", "v"], Columns]
    widths: tuple[int, ...]
    q_heads: Range
    kv_heads: Range
    kv_head_of: tuple[int, ...] | None


class PipelinedUlysses(UlyssesAttention):
    """`UlyssesAttention` whose exchanges hide under the attention of its own parts.

    The result is that of `UlyssesAttention` up to the rounding of attention over other blocks of queries; on a
    deterministic mesh of CPUs it has the same bits where requests are cut at multiples of 64 tokens. Steps of few
    tokens, with a tail, or over a group of one run as they do there.

    Args:
        heads: who owns which heads; its sp must be the size of `group`.
        head_dim: D.
        group: the sequence ranks.
        head_groups: parts by KV heads; as many as a rank has at most.
        query_chunks: parts by query tokens.
        min_tokens: steps of fewer tokens are not cut.
        options: see `UlyssesAttention`.

    Raises:
        ValueError: counts below one, one part in all, or what `UlyssesAttention` refuses.
    """

    unrecorded: ClassVar[str] = "whose parts have not been tried in one"

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        head_groups: int = 2,
        query_chunks: int = 2,
        min_tokens: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(heads, head_dim, group=group, **options)
        self.pipeline = ThreePhase(head_groups, query_chunks, min_tokens)
        self.parts: dict[Layout | None, tuple[_Part, ...]] = {}
        self.parts[None] = self.parts[heads.layout] = self._parts(heads, head_groups)

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """See `UlyssesAttention.add_layout`."""
        super().add_layout(layout, group=group)
        self.parts[layout] = self._parts(self.heads.on(layout), self.pipeline.head_groups)

    def steps(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
    ) -> Steps[Float[Tensor, "t_out o"]]:
        """See `UlyssesAttention.forward`; yields at the ways in as they are needed and at the ways back at the end.

        Two `Mark`s where groups of heads are appended: one opens before the first, one closes before the last.

        Comm:  as there in all, in groups * (2 + chunks) all-to-alls and groups * chunks back.
        """
        exchange = self.exchanges.get(layout)
        cut = exchange is not None and exchange.group.size() > 1 and batch.num_tokens >= self.pipeline.min_tokens
        if not cut or tail is not None:
            return (yield from super().steps(qkv, batch, cos, sin, kv, layout=layout, tail=tail))
        parts = AttentionParts(self, qkv, batch, cos, sin, kv, layout, self.pipeline.query_chunks)
        backs: list[list[Steps[Tensor]]] = []
        try:
            for group in range(len(parts.groups)):
                yield from parts.ready_steps(group)
                backs.append([])
                for chunk in range(len(parts.pieces)):
                    out = yield from parts.attend_steps(group, chunk)
                    backs[-1].append(comm.start(parts.back_steps(out, group, chunk)))
            outs: list[list[Tensor]] = []
            for started in backs:
                outs.append([])
                for back in started:
                    outs[-1].append((yield from back))
        finally:
            parts.close()
            for back in chain(*backs):
                back.close()
        return parts.join(outs)

    def _parts(self, heads: HeadMap, count: int) -> tuple[_Part, ...]:
        """The parts of a layout, on this rank."""
        tp_rank, dim = self.rank // heads.sp, self.head_dim
        own, kv_head_of = heads.parts(count)[self.rank], heads.kv_head_of(self.rank)
        first_q, first_kv = heads.q_ranges[self.rank].start, heads.kv_ranges[self.rank].start
        peers = heads.parts(count)[tp_rank * heads.sp : (tp_rank + 1) * heads.sp]
        found = []
        for index, columns in enumerate(heads.part_columns(tp_rank, count)):
            q, kv = own[index].q.shift(-first_q), own[index].kv.shift(-first_kv)
            read = tuple(head - kv.start for head in kv_head_of[q.start : q.stop])
            scaled = {k: tuple(tuple(r.scale(dim) for r in rank) for rank in v) for k, v in columns.items()}
            widths = tuple(rank[index].q.size * dim for rank in peers)
            found.append(_Part(scaled, widths, q, kv, None if uniform(read, kv.size) else read))
        return tuple(found)


class AttentionParts:
    """One step of a `PipelinedUlysses`, cut into parts: what is in flight of it, and the programs of each part.

    Made, it has launched the ways in of every part. The driver makes each group of KV heads ready and attends with
    every chunk of its queries, groups and chunks in order, and closes what it has made at the end.

    Args:
        core: the layer.
        qkv, batch, cos, sin, kv, layout: as `UlyssesAttention.forward` takes them.
        chunks: parts by query tokens.

    Attributes:
        groups: the layer's groups of KV heads.
        pieces: for each chunk of queries, the tokens of it that each rank holds.
    """

    def __init__(
        self,
        core: PipelinedUlysses,
        qkv: Tensor,
        batch: RaggedBatch,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: PagedKV | None,
        layout: Layout | None,
        chunks: int,
    ) -> None:
        self._exchange = find_layout(core.exchanges, layout)
        self.groups = core.parts[layout]
        self._core, self._batch, self._kv, self._tables = core, batch, kv, (cos, sin)
        size, rank = self._exchange.group.size(), self._exchange.group.rank()
        slices = even_ranges(batch.num_tokens, size)
        core._check(qkv, slices[rank].size, self._exchange)
        core._check_step(qkv, batch, cos, sin, kv, None)
        self.pieces = piece_ranges(batch.num_tokens, size, min(chunks, max(1, slices[0].size)))
        self._flat = batch.kv_lens == batch.q_lens
        self._runs = _runs(batch.without_cache if self._flat else batch, self.pieces)
        self._keys: list[tuple[Tensor, Tensor]] = []
        self._queries: dict[tuple[int, int], Tensor] = {}
        mine = [ranks[rank].shift(-slices[rank].start) for ranks in self.pieces]
        self._in: dict[tuple[str, int, int], Steps[Tensor]] = {}
        try:
            for group in range(len(self.groups)):
                self._launch("k", group, 0, qkv, slices)
                self._launch("q", group, 0, qkv[mine[0].start : mine[0].stop], self.pieces[0])
                self._launch("v", group, 0, qkv, slices)
                for chunk, rows in enumerate(mine[1:], 1):
                    self._launch("q", group, chunk, qkv[rows.start : rows.stop], self.pieces[chunk])
        except BaseException:
            self.close()
            raise

    def ready_steps(self, group: int) -> Steps[None]:
        """Wait for the keys, the first queries and the values of a group, and append to the cache."""
        core, (cos, sin) = self._core, self._tables
        k = core.prepare(core.k_norm, (yield from self._in["k", group, 0]), cos, sin)
        self._queries[group, 0] = yield from self._query_steps(group, 0)
        v = yield from self._in["v", group, 0]
        opens, closes = group == 0, group == len(self.groups) - 1
        if opens or closes:
            yield Mark(core.layer_index, opens=opens, closes=closes)
        if self._kv is not None:
            heads = None if opens and closes else self.groups[group].kv_heads
            self._kv.append(core.layer_index, k.detach(), v.detach(), self._batch, heads=heads)
        self._keys.append((k, v))

    def attend_steps(self, group: int, chunk: int) -> Steps[Tensor]:
        """Wait for a chunk's queries, and attend: [tokens of the chunk, heads of the group here * D]."""
        part, core = self.groups[group], self._core
        options = core._attention_options(part.q_heads, part.kv_head_of)
        q = self._queries.pop((group, chunk), None)
        if q is None:
            q = yield from self._query_steps(group, chunk)
        outs, row = [], 0
        for batch, keys in self._runs[chunk]:
            if self._flat or self._kv is None:
                k, v = (x[keys] for x in self._keys[group])
            else:
                k, v = self._kv.read(core.layer_index, batch, heads=part.kv_heads)
                options["scales"] = self._kv.scales(core.layer_index, heads=part.kv_heads)
            rows = q[row : row + batch.num_tokens]
            outs.append(attention(rows, k, v, batch, **options)[0])
            row += batch.num_tokens
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)

    def back_steps(self, out: Tensor, group: int, chunk: int) -> Steps[Tensor]:
        """Send a part's output back: [this rank's tokens of the chunk, heads of the group on all ranks * D]."""
        return comm.heads_to_seq_steps(
            out,
            widths=self.groups[group].widths,
            tokens=[piece.size for piece in self.pieces[chunk]],
            group=self._exchange.group,
            **self._wire,
        )

    def join(self, outs: Sequence[Sequence[Tensor]]) -> Tensor:
        """This rank's tokens with all heads in order, out of what came back for each group and chunk."""
        rows = []
        for chunk in zip(*outs, strict=True):
            columns = [out.split(part.widths, 1) for out, part in zip(chunk, self.groups, strict=True)]
            rows.append(chunk[0] if len(chunk) == 1 else torch.cat([*chain(*zip(*columns, strict=True))], 1))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def close(self) -> None:
        """Wait for what is in flight and nobody will ask for."""
        for steps in self._in.values():
            steps.close()

    @property
    def _wire(self) -> dict[str, Any]:
        return {"label": self._core.label, "wire": self._core.wire, "head_dim": self._core.head_dim}

    def _launch(
        self, which: Literal["q", "k", "v"], group: int, chunk: int, rows: Tensor, tokens: Sequence[Range]
    ) -> None:
        columns = self.groups[group].columns[which]
        sizes = [piece.size for piece in tokens]
        steps = comm.seq_to_heads_steps(rows, columns=columns, tokens=sizes, group=self._exchange.group, **self._wire)
        self._in[which, group, chunk] = comm.start(_heads(steps, self._core.head_dim))

    def _query_steps(self, group: int, chunk: int) -> Steps[Tensor]:
        q = yield from self._in["q", group, chunk]
        cos, sin = (None if x is None else _rows(x, self.pieces[chunk]) for x in self._tables)
        return self._core.prepare(self._core.q_norm, q, cos, sin)


def _heads(steps: Steps[Tensor], head_dim: int) -> Steps[Tensor]:
    """The result [T, H * D] as [T, H, D]."""
    x = yield from steps
    return x.view(len(x), x.shape[1] // head_dim, head_dim)


def _rows(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Those rows of x, a view where they are one run."""
    if sum(r.size for r in ranges) == ranges[-1].stop - ranges[0].start:
        return x[ranges[0].start : ranges[-1].stop]
    return torch.cat([x[r.start : r.stop] for r in ranges])


def _runs(batch: RaggedBatch, pieces: Sequence[Sequence[Range]]) -> list[list[tuple[RaggedBatch, slice]]]:
    """For each chunk the runs of consecutive tokens that it consists of, and where their keys lie if they are given."""
    key = ("threephase.runs", len(pieces), len(pieces[0]))
    if key not in batch.plans:
        cuts = [piece.start for rank in zip(*pieces, strict=True) for piece in rank][1:]
        split = [(x, slice(0)) for x in batch.split(cuts)] if batch.has_cache else list(batch.split_keys(cuts))
        batch.plans[key] = [split[chunk :: len(pieces)] for chunk in range(len(pieces))]
    runs: list[list[tuple[RaggedBatch, slice]]] = batch.plans[key]
    return runs
