"""Bubbles of a pipeline: SARATHI's batches beside Orca's, on two real stages and as the paper's set-up is predicted.

*Measured*: the bundled checkpoint in two stages, each a gloo rank of one thread. One set of requests, all there at the
start, is served with `DecodeMaximal` (a chunk of one prompt a micro-batch, decodes beside it) and with `FullHybrid`
(whole prompts, decodes beside them), in rounds that take turns. Both give the tokens that the model gives without
stages, or nothing is printed. A stage's bubble is the time in which it does not compute, from the first compute of any
stage to the last (`plan.measured_pipeline`); the host's own work between micro-batches is in it.

*Simulated from the measured*: what each micro-batch computed on each stage, put into `plan.pipeline`: the bubbles that
these times alone would leave. What the measured ones have beyond that is the host's and the messages'.

*Predicted*: the paper's GPT-3 on 64 A100s. Composed are the steps that this library would run, by `compose` and
`MicroBatchQueue`; their times are the cost model's (`plan.Costs`), whose rates are assumed, not measured. Nothing is
fitted to the paper's results. Assumed are besides: the reading of Zipf (the shortest length is the likeliest), that all
requests are there at the start, that a batch of 27 is one micro-batch's, 8 of them being in flight (27 x 8 requests of
4K tokens have 65 GB of keys on each GPU, about what the weights leave), that prompts of Orca's batches are never cut,
and that embedding and head cost every stage what they cost one (up to 3 % of a step).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Row, Timing, WrongResultError, launch, meta, parser, progress, ratio, report
from torch import Tensor

from seqpar import comm, plan
from seqpar.batching import (
    Budget,
    DecodeMaximal,
    FullHybrid,
    MicroBatchQueue,
    PipelineFusion,
    Policy,
    Progress,
    Request,
    Room,
    Spread,
    StallFree,
    Step,
    TemporalFusion,
    compose,
)
from seqpar.comm import Handle, Steps
from seqpar.plan import Costs, Grid, Model, ModelShape, PipelineTimes, StepWork
from seqpar.ragged import RaggedBatch

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "examples" / "tiny-llama"
PUBLISHED = json.loads((HERE / "published" / "sarathi-pipeline.json").read_text())
_RESULTS = json.loads((HERE / "published" / "sarathi.json").read_text())["pipeline"]
RESULTS = {
    "bubble time of a request, median, TP8 x PP8: Orca ÷ SARATHI": _RESULTS["bubble_reduction"],
    "time for all requests, TP8 x PP8: Orca ÷ SARATHI": _RESULTS["speedup"],
    "time for all requests: 8 x TP8 with Orca ÷ TP8 x PP8 with SARATHI": _RESULTS["speedup_over_tp"],
    "time for all requests, with Orca: TP8 x PP8 ÷ 8 x TP8": _RESULTS["tp_over_pipeline_orca"],
}
PACKAGES = ("seqpar", "torch", "transformers")

STAGES, PAGE_SIZE = 2, 16
BATCH = 8  # requests of a micro-batch
PROMPTS, RATIO = (80, 400), 10  # tokens of a prompt; prompts and outputs as the paper's
CHUNK = RATIO * (BATCH - 1)  # prompts then carry all decodes
MEASURED = {"SARATHI": DecodeMaximal(CHUNK), "Orca": FullHybrid()}

A100 = plan.HARDWARE["a100"]  # servers of 8, InfiniBand between them


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


@dataclass(frozen=True)
class Composed:
    """The micro-batches of a set of requests, in order: their work, and who is in each."""

    works: list[StepWork]
    ids: list[tuple[int, ...]]


def lengths_of(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Prompts and outputs by the paper's distribution."""
    sizes = range(PUBLISHED["shortest"], PUBLISHED["longest"] + 1)
    weights = list(accumulate((1 + place) ** -PUBLISHED["zipf"] for place in range(len(sizes))))
    share = PUBLISHED["prompt_to_output"] / (1 + PUBLISHED["prompt_to_output"])
    drawn = random.Random(seed).choices(sizes, cum_weights=weights, k=count)
    return [(round(size * share), max(1, size - round(size * share))) for size in drawn]


