"""`plan.simulate` beside the engine that it stands for, and how long a large simulation takes.

The engine: `examples/engine.py` serves a trace of Poisson arrivals with the bundled model on 1 and on 2 gloo ranks
(sequence parallel, shifting). Costs of its steps are fitted to other traces, served before: a straight line in what a
step has to do for each layout, bent where products get rows enough, and the scatter around it, drawn anew for every
simulated step. The same trace, policy, budget and cache are then simulated, and percentiles compared. Both are done
several times, of which the median counts.

The large one: 100,000 requests for a 70B model on 1,024 ranks in replicas of 8, in processor time of one core.

"""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from common import Row, launch, meta, parser, progress, report
from scaling import model_of

import seqpar
from seqpar import batching, comm, plan
from seqpar.partition import Layout, Shift

ROOT = Path(__file__).parent.parent
PACKAGES = ("seqpar", "torch")
SHARES = (0.5, 0.9, 0.99)
WITHIN = 0.15
SHIFT = 16
ENGINE = ["--tau", "64", "--max-requests", "32", "--pages", "1024", "--prompt-tokens", "200", "--new-tokens", "32"]
BENDS = (8, 16, 32)

REQUESTS, RANKS, MOST_S = 100_000, 1024, 60.0


class Session(NamedTuple):
    """One trace served by the engine: who asked for what, the times of all tokens, and what steps did."""

    trace: list[plan.Arrival]
    times: list[list[float]]
    works: list[plan.StepWork]
    seconds: list[float]

    def values(self) -> dict[str, list[float]]:
        """Times to the first tokens, and between tokens."""
        first = [times[0] - asked.at_s for asked, times in zip(self.trace, self.times, strict=True)]
        return {"TTFT": first, "TBT": [b - a for times in self.times for a, b in pairwise(times)]}


# The engine


def load_engine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine", ROOT / "examples" / "engine.py")
    assert spec is not None and spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    return engine


class Working:
    """A stepper that remembers what each of its steps had to do."""

    def __init__(self, stepper: Any) -> None:
        self.stepper, self.works = stepper, []

    def __call__(self, batch: Any, tokens: Any, rows: Sequence[int]) -> Any:
        self.works.append(work_of(batch.q_lens, batch.kv_lens, len(rows)))
        return self.stepper(batch, tokens, rows)


class Timed:
    """The loop as the engine takes it, with the seconds from the end of one step to that of the next."""

    def __init__(self, loop: Any) -> None:
        self.loop, self.seconds, self.ended = loop, [], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def step(self) -> Any:
        start, steps = self.ended or time.perf_counter(), self.loop.steps
        emitted = self.loop.step()
        now = time.perf_counter()
        if self.loop.steps > steps:
            self.seconds.append(now - start)
        self.ended = now if self.loop.live else None  # else it sleeps until somebody comes
        return emitted


def work_of(q_lens: Sequence[int], kv_lens: Sequence[int], rows: int) -> plan.StepWork:
    """What a step has to do, of its lengths."""
    pairs = cached = keys = decodes = 0
    for new, held in zip(q_lens, kv_lens, strict=True):
        if new == 1 and held > 1:
            decodes, cached = decodes + 1, cached + held
        else:
            pairs += new * (held - new) + new * (new + 1) // 2
            keys += held
    return plan.StepWork(sum(q_lens), pairs, cached, keys, decodes, rows)


def serve(ranks: int, seeds: Sequence[int], requests: int, rate: float) -> list[Session] | None:
    """The engine on these ranks, a session for each seed; on rank 0 what it saw."""
    from transformers import AutoTokenizer

    engine, found = load_engine(), []
    options = engine.parse([*ENGINE, "--sp", str(ranks), "--shift", str(SHIFT if ranks > 1 else 0)])
    options.requests, options.rate = requests, rate
    mesh = seqpar.init_mesh(sp=ranks, device="cpu")
    group = comm.groups(mesh).flat
    how = {"shift": options.shift or "off", "dtype": torch.float32, "progress": False}
    model = seqpar.hf.load(options.model, mesh, **how)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    stepper = seqpar.hf.Stepper(model, num_pages=options.pages, page_size=options.page_size)
    for at, seed in enumerate(seeds):
        options.seed = seed
        working = Working(stepper)
        budget = batching.Budget(options.max_tokens, options.max_requests, options.admission)
        loop = batching.TemporalFusion(
            working,
            stepper.kv,
            vocab_size=stepper.vocab_size,
            policy=batching.StallFree(options.tau),
            budget=budget,
            lead=group,
        )
        if group.rank():
            loop.follow()
            continue
        arrivals, _ = engine.generate_trace(options, tokenizer)
        timed = Timed(loop)
        with batching.Journal(None) as journal, loop:
            records, _ = engine.serve(timed, arrivals, [], journal)
        trace = [plan.Arrival(each.at_s, len(each.request.prompt), len(each.times)) for each in records]
        found.append(Session(trace, [each.times for each in records], working.works, timed.seconds))
        progress(at + 1, len(seeds), f"sessions on {ranks} rank(s)")
    return None if group.rank() else found


