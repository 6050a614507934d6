"""Streams without asking for a device: on a CPU they are `CPU_STREAM`, and every operation on it is a no-op.

So code that orders work on streams is one path, and its logic runs on a laptop.

Source: torchgpipe, arXiv:2004.09910, `torchgpipe/stream.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "CPU_STREAM",
    "CPUStream",
    "Launched",
    "Stream",
    "current_stream",
    "follow",
    "hold_for",
    "new_stream",
    "record_event",
    "use_stream",
    "wait_event",
]


class CPUStream:
    """The one stream of a CPU: work on it is done when the call returns."""

    def __repr__(self) -> str:
        return "CPUStream()"


CPU_STREAM = CPUStream()
Stream = torch.cuda.Stream | CPUStream


def current_stream(device: torch.device) -> Stream:
    """The stream on which work for `device` is issued now."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else CPU_STREAM


def use_stream(stream: Stream) -> AbstractContextManager[object]:
    """A context in which `stream` is the current one."""
    return nullcontext() if isinstance(stream, CPUStream) else torch.cuda.stream(stream)


def new_stream(device: torch.device, *, priority: int = 0) -> torch.cuda.Stream:
    """A stream of a CUDA device; a lower number goes first."""
    return torch.cuda.Stream(device, priority=priority)


def follow(stream: Stream) -> None:
    """Order the current stream of the same device behind the present work of `stream`."""
    if not isinstance(stream, CPUStream):
        here = torch.cuda.current_stream(stream.device)
        if here != stream:
            here.wait_stream(stream)


def record_event(device: torch.device) -> torch.cuda.Event:
    """A signal that the present work of the current stream is done."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_event(event: torch.cuda.Event, device: torch.device) -> None:
    """Order the current stream behind a signal."""
    torch.cuda.current_stream(device).wait_event(event)


def hold_for(stream: Stream, tensors: Iterable[Tensor]) -> None:
    """Keep the memory of `tensors`, allocated on another stream, until the present work of `stream` is done."""
    if not isinstance(stream, CPUStream):
        for tensor in tensors:
            tensor.record_stream(stream)


class Launched:
    """The present work of the current stream; a handle waits for it as for what a backend has in flight."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ended = device, record_event(device)  # [A] matches the wait below

    def wait(self) -> None:
        """Order the current stream behind its end."""
        wait_event(self._ended, self._device)  # [A]

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return bool(self._ended.query())
