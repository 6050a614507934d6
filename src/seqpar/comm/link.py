"""Links that are not there: collectives finish no earlier than they would on a link of known latency and rate.

For seeing on one machine what a schedule hides. The transfer itself is real, and so is its result; only its end is put
off. A launch books the link, transfers follow one another on it, and `Handle.wait` sleeps until the booked end, so
what is computed between a launch and its wait hides the transfer as it would on the real link.

On CUDA nobody sleeps. A launch puts a kernel of `sm` CTAs, which spin for the modelled time, on a stream of the link
beside the real transfer, and the wait orders the current stream behind both by events. So what a transfer costs others
is real too: the processors that it holds, and the start that it misses while a matrix product fills the GPU. All of it
can be captured in a CUDA graph; let it run once before, as anything that compiles a kernel.

A link of `ranks=8` takes one process for rank 0 of eight: a collective of a group of one rank, which has nothing to do,
then takes the time that eight would need and leaves its argument as it is. With the shard of one of eight ranks in the
layers, one GPU shows when it would have computed and waited; what it computes is not the model's output.

A sleep in the launch lost: nothing could hide it. Shaping the network itself tests more (the transport, its use of the
processor), but needs rights that a laptop or CI seldom grants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from seqpar.comm.stream import current_stream, follow, new_stream, record_event, use_stream, wait_event
from seqpar.kernels.spin import spin

__all__ = ["LINK_PRESETS", "LinkCosts", "SimulatedLink"]


class LinkCosts(NamedTuple):
    """Latency of a collective, and the rate at which one rank sends."""

    alpha_s: float
    bytes_per_s: float


def _costs(alpha_us: float, gigabytes_per_s: float) -> LinkCosts:
    return LinkCosts(alpha_us * 1e-6, gigabytes_per_s * 1e9)


LINK_PRESETS: Mapping[str, LinkCosts] = MappingProxyType(
    {
        "a100-dgx-2": _costs(43.0, 169.0),
        "a100-dgx-4": _costs(47.0, 171.0),
        "a100-dgx-8": _costs(51.0, 161.0),
        "h100-dgx-2": _costs(24.0, 318.0),
        "h100-dgx-4": _costs(26.0, 358.0),
        "h100-dgx-8": _costs(31.0, 348.0),
        "a100-pairwise-nvlink-4": _costs(63.0, 24.0),
        "h100-pairwise-nvlink-4": _costs(51.0, 50.0),
        "h100-nccl-8": _costs(39.0, 368.0),
        "h100-multimem-8": _costs(12.7, 480.0),
    }
)
"""Alpha-beta fits of all-reduce times, by fabric and number of GPUs; the rate is the bus bandwidth.

A fit is of a whole all-reduce, alpha included: one in two phases pays alpha twice here.

