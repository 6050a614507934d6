"""Linear layers sharded over a tensor-parallel group, stored so that finer layouts are views of the same rows.

Every dimension is split over the flat order of all ranks (`seqpar.partition`), also when the layer is built for one
group: `sp` says how many flat blocks a shard holds. The slice that a layout with a larger `tp` needs is then one
contiguous view of the stored rows (columns, for the row-parallel layer), or two where KV heads are shared between
ranks; `add_layout` records it and `steps(x, layout=...)` uses it. Shifting moves no bytes and stores none twice, where
Shift Parallelism (arXiv:2509.16495) keeps a second copy of the weights of 1/SP the size.

Source: column- and row-parallel products are Megatron-LM's (arXiv:1909.08053), the sequence-sharded form is
arXiv:2205.05198's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm, kernels
from seqpar.comm import Groups, ProcessGroup, Steps, Wire
from seqpar.kernels.quantize import check_wire
from seqpar.layers.base import ShardedModule, Source, check_gradients, check_new, check_view, find_layout
from seqpar.partition import HeadMap, Layout, Piece, Range, block_ranges, even_split, shard_range

__all__ = ["ColumnParallelLinear", "GateUpParallelLinear", "QKVParallelLinear", "RowParallelLinear", "Shard"]


Sharded = TypeVar("Sharded", bound="_ShardedLinear")


CALL = "FSDP shards it between calls: call the module that it was given, by `forward`"

Tokens: TypeAlias = int | tuple[int, ...]
"""T tokens, shared out by `even_split`, or how many each rank holds."""


class Shard(NamedTuple):
    """What a layer uses in one layout: the group, and which ranges of the stored rows or columns."""

    group: ProcessGroup
    views: tuple[Range, ...]


class _ShardedLinear(ShardedModule):
    """Parameters, layouts and checks that the column- and the row-parallel linears share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        bias: int | None,
        *,
        group: ProcessGroup,
        sp: int,
        sequence_sharded: bool,
        wire: Wire | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.wire = wire
        self.group = group
        self.layout = Layout(group.size(), sp).check()
        self.sequence_sharded = sequence_sharded
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        check_wire(wire, self.weight, "weight")
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias, device=device, dtype=dtype))
        self.shards: dict[Layout, Shard] = {self.layout: Shard(group, self._views(self.layout, group.rank()))}

    @property
    def shard_group(self) -> ProcessGroup:
        return self.group

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """Let `steps(x, layout=layout)` run over `group`, on views of the weights that are stored.

        Raises:
            ValueError: the stored rows do not contain that layout's, or `group` has another size than its tp.
        """
        check_view(self.layout, self.group.rank(), layout, group)
        self.shards[layout] = Shard(group, self._views(layout, group.rank()))

    def reset_parameters(self) -> None:
        """Draw the parameters that the unsharded `nn.Linear` would draw from the same random state, and slice them.

        Every rank must hold the same random state, or the shards belong to different layers.
        """
        sources = self.sources()
        for name, source in sources.items():
            if not self._parameter(source.param).is_meta:
                weight = sources[name.removesuffix("bias") + "weight"] if name.endswith("bias") else source
                full = torch.empty(source.shape, dtype=self.weight.dtype, device=self.weight.device)
                bound = 1 / math.sqrt(weight.shape[1])
                self.load_source(name, nn.init.uniform_(full, -bound, bound))

    def _views(self, layout: Layout, rank: int) -> tuple[Range, ...]:
        raise NotImplementedError

    def _shard(self, layout: Layout | None) -> Shard:
        return find_layout(self.shards, self.layout if layout is None else layout)

    def _check(self, x: Tensor, features: int) -> None:
        comm.refuse_dtensor(x, "x")
        comm.refuse_dtensor(self.weight, "weight", CALL)
        if x.ndim != 2 or x.shape[1] != features:
            raise ValueError(f"`x` must have shape [T, {features}], got {list(x.shape)}")
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"`x` must have the layer's dtype ({self.weight.dtype}), got {x.dtype}")

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return (
            f"in_features={columns}, out_features={rows}, bias={self.bias is not None}, "
            f"layouts={[tuple(layout) for layout in self.shards]}, sequence_sharded={self.sequence_sharded}"
            + (f", wire={self.wire}" if self.wire else "")
        )


