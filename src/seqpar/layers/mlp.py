"""The gated MLP of the Llama family, sharded over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps, Wire
from seqpar.kernels import swiglu
from seqpar.layers.base import check_covered, drop_child_names, find_layout, part_of
from seqpar.layers.linear import GateUpParallelLinear, RowParallelLinear, Tokens, enter_steps
from seqpar.partition import Layout

__all__ = ["ParallelMLP"]


class ParallelMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with the hidden dim split over the group.

    Args:
        hidden_size: M.
        intermediate_size: F; it need not divide.
        group: the tensor-parallel ranks.
        sp: flat blocks in this shard (`seqpar.layers.linear`).
        bias: whether the three projections have one.
        sequence_sharded: x holds T/p tokens of each rank; an all-gather before and a reduce-scatter after replace the
            all-reduce.
        wire: the format in which they send; see `seqpar.comm.wire`.
    """

    label: str = ""
    unnamed: ClassVar[tuple[str, ...]] = ("gate_up_proj",)
    segments: ClassVar[tuple[str, ...]] = ("activate",)
    activate = staticmethod(swiglu)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        group: ProcessGroup,
        sp: int = 1,
        bias: bool = False,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kwargs: dict[str, Any] = {
            "group": group,
            "sp": sp,
            "bias": bias,
            "sequence_sharded": sequence_sharded,
            "wire": wire,
            "device": device,
            "dtype": dtype,
        }
        self._build(
            GateUpParallelLinear(hidden_size, intermediate_size, **kwargs),
            RowParallelLinear(intermediate_size, hidden_size, **kwargs),
        )

    def _build(self, gate_up_proj: GateUpParallelLinear, down_proj: RowParallelLinear) -> None:
        super().__init__()
        self.gate_up_proj: nn.Module = gate_up_proj
        self.down_proj: nn.Module = down_proj
        self.sequence_sharded, self.wire = gate_up_proj.sequence_sharded, gate_up_proj.wire
        gate_up_proj.enters = False
        place = _Place(gate_up_proj.group, gate_up_proj.blocks())
        self.places: dict[Layout | None, _Place] = {None: place, gate_up_proj.layout: place}
        drop_child_names(self, self.unnamed)

    @classmethod
    def from_module(
        cls,
        mlp: nn.Module,
        *,
        group: ProcessGroup,
        sp: int = 1,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
    ) -> ParallelMLP:
        """Slice an MLP with `gate_proj`, `up_proj` and `down_proj` linears and a SiLU between them.

        Raises:
            TypeError: one of the linears is missing.
            ValueError: it has other parameters too, or an `act_fn` that is no SiLU.
        """
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (part for part in parts)
        if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            raise TypeError(f"`mlp` must have linear gate_proj, up_proj and down_proj, got {type(mlp).__name__}")
        check_activation(getattr(mlp, "act_fn", F.silu))
        new = cls.__new__(cls)
        options: dict[str, Any] = {"group": group, "sp": sp, "sequence_sharded": sequence_sharded, "wire": wire}
        new._build(
            GateUpParallelLinear.from_linears(gate, up, **options), RowParallelLinear.from_linear(down, **options)
        )
        check_covered(mlp, new)
        return new

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """Make `steps(x, layout=layout)` available over `group`, on views of the stored weights.

        Raises:
            ValueError: a layout that the stored one does not reach, or a group of another one.
            TypeError: a part that is wrapped.
        """
        gate_up = part_of(self, "gate_up_proj", GateUpParallelLinear)
        down = part_of(self, "down_proj", RowParallelLinear)
        gate_up.add_layout(layout, group=group)
        down.add_layout(layout, group=group)
        self.places[layout] = _Place(group, gate_up.blocks(layout))

    def steps(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Steps[Float[Tensor, "t m"]]:
        """See `forward`; yields where its linears do."""
        comm.refuse_dtensor(x, "x")
        group, blocks = find_layout(self.places, layout)
        options = given(layout=layout)
        x = yield from enter_steps(
            x,
            group=group,
            sequence_sharded=self.sequence_sharded,
            num_tokens=num_tokens,
            label=self.label,
            wire=self.wire,
        )
        gate_up = yield from comm.call(self.gate_up_proj, x, **options)
        hidden = self.activate(gate_up, blocks, consume=comm.splits(self.gate_up_proj))  # else a hook may have kept it
        uneven = given(num_tokens=num_tokens if isinstance(num_tokens, tuple) else None)
        out: Tensor = yield from comm.call(self.down_proj, hidden, **options, **uneven)
        return out

    def forward(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Float[Tensor, "t m"]:
        """Apply the MLP.

        In, Out: x[T, M], replicated over the group; [T/p, M] when sequence-sharded.
        Grad:  replicated (or sequence-sharded), as `x` is.
        Comm:  one all-reduce of T*M elements (or an all-gather and a reduce-scatter).
        """
        return comm.run(self.steps(x, layout=layout, num_tokens=num_tokens))


class _Place(NamedTuple):
    """The tensor-parallel group of a layout, and the sizes of the g, u blocks in its product."""

    group: ProcessGroup
    blocks: tuple[int, ...]


def check_activation(act_fn: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError unless `act_fn` is a SiLU, by its values."""
    probe = torch.linspace(-4, 4, 9)
    if not torch.allclose(act_fn(probe), F.silu(probe)):
        raise ValueError(f"`act_fn` must be a SiLU, got {act_fn}")


def given(**options: Any) -> dict[str, Any]:
    """The options that are set, so that a wrapped child which knows none of them is called with `x` alone."""
    return {name: value for name, value in options.items() if value is not None}
