"""Where queries meet the keys of other ranks: with their own tokens, or with their heads.

* `Seat`, as in a ring: a rank attends for its own tokens, with all heads. Queries stay, and a key goes to every rank
  that sees it.
* `HeadSeat`, as in Ulysses: a rank attends for the tokens of all ranks, with a part of the heads. Queries come in one
  all-to-all, a key goes to the rank of its head alone, and outputs go back.

Either way a query meets the keys of its own rank there, exactly, while everything travels, so that no policy has to
send what lies beside a query. Seated by heads, a step has the three phases of CSPS: the ways in go on under that
attention; then a rank attends for the tokens of one rank after another, its own last; and the outputs of one rank's
tokens go home, with their log-sum-exp, under the attention for the next one's. There they are merged.

What lost: keys of the own rank that travel like all others, as in the authors' code. They are those that matter most,
and a policy would have to send them whole.

Source: CSPS, arXiv:2409.15104v1; DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import Steps
from seqpar.kernels import BlockLists, sparse_attention
from seqpar.layers.csa.core import CSAAttention
from seqpar.layers.csa.cut import kept, positions_of, query_blocks, request_lists
from seqpar.layers.ring import CachedKV, PartialSum, RingStep
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch

__all__ = ["HeadSeat", "Part", "Seat", "seat_for"]

K = TypeVar("K")
Partial = tuple[Tensor, Tensor]

HOME = 3
"""The tag of outputs; policies have those below."""


class Part(NamedTuple):
    """The queries of one rank's tokens.

    Attributes:
        rank: whose tokens.
        rows: where they lie among all queries that sit here.
        queries: blocks of consecutive tokens among them, and whose request they are.
        positions: of the tokens.
    """

    rank: int
    rows: Range
    queries: tuple[tuple[Range, int], ...]
    positions: Tensor


class Seat:
    """One step's queries on their own ranks.

    Args:
        core: the layer.
        q: of this rank's tokens.
        kv: of this rank's tokens, `core.own_keys(...)`.
        batch: of the step.
        cached: see `CSAAttention.attend`.

    Attributes:
        own_q: of this rank's tokens.
        q: the queries that sit here, when they have come.
        parts: of them, in the order in which they are best finished.
        targets: the other ranks, the next one first, which sees the nearest keys.
        sources: the other ranks, the one before first: what goes to `targets[i]` comes from `sources[i]` here.
        rounds: of messages, beside the policy's.
    """

    rounds = 0

    def __init__(self, core: CSAAttention, q: Tensor, kv: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> None:
        self.core, self.kv, self.batch, self.cached = core, kv, batch, cached
        self.order, self.rank, self.ranks = core.order(batch, cached), core.group.rank(), core.group.size()
        self.targets = [(self.rank + hop) % self.ranks for hop in range(1, self.ranks)]
        self.sources = [(self.rank - hop) % self.ranks for hop in range(1, self.ranks)]
        self.q = self.own_q = q
        self.sent_bytes = 0
        self.parts: tuple[Part, ...] = (self._part(self.rank, 0),)

    @property
    def kv_heads(self) -> int:
        """Of the queries that sit here."""
        return self.core.parts[self.rank].kv.size

    def open(self) -> None:
        """Launch what brings the queries here."""

    def arrive_steps(self) -> Steps[None]:
        """Wait for them."""
        return
        yield

    def meet_steps(self) -> Steps[PartialSum]:
        """Attend to this rank's keys, exactly; what the queries here have gathered so far, to be added to."""
        return self._attend_own(self.q)
        yield

    def known_steps(self, total: PartialSum) -> Steps[Tensor]:
        """The mass that the queries here have found so far, anywhere."""
        return total.lse
        yield

    def attend(self, part: Part, kv: Tensor, positions: Tensor, lists: BlockLists) -> Partial:
        """What some queries gather from keys that lie head after head, [n, 2, D]."""
        return sparse_attention(
            self.q[slice(*part.rows)],
            kv[:, 0],
            kv[:, 1],
            lists,
            q_positions=part.positions,
            k_positions=positions,
            softmax_scale=self.core.softmax_scale,
            kv_head_of=self.core.reads(self.rank),
            window=self.core.window,
        )

    def gather_steps(
        self, total: PartialSum, coming: Callable[[int], Steps[K]], attend: Callable[[Part, int, K], Partial]
    ) -> Steps[None]:
        """Add what queries gather from what comes last of each other rank, and finish part after part.

        Args:
            total: of all queries here.
            coming: the program that waits for what a rank has sent.
            attend: the queries of a part with what came from a rank.
        """
        arrived: dict[int, K] = {}
        for part in self.parts:
            for src in self.sources:
                if src not in arrived:
                    arrived[src] = yield from coming(src)
                if src != part.rank:  # they have met those where their tokens are
                    total.add(part.rows, *attend(part, src, arrived[src]))
            self._finish(part, total)

    def home_steps(self, total: PartialSum) -> Steps[PartialSum]:
        """What this rank's tokens have gathered everywhere, when all parts are finished."""
        return total
        yield

    def handed_home_steps(self, out: Tensor, numbers: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Of this rank's tokens, what has been found of all queries here: [t, h, D], and some [t, h, c] beside it."""
        return out, numbers
        yield

    def close(self) -> None:
        """Wait for what is in flight and nobody will ask for."""

    def positions(self, owner: int) -> Tensor:
        """Of all keys of a rank."""
        key = ("csa.positions", self.order, owner)
        return kept(self.batch, key, lambda: positions_of(run for runs in self.order.kv[owner] for run in runs))

    def _finish(self, part: Part, total: PartialSum) -> None:
        """Launch what brings home what some queries have gathered: nothing more will be added."""

    def _part(self, rank: int, first: int) -> Part:
        def make() -> Part:
            positions = positions_of(run for runs in self.order.q[rank] for run in runs)
            return Part(rank, Range(first, first + len(positions)), query_blocks(self.order, rank), positions)

        return kept(self.batch, ("csa.part", self.order, rank, first), make)

    def _attend_own(self, q: Tensor) -> PartialSum:
        return RingStep(self.core.ring_core(), self.order, self.batch, q.dtype).alone(q, self.kv)


class HeadSeat(Seat):
    """One step's queries on the ranks of their heads."""

    rounds = 1

    def __init__(self, core: CSAAttention, q: Tensor, kv: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> None:
        super().__init__(core, q, kv, batch, cached)
        self.tokens = [sum(run.size for runs in requests for run in runs) for requests in self.order.q]
        firsts = list(accumulate(self.tokens, initial=0))
        self.parts = tuple(self._part(rank, firsts[rank]) for rank in (*self.targets, self.rank))
        self._coming: Steps[Tensor] | None = None
        self._backs: dict[int, Steps[Tensor]] = {}

    def open(self) -> None:
        self._coming = comm.start(self._to_heads_steps(self.own_q))

    def arrive_steps(self) -> Steps[None]:
        assert self._coming is not None, "opened before"
        self.q = yield from self._coming

    def meet_steps(self) -> Steps[PartialSum]:
        """Attend for the own tokens, with all heads, while the others' queries travel; then for those."""
        self._own = self._attend_own(self.own_q)
        yield from self.arrive_steps()
        total, heads = PartialSum(self.q), self.core.parts[self.rank].kv
        keys = self.kv[:, :, slice(*heads)].permute(2, 0, 1, 3).flatten(0, 1)
        positions = self.positions(self.rank).repeat(heads.size)
        ends = accumulate((sum(run.size for run in runs) for runs in self.order.kv[self.rank]), initial=0)
        requests = [Range(*each) for each in pairwise(ends)]
        for part in self.parts[:-1]:
            lists = request_lists(part.queries, [requests] * heads.size)
            total.add(part.rows, *self.attend(part, keys, positions, lists))
        return total

    def known_steps(self, total: PartialSum) -> Steps[Tensor]:
        return torch.logaddexp(total.lse, (yield from self._to_heads_steps(self._own.lse)))

    def _finish(self, part: Part, total: PartialSum) -> None:
        rows = slice(*part.rows)
        self._send_home(part, total.out[rows].to(self.q.dtype), total.lse[rows, :, None])

    def handed_home_steps(self, out: Tensor, numbers: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        for part in self.parts:
            self._send_home(part, out[slice(*part.rows)], numbers[slice(*part.rows)])
        return (yield from self._returned_steps())

    def home_steps(self, total: PartialSum) -> Steps[PartialSum]:
        out, masses = yield from self._returned_steps()
        self._own.add(Range(0, len(out)), out, masses[..., 0])
        return self._own

    def _send_home(self, part: Part, out: Tensor, numbers: Tensor) -> None:
        """Launch [t, heads here, D], and some [t, heads here, c] of another dtype, to the rank of the tokens."""
        packed = torch.cat([x.contiguous().view(torch.uint8) for x in (out, numbers)], -1)
        src = (2 * self.rank - part.rank) % self.ranks
        self.sent_bytes += packed.numel() if src != self.rank else 0
        steps = comm.send_recv_steps(
            packed,
            dst=part.rank,
            src=src,
            group=self.core.group,
            recv_shape=(len(self.own_q), self.core.parts[src].q.size, packed.shape[-1]),
            tag=HOME,
            label=f"{self.core.label or 'csa'} (home)",
        )
        self._backs[src] = comm.start(steps)

    def _returned_steps(self) -> Steps[tuple[Tensor, Tensor]]:
        """What was sent home to this rank's tokens, all heads in order."""
        found = []
        for src in range(self.ranks):
            found.append((yield from self._backs[src]))
        whole = torch.cat(found, 1)
        width = self.core.head_dim * self.own_q.itemsize
        out, numbers = whole.split([width, whole.shape[-1] - width], -1)
        wide = torch.promote_types(self.own_q.dtype, torch.float32)
        return out.contiguous().view(self.own_q.dtype), numbers.contiguous().view(wide)

    def close(self) -> None:
        for steps in (self._coming, *self._backs.values()):
            if steps is not None:
                steps.close()

    def _to_heads_steps(self, x: Tensor) -> Steps[Tensor]:
        """This rank's tokens with all heads, [t, H, ...], as all ranks' with the heads here, ranks in order."""
        parts, rest = self.core.parts, x.shape[2:]
        blocks = [x[:, slice(*part.q)].flatten() for part in parts]
        sizes = [len(block) for block in blocks]
        self.sent_bytes += (sum(sizes) - sizes[self.rank]) * x.itemsize
        here = parts[self.rank].q.size
        got: Tensor = yield comm.all_to_all_async(
            torch.cat(blocks),
            group=self.core.group,
            send_sizes=sizes,
            recv_sizes=[tokens * here * prod(rest) for tokens in self.tokens],
            label=f"{self.core.label or 'csa'} (queries)",
        )
        return got.view(-1, here, *rest)


def seat_for(core: CSAAttention, q: Tensor, kv: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> Seat:
    """The layer's."""
    return (HeadSeat if core.exchange == "ulysses" else Seat)(core, q, kv, batch, cached)
