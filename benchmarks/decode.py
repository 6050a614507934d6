"""Decodes over 256 to 65,536 cached tokens, by heads and with queries that travel, on links of several speeds.

One layer's attention (8 query heads of 128, 1 or 2 KV heads, float32) under tensor parallelism over 2 or 4 gloo ranks.
By heads (`local`) a rank reads the whole context of at least one KV head, and nothing travels. With queries that travel
(`qship`) the context is spread by tokens, and a step has an all-gather and an all-to-all; `ag_rs` returns partials by
an all-gather and a reduce-scatter, `helix` has computed all heads' projections on every rank and gathers nothing.

Replay: compute segments in processor time of the computing thread (the slowest rank's in every slot, medians over
repetitions), put into the schedule with the link's times, as if every rank had a core of its own. The rule is
`plan.decode` on one half of the repetitions, at every third context or so; the crossover and regret are those of the
other half, at all contexts. Bytes of every step are compared with
`plan.decode_volumes`, which knows no context. Beside it the wall clock of 2 ranks, a core each, that sleep for the
link, with costs by `plan.calibrate_decode`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Contender, Row, WrongResultError, check, launch, meta, parser, progress, ratio, report, time_rounds
from shift import JUDGED, SEEN, Run, Step, over_ranks, slots
from torch import Tensor

from seqpar import comm, plan
from seqpar.comm import LinkCosts, SimulatedLink
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import QShipDecodeAttention, UlyssesAttention
from seqpar.partition import HeadMap, Layout, Striping

HEADS, HEAD_DIM, INTERLEAVE, LAYERS = 8, 128, 16, 2
SHORT, SHORTEST, LONGEST = 16, 256, 65536
MOST = 2 * LONGEST  # tokens of all requests
CONTEXTS = tuple(round(SHORTEST * 2 ** (i / 2)) for i in range(17))
QUICK_CONTEXTS = tuple(SHORTEST * 4**i for i in range(5))
KNOWN = (256, 1024, 4096, 16384, 32768, 65536)  # contexts that the rule was told of
QUICK_KNOWN = (256, 4096, 65536)
BATCHES = (1, 8)
LINKS = {
    "20 us, 50 GB/s": LinkCosts(20e-6, 50e9),
    "100 us, 12.5 GB/s": LinkCosts(100e-6, 12.5e9),
    "300 us, 1.25 GB/s": LinkCosts(300e-6, 1.25e9),
    "800 us, 0.125 GB/s": LinkCosts(800e-6, 0.125e9),
}
FORMS = ("local", "qship", "ag_rs", "helix")
CROSSOVER, REGRET = 0.2, 0.05
TOLERANCE = 2e-5  # float32 against float64
WALL_LINK = LINKS["300 us, 1.25 GB/s"]
PACKAGES = ("seqpar", "torch")
COLOURS = {"local": "tab:blue", "qship": "tab:orange", "ag_rs": "tab:olive", "helix": "tab:green"}


class Case(NamedTuple):
    """Ranks, and the KV heads of the model."""

    ranks: int
    kv_heads: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.kv_heads} KV head(s)"


CASES = (Case(2, 1), Case(4, 1), Case(4, 2), Case(2, 2))


class Key(NamedTuple):
    """A step: how it is computed, of how many requests, over how many cached tokens each."""

    form: str
    batch: int
    context: int


Measured = dict[Key, Step]


class Bench:
    """Layers and caches of both placements for some requests, which grow by and by."""

    def __init__(self, case: Case, batch: int, most: int) -> None:
        base = comm.groups(comm.init_mesh(tp=1, sp=case.ranks))
        self.under = comm.layout_groups(base)[Layout(case.ranks, 1)]
        self.base, self.batch, self.context = base, batch, 0
        self.heads = HeadMap(HEADS, case.kv_heads, 1, case.ranks)
        self.there = self.heads.on(self.under.layout)
        self.rank = base.flat.rank()
        self.layers: dict[str, list[Any]] = {
            "local": [UlyssesAttention(self.heads, HEAD_DIM, group=base.sp, layer_index=i) for i in range(LAYERS)]
        }
        for form, exchange in (("qship", "a2a"), ("ag_rs", "ag_rs"), ("helix", "a2a")):
            self.layers[form] = [
                QShipDecodeAttention(self.heads, HEAD_DIM, group=base.sp, layer_index=i, exchange=exchange)
                for i in range(LAYERS)
            ]
        for layers in self.layers.values():
            for layer in layers:
                layer.add_layout(self.under.layout, group=self.under.sp)
        self.own = self.heads.kv_ranges[self.rank]
        self.kv = PagedKV.contiguous(LAYERS, batch, most + 1, self.own.size, HEAD_DIM)
        self.stripes = StripedKV.contiguous(
            LAYERS,
            batch,
            most + 1,
            case.kv_heads,
            HEAD_DIM,
            striping=Striping(case.ranks, INTERLEAVE),
            rank=self.rank,
        )

    def grow(self, context: int) -> None:
        """Let every request have so many cached tokens."""
        more = [context - self.context] * self.batch
        batches = [kv.batch(range(self.batch), more) for kv in (self.kv, self.stripes)]
        generator = torch.Generator().manual_seed(context)
        for layer in range(LAYERS):
            k, v = torch.randn(2, sum(more), self.heads.num_kv_heads, HEAD_DIM, generator=generator)
            mine = slice(*self.own)
            self.kv.append(layer, k[:, mine], v[:, mine], batches[0])
            self.stripes.append(layer, k, v, batches[1])
        self.context = context

    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step's tokens, the same on every rank: q, k, v of all heads."""
        generator = torch.Generator().manual_seed(1)
        sizes = (HEADS, self.heads.num_kv_heads, self.heads.num_kv_heads)
        q, k, v = (torch.randn(self.batch, heads, HEAD_DIM, generator=generator) for heads in sizes)
        return q, k, v

    def steps(self, form: str, layer: int, batch: Any) -> comm.Steps[Tensor]:
        heads, tp_rank = (self.heads, 0) if form == "helix" else (self.there, self.rank)
        q, k, v = self.new()
        stored = {"q": q, "kv": torch.stack([k, v], 2)}
        columns = [stored[kind][:, r.start : r.stop].flatten(1) for kind, r in heads.storage(tp_rank)]
        options = {"whole": True} if form == "helix" else {}
        kv = self.kv if form == "local" else self.stripes
        layout = self.under.layout
        return self.layers[form][layer].steps(torch.cat(columns, 1), batch, kv=kv, layout=layout, **options)

    def once(self, form: str, link: SimulatedLink | None = None) -> tuple[Run, Tensor, int]:
        """One token of each request, in the second of two layers over one batch; what it sent."""
        kv = self.kv if form == "local" else self.stripes
        batch = kv.batch(range(self.batch), [1] * self.batch)
        comm.run(self.steps(form, 0, batch))
        last = self.steps(form, 1, batch)
        dist.barrier()
        start = time.perf_counter()
        with comm.record() as sent, comm.trace(clock=time.thread_time) as trace:
            (out,) = comm.interleave([last])
        run = Run(*slots(trace), time.perf_counter() - start)
        for request in range(self.batch):
            kv.truncate(request, self.context)
        return run, out, sent.total.num_bytes

    def check_bytes(self, form: str, sent: int) -> None:
        if sent != self.volumes(form)[self.rank]:
            raise WrongResultError(f"{form} over {self.context} tokens sent {sent} bytes, not {self.volumes(form)}")

    def volumes(self, form: str) -> list[int]:
        return volumes(self.heads, form, self.batch)

    def verify(self) -> float:
        """The largest error of any form against one process in float64; `grow` from nothing has been called once."""
        generator = torch.Generator().manual_seed(self.context)
        q, k, v = (x.double() for x in self.new())
        shape = (self.batch, self.context, self.heads.num_kv_heads, HEAD_DIM)
        for _ in range(LAYERS):
            cached = torch.randn(2, self.batch * self.context, *shape[2:], generator=generator)
        keys, values = (
            torch.cat([old.double().view(shape), x[:, None]], 1).repeat_interleave(self.heads.group_size, 2)
            for old, x in zip(cached, (k, v), strict=True)
        )
        scores = torch.einsum("bhd,bkhd->bhk", q, keys) * HEAD_DIM**-0.5
        expected = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), values)
        mine = expected[:, slice(*self.there.q_shard(self.rank))].flatten(1)
        return max(check(f"{form} over {self.context}", self.once(form)[1], mine, TOLERANCE) for form in FORMS)


