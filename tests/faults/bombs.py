"""Faults that a test plants in its own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seqpar import comm

Fault = Callable[[], object]
Launch = tuple[str, str]
"""A collective, and who asked for it."""


def die() -> None:
    """As by the kernel's hand, when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """As in a debugger, or on a host that hangs: all threads, until somebody says otherwise."""
    os.kill(os.getpid(), signal.SIGSTOP)


def run_out() -> None:
    """As an allocator raises."""
    raise RuntimeError("out of memory")


@contextmanager
def planted(fault: Fault, at: int | None) -> Iterator[list[Launch]]:
    """Have `fault` happen right before the launch numbered `at`, from 0; gives what is launched in the context."""
    launches: list[Launch] = []
    with comm.record() as recorder:

        def add(op: str, label: str, *_: int) -> None:
            launches.append((op, label))
            if len(launches) - 1 == at:
                fault()

        recorder.add = add  # type: ignore[method-assign]
        yield launches
