"""What a step of any model costs on any hardware under any layout: one model, from operators to the whole step.

A layer is the row of slots that `comm` runs it by: projections and the exchange of heads, attention and the exchange
back, the output projection and its sum, the MLP and its sum. Each slot's local work is a sum of operators: products in
whole waves of tiles or as long as their weights are read, attention as long as it multiplies or reads keys, elementwise
work at the memory's rate, launches. Each collective takes its bytes over the tiers of links that its group spans.
The slots then go through the schedules themselves: `Interleave.cuts_of` cuts, `Shift.layout_of` chooses, `HeadMap`
deals out heads, `repeated_makespan` takes turns as `interleave` does. So a change of any of them changes what is said.

All that a step's cost depends on is a handful of totals (`StepWork`), in most of which it is a straight line. `Costs`
keeps what depends on the number of tokens, so that a simulator can ask for millions of steps. A model of single
requests lost: it is slower for the same numbers, as long as work is dealt out evenly, which it is.

Pipeline stages run one after another here: `total_s` is how long a step is on its way, `stage_s` how often one can
follow another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil, fsum
from typing import Literal, NamedTuple, TypeAlias

from seqpar.comm import LinkCosts
from seqpar.kernels.quantize import Wire, check_wire, encoded_width
from seqpar.partition import HeadMap, Interleave, Layout, Shift, even_split
from seqpar.plan.costs import Curve, LayerCosts, Prompt, SlotCosts
from seqpar.plan.decode import MethodCosts, decode_costs
from seqpar.plan.hardware import Hardware, Number
from seqpar.plan.model import Model, StepWork
from seqpar.plan.ring import ring_seconds
from seqpar.plan.schedule import Slot, repeated_makespan

__all__ = ["Breakdown", "Costs", "Grid", "Memory", "Options", "Part", "cost"]

Kind = Literal["compute", "memory", "link", "host"]
Prefill = Literal["ulysses", "ring"]
Decode = Literal["local", "qship"]
Cut: TypeAlias = tuple[StepWork, ...]

_HALF = 2  # bytes of an element in half precision
_NORM_PASSES = 8  # of the activations through memory: around each half the sum, the residual twice, the norm
_KERNELS = (3, 1, 1, 3)  # of a slot: qkv, rotary, append; attention; o; gate and up, activation, down
_MANY = 1 << 24  # pairs from which on each takes as long
_ROUTING = 4  # kernels of a mixture beside its products
_SIZES = (1, 16, 64, *range(128, 4096, 128), *(1 << i for i in range(12, 18)))


class Grid(NamedTuple):
    """How many ways a model is split: `tp` over heads and rows, `sp` over tokens, `pp` over layers."""

    tp: int = 1
    sp: int = 1
    pp: int = 1

    @classmethod
    def of(cls, layout: Layout | Grid | tuple[int, ...]) -> Grid:
        """A layout without pipeline stages, or a grid.

        Raises:
            ValueError: an axis below 1, or more than three of them.
        """
        if not 1 <= len(layout) <= 3 or min(layout) < 1:
            raise ValueError(f"`layout` must be tp, sp and pp of at least 1, got {tuple(layout)}")
        return cls(*layout)

    @property
    def layout(self) -> Layout:
        """Of one stage."""
        return Layout(self.tp, self.sp)

    @property
    def size(self) -> int:
        return self.tp * self.sp * self.pp

    def __str__(self) -> str:
        return f"{self.tp}x{self.sp}" + (f"x{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True)
class Options:
    """How a model runs.

    Args:
        overlap: chunks of a step that take turns; None for steps run whole.
        shift: the layout by the number of tokens, among those that the grid's layout reaches; None for the grid's.
        wire: the format that sums and exchanges travel in; quantising costs a pass through memory on either side.
        prefill: what the sequence ranks do in prompts.
        decode: where decodes are computed.
        weight_itemsize: bytes of a weight of the layers, 2, 1 (fp8) or 4.
        kv_itemsize: bytes of a number in the cache, 2, 1 or 4.
        itemsize: bytes of an activation, and of a weight of embedding and head, 2 or 4.
        overhead_s: of the engine, beside the model, for every step.
        memory_share: of the device's memory that may be used.
        fused_norms: norms come with the sums, as in a fused kernel, and are not charged.
        near: the axis whose ranks are neighbours, "sp" as in a mesh, or "tp" where ranks are listed so.

    Raises:
        ValueError: an unknown format, method or axis, other sizes, a negative overhead, or a share outside of (0, 1].
    """

    overlap: Interleave | None = None
    shift: Shift | None = None
    wire: Wire | None = None
    prefill: Prefill = "ulysses"
    decode: Decode = "local"
    weight_itemsize: int = 2
    kv_itemsize: int = 2
    itemsize: int = 2
    overhead_s: float = 0.0
    memory_share: float = 0.9
    fused_norms: bool = False
    near: Literal["sp", "tp"] = "sp"

    def __post_init__(self) -> None:
        check_wire(self.wire)
        for name, among in (("prefill", ("ulysses", "ring")), ("decode", ("local", "qship")), ("near", ("sp", "tp"))):
            if getattr(self, name) not in among:
                raise ValueError(f'`{name}` must be "{among[0]}" or "{among[1]}", got {getattr(self, name)!r}')
        sizes = (self.weight_itemsize, self.kv_itemsize, self.itemsize)
        if not {*sizes} <= {1, 2, 4} or self.itemsize == 1:
            raise ValueError(
                "`weight_itemsize` and `kv_itemsize` must be 1, 2 or 4 and `itemsize` 2 or 4, got "
                f"{', '.join(map(str, sizes))}"
            )
        if not (self.overhead_s >= 0 and 0 < self.memory_share <= 1):
            raise ValueError(
                f"`overhead_s` must be >= 0 and `memory_share` in (0, 1], got {self.overhead_s}, {self.memory_share}"
            )


class Part(NamedTuple):
    """One operator or collective of a step, over all layers.

    Attributes:
        name: which.
        kind: what it waits for: multiplying, memory, a link, the host.
        seconds: of all its calls, each alone.
        calls: how many.
    """

    name: str
    kind: Kind
    seconds: float
    calls: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        weights: of its stage.
        kv: the cache of the requests of a step, their new tokens included.
        activations: at the worst point of a step.
        available: that may be used; 0 where the device's memory is not known.
    """

    weights: Number
    kv: Number
    activations: Number
    available: Number = 0

    @property
    def total(self) -> Number:
        return self.weights + self.kv + self.activations

    @property
    def short(self) -> Number:
        """Bytes by which it does not fit; 0 where it does."""
        return max(0.0, self.total - self.available) if self.available else 0.0


