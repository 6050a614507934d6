"""Several programs by turns: the schedule under which one program's communication hides behind another's compute.

ISO's chunks of one prompt, two batches of requests, the parts of a three-phase pipeline are all the same call: each
program advances until it has launched its next collective, and is waited for when its turn comes round again.

* Collectives are launched before the other programs compute, and waited for one by one: with n programs a wait ends up
  to n - 1 pieces of compute after its launch. Lock-step rounds, which wait for all before going on, do as well for
  n = 2 and worse from 3 on.
* Who goes next depends on the programs' yields alone, never on what has arrived, so every rank launches the same
  collectives in the same order. Polling for whatever is ready first would not.
* A program never passes its k-th `Mark` before the program before it has, unless they are said to be unrelated.
  Programs need not yield equally often, and the mark, at the append to a layer's cache, is what keeps a later chunk
  from attending to keys that are not there yet. The first program is never held back, so nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from seqpar.comm.handle import Handle, Mark
from seqpar.comm.steps import Steps, resume, run

__all__ = ["interleave", "interleave_steps"]

T = TypeVar("T")


def interleave(programs: Sequence[Steps[T]], *, ordered: bool = True) -> list[T]:
    """Drive several programs by turns, each computing while the others' collectives are in flight.

    One compute stream runs the programs' local work in the order of the turns; every rank must pass the same programs.
    One program alone runs serially, as under `run`.

    Args:
        programs: in causal order: a later one may need what an earlier one appends at a `Mark`.
        ordered: False for programs that do not need each other's appends, such as batches of different requests: then
            none is held back at its marks.

    Returns:
        What each program returned.

    Raises:
        CommError: a collective failed; the other programs are closed.
    """
    return run(interleave_steps(programs, ordered=ordered))


def interleave_steps(programs: Sequence[Steps[T]], *, ordered: bool = True) -> Steps[list[T]]:
    """`interleave` as a program of its own, for a layer that hides its own collectives.

    Yields each handle when its turn to be waited for has come, after the others have computed; and a mark when one
    program is the first to open it and when one is the last to close it, so that schedules nest.
    """
    turns = [_Turns(steps, index) for index, steps in enumerate(programs)]
    try:
        while not all(program.finished for program in turns):
            for index, program in enumerate(turns):
                if not program.finished:
                    before = turns[index - 1] if index and ordered else None
                    yield from program.advance(before, [other for other in turns if other is not program])
    except BaseException:
        for program in turns:
            program.close()
        raise
    return [program.result for program in turns]


class _Turns(Generic[T]):
    """One program, with the handle or the mark at which it stands."""

    result: T

    def __init__(self, steps: Steps[T], index: int) -> None:
        self._steps = steps
        self._index = index
        self._handle: Handle | None = None
        self._mark: Mark | None = None
        self._opened = self._closed = 0
        self.finished = False

    def advance(self, before: _Turns[T] | None, others: Sequence[_Turns[T]]) -> Steps[None]:
        """Wait for what is in flight and compute up to the next launch, or to a mark that `before` has yet to pass."""
        value = None
        if self._handle is not None:
            value = yield self._handle
            self._handle = None
        while self._may_go_on(before):
            if self._mark is not None:
                yield from self._pass(self._mark, others)
            try:
                item = resume(self._steps, value, self._index)
            except StopIteration as stop:
                self.result, self.finished = stop.value, True
                return
            if not isinstance(item, Mark):
                self._handle = item
                return
            self._mark, value = item, None

    def close(self) -> None:
        """Let go of what is in flight, after waiting for it: a buffer must outlive its collective."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(RuntimeError):  # the error that closes the programs is already on its way
                handle.wait()
        self._steps.close()

    def _may_go_on(self, before: _Turns[T] | None) -> bool:
        """Whether there is no mark ahead, or one that the program before has closed as often as this one asks for."""
        if self._mark is None or not self._mark.opens or before is None or before.finished:
            return True
        return before._closed > self._opened

    def _pass(self, mark: Mark, others: Sequence[_Turns[T]]) -> Steps[None]:
        """Pass a mark, and tell an outer schedule where no other has opened, or all have closed, as often."""
        self._mark = None
        self._opened += mark.opens
        self._closed += mark.closes
        opens = mark.opens and all(other._opened < self._opened for other in others)
        closes = mark.closes and all(other.finished or other._closed >= self._closed for other in others)
        if opens or closes:
            yield Mark(mark.layer, opens=opens, closes=closes)
