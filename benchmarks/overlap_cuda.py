"""What hiding collectives is worth on one GPU: one rank's shard of a 70B model, its seven peers simulated.

The shard is that of rank 0 of 8 of Llama 3 70B (model dim 8192, 8 query heads and 1 KV head of 128, MLP dim 3584,
bfloat16), four layers of it. Its sums over ranks are `comm.SimulatedLink`s: a kernel of k CTAs that spins for the
modelled time on a high-priority stream. So measured are: products on parts of the tokens, the multiprocessors that a
sum takes from them, starts that a sum misses, launches, graphs. Not there are: the peers and their lateness, traffic on
the link and in memory, a link's power. Every number that contains such a sum is a number of a simulated link.

  ghost       the simulated sum alone: its time divided by the modelled one
  tax         what cutting the tokens costs: n parts one after another, without sums, divided by the whole
  contention  what a sum takes: the layers beside a sum that holds k multiprocessors, divided by the layers alone
  late        how much later a sum ends that is launched behind products than one launched before them
  schedules   the layers serially and interleaved (ISO) in n chunks, eagerly and as CUDA graphs

Times of 80 layers are those of the layers measured, times 80 by their number, but for the last sum, which has nothing
left to hide under and is counted once. TokenWeave's times (arXiv:2505.11329) are of 8 H100 with the whole model.

On a CPU (`--device cpu --quick`) everything runs at a tiny size: a look at the program, not a result.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from common import Contender, Ratio, Row, Timing, WrongResultError, meta, parser, progress, ratio, report
from torch import Tensor, nn

from seqpar import comm
from seqpar.kernels import RopeConfig, linear, rope_table
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
from seqpar.partition import HeadMap, Interleave
from seqpar.ragged import RaggedBatch

RANKS, LAYERS_OF_MODEL, PARTS = 8, 80, (2, 3, 4)
LINKS = {"h100-multimem-8": 4, "h100-nccl-8": 24}
"""The link presets, and the multiprocessors that their sums hold: measured by TokenWeave, and NCCL's guessed."""
HELD = (2, 4, 8, 16, 24)
PUBLISHED = {1024: (53.7, 46.2), 2048: (94.2, 76.7), 4096: (179.5, 142.2), 8192: (356.0, 280.0), 16384: (744.0, 585.0)}
"""Milliseconds of a prefill of Llama 3.3 70B on 8 H100: TokenWeave's baseline with multimem sums, and TokenWeave."""


class Shape(NamedTuple):
    """A rank's shard."""

    hidden: int
    heads: int
    head_dim: int
    mlp: int
    layers: int
    dtype: torch.dtype


SHARD = Shape(8192, 8, 128, 3584, 4, torch.bfloat16)
TINY = Shape(64, 2, 16, 48, 2, torch.float32)
TOLERANCE = 3e-2  # of chunks against the whole: both round to bfloat16 in every layer, over other keys first


@dataclass(frozen=True)
class Setting:
    """What every part needs."""

    device: torch.device
    shape: Shape
    tokens: tuple[int, ...]
    rounds: int
    group: comm.ProcessGroup
    layers: nn.ModuleList
    table: list[str] = field(default_factory=list)


# Time.


class Mark:
    """A point in time: an event on the current stream, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.host_s = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def since(self, earlier: Mark) -> float:
        """Seconds, once both have passed."""
        if self.event is None or earlier.event is None:
            return self.host_s - earlier.host_s
        return earlier.event.elapsed_time(self.event) * 1e-3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def delay(device: torch.device, seconds: float = 1e-3) -> None:
    """Keep the stream busy, so that the host gets ahead and its launches cost nothing."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * 1.7e9))


def timed(device: torch.device, contender: Contender, *, ahead: bool) -> float:
    """Seconds of one run."""
    synchronize(device)
    contender.prepare()
    if ahead:
        delay(device)
    start = Mark(device)
    contender.run()
    end = Mark(device)
    synchronize(device)
    return end.since(start)


def time_rounds(
    setting: Setting, contenders: Sequence[Contender], *, ahead: bool = False, warmup: int = 2
) -> dict[str, Timing]:
    """Every contender once a round, in an order that rotates."""
    found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(warmup + setting.rounds):
        for i in range(len(contenders)):
            contender = contenders[(i + turn) % len(contenders)]
            seconds = timed(setting.device, contender, ahead=ahead)
            if turn >= warmup:
                found[contender.name].append(seconds)
    return {name: Timing(name, tuple(rounds)) for name, rounds in found.items()}


