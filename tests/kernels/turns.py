"""Kernels of several ranks in one process, one step at a time in any order, and what orders their accesses.

Triton's interpreter runs a kernel in a thread of its own for each rank, and only one of them at a time. Before each
access to memory that the ranks share it stops, and a `Policy` says who goes on. What a kernel does is written down:

- an order in which all ranks wait for each other is a deadlock, and raises;
- `Turns.races` are the pairs of accesses to the same bytes, one of them a write, that nothing orders. What orders them
  is what does so on a GPU, and no more: launches of a rank follow one another; the blocks of one do not; the accesses
  of a block are those of many threads, and only a barrier puts what comes before it before what comes after; a release
  at system scope comes before an acquire that reads what it wrote. So a kernel without races here has none on a GPU
  whatever the timing, where the orders tried see the earliest signal that ends a wait: `eager` does.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder

__all__ = ["Policy", "Turns", "delayed", "eager", "shuffled"]

SYSTEM, RELEASE = interpreter._ir.MEM_SYNC_SCOPE.SYSTEM, interpreter._ir.MEM_SEMANTIC.RELEASE
ACQUIRE, EXCHANGE = interpreter._ir.MEM_SEMANTIC.ACQUIRE, interpreter._ir.ATOMIC_OP.XCHG
GIVE_UP_S = 30.0


class Step(NamedTuple):
    """What a rank is about to do: "read", "write", "signal", "wait", or "call" for its next call."""

    rank: int
    kind: str
    own: bool
    """Whether in its own memory alone."""


Policy = Callable[[list[Step]], int]
"""Which of the steps that can be made is made."""


class Access(NamedTuple):
    arena: int
    first: int
    end: int
    is_write: bool
    event: int
    what: str


class Turns:
    """Ranks that share `arenas`, one for each.

    Attributes:
        races: pairs of accesses that nothing orders.
        steps: what was done, in its order.
    """

    def __init__(self, arenas: Sequence[Tensor], policy: Policy) -> None:
        self.arenas, self.policy = arenas, policy
        self.steps: list[Step] = []
        self._next: dict[int, Step] = {}
        self._seen: dict[int, tuple[np.ndarray, np.ndarray] | None] = dict.fromkeys(range(len(arenas)))
        self._go = [threading.Semaphore(0) for _ in arenas]
        self._back = threading.Semaphore(0)
        self._rank = -1
        self._stopped = False
        self._errors: list[BaseException] = []
        self._before: list[int] = []  # events before each, as bits
        self._accesses: list[Access] = []
        self._put: dict[int, dict[int, int]] = defaultdict(dict)  # address, value: event
        self._events: dict[int, list[int]] = defaultdict(list)
        self._launched: dict[int, int] = {}
        self._barrier: dict[tuple[int, int], int] = {}
        self._since: dict[tuple[int, int], list[int]] = defaultdict(list)

    def run(self, body: Callable[[int], Any], kernel: Any) -> list[Any]:
        """`body(rank)` of every rank, to their ends; what they return. `kernel` is any of those that they launch."""
        results: list[Any] = [None] * len(self.arenas)

        def work(rank: int) -> None:
            self._go[rank].acquire()
            try:
                with np.errstate(all="ignore"):
                    results[rank] = body(rank)
            except BaseException as error:  # ends the others, and is raised below
                self._errors.append(error)
                self._stopped = True
            self._next.pop(rank, None)
            self._back.release()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(self.arenas))]
        with self._watched(kernel):
            for rank, thread in enumerate(threads):
                self._next[rank] = Step(rank, "call", True)
                thread.start()
            while self._next:
                ready = [step for rank, step in sorted(self._next.items()) if self._stopped or not self._waits(rank)]
                if not ready:
                    self._stopped = True
                    self._errors.append(AssertionError(f"every rank waits: {sorted(self._next.values())}"))
                    continue
                step = ready[0] if self._stopped else ready[self.policy(ready)]
                self._rank = step.rank
                self._go[step.rank].release()
                assert self._back.acquire(timeout=GIVE_UP_S), "a rank does not come back"
            for thread in threads:
                thread.join(GIVE_UP_S)
        if self._errors:
            raise self._errors[0]
        return results

    def call(self) -> None:
        """To be called by a body before each launch: what follows is a launch of its own."""
        self._pause(Step(self._rank, "call", True))
        rank = self._rank
        self._launched[rank] = self._event(self._events[rank])
        self._barrier = {key: at for key, at in self._barrier.items() if key[0] != rank}
        self._since = defaultdict(list, {key: at for key, at in self._since.items() if key[0] != rank})

    @property
    def races(self) -> list[str]:
        found = []
        by_start = sorted(self._accesses)
        for at, one in enumerate(by_start):
            for other in by_start[at + 1 :]:
                if (other.arena, other.first) >= (one.arena, one.end):
                    break
                early, late = sorted((one.event, other.event))
                if (one.is_write or other.is_write) and early != late and not self._before[late] >> early & 1:
                    found.append(f"{one.what} and {other.what}")
        return found

    # What follows runs in the threads of the ranks, which have the turn.

    def _waits(self, rank: int) -> bool:
        """Whether what a rank polls is still what it has seen."""
        seen = self._seen[rank]
        return seen is not None and bool((_read(seen[0]) == seen[1]).all())

    def _pause(self, step: Step) -> None:
        """Let the policy choose who goes on; return when it is this one."""
        saved = getattr(interpreter_builder, "grid_idx", None), getattr(interpreter_builder, "grid_dim", None)
        self._next[step.rank] = step
        if step.kind != "wait":
            self._seen[step.rank] = None
        self._back.release()
        self._go[step.rank].acquire()
        if self._stopped:
            raise RuntimeError("another rank failed")
        interpreter_builder.grid_idx, interpreter_builder.grid_dim = saved
        self.steps.append(step)

    def _where(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> list[tuple[int, int, int]]:
        """Which bytes of which arenas are accessed: one run in each of them."""
        wanted = addresses.reshape(-1)[np.broadcast_to(mask, addresses.shape).reshape(-1)].astype(np.int64)
        found = []
        for rank, arena in enumerate(self.arenas):
            start = arena.data_ptr()
            inside = wanted[(wanted >= start) & (wanted < start + arena.nbytes)]
            if inside.size:
                assert inside.max() - inside.min() == (inside.size - 1) * size or size == 8, "accesses have gaps"
                found.append((rank, int(inside.min()) - start, int(inside.max()) + size - start))
        return found

    def _event(self, before: Sequence[int]) -> int:
        bits = 0
        for event in before:
            bits |= self._before[event] | 1 << event
        self._before.append(bits)
        event = len(self._before) - 1
        self._events[self._rank].append(event)
        return event

    @property
    def _block(self) -> tuple[int, int]:
        return self._rank, interpreter_builder.grid_idx[0]

    def _in_block(self, *more: int) -> int:
        """An event of some thread of the block."""
        event = self._event([self._barrier.get(self._block, self._launched[self._rank]), *more])
        self._since[self._block].append(event)
        return event

    def _access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        where = self._where(addresses, mask, size)
        if where:
            self._pause(Step(self._rank, kind, all(rank == self._rank for rank, _, _ in where)))
        for rank, first, end in where:
            what = f"{kind} of rank {self._rank}, block {self._block[1]}, at {first}:{end} of rank {rank}"
            self._accesses.append(Access(rank, first, end, kind == "write", self._in_block(), what))

    @contextmanager
    def _watched(self, kernel: Any) -> Iterator[None]:
        """Accesses of kernels stop here first. Triton stays patched for all threads, and is so once: it takes long."""
        load, store, rmw = (
            getattr(interpreter_builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw")
        )

        def masked_load(ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
            self._access("read", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
            return load(ptrs, mask, *rest)

        def masked_store(ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
            self._access("write", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
            return store(ptrs, value, mask, *rest)

        def atomic_rmw(
            op: Any, ptr: TensorHandle, value: TensorHandle, mask: TensorHandle, order: Any, scope: Any
        ) -> Any:
            flags = ptr.data[mask.data]
            if op == EXCHANGE:
                self._pause(Step(self._rank, "signal", False))
                event = self._in_block()
                if order == RELEASE and scope == SYSTEM:
                    self._put_at(flags, value.data[mask.data], event)
                return rmw(op, ptr, value, mask, order, scope)
            assert not value.data.any(), "the only other atomic is a poll"
            self._pause(Step(self._rank, "wait", True))
            out = rmw(op, ptr, value, mask, order, scope)
            seen = out.data[mask.data]
            self._seen[self._rank] = (flags, seen)
            acquires = order == ACQUIRE and scope == SYSTEM
            self._in_block(*(self._observed(flags, seen) if acquires else ()))
            return out

        def barrier(*_: Any) -> None:
            before = [self._barrier.get(self._block, self._launched[self._rank]), *self._since[self._block]]
            self._barrier[self._block] = self._event(before)
            self._since[self._block] = []

        replaced = {"masked_load": masked_load, "masked_store": masked_store, "atomic_rmw": atomic_rmw}
        with ExitStack() as stack:
            stack.callback(interpreter._patch_lang(kernel.fn).restore)
            stack.enter_context(patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()))
            for name, function in {**replaced, "barrier": barrier}.items():
                stack.enter_context(patch.object(interpreter_builder, f"create_{name}", function))
            yield

    def _put_at(self, flags: np.ndarray, values: np.ndarray, event: int) -> None:
        for flag, value in zip(flags.tolist(), values.tolist(), strict=True):
            self._put[flag][value] = event

    def _observed(self, flags: np.ndarray, values: np.ndarray) -> list[int]:
        pairs = zip(flags.tolist(), values.tolist(), strict=True)
        return [self._put[flag][value] for flag, value in pairs if value in self._put[flag]]


def _read(addresses: np.ndarray) -> np.ndarray:
    return interpreter._interpreter.load(
        addresses, np.ones(addresses.shape, bool), np.zeros(addresses.shape, np.int64), np.dtype(np.int64)
    )


def eager(ready: list[Step]) -> int:
    """Whoever waits goes on as soon as it can, and so sees the earliest signal; else the rank that has done least."""
    return next((i for i, step in enumerate(ready) if step.kind == "wait"), 0)


def delayed(rank: int, kind: str, own: bool) -> Policy:
    """One rank stops before each step of a kind until no other rank can go on; else they take turns."""
    turn = [0]

    def policy(ready: list[Step]) -> int:
        others = [i for i, step in enumerate(ready) if step != Step(rank, kind, own)]
        turn[0] += 1
        return others[turn[0] % len(others)] if others else 0

    return policy


def shuffled(seed: int) -> Policy:
    """Any rank, drawn."""
    draw = random.Random(seed)
    return lambda ready: draw.randrange(len(ready))
