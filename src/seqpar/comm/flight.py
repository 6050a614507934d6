"""One launch, as the check in force compares it, the simulated link delays it and the trace sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from seqpar.comm.check import Crossing, current_check
from seqpar.comm.link import SimulatedLink, link_of, simulates
from seqpar.comm.stream import Launched
from seqpar.comm.trace import Trace, Transfer, current_trace

__all__ = ["Flight", "announce", "cross", "depart", "is_watched"]


def is_watched() -> bool:
    """Whether a check, a link or a trace is in force in this thread."""
    return simulates() or current_trace() is not None or current_check() is not None


def depart(
    op: str,
    label: str,
    group: ProcessGroup,
    x: Tensor,
    num_bytes: int,
    shape: Sequence[int] | None,
    sizes: tuple[Sequence[int], Sequence[int]] | None = None,
    src: int | None = None,
) -> Flight | None:
    """What to tell the link and the trace in force of a launch that sends `num_bytes`; None where there is neither.

    Args:
        op: the collective.
        label: who asked for it.
        group: its ranks.
        x: a buffer of its dtype and on its device.
        num_bytes: sent by this rank.
        shape: of what the caller was given, where that is known.
        sizes: elements sent to each rank and received from each, in an exchange.
        src: the rank that alone sends.

    Raises:
        ValueError: other ranks launch something else, where a check is in force; a simulated link, and tensors that are
            neither on a CPU nor on CUDA.
    """
    announce(op, label, group, x, shape, sizes, src)
    link, trace = link_of(group), current_trace()
    if link is None and trace is None:
        return None
    if link is not None and x.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"simulated links must be used on CPU or CUDA tensors, got `{op}` of `{label}` on {x.device}; "
            "leave out `link.on`"
        )
    return Flight(op, label, x.device, num_bytes, link, trace)


def announce(
    op: str,
    label: str,
    group: ProcessGroup,
    x: Tensor,
    shape: Sequence[int] | None,
    sizes: tuple[Sequence[int], Sequence[int]] | None,
    src: int | None = None,
) -> None:
    """The part of `depart` that is for the check in force."""
    checker = current_check()
    if checker is not None:
        checker.launch(op, label, group, x.dtype, shape, sizes, src)


def cross(
    op: str, label: str, group: ProcessGroup, x: Tensor, num_bytes: int, peer: int
) -> tuple[Flight | None, tuple[Crossing, ...]]:
    """`depart` for one half of a message, which no other rank than `peer` launches the other half of.

    So nobody waits at the launch: what a check has to say is said in the wait, by what comes beside the flight.

    Raises:
        ValueError: the other half has been launched and does not fit, where a check is in force.
    """
    checker, trace = current_check(), current_trace()
    crossing = () if checker is None else (checker.cross(op, label, group, x.dtype, x.shape, peer),)
    return (None if trace is None else Flight(op, label, x.device, num_bytes, None, trace)), crossing


class Flight:
    """A launch that is simulated, traced, or both; a handle tells it of its works, its wait and its result."""

    __slots__ = ("_carried", "_trace", "_transfer", "link")

    def __init__(
        self,
        op: str,
        label: str,
        device: torch.device,
        num_bytes: int,
        link: SimulatedLink | None,
        trace: Trace | None,
    ) -> None:
        self.link, self._trace = link, trace
        launched = start = 0.0 if trace is None else trace.clock()
        end = None
        self._carried = None if link is None else link.carry(num_bytes, device)
        if self._carried is not None and self._carried.start_s is not None:
            start, end = self._carried.start_s, self._carried.end_s
        program = () if trace is None else trace.program
        self._transfer = Transfer(op, label, program, launched, start, end, num_bytes, link is not None)

    @property
    def number(self) -> int:
        """Which launch of the trace this is; -1 without one."""
        return self._transfer.number

    def observe(self, works: Sequence[Work | Crossing | Launched]) -> None:
        """The launch has succeeded."""
        if self._trace is None:
            return
        self._trace.add(self._transfer)
        clock, transfer = self._trace.clock, self._transfer
        if len(works) == 1 and isinstance(works[0], Work):
            with suppress(RuntimeError):  # sends and receives have no future: the end of the wait it is
                works[0].get_future().add_done_callback(lambda _: transfer.complete(clock()))

    def arrived(self) -> bool:
        """Whether a simulated transfer has ended; a real one is asked itself."""
        return self._carried is None or self._carried.arrived()

    def land(self, join: Callable[[], None]) -> None:
        """Wait by `join`, and on a simulated link for its end too."""
        if self._trace is None:
            self._block(join)
            return
        with self._trace.waiting(self._transfer):
            self._block(join)

    def finish(self, make: Callable[[], Tensor]) -> Tensor:
        """The result by `make`, which is compute of the program that launched."""
        if self._trace is None:
            return make()
        self._trace.begin(self._transfer.program)
        try:
            return make()
        finally:
            self._trace.end("finish", self._transfer.label or self._transfer.op, self._transfer.number)

    def _block(self, join: Callable[[], None]) -> None:
        join()
        if self._carried is not None:
            self._carried.join()
