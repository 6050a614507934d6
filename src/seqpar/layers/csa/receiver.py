"""What a rank makes of keys and values that it knows to a certified precision: outputs, bounds, and what to ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from seqpar.kernels import merge
from seqpar.kernels.certificate import ROUNDOFF, Terms, chunks, raises
from seqpar.layers.csa.precision import BLOCK, Basis, Given, Source, Tokens, Turn

PLANS = 2
"""How often a plan is made anew from the bound that the one before it would lead to."""


class Rule(NamedTuple):
    """What the queries of a layer do, and what is asked of the result."""

    epsilon: float
    softmax_scale: float
    kv_head_of: tuple[int, ...]
    window: int | None


class Problem(NamedTuple):
    """Queries of one request that read one KV head, and all that is known of its keys: own ones, then those of sources.

    Attributes:
        rows: local tokens of the queries.
        heads: their heads.
        tokens: of the request.
        head: the KV head.
        own: how many of the tokens are this rank's.
        blocks: which of each source's blocks follow.
    """

    rows: Int64[Tensor, " r"]
    heads: Int64[Tensor, " r"]
    tokens: Tokens
    head: int
    own: int
    blocks: tuple[Int64[Tensor, " b"], ...]

    def take(self, some: slice | Tensor) -> Problem:
        return self._replace(rows=self.rows[some], heads=self.heads[some])


class Receiver:
    """A rank's queries, what they gathered, and how far that may be off.

    A query that is certified keeps what it has; the others are computed again whenever keys and values got better.
    """

    def __init__(
        self,
        q: Tensor,
        request: Tensor,
        position: Tensor,
        own: Given,
        sources: Sequence[Source | Given],
        basis: Basis,
        turn: Turn,
        rule: Rule,
    ) -> None:
        self.own, self.sources = own, sources
        self.q, self.request, self.position, self.rule = q.to(own.known.k.dtype), request, position, rule
        self.kv_heads = own.known.k.shape[1]
        rows = basis.rows[: self.kv_heads][list(rule.kv_head_of)]
        self.reach = (rule.softmax_scale * turn.reach(q.double(), rows) * (1 + 1e-6)).to(self.q.dtype)
        self.out, self.lse = torch.zeros_like(q), torch.zeros_like(self.reach)
        self.bound, self.budget = torch.zeros_like(self.reach), torch.zeros_like(self.reach)
        self.room, self.doubt = torch.zeros_like(self.reach), torch.zeros_like(self.reach)
        self.open = torch.ones_like(self.reach, dtype=torch.bool)

    def assess(self) -> None:
        """Attend with every query that is open, and close those whose bound is within their budget."""
        for problem in self._problems():
            for some in chunks(len(problem.rows), len(problem.tokens.k)):
                part = problem.take(some)
                seen, at = self._seen(part), (part.rows, part.heads)
                terms = self._terms(part, seen)
                out = terms.out.to(self.out.dtype)
                rounded = _lost(terms.out, out)
                self.out[at], self.lse[at], self.bound[at] = out, terms.lse, terms.bound() + rounded
                self.doubt[at] = terms.doubt()
                self.budget[at] = self.rule.epsilon * self._largest(part, seen)
                # Where all values are remote, little may be certain of how long they are: plans count on an eighth.
                hoped = _most(torch.where(seen, part.tokens.v[:, part.head].norm(dim=-1), 0))
                self.room[at] = torch.maximum(self.budget[at], self.rule.epsilon / 8 * hoped) - rounded
        self.open &= ~(self.bound <= self.budget)

    def alone(self, rows: Tensor, heads: Tensor) -> Float[Tensor, "r c"]:
        """Exact partials of some queries over the own tokens: for each out, lse, bound of out, and that of lse."""
        part = copy(self)
        part.sources = []
        part.open = torch.zeros_like(self.open)
        part.open[rows, heads] = True
        part.out = torch.zeros_like(self.q)
        part.lse, part.bound, part.budget, part.room, part.doubt = (torch.zeros_like(self.reach) for _ in range(5))
        part.lse -= torch.inf
        part.assess()
        at = rows, heads
        return torch.cat([part.out[at], *(x[at][:, None] for x in (part.lse, part.bound, part.doubt))], 1)

    def settle(self, rows: Tensor, heads: Tensor, partials: Float[Tensor, "n r c"]) -> None:
        """Take for some queries what exact partials merge to.

        With the log-sum-exps off by at most a, their weights are off by less than e^2a - 1 in all.
        """
        size = self.q.shape[-1]
        outs, (lses, bounds, doubts) = partials[..., :size], partials[..., size:].unbind(-1)
        out, lse = merge(tuple(outs.contiguous()), tuple(lses.contiguous()))
        longest = outs.norm(dim=-1).amax(0)
        turned = (2 * doubts.amax(0) + 64 * ROUNDOFF * len(outs)).expm1() * (1 + 1e-5)
        kept = out.to(self.out.dtype)
        self.out[rows, heads], self.lse[rows, heads] = kept, lse
        self.bound[rows, heads] = bounds.amax(0) + turned * longest + _lost(out, kept)
        self.open[rows, heads] = False

    def plan(self, target: float, most: int) -> list[Int32[Tensor, "c b m"]]:
        """How many bits the tokens of each source should gain to bring open queries to that part of their budgets."""
        sources = [source for source in self.sources if isinstance(source, Source)]
        gains = [torch.zeros(source.shape[:3], dtype=torch.int32, device=self.q.device) for source in sources]
        costs = [source.costs() for source in sources]
        for whole in self._problems():
            problem = whole.take(self._hardest(whole, most))
            remote = slice(problem.own, None)
            if not len(problem.rows) or not len(problem.tokens.k[remote]):
                continue
            streams = [problem.head, problem.head + self.kv_heads]
            cost = torch.cat([c[streams][:, b].flatten(1) for c, b in zip(costs, problem.blocks, strict=True)], 1)
            gain = self._gain(problem, cost.to(self.q.dtype), target)
            sizes = [len(blocks) * BLOCK for blocks in problem.blocks]
            for found, blocks, part in zip(gains, problem.blocks, gain.split(sizes, 1), strict=True):
                for stream, own in zip(streams, part, strict=True):
                    found[stream, blocks] = own.view(-1, BLOCK)
        return [torch.minimum(gain, source.room()) for gain, source in zip(gains, sources, strict=True)]

    def _gain(self, problem: Problem, cost: Tensor, target: float) -> Int32[Tensor, "two m"]:
        """Bits for the keys and values of a problem: planned, tried on the bound itself, and planned again."""
        terms = now = self._terms(problem, self._seen(problem))
        radii = problem.tokens.radii[[0, 3], problem.own :, problem.head]
        least = (ROUNDOFF * terms.most).clamp(min=1e-30)  # float32 proves nothing smaller, and overflows beyond
        budget = torch.maximum(target * self.room[problem.rows, problem.heads], least)
        gain = torch.zeros(cost.shape, dtype=torch.int32, device=cost.device)
        for _ in range(PLANS):
            pressure = torch.cat(now.pressures(), 1)
            linear = pressure @ (radii * torch.exp2(-gain)).flatten()
            loose = (now.bound() / linear.clamp(min=1e-30)).clamp(1, 2)
            gain = raises(pressure, radii.flatten(), cost.flatten(), budget / loose).view(cost.shape)
            now = terms.sharpened(gain.to(cost.dtype))
        return gain

    def _problems(self) -> Iterator[Problem]:
        known = [(source.request, source.tokens()) for source in (self.own, *self.sources)]
        for request in self.request[self.open.any(1)].unique():
            blocks = [(owners == request).nonzero()[:, 0] for owners, _ in known]
            parts = [tokens.take(those) for (_, tokens), those in zip(known, blocks, strict=True)]
            tokens = Tokens(*(torch.cat(same, 1 if i == 2 else 0) for i, same in enumerate(zip(*parts, strict=True))))
            for head in range(self.kv_heads):
                reads = torch.tensor([kv == head for kv in self.rule.kv_head_of], device=self.q.device)
                mine = self.open & (self.request == request)[:, None] & reads
                rows, heads = mine.nonzero().unbind(1)
                yield Problem(rows, heads, tokens, head, len(parts[0].k), tuple(blocks[1:]))

    def _hardest(self, problem: Problem, most: int) -> Tensor:
        """Which queries the plan is made for: all, or the farthest from their budgets and every so many of the rest."""
        at = problem.rows, problem.heads
        order = (self.bound[at] / self.budget[at]).nan_to_num(torch.inf).argsort(descending=True)
        if len(order) <= most:
            return order
        first, rest = order[: most // 4], order[most // 4 :]
        return torch.cat([first, rest[:: -(-len(rest) // (most - len(first)))]])

    def _terms(self, problem: Problem, seen: Tensor) -> Terms:
        tokens, head, at = problem.tokens, problem.head, (problem.rows, problem.heads)
        return Terms(
            self.q[at],
            tokens.k[:, head],
            tokens.v[:, head],
            tokens.radii[:, :, head],
            self.reach[at],
            seen,
            softmax_scale=self.rule.softmax_scale,
            block=BLOCK,
            own=problem.own // BLOCK,
            spans=[len(blocks) for blocks in problem.blocks],
        )

    def _seen(self, problem: Problem) -> Tensor:
        own, key = self.position[problem.rows, None], problem.tokens.positions
        seen = key <= own
        return seen if self.rule.window is None else seen & (key > own - self.rule.window)

    def _largest(self, problem: Problem, seen: Tensor) -> Tensor:
        """The largest value that each query sees, from below; a query sees all of a block whose last token it sees."""
        tokens, head = problem.tokens, problem.head
        norms = tokens.least[:, head]
        if self.rule.window is None:
            norms = torch.maximum(norms, tokens.peak[:, head])
        return _most(torch.where(seen, norms, 0))


def _most(x: Tensor) -> Tensor:
    """The largest number of each row; 0 where a rank has no keys of a request."""
    return x.amax(-1) if x.shape[-1] else x.new_zeros(len(x))


def _lost(out: Tensor, kept: Tensor) -> Tensor:
    """How far rounding to another dtype takes outputs."""
    found: Tensor = torch.linalg.vector_norm(out - kept.to(out.dtype), dim=-1) * (1 + 1e-5)
    return found
