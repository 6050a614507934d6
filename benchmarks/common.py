"""What every benchmark shares: arguments, ranks, interleaved timing, ratios with an interval, the report.

A benchmark is a list of cases. In each case several contenders do the same work on the same input; their results are
checked before anything is timed, and a wrong one ends the run with exit status 1 and no numbers. Then every round times
each contender once, in an order that rotates, so that a machine that slows down slows all of them. A ratio is the
median of the rounds' ratios, with a 95 % interval by the bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

__all__ = [
    "Contender",
    "Ratio",
    "Row",
    "Timing",
    "WrongResultError",
    "check",
    "launch",
    "meta",
    "parser",
    "progress",
    "ratio",
    "report",
    "time_rounds",
]


class WrongResultError(AssertionError):
    """A contender computed something else than the reference."""


@dataclass(frozen=True)
class Row:
    """One number of a report; `ok` is None where nothing was promised."""

    name: str
    value: float
    unit: str
    target: float | None = None
    ok: bool | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` is timed, `prepare` before every call is not."""

    name: str
    run: Callable[[], Tensor]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, the slowest rank's."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds) * 1e3


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios and its 95 % interval."""

    value: float
    low: float
    high: float


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    args = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="fewer sizes and rounds: a look, not a result")
    args.add_argument("--json", type=Path, metavar="FILE", help="write meta and rows here")
    args.add_argument("--markdown", type=Path, metavar="FILE", help="put the table of rows here, text around it stays")
    args.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios here (needs matplotlib)")
    args.add_argument("--machine", default=_machine(), help="what to call this machine (default: %(default)s)")
    return args


def _machine() -> str:
    return f"{os.cpu_count()}-core {platform.machine()} {platform.system()}, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def meta(machine: str, packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        **more,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def launch(ranks: int, body: Callable[..., Any], *args: Any) -> Any:
    """Run `body(*args)` on that many gloo ranks of one compute thread each, and return what rank 0 returns.

    The ranks see the environment that torchrun would give them, since some libraries read it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(shared)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        try:
            mp.spawn(_rank, (body, args, result), nprocs=ranks)
        except mp.ProcessRaisedException as error:
            if "WrongResultError" not in str(error):
                raise
            print(f"WRONG RESULT: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            sys.exit(1)
        return torch.load(result, weights_only=False)


def _rank(rank: int, body: Callable[..., Any], args: tuple[Any, ...], result: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    value = body(*args)
    if rank == 0:
        torch.save(value, result)
    dist.barrier()
    dist.destroy_process_group()


def progress(done: int, total: int, what: str) -> None:
    """One line on stderr, redrawn by rank 0; nothing when stderr is a file."""
    if sys.stderr.isatty() and (not dist.is_initialized() or dist.get_rank() == 0):
        bar = "#" * (30 * done // max(total, 1))
        print(
            f"\r\033[K[{bar:30}] {done}/{total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True
        )


def check(name: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error relative to the largest expected value.

    Raises:
        WrongResultError: it is above `tolerance` on some rank, or shapes differ.
    """
    if got.shape != expected.shape:
        raise WrongResultError(f"{name}: shape {list(got.shape)} instead of {list(expected.shape)}")
    error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).reshape(1)
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    if not error.item() <= tolerance:
        raise WrongResultError(f"{name}: relative error {error.item():.2e} is above {tolerance:.0e}")
    return error.item()


def time_rounds(contenders: Sequence[Contender], rounds: int, *, warmup: int = 2) -> list[Timing]:
    """Time every contender once a round, on all ranks from a barrier on; the slowest rank counts."""
    seconds = torch.zeros(len(contenders), warmup + rounds, dtype=torch.float64)
    for turn in range(warmup + rounds):
        for i in range(len(contenders)):
            which = (i + turn) % len(contenders)
            contenders[which].prepare()
            dist.barrier()
            start = time.perf_counter()
            contenders[which].run()
            seconds[which, turn] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    measured = seconds[:, warmup:].tolist()
    return [Timing(c.name, tuple(row)) for c, row in zip(contenders, measured, strict=True)]


def ratio(ours: Timing, theirs: Timing, *, draws: int = 2000) -> Ratio:
    """How long ours takes in units of theirs."""
    paired = [a / b for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(paired, k=len(paired))) for _ in range(draws))
    return Ratio(statistics.median(paired), medians[int(0.025 * draws)], medians[int(0.975 * draws)])


def report(
    args: argparse.Namespace,
    about: dict[str, Any],
    rows: Sequence[Row],
    title: str,
    tables: str | None = None,
    *,
    block: str = "",
) -> None:
    """Print the rows; write the files that were asked for, the page with `tables` if they are other than the rows.

    A page may have several generated tables, each with a name (`block`) in its markers.
    """
    print(f"{title}\n{about['machine']}, {about['date']}, torch {about['versions'].get('torch')}")
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        interval = f"[{row.interval[0]:.2f}, {row.interval[1]:.2f}]" if row.interval else ""
        target = f"target {row.target:g} {'met' if row.ok else 'MISSED'}" if row.target is not None else ""
        print(f"  {row.name:{width}}  {row.value:10.3f} {row.unit:6} {interval:14} {target}".rstrip())
    if args.json:
        args.json.write_text(json.dumps({"meta": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if args.markdown:
        _fill_in(args.markdown, "\n".join((*_place(about), tables or _table(rows))), block)
    if args.plot:
        _plot(args.plot, [row for row in rows if row.interval], f"{title}\n{about['machine']}, {about['date']}")


def _place(about: dict[str, Any]) -> tuple[str, str]:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    return f"{about['machine']}, {about['date']}; {versions}.", ""


def _table(rows: Sequence[Row]) -> str:
    lines = ["| | value | 95 % interval | target | |", "|---|---:|:---:|---:|---|"]
    for row in rows:
        interval = f"{row.interval[0]:.2f} to {row.interval[1]:.2f}" if row.interval else ""
        target = "" if row.target is None else f"{row.target:g}"
        verdict = {None: "", True: "met", False: "**missed**"}[row.ok]
        value = f"{row.value:.3g}" if row.value < 100 else f"{row.value:.0f}"
        lines.append(f"| {row.name} | {value} {row.unit} | {interval} | {target} | {verdict} |")
    return "\n".join(lines)


def _fill_in(path: Path, table: str, block: str = "") -> None:
    """Replace what stands between the two markers of a block; where there are none, they are the end of the file."""
    name = f" of {block}" if block else ""
    begin, end = f"<!-- begin of the generated table{name} -->", f"<!-- end of the generated table{name} -->"
    text = path.read_text() if path.exists() else ""
    if begin not in text:
        text += f"{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def _plot(path: Path, rows: Sequence[Row], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    for at, row in enumerate(rows):
        assert row.interval is not None
        colour = "tab:gray" if row.ok is None else "tab:green" if row.ok else "tab:red"
        axes.plot(row.interval, (at, at), color=colour, linewidth=2)
        axes.plot(row.value, at, "o", color=colour)
        if row.target is not None:
            axes.plot(row.target, at, "|", color="black", markersize=14)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticks = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time ÷ peer's time, median and 95 % interval; bars: targets (smaller is better)")
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
