"""Ring attention: every rank keeps the tokens it has, and keys, or queries, go round.

Tokens of a request lie over the ranks by a placement (`partition.place_tokens`), each request by itself. Every rank
knows the positions that all the others hold, so what travels, what is computed and what is skipped is worked out on
host integers (`partition.RingOrder`), once for a batch, and is the same on every rank.

* pass-KV: keys and values go from rank r to r + 1, in one message a hop. The next hop is launched before the attention
  with what is there, and waited for after it.
* pass-Q: keys stay, queries go from rank r to r - 1. Each partial (out, lse) is sent to its owner as soon as it is
  there, packed into one message, and travels under the attention of the next hop. Meta's form sends all of them at the
  end, in an all-to-all that nothing hides.
* A token travels only as far as some rank needs it. Under a causal mask contiguous slices stop at the last rank; under
  a window a slice is cut to the keys that the next rank still sees. Nothing is padded.
* Partials are merged in float32 (float64 for float64), and sinks join at the end, once.
* In a wire format the keys, or the queries, are encoded once, where they are, and travel on as they came. Every rank
  computes with what the others got of them, its own too. Answers are rounded on their way, those of the own keys not.

The backward pass is a ring as well, whichever way the forward went: keys and values go round again, and their
gradients, in the dtype of the log-sum-exp, go home from every rank that saw them, each under the next block's work. So
it sends what pass-KV does, and about as many elements of gradients; memory is that of two blocks and their gradients.
Two others lost: a composition of differentiable steps keeps every received block and the scores of every tile;
gradients that follow their keys round take a hop more, also those of tokens that a window has long left behind. What
travelled in a wire format does so again, so that gradients are of the numbers that were used; they themselves travel as
they are, straight through the rounding.

Masks by positions cost one call for each block of 128 rows: striped placements, and windows. Contiguous and zig-zag
prompts without a window have none: their pairs of chunks are seen whole, or causal, or not at all.

Source: Ring Attention, arXiv:2310.01889; zig-zag chunks and pass-Q of partial prefills, arXiv:2411.01783; striped,
arXiv:2311.09431.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps
from seqpar.kernels import add_sinks, attention, merge, tile_attention, tile_gradients
from seqpar.kernels.quantize import Wire, check_wire, decode, encode, encoded_width
from seqpar.layers.base import check_new, drop_child_names
from seqpar.layers.heads import HeadParameter
from seqpar.partition import HeadMap, Held, Placement, Range, RingOrder, Run, Tile, place_tokens, ring_peers
from seqpar.ragged import RaggedBatch

__all__ = [
    "CachedKV",
    "PartialSum",
    "PlacedAttention",
    "RingAttention",
    "RingCore",
    "RingStep",
    "attend_steps",
    "placed_rows",
]

T = TypeVar("T")
Method = Literal["kv", "q"]
Runs = tuple[tuple[Run, ...], ...]
Rows = tuple[tuple[int, ...], ...]


class CachedKV(NamedTuple):
    """What lies on the ranks of earlier tokens: this rank's keys and values, and the positions that every rank holds.

    `held[rank][request]` are runs of tokens, those of `place_tokens`, or of several calls one after another; `k` and
    `v` are this rank's, [tokens, G, D], request after request.
    """

    k: Tensor
    v: Tensor
    held: Held

    @classmethod
    def placed(
        cls, k: Tensor, v: Tensor, lens: Sequence[int], ranks: int, placement: Placement, *, interleave: int = 1
    ) -> CachedKV:
        """That many tokens of each request, laid out by one placement."""
        return cls(k, v, place_lens(lens, ranks, placement, interleave=interleave))


class RingCore(NamedTuple):
    """The ranks of a ring, the heads that each of them computes, and how.

    `kv_head_of` has the KV head that each query head reads, of those here.
    """

    group: ProcessGroup
    method: Method
    head_dim: int
    kv_head_of: tuple[int, ...]
    softmax_scale: float
    wire: Wire | None
    label: str


class PlacedAttention(nn.Module):
    """What attention over tokens that lie on the ranks of a group by a placement has in common.

    Its arguments are those of `RingAttention` but the method, and so are its refusals.
    """

    label: str = ""
    unrecorded: ClassVar[str] = "whose transfers have not been tried in one"

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        tp_rank: int,
        placement: Placement,
        interleave: int,
        window: int | None,
        softmax_scale: float | None,
    ) -> None:
        super().__init__()
        check_new(None, head_dim=head_dim)
        if window is not None and window < 1:
            raise ValueError(f"`window` must be at least 1 key or None, got {window}")
        if not 0 <= tp_rank < heads.tp:
            raise ValueError(f"`tp_rank` must lie in [0, {heads.tp}), got {tp_rank}")
        place_tokens(0, group.size(), placement, interleave=interleave)
        self.group, self.head_dim, self.window = group, head_dim, window
        self.placement: Placement = placement
        self.interleave = interleave
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.q_shard, self.kv_shard = heads.q_shard(tp_rank), heads.kv_shard(tp_rank)
        self.num_heads, self.num_kv_heads = self.q_shard.size, self.kv_shard.size
        self.group_size = heads.group_size
        self.kv_head_of = tuple(head // heads.group_size - self.kv_shard.start for head in range(*self.q_shard))

    def rows(self, batch: RaggedBatch) -> Int64[Tensor, " t_local"]:
        """Which of the batch's tokens this rank holds, in the order in which the layer takes them."""
        key = ("ring.rows", self.group.size(), self.group.rank(), self.placement, self.interleave)
        if key not in batch.plans:
            rows = placed_rows(batch, self.group.size(), self.placement, interleave=self.interleave)
            with torch.inference_mode(False):
                batch.plans[key] = torch.tensor(rows[self.group.rank()], dtype=torch.int64, device=batch.device)
        found: Tensor = batch.plans[key]
        return found

    def own_keys(self, k: Tensor, v: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> Float[Tensor, "n 2 g d"]:
        """This rank's keys and values, each request's cached ones before its new ones."""
        kv = torch.stack((k, v), 1)
        if cached is None:
            return kv
        old = torch.stack((cached.k, cached.v), 1)
        return joined_rows(old, cached.held, kv, self._held(batch), self.group.rank())

    def order(self, batch: RaggedBatch, cached: CachedKV | None = None) -> RingOrder:
        """What travels and what is computed for a batch; the same on every rank."""
        held = None if cached is None else cached.held
        key = ("ring", self.group.size(), self.placement, self.interleave, self.window, held)
        if key not in batch.plans:
            new = self._held(batch)
            kv = new if held is None else joined_held(held, new)
            batch.plans[key] = RingOrder(new, kv, self.window)
        order: RingOrder = batch.plans[key]
        return order

    def ring_core(self) -> RingCore:
        """What a ring of these ranks and heads computes with."""
        label = self.label or "ring"
        return RingCore(self.group, "kv", self.head_dim, self.kv_head_of, self.softmax_scale, None, label)

    def _held(self, batch: RaggedBatch) -> Held:
        return placed_held(batch, self.group.size(), self.placement, interleave=self.interleave)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> None:
        """Refuse what does not fit before the first collective."""
        for x, name in ((q, "q"), (k, "k"), (v, "v")):
            comm.refuse_dtensor(x, name)
        rank, own = self.group.rank(), self._held(batch)
        wanted = count_tokens(own[rank])
        shapes = [(wanted, heads, self.head_dim) for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        if [tuple(x.shape) for x in (q, k, v)] != shapes or not q.dtype == k.dtype == v.dtype:
            raise ValueError(
                f"`q`, `k`, `v` must be {', '.join(str(list(shape)) for shape in shapes)} (the tokens `rows(batch)`) "
                f"in one dtype, got {', '.join(str(list(x.shape)) for x in (q, k, v))} in {q.dtype}, {k.dtype}, "
                f"{v.dtype}"
            )
        lens = tuple(keys - new for keys, new in zip(batch.kv_lens, batch.q_lens, strict=True))
        if cached is None:
            if any(lens):
                raise ValueError(f"`cached` must be given for a batch with cached tokens ({lens}), got None")
            return
        _check_cached(cached, lens, self.group, (self.num_kv_heads, self.head_dim), k.dtype)


class RingAttention(PlacedAttention):
    """Causal attention over a ragged batch whose tokens lie on the ranks of `group` by a placement.

    The group may have more ranks than there are heads.

    Args:
        heads: who owns which heads; the ring holds all of one tensor-parallel shard, so any sp will do.
        head_dim: D.
        group: the sequence ranks.
        tp_rank: which tensor-parallel shard of the heads.
        sinks: a score of each query head that joins its softmax and has no value (gpt-oss). They may be stored by the
            flat map of `heads`' tensor-parallel ranks over the group, and are gathered then, or split over those alone
            (a head map with sp 1 over the tensor-parallel group).
        method: "kv" sends keys and values round, "q" queries.
        placement: of the new tokens; see `partition.place_tokens`.
        interleave: neighbours that lie together, of a striped placement.
        window: visible keys including the query's own; None for all.
        softmax_scale: factor of the scores; 1/sqrt(D) by default.
        wire: the format in which keys, values, queries and answers travel; see `seqpar.comm.wire`.

    Raises:
        ValueError: a method, placement, interleave, window, wire format or tp rank that is none; sinks of other heads.
    """

    unnamed: ClassVar[tuple[str, ...]] = ("sinks",)

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        tp_rank: int = 0,
        sinks: HeadParameter | None = None,
        method: Method = "kv",
        placement: Placement = "zigzag",
        interleave: int = 1,
        window: int | None = None,
        softmax_scale: float | None = None,
        wire: Wire | None = None,
    ) -> None:
        check_wire(wire)
        if method not in ("kv", "q"):
            raise ValueError(f'`method` must be "kv" or "q", got {method!r}')
        super().__init__(
            heads,
            head_dim,
            group=group,
            tp_rank=tp_rank,
            placement=placement,
            interleave=interleave,
            window=window,
            softmax_scale=softmax_scale,
        )
        self.method: Method = method
        self.wire, self.sinks = wire, sinks
        if sinks is not None:
            _check_sinks(sinks, heads, tp_rank, group)
            drop_child_names(self, self.unnamed)

    def steps(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Steps[Float[Tensor, "t_local h d"]]:
        """See `forward`; yields at every hop, and with method "q" at every partial that comes back."""
        self._check(q, k, v, batch, cached)
        order = self.order(batch, cached)
        kv = self.own_keys(k, v, batch, cached)
        return (yield from attend_steps(self.ring_core(), q, kv, order, batch, self._sinks_steps()))

    def forward(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Float[Tensor, "t_local h d"]:
        """Attend.

        In:    q[T/p, H/tp, D]; k, v[T/p, G/tp, D], rotated: the tokens `rows(batch)`, heads of this shard in order.
        Out:   [T/p, H/tp, D], the same tokens.
        Grad:  placed as the inputs, the cached keys and values included; every rank must use the result.
        Comm:  method "kv": keys and values of every token, as often as it has to hop. Method "q": queries likewise,
               and the output and lse of every query once for each other rank whose keys it sees.
               `plan.ring_volumes` has the bytes of every rank. Sinks that are not here: an all-gather, under the ring.

        Args:
            q: queries.
            k: keys.
            v: values.
            batch: the step's tokens, all of them, the same on every rank; its pages are not read.
            cached: earlier tokens of its requests, all of `kv_lens - q_lens`.

        Raises:
            ValueError: tokens, heads or dtypes that are not the batch's or the head map's, or that the wire format
                does not take; cached tokens that are not those that the batch has, each on one rank.
        """
        return comm.run(self.steps(q, k, v, batch, cached))

    def ring_core(self) -> RingCore:
        return super().ring_core()._replace(method=self.method, wire=self.wire)

    def _sinks_steps(self) -> Steps[Tensor | None]:
        """The sinks of all heads of the shard, gathered unless they are here."""
        if self.sinks is None:
            return None
        found, heads = self.sinks(), self.sinks.heads
        if heads.sp > 1:
            first = self.sinks.group.rank() // heads.sp * heads.sp
            sizes = [own.size for own in heads.q_ranges[first : first + heads.sp]]
            found = yield from comm.all_gather_steps(found, group=self.group, sizes=sizes, label=self.label or "ring")
        gathered: Tensor = found
        return gathered

    def _check(self, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> None:
        super()._check(q, k, v, batch, cached)
        check_wire(self.wire, q, "q")


def attend_steps(
    core: RingCore,
    q: Float[Tensor, "t h d"],
    kv: Float[Tensor, "n two g d"],
    order: RingOrder,
    batch: RaggedBatch,
    sinks: Steps[Tensor | None],
) -> Steps[Float[Tensor, "t h d"]]:
    """The attention of a ring: this rank's queries over the keys of all, in the order of `order.q` and `order.kv`.

    Grad:  to q, kv and the sinks.

    Args:
        core: who computes what.
        q: of this rank.
        kv: keys and values of this rank.
        order: what travels and what is computed.
        batch: whose plans remember what is the same in every layer.
        sinks: a program whose result is those of all heads here, or None. It runs beside the ring.
    """
    ring = RingStep(core, order, batch, q.dtype)
    go_round = ring.pass_kv if core.method == "kv" else ring.pass_q
    coming = comm.start(sinks)
    try:
        out, lse = yield from go_round(q.detach(), kv.detach())
        found = yield from coming
    finally:
        coming.close()
    if found is not None:
        out, lse = add_sinks(out, lse, found.detach())
    out = out.to(q.dtype)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, kv, found)):
        result: Tensor = _Backward.apply(q, kv, found, (out, lse), ring)  # type: ignore[no-untyped-call]
        return result
    return out


class RingStep:
    """One step: its order, on this rank."""

    def __init__(self, core: RingCore, order: RingOrder, batch: RaggedBatch, dtype: torch.dtype) -> None:
        self.core, self.order, self.batch = core, order, batch
        self.rank, self.ranks, self.group = core.group.rank(), order.ranks, core.group
        self.dtype = dtype
        self.wire = core.wire if self.ranks > 1 else None
        self.memory: dict[tuple[Any, ...], Any] = batch.plans.setdefault(("ring.memory", order, self.rank), {})
        self.options: dict[str, Any] = {"softmax_scale": core.softmax_scale, "kv_head_of": core.kv_head_of}

    def alone(self, q: Tensor, kv: Tensor) -> PartialSum:
        """This rank's queries over its own keys: a sum to which other partials may be added."""
        total = PartialSum(q)
        for rows, out, lse in self._partials(q, kv, self._tiles_of_keys(0)):
            total.add(rows, out, lse)
        return total

    def pass_kv(self, q: Tensor, kv: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Attend to each block of keys while the next one travels."""
        total, block = PartialSum(q), self._coded(kv)
        for hop in range(self.order.hops + 1):
            coming = self._next_keys(block, hop)
            try:
                for rows, out, lse in self._partials(q, self._decoded(block), self._tiles_of_keys(hop)):
                    total.add(rows, out, lse)
                block = yield from coming
            finally:
                coming.close()
        return total.out, total.lse

    def pass_q(self, q: Tensor, kv: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Answer each block of queries while the next one travels, and the answer before it, too."""
        total, block, back = PartialSum(q), self._coded(q), comm.start(_nothing())
        try:
            for hop in range(self.order.hops + 1):
                coming = self._next_queries(block, hop)
                try:
                    asked = self._decoded(block)
                    answer = PartialSum(asked) if hop else total
                    for rows, out, lse in self._partials(asked, kv, self._tiles_of_queries(hop)):
                        answer.add(rows, out, lse)
                    self._collect(total, hop - 1, (yield from back))
                    back = self._answer(answer, hop)
                    block = yield from coming
                finally:
                    coming.close()
            self._collect(total, self.order.hops, (yield from back))
        finally:
            back.close()
        return total.out, total.lse

    def backward(self, grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Keys go round as in `pass_kv`; the gradients of each block go home under the next one's."""
        to_q, to_own = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(kv, dtype=lse.dtype)
        coded = self.core.method == "kv"
        block, q = (self._coded(kv), q) if coded else (kv, self._decoded(self._coded(q)))
        back = comm.start(_nothing())
        try:
            for hop in range(self.order.hops + 1):
                coming = self._next_keys(block, hop)
                try:
                    held = self._decoded(block) if coded else block
                    to_kv = torch.zeros_like(held, dtype=lse.dtype) if hop else to_own
                    for tile in self._tiles_of_keys(hop):
                        rows, keys = slice(*tile.rows), slice(*tile.keys)
                        (k, v), options = held[keys].unbind(1), self._rule(tile)
                        found = tile_gradients(grad[rows], q[rows], k, v, out[rows], lse[rows], **options)
                        to_q[rows] += found[0]
                        to_kv[keys] += torch.stack(found[1:], 1)
                    self._add_home(to_own, hop - 1, (yield from back))
                    back = self._gradients_home(to_kv, hop)
                    block = yield from coming
                finally:
                    coming.close()
            self._add_home(to_own, self.order.hops, (yield from back))
        finally:
            back.close()
        return to_q.to(q.dtype), to_own.to(grad.dtype)

    def _partials(self, q: Tensor, kv: Tensor, tiles: Sequence[Tile]) -> Iterator[tuple[Range, Tensor, Tensor]]:
        for tile in tiles:
            rows, (k, v) = q[slice(*tile.rows)], kv[slice(*tile.keys)].unbind(1)
            if tile.kind == "causal":
                out, lse = attention(rows, k, v, self._whole(tile.rows.size), **self.options)
            else:
                out, lse = tile_attention(rows, k, v, **self._rule(tile))
            yield tile.rows, out, lse

    def _rule(self, tile: Tile) -> dict[str, Any]:
        """What the kernels of tiles are told of one."""
        mask = self._kept(("mask", tile.q, tile.k), lambda: self._mask(tile)) if tile.kind == "masked" else None
        return {**self.options, "causal": tile.kind == "causal", "mask": mask}

    def _mask(self, tile: Tile) -> Tensor:
        own, key = run_positions(tile.q)[:, None], run_positions(tile.k)
        seen = key <= own
        if self.order.window is not None:
            seen &= key > own - self.order.window
        return seen.to(self.batch.device)

    def _whole(self, tokens: int) -> RaggedBatch:
        return self._kept(("whole", tokens), lambda: RaggedBatch.prefill((tokens,), self.batch.device))

    def _tiles_of_keys(self, hop: int) -> tuple[Tile, ...]:
        keys = self._keys((self.rank - hop) % self.ranks, hop)
        return self._kept(("keys", hop), lambda: self.order.tiles(self.order.q[self.rank], keys))

    def _tiles_of_queries(self, hop: int) -> tuple[Tile, ...]:
        queries = self._queries((self.rank + hop) % self.ranks, hop)
        return self._kept(("queries", hop), lambda: self.order.tiles(queries, self.order.kv[self.rank]))

    def _keys(self, owner: int, hop: int) -> Runs:
        return self._kept(("keys at", owner, hop), lambda: self.order.keys_at(owner, hop))

    def _queries(self, owner: int, hop: int) -> Runs:
        return self._kept(("queries at", owner, hop), lambda: self.order.queries_at(owner, hop))

    def _seen(self, owner: int, hop: int) -> Runs:
        return self._kept(("seen at", owner, hop), lambda: self.order.seen_at(owner, hop))

    def _answered(self, owner: int, hop: int) -> Runs:
        return self._kept(("answered at", owner, hop), lambda: self.order.answered_at(owner, hop))

    def _kept(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is the same in every layer of the batch."""
        if key not in self.memory:
            self.memory[key] = make()
        found: T = self.memory[key]
        return found

    def _coded(self, x: Tensor) -> Tensor:
        """Heads as they travel: themselves, or bytes [..., encoded_width]."""
        if self.wire is None:
            return x
        dim = self.core.head_dim
        return encode(x.reshape(-1, dim), self.wire).view(*x.shape[:-1], encoded_width(dim, self.wire))

    def _decoded(self, x: Tensor) -> Tensor:
        """What `_coded` is on arrival."""
        if self.wire is None:
            return x
        dim = self.core.head_dim
        return decode(x.reshape(-1, x.shape[-1]), dim, self.dtype, self.wire).view(*x.shape[:-1], dim)

    def _next_keys(self, kv: Tensor, hop: int) -> Steps[Tensor]:
        """Launch the hop after `hop` of the keys that are here, and of those that come."""
        if hop == self.order.hops:
            return comm.start(_nothing())
        there, before = (self.rank - hop) % self.ranks, (self.rank - hop - 1) % self.ranks
        sent = _select(kv, self._keys(there, hop), self._keys(there, hop + 1))
        return self._send(sent, *ring_peers(self.rank, self.ranks), count_tokens(self._keys(before, hop + 1)))

    def _next_queries(self, q: Tensor, hop: int) -> Steps[Tensor]:
        """The same of queries, the other way round."""
        if hop == self.order.hops:
            return comm.start(_nothing())
        there, after = (self.rank + hop) % self.ranks, (self.rank + hop + 1) % self.ranks
        sent = _select(q, self._queries(there, hop), self._queries(there, hop + 1))
        src, dst = ring_peers(self.rank, self.ranks)
        return self._send(sent, dst, src, count_tokens(self._queries(after, hop + 1)))

    def _answer(self, answer: PartialSum, hop: int) -> Steps[Tensor]:
        """Launch the way home of the partials of other ranks' queries, and of this one's."""
        if hop == 0:
            return comm.start(_nothing())
        owner, there = (self.rank + hop) % self.ranks, (self.rank - hop) % self.ranks
        arrived, wanted = self._queries(owner, hop), self._answered(owner, hop)
        out = self._coded(_select(answer.out, arrived, wanted).to(self.dtype))
        packed = _pack(out, _select(answer.lse, arrived, wanted))
        return self._send(packed, owner, there, count_tokens(self._answered(self.rank, hop)), tag=1)

    def _collect(self, total: PartialSum, hop: int, packed: Tensor | None) -> None:
        """Add what came back from the rank `hop` further on."""
        if packed is None:
            return
        coded, lse = _unpack(packed, self.dtype if self.wire is None else torch.uint8, _wide(self.dtype))
        out = self._decoded(coded)
        for rows, part in _places(self.order.q[self.rank], self._answered(self.rank, hop)):
            total.add(rows, out[slice(*part)], lse[slice(*part)])

    def _gradients_home(self, to_kv: Tensor, hop: int) -> Steps[Tensor]:
        """Launch the way home of the gradients of other ranks' keys, and of this one's."""
        if hop == 0:
            return comm.start(_nothing())
        owner, there = (self.rank - hop) % self.ranks, (self.rank + hop) % self.ranks
        sent = _select(to_kv, self._keys(owner, hop), self._seen(owner, hop))
        return self._send(sent, owner, there, count_tokens(self._seen(self.rank, hop)), tag=1, label=" (backward)")

    def _add_home(self, total: Tensor, hop: int, found: Tensor | None) -> None:
        if found is None:
            return
        for rows, part in _places(self.order.kv[self.rank], self._seen(self.rank, hop)):
            total[slice(*rows)] += found[slice(*part)]

    def _send(self, x: Tensor, dst: int, src: int, rows: int, *, tag: int = 0, label: str = "") -> Steps[Tensor]:
        return comm.start(
            comm.send_recv_steps(
                x,
                dst=dst,
                src=src,
                group=self.group,
                recv_shape=(rows, *x.shape[1:]),
                tag=tag,
                label=self.core.label + label,
            )
        )


class PartialSum:
    """Partials of some queries, merged as they come."""

    def __init__(self, q: Tensor) -> None:
        dtype = _wide(q.dtype)
        self.out = torch.zeros_like(q, dtype=dtype)
        self.lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
        self._found = bytearray(len(q))  # 1 where a row has a partial: the first one is the sum

    def add(self, rows: Range, out: Tensor, lse: Tensor) -> None:
        """Merge a partial of consecutive rows into theirs."""
        those = slice(*rows)
        if self._found.find(1, *rows) >= 0:
            out, lse = merge((self.out[those], out), (self.lse[those], lse))
        self.out[those], self.lse[those] = out, lse
        self._found[those] = b"\1" * rows.size


class _Backward(torch.autograd.Function):
    """Gives the finished output its gradient: another ring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, sinks: Tensor | None, found: tuple[Tensor, Tensor], ring: RingStep
    ) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(q, kv, sinks, *found)
        return found[0].data  # no view of what is saved, so that its owner may write to it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, kv, sinks, out, lse = ctx.saved_tensors
        to_q, to_kv = comm.run(ctx.ring.backward(grad.contiguous(), q, kv, out, lse))
        return to_q, to_kv, None if sinks is None else _to_sinks(grad, sinks, out, lse), None, None


def _to_sinks(grad: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """A sink takes its share of the softmax from all values alike, and has none of its own."""
    share = (sinks.to(lse.dtype) - lse).exp()
    return -(share * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum(0).to(sinks.dtype)


def _nothing() -> Steps[Any]:
    """A program with nothing in flight, and no result."""
    return None
    yield


def placed_held(batch: RaggedBatch, ranks: int, placement: Placement, *, interleave: int = 1) -> Held:
    """The positions of a batch's new tokens that each of `ranks` holds, each request laid out by itself."""
    key = ("ring.held", ranks, placement, interleave)
    if key not in batch.plans:
        firsts = [keys - new for keys, new in zip(batch.kv_lens, batch.q_lens, strict=True)]
        batch.plans[key] = place_lens(batch.q_lens, ranks, placement, interleave=interleave, firsts=firsts)
    held: Held = batch.plans[key]
    return held


def placed_rows(batch: RaggedBatch, ranks: int, placement: Placement, *, interleave: int = 1) -> Rows:
    """Which of a batch's tokens each of `ranks` holds, in its order, when each request is laid out by itself."""
    key = ("ring.rows of all", ranks, placement, interleave)
    if key not in batch.plans:
        olds = [keys - new for keys, new in zip(batch.kv_lens, batch.q_lens, strict=True)]
        starts = [start - old for start, old in zip(batch.q_starts, olds, strict=False)]
        batch.plans[key] = tuple(
            tuple(p + start for runs, start in zip(own, starts, strict=True) for run in runs for p in run.positions)
            for own in placed_held(batch, ranks, placement, interleave=interleave)
        )
    rows: Rows = batch.plans[key]
    return rows


def place_lens(
    lens: Sequence[int],
    ranks: int,
    placement: Placement,
    *,
    interleave: int = 1,
    firsts: Sequence[int] | None = None,
) -> Held:
    """So many tokens of each request over the ranks, each request by itself, from position `firsts` (0) on."""
    placed = [
        place_tokens(length, ranks, placement, interleave=interleave, first=first)
        for length, first in zip(lens, firsts or [0] * len(lens), strict=True)
    ]
    return tuple(tuple(request[rank] for request in placed) for rank in range(ranks))


def joined_held(cached: Held, new: Held) -> Held:
    """Each request's cached runs, then its new ones."""
    return tuple(
        tuple((*old, *own) for old, own in zip(*ranks, strict=True)) for ranks in zip(cached, new, strict=True)
    )


def joined_rows(cached: Tensor, held: Held, new: Tensor, own: Held, rank: int) -> Tensor:
    """The rows of `joined_held`, out of those of the cached and the new tokens."""
    olds = cached.split([count_tokens((runs,)) for runs in held[rank]])
    news = new.split([count_tokens((runs,)) for runs in own[rank]])
    return torch.cat([new[:0], *chain(*zip(olds, news, strict=True))])


def count_tokens(requests: Runs) -> int:
    return sum(run.size for runs in requests for run in runs)


def _places(held: Runs, part: Runs) -> list[tuple[Range, Range]]:
    """Where the rows of `part` lie among those of `held`, whose runs they are parts of, and among their own."""
    found: list[tuple[Range, Range]] = []
    row = at = 0
    for whole, some in zip(chain(*held), chain(*part), strict=True):
        if some.size:
            there, here = Range(0, some.size).shift(row + some.first - whole.first), Range(at, at + some.size)
            last = found[-1] if found else None
            if last is not None and last[0].stop == there.start:
                found[-1] = Range(last[0].start, there.stop), Range(last[1].start, here.stop)
            else:
                found.append((there, here))
        row, at = row + whole.size, at + some.size
    return found


def _select(x: Tensor, held: Runs, part: Runs) -> Tensor:
    """Those rows of x, a view where they are consecutive."""
    rows = [x[slice(*there)] for there, _ in _places(held, part)]
    return rows[0] if len(rows) == 1 else torch.cat([x[:0], *rows])


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """[T, H, D] and [T, H] as bytes [T, H, D * b + 4], the lse beside each head's output (8 for float64)."""
    return torch.cat([out.contiguous().view(torch.uint8), lse.contiguous()[..., None].view(torch.uint8)], -1)


def _unpack(packed: Tensor, dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The outputs, in the dtype in which they travelled, and the log-sum-exps."""
    out, lse = packed.split([packed.shape[-1] - wide.itemsize, wide.itemsize], -1)
    return out.contiguous().view(dtype), lse.contiguous().view(wide)[..., 0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run_positions(run: Run) -> Tensor:
    index = torch.arange(run.first, run.stop)
    return run.start + index // run.width * run.step + index % run.width


def _check_sinks(sinks: HeadParameter, heads: HeadMap, tp_rank: int, group: ProcessGroup) -> None:
    """Refuse sinks that are not one number for each query head of the shard, here or over the group."""
    found = sinks.heads
    rank = tp_rank if found.sp == 1 else tp_rank * found.sp + group.rank()
    if (
        (found.num_heads, found.num_kv_heads, found.tp) != (heads.num_heads, heads.num_kv_heads, heads.tp)
        or found.q_shard(tp_rank) != heads.q_shard(tp_rank)
        or found.sp not in (1, group.size())
        or (sinks.group.rank(), sinks.shape) != (rank, ())
    ):
        raise ValueError(
            f"`sinks` must be a number for each of the heads {list(heads.q_shard(tp_rank))} of tp rank {tp_rank} of "
            f"{heads}, split over tp alone or over the {group.size()} ranks of `group` too, got {sinks.shape} for each "
            f"of those of rank {sinks.group.rank()} of {found}"
        )


def _check_cached(
    cached: CachedKV, lens: tuple[int, ...], group: ProcessGroup, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Refuse cached tokens that are not the first ones of the batch's requests, each once."""
    held = cached.held
    if len(held) != group.size() or any(len(requests) != len(lens) for requests in held):
        raise ValueError(
            f"`cached.held` must have the runs of {len(lens)} requests for each of {group.size()} ranks, got those of "
            f"{[len(requests) for requests in held]}"
        )
    for request, length in enumerate(lens):
        runs = [run for requests in held for run in requests[request] if run.size]
        ends = [(run.position(0), run.position(run.size - 1)) for run in runs]
        if sum(run.size for run in runs) != length or any(a < 0 or b >= length for a, b in ends):
            raise ValueError(
                f"`cached.held` must place the {length} cached tokens of request {request} once each, got {runs}"
            )
    shape = (count_tokens(held[group.rank()]), *heads)
    if (
        tuple(cached.k.shape) != shape
        or cached.k.shape != cached.v.shape
        or {cached.k.dtype, cached.v.dtype} != {dtype}
    ):
        raise ValueError(
            f"`cached.k` and `cached.v` must be {list(shape)} in {dtype}, got {list(cached.k.shape)} in "
            f"{cached.k.dtype} and {list(cached.v.shape)} in {cached.v.dtype}"
        )