def volumes(heads: HeadMap, form: str, batch: int) -> list[int]:
    """Bytes of every rank in a step, by the formula."""
    found = plan.decode_volumes(
        heads,
        batch,
        "local" if form == "local" else "qship",
        head_dim=HEAD_DIM,
        itemsize=4,
        layout=Layout(heads.size, 1),
        exchange="ag_rs" if form == "ag_rs" else "a2a",
        whole=form == "helix",
    )
    return [int(volume.total) for volume in found]


@torch.no_grad()
def measure(case: Case, contexts: Sequence[int], quick: bool) -> tuple[Measured, float]:
    """All steps of one case, and the largest error."""
    found: Measured = {}
    error = 0.0
    for batch in BATCHES:
        sizes = (SHORT, *(n for n in contexts if n * batch <= MOST))
        bench = Bench(case, batch, sizes[-1])
        for at, context in enumerate(sizes):
            progress(at, len(sizes), f"{case}, {batch} request(s), {context} tokens")
            bench.grow(context)
            if context == SHORT:
                error = max(error, bench.verify())
            runs: dict[str, list[Run]] = {form: [] for form in FORMS}
            for turn in range(-2, 8 if quick else 40):
                for form in FORMS:
                    run, _, sent = bench.once(form)
                    bench.check_bytes(form, sent)
                    if turn >= 0:
                        runs[form].append(run)
            found |= {Key(form, batch, context): over_ranks(each) for form, each in runs.items()}
        progress(len(sizes), len(sizes), "done")
    return found, error