class _ColumnParallel(_ShardedLinear):
    """Output rows sharded over the group; subclasses say which rows, in which order.

    Attributes:
        enters: the layer itself gathers its input, and sums the gradient of it. A parent that does both before it calls
            the layer sets this to False, so that a wrapper around the layer may read the input too.
    """

    enters = True

    def steps(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: int | None = None
    ) -> Steps[Float[Tensor, "t_out rows"]]:
        """See `forward`; yields at the gather of a sequence-sharded input and nowhere else."""
        shard = self._shard(layout)
        self._check(x, self.weight.shape[1])
        if self.enters:
            x = yield from enter_steps(
                x,
                group=shard.group,
                sequence_sharded=self.sequence_sharded,
                num_tokens=num_tokens,
                label=self.label,
                wire=self.wire,
            )
        if layout is None or layout == self.layout:
            return kernels.linear(x, self.weight, self.bias)
        parts = [kernels.linear(x, *self._rows(view)) for view in shard.views]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def forward(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: int | None = None
    ) -> Float[Tensor, "t_out rows"]:
        """Multiply by this rank's rows.

        In:    x[T, M], replicated over the group; x[T/p, M] by `even_split` when sequence-sharded.
        Out:   [T, F/p], in the stored order of rows.
        Grad:  all-reduced (reduce-scattered when sequence-sharded): replicated, as `x` is.
        Comm:  none forward; an all-gather of T*M elements when sequence-sharded. The reverse backward.

        Args:
            x: activations, in the layer's dtype.
            layout: one of `shards`; the stored layout by default.
            num_tokens: T, which a sequence-sharded layer needs: a rank cannot know how many tokens the others hold.

        Raises:
            ValueError, TypeError: a shape, dtype or layout that is not the layer's.
        """
        return comm.run(self.steps(x, layout=layout, num_tokens=num_tokens))

    def weights(self, layout: Layout) -> list[Tensor]:
        return [part for view in self._shard(layout).views for part in self._rows(view) if part is not None]

    def _rows(self, rows: Range) -> tuple[Tensor, Tensor | None]:
        """Some rows of the stored weight and of the bias."""
        part = slice(*rows)
        return self.weight[part], None if self.bias is None else self.bias[part]


def enter_steps(
    x: Float[Tensor, "t m"],
    *,
    group: ProcessGroup,
    sequence_sharded: bool,
    num_tokens: Tokens | None,
    label: str,
    wire: Wire | None = None,
) -> Steps[Float[Tensor, "t_all m"]]:
    """Make activations ready for products with sharded rows: gather them, or take them as they are.

    In:    x[T, M], replicated over the group; x[T/p, M] by `even_split` when sequence-sharded, or by `num_tokens`.
    Out:   [T, M], replicated.
    Grad:  partial; all-reduced, or reduce-scattered, to the placement of `x`.

    Raises:
        ValueError: sequence-sharded, and `num_tokens` (T) is not given or not what `x` is a share of.
    """
    if not sequence_sharded:
        return comm.reduce_grad(x, group=group, label=label)
    if num_tokens is None:
        raise ValueError(
            "`num_tokens` must be given to a sequence-sharded layer, got None; a rank cannot know how many tokens the "
            "others hold"
        )
    sizes = even_split(num_tokens, group.size()) if isinstance(num_tokens, int) else num_tokens
    return (yield from comm.all_gather_steps(x, group=group, sizes=sizes, label=label, wire=wire))


