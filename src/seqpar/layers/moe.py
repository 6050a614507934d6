"""A mixture of experts as the feed-forward of a decoder layer, sharded over `tp` or over all ranks.

There are two placements of the experts. "tp": every rank holds a slice of each, as `ParallelMLP` holds one of its MLP,
and the ranks of a `tp` group compute the same tokens and sum. "ep" (expert parallel): every rank of the mesh owns whole
experts, the tokens that a `tp` group replicates are shared out among it, and each goes to the owners of its experts and
comes back. In both a layout with a larger `tp` runs on the same storage: on strided views of the slices, or on the
experts as they are.

What "ep" sends grows with a rank's own tokens, T / (tp * sp), and the experts of each; what "tp" sends, with T / sp.
Its price is that ranks whose experts are asked for more than others' work longer, and that the host has to learn the
counts before the rows can travel.

Each token is sent once for each of its experts, also where one rank owns several of them. Sending it once for each rank
and summing there would save bytes where K is large against the number of ranks, and make the sum of a token depend on
who owns what: here a token's own rank adds what its experts give in the order in which it chose them.

Source: the all-to-all form is GShard's (arXiv:2006.16668); without a capacity, so that no token is dropped.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seqpar import comm, kernels
from seqpar.comm import Groups, ProcessGroup, Steps, Wire
from seqpar.kernels.quantize import check_wire
from seqpar.layers.base import (
    ShardedModule,
    Source,
    check_covered,
    check_gradients,
    check_new,
    check_view,
    find_layout,
    part_of,
)
from seqpar.layers.linear import Tokens, enter_steps
from seqpar.layers.mlp import check_activation, given
from seqpar.partition import Layout, Piece, Range, block_ranges, even_ranges, even_split, shard_range

__all__ = ["ExpertPlacement", "ParallelMoE", "is_mixture"]

ExpertPlacement: TypeAlias = Literal["tp", "ep"]
"""Where experts are: a slice of each on every rank, or each on one."""


class ParallelMoE(nn.Module):
    """The weighted sum of the gated MLPs that a router picks for each token.

    Comm:  for T tokens of this sequence rank (all tp ranks hold them), b bytes a number, P = tp * sp ranks:
           "tp": an all-reduce over `tp`, 2 * (tp-1)/tp * T*M*b; an all-gather and a reduce-scatter of as much in all
           when sequence-sharded.
           "ep": over all ranks, 8 bytes for every expert of another rank; M*b there for every token and expert of this
           rank's T/tp tokens that another rank owns (T/tp * K * (P-1)/P * M*b where routing is even), and M*b back for
           every one that came from another rank; then an all-gather over `tp`, T/tp * M*b to tp-1 others, none when
           sequence-sharded. In a `wire` format rows of M numbers take M + 2*ceil(M/64) bytes, everywhere but in the
           sum over `tp` of few rows (`seqpar.comm.wire`).

    Args:
        hidden_size: M.
        intermediate_size: F of one expert; it need not divide.
        num_experts: E; it need not divide.
        top_k: K, experts of a token.
        groups: the ranks.
        experts: "tp" or "ep", see the module.
        renormalise: the weights of a token's experts sum to one (Mixtral); else they are its probabilities.
        rounded: the weights are rounded to the dtype of the activations, as Qwen3-MoE's are.
        sequence_sharded: x holds T/tp tokens of each rank.
        wire: the format in which activations travel; see `seqpar.comm.wire`.
    """

    label: str = ""
    unrecorded: ClassVar[str] = "which asks the device how many tokens each expert gets"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        groups: Groups,
        experts: ExpertPlacement = "tp",
        renormalise: bool = True,
        rounded: bool = False,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if experts not in get_args(ExpertPlacement):
            raise ValueError(f'`experts` must be "tp" or "ep", got {experts!r}')
        check_new(dtype, hidden_size=hidden_size, intermediate_size=intermediate_size)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate: nn.Module = _Router(hidden_size, num_experts, top_k, renormalise, rounded, **made)
        shape = _Shape(num_experts, hidden_size, intermediate_size)
        self.experts: nn.Module = (
            _SlicedExperts(shape, groups=groups, **made)
            if experts == "tp"
            else _OwnedExperts(shape, groups=groups, wire=wire, **made)
        )
        check_wire(wire, self.gate.weight, "weight")
        self.placement, self.hidden_size = experts, hidden_size
        self.sequence_sharded, self.wire = sequence_sharded, wire
        self.layout = groups.layout
        self.tp_groups: dict[Layout | None, ProcessGroup] = {None: groups.tp, self.layout: groups.tp}
        self.reset_parameters()

    @classmethod
    def from_module(
        cls,
        block: nn.Module,
        *,
        groups: Groups,
        experts: ExpertPlacement = "tp",
        sequence_sharded: bool = False,
        wire: Wire | None = None,
    ) -> ParallelMoE:
        """Slice a block that holds its experts as Transformers' Mixtral and Qwen3-MoE do.

        It has `gate` with `weight`[E, M], `top_k` and, where weights are not always renormalised, `norm_topk_prob`; and
        `experts` with `gate_up_proj`[E, 2F, M], gate first, `down_proj`[E, M, F] and a SiLU `act_fn`.

        Raises:
            TypeError: one of these is missing.
            ValueError: it has other parameters too, adds noise in training, has an `act_fn` that is no SiLU, or its
                gate does not give what a softmax and a top-k give (tried on a row, unless on meta).
        """
        gate, whole = _parts(block)
        check_activation(getattr(whole, "act_fn", F.silu))
        noise = getattr(block, "jitter_noise", 0)
        if noise:
            raise ValueError(f"`jitter_noise` must be 0, got {noise}; in inference it does nothing, set it so")
        num_experts, hidden_size, intermediate_size = whole.down_proj.shape
        new = cls(
            hidden_size,
            intermediate_size,
            num_experts,
            gate.top_k,
            groups=groups,
            experts=experts,
            renormalise=getattr(gate, "norm_topk_prob", True),
            rounded=hasattr(gate, "norm_topk_prob"),
            sequence_sharded=sequence_sharded,
            wire=wire,
            device="meta",
            dtype=whole.down_proj.dtype,
        )
        for theirs, ours in ((gate, new.gate), (whole, new.experts)):
            assert isinstance(ours, ShardedModule)
            params = dict(theirs.named_parameters(recurse=False))
            ours.load_unsharded(params)
            for name, param in params.items():
                getattr(ours, name).requires_grad_(param.requires_grad)
        check_covered(block, new)
        new._check_like(gate)
        return new

    def reset_parameters(self) -> None:
        """Draw what unsharded linears would draw; every rank must hold the same random state."""
        for module in (self.gate, self.experts):
            assert isinstance(module, ShardedModule)
            for name, source in module.sources().items():
                param = module.get_parameter(source.param)
                if not param.is_meta:
                    bound = 1 / math.sqrt(source.shape[-1])
                    full = torch.empty(source.shape, dtype=param.dtype, device=param.device)
                    module.load_source(name, nn.init.uniform_(full, -bound, bound))

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """Make `steps(x, layout=layout)` available over `groups`, on what is stored.

        Raises:
            ValueError: the stored slices do not contain that layout's ("tp"), or it has other ranks.
            TypeError: the experts are wrapped.
        """
        part_of(self, "experts", _Experts).add_layout(layout, groups=groups)
        self.tp_groups[layout] = groups.tp

    def steps(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Steps[Float[Tensor, "t m"]]:
        """See `forward`; yields at the collectives."""
        group = find_layout(self.tp_groups, layout)
        check_gradients(self.gate.parameters(), layout, self.layout)
        self._check(x)
        tokens = num_tokens if self.sequence_sharded else len(x)
        x = yield from self._enter_steps(x, group, tokens)
        weights, ids = yield from comm.call(self.gate, x)
        options = given(layout=layout) if self.placement == "tp" else {}
        out = yield from comm.call(self.experts, x, weights, ids, **options)
        return (yield from self._leave_steps(out, group, tokens))

    def _enter_steps(self, x: Tensor, group: ProcessGroup, tokens: Tokens | None) -> Steps[Tensor]:
        """The tokens whose experts this rank asks for: all that the group holds ("tp"), or its own share of them."""
        if self.placement == "tp":
            sharded = self.sequence_sharded
            return (
                yield from enter_steps(
                    x, group=group, sequence_sharded=sharded, num_tokens=tokens, label=self.label, wire=self.wire
                )
            )
        if self.sequence_sharded:
            return x
        mine = even_ranges(len(x), group.size())[group.rank()]
        return comm.reduce_grad(x, group=group, label=self.label)[slice(*mine)]

    def _leave_steps(self, out: Tensor, group: ProcessGroup, tokens: Tokens | None) -> Steps[Tensor]:
        """Out of these tokens' sums, partial ("tp") or of a share, what the group holds."""
        options: dict[str, Any] = {"group": group, "label": self.label, "wire": self.wire}
        if self.placement == "tp" and not self.sequence_sharded:
            return (yield from comm.all_reduce_steps(out, **options))
        if self.placement == "ep" and self.sequence_sharded:
            return out
        sizes = tokens if isinstance(tokens, tuple) else even_split(tokens or 0, group.size())
        if self.placement == "tp":
            return (yield from comm.reduce_scatter_steps(out, sizes=sizes, **options))
        return (yield from comm.all_gather_steps(out, sizes=sizes, grad="replicate", **options))

    def forward(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
    ) -> Float[Tensor, "t m"]:
        """Apply the experts.

        In, Out: x[T, M], this sequence rank's tokens, replicated over `tp`; [T/tp, M] when sequence-sharded.
        Grad:  placed as `x`. Of the router partial over all ranks, of "tp" experts over `sp`, of "ep" experts whole
               (`sync_gradients`).
        Comm:  see the class; every rank of the mesh must call it, also one without tokens.

        Args:
            x: activations, in the layer's dtype.
            layout: one that `add_layout` recorded; the stored one by default.
            num_tokens: T, or how many tokens each `tp` rank holds: what sequence-sharded "tp" needs to know.

        Raises:
            ValueError, TypeError: a shape, dtype or layout that is not the layer's.
        """
        return comm.run(self.steps(x, layout=layout, num_tokens=num_tokens))

    def _check(self, x: Tensor) -> None:
        comm.refuse_dtensor(x, "x")
        if x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"`x` must have shape [T, {self.hidden_size}], got {list(x.shape)}")
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"`x` must have the layer's dtype ({dtype}), got {x.dtype}")

    def _check_like(self, gate: nn.Module) -> None:
        """Raise ValueError unless `gate` routes a row as this layer's router does."""
        router = self.gate
        assert isinstance(router, _Router)
        weight = router.weight
        if weight.is_meta:
            return
        row = torch.linspace(-1, 2, self.hidden_size, dtype=weight.dtype, device=weight.device).view(1, -1)
        with torch.no_grad():
            weights, expected = gate(row)[1], router(row)[0]
        if weights.shape != expected.shape or not torch.allclose(
            weights.double(), expected.double(), rtol=2e-2, atol=1e-3
        ):
            raise ValueError(f"`gate` must give the largest probabilities of a softmax, got {gate}")

    def extra_repr(self) -> str:
        layouts = [tuple(layout) for layout in self.tp_groups if layout is not None]
        return f"experts={self.placement}, layouts={layouts}, sequence_sharded={self.sequence_sharded}" + (
            f", wire={self.wire}" if self.wire else ""
        )


