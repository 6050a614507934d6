"""Decode that ships queries: the tokens of a cache stay where they are, and every rank answers for those it holds.

A striped cache (`StripedKV`) spreads each request over the sequence ranks. One all-gather brings the step's queries,
keys and values to all of them; each appends what it owns, attends with all queries to its share of the context, and one
all-to-all returns (out, lse) to where the tokens came from, to be merged. What travels depends on the step's tokens
alone, and every rank reads 1/N of the context.

Context and current tokens are apart. All context tokens come before all of the step's, so the attention of a share has
no causal mask, whatever the striping, also with several tokens of a request (speculation, prompt chunks). Among the
step's own tokens every rank attends for itself, causally, while the partials travel. A sink joins the partial of the
rank that stores it, once for each head, so that none is gathered.

Tokens and heads are placed as the layout of the step says, before and after. Under the stored layout the tokens are
sharded: it is where Ulysses stands, so nothing around it changes, and no rank computes a projection twice. Under pure
tensor parallelism every rank has all tokens and its own heads, which small steps want, and the gather is that of
vLLM's decode context parallelism. With `whole=True` the projection of all tokens and all heads of the shard was
computed on every rank, and nothing is gathered (Helix). They are one code path over "which tokens, which heads".

The way back is one all-to-all with the float32 LSE in the columns beside `out`, bit for bit. The other form
(`exchange="ag_rs"`) all-gathers the LSE, so that every rank knows what its partials weigh, and reduce-scatters the
weighted ones: a collective more, more bytes, and sums rounded in the wire's dtype, but a fabric that adds on its way
delivers one row where the all-to-all delivers N. K and V of the step travel with Q in one collective, though only their
owner needs them: they are small beside Q for GQA, a message of its own would cost more, and every rank then has the
current keys that its own tokens see.

Source: CSPS, arXiv:2409.15104v1 (queries travel); the split and the layout as in vLLM; Helix, arXiv:2507.07120.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Mark, ProcessGroup, Steps
from seqpar.kernels import add_sinks, attention, merge
from seqpar.kernels.quantize import Wire, check_wire, decode, encode, encoded_width
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers.base import find_layout
from seqpar.layers.heads import HeadParameter
from seqpar.layers.striped import check_striped
from seqpar.layers.ulysses import UlyssesAttention
from seqpar.partition import HeadMap, Layout, Range, even_ranges, layout_names
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["QShipDecodeAttention"]

Partial = tuple[Tensor, Tensor]
Exchange = Literal["a2a", "ag_rs"]


class _Block(NamedTuple):
    """What a rank of the group holds of a step: one of so many slices of the tokens, and some heads of the shard."""

    slice: int
    slices: int
    q: Range
    kv: Range

    def rows(self, total: int) -> Range:
        return even_ranges(total, self.slices)[self.slice]


class _Share(NamedTuple):
    """Queries that see the same number of tokens a request, and the context tokens of this rank that they see."""

    rows: Tensor
    """Of the step's queries."""
    slots: Tensor | None
    """Of the cache, of all keys; None where they are read in place, by pages."""
    batch: RaggedBatch
    """A request is a single query, or the queries of one request, whose heads lie one after another."""
    queries: int
    """That one of its requests has."""
    order: Tensor
    """Of the heads of those queries, for each KV head to be read once for all of them."""
    back: Tensor
    """The order undone."""
    kv_head_of: tuple[int, ...]
    """The KV head that each of them reads, in order."""


class _Plan(NamedTuple):
    """One step on one rank, worked out once for all layers."""

    tokens: tuple[Range, ...]
    """New tokens that each rank of the group holds."""
    queries: tuple[Range, ...]
    """Queries that each rank holds, out of those of the step; all its tokens unless there is a tail."""
    context: tuple[_Share, ...]
    current: RaggedBatch
    """This rank's queries over the step's own keys, of which it sees those in `keys`."""
    keys: slice


