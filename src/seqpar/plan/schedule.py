"""How long programs take under `comm.interleave`, without running them: the schedule itself, in virtual time.

`makespan` hands the real `interleave` programs that compute by advancing a clock and communicate by booking a link, so
the prediction follows the schedule when that changes. A formula of its own lost: it would go on predicting the old one.
The tuner scans hundreds of cuts and uses `repeated_makespan`, the same turns written out, which a test holds equal;
what it picks is then replayed by `makespan`.

With K slots over all programs in the order of their turns, compute c and communication x, n programs:

    start(c_k) = max(end c_{k-1}, end x_{k-n});  start(x_k) = max(end c_k, end x_{k-1})

and for n = 2 in closed form c_1 + sum max(c_{k+1}, x_k) + x_K.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import fsum, inf, isclose
from typing import Any, NamedTuple

from seqpar import comm

__all__ = ["Schedule", "Slot", "bound", "makespan", "repeated_makespan"]


class Slot(NamedTuple):
    """Local work up to a launch, and the collective launched; where `comm_s` is 0, nothing is and the work goes on."""

    compute_s: float
    comm_s: float


@dataclass(frozen=True)
class Schedule:
    """Times of one run of a schedule.

    Attributes:
        total_s: from the first program's start to the last one's end.
        compute_s: the programs' local work, each alone.
        comm_s: their collectives, each alone.
        exposed_s: how long the compute stream stood still.
    """

    total_s: float
    compute_s: float
    comm_s: float
    exposed_s: float

    @property
    def efficiency(self) -> float:
        """The time saved against one after the other, of all that could be: min(compute, comm); 0 for nothing."""
        most = min(self.compute_s, self.comm_s)
        return (self.compute_s + self.comm_s - self.total_s) / most if most else 0.0


def makespan(programs: Sequence[Sequence[Slot]], *, contention: float = 0.0, link_contention: float = 0.0) -> Schedule:
    """Replay programs under `comm.interleave` on one compute stream and one link that carries transfers in order.

    Args:
        programs: the slots of each, in the programs' causal order; one program alone runs serially.
        contention: share of the compute rate that is lost while the link is busy (the collective's SMs or cores).
        link_contention: share of the link's rate that is lost while a program computes.

    Raises:
        ValueError: a negative time, or a share outside of [0, 1).
    """
    for index, program in enumerate(programs):
        for slot in program:
            if not (0 <= slot[0] < inf and 0 <= slot[1] < inf):
                raise ValueError(f"slots must be finite and >= 0, got {tuple(slot)} in program {index}")
    machine = _Machine(contention, link_contention)
    with comm.trace():  # a trace in force is of real time, and must not see this
        comm.interleave([_program(machine, slots) for slots in programs])
    return Schedule(
        total_s=machine.now_s,
        compute_s=fsum(slot[0] for program in programs for slot in program),
        comm_s=fsum(slot[1] for program in programs for slot in program),
        exposed_s=machine.exposed_s,
    )


def repeated_makespan(
    phases: Sequence[tuple[Sequence[Sequence[Slot]], int]], *, contention: float = 0.0, link_contention: float = 0.0
) -> float:
    """`makespan(...).total_s` of programs made of like layers, in time that does not grow with their number.

    Once a layer leaves the link as far behind as the layer before did, all further layers take as long as it took.

    Args:
        phases: the slots of one layer for each program, and how many such layers follow one another. In each slot all
            programs communicate or none does.
        contention: see `makespan`.
        link_contention: see `makespan`.
    """
    machine = _Machine(contention, link_contention)
    n = len(phases[0][0]) if phases else 0
    carry, ends = [0.0] * n, [0.0] * n
    for programs, layers in phases:
        slots = [(list(slot), any(x > 0 for _, x in slot)) for slot in zip(*programs, strict=True)]
        before: list[float] | None = None
        for layer in range(layers):
            start = machine.now_s
            for slot, communicates in slots:
                for i, (compute_s, comm_s) in enumerate(slot):
                    if not communicates:
                        carry[i] += compute_s
                        continue
                    machine.wait(ends[i])
                    machine.compute(carry[i] + compute_s)
                    carry[i], ends[i] = 0.0, machine.launch(comm_s)
            behind = [*(max(0.0, end - machine.done_s) for end in ends), *carry]
            took = machine.now_s - start
            if before is not None and all(
                isclose(a, b, rel_tol=1e-9, abs_tol=1e-9 * took) for a, b in zip(behind, before, strict=True)
            ):
                machine.now_s += took * (layers - layer - 1)
                break
            before = behind
    for i in range(n):
        machine.wait(ends[i])
        machine.compute(carry[i])
    return machine.now_s


def bound(programs: Sequence[Sequence[Slot]]) -> float:
    """A time that no run of the programs in these turns goes below: max(sum c + x_K, c_1 + sum x).

    All compute, and then the last collective; or the first compute, and then all collectives. Local work after a
    program's last collective is work that the second one does not count.
    """
    merged = [_merge(program) for program in programs]
    launches = [launched for launched, _ in merged if launched]
    work = fsum(c for launched in launches for c, _ in launched)
    tails = fsum(tail for _, tail in merged)
    if not launches:
        return tails
    most = max(map(len, launches))
    last = next(launched for launched in reversed(launches) if len(launched) == most)[-1].comm_s
    first = launches[0][0].compute_s
    return max(work + max(last, tails), first + fsum(x for launched in launches for _, x in launched))


class _Machine:
    """One compute stream and one link, in virtual time; each may slow the other down while both are busy.

    The link's clock is the work that it has done: a transfer ends when that reaches what was booked at its launch.
    """

    __slots__ = ("_compute_rate", "_link_rate", "booked_s", "done_s", "exposed_s", "now_s")

    def __init__(self, contention: float, link_contention: float) -> None:
        for name, share in (("contention", contention), ("link_contention", link_contention)):
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {share}")
        self._compute_rate, self._link_rate = 1 - contention, 1 - link_contention
        self.now_s = self.exposed_s = self.booked_s = self.done_s = 0.0

    def compute(self, seconds: float) -> None:
        """Work of that many seconds alone."""
        behind = self.booked_s - self.done_s
        if seconds / self._compute_rate <= behind / self._link_rate:  # the link is busy for all of it
            self.now_s += seconds / self._compute_rate
            self.done_s = min(self.booked_s, self.done_s + seconds / self._compute_rate * self._link_rate)
            return
        self.now_s += seconds + behind / self._link_rate * (1 - self._compute_rate)
        self.done_s = self.booked_s

    def launch(self, seconds: float) -> float:
        """Book the link for a transfer of that many seconds alone; what to wait for."""
        self.booked_s += seconds
        return self.booked_s

    def wait(self, end_s: float) -> None:
        """Stand still until the transfer is done."""
        left = end_s - self.done_s
        if left > 0:
            self.now_s += left
            self.exposed_s += left
            self.done_s = end_s


class _Transfer:
    """What `interleave` needs of a handle."""

    __slots__ = ("_end_s", "_machine")

    def __init__(self, machine: _Machine, seconds: float) -> None:
        self._machine, self._end_s = machine, machine.launch(seconds)

    def wait(self) -> None:
        self._machine.wait(self._end_s)


def _program(machine: _Machine, slots: Sequence[Slot]) -> Generator[Any, Any, None]:
    """The slots as the steps of a layer: compute, launch, yield."""
    for compute_s, comm_s in slots:
        machine.compute(compute_s)
        if comm_s:
            yield _Transfer(machine, comm_s)


def _merge(program: Sequence[Slot]) -> tuple[list[Slot], float]:
    """The slots that communicate, each with the local work before it, and the local work after the last."""
    launched, carry = [], 0.0
    for compute_s, comm_s in program:
        carry += compute_s
        if comm_s:
            launched.append(Slot(carry, comm_s))
            carry = 0.0
    return launched, carry
