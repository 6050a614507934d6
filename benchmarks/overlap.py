"""How much of a stack's communication ISO hides, on two CPU ranks of one thread each.

A stack of 8 decoder layers (model dim 1024, 16 query and 4 KV heads, MLP dim 2816, float32) is tensor-parallel over 2
gloo ranks and reads one prompt of T tokens. The link between the ranks is simulated (`comm.SimulatedLink`): its rate is
set so that communication is a share f of the time of the unchunked serial run. Then chunks of the prompt take turns.

Efficiency is (T_serial - T_overlap) / min(compute, communication) of the serial run: 1 when all of the shorter one is
hidden; the last sum of the stack has nothing to hide behind, so at most 1 - 1/(4 layers) at f = 0.5.

Two clocks. *Replay*: compute segments measured one by one in processor time of the computing thread, medians over
repetitions, put back into the real schedule (`plan.makespan`) with the link's times. It leaves out what the two shared
cores add (the transfers of gloo's own threads, other tenants), which no link of a GPU would; fine choices are judged by
it. *Wall*: the real run, simulated link included, paired and interleaved with the serial one; up to 4096 tokens.

`"auto"` knows neither: it decides by `plan.calibrate_layers`, run anew for each row with its link in force. Its regret
is the time of its cuts beside that of the best of the serial run and 2, 3 and 4 equal chunks, both replayed.

The same with nothing simulated: the ranks run in a private network namespace whose loopback a token bucket slows down
to 1 and 2 Gbit/s (Linux, where unprivileged namespaces are allowed; else the rows are missing, with the reason).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Contender, Row, Timing, check, launch, meta, parser, progress, ratio, report, time_rounds
from torch import Tensor

from seqpar import comm, plan
from seqpar.comm import SimulatedLink, Steps
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch

RANKS, LAYERS = 2, 8
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 1024, 2816, 16, 4, 64
ALPHA_S = 50e-6
SHARES = (0.15, 0.3, 0.5, 0.65)
# Chunked against whole attention and products in float32; sums over at most 8192 terms, 16 of them in a row.
TOLERANCE = 2e-5
EFFICIENCY = {0.5: 0.9}
EFFICIENCY_ELSEWHERE, REGRET, REAL = 0.85, 0.03, 0.75
PACKAGES = ("seqpar", "torch", "transformers")
CHUNKS = (1, 2, 3, 4)
TBF = "ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 512kb latency 400ms"


@dataclass(frozen=True)
class Size:
    """A prompt, and how often its runs are repeated: for the replay, and by the wall clock."""

    tokens: int
    repeats: int
    rounds: int


SIZES = (Size(1024, 7, 8), Size(2048, 5, 6), Size(4096, 5, 3), Size(8192, 3, 0))
QUICK_SIZES = (Size(512, 3, 3),)


class Segment(NamedTuple):
    """What a program computes up to a launch, and what it then sends; the last one sends nothing."""

    compute_s: float
    num_bytes: int | None


Programs = list[list[Segment]]


class Stack:
    """Decoder layers, a prompt and a cache: what one run needs."""

    def __init__(self, max_tokens: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        mesh = comm.init_mesh(tp=RANKS, sp=1)
        self.groups, heads = comm.groups(mesh), HeadMap(HEADS, KV_HEADS, RANKS, 1)
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
        )
        torch.manual_seed(0)
        self.layers = [
            ParallelDecoderLayer.from_module(
                LlamaDecoderLayer(config, i), groups=self.groups, heads=heads, layer_index=i
            )
            for i in range(LAYERS)
        ]
        self.kv = PagedKV.contiguous(LAYERS, 1, max_tokens, KV_HEADS // RANKS, HEAD_DIM)

    def prompt(self, tokens: int) -> None:
        torch.manual_seed(tokens)
        self.x = torch.randn(tokens, HIDDEN)
        angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.cat([angles, angles], 1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.begin()

    def begin(self) -> None:
        """An empty cache, and the batch of the whole prompt."""
        if 0 in self.kv:
            self.kv.free(0)
        self.batch = self.kv.batch([0], [len(self.x)])

    def programs(self, cuts: Sequence[int]) -> list[Steps[Tensor]]:
        bounds = [0, *cuts, len(self.x)]
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        parts = self.batch.split(cuts) if cuts else (self.batch,)
        return [self.steps(span, part) for span, part in zip(spans, parts, strict=True)]

    def steps(self, span: slice, batch: RaggedBatch) -> Steps[Tensor]:
        x = self.x[span]
        for layer in self.layers:
            x = yield from comm.call(layer, x, batch, self.cos[span], self.sin[span], self.kv)
        return x

    def run(self, cuts: Sequence[int]) -> Tensor:
        return torch.cat(comm.interleave(self.programs(cuts)))


def even_cuts(tokens: int, chunks: int) -> tuple[int, ...]:
    return tuple(r.start for r in even_ranges(tokens, chunks)[1:])


def segments(stack: Stack, cuts: Sequence[int], repeats: int) -> Programs:
    """The segments of every program in processor time: medians over `repeats`, means over ranks."""
    return segments_of(stack, [cuts], repeats)[0]


def segments_of(stack: Stack, choices: Sequence[Sequence[int]], repeats: int) -> list[Programs]:
    """`segments` of several cuts, which take turns, so that a machine that slows down slows all of them."""
    runs = [[_once(stack, cuts) for cuts in choices] for _ in range(repeats)]
    return [_medians(list(same)) for same in zip(*runs, strict=True)]


Run = tuple[list[list[float]], list[list[int | None]]]


def _once(stack: Stack, cuts: Sequence[int]) -> Run:
    """Seconds up to each launch of each program, and what it sent there."""
    stack.begin()
    dist.barrier()
    with comm.trace(clock=time.thread_time) as trace:
        stack.run(cuts)
    intervals = [i for i in trace.intervals if i.kind != "wait" and i.program]  # () is the schedule itself
    index = {program: at for at, program in enumerate(sorted({i.program for i in intervals}))}
    compute: list[list[float]] = [[0.0] for _ in index]
    sent: list[list[int | None]] = [[] for _ in index]
    for interval in sorted(intervals, key=lambda i: (i.launched_s, i.kind != "compute")):
        at = index[interval.program]
        if interval.kind == "comm":
            sent[at].append(interval.num_bytes)
            compute[at].append(0.0)
        else:
            compute[at][-1] += interval.end_s - interval.start_s
    return compute, [[*program, None] for program in sent]


def _medians(runs: list[Run]) -> Programs:
    seen, sizes = [compute for compute, _ in runs], runs[0][1]
    medians = [
        [statistics.median(values) for values in zip(*program, strict=True)] for program in zip(*seen, strict=True)
    ]
    flat = torch.tensor([value for program in medians for value in program], dtype=torch.float64)
    dist.all_reduce(flat)
    values = iter((flat / RANKS).tolist())
    return [[Segment(next(values), size) for size in program] for program in sizes]


def slots(programs: Programs, link: SimulatedLink) -> list[list[plan.Slot]]:
    """The segments on a link."""
    return [
        [plan.Slot(s.compute_s, 0.0 if s.num_bytes is None else link.seconds(s.num_bytes)) for s in program]
        for program in programs
    ]


def link_for(serial: Programs, share: float) -> SimulatedLink:
    """The link on which communication is `share` of the serial run's time."""
    (program,) = serial
    sent = [s.num_bytes for s in program if s.num_bytes is not None]
    seconds = share / (1 - share) * sum(s.compute_s for s in program)
    return SimulatedLink(ALPHA_S, sum(sent) / (seconds - len(sent) * ALPHA_S))