@dataclass(frozen=True)
class Breakdown:
    """What a step costs.

    Attributes:
        total_s: from its start to its result, through all stages.
        parts: operators and collectives, each alone; without an overlap their sum is the total.
        hidden_s: what the schedule hides of it; negative where it costs more than it hides.
        memory: of the fullest rank.
        stage_s: the slowest stage's share of it, after which another step can follow.
        layout: that it runs under.
        work: what it had to do.
    """

    total_s: float
    parts: tuple[Part, ...]
    hidden_s: float
    memory: Memory
    stage_s: float
    layout: Layout
    work: StepWork

    def seconds_of(self, kind: Kind) -> float:
        """Of all parts of a kind."""
        return fsum(part.seconds for part in self.parts if part.kind == kind)

    @property
    def comm_s(self) -> float:
        """Of all collectives and messages, each alone."""
        return self.seconds_of("link")

    def explain(self) -> str:
        """A line for each part, the longest first, and the memory."""
        work = f"{self.work.tokens:,} tokens ({self.work.decodes:,} decodes), tp x sp {self.layout.tp}x{self.layout.sp}"
        lines = [f"{work}: {1e3 * self.total_s:.4g} ms, {1e3 * self.hidden_s:.3g} ms hidden"]
        for part in sorted(self.parts, key=lambda part: -part.seconds):
            share = part.seconds / self.total_s if self.total_s else 0.0
            lines.append(
                f"  {part.name:18} {1e3 * part.seconds:10.4g} ms {share:6.1%}  {part.kind}, {part.calls} calls"
            )
        m = self.memory
        of = f" of {m.available / 1e9:,.1f}" if m.available else ""
        lines.append(
            f"memory of a rank: {m.weights / 1e9:,.1f} GB weights, {m.kv / 1e9:,.1f} GB cache, "
            f"{m.activations / 1e9:,.1f} GB activations{of}"
        )
        return "\n".join(lines)


class _Piece(NamedTuple):
    """One operator of one layer, or its collective, and the slot that it belongs to."""

    slot: int
    name: str
    kind: Kind
    seconds: float


