"""What the cost model says of Shift Parallelism's hardware, beside what the paper published; no ranks, no measurement.

Shift Parallelism (arXiv:2509.16495), Fig. 12c: Llama-70B and Qwen-32B in FP8 on 8 x H200, each way of serving (data
parallel, tensor parallel, Ulysses, Shift) with its time to the first token and between tokens at low traffic and its
throughput when saturated.

Four constants are solved for, each on one number of Llama-70B; see `solve`. All other numbers of Llama-70B, and all of
Qwen-32B, are predictions. In a second set the shares of the peaks that kernels reach are those of Qwen-32B on one
GPU, solved for on the two times of its data parallel row: what one GPU does is then known, and eight are predicted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common import meta, parser

from seqpar.partition import HeadMap, Layout
from seqpar.plan import (
    MACHINES,
    Curve,
    Machine,
    ModelShape,
    ShiftChoice,
    StepCosts,
    StepWork,
    closed_volume,
    shift,
    step_seconds,
)
from seqpar.plan.costs import Prompt

PUBLISHED = json.loads((Path(__file__).parent / "published/shift.json").read_text())
BEGIN, END = "<!-- begin of the generated tables -->", "<!-- end of the generated tables -->"

MACHINE = MACHINES["h200-x8"]
ONE, TP, SP = Layout(1, 1), Layout(8, 1), Layout(1, 8)
WAYS = {"DP": (ONE,), "TP": (TP,), "SP": (SP,), "Shift": (SP, TP)}
METRICS = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "tokens_per_s": "tokens/s"}
SHARED, OWN = "solved on Llama-70B", "kernels of Qwen-32B"
RUNS = ((SHARED, "Llama-70B"), (SHARED, "Qwen-32B"), (OWN, "Qwen-32B"))
SOLVED = {  # what the constants are solved for, by way and metric
    RUNS[0]: {("DP", "ttft_ms"), ("DP", "tpot_ms"), ("TP", "tpot_ms"), ("SP", "tpot_ms")},
    RUNS[1]: set(),
    RUNS[2]: {("DP", "ttft_ms"), ("DP", "tpot_ms")},
}
SIZES = (1, 8, *range(64, 2048, 64), 2048, 4096, 8192)

# Assumed: the defaults of vLLM on GPUs with so much memory (tokens and requests of a step, share of the memory used),
# half-precision cache and head, and that eight GPUs hold whole weights (tp=1) under SP and Shift.
BUDGET, MAX_REQUESTS = 8192, 1024
MEMORY_BYTES, MEMORY_SHARE, ACTIVATION_BYTES = 141e9, 0.9, 4e9


@dataclass(frozen=True)
class Constants:
    """What is not on a data sheet.

    Args:
        gemm_efficiency: share of the FP8 peak that products reach.
        hbm_share: share of the memory rate that is reached.
        overhead_s: of the engine, for every step.
        all_to_all_alpha_s: of one all-to-all, with what packs and unpacks it.
    """

    gemm_efficiency: float
    hbm_share: float
    overhead_s: float
    all_to_all_alpha_s: float


@dataclass(frozen=True)
class Server:
    """One model under some constants."""

    config: Mapping[str, int]
    constants: Constants

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(self.config)

    @cached_property
    def machine(self) -> Machine:
        device, fabric, c = MACHINE.accelerator, MACHINE.fabric, self.constants
        rate = device.hbm_bytes_per_s * c.hbm_share
        return Machine(
            replace(device, gemm_efficiency=c.gemm_efficiency, hbm_bytes_per_s=rate),
            replace(fabric, all_to_all_alpha_s=c.all_to_all_alpha_s),
        )

    @property
    def head_bytes(self) -> int:
        return 2 * self.config["vocab_size"] * self.shape.hidden_size

    def step_s(self, layout: Layout, work: StepWork) -> float:
        """One step; the head's weights are split over tp, and reading them takes longer than multiplying."""
        head_s = self.head_bytes / layout.tp / self.machine.accelerator.hbm_bytes_per_s
        layers_s = step_seconds(self.shape, self.machine, layout, work, weight_itemsize=1)
        return layers_s + head_s + self.constants.overhead_s

    def choice(self, layouts: Sequence[Layout]) -> ShiftChoice:
        """Which of the layouts a step of any size runs under."""
        sizes = SIZES if len(layouts) > 1 else SIZES[:1]
        curves = {layout: Curve(sizes, tuple(self.step_s(layout, StepWork(n)) for n in sizes)) for layout in layouts}
        return shift(StepCosts(curves, f"predicted for {MACHINE.fabric.ranks} x {MACHINE.accelerator.name}, FP8"))

    def ttft_ms(self, way: str) -> float:
        """The step of a whole prompt."""
        n = PUBLISHED["prompt"]
        layout = self.choice(WAYS[way]).layout_of(n)
        return 1e3 * self.step_s(layout, StepWork(n, pairs=Prompt(n).pairs(0, n)))

    def tpot_ms(self, way: str) -> float:
        """The step of one request's token halfway through its output."""
        keys = PUBLISHED["prompt"] + PUBLISHED["output"] // 2
        return 1e3 * self.step_s(self.choice(WAYS[way]).layout_of(1), StepWork(1, cached=keys))

    def tokens_per_s(self, way: str, generations: int) -> float:
        """Of all GPUs, with as many requests as the cache holds; data parallel is eight such servers."""
        choice = self.choice(WAYS[way])
        replicas = MACHINE.fabric.ranks // choice.costs.base.size
        return replicas * saturated(
            lambda work: self.step_s(choice.layout_of(work.tokens), work),
            prompt=PUBLISHED["prompt"],
            output=PUBLISHED["output"],
            capacity=self.capacity(way),
            generations=generations,
        )

    def capacity(self, way: str) -> int:
        """Requests that fit into the cache of one server, whole; Shift's second copy of the weights is the paper's."""
        layouts, shape = WAYS[way], self.shape
        ranks = layouts[0].size
        layers = shape.hidden_size * (shape.qkv_size + shape.num_heads * shape.head_dim + 3 * shape.intermediate_size)
        weights = sum((shape.num_layers * layers + 2 * self.head_bytes) / layout.tp for layout in layouts)
        free = ranks * (MEMORY_SHARE * MEMORY_BYTES - ACTIVATION_BYTES - weights)
        token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        return min(MAX_REQUESTS, int(free / token / (PUBLISHED["prompt"] + PUBLISHED["output"])))