Source: the measurements published with Vidur (arXiv:2405.05465; dgx, pairwise-nvlink) and TokenWeave (arXiv:2505.11329;
nccl, multimem), none of them ours.
"""


class SimulatedLink:
    """A link of latency `alpha_s` and rate `bytes_per_s`, which carries one transfer after another.

    In force inside `with link.on(group):`, for what is launched there. Each rank has its own, for what it sends. The
    object holds when the link is free again, on CUDA the stream of its transfers; groups that share it share the link.

    Args:
        alpha_s: latency of a launch, also of one that sends nothing.
        bytes_per_s: rate of what this rank sends to others; `math.inf` for latency alone.
        sm: multiprocessors that a transfer holds on CUDA.
        ranks: make the collectives of one-rank groups cost what they would over so many; reshards stay free.
        clock: the time on a CPU, in seconds; give a trace the same one.
        sleep: waits for some seconds of that clock.

    Raises:
        ValueError: a negative latency, a rate that is not positive, `sm` below 1, or `ranks` below 2.
    """

    def __init__(
        self,
        alpha_s: float,
        bytes_per_s: float,
        *,
        sm: int = 4,
        ranks: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 <= alpha_s < inf:
            raise ValueError(f"`alpha_s` must be finite and >= 0, got {alpha_s}")
        if not bytes_per_s > 0:
            raise ValueError(f"`bytes_per_s` must be > 0, got {bytes_per_s}")
        if sm < 1:
            raise ValueError(f"`sm` must be at least 1, got {sm}")
        if ranks is not None and ranks < 2:
            raise ValueError(f"`ranks` must be at least 2, got {ranks}; leave it out for the ranks that there are")
        self.alpha_s = alpha_s
        self.bytes_per_s = bytes_per_s
        self.sm = sm
        self.ranks = ranks
        self.busy_until_s = -inf
        self._clock = clock
        self._sleep = sleep
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def preset(cls, name: str, *, sm: int = 4, ranks: int | None = None) -> SimulatedLink:
        """A new link with the costs of `LINK_PRESETS[name]`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in LINK_PRESETS:
            raise ValueError(f'`name` must be one of {", ".join(LINK_PRESETS)}, got "{name}"')
        return cls(*LINK_PRESETS[name], sm=sm, ranks=ranks)

    def seconds(self, num_bytes: int) -> float:
        """How long a transfer takes on the free link."""
        return self.alpha_s + num_bytes / self.bytes_per_s

    @property
    def clock(self) -> Callable[[], float]:
        """The time on a CPU, for traces."""
        return self._clock

    def reset(self) -> None:
        """Forget the transfers under way: the link is free. On CUDA they spin on, beside those to come."""
        self.busy_until_s = -inf
        self._streams.clear()

    @contextmanager
    def on(self, *groups: ProcessGroup) -> Iterator[SimulatedLink]:
        """Carry what this thread launches on `groups` in the context; the innermost link of a group is in force.

        It goes around the driver of the programs, not into one of them.

        Raises:
            ValueError: no group, or one of several ranks on a link that sets `ranks`.
        """
        if not groups:
            raise ValueError("`groups` must be at least one group, got none")
        several = next((group.size() for group in groups if group.size() > 1), None)
        if self.ranks is not None and several is not None:
            raise ValueError(
                f"`groups` must be of one rank on a link that sets `ranks` ({self.ranks}), got one of {several}"
            )
        token = _LINKS.set({**(_LINKS.get() or {}), **{group.group_name: self for group in groups}})
        try:
            yield self
        finally:
            _LINKS.reset(token)

    def book(self, num_bytes: int) -> tuple[float, float]:
        """Take the link as soon as it is free for a transfer that starts now; its start and its end."""
        start = max(self._clock(), self.busy_until_s)
        self.busy_until_s = start + self.seconds(num_bytes)
        return start, self.busy_until_s

    def sleep_until(self, deadline_s: float) -> None:
        """Return once the clock shows `deadline_s`."""
        while (left := deadline_s - self._clock()) > 0:
            self._sleep(left)

    def has_passed(self, deadline_s: float) -> bool:
        """Whether the clock shows `deadline_s` or more."""
        return self._clock() >= deadline_s

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of the transfers of CUDA tensors, above others in priority; made when first asked for."""
        if device not in self._streams:
            self._streams[device] = new_stream(device, priority=-1)
        return self._streams[device]

    def carry(self, num_bytes: int, device: torch.device) -> Booked | Spinning:
        """Send off a transfer that can start now, or when the present work of the current stream is done."""
        return Booked(self, num_bytes) if device.type == "cpu" else Spinning(self, num_bytes, device)

    def __repr__(self) -> str:
        ranks = "" if self.ranks is None else f", ranks={self.ranks}"
        return f"SimulatedLink(alpha_s={self.alpha_s:g}, bytes_per_s={self.bytes_per_s:g}{ranks})"


class Booked:
    """A transfer of CPU tensors: when it starts and ends."""

    def __init__(self, link: SimulatedLink, num_bytes: int) -> None:
        self._link = link
        self.start_s, self.end_s = link.book(num_bytes)

    def arrived(self) -> bool:
        return self._link.has_passed(self.end_s)

    def join(self) -> None:
        """Block the host until the end."""
        self._link.sleep_until(self.end_s)


class Spinning:
    """A transfer of CUDA tensors: a kernel behind the earlier ones of its link. The host knows no times of it."""

    start_s = end_s = None

    def __init__(self, link: SimulatedLink, num_bytes: int, device: torch.device) -> None:
        self._device, launcher = device, current_stream(device)
        with use_stream(link.stream(device)):
            follow(launcher)  # what is sent has been computed
            spin(link.seconds(num_bytes), ctas=link.sm)
            self._ended = record_event(device)  # [A] matches the wait in `join`

    def arrived(self) -> bool:
        return bool(self._ended.query())

    def join(self) -> None:
        """Order the current stream behind the end."""
        wait_event(self._ended, self._device)  # [A]


_LINKS: ContextVar[Mapping[str, SimulatedLink] | None] = ContextVar("seqpar_links", default=None)


def simulates() -> bool:
    """Whether any group of this thread has a simulated link."""
    return _LINKS.get() is not None


def link_of(group: ProcessGroup) -> SimulatedLink | None:
    """The link in force for `group`."""
    links = _LINKS.get()
    return None if links is None else links.get(group.group_name)


def ranks_of(group: ProcessGroup) -> int:
    """How many ranks a collective of `group` is to cost: its own, or those that its link sets."""
    link = link_of(group)
    return group.size() if link is None or link.ranks is None else link.ranks
