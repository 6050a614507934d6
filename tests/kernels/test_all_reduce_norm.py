"""The sum over ranks with residual and norm: its values, and its protocol in every order that ranks can come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.all_reduce_norm import Arena, ArenaPlan, Shots, all_reduce_norm, reference
from seqpar.kernels.all_reduce_norm import triton as kernels
from seqpar.kernels.all_reduce_norm.triton import await_all, signal
from seqpar.partition import even_ranges
from tests.kernels.interpreter import interpreted
from tests.kernels.own_errors import own_errors
from tests.kernels.turns import Policy, Step, Turns, delayed, eager, shuffled
from tests.ranks import thinned

Call = tuple[Shots, int]
"""Who sums what, and tokens."""

MIXED: tuple[Call, ...] = (
    ("one_shot", 3),
    ("one_shot", 5),
    ("one_shot", 2),
    ("two_shot", 5),
    ("sharded", 3),
    ("sharded", 5),
    ("two_shot", 1),
    ("one_shot", 4),
)
"""Every algorithm after every other, with more and fewer rows than blocks and ranks."""

WIDTH, EPS = 24, 1e-5


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arenas(p: int, blocks: int, capacity: int) -> list[Arena]:
    plan = ArenaPlan(p, blocks, capacity).check()
    memory = [torch.full((plan.num_bytes,), 255, dtype=torch.uint8) for _ in range(p)]  # not a number in any dtype
    for own in memory:
        own[: plan.staged] = 0
    addresses = torch.tensor([own.data_ptr() for own in memory])
    return [Arena(own, addresses, rank, plan) for rank, own in enumerate(memory)]


def rows_of(call: Call, rank: int, p: int) -> slice:
    shots, tokens = call
    return slice(*even_ranges(tokens, p)[rank]) if shots == "sharded" else slice(None)


def together(
    p: int, calls: tuple[Call, ...], policy: Policy, blocks: int = 2, dtype: torch.dtype = torch.float32
) -> Turns:
    """Run calls one after another on p ranks; raise where a result is not the definition's."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(p + 1, tokens, WIDTH, generator=draw).to(dtype) for _, tokens in calls]
    weight = torch.randn(WIDTH, generator=draw).to(dtype)
    shared = arenas(p, blocks, max(x[0].nbytes for x in inputs))
    turns = Turns([arena.own for arena in shared], policy)

    def body(rank: int) -> list[tuple[Tensor, Tensor]]:
        found = []
        for call, x in zip(calls, inputs, strict=True):
            turns.call()
            residual = x[p][rows_of(call, rank, p)]
            found.append(all_reduce_norm(x[rank], residual, weight, EPS, arena=shared[rank], shots=call[0]))
        return found

    found = turns.run(body, kernels.all_reduce_norm_kernel)
    for call, x, *each in zip(calls, inputs, *found, strict=True):
        normed, total = reference.all_reduce_norm(list(x[:p]), x[p], weight, EPS)
        for rank, (out, kept) in enumerate(each):
            assert torch.equal(kept, total[rows_of(call, rank, p)]), (call, rank)
            torch.testing.assert_close(out, normed, rtol=2.0**-22 if dtype == torch.float32 else 2.0**-7, atol=1e-6)
            assert torch.equal(out, each[0][0]), (call, rank)
    return turns


