"""What PyTorch was built to communicate with."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["backends"]


def backends() -> tuple[str, ...]:
    """Names of the backends that process groups can have here."""
    return tuple(name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if dist.is_backend_available(name))