@torch.no_grad()
def by_the_wall(case: Case, contexts: Sequence[int], known: Sequence[int], quick: bool) -> tuple[str, list[Row]]:
    """Costs measured under a link that sleeps, and what the choice by them takes beside the better method."""
    bench = Bench(case, 1, contexts[-1])
    link, rounds = SimulatedLink(*WALL_LINK), 8 if quick else 30
    with link.on(bench.base.sp):
        costs = plan.calibrate_decode(
            bench.heads, HEAD_DIM, groups=bench.base, under=bench.under, contexts=known, rounds=rounds
        )
        rows = []
        for context in contexts:
            bench.grow(context)
            timings = dict(zip(FORMS[:2], time_rounds(_contenders(bench), rounds), strict=True))
            for kv in (bench.kv, bench.stripes):
                kv.truncate(0, context)
            chosen = plan.decode(costs, context).method
            best = min(timings.values(), key=lambda timing: timing.median_ms)
            found = ratio(timings[chosen], best)
            name = f"{case}, {context} tokens, wall: auto ({chosen}) ÷ the better"
            rows.append(Row(name, found.value, "x", None, None, (found.low, found.high)))
    return plan.decode(costs, contexts[-1]).explain(), rows


def _contenders(bench: Bench) -> list[Contender]:
    """Both methods, each of which prepares the first of two layers over one batch and is timed in the second."""
    contenders = []
    for form in FORMS[:2]:
        kv = bench.kv if form == "local" else bench.stripes
        state: dict[str, Any] = {}

        def prepare(form: str = form, kv: PagedKV = kv, state: dict[str, Any] = state) -> None:
            if state:
                kv.truncate(0, bench.context)
            batch = kv.batch([0], [1])
            comm.run(bench.steps(form, 0, batch))
            state["steps"] = bench.steps(form, 1, batch)

        def run(state: dict[str, Any] = state) -> Tensor:
            out: Tensor = comm.run(state["steps"])
            return out

        contenders.append(Contender(form, run, prepare))
    return contenders


# Choosing, judging, the report.