@pytest.mark.parametrize(
    "case",
    thinned(
        [(p, dtype) for p in (1, 2, 3, 4) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        lambda case: case in ((1, torch.float32), (2, torch.float16), (3, torch.bfloat16)),
    ),
    ids=str,
)
def test_it_is_the_definition(case: tuple[int, torch.dtype]) -> None:
    p, dtype = case
    together(p, (("one_shot", 3), ("two_shot", 4), ("sharded", 5)), eager, dtype=dtype)


@pytest.mark.parametrize("p", thinned([2, 3], lambda p: p == 2))
def test_nothing_races(p: int) -> None:
    """In one order, in which every wait ends at the first signal that can end it: so in any."""
    assert together(p, MIXED, eager).races == []


STAGES = (("call", True), ("write", True), ("signal", False), ("wait", True), ("read", True), ("read", False))


@pytest.mark.parametrize("late", thinned([(2, 1), (2, 0), (3, 0), (3, 1), (3, 2)], lambda late: late == (2, 1)))
@pytest.mark.parametrize(("kind", "own"), [*STAGES, ("write", False)])
def test_a_rank_is_late(kind: str, own: bool, late: tuple[int, int]) -> None:
    """Before each of its steps of a kind it stops, until the others can do no more without it."""
    p, rank = late
    turns = together(p, MIXED, delayed(rank, kind, own), blocks=1)
    assert Step(rank, kind, own) in turns.steps


@pytest.mark.parametrize("seed", thinned(range(20), lambda seed: seed == 0))
def test_ranks_come_in_any_order(seed: int) -> None:
    together(3, MIXED, shuffled(seed), blocks=1)


@triton.jit
def wait_for_nobody(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    pass


@triton.jit
def wait_for_the_last_call(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    await_all(addresses_ptr, flags, rank, block, epoch - 1, RANKS, PADDED)


@triton.jit
def wait_for_the_next_call(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    await_all(addresses_ptr, flags, rank, block, epoch + 1, RANKS, PADDED)


@triton.jit
def always_the_first(epoch):
    return epoch * 0


@triton.jit
def relaxed_signal(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    peer = tl.arange(0, PADDED)
    arenas = tl.load(addresses_ptr + peer, mask=peer < RANKS, other=0)
    flag = (arenas + flags + (block * RANKS + rank) * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flag, epoch, mask=peer < RANKS, sem="relaxed", scope="sys")


@triton.jit
def signal_of_the_device(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    peer = tl.arange(0, PADDED)
    arenas = tl.load(addresses_ptr + peer, mask=peer < RANKS, other=0)
    flag = (arenas + flags + (block * RANKS + rank) * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flag, epoch, mask=peer < RANKS, sem="release", scope="gpu")


@triton.jit
def meet_without_a_first_barrier(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    signal(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)
    await_all(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)
    tl.debug_barrier()


@triton.jit
def meet_without_a_last_barrier(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    tl.debug_barrier()
    signal(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)
    await_all(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)


BROKEN: dict[str, tuple[str, Any]] = {
    "nobody waits": ("await_all", wait_for_nobody),
    "an epoch too early": ("await_all", wait_for_the_last_call),
    "one half, and no closing meeting": ("half_of", always_the_first),
    "a signal that releases nothing": ("signal", relaxed_signal),
    "a signal to this device alone": ("signal", signal_of_the_device),
    "a signal while threads still write": ("meet", meet_without_a_first_barrier),
    "threads that do not wait": ("meet", meet_without_a_last_barrier),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_protocol_races(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the two tests above would see it."""
    monkeypatch.setattr(kernels, *BROKEN[broken])
    calls: tuple[Call, ...] = (("one_shot", 2),) * 3
    try:
        assert together(2, calls, eager, blocks=1).races
    except AssertionError as error:
        assert "every rank waits" not in str(error)


@pytest.mark.parametrize("broken", ["nobody waits", "an epoch too early", "one half, and no closing meeting"])
def test_a_broken_protocol_gives_wrong_results_when_a_rank_is_late(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, *BROKEN[broken])
    with pytest.raises(AssertionError):
        for kind, own in STAGES:
            together(2, (("one_shot", 2),) * 3, delayed(1, kind, own), blocks=1)


def test_ranks_that_all_wait_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "await_all", wait_for_the_next_call)
    with pytest.raises(AssertionError, match="every rank waits"):
        together(2, (("one_shot", 2),), eager)


def test_an_arena_has_a_place_for_everything() -> None:
    plan = ArenaPlan(3, 2, 100)
    assert (plan.flags, plan.staged, plan.half, plan.gathered, plan.num_bytes) == (128, 256, 128, 512, 640)
    with pytest.raises(ValueError, match="`blocks` must be at least 1, got 0"):
        ArenaPlan(2, 0, 8).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": "three_shot"}, '`shots` must be "one_shot", "two_shot" or "sharded", got \'three_shot\''),
        ({"weight": torch.ones(3)}, "`weight` must have one entry per column of `x` (24), got [3]"),
        (
            {"weight": torch.ones(24).bfloat16()},
            "`weight` must have the dtype of `partial` (torch.float32), got torch.bfloat16",
        ),
        (
            {"residual": torch.ones(3, 24)},
            '`residual` must be 4 x 24 for `shots` "one_shot" on rank 1 of 2, got [3, 24]',
        ),
        ({"shots": "sharded"}, '`residual` must be 2 x 24 for `shots` "sharded" on rank 1 of 2, got [4, 24]'),
        (
            {"partial": torch.ones(5, 24), "residual": torch.ones(5, 24)},
            "`partial` must have at most the 384 bytes of the arena, got 480; make a larger one",
        ),
        (
            {name: torch.ones(*size) for name, size in (("partial", (4, 6)), ("residual", (4, 6)), ("weight", (6,)))},
            "`partial` must have at most 16384 columns, and rows of a multiple of 16 bytes, got 6 of torch.float32; "
            "`comm.all_reduce` and a norm after it take it",
        ),
        (
            {name: torch.ones(*size).double() for name, size in (("partial", (4, 24)), ("residual", (4, 24)))}
            | {"weight": torch.ones(24).double()},
            '`partial` must be float32, bfloat16 or float16 for backend="triton", got torch.float64; '
            'backend="torch" takes it',
        ),
    ],
)
@own_errors()
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"partial": torch.ones(4, 24), "residual": torch.ones(4, 24), "weight": torch.ones(24)}
    given |= {"eps": EPS, "arena": arenas(2, 1, 384)[1], "shots": "one_shot"} | change
    with pytest.raises(ValueError) as error:
        all_reduce_norm(**given)
    assert str(error.value) == message
