"""Steps of 1 to 4096 tokens under tensor parallelism, Ulysses and Shift, and bursty traffic served by each.

A stack of 4 decoder layers (model dim 1024, 16 query and 4 KV heads, MLP dim 2816, float32) whose weights are stored
for the base layout, Ulysses over all ranks; all other layouts are views. A step of up to 64 tokens is as many requests
of one new token each over 256 cached ones, a larger one a prompt. Two machines:

*4 ranks on a simulated link*, whose rate makes communication a share f of the tensor-parallel step of 1024 tokens.
Replay: compute segments in processor time of the computing thread (the slowest rank's in every slot, medians over
repetitions), put into the schedule with the link's times, as if every rank had a core of its own.

*2 ranks, nothing simulated*, a core each: whole steps by the wall clock, the slowest rank's, medians over rounds.

`"auto"` is `plan.shift` on one half of the repetitions, at the sizes that `plan.calibrate_layouts` would measure:
powers of two, and those halfway between where the choice is in doubt. What it chose is judged on the other half, at all
sizes, also those that it has not seen. Its regret is its time beside that of the better one of pure tensor parallelism
and pure Ulysses, and for the trace the same of each metric. Layouts take turns in every round, so that ratios of the
wall clock are paired.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Row, Timing, check, launch, meta, parser, progress, ratio, report
from torch import Tensor
from traffic import Service, bursty, serve

from seqpar import comm, plan
from seqpar.comm import Groups, SimulatedLink, Steps
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, Layout, even_ranges

LAYERS, CONTEXT, DECODES = 4, 256, 64
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 1024, 2816, 16, 4, 64
ALPHA_S = 50e-6
SHARES = (0.15, 0.5)
KNOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)  # those of `seqpar.hf.AutoShift`
REFINE = 2  # times, as there
OTHERS = (3, 5, 6, 10, 12, 20, 24, 40, 48, 80, 96, 160, 192, 384, 768, 2048)
QUICK_KNOWN, QUICK_OTHERS = (1, 64, 256), (8,)
REQUESTS, QUICK_REQUESTS = 240, 40
REGRET, TRACE_REGRET = 0.03, 0.05
TOLERANCE = 2e-5  # float32 against float64; sums over at most 4096 terms
SEEN, JUDGED = slice(0, None, 2), slice(1, None, 2)  # of the repetitions
COLOURS = {"tp": "tab:blue", "sp": "tab:orange", "shift": "tab:gray"}
PACKAGES = ("seqpar", "torch", "transformers")


class Run(NamedTuple):
    """One step on this rank: what each slot computes, what it sends then, and the wall clock of it all."""

    compute_s: list[float]
    sent: list[int]
    wall_s: float


class Step(NamedTuple):
    """One size under one layout, over all ranks: a list for each repetition."""

    compute_s: list[list[float]]
    sent: list[int]
    wall_s: list[float]

    def seconds(self, half: slice, link: SimulatedLink) -> float:
        """The median of some repetitions, replayed on a link."""
        computes = [statistics.median(slot) for slot in zip(*self.compute_s[half], strict=True)]
        travels = [link.seconds(size) for size in self.sent]
        return plan.makespan([[plan.Slot(*slot) for slot in zip(computes, [*travels, 0.0], strict=True)]]).total_s


Measured = dict[Layout, dict[int, Step]]


def seconds_of(measured: Measured, tokens: int, half: slice, link: SimulatedLink | None) -> dict[Layout, float]:
    """Seconds of a size under each layout: replayed on a link, or by the wall clock.

    By the wall clock layouts are compared within the rounds in which they took turns, and what all took is put back.
    """
    steps = {layout: rows[tokens] for layout, rows in measured.items()}
    if link is not None:
        return {layout: step.seconds(half, link) for layout, step in steps.items()}
    rounds = [statistics.fmean(times) for times in zip(*(step.wall_s[half] for step in steps.values()), strict=True)]
    typical = statistics.median(rounds)
    return {
        layout: typical * statistics.median(a / b for a, b in zip(step.wall_s[half], rounds, strict=True))
        for layout, step in steps.items()
    }


def costs_of(measured: Measured, sizes: Sequence[int], link: SimulatedLink | None, source: str) -> plan.StepCosts:
    """What auto knows at some sizes, from the half of the repetitions that it sees."""
    seen = {tokens: seconds_of(measured, tokens, SEEN, link) for tokens in sizes}
    curves = {layout: plan.Curve(tuple(sizes), tuple(seen[n][layout] for n in sizes)) for layout in measured}
    return plan.StepCosts(curves, source=source, resolution=0.01)


def refined(measured: Measured, known: Sequence[int], link: SimulatedLink | None, times: int) -> tuple[int, ...]:
    """The sizes that auto would know: the first ones, and so often those halfway between where it is in doubt."""
    sizes = tuple(known)
    for _ in range(times):
        costs = costs_of(measured, sizes, link, "")
        sizes = tuple(sorted({*sizes, *plan.undecided(costs)}))
    return sizes


class Stack:
    """Layers that know every layout, a cache, and the same in float64 on this process alone."""

    def __init__(self, ranks: int, most: int) -> None:
        base = comm.groups(comm.init_mesh(tp=1, sp=ranks))
        self.places: dict[Layout, Groups] = comm.layout_groups(base)
        self.base, self.heads = base, HeadMap(HEADS, KV_HEADS, 1, ranks)
        self.layers = _layers(base, self.heads, torch.float32)
        for layer in self.layers:
            for layout, groups in self.places.items():
                layer.add_layout(layout, groups=groups)
        self.kv = self._cache(self.heads, most, torch.float32)

    @staticmethod
    def _cache(heads: HeadMap, most: int, dtype: torch.dtype) -> PagedKV:
        rank = dist.get_rank() % heads.size
        slots = max(most, CONTEXT + 1)
        return PagedKV.contiguous(LAYERS, DECODES, slots, heads.kv_ranges[rank].size, HEAD_DIM, dtype=dtype)

    def begin(self, tokens: int, kv: PagedKV | None = None, heads: HeadMap | None = None) -> Any:
        """A batch of that many new tokens: decodes over cached keys, or one prompt."""
        kv, heads = kv or self.kv, heads or self.heads
        for request in list(kv.ids):
            kv.free(request)
        if tokens > DECODES:
            return kv.batch([0], [tokens])
        filled = kv.batch(range(tokens), [CONTEXT] * tokens)
        generator = torch.Generator().manual_seed(1)
        for layer in range(LAYERS):
            k, v = torch.randn(2, CONTEXT, KV_HEADS, HEAD_DIM, generator=generator).repeat(1, tokens, 1, 1)
            mine = slice(*heads.kv_ranges[dist.get_rank() % heads.size])
            kv.append(layer, *(x[:, mine].to(kv.dtype) for x in (k, v)), filled)
        return kv.batch(range(tokens), [1] * tokens)

    def steps(self, tokens: int, layout: Layout, batch: Any) -> Steps[Tensor]:
        x, cos, sin = inputs(tokens)
        x = x[slice(*even_ranges(tokens, layout.sp)[self.places[layout].sp.rank()])]
        for layer in self.layers:
            x = yield from comm.call(layer, x, batch, cos, sin, self.kv, layout=layout)
        return x

    def once(self, tokens: int, layout: Layout, link: SimulatedLink | None) -> Run:
        batch = self.begin(tokens)
        steps = self.steps(tokens, layout, batch)
        if link is not None:
            link.reset()
        dist.barrier()
        start = time.perf_counter()
        with comm.trace(clock=time.thread_time) as trace:
            if link is None:
                comm.interleave([steps])
            else:
                with link.on(self.base.flat, *self.places[layout][1:3]):
                    comm.interleave([steps])
        return Run(*slots(trace), time.perf_counter() - start)

    def verify(self, tokens: int) -> float:
        """The largest error of any layout against one process in float64."""
        groups = comm.groups(comm.init_mesh(tp=1, sp=1))
        heads = HeadMap(HEADS, KV_HEADS)
        kv = self._cache(heads, tokens, torch.float64)
        x, cos, sin = (each.double() for each in inputs(tokens))
        batch = self.begin(tokens, kv, heads)
        for layer in _layers(groups, heads, torch.float64):
            x = layer(x, batch, cos, sin, kv)
        errors = []
        for layout, places in self.places.items():
            mine = slice(*even_ranges(tokens, layout.sp)[places.sp.rank()])
            got = torch.zeros(tokens, HIDDEN)
            got[mine] = comm.run(self.steps(tokens, layout, self.begin(tokens)))
            expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
            expected[mine] = x[mine]
            whole = comm.all_reduce(torch.stack([got.double(), expected]), group=places.sp)
            errors.append(check(f"{tokens} tokens under {tuple(layout)}", whole[0], whole[1], TOLERANCE))
        return max(errors)


def _layers(groups: Groups, heads: HeadMap, dtype: torch.dtype) -> list[ParallelDecoderLayer]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    torch.manual_seed(0)
    made = [LlamaDecoderLayer(config, index).to(dtype) for index in range(LAYERS)]
    return [
        ParallelDecoderLayer.from_module(layer, groups=groups, heads=heads, layer_index=index)
        for index, layer in enumerate(made)
    ]


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations and rotary tables of a step, the same on every rank."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    positions = torch.arange(tokens) if tokens > DECODES else torch.full((tokens,), CONTEXT)
    angles = positions[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat([angles, angles], 1)
    return x, angles.cos(), angles.sin()


def slots(trace: comm.Trace) -> tuple[list[float], list[int]]:
    """Processor time up to each launch, and what was sent there; the last slot sends nothing."""
    compute, sent = [0.0], []
    intervals = [interval for interval in trace.intervals if interval.kind != "wait" and interval.program]
    for interval in sorted(intervals, key=lambda i: (i.launched_s, i.kind != "compute")):
        if interval.kind == "comm":
            sent.append(interval.num_bytes)
            compute.append(0.0)
        else:
            compute[-1] += interval.end_s - interval.start_s
    return compute, sent


def over_ranks(runs: Sequence[Run]) -> Step:
    """The slowest rank of every slot and of every run."""
    mine = torch.tensor([[*run.compute_s, *run.sent, run.wall_s] for run in runs], dtype=torch.float64)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    slots = len(runs[0].compute_s)
    rows = mine.tolist()
    sent = [int(size) for size in rows[0][slots:-1]]
    return Step([row[:slots] for row in rows], sent, [row[-1] for row in rows])


def repeats_of(tokens: int, quick: bool) -> int:
    return 4 if quick else 32 if tokens <= 64 else 20 if tokens <= 512 else 8 if tokens <= 2048 else 6


@torch.no_grad()
def measure(ranks: int, quick: bool, simulated: bool) -> tuple[Measured, float | None, float]:
    """All sizes under all layouts, the rate of the link in force for the wall clock, and the largest error.

    First those that auto knows, then those it would ask for (each on its link), then others.
    """
    known, others = (QUICK_KNOWN, QUICK_OTHERS) if quick else (KNOWN, OTHERS)
    most = max(known)
    stack = Stack(ranks, most)
    error = max(stack.verify(tokens) for tokens in (5, 130))
    full = Layout(ranks, 1)
    link = rate = None
    if simulated:
        probe = min(1024, most)
        runs = [stack.once(probe, full, None) for _ in range(4)]
        rate = rate_for(over_ranks(runs[1:]), SHARES[-1])
        link = SimulatedLink(ALPHA_S, rate)
    found: dict[Layout, dict[int, Step]] = {layout: {} for layout in stack.places}
    waiting = list(known)
    for more in range(REFINE + 2):
        for at, tokens in enumerate(waiting):
            progress(at, len(waiting), f"{ranks} ranks, {tokens} tokens")
            runs_of: dict[Layout, list[Run]] = {layout: [] for layout in stack.places}
            for turn in range(-1, repeats_of(tokens, quick)):
                for layout in stack.places:
                    run = stack.once(tokens, layout, link)
                    if turn >= 0:
                        runs_of[layout].append(run)
            for layout, runs in runs_of.items():
                found[layout][tokens] = over_ranks(runs)
        progress(len(waiting), len(waiting), f"{ranks} ranks, done")
        wanted = set(others) if more == REFINE else set()
        if more < REFINE:
            for each in links_of(found, ranks).values() if simulated else [None]:
                wanted |= {*refined(found, known, each, more + 1)}
        waiting = sorted(wanted - {*found[full]})
    return {layout: dict(sorted(steps.items())) for layout, steps in found.items()}, rate, error


def links_of(measured: Measured, ranks: int) -> dict[float, SimulatedLink]:
    """A link for each share of communication, from the pure tensor-parallel step of 1024 tokens."""
    steps = measured[Layout(ranks, 1)]
    reference = steps[min(1024, max(steps))]
    return {share: SimulatedLink(ALPHA_S, rate_for(reference, share)) for share in SHARES}


def rate_for(step: Step, share: float) -> float:
    """Bytes a second at which communication is that share of a step's time."""
    compute = sum(statistics.median(slot) for slot in zip(*step.compute_s, strict=True))
    return sum(step.sent) / (share / (1 - share) * compute - len(step.sent) * ALPHA_S)


