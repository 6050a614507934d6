"""Virtual time, and a group of two ranks of which the other sends what this one does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)


class FakeWork(dist.Work):
    """Done at once; with a future where there is one to complete."""

    def __init__(self, future: torch.futures.Future[Any] | None) -> None:
        super().__init__()
        self.future = future

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        if self.future is None:
            raise RuntimeError("Work::getFuture not implemented.")
        return self.future


class FakeGroup(dist.ProcessGroup):
    """Rank 0 of two, or of one; `future` is that of the next works."""

    def __init__(self, name: str = "fake", size: int = 2) -> None:
        super().__init__(0, size)
        self.name = name
        self.future: torch.futures.Future[Any] | None = None

    @property
    def group_name(self) -> str:
        return self.name

    @property
    def group_desc(self) -> str:
        return self.name

    def alltoall_base(self, received: Tensor, sent: Tensor, recv_sizes: list[int], send_sizes: list[int]) -> FakeWork:
        received[: recv_sizes[0]] = sent[: send_sizes[0]]
        received[recv_sizes[0] :] = sent[send_sizes[0] :] if recv_sizes[1] == send_sizes[1] else 0
        return FakeWork(self.future)

    def allreduce(self, tensors: list[Tensor]) -> FakeWork:
        return FakeWork(self.future)

    def broadcast(self, tensor: Tensor, src: int) -> FakeWork:
        return FakeWork(self.future)
