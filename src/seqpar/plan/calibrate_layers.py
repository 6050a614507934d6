"""What a layer costs on the ranks at hand, measured in seconds of wall time.

The layers themselves are driven, serially and under a trace, on prompts of a few sizes, and once on a chunk behind a
cached prefix, which tells apart what grows with tokens and what with keys. A table of kernels timed one by one lost: it
has to know what a layer launches, and forgets what lies between.

Ranks differ, and a wait of a fast one holds the slowness of another. So a slot's compute is that of the slowest rank,
and its communication that of the rank which waited least. Of the rounds the fastest counts: other work on a machine
only ever adds, and on a busy one medians of a few rounds were off by a factor of two. All ranks work this out from the
same gathered numbers, and so hold the same costs to the last bit; any decision from them is the same everywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import Groups, ProcessGroup
from seqpar.kv import PagedKV
from seqpar.layers import (
    ParallelAttention,
    ParallelDecoderLayer,
    ParallelMLP,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    UlyssesAttention,
)
from seqpar.partition import HeadMap, Layout, even_split
from seqpar.plan.costs import Curve, LayerCosts, Prompt, SlotCosts
from seqpar.plan.prefill import ModelShape
from seqpar.plan.shift import StepCosts, undecided
from seqpar.ragged import RaggedBatch

__all__ = ["calibrate_layers", "calibrate_layouts"]

SMALL = 64
"""Steps of up to so many tokens are measured four times as often: they take little time, and vary the more."""

RESOLUTION = 0.01
"""Repeated measurements differ by this much and more, even of an idle machine."""

Progress = Callable[[int, int], None]
Measured = tuple[float, float]


class Probe(NamedTuple):
    """A step to measure.

    Attributes:
        tokens: new ones of each request.
        prefix: tokens cached before them; each further request has one more.
        last: whether the layer is a last one of which no row is wanted.
        requests: how many.
    """

    tokens: int
    prefix: int = 0
    last: bool = False
    requests: int = 1


class Wait(NamedTuple):
    """The local work before a wait, and the wait."""

    what: tuple[str, str]
    compute_s: float
    comm_s: float


def calibrate_layers(
    layers: Sequence[ParallelDecoderLayer],
    *,
    group: ProcessGroup,
    tokens: Sequence[int] = (256, 512, 1024, 2048),
    rounds: int = 5,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> LayerCosts:
    """Measure what one of these layers costs, alike on every rank.

    Every rank of the layers' mesh calls it with the same arguments. Caches and inputs are its own; on a simulated link
    in force, that link's times are measured. All sizes take turns in every round, of which the fastest counts; of the
    layers, the mean.

    Args:
        layers: like layers; a few are closer to a whole stack than one whose weights stay in the processor's caches.
        group: all ranks of the mesh, `groups.flat`.
        tokens: sizes of prompts to measure, increasing; between and beyond them costs go straight on.
        rounds: measurements of each, after one that is not counted.
        layout: one that the layers know; the stored one by default.
        progress: told how many measurements are done, and of how many.

    Comm:  the layers' own, a gather of one number before each measurement, and of all results at the end.

    Raises:
        ValueError: no layers or rounds, sizes that are not increasing, layers of different windows; layers whose
            collectives differ between sizes and have no names to tell them by (`seqpar.layers.name_modules`).
    """
    _check(layers, tokens, rounds)
    window = _parts(layers[0])[0].window
    half = min(tokens, key=lambda size: abs(2 * size - tokens[-1]))
    probes = [*map(Probe, tokens), Probe(half, half)]
    takes = torch.tensor([all(layer.takes_tail() for layer in layers)])  # a hook may be on one rank alone
    if comm.all_gather(on_device(takes, group), group=group, label="calibrate").all():
        probes += [Probe(size, last=True) for size in sorted({tokens[0], tokens[-1]})]
    bench = Bench(layers, max(tokens[-1], 2 * half), layout)
    found: list[list[list[Wait]]] = [[] for _ in probes]
    simulated = False
    with torch.no_grad():
        for turn in range(rounds + 1):
            for index, probe in enumerate(probes):
                comm.all_gather(on_device(torch.zeros(1), group), group=group, label="calibrate")  # a common start
                waits, on_link = bench.run(probe)
                simulated |= on_link
                if turn:
                    found[index].append(waits)
                if progress is not None:
                    progress(turn * len(probes) + index + 1, (rounds + 1) * len(probes))
    slots = [
        measured
        for last in (False, True)
        for measured in _agreed(
            _same_slots([waits for probe, waits in zip(probes, found, strict=True) if probe.last == last]), group
        )
    ]
    where = f"{group.size()} rank(s) of {bench.x.device.type}{', simulated link' if simulated else ''}"
    return _fit(probes, slots, window, f"measured on {where}, {tokens[0]} to {tokens[-1]} tokens")


def calibrate_layouts(
    layers: Sequence[ParallelDecoderLayer],
    *,
    layouts: Sequence[Layout],
    group: ProcessGroup,
    num_layers: int,
    tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    rounds: int = 3,
    refine: int = 2,
    progress: Progress | None = None,
) -> StepCosts:
    """Measure what a step of a stack of such layers takes under each layout, alike on every rank.

    Every rank of the layers' mesh calls it with the same arguments. A step is one new request of that many tokens:
    attention takes as long under all layouts, since a rank has the same heads in each. Layouts take turns in every
    round; a round counts as its slowest rank's, of the rounds the fastest. On a simulated link in force, that link's
    times are measured.

    Times go by steps where products change their kernel, so sizes between two that are measured may be unlike both.
    Where that could change the choice (`plan.undecided`), the size halfway is measured too, some times over.

    Args:
        layers: like layers; all know the layouts.
        layouts: those to measure.
        group: all ranks of the mesh, `groups.flat`.
        num_layers: of the whole stack.
        tokens: sizes of steps to measure, increasing; between them costs go straight, beyond them nothing is known.
        rounds: measurements of each, after one that is not counted; four times as many up to 64 tokens.
        refine: how many times more sizes are measured where the choice is in doubt.
        progress: told how many measurements are done, and of how many so far.

    Comm:  the layers' own, a gather of one number before each measurement, and of all results at the end, once more
        for each time that it refines.

    Raises:
        ValueError: no layers, layouts or rounds, sizes that are not increasing, `refine` below 0, or a layout that was
            not added.
    """
    _check(layers, tokens, rounds)
    if refine < 0:
        raise ValueError(f"`refine` must be at least 0, got {refine}")
    unknown = [tuple(layout) for layout in layouts for layer in layers if layout not in layer.ranks]
    if unknown or not layouts:
        raise ValueError(f"`layouts` must be some that were added to the layers, got {unknown[:1] or 'none'}")
    bench = Bench(layers, tokens[-1], None)
    where = f"{group.size()} rank(s) of {bench.x.device.type}"
    found: dict[int, list[float]] = {}
    done, sizes = 0, tuple(tokens)
    for more in range(refine + 1):
        total = done + len(layouts) * sum(1 + _turns(size, rounds) for size in sizes)
        tell = None if progress is None else partial(_tell, progress, done, total)
        found |= _time_layouts(bench, layouts, sizes, rounds, group, tell)
        done = total
        known = tuple(sorted(found))
        seconds = [tuple(found[size][row] * num_layers / len(layers) for size in known) for row in range(len(layouts))]
        costs = StepCosts(
            curves={layout: Curve(known, times) for layout, times in zip(layouts, seconds, strict=True)},
            source=f"measured on {where}, {tokens[0]} to {tokens[-1]} tokens",
            resolution=RESOLUTION,
        )
        sizes = undecided(costs) if more < refine else ()
        if not sizes:
            break
    return costs


def _turns(size: int, rounds: int) -> int:
    """How often a step of a size is timed."""
    return rounds * (4 if size <= SMALL else 1)


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


@torch.no_grad()
def _time_layouts(
    bench: Bench,
    layouts: Sequence[Layout],
    sizes: Sequence[int],
    rounds: int,
    group: ProcessGroup,
    tell: Callable[[int], None] | None,
) -> dict[int, list[float]]:
    """Seconds of the layers at each size, one number for each layout, the same on every rank."""
    turns = [_turns(size, rounds) for size in sizes]
    found, done = torch.full((len(layouts), len(sizes), max(turns)), torch.inf), 0
    for column, (size, count) in enumerate(zip(sizes, turns, strict=True)):
        for turn in range(-1, count):
            for row, layout in enumerate(layouts):
                comm.all_gather(on_device(torch.zeros(1), group), group=group, label="calibrate")  # a common start
                seconds = bench.time(size, layout)
                if turn >= 0:
                    found[row, column, turn] = seconds
                done += 1
                if tell is not None:
                    tell(done)
    everyone = comm.all_gather(on_device(found[None], group), group=group, label="calibrate").cpu()
    best = everyone.amax(dim=0).amin(dim=2).double()
    return dict(zip(sizes, best.T.tolist(), strict=True))


class Bench:
    """The layers, with inputs and a cache large enough for every probe.

    Args:
        layers: that are driven.
        most: tokens of a request, cached ones included, and of a step.
        layout: one that the layers know; the stored one by default.
        requests: the most of a step.
    """

    def __init__(
        self,
        layers: Sequence[ParallelDecoderLayer],
        most: int,
        layout: Layout | None,
        *,
        requests: int = 1,
    ) -> None:
        self.layers, self.layout = layers, layout
        core, qkv = _parts(layers[0])
        dtype, device = qkv.weight.dtype, qkv.weight.device
        generator = torch.Generator().manual_seed(0)  # unlike tokens, or all would ask for the same experts
        self.x = torch.randn(most, qkv.in_features, generator=generator).to(device, dtype)
        self.cos = torch.ones(most, core.head_dim, dtype=dtype, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.indices = [_parts(layer)[0].layer_index for layer in layers]
        self.kv = PagedKV.contiguous(
            max(self.indices) + 1, requests, most, core.num_kv_heads, core.head_dim, dtype=dtype, device=device
        )

    def run(self, probe: Probe) -> tuple[list[Wait], bool]:
        """The waits of one layer, in the mean over the layers, and whether they were on a simulated link."""
        batch, cos, sin = self.begin(probe)
        simulated, each = False, []
        for layer in self.layers:
            x = self.share(batch.num_tokens)
            tail = batch.tail([]) if probe.last else None
            steps = layer.steps(x, batch, cos, sin, self.kv, layout=self.layout, tail=tail)
            with comm.trace() as seen:
                timed = on_stream(steps) if x.is_cuda else comm.run(steps)
            simulated |= any(interval.simulated for interval in seen.intervals)
            each.append(timed if isinstance(timed, list) else _waits(seen))
        means = [
            Wait(same[0].what, statistics.fmean(w.compute_s for w in same), statistics.fmean(w.comm_s for w in same))
            for same in zip(*each, strict=True)
        ]
        return means, simulated

    def begin(self, probe: Probe) -> tuple[RaggedBatch, Tensor, Tensor]:
        """A cache that holds what lies before the step, and the step with its rotary tables."""
        self._clear()
        ids, total = range(probe.requests), probe.tokens * probe.requests
        if probe.prefix:  # of zeros: what nothing wrote could be slow to compute with, and would be refused
            lengths = [probe.prefix + number for number in ids]
            prefix = self.kv.batch(ids, lengths)
            zeros = self.x.new_zeros(1, 1, 1).expand(sum(lengths), self.kv.num_kv_heads, self.kv.head_dim)
            for index in self.indices:
                self.kv.append(index, zeros, zeros, prefix)
        return self.kv.batch(ids, [probe.tokens] * probe.requests), self.cos[:total], self.sin[:total]

    def share(self, tokens: int) -> Tensor:
        """This rank's tokens of a step."""
        return self.x[: self._local(self.layers[0], tokens)].contiguous()

    def time(self, tokens: int, layout: Layout) -> float:
        """Seconds of all layers on a new request under a layout, one behind the other and undisturbed."""
        self.layout = layout
        self._clear()
        batch = self.kv.batch([0], [tokens])
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        x = self.share(tokens)
        finish(x)
        start = time.perf_counter()
        for layer in self.layers:
            x = layer(x, batch, cos, sin, self.kv, layout=layout)
        finish(x)
        return time.perf_counter() - start

    def _clear(self) -> None:
        for request in list(self.kv.ids):
            self.kv.free(request)

    def _local(self, layer: ParallelDecoderLayer, tokens: int) -> int:
        """This rank's share of a step's tokens."""
        place = layer.ranks[self.layout]
        mine = even_split(tokens, place.layout.sp)[place.sp_rank]
        return even_split(mine, place.layout.tp)[place.tp_rank] if layer.sequence_sharded else mine


