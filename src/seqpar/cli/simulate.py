"""`python -m seqpar simulate`: a trace of requests served in virtual time."""

from __future__ import annotations

import argparse
import json

from seqpar import batching, plan
from seqpar.cli.plan import hardware_named
from seqpar.partition import Layout, Shift

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Serve, print, write."""
    trace = _trace(options)
    step_s, pages = _costs(options)
    fleet = _fleet(options, pages)
    budget = batching.Budget(options.max_tokens, options.max_requests, options.admission)
    compose = batching.Composer(_policy(options), budget)
    faults: list[plan.Straggler | plan.Failure] = []
    faults += (plan.Straggler(each.rank, *each.numbers) for each in options.straggler)
    faults += (plan.Failure(each.rank, *each.numbers) for each in options.fail)
    found = plan.simulate(trace, step_s, compose, fleet, faults=faults)
    if options.write_trace is not None:
        plan.write_trace(options.write_trace, trace)
    if options.rows is not None:
        options.rows.write_text("".join(f"{_row(row)}\n" for row in found.rows))
    if options.plot is not None:
        found.plot(options.plot)
    print(found.to_json() if options.json else f"{_said(fleet)}\n{found.explain()}")
    return 0


def _trace(options: argparse.Namespace) -> tuple[plan.Arrival, ...]:
    """The requests of a file, or drawn."""
    if options.trace is not None:
        return plan.read_trace(options.trace)
    lengths = {"prompt_tokens": options.prompt, "new_tokens": options.new, "spread": options.spread}
    return plan.make_trace(options.requests, per_s=options.rate, bursts=options.bursts, seed=options.seed, **lengths)


def _rule(options: argparse.Namespace) -> Layout | Shift:
    """The layout of each stage, by the tokens of a step where it shifts."""
    base = Layout(options.tp, options.sp)
    return base if options.shift is None else Shift.threshold(options.shift, base)


def _costs(options: argparse.Namespace) -> tuple[plan.StepCost, int]:
    """Seconds of a step, and the pages of a replica's cache."""
    rule = _rule(options)
    if options.costs is not None:
        if options.model is not None or options.hardware is not None:
            raise ValueError("`--costs` must be given without `--model` and `--hardware`, got both")
        if options.pages is None:
            raise ValueError("`--pages` must be given with `--costs`, which know no memory, got none")
        measured = plan.StepCosts.load(options.costs)
        for layout in rule.layouts if isinstance(rule, Shift) else (rule,):
            if layout not in measured.curves:
                known = ", ".join(f"{tp}x{sp}" for tp, sp in measured.curves)
                raise ValueError(
                    f"`--tp` and `--sp` must be of {known}, which were measured, got {layout.tp}x{layout.sp}"
                )
        return lambda layout, work: measured.seconds(layout, work.tokens) + options.overhead, options.pages
    if options.model is None or options.hardware is None:
        raise ValueError("`--model` and `--hardware` must be given, or `--costs`, got neither")
    costs = predicted(options, rule if isinstance(rule, Shift) else None)
    pages = options.pages or costs.tokens_that_fit(options.max_tokens, options.max_requests) // options.page_size
    if not pages:
        short = costs.memory(options.page_size, options.max_tokens, options.max_requests).short
        raise ValueError(
            f"`--ranks` must hold the model, got {short / 1e9:,.1f} GB too little on each of "
            f"{costs.grid.size} {options.hardware}; use more tp or stages"
        )
    return lambda layout, work: costs.seconds(work), pages


def predicted(options: argparse.Namespace, shift: Shift | None) -> plan.Costs:
    """The cost model of one replica."""
    grid = plan.Grid(options.tp, options.sp, len(options.stages))
    how = plan.Options(shift=shift, overhead_s=options.overhead)
    return plan.Costs(plan.Model.from_config(options.model), hardware_named(options.hardware), grid, how)


def _fleet(options: argparse.Namespace, pages: int) -> plan.Fleet:
    """The ranks."""
    one = options.tp * options.sp * len(options.stages)
    ranks = one if options.ranks is None else options.ranks
    if ranks % one:
        raise ValueError(f"`--ranks` must be a multiple of tp * sp * stages ({one}), got {ranks}")
    return plan.Fleet(pages, _rule(options), replicas=ranks // one, stages=options.stages, page_size=options.page_size)


def _policy(options: argparse.Namespace) -> batching.Policy:
    """What steps are made of."""
    tau, tile = options.tau, options.tile
    made: dict[str, batching.Policy] = {
        "stall-free": batching.StallFree(tau, tile),
        "decode-maximal": batching.DecodeMaximal(tau, tile),
        "full-hybrid": batching.FullHybrid(),
        "prefill-first": batching.PrefillFirst(),
        "request-level": batching.RequestLevel(),
        "exclusive": batching.Exclusive(),
    }
    return made[options.policy]


def _said(fleet: plan.Fleet) -> str:
    layouts = " or ".join(f"{layout.tp}x{layout.sp}" for layout in fleet.rule.layouts)
    stages = f", {len(fleet.stages)} stages" if len(fleet.stages) > 1 else ""
    tokens = fleet.num_pages * fleet.page_size
    return (
        f"{fleet.ranks:,} ranks: {fleet.replicas:,} replicas of tp x sp {layouts}{stages}; {tokens:,} tokens in a cache"
    )


def _row(row: plan.Served) -> str:
    return json.dumps({**row._asdict(), "ttft_s": row.ttft_s, "tpot_s": row.tpot_s})