def saturated(
    step_s: Callable[[StepWork], float],
    *,
    prompt: int,
    output: int,
    capacity: int,
    budget: int = BUDGET,
    generations: int = 4,
) -> float:
    """Tokens in and out a second of a server whose queue never ends, by replaying its scheduler.

    Every step takes a token of each request that decodes, then as much of the prompts as the budget leaves, first come
    first served. Counted is from when `capacity` requests have ended until another `generations` times as many have.
    """
    running: list[list[int]] = []  # tokens of the prompt done, tokens out
    now = begin = 0.0
    done = tokens = 0
    while done < (1 + generations) * capacity:
        decoding = [request for request in running if request[0] == prompt]
        room, pairs = budget - len(decoding), 0
        running += [[0, 0] for _ in range(capacity - len(running))]
        work = StepWork(len(decoding), cached=sum(prompt + out for _, out in decoding))
        for request in running:
            start = request[0]
            if start < prompt and room:
                request[0] = min(prompt, start + room)
                room -= request[0] - start
                pairs += Prompt(request[0] - start, start).pairs(0, request[0] - start)
            if request[0] == prompt:
                request[1] += 1
        work = replace(work, tokens=budget - room, pairs=pairs)
        now += step_s(work)
        was, done = done, done + sum(out == output for _, out in running)
        running = [request for request in running if request[1] < output]
        tokens += work.tokens
        if was < capacity <= done:
            begin, tokens = now, 0
    return tokens / (now - begin)


