"""A trace as a picture: two lanes for each rank, compute above communication."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

from seqpar.comm.intervals import Interval

__all__ = ["draw"]

_COLOURS = ("#3b6fb6", "#e08a2b", "#4a9d6e", "#b5547c", "#7d68b5", "#8a7a5c")
_INK, _FAINT, _WAIT = "#2b2f36", "#d5d9df", "#9aa1ab"


def draw(intervals: Sequence[Interval], path: str | PathLike[str], title: str = "") -> None:
    """Write the picture; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    origin = min((i.start_s for i in intervals), default=0.0)
    end = max((i.end_s for i in intervals), default=origin)
    ranks = sorted({i.rank for i in intervals})
    programs = sorted({i.program for i in intervals if i.program} or {i.program for i in intervals})
    colours = {program: _COLOURS[number % len(_COLOURS)] for number, program in enumerate(programs)}
    lanes = {(rank, kind): 2.4 * n + m for n, rank in enumerate(ranks) for m, kind in enumerate(("compute", "comm"))}
    figure = Figure(figsize=(12, 1.5 + 0.9 * max(1, len(ranks))), layout="constrained")
    axes = figure.add_subplot()
    for rank in ranks:
        mine = [i for i in intervals if i.rank == rank]
        top, bottom = lanes[rank, "compute"] - 0.45, lanes[rank, "comm"] + 0.42
        for number, start_s in _layers(mine):
            x = (start_s - origin) * 1e3
            axes.plot([x, x], [top - 0.12, bottom], color=_FAINT, linewidth=1, zorder=0)
            if rank == ranks[0]:
                axes.text(x, top - 0.16, f" layer {number}", color=_WAIT, fontsize=7, ha="left", va="bottom")
        for kind in ("compute", "comm", "wait"):
            for i in (i for i in mine if i.kind == kind):
                _bar(axes, i, lanes[rank, "comm" if kind == "comm" else "compute"], origin, colours.get(i.program))
        for i in (i for i in mine if i.kind == "comm"):
            _name(axes, i, lanes[rank, "comm"], origin, end)
    axes.set_yticks(list(lanes.values()), [f"rank {rank}  {kind}" for rank, kind in lanes], fontsize=8)
    axes.set_xlim(0.0, max(1e-6, (end - origin) * 1e3))
    axes.set_ylim(max(lanes.values(), default=0.0) + 0.55, -0.95)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, color=_FAINT)
    axes.set_xlabel("ms", fontsize=8)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    link = "simulated link" if any(i.simulated for i in intervals) else "measured"
    axes.set_title(f"{title} ({link})" if title else link, fontsize=10, loc="left", color=_INK)
    names = [
        Patch(color=colours[p], label=f"program {'.'.join(map(str, p))}" if p else "one program") for p in programs
    ]
    names.append(Patch(facecolor="none", edgecolor=_WAIT, hatch="////", label="waiting", linewidth=0))
    figure.legend(handles=names, loc="outside upper right", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _bar(axes: Any, i: Interval, lane: float, origin: float, colour: str | None) -> None:
    span = [((i.start_s - origin) * 1e3, (i.end_s - i.start_s) * 1e3)]
    if i.kind == "wait":
        axes.broken_barh(span, (lane - 0.36, 0.72), facecolor="none", edgecolor=_WAIT, hatch="////", linewidth=0)
        return
    height, alpha = (0.84, 1.0) if i.kind == "compute" else (0.56, 0.72)
    where = (lane - height / 2, height)
    axes.broken_barh(span, where, facecolor=colour or _WAIT, edgecolor="white", linewidth=0.4, alpha=alpha)


def _name(axes: Any, i: Interval, lane: float, origin: float, end: float) -> None:
    """The collective and its layer, as much as has room."""
    short = i.label.rsplit(".", 1)[-1]
    width = 150 * (i.end_s - i.start_s) / max(end - origin, 1e-12)  # in letters: what fits next to each other
    text = next((text for text in (f"{i.op} {short}", short or i.op) if len(text) + 1 <= width), "")
    x = ((i.start_s + i.end_s) / 2 - origin) * 1e3
    axes.text(x, lane + 0.02, text, color="white", fontsize=6.5, ha="center", va="center", clip_on=True)


def _layers(intervals: Sequence[Interval]) -> list[tuple[int, float]]:
    """Where this rank first computes for each layer, by the numbers in labels and marks."""
    found: dict[int, float] = {}
    for i in sorted((i for i in intervals if i.kind == "compute" and i.op != "finish"), key=lambda i: i.start_s):
        number = re.search(r"(?<![^.(])\d+(?![^.)])", i.label)
        if number:
            found.setdefault(int(number.group()), i.start_s)
    return list(found.items())