# Choosing, judging, the report.


class Verdict(NamedTuple):
    """One machine: seconds of every step and layout as judged, what auto chose, and what users saw under each rule."""

    name: str
    judged: dict[Layout, dict[int, float]]
    choice: plan.ShiftChoice
    services: dict[str, Service]

    @property
    def pure(self) -> tuple[Layout, Layout]:
        """Tensor parallelism and Ulysses over all ranks."""
        size = next(iter(self.judged)).size
        return Layout(size, 1), Layout(1, size)

    def regret(self, tokens: int) -> float:
        best = min(self.judged[layout][tokens] for layout in self.pure)
        return self.judged[self.choice.layout_of(tokens)][tokens] / best - 1


def judge(name: str, measured: Measured, known: Sequence[int], link: SimulatedLink | None, requests: int) -> Verdict:
    """Choose by the even repetitions, judge by the odd ones."""
    choice = plan.shift(costs_of(measured, refined(measured, known, link, REFINE), link, f"{name}, measured"))
    sizes = tuple(next(iter(measured.values())))
    seconds = {tokens: seconds_of(measured, tokens, JUDGED, link) for tokens in sizes}
    judged = {layout: {tokens: seconds[tokens][layout] for tokens in sizes} for layout in measured}
    times = {layout: plan.Curve(sizes, tuple(row.values())) for layout, row in judged.items()}
    most = sizes[-1]
    capacity = max(most / row[most] for row in judged.values())
    traffic = bursty(requests, capacity)
    budget = min(2048, most)
    verdict = Verdict(name, judged, choice, {})
    rules = {"tp": lambda n: verdict.pure[0], "sp": lambda n: verdict.pure[1], "shift": choice.layout_of}
    for rule, layout_of in rules.items():
        verdict.services[rule] = serve(traffic, lambda n, at=layout_of: times[at(n)](n), budget=budget)
    return verdict


