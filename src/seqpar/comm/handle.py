"""Collectives in flight.

A handle owns every tensor that the collective touches. It lets go of them in `wait`, after two things are ordered
behind the collective: the stream that waits, and the stream that launched it. The second is where the tensors were
allocated: the caching allocator hands their memory to that stream's next request as soon as they are dropped, also
when another stream did the waiting. `Tensor.record_stream` at launch lost: such a block stays unusable until the
allocator polls an event, so memory grows with the collectives in flight; here it serves the rare second stream only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributed import ProcessGroup, Work

from seqpar.comm.check import Crossing
from seqpar.comm.failure import failure
from seqpar.comm.flight import Flight
from seqpar.comm.stream import CPU_STREAM, CPUStream, Launched, current_stream, follow, hold_for, use_stream

__all__ = ["Handle", "Mark"]


class Mark:
    """A point that a program passes, such as its append to the KV cache of a layer; nothing is in flight.

    Args:
        layer: which one.
        opens: the program asks to pass. A later program's k-th such mark waits for the k-th that closes before it.
        closes: what follows at once, up to the next yield, is the last that later programs need. A program made of
            several opens with its first and closes with its last.
    """

    __slots__ = ("closes", "layer", "opens")

    def __init__(self, layer: int, *, opens: bool = True, closes: bool = True) -> None:
        self.layer, self.opens, self.closes = layer, opens, closes

    @property
    def kind(self) -> str:
        """What a trace calls it: "mark", or "open" or "close" where it does only that, or "pass"."""
        names = {(True, True): "mark", (True, False): "open", (False, True): "close", (False, False): "pass"}
        return names[self.opens, self.closes]

    def wait(self) -> None:
        """Return at once."""

    def __repr__(self) -> str:
        return f"Mark({self.layer})"


class Handle:
    """A collective in flight; `wait` gives its result.

    Args:
        op: name of the collective.
        label: who asked for it (the layer).
        group: its ranks.
        works: what the backend, or a kernel on another stream, has in flight; of a message under a check, the other
            half too.
        finish: makes the result out of the received buffers; runs once, in `wait`.
        buffers: every tensor in flight, for the allocator.
        flight: the simulated link that carries it, the trace that sees it.
    """

    __slots__ = ("_buffers", "_finish", "_flight", "_result", "_stream", "_works", "group", "label", "op")

    def __init__(
        self,
        op: str,
        label: str,
        group: ProcessGroup,
        works: Sequence[Work | Crossing | Launched],
        finish: Callable[[], Tensor],
        buffers: Sequence[Tensor],
        flight: Flight | None = None,
    ) -> None:
        self.op = op
        self.label = label
        self.group = group
        self._works = works
        self._finish: Callable[[], Tensor] | None = finish
        self._buffers = buffers
        self._result: Tensor | None = None
        self._stream = current_stream(buffers[0].device) if buffers else CPU_STREAM
        self._flight = flight
        if flight is not None:
            flight.observe(works)

    @classmethod
    def finished(cls, op: str, label: str, group: ProcessGroup, result: Tensor, flight: Flight | None = None) -> Handle:
        """The handle of a collective that had nothing to do, or only to simulate it."""
        return cls(op, label, group, (), lambda: result, (result,), flight)

    def then(self, finish: Callable[[Tensor], Tensor]) -> Handle:
        """This handle, whose result will be `finish` of what it was."""
        inner = self._finish
        assert inner is not None, "`then` comes before `wait`"
        self._finish = lambda: finish(inner())
        return self

    @property
    def number(self) -> int:
        """Which launch of the trace in force this is; -1 where none is traced."""
        return -1 if self._flight is None else self._flight.number

    def done(self) -> bool:
        """Whether `wait` would return without blocking the host (on CUDA: without blocking the stream)."""
        arrived = self._flight is None or self._flight.arrived()
        return arrived and all(work.is_completed() for work in self._works)

    def wait(self) -> Tensor:
        """The result; the current stream is ordered after the collective. Later calls return the same tensor.

        Raises:
            CommError: the collective failed.
        """
        if self._finish is not None:
            if self._flight is None:
                self._join()
                self._result = self._finish()
            else:
                self._flight.land(self._join)
                self._result = self._flight.finish(self._finish)
            self._release()
        assert self._result is not None
        return self._result

    def _join(self) -> None:
        if not self._works:
            follow(self._stream)  # nothing is in flight, but what made the result may be
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise failure(self.op, self.label, self.group, error) from error

    def _release(self) -> None:
        """Let go of the tensors, allocated on `self._stream`, once no stream can touch them any more."""
        if not isinstance(self._stream, CPUStream):
            here = current_stream(self._buffers[0].device)
            if here != self._stream:
                with use_stream(self._stream):  # [A] the allocating stream, too, is ordered after the collective,
                    self._join()
                hold_for(here, self._buffers)  # [B] and its memory outlives what `_finish` read and wrote here.
                if self._result is not None:
                    hold_for(here, (self._result,))
        self._works, self._buffers, self._finish = (), (), None

    def __repr__(self) -> str:
        state = "done" if self._finish is None else "in flight"
        link = "" if self._flight is None or self._flight.link is None else f", {self._flight.link}"
        return f"Handle({self.op}, {self.label!r}, {state}{link})"
