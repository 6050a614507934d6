"""Attention block and decoder layer of the Llama family, as programs of steps over the parts.

Tokens are flat and sharded over `sp`; heads and MLP rows are sharded over `tp`. A group of one rank takes the same
path, so that pure tensor parallelism, pure Ulysses and their product are one piece of code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Groups, ProcessGroup, Steps, SymmetricMemory, Wire
from seqpar.kernels import add_rms_norm
from seqpar.kv import PagedKV
from seqpar.layers.base import check_covered, check_gradients, drop_child_names, find_layout, part_of
from seqpar.layers.embedding import VocabParallelEmbedding
from seqpar.layers.heads import HeadParameter
from seqpar.layers.linear import QKVParallelLinear, RowParallelLinear, enter_steps
from seqpar.layers.mlp import ParallelMLP, given
from seqpar.layers.moe import ExpertPlacement, ParallelMoE, is_mixture
from seqpar.layers.norm import RMSNorm, is_plain
from seqpar.layers.placed import PlacedCore
from seqpar.layers.threephase import PipelinedUlysses
from seqpar.layers.ulysses import UlyssesAttention
from seqpar.partition import HeadMap, Layout, Range, ThreePhase, even_ranges, even_split
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["ParallelAttention", "ParallelDecoderLayer", "add_layouts"]


class ParallelAttention(nn.Module):
    """Fused QKV projection, Ulysses attention and output projection.

    Args:
        qkv_proj: sharded over `tp` by heads.
        core: attention over the sequence ranks.
        o_proj: sharded over `tp` by the same heads.
    """

    unnamed: ClassVar[tuple[str, ...]] = ("qkv_proj", "core")

    def __init__(self, qkv_proj: QKVParallelLinear, core: UlyssesAttention, o_proj: nn.Module) -> None:
        super().__init__()
        self.cores: dict[str, UlyssesAttention | PlacedCore] = {}
        self.label = ""
        qkv_proj.enters = False
        self.sequence_sharded, self.wire = qkv_proj.sequence_sharded, qkv_proj.wire
        self.tp_groups: dict[Layout | None, ProcessGroup] = {
            None: qkv_proj.group,
            qkv_proj.layout: qkv_proj.group,
        }
        self.qkv_proj: nn.Module = qkv_proj
        self.core, self.o_proj = core, o_proj
        drop_child_names(self, self.unnamed)

    @classmethod
    def from_module(
        cls,
        attention: nn.Module,
        *,
        groups: Groups,
        heads: HeadMap,
        layer_index: int = 0,
        window: int | None = None,
        softmax_scale: float | None = None,
        sequence_sharded: bool = False,
        pipeline: ThreePhase | None = None,
        wire: Wire | None = None,
    ) -> ParallelAttention:
        """Slice an attention module with q_proj, k_proj, v_proj, o_proj and, where it has them, q_norm, k_norm, sinks.

        A `pipeline` makes the core a `PipelinedUlysses`. All that the parts exchange travels in the format `wire`, see
        `seqpar.comm.wire`.
        """
        q_proj, k_proj, v_proj, o_proj = (_linear(attention, f"{name}_proj") for name in "qkvo")
        if heads.layout != groups.layout:
            raise ValueError(f"`heads` must be split as the groups are ({groups.layout}), got {heads.layout}")
        qkv_proj = QKVParallelLinear.from_linears(
            q_proj, k_proj, v_proj, heads=heads, group=groups.tp, sequence_sharded=sequence_sharded, wire=wire
        )
        norms: dict[str, Any] = {
            name: RMSNorm.from_module(norm, over_tp=True) if isinstance(norm, nn.Module) else None
            for name, norm in (
                ("q_norm", getattr(attention, "q_norm", None)),
                ("k_norm", getattr(attention, "k_norm", None)),
            )
        }
        sinks = getattr(attention, "sinks", None)
        if isinstance(sinks, Tensor):
            sinks = HeadParameter.from_tensor("sinks", sinks, heads=heads, group=groups.flat)
        cut: dict[str, Any] = {} if pipeline is None else asdict(pipeline)
        core = (PipelinedUlysses if cut else UlyssesAttention)(
            heads,
            qkv_proj.head_dim,
            group=groups.sp,
            tp_rank=groups.tp.rank(),
            window=window,
            softmax_scale=softmax_scale,
            layer_index=layer_index,
            wire=wire,
            sinks=sinks,
            **norms,
            **cut,
        )
        o_linear = RowParallelLinear.from_linear(
            o_proj,
            group=groups.tp,
            sp=heads.sp,
            sequence_sharded=sequence_sharded,
            wire=wire,
            unit=qkv_proj.head_dim,
        )
        new = cls(qkv_proj, core, o_linear)
        check_covered(attention, new)
        return new

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """Make `steps(x, layout=layout)` available over `groups`, on views of the stored weights.

        Raises:
            ValueError: a layout that the stored one does not reach, or groups of another one.
            TypeError: a part that is wrapped.
        """
        qkv_proj, o_proj = part_of(self, "qkv_proj", QKVParallelLinear), part_of(self, "o_proj", RowParallelLinear)
        qkv_proj.add_layout(layout, group=groups.tp)
        for core in (self.core, *self.cores.values()):
            if isinstance(core, UlyssesAttention):
                core.add_layout(layout, group=groups.sp)
        o_proj.add_layout(layout, group=groups.tp)
        self.tp_groups[layout] = groups.tp

    @property
    def label(self) -> str:
        """Names its collectives; the cores that were added are called what the core is that they stand for."""
        return self._label

    @label.setter
    def label(self, label: str) -> None:
        self._label = label
        for core in self.cores.values():
            core.label = f"{label}.core"

    def add_core(self, name: str, core: UlyssesAttention | PlacedCore) -> None:
        """Make `steps(x, core=name)` available: other steps of the same projections attend otherwise.

        It is to have no weights but those of `core`, whose norms and sinks it may share; it is no child, so that
        `state_dict` and `parameters` are what they were. Add layouts afterwards.
        """
        self.cores[name] = core
        self.label = self._label

    def find_core(self, name: str | None) -> UlyssesAttention | PlacedCore:
        """What attends in steps with `core=name`.

        Raises:
            ValueError: it was never added.
        """
        if name is not None and name not in self.cores:
            raise ValueError(f"`core` must be None or one of {sorted(self.cores)}, got {name!r}; see add_core")
        return self.core if name is None else self.cores[name]

    def steps(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        num_tokens: int | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Steps[Float[Tensor, "t_out m"]]:
        """See `forward`; yields where its parts do."""
        x, out = yield from self._attended(x, batch, cos, sin, kv, layout, num_tokens, tail, core)
        if tail is not None and not tail.rows:
            return x[:0]
        options = given(layout=layout)
        if tail is not None and self.sequence_sharded:
            options["num_tokens"] = self._held(tail, layout)
        projected: Tensor = yield from comm.call(self.o_proj, out, **options)
        return projected

    def partial_steps(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Steps[Float[Tensor, "t_out m"]]:
        """`steps` up to the sum over `tp`, which is left to the caller; not for sequence-sharded activations."""
        x, out = yield from self._attended(x, batch, cos, sin, kv, layout, None, tail, core)
        if tail is not None and not tail.rows:
            return x[:0]
        return part_of(self, "o_proj", RowParallelLinear).partial(out, layout=layout)

    def _attended(
        self,
        x: Tensor,
        batch: RaggedBatch,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: PagedKV | None,
        layout: Layout | None,
        num_tokens: int | None,
        tail: Tail | None,
        core: str | None,
    ) -> Steps[tuple[Tensor, Tensor]]:
        """The tokens that enter the projection, and what the heads of this rank attend to."""
        comm.refuse_dtensor(x, "x")
        group, options = find_layout(self.tp_groups, layout), given(layout=layout)
        attend = self.find_core(core)
        x = yield from enter_steps(
            x,
            group=group,
            sequence_sharded=self.sequence_sharded,
            num_tokens=num_tokens,
            label=self.label,
            wire=self.wire,
        )
        qkv = yield from comm.call(self.qkv_proj, x, **options)
        return x, (yield from comm.call(attend, qkv, batch, cos, sin, kv, **options, **given(tail=tail)))

    def forward(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        num_tokens: int | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Float[Tensor, "t_out m"]:
        """Attend over the batch; arguments as `UlyssesAttention.forward` and the linears take them.

        In, Out: x[T/sp, M], replicated over `tp`; [T/sp/tp, M] when sequence-sharded. With `tail`, out come its rows.
        Comm:  two all-to-alls over `sp`, or what the core that was added as `core` sends, and one all-reduce over `tp`.
        """
        run = self.steps(x, batch, cos, sin, kv, layout=layout, num_tokens=num_tokens, tail=tail, core=core)
        return comm.run(run)

    def _held(self, tail: Tail, layout: Layout | None) -> tuple[int, ...]:
        """How many rows of a tail each tensor-parallel rank holds when sequence-sharded."""
        seq = self.core.exchanges[layout].group
        mine = even_ranges(tail.whole.num_tokens, seq.size())[seq.rank()]
        return _rows_of(tail, mine, self.tp_groups[layout].size())


class ParallelDecoderLayer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        self_attn: usually a `ParallelAttention`.
        mlp: usually a `ParallelMLP` or a `ParallelMoE`.
        input_layernorm, post_attention_layernorm: norms over the model dim.
        groups: the ranks it runs over.
        sequence_sharded: activations between the linears are split over `tp` as well as `sp` (arXiv:2205.05198).
    """

    segments: ClassVar[tuple[str, ...]] = ("join",)
    join = staticmethod(add_rms_norm)

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        *,
        groups: Groups,
        sequence_sharded: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.post_attention_layernorm = input_layernorm, post_attention_layernorm
        self.sequence_sharded = sequence_sharded
        self.ranks: dict[Layout | None, _Place] = {None: _Place.of(groups), groups.layout: _Place.of(groups)}
        self.memory: dict[Layout | None, SymmetricMemory | None] = {}

    @classmethod
    def from_module(
        cls,
        layer: nn.Module,
        *,
        groups: Groups,
        heads: HeadMap,
        layer_index: int = 0,
        window: int | None = None,
        softmax_scale: float | None = None,
        sequence_sharded: bool = False,
        pipeline: ThreePhase | None = None,
        wire: Wire | None = None,
        experts: ExpertPlacement = "tp",
    ) -> ParallelDecoderLayer:
        """Slice a decoder layer whose children have the names of Transformers' Llama.

        All that its parts exchange travels in the format `wire`; see `seqpar.comm.wire`. An `mlp` that is a mixture of
        experts becomes a `ParallelMoE` with its `experts` placed so.
        """
        attention = ParallelAttention.from_module(
            _child(layer, "self_attn"),
            groups=groups,
            heads=heads,
            layer_index=layer_index,
            window=window,
            softmax_scale=softmax_scale,
            sequence_sharded=sequence_sharded,
            pipeline=pipeline,
            wire=wire,
        )
        whole = _child(layer, "mlp")
        options: dict[str, Any] = {"sequence_sharded": sequence_sharded, "wire": wire}
        mlp = (
            ParallelMoE.from_module(whole, groups=groups, experts=experts, **options)
            if is_mixture(whole)
            else ParallelMLP.from_module(whole, group=groups.tp, sp=heads.sp, **options)
        )
        norms = [
            RMSNorm.from_module(_child(layer, name), over_tp=sequence_sharded)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        new = cls(attention, mlp, norms[0], norms[1], groups=groups, sequence_sharded=sequence_sharded)
        check_covered(layer, new)
        return new

    def add_layout(self, layout: Layout, *, groups: Groups) -> None:
        """Make `steps(x, layout=layout)` available over `groups`, on views of the stored weights.

        Raises:
            ValueError: a layout that the stored one does not reach, or groups of another one.
            TypeError: a part that is wrapped.
        """
        attention = part_of(self, "self_attn", ParallelAttention)
        mlp = self.mlp if isinstance(self.mlp, ParallelMoE) else part_of(self, "mlp", ParallelMLP)
        attention.add_layout(layout, groups=groups)
        if isinstance(mlp, ParallelMoE):
            mlp.add_layout(layout, groups=groups)
        else:
            mlp.add_layout(layout, group=groups.tp)
        self.ranks[layout] = _Place.of(groups)

    def fuse(self, memory: SymmetricMemory | None, *, layout: Layout | None = None) -> None:
        """Sum what the attention projects on symmetric memory, in one kernel with the residual and the norm.

        So in steps of that layout, which want no gradient. Where hooks look on at the attention, its projection or the
        norm, the sum is that of the group's collectives, as it is with None.

        Args:
            memory: of the tensor-parallel ranks of the layout, for as many tokens as a step has.
            layout: one that `add_layout` recorded; the stored one by default.

        Raises:
            ValueError: memory of other ranks; activations that are sequence-sharded, a projection with a bias or a wire
                format, or a norm that is no `RMSNorm`.
            TypeError: an attention that is wrapped, or another than `ParallelAttention`.
        """
        attention = part_of(self, "self_attn", ParallelAttention)
        if type(attention) is not ParallelAttention:
            raise TypeError(f"`self_attn` must be a ParallelAttention to be fused, got {type(attention).__name__}")
        o_proj = part_of(attention, "o_proj", RowParallelLinear)
        if self.sequence_sharded or o_proj.bias is not None or o_proj.wire is not None:
            raise ValueError(
                "`fuse` must be asked of layers whose activations are not sequence-sharded, and whose `o_proj` has "
                f"neither bias nor wire format, got {o_proj}; see `comm.all_reduce_norm`"
            )
        if not isinstance(self.post_attention_layernorm, RMSNorm):
            raise ValueError(f"`post_attention_layernorm` must be an RMSNorm, got {self.post_attention_layernorm}")
        group = find_layout(attention.tp_groups, layout)
        if memory is not None and memory.group is not group:
            raise ValueError(f"`memory` must be of {comm.describe(group)}, got {memory}")
        for key in (None, self.ranks[None].layout) if layout in (None, self.ranks[None].layout) else (layout,):
            self.memory[key] = memory

    def steps(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Steps[Float[Tensor, "t_out m"]]:
        """See `forward`; yields where its parts do."""
        tokens = self._check(x, batch, layout, core)
        options: dict[str, Any] = given(layout=layout, num_tokens=tokens.size if self.sequence_sharded else None)
        normed = yield from comm.call(self.input_layernorm, x)
        memory = self._memory(layout)
        how = given(tail=tail, core=core)
        if memory is None:
            attended = yield from comm.call(self.self_attn, normed, batch, cos, sin, kv, **options, **how)
        else:
            attention = part_of(self, "self_attn", ParallelAttention)
            attended = yield from attention.partial_steps(normed, batch, cos, sin, kv, **options, **how)
        if tail is not None:
            start = tokens.start
            if self.sequence_sharded:
                place = self.ranks[layout]
                start += even_ranges(tokens.size, place.layout.tp)[place.tp_rank].start
                options["num_tokens"] = _rows_of(tail, tokens, place.layout.tp)
            x = tail.take(x, start)
            if not tail.rows:
                return x
        norm = self.post_attention_layernorm
        if memory is not None:
            normed, x = yield from self._sum(attended, x, memory)
        elif is_plain(norm) and x.dtype == attended.dtype:
            normed, x = self.join(x, attended, norm.weight, norm.eps)
        else:
            x = x + attended
            normed = yield from comm.call(norm, x)
        hidden: Tensor = yield from comm.call(self.mlp, normed, **options)
        return x + hidden

    def forward(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Float[Tensor, "t_out m"]:
        """Run the layer over one ragged batch.

        In, Out: x[T/sp, M] by `even_split`, replicated over `tp`; [T/sp/tp, M] when sequence-sharded. With `tail`, out
            come those of its rows that x holds. With a `core` that places tokens itself, those of `placed_rows`.
        Grad:  placed as `x`.
        Comm:  per layer two all-to-alls over `sp` and two all-reduces over `tp` (or two all-gathers and two
            reduce-scatters); nothing over a group of one. With a `tail` all but the first all-to-all move its rows
            only, and are left out where it has none.

        Args:
            x: this rank's tokens.
            batch: the step's tokens, the same on every rank.
            cos: rotary table of all T tokens.
            sin: the same, sine.
            kv: the cache of this rank's heads, or None to attend among the new tokens alone.
            layout: one that `add_layout` recorded; the stored one by default.
            tail: the only rows to compute, for a last layer (`RaggedBatch.tail`): of the others it appends the keys
                and values. A rank computes those that it holds; some ranks may have none.
            core: what attends, by the name that it was added under (`ParallelAttention.add_core`).

        Raises:
            ValueError: a number of tokens that is not this rank's share of the batch, or another batch's tail.
        """
        return comm.run(self.steps(x, batch, cos, sin, kv, layout=layout, tail=tail, core=core))

    def takes_tail(self) -> bool:
        """Whether `steps` may be given a `tail`: no hook and no part of another's would miss the other rows."""
        attention = self.self_attn
        return (
            isinstance(attention, ParallelAttention)
            and isinstance(attention.core, UlyssesAttention)
            and all(comm.splits(part) for part in (self, attention, attention.core, self.mlp))
            and not any(comm.is_wrapped(module) for module in self.modules())
        )

    def _sum(self, partial: Tensor, residual: Tensor, memory: SymmetricMemory) -> Steps[tuple[Tensor, Tensor]]:
        """The normed total of what the attention projects and the residual, and the total, on symmetric memory."""
        label = part_of(part_of(self, "self_attn", ParallelAttention), "o_proj", RowParallelLinear).label
        norm = self.post_attention_layernorm
        assert is_plain(norm)
        return comm.all_reduce_norm_steps(
            partial, residual, norm.weight, norm.eps, group=memory.group, memory=memory, label=label
        )

    def _memory(self, layout: Layout | None) -> SymmetricMemory | None:
        """Where the attention's sum is made with what follows it; None where it is by itself, or hooks look on."""
        memory, attention = self.memory.get(layout), self.self_attn
        if memory is None or not (comm.splits(attention) and is_plain(self.post_attention_layernorm)):
            return None
        return memory if comm.splits(attention.o_proj) else None

    def _check(self, x: Tensor, batch: RaggedBatch, layout: Layout | None, core: str | None) -> Range:
        """The tokens of this sequence rank, after checking that `x` holds them (or this rank's share of them)."""
        comm.refuse_dtensor(x, "x")
        place = find_layout(self.ranks, layout)
        check_gradients(self.parameters(), layout, self.ranks[None].layout)
        tokens = even_ranges(batch.num_tokens, place.layout.sp)[place.sp_rank]
        attend = None if core is None else part_of(self, "self_attn", ParallelAttention).find_core(core)
        if isinstance(attend, PlacedCore):
            tokens = Range(0, len(attend.rows(batch)))
        expected = even_split(tokens.size, place.layout.tp)[place.tp_rank] if self.sequence_sharded else tokens.size
        if x.ndim != 2 or x.shape[0] != expected:
            raise ValueError(
                f"`x` must hold this rank's {expected} of {batch.num_tokens} tokens, got shape {list(x.shape)}"
            )
        return tokens


class _Place(NamedTuple):
    """Where this rank sits in a layout."""

    layout: Layout
    tp_rank: int
    sp_rank: int

    @classmethod
    def of(cls, groups: Groups) -> _Place:
        return cls(groups.layout, groups.tp.rank(), groups.sp.rank())


def _rows_of(tail: Tail, tokens: Range, tp: int) -> tuple[int, ...]:
    """How many rows of a tail each of `tp` ranks holds, which share these tokens out."""
    return tuple(len(tail.within(*share.shift(tokens.start))) for share in even_ranges(tokens.size, tp))


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise TypeError(f"`{type(module).__name__}` must have a child `{name}`, got {type(child).__name__}")
    return child


def _linear(module: nn.Module, name: str) -> nn.Linear:
    child = _child(module, name)
    if type(child) is not nn.Linear:
        raise TypeError(f"`{name}` must be an nn.Linear, got {type(child).__name__}; unwrap it before slicing")
    return child


def add_layouts(parts: Sequence[nn.Module], layouts: Mapping[Layout, Groups]) -> None:
    """Let embeddings and decoder layers run under other layouts of their ranks, on views of the stored weights.

    Raises:
        TypeError: a part is another's, which knows no layouts; then nothing has changed.
    """
    known = (VocabParallelEmbedding, ParallelDecoderLayer)
    foreign = next((part for part in parts if not isinstance(part, known)), None)
    if foreign is not None:
        raise TypeError(f"`layers` must be parallel ones to be shifted, got {type(foreign).__name__}")
    for layout, groups in layouts.items():
        for part in parts:
            if isinstance(part, VocabParallelEmbedding):
                part.add_layout(layout, group=groups.tp)
            elif isinstance(part, ParallelDecoderLayer):
                part.add_layout(layout, groups=groups)
