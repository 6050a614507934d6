"""The tuner: its frontier is one, its choices are the best of what was tried, and it says what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqpar.plan import (
    HARDWARE,
    Costs,
    Grid,
    Hardware,
    Model,
    ModelShape,
    Options,
    Plan,
    StepWork,
    Tuned,
    Workload,
    best,
    saturated,
)
from tests.kernels.own_errors import own_errors

ROOT = Path(__file__).parents[2]
SMALL = Model(ModelShape(4096, 32, 32, 8, 128, 14336), 128256, name="Llama-8B")
LARGE = Model(ModelShape(16384, 126, 128, 8, 128, 53248), 128256, name="Llama-405B")
WORK = Workload(prompt=4096, output=256)
H100, RTX = HARDWARE["h100"], HARDWARE["4090"]


def search(*arguments: Any, hardware: Hardware = H100, model: Model = SMALL, **options: Any) -> Tuned:
    """Without the checker, which takes most of the time of so many small calls."""
    with own_errors():
        return best(model, hardware, WORK, *arguments, **{"ranks": 4, "budgets": (2048,), **options})


@pytest.fixture(scope="module")
def found() -> Tuned:
    return search()


def metrics(plan: Plan) -> tuple[float, float, float]:
    return plan.latency_s, -plan.tokens_per_s, plan.memory_bytes


def test_the_frontier_is_one(found: Tuned) -> None:
    values = [metrics(plan) for plan in found.frontier]
    for one in values:
        assert not any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in values)
    assert found.chosen.tokens_per_s == max(plan.tokens_per_s for plan in found.frontier)
    assert found.tried > 20 and all(plan.reason and plan.capacity >= 1 for plan in found.frontier)
    assert all(plan.replicas * plan.grid.size == 4 for plan in found.frontier)
    assert all(f"{plan.name}, steps of {plan.budget:,}" in found.explain() for plan in found.frontier)


def test_a_plan_is_what_its_costs_say(found: Tuned) -> None:
    for plan in found.frontier:
        costs = Costs(SMALL, H100, plan.grid, plan.options)
        assert plan.tpot_s == costs.seconds(SMALL.work([1], [4096 + 128]))
        starts = range(0, 4096, plan.budget)
        chunks = [SMALL.work([min(plan.budget, 4096 - start)], [start]) for start in starts]
        last = costs.seconds(chunks[-1])
        assert plan.ttft_s == pytest.approx(sum(costs.stage_seconds(work) for work in chunks[:-1]) + last)
        assert plan.latency_s == pytest.approx(plan.ttft_s + 256 * plan.tpot_s)
        assert plan.memory_bytes <= 0.9 * H100.accelerator.memory_bytes
        assert costs.memory((plan.capacity + 2) * 4352, plan.budget, min(plan.budget, plan.capacity)).short


def test_each_objective_is_met_first(found: Tuned) -> None:
    for objective in ("ttft", "tpot", "latency"):
        other = search(objective, ranks=2)
        wanted = other.chosen.value(other.objective)
        assert wanted == min(plan.value(other.objective) for plan in other.frontier)


def test_decodes_want_tensor_parallelism_and_a_crowd_replicas(found: Tuned) -> None:
    latency = search("latency").chosen
    assert found.chosen.replicas > latency.replicas == 1
    under = latency.options.shift.layout_of(1) if latency.options.shift else latency.grid.layout
    assert under.tp == 4
    few = Workload(4096, 256, requests=4)
    with own_errors():
        asked = best(SMALL, H100, few, ranks=2, budgets=(2048,)).chosen
    assert asked.capacity * asked.replicas <= 4


def test_what_does_not_fit_is_told_by_how_much() -> None:
    with pytest.raises(
        ValueError, match=r"one request of 4,352 tokens, got [\d.]+ GB too much on every rank of"
    ) as caught:
        search(model=LARGE, hardware=RTX, ranks=8)
    grids = [Grid(tp, sp, 8 // tp // sp) for tp in (1, 2, 4, 8) for sp in (1, 2, 4, 8) if tp * sp <= 8]
    ways = [Options(), Options(decode="qship")]
    least = min(Costs(LARGE, RTX, grid, way).memory(4352, 2048).short for grid in grids for way in ways)
    assert f"got {least / 1e9:,.1f} GB" in str(caught.value)


def test_lossy_formats_are_used_where_they_are_asked_for() -> None:
    plain, coded = (search("ttft", hardware=RTX, ranks=2, wires=wires) for wires in ((None,), (None, "int8")))
    assert all(plan.options.wire is None for plan in plain.frontier)
    assert coded.chosen.options.wire == "int8" and coded.chosen.ttft_s < plain.chosen.ttft_s
    cut = [plan for plan in search("ttft", hardware=RTX).frontier if plan.options.overlap]
    assert any("hidden" in plan.reason and "chunks" in plan.name for plan in cut)


def test_balance_is_what_a_replayed_queue_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper_shift

    costs = Costs(SMALL, H100, Grid(2))
    with own_errors():
        for prompt, output, budget, capacity in ((512, 64, 1024, 32), (1024, 32, 512, 16)):
            told = saturated(costs, Workload(prompt, output), budget=budget, capacity=capacity)

            def step(of: Any) -> float:
                return costs.seconds(StepWork(of.tokens, of.pairs, of.cached, decodes=1, rows=1))

            sizes = {"prompt": prompt, "output": output, "capacity": capacity, "budget": budget}
            assert told.tokens_per_s == pytest.approx(paper_shift.saturated(step, **sizes, generations=3), rel=0.1)


def test_what_is_refused() -> None:
    for arguments, match in (
        ({"objective": "fun"}, "`objective` must be one of latency"),
        ({"ranks": 0}, "`ranks` and `budgets` must be at least 1"),
        ({"budgets": ()}, "`ranks` and `budgets`"),
        ({"wires": ("int3",)}, "`wires` must be of None, "),
    ):
        with own_errors(), pytest.raises(ValueError, match=match):
            best(SMALL, H100, WORK, **arguments)
    bare = replace(H100, accelerator=replace(H100.accelerator, memory_bytes=0.0))
    with pytest.raises(ValueError, match="`hardware` must say how much memory a rank has, got none for h100"):
        best(SMALL, bare, WORK)
    with pytest.raises(ValueError, match="`prompt`, `output` and `requests` must be at least 1"):
        Workload(0, 1)