def is_mixture(module: nn.Module) -> bool:
    """Whether a feed-forward is one for `ParallelMoE.from_module`, and not for `ParallelMLP`'s."""
    return isinstance(getattr(module, "experts", None), nn.Module) and hasattr(module, "gate")


class _Router(ShardedModule):
    """The experts that each token takes, and what each counts for; its weight is replicated.

    In:    x[T, M].
    Out:   weights[T, K] in float32, or rounded to the dtype of x; ids[T, K].
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        renormalise: bool,
        rounded: bool,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"`top_k` must lie in [1, {num_experts}] (the experts), got {top_k}")
        self.top_k, self.renormalise, self.rounded = top_k, renormalise, rounded
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "t m"]) -> tuple[Float[Tensor, "t k"], Int64[Tensor, "t k"]]:
        logits = kernels.linear(x, self.weight)
        weights, ids = kernels.route(logits, self.top_k, renormalise=self.renormalise)
        return (weights.to(logits.dtype) if self.rounded else weights), ids

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        return {"weight": Source.whole(tuple(self.weight.shape), "weight")}

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        # "tp": every rank of the group knows a part of each expert's output; "ep": every rank routes other tokens.
        return groups.tp, groups.sp

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"{num_experts} experts of which {self.top_k}, hidden_size={hidden_size}"


class _Shape(NamedTuple):
    """E, M and F."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class _Experts(ShardedModule):
    """The experts' weights, in two parameters: gate_up_proj[e, 2f, M] and down_proj[e, M, f].

    Args:
        shape: of the unsharded experts.
        num_experts: e, stored here.
        width: f, stored here of each.
    """

    def __init__(
        self,
        shape: _Shape,
        num_experts: int,
        width: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, size, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, width, device=device, dtype=dtype))

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """See `ParallelMoE.add_layout`."""
        raise NotImplementedError

    def _sources(self, gate_up: tuple[Piece, ...], down: tuple[Piece, ...]) -> dict[str, Source]:
        count, size, width = self.shape
        return {
            "gate_up_proj": Source((count, 2 * width, size), "gate_up_proj", gate_up),
            "down_proj": Source((count, size, width), "down_proj", down),
        }

    def extra_repr(self) -> str:
        count, _, width = self.shape
        stored = self.down_proj.shape
        return f"{stored[0]} of {count} experts, {stored[2]} of {width} rows each"