def rows_of(verdicts: Sequence[Verdict]) -> list[Row]:
    rows = []
    for verdict in verdicts:
        for tokens in next(iter(verdict.judged.values())):
            regret = verdict.regret(tokens)
            chosen = verdict.choice.layout_of(tokens)
            name = f"{verdict.name}, {tokens} token(s)"
            rows.append(Row(f"{name}: regret of auto ({chosen.tp}x{chosen.sp})", regret, "", REGRET, regret <= REGRET))
        for metric in ("ttft_s", "tpot_s", "tokens_per_s"):
            values = {rule: getattr(service, metric) for rule, service in verdict.services.items()}
            unit = "tokens/s" if metric == "tokens_per_s" else "ms"
            sign = -1 if metric == "tokens_per_s" else 1
            best = min((values["tp"], values["sp"]), key=lambda value, sign=sign: sign * value)
            regret = values["shift"] / best - 1 if sign > 0 else best / values["shift"] - 1
            name = f"{verdict.name}, trace, {metric.removesuffix('_s') if sign > 0 else 'tokens/s'}"
            rows.append(Row(f"{name}: regret of auto", regret, "", TRACE_REGRET, regret <= TRACE_REGRET))
            rows += [Row(f"{name}: {rule}", value * (1e3 if sign > 0 else 1), unit) for rule, value in values.items()]
    return rows


