"""Sarathi-Serve's capacities (arXiv:2403.02310): requests a second within a bound of the time between tokens.

Of the traces only percentiles are known, so lengths are drawn from log-normal distributions that have them. The real
policies compose the steps in `plan.simulate`, each in the cost model's time; a bisection finds the rate from which the
bound, or the wait for the first step, is no longer kept.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

from seqpar.batching import Budget, Composer, FullHybrid, PrefillFirst, StallFree
from seqpar.batching.compose import Policy
from seqpar.partition import Layout
from seqpar.plan import Arrival, Costs, Curve, Fleet, Grid, Simulation, StepWork, simulate

__all__ = ["Server", "capacity"]

DELAY_S = 2.0
BUDGET = 512
MOST_REQUESTS = 128
POLICIES: dict[str, tuple[Policy, int]] = {
    "Sarathi": (StallFree(BUDGET), 1 << 14),
    "vLLM": (PrefillFirst(), 1 << 14),
    "Orca": (FullHybrid(), 1 << 14),
}


@dataclass(frozen=True)
class Server:
    """A model's steps on its ranks, and the bound of the time between tokens."""

    costs: Costs
    bound_s: float

    def fleet(self) -> Fleet:
        grid = self.costs.grid
        tokens = self.costs.tokens_that_fit(BUDGET)
        sent = self.costs.model.shape.hidden_size * 2 / grid.tp
        hop = Curve((1, 1 << 20), tuple(self.costs.hardware.message_s(n * sent, grid.tp) for n in (1, 1 << 20)))
        return Fleet(
            num_pages=tokens // 16,
            layout=grid.layout,
            stages=(1 / grid.pp,) * grid.pp,
            hop=hop if grid.pp > 1 else None,
        )

    def serve(self, policy: Policy, most_tokens: int, trace: Sequence[Arrival]) -> Simulation:
        costs = Costs(self.costs.model, self.costs.hardware, Grid(self.costs.grid.tp))

        def step_s(_: Layout, work: StepWork) -> float:
            return costs.seconds(work)

        composer = Composer(policy, Budget(max_tokens=most_tokens, max_requests=MOST_REQUESTS))
        return simulate(trace, step_s, composer, self.fleet())

    def keeps(self, policy: Policy, most_tokens: int, trace: Sequence[Arrival]) -> bool:
        """Whether both bounds are kept; the time to the first token holds the wait and the prompt's own steps."""
        found = self.serve(policy, most_tokens, trace)
        prompt = self.costs.seconds(self.costs.model.work([round(_middle([each.prompt_tokens for each in trace]))]))
        waited = found.percentiles("ttft", (0.5,))[0] - prompt
        return found.percentiles("tbt", (0.99,))[0] <= self.bound_s and waited <= DELAY_S


@cache
def lengths(prompt: tuple[int, int], output: tuple[int, int], longest: int, count: int) -> tuple[tuple[int, int], ...]:
    """Drawn from log-normal distributions of these medians and 90th percentiles."""
    draw, found = random.Random(0), []
    while len(found) < count:
        each = tuple(
            max(1, round(draw.lognormvariate(log(median), log(high / median) / 1.2816)))
            for median, high in (prompt, output)
        )
        if sum(each) <= longest:
            found.append((each[0], each[1]))
    return tuple(found)


def capacity(server: Server, name: str, trace: Mapping[str, Any], count: int) -> float:
    """The most requests a second that a policy serves within the bounds."""
    policy, most_tokens = POLICIES[name]
    sizes = lengths(tuple(trace["prompt"]), tuple(trace["output"]), trace["longest"], count)
    gaps = random.Random(1)
    units = [gaps.expovariate(1.0) for _ in sizes]

    def at(rate: float) -> list[Arrival]:
        now, found = 0.0, []
        for unit, (prompt, output) in zip(units, sizes, strict=True):
            now += unit / rate
            found.append(Arrival(now, prompt, output))
        return found

    low, high = 0.005, 20.0
    for _ in range(9):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if server.keeps(policy, most_tokens, at(middle)) else (low, middle)
    return low


def _middle(values: Sequence[int]) -> float:
    return float(sorted(values)[len(values) // 2])
