"""Collectives of two ranks with arguments that both draw alike: the right answer on both, or a refusal on both.

What a rank holds follows from the draw and its number, so each works out by itself what comes of both. Where no answer
can be worked out the ranks must refuse; no rank may be left waiting for the other.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.partition import Range
from tests.kernels.own_errors import own_errors
from tests.ranks import run_ranks

SECONDS = float(os.environ.get("SEQPAR_FUZZ_SECONDS", "0")) / 8
CALLS = 100
P = 2

SIZES = (0, 1, 2, 2, 3, 4, 7)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool)
SUMMABLE = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32)


class Refused(Exception):
    """There is no answer."""


def held(shape: Sequence[int], dtype: torch.dtype, seed: int, rank: int) -> Tensor:
    """What a rank holds: small integers, whose sums are exact."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 5, tuple(shape), generator=draw).to(dtype)


def need(condition: bool) -> None:
    if not condition:
        raise Refused


class Case:
    """One call: what is drawn is the same on both ranks, but for the shards' own sizes."""

    def __init__(self, draw: random.Random, group: comm.ProcessGroup) -> None:
        self.draw, self.group, self.rank = draw, group, group.rank()
        self.seed, self.dtype = draw.randrange(10**6), draw.choice(DTYPES)
        self.shape = [draw.choice(SIZES) for _ in range(draw.choice((1, 2, 2, 3)))]
        self.dim = draw.choice((0, 0, 0, 1, -1, 2, -4))
        self.sizes = draw.choice((None, [draw.choice(SIZES) for _ in range(draw.choice((1, 2, 2, 2, 3)))]))

    def axis(self) -> int:
        need(-len(self.shape) <= self.dim < len(self.shape))
        return self.dim % len(self.shape)

    def shard(self, rank: int) -> Tensor:
        """A rank's part along `dim` by `sizes`; any shape where these are none."""
        shape = list(self.shape)
        if self.sizes is not None and len(self.sizes) == P and -len(shape) <= self.dim < len(shape):
            shape[self.dim] = self.sizes[rank]
        return held(shape, self.dtype, self.seed, rank)

    def all_gather(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        def expected() -> Tensor:
            axis = self.axis()
            need(self.sizes is None or len(self.sizes) == P)
            return torch.cat([self.shard(rank) for rank in range(P)], axis)

        x = self.shard(self.rank)
        return lambda: comm.all_gather(x, group=self.group, dim=self.dim, sizes=self.sizes), expected

    def total(self) -> Tensor:
        need(self.dtype in SUMMABLE)
        return held(self.shape, self.dtype, self.seed, 0) + held(self.shape, self.dtype, self.seed, 1)

    def all_reduce(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        x = held(self.shape, self.dtype, self.seed, self.rank)
        return lambda: comm.all_reduce(x, group=self.group), self.total

    def reduce_scatter(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        def expected() -> Tensor:
            axis, total = self.axis(), self.total()
            size = total.shape[axis]
            sizes = [(size + 1) // 2, size // 2] if self.sizes is None else self.sizes
            need(len(sizes) == P and sum(sizes) == size)
            return total.split(list(sizes), axis)[self.rank]

        x = held(self.shape, self.dtype, self.seed, self.rank)
        return lambda: comm.reduce_scatter(x, group=self.group, dim=self.dim, sizes=self.sizes), expected

    def broadcast(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        src = self.draw.choice((0, 1, 1, 2, -1))

        def expected() -> Tensor:
            need(0 <= src < P)
            return held(self.shape, self.dtype, self.seed, src)

        x = held(self.shape, self.dtype, self.seed, self.rank)
        return lambda: comm.broadcast(x, src=src, group=self.group), expected

    def all_to_all(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """`table[a][b]` rows go from a to b; now and then one side is told a row less, on both ranks alike."""
        table = [[self.draw.choice(SIZES) for _ in range(P)] for _ in range(P)]
        off = self.draw.choice((0, 0, 0, 1, -99))
        rest = self.shape[1:]

        def expected() -> Tensor:
            need(off == 0)
            parts = []
            for source in range(P):
                whole = held([sum(table[source]), *rest], self.dtype, self.seed, source)
                parts.append(whole.split(table[source])[self.rank])
            return torch.cat(parts)

        x = held([sum(table[self.rank]), *rest], self.dtype, self.seed, self.rank)
        send = [size + off for size in table[self.rank]]
        recv = [table[source][self.rank] for source in range(P)]
        return lambda: comm.all_to_all(x, send_sizes=send, recv_sizes=recv, group=self.group), expected

    def seq_to_heads(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        width = self.draw.choice(SIZES)
        cut, over = self.draw.choice(SIZES), self.draw.choice((0, 0, 0, 3))
        columns = [[Range(0, cut)], [Range(cut, width + over)]]
        tokens = [self.draw.choice(SIZES) for _ in range(self.draw.choice((2, 2, 2, 1, 3)))]

        def expected() -> Tensor:
            need(len(tokens) == P and cut <= width and not over)
            whole = [held([tokens[rank], width], self.dtype, self.seed, rank) for rank in range(P)]
            return torch.cat(whole)[:, slice(*columns[self.rank][0])]

        x = held([tokens[self.rank % len(tokens)], width], self.dtype, self.seed, self.rank)
        return lambda: comm.seq_to_heads(x, columns=columns, tokens=tokens, group=self.group), expected


KINDS = ("all_gather", "all_reduce", "reduce_scatter", "broadcast", "all_to_all", "seq_to_heads")


def calls(rank: int, p: int, first: int, seconds: float) -> dict[str, list[int]]:
    """Of every kind, how many were answered and how many refused."""
    group = comm.groups(comm.init_mesh(1, p, "cpu", timeout_s=20.0)).sp
    told = {kind: [0, 0] for kind in KINDS}
    end, number = time.monotonic() + seconds, first
    while True:
        for _ in range(CALLS):
            number += 1
            draw = random.Random(number)
            kind = draw.choice(KINDS)
            call, expected = getattr(Case(draw, group), kind)()
            told[kind][one(call, expected, f"{kind} {number}")] += 1
        late = torch.tensor(time.monotonic() >= end, dtype=torch.int32)
        if comm.all_reduce(late, group=group):  # one of them is enough, and both go on or end
            return told


def one(call: Callable[[], Tensor], expected: Callable[[], Tensor], name: str) -> bool:
    """Whether a call was refused, as it had to be."""
    try:
        answer: Any = expected()
    except Refused:
        answer = None
    try:
        with own_errors():
            result = call()
    except (ValueError, TypeError) as error:
        assert answer is None, f"{name}: {error}"
        assert str(error)
        return True
    assert answer is not None, f"{name} must be refused, got {list(result.shape)}"
    assert torch.equal(result, answer) and result.dtype == answer.dtype, name
    return False


@pytest.mark.parametrize("first", [0])
def test_the_right_answer_or_a_refusal_on_both(first: int) -> None:
    told = run_ranks(P, calls, first, SECONDS, timeout_s=90.0 + 2 * SECONDS)
    assert all(min(counts) > 0 for each in told for counts in each.values()), told