# What the ranks do.


class Outcome(NamedTuple):
    """One size on one link."""

    tokens: int
    share: float
    choice: tuple[int, ...]
    explained: str
    serial_s: float
    compute_s: float
    comm_s: float
    replayed_s: dict[str, float]  # by name of the choice
    predicted_s: float
    wall: dict[str, Timing]
    error: float


def calibrated(stack: Stack, tokens: int) -> plan.LayerCosts:
    """What "auto" of `seqpar.hf` knows when this prompt is its first: two layers at a quarter, a half and all of it."""
    sizes = (tokens // 4, tokens // 2, tokens)
    return plan.calibrate_layers(stack.layers[:2], group=stack.groups.flat, tokens=sizes, rounds=3)


def replay(programs: Programs, link: SimulatedLink) -> float:
    return plan.makespan(slots(programs, link)).total_s


def contender(stack: Stack, name: str, cuts: Sequence[int], link: SimulatedLink | None) -> Contender:
    """A run on the link; on the real one where that is None."""

    def prepare() -> None:
        stack.begin()
        if link is not None:
            link.reset()

    def run() -> Tensor:
        if link is None:
            return stack.run(cuts)
        with link.on(stack.groups.tp):
            return stack.run(cuts)

    return Contender(name, run, prepare)


@torch.no_grad()
def simulated(sizes: Sequence[Size], shares: Sequence[float], picture: Path | None) -> list[Outcome]:
    stack = Stack(max(size.tokens for size in sizes))
    outcomes: list[Outcome] = []
    total = len(sizes) * (1 + len(shares))
    for number, size in enumerate(sizes):
        progress(number * (1 + len(shares)), total, f"{size.tokens} tokens: segments")
        stack.prompt(size.tokens)
        expected = stack.run(())
        cuts = [even_cuts(size.tokens, n) for n in CHUNKS]
        measured = dict(zip(CHUNKS, segments_of(stack, cuts, size.repeats), strict=True))
        for at, share in enumerate(shares):
            progress(number * (1 + len(shares)) + at + 1, total, f"{size.tokens} tokens, f = {share}")
            link = link_for(measured[1], share)
            with link.on(stack.groups.tp):
                costs = calibrated(stack, size.tokens)
            choice = plan.overlap(costs, size.tokens, num_layers=LAYERS)
            named = {f"n={n}": programs for n, programs in measured.items()}
            named["auto"] = named.get(_name(choice.cuts, size.tokens)) or segments(stack, choice.cuts, size.repeats)
            runs = [contender(stack, "serial", (), link), contender(stack, "auto", choice.cuts, link)]
            errors = []
            for run in runs:
                run.prepare()
                errors.append(check(f"{size.tokens} {run.name}", run.run(), expected, TOLERANCE))
            timings = time_rounds(runs, size.rounds, warmup=0) if choice.cuts and size.rounds else []
            (serial,) = measured[1]
            outcomes.append(
                Outcome(
                    size.tokens,
                    share,
                    choice.cuts,
                    choice.explain(),
                    replay(measured[1], link),
                    sum(s.compute_s for s in serial),
                    sum(slot.comm_s for slot in slots(measured[1], link)[0]),
                    {name: replay(programs, link) for name, programs in named.items()},
                    choice.predicted_s,
                    {timing.name: timing for timing in timings},
                    max(errors),
                )
            )
    if picture is not None:
        draw(stack, sizes[0], picture)
    return outcomes


def _name(cuts: Sequence[int], tokens: int) -> str:
    """The fixed choice that these cuts are, if they are one."""
    return next((f"n={n}" for n in CHUNKS if even_cuts(tokens, n) == tuple(cuts)), "")


def draw(stack: Stack, size: Size, picture: Path) -> None:
    """The timelines of two layers, serial and with two chunks, at equal shares."""
    stack.prompt(size.tokens)
    link = link_for(segments(stack, (), 1), 0.5)
    layers, stack.layers = stack.layers, stack.layers[:2]
    for name, cuts in (("serial", ()), ("two-chunks", even_cuts(size.tokens, 2))):
        stack.begin()
        link.reset()
        dist.barrier()
        with comm.trace() as trace, link.on(stack.groups.tp):
            stack.run(cuts)
        if dist.get_rank() == 0:
            trace.plot(picture.with_name(f"{picture.stem}-{name}{picture.suffix}"))
    stack.layers = layers


@torch.no_grad()
def real(rounds: int, tokens: int) -> dict[str, Any]:
    """Serial against interleaved runs on whatever the ranks are connected by."""
    stack = Stack(tokens)
    stack.prompt(tokens)
    expected = stack.run(())
    choice = plan.overlap(calibrated(stack, tokens), tokens, num_layers=LAYERS)
    cuts = {"serial": (), **{f"n={n}": even_cuts(tokens, n) for n in CHUNKS[1:]}, "auto": choice.cuts}
    runs = [contender(stack, name, where, None) for name, where in cuts.items()]
    for run in runs:
        run.prepare()
        check(f"{tokens} {run.name}", run.run(), expected, TOLERANCE)
    timings = {t.name: t.rounds for t in time_rounds(runs, rounds, warmup=1)}
    return {"timings": timings, "cuts": choice.cuts, "explained": choice.explain()}


def on_namespace(rate: str, quick: bool) -> dict[str, Any] | str:
    """`real` in a network namespace with a slow loopback; or why it could not be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "real.json"
        inner = f'{TBF.format(rate=rate)} && exec "$0" "$@"'
        command = ["unshare", "-Urn", "bash", "-c", inner, sys.executable, __file__, "--inside", str(out)]
        ran = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=False)
        if ran.returncode or not out.exists():
            if "WRONG RESULT" in ran.stderr:
                sys.exit(ran.stderr)
            return (ran.stderr.strip().splitlines() or ["no error message"])[-1]
        found: dict[str, Any] = json.loads(out.read_text())
        return found


# The report.


def rows_of(outcomes: Sequence[Outcome], namespaces: dict[str, dict[str, Any] | str]) -> list[Row]:
    rows: list[Row] = []
    for o in outcomes:
        name, most = f"{o.tokens} tokens, f={o.share:g}", min(o.compute_s, o.comm_s)
        auto = o.replayed_s["auto"]
        if o.choice:
            target = EFFICIENCY.get(o.share, EFFICIENCY_ELSEWHERE)
            value = (o.serial_s - auto) / most
            rows.append(Row(f"{name}: efficiency, replay", value, "", target, value >= target))
        regret = auto / min(o.replayed_s.values()) - 1
        rows.append(Row(f"{name}: regret of auto", regret, "", REGRET, regret <= REGRET))
        rows.append(Row(f"{name}: auto ÷ serial, replay", auto / o.serial_s, "x", 1.0, auto <= o.serial_s))
        rows.append(Row(f"{name}: predicted ÷ replayed", o.predicted_s / auto, "x"))
        if o.wall:
            found = ratio(o.wall["auto"], o.wall["serial"])
            rows.append(Row(f"{name}: auto ÷ serial, wall", found.value, "x", None, None, (found.low, found.high)))
            serial = statistics.median(o.wall["serial"].rounds)
            rows.append(Row(f"{name}: efficiency, wall", (1 - found.value) * serial / most, ""))
        rows.append(Row(f"{name}: chunks chosen", len(o.choice) + 1, ""))
    for rate, found in namespaces.items():
        if isinstance(found, str):
            continue
        timings = {name: Timing(name, tuple(rounds)) for name, rounds in found["timings"].items()}
        for name, timing in timings.items():
            if name == "serial":
                continue
            r = ratio(timing, timings["serial"])
            target = REAL if name == "auto" and rate == "1gbit" else None
            ok = None if target is None else r.value <= target
            rows.append(Row(f"real {rate}/s: {name} ÷ serial", r.value, "x", target, ok, (r.low, r.high)))
        rows.append(Row(f"real {rate}/s: serial", timings["serial"].median_ms, "ms"))
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--inside", type=Path, metavar="FILE", help="only measure the real link; results go here")
    arguments.add_argument("--timeline", type=Path, metavar="FILE", help="draw two layers' timelines beside this name")
    arguments.add_argument("--tokens", type=int, nargs="+", metavar="T", help="only prompts of these lengths")
    arguments.add_argument("--explain", action="store_true", help="print why each choice was made")
    args = arguments.parse_args()
    real_size = (3, 512) if args.quick else (9, 1024)
    if args.inside:
        args.inside.write_text(json.dumps(launch(RANKS, real, *real_size)))
        return
    sizes, shares = (QUICK_SIZES, (0.5,)) if args.quick else (SIZES, SHARES)
    sizes = tuple(size for size in sizes if args.tokens is None or size.tokens in args.tokens)
    if not sizes:
        arguments.error(f"--tokens must be of {', '.join(str(size.tokens) for size in SIZES)}")
    outcomes = launch(RANKS, simulated, sizes, shares, args.timeline)
    namespaces = {rate: on_namespace(rate, args.quick) for rate in ("1gbit", "2gbit")}
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        ranks=RANKS,
        threads_per_rank=1,
        dtype="float32",
        layers=LAYERS,
        layer={"hidden": HIDDEN, "mlp": MLP, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        alpha_s=ALPHA_S,
        outcomes=[{**o._asdict(), "wall": {name: t.rounds for name, t in o.wall.items()}} for o in outcomes],
        sizes=[asdict(size) for size in sizes],
        real=namespaces,
        largest_relative_error=max(o.error for o in outcomes),
        tolerance=TOLERANCE,
    )
    title = "ISO on a simulated link (efficiency, regret) and on a slow real one (time ÷ serial), 2 gloo ranks"
    report(args, about, rows_of(outcomes, namespaces), title)
    for rate, found in namespaces.items():
        if isinstance(found, str):
            print(f"  not run: real link of {rate}/s: {found}")
    if args.explain:
        for o in outcomes:
            print(f"\n{o.tokens} tokens, f = {o.share}\n{o.explained}")


if __name__ == "__main__":
    main()