class ColumnParallelLinear(_ColumnParallel):
    """A linear layer whose output rows are split over the group.

    Args:
        in_features: M of the unsharded layer.
        out_features: F of the unsharded layer; it need not divide.
        group: the tensor-parallel ranks.
        sp: flat blocks in this shard, so that a layout with `tp * sp` ranks finds its rows (see the module).
        bias: whether there is one, sharded with the rows.
        sequence_sharded: the input holds T/p tokens of each rank and is gathered first.
        wire: the format in which that gather sends; see `seqpar.comm.wire`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup,
        sp: int = 1,
        bias: bool = True,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_new(dtype, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        rows = shard_range(out_features, Layout(group.size(), sp).check(), group.rank()).size
        super().__init__(
            (rows, in_features),
            rows if bias else None,
            group=group,
            sp=sp,
            sequence_sharded=sequence_sharded,
            wire=wire,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group: ProcessGroup,
        sp: int = 1,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
    ) -> ColumnParallelLinear:
        """Slice an ordinary linear layer; every rank passes the same one."""
        return _filled(
            lambda: cls(
                linear.in_features,
                linear.out_features,
                group=group,
                sp=sp,
                bias=linear.bias is not None,
                sequence_sharded=sequence_sharded,
                wire=wire,
                device="meta",
                dtype=linear.weight.dtype,
            ),
            {"": linear},
        )

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        rows = shard_range(self.out_features, self.layout, self.group.rank() if rank is None else rank)
        piece = (Piece(0, Range(0, rows.size), rows),)
        found = {"weight": Source((self.out_features, self.in_features), "weight", piece)}
        return found if self.bias is None else found | {"bias": Source((self.out_features,), "bias", piece)}

    def _views(self, layout: Layout, rank: int) -> tuple[Range, ...]:
        stored = shard_range(self.out_features, self.layout, self.group.rank())
        return (shard_range(self.out_features, layout, rank).shift(-stored.start),)


class QKVParallelLinear(_ColumnParallel):
    """The query, key and value projections as one product, sharded by heads.

    Rows follow `HeadMap.storage`: what each sequence rank will own lies together (q heads, then k0 v0 k1 v1 ...), or,
    where KV heads are replicated, all query rows and then all k, v pairs. KV heads that several ranks' query heads read
    are stored by each of them; their gradients are partial until `sync_gradients`.

    Args:
        in_features: M of the unsharded layers.
        heads: who owns which heads; its tp must be the size of `group`.
        head_dim: rows per head.
        group: the tensor-parallel ranks.
        bias: whether q, k and v have one (Qwen2).
        sequence_sharded: the input holds T/p tokens of each rank and is gathered first.
        wire: the format in which that gather sends; see `seqpar.comm.wire`.
    """

    def __init__(
        self,
        in_features: int,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        bias: bool = False,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if heads.tp != group.size():
            raise ValueError(f"`heads.tp` must be the group size ({group.size()}), got {heads.tp}")
        check_new(dtype, in_features=in_features, head_dim=head_dim)
        self.in_features, self.heads, self.head_dim = in_features, heads, head_dim
        rows = heads.width(group.rank()) * head_dim
        super().__init__(
            (rows, in_features),
            rows if bias else None,
            group=group,
            sp=heads.sp,
            sequence_sharded=sequence_sharded,
            wire=wire,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @classmethod
    def from_linears(
        cls,
        q_proj: nn.Linear,
        k_proj: nn.Linear,
        v_proj: nn.Linear,
        *,
        heads: HeadMap,
        group: ProcessGroup,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
    ) -> QKVParallelLinear:
        """Fuse and slice three ordinary projections; every rank passes the same ones."""
        linears = {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj}
        head_dim = _head_dim(linears, heads)
        return _filled(
            lambda: cls(
                q_proj.in_features,
                heads,
                head_dim,
                group=group,
                bias=q_proj.bias is not None,
                sequence_sharded=sequence_sharded,
                wire=wire,
                device="meta",
                dtype=q_proj.weight.dtype,
            ),
            linears,
        )

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        tp_rank = self.group.rank() if rank is None else rank
        found: dict[str, Source] = {}
        counts: dict[Literal["q", "k", "v"], int] = {
            "q": self.heads.num_heads,
            "k": self.heads.num_kv_heads,
            "v": self.heads.num_kv_heads,
        }
        for which, count in counts.items():
            pieces = self.heads.pieces(tp_rank, which, self.head_dim)
            found[f"{which}_proj.weight"] = Source((count * self.head_dim, self.in_features), "weight", pieces)
            if self.bias is not None:
                found[f"{which}_proj.bias"] = Source((count * self.head_dim,), "bias", pieces)
        return found

    def sync_gradients(self, groups: Groups) -> None:
        super().sync_gradients(groups)
        stored = sum(self.heads.kv_shard(tp_rank).size for tp_rank in range(self.heads.tp))
        if stored > self.heads.num_kv_heads:
            for param in self.parameters(recurse=False):
                if param.requires_grad:
                    self._sum_replicated_kv(param)

    def _sum_replicated_kv(self, param: nn.Parameter) -> None:
        """Add up the gradients of k and v rows that several tensor-parallel ranks store."""
        assert param.grad is not None
        param.grad = comm.on_whole(param.grad, self._replicated_kv_summed)

    def _replicated_kv_summed(self, grad: Tensor) -> Tensor:
        """The gradient of all stored rows, in which those of k and v are sums over the ranks that store them too."""
        total = grad.new_zeros(2 * self.heads.num_kv_heads * self.head_dim, *grad.shape[1:])
        pieces: list[tuple[Range, Range]] = []
        kinds: tuple[Literal["k", "v"], ...] = ("k", "v")
        for i, which in enumerate(kinds):
            offset = i * self.heads.num_kv_heads * self.head_dim
            mine = self.heads.pieces(self.group.rank(), which, self.head_dim)
            pieces += [(piece.local, piece.full.shift(offset)) for piece in mine]
        for local, full in pieces:
            total[slice(*full)] = grad[slice(*local)]
        total = comm.all_reduce(total, group=self.group, label=f"{self.label}.grad")
        for local, full in pieces:
            grad[slice(*local)] = total[slice(*full)]
        return grad

    def _views(self, layout: Layout, rank: int) -> tuple[Range, ...]:
        views = self.heads.views(self.group.rank(), layout, rank)
        return tuple(view.scale(self.head_dim) for view in views)


class GateUpParallelLinear(_ColumnParallel):
    """The gate and up projections of a gated MLP as one product.

    Rows are stored g0 u0 g1 u1 ... by flat block, so that the slice of any layout with a larger tp is one view;
    `blocks(layout)` gives the block sizes that `kernels.swiglu` needs to pair them.

    Args:
        in_features: M of the unsharded layers.
        out_features: F of each of the two; it need not divide.
        group: the tensor-parallel ranks.
        sp: flat blocks in this shard.
        bias: whether gate and up have one.
        sequence_sharded: the input holds T/p tokens of each rank and is gathered first.
        wire: the format in which that gather sends; see `seqpar.comm.wire`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup,
        sp: int = 1,
        bias: bool = False,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_new(dtype, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        rows = 2 * shard_range(out_features, Layout(group.size(), sp).check(), group.rank()).size
        super().__init__(
            (rows, in_features),
            rows if bias else None,
            group=group,
            sp=sp,
            sequence_sharded=sequence_sharded,
            wire=wire,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @classmethod
    def from_linears(
        cls,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        *,
        group: ProcessGroup,
        sp: int = 1,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
    ) -> GateUpParallelLinear:
        """Fuse and slice two ordinary projections; every rank passes the same ones."""
        return _filled(
            lambda: cls(
                gate_proj.in_features,
                gate_proj.out_features,
                group=group,
                sp=sp,
                bias=gate_proj.bias is not None,
                sequence_sharded=sequence_sharded,
                wire=wire,
                device="meta",
                dtype=gate_proj.weight.dtype,
            ),
            {"gate_proj": gate_proj, "up_proj": up_proj},
        )

    def blocks(self, layout: Layout | None = None) -> tuple[int, ...]:
        """Sizes of the g, u blocks in the output under `layout` (default: the stored one)."""
        layout = self.layout if layout is None else layout
        return tuple(block.size for block in block_ranges(self.out_features, layout, self._shard(layout).group.rank()))

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        tp_rank = self.group.rank() if rank is None else rank
        found: dict[str, Source] = {}
        for which, name in enumerate(("gate_proj", "up_proj")):
            pieces = self._pieces(tp_rank, which)
            found[f"{name}.weight"] = Source((self.out_features, self.in_features), "weight", pieces)
            if self.bias is not None:
                found[f"{name}.bias"] = Source((self.out_features,), "bias", pieces)
        return found

    def _pieces(self, tp_rank: int, which: int) -> tuple[Piece, ...]:
        blocks = block_ranges(self.out_features, self.layout, tp_rank)
        first = blocks[0].start
        return tuple(
            Piece(0, Range(0, block.size).shift(2 * (block.start - first) + which * block.size), block)
            for block in blocks
        )

    def _views(self, layout: Layout, rank: int) -> tuple[Range, ...]:
        stored = shard_range(self.out_features, self.layout, self.group.rank())
        return (shard_range(self.out_features, layout, rank).shift(-stored.start).scale(2),)


class RowParallelLinear(_ShardedLinear):
    """A linear layer whose input columns are split over the group and whose outputs are summed.

    Args:
        in_features: F of the unsharded layer; it need not divide.
        out_features: M of the unsharded layer.
        group: the tensor-parallel ranks.
        sp: flat blocks in this shard.
        bias: whether there is one; it is replicated and added once, after the sum.
        sequence_sharded: the output is reduce-scattered by tokens instead of all-reduced.
        wire: the format in which the sum travels; see `seqpar.comm.wire`.
        unit: columns that stay together: head_dim where the input comes from attention heads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup,
        sp: int = 1,
        bias: bool = True,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        unit: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_new(dtype, in_features=in_features, out_features=out_features, unit=unit)
        if in_features % unit:
            raise ValueError(f"`in_features` must be a multiple of `unit` ({unit}), got {in_features}")
        self.in_features, self.out_features, self.unit = in_features, out_features, unit
        columns = self._columns(Layout(group.size(), sp).check(), group.rank()).size
        super().__init__(
            (out_features, columns),
            out_features if bias else None,
            group=group,
            sp=sp,
            sequence_sharded=sequence_sharded,
            wire=wire,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group: ProcessGroup,
        sp: int = 1,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        unit: int = 1,
    ) -> RowParallelLinear:
        """Slice an ordinary linear layer; every rank passes the same one."""
        return _filled(
            lambda: cls(
                linear.in_features,
                linear.out_features,
                group=group,
                sp=sp,
                bias=linear.bias is not None,
                sequence_sharded=sequence_sharded,
                wire=wire,
                unit=unit,
                device="meta",
                dtype=linear.weight.dtype,
            ),
            {"": linear},
        )

    def steps(
        self, x: Float[Tensor, "t f"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Steps[Float[Tensor, "t_out m"]]:
        """See `forward`; yields once, at the reduction."""
        group = self._shard(layout).group
        check_gradients((self.bias,), layout, self.layout)
        partial = self.partial(x, layout=layout)
        if self.sequence_sharded:
            sizes = num_tokens if isinstance(num_tokens, tuple) else even_split(x.shape[0], group.size())
            out = yield from comm.reduce_scatter_steps(
                partial, group=group, sizes=sizes, label=self.label, wire=self.wire
            )
        else:
            out = yield from comm.all_reduce_steps(partial, group=group, label=self.label, wire=self.wire)
        return out if self.bias is None else out + self.bias

    def partial(self, x: Float[Tensor, "t f"], *, layout: Layout | None = None) -> Float[Tensor, "t m"]:
        """This rank's summand, without the bias, for a caller that sums: `comm.all_reduce_norm` with what follows."""
        (view,) = self._shard(layout).views
        self._check(x, view.size)
        return kernels.linear(x, self._view(view))

    def forward(
        self, x: Float[Tensor, "t f"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Float[Tensor, "t_out m"]:
        """Multiply this rank's columns and sum over the group.

        In:    x[T, F/p], this rank's columns.
        Out:   [T, M], replicated; [T/p, M] by `even_split` when sequence-sharded.
        Grad:  of `x`: its columns' (no communication forward of the replicated output gradient).
        Comm:  an all-reduce of T*M elements, or a reduce-scatter.

        Args:
            x: activations, in the layer's dtype.
            layout: one of `shards`; the stored layout by default.
            num_tokens: how many tokens each rank gets of a sequence-sharded result, where that is no even split.

        Raises:
            ValueError, TypeError: a shape, dtype or layout that is not the layer's.
        """
        return comm.run(self.steps(x, layout=layout, num_tokens=num_tokens))

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        columns = self._columns(self.layout, self.group.rank() if rank is None else rank)
        piece = (Piece(1, Range(0, columns.size), columns),)
        found = {"weight": Source((self.out_features, self.in_features), "weight", piece)}
        return found if self.bias is None else found | {"bias": Source.whole((self.out_features,), "bias")}

    def weights(self, layout: Layout) -> list[Tensor]:
        bias = [] if self.bias is None else [self.bias]
        return [self._view(view) for view in self._shard(layout).views] + bias

    def _view(self, columns: Range) -> Tensor:
        """Some columns of the stored weight, which all are the weight itself."""
        return self.weight if columns.size == self.weight.shape[1] else self.weight[:, slice(*columns)]

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        if param == "bias" and self.sequence_sharded:
            return groups.tp, groups.sp
        return (groups.sp,)

    def _columns(self, layout: Layout, rank: int) -> Range:
        return shard_range(self.in_features // self.unit, layout, rank).scale(self.unit)

    def _views(self, layout: Layout, rank: int) -> tuple[Range, ...]:
        return (self._columns(layout, rank).shift(-self._columns(self.layout, self.group.rank()).start),)


def _filled(build: Callable[[], Sharded], linears: Mapping[str, nn.Linear]) -> Sharded:
    """Build a layer on the meta device and slice the given ones into it (meta ones leave it there)."""
    first = next(iter(linears.values()))
    for name, linear in linears.items():
        if _kind(linear) != _kind(first):
            raise ValueError(
                f"`{name}` must have the input features, bias, dtype and requires_grad of the others {_kind(first)}, "
                f"got {_kind(linear)}"
            )
    layer = build()
    prefixes = {name: f"{name}." if name else "" for name in linears}
    layer.load_unsharded(
        {
            prefixes[name] + which: tensor
            for name, linear in linears.items()
            for which, tensor in linear.named_parameters(recurse=False)
        }
    )
    for which, param in first.named_parameters(recurse=False):
        getattr(layer, which).requires_grad_(param.requires_grad)
    return layer


def _kind(linear: nn.Linear) -> tuple[int, bool, torch.dtype, tuple[bool, ...]]:
    """What fused linears must have in common."""
    trained = tuple(param.requires_grad for param in linear.parameters())
    return linear.in_features, linear.bias is not None, linear.weight.dtype, trained


def _head_dim(linears: Mapping[str, nn.Linear], heads: HeadMap) -> int:
    """Rows per head, the same in all three projections."""
    counts = {"q_proj": heads.num_heads, "k_proj": heads.num_kv_heads, "v_proj": heads.num_kv_heads}
    head_dim = linears["q_proj"].out_features // heads.num_heads
    for name, linear in linears.items():
        if linear.out_features != counts[name] * head_dim:
            raise ValueError(
                f"`{name}` must have {counts[name]} heads x {head_dim} rows, got {linear.out_features} rows; "
                "do `heads` belong to this layer?"
            )
    return head_dim