class Verdict(NamedTuple):
    """One case on one link: seconds of every step as judged, and the rule."""

    case: Case
    link: str
    judged: dict[Key, float]
    costs: plan.DecodeCosts

    def contexts(self, batch: int) -> list[int]:
        return sorted({key.context for key in self.judged if key.batch == batch and key.context > SHORT})

    def saved_s(self, batch: int, context: int) -> float:
        """What the judged step takes less with queries that travel."""
        return self.judged[Key("local", batch, context)] - self.judged[Key("qship", batch, context)]

    def crossover(self, batch: int) -> float | None:
        """Where the judged curves cross for the last time; None where they do not, or queries always pay."""
        contexts = self.contexts(batch)
        slower = [n for n in contexts if self.saved_s(batch, n) <= 0]
        if not slower or slower[-1] == contexts[-1]:
            return None
        a, b = slower[-1], contexts[contexts.index(slower[-1]) + 1]
        lost, won = -self.saved_s(batch, a), self.saved_s(batch, b)
        return a + (b - a) * lost / (lost + won)

    def regret(self, batch: int, context: int) -> float:
        both = {form: self.judged[Key(form, batch, context)] for form in FORMS[:2]}
        return both[plan.decode(self.costs, context, batch).method] / min(both.values()) - 1


def judge(case: Case, name: str, measured: Measured, known: Sequence[int], link: LinkCosts) -> Verdict:
    """The rule by the even repetitions, the truth by the odd ones."""
    simulated = SimulatedLink(*link)
    judged = {key: step.seconds(JUDGED, simulated) for key, step in measured.items()}
    heads = HeadMap(HEADS, case.kv_heads, 1, case.ranks)

    def seen(form: str, batch: int, context: int) -> float:
        """Compute alone."""
        runs = measured[Key(form, batch, context)].compute_s[SEEN]
        return sum(statistics.median(slot) for slot in zip(*runs, strict=True))

    def costs(form: str, launches: int) -> plan.MethodCosts:
        sent = {batch: max(volumes(heads, form, batch)) for batch in BATCHES}
        step = [seen(form, b, SHORT) + launches * link.alpha_s + sent[b] / link.bytes_per_s for b in BATCHES]
        return plan.MethodCosts(plan.Curve(BATCHES, tuple(step)), {batch: added(form, batch) for batch in BATCHES})

    def added(form: str, batch: int) -> plan.Curve:
        sizes = (0, *(n for n in known if n * batch <= MOST))
        bare = seen(form, batch, SHORT)
        times = [*accumulate((seen(form, batch, n) - bare if n else 0.0 for n in sizes), max)]
        reads = plan.Curve(tuple(n * batch for n in sizes), tuple(times))
        far = 4 * sizes[-1] * batch  # straight on, so that a crossover just beyond what was measured is a number
        return plan.Curve((*reads.tokens, far), (*reads.seconds, max(times[-1], reads(far))))

    rule = plan.DecodeCosts(costs("local", 0), costs("qship", 2), source=f"{case}, {name}, measured")
    return Verdict(case, name, judged, rule)


def rows_of(verdict: Verdict) -> list[Row]:
    rows = []
    for batch in BATCHES:
        contexts = verdict.contexts(batch)
        name = f"{verdict.case}, {verdict.link}, {batch} request(s)"
        rule, found = verdict.costs.crossover(batch), verdict.crossover(batch)
        if found is not None:
            rows.append(Row(f"{name}: crossover", found, "tokens"))
            off = abs((rule or 0) / found - 1) if rule is not None else float("inf")
            rows.append(Row(f"{name}: crossover, rule off by", off, "", CROSSOVER, off <= CROSSOVER))
        else:
            always = verdict.saved_s(batch, contexts[-1]) > 0
            near, far = contexts[0] * (1 + CROSSOVER), contexts[-1] / (1 + CROSSOVER)
            agrees = rule is not None and rule <= near if always else rule is None or rule >= far
            where = f"always below {contexts[0]}" if always else f"none up to {contexts[-1]}"
            rows.append(Row(f"{name}: crossover {where}, rule disagrees", float(not agrees), "", 0.0, agrees))
        regrets = {context: verdict.regret(batch, context) for context in contexts}
        worst = max(regrets, key=regrets.__getitem__)
        label = f"{name}: most regret of auto, at {worst} tokens"
        rows.append(Row(label, regrets[worst], "", REGRET, regrets[worst] <= REGRET))
    last = verdict.contexts(1)[-1]
    local = verdict.judged[Key("local", 1, last)]
    for form in FORMS[1:]:
        value = verdict.judged[Key(form, 1, last)] / local
        rows.append(Row(f"{verdict.case}, {verdict.link}, {last} tokens: {form} ÷ local", value, "x"))
    return rows


