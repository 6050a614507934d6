"""Scaling to 1,024 ranks by the cost model: 8B, 70B and 405B models on H100s behind three fabrics; nothing is measured.

Weights have one byte. In strong scaling a prompt of 128k tokens, or 64 decodes over 32k tokens each, is the work of
all ranks, and a technique stops paying where twice the ranks save less than a tenth of the time. In weak scaling a
prompt of 8k tokens for each rank, or 4 decodes for each over 32k tokens, is put beside the fewest ranks with the same
prompt, or beside replicas of the fewest ranks, and a technique stops paying where twice as many would be used less than
half as well. Rates are the presets' (`plan.HARDWARE`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from common import Row, meta, parser, report

from seqpar import plan
from seqpar.partition import Interleave

__all__ = ["model_of"]

PACKAGES = ("seqpar", "torch")
SIZES = {
    "8B": (4096, 32, 32, 8, 14336),
    "70B": (8192, 80, 64, 8, 28672),
    "405B": (16384, 126, 128, 8, 53248),
}
LEAST_TP = {"8B": 1, "70B": 2, "405B": 8}  # whose ranks hold the weights, of one byte each
SCALES = tuple(1 << i for i in range(11))
STRONG_PROMPT, WEAK_PROMPT = 1 << 17, 1 << 13  # tokens: of all ranks, of each
STRONG_DECODES, WEAK_DECODES, CONTEXT = 64, 4, 1 << 15
LESS, ENOUGH = 0.9, 0.5  # of the time that twice the ranks take; of the work that ranks get done
COLOURS = {"tp": "C0", "tp, two chunks": "C4", "Ulysses": "C1", "ring": "C2", "qship": "C3", "pipeline": "C5"}
STYLES = ("-", "--", ":")


def model_of(name: str) -> plan.Model:
    hidden, layers, heads, kv_heads, mlp = SIZES[name]
    return plan.Model(plan.ModelShape(hidden, layers, heads, kv_heads, hidden // heads, mlp), 128256, name=name)


class Line(NamedTuple):
    """One technique on one fabric, by ranks: seconds of a step in strong scaling, efficiency in weak scaling."""

    model: str
    fabric: str
    regime: str
    technique: str
    points: dict[int, float]

    @property
    def until(self) -> int:
        """The number of ranks from which on it stops paying, or that it ends at."""
        sizes = sorted(self.points)
        if self.regime.startswith("weak"):
            return next((p for p, more in pairwise(sizes) if self.points[more] < ENOUGH), sizes[-1])
        return next((p for p, more in pairwise(sizes) if self.points[more] > LESS * self.points[p]), sizes[-1])

    @property
    def ends(self) -> bool:
        """Whether it pays as far as it goes: to all ranks, or to as many as the model has heads or layers for."""
        return self.until == max(self.points)


def fabrics() -> dict[str, plan.Hardware]:
    """The same accelerator behind three of them."""
    h100 = plan.HARDWARE["h100"]
    pcie = plan.HARDWARE["4090"].tiers
    return {
        "NVSwitch, InfiniBand 400": h100,
        "NVSwitch, Ethernet 100": h100.over(plan.NETWORKS["ethernet-100"]),
        "PCIe, Ethernet 100": replace(h100, name="h100-pcie", tiers=pcie),
    }


def grids(least: int) -> Iterator[tuple[str, str, Callable[[int], plan.Grid], dict[str, Any]]]:
    """Techniques of prompts and decodes: the layout of so many ranks, and the options."""
    two: dict[str, Any] = {"overlap": Interleave(2, min_tokens=2)}
    yield "prompt", "tp", lambda p: plan.Grid(p), {}
    yield "prompt", "tp, two chunks", lambda p: plan.Grid(p), two
    yield "prompt", "Ulysses", lambda p: plan.Grid(least, p // least), {}
    yield "prompt", "ring", lambda p: plan.Grid(least, p // least), {"prefill": "ring"}
    yield "decode", "tp", lambda p: plan.Grid(p), {}
    yield "decode", "Ulysses", lambda p: plan.Grid(least, p // least), {}
    yield "decode", "qship", lambda p: plan.Grid(least, p // least), {"prefill": "ring", "decode": "qship"}
    yield "decode", "pipeline", lambda p: plan.Grid(least, 1, p // least), {}


def scaling(models: Sequence[str]) -> list[Line]:
    """Every model, fabric, technique; a number of ranks that the technique cannot have has no point."""
    found = []
    for name in models:
        model, least = model_of(name), LEAST_TP[name]
        for fabric, hardware in fabrics().items():
            for what, technique, grid_of, ways in grids(least):
                points: dict[str, dict[int, float]] = {"strong": {}, "weak": {}}
                for p in (p for p in SCALES if p >= least):
                    try:
                        both = {regime: _point(model, hardware, grid_of, ways, what, regime, p) for regime in points}
                    except ValueError:  # fewer heads or layers than ranks
                        break
                    for regime, value in both.items():
                        points[regime][p] = value
                found += [Line(name, fabric, f"{regime} {what}", technique, by) for regime, by in points.items() if by]
    return found


def _point(
    model: plan.Model,
    hardware: plan.Hardware,
    grid_of: Callable[[int], plan.Grid],
    ways: dict[str, Any],
    what: str,
    regime: str,
    p: int,
) -> float:
    """Seconds of the step in strong scaling; in weak scaling, how well ranks are used.

    That is, for prompts, beside the fewest ranks with the same prompt; for decodes, beside replicas of the fewest
    ranks, each with its share of the requests.
    """
    least = LEAST_TP[model.name]
    costs = plan.Costs(model, hardware, grid_of(p), plan.Options(weight_itemsize=1, **ways))
    one = plan.Costs(model, hardware, plan.Grid(least), plan.Options(weight_itemsize=1))
    if what == "prompt":
        work = model.work([STRONG_PROMPT if regime == "strong" else WEAK_PROMPT * p])
        return costs.seconds(work) if regime == "strong" else one.seconds(work) * least / costs.seconds(work) / p
    if regime == "strong":
        return costs.seconds(model.work([1] * STRONG_DECODES, CONTEXT))
    ways_on = costs.grid.pp  # micro-batches take turns in as many stages
    seconds = ways_on * costs.stage_seconds(model.work([1] * max(1, WEAK_DECODES * p // ways_on), CONTEXT))
    return one.seconds(model.work([1] * (WEAK_DECODES * least), CONTEXT)) / seconds


def picture(path: Path, lines: Sequence[Line], title: str) -> None:
    """A row for each regime, a column for each model."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models, regimes = (
        list(dict.fromkeys(line.model for line in lines)),
        list(dict.fromkeys(line.regime for line in lines)),
    )
    names = list(fabrics())
    figure = Figure(figsize=(4.2 * len(models), 2.7 * len(regimes)), layout="constrained")
    axes = figure.subplots(len(regimes), len(models), squeeze=False, sharex=True)
    for line in lines:
        cell = axes[regimes.index(line.regime)][models.index(line.model)]
        by = sorted(line.points.items())
        style = STYLES[names.index(line.fabric)]
        cell.plot([p for p, _ in by], [y for _, y in by], style, color=COLOURS[line.technique], linewidth=1.2)
        cell.plot(line.until, line.points[line.until], "o", color=COLOURS[line.technique], markersize=3)
    for row, regime in zip(axes, regimes, strict=True):
        for cell, model in zip(row, models, strict=True):
            cell.set(
                xscale="log", yscale="log" if regime.startswith("strong") else "linear", title=f"{model}, {regime}"
            )
            cell.set_xlabel("ranks")
            cell.set_ylabel("s" if regime.startswith("strong") else "efficiency")
            cell.title.set_fontsize(9)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=name) for name, style in zip(names, STYLES, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"{title}; a dot: stops paying", fontsize=10)
    figure.savefig(path, dpi=110)