class QShipDecodeAttention(UlyssesAttention):
    """Causal attention over a batch whose context is striped over `group`; it stands where `UlyssesAttention` does.

    It is for inference: there is no gradient. Steps of many new tokens are right but not what it is for, since all
    their queries, keys and values are gathered.

    Args:
        heads: who owns which heads; its sp must be the size of `group`.
        head_dim: D.
        group: the sequence ranks, which hold the context between them under every layout.
        tp_rank, q_norm, k_norm, sinks, window, softmax_scale, layer_index: as `UlyssesAttention` takes them.
        exchange: how partials return: "a2a", one all-to-all; "ag_rs", an all-gather of the LSE and a reduce-scatter of
            `out`; or a number of queries, from which on a step takes the second form (`plan.exchange_from`).
        wire: the format in which everything but the LSE travels, each number rounded once and under "ag_rs" each
            summand; also what is cached.

    Raises:
        ValueError: what `UlyssesAttention` refuses, or an exchange that is none.
    """

    unrecorded: ClassVar[str] = "whose transfers have not been tried in one"

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        tp_rank: int = 0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        sinks: HeadParameter | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        layer_index: int = 0,
        exchange: Exchange | int = "a2a",
        wire: Wire | None = None,
    ) -> None:
        super().__init__(
            heads,
            head_dim,
            group=group,
            tp_rank=tp_rank,
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=sinks,
            window=window,
            softmax_scale=softmax_scale,
            layer_index=layer_index,
            wire=wire,
        )
        if exchange not in get_args(Exchange) and not (type(exchange) is int and exchange >= 1):
            raise ValueError(
                f'`exchange` must be "a2a", "ag_rs" or a number of queries of at least 1, got {exchange!r}'
            )
        self.exchange = exchange
        if group.size() == 1:  # nothing travels, and nothing is rounded
            self.wire = None
        self.group = group
        self.q_shard, self.kv_shard = heads.q_shard(tp_rank), heads.kv_shard(tp_rank)
        self.blocks: dict[Layout | None, tuple[_Block, ...]] = {}
        self.blocks[None] = self.blocks[heads.layout] = self._blocks(heads.layout)

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """See `UlyssesAttention.add_layout`; the context stays with the ranks that hold it.

        Raises:
            ValueError: as there, or a layout that the stored one does not reach.
        """
        super().add_layout(layout, group=group)
        if not self.heads.layout.reaches(layout):
            del self.exchanges[layout]
            raise ValueError(
                f"`layout` must keep the tokens of a step within the group that holds its context, got {layout}; "
                f"layouts that do are {layout_names(self.heads.layout.reachable)}"
            )
        self.blocks[layout] = self._blocks(layout)

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
        whole: bool = False,
    ) -> Steps[Float[Tensor, "t_out o"]]:
        """See `forward`; yields at the all-gather and on the way back, with a `Mark` where the KV is appended."""
        exchange, blocks = find_layout(self.exchanges, layout), find_layout(self.blocks, layout)
        me = blocks[self.group.rank()]
        held = self._shard_block if whole else me
        rows = held.rows(batch.num_tokens)
        self._check(qkv, rows.size, self.exchanges[None] if whole else exchange)
        self._check_step(qkv, batch, cos, sin, kv, tail)
        assert isinstance(kv, StripedKV), "`_check_cache` refuses others"
        plan = self._plan(batch, tail, kv, blocks)
        q, k, v = self.unpack(qkv, layout=None if whole else layout)
        if tail is not None:
            q = tail.take(q, rows.start)
        q, k = (x.detach() for x in self._turn(q, k, rows, cos, sin, tail))
        if not whole:
            rows_sent = yield comm.all_gather_async(
                torch.cat([x.flatten(0, 1) for x in (q, k, v)]),
                group=self.group,
                sizes=[sum(a * b for a, b, _ in self._shapes(plan, blocks, rank)) for rank in range(len(blocks))],
                label=self.label,
                wire=self.wire,
            )
            q, k, v = self._assemble(rows_sent, plan, blocks)
        yield Mark(self.layer_index)
        kv.append(self.layer_index, k, v, batch)
        if not len(q):
            return q.new_empty(0, me.q.size * self.head_dim)
        give_back = self._reduce_steps if self._reduces(len(q)) else self._ship_steps
        back = comm.start(give_back(self._attend_context(q, batch, kv, plan), plan, blocks))
        try:
            current = self._attend_current(q[slice(*plan.queries[self.group.rank()]), slice(*me.q)], k, v, plan, me)
            context = yield from back
        finally:
            back.close()
        outs, masses = zip(current, *context, strict=True)
        return merge(outs, masses)[0].flatten(1)

    def forward(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
        whole: bool = False,
    ) -> Float[Tensor, "t_out o"]:
        """Attend.

        In:    qkv[T/sp, C]: `even_split` of the batch's tokens; this tp shard's columns in `HeadMap.storage` order,
            tokens and shard those of `layout`. With `whole`, all tokens and the stored layout's columns.
        Out:   [T/sp, H/tp * D] of `layout`: the same tokens (with `tail`, those of them that are in it), query heads in
            order.
        Grad:  none.
        Comm:  over `group` of N ranks, each sends its q, k and v to the others (nothing with `whole`), then of the
            heads and tokens of every other rank out and LSE: D elements and 4 bytes (8 in float64) for each head of
            a token. For the stored layout (N-1) * T_local * (H + 2 G) * D elements and (T - T_local) * H * (D + lse).
            By "ag_rs" the LSE of all heads and tokens goes to all others instead: (N-1) * T * H * lse. To the byte,
            for any layout: `plan.decode_volumes`.

        Args:
            qkv: the fused projection.
            batch: the step's tokens, made by `kv`, the same on every rank.
            cos: rotary table of all T tokens; None leaves q and k as they are.
            sin: the same, sine.
            kv: the `StripedKV` of this rank. It writes those of the new tokens that are its own.
            layout: one that `add_layout` recorded; the stored one by default.
            tail: attend with these queries only; all keys and values are appended. Without rows it ends there.
            whole: `qkv` is everything, computed by every rank of the group, and nothing is gathered (Helix).

        Raises:
            ValueError: tokens or columns that are not the batch's or the head map's; a cache of another placement, or
                of other ranks; another batch's tail; a gradient wanted.
        """
        return comm.run(self.steps(qkv, batch, cos, sin, kv, layout=layout, tail=tail, whole=whole))

    @property
    def _shard_block(self) -> _Block:
        """All tokens of all heads."""
        return _Block(0, 1, Range(0, self.q_shard.size), Range(0, self.kv_shard.size))

    def _blocks(self, layout: Layout) -> tuple[_Block, ...]:
        """What each rank of the group holds under a layout, heads counted from the shard's first."""
        heads, first = self.heads.on(layout), self.rank // self.heads.sp * self.heads.sp
        return tuple(
            _Block(
                flat % layout.sp,
                layout.sp,
                heads.q_shard(flat // layout.sp).shift(-self.q_shard.start),
                heads.kv_shard(flat // layout.sp).shift(-self.kv_shard.start),
            )
            for flat in range(first, first + self.heads.sp)
        )

    def _check_cache(self, qkv: Tensor, batch: RaggedBatch, kv: PagedKV | None) -> None:
        if torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("`qkv` must need no gradient, got one that does; use torch.no_grad(), or Ulysses to train")
        check_wire(self.wire, qkv, "qkv")
        check_striped(kv, batch, group=self.group, heads=self.kv_shard.size, head_dim=self.head_dim, dtype=qkv.dtype)

    def _turn(
        self,
        q: Tensor,
        k: Tensor,
        rows: Range,
        cos: Tensor | None,
        sin: Tensor | None,
        tail: Tail | None,
    ) -> tuple[Tensor, Tensor]:
        """Norms and rotary embedding of the tokens `rows`, before they travel, so that no rank repeats another's."""
        if cos is None or sin is None:
            return self.prepare(self.q_norm, q, None, None), self.prepare(self.k_norm, k, None, None)
        cos, sin = cos[rows.start : rows.stop], sin[rows.start : rows.stop]
        k = self.prepare(self.k_norm, k, cos, sin)
        if tail is not None:
            cos, sin = tail.take(cos, rows.start), tail.take(sin, rows.start)
        return self.prepare(self.q_norm, q, cos, sin), k

    def _kv_head_of(self, q: Range, kv: Range) -> tuple[int, ...]:
        """Which of the KV heads `kv` each of the query heads `q` reads."""
        return tuple(head // self.heads.group_size - kv.start for head in range(*q))

    def _shapes(self, plan: _Plan, blocks: Sequence[_Block], rank: int) -> tuple[torch.Size, torch.Size, torch.Size]:
        """Of the q, k and v that a rank sends."""
        kv = torch.Size((plan.tokens[rank].size, blocks[rank].kv.size, self.head_dim))
        return torch.Size((plan.queries[rank].size, blocks[rank].q.size, self.head_dim)), kv, kv

    def _assemble(self, rows: Tensor, plan: _Plan, blocks: Sequence[_Block]) -> tuple[Tensor, Tensor, Tensor]:
        """What all ranks sent, put together: all queries, keys and values of the shard."""
        tokens, queries = max(r.stop for r in plan.tokens), max(r.stop for r in plan.queries)
        q = rows.new_empty(queries, self.q_shard.size, self.head_dim)
        k, v = (rows.new_empty(tokens, self.kv_shard.size, self.head_dim) for _ in range(2))
        shapes = [shape for rank in range(len(blocks)) for shape in self._shapes(plan, blocks, rank)]
        parts = iter(rows.split([there * heads for there, heads, _ in shapes]))
        sized = iter(shapes)
        for rank, block in enumerate(blocks):
            for whole, held, heads in (
                (q, plan.queries[rank], block.q),
                (k, plan.tokens[rank], block.kv),
                (v, plan.tokens[rank], block.kv),
            ):
                whole[held.start : held.stop, heads.start : heads.stop] = next(parts).view(next(sized))
        return q, k, v

    def _attend_context(self, q: Tensor, batch: RaggedBatch, kv: StripedKV, plan: _Plan) -> Partial:
        """All queries over this rank's tokens from before the step; (0, -inf) for those that see none."""
        k, v = kv.read(self.layer_index, batch)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=_lse_dtype(q))
        for share in plan.context:
            keys, values = (k, v) if share.slots is None else (x.flatten(0, 1)[share.slots] for x in (k, v))
            folded = q[share.rows].unflatten(0, (-1, share.queries)).flatten(1, 2)[:, share.order]
            found, mass = attention(
                folded, keys, values, share.batch, softmax_scale=self.softmax_scale, kv_head_of=share.kv_head_of
            )
            out[share.rows] = found[:, share.back].reshape(-1, *q.shape[1:])
            lse[share.rows] = mass[:, share.back].reshape(-1, q.shape[1])
        if self.sinks is not None:
            own = slice(*self.heads.q_ranges[self.rank].shift(-self.q_shard.start))
            out[:, own], lse[:, own] = add_sinks(out[:, own], lse[:, own], self.sinks().detach())
        return out, lse

    def _attend_current(self, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, me: _Block) -> Partial:
        """This rank's queries over the step's own tokens."""
        own = (plan.keys, slice(*me.kv))
        return attention(
            q,
            k[own],
            v[own],
            plan.current,
            softmax_scale=self.softmax_scale,
            window=self.window,
            kv_head_of=self._kv_head_of(me.q.shift(self.q_shard.start), me.kv.shift(self.kv_shard.start)),
            deterministic=comm.is_deterministic(self.group),
        )

    def _reduces(self, queries: int) -> bool:
        """Whether the partials of so many queries are added on their way."""
        return queries >= self.exchange if isinstance(self.exchange, int) else self.exchange == "ag_rs"

    def _ship_steps(self, partial: Partial, plan: _Plan, blocks: Sequence[_Block]) -> Steps[list[Partial]]:
        """Return every rank's tokens and heads to it; all ranks' partials of this one's.

        A row of `out` and LSE for each head of a token.
        """
        parts = _by_rank(self._pack_partial(partial), plan, blocks)
        mine, shape = len(parts[self.group.rank()]), self._own_shape(plan, blocks)
        rows = yield comm.all_to_all_async(
            torch.cat(parts),
            group=self.group,
            send_sizes=[len(part) for part in parts],
            recv_sizes=[mine] * len(parts),
            label=self.label,
        )
        outs, masses = (x.unflatten(0, (len(parts), *shape)) for x in self._unpack_partial(rows, partial))
        return list(zip(outs, masses, strict=True))

    def _reduce_steps(self, partial: Partial, plan: _Plan, blocks: Sequence[_Block]) -> Steps[list[Partial]]:
        """Add up all ranks' partials, each weighing what its LSE is of the sum; one partial of this rank's tokens."""
        out, lse = partial
        masses = yield comm.all_gather_async(lse[None], group=self.group, label=self.label)
        total = masses.logsumexp(0)
        share = (lse - total).exp().masked_fill(lse == -torch.inf, 0)  # a query without context is -inf less -inf
        parts = _by_rank((out.to(lse.dtype) * share[..., None]).to(out.dtype), plan, blocks)
        rank, shape = self.group.rank(), self._own_shape(plan, blocks)
        summed = yield comm.reduce_scatter_async(
            torch.cat(parts), group=self.group, sizes=[len(part) for part in parts], label=self.label, wire=self.wire
        )
        return [(summed.unflatten(0, shape), total[slice(*plan.queries[rank]), slice(*blocks[rank].q)])]

    def _own_shape(self, plan: _Plan, blocks: Sequence[_Block]) -> tuple[int, int]:
        """Queries and heads whose output this rank is to have."""
        rank = self.group.rank()
        return plan.queries[rank].size, blocks[rank].q.size

    def _pack_partial(self, partial: Partial) -> Tensor:
        """The LSE bit for bit in the columns beside `out`; bytes where that is encoded."""
        out, lse = partial
        if self.wire is None:
            return torch.cat([out, lse[..., None].view(out.dtype)], -1)
        coded = encode(out.flatten(0, 1), self.wire).unflatten(0, lse.shape)
        return torch.cat([coded, lse[..., None].view(torch.uint8)], -1)

    def _unpack_partial(self, rows: Tensor, like: Partial) -> Partial:
        """Rows of `_pack_partial` as `out` and LSE, in the dtypes of `like`."""
        width = self.head_dim if self.wire is None else encoded_width(self.head_dim, self.wire)
        out, dtype = rows[:, :width], like[1].dtype
        if rows.shape[1] * rows.itemsize % dtype.itemsize:
            mass = rows[:, width:].clone(memory_format=torch.contiguous_format).view(dtype)[:, 0]
        else:  # in place: the last column of the rows as numbers of that size
            mass = rows.view(dtype)[:, -1]
        if self.wire is not None:
            out = decode(out.contiguous(), self.head_dim, like[0].dtype, self.wire)
        return out, mass

    def _plan(self, batch: RaggedBatch, tail: Tail | None, kv: StripedKV, blocks: tuple[_Block, ...]) -> _Plan:
        queries = batch if tail is None else tail.batch
        key = ("qship", self.heads, blocks, kv.striping, kv.rank, self.window)
        plan: _Plan | None = queries.plans.get(key)
        if plan is None:
            tokens = tuple(block.rows(batch.num_tokens) for block in blocks)
            rows = tokens if tail is None else tuple(_rows_of(tail, held) for held in tokens)
            mine = rows[self.group.rank()]
            steps = RaggedBatch.build(queries.q_lens, batch.q_lens, device=batch.device)
            _, (current, keys), _ = steps.split_keys([mine.start, mine.stop])
            context = tuple(_shares(batch, queries, kv, self.window, self._kv_head_of(self.q_shard, self.kv_shard)))
            plan = queries.plans[key] = _Plan(tokens, rows, context, current, keys)
        return plan


def _by_rank(rows: Tensor, plan: _Plan, blocks: Sequence[_Block]) -> list[Tensor]:
    """What of [queries, heads, ...] every rank holds, a row for each head of a query."""
    return [
        rows[slice(*queries), slice(*block.q)].flatten(0, 1)
        for queries, block in zip(plan.queries, blocks, strict=True)
    ]


def _rows_of(tail: Tail, tokens: Range) -> Range:
    """Which rows of a tail lie among these tokens."""
    start = len(tail.within(0, tokens.start))
    return Range(start, start + len(tail.within(*tokens)))


def _shares(
    batch: RaggedBatch, queries: RaggedBatch, kv: StripedKV, window: int | None, kv_head_of: tuple[int, ...]
) -> Iterator[_Share]:
    """What the queries of a step see of this rank's context: in place, or gathered where a window ends inside it."""
    alike: dict[int, list[int]] = {}
    near: list[tuple[int, int, Range]] = []
    held = kv.context(batch)
    for request, (asked, new, keys) in enumerate(zip(queries.q_lens, batch.q_lens, batch.kv_lens, strict=True)):
        if window is None or keys <= window:
            if asked and held[request]:
                alike.setdefault(asked, []).append(request)
            continue
        for i in range(asked):
            first = min(keys - asked + i + 1 - window, keys - new)
            seen = kv.striping.local_range(max(first, 0), keys - new, kv.rank)
            if seen.size:
                near.append((queries.q_starts[request] + i, request, seen))
    size, device = kv.local_page_size, batch.device
    for asked, requests in alike.items():
        rows = [row for r in requests for row in range(queries.q_starts[r], queries.q_starts[r] + asked)]
        lengths, pages = [held[r] for r in requests], [batch.pages[r] for r in requests]
        paged = RaggedBatch.build([1] * len(requests), lengths, pages, size, device=device)
        yield _share(rows, None, paged, asked, kv_head_of)
    if near:
        slots = torch.cat([kv.slots(batch.pages[request], seen) for _, request, seen in near])
        flat = RaggedBatch.build([1] * len(near), [seen.size for *_, seen in near], device=device)
        yield _share([row for row, *_ in near], slots.to(device), flat, 1, kv_head_of)


def _share(
    rows: Sequence[int], slots: Tensor | None, batch: RaggedBatch, queries: int, kv_head_of: tuple[int, ...]
) -> _Share:
    heads = len(kv_head_of)
    order = sorted(range(queries * heads), key=lambda place: kv_head_of[place % heads])
    back = sorted(range(queries * heads), key=order.__getitem__)
    read = tuple(kv_head_of[place % heads] for place in order)
    where, there, again = (torch.tensor(places, device=batch.device) for places in (rows, order, back))
    return _Share(where, slots, batch, queries, there, again, read)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
