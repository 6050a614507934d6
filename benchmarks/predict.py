"""What `plan.cost` predicts after `plan.calibrate`, beside steps of the bundled model; and what its choices cost.

The bundled checkpoint in float32 on 1, 2 and 4 gloo ranks of one thread each: decodes and prompts, under every layout
of the ranks, whole and in two and three chunks that take turns. `calibrate` measures layers of its sizes with random
weights and knows neither the checkpoint nor these steps; what a step takes around its layers on the host (tables,
gathering of rows) is `Options.overhead_s`, taken from the median of the decodes of one token.

*Replay*: the compute segments of every step in processor time of the computing thread, for each the median of the
repetitions and the slowest rank, put into the real schedule (`plan.makespan`) with a link's times, as if every rank had
a core of its own. Prediction and replay meet here: this is what is judged. Links are simulated, and calibrated in the
virtual time of their own clock, so that what sharing cores adds to a transfer is in neither.

*Wall*: the same steps by the wall clock with the links in force, layouts and cuts taking turns in every round. On ranks
that share cores nothing here predicts that; it is shown beside.

*Tuner*: `plan.best` on the calibrated hardware where it has an objective for the step (a prompt's time, the time of one
decode), else the least prediction over all layouts and cuts. Its regret is the replayed time of what it chose beside
that of the best of all layouts and cuts, fewer ranks included where the tuner may take them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Row, Timing, WrongResultError, launch, meta, parser, progress, ratio, report
from torch import Tensor

import seqpar
from seqpar import comm, plan
from seqpar.comm import SimulatedLink
from seqpar.partition import Interleave, Layout, Shift

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"
MODEL = plan.Model.from_config(CHECKPOINT)
RANKS = (1, 2, 4)
LINKS = {"2 Gbit/s": (50e-6, 0.25e9), "10 Gbit/s": (50e-6, 1.25e9)}  # latency, bytes a second that a rank sends
CHUNKS = (1, 2, 3)
CONTEXT, PAGE = 256, 16
ERROR, REGRET, SHARE = 0.10, 0.05, 0.95
OPTIONS = plan.Options(weight_itemsize=4, kv_itemsize=4, itemsize=4)
TOLERANCE = 1e-4  # of logits: sums over at most 1024 terms in float32, in other orders
PACKAGES = ("seqpar", "torch", "transformers")


class Step(NamedTuple):
    """Requests with so many new tokens each, behind so many cached ones; each further request has one more."""

    new: int
    cached: int = 0
    requests: int = 1

    @property
    def name(self) -> str:
        if self.new == 1:
            return f"{self.requests} decode(s)"
        return f"prompt of {self.new}" + (f" behind {self.cached}" if self.cached else "")

    @property
    def tokens(self) -> int:
        return self.new * self.requests

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """New and cached tokens of each request."""
        return [self.new] * self.requests, [self.cached + i if self.cached else 0 for i in range(self.requests)]


STEPS = (
    *(Step(1, CONTEXT, n) for n in (1, 4, 8, 16, 32)),
    *(Step(n) for n in (32, 64, 128, 256, 512, 1024)),
    Step(256, 512),
)
QUICK = (Step(1, CONTEXT), Step(1, CONTEXT, 8), Step(64), Step(256), Step(256, 512))


class Way(NamedTuple):
    """How a step runs."""

    layout: Layout
    chunks: int

    @property
    def name(self) -> str:
        return f"{self.layout.tp}x{self.layout.sp}" + (f", {self.chunks} chunks" if self.chunks > 1 else "")


class Segments(NamedTuple):
    """What a step computes and sends: around its programs, and in each of them up to every launch."""

    around_s: float
    around_bytes: tuple[int, ...]
    programs: tuple[tuple[tuple[float, int], ...], ...]  # of the last one of each nothing is sent: -1

    def seconds(self, link: SimulatedLink | None) -> float:
        """Replayed on a link."""

        def carried(num_bytes: int) -> float:
            return 0.0 if link is None or num_bytes < 0 else link.seconds(num_bytes)

        slots = [[plan.Slot(compute_s, carried(sent)) for compute_s, sent in program] for program in self.programs]
        return self.around_s + sum(map(carried, self.around_bytes)) + plan.makespan(slots).total_s


Found = dict[Step, dict[Way, Segments]]


class Virtual:
    """A clock that only a link's transfers move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Runner:
    """The model, which runs any step under any layout."""

    def __init__(self, ranks: int, most: int) -> None:
        mesh = seqpar.init_mesh(sp=ranks, device="cpu")
        self.groups = comm.groups(mesh)
        self.model = seqpar.hf.load(CHECKPOINT, mesh, dtype=torch.float32, progress=False)
        self.backbone: Any = self.model.model
        self.places = comm.layout_groups(self.groups)
        self.backbone.add_layouts(self.places)
        self.mesh = mesh
        pages = 33 * -(-(CONTEXT + 64) // PAGE) + 2 * -(-most // PAGE)
        self.kv = self.backbone.cache_spec().make(pages, PAGE, None)

    def prepare(self, step: Step, way: Way) -> Callable[[], Tensor]:
        """What is to be timed; the cache holds what went before."""
        for request in list(self.kv.ids):
            self.kv.free(request)
        self.backbone.shift = Shift(((1, way.layout),))
        self.backbone.overlap = Interleave(way.chunks, min_tokens=2) if way.chunks > 1 else None
        new, cached = step.lengths
        draw = torch.Generator().manual_seed(step.tokens)
        if step.cached:
            filled = self.kv.batch(range(step.requests), cached)
            for layer in range(self.kv.num_layers):
                k, v = torch.randn(2, sum(cached), 1, MODEL.shape.head_dim, generator=draw)
                wide = (x.expand(-1, self.kv.num_kv_heads, -1) for x in (k, v))
                self.kv.append(layer, *wide, filled)
        batch = self.kv.batch(range(step.requests), new)
        tokens = torch.randint(3, MODEL.vocab_size, (step.tokens,), generator=draw)
        rows = [step.new * (number + 1) - 1 for number in range(step.requests)]

        def run() -> Tensor:
            layout = self.backbone.layout_of(batch)
            hidden = comm.run(self.backbone.ragged_steps(tokens, batch, self.kv, rows, has_tail=False, layout=layout))
            logits: Tensor = self.model.lm_head(hidden)
            return logits

        return run

    def once(self, step: Step, way: Way) -> tuple[list[float], list[int], list[list[float]], list[list[int]]]:
        """Seconds and bytes around the programs, and of each of them."""
        run = self.prepare(step, way)
        dist.barrier()
        with comm.trace(clock=time.thread_time) as trace:
            run()
        seen = sorted(
            (each for each in trace.intervals if each.kind != "wait"), key=lambda i: (i.launched_s, i.kind != "compute")
        )
        inner = sorted({each.program for each in seen if each.program})
        around, sent = 0.0, []
        compute: list[list[float]] = [[0.0] for _ in inner]
        launched: list[list[int]] = [[] for _ in inner]
        for each in seen:
            if not each.program:
                if each.kind == "comm":
                    sent.append(each.num_bytes)
                else:
                    around += each.end_s - each.start_s
                continue
            at = inner.index(each.program)
            if each.kind == "comm":
                launched[at].append(each.num_bytes)
                compute[at].append(0.0)
            else:
                compute[at][-1] += each.end_s - each.start_s
        return [around], sent, compute, launched

    def wall(self, step: Step, way: Way, link: SimulatedLink | None) -> float:
        """Seconds by the wall clock on this rank, with a link in force."""
        run = self.prepare(step, way)
        dist.barrier()
        start = time.perf_counter()
        if link is None:
            run()
        else:
            link.reset()
            _, tp, sp, flat = self.places[way.layout]
            with link.on(flat, tp, sp):
                run()
        return time.perf_counter() - start


def agreed(runs: Sequence[tuple[list[float], list[int], list[list[float]], list[list[int]]]]) -> Segments:
    """Medians over the repetitions, of the slowest rank in every segment."""
    flat = [[*around, *(value for program in compute for value in program)] for around, _, compute, _ in runs]
    medians = torch.tensor([statistics.median(column) for column in zip(*flat, strict=True)], dtype=torch.float64)
    _, sent, compute, launched = runs[0]
    bytes_ = torch.tensor([*sent, *(value for program in launched for value in program)], dtype=torch.int64)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    dist.all_reduce(bytes_, op=dist.ReduceOp.MAX)
    seconds, sizes = iter(medians.tolist()), iter(bytes_.tolist())
    around = next(seconds)
    first = tuple(next(sizes) for _ in sent)
    programs = tuple(
        tuple((next(seconds), next(sizes) if at + 1 < len(program) else -1) for at in range(len(program)))
        for program in compute
    )
    return Segments(around, first, programs)


def ways_of(step: Step, layouts: Sequence[Layout]) -> list[Way]:
    """Decodes are never cut, nor is anything on one rank."""
    return [
        Way(layout, chunks) for layout, chunks in product(layouts, CHUNKS) if chunks == 1 or step.new > 1 < layout.size
    ]


class Measured(NamedTuple):
    """All that one number of ranks gives."""

    found: Found
    hardware: dict[str, plan.Hardware]
    wall: dict[str, dict[Step, dict[Way, list[float]]]]
    calibrated_s: float


@torch.no_grad()
def measure(ranks: int, quick: bool) -> Measured:
    """Calibrations, segments, and times by the wall clock."""
    steps = QUICK if quick else STEPS
    runner = Runner(ranks, 1024)
    layouts = list(runner.places)
    check(runner, layouts)
    start = time.perf_counter()
    hardware = {name: calibrated(runner, link, quick) for name, link in links_of(ranks).items()}
    took = (time.perf_counter() - start) / len(hardware)
    found: Found = {}
    wall: dict[str, dict[Step, dict[Way, list[float]]]] = {name: {} for name in hardware}
    for at, step in enumerate(steps):
        progress(at, len(steps), f"{ranks} ranks, {step.name}")
        ways = ways_of(step, layouts)
        repeats = 5 if quick else 9 if step.tokens <= 256 else 7
        rounds = [[runner.once(step, way) for way in ways] for _ in range(repeats + 1)][1:]
        found[step] = {way: agreed([each[at] for each in rounds]) for at, way in enumerate(ways)}
        for name, link in links_of(ranks).items():
            real = None if link is None else SimulatedLink(link.alpha_s, link.bytes_per_s)
            times = [[runner.wall(step, way, real) for way in ways] for _ in range(3 if quick else 5)]
            slowest = torch.tensor(times, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            wall[name][step] = dict(zip(ways, slowest.T.tolist(), strict=True))
    progress(len(steps), len(steps), f"{ranks} ranks, done")
    return Measured(found, hardware, wall, took)


def links_of(ranks: int) -> dict[str, SimulatedLink | None]:
    """Those that are tried; one rank needs none."""
    if ranks == 1:
        return {"none": None}
    return {name: SimulatedLink(*rates) for name, rates in LINKS.items()}


def calibrated(runner: Runner, link: SimulatedLink | None, quick: bool) -> plan.Hardware:
    """The ranks, and the link in its own time."""
    options: dict[str, Any] = {"model": MODEL, "layers": MODEL.num_layers, "rounds": 3 if quick else 5}
    options["tokens"] = (1, 8, 32, 128, 512) if quick else (1, 4, 16, 32, 64, 128, 256, 512, 1024)
    if link is None:
        return plan.calibrate(runner.mesh, **options)
    clock = Virtual()
    virtual = SimulatedLink(link.alpha_s, link.bytes_per_s, clock=clock.read, sleep=clock.sleep)
    return plan.calibrate(runner.mesh, link=virtual, **options)


def check(runner: Runner, layouts: Sequence[Layout]) -> None:
    """Every way gives the same logits, or nothing is measured."""
    step = Step(64)
    expected = runner.prepare(step, Way(layouts[0], 1))()
    for way in ways_of(step, layouts):
        got = runner.prepare(step, way)()
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE:
            raise WrongResultError(f"{way.name}: relative error {error:.2e} is above {TOLERANCE:.0e}")


# Predictions.


class Case(NamedTuple):
    """One way to run one step on one link."""

    ranks: int
    link: str
    step: Step
    way: Way
    predicted_s: float
    replayed_s: float
    wall: Timing

    @property
    def error(self) -> float:
        return abs(self.predicted_s / self.replayed_s - 1)


class Chosen(NamedTuple):
    """What the tuner takes for a step, and the best there is."""

    ranks: int
    link: str
    step: Step
    way: Way
    best: Way
    replayed_s: float
    best_s: float
    by: str

    @property
    def regret(self) -> float:
        return self.replayed_s / self.best_s - 1


def predict(hardware: plan.Hardware, step: Step, way: Way, overhead_s: float) -> float:
    """`plan.cost` of it."""
    cut = Interleave(way.chunks, min_tokens=2) if way.chunks > 1 else None
    options = replace(OPTIONS, overlap=cut, overhead_s=overhead_s)
    return plan.cost(MODEL, hardware, way.layout, *step.lengths, options=options).total_s


def overhead(measured: Measured) -> float:
    """What a step takes around its programs on the host, beside the head."""
    (first,) = [step for step in measured.found if step == Step(1, CONTEXT)]
    hardware = next(iter(measured.hardware.values()))
    shares = []
    for way, segments in measured.found[first].items():
        head = hardware.accelerator.product_s(1, MODEL.vocab_size / way.layout.size, MODEL.shape.hidden_size, 4)
        shares.append(max(0.0, segments.around_s - head))
    return statistics.median(shares)


def cases_of(ranks: int, measured: Measured) -> list[Case]:
    found, links, extra = [], links_of(ranks), overhead(measured)
    for name, hardware in measured.hardware.items():
        for step, ways in measured.found.items():
            for way, segments in ways.items():
                wall = Timing(way.name, tuple(measured.wall[name][step][way]))
                told = predict(hardware, step, way, extra)
                found.append(Case(ranks, name, step, way, told, segments.seconds(links[name]), wall))
    return found


def chosen_of(ranks: int, measured: Measured, cases: Sequence[Case], fewer: Sequence[Measured]) -> list[Chosen]:
    """The tuner's choice for every step and link."""
    found = []
    for name, hardware in measured.hardware.items():
        for step in measured.found:
            mine = {case.way: case for case in cases if (case.ranks, case.link, case.step) == (ranks, name, step)}
            times = {way: case.replayed_s for way, case in mine.items()}
            way = tuned(hardware, step, ranks, overhead(measured))
            by = "plan.best"
            if way is None:
                way, by = min(mine, key=lambda each: mine[each].predicted_s), "plan.cost"
            else:
                for other in fewer:
                    link = links_of(ranks)[name]
                    times |= {each: segments.seconds(link) for each, segments in other.found[step].items()}
            best = min(times, key=times.__getitem__)
            found.append(Chosen(ranks, name, step, way, best, times[way], times[best], by))
    return found


def tuned(hardware: plan.Hardware, step: Step, ranks: int, overhead_s: float) -> Way | None:
    """What `plan.best` takes for a step that it has an objective for."""
    if step.cached and step != Step(1, CONTEXT):
        return None
    prompt = step.cached or step.new
    found = plan.best(
        MODEL,
        hardware,
        plan.Workload(prompt, 1, 1),
        "tpot" if step.new == 1 else "ttft",
        ranks=ranks,
        options=replace(OPTIONS, overhead_s=overhead_s),
        budgets=(prompt,),
        prefills=("ulysses",),
        decodes=("local",),
    ).chosen
    layout = found.options.shift.layout_of(step.tokens) if found.options.shift else found.grid.layout
    chunks = found.options.overlap.chunks if found.options.overlap and step.new > 1 else 1
    return Way(layout, chunks)


# The report.


def rows_of(cases: Sequence[Case], chosen: Sequence[Chosen], measured: dict[int, Measured]) -> list[Row]:
    median = statistics.median(case.error for case in cases)
    near = sum(each.regret <= REGRET for each in chosen) / len(chosen)
    rows = [
        Row(f"median error of {len(cases)} predictions", median, "", ERROR, median <= ERROR),
        Row(f"share of {len(chosen)} choices with a regret of at most {REGRET:.0%}", near, "", SHARE, near >= SHARE),
        Row("largest regret", max(each.regret for each in chosen), ""),
    ]
    rows += [Row(f"calibrate on {ranks} rank(s)", each.calibrated_s, "s") for ranks, each in measured.items()]
    for ranks in measured:
        for link in measured[ranks].hardware:
            mine = [case for case in cases if (case.ranks, case.link) == (ranks, link)]
            rows.append(
                Row(f"{ranks} rank(s), {link}: median error", statistics.median(case.error for case in mine), "")
            )
            walls = [case.predicted_s / statistics.median(case.wall.rounds) for case in mine]
            rows.append(Row(f"{ranks} rank(s), {link}: predicted ÷ wall, median", statistics.median(walls), "x"))
    by = {(case.ranks, case.link, case.step, case.way): case for case in cases}
    for each in chosen:
        one, other = (by.get((each.ranks, each.link, each.step, way)) for way in (each.way, each.best))
        if one is not None and other is not None and one is not other:
            value = ratio(one.wall, other.wall)
            name = f"{each.ranks} ranks, {each.link}, {each.step.name}: {each.way.name} ÷ {each.best.name}, wall"
            rows.append(Row(name, value.value, "x", interval=(value.low, value.high)))
    return rows


def tables(cases: Sequence[Case], chosen: Sequence[Chosen], rows: Sequence[Row]) -> str:
    """As Markdown: the targets, errors by ranks and steps, choices."""
    lines = ["| | value | target | |", "|---|---:|---:|---|"]
    for row in (row for row in rows if row.interval is None):
        verdict = {None: "", True: "met", False: "**missed**"}[row.ok]
        lines.append(f"| {row.name} | {row.value:.3g} {row.unit} | {row.target or ''} | {verdict} |")
    ranks = sorted({case.ranks for case in cases})
    lines += ["", f"| median error | {' | '.join(f'{n} rank(s)' for n in ranks)} |", f"|---|{'---:|' * len(ranks)}"]
    for step in dict.fromkeys(case.step for case in cases):
        cells = []
        for n in ranks:
            cells.append(
                f"{statistics.median(case.error for case in cases if (case.ranks, case.step) == (n, step)):.1%}"
            )
        lines.append(f"| {step.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| ranks | link | step | chosen | best | replayed, ms | best, ms | regret | by | chosen ÷ best, wall |",
        "|---:|---|---|---|---|---:|---:|---:|---|---|",
    ]
    walls = {row.name: row for row in rows if row.interval is not None}
    for each in chosen:
        name = f"{each.ranks} ranks, {each.link}, {each.step.name}: {each.way.name} ÷ {each.best.name}, wall"
        wall = walls.get(name)
        beside = (
            f"{wall.value:.2f} ({wall.interval[0]:.2f} to {wall.interval[1]:.2f})" if wall and wall.interval else ""
        )
        times = f"{1e3 * each.replayed_s:.2f} | {1e3 * each.best_s:.2f} | {each.regret:.1%}"
        lines.append(
            f"| {each.ranks} | {each.link} | {each.step.name} | {each.way.name} | {each.best.name} | {times} | "
            f"{each.by} | {beside} |"
        )
    return "\n".join(lines)


def picture(path: Path, cases: Sequence[Case], title: str) -> None:
    """Predicted against replayed, and against the wall clock."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    sides: tuple[tuple[Any, str, Callable[[Case], float]], ...] = tuple(
        zip(
            figure.subplots(1, 2),
            ("replayed", "by the wall clock"),
            (lambda case: case.replayed_s, lambda case: statistics.median(case.wall.rounds)),
            strict=True,
        )
    )
    for axes, name, of in sides:
        for at, ranks in enumerate(sorted({case.ranks for case in cases})):
            mine = [case for case in cases if case.ranks == ranks]
            xs, ys = [1e3 * of(case) for case in mine], [1e3 * case.predicted_s for case in mine]
            axes.plot(xs, ys, "o", markersize=3, color=f"C{at}", label=f"{ranks} rank(s)")
        ends = [1e3 * min(case.predicted_s for case in cases), 1e3 * max(case.predicted_s for case in cases)]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=f"{name}, ms", ylabel="predicted, ms")
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser(__doc__ or "").parse_args(arguments)
    measured = {ranks: launch(ranks, measure, ranks, args.quick) for ranks in RANKS}
    cases = [case for ranks, each in measured.items() for case in cases_of(ranks, each)]
    chosen = [
        found
        for ranks, each in measured.items()
        if ranks > 1
        for found in chosen_of(ranks, each, cases, [other for n, other in measured.items() if n < ranks])
    ]
    rows = rows_of(cases, chosen, measured)
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        dtype="float32",
        links={name: dict(zip(("alpha_s", "bytes_per_s"), rates, strict=True)) for name, rates in LINKS.items()},
        overhead_s={ranks: overhead(each) for ranks, each in measured.items()},
        cases=[
            {
                "ranks": case.ranks,
                "link": case.link,
                "step": case.step._asdict(),
                "way": case.way.name,
                "predicted_s": case.predicted_s,
                "replayed_s": case.replayed_s,
                "wall_s": case.wall.rounds,
            }
            for case in cases
        ],
        chosen=[
            {**each._asdict(), "step": each.step._asdict(), "way": each.way.name, "best": each.best.name}
            for each in chosen
        ],
    )
    plot, args.plot = args.plot, None
    title = "predicted after calibrate beside replayed steps of the bundled model, and what the tuner's choices cost"
    shown = f"\n\n![predicted against replayed, and against the wall clock]({plot.name})" if plot else ""
    report(args, about, rows, title, tables(cases, chosen, rows) + shown)
    if plot:
        picture(plot, cases, f"{args.machine}, {about['date']}")
    if any(row.ok is False for row in rows) and not args.quick:
        print("a target was missed", file=sys.stderr)


if __name__ == "__main__":
    main()
