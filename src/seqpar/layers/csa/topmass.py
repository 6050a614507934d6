"""Keys chosen by the mass that a softmax would give them, estimated from a sketch of them in two bits a number.

1. Every rank sends the sinks and the recent keys of each other one, which travel in any case, and a sketch of its other
   keys (`kernels.encode_sketch`). The attention to the own keys hides that.
2. The receiver knows what its queries have already gathered, exactly, and estimates from the sketch what share of the
   whole each block of keys would have. It asks for the blocks that its rule chooses: a bit for each block and KV head.
3. Those blocks travel. Both sides know how many from the bits, so nothing is padded. Meanwhile the receiver attends to
   the sketch of the others, with mean values of some 64 of them in 8 bits (sent with the sketch): queries whose
   attention is spread out, and choose nothing, still gather about what they should, with the weight that it has.

All query heads that read a KV head choose together, by the mean of their shares, since what is sent serves them all.
Queries attend to all that has arrived and is not after them, whoever asked for it.

What lost, on the bundled checkpoint read in slices for 4 ranks (retrieval from 256 tokens back and more, for so much
of the bytes of all keys; 54 queries in 2048 tokens, scores exact where nothing else is said, blocks of 16):
* Means and variances of blocks in place of a sketch: 48 % for 20 %, where exact scores of the same rule find 96 %. The
  score of the one key that a query looks for is lost in its block. Sums along antidiagonals, by which XAttention scores
  blocks, need every key, so they save work but no bytes.
* The fewest blocks that cover a share of the masses of every few queries (rule "cover", as XAttention and FlexPrefill
  choose): queries whose attention is spread out want everything between them, though they lose little without it. 78 %
  for 28 % with a set for each 16 queries, 100 % for 75 % with a set for each. The peaks alone, blocks of which some
  query would lose much: 98 % for 20 %, and smaller blocks take less.
* Means of queries that travel to the owner of keys, which chooses by exact scores: a query that looks for one token is
  drowned by its neighbours, and the owner cannot know what the query has found elsewhere. (Reasoned, not measured.)

Source: FlexPrefill, arXiv:2502.20766, and XAttention, arXiv:2503.16428, which choose blocks by coverage on one device;
one choice for a group of query heads, NSA, arXiv:2502.11089.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import Steps
from seqpar.kernels.blocks import block_masses, block_means, smallest_cover
from seqpar.kernels.quantize import decode, encode, encoded_width
from seqpar.kernels.sparse import decode_sketch, encode_sketch, sketch_bytes
from seqpar.layers.csa.core import CSAAttention, CSAResult, Exchange, Policy
from seqpar.layers.csa.cut import EVERYTHING, Cut, cut_keys, everyone_but, kept, request_lists
from seqpar.layers.csa.seats import Part, Seat, seat_for
from seqpar.layers.ring import CachedKV, PartialSum
from seqpar.partition import Range, RingOrder
from seqpar.ragged import RaggedBatch

__all__ = ["TopMass"]

CHUNK = 256
"""Queries whose estimated scores are in memory at a time."""

MEANS = 64
"""Keys whose values stand for one another where they are not sent."""


@dataclass(frozen=True)
class TopMass(Policy):
    """Of other ranks' keys those blocks travel that are estimated to hold much of the mass of a rank's queries.

    Sends: to each rank that sees some of them, of a rank's keys the sinks and those near a query; of the other keys
    two bits a number, the directions that those are in, and mean values; for each block of those and KV head a bit
    back; and the blocks that were asked for.
    Error: not bounded, since the masses of the other keys are estimated and their values means. Coverage 1.0 sends
    every key that some query sees, and is exact.
    Work: as much as dense attention, and the scores of all keys once more, to choose.

    Args:
        coverage: in (0, 1], of the softmax of a query, the mean of the heads that read a KV head.
        rule: "peak" asks for each block that would have a share of at least 1 - coverage for some query. "cover" asks,
            for every `rows` queries, for the fewest blocks with which they have the coverage of their masses.
        block: keys that travel together or not at all.
        rows: queries that share a choice of rule "cover".
        sinks: first tokens of each request that travel in any case.
        recent: positions up to each query that travel in any case.

    Raises:
        ValueError: a coverage outside of (0, 1], an unknown rule, or counts that are none.
    """

    coverage: float = 0.9
    rule: Literal["peak", "cover"] = "peak"
    block: int = 4
    rows: int = 16
    sinks: int = 4
    recent: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ValueError(f"`coverage` must lie in (0, 1], got {self.coverage}")
        if self.rule not in ("peak", "cover"):
            raise ValueError(f'`rule` must be "peak" or "cover", got {self.rule!r}')
        if min(self.block, self.rows) < 1 or min(self.sinks, self.recent) < 0:
            raise ValueError(
                "`block` and `rows` must be at least 1, `sinks` and `recent` at least 0, got "
                f"{self.block}, {self.rows}, {self.sinks}, {self.recent}"
            )

    def cut(self, order: RingOrder, receiver: int, owner: int, exchange: Exchange = "ring") -> Cut:
        """Which keys of `owner` travel to `receiver` in any case, and the blocks that it may ask for."""
        if exchange == "ulysses":
            order = everyone_but(order, owner)
        recent = EVERYTHING if self.coverage == 1 else self.recent
        return cut_keys(order, receiver, owner, size=self.block, sinks=self.sinks, recent=recent, tails=True)

    def steps(
        self, core: CSAAttention, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cached: CachedKV | None
    ) -> Steps[CSAResult]:
        """See `Policy.steps`."""
        seat = seat_for(core, q, core.own_keys(k, v, batch, cached), batch, cached)
        exchange = _Exchange(self, seat)
        try:
            seat.open()
            exchange.open()
            total = yield from seat.meet_steps()
            coming = exchange.opening_steps
            if self.coverage < 1:
                yield from self._choose_steps(seat, exchange, total)
                coming = exchange.arrival_steps
            yield from seat.gather_steps(total, coming, exchange.attend)
            total = yield from seat.home_steps(total)
        finally:
            seat.close()
            exchange.close()
        rounds = 0 if not seat.sources else 1 if self.coverage == 1 else 3
        rounds += seat.rounds * (2 if self.coverage < 1 else 1) if seat.sources else 0
        return CSAResult(total.out.to(q.dtype), total.lse, None, exchange.sent_bytes + seat.sent_bytes, rounds)

    def _choose_steps(self, seat: Seat, exchange: _Exchange, total: PartialSum) -> Steps[None]:
        """Choose blocks and launch those that others chose; attend to all else that is known of other ranks' keys."""
        sketches = {}
        for src in seat.sources:
            exchange.gather(total, src, (yield from exchange.opening_steps(src)))
            sketches[src] = exchange.sketch(src)
        exchange.ask(exchange.choose((yield from seat.known_steps(total)), sketches))
        for dst in seat.targets:
            yield from exchange.answer_steps(dst)
        for src in seat.sources:
            exchange.gather(total, src, exchange.rest(src, sketches[src]))