def picture(path: Path, verdicts: Sequence[Verdict], machine: str) -> None:
    """Times of a step by cached tokens: a row for each case, a column for each link, rule and crossover in them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(verdict.case for verdict in verdicts))
    figure, grid = plt.subplots(
        len(cases), len(LINKS), figsize=(13, 2.8 * len(cases)), layout="constrained", squeeze=False, sharex=True
    )
    for verdict in verdicts:
        axes = grid[cases.index(verdict.case)][list(LINKS).index(verdict.link)]
        contexts = verdict.contexts(1)
        for form in FORMS:
            ms = [verdict.judged[Key(form, 1, n)] * 1e3 for n in contexts]
            axes.plot(contexts, ms, "o-" if form in FORMS[:2] else ":", markersize=3, color=COLOURS[form], label=form)
        chosen = [verdict.judged[Key(plan.decode(verdict.costs, n).method, 1, n)] * 1e3 for n in contexts]
        axes.plot(contexts, chosen, color="tab:gray", linewidth=6, alpha=0.4, label="auto")
        rule = verdict.costs.crossover(1)
        if rule is not None and rule <= contexts[-1]:
            axes.axvline(max(rule, contexts[0]), color="black", linestyle=":", label="rule")
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"{verdict.case}\n{verdict.link}", fontsize=8, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("cached tokens")
    for row in grid:
        row[0].set_ylabel("ms")
    grid[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--explain", action="store_true", help="print why each choice was made")
    args = arguments.parse_args()
    contexts, known = (QUICK_CONTEXTS, QUICK_KNOWN) if args.quick else (CONTEXTS, KNOWN)
    verdicts, error = [], 0.0
    for case in CASES[:2] if args.quick else CASES:
        measured, worst = launch(case.ranks, measure, case, contexts, args.quick)
        error = max(error, worst)
        verdicts += [judge(case, name, measured, known, link) for name, link in LINKS.items()]
    why, wall = launch(2, by_the_wall, CASES[0], contexts[::2] if args.quick else contexts[::4], known, args.quick)
    rows = [row for verdict in verdicts for row in rows_of(verdict)]
    rows += wall
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        dtype="float32",
        heads=HEADS,
        head_dim=HEAD_DIM,
        interleave=INTERLEAVE,
        links={name: link._asdict() for name, link in LINKS.items()},
        wall_link=WALL_LINK._asdict(),
        largest_relative_error=error,
        tolerance=TOLERANCE,
        bytes=[
            {"case": str(case), "form": form, "batch": batch, "bytes": volumes(_heads(case), form, batch)}
            for case in CASES
            for form in FORMS
            for batch in BATCHES
        ],
        steps=[
            {"case": str(verdict.case), "link": verdict.link, **key._asdict(), "seconds": seconds}
            for verdict in verdicts
            for key, seconds in verdict.judged.items()
        ],
        choices={
            f"{verdict.case}, {verdict.link}": plan.decode(verdict.costs, LONGEST).explain() for verdict in verdicts
        },
        wall=why,
    )
    plot, args.plot = args.plot, None
    report(args, about, rows, "decodes by heads and with queries that travel, replayed on simulated links")
    if plot:
        picture(plot, verdicts, f"{args.machine}, {about['date']}")
    if args.explain:
        for name, text in {**about["choices"], "wall": why}.items():
            print(f"\n{name}\n{text}")


def _heads(case: Case) -> HeadMap:
    return HeadMap(HEADS, case.kv_heads, 1, case.ranks)


if __name__ == "__main__":
    main()
