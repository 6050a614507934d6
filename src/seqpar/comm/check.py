"""Whether all ranks launch the same, asked before each launch instead of found by a hang.

Under `check()` a launch first says what it is about to do in the key-value store through which the ranks met, and goes
on once the launches of all ranks of its group are there and fit. Another collective would have been quicker to write;
but where collectives differ, it hangs or aborts like those that it is to check.

The last rank to come compares. Its verdict, or that of a rank which has waited in vain, is set once (the store's
compare-and-set), so all ranks go on, or all raise the same error. Keys are overwritten step by step: a context leaves
two for each rank, and for each group one for each of its ranks and two more.

A message between two ranks is launched by these alone, and the sender may be several ahead. So neither waits at the
launch: the second to come compares, and the first one learns of it in its wait. A message leaves four keys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from seqpar.comm.failure import failure
from seqpar.comm.mesh import describe

__all__ = ["Checker", "Crossing", "check", "current_check"]


class _Launch(NamedTuple):
    """What a rank is about to do; without an `op`, to leave the context.

    Attributes:
        op: the collective.
        label: who asked for it.
        dtype: of what travels.
        shape: of what the caller was given.
        sends: elements for each rank of an exchange.
        recvs: elements from each rank of an exchange.
        src: the rank that alone sends.
    """

    op: str = ""
    label: str = ""
    dtype: str = ""
    shape: Sequence[int] | None = None
    sends: Sequence[int] | None = None
    recvs: Sequence[int] | None = None
    src: int | None = None

    def __str__(self) -> str:
        if not self.op:
            return "left `comm.check()`"
        label = f" of `{self.label}`" if self.label else ""
        source = "" if self.src is None else f" from rank {self.src}"
        shape = "" if self.shape is None else f" {list(self.shape)}"
        return f"launched `{self.op}`{label}{source}{shape} {self.dtype}"

    def key(self) -> tuple[object, ...]:
        """What all ranks must have in common, besides sizes that fit."""
        label = None if self.op == "send_recv" else self.label  # stages of a pipeline hand over under their own names
        shape = None if self.op in _UNEVEN else self.shape
        return self.op, label, self.dtype, shape, self.src, self.sends is None


_UNEVEN = frozenset({"all_gather", "all_to_all", "send_recv"})  # ranks may hold different shapes


class _Channel:
    """The launches of a group, which its ranks number alike."""

    def __init__(self, group: ProcessGroup, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.global_ranks = dist.get_process_group_ranks(group)
        self.rank = group.rank()
        self.step = 0

    @property
    def here(self) -> str:
        return f"step {self.step} of {self.where}" if self.where else "the end of `comm.check()`"

    def difference(self, launches: Sequence[_Launch]) -> str | None:
        """The first launch of this step that does not fit those of the ranks before, and why."""
        first = launches[0]
        for rank, launch in enumerate(launches):
            head = f"rank {rank} {launch} at {self.here}"
            if launch.key() != first.key():
                how = ", by another algorithm" if str(launch) == str(first) else ""
                return f"{head}, where rank 0 {first}{how}; {_RULE}"
            for other, before in enumerate(launches[:rank]):
                if (sizes := _sizes(before, launch, other, rank)) is not None:
                    return f"{head} and awaits {sizes[1]} elements of rank {other}, which sends {sizes[0]}"
                if (sizes := _sizes(launch, before, rank, other)) is not None:
                    return f"{head} and sends {sizes[0]} elements to rank {other}, which awaits {sizes[1]}"
        return None


_RULE = "ranks must launch the same collectives in the same order"


def _sizes(sender: _Launch, receiver: _Launch, source: int, target: int) -> tuple[int, int] | None:
    """Elements sent and elements awaited, where these are not the same."""
    if sender.sends is None or receiver.recvs is None or sender.sends[target] == receiver.recvs[source]:
        return None
    return sender.sends[target], receiver.recvs[source]


class Checker:
    """What one `check()` context knows; every launch in it passes `launch`."""

    def __init__(self, timeout_s: float) -> None:
        # Private, but torch has no other way to the store that its process groups were made with.
        store, self._rank = _get_default_store(), dist.get_rank()
        entry = store.add(f"seqpar.check/{self._rank}", 1)  # ranks enter equally often, so this names the context
        self._store = PrefixStore(f"seqpar.check/{entry}", store)
        self.timeout_s = timeout_s
        self._channels: dict[str, _Channel] = {}
        self._messages: dict[str, int] = {}

    def launch(
        self,
        op: str,
        label: str,
        group: ProcessGroup,
        dtype: torch.dtype,
        shape: Sequence[int] | None,
        sizes: tuple[Sequence[int], Sequence[int]] | None,
        src: int | None,
    ) -> None:
        """Return when all ranks of the group launch what fits.

        Raises:
            ValueError: they do not.
            CommError: the process that keeps the store is gone.
        """
        sends, recvs = (None, None) if sizes is None else sizes
        launch = _Launch(op, label, str(dtype).removeprefix("torch."), shape, sends, recvs, src)
        try:
            channel = self._channel(group, group.group_name, describe(group))
            self._arrive(channel, launch)
            self._await(channel)
        except dist.DistError as error:
            raise failure(op, label, group, error) from error

    def cross(
        self, op: str, label: str, group: ProcessGroup, dtype: torch.dtype, shape: Sequence[int], peer: int
    ) -> Crossing:
        """Say that this rank launches its half of a message, "send" or "recv"; its wait is to wait for the crossing.

        Raises:
            ValueError: the other half has been launched, and does not fit.
            CommError: the process that keeps the store is gone.
        """
        ends = (group.rank(), peer) if op == "send" else (peer, group.rank())
        pair = f"{group.group_name}/{ends[0]}>{ends[1]}"
        self._messages[pair] = number = self._messages.get(pair, 0) + 1
        where = f"message {number} from rank {ends[0]} to rank {ends[1]} of {describe(group)}"
        launch = _Launch(op, label, str(dtype).removeprefix("torch."), tuple(shape))
        crossing = Crossing(self, f"message/{pair}/{number}", where, launch, group, peer)
        try:
            self._store.set(f"last/{self._rank}", f"last {launch} as {where}")
            crossing.arrive(self._store)
        except dist.DistError as error:
            raise failure(op, label, group, error) from error
        return crossing

    def leave(self) -> None:
        """Let the others know that this rank launches no more, and return when all ranks do."""
        world = dist.group.WORLD
        assert world is not None
        channel = self._channel(world, "world", "")
        self._arrive(channel, _Launch())
        self._store.set(f"left/{self._rank}", "")  # now that it has come to the end
        self._await(channel)

    def abandon(self, error: BaseException) -> None:
        """Let the others know why this rank launches no more."""
        how = f"left `comm.check()` by {type(error).__name__}: {error}"
        with suppress(dist.DistError):  # where the store is gone, the others know
            self._fail(f"rank {self._rank} of the world {how}; it {self.last(self._rank)}")

    def _channel(self, group: ProcessGroup, name: str, where: str) -> _Channel:
        if name not in self._channels:
            self._channels[name] = channel = _Channel(group, name, where)
            self._settle(channel, "", "0")
        return self._channels[name]

    def _arrive(self, channel: _Channel, launch: _Launch) -> None:
        """Say what this rank is about to do; the last one to come compares."""
        channel.step += 1
        if launch.op:
            self._store.set(f"last/{self._rank}", f"last {launch} at {channel.here}")
        self._store.set(f"{channel.name}/{channel.rank}", json.dumps([channel.step, *launch]))
        if self._store.add(f"{channel.name}/arrived", 1) == channel.step * len(channel.global_ranks):
            launches = [_Launch(*self._posted(channel, rank)[1:]) for rank in range(len(channel.global_ranks))]
            verdict = channel.difference(launches) or str(channel.step)
            self._settle(channel, str(channel.step - 1), verdict)

    def _await(self, channel: _Channel) -> None:
        """Return when all ranks have come to this step, and what they launch fits."""
        deadline, pause_s = time.monotonic() + self.timeout_s, 2e-5
        while (verdict := self._verdict(channel)) == str(channel.step - 1):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1e-3)
            if pause_s == 1e-3:
                error = self.read("error") or self._missing(channel, late=time.monotonic() > deadline)
                if error:
                    self._settle(channel, verdict, error)
        if verdict != str(channel.step):
            self._fail(verdict)
            raise ValueError(verdict)

    def _fail(self, error: str) -> None:
        """Let all other groups fail by the first error, too."""
        self._store.compare_set("error", "", error)

    def _verdict(self, channel: _Channel) -> str:
        """The last step that all ranks went on with, or the error that ended it."""
        return self._store.get(f"{channel.name}/verdict").decode()

    def _settle(self, channel: _Channel, before: str, verdict: str) -> None:
        self._store.compare_set(f"{channel.name}/verdict", before, verdict)

    def _posted(self, channel: _Channel, rank: int) -> list[Any]:
        """The step and the launch that a rank was last at."""
        posted = self.read(f"{channel.name}/{rank}")
        return list(json.loads(posted)) if posted else [0]

    def _missing(self, channel: _Channel, *, late: bool) -> str | None:
        """The error of the first rank that has not come to this step, if it is late or will not come any more."""
        for rank, global_rank in enumerate(channel.global_ranks):
            left = self.has_left(global_rank)
            if (late or left) and self._posted(channel, rank)[0] < channel.step:
                how = "left `comm.check()` before" if left else f"did not come within {self.timeout_s:g} s to"
                mine = f"where rank {channel.rank} {_Launch(*self._posted(channel, channel.rank)[1:])}"
                return f"rank {rank} {how} {channel.here}, {mine}; rank {rank} {self.last(global_rank)}"
        return None

    def last(self, global_rank: int) -> str:
        """What a rank launched last."""
        return self.read(f"last/{global_rank}") or "launched nothing"

    def has_left(self, global_rank: int) -> bool:
        """Whether a rank launches no more."""
        return self._store.check([f"left/{global_rank}"])

    def read(self, key: str) -> str:
        """What a key says; nothing where it is not set."""
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def refuse(self, verdict: str, error: str) -> None:
        """Let a message fail by an error, and all others after it."""
        self._store.compare_set(verdict, "", error)
        self._fail(error)


class Crossing:
    """One rank's half of a message under a check; a handle waits for it as for what the backend has in flight."""

    def __init__(self, checker: Checker, key: str, where: str, launch: _Launch, group: ProcessGroup, peer: int) -> None:
        self._checker, self._key, self._where, self._launch = checker, key, where, launch
        self._rank, self._peer, self._global_peer = group.rank(), peer, dist.get_process_group_ranks(group)[peer]
        self._agreed = False

    def arrive(self, store: PrefixStore) -> None:
        """Say what this rank launches; the second one to come compares."""
        store.set(f"{self._key}/{self._rank}", json.dumps(self._launch))
        if store.add(f"{self._key}/came", 1) == 2:
            other = _Launch(*json.loads(store.get(f"{self._key}/{self._peer}")))
            fits = (other.dtype, tuple(other.shape or ())) == (self._launch.dtype, self._launch.shape)
            if not fits:
                self._refuse(
                    f"rank {self._rank} {self._launch} as {self._where}, where rank {self._peer} {other}; both must "
                    "have one shape and dtype"
                )
            store.compare_set(f"{self._key}/verdict", "", _FITS)

    def wait(self) -> None:
        """Return once the other rank has launched a half that fits.

        Raises:
            ValueError: it has launched another, or does not come.
        """
        checker, pause_s = self._checker, 2e-5
        deadline = time.monotonic() + checker.timeout_s
        while not self._agreed:
            error = checker.read("error") or self._missing(late=time.monotonic() > deadline)
            verdict = checker.read(f"{self._key}/verdict")
            self._agreed = verdict == _FITS
            if verdict and not self._agreed:
                raise ValueError(verdict)
            if not verdict and error:
                self._refuse(error)
            if not verdict:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1e-3)

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._agreed or self._checker.read(f"{self._key}/verdict") == _FITS

    def _refuse(self, error: str) -> NoReturn:
        self._checker.refuse(f"{self._key}/verdict", error)
        raise ValueError(error)

    def _missing(self, *, late: bool) -> str | None:
        """What is wrong where the other half will not come any more, or is late."""
        left = self._checker.has_left(self._global_peer)
        if not (late or left):
            return None
        how = "left `comm.check()` before" if left else f"did not come within {self._checker.timeout_s:g} s to"
        return (
            f"rank {self._peer} {how} {self._where}, where rank {self._rank} {self._launch}; rank {self._peer} "
            f"{self._checker.last(self._global_peer)}"
        )


