"""Keys chosen by their position alone: the further away a rank, the fewer of its keys travel.

Levels pair a group size with a degree. Ranks are cut into consecutive groups of each size; of a rank with which one
first shares a group at degree r, every r-th key travels, another one for each KV head in turn. All messages are
launched at once, before the attention to the own keys, and attended with in the order in which they were launched.

`faithful=True` is the form of the authors' code, kept so that results of it can be reproduced: multi-level sparse
attention, with queries sampled as keys are. What the default repairs:

1. Sampled queries: only 1/r of the pairs of a token and a head see anything of other ranks. Here all queries attend.
2. Levels overlap, so near keys that are sampled again further out count twice. Here every key is in one level.
3. A sampled key stands for r of them, with the weight of one. Here its score has log r added.
4. Denominators are exponentials of raw scores, and travel in float16: infinite from a log-sum-exp of 11.1 (88.7 where
   they stay in float32), and 0 below -17.3. Here partials are merged by their log-sum-exp.
5. Sinks, and keys just before a slice, are hit by chance. Here they travel whole.
6. What a slice has beyond a multiple of r tokens is dropped. Here it travels whole.

Source: CSPS, arXiv:2409.15104v1, whose released code calls it multi-level sparse attention; the same algebra, trained
with, is LongNet's dilated attention, arXiv:2307.02486.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import Steps
from seqpar.kernels import BlockLists, attention, merge
from seqpar.layers.csa.core import CSAAttention, CSAResult, Exchange, Policy
from seqpar.layers.csa.cut import EVERYTHING, Cut, cut_keys, everyone_but, kept, request_lists
from seqpar.layers.csa.seats import Part, Seat, seat_for
from seqpar.layers.ring import CachedKV
from seqpar.partition import Range, RingOrder, head_parts
from seqpar.ragged import RaggedBatch

__all__ = ["Strided"]

Partial = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Strided(Policy):
    """Of ranks further away a fixed share of the keys travels: the paper's sparse attention.

    Sends: of a rank's keys that another one sees, those of the first `sinks` tokens and those up to `recent` positions
    before one of its queries; of the others one in r, with one message to each rank. Ranks that share no group send
    each other sinks and recent keys alone. Under a striped placement every key is near some query of a long prompt.
    Error: not bounded. A sampled key stands for the r - 1 beside it, so what depends on one key far away is lost with
    probability 1 - 1/r in each head. Degree 1 is exact; so is any prompt that `sinks` or `recent` covers.

    Args:
        levels: (group, degree), groups growing by whole factors, the last one dividing the number of ranks.
        faithful: the form of the authors' code; without sinks and recent keys. For whole prompts in contiguous slices,
            without a window. A group must have a query head for every rank. Of grouped-query heads all that read one
            KV head are sampled at its offset.
        sinks: first tokens of each request that travel whole.
        recent: positions up to each query that travel whole.

    Raises:
        ValueError: no levels, or sizes that are none or do not grow; negative counts.
    """

    levels: Sequence[tuple[int, int]]
    faithful: bool = False
    sinks: int = 16
    recent: int = 64

    def __post_init__(self) -> None:
        levels = tuple(map(tuple, self.levels))
        object.__setattr__(self, "levels", levels)
        sound = bool(levels) and all(len(level) == 2 and min(level) >= 1 for level in levels)
        if not sound or any(b <= a or b % a for (a, _), (b, _) in pairwise(levels)):
            raise ValueError(
                "`levels` must be (group, degree) of at least 1, each group a larger multiple of the one before, got "
                f"{levels}"
            )
        if min(self.sinks, self.recent) < 0:
            raise ValueError(f"`sinks` and `recent` must be at least 0, got {self.sinks} and {self.recent}")

    def check(self, core: CSAAttention) -> None:
        """See `Policy.check`."""
        ranks, largest = core.group.size(), self.levels[-1][0]
        if ranks % largest:
            raise ValueError(f"`levels` must have groups that divide the {ranks} ranks, got one of {largest}")
        if self.faithful and core.num_heads < largest:
            raise ValueError(
                f"`levels` must have groups of at most as many ranks as query heads ({core.num_heads}) where "
                f"`faithful`, got one of {largest}"
            )
        if self.faithful and (core.placement != "contiguous" or core.window is not None):
            raise ValueError(
                '`placement` must be "contiguous" and `window` None where the policy is faithful, got '
                f"{core.placement!r} and {core.window}"
            )

    def steps(
        self, core: CSAAttention, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cached: CachedKV | None
    ) -> Steps[CSAResult]:
        """See `Policy.steps`."""
        if self.faithful:
            if cached is not None:
                raise ValueError("`cached` must be None where the policy is faithful, got cached keys")
            return (yield from _Levels(self, core, batch).steps(q, k, v))
        return (yield from self._repaired_steps(core, q, core.own_keys(k, v, batch, cached), batch, cached))

    def degree(self, rank: int, other: int) -> int | None:
        """Of the innermost level in which two ranks share a group; None where there is none."""
        return next((degree for group, degree in self.levels if rank // group == other // group), None)

    def cut(self, order: RingOrder, receiver: int, owner: int, exchange: Exchange = "ring") -> Cut:
        """Which keys of `owner` travel to `receiver`: the whole ones, and one of each block."""
        degree = self.degree(receiver, owner)
        if exchange == "ulysses":
            degree, order = self._finest(order, owner), everyone_but(order, owner)
        recent = EVERYTHING if degree == 1 else self.recent
        return cut_keys(order, receiver, owner, size=degree, sinks=self.sinks, recent=recent, tails=False)

    def _finest(self, order: RingOrder, owner: int) -> int | None:
        """The least degree at which some other rank is to see keys of `owner`; None where there is none."""
        first = [min((run.position(0) for run in runs if run.size), default=EVERYTHING) for runs in order.kv[owner]]
        degrees = []
        for rank in range(order.ranks):
            last = [max((run.position(run.size - 1) for run in runs if run.size), default=-1) for runs in order.q[rank]]
            degree = self.degree(rank, owner)
            if rank != owner and degree is not None and any(a <= b for a, b in zip(first, last, strict=True)):
                degrees.append(degree)
        return min(degrees, default=None)

    def _repaired_steps(
        self, core: CSAAttention, q: Tensor, kv: Tensor, batch: RaggedBatch, cached: CachedKV | None
    ) -> Steps[CSAResult]:
        seat, sent_bytes = seat_for(core, q, kv, batch, cached), 0
        incoming: dict[int, Steps[Tensor]] = {}
        try:
            seat.open()
            for dst, src in zip(seat.targets, seat.sources, strict=True):
                message = self._message(seat, dst)
                sent_bytes += message.numel() * message.itemsize
                arriving = self._cut(seat, seat.rank, src)
                rows = seat.kv_heads * (len(arriving.whole) + len(arriving.blocks))
                steps = comm.send_recv_steps(
                    message,
                    dst=dst,
                    src=src,
                    group=core.group,
                    recv_shape=(rows, *message.shape[1:]),
                    label=core.label or "csa",
                )
                incoming[src] = comm.start(steps)
            total = yield from seat.meet_steps()
            yield from seat.gather_steps(total, incoming.__getitem__, partial(self._attend, seat))
            total = yield from seat.home_steps(total)
        finally:
            seat.close()
            for coming in incoming.values():
                coming.close()
        rounds = 1 + seat.rounds if seat.sources else 0
        return CSAResult(total.out.to(q.dtype), total.lse, None, sent_bytes + seat.sent_bytes, rounds)

    def _cut(self, seat: Seat, receiver: int, owner: int) -> Cut:
        key = ("csa.strided.cut", self, seat.core.exchange, seat.order, receiver, owner)
        return kept(seat.batch, key, lambda: self.cut(seat.order, receiver, owner, seat.core.exchange))

    def _message(self, seat: Seat, dst: int) -> Tensor:
        """[keys of all heads there, 2, D]: head after head the whole ones, then head after head the samples."""
        core, cut, kv = seat.core, self._cut(seat, dst, seat.rank), seat.kv
        heads = core.parts[dst].kv
        whole = kv[cut.whole.to(kv.device), :, heads.start : heads.stop].permute(2, 0, 1, 3).flatten(0, 1)
        if not cut.blocks:
            return whole
        degree = cut.blocks[0].size
        offsets = [(core.kv_shard.start + head) % degree for head in range(*heads)]
        rows = cut.rest.view(-1, degree)[:, offsets].T.to(kv.device)
        samples = kv[rows, :, torch.arange(*heads, device=kv.device)[:, None]]
        return torch.cat([whole, samples.flatten(0, 1)])

    def _arrivals(self, seat: Seat, part: Part, src: int) -> tuple[_Arrival, ...]:
        """What comes from a rank, in the order in which it comes, and which queries of a part attend to it."""
        heads = seat.kv_heads

        def make() -> tuple[_Arrival, ...]:
            cut, positions = self._cut(seat, seat.rank, src), seat.positions(src)
            degree = cut.blocks[0].size if cut.blocks else 1
            # A sample is seen by the queries that see the last key that it stands for.
            last = cut.rest.view(-1, degree)[:, -1]
            kinds = (cut.whole, cut.whole_of, 1), (last, cut.blocks_of, degree)
            return tuple(
                _Arrival(request_lists(part.queries, [requests] * heads), positions[rows].repeat(heads), log(weight))
                for rows, requests, weight in kinds
            )

        key = ("csa.strided.arrivals", self, seat.core.exchange, seat.order, heads, seat.rank, part.rank, src)
        return kept(seat.batch, key, make)

    def _attend(self, seat: Seat, part: Part, src: int, kv: Tensor) -> Partial:
        """What some queries gather from what came from one other rank."""
        outs, lses, arrivals = [], [], self._arrivals(seat, part, src)
        for arrival, keys in zip(arrivals, kv.split([len(each.positions) for each in arrivals]), strict=True):
            out, lse = seat.attend(part, keys, arrival.positions, arrival.lists)
            outs.append(out)
            lses.append(lse + arrival.log_weight)
        return merge(outs, lses)


class _Arrival(NamedTuple):
    """Keys of one weight, head after head: which queries attend to which of them, and where they are."""

    lists: BlockLists
    positions: Tensor
    log_weight: float


class _Levels:
    """One step in the form of the authors' code."""

    def __init__(self, policy: Strided, core: CSAAttention, batch: RaggedBatch) -> None:
        self.policy, self.core = policy, core
        self.rank = core.group.rank()
        self.lens = [[sum(run.size for run in runs) for runs in requests] for requests in core.order(batch).q]
        self.sent_bytes = 0

    def steps(self, q: Tensor, k: Tensor, v: Tensor) -> Steps[CSAResult]:
        """Launch all ways in, attend level by level, launch each way back at once, wait for those at the end."""
        levels = self.policy.levels
        coming: list[Steps[Tensor]] = []
        backs: list[Steps[Partial]] = []
        found: list[Partial] = []
        try:
            for level in levels:
                coming.append(comm.start(self._in_steps(level, q, k, v)))
            for level, arriving in zip(levels, coming, strict=True):
                partial = self._attend(level, (yield from arriving))
                backs.append(comm.start(self._back_steps(level, *partial)))
            for level, back in zip(levels, backs, strict=True):
                found.append(self._spread(level, q, *(yield from back)))
        finally:
            for steps in (*coming, *backs):
                steps.close()
        masses = torch.stack([mass for _, mass in found])
        total = masses.sum(0)
        shares = (masses / total).masked_fill(total == 0, 0)
        out = torch.stack([out.to(masses.dtype) for out, _ in found]).mul(shares[..., None]).sum(0)
        rounds = 2 * int(levels[-1][0] > 1)
        return CSAResult(out.to(q.dtype), total.log(), None, self.sent_bytes, rounds)

    def _members(self, group: int) -> range:
        first = self.rank // group * group
        return range(first, first + group)

    def _heads(self, group: int, place: int) -> tuple[Range, Range]:
        """Query and KV heads of a member while it attends, counted from the first ones of the shard."""
        part = head_parts(self.core.q_shard, self.core.group_size, group)[place]
        return part.q.shift(-self.core.q_shard.start), part.kv.shift(-self.core.kv_shard.start)

    def _samples(self, rank: int, degree: int) -> list[int]:
        """How many tokens of each request a rank samples."""
        return [length // degree for length in self.lens[rank]]

    def _rows(self, degree: int, kv_heads: Sequence[int], like: Tensor) -> Tensor:
        """This rank's sampled tokens, [samples, heads], for heads that are, or read, those KV heads."""
        starts = accumulate(self.lens[self.rank], initial=0)
        counts = self._samples(self.rank, degree)
        first = [start + i * degree for start, count in zip(starts, counts, strict=False) for i in range(count)]
        offsets = [(self.core.kv_shard.start + head) % degree for head in kv_heads]
        rows = torch.tensor(first, dtype=torch.int64)[:, None] + torch.tensor(offsets, dtype=torch.int64)
        return rows.to(like.device)

    def _in_steps(self, level: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Steps[Tensor]:
        """Samples of all members, requests one after another, of the heads that this rank attends for: q, k, v."""
        (group, degree), heads = level, range(self.core.num_kv_heads)
        rows = self._rows(degree, heads, k), self._rows(degree, self.core.kv_head_of, q)
        own_q = q[rows[1], torch.arange(q.shape[1], device=q.device)]
        own_k, own_v = (x[rows[0], torch.arange(x.shape[1], device=x.device)] for x in (k, v))
        if group == 1:
            return torch.cat([own_q, own_k, own_v], 1)
        blocks = []
        for place in range(group):
            of_q, of_kv = (slice(*heads) for heads in self._heads(group, place))
            blocks.append(torch.cat([own_q[:, of_q], own_k[:, of_kv], own_v[:, of_kv]], 1).flatten())
        mine = self._heads(group, self.rank % group)
        shape = mine[0].size + 2 * mine[1].size, self.core.head_dim
        counts = [self._samples(member, degree) for member in self._members(group)]
        received = yield from self._exchange_steps(group, blocks, [sum(each) * shape[0] * shape[1] for each in counts])
        parts = [part.view(-1, *shape).split(each) for part, each in zip(received, counts, strict=True)]
        return torch.cat([part for request in zip(*parts, strict=True) for part in request])

    def _attend(self, level: tuple[int, int], qkv: Tensor) -> Partial:
        """Causal attention to the samples of all members, and the sum of its exponentials."""
        group, degree = level
        of_q, of_kv = self._heads(group, self.rank % group)
        q, k, v = qkv.split([of_q.size, of_kv.size, of_kv.size], 1)
        lens = [sum(each) for each in zip(*(self._samples(m, degree) for m in self._members(group)), strict=True)]
        if not len(q):
            return q, q.new_empty(q.shape[:2], dtype=torch.float32)
        read = tuple(head - of_kv.start for head in self.core.kv_head_of[of_q.start : of_q.stop])
        batch = RaggedBatch.prefill(lens, q.device)
        out, lse = attention(q, k, v, batch, softmax_scale=self.core.softmax_scale, kv_head_of=read)
        return out, lse.exp()

    def _back_steps(self, level: tuple[int, int], out: Tensor, mass: Tensor) -> Steps[Partial]:
        """This rank's samples with all heads; the masses travel in float16."""
        group, degree = level
        if group == 1:
            return out, mass
        counts = [self._samples(member, degree) for member in self._members(group)]
        packed = torch.cat([out.contiguous().view(torch.uint8), mass.half()[..., None].view(torch.uint8)], -1)
        requests = packed.split([sum(each) for each in zip(*counts, strict=True)])
        cut = [part.split(list(each)) for part, each in zip(requests, zip(*counts, strict=True), strict=True)]
        blocks = [torch.cat([packed[:0], *(request[place] for request in cut)]).flatten() for place in range(group)]
        mine, width = sum(self._samples(self.rank, degree)), packed.shape[-1]
        heads = [self._heads(group, place)[0].size for place in range(group)]
        received = yield from self._exchange_steps(group, blocks, [mine * each * width for each in heads])
        whole = torch.cat([part.view(mine, each, width) for part, each in zip(received, heads, strict=True)], 1)
        outs, masses = whole.split([width - 2, 2], -1)
        return outs.contiguous().view(out.dtype), masses.contiguous().view(torch.float16)[..., 0].float()

    def _exchange_steps(self, group: int, blocks: Sequence[Tensor], sizes: Sequence[int]) -> Steps[list[Tensor]]:
        """An all-to-all among the members of this rank's group; ranks outside of it send and get nothing."""
        ranks, members = self.core.group.size(), self._members(group)
        send, receive = [0] * ranks, [0] * ranks
        for member, block, size in zip(members, blocks, sizes, strict=True):
            send[member], receive[member] = block.numel(), size
        flat = torch.cat(list(blocks))
        self.sent_bytes += (flat.numel() - send[self.rank]) * flat.itemsize
        received: Tensor = yield comm.all_to_all_async(
            flat, group=self.core.group, send_sizes=send, recv_sizes=receive, label=self.core.label or "csa"
        )
        return list(received.split(list(sizes)))

    def _spread(self, level: tuple[int, int], q: Tensor, out: Tensor, mass: Tensor) -> Partial:
        """The samples at their tokens, nothing at the others."""
        rows, heads = self._rows(level[1], self.core.kv_head_of, q), torch.arange(q.shape[1], device=q.device)
        outs, masses = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        outs[rows, heads], masses[rows, heads] = out, mass.to(masses.dtype)
        return outs, masses