# What its steps cost


class Fitted:
    """Seconds of a step from what it has to do, with the scatter that was seen around them.

    Args:
        sessions: that were served.
        rule: which layout a step runs under.
        seed: of the scatter.
    """

    def __init__(self, sessions: Sequence[Session], rule: Shift, seed: int) -> None:
        self.draw = random.Random(seed)
        seen: dict[Layout, list[tuple[list[float], float]]] = {}
        for session in sessions:
            for work, seconds in zip(session.works, session.seconds, strict=True):
                seen.setdefault(rule.layout_of(work.tokens), []).append((features(work), seconds))
        self.weights = {layout: fit(*zip(*rows, strict=True)) for layout, rows in seen.items()}
        self.scatter = {
            layout: [seconds / max(1e-9, dot(self.weights[layout], row)) for row, seconds in rows]
            for layout, rows in seen.items()
        }

    def __call__(self, layout: Layout, work: plan.StepWork) -> float:
        return dot(self.weights[layout], features(work)) * self.draw.choice(self.scatter[layout])


def features(work: plan.StepWork) -> list[float]:
    """What seconds are a sum of."""
    rows = [float(max(0, work.tokens - bend)) for bend in (0, *BENDS)]
    return [1.0, *rows, float(work.decodes), float(work.pairs), float(work.cached), float(work.keys), float(work.rows)]


def fit(rows: Sequence[list[float]], seconds: Sequence[float]) -> list[float]:
    """Weights that are not negative, of the least relative error: those that would be are left out, one by one."""
    a, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    scale = a.abs().amax(0).clamp_min(1e-30)
    a, used = a / scale / b[:, None], list(range(a.shape[1]))
    while True:
        eye = 1e-6 * torch.eye(len(used), dtype=torch.float64)
        found = torch.linalg.lstsq(
            torch.cat([a[:, used], eye]), torch.cat([torch.ones_like(b), eye[:, 0] * 0])
        ).solution
        if found.min() >= 0 or len(used) == 1:
            break
        del used[int(found.argmin())]
    weights = torch.zeros(len(scale), dtype=torch.float64)
    weights[used] = found.clamp_min(0)
    return (weights / scale).tolist()


def dot(weights: Sequence[float], row: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(weights, row, strict=True))


class Compared(NamedTuple):
    """A percentile of the engine's and of the simulation's."""

    ranks: int
    metric: str
    share: float
    engine_s: float
    simulated_s: float

    @property
    def off(self) -> float:
        return abs(self.simulated_s / self.engine_s - 1)


def compare(ranks: int, learned: Sequence[Session], judged: Sequence[Session], seeds: int) -> list[Compared]:
    """Percentiles of the sessions that the costs have not seen, and of as many simulations."""
    options = load_engine().parse(ENGINE)
    base = Layout(1, ranks)
    rule = Shift.threshold(SHIFT, base) if ranks > 1 else Shift(((1, base),))
    budget = batching.Budget(options.max_tokens, options.max_requests, options.admission)
    compose = batching.Composer(batching.StallFree(options.tau), budget)
    fleet = plan.Fleet(options.pages, rule, page_size=options.page_size)
    runs = [
        plan.simulate(judged[0].trace, Fitted(learned, rule, seed), compose, fleet, repeat=False)
        for seed in range(seeds)
    ]
    found = []
    for metric in ("TTFT", "TBT"):
        simulated = [run.percentiles(metric.lower(), SHARES) for run in runs]
        measured = [[plan.percentile(session.values()[metric], share) for share in SHARES] for session in judged]
        for at, share in enumerate(SHARES):
            pair = (statistics.median(each[at] for each in values) for values in (measured, simulated))
            found.append(Compared(ranks, metric, share, *pair))
    return found