def tables(lines: Sequence[Line]) -> str:
    """A row for each technique: the number of ranks up to which it pays on each fabric, and what it reaches there."""
    names = list(fabrics())
    text = [f"| regime | model | technique | {' | '.join(names)} |", f"|---|---|---|{'---:|' * len(names)}"]
    by = {(line.regime, line.model, line.technique, line.fabric): line for line in lines}
    for key in dict.fromkeys(key[:3] for key in by):
        cells = (_cell(by.get((*key, name))) for name in names)
        text.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(text)


def _cell(line: Line | None) -> str:
    """Up to where, and the seconds of the step or the efficiency there."""
    if line is None:
        return ""
    reached = line.points[line.until]
    ms = 1e3 * reached
    value = f"{reached:.0%}" if line.regime.startswith("weak") else f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
    return f"{line.until:,}{' (end)' if line.ends else ''}, {value}"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser(__doc__ or "").parse_args(arguments)
    lines = scaling(("8B",) if args.quick else tuple(SIZES))
    rows = [
        Row(f"{line.regime}, {line.model}, {line.technique}, {line.fabric}: pays up to", line.until, "ranks")
        for line in lines
    ]
    about = meta("none: predictions", PACKAGES, quick=args.quick, lines=[line._asdict() for line in lines])
    plot, args.plot = args.plot, None
    report(args, about, rows, "scaling by the cost model", tables(lines))
    if plot:
        picture(plot, lines, "predicted for H100s")


if __name__ == "__main__":
    main()