def captured(device: torch.device, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph, which is captured now; on a CPU `run` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


# The model.


def make_layers(shape: Shape, device: torch.device, groups: comm.Groups) -> nn.ModuleList:
    """Decoder layers with random weights, as rank 0 of 8 holds them."""
    heads = HeadMap(shape.heads, 1)
    made: dict[str, Any] = {"device": device, "dtype": shape.dtype}

    def layer(index: int) -> ParallelDecoderLayer:
        attention = ParallelAttention(
            QKVParallelLinear(shape.hidden, heads, shape.head_dim, group=groups.tp, **made),
            UlyssesAttention(heads, shape.head_dim, group=groups.sp, layer_index=index),
            RowParallelLinear(
                shape.heads * shape.head_dim, shape.hidden, group=groups.tp, bias=False, unit=shape.head_dim, **made
            ),
        )
        mlp = ParallelMLP(shape.hidden, shape.mlp, group=groups.tp, **made)
        norms = [RMSNorm(shape.hidden, **made) for _ in range(2)]
        return ParallelDecoderLayer(attention, mlp, *norms, groups=groups)

    return nn.ModuleList(layer(index) for index in range(shape.layers))


class Prompt:
    """One prompt of so many tokens, and the ways to run the layers over it."""

    def __init__(self, setting: Setting, tokens: int) -> None:
        shape, device = setting.shape, setting.device
        self.setting, self.tokens = setting, tokens
        self.x = torch.randn(tokens, shape.hidden, device=device, dtype=shape.dtype)
        self.kv = PagedKV.contiguous(shape.layers, 1, tokens, 1, shape.head_dim, dtype=shape.dtype, device=device)
        self.batch = self.kv.batch([0], [tokens])
        table = rope_table(RopeConfig(shape.head_dim, rope_theta=500000.0), self.batch.positions)
        self.cos, self.sin = (part.to(shape.dtype) for part in table)
        # A chunk keeps what it needs on the device from its first run on: before any capture.
        self.parts = {n: self._cut(n) for n in (1, *PARTS)}

    def _cut(self, n: int) -> list[tuple[slice, RaggedBatch]]:
        cuts = Interleave(chunks=n, min_tokens=2).cuts_of(self.tokens) if n > 1 else ()
        bounds = (0, *cuts, self.tokens)
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        return list(zip(spans, self.batch.split(cuts), strict=True))

    def programs(self, n: int) -> list[comm.Steps[Tensor]]:
        return [self._steps(span, batch) for span, batch in self.parts[n]]

    def _steps(self, span: slice, batch: RaggedBatch) -> comm.Steps[Tensor]:
        x = self.x[span]
        for layer in self.setting.layers:
            x = yield from comm.call(layer, x, batch, self.cos[span], self.sin[span], self.kv)
        return x

    def serial(self, n: int, link: comm.SimulatedLink | None = None) -> Tensor:
        """The parts one after another."""
        with self._on(link):
            return torch.cat([comm.run(steps) for steps in self.programs(n)])

    def interleaved(self, n: int, link: comm.SimulatedLink | None = None) -> Tensor:
        with self._on(link):
            return torch.cat(comm.interleave(self.programs(n)))

    def _on(self, link: comm.SimulatedLink | None) -> AbstractContextManager[object]:
        return nullcontext() if link is None else link.on(self.setting.group)

    def check(self, name: str) -> None:
        """Interleaved equals the same chunks one after another bit for bit, and every chunk's sums were launched."""
        whole = self.serial(1)
        for n in PARTS:
            chunks, link = self.serial(n), comm.SimulatedLink.preset(name, sm=LINKS[name], ranks=RANKS)
            with comm.trace() as trace:
                found = self.interleaved(n, link)
            if not torch.equal(found, chunks):
                raise WrongResultError(f"{self.tokens} tokens in {n} chunks: interleaved differs from one by one")
            error = float((chunks - whole).double().norm() / whole.double().norm())
            if not error <= TOLERANCE:
                raise WrongResultError(f"{self.tokens} tokens in {n} chunks: relative error {error:.1e} of the whole")
            sums = [interval for interval in trace.intervals if interval.kind == "comm"]
            if len(sums) != 2 * n * self.setting.shape.layers or not all(interval.simulated for interval in sums):
                raise WrongResultError(f"{self.tokens} tokens in {n} chunks: {len(sums)} sums were launched")


def sum_bytes(setting: Setting, tokens: int) -> int:
    """What a rank of 8 sends for the sum of a layer's output."""
    elements = tokens * setting.shape.hidden
    return 2 * (elements - elements // RANKS) * setting.shape.dtype.itemsize


def links(setting: Setting) -> Iterator[tuple[str, comm.SimulatedLink]]:
    for name, sm in LINKS.items():
        yield name, comm.SimulatedLink.preset(name, sm=sm, ranks=RANKS)


# The parts.


def ghost(setting: Setting) -> list[Row]:
    """The simulated sum alone."""
    rows = []
    for name, link in links(setting):
        for tokens in setting.tokens:
            x = torch.zeros(tokens, setting.shape.hidden, device=setting.device, dtype=setting.shape.dtype)

            def run(x: Tensor = x, link: comm.SimulatedLink = link) -> Tensor:
                with link.on(setting.group):
                    return comm.all_reduce_async(x, group=setting.group, label="ghost").wait()

            with comm.trace() as trace:
                run()
            (sent,) = (interval.num_bytes for interval in trace.intervals if interval.kind == "comm")
            target = link.seconds(sent)
            found = time_rounds(setting, [Contender("ghost", run)], ahead=True)["ghost"]
            measured = statistics.median(found.rounds)
            rows.append(Row(f"{name} {tokens}: simulated sum", target * 1e6, "us"))
            rows.append(Row(f"{name} {tokens}: measured ÷ modelled", measured / target, "x"))
    return rows


def tax(setting: Setting) -> list[Row]:
    """What cutting costs, for each product of a layer and for whole layers."""
    rows = []
    layer = setting.layers[0]
    products = {
        "qkv": layer.self_attn.qkv_proj.weight,
        "o": layer.self_attn.o_proj.weight,
        "gate_up": layer.mlp.gate_up_proj.weight,
        "down": layer.mlp.down_proj.weight,
    }
    for tokens in setting.tokens:
        for name, weight in products.items():
            x = torch.randn(tokens, weight.shape[1], device=setting.device, dtype=weight.dtype)
            contenders = [Contender(f"{n}", partial(_products, x.chunk(n), weight)) for n in (1, *PARTS)]
            found = time_rounds(setting, contenders, ahead=True)
            for n in PARTS:
                rows.append(_ratio(f"{tokens}: {name} in {n} parts ÷ whole", found[f"{n}"], found["1"]))
        prompt = Prompt(setting, tokens)
        runs = [
            Contender(f"{n}", captured(setting.device, lambda n=n, prompt=prompt: prompt.serial(n)))
            for n in (1, *PARTS)
        ]
        found = time_rounds(setting, runs)
        for n in PARTS:
            rows.append(_ratio(f"{tokens}: layers in {n} parts ÷ whole", found[f"{n}"], found["1"]))
    return rows


def _products(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    return [linear(part, weight) for part in parts][-1]


def contention(setting: Setting) -> list[Row]:
    """The layers beside a sum that lasts for longer than they do."""
    rows = []
    for tokens in setting.tokens:
        prompt = Prompt(setting, tokens)
        layers = captured(setting.device, lambda prompt=prompt: prompt.serial(1))
        alone = statistics.median(time_rounds(setting, [Contender("alone", layers)])["alone"].rounds)
        lasts_s = 3 * alone + 5e-3 if setting.device.type == "cuda" else 0.0

        def launch(sm: int, x: Tensor = prompt.x[:1], lasts_s: float = lasts_s) -> None:
            with comm.SimulatedLink(lasts_s, inf, sm=sm, ranks=RANKS).on(setting.group):
                comm.all_reduce_async(x, group=setting.group, label="beside")
            time.sleep(1e-3)  # by then it holds its multiprocessors

        contenders = [Contender("alone", layers)]
        contenders += [Contender(f"{sm}", layers, lambda sm=sm, launch=launch: launch(sm)) for sm in HELD]
        found = time_rounds(setting, contenders)
        if lasts_s and max(found[f"{HELD[-1]}"].rounds) + 3e-3 > lasts_s:
            raise WrongResultError(f"{tokens} tokens: the sum beside the layers ended before them")
        rows += [
            _ratio(f"{tokens}: layers beside a sum on {sm} SMs ÷ alone", found[f"{sm}"], found["alone"]) for sm in HELD
        ]
    return rows


def late(setting: Setting) -> list[Row]:
    """When a sum ends, less when it could have, if products fill the GPU before it or only after it."""
    rows, device = [], setting.device
    weight = setting.layers[0].mlp.gate_up_proj.weight
    for tokens in setting.tokens:
        x = torch.randn(tokens, setting.shape.hidden, device=device, dtype=weight.dtype)

        def compute(x: Tensor = x) -> Tensor:
            return [linear(x, weight) for _ in range(4)][-1]

        product = time_rounds(setting, [Contender("four", compute)], ahead=True)["four"]
        rows.append(Row(f"{tokens}: one product", statistics.median(product.rounds) / 4 * 1e6, "us"))
        for sm in LINKS.values():
            link = comm.SimulatedLink.preset("h100-multimem-8", sm=sm, ranks=RANKS)
            for behind in (False, True):
                found = [_lateness(setting, link, x, compute, behind) for _ in range(2 + setting.rounds)][2:]
                where = "behind" if behind else "before"
                rows.append(
                    Row(
                        f"{tokens}: a sum on {sm} SMs launched {where} products, late",
                        statistics.median(found) * 1e6,
                        "us",
                    )
                )
    return rows


def _lateness(
    setting: Setting, link: comm.SimulatedLink, x: Tensor, compute: Callable[[], Tensor], behind: bool
) -> float:
    """Seconds from when the sum's stream is ready to when it has ended, less the sum's own."""
    synchronize(setting.device)
    if behind:
        compute()
    with torch.cuda.stream(torch.cuda.Stream()) if setting.device.type == "cuda" else nullcontext():
        ready = Mark(setting.device)
        with link.on(setting.group):
            comm.all_reduce_async(x, group=setting.group, label="late").wait()
        end = Mark(setting.device)
    if not behind:
        compute()
    synchronize(setting.device)
    return end.since(ready) - link.seconds(sum_bytes(setting, len(x)))


def schedules(setting: Setting) -> list[Row]:
    """The layers serially and in chunks that take turns, eagerly and as graphs."""
    rows, lines = [], []
    for tokens in setting.tokens:
        prompt = Prompt(setting, tokens)
        prompt.check(next(iter(LINKS)))
        runs: dict[str, Callable[[], Tensor]] = {"no sums": lambda prompt=prompt: prompt.serial(1)}
        for name, link in links(setting):
            runs[f"{name} 1"] = lambda prompt=prompt, link=link: prompt.serial(1, link)
            for n in PARTS:
                runs[f"{name} {n}"] = lambda prompt=prompt, link=link, n=n: prompt.interleaved(n, link)
        graphs = {name: captured(setting.device, run) for name, run in runs.items()}
        for name, run in runs.items():
            if not torch.equal(graphs[name](), run()):
                raise WrongResultError(f"{tokens} tokens, {name}: the graph differs from the eager run")
        eager = time_rounds(setting, [Contender(name, run) for name, run in runs.items()])
        graph = time_rounds(setting, [Contender(name, replay) for name, replay in graphs.items()])
        for name, link in links(setting):
            tails = {
                n: link.seconds(sum_bytes(setting, prompt.parts[n][-1][0].stop - prompt.parts[n][-1][0].start))
                for n in PARTS
            }
            whole = {"no sums": _of_model(setting, graph["no sums"]), 1: _of_model(setting, graph[f"{name} 1"])}
            whole |= {n: _of_model(setting, graph[f"{name} {n}"], tails[n]) for n in PARTS}
            best = min(PARTS, key=lambda n: statistics.median(whole[n].rounds))
            case = f"{name} {tokens}"
            rows.append(Row(f"{case}: serial, {LAYERS_OF_MODEL} layers", whole[1].median_ms, "ms"))
            rows.append(Row(f"{case}: no sums, {LAYERS_OF_MODEL} layers", whole["no sums"].median_ms, "ms"))
            rows += [_ratio(f"{case}: ISO in {n} ÷ serial", whole[n], whole[1]) for n in PARTS]
            rows += [
                _ratio(f"{case}: eager ISO in {n} ÷ eager serial", eager[f"{name} {n}"], eager[f"{name} 1"])
                for n in PARTS
            ]
            for n in (1, best):
                rows.append(
                    _ratio(
                        f"{case}: {'serial' if n == 1 else f'ISO in {n}'}, eager ÷ graph",
                        eager[f"{name} {n}"],
                        graph[f"{name} {n}"],
                    )
                )
            published = PUBLISHED.get(tokens) if name == "h100-multimem-8" else None
            if published is not None:
                rows.append(Row(f"{case}: TokenWeave's baseline, published (8 H100)", published[0], "ms"))
                rows.append(
                    Row(f"{case}: TokenWeave ÷ its baseline, published (8 H100)", published[1] / published[0], "x")
                )
            lines.append((case, whole, best, published))
        del graphs, runs, prompt
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    setting.table.extend(_table(lines))
    return rows


def _of_model(setting: Setting, timing: Timing, tail_s: float = 0.0) -> Timing:
    """The whole model's time, in which the last sum is exposed once."""
    factor = LAYERS_OF_MODEL / setting.shape.layers
    return Timing(timing.name, tuple((t - tail_s) * factor + tail_s for t in timing.rounds))


def _ratio(name: str, ours: Timing, theirs: Timing) -> Row:
    found: Ratio = ratio(ours, theirs)
    return Row(name, found.value, "x", interval=(found.low, found.high))


def _table(lines: Sequence[tuple[str, dict[Any, Timing], int, tuple[float, float] | None]]) -> Iterator[str]:
    """Ours beside what was published, in milliseconds."""
    yield f"{LAYERS_OF_MODEL} layers, simulated sums, graphs, ms; beside TokenWeave's on 8 H100, as published"
    names = ("no sums", "serial", "ISO", "n", "ratio", "baseline", "TokenWeave", "ratio")
    form = "{:24} {:>9} {:>9} {:>9} {:>2} {:>6}   {:>9} {:>10} {:>6}"
    yield form.format("link, tokens", *names)
    for case, whole, best, published in lines:
        ours = [whole[key].median_ms for key in ("no sums", 1, best)]
        theirs = ("", "", "") if published is None else (*published, f"{published[1] / published[0]:.3f}")
        yield form.format(case, *(f"{ms:.2f}" for ms in ours), best, f"{ours[2] / ours[1]:.3f}", *theirs).rstrip()


MEASUREMENTS: dict[str, Callable[[Setting], list[Row]]] = {
    "ghost": ghost,
    "tax": tax,
    "contention": contention,
    "late": late,
    "schedules": schedules,
}


def main() -> None:
    assert __doc__ is not None
    args_of = parser(__doc__)
    args_of.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    args_of.add_argument("--tokens", type=int, nargs="+", metavar="T", help="lengths of the prompt")
    args_of.add_argument(
        "--only",
        nargs="+",
        choices=tuple(MEASUREMENTS),
        default=tuple(MEASUREMENTS),
        metavar="PART",
        help="of: %(choices)s",
    )
    args = args_of.parse_args()
    setting = make_setting(args)
    rows, failed = [], False
    for done, name in enumerate(args.only):
        progress(done, len(args.only), name)
        try:
            rows += [replace(row, name=f"{name}: {row.name}") for row in MEASUREMENTS[name](setting)]
        except WrongResultError as error:
            print(f"WRONG RESULT: {name}: {error}", file=sys.stderr)
            sys.exit(1)
        except Exception:  # the other measurements are worth having; the exit status tells
            traceback.print_exc()
            failed = True
    if rows:
        about = meta(
            machine(args, setting.device), ("seqpar", "torch", "triton"), simulated=True, cuda=torch.version.cuda
        )
        report(args, about, rows, "One rank of a 70B model (tp = 8), its sums simulated")
        print(*setting.table, sep="\n")
    sys.exit(failed)


def make_setting(args: argparse.Namespace) -> Setting:
    device = torch.device(args.device)
    if device.type == "cpu":
        shape, tokens, rounds = TINY, (32,), 2
        torch.set_num_threads(1)
    else:
        shape = SHARD
        tokens, rounds = ((1024, 4096), 5) if args.quick else ((1024, 2048, 4096, 8192, 16384), 20)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    groups = comm.groups(comm.init_mesh(1, 1, args.device))
    layers = make_layers(shape, device, groups)
    return Setting(device, shape, tuple(args.tokens or tokens), rounds, groups.tp, layers)


def machine(args: argparse.Namespace, device: torch.device) -> str:
    return args.machine if device.type == "cpu" else f"{torch.cuda.get_device_name()}, simulated sums"


if __name__ == "__main__":
    main()