def composed(lengths: Sequence[tuple[int, int]], policy: Policy, batch: int, depth: int) -> Composed:
    """What runs, where every micro-batch's tokens are known when it has left: no time is needed for that."""
    queue, budget = MicroBatchQueue(depth), Budget(PUBLISHED["longest"] + batch, batch * depth)
    spread, room, found = Spread(policy, depth), Room(16, 1 << 40), Composed([], [])
    waiting = deque(Progress(i, prompt, prompt + new - 1) for i, (prompt, new) in enumerate(lengths))
    running: dict[Any, Progress] = {}
    while running or waiting:
        step = Step((), ())
        if queue.is_ready:
            step = compose(list(running.values()), list(islice(waiting, batch * depth)), budget, spread, room)
            for _ in step.admitted:
                each = waiting.popleft()
                running[each.id] = each
        if step.ids:
            found.works.append(work_of(step, running))
            found.ids.append(step.ids)  # type: ignore[arg-type]
            queue.push(step, running)
            if queue.is_ready:
                continue
        for request in queue.complete().ids:
            each = running[request]
            if each.computed == each.tokens:
                each.tokens += 1
                if each.tokens == sum(lengths[each.id]):  # type: ignore[index]
                    del running[request]
    return found


def work_of(step: Step, running: dict[Any, Progress]) -> StepWork:
    """What a step has to do: decodes read their keys, prompts meet theirs, and some are done with their last token."""
    pairs = keys = cached = rows = 0
    for place, (request, new) in enumerate(step.items):
        each = running[request]
        seen = each.scheduled + new
        rows += seen == each.tokens
        if place < step.num_decodes:
            cached += seen
        else:
            keys += seen
            pairs += (seen * (seen + 1) - (seen - new) * (seen - new + 1)) // 2
    return StepWork(step.num_tokens, pairs, cached, keys, decodes=step.num_decodes, rows=rows)


class Predicted(NamedTuple):
    """A set-up of the paper: the time for all requests, and the bubble time of each."""

    seconds: float
    bubbles_s: list[float]
    times: PipelineTimes | None


def costs_of(layers: int) -> Costs:
    """Of so many layers of GPT-3, whose MLP has two matrices, on the 8 ranks of a server."""
    config = PUBLISHED["model"]
    shape = ModelShape.from_config({**config, "num_hidden_layers": layers})
    return Costs(Model(shape, config["vocab_size"], gated=False, name="GPT-3"), A100, Grid(PUBLISHED["tp"]))


