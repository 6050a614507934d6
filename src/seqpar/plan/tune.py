"""Which layout and which techniques: a search through the cost model, and the plans that nothing else beats.

Every way to split the ranks is tried: replicas of tp x sp x pp. For each, what has a choice of its own takes it: the
layouts of a shift from `plan.shift`, cuts from `plan.overlap`, each on this model's curves. The rest (how prompts and
decodes use the sequence ranks, tokens of a step, the wire format) is a product small enough to go through.

A plan is judged at one request (time to the first token, between tokens) and saturated. There the numbers balance:
with P tokens in, O out and d requests decoding, as many prompts must end as decodes, so a step has d P / O tokens of
prompts beside its d decodes, and d is what the cache holds or the step has room for, whichever is less. Replaying a
queue lost: it takes a thousand times as long, for averages that differ by a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any, Literal

from seqpar.kernels.quantize import FORMATS, Wire
from seqpar.partition import Interleave, Shift
from seqpar.plan.cost import Costs, Decode, Grid, Options, Prefill
from seqpar.plan.costs import Curve
from seqpar.plan.hardware import Hardware
from seqpar.plan.model import Model, StepWork
from seqpar.plan.overlap import overlap
from seqpar.plan.shift import StepCosts, shift

__all__ = ["Plan", "Saturated", "Tuned", "Workload", "best", "saturated"]

Objective = Literal["latency", "throughput", "memory", "ttft", "tpot"]

_OBJECTIVES = ("latency", "throughput", "memory", "ttft", "tpot")
_PREFILLS: tuple[Prefill, ...] = ("ulysses", "ring")
_DECODES: tuple[Decode, ...] = ("local", "qship")
_BUDGETS = (512, 1024, 2048, 4096, 8192)
_LAYERS = 4  # show where to cut: turns are alike from layer to layer
_STEPS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Workload:
    """What requests are like.

    Args:
        prompt: tokens of a request's prompt.
        output: tokens that it decodes.
        requests: that run at a time, over all replicas; None for as many as fit.

    Raises:
        ValueError: counts below 1.
    """

    prompt: int
    output: int
    requests: int | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1 or (self.requests is not None and self.requests < 1):
            raise ValueError(
                "`prompt`, `output` and `requests` must be at least 1, got "
                f"{self.prompt}, {self.output}, {self.requests}"
            )


@dataclass(frozen=True)
class Saturated:
    """A server whose queue never ends.

    Attributes:
        tokens_per_s: in and out.
        step_s: between two tokens of a request.
        decodes: of a step.
        prompt_tokens: beside them.
        work: of a step of one stage.
    """

    tokens_per_s: float
    step_s: float
    decodes: float
    prompt_tokens: float
    work: StepWork


@dataclass(frozen=True)
class Plan:
    """One way to run a model, and what is predicted of it.

    Attributes:
        grid: of each replica.
        replicas: side by side, none knowing of another.
        options: how each runs.
        budget: tokens of a step.
        ttft_s: of one request's prompt on an idle server.
        tpot_s: between its tokens.
        latency_s: of it as a whole.
        tokens_per_s: of all replicas, saturated.
        step_s: between tokens of a request then.
        capacity: requests that a replica's cache holds, or that it is asked to.
        memory_bytes: of the fullest rank with those.
        reason: what speaks for it, in a line.
    """

    grid: Grid
    replicas: int
    options: Options
    budget: int
    ttft_s: float
    tpot_s: float
    latency_s: float
    tokens_per_s: float
    step_s: float
    capacity: int
    memory_bytes: float
    reason: str = ""

    @property
    def name(self) -> str:
        """In a few words."""
        o, times = self.options, f"{self.replicas} x " if self.replicas > 1 else ""
        words = [f"{times}{self.grid}"]
        words += ["shift"] if o.shift and len(o.shift.spans) > 1 else []
        words += [f"{o.overlap.chunks} chunks"] if o.overlap else []
        words += [o.prefill] if self.grid.sp > 1 and o.prefill != "ulysses" else []
        words += [o.decode] if self.grid.sp > 1 and o.decode != "local" else []
        words += [o.wire] if o.wire else []
        return ", ".join(words)

    def value(self, objective: Objective) -> float:
        """What is to be small.

        Raises:
            ValueError: an unknown objective.
        """
        _check_objective(objective)
        return {
            "latency": self.latency_s,
            "ttft": self.ttft_s,
            "tpot": self.tpot_s,
            "throughput": -self.tokens_per_s,
            "memory": self.memory_bytes,
        }[objective]


@dataclass(frozen=True)
class Tuned:
    """The plans that no other one beats in latency, throughput and memory at once.

    Attributes:
        frontier: the best first, by the objective.
        objective: that was asked for.
        tried: how many plans were compared.
    """

    frontier: tuple[Plan, ...]
    objective: Objective
    tried: int

    @property
    def chosen(self) -> Plan:
        return self.frontier[0]

    def explain(self) -> str:
        """A line for each plan."""
        lines = [f"{self.tried} plans compared, {len(self.frontier)} that no other beats; best {self.objective} first"]
        for plan in self.frontier:
            times = f"TTFT {1e3 * plan.ttft_s:,.0f} ms, TPOT {1e3 * plan.tpot_s:.3g} ms"
            lines.append(
                f"  {plan.name}, steps of {plan.budget:,}: {times}, {plan.tokens_per_s:,.0f} tokens/s, "
                f"{plan.memory_bytes / 1e9:,.0f} GB; {plan.reason}"
            )
        return "\n".join(lines)


def best(
    model: Model,
    hardware: Hardware,
    workload: Workload,
    objective: Objective = "throughput",
    *,
    ranks: int | None = None,
    options: Options | None = None,
    wires: Sequence[Wire | None] = (None,),
    budgets: Sequence[int] = _BUDGETS,
    prefills: Sequence[Prefill] = _PREFILLS,
    decodes: Sequence[Decode] = _DECODES,
) -> Tuned:
    """Search for plans.

    Args:
        model: see `Model.from_config`.
        hardware: see `HARDWARE`.
        workload: what requests are like.
        objective: by which the frontier is sorted: a single request's latency, its time to the first token ("ttft") or
            between tokens ("tpot"), tokens a second when saturated, or memory of a rank.
        ranks: that there are; those of one host by default.
        options: itemsizes, the engine's overhead and the share of the memory; the techniques are searched.
        wires: formats that sums and exchanges may travel in: lossy ones only where they are asked for.
        budgets: tokens of a step to try.
        prefills: what the sequence ranks may do in prompts.
        decodes: where decodes may be computed.

    Raises:
        ValueError: an unknown objective or method, no ranks or budgets, hardware of unknown memory, or a model of which
            not one request fits in any layout.
    """
    ranks = hardware.host_ranks if ranks is None else ranks
    _check_objective(objective)
    if ranks < 1 or not budgets or min(budgets) < 1:
        raise ValueError(f"`ranks` and `budgets` must be at least 1, got {ranks} and {list(budgets)}")
    if not hardware.accelerator.memory_bytes:
        raise ValueError(
            f"`hardware` must say how much memory a rank has, got none for {hardware.name}; see Accelerator"
        )
    unknown = [wire for wire in wires if wire is not None and wire not in FORMATS]
    if unknown or not wires:
        raise ValueError(f"`wires` must be of None, {', '.join(FORMATS)}, got {list(wires)}")
    for name, given, known in (("prefills", prefills, _PREFILLS), ("decodes", decodes, _DECODES)):
        if not given or not {*given} <= {*known}:
            raise ValueError(f"`{name}` must be of {', '.join(known)}, got {list(given)}")
    found: list[Plan] = []
    short: list[tuple[float, Grid]] = []
    for grid, ways in _candidates(model, hardware, ranks, options or Options(), wires, prefills, decodes):
        costs = Costs(model, hardware, grid, ways)
        # A plan whose weights do not fit is not worth its schedules.
        missing = costs.memory(workload.prompt + workload.output, min(budgets)).short
        if missing:
            short.append((missing, grid))
            continue
        found += _plans(costs, workload, ranks // grid.size, budgets)
    if not found:
        if not short:
            raise ValueError(f"`ranks` must give a layout that the model has, got {ranks} on {hardware.name}")
        missing, grid = min(short)
        raise ValueError(
            f"the model must fit with one request of {workload.prompt + workload.output:,} tokens, got "
            f"{missing / 1e9:,.1f} GB too much on every rank of {grid} (tp x sp x pp), the layout that is least short, "
            f"of {ranks} x {hardware.accelerator.name}; take more ranks, or 1-byte weights"
        )
    kept = [plan for plan in found if not any(_beats(other, plan) for other in found)]
    unique = {(plan.name, plan.budget): plan for plan in kept}
    return Tuned(tuple(sorted(unique.values(), key=lambda plan: plan.value(objective))), objective, len(found))


def _check_objective(objective: Objective) -> None:
    if objective not in _OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(_OBJECTIVES)}, got {objective!r}")


def saturated(costs: Costs, workload: Workload, *, budget: int, capacity: int) -> Saturated:
    """A server of which as many requests run as its cache holds, or its steps have room for.

    Args:
        costs: of its steps.
        workload: what requests are like.
        budget: tokens of a step.
        capacity: requests that the cache holds.
    """
    ways = costs.grid.pp
    prompt, output = workload.prompt, workload.output
    decodes = min(capacity / ways, budget * output / (prompt + output))
    tokens = decodes * prompt / output
    # A chunk's queries see half of the prompt before it on average, or its own half where it is the whole prompt.
    keys_seen = (prompt + 1) / 2
    requests = max(1.0, tokens / prompt)
    work = StepWork(
        max(1, round(decodes + tokens)),
        pairs=tokens * keys_seen,
        cached=decodes * (prompt + output / 2),
        keys=tokens + requests * prompt / 2,
        decodes=max(1, round(decodes)),
        rows=max(1, round(decodes)),
    )
    stage = costs.stage_seconds(work)
    return Saturated((decodes + tokens) / stage, stage * ways, decodes * ways, tokens, work)


def _candidates(
    model: Model,
    hardware: Hardware,
    ranks: int,
    options: Options,
    wires: Sequence[Wire | None],
    prefills: Sequence[Prefill],
    decodes: Sequence[Decode],
) -> Iterator[tuple[Grid, Options]]:
    """Layouts of all divisors of the ranks, and what of the options does not depend on the curves."""
    heads = model.shape.num_heads
    for size in _divisors(ranks):
        for tp, sp in product(_divisors(size), repeat=2):
            pp = size // tp // sp
            fits = tp * sp * pp == size and tp <= heads and pp <= model.num_layers
            if not fits or size > (hardware.most_ranks or size):
                continue
            able = {"ulysses": tp * sp <= heads, "ring": sp > 1, "local": True, "qship": sp > 1 and tp * sp <= heads}
            methods = ([each for each in given if able[each]] for given in (prefills, decodes))
            for prefill, decode, wire in product(*methods, wires if tp * sp > 1 else (None,)):
                ways: dict[str, Any] = {"prefill": prefill, "decode": decode, "wire": wire}
                yield Grid(tp, sp, pp), replace(options, overlap=None, shift=None, **ways)


def _plans(costs: Costs, workload: Workload, replicas: int, budgets: Sequence[int]) -> Iterator[Plan]:
    """With and without a shift, for each budget as `overlap` would have it cut."""
    rules = [None, *([rule] if (rule := _shift(costs, workload)) else [])]
    for rule in rules:
        shifted = costs if rule is None else _with(costs, shift=rule)
        if shifted.memory(workload.prompt + workload.output, min(budgets)).short:
            continue
        sums = shifted.layer_costs(most=max(budgets)) if costs.grid.tp * costs.grid.sp > 1 else None
        for budget in budgets:
            choice = sums and overlap(sums, min(budget, workload.prompt), num_layers=_LAYERS, chunks=(2, 3), grid=512)
            ways = [shifted]
            if choice and choice.cuts and shifted.layout_of(budget) == shifted.layout_of(1 << 17):
                ways.append(
                    _with(shifted, overlap=Interleave(choice.chunks, min_tokens=max(2, choice.num_tokens // 2)))
                )
            for each in ways:
                plan = _plan(each, workload, replicas, budget)
                if plan is not None:
                    yield plan


def _with(costs: Costs, **changes: Any) -> Costs:
    return Costs(costs.model, costs.hardware, costs.grid, replace(costs.options, **changes))


def _shift(costs: Costs, workload: Workload) -> Shift | None:
    """The rule among all layouts that this one reaches; None where it would never change the layout."""
    base = costs.grid.layout
    if base.sp == 1 or costs.options.prefill != "ulysses":
        return None
    curves = {}
    for layout in base.reachable:
        one = Costs(costs.model, costs.hardware, Grid(*layout, costs.grid.pp), costs.options)
        curves[layout] = Curve(_STEPS, tuple(one.seconds(StepWork(n, rows=1)) for n in _STEPS))
    rule = shift(StepCosts(curves)).shift
    # The weights lie as the base has them, so a rule must know it, if only for steps that are larger than any.
    if len(rule.spans) < 2 or base not in rule.layouts:
        return None
    return rule


def _plan(costs: Costs, workload: Workload, replicas: int, budget: int) -> Plan | None:
    """What is predicted of one way; None where no request fits."""
    prompt, output = workload.prompt, workload.output
    each = prompt + output
    most = costs.tokens_that_fit(budget) // each
    capacity = costs.tokens_that_fit(budget, min(budget, most)) // each  # beside the logits of as many
    if workload.requests is not None:
        capacity = min(capacity, ceil(workload.requests / replicas))
    if capacity < 1:
        return None
    ttft = _ttft(costs, prompt, budget)
    tpot = costs.seconds(costs.model.work([1], [prompt + output // 2]))
    full = saturated(costs, workload, budget=budget, capacity=capacity)
    return Plan(
        costs.grid,
        replicas,
        costs.options,
        budget,
        ttft,
        tpot,
        ttft + output * tpot,
        replicas * full.tokens_per_s,
        full.step_s,
        capacity,
        costs.memory(capacity * each, budget, min(budget, capacity)).total,
        _reason(costs, full, capacity),
    )


def _ttft(costs: Costs, prompt: int, budget: int) -> float:
    """One prompt in chunks of the budget; chunks follow one another through the stages."""
    starts = range(0, prompt, budget)
    works = [costs.model.work([min(budget, prompt - start)], [start]) for start in starts]
    return sum(costs.stage_seconds(work) for work in works[:-1]) + costs.seconds(works[-1])


def _reason(costs: Costs, full: Saturated, capacity: int) -> str:
    """What it is bound by, and what its techniques do."""
    step = costs.breakdown(full.work)
    bound = max(("compute", "memory", "link"), key=lambda kind: step.seconds_of(kind))  # type: ignore[arg-type]
    words = [f"{capacity} requests fit", f"a full step of {step.work.tokens:,} tokens is bound by {bound}"]
    if step.comm_s:
        words.append(f"links busy for {step.comm_s / step.total_s:.0%} of it")
    if step.hidden_s > 0:
        words.append(f"{1e3 * step.hidden_s:.3g} ms hidden")
    if costs.options.shift:
        first = costs.options.shift.spans[0][1]
        words.append(f"decodes under {first.tp}x{first.sp}")
    return ", ".join(words)


def _beats(one: Plan, other: Plan) -> bool:
    """At least as good in all three, better in one."""
    mine = (one.latency_s, -one.tokens_per_s, one.memory_bytes)
    theirs = (other.latency_s, -other.tokens_per_s, other.memory_bytes)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