def solve() -> Constants:
    """The constants of Llama-70B: from three TPOTs the memory rate, overhead and latency, from DP's TTFT the products.

    Data and tensor parallel decodes differ in the weights that a GPU reads, so their difference is the memory rate's;
    what is left of either is the engine's. Ulysses reads what data parallel does and exchanges twice a layer.
    """
    want = published(RUNS[0][1])
    config = PUBLISHED["models"][RUNS[0][1]]
    start = Constants(0.5, 1.0, 0.0, 0.0)

    def tpot(constants: Constants, way: str) -> float:
        return Server(config, constants).tpot_ms(way)

    gap = want["DP", "tpot_ms"] - want["TP", "tpot_ms"]
    share = _root(lambda x: tpot(replace(start, hbm_share=x), "DP") - tpot(replace(start, hbm_share=x), "TP"), gap)
    found = replace(start, hbm_share=share)
    found = replace(found, overhead_s=1e-3 * (want["TP", "tpot_ms"] - tpot(found, "TP")))
    exchange_ms = (want["SP", "tpot_ms"] - tpot(found, "SP")) / (2 * config["num_hidden_layers"])
    found = replace(found, all_to_all_alpha_s=1e-3 * exchange_ms)
    return replace(found, gemm_efficiency=_solve_products(RUNS[0][1], found))


def refit(model: str, constants: Constants) -> Constants:
    """The same, but for what kernels of this model reach on one GPU: from its two data parallel times."""
    config, want = PUBLISHED["models"][model], published(model)["DP", "tpot_ms"]
    share = _root(lambda x: Server(config, replace(constants, hbm_share=x)).tpot_ms("DP"), want)
    constants = replace(constants, hbm_share=share)
    return replace(constants, gemm_efficiency=_solve_products(model, constants))


def _solve_products(model: str, constants: Constants) -> float:
    config = PUBLISHED["models"][model]
    return _root(
        lambda x: Server(config, replace(constants, gemm_efficiency=x)).ttft_ms("DP"), published(model)["DP", "ttft_ms"]
    )


def _root(falling: Callable[[float], float], value: float) -> float:
    """The share in (0, 1] at which a falling function takes a value."""
    low, high = 1e-3, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return (low + high) / 2


def published(model: str) -> dict[tuple[str, str], float]:
    """The paper's numbers by way and metric."""
    return {
        (way, metric): value
        for way, values in PUBLISHED["results"][model].items()
        for metric, value in zip(PUBLISHED["metrics"], values, strict=True)
    }


def cells(generations: int) -> tuple[list[dict[str, Any]], dict[str, Constants]]:
    """A cell for each set of constants, model, way and metric; and the sets."""
    sets = {SHARED: (common := solve()), OWN: refit(RUNS[2][1], common)}
    found = []
    for name, model in RUNS:
        server = Server(PUBLISHED["models"][model], sets[name])
        for (way, metric), value in published(model).items():
            predicted = (
                server.tokens_per_s(way, generations) if metric == "tokens_per_s" else getattr(server, metric)(way)
            )
            found.append(
                {
                    "constants": name,
                    "model": model,
                    "way": way,
                    "metric": metric,
                    "published": value,
                    "predicted": predicted,
                    "off": predicted / value - 1,
                    "solved": (way, metric) in SOLVED[name, model],
                }
            )
    return found, sets


