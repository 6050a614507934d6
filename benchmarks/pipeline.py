"""Bubbles of a pipeline: SARATHI's batches beside Orca's, on two real stages and as the paper's set-up is predicted.

*Measured*: the bundled checkpoint in two stages, each a gloo rank of one thread. One set of requests, all there at the
start, is served with `DecodeMaximal` (a chunk of one prompt a micro-batch, decodes beside it) and with `FullHybrid`
(whole prompts, decodes beside them), in rounds that take turns. Both give the tokens that the model gives without
stages, or nothing is printed. A stage's bubble is the time in which it does not compute, from the first compute of any
stage to the last (`plan.measured_pipeline`); the host's own work between micro-batches is in it.

*Simulated from the measured*: what each micro-batch computed on each stage, put into `plan.pipeline`: the bubbles that
these times alone would leave. What the measured ones have beyond that is the host's and the messages'.

*Predicted*: the paper's GPT-3 on 64 A100s, by `paper_pipeline.py`, which names its assumptions.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import paper_pipeline
import paper_results
import torch
import torch.distributed as dist
from common import Row, Timing, WrongResultError, launch, meta, parser, progress, ratio, report
from paper_pipeline import PUBLISHED, Predicted
from torch import Tensor

from seqpar import comm, plan
from seqpar.batching import (
    Budget,
    DecodeMaximal,
    FullHybrid,
    PipelineFusion,
    Policy,
    Request,
    StallFree,
    TemporalFusion,
)
from seqpar.comm import Handle, Steps
from seqpar.plan import PipelineTimes
from seqpar.ragged import RaggedBatch

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "examples" / "tiny-llama"
_RESULTS = json.loads((HERE / "published" / "sarathi.json").read_text())["pipeline"]
RESULTS = {
    "bubble_reduction": "bubble time of a request, median, TP8 x PP8: Orca ÷ SARATHI",
    "speedup": "time for all requests, TP8 x PP8: Orca ÷ SARATHI",
    "speedup_over_tp": "time for all requests: 8 x TP8 with Orca ÷ TP8 x PP8 with SARATHI",
    "tp_over_pipeline_orca": "time for all requests, with Orca: TP8 x PP8 ÷ 8 x TP8",
}
PACKAGES = ("seqpar", "torch", "transformers")

STAGES, PAGE_SIZE = 2, 16
BATCH = 8  # requests of a micro-batch
PROMPTS, RATIO = (80, 400), 10  # tokens of a prompt; prompts and outputs as the paper's
CHUNK = RATIO * (BATCH - 1)  # prompts then carry all decodes
MEASURED = {"SARATHI": DecodeMaximal(CHUNK), "Orca": FullHybrid()}

A100 = paper_results.ampere("a100")  # servers of 8, InfiniBand between them


class Served(NamedTuple):
    """One run of a policy."""

    tokens: list[list[int]]
    seconds: float
    measured: PipelineTimes
    simulated: PipelineTimes
    micro_batches: int


class Timed:
    """A stage that notes how long it computes for each micro-batch."""

    def __init__(self, stage: Any) -> None:
        self.stages, self._stage = stage.stages, stage
        self.seconds: list[float] = []

    def __call__(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        logits: Tensor = self._stage(batch, tokens, rows)
        return logits

    def steps(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> Steps[Tensor | Handle]:
        steps, value, total = self._stage.steps(batch, tokens, rows), None, 0.0
        while True:
            start = time.perf_counter()
            try:
                item = steps.send(value)
            except StopIteration as stop:
                self.seconds.append(total + time.perf_counter() - start)
                return stop.value
            total += time.perf_counter() - start
            value = yield item


def requests_of(count: int, seed: int = 0) -> list[Request]:
    """Prompts out of this file's own text, of random lengths; outputs in proportion."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(CHECKPOINT)(Path(__file__).read_text()[:15000]).input_ids
    draw, found = random.Random(seed), []
    for number in range(count):
        length, start = draw.randint(*PROMPTS), draw.randrange(len(text))
        found.append(Request(number, (text[start:] + text)[:length], max(1, length // RATIO)))
    return found


def measure(requests: Sequence[Request], rounds: int, depth: int) -> dict[str, list[Served]]:
    """Serve the requests with each policy in every round; runs on each rank."""
    from seqpar import hf

    pages = sum(-(-each.most_cached // PAGE_SIZE) for each in requests)
    alone = hf.load(CHECKPOINT, comm.init_mesh(1, 1, "cpu"), dtype=torch.float32, progress=False)
    stepper = hf.Stepper(alone, num_pages=pages, page_size=PAGE_SIZE)
    budget = Budget(64, len(requests))
    loop = TemporalFusion(stepper, stepper.kv, vocab_size=stepper.vocab_size, policy=StallFree(64), budget=budget)
    expected = generate(loop, requests)
    mesh = comm.init_mesh(1, 1, "cpu", pp=STAGES)
    stage = hf.load_stage(CHECKPOINT, mesh, num_pages=pages, page_size=PAGE_SIZE, dtype=torch.float32, progress=False)
    found: dict[str, list[Served]] = {name: [] for name in MEASURED}
    for turn in range(rounds + 1):
        for name in list(MEASURED)[:: 1 if turn % 2 else -1]:
            progress(turn, rounds + 1, name)
            served = serve(stage, MEASURED[name], requests, depth)
            if served.tokens != expected:
                raise WrongResultError(f"{name}: other tokens than without stages")
            if turn:  # the first round warms up
                found[name].append(served)
    progress(rounds + 1, rounds + 1, "done")
    return found


def generate(loop: TemporalFusion, requests: Sequence[Request]) -> list[list[int]]:
    generations = [loop.add(request) for request in requests]
    for _ in loop.run():
        pass
    return [each.tokens for each in generations]


def serve(stage: Any, policy: Policy, requests: Sequence[Request], depth: int) -> Served:
    """One run, from a barrier on."""
    timed, whole = Timed(stage), stage.stages.whole
    budget = Budget(PROMPTS[1] + BATCH, BATCH * depth)
    loop = PipelineFusion(timed, stage.kv, vocab_size=stage.vocab_size, policy=policy, budget=budget, depth=depth)
    dist.barrier()
    with comm.trace() as seen:
        start = time.perf_counter()
        tokens = generate(loop, requests)
        seconds = time.perf_counter() - start
    columns: list[Any] = [None] * STAGES
    dist.all_gather_object(columns, timed.seconds, group=whole)
    measured = plan.measured_pipeline(seen.gather(group=whole).intervals, STAGES)
    simulated = plan.pipeline(list(zip(*columns, strict=True)), depth)
    return Served(tokens, seconds, measured, simulated, loop.steps)


def rows_of(found: dict[str, list[Served]], new_tokens: int) -> list[Row]:
    """Shares of bubbles, and SARATHI's times in units of Orca's."""
    rows = []
    for name, runs in found.items():
        for stage in range(STAGES):
            share = statistics.median(run.measured.stages[stage].bubble for run in runs)
            blocked = statistics.median(run.measured.stages[stage].blocked_s / run.measured.span_s for run in runs)
            rows.append(Row(f"measured, {name}: bubbles of stage {stage}", 100 * share, "%"))
            rows.append(Row(f"measured, {name}: stage {stage} blocked", 100 * blocked, "%"))
        simulated = statistics.median(run.simulated.bubble for run in runs)
        rows.append(Row(f"simulated from these times, {name}: bubbles", 100 * simulated, "%"))
        rate = new_tokens / statistics.median(run.seconds for run in runs)
        rows.append(Row(f"measured, {name}: generated", rate, "tok/s"))
        rows.append(Row(f"measured, {name}: micro-batches", float(runs[0].micro_batches), ""))
    units: tuple[tuple[str, Any], ...] = (
        ("bubbles, measured", lambda run: run.measured.bubble),
        ("bubbles, simulated from the times", lambda run: run.simulated.bubble),
        ("time for all requests, measured", lambda run: run.seconds),
    )
    for what, of in units:
        ours, theirs = (Timing(name, tuple(of(run) for run in found[name])) for name in ("SARATHI", "Orca"))
        value = ratio(ours, theirs)
        rows.append(Row(f"SARATHI ÷ Orca: {what}", value.value, "x", interval=(value.low, value.high)))
    return rows


def beside(found: dict[str, Predicted]) -> list[tuple[str, float, float, float]]:
    """What was published, and what is predicted of it: with Orca at its best, and at its worst."""
    best, worst = (paper_pipeline.ratios(found, orca) for orca in (paper_pipeline.ORCA, paper_pipeline.TOGETHER))
    return [(name, _RESULTS[key], best[key], worst[key]) for key, name in RESULTS.items()]


def predicted_rows(found: dict[str, Predicted]) -> list[Row]:
    rows = []
    for name, published, got, worst in beside(found):
        rows.append(Row(f"published: {name}", published, "x"))
        rows.append(Row(f"predicted: {name}", got, "x"))
        rows.append(Row(f"predicted, Orca at worst: {name}", worst, "x"))
    for name, each in found.items():
        rows.append(Row(f"predicted, {name}: time for all requests", each.seconds, "s"))
        if each.times is not None:
            rows.append(Row(f"predicted, {name}: bubbles", 100 * each.times.bubble, "%"))
            rows.append(
                Row(f"predicted, {name}: bubble time of a request, median", statistics.median(each.bubbles_s), "s")
            )
    return rows


def tables(rows: Sequence[Row], found: dict[str, Predicted]) -> str:
    """Measured, and predicted beside published."""
    lines = ["Two stages: not measured yet."]
    if rows:
        lines = ["| measured on two stages | value | 95 % interval |", "|---|---:|:---:|"]
    for row in rows:
        interval = f"{row.interval[0]:.2f} to {row.interval[1]:.2f}" if row.interval else ""
        lines.append(f"| {row.name} | {row.value:.3g} {row.unit} | {interval} |")
    lines += ["", "| GPT-3 on 64 A100s | published | predicted | with Orca at worst |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {value:g}x | {got:.2f}x | {worst:.2f}x |" for name, value, got, worst in beside(found)]
    lines += [
        "",
        "| predicted | time for all requests | bubbles | bubble time of a request, median |",
        "|---|---:|---:|---:|",
    ]
    for name, each in found.items():
        cells = (
            ("", "")
            if each.times is None
            else (
                f"{each.times.bubble:.1%}",
                f"{statistics.median(each.bubbles_s):.1f} s",
            )
        )
        lines.append(f"| {name} | {each.seconds:,.0f} s | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def picture(path: Path, measured: Sequence[Row], predicted: dict[str, Predicted], title: str) -> None:
    """Bubbles of the stages, measured and simulated; bubble times of requests as predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, requests = figure.subplots(1, 2)
    width, by = 0.25, {row.name: row.value for row in measured}
    for place, name in enumerate(MEASURED if by else ()):
        bars = [by[f"measured, {name}: bubbles of stage {s}"] for s in range(STAGES)]
        bars.append(by[f"simulated from these times, {name}: bubbles"])
        at = [x + (place - 0.5) * width for x in range(len(bars))]
        shares.bar(at, bars, width, label=name)
    shares.set_xticks(range(STAGES + 1), [*(f"stage {s}" for s in range(STAGES)), "from times"])
    shares.set(ylabel="bubbles, % of the time", title="two gloo stages, bundled checkpoint")
    for name, each in predicted.items():
        if each.bubbles_s:
            requests.ecdf(each.bubbles_s, label=name)
    requests.set(xscale="log", xlabel="bubble time of a request, s", ylabel="share", title="GPT-3, predicted")
    for axes in (shares, requests) if by else (requests,):
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def kept(path: Path | None) -> tuple[dict[str, Any], list[Row]]:
    """What an earlier run measured, and where."""
    if path is None or not path.exists():
        return {}, []
    content = json.loads(path.read_text())
    rows = [Row(**{**row, "interval": row["interval"] and tuple(row["interval"])}) for row in content["rows"]]
    return content["meta"], [row for row in rows if not row.name.startswith(("published", "predicted"))]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--depth", type=int, default=STAGES, help="micro-batches in flight on the two stages")
    options.add_argument("--predicted", action="store_true", help="measure nothing; what --json has measured stays")
    args: argparse.Namespace = options.parse_args(arguments)
    requests = requests_of(24 if args.quick else 64)
    rounds = 2 if args.quick else 9
    found = {} if args.predicted else launch(STAGES, measure, requests, rounds, args.depth)
    predicted = paper_pipeline.predict(A100, 300 if args.quick else PUBLISHED["requests"])
    before, measured = kept(args.json) if args.predicted else ({}, [])
    if found:
        measured = rows_of(found, sum(each.max_new_tokens for each in requests))
    about = {
        **meta(
            args.machine if found else "none: predictions",
            PACKAGES,
            quick=args.quick,
            depth=args.depth,
            requests=len(requests),
            batch=BATCH,
            chunk=CHUNK,
            prompts=PROMPTS,
            published=PUBLISHED["source"],
        ),
        **(before if measured else {}),
        "predicted": {
            "requests": len(predicted[paper_pipeline.ORCA].bubbles_s),
            "hardware": A100.name,
            "rates": "assumed",
        },
    }
    plot, args.plot = args.plot, None
    title = "bubbles of SARATHI's and of Orca's batches: two stages measured, the paper's set-up predicted"
    report(args, about, [*measured, *predicted_rows(predicted)], title, tables(measured, predicted))
    if plot:
        picture(plot, measured, predicted, f"{about['machine']}, {about['date']}")


if __name__ == "__main__":
    main()
