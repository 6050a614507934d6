"""SARATHI's simulated pipeline (arXiv:2308.16369, section 5.3): GPT-3 on 64 A100s, by the library's own policies.

The one model of it, for docs/results/pipeline.md and docs/paper-results.md. Composed are the steps that this library
would run, by `compose` and `MicroBatchQueue`; their times are the cost model's (`plan.Costs`), put into
`plan.pipeline`. Nothing is fitted to the paper's results. Assumed are: the reading of Zipf (the shortest length is the
likeliest), that all requests are there at the start, that a batch of 27 is one micro-batch's, 8 of them being in flight
(27 x 8 requests of 4K tokens have 65 GB of keys on each GPU, about what the weights leave), that prompts of Orca's
batches are never cut, that SARATHI's chunks end on a tile of 128 rows together with their decodes, which is the paper's
own rule, and that embedding and head cost every stage what they cost one (up to 3 % of a step).

What Orca's batches are, the paper says by two cases: at best a whole prompt joins the decodes of a batch as soon as
there is room, at worst the requests of a batch begin and end together. Which of the two its simulation of a pipeline
has is not said. `predict` gives both; the ratios are those of the first, which is what Orca's scheduler does.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from seqpar import plan
from seqpar.batching import (
    Budget,
    DecodeMaximal,
    FullHybrid,
    MicroBatchQueue,
    Policy,
    Progress,
    Room,
    Spread,
    Step,
    compose,
)
from seqpar.plan import Costs, Grid, Hardware, Model, ModelShape, PipelineTimes, StepWork

__all__ = ["PUBLISHED", "Predicted", "composed", "lengths_of", "predict", "ratios"]

PUBLISHED = json.loads((Path(__file__).parent / "published" / "sarathi-pipeline.json").read_text())
TILE = 128
ORCA, SARATHI, COPIES, TOGETHER = "TP8 x PP8, Orca", "TP8 x PP8, SARATHI", "8 x TP8, Orca", "TP8 x PP8, Orca at worst"


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


def together(lengths: Sequence[tuple[int, int]], batch: int, depth: int) -> Composed:
    """Batches whose requests begin together: a step of all their prompts, then decodes until the longest one ends."""
    waiting = [list(range(at, min(at + batch, len(lengths)))) for at in range(0, len(lengths), batch)]
    slots: list[list[tuple[int, int, int]]] = [[] for _ in range(depth)]  # request, its tokens so far, still to come
    found = Composed([], [])
    while waiting or any(slots):
        for slot in range(depth):
            held = slots[slot]
            if held:
                held = [(each, seen + 1, left - 1) for each, seen, left in held]
                found.works.append(
                    StepWork(len(held), cached=sum(seen for _, seen, _ in held), decodes=len(held), rows=len(held))
                )
            elif waiting:
                held = [(each, lengths[each][0], lengths[each][1] - 1) for each in waiting.pop(0)]
                prompts = [seen for _, seen, _ in held]
                pairs = sum(n * (n + 1) // 2 for n in prompts)
                found.works.append(StepWork(sum(prompts), pairs=pairs, keys=sum(prompts), rows=len(held)))
            else:
                continue
            found.ids.append(tuple(each for each, _, _ in held))
            slots[slot] = [each for each in held if each[2]]
    return found


class Predicted(NamedTuple):
    """A set-up of the paper: the time for all requests, and the bubble time of each."""

    seconds: float
    bubbles_s: list[float]
    times: PipelineTimes | None


def costs_of(hardware: Hardware, layers: int) -> Costs:
    """Of so many layers of GPT-3, whose MLP has two matrices, on the 8 ranks of a server."""
    config = PUBLISHED["model"]
    shape = ModelShape.from_config({**config, "num_hidden_layers": layers})
    return Costs(Model(shape, config["vocab_size"], gated=False, name="GPT-3"), hardware, Grid(PUBLISHED["tp"]))


def staged(hardware: Hardware, found: Composed, requests: int) -> Predicted:
    """TP8 x PP8."""
    stages = PUBLISHED["stages"]
    costs = costs_of(hardware, PUBLISHED["model"]["num_hidden_layers"] // stages)
    seconds = [costs.seconds(work) for work in found.works]
    row = 2 * PUBLISHED["model"]["hidden_size"]  # bytes of a token, which each rank hands over as it holds it
    sends = [hardware.message_s(work.tokens * row, PUBLISHED["tp"]) for work in found.works]
    back_s = hardware.message_s(0, PUBLISHED["tp"])
    times = plan.pipeline([[each] * stages for each in seconds], stages, sends=sends, back_s=back_s)
    bubbles = [0.0] * requests
    for ids, gap in zip(found.ids, times.gaps_s, strict=True):
        for request in ids:
            bubbles[request] += gap
    return Predicted(times.span_s, bubbles, times)


def replicated(hardware: Hardware, lengths: Sequence[tuple[int, int]], policy: Policy) -> Predicted:
    """8 x TP8: eight copies of the model, each with an eighth of the requests; the last to end counts."""
    copies, batch = PUBLISHED["stages"], PUBLISHED["batch"]["8 x TP8"]
    costs = costs_of(hardware, PUBLISHED["model"]["num_hidden_layers"])
    totals = [
        sum(costs.seconds(work) for work in composed(mine, policy, batch, 1).works)
        for mine in (lengths[copy::copies] for copy in range(copies))
    ]
    return Predicted(max(totals), [], None)


@cache
def predict(hardware: Hardware, count: int) -> dict[str, Predicted]:
    """Every set-up, of so many requests."""
    lengths, batch, depth = lengths_of(count), PUBLISHED["batch"]["TP8 x PP8"], PUBLISHED["stages"]
    orca, sarathi = FullHybrid(), DecodeMaximal(PUBLISHED["chunk"], tile=TILE)
    return {
        ORCA: staged(hardware, composed(lengths, orca, batch, depth), count),
        SARATHI: staged(hardware, composed(lengths, sarathi, batch, depth), count),
        COPIES: replicated(hardware, lengths, orca),
        TOGETHER: staged(hardware, together(lengths, batch, depth), count),
    }


def ratios(found: dict[str, Predicted], orca: str = ORCA) -> dict[str, float]:
    """What the paper gives, by its keys in `published/sarathi.json`, with one of the two readings of Orca."""
    before, after, copies = found[orca], found[SARATHI], found[COPIES]
    return {
        "bubble_reduction": statistics.median(before.bubbles_s) / statistics.median(after.bubbles_s),
        "speedup": before.seconds / after.seconds,
        "speedup_over_tp": copies.seconds / after.seconds,
        "tp_over_pipeline_orca": before.seconds / copies.seconds,
    }
