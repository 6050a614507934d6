"""Checks that ranks could answer differently, answered together, so that they raise instead of hang."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from seqpar.comm.collectives import all_gather_async, broadcast_async

__all__ = ["agree", "device_of"]


def device_of(group: ProcessGroup) -> torch.device:
    """Where a few integers are exchanged over a group: the CPU, where it can."""
    return torch.device("cpu") if torch.device("cpu") in group._device_types else torch.device("cuda")


def agree(error: str | ValueError | TypeError | None, *, group: ProcessGroup) -> None:
    """Raise the error of the first rank that has one, on all ranks; return where none has.

    Args:
        error: what is wrong on this rank: an exception, or the message of a ValueError.
        group: the ranks that check together.

    Comm:  three integers per rank; only with an error also its message.

    Raises:
        ValueError, TypeError: some rank passed an error.
    """
    if group.size() == 1:
        if error is not None:
            raise error if isinstance(error, Exception) else ValueError(error)
        return
    device = device_of(group)
    message = str(error or "").encode()
    mine = torch.tensor([[error is not None, isinstance(error, TypeError), len(message)]], dtype=torch.int64)
    states = all_gather_async(mine.to(device), group=group, label="agree").wait().tolist()
    first = next((rank for rank, (failed, _, _) in enumerate(states) if failed), None)
    if first is None:
        return
    _, is_type, length = states[first]
    text = torch.tensor(list(message) if first == group.rank() else [0] * length, dtype=torch.uint8)
    text = broadcast_async(text.to(device), src=first, group=group, label="agree").wait()
    raise (TypeError if is_type else ValueError)(bytes(text.tolist()).decode())
