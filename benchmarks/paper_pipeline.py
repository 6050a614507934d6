"""SARATHI's simulated pipeline (arXiv:2308.16369): GPT-3 on 64 A100s, by `plan.simulate` and the cost model.

Eight stages of TP8 against eight replicas of TP8, with Orca's batches (whole prompts beside decodes) and SARATHI's
(chunks of 256 beside decodes). The real policies compose the steps; the cache holds what 27, or 11, requests of the
longest length need for each micro-batch, as the paper gives. Requests all wait at the start. As many as the paper has
take minutes, so fewer are drawn; what is compared are rates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from seqpar.batching import Budget, Composer, DecodeMaximal
from seqpar.batching.compose import Draft, Policy
from seqpar.partition import Layout
from seqpar.plan import (
    Arrival,
    Costs,
    Curve,
    Fleet,
    Grid,
    Hardware,
    Model,
    ModelShape,
    Simulation,
    StepWork,
    simulate,
)

__all__ = ["GPT3", "ratios"]

GPT3 = Model(ModelShape(12288, 96, 96, 96, 128, 4 * 12288), 50257, gated=False, name="GPT-3 175B")
STAGES, TP, CHUNK, SHORTEST, LONGEST, SKEW, PROMPTS = 8, 8, 256, 1024, 4096, 0.4, 10
MOST = {"pipeline": 27, "replicas": 11}  # requests of a micro-batch, and of a replica


@dataclass(frozen=True)
class Orca:
    """All decodes, and whole prompts beside them while a batch has room for requests."""

    most: int

    def fill(self, draft: Draft) -> None:
        draft.decode()
        if draft.num_decoding < self.most:
            draft.prefill(whole=True, requests=self.most - draft.num_decoding)


def trace(count: int) -> list[Arrival]:
    """Lengths by Zipf's law, ten tokens of a prompt for each that is decoded."""
    sizes = range(SHORTEST, LONGEST + 1)
    weights = [1 / (at + 1) ** SKEW for at in range(len(sizes))]
    lengths = random.Random(0).choices(sizes, weights, k=count)
    return [Arrival(0.0, length - length // (1 + PROMPTS), length // (1 + PROMPTS)) for length in lengths]


def run(hardware: Hardware, policy: Policy, *, pipelined: bool, count: int) -> Simulation:
    """Serve it by a pipeline of all ranks, or by replicas of one stage each."""
    costs = Costs(GPT3, hardware, Grid(TP))
    ways = STAGES if pipelined else 1
    most = MOST["pipeline" if pipelined else "replicas"] * ways
    sent = GPT3.shape.hidden_size * 2 / TP
    sizes = (1, 1 << 20)
    fleet = Fleet(
        num_pages=most * LONGEST // 16,
        layout=Layout(TP, 1),
        replicas=1 if pipelined else STAGES,
        stages=(1 / ways,) * ways,
        hop=Curve(sizes, tuple(hardware.message_s(n * sent, TP) for n in sizes)) if pipelined else None,
    )

    def step_s(_: Layout, work: StepWork) -> float:
        return costs.seconds(work)

    composer = Composer(policy, Budget(max_tokens=1 << 20, max_requests=most))
    return simulate(trace(count), step_s, composer, fleet)


@cache
def ratios(hardware: Hardware, count: int) -> dict[str, float]:
    """What the paper gives, by its keys in `published/sarathi.json`."""
    orca, chunks = Orca(MOST["pipeline"]), DecodeMaximal(CHUNK, tile=128)
    before, after = (run(hardware, policy, pipelined=True, count=count) for policy in (orca, chunks))
    alone = run(hardware, Orca(MOST["replicas"]), pipelined=False, count=count)
    idle = [found.span_s - found.busy_s for found in (before, after)]
    return {
        "bubble_reduction": idle[0] / idle[1],
        "speedup": before.duration_s / after.duration_s,
        "speedup_over_tp": alone.duration_s / after.duration_s,
        "tp_over_pipeline_orca": before.duration_s / alone.duration_s,
    }