def wall_rows(name: str, measured: Measured, choice: plan.ShiftChoice) -> list[Row]:
    """The wall clock of what auto chose beside the better pure layout, paired within the rounds that it did not see."""
    rows, size = [], next(iter(measured)).size
    for tokens in next(iter(measured.values())):
        tensor, ulysses, chosen = (
            Timing("", tuple(measured[layout][tokens].wall_s[JUDGED]))
            for layout in (Layout(size, 1), Layout(1, size), choice.layout_of(tokens))
        )
        found = ratio(chosen, min(tensor, ulysses, key=lambda timing: timing.median_ms))
        label = f"{name}, {tokens} token(s), wall: auto ÷ the better"
        rows.append(Row(label, found.value, "x", None, None, (found.low, found.high)))
    return rows


def picture(path: Path, verdicts: Sequence[Verdict], machine: str) -> None:
    """Times of a step by tokens, and what users saw, a row for each machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        len(verdicts), 2, figsize=(11, 3.4 * len(verdicts)), layout="constrained", squeeze=False, width_ratios=(3, 2)
    )
    for (steps, users), verdict in zip(grid, verdicts, strict=True):
        for layout, row in verdict.judged.items():
            label = {verdict.pure[0]: " (TP)", verdict.pure[1]: " (Ulysses)"}.get(layout, "")
            milliseconds = [seconds * 1e3 for seconds in row.values()]
            name = f"{layout.tp}x{layout.sp}{label}"
            colour = {verdict.pure[0]: COLOURS["tp"], verdict.pure[1]: COLOURS["sp"]}.get(layout, "tab:olive")
            steps.plot(list(row), milliseconds, "o-", markersize=3, color=colour, label=name)
        tokens = list(next(iter(verdict.judged.values())))
        chosen = [verdict.judged[verdict.choice.layout_of(n)][n] * 1e3 for n in tokens]
        steps.plot(tokens, chosen, color=COLOURS["shift"], linewidth=6, alpha=0.4, label="auto")
        steps.set(xscale="log", yscale="log", xlabel="tokens of a step", ylabel="ms")
        steps.set_title(f"{verdict.name}: one step", fontsize=10, loc="left")
        steps.legend(fontsize=8, frameon=False)
        best = {
            metric: max(getattr(service, metric) for service in verdict.services.values())
            for metric in ("ttft_s", "tpot_s", "tokens_per_s")
        }
        for at, (rule, service) in enumerate(verdict.services.items()):
            heights = [getattr(service, metric) / best[metric] for metric in best]
            bars = users.bar([x + 0.27 * at for x in range(3)], heights, 0.25, label=rule, color=COLOURS[rule])
            values = [f"{service.ttft_s * 1e3:.0f} ms", f"{service.tpot_s * 1e3:.0f} ms", f"{service.tokens_per_s:.0f}"]
            users.bar_label(bars, values, fontsize=7)
        users.set_xticks([x + 0.27 for x in range(3)], ["TTFT", "TPOT", "tokens/s"])
        users.set_yticks([])
        users.set_title("bursty traffic", fontsize=10, loc="left")
        users.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--explain", action="store_true", help="print why each choice was made")
    args = arguments.parse_args()
    known = QUICK_KNOWN if args.quick else KNOWN
    requests = QUICK_REQUESTS if args.quick else REQUESTS
    four, rate, error = launch(4, measure, 4, args.quick, True)
    two, _, other_error = launch(2, measure, 2, args.quick, False)
    links = links_of(four, 4)
    verdicts = [judge(f"4 ranks, f={share:g}", four, known, link, requests) for share, link in links.items()]
    verdicts.append(judge("2 ranks", two, known, None, requests))
    rows = [*rows_of(verdicts), *wall_rows("2 ranks", two, verdicts[-1].choice)]
    crowded = f"4 ranks on the cores of this machine, f={SHARES[-1]:g}"
    rows += wall_rows(crowded, four, judge(crowded, four, known, None, requests).choice)
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        dtype="float32",
        layers=LAYERS,
        layer={"hidden": HIDDEN, "mlp": MLP, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        alpha_s=ALPHA_S,
        bytes_per_s={share: link.bytes_per_s for share, link in links.items()},
        wall_bytes_per_s=rate,
        largest_relative_error=max(error, other_error),
        tolerance=TOLERANCE,
        steps=[
            {"machine": verdict.name, "tp": layout.tp, "sp": layout.sp, "seconds": seconds}
            for verdict in verdicts
            for layout, seconds in verdict.judged.items()
        ],
        choices={verdict.name: verdict.choice.explain() for verdict in verdicts},
    )
    plot, args.plot = args.plot, None
    report(args, about, rows, "regret of shift's auto, 4 gloo ranks on a simulated link and 2 without")
    if plot:
        picture(plot, verdicts, f"{args.machine}, {about['date']}")
    if args.explain:
        for verdict in verdicts:
            print(f"\n{verdict.name}\n{verdict.choice.explain()}")


if __name__ == "__main__":
    main()
