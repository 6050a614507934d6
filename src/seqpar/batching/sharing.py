"""What rank 0 says, on every rank: objects of the host, between the steps."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup

__all__ = ["share"]

_FIRST = 4096  # bytes of the message that always travels; what is longer sends the rest in a second one
_LENGTH = 8


def share(said: Any, *, group: ProcessGroup) -> Any:
    """Rank 0's object, a copy on the others.

    Comm:  a broadcast of 4 KB; of a longer object a second one.

    Args:
        said: anything that can be pickled; the other ranks' is not looked at.
        group: the ranks.
    """
    if group.size() == 1:
        return said
    content = b""
    if group.rank() == 0:
        content = pickle.dumps(said)
        content = len(content).to_bytes(_LENGTH, "little") + content
    first = _broadcast(content[:_FIRST].ljust(_FIRST, b"\0"), group)
    size = _LENGTH + int.from_bytes(first[:_LENGTH], "little")
    rest = _broadcast(content[_FIRST:].ljust(size - _FIRST, b"\0"), group) if size > _FIRST else b""
    return said if group.rank() == 0 else pickle.loads((first + rest)[_LENGTH:size])


def _broadcast(content: bytes, group: ProcessGroup) -> bytes:
    on_cpu = torch.device("cpu") in group._device_types
    sent: UInt8[Tensor, " n"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    device = torch.device("cpu" if on_cpu else "cuda")
    return bytes(comm.broadcast(sent.to(device), src=0, group=group, label="share").tolist())
