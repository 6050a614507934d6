"""Where PyTorch's DTensor meets this library.

Layers take and give plain tensors, what one rank holds, and know themselves how it is placed: a DTensor is refused by
name, before a collective that the other ranks would wait in. Inside they meet one in one place: FSDP keeps parameters
and gradients as DTensors between calls, and what is done with a gradient then is done with this rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_dtensor", "on_shards", "on_whole", "refuse_dtensor"]


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Whether `x` is a DTensor."""
    if type(x) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # who has none need not pay for the import

    return isinstance(x, DTensor)


def refuse_dtensor(x: object, name: str, remedy: str = "pass `.to_local()` of one that is placed so") -> None:
    """Check that an argument is a plain tensor.

    Raises:
        TypeError: it is a DTensor.
    """
    if is_dtensor(x):
        placements = ", ".join(map(str, x.placements))
        raise TypeError(f"`{name}` must be this rank's own tensor, got a DTensor ({placements}); {remedy}")


def on_shards(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of `x`, or of this rank's shard where `x` is a DTensor, placed as `x` is.

    Args:
        x: a tensor.
        change: keeps the shape, and does to each number what it does to the others.
    """
    if not is_dtensor(x):
        return change(x)
    from torch.distributed.tensor import DTensor

    shard = change(x.to_local())
    return DTensor.from_local(shard, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def on_whole(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of the whole of `x`, placed as `x` is.

    Comm:  of a DTensor, an all-gather over its mesh.

    Args:
        x: a tensor.
        change: keeps the shape.
    """
    if not is_dtensor(x):
        return change(x)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(change(x.full_tensor()), x.device_mesh, x.placements, src_data_rank=None)
