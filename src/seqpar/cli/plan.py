"""`python -m seqpar plan`: which layout and which techniques, for a model, an accelerator and a number of ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from seqpar import plan

__all__ = ["hardware_named", "run"]


def run(options: argparse.Namespace) -> int:
    """Search, print, draw."""
    model, hardware = plan.Model.from_config(options.model), hardware_named(options.hardware)
    if options.network is not None:
        if options.network not in plan.NETWORKS:
            raise ValueError(f"`--network` must be one of {', '.join(plan.NETWORKS)}, got {options.network}")
        hardware = hardware.over(plan.NETWORKS[options.network])
    measured = hardware.accelerator.operators
    usual = 2 if measured is None else measured.itemsize
    how = plan.Options(
        weight_itemsize=options.weight_bytes or usual,
        kv_itemsize=options.kv_bytes or usual,
        itemsize=usual,
        overhead_s=options.overhead,
    )
    workload = plan.Workload(options.prompt, options.new, options.requests)
    found = plan.best(
        model,
        hardware,
        workload,
        options.objective,
        ranks=options.ranks,
        options=how,
        wires=(None, *options.wire),
    )
    if options.plot is not None:
        _plot(options.plot, found, f"{model.name} on {options.hardware}")
    print(json.dumps([_content(each) for each in found.frontier], indent=1) if options.json else _table(options, found))
    if options.explain and not options.json:
        print(_steps(model, hardware, found.chosen, options))
    return 0


def hardware_named(name: str) -> plan.Hardware:
    """A preset, or what `calibrate` wrote.

    Raises:
        ValueError: there is neither of that name, or the file holds something else.
    """
    if name in plan.HARDWARE:
        return plan.HARDWARE[name]
    if not Path(name).is_file():
        raise ValueError(f"`--hardware` must be one of {', '.join(plan.HARDWARE)}, or a file, got {name}")
    return plan.Hardware.load(name)


def _content(found: plan.Plan) -> dict[str, Any]:
    """What JSON can hold of a plan."""
    numbers = ("ttft_s", "tpot_s", "latency_s", "tokens_per_s", "step_s", "capacity", "memory_bytes", "budget")
    spans = found.options.shift.spans if found.options.shift else ()
    return {
        "name": found.name,
        "replicas": found.replicas,
        "tp": found.grid.tp,
        "sp": found.grid.sp,
        "pp": found.grid.pp,
        "overlap": found.options.overlap.chunks if found.options.overlap else 1,
        "shift": [{"from_tokens": first, "tp": layout.tp, "sp": layout.sp} for first, layout in spans],
        "prefill": found.options.prefill,
        "decode": found.options.decode,
        "wire": found.options.wire,
        **{name: getattr(found, name) for name in numbers},
        "reason": found.reason,
    }


def _table(options: argparse.Namespace, found: plan.Tuned) -> str:
    """A line for each plan."""
    rows = [("plan", "TTFT ms", "TPOT ms", "tokens/s", "GB", "budget", "why")]
    for each in found.frontier[: options.most]:
        times = (f"{1e3 * each.ttft_s:,.1f}", f"{1e3 * each.tpot_s:,.2f}", f"{each.tokens_per_s:,.0f}")
        rows.append((each.name, *times, f"{each.memory_bytes / 1e9:,.0f}", f"{each.budget:,}", each.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 2) + "<"
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    more = len(found.frontier) - options.most
    lines = [f"{found.tried:,} plans compared; those that no other beats, best {found.objective} first"]
    lines += [form.format(*row).rstrip() for row in rows]
    return "\n".join([*lines, *([f"and {more} more (--most)"] if more > 0 else [])])


def _steps(model: plan.Model, hardware: plan.Hardware, chosen: plan.Plan, options: argparse.Namespace) -> str:
    """What a prompt's first step and a decode are made of."""
    sizes = ((min(chosen.budget, options.prompt), 0), (1, options.prompt))
    steps = (plan.cost(model, hardware, chosen.grid, [new], [old], options=chosen.options) for new, old in sizes)
    return "\n".join(step.explain() for step in steps)


def _plot(path: Path, found: plan.Tuned, title: str) -> None:
    """Latency of a request against throughput."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for each in found.frontier:
        axes.plot(each.latency_s, each.tokens_per_s, "o", color="C1" if each is found.chosen else "C0")
        axes.annotate(
            each.name, (each.latency_s, each.tokens_per_s), fontsize=7, xytext=(4, 2), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="latency of one request, s", ylabel="tokens/s, saturated")
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=120)
