"""Parameters with an entry for each query head, placed as the heads are.

A rank owns the same query heads under every layout of the same ranks (`HeadMap.q_ranges`, by flat rank), and sees all
tokens of them. So an entry is stored once in all, by the rank that uses it; a shift moves none, and no gradient needs a
sum. That is another placement than that of the projections, which sequence ranks hold a tensor-parallel shard of.

Rings have more ranks than a model may have heads, and each of them computes all heads of its shard. For those the map
is split over tensor-parallel ranks alone, and the sequence ranks hold the same entries, as they do of projections.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar.comm import Groups, ProcessGroup
from seqpar.layers.base import ShardedModule, Source, check_new
from seqpar.partition import HeadMap, Piece, Range

__all__ = ["HeadParameter"]


class HeadParameter(ShardedModule):
    """One parameter with an entry, or a row, for each query head, of which a rank stores its own heads'.

    Attention sinks are one; a slope or a scale of each head would be another. Called, it returns this rank's entries.

    Args:
        name: what the tensor is called in the unsharded layer.
        heads: who owns which heads.
        shape: of one entry.
        group: all ranks of `heads`, in flat order: `Groups.flat`, or `Groups.tp` for a map that is split over tp alone.

    Raises:
        ValueError: `group` has another size than `heads`.
    """

    def __init__(
        self,
        name: str,
        heads: HeadMap,
        *,
        group: ProcessGroup,
        shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_new(dtype, shape=min(shape, default=1))
        if group.size() != heads.size:
            raise ValueError(f"`group` must be all {heads.size} ranks of `heads`, got {group.size()}; pass groups.flat")
        self.name, self.heads, self.shape, self.group = name, heads, shape, group
        own = heads.q_ranges[group.rank()].size
        self.weight = nn.Parameter(torch.zeros(own, *shape, device=device, dtype=dtype))

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor, *, heads: HeadMap, group: ProcessGroup) -> HeadParameter:
        """Slice an unsharded parameter; every rank passes the same one, which may be on the meta device.

        Raises:
            ValueError: it has not one entry for each head.
        """
        new = cls(name, heads, group=group, shape=tuple(tensor.shape[1:]), device="meta", dtype=tensor.dtype)
        new.load_unsharded({name: tensor})
        new.weight.requires_grad_(tensor.requires_grad)
        return new

    def forward(self) -> Float[Tensor, "h_local *entry"]:
        return self.weight

    @property
    def shard_group(self) -> ProcessGroup:
        return self.group

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        rank = self.group.rank() if rank is None else rank
        if not 0 <= rank < self.heads.size:
            raise ValueError(f"`rank` must lie in [0, {self.heads.size}), got {rank}")
        own = self.heads.q_ranges[rank]
        pieces = (Piece(0, Range(0, own.size), own),)
        return {self.name: Source((self.heads.num_heads, *self.shape), "weight", pieces)}

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        return () if self.heads.size == groups.layout.size else (groups.sp,)

    def extra_repr(self) -> str:
        return f"{self.name}, {tuple(self.weight.shape)} of {(self.heads.num_heads, *self.shape)}"