def markdown(found: Sequence[dict[str, Any]], sets: Mapping[str, Constants]) -> str:
    """The constants, a table for each model, thresholds, and the volumes."""
    lines = ["| constants | products, share of FP8 peak | memory rate | engine, a step | all-to-all |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, c in sets.items():
        times = f"{1e3 * c.overhead_s:.2f} ms | {1e6 * c.all_to_all_alpha_s:.0f} us"
        lines.append(f"| {name} | {c.gemm_efficiency:.1%} | {c.hbm_share:.1%} | {times} |")
    for name, model in RUNS:
        mine = [cell for cell in found if (cell["constants"], cell["model"]) == (name, model)]
        lines += ["", f"**{model}**, constants: {name}", "", *_model_table(mine)]
    lines += ["", *_thresholds(sets), "", *_volumes()]
    return "\n".join(lines)


def _model_table(mine: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each way: of each metric what was published, what is predicted, and how far that is off."""
    lines = ["| | " + " | ".join(f"{name}: published | predicted | " for name in METRICS.values()) + " |"]
    lines += ["|---|" + "---:|" * 3 * len(METRICS)]
    for way in WAYS:
        row = {cell["metric"]: cell for cell in mine if cell["way"] == way}
        numbers = (
            f"{_number(row[m]['published'])} | {_number(row[m]['predicted'])} | "
            + ("solved" if row[m]["solved"] else f"{row[m]['off']:+.0%}")
            for m in METRICS
        )
        lines.append(f"| {way} | " + " | ".join(numbers) + " |")
    return lines


def _thresholds(sets: Mapping[str, Constants]) -> list[str]:
    """Where the model would shift, for each pair of layouts and for all."""
    lines = ["| model | constants | the paper's two layouts | all that Ulysses reaches |", "|---|---|---|---|"]
    for name, model in RUNS:
        server = Server(PUBLISHED["models"][model], sets[name])
        rules = (
            server.choice(layouts).explain().splitlines()[0].split(": ")[1] for layouts in ((SP, TP), SP.reachable)
        )
        lines.append(f"| {model} | {name} | {' | '.join(rules)} |")
    return lines


def _volumes() -> list[str]:
    """KiB that leave a GPU for each token and layer."""
    layouts = tuple(reversed(SP.reachable))
    lines = ["| KiB a token, layer and GPU | " + " | ".join(f"{tp} x {sp}" for tp, sp in layouts) + " |"]
    lines += ["|---|" + "---:|" * len(layouts)]
    for model, config in PUBLISHED["models"].items():
        shape = ModelShape.from_config(config)
        sent = (
            closed_volume(
                layout,
                1,
                HeadMap(shape.num_heads, shape.num_kv_heads, *layout),
                hidden_size=shape.hidden_size,
                head_dim=shape.head_dim,
            ).total
            for layout in layouts
        )
        lines.append(f"| {model} | " + " | ".join(f"{float(each) / 1024:.2f}" for each in sent) + " |")
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Published and predicted, a panel for each model and metric."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    models = list(PUBLISHED["models"])
    panels = figure.subplots(len(models), len(METRICS))
    styles = {SHARED: ("o", "C0"), OWN: ("s", "C1")}
    for row, model in zip(panels, models, strict=True):
        for axes, (metric, title) in zip(row, METRICS.items(), strict=True):
            want = [published(model)[way, metric] for way in WAYS]
            axes.bar(list(WAYS), want, color="#d5d9df", label="published")
            for name, solved in itertools.product(styles, (False, True)):
                key = (name, model, metric, solved)
                dots = [c for c in found if (c["constants"], c["model"], c["metric"], c["solved"]) == key]
                marker, colour = styles[name]
                axes.scatter(
                    [c["way"] for c in dots],
                    [c["predicted"] for c in dots],
                    marker=marker,
                    facecolors="none" if solved else colour,
                    edgecolors=colour,
                    label=f"predicted, {name}" if not solved else "solved for",
                    zorder=2,
                )
            axes.set_title(f"{model}: {title}", fontsize=10, loc="left")
    handles, labels = panels[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = parser(__doc__ or "").parse_args(arguments)
    found, sets = cells(generations=1 if args.quick else 4)
    text = markdown(found, sets)
    print(text)
    if args.json:
        about = {
            **meta("none: predictions", ["torch"]),
            "constants": {name: asdict(each) for name, each in sets.items()},
            "assumed": {"budget": BUDGET, "max_requests": MAX_REQUESTS, "memory_share": MEMORY_SHARE},
        }
        args.json.write_text(json.dumps({"meta": about, "cells": found}, indent=1) + "\n")
    if args.markdown:
        page = args.markdown.read_text() if args.markdown.exists() else f"{BEGIN}\n{END}\n"
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        args.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    if args.plot:
        plot(args.plot, found)


if __name__ == "__main__":
    main()