def validate(quick: bool) -> list[Compared]:
    """On one rank and on two, with sessions to learn from and to judge by turns: the machine is not always as fast."""
    turns = (101, 0) if quick else (0, 101, 0, 102, 0, 103, 0)
    found = []
    for ranks, requests, rate in ((1, 300, 25.0), (2, 200, 10.0)):
        warm, *sessions = launch(ranks, serve, ranks, [100, *turns], 60 if quick else requests, rate)
        assert warm.trace
        learned, judged = (
            [each for each, seed in zip(sessions, turns, strict=True) if (seed > 0) == learns]
            for learns in (True, False)
        )
        found += compare(ranks, learned, judged, 9)
    return found


# How long a large one takes


def large(requests: int) -> tuple[float, plan.Simulation]:
    """Processor seconds of the whole simulation, drawing the trace included, and what it found."""
    start = time.process_time()
    costs = plan.Costs(model_of("70B"), plan.HARDWARE["h100"], plan.Grid(8), plan.Options(weight_itemsize=1))
    tokens = costs.tokens_that_fit(2048, 256)
    capacity = tokens // (1024 + 128)
    full = plan.saturated(costs, plan.Workload(1024, 128), budget=512, capacity=min(256, capacity))
    replicas = RANKS // costs.grid.size
    rate = 0.7 * replicas * full.tokens_per_s / (1024 + 128)
    trace = plan.make_trace(requests, per_s=rate, prompt_tokens=1024, new_tokens=128)
    compose = batching.Composer(batching.StallFree(512), batching.Budget(512, 256))
    fleet = plan.Fleet(tokens // 16, Layout(8, 1), replicas=replicas)
    found = plan.simulate(trace, lambda layout, work: costs.seconds(work), compose, fleet)
    return time.process_time() - start, found


# The report


def tables(compared: Sequence[Compared], seconds: float, found: plan.Simulation) -> str:
    """As Markdown."""
    text = [
        "| ranks | | share | engine, ms | simulated, ms | off | within 15 % |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for each in compared:
        verdict = "met" if each.off <= WITHIN else "**missed**"
        times = f"{1e3 * each.engine_s:.1f} | {1e3 * each.simulated_s:.1f}"
        text.append(f"| {each.ranks} | {each.metric} | {each.share:.0%} | {times} | {each.off:.1%} | {verdict} |")
    text += ["", f"{len(found.rows):,} requests on {RANKS:,} simulated ranks: {seconds:.1f} s of one core.", ""]
    return "\n".join([*text, "```text", found.explain(), "```"])


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", choices=("engine", "large"), help="one part alone, and no files")
    args = arguments.parse_args()
    compared = validate(args.quick) if args.only in (None, "engine") else []
    requests = REQUESTS // (20 if args.quick else 1)
    seconds, found = large(requests) if args.only in (None, "large") else (0.0, None)
    rows = [
        Row(
            f"{each.ranks} rank(s), {each.metric} of {each.share:.0%}: off by", each.off, "", WITHIN, each.off <= WITHIN
        )
        for each in compared
    ]
    if found is not None:
        target = MOST_S * requests / REQUESTS
        rows.append(Row(f"{requests:,} requests on {RANKS:,} ranks", seconds, "s", target, seconds <= target))
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        engine=" ".join(ENGINE),
        shift=SHIFT,
        compared=[{**each._asdict(), "off": each.off} for each in compared],
    )
    plot, args.plot = args.plot, None
    if args.only:
        args.json = args.markdown = None
    title = "the simulator beside the engine, and its speed"
    shown = f"\n\n![percentiles of the engine and of the simulation]({plot.name})" if plot else ""
    report(args, about, rows, title, tables(compared, seconds, found) + shown if found and compared else None)
    if plot and compared:
        picture(plot, compared, f"{args.machine}, {about['date']}")
    if any(row.ok is False for row in rows) and not args.quick:
        print("a target was missed", file=sys.stderr)


def picture(path: Path, compared: Sequence[Compared], title: str) -> None:
    """Percentiles of the engine and of the simulation, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, ranks in zip(figure.subplots(1, 2), sorted({each.ranks for each in compared}), strict=False):
        mine = [each for each in compared if each.ranks == ranks]
        for at, values in enumerate(([each.engine_s for each in mine], [each.simulated_s for each in mine])):
            places = [place + (at - 0.5) * 0.4 for place in range(len(mine))]
            axes.bar(places, [1e3 * value for value in values], 0.4, label=("engine", "simulated")[at])
        axes.set_xticks(range(len(mine)), [f"{each.metric}\n{each.share:.0%}" for each in mine])
        axes.set(title=f"{ranks} rank(s)", ylabel="ms", yscale="log")
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