def staged(lengths: Sequence[tuple[int, int]], policy: Policy) -> Predicted:
    """TP8 x PP8."""
    stages, batch = PUBLISHED["stages"], PUBLISHED["batch"]["TP8 x PP8"]
    costs = costs_of(PUBLISHED["model"]["num_hidden_layers"] // stages)
    found = composed(lengths, policy, batch, stages)
    seconds = [costs.seconds(work) for work in found.works]
    row = 2 * PUBLISHED["model"]["hidden_size"]  # bytes of a token, which each rank hands over as it holds it
    sends = [A100.message_s(work.tokens * row, PUBLISHED["tp"]) for work in found.works]
    back_s = A100.message_s(0, PUBLISHED["tp"])
    times = plan.pipeline([[each] * stages for each in seconds], stages, sends=sends, back_s=back_s)
    bubbles = [0.0] * len(lengths)
    for ids, gap in zip(found.ids, times.gaps_s, strict=True):
        for request in ids:
            bubbles[request] += gap
    return Predicted(times.span_s, bubbles, times)


def replicated(lengths: Sequence[tuple[int, int]], policy: Policy) -> Predicted:
    """8 x TP8: eight copies of the model, each with an eighth of the requests; the last to end counts."""
    copies, batch = PUBLISHED["stages"], PUBLISHED["batch"]["8 x TP8"]
    costs = costs_of(PUBLISHED["model"]["num_hidden_layers"])
    totals = [
        sum(costs.seconds(work) for work in composed(mine, policy, batch, 1).works)
        for mine in (lengths[copy::copies] for copy in range(copies))
    ]
    return Predicted(max(totals), [], None)


def predict(count: int) -> dict[str, Predicted]:
    lengths = lengths_of(count)
    orca, sarathi = FullHybrid(), DecodeMaximal(PUBLISHED["chunk"])
    return {
        "TP8 x PP8, Orca": staged(lengths, orca),
        "TP8 x PP8, SARATHI": staged(lengths, sarathi),
        "8 x TP8, Orca": replicated(lengths, orca),
    }


def beside(found: dict[str, Predicted]) -> list[tuple[str, float, float]]:
    """What was published, and what is predicted of it."""
    orca, sarathi, copies = (found[name] for name in ("TP8 x PP8, Orca", "TP8 x PP8, SARATHI", "8 x TP8, Orca"))
    predicted = (
        statistics.median(orca.bubbles_s) / statistics.median(sarathi.bubbles_s),
        orca.seconds / sarathi.seconds,
        copies.seconds / sarathi.seconds,
        orca.seconds / copies.seconds,
    )
    return [(name, value, got) for (name, value), got in zip(RESULTS.items(), predicted, strict=True)]


def predicted_rows(found: dict[str, Predicted]) -> list[Row]:
    rows = []
    for name, published, got in beside(found):
        rows.append(Row(f"published: {name}", published, "x"))
        rows.append(Row(f"predicted: {name}", got, "x"))
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
    lines += ["", "| GPT-3 on 64 A100s | published | predicted |", "|---|---:|---:|"]
    lines += [f"| {name} | {published:g}x | {got:.2f}x |" for name, published, got in beside(found)]
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


def picture(path: Path, found: dict[str, list[Served]], predicted: dict[str, Predicted], title: str) -> None:
    """Bubbles of the stages, measured and simulated; bubble times of requests as predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, requests = figure.subplots(1, 2)
    width = 0.25
    for place, (name, runs) in enumerate(found.items()):
        bars = [statistics.median(run.measured.stages[s].bubble for run in runs) for s in range(STAGES)]
        bars.append(statistics.median(run.simulated.bubble for run in runs))
        at = [x + (place - 0.5) * width for x in range(len(bars))]
        shares.bar(at, [100 * bar for bar in bars], width, label=name)
    shares.set_xticks(range(STAGES + 1), [*(f"stage {s}" for s in range(STAGES)), "from times"])
    shares.set(ylabel="bubbles, % of the time", title="two gloo stages, bundled checkpoint")
    for name, each in predicted.items():
        if each.bubbles_s:
            requests.ecdf(each.bubbles_s, label=name)
    requests.set(xscale="log", xlabel="bubble time of a request, s", ylabel="share", title="GPT-3, predicted")
    for axes in (shares, requests) if found else (requests,):
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--depth", type=int, default=STAGES, help="micro-batches in flight on the two stages")
    options.add_argument("--predicted", action="store_true", help="leave out what is measured")
    args: argparse.Namespace = options.parse_args(arguments)
    requests = requests_of(24 if args.quick else 64)
    rounds = 2 if args.quick else 9
    found = {} if args.predicted else launch(STAGES, measure, requests, rounds, args.depth)
    predicted = predict(300 if args.quick else PUBLISHED["requests"])
    measured = rows_of(found, sum(each.max_new_tokens for each in requests)) if found else []
    about = meta(
        args.machine if found else "none: predictions",
        PACKAGES,
        quick=args.quick,
        depth=args.depth,
        requests=len(requests),
        batch=BATCH,
        chunk=CHUNK,
        prompts=PROMPTS,
        published=PUBLISHED["source"],
        predicted={"requests": len(predicted["TP8 x PP8, Orca"].bubbles_s), "hardware": A100.name, "rates": "assumed"},
    )
    plot, args.plot = args.plot, None
    title = "bubbles of SARATHI's and of Orca's batches: two stages measured, the paper's set-up predicted"
    report(args, about, [*measured, *predicted_rows(predicted)], title, tables(measured, predicted))
    if plot:
        picture(plot, found, predicted, f"{args.machine}, {about['date']}")


if __name__ == "__main__":
    main()
