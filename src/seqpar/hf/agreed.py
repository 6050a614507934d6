"""Local work whose failure on one rank is to be an error on all of them, instead of a hang at the next collective."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from seqpar import comm
from seqpar.comm import ProcessGroup

__all__ = ["agreed", "check_same", "keep_first", "read_first"]


@contextmanager
def agreed(group: ProcessGroup) -> Iterator[None]:
    """Run a block without collectives; when it raised on some rank, raise that rank's error on every one.

    Comm:  one `comm.agree` at the end.

    Raises:
        TypeError, ValueError: the first failing rank's; other exceptions become ValueErrors that name their type.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = (
        error if isinstance(error, (ValueError, TypeError)) or error is None else f"{type(error).__name__}: {error}"
    )
    try:
        comm.agree(message, group=group)
    except (ValueError, TypeError) as first:
        if first is error:
            raise
        raise first from error


def check_same(what: str, value: bytes, *, group: ProcessGroup, device: torch.device) -> None:
    """Raise on every rank unless all have the same `value`.

    Comm:  a broadcast of 32 bytes on `device`, and one `comm.agree`.

    Raises:
        ValueError: `what` differs between ranks.
    """
    mine = torch.frombuffer(bytearray(hashlib.sha256(value).digest()), dtype=torch.uint8)
    theirs = comm.broadcast(mine.to(device), src=0, group=group, label="check_same").cpu()
    with agreed(group):
        if not torch.equal(mine, theirs):
            raise ValueError(f"{what} must be the same on every rank, got another than rank 0's on rank {group.rank()}")


def read_first(file: Path | None, read: Callable[[Path], str], *, group: ProcessGroup) -> str:
    """What rank 0 reads from a file, on every rank; empty where there is none.

    Comm:  nothing without a file's name; else a `comm.agree`, a broadcast of 8 bytes and one of the text.

    Raises:
        ValueError: what rank 0's reading raised.
    """
    if file is None:
        return ""
    text = ""
    with agreed(group):
        if group.rank() == 0 and file.is_file():
            text = read(file)
    device = torch.device("cpu") if torch.device("cpu") in group._device_types else torch.device("cuda")
    mine = list(text.encode())
    size = int(comm.broadcast(torch.tensor([len(mine)], device=device), src=0, group=group, label="read"))
    sent = torch.tensor(mine if group.rank() == 0 else [0] * size, dtype=torch.uint8, device=device)
    return bytes(comm.broadcast(sent, src=0, group=group, label="read").tolist()).decode()


def keep_first(file: Path | None, write: Callable[[Path], None], *, group: ProcessGroup) -> None:
    """Have rank 0 write a file, if it has a name.

    Comm:  one `comm.agree`.

    Raises:
        ValueError: what rank 0's writing raised.
    """
    with agreed(group):
        if file is not None and group.rank() == 0:
            write(file)