def cost(
    model: Model,
    hardware: Hardware,
    layout: Layout | Grid | tuple[int, ...],
    lens_new: Sequence[int],
    lens_cached: Sequence[int] | int = 0,
    *,
    options: Options | None = None,
) -> Breakdown:
    """One step of requests with so many new tokens each behind so many cached ones.

    Args:
        model: see `Model.from_config`.
        hardware: see `HARDWARE`.
        layout: tp x sp, or with pipeline stages.
        lens_new: new tokens of each request: a prompt, a chunk of one, or 1 for a decode.
        lens_cached: cached tokens of each.
        options: how it runs.

    Raises:
        ValueError: lengths that are none, more ranks than are joined, a layout that the model does not have, a shift
            of other ranks.
    """
    costs = _costs(model, hardware, Grid.of(layout), options or Options())
    return costs.breakdown(model.work(lens_new, lens_cached), prompt=Prompt(lens_new, lens_cached))


@lru_cache(maxsize=128)
def _costs(model: Model, hardware: Hardware, grid: Grid, options: Options) -> Costs:
    return Costs(model, hardware, grid, options)


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of a model's steps under one layout and one way to run it.

    Args:
        model: of the steps.
        hardware: that they run on.
        grid: the layout, with pipeline stages.
        options: how they run.

    Raises:
        ValueError: see `cost`.
    """

    model: Model
    hardware: Hardware
    grid: Grid
    options: Options = field(default_factory=Options)
    _whole: dict[tuple[Layout, int], tuple[list[float], list[float]]] = field(
        default_factory=dict, init=False, repr=False
    )
    _around: dict[tuple[Layout, int, int], float] = field(default_factory=dict, init=False, repr=False)
    _one_by_one: dict[tuple[Layout, int], float] = field(default_factory=dict, init=False, repr=False)
    _rates: dict[Layout, tuple[float, float, bool]] = field(default_factory=dict, init=False, repr=False)
    _of_heads: dict[tuple[str, Layout], int] = field(default_factory=dict, init=False, repr=False)
    _ships: dict[Layout, MethodCosts] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", Grid.of(self.grid))
        grid, shape, shift = self.grid, self.model.shape, self.options.shift
        most = self.hardware.most_ranks
        if most is not None and grid.size > most:
            raise ValueError(
                f"`layout` must have at most the {most} ranks that {self.hardware.name} joins, got {grid.size}; give "
                "it a network (`Hardware.over`)"
            )
        if grid.pp > shape.num_layers:
            raise ValueError(f"`pp` must be at most the {shape.num_layers} layers of the model, got {grid.pp}")
        heads_of = grid.tp if self.options.prefill == "ring" else grid.tp * grid.sp
        if heads_of > shape.num_heads:
            raise ValueError(
                f"`layout` must split the model's {shape.num_heads} heads over at most as many ranks, got {heads_of}; "
                'split tokens with prefill="ring"'
            )
        if shift is not None:
            others = [layout for layout in shift.layouts if layout.size != grid.layout.size]
            if others:
                raise ValueError(f"`shift` must be of the layout's {grid.layout.size} ranks, got {tuple(others[0])}")

    def layout_of(self, tokens: int) -> Layout:
        """What a step of so many tokens runs under."""
        return self.grid.layout if self.options.shift is None else self.options.shift.layout_of(tokens)

    def seconds(self, work: StepWork) -> float:
        """`breakdown(work).total_s`, sooner."""
        layers, rest = self._times(work)
        return layers + rest

    def stage_seconds(self, work: StepWork) -> float:
        """`breakdown(work).stage_s`, sooner."""
        layers, rest = self._times(work)
        return layers * self._stage_share + rest if self.grid.pp > 1 else layers + rest

    def breakdown(
        self, work: StepWork, *, prompt: Prompt | None = None, tokens_held: Number | None = None
    ) -> Breakdown:
        """The step in parts.

        Args:
            work: of the step.
            prompt: its requests, where chunks are cut by them; by default it is taken for one prompt.
            tokens_held: in the cache, over all requests; by default those that the step reads and adds.
        """
        layout = self.layout_of(work.tokens)
        found: list[Part] = []
        for mixture, count in self._layers:
            for piece in self._pieces(layout, work, mixture):
                found.append(Part(piece.name, piece.kind, piece.seconds * count, count))
        merged: dict[tuple[str, Kind], Part] = {}
        for part in (*found, *self._ends(layout, work)):
            before = merged.get(part[:2])
            merged[part[:2]] = (
                part
                if before is None
                else Part(part.name, part.kind, before.seconds + part.seconds, before.calls + part.calls)
            )
        layers, rest = self._times(work, prompt)
        parts = tuple(part for part in merged.values() if part.seconds)
        held = work.keys + work.cached if tokens_held is None else tokens_held
        return Breakdown(
            total_s=layers + rest,
            parts=parts,
            hidden_s=sum(part.seconds for part in parts) - layers - rest if self._cuts(work) else 0.0,
            memory=self.memory(held, work.tokens, work.rows),
            stage_s=layers * self._stage_share + rest if self.grid.pp > 1 else layers + rest,
            layout=layout,
            work=work,
        )

    def layer_costs(self, *, most: int = 1 << 17) -> LayerCosts:
        """Costs of one layer as `plan.overlap` takes them, for prompts without decodes beside them."""
        layout, mixture = self.layout_of(most), self.model.moe_layers * 2 > self.model.num_layers
        sizes = tuple(n for n in _SIZES if n <= most)
        local = [[0.0] * 4 for _ in sizes]
        comm = [[0.0] * 4 for _ in sizes]
        for at, n in enumerate(sizes):
            for piece in self._pieces(layout, StepWork(n), mixture):
                (comm if piece.kind == "link" else local)[at][piece.slot] += piece.seconds
        slots = []
        for slot in range(4):
            sends = any(column[slot] for column in comm)
            per_pair = self._multiply_s(layout, StepWork(most, pairs=_MANY, keys=most)) / _MANY if slot == 1 else 0.0
            slots.append(
                SlotCosts(
                    Curve(sizes, tuple(column[slot] for column in local)),
                    Curve(sizes, tuple(column[slot] for column in comm)) if sends else None,
                    per_pair,
                )
            )
        return LayerCosts(
            tuple(slots),
            window=self.model.window if self.model.windowed_layers == self.model.num_layers else None,
            contention=self._contention(layout, most // 2),
            source=f"predicted for {self.grid} x {self.hardware.accelerator.name}",
        )

    def memory(self, tokens_held: Number, step_tokens: int = 1, rows: int = 1) -> Memory:
        """Bytes on the fullest rank with so many tokens in the cache and steps of so many tokens."""
        model, grid, options, shape = self.model, self.grid, self.options, self.model.shape
        base = self._base
        layers = ceil(shape.num_layers / grid.pp)
        layer = layers * model.attention_parameters + model.mlp_parameters(layers)
        table = model.vocab_size * shape.hidden_size * options.itemsize
        ends = table / base.tp + (0 if model.tied else table / grid.layout.size)
        if grid.pp > 1:
            ends = table / base.tp  # the first stage has the embedding, the last one the head
        weights = layer * options.weight_itemsize / base.tp + ends
        split = ceil(step_tokens / grid.sp)
        widest = max(2 * self._qkv(base), (2 if model.gated else 1) * 1.5 * shape.intermediate_size / base.tp)
        active = (
            split * (3 * shape.hidden_size + widest) * options.itemsize + rows * model.vocab_size / grid.layout.size * 4
        )
        available = self.hardware.accelerator.memory_bytes * options.memory_share
        return Memory(weights, tokens_held * self.kv_bytes, active, available)

    @cached_property
    def kv_bytes(self) -> Number:
        """Of one token in the cache, on one rank of a stage."""
        shape, layers = self.model.shape, ceil(self.model.num_layers / self.grid.pp)
        token = 2 * layers * shape.head_dim * self.options.kv_itemsize
        if self.options.decode == "qship" or self._base.size > shape.num_heads:
            return token * ceil(shape.num_kv_heads / self._base.tp) / self._base.sp
        return token * self._most_kv(self._base)

    def tokens_that_fit(self, step_tokens: int = 1, rows: int = 1) -> int:
        """Tokens of requests that the cache holds beside the weights and a step's activations; 0 for none."""
        memory = self.memory(0, step_tokens, rows)
        return max(0, int((memory.available - memory.total) / self.kv_bytes))

    @property
    def _base(self) -> Layout:
        """The layout that the weights are stored under."""
        return self.options.shift.layouts[0] if self.options.shift else self.grid.layout

    @cached_property
    def _layers(self) -> tuple[tuple[bool, int], ...]:
        """Whether layers have a mixture, and how many do."""
        mixtures = self.model.moe_layers
        counts = ((False, self.model.num_layers - mixtures), (True, mixtures))
        return tuple((mixture, count) for mixture, count in counts if count)

    @cached_property
    def _stage_share(self) -> float:
        """The longest stage's share of the layers."""
        return max(even_split(self.model.num_layers, self.grid.pp)) / self.model.num_layers

    def _cuts(self, work: StepWork) -> tuple[int, ...]:
        return self.options.overlap.cuts_of(work.tokens) if self.options.overlap else ()

    def _times(self, work: StepWork, prompt: Prompt | None = None) -> tuple[float, float]:
        """Seconds of all layers under the schedule, and of what is around them."""
        if not work.tokens:
            return 0.0, 0.0
        layout = self.layout_of(work.tokens)
        cuts = self._cuts(work)
        at = (layout, work.tokens, work.rows)
        rest = self._around.get(at)
        if rest is None:
            rest = self._around[at] = sum(part.seconds for part in self._ends(layout, work))
        if not cuts:
            return self._serial(layout, work.tokens) + self.model.num_layers * self._attention_s(layout, work), rest
        chunks = _chunks(work, cuts, prompt)
        phases = [([self._slots(layout, each, mixture) for each in chunks], count) for mixture, count in self._layers]
        contention = self._contention(layout, chunks[0].tokens)
        return repeated_makespan(phases, contention=contention), rest

    def _slots(self, layout: Layout, work: StepWork, mixture: bool) -> list[Slot]:
        """The slots of one layer."""
        local, comm = self._fixed(layout, work.tokens, mixture)
        attention = self._attention_s(layout, work)
        return [Slot(local[i] + (attention if i == 1 else 0.0), comm[i]) for i in range(4)]

    def _serial(self, layout: Layout, tokens: int) -> float:
        """Of all layers what depends on the number of tokens alone, one after another."""
        at = (layout, tokens)
        kept = self._one_by_one.get(at)
        if kept is None:
            each = ((count, self._fixed(layout, tokens, mixture)) for mixture, count in self._layers)
            kept = self._one_by_one[at] = fsum(count * fsum((*local, *comm)) for count, (local, comm) in each)
        return kept

    def _attention_s(self, layout: Layout, work: StepWork) -> float:
        """Of one layer, all of `_attention`."""
        rates = self._rates.get(layout)
        if rates is None:
            plain = layout.sp == 1 or (self.options.prefill, self.options.decode) == ("ulysses", "local")
            plain = plain and self.hardware.accelerator.operators is None
            rates = self._rates[layout] = (self._pair_s(layout), self._key_s(layout), plain)
        pair_s, key_s, plain = rates
        if not plain:
            return fsum(piece.seconds for piece in self._attention(layout, work))
        prompts = max(work.pairs * pair_s, work.keys * key_s) if work.pairs else 0.0
        return prompts + work.cached * key_s

    def _fixed(self, layout: Layout, tokens: int, mixture: bool) -> tuple[list[float], list[float]]:
        """Of each slot what depends on the number of tokens alone: local work, and the collective."""
        key = (layout, tokens if mixture else -tokens)
        kept = self._whole.get(key)
        if kept is None:
            local, comm = [0.0] * 4, [0.0] * 4
            for piece in (*self._local(layout, tokens, mixture), *self._sends(layout, tokens)):
                (comm if piece.kind == "link" else local)[piece.slot] += piece.seconds
            kept = self._whole[key] = (local, comm)
        return kept

    def _pieces(self, layout: Layout, work: StepWork, mixture: bool) -> list[_Piece]:
        return [
            *self._local(layout, work.tokens, mixture),
            *self._attention(layout, work),
            *self._sends(layout, work.tokens),
        ]

    def _local(self, layout: Layout, tokens: int, mixture: bool) -> list[_Piece]:
        """Operators of a layer but for attention, on the busiest rank."""
        shape, device, size = self.model.shape, self.hardware.accelerator, self.options.weight_itemsize
        rows, m, tp = ceil(tokens / layout.sp), shape.hidden_size, layout.tp
        qkv, inner = self._qkv(layout), shape.num_heads * shape.head_dim / tp
        half = rows * self.options.itemsize / device.memory_rate
        norms = 0 if self.options.fused_norms else _NORM_PASSES / 2 * m
        products = [
            _product(0, "qkv", device.product_s(rows, qkv, m, size), device.multiply_s(rows, qkv, m, size)),
            _product(2, "o", device.product_s(rows, m, inner, size), device.multiply_s(rows, m, inner, size)),
        ]
        mlp = self._mlp(rows, tp, mixture, half)
        if device.operators is not None:
            around = device.operators.around_s(layout, tokens, m)
            mine = [piece for piece in mlp if piece.name != "norms"]
            return [*products, *mine, *(_Piece(slot, "around", "host", each) for slot, each in enumerate(around))]
        found = [
            *products,
            _Piece(0, "norms", "memory", half * (norms + 2 * qkv)),
            _Piece(3, "norms", "memory", half * norms),
            *mlp,
        ]
        launches = [*_KERNELS[:3], _KERNELS[3] + _ROUTING * mixture]
        found += [_Piece(slot, "launches", "host", count * device.kernel_s) for slot, count in enumerate(launches)]
        return found

    def _mlp(self, rows: int, tp: int, mixture: bool, half: float) -> list[_Piece]:
        model, device, size = self.model, self.hardware.accelerator, self.options.weight_itemsize
        m, ways = model.shape.hidden_size, model.matrices - 1
        if not mixture:
            f = model.shape.intermediate_size / tp
            return [
                _product(
                    3, "gate, up", device.product_s(rows, ways * f, m, size), device.multiply_s(rows, ways * f, m, size)
                ),
                _product(3, "down", device.product_s(rows, m, f, size), device.multiply_s(rows, m, f, size)),
                _Piece(3, "norms", "memory", half * (ways + 1) * f),
            ]
        f, picked = model.expert_size / tp, model.experts_per_token
        touched = max(1, ceil(model.num_experts * (1 - (1 - picked / model.num_experts) ** rows) - 1e-9))
        each = ceil(rows * picked / touched)
        shapes = ((ways * f, m), (m, f))
        whole = fsum(device.product_s(each, wide, deep, size, count=touched) for wide, deep in shapes)
        multiplied = fsum(device.multiply_s(each, wide, deep, size, count=touched) for wide, deep in shapes)
        return [
            _product(3, "experts", whole, multiplied),
            _product(3, "router", *([device.product_s(rows, model.num_experts, m)] * 2)),
            _Piece(3, "norms", "memory", half * picked * ((ways + 1) * f + 2 * m)),
        ]

    def _attention(self, layout: Layout, work: StepWork) -> list[_Piece]:
        """Of one layer: prompts multiply, or read keys; decodes read them, here or where they lie."""
        shape, options = self.model.shape, self.options
        found = []
        if work.pairs:
            multiply, read = self._multiply_s(layout, work), self._read_s(layout, work)
            kind: Kind = "compute" if multiply >= read else "memory"
            seconds = max(multiply, read)
            if options.prefill == "ring" and layout.sp > 1:
                block = work.keys / layout.sp * 2 * ceil(shape.num_kv_heads / layout.tp) * shape.head_dim
                hop = self.hardware.message_s(block * options.kv_itemsize, (layout.sp - 1) * self._strides(layout).sp)
                ring = ring_seconds(seconds / layout.sp, hop, layout.sp)
                found.append(_Piece(1, "hops", "host", ring - seconds))
            found.append(_Piece(1, "attention, prompts", kind, seconds))
        if work.cached:
            if options.decode == "qship" and layout.sp > 1:
                seconds = self._shipped(layout).seconds(max(1, work.decodes), int(work.cached))
            else:
                seconds = self._decodes_s(layout, work)
                if options.prefill == "ring" and 1 < layout.size <= shape.num_heads:
                    exchanges = fsum(piece.seconds for piece in self._exchanges(layout, work.decodes))
                    found.append(_Piece(1, "exchange, decodes", "link", exchanges))
            found.append(_Piece(1, "attention, decodes", "memory", seconds))
        return found

    def _sends(self, layout: Layout, tokens: int) -> list[_Piece]:
        """Collectives of one layer: exchanges over sp before and after attention, sums over tp after each half."""
        shape, hardware, wire, (tp, sp) = self.model.shape, self.hardware, self.options.wire, layout
        strides = self._strides(layout)
        found = self._exchanges(layout, tokens) if self.options.prefill == "ulysses" else []
        if tp > 1:
            rows, row = ceil(tokens / sp), shape.hidden_size * self.options.itemsize
            sent = rows * (row if wire is None else encoded_width(shape.hidden_size, wire))
            seconds = hardware.all_reduce_s(sent, tp, strides.tp)
            found += [_Piece(slot, "sums", "link", seconds) for slot in (2, 3)]
        if wire is not None and found:
            # Codes are written and read once for each collective, at the rate of the memory.
            passes = len(found) * 2 * ceil(tokens / sp) * shape.hidden_size * (self.options.itemsize + 1)
            found.append(_Piece(3, "quantising", "memory", passes / hardware.accelerator.memory_rate))
        return found

    def _exchanges(self, layout: Layout, tokens: int) -> list[_Piece]:
        """Heads for tokens before attention, and back after it, as busy as the busiest rank is."""
        dim, wire, sp = self.model.shape.head_dim, self.options.wire, layout.sp
        if sp == 1:
            return []
        head = dim * self.options.itemsize if wire is None else encoded_width(dim, wire)
        there = ceil(tokens / sp) * self._others(layout) * head
        back = (tokens - tokens // sp) * self._most_q(layout) * head
        stride = self._strides(layout).sp
        return [
            _Piece(0, "exchange in", "link", self.hardware.pass_s(there, sp, stride)),
            _Piece(1, "exchange out", "link", self.hardware.pass_s(back, sp, stride)),
        ]

    def _ends(self, layout: Layout, work: StepWork) -> list[Part]:
        """What is around the layers: embedding, head, messages between stages, the engine."""
        model, hardware, grid, options = self.model, self.hardware, self.grid, self.options
        m, device = model.shape.hidden_size, hardware.accelerator
        found = []
        rows, p, item = max(1, work.rows), layout.size, options.itemsize
        if device.operators is not None:
            found.append(Part("ends", "host", device.operators.ends_s(layout, work.tokens, m), 1))
        if options.overhead_s:
            found.append(Part("engine", "host", options.overhead_s, 1))
        if layout.tp > 1:
            sent = ceil(work.tokens / layout.sp) * m * item
            found.append(Part("embedding", "link", hardware.all_reduce_s(sent, layout.tp, self._strides(layout).tp), 1))
        if layout.sp > 1:
            others = (layout.sp - 1) / layout.sp * rows * m * item
            found.append(Part("rows", "link", hardware.pass_s(others, layout.sp, self._strides(layout).sp), 1))
        columns = model.vocab_size / p
        seconds, multiplied = device.product_s(rows, columns, m, item), device.multiply_s(rows, columns, m, item)
        found.append(Part("head", "compute" if multiplied >= seconds else "memory", seconds, 1))
        if p > 1:
            found.append(Part("logits", "link", hardware.pass_s((p - 1) / p * rows * model.vocab_size * item, p), 1))
        if grid.pp > 1:
            each = hardware.message_s(ceil(work.tokens / layout.sp) * m / layout.tp * item, p)
            found.append(Part("stages", "link", (grid.pp - 1) * each, grid.pp - 1))
        return found

    def _contention(self, layout: Layout, tokens: int) -> float:
        if layout.tp == 1:
            return 0.0
        num_bytes = tokens * self.model.shape.hidden_size * self.options.itemsize
        return self.hardware.contention(num_bytes, layout.tp, self._strides(layout).tp)

    def _strides(self, layout: Layout) -> Layout:
        """How many ranks lie between neighbours of an axis."""
        return Layout(layout.sp, 1) if self.options.near == "sp" else Layout(1, layout.tp)

    def _pair_s(self, layout: Layout) -> float:
        """Seconds of a query and a key that it sees, in one layer."""
        device = self.hardware.accelerator
        return 4 * self._width(layout) / (device.flops * device.attention_efficiency)

    def _multiply_s(self, layout: Layout, work: StepWork) -> float:
        """Seconds of all pairs of a step's prompts, in one layer."""
        operators = self.hardware.accelerator.operators
        if operators is None:
            return work.pairs * self._pair_s(layout)
        return operators.prompts_s(work.pairs * self._width(layout), cached=work.keys > work.tokens - work.decodes)

    def _read_s(self, layout: Layout, work: StepWork) -> float:
        """Seconds to read the keys of a step's prompts, in one layer; what was measured has read them."""
        return 0.0 if self.hardware.accelerator.operators is not None else work.keys * self._key_s(layout)

    def _decodes_s(self, layout: Layout, work: StepWork) -> float:
        """Seconds of all decodes of a step where the keys lie by heads, in one layer."""
        operators = self.hardware.accelerator.operators
        if operators is None:
            return work.cached * self._key_s(layout)
        return operators.decodes_s(work.decodes, work.cached * self._width(layout))

    def _width(self, layout: Layout) -> Number:
        """Query heads times their dim, of one rank's attention."""
        shape = self.model.shape
        heads = shape.num_heads / layout.size if self.options.prefill == "ring" else self._most_q(layout)
        return heads * shape.head_dim

    def _key_s(self, layout: Layout) -> float:
        """Seconds to read one token's keys and values of one rank, in one layer."""
        per_token = 2 * self._most_kv(layout) * self.model.shape.head_dim * self.options.kv_itemsize
        return per_token / self.hardware.accelerator.memory_rate

    def _heads(self, layout: Layout) -> HeadMap:
        shape = self.model.shape
        sp = 1 if self.options.prefill == "ring" and layout.size > shape.num_heads else layout.sp
        return HeadMap(shape.num_heads, shape.num_kv_heads, layout.tp, sp)

    def _known(self, what: str, layout: Layout, work_out: Callable[[HeadMap], int]) -> int:
        """Of the heads of a layout, worked out once."""
        if (what, layout) not in self._of_heads:
            self._of_heads[what, layout] = work_out(self._heads(layout))
        return self._of_heads[what, layout]

    def _most_q(self, layout: Layout) -> int:
        return self._known("q", layout, lambda heads: max(each.size for each in heads.q_ranges))

    def _most_kv(self, layout: Layout) -> int:
        return self._known("kv", layout, lambda heads: max(each.size for each in heads.kv_ranges))

    def _qkv(self, layout: Layout) -> int:
        """Columns of the widest shard of the projection."""
        dim = self.model.shape.head_dim
        return self._known(
            "qkv",
            layout,
            lambda heads: dim * max(heads.q_shard(r).size + 2 * heads.kv_shard(r).size for r in range(heads.tp)),
        )

    def _others(self, layout: Layout) -> int:
        """Heads of a token, of queries, keys and values, that its rank sends away."""

        def work_out(heads: HeadMap) -> int:
            widths = [q.size + 2 * kv.size for q, kv in zip(heads.q_ranges, heads.kv_ranges, strict=True)]
            groups = (widths[first : first + heads.sp] for first in range(0, heads.size, heads.sp))
            return max(sum(group) - min(group) for group in groups)

        return self._known("others", layout, work_out)

    def _shipped(self, layout: Layout) -> MethodCosts:
        """Decodes of one layer with queries that travel."""
        if layout not in self._ships:
            fabric = self.hardware.machine(layout.size, 1 << 16).fabric
            costs = decode_costs(
                self._heads(self._base),
                self.model.shape.head_dim,
                link=LinkCosts(fabric.exchange_alpha_s, fabric.bytes_per_s),
                memory_bytes_per_s=self.hardware.accelerator.memory_rate * _HALF / self.options.kv_itemsize,
                layout=layout,
            )
            self._ships[layout] = costs.qship
        return self._ships[layout]


def _product(slot: int, name: str, seconds: float, multiplied: float) -> _Piece:
    return _Piece(slot, name, "compute" if multiplied >= seconds else "memory", seconds)


def _chunks(work: StepWork, cuts: Sequence[int], prompt: Prompt | None) -> Cut:
    """The step's chunks: tokens as they are cut, pairs as their tokens see keys, the rest in proportion."""
    if prompt is None:
        mean = work.pairs / work.tokens - (work.tokens + 1) / 2
        prompt = Prompt(work.tokens, max(0, round(mean))) if mean >= 0 else None
    total = work.tokens
    whole = prompt.pairs(0, total) if prompt else total
    found = []
    for start, stop in zip((0, *cuts), (*cuts, total), strict=True):
        share = (prompt.pairs(start, stop) if prompt else stop - start) / whole
        part = (stop - start) / total
        found.append(
            replace(
                work,
                tokens=stop - start,
                pairs=share * work.pairs,
                cached=part * work.cached,
                keys=stop / total * work.keys,
                decodes=ceil(part * work.decodes),
            )
        )
    return tuple(found)