class _Slice(NamedTuple):
    """What one layout uses of every expert: a range of its F here, and the blocks that this is made of."""

    rows: Range
    blocks: tuple[int, ...]


class _SlicedExperts(_Experts):
    """A slice of every expert: rows g0 u0 g1 u1 ... by flat block, as `GateUpParallelLinear` stores them."""

    def __init__(self, shape: _Shape, *, groups: Groups, **made: Any) -> None:
        self.group, self.layout = groups.tp, groups.layout
        self.stored = shard_range(shape.intermediate_size, self.layout, self.group.rank())
        super().__init__(shape, shape.num_experts, self.stored.size, **made)
        own = self._slice(self.layout, self.group.rank())
        self.slices: dict[Layout | None, _Slice] = {None: own, self.layout: own}

    @property
    def shard_group(self) -> ProcessGroup:
        return self.group

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """See `ParallelMoE.add_layout`."""
        check_view(self.layout, self.group.rank(), layout, groups.tp)
        self.slices[layout] = self._slice(layout, groups.tp.rank())

    def forward(
        self,
        x: Float[Tensor, "t m"],
        weights: Float[Tensor, "t k"],
        ids: Int64[Tensor, "t k"],
        *,
        layout: Layout | None = None,
    ) -> Float[Tensor, "t m"]:
        """Compute the tokens' experts.

        In:    x[T, M], weights[T, K] and ids[T, K], replicated over the group.
        Out:   [T, M] {partial}.
        """
        blocks = find_layout(self.slices, layout).blocks
        gate_up, down = self.weights(layout)
        order, counts = kernels.sort_by_expert(ids, self.shape.num_experts)
        rows = x.index_select(0, order // ids.shape[1])
        return kernels.combine(kernels.experts(rows, gate_up, down, counts, blocks), weights, order)

    def weights(self, layout: Layout | None) -> list[Tensor]:
        start, stop = find_layout(self.slices, layout).rows
        if stop - start == self.stored.size:
            return [self.gate_up_proj, self.down_proj]
        return [self.gate_up_proj[:, 2 * start : 2 * stop], self.down_proj[:, :, start:stop]]

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        at, width = self.group.rank() if rank is None else rank, self.shape.intermediate_size
        blocks, whole = block_ranges(width, self.layout, at), shard_range(width, self.layout, at)
        gate, up = (
            tuple(
                Piece(1, Range(0, b.size).shift(2 * (b.start - whole.start) + which * b.size), b.shift(which * width))
                for b in blocks
            )
            for which in (0, 1)
        )
        return self._sources(gate + up, (Piece(2, Range(0, whole.size), whole),))

    def _slice(self, layout: Layout, rank: int) -> _Slice:
        width = self.shape.intermediate_size
        rows = shard_range(width, layout, rank).shift(-self.stored.start)
        return _Slice(rows, tuple(block.size for block in block_ranges(width, layout, rank)))


class _OwnedExperts(_Experts):
    """Whole experts, consecutive ones on each rank of the mesh; tokens travel to them and back."""

    def __init__(self, shape: _Shape, *, groups: Groups, wire: Wire | None, **made: Any) -> None:
        self.flat, self.wire = groups.flat, wire
        self.owned = even_ranges(shape.num_experts, groups.flat.size())
        super().__init__(shape, self.owned[groups.flat.rank()].size, shape.intermediate_size, **made)

    @property
    def shard_group(self) -> ProcessGroup:
        return self.flat

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """See `ParallelMoE.add_layout`."""
        if groups.layout != layout or groups.flat.size() != self.flat.size():
            raise ValueError(
                f"`layout` must be that of `groups`, over the {self.flat.size()} ranks that own the experts, "
                f"got {layout} with groups of {groups.layout}"
            )

    def steps(
        self, x: Float[Tensor, "t m"], weights: Float[Tensor, "t k"], ids: Int64[Tensor, "t k"]
    ) -> Steps[Float[Tensor, "t m"]]:
        """See `forward`; yields at three exchanges: of counts, of rows to their experts, and back."""
        order, counts = kernels.sort_by_expert(ids, self.shape.num_experts)
        sizes = [experts.size for experts in self.owned]
        own = sizes[self.flat.rank()]
        from_each = yield from comm.all_to_all_steps(
            counts, group=self.flat, send_sizes=sizes, recv_sizes=[own] * len(sizes), label=f"{self.label}.counts"
        )
        from_each = from_each.view(len(sizes), own)
        there: dict[str, Any] = {
            "send_sizes": [int(part.sum()) for part in counts.cpu().split(sizes)],
            "recv_sizes": from_each.sum(1).tolist(),
        }
        back = {"send_sizes": there["recv_sizes"], "recv_sizes": there["send_sizes"]}
        rows = x.index_select(0, order // ids.shape[1])
        options: dict[str, Any] = {"group": self.flat, "label": self.label, "wire": self.wire}
        rows = yield from comm.all_to_all_steps(rows, **there, **options)
        rows = yield from comm.all_to_all_steps(self._compute(rows, from_each), **back, **options)
        return kernels.combine(rows, weights, order)

    def forward(
        self, x: Float[Tensor, "t m"], weights: Float[Tensor, "t k"], ids: Int64[Tensor, "t k"]
    ) -> Float[Tensor, "t m"]:
        """Let the owners compute the tokens' experts.

        In, Out: x[T, M], weights[T, K] and ids[T, K] of this rank's own tokens; the ranks have any number of them each.
        Grad:  placed as the arguments; of the experts whole, for all tokens of an expert come to its owner.
        """
        return comm.run(self.steps(x, weights, ids))

    def _compute(self, rows: Tensor, from_each: Int64[Tensor, "p own"]) -> Tensor:
        """Rows that came from each rank in turn, sorted by expert within it, through their experts."""
        own = from_each.shape[1]
        experts = torch.arange(own, device=rows.device).repeat(len(from_each)).repeat_interleave(from_each.flatten())
        order, counts = kernels.sort_by_expert(experts, own)
        blocks = (self.shape.intermediate_size,)
        out = kernels.experts(rows.index_select(0, order), self.gate_up_proj, self.down_proj, counts, blocks)
        return out.index_select(0, order.argsort())

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        mine = self.owned[self.flat.rank() if rank is None else rank]
        piece = (Piece(0, Range(0, mine.size), mine),)
        return self._sources(piece, piece)

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        return ()


def _parts(block: nn.Module) -> tuple[Any, Any]:
    """The gate and the experts of an unsharded block, with what they must have."""
    gate, experts = getattr(block, "gate", None), getattr(block, "experts", None)
    tensors = getattr(gate, "weight", None), getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or not hasattr(gate, "top_k"):
        raise TypeError(
            "`block` must have a gate with `weight` and `top_k`, and experts with `gate_up_proj` and `down_proj`, "
            f"got {type(block).__name__}"
        )
    return gate, experts