_FITS = "fits"

_CHECKER: ContextVar[Checker | None] = ContextVar("seqpar_check", default=None)


@contextmanager
def check(*, timeout_s: float = 10.0) -> Iterator[None]:
    """Compare what the ranks of a group are about to launch, before each collective of the context; for debugging.

    All ranks of the world enter and leave it together. What differs, the collective, the label, shape, dtype or sizes,
    or that a rank does not come, is an error on all of them instead of a hang; results are what they are without it.
    It sees collectives of this package that are launched in this thread. Those of a group must be the same on all its
    ranks, except for the sizes that an exchange or a gather may have; in a `send_recv` a rank without a partner sends
    to itself. Of a `send` or a `recv`, only the other rank must launch the other half, and errors come in the wait.

    Comm:  some small messages by way of the process group's store, and all ranks of a group wait for each other, before
        each launch: 0.4 to 0.9 ms with 2 ranks, 1.2 to 2.5 ms with 4, by a TCP store on two busy cores of an Intel Xeon
        (2026-11). What is timed or traced under it is no measurement.

    Args:
        timeout_s: how long a rank may keep the others waiting, with its compute before a launch for one.

    Raises:
        ValueError: the first difference, naming the rank, the step and both sides, on all ranks of the group, of which
            some may already have left the context; a timeout that is not positive; no process group.
        CommError: the process that keeps the store is gone, as rank 0 may have been.
    """
    if not timeout_s > 0:
        raise ValueError(f"`timeout_s` must be > 0, got {timeout_s}")
    if not dist.is_initialized():
        raise ValueError(
            "`check` must be entered after the ranks have met, got no process group; call `init_mesh` first"
        )
    checker = Checker(timeout_s)
    token = _CHECKER.set(checker)
    try:
        yield
        checker.leave()
    except BaseException as error:
        checker.abandon(error)
        raise
    finally:
        _CHECKER.reset(token)


def current_check() -> Checker | None:
    """The check in force."""
    return _CHECKER.get()