class _Keys(NamedTuple):
    """Keys and values of another rank, [n, 2, D], head after head: where they are, and where each request's lie."""

    kv: Tensor
    positions: Tensor
    requests: list[list[Range]]


class _Exchange:
    """What is in flight of one step's keys, and what each message has."""

    def __init__(self, policy: TopMass, seat: Seat) -> None:
        self.policy, self.seat, self.core = policy, seat, seat.core
        self.rank, self.heads, self.sent_bytes = seat.rank, seat.kv_heads, 0
        self._flying: dict[tuple[str, int], Steps[Tensor]] = {}
        self._chosen: dict[int, Tensor] = {}
        self._sketches: dict[int, list[Tensor]] = {}

    def close(self) -> None:
        """Wait for what is in flight and nobody will ask for."""
        for steps in self._flying.values():
            steps.close()

    def open(self) -> None:
        """Launch the keys that travel in any case, and a sketch of the others."""
        for dst, src in zip(self.seat.targets, self.seat.sources, strict=True):
            there = self._opening_bytes(self._cut(self.rank, src), self.heads)
            self._launch("opening", self._opening(dst), dst, src, (sum(there),))

    def opening_steps(self, src: int) -> Steps[_Keys]:
        """The keys that travel in any case."""
        message, cut = (yield from self._flying["opening", src]), self._cut(self.rank, src)
        whole, *self._sketches[src] = message.split(self._opening_bytes(cut, self.heads))
        kv = whole.clone().view(self.seat.kv.dtype).view(-1, 2, self.core.head_dim)
        positions = self.seat.positions(src)[cut.whole].repeat(self.heads)
        return _Keys(kv, positions, [list(cut.whole_of)] * self.heads)

    def sketch(self, src: int) -> Tensor:
        """What the other keys are like, when the opening is here.

        [2, keys, heads, D]: keys by their sketch, and the mean of values around each.
        """
        (scales, codes, means), cut = self._sketches.pop(src), self._cut(self.rank, src)
        shape = 2, len(cut.rest), self.heads, self.core.head_dim
        sketch = torch.empty(shape, dtype=torch.float32, device=codes.device)
        if len(cut.rest):
            codes = codes.view(len(cut.rest), self.heads, -1)
            sketch[0] = decode_sketch(scales.view(self.heads, -1), codes, self.core.head_dim)
            values = decode(
                means.view(-1, encoded_width(self.core.head_dim, "int8")), self.core.head_dim, torch.float32, "int8"
            )
            sizes = torch.tensor([group.size for group in _groups(cut)], device=values.device)
            sketch[1] = values.view(len(sizes), *sketch.shape[2:]).repeat_interleave(sizes, 0)
        return sketch

    def gather(self, total: PartialSum, src: int, keys: _Keys) -> None:
        """Add what all queries here gather from keys of another rank, but for those of its own tokens."""
        for part in self.seat.parts:
            if part.rank != src:
                total.add(part.rows, *self.attend(part, src, keys))

    def attend(self, part: Part, src: int, keys: _Keys) -> tuple[Tensor, Tensor]:
        """What the queries of a part gather from keys of another rank."""
        return self.seat.attend(part, keys.kv, keys.positions, request_lists(part.queries, keys.requests))

    def choose(self, lse: Tensor, sketches: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The blocks [heads, blocks] of each other rank that the queries here want, whose mass so far is `lse`."""
        cuts = {src: self._cut(self.rank, src) for src in self.seat.sources}
        chosen = {src: torch.zeros(self.heads, len(cut.blocks), dtype=torch.bool) for src, cut in cuts.items()}
        for part in self.seat.parts:
            others = {src: cut for src, cut in cuts.items() if src != part.rank}
            for rows, request in part.queries:
                sizes: list[int] = []
                keys, positions = [], []
                for src, cut in others.items():
                    blocks = cut.blocks[slice(*cut.blocks_of[request])]
                    sizes += [block.size for block in blocks]
                    those = slice(blocks[0].start, blocks[-1].stop) if blocks else slice(0)
                    keys.append(sketches[src][0, those])
                    positions.append(self.seat.positions(src)[cut.rest[those]])
                if not sizes:
                    continue
                ends = [0, *accumulate(sizes)]
                spans = list(map(Range, ends, ends[1:]))
                wanted = self._wanted(part, rows, lse, torch.cat(keys), torch.cat(positions), spans)
                counts = [cut.blocks_of[request].size for cut in others.values()]
                for (src, cut), some in zip(others.items(), wanted.split(counts, 1), strict=True):
                    chosen[src][:, slice(*cut.blocks_of[request])] |= some
        return chosen

    def ask(self, chosen: dict[int, Tensor]) -> None:
        """Launch the bits that say which blocks are wanted."""
        self._chosen = chosen
        for dst, src in zip(self.seat.targets, self.seat.sources, strict=True):
            count = self.core.parts[dst].kv.size * len(self._cut(dst, self.rank).blocks)
            self._launch("bits", _pack(chosen[src]).to(self.seat.kv.device), src, dst, (-(-count // 8),))

    def answer_steps(self, dst: int) -> Steps[None]:
        """Launch the blocks that another rank wants, when it has said which."""
        bits, cut, there = (yield from self._flying["bits", dst]), self._cut(dst, self.rank), self.core.parts[dst].kv
        wanted = _unpack(bits.cpu(), there.size, len(cut.blocks))
        tokens, heads = self._places(cut, wanted)
        src = self.seat.sources[self.seat.targets.index(dst)]
        count = len(self._places(self._cut(self.rank, src), self._chosen[src])[0])
        kv = self.seat.kv
        message = kv[cut.rest[tokens].to(kv.device), :, (there.start + heads).to(kv.device)]
        self._launch("blocks", message, dst, src, (count, *message.shape[1:]))

    def rest(self, src: int, sketch: Tensor) -> _Keys:
        """The sketch of the blocks that were not asked for."""
        cut, others = self._cut(self.rank, src), ~self._chosen[src]
        rows, heads = self._places(cut, others)
        device = sketch.device
        kv = sketch[:, rows.to(device), heads.to(device)].transpose(0, 1).to(self.seat.q.dtype)
        return _Keys(kv, self.seat.positions(src)[cut.rest[rows]], self._requests(cut, others))

    def arrival_steps(self, src: int) -> Steps[_Keys]:
        """The blocks that were asked for."""
        kv, cut, chosen = (yield from self._flying["blocks", src]), self._cut(self.rank, src), self._chosen[src]
        rows, _ = self._places(cut, chosen)
        return _Keys(kv, self.seat.positions(src)[cut.rest[rows]], self._requests(cut, chosen))

    def _opening_bytes(self, cut: Cut, heads: int) -> list[int]:
        """Of the keys that travel in any case; of the directions of the sketch, its codes, and the mean values."""
        scales, codes = sketch_bytes(self.core.head_dim)
        whole = len(cut.whole) * 2 * self.core.head_dim * self.seat.kv.itemsize
        means = len(_groups(cut)) * encoded_width(self.core.head_dim, "int8")
        sizes = whole, scales if len(cut.rest) else 0, codes * len(cut.rest), means
        return [heads * size for size in sizes]

    def _launch(self, what: str, x: Tensor, dst: int, src: int, shape: tuple[int, ...]) -> None:
        self.sent_bytes += x.numel() * x.itemsize
        steps = comm.send_recv_steps(
            x,
            dst=dst,
            src=src,
            group=self.core.group,
            recv_shape=shape,
            tag=("opening", "bits", "blocks").index(what),
            label=f"{self.core.label or 'csa'} ({what})",
        )
        self._flying[what, src] = comm.start(steps)

    def _opening(self, dst: int) -> Tensor:
        cut, heads = self._cut(dst, self.rank), slice(*self.core.parts[dst].kv)
        kv = self.seat.kv[:, :, heads]
        whole = kv[cut.whole.to(kv.device)].permute(2, 0, 1, 3).contiguous().view(torch.uint8).flatten()
        if not len(cut.rest):
            return whole
        (scales, codes), rest = self._sketch, cut.rest.to(kv.device)
        means = encode(block_means(kv[rest, 1], _groups(cut)).float().flatten(0, 1), "int8")
        return torch.cat([whole, scales[heads].flatten(), codes[rest, heads].flatten(), means.flatten()])

    @cached_property
    def _sketch(self) -> tuple[Tensor, Tensor]:
        """Of all own keys, as the own queries weigh them."""
        return encode_sketch(self.seat.kv[:, 0], self.seat.own_q, self.core.kv_head_of)

    def _wanted(
        self, part: Part, rows: Range, lse: Tensor, keys: Tensor, positions: Tensor, blocks: Sequence[Range]
    ) -> Tensor:
        """Which blocks [heads, blocks] of sketched keys some queries of a part want."""
        seat, read = self.seat, self.core.reads(self.rank)
        wanted = torch.zeros(self.heads, len(blocks), dtype=torch.bool)
        step = -(-CHUNK // self.policy.rows) * self.policy.rows
        for start in range(rows.start, rows.stop, step):
            those = Range(start, min(start + step, rows.stop))
            here = slice(*those.shift(part.rows.start))
            age = part.positions[slice(*those), None] - positions
            seen = age >= 0 if self.core.window is None else (age >= 0) & (age < self.core.window)
            hidden = ~seen[:, None].to(lse.device)
            for head in range(self.heads):
                own = slice(read.index(head), read.index(head) + read.count(head))
                q, estimates = seat.q[here, own].to(lse.dtype), keys[:, head].to(lse.dtype)
                scores = torch.einsum("shd,nd->shn", q, estimates) * self.core.softmax_scale
                shares, base = block_masses(scores.masked_fill_(hidden, -torch.inf), lse[here, own], blocks)
                wanted[head] |= self._chosen_of(shares.mean(1), base.mean(1)).cpu()
        return wanted

    def _chosen_of(self, shares: Tensor, base: Tensor) -> Tensor:
        """The blocks that the rule takes for consecutive queries, given their shares [queries, blocks]."""
        if self.policy.rule == "peak":
            return shares.amax(0) >= 1 - self.policy.coverage
        parts = [x.split(self.policy.rows) for x in (shares, base)]
        means, rest = (torch.stack([part.mean(0) for part in each]) for each in parts)
        return smallest_cover(means, rest, self.policy.coverage).any(0)

    def _places(self, cut: Cut, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of chosen blocks, head after head, counted in the rest of the cut; and of which head each is."""
        sizes = torch.tensor([block.size for block in cut.blocks], dtype=torch.int64)
        heads, tokens = chosen.repeat_interleave(sizes, 1).nonzero(as_tuple=True)
        return tokens, heads

    def _requests(self, cut: Cut, chosen: Tensor) -> list[list[Range]]:
        """For each head where the chosen blocks of each request lie among all of that head."""
        sizes = chosen * torch.tensor([block.size for block in cut.blocks], dtype=torch.int64)
        bounds = [[0, *row] for row in sizes.cumsum(1).tolist()]
        return [[Range(row[part.start], row[part.stop]) for part in cut.blocks_of] for row in bounds]

    def _cut(self, receiver: int, owner: int) -> Cut:
        policy, seat, exchange = self.policy, self.seat, self.core.exchange
        key = ("csa.topmass.cut", policy, exchange, seat.order, receiver, owner)
        return kept(seat.batch, key, lambda: policy.cut(seat.order, receiver, owner, exchange))


def _groups(cut: Cut) -> list[Range]:
    """The rest of a cut in groups of some `MEANS` keys, none of two requests: whole blocks."""
    found: list[Range] = []
    for part in cut.blocks_of:
        blocks = cut.blocks[slice(*part)]
        step = max(1, MEANS // blocks[0].size) if blocks else 1
        some = (blocks[at : at + step] for at in range(0, len(blocks), step))
        found += [Range(those[0].start, those[-1].stop) for those in some]
    return found


def _pack(bits: Tensor) -> Tensor:
    """Bits as bytes, the last one filled up with zeros."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat * (1 << torch.arange(8))).sum(1).to(torch.uint8)


def _unpack(data: Tensor, heads: int, blocks: int) -> Tensor:
    """The bits [heads, blocks] that were packed."""
    bits = data[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: heads * blocks].bool().view(heads, blocks)
