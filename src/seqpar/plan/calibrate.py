"""The machine at hand as `Hardware`: what its ranks and the links between them take, measured in seconds.

Three things are timed on every rank. The products of a layer's shards, each alone, at many numbers of rows. Attention
alone. And whole layers of this library with random weights, under every layout that the ranks reach: what these take
beside their products and their attention is the norms, packing, launches and the host, and is kept by layout and slot.
Collectives are timed by size and by the number of ranks, on whatever carries them: a simulated link in force, too.

A rank's work is in processor time of its computing thread on a CPU, so that ranks that share cores count as if each had
its own; on CUDA by the device's clock. Medians of the rounds count, of the slowest rank. A collective's time is that of
the rank that waited least, of the fastest round: other work only ever adds to it. All ranks work with the same gathered
numbers and return the same hardware.

A table of single kernels lost: it has to know what a layer launches, and forgets what lies between. Whole layers alone
lost too: they say nothing of a layout or a model that was not measured.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar import comm, kernels
from seqpar.comm import DeviceMesh, Groups, ProcessGroup, SimulatedLink
from seqpar.layers import RMSNorm, VocabParallelEmbedding
from seqpar.partition import HeadMap, Layout
from seqpar.plan.calibrate_layers import Bench, Probe, Progress, finish, on_device, on_stream, random_layer
from seqpar.plan.costs import Curve, Prompt
from seqpar.plan.hardware import Accelerator, Fabric, Hardware, Tier
from seqpar.plan.model import Model
from seqpar.plan.operators import SLOTS, Around, Operators, Product
from seqpar.plan.prefill import ModelShape
from seqpar.ragged import RaggedBatch

__all__ = ["calibrate"]

_SHARES = (3, 1, 1, 3)  # kernels of a layer's slots, by which what is left of several is dealt out
_CONTEXT = 256  # tokens behind which decodes are measured, at the least and at four times as many
_ENOUGH_S = 3e-3  # of an operator, beyond which more rounds are not needed
_BYTES = (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 23)
_VOCABULARY = 32000
_DEFAULT = ModelShape(2048, 2, 16, 8, 128, 5632)


def calibrate(
    mesh: DeviceMesh,
    *,
    model: Model | None = None,
    tokens: Sequence[int] = (1, 8, 32, 128, 512, 2048),
    decodes: Sequence[int] = (1, 8, 32),
    rounds: int = 5,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    link: SimulatedLink | None = None,
    progress: Progress | None = None,
) -> Hardware:
    """Measure the ranks of a mesh, and what joins them; alike on every rank, which all call it.

    Args:
        mesh: with the axes "tp" and "sp". Every layout of its ranks is measured, and of the rows of neighbours that
            they can be divided into, as far as there are heads.
        model: whose products and layers are measured, for predictions of it; a layer of 2048 by default. Of mixtures
            the dense layer, experts being products of other shapes.
        tokens: of steps, increasing; between and beyond them times go straight on.
        decodes: numbers of decoding requests.
        rounds: measurements of each, after one that is not counted.
        layers: with weights of their own; more of them keep weights out of the processor's caches, as in a model.
        dtype: of weights, activations and cache.
        link: a simulated one to put all groups on; on a CPU collectives then take seconds of its clock.
        progress: told how many measurements are done, and of how many.

    Comm:  the layers' own, sums and exchanges of up to 8 MB, and gathers of the results.

    Raises:
        ValueError: sizes that are not increasing or below 1, no rounds or layers.
    """
    for name, sizes in (("tokens", tokens), ("decodes", decodes)):
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"`{name}` must be at least 1 and increasing, got {list(sizes)}")
    if rounds < 1 or layers < 1:
        raise ValueError(f"`rounds` and `layers` must be at least 1, got {rounds} and {layers}")
    shape = _DEFAULT if model is None else model.shape
    vocabulary = _VOCABULARY if model is None else model.vocab_size
    flat = comm.groups(mesh).flat
    made = {"device": mesh.device_type, "dtype": dtype}
    clock = time.perf_counter if link is None else link.clock
    timer = _Timer(flat, rounds, mesh.device_type, clock)
    rows = [_rows(flat, size) for size in _divisors(flat.size()) if size <= shape.num_heads]
    every = {layout: groups for row in rows for layout, groups in row.items()}
    whole = {layout: groups for layout, groups in every.items() if layout.size == flat.size()}
    tell = _Teller(progress, 3 + len(every))
    probes = _probes(tokens, decodes)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        if link is not None:
            stack.enter_context(link.on(*{group for groups in every.values() for group in groups[1:]}))
        products = _products(shape, every, vocabulary, tokens, timer, made)
        tell()
        prompts = _attention(shape, tokens, timer, made)
        tell()
        measured = []
        for row in rows:
            bench, embedding, norm = _bench(shape, vocabulary, row, layers, tokens, decodes, made)
            for layout in row:
                parts = _layers(bench, layout, probes, timer)
                ends = _ends(embedding, norm, layout, tokens, vocabulary, timer)
                measured.append(_Measured(layout, parts, ends))
                tell()
        fabrics = tuple(_fabrics(whole, timer, made))
        tell()
    found = _fitted(products, prompts, measured, probes, shape, dtype.itemsize)
    device = _accelerator(mesh.device_type, found, flat)
    nearest = fabrics[0]
    tier = Tier("measured", flat.size(), fabrics, nearest.exchange_alpha_s, nearest.bytes_per_s)
    return Hardware(device.name, device, (tier,))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _rows(flat: ProcessGroup, size: int) -> dict[Layout, Groups]:
    """The layouts of rows of so many neighbours; the first is that of sequence ranks, which reaches all."""
    row, alone = (comm.split_groups(flat, each).inner for each in (size, 1))
    base = Groups(Layout(1, size), alone, row, row)
    return comm.layout_groups(base, sorted(base.layout.reachable))


def _bench(
    shape: ModelShape,
    vocabulary: int,
    row: dict[Layout, Groups],
    layers: int,
    tokens: Sequence[int],
    decodes: Sequence[int],
    made: dict[str, Any],
) -> tuple[Bench, VocabParallelEmbedding, RMSNorm]:
    """A stack with random weights that knows every layout of a row, and what is around it."""
    base, *others = row.values()
    stack = [random_layer(shape, base, index, **made) for index in range(layers)]
    embedding = VocabParallelEmbedding(vocabulary, shape.hidden_size, group=base.tp, sp=base.layout.sp, **made)
    torch.nn.init.normal_(embedding.weight)
    for groups in others:
        embedding.add_layout(groups.layout, group=groups.tp)
        for layer in stack:
            layer.add_layout(groups.layout, groups=groups)
    bench = Bench(stack, _longest(tokens, decodes), None, requests=decodes[-1])
    return bench, embedding, RMSNorm(shape.hidden_size, **made)


class _Teller:
    """Counts measurements."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Timer:
    """Times work on this rank, and agrees on what all ranks say."""

    def __init__(self, group: ProcessGroup, rounds: int, device: str, links: Callable[[], float]) -> None:
        self.group, self.rounds, self.device, self.links = group, rounds, device, links
        self.now = time.thread_time if device == "cpu" else time.perf_counter

    def seconds(self, work: Callable[[], Tensor]) -> float:
        """The median of the rounds, of which short work takes more."""
        finish(work())
        times: list[float] = []
        while len(times) < self.rounds or (sum(times) < _ENOUGH_S and len(times) < 8 * self.rounds):
            start = self.now()
            finish(work())
            times.append(self.now() - start)
        return statistics.median(times)

    def start(self) -> None:
        """A common start."""
        comm.all_gather(on_device(torch.zeros(1), self.group), group=self.group, label="calibrate")

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Each of them, of the rank where it is the largest."""
        return self._everyone(values).amax(0).tolist()

    def fastest(self, values: Sequence[float]) -> list[float]:
        """Each of them, of the rank where it is the least."""
        return self._everyone(values).amin(0).tolist()

    def _everyone(self, values: Sequence[float]) -> Tensor:
        mine = on_device(torch.tensor([list(values)], dtype=torch.float64), self.group)
        return comm.all_gather(mine, group=self.group, label="calibrate").cpu()


def _longest(tokens: Sequence[int], decodes: Sequence[int]) -> int:
    """Tokens of the longest request or step."""
    return max(tokens[-1], decodes[-1], 4 * _CONTEXT + decodes[-1] + 1)


def _probes(tokens: Sequence[int], decodes: Sequence[int]) -> list[Probe]:
    """Whole prompts, halves of them behind the other half, and decodes."""
    behind = [Probe(n // 2, n // 2) for n in tokens if n > 1]
    contexts = [Probe(1, context, requests=n) for n in decodes for context in (_CONTEXT, 4 * _CONTEXT)]
    return [*map(Probe, tokens), *behind, *contexts]


# Operators alone.


def _shapes(shape: ModelShape, layout: Layout, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Columns and inner size of the products of a layer, and of the head, on the rank with the widest shards."""
    m, d, tp = shape.hidden_size, shape.head_dim, layout.tp
    heads = HeadMap(shape.num_heads, shape.num_kv_heads, *layout)
    shards = [(heads.q_shard(rank).size, heads.kv_shard(rank).size) for rank in range(tp)]
    inner = -(-shape.intermediate_size // tp)
    yield max(q + 2 * kv for q, kv in shards) * d, m
    yield m, max(q for q, _ in shards) * d
    yield 2 * inner, m
    yield m, inner
    yield -(-vocabulary // layout.size), m


def _products(
    shape: ModelShape,
    every: dict[Layout, Groups],
    vocabulary: int,
    tokens: Sequence[int],
    timer: _Timer,
    made: dict[str, Any],
) -> tuple[Product, ...]:
    """Every product of every layout, at powers of two of rows."""
    shapes = sorted({each for layout in every for each in _shapes(shape, layout, vocabulary)})
    rows = sorted({*(1 << i for i in range(tokens[-1].bit_length())), tokens[-1]})
    times = []
    for columns, inner in shapes:
        weight = torch.randn(columns, inner, **made)
        for n in rows:
            x = torch.randn(n, inner, **made)
            times.append(timer.seconds(partial(kernels.linear, x, weight, None)))
    seconds = iter(timer.slowest(times))
    return tuple(Product(*each, Curve(tuple(rows), tuple(next(seconds) for _ in rows))) for each in shapes)


def _attention(shape: ModelShape, tokens: Sequence[int], timer: _Timer, made: dict[str, Any]) -> Curve:
    """Prompts by pairs x query heads x head_dim, on the heads of one rank of all."""
    mine = HeadMap(shape.num_heads, shape.num_kv_heads, 1, min(timer.group.size(), shape.num_heads))
    heads, kv, dim = mine.q_ranges[0].size, mine.kv_ranges[0].size, shape.head_dim
    times, work = [], []
    for n in tokens:
        q, k, v = (torch.randn(n, count, dim, **made) for count in (heads, kv, kv))
        batch = RaggedBatch.build([n], [n], device=made["device"])

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v, batch: RaggedBatch = batch) -> Tensor:
            return kernels.attention(q, k, v, batch.without_cache)[0]

        times.append(timer.seconds(attend))
        work.append(Prompt(n).pairs(0, n) * heads * dim)
    return Curve(tuple(work), tuple(timer.slowest(times)))


# Layers.


class _Measured(NamedTuple):
    """A layout: seconds of every part of a layer for each probe, and of what is around the layers."""

    layout: Layout
    seconds: list[list[float]]
    ends: Curve


def _parts_of(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Which slots lie before each collective of a layer; what follows the last runs into the next layer."""
    ends = [0, 1] * (layout.sp > 1) + [2, 3] * (layout.tp > 1)
    if not ends:
        return ((0, 1, 2, 3),)
    after = tuple(range(ends[-1] + 1, SLOTS))
    return ((*after, *range(ends[0] + 1)), *(tuple(range(a + 1, b + 1)) for a, b in pairwise(ends)))


def _layers(bench: Bench, layout: Layout, probes: Sequence[Probe], timer: _Timer) -> list[list[float]]:
    """Local work of one layer before each of its collectives, under a layout."""
    bench.layout = layout
    parts = len(_parts_of(layout))
    found: list[list[float]] = []
    for probe in probes:
        rounds: list[list[float]] = []
        for turn in range(-1, timer.rounds):
            timer.start()
            segments = _driven(partial(_stack_steps, bench, probe), timer)
            if turn >= 0:
                rounds.append(_folded(segments, parts, len(bench.layers)))
        found.append([statistics.median(times) for times in zip(*rounds, strict=True)])
    flat = iter(timer.slowest([value for row in found for value in row]))
    return [[next(flat) for _ in row] for row in found]


def _stack_steps(bench: Bench, probe: Probe) -> comm.Steps[Tensor]:
    """The layers, called as a model calls them."""
    batch, cos, sin = bench.begin(probe)
    x = bench.share(batch.num_tokens)
    finish(x)

    def steps(x: Tensor = x) -> comm.Steps[Tensor]:
        for layer in bench.layers:
            x = yield from comm.call(layer, x, batch, cos, sin, bench.kv, layout=bench.layout)
        return x

    return steps()


def _ends(
    embedding: VocabParallelEmbedding,
    norm: RMSNorm,
    layout: Layout,
    tokens: Sequence[int],
    vocabulary: int,
    timer: _Timer,
) -> Curve:
    """Local work of embedding and norm, by the step's tokens."""
    times = []
    for n in tokens:
        ids = torch.arange(-(-n // layout.sp), device=embedding.weight.device) % vocabulary

        def made(ids: Tensor = ids) -> comm.Steps[Tensor]:
            def steps() -> comm.Steps[Tensor]:
                x: Tensor = yield from comm.call(embedding, ids, layout=layout)
                return norm.forward(x)

            return steps()

        rounds = []
        for turn in range(-1, timer.rounds):
            timer.start()
            seconds = sum(_driven(made, timer))
            if turn >= 0:
                rounds.append(seconds)
        times.append(statistics.median(rounds))
    return Curve(tuple(tokens), tuple(timer.slowest(times)))


def _driven(made: Callable[[], comm.Steps[Tensor]], timer: _Timer) -> list[float]:
    """A program's local work up to each collective, and after the last one; what it is made with is not timed."""
    steps = made()
    if timer.device == "cuda":
        return [wait.compute_s for wait in on_stream(steps)]
    with comm.trace(clock=time.thread_time) as seen:
        comm.interleave([steps])
    found = [0.0]
    mine = (each for each in seen.intervals if each.program and each.kind != "wait")
    for each in sorted(mine, key=lambda each: (each.launched_s, each.kind != "compute")):
        if each.kind == "comm":
            found.append(0.0)
        else:
            found[-1] += each.end_s - each.start_s
    return found


def _folded(segments: Sequence[float], parts: int, layers: int) -> list[float]:
    """The parts of one layer, in the mean; a sum in several steps counts as one, by what it adds in the middle."""
    if len(segments) == 1:
        return [segments[0] / layers]
    each, more = divmod(len(segments) - 1, layers)
    if more or each != parts:
        raise ValueError(
            f"`layers` must launch {parts} collectives each, got {len(segments) - 1} of {layers} layers; groups that "
            "are deterministic sum large tensors in two steps, take fewer tokens"
        )
    found = [sum(segments[at:-1:parts]) / layers for at in range(parts)]
    found[0] += segments[-1] / layers
    return found


def _fitted(
    products: tuple[Product, ...],
    prompts: Curve,
    measured: Sequence[_Measured],
    probes: Sequence[Probe],
    shape: ModelShape,
    itemsize: int,
) -> Operators:
    """What is left of the layers beside products and attention, and attention behind keys and of decodes."""
    nothing = Curve((1,), (0.0,))
    known = Operators(
        products,
        prompts,
        prompts,
        0.0,
        0.0,
        tuple(Around(each.layout, (nothing,) * SLOTS, each.ends) for each in measured),
        shape.hidden_size,
        itemsize,
    )
    around: list[Around] = []
    behind: list[tuple[int, float]] = []
    decodes: list[tuple[int, int, float]] = []
    for layout, seconds, ends in measured:
        rest = _left(known, probes, seconds, shape, layout)
        around.append(Around(layout, rest, ends))
        width = _width(shape, layout)
        for probe, row in zip(probes, seconds, strict=True):
            if not probe.prefix:
                continue
            n = probe.tokens * probe.requests
            attention = sum(row) - sum(_known_s(known, shape, layout, n)) - sum(slot(n) for slot in rest)
            if probe.tokens > 1:
                behind.append((Prompt(n, probe.prefix).pairs(0, n) * width, attention))
            else:
                keys = sum(probe.prefix + number + 1 for number in range(probe.requests))
                decodes.append((probe.requests, keys * width, attention))
    decode_s, key_s = _line(decodes)
    return replace(known, behind=_means(behind) or prompts, decode_s=decode_s, key_s=key_s, around=tuple(around))


def _left(
    known: Operators, probes: Sequence[Probe], seconds: Sequence[Sequence[float]], shape: ModelShape, layout: Layout
) -> tuple[Curve, ...]:
    """Of each slot what is left beside products and attention, by the step's tokens."""
    parts, width = _parts_of(layout), _width(shape, layout)
    left: dict[int, list[float]] = {}
    for probe, row in zip(probes, seconds, strict=True):
        if probe.prefix:
            continue
        taken = _known_s(known, shape, layout, probe.tokens)
        taken[1] += known.prompts_s(Prompt(probe.tokens).pairs(0, probe.tokens) * width, cached=False)
        left[probe.tokens] = [0.0] * SLOTS
        for part, slots in zip(row, parts, strict=True):
            rest = max(0.0, part - sum(taken[slot] for slot in slots))
            for slot in slots:
                left[probe.tokens][slot] = rest * _SHARES[slot] / sum(_SHARES[each] for each in slots)
    sizes = tuple(sorted(left))
    return tuple(Curve(sizes, tuple(left[n][slot] for n in sizes)) for slot in range(SLOTS))


def _known_s(operators: Operators, shape: ModelShape, layout: Layout, tokens: int) -> list[float]:
    """Products of each slot in a step of so many tokens."""
    rows = -(-tokens // layout.sp)
    qkv, o, up, down, *_ = (operators.product_s(rows, *each) for each in _shapes(shape, layout, 1))
    return [qkv, 0.0, o, up + down]


def _means(points: Sequence[tuple[int, float]]) -> Curve | None:
    """A curve through the means of what several layouts say; None for nothing."""
    by: dict[int, list[float]] = {}
    for at, seconds in points:
        by.setdefault(at, []).append(max(0.0, seconds))
    sizes = tuple(sorted(by))
    return Curve(sizes, tuple(statistics.fmean(by[at]) for at in sizes)) if sizes else None


def _line(points: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Seconds of a request and of a key that together come nearest to all points; neither negative."""
    rows = torch.tensor([point[:2] for point in points], dtype=torch.float64)
    seconds = torch.tensor([point[2] for point in points], dtype=torch.float64)
    scale = rows.amax(0)
    solved = torch.linalg.lstsq(rows / scale, seconds[:, None]).solution[:, 0] / scale
    if solved.min() >= 0:
        return float(solved[0]), float(solved[1])
    alone = [max(0.0, float((column * seconds).sum() / column.square().sum())) for column in rows.T]
    return (alone[0], 0.0) if solved[1] < 0 else (0.0, alone[1])


def _width(shape: ModelShape, layout: Layout) -> int:
    """Query heads times their dim, of the busiest rank."""
    heads = HeadMap(shape.num_heads, shape.num_kv_heads, *layout)
    return max(each.size for each in heads.q_ranges) * shape.head_dim


# Links.


def _fabrics(every: dict[Layout, Groups], timer: _Timer, made: dict[str, Any]) -> Iterator[Fabric]:
    """Sums and exchanges over groups of each size that a layout has."""
    sizes = sorted({size for layout in every for size in layout} - {1})
    for size in sizes:
        sums = next((groups.tp for layout, groups in every.items() if layout.tp == size), None)
        passes = next((groups.sp for layout, groups in every.items() if layout.sp == size), None)
        summed = None if sums is None else _sums(sums, timer, made)
        passed = None if passes is None else _passes(passes, timer, made)
        alpha, rate = _alpha_beta(summed, 2 * (size - 1) / size) if summed else _alpha_beta(passed, 1.0)
        first = None if passed is None else passed.seconds[0]
        yield Fabric(size, alpha, rate, 0, "measured", first, summed, passed)
    if not sizes:
        yield Fabric(1, 0.0, inf, 0, "one rank")


def _sums(group: ProcessGroup, timer: _Timer, made: dict[str, Any]) -> Curve:
    """All-reduces by bytes; also on both sides of where another algorithm begins."""
    item = made["dtype"].itemsize
    limit = _changes(group, made["device"], _BYTES[-1]) // item * item
    sizes = sorted({*_BYTES, *((limit, limit + item) if limit + item < _BYTES[-1] else ())})
    times = []
    for size in sizes:
        x = torch.zeros(size // item, **made)
        times.append(_travels(partial(comm.all_reduce_steps, x, group=group), timer, x))
    return Curve(tuple(sizes), tuple(timer.fastest(times)))


def _changes(group: ProcessGroup, device: str, most: int) -> int:
    """The most bytes that are summed by the algorithm of small tensors."""
    deterministic = comm.is_deterministic(group)

    def small(num_bytes: int) -> bool:
        found = comm.all_reduce_algorithm(num_bytes, group.size(), deterministic, device)
        return found == comm.all_reduce_algorithm(1, group.size(), deterministic, device)

    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if small(middle) else (low, middle)
    return low


def _passes(group: ProcessGroup, timer: _Timer, made: dict[str, Any]) -> Curve:
    """Exchanges by the bytes that a rank sends."""
    item, p = made["dtype"].itemsize, group.size()
    sent, times = [], []
    for size in _BYTES:
        rows = max(1, size // item // p)
        x = torch.zeros(rows * p, **made)
        sizes = [rows] * p
        times.append(
            _travels(
                partial(comm.all_to_all_steps, x, group=group, send_sizes=sizes, recv_sizes=sizes),
                timer,
                x,
            )
        )
        sent.append(rows * (p - 1) * item)
    return Curve(tuple(sent), tuple(timer.fastest(times)))


def _travels(steps: Callable[[], comm.Steps[Tensor]], timer: _Timer, x: Tensor) -> float:
    """The fastest round of a collective, from launch to end."""
    best = inf
    for turn in range(-1, timer.rounds):
        timer.start()
        start = time.perf_counter()
        with comm.trace(clock=timer.links) as seen:
            comm.run(steps())
        finish(x)
        whole = time.perf_counter() - start
        carried = [each.end_s - each.launched_s for each in seen.intervals if each.kind == "comm"]
        seconds = whole if x.is_cuda or not carried else sum(carried)
        best = min(best, seconds) if turn >= 0 else best
    return best


def _alpha_beta(curve: Curve | None, factor: float) -> tuple[float, float]:
    """Latency, and the rate between the smallest size and the largest."""
    assert curve is not None, "a layout has a group of every size on one of its axes"
    bytes_, seconds = curve.tokens[-1] - curve.tokens[0], curve.seconds[-1] - curve.seconds[0]
    return curve.seconds[0], factor * bytes_ / max(1e-9, seconds)


# The device.


def _accelerator(device: str, operators: Operators, group: ProcessGroup) -> Accelerator:
    """The rates that were reached, for those who ask for one number."""
    best = max(
        2 * rows * each.columns * each.inner / seconds
        for each in operators.products
        for rows, seconds in zip(each.seconds.tokens, each.seconds.seconds, strict=True)
    )
    widest = max(operators.products, key=lambda each: each.columns * each.inner)
    read = widest.columns * widest.inner * operators.itemsize / widest.seconds(1)
    attention = 4 * operators.prompts.tokens[-1] / operators.prompts.seconds[-1]
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s) a rank"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // group.size()
    return Accelerator(
        name,
        best,
        read,
        1,
        1.0,
        min(1.0, attention / best),
        source=f"measured on {group.size()} rank(s) of {device}; memory of a CPU is shared out evenly",
        memory_bytes=float(memory),
        operators=operators,
    )