def _parts(layer: ParallelDecoderLayer) -> tuple[UlyssesAttention, QKVParallelLinear]:
    """The parts of a layer that know its sizes."""
    attention = layer.self_attn
    assert isinstance(attention, ParallelAttention) and isinstance(attention.qkv_proj, QKVParallelLinear)
    return attention.core, attention.qkv_proj


def _waits(seen: comm.Trace) -> list[Wait]:
    """The waits of a serial run, each with the local work before its launch; after the last nothing is waited for.

    From the launch on it is communication: what the host does between the two delays no link.
    """
    waits, compute_s = [], 0.0
    for interval in seen.intervals:
        if interval.kind == "compute":
            compute_s += interval.end_s - interval.start_s
        elif interval.kind == "wait":
            after = interval.start_s - interval.launched_s
            comm_s = interval.end_s - interval.launched_s
            waits.append(Wait((interval.op, interval.label), max(0.0, compute_s - after), comm_s))
            compute_s = 0.0
    return [*waits, Wait(("", ""), compute_s, 0.0)]


def on_stream(steps: comm.Steps[Tensor]) -> list[Wait]:
    """The same by the device's clock, which a trace, that of the host, does not see."""
    events, names, value = [_event()], [], None
    try:
        while True:
            item = steps.send(value)
            if isinstance(item, comm.Mark):
                value = None
                continue
            events.append(_event())
            value = item.wait()
            events.append(_event())
            names.append((item.op, item.label))
    except StopIteration:
        events.append(_event())
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]
    return [Wait(*wait) for wait in zip([*names, ("", "")], spans[::2], [*spans[1::2], 0.0], strict=True)]


