"""Whether to cut a step into chunks that hide each other's collectives, into how many, and where.

First the necessary condition, which needs no schedule: cutting pays some compute and some latency once more for each
chunk, and there is nothing to gain unless the one is less than the communication to hide and the other less than the
compute to hide it behind. Then a scan: cuts on a grid, every one replayed (`schedule`). Then the best of them, if it
is predicted faster than the whole by a margin; so a step is never cut against the prediction.

Source: the problem is ISO's (arXiv:2409.11155, adaptive segmentation as future work); TokenWeave (arXiv:2505.11329)
searches offline for a day where this scans a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from seqpar.partition import Interleave, even_ranges
from seqpar.plan.costs import Counts, LayerCosts, Prompt
from seqpar.plan.schedule import Slot, bound, makespan, repeated_makespan

__all__ = ["Candidate", "OverlapChoice", "overlap"]

Cuts: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """The best cuts found for one number of chunks.

    Attributes:
        cuts: first token of all chunks but the first.
        predicted_s: the layers under `comm.interleave`.
        bound_s: no schedule of these chunks in these turns is faster.
        exposed_s: how long nothing computes.
        even_s: the same for chunks of equal numbers of tokens.
    """

    cuts: Cuts
    predicted_s: float
    bound_s: float
    exposed_s: float
    even_s: float

    @property
    def chunks(self) -> int:
        return len(self.cuts) + 1


@dataclass(frozen=True)
class OverlapChoice:
    """What `overlap` decided, with the numbers that it decided by.

    Attributes:
        cuts: first token of all chunks but the first; empty where the step is to run whole.
        num_tokens: new tokens of the step.
        num_layers: layers that it goes through.
        serial_s: the step run whole.
        compute_s: local work of the whole step.
        comm_s: its collectives.
        predicted_s: as chosen.
        bound_s: no schedule of what was chosen is faster.
        repeated_compute_s: local work that two equal chunks repeat; less than 0 where smaller ones are more efficient.
        repeated_comm_s: communication that two equal chunks repeat.
        candidates: the best of each number of chunks; none where the first gate was not passed.
        margin: what a cut must save, as a share of its time.
        source: where the costs are from.
        last_rows: rows that the last layer computes; None for all.
    """

    cuts: Cuts
    num_tokens: int
    num_layers: int
    serial_s: float
    compute_s: float
    comm_s: float
    predicted_s: float
    bound_s: float
    repeated_compute_s: float
    repeated_comm_s: float
    candidates: tuple[Candidate, ...]
    margin: float
    source: str = ""
    last_rows: int | None = None

    @property
    def chunks(self) -> int:
        return len(self.cuts) + 1

    @property
    def reduction(self) -> float:
        """The share of the serial time that is predicted to be saved."""
        return 1 - self.predicted_s / self.serial_s if self.serial_s else 0.0

    @property
    def interleave(self) -> Interleave | None:
        """The choice as an option for steps of this many tokens; None for none."""
        return Interleave(cuts=self.cuts, min_tokens=max(2, self.num_tokens)) if self.cuts else None

    def explain(self) -> str:
        """Why, for people: the verdict, the gates, and a line for each number of chunks."""
        rows = "" if self.last_rows is None else f", {self.last_rows:,} row(s) of the last"
        whole = f"{self.num_tokens:,} tokens through {self.num_layers} layer(s){rows}"
        verdict = "run whole" if not self.cuts else f"{self.chunks} chunks, cut at {_listed(self.cuts)}"
        share = self.comm_s / self.serial_s if self.serial_s else 0.0
        can = bool(self.candidates)
        lines = [
            f"{whole}: {verdict}",
            f"costs: {self.source or 'given'}",
            f"serial {_ms(self.serial_s)} = compute {_ms(self.compute_s)} + communication {_ms(self.comm_s)} "
            f"({share:.1%})",
            f"gate 1, can it pay: two halves repeat {_ms(self.repeated_compute_s)} of compute (must be less than the "
            f"{_ms(self.comm_s)} to hide)",
            f"                    and {_ms(self.repeated_comm_s)} of communication (less than the "
            f"{_ms(self.compute_s)} to hide behind): {'yes' if can else 'no'}",
        ]
        if not can:
            return "\n".join(lines)
        best = min(self.candidates, key=lambda candidate: candidate.predicted_s)
        lines += _table(self)
        lines.append(
            f"gate 2, does it: {_ms(best.predicted_s)} and {self.margin:.0%} more is "
            f"{'less' if self.cuts else 'not less'} than {_ms(self.serial_s)}: {'yes' if self.cuts else 'no'}"
        )
        return "\n".join(lines)


def overlap(
    costs: LayerCosts,
    num_tokens: Counts,
    *,
    num_layers: int,
    prefix: Counts = 0,
    chunks: Sequence[int] = (2, 3, 4),
    grid: int = 128,
    margin: float = 0.03,
    last_rows: int | None = None,
) -> OverlapChoice:
    """Choose the cuts of a step.

    Args:
        costs: of a layer; see `calibrate_layers`.
        num_tokens: new tokens of the step, or of each of its requests.
        num_layers: like layers, one after another.
        prefix: keys that are cached already, of the request or of each.
        chunks: numbers of chunks to consider.
        grid: cuts are multiples of this, or even.
        margin: a cut must be predicted faster by this share.
        last_rows: rows of the last layer that are wanted, where it skips the others (needs `costs.last`).

    Raises:
        ValueError: sizes below 1, a negative margin, or `last_rows` for costs without a last layer.
    """
    _check(costs, num_layers, chunks, grid, margin, last_rows)
    prompt = Prompt(num_tokens, prefix, costs.window)
    scan = _Scan(costs, prompt, num_layers, last_rows)
    total = prompt.num_tokens
    whole = scan.programs(())[0]
    serial, compute, comm = (sum(column) for column in ((c + x for c, x in whole), *zip(*whole, strict=True)))
    halves = scan.programs(_even(total, 2)) if total > 1 else [whole]
    again_compute = sum(c for program in halves for c, _ in program) - compute
    again_comm = sum(x for program in halves for _, x in program) - comm
    candidates: tuple[Candidate, ...] = ()
    if total > 1 and again_compute < comm and again_comm < compute:
        candidates = tuple(_best(scan, n, grid) for n in sorted(set(chunks)) if n <= total)
    best: Candidate | None = None
    for candidate in candidates:
        if best is None or _clearly_faster(candidate.predicted_s, best.predicted_s, costs.resolution):
            best = candidate
    if best is not None and best.predicted_s * (1 + margin) >= serial:
        best = None
    return OverlapChoice(
        cuts=best.cuts if best else (),
        num_tokens=total,
        num_layers=num_layers,
        serial_s=serial,
        compute_s=compute,
        comm_s=comm,
        predicted_s=best.predicted_s if best else serial,
        bound_s=best.bound_s if best else serial,
        repeated_compute_s=again_compute,
        repeated_comm_s=again_comm,
        candidates=candidates,
        margin=margin,
        source=costs.source,
        last_rows=last_rows,
    )


class _Scan:
    """Predictions for many cuts of one step."""

    def __init__(self, costs: LayerCosts, prompt: Prompt, num_layers: int, last_rows: int | None) -> None:
        self.costs, self.prompt, self.num_layers, self.last_rows = costs, prompt, num_layers, last_rows
        self._seen: dict[Cuts, float] = {}

    @property
    def rates(self) -> dict[str, float]:
        return {"contention": self.costs.contention, "link_contention": self.costs.link_contention}

    def seconds(self, cuts: Cuts) -> float:
        """The step under these cuts, by the recursion."""
        if cuts not in self._seen:
            self._seen[cuts] = repeated_makespan(self._phases(cuts), **self.rates)
        return self._seen[cuts]

    def programs(self, cuts: Cuts) -> list[list[Slot]]:
        """All slots of all chunks."""
        programs: list[list[Slot]] = [[] for _ in range(len(cuts) + 1)]
        for layer, count in self._phases(cuts):
            for program, slots in zip(programs, layer, strict=True):
                program += [*slots] * count
        return programs

    def candidate(self, cuts: Cuts) -> Candidate:
        """What these cuts come to, by the schedule itself."""
        programs = self.programs(cuts)
        found = makespan(programs, **self.rates)
        even = self.seconds(_even(self.prompt.num_tokens, len(programs)))
        return Candidate(cuts, found.total_s, bound(programs), found.exposed_s, even)

    def _phases(self, cuts: Cuts) -> list[tuple[list[tuple[Slot, ...]], int]]:
        """One layer of each kind for each chunk, and how many there are of it."""
        total, costs = self.prompt.num_tokens, self.costs
        spans = list(pairwise((0, *cuts, total)))
        alike = [costs.chunk(self.prompt, a, b) for a, b in spans]
        if self.last_rows is None:
            return [(alike, self.num_layers)]
        rows = min(self.last_rows, total)
        appends = [costs.chunk(self.prompt, a, b, last=True) for a, b in spans]
        nothing = tuple(Slot(0.0, 0.0) for _ in costs.slots)
        # The wanted rows are taken to be the step's last ones, and their layer to run once the chunks have appended.
        wanted = [*(nothing for _ in spans[1:]), costs.chunk(self.prompt, total - rows, total)]
        return [(alike, self.num_layers - 1), (appends, 1), (wanted, 1)]


def _best(scan: _Scan, n: int, grid: int) -> Candidate:
    """The best cuts into n chunks: for two all of the grid, for more a local search from the even ones."""
    total = scan.prompt.num_tokens
    even = _even(total, n)
    starts = [even, tuple(max(1, round(cut / grid)) * grid for cut in even)]
    if n == 2:
        starts += [(cut,) for cut in range(grid, total, grid)]
    best = min(filter(lambda cuts: _is_cut(cuts, total), starts), key=scan.seconds)
    step = _widest(total // (2 * n), grid)
    while n > 2 and step:
        better = min(filter(lambda cuts: _is_cut(cuts, total), _moves(best, step)), key=scan.seconds, default=best)
        if scan.seconds(better) < scan.seconds(best):
            best = better
        else:
            step = 0 if step == grid else max(grid, step // 2 // grid * grid)
    return scan.candidate(
        best if _clearly_faster(scan.seconds(best), scan.seconds(even), scan.costs.resolution) else even
    )


def _clearly_faster(one_s: float, other_s: float, resolution: float) -> bool:
    """By more than costs are worth: of cuts that do as well the even ones have the most to spare."""
    return one_s < other_s * (1 - resolution)


def _moves(cuts: Cuts, step: int) -> Iterable[Cuts]:
    """The cuts with one of them, or all of them from one on, moved by a step."""
    for index in range(len(cuts)):
        for by in (-step, step):
            yield (*cuts[:index], cuts[index] + by, *cuts[index + 1 :])
            if index + 1 < len(cuts):
                yield (*cuts[:index], *(cut + by for cut in cuts[index:]))


def _widest(most: int, grid: int) -> int:
    """The largest multiple of the grid that is at most `most`, and at least one."""
    return max(1, most // grid) * grid


def _even(total: int, n: int) -> Cuts:
    return tuple(chunk.start for chunk in even_ranges(total, min(n, total))[1:])


def _is_cut(cuts: Cuts, total: int) -> bool:
    return all(a < b for a, b in pairwise((0, *cuts, total)))


def _check(
    costs: LayerCosts, num_layers: int, chunks: Sequence[int], grid: int, margin: float, last_rows: int | None
) -> None:
    if num_layers < 1 or grid < 1:
        raise ValueError(f"`num_layers` and `grid` must be at least 1, got {num_layers} and {grid}")
    if not chunks or min(chunks) < 2:
        raise ValueError(f"`chunks` must name numbers of at least 2, got {list(chunks)}")
    if not margin >= 0:
        raise ValueError(f"`margin` must be >= 0, got {margin}")
    if last_rows is not None and not (last_rows >= 1 and costs.last):
        raise ValueError(
            f"`last_rows` must be at least 1, and None for costs without `last` slots, got {last_rows} "
            f"with {len(costs.last)} such slots"
        )


def _table(choice: OverlapChoice) -> list[str]:
    """Columns for each number of chunks."""
    rows = [("chunks", "cut at", "predicted", "÷ serial", "even cuts", "bound", "idle", "")]
    for c in choice.candidates:
        mark = "<- chosen" if c.cuts == choice.cuts else ""
        ratio = f"{c.predicted_s / choice.serial_s:.3f}" if choice.serial_s else ""
        times = (_ms(c.even_s), _ms(c.bound_s), _ms(c.exposed_s))
        rows.append((str(c.chunks), _listed(c.cuts), _ms(c.predicted_s), ratio, *times, mark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  " + "  ".join(f"{{:{side}{width}}}" for side, width in zip(">" * 7 + "<", widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def _listed(cuts: Cuts) -> str:
    return " ".join(map(str, cuts))


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.1f} ms" if abs(ms) >= 100 else f"{ms:.3g} ms"
