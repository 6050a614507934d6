"""Who owns which heads, rows, tokens: functions from ints to tuples, with no group and no tensor.

One flat map serves every layout. Ranks of a `tp` x `sp` mesh are numbered `tp_rank * sp + sp_rank` (sequence axis
fastest), every dimension is split evenly over that flat order, and the shard of a `tp` rank is the union of the blocks
of its `sp` ranks. So all factorisations of the same ranks give each rank the same heads and the same rows, also where
the counts do not divide: the alternative, splitting over `tp` and then again over `sp`, gives rank 2 of 28 heads on
4 x 2 ranks other heads than on 8 x 1, and a KV cache that no other layout can read.

Source: the SP-fastest order is the transpose of Shift Parallelism's device grid (arXiv:2509.16495, Fig. 6).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

__all__ = [
    "GraphKey",
    "GraphKeys",
    "GridOrder",
    "HeadMap",
    "HeadPart",
    "Held",
    "Interleave",
    "Layout",
    "Piece",
    "Placement",
    "Range",
    "RingOrder",
    "Run",
    "Segment",
    "Shift",
    "Striping",
    "ThreePhase",
    "Tile",
    "block_ranges",
    "even_ranges",
    "even_split",
    "gather_held",
    "head_parts",
    "layout_names",
    "piece_ranges",
    "place_tokens",
    "ring_peers",
    "shard_range",
    "stage_layers",
    "union",
]


class Range(NamedTuple):
    """The half-open range [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scale(self, factor: int) -> Range:
        """The range of elements when every index stands for `factor` of them (heads to rows)."""
        return Range(self.start * factor, self.stop * factor)

    def shift(self, offset: int) -> Range:
        return Range(self.start + offset, self.stop + offset)


class Layout(NamedTuple):
    """How many ways a step is split: `tp` over heads and rows, `sp` over tokens."""

    tp: int
    sp: int

    @property
    def size(self) -> int:
        return self.tp * self.sp

    def reaches(self, other: Layout) -> bool:
        """Whether `other` needs only views of the weights that this layout stores.

        Raises:
            ValueError: an axis of this layout is smaller than 1.
        """
        self.check()
        return other.size == self.size and other.tp % self.tp == 0

    @property
    def reachable(self) -> tuple[Layout, ...]:
        """The layouts that this one reaches, itself first and pure tensor parallelism last.

        >>> [tuple(layout) for layout in Layout(2, 4).reachable]
        [(2, 4), (4, 2), (8, 1)]
        """
        return tuple(Layout(self.tp * f, self.sp // f) for f in range(1, self.sp + 1) if self.sp % f == 0)

    def check(self) -> Layout:
        """Return self, or raise ValueError when an axis is smaller than one."""
        if self.tp < 1 or self.sp < 1:
            raise ValueError(f"`tp` and `sp` must be at least 1, got tp={self.tp}, sp={self.sp}")
        return self


class Piece(NamedTuple):
    """`local` of a stored parameter is `full` of the unsharded tensor, both along `dim`."""

    dim: int
    local: Range
    full: Range


class Segment(NamedTuple):
    """A run of heads in a fused QKV projection; a "kv" head holds its key rows, then its value rows."""

    kind: Literal["q", "kv"]
    heads: Range


class HeadPart(NamedTuple):
    """Some KV heads of one rank, and the query heads of it that read them."""

    q: Range
    kv: Range


def layout_names(layouts: Iterable[Layout]) -> str:
    """Layouts for people, in a message.

    >>> layout_names(Layout(2, 2).reachable)
    '(2, 2), (4, 1)'
    """
    return ", ".join(str(tuple(layout)) for layout in layouts)


def even_split(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of `total` things over `parts`, the first `total % parts` one larger; some may be zero.

    Raises:
        ValueError: `parts` is smaller than 1, or `total` is negative.
    """
    base, extra = _shares(total, parts)
    return tuple(base + (part < extra) for part in range(parts))


def _shares(total: int, parts: int) -> tuple[int, int]:
    """How large each part is, and how many are one larger."""
    if parts < 1 or total < 0:
        raise ValueError(f"a split must be of a count >= 0 over parts >= 1, got {total} over {parts}")
    return divmod(total, parts)


def even_ranges(total: int, parts: int) -> tuple[Range, ...]:
    """The consecutive ranges whose sizes are `even_split(total, parts)`; token slices are these.

    Raises:
        ValueError: as `even_split`.
    """
    base, extra = _shares(total, parts)
    starts = [part * base + min(part, extra) for part in range(parts + 1)]
    return tuple(Range(a, b) for a, b in pairwise(starts))


def stage_layers(num_layers: int, pp: int) -> tuple[Range, ...]:
    """The layers of each stage of a pipeline: consecutive, evenly split; earlier stages take what is left over.

    >>> [tuple(layers) for layers in stage_layers(10, 4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]

    Raises:
        ValueError: a stage would have no layer.
    """
    if not 1 <= pp <= num_layers:
        raise ValueError(f"`pp` must be at least 1 and at most the number of layers ({num_layers}), got {pp}")
    return even_ranges(num_layers, pp)


def piece_ranges(total: int, ranks: int, pieces: int) -> tuple[tuple[Range, ...], ...]:
    """The slices of `even_ranges(total, ranks)`, each cut evenly: entry `c` lists piece `c` of every rank.

    All ranks send as much of each entry, and under causal attention all entries are about as much work; consecutive
    chunks of all tokens would come from one rank after another, and each would cost more than the one before.

    >>> piece_ranges(8, 2, 2)
    ((Range(start=0, stop=2), Range(start=4, stop=6)), (Range(start=2, stop=4), Range(start=6, stop=8)))

    Raises:
        ValueError: as `even_split`.
    """
    cut = [[r.shift(s.start) for r in even_ranges(s.size, pieces)] for s in even_ranges(total, ranks)]
    return tuple(zip(*cut, strict=True))


def block_ranges(total: int, layout: Layout, tp_rank: int) -> tuple[Range, ...]:
    """The flat blocks of a dimension that tensor-parallel rank `tp_rank` stores, one per sequence rank.

    Raises:
        ValueError: the layout has no such rank, or the dimension is negative.
    """
    _check_rank(tp_rank, layout.check().tp, "tp_rank")
    return even_ranges(total, layout.size)[tp_rank * layout.sp : (tp_rank + 1) * layout.sp]


def shard_range(total: int, layout: Layout, tp_rank: int) -> Range:
    """The rows of a dimension that tensor-parallel rank `tp_rank` stores: the union of its blocks.

    Raises:
        ValueError: as `block_ranges`.
    """
    return union(block_ranges(total, layout, tp_rank))


def _check_rank(rank: int, ranks: int, name: str) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"`{name}` must be a rank (below {ranks}), got {rank}")


def union(ranges: Sequence[Range]) -> Range:
    """The smallest range that covers `ranges`, which lie in order and leave no gap.

    Raises:
        ValueError: there is none.
    """
    if not ranges:
        raise ValueError("`ranges` must be at least one, got none")
    return Range(ranges[0].start, ranges[-1].stop)


@dataclass(frozen=True)
class Interleave:
    """How the tokens of a step are cut into chunks that take turns, each computing while another's sums travel (ISO).

    Args:
        chunks: how many, of equal numbers of tokens; requests are cut where that falls.
        cuts: the first tokens of all chunks but the first instead, for steps of one known size. Tokens are counted
            request after request, without padding.
        min_tokens: steps of fewer tokens are not cut: decodes, which would read all weights once for each chunk, and
            prompts whose halves are too small to be computed efficiently.

    Raises:
        ValueError: fewer than two chunks, cuts that are not positive and increasing, or a gate below two tokens.

    Source: ISO, arXiv:2409.11155.
    """

    chunks: int = 2
    cuts: Sequence[int] | None = None
    min_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.cuts is not None:
            object.__setattr__(self, "cuts", tuple(self.cuts))
            if not self.cuts or any(a >= b for a, b in pairwise((0, *self.cuts))):
                raise ValueError(f"`cuts` must be positive and increasing, got {list(self.cuts)}")
        if self.chunks < 2 or self.min_tokens < 2:
            raise ValueError(
                f"`chunks` and `min_tokens` must be at least 2, got {self.chunks} and {self.min_tokens}; "
                'to cut nothing, turn the overlap "off"'
            )

    def cuts_of(self, num_tokens: int) -> tuple[int, ...]:
        """Where a step of `num_tokens` tokens is cut; nowhere below the gate.

        Raises:
            ValueError: given cuts that lie outside of the step.
        """
        if num_tokens < self.min_tokens:
            return ()
        if self.cuts is None:
            return tuple(chunk.start for chunk in even_ranges(num_tokens, min(self.chunks, num_tokens))[1:])
        if self.cuts[-1] >= num_tokens:
            raise ValueError(
                f"`cuts` must lie within the step's {num_tokens} tokens, got {list(self.cuts)}; give cuts for steps of "
                "this size (padding is not counted), or `chunks`"
            )
        return tuple(self.cuts)


@dataclass(frozen=True)
class Shift:
    """Which layout a step runs under, by how many tokens it has in all: the same answer on every rank.

    Args:
        spans: the first number of tokens of each span and its layout, from 1 token on, increasing. There may be any
            number of them: near a crossing point a layout between the two ends may be the fastest.

    Raises:
        ValueError: no span, one that does not begin at 1 token or not after the one before it, or layouts of
            different numbers of ranks.

    Source: Shift Parallelism, arXiv:2509.16495, which has two spans.
    """

    spans: tuple[tuple[int, Layout], ...]

    def __post_init__(self) -> None:
        spans = tuple((first, Layout(*layout).check()) for first, layout in self.spans)
        object.__setattr__(self, "spans", spans)
        firsts = [first for first, _ in spans]
        if firsts[:1] != [1] or any(a >= b for a, b in pairwise(firsts)):
            raise ValueError(f"`spans` must begin at 1 token and increase, got {firsts}")
        sizes = sorted({layout.size for _, layout in spans})
        if len(sizes) > 1:
            raise ValueError(f"`spans` must have layouts of the same ranks, got layouts of {sizes}")

    @classmethod
    def threshold(cls, tokens: int, base: Layout) -> Shift:
        """The paper's rule: up to that many tokens pure tensor parallelism, above it the base layout.

        Raises:
            ValueError: a negative number of tokens.
        """
        if tokens < 0:
            raise ValueError(f"`tokens` must be at least 0, got {tokens}")
        full = Layout(base.size, 1)
        return cls(((1, base),) if tokens == 0 or full == base else ((1, full), (tokens + 1, base)))

    def layout_of(self, num_tokens: int) -> Layout:
        """The layout of a step of that many tokens, over all requests and ranks."""
        return next(layout for first, layout in reversed(self.spans) if num_tokens >= first or first == 1)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Every layout that some step runs under, once, tensor-parallel ranks increasing."""
        return tuple(sorted({layout for _, layout in self.spans}))


class GraphKey(NamedTuple):
    """A step that is recorded as a graph: its layout, and how many tokens its buffers hold."""

    layout: Layout
    num_tokens: int


@dataclass(frozen=True)
class GraphKeys:
    """Which steps run as recorded graphs, and which graph serves a step of any number of tokens.

    Args:
        keys: the graphs, in any order.

    Raises:
        ValueError: one of fewer than one token, or the same one twice.
    """

    keys: tuple[GraphKey, ...]

    def __post_init__(self) -> None:
        keys = tuple(sorted(GraphKey(Layout(*layout).check(), num_tokens) for layout, num_tokens in self.keys))
        object.__setattr__(self, "keys", keys)
        if len(set(keys)) != len(keys) or any(key.num_tokens < 1 for key in keys):
            raise ValueError(f"`keys` must be different and of at least 1 token, got {[tuple(key) for key in keys]}")

    @classmethod
    def every(cls, layouts: Sequence[Layout], sizes: Sequence[int]) -> GraphKeys:
        """Every size under every layout, for steps of which any may come under any."""
        return cls(tuple(GraphKey(layout, size) for layout in layouts for size in sizes))

    @classmethod
    def of(cls, shift: Shift, sizes: Sequence[int]) -> GraphKeys:
        """Those that steps under a rule can need, and no others: some size, under the layout of a step that it serves.

        A step of the last tokens before a border of the rule may be served by a size beyond it.
        """
        found, first = set(), 1
        for size in sorted(sizes):
            begins = [first, *(start for start, _ in shift.spans if first < start <= size)]
            found |= {GraphKey(shift.layout_of(start), size) for start in begins}
            first = size + 1
        return cls(tuple(found))

    def key_of(self, layout: Layout, num_tokens: int) -> GraphKey | None:
        """The graph of the fewest tokens that serves such a step; None where there is none, and it must run eagerly."""
        sizes = self._sizes.get(layout, ())
        index = bisect_left(sizes, num_tokens)
        return GraphKey(layout, sizes[index]) if index < len(sizes) else None

    @cached_property
    def _sizes(self) -> dict[Layout, tuple[int, ...]]:
        return {
            layout: tuple(key.num_tokens for key in keys) for layout, keys in groupby(self.keys, lambda k: k.layout)
        }


@dataclass(frozen=True)
class ThreePhase:
    """How Ulysses attention is cut into parts that travel in, are computed and travel back at the same time (CSPS).

    Args:
        head_groups: parts by KV heads; as many as a rank has at most.
        query_chunks: parts by query tokens, of every rank's own slice.
        min_tokens: steps of fewer tokens run as plain Ulysses: their messages are too small to be worth cutting.

    Raises:
        ValueError: a count below one, or one part in all.

    Source: CSPS, arXiv:2409.15104v1.
    """

    head_groups: int = 2
    query_chunks: int = 2
    min_tokens: int = 1024

    def __post_init__(self) -> None:
        if min(self.head_groups, self.query_chunks) < 1 or self.head_groups * self.query_chunks < 2:
            raise ValueError(
                "`head_groups` and `query_chunks` must be at least 1, and one of them 2, "
                f"got {self.head_groups} and {self.query_chunks}; to cut nothing, leave the pipeline out"
            )


@dataclass(frozen=True)
class Striping:
    """Which rank holds which tokens of a request when its keys are dealt out in short runs: `t // interleave % ranks`.

    The ranks' shares never differ by more than `interleave` tokens, however long a request grows, so nothing is ever
    moved to restore balance. Among its own, a rank numbers tokens without gaps, in order. A page of
    `ranks * interleave * n` tokens holds `interleave * n` on every rank, so that one page table serves them all.

    Args:
        ranks: that hold the tokens between them.
        interleave: tokens of a run.

    Raises:
        ValueError: a count below one.

    Source: decode context parallelism in vLLM; the runs are those of Helix, arXiv:2507.07120.
    """

    ranks: int
    interleave: int = 1

    def __post_init__(self) -> None:
        if min(self.ranks, self.interleave) < 1:
            raise ValueError(
                f"`ranks` and `interleave` must be at least 1, got ranks={self.ranks}, interleave={self.interleave}"
            )

    @property
    def period(self) -> int:
        """Tokens after which it is the first rank's turn again."""
        return self.ranks * self.interleave

    def owner(self, token: int) -> int:
        """The rank that holds a token.

        >>> [Striping(2, interleave=3).owner(token) for token in range(8)]
        [0, 0, 0, 1, 1, 1, 0, 0]
        """
        return token // self.interleave % self.ranks

    def local_offset(self, token: int) -> int:
        """How many tokens before it its owner holds."""
        return token // self.period * self.interleave + token % self.interleave

    def local_len(self, length: int, rank: int) -> int:
        """How many of the first `length` tokens a rank holds."""
        rounds, rest = divmod(length, self.period)
        return rounds * self.interleave + min(max(rest - rank * self.interleave, 0), self.interleave)

    def local_range(self, start: int, stop: int, rank: int) -> Range:
        """Which of a rank's own tokens lie in [start, stop)."""
        return Range(self.local_len(start, rank), self.local_len(stop, rank))

    def tokens(self, start: int, stop: int, rank: int) -> tuple[int, ...]:
        """The tokens in [start, stop) that a rank holds, in order."""
        first = (start // self.period * self.ranks + rank) * self.interleave
        runs = range(first, stop, self.period)
        return tuple(t for run in runs for t in range(max(run, start), min(run + self.interleave, stop)))


@dataclass(frozen=True)
class HeadMap:
    """Which query and KV heads every (tp, sp) rank owns.

    Query heads are split evenly over the flat order, so a count that does not divide gives the first ranks one more.
    A rank owns the KV heads that its query heads read: KV heads are replicated where they are fewer than ranks or
    where a boundary falls inside a group of query heads.

    Raises:
        ValueError: `num_heads` is no multiple of `num_kv_heads`, or there are fewer query heads than ranks.
    """

    num_heads: int
    num_kv_heads: int
    tp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        self.layout.check()
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_kv_heads`, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.num_heads < self.size:
            raise ValueError(
                f"`num_heads` must be at least the number of ranks ({self.size}), got {self.num_heads}; "
                "use a smaller tp or sp"
            )

    @property
    def layout(self) -> Layout:
        return Layout(self.tp, self.sp)

    @property
    def size(self) -> int:
        return self.tp * self.sp

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def on(self, layout: Layout) -> HeadMap:
        """The same heads under another factorisation of the same ranks."""
        return HeadMap(self.num_heads, self.num_kv_heads, *layout)

    @cached_property
    def q_ranges(self) -> tuple[Range, ...]:
        """Query heads of each flat rank; together they tile all heads once."""
        return even_ranges(self.num_heads, self.size)

    @cached_property
    def kv_ranges(self) -> tuple[Range, ...]:
        """KV heads of each flat rank; neighbours overlap where a KV head is replicated."""
        return tuple(self._kv_of(heads) for heads in self.q_ranges)

    @cached_property
    def kv_owners(self) -> tuple[tuple[int, ...], ...]:
        """The flat ranks that hold each KV head; the length of an entry is its replication count."""
        return tuple(
            tuple(rank for rank, heads in enumerate(self.kv_ranges) if heads.start <= head < heads.stop)
            for head in range(self.num_kv_heads)
        )

    @cached_property
    def blocked(self) -> bool:
        """Whether no KV head is replicated, so that each flat rank's q, k and v rows can lie together."""
        return all(len(owners) == 1 for owners in self.kv_owners)

    def kv_head_of(self, rank: int) -> tuple[int, ...]:
        """The local KV head that each local query head of flat rank `rank` reads."""
        _check_rank(rank, self.size, "rank")
        first = self.kv_ranges[rank].start
        return tuple(head // self.group_size - first for head in range(*self.q_ranges[rank]))

    def q_shard(self, tp_rank: int) -> Range:
        """Query heads in the weights of a tensor-parallel rank."""
        return union(self._of_tp(self.q_ranges, tp_rank))

    def kv_shard(self, tp_rank: int) -> Range:
        """KV heads in the weights of a tensor-parallel rank."""
        return union(self._of_tp(self.kv_ranges, tp_rank))

    def storage(self, tp_rank: int) -> tuple[Segment, ...]:
        """The order of heads in the fused QKV projection of a tensor-parallel rank.

        Without replicated KV heads the rows of each flat rank lie together (q, then k0 v0 k1 v1 ...), so the weights
        of any layout with a larger tp are one view and the projection comes out grouped by destination. With
        replicated ones all query rows come first, then all of k0 v0 k1 v1 ..., and such a layout needs two views.
        """
        if self.blocked:
            pairs = zip(self._of_tp(self.q_ranges, tp_rank), self._of_tp(self.kv_ranges, tp_rank), strict=True)
            return tuple(seg for q, kv in pairs for seg in (Segment("q", q), Segment("kv", kv)))
        return Segment("q", self.q_shard(tp_rank)), Segment("kv", self.kv_shard(tp_rank))

    def offsets(self, tp_rank: int) -> tuple[tuple[Segment, int], ...]:
        """Each segment of `storage` with the head-sized row block at which it begins (a KV head takes two)."""
        at, placed = 0, []
        for segment in self.storage(tp_rank):
            placed.append((segment, at))
            at += segment.heads.size * (2 if segment.kind == "kv" else 1)
        return tuple(placed)

    def width(self, tp_rank: int) -> int:
        """Head-sized row blocks in the fused QKV projection of a tensor-parallel rank."""
        return self.q_shard(tp_rank).size + 2 * self.kv_shard(tp_rank).size

    def columns(self, tp_rank: int) -> tuple[tuple[Range, ...], ...]:
        """What each sequence rank receives of the fused QKV output, in head-sized columns.

        Entry `s` lists the column ranges that sequence rank `s` owns: its query heads, then its k, v pairs.
        Ranges overlap between entries where a KV head is replicated: that is the replication in the send buffer.
        """
        return tuple(
            _merged(self._find(tp_rank, Segment("q", q)), self._find(tp_rank, Segment("kv", kv)))
            for q, kv in zip(self._of_tp(self.q_ranges, tp_rank), self._of_tp(self.kv_ranges, tp_rank), strict=True)
        )

    def parts(self, count: int) -> tuple[tuple[HeadPart, ...], ...]:
        """The heads of each flat rank in `count` parts by KV heads, or in as many as any rank has KV heads.

        The number is the same for all ranks; a rank with fewer KV heads than parts ends with empty ones.
        """
        count = min(count, max(heads.size for heads in self.kv_ranges))
        return tuple(
            tuple(HeadPart(self._readers(rank, kv.shift(own.start)), kv.shift(own.start)) for kv in kvs)
            for rank, own in enumerate(self.kv_ranges)
            for kvs in (even_ranges(own.size, count),)
        )

    def part_columns(
        self, tp_rank: int, count: int
    ) -> tuple[dict[Literal["q", "k", "v"], tuple[tuple[Range, ...], ...]], ...]:
        """What each sequence rank receives of the fused QKV output for each of `parts(count)`, in head-sized columns.

        Entry `part[which][s]` lists the columns of sequence rank `s`; together they are `columns(tp_rank)[s]`.
        """
        ranks = self.parts(count)[tp_rank * self.sp : (tp_rank + 1) * self.sp]
        found: list[dict[Literal["q", "k", "v"], tuple[tuple[Range, ...], ...]]] = []
        for parts in zip(*ranks, strict=True):
            runs = [self._find(tp_rank, Segment("kv", part.kv)) for part in parts]
            heads = [[at for r in each for at in range(r.start, r.stop, 2)] for each in runs]
            found.append(
                {
                    "q": tuple(_merged(self._find(tp_rank, Segment("q", part.q))) for part in parts),
                    "k": tuple(tuple(Range(at, at + 1) for at in each) for each in heads),
                    "v": tuple(tuple(Range(at + 1, at + 2) for at in each) for each in heads),
                }
            )
        return tuple(found)

    def qkv_widths(self, tp_rank: int) -> tuple[int, ...]:
        """Head-sized columns that each sequence rank receives (q + k + v), the send sizes for one token."""
        return tuple(sum(r.size for r in ranges) for ranges in self.columns(tp_rank))

    def out_widths(self, tp_rank: int) -> tuple[int, ...]:
        """Query heads that each sequence rank returns after attention, the receive sizes for one token."""
        return tuple(heads.size for heads in self._of_tp(self.q_ranges, tp_rank))

    def kv_routes(self, tp_rank: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The KV heads that each sequence rank sends each for all of them to have the whole shard, every head once.

        Entry `[source][target]`. Of a replicated head a rank takes its own copy, else one of the holders' in turn.
        """
        first, shard, ranks = tp_rank * self.sp, self.kv_shard(tp_rank), range(self.sp)
        holders = {h: [r - first for r in self.kv_owners[h] if r - first in ranks] for h in range(*shard)}

        def source_of(head: int, target: int) -> int:
            ours = holders[head]
            return target if target in ours else ours[target % len(ours)]

        return tuple(
            tuple(tuple(head for head in holders if source_of(head, target) == source) for target in ranks)
            for source in ranks
        )

    def views(self, tp_rank: int, layout: Layout, layout_tp_rank: int) -> tuple[Range, ...]:
        """Row blocks of `storage(tp_rank)` that are the fused QKV weights of `layout_tp_rank` under `layout`.

        Raises:
            ValueError: the weights of this layout do not contain those of `layout`.
        """
        other = self.on(layout)
        within = Range(tp_rank * self.sp, (tp_rank + 1) * self.sp)
        wanted = Range(layout_tp_rank * layout.sp, (layout_tp_rank + 1) * layout.sp)
        if not self.layout.reaches(layout) or wanted.start < within.start or wanted.stop > within.stop:
            raise ValueError(
                f"`layout` must have the same ranks as {self.layout} and a multiple of its tp, got {layout} "
                f"for tp rank {layout_tp_rank} out of tp rank {tp_rank}"
            )
        ranges = [found for segment in other.storage(layout_tp_rank) for found in self._find(tp_rank, segment)]
        return _merged(ranges)

    def pieces(self, tp_rank: int, which: Literal["q", "k", "v"], head_dim: int, dim: int = 0) -> tuple[Piece, ...]:
        """Where the rows of the unsharded q, k or v projection lie in the fused one of a tensor-parallel rank."""
        found = []
        for segment, at in self.offsets(tp_rank):
            if segment.kind == which == "q":
                found.append(
                    Piece(dim, Range(at, at + segment.heads.size).scale(head_dim), segment.heads.scale(head_dim))
                )
            elif segment.kind == "kv" and which != "q":
                for i, head in enumerate(range(*segment.heads)):
                    row = at + 2 * i + (which == "v")
                    found.append(Piece(dim, Range(row, row + 1).scale(head_dim), Range(head, head + 1).scale(head_dim)))
        return tuple(found)

    def _kv_of(self, heads: Range) -> Range:
        return Range(heads.start // self.group_size, (heads.stop - 1) // self.group_size + 1)

    def _readers(self, rank: int, kv: Range) -> Range:
        """The query heads of flat rank `rank` that read the KV heads `kv`."""
        own = self.q_ranges[rank]
        start, stop = (min(max(head * self.group_size, own.start), own.stop) for head in kv)
        return Range(start, stop)

    def _of_tp(self, per_rank: tuple[Range, ...], tp_rank: int) -> tuple[Range, ...]:
        _check_rank(tp_rank, self.tp, "tp_rank")
        return per_rank[tp_rank * self.sp : (tp_rank + 1) * self.sp]

    def _find(self, tp_rank: int, wanted: Segment) -> tuple[Range, ...]:
        """Columns of the heads of `wanted`, in head order, out of the fused projection of `tp_rank`."""
        factor = 2 if wanted.kind == "kv" else 1
        found = []
        for segment, at in self.offsets(tp_rank):
            start, stop = max(segment.heads.start, wanted.heads.start), min(segment.heads.stop, wanted.heads.stop)
            if segment.kind == wanted.kind and start < stop:
                found.append(Range(start, stop).shift(-segment.heads.start).scale(factor).shift(at))
        return tuple(found)


def head_parts(heads: Range, group_size: int, parts: int) -> tuple[HeadPart, ...]:
    """Query heads in even parts, each with the KV heads that it reads; those at a border are in both parts.

    >>> [(tuple(part.q), tuple(part.kv)) for part in head_parts(Range(0, 6), 4, 2)]
    [((0, 3), (0, 1)), ((3, 6), (0, 2))]

    Args:
        heads: the query heads.
        group_size: that share one KV head.
        parts: how many.

    Raises:
        ValueError: fewer heads than parts.
    """
    if not 1 <= parts <= heads.size:
        raise ValueError(
            f"`parts` must be at least 1 and at most the number of query heads ({heads.size}), got {parts}"
        )
    even = [part.shift(heads.start) for part in even_ranges(heads.size, parts)]
    return tuple(HeadPart(q, Range(q.start // group_size, (q.stop - 1) // group_size + 1)) for q in even)


def _merged(*runs: Sequence[Range]) -> tuple[Range, ...]:
    """The ranges of all runs in order, neighbours that touch joined."""
    joined: list[Range] = []
    for item in (item for run in runs for item in run):
        if joined and joined[-1].stop == item.start:
            joined[-1] = Range(joined[-1].start, item.stop)
        else:
            joined.append(item)
    return tuple(joined)


Placement = Literal["contiguous", "zigzag", "striped"]
"""How the tokens of a request lie over ranks; see `place_tokens`."""


class Run(NamedTuple):
    """Tokens of one request, increasing: `width` neighbours, the next `width` of them `step` further, and so on.

    Index i is position `start + i // width * step + i % width`; the run is the indices from `first` to `stop`.
    """

    first: int
    stop: int
    start: int = 0
    step: int = 1
    width: int = 1

    @property
    def size(self) -> int:
        return self.stop - self.first

    def position(self, index: int) -> int:
        """The position of the token `index` of the run, which is counted from its own first."""
        turn, offset = divmod(self.first + index, self.width)
        return self.start + turn * self.step + offset

    @property
    def positions(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(map(self.position, range(self.size)))

    def below(self, position: int) -> int:
        """How many tokens of the run lie before `position`."""
        turn, offset = divmod(position - self.start, self.step)
        return min(max(turn * self.width + min(offset, self.width) - self.first, 0), self.size)

    def take(self, indices: Range) -> Run:
        """The part of it with these indices."""
        return self._replace(first=self.first + indices.start, stop=self.first + indices.stop)


Held = tuple[tuple[tuple[Run, ...], ...], ...]
"""Entry [rank][request]: the runs that lie there, one after another."""


def place_tokens(
    num_tokens: int, ranks: int, placement: Placement, *, interleave: int = 1, first: int = 0
) -> tuple[tuple[Run, ...], ...]:
    """The tokens [first, first + num_tokens) of a request over ranks; entry r is what rank r holds, in order.

    "contiguous": even slices; under a causal mask the last rank has up to 2 * ranks - 1 times the work of the first.
    "zigzag": of 2 * ranks even chunks rank r has number r and the r-th from the end.
    "striped": position t is on rank t // interleave mod ranks, whatever `first` is.

    The causal work of two ranks, the sum of position + 1 over their tokens, differs by at most 2 * num_tokens for
    zigzag and 2 * interleave * num_tokens for striped, of about num_tokens**2 / (2 * ranks) each (first = 0).

    Raises:
        ValueError: fewer than one rank, an interleave below one or of another placement than striped, an unknown one.
    """
    if placement not in ("contiguous", "zigzag", "striped"):
        raise ValueError(f'`placement` must be one of "contiguous", "zigzag", "striped", got {placement!r}')
    if ranks < 1 or num_tokens < 0:
        raise ValueError(f"a placement must be of a count >= 0 over ranks >= 1, got {num_tokens} over {ranks}")
    if interleave < 1 or (interleave > 1 and placement != "striped"):
        raise ValueError(f"`interleave` must be at least 1, and 1 unless striped, got {interleave} for {placement}")
    if placement == "striped":
        step, found = ranks * interleave, []
        for rank in range(ranks):
            whole = Run(0, 2 * (first + num_tokens), rank * interleave, step, interleave)
            found.append((whole.take(Range(whole.below(first), whole.below(first + num_tokens))),))
        return tuple(found)
    if placement == "contiguous":
        return tuple((Run(*r.shift(first)),) for r in even_ranges(num_tokens, ranks))
    chunks = [Run(*r.shift(first)) for r in even_ranges(num_tokens, 2 * ranks)]
    return tuple((chunks[rank], chunks[-1 - rank]) for rank in range(ranks))


def gather_held(held: Held, ranks: int) -> Held:
    """What each `ranks` neighbours hold together, with runs that continue each other made one; [row][request].

    Neighbouring slices and chunks become one, and so do neighbouring stripes: a row of `place_tokens` is what
    `place_tokens` over the rows would be, up to where slices are cut. Of one rank it is what that holds, as it is.
    """
    if ranks == 1:
        return held
    return tuple(
        tuple(
            _join_runs([run for own in requests for run in own])
            for requests in zip(*held[at : at + ranks], strict=True)
        )
        for at in range(0, len(held), ranks)
    )


def _join_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    found = [run for run in runs if run.size]
    for _ in range(2):  # what continues a run first, and only then its neighbour beside it
        rest, found = sorted(found, key=lambda r: (r.step, r.start, r.first)), []
        for run in rest:
            joined = _join(found[-1], run) if found else None
            found[-1:] = [*found[-1:], run] if joined is None else [joined]
    return tuple(sorted(found, key=lambda r: r.position(0)))


def _join(a: Run, b: Run) -> Run | None:
    """Both as one run, where there is one."""
    if (a.start, a.step, a.width) == (b.start, b.step, b.width):
        return a._replace(stop=b.stop) if a.stop == b.first else None
    if a.step != b.step or a.start + a.width != b.start:
        return None
    low, high = min(a.position(0), b.position(0)), max(r.position(r.size - 1) for r in (a, b)) + 1
    width = a.width + b.width
    whole = Run(0, (high // a.step + 1) * width, a.start, a.step, width)
    both = whole.take(Range(whole.below(low), whole.below(high)))
    return both if both.size == a.size + b.size else None


def ring_peers(rank: int, ranks: int) -> tuple[int, int]:
    """Whom a rank of a ring sends to, and whom it receives from.

    Raises:
        ValueError: the ring has no such rank.
    """
    _check_rank(rank, ranks, "rank")
    return (rank + 1) % ranks, (rank - 1) % ranks


class Tile(NamedTuple):
    """Queries and keys of which one call makes a partial: local rows, local keys, and what they may see.

    "full": every query sees every key. "causal": row i sees keys up to i. "masked": by the positions of both.
    """

    kind: Literal["full", "causal", "masked"]
    rows: Range
    keys: Range
    q: Run
    k: Run


TILE_ROWS = 128
"""Rows of a block of queries that see different keys of a run."""


@dataclass(frozen=True)
class RingOrder:
    """What goes round a ring of ranks, and what is computed at every hop.

    Keys go from rank r to r + 1, queries from r to r - 1. Of what rank r sent out, only those tokens travel on that
    some rank further on will need, so a causal mask or a window cuts transfers short.

    Args:
        q: the queries that each rank holds.
        kv: the keys that each rank holds, of the same requests.
        window: keys that a query sees, itself included; None for all before it.
    """

    q: Held
    kv: Held
    window: int | None = None

    @property
    def ranks(self) -> int:
        return len(self.q)

    def keys_at(self, owner: int, hop: int) -> tuple[tuple[Run, ...], ...]:
        """The keys of `owner` that arrive at rank `owner + hop`: those that it or a later one sees; all at hop 0."""
        ranks = [(owner + further) % self.ranks for further in range(hop, self.ranks)]
        return self._part(self.kv, owner, ranks, self._keys_seen) if hop else self.kv[owner]

    def seen_at(self, owner: int, hop: int) -> tuple[tuple[Run, ...], ...]:
        """The keys of `owner` that rank `owner + hop` sees: their gradients come back from there."""
        return self._part(self.kv, owner, [(owner + hop) % self.ranks], self._keys_seen)

    def queries_at(self, owner: int, hop: int) -> tuple[tuple[Run, ...], ...]:
        """The queries of `owner` that arrive at rank `owner - hop`: those that see keys there or later; all at hop 0.

        They go round the other way: under a window the keys that they see are near in both.
        """
        ranks = [(owner - further) % self.ranks for further in range(hop, self.ranks)]
        return self._part(self.q, owner, ranks, self._rows_seeing) if hop else self.q[owner]

    def answered_at(self, owner: int, hop: int) -> tuple[tuple[Run, ...], ...]:
        """The queries of `owner` that see keys of rank `owner - hop`: their partials come back from there."""
        return self._part(self.q, owner, [(owner - hop) % self.ranks], self._rows_seeing)

    @cached_property
    def hops(self) -> int:
        """How many hops anything of anybody has to make."""
        for hop in range(self.ranks - 1, 0, -1):
            if any(run.size for owner in range(self.ranks) for runs in self.keys_at(owner, hop) for run in runs):
                return hop
        return 0

    def tiles(self, q: Sequence[Sequence[Run]], k: Sequence[Sequence[Run]]) -> tuple[Tile, ...]:
        """What is to be computed of those queries with those keys, request by request."""
        found, row, key = [], 0, 0
        for q_runs, k_runs in zip(q, k, strict=True):
            for q_run in q_runs:
                at, of_run = key, []
                for k_run in k_runs:
                    of_run += self._tiles_of(q_run, row, k_run, at)
                    at += k_run.size
                row += q_run.size
                found += of_run
            key += sum(run.size for run in k_runs)
        return _joined(found)

    def visible(self, q: Run, k: Run) -> tuple[Range, Range] | None:
        """Indices of the queries that see some of the keys, and of the keys that are seen by some; None for neither."""
        if not q.size or not k.size:
            return None
        start = 0 if self.window is None else k.below(q.position(0) - self.window + 1)
        keys = Range(start, k.below(q.position(q.size - 1) + 1))
        if keys.start >= keys.stop:
            return None
        stop = q.size if self.window is None else q.below(k.position(keys.stop - 1) + self.window)
        rows = Range(q.below(k.position(keys.start)), stop)
        return (rows, keys) if rows.start < rows.stop else None

    def _tiles_of(self, q: Run, row: int, k: Run, key: int) -> list[Tile]:
        found = self.visible(q, k)
        if found is None:
            return []
        rows, keys = found
        part, seen = q.take(rows), k.take(keys)
        span = part.position(part.size - 1) - seen.position(0)
        inside = self.window is None or span < self.window
        full = inside and seen.position(seen.size - 1) <= part.position(0)
        if full or (inside and part == seen):
            return [Tile("full" if full else "causal", rows.shift(row), keys.shift(key), part, seen)]
        if part.size > TILE_ROWS:
            cuts = range(rows.start, rows.stop, TILE_ROWS)
            blocks = [Range(start, min(start + TILE_ROWS, rows.stop)) for start in cuts]
            return [tile for b in blocks for tile in self._tiles_of(q.take(b), row + b.start, k, key)]
        # Keys that all of the block see need no mask, those before and after them do.
        low = 0 if self.window is None else seen.below(part.position(part.size - 1) - self.window + 1)
        high = max(low, seen.below(part.position(0) + 1))
        kinds: tuple[tuple[Literal["full", "masked"], Range], ...] = (
            ("masked", Range(0, low)),
            ("full", Range(low, high)),
            ("masked", Range(high, seen.size)),
        )
        at = key + keys.start
        return [Tile(kind, rows.shift(row), r.shift(at), part, seen.take(r)) for kind, r in kinds if r.size]

    def _part(
        self, held: Held, owner: int, others: Sequence[int], wanted: Callable[[Run, int, int], Range]
    ) -> tuple[tuple[Run, ...], ...]:
        return tuple(
            tuple(run.take(_hull([wanted(run, request, rank) for rank in others])) for run in runs)
            for request, runs in enumerate(held[owner])
        )

    def _keys_seen(self, k: Run, request: int, rank: int) -> Range:
        found = [self.visible(q, k) for q in self.q[rank][request]]
        return _hull([each[1] for each in found if each])

    def _rows_seeing(self, q: Run, request: int, rank: int) -> Range:
        found = [self.visible(q, k) for k in self.kv[rank][request]]
        return _hull([each[0] for each in found if each])


class GridOrder(NamedTuple):
    """What a hybrid of Ulysses and a ring has to move: neighbours exchange heads, rows of them form a ring.

    Attributes:
        ring: of the rows (`gather_held`).
        tokens: new ones that each rank holds.
        cached: earlier ones that each rank holds.
    """

    ring: RingOrder
    tokens: tuple[int, ...]
    cached: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Ranks of a row."""
        return len(self.tokens) // self.ring.ranks


def _hull(ranges: Sequence[Range]) -> Range:
    """The shortest range around those that are not empty."""
    some = [r for r in ranges if r.size]
    return Range(min(r.start for r in some), max(r.stop for r in some)) if some else Range(0, 0)


def _joined(tiles: Sequence[Tile]) -> tuple[Tile, ...]:
    """The tiles with neighbours that need no mask made one: of the same queries, then of the same keys."""
    found: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: (t.kind != "full", t.rows, t.keys)):
        last = found[-1] if found else None
        full = last is not None and last.kind == tile.kind == "full"
        if last is not None and full and (last.rows, last.keys.stop) == (tile.rows, tile.keys.start):
            found[-1] = last._replace(keys=Range(last.keys.start, tile.keys.stop))
        elif last is not None and full and (last.keys, last.rows.stop) == (tile.keys, tile.rows.start):
            found[-1] = last._replace(rows=Range(last.rows.start, tile.rows.stop))
        else:
            found.append(tile)
    return tuple(found)
