"""Which implementation an entry runs: chosen by name, or by device and dtype in a way that can be asked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Backend", "choose_backend", "unknown_backend", "wants_grad"]

Backend = Literal["auto", "torch", "reference"]


def choose_backend(op: str, device: torch.device, dtype: torch.dtype) -> Literal["torch", "reference"]:
    """The backend that `backend="auto"` stands for.

    PyTorch's fused operators serve everything but float64 attention on a GPU, for which there are none.
    """
    if op == "attention" and device.type == "cuda" and dtype == torch.float64:
        return "reference"
    return "torch"


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unknown_backend(backend: str) -> ValueError:
    return ValueError(f'`backend` must be one of "auto", "torch", "reference", got {backend!r}')