def _event() -> torch.cuda.Event:
    """Now, on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _same_slots(found: list[list[list[Wait]]]) -> list[list[list[Wait]]]:
    """The measurements [probe, round, slot] with the same slots in all.

    An all-reduce of one size takes one step, and of another size two: then its steps count as one.
    """
    if len({len(waits) for rounds in found for waits in rounds}) > 1:
        found = [[_joined(waits) for waits in rounds] for rounds in found]
    if len({len(waits) for rounds in found for waits in rounds}) > 1:
        raise ValueError(
            "`layers` must launch the same collectives at every size, or have names to tell them by, got "
            f"{sorted({len(waits) - 1 for rounds in found for waits in rounds})}; see seqpar.layers.name_modules"
        )
    return found


def _joined(waits: list[Wait]) -> list[Wait]:
    """The steps of one all-reduce as one."""
    keys = (wait.what if wait.what[0] == "all_reduce" else index for index, wait in enumerate(waits))
    runs = [[wait for _, wait in run] for _, run in groupby(zip(keys, waits, strict=True), key=lambda pair: pair[0])]
    if any(len(run) > 1 and not run[0].what[1] for run in runs):
        return waits
    return [Wait(run[0].what, sum(w.compute_s for w in run), sum(w.comm_s for w in run)) for run in runs]


def _agreed(found: list[list[list[Wait]]], group: ProcessGroup) -> list[list[Measured]]:
    """Compute and communication of [probe, slot] over all ranks, the same numbers on each."""
    if not found:
        return []
    mine = torch.tensor([[[wait[1:] for wait in waits] for waits in rounds] for rounds in found], dtype=torch.float64)
    everyone = comm.all_gather(on_device(mine[None], group), group=group, label="calibrate").cpu()
    compute = everyone[..., 0].amin(dim=2).amax(dim=0)
    waited = everyone[..., 1].amin(dim=(0, 2))
    return [list(zip(*both, strict=True)) for both in zip(compute.tolist(), waited.tolist(), strict=True)]


def _fit(probes: list[Probe], slots: list[list[Measured]], window: int | None, source: str) -> LayerCosts:
    """Costs of every slot from its measurements at every probe, one of which has a prefix."""
    behind = next(index for index, probe in enumerate(probes) if probe.prefix)
    plain, last = probes[:behind], probes[behind + 1 :]
    without = next(index for index, probe in enumerate(plain) if probe.tokens == probes[behind].tokens)
    grown = [after[0] - before[0] for before, after in zip(slots[without], slots[behind], strict=True)]
    attends = max(range(len(grown)), key=grown.__getitem__)
    pairs = [Prompt(probe.tokens, probe.prefix, window).pairs(0, probe.tokens) for probe in probes]
    more = pairs[behind] - pairs[without]
    per_pair = max(0.0, grown[attends] / more) if more else 0.0
    return LayerCosts(
        tuple(
            _slot(plain, slots[:behind], pairs, index, per_pair if index == attends else 0.0)
            for index in range(len(grown))
        ),
        window=window,
        last=tuple(_slot(last, slots[behind + 1 :], pairs, index, 0.0) for index in range(len(slots[-1])))
        if last
        else (),
        source=source,
        resolution=RESOLUTION,
    )


def _slot(
    probes: list[Probe], slots: list[list[Measured]], pairs: list[int], index: int, per_pair_s: float
) -> SlotCosts:
    """One slot from its measurements at some probes; what the attention takes of them is told apart."""
    tokens, measured = tuple(probe.tokens for probe in probes), [at[index] for at in slots]
    compute = tuple(max(0.0, c - per_pair_s * n) for (c, _), n in zip(measured, pairs, strict=False))
    comms = tuple(x for _, x in measured)
    return SlotCosts(Curve(tokens, compute), Curve(tokens, comms) if any(comms) else None, per_pair_s)


def random_layer(shape: ModelShape, groups: Groups, index: int, **made: Any) -> ParallelDecoderLayer:
    """This rank's slices of a decoder layer of those sizes, with random weights.

    Args:
        shape: of the model.
        groups: the ranks.
        index: of the layer.
        made: device and dtype of the weights.
    """
    m, d = shape.hidden_size, shape.head_dim
    heads = HeadMap(shape.num_heads, shape.num_kv_heads, *groups.layout)
    qkv = QKVParallelLinear(m, heads, d, group=groups.tp, **made)
    core = UlyssesAttention(heads, d, group=groups.sp, tp_rank=groups.tp.rank(), layer_index=index)
    width = shape.num_heads * d
    out = RowParallelLinear(width, m, group=groups.tp, sp=groups.layout.sp, bias=False, unit=d, **made)
    mlp = ParallelMLP(m, shape.intermediate_size, group=groups.tp, sp=groups.layout.sp, **made)
    norms = [RMSNorm(m, **made) for _ in range(2)]
    layer = ParallelDecoderLayer(ParallelAttention(qkv, core, out), mlp, *norms, groups=groups)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=m**-0.5)
    return layer


def finish(x: Tensor) -> None:
    """Wait for what was launched on the device of `x`."""
    if x.is_cuda:
        torch.cuda.synchronize()


def on_device(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` where the group can send it from."""
    return x if torch.device("cpu") in group._device_types else x.cuda()


def _check(layers: Sequence[ParallelDecoderLayer], tokens: Sequence[int], rounds: int) -> None:
    if not layers or rounds < 1:
        raise ValueError(f"`layers` and `rounds` must be at least 1, got {len(layers)} and {rounds}")
    if not tokens or tokens[0] < 1 or any(a >= b for a, b in pairwise(tokens)):
        raise ValueError(f"`tokens` must be at least 1 and increasing, got {list(tokens)}")
    windows = {_parts(layer)[0].window for layer in layers}
    if len(windows) > 1:
        raise ValueError(f"`layers` must attend to windows of one size, got {sorted(map(str, windows))}")
