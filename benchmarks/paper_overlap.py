"""What the cost model says of two papers' hardware, beside what they published; no ranks, no measurement.

ISO (arXiv:2409.11155): predicted reduction of the prefill time on the paper's grid of machines, models and lengths, by
a roofline whose efficiencies are assumed (`seqpar.plan.MACHINES`); nothing is fitted.

TokenWeave (arXiv:2505.11329): Llama-3.3-70B on eight H100s, from its published times of single kernels and the three
constants below, each solved for on one row of the table; the other rows are predictions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import meta, parser

from seqpar.plan import (
    MACHINES,
    Curve,
    LayerCosts,
    Machine,
    ModelShape,
    SlotCosts,
    makespan,
    overlap,
    prefill_costs,
)
from seqpar.plan.costs import Prompt

PUBLISHED = Path(__file__).parent / "published"
BEGIN, END = "<!-- begin of the generated tables -->", "<!-- end of the generated tables -->"

# Solved for, on rows of TokenWeave's table: the first two on the serial times of 16k and 64k tokens, the third on the
# gain at 8k. It is the share of the compute rate lost beside the fused kernel: its 8 of 132 SMs, and memory and power.
FITTED = {"gemm_efficiency": 0.661, "attention_efficiency": 0.546, "contention": 0.294}
# Assumed. With 3 or 5 us a kernel the gain at 1k, its most sensitive row, comes out 1 or 3 points lower.
ASSUMED: dict[str, Any] = {"tile": (128, 128), "kernel_s": 2e-6}


def iso_cells(machines: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A cell for each machine (of those named), wire format, model and length of ISO's grid."""
    published = json.loads((PUBLISHED / "iso.json").read_text())
    cells = []
    for name in published["machines"] if machines is None else machines:
        for wire in published["machines"][name]:
            for model, config in published["models"].items():
                shape = ModelShape.from_config(config)
                costs = prefill_costs(shape, MACHINES[name], wire=None if wire == "fp16" else wire)
                for tokens in published["tokens"]:
                    cells.append(
                        {"machine": name, "wire": wire, "model": model, "tokens": tokens}
                        | _cell(costs, tokens, shape.num_layers)
                    )
    return cells


def _cell(costs: LayerCosts, tokens: int, num_layers: int) -> dict[str, Any]:
    choice = overlap(costs, tokens, num_layers=num_layers, grid=max(128, tokens // 128))
    by_n = {candidate.chunks: candidate for candidate in choice.candidates}
    best = min(choice.candidates, key=lambda candidate: candidate.predicted_s, default=None)

    def reduction(seconds: float) -> float:
        return 100 * (1 - seconds / choice.serial_s)

    return {
        "comm share": 100 * choice.comm_s / choice.serial_s,
        "two halves": reduction(by_n[2].even_s) if 2 in by_n else 0.0,
        "best n": reduction(best.predicted_s) if best else 0.0,
        "auto": 100 * choice.reduction,
        "auto n": choice.chunks,
    }


def tokenweave_rows() -> list[dict[str, float]]:
    """Predicted and measured serial and overlapped times, a row for each length."""
    published = json.loads((PUBLISHED / "tokenweave.json").read_text())
    kernels, prefill = published["kernels"], published["prefill"]
    shape = ModelShape.from_config(published["model"])

    def curve(name: str) -> Curve:
        return Curve(tuple(kernels["tokens"]), tuple(us * 1e-6 for us in kernels[name]))

    device = replace(
        MACHINES["h100-x8-multimem"].accelerator,
        gemm_efficiency=FITTED["gemm_efficiency"],
        attention_efficiency=FITTED["attention_efficiency"],
        **ASSUMED,
    )
    machine = Machine(device, MACHINES["h100-x8-multimem"].fabric)
    work = prefill_costs(shape, machine, norms=False, most=prefill["tokens"][-1])
    plain, norm = (_with(work, curve(name)) for name in ("all_reduce_us", "rms_norm_us"))
    fused = _with(work, curve("fused_all_reduce_norm_8_ctas_us"))
    rows = []
    for tokens, serial_ms, weave_ms in zip(
        prefill["tokens"], prefill["serial_ms"], prefill["tokenweave_ms"], strict=True
    ):
        whole = Prompt(tokens)
        # In the baseline every all-reduce is followed by a norm of all rows; TokenWeave's holds the norm of its share.
        serial = sum(sum(slot) for slot in plain.chunk(whole, 0, tokens))
        serial += sum(slot.comm_s for slot in norm.chunk(whole, 0, tokens))
        weave = min(
            _two(fused, whole, tokens // 2 + offset, shape.num_layers) for offset in published["offsets"]
        )  # the paper searches the same offsets
        predicted = 1e3 * shape.num_layers * serial
        rows.append(
            {
                "tokens": tokens,
                "serial_ms": predicted,
                "measured_serial_ms": serial_ms,
                "weave_ms": 1e3 * weave,
                "measured_weave_ms": weave_ms,
                "gain": 100 * (1 - 1e3 * weave / predicted),
                "measured_gain": 100 * (1 - weave_ms / serial_ms),
            }
        )
    return rows


def _with(costs: LayerCosts, comm: Curve) -> LayerCosts:
    """The same compute with a measured collective after each half."""
    return replace(costs, slots=tuple(SlotCosts(slot.compute, comm, slot.per_pair_s) for slot in costs.slots))


def _two(costs: LayerCosts, prompt: Prompt, cut: int, num_layers: int) -> float:
    spans = (0, cut), (cut, prompt.num_tokens)
    programs = [[*costs.chunk(prompt, a, b)] * num_layers for a, b in spans]
    return makespan(programs, contention=FITTED["contention"]).total_s


def iso_summary(cells: Sequence[dict[str, Any]]) -> list[tuple[str, float, float, list[float], list[float]]]:
    """For each GPU of the paper: its name, what was published, and the grid's reductions by two halves and by auto.

    Of the RTX 4090 the cells are those with int8 sums, which the paper is understood to use there.
    """
    published = json.loads((PUBLISHED / "iso.json").read_text())["reduction"]
    out = []
    for gpu, value in published.items():
        mine = [c for c in cells if c["machine"].startswith(gpu) and (c["wire"] == "int8" or gpu == "a800")]
        halves, auto = ([c[key] for c in mine] for key in ("two halves", "auto"))
        out.append((gpu, 100 * value, statistics.fmean(halves), halves, auto))
    return out


def markdown(cells: Sequence[dict[str, Any]], rows: Sequence[dict[str, float]]) -> str:
    """Both papers' tables."""
    return f"{iso_markdown(cells)}\n\n{tokenweave_markdown(rows)}"


def iso_markdown(cells: Sequence[dict[str, Any]]) -> str:
    """The means beside what was published, then a table for each machine."""
    lines = ["| GPU | published | two halves: mean (range) | auto: mean (range) | two halves - published |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for gpu, value, mean, halves, auto in iso_summary(cells):
        means = f"{_mean_range(halves)} | {_mean_range(auto)}"
        lines.append(f"| {gpu} | about {value:.0f} % | {means} | {mean - value:+.1f} points |")
    for machine in dict.fromkeys(c["machine"] for c in cells):
        lines += ["", machine_markdown(machine, [c for c in cells if c["machine"] == machine])]
    return "\n".join(lines)


def machine_markdown(machine: str, cells: Sequence[dict[str, Any]]) -> str:
    """The cells of one machine, a column for each length."""
    lengths = sorted({c["tokens"] for c in cells})
    head = " | ".join(f"{n // 1024}k" for n in lengths)
    lines = [f"**{machine}**, reduction in %", "", f"| model, sums in | | {head} |"]
    lines += ["|---|---|" + "---:|" * len(lengths)]
    for model, wire in dict.fromkeys((c["model"], c["wire"]) for c in cells):
        row = {c["tokens"]: c for c in cells if (c["model"], c["wire"]) == (model, wire)}
        for key in ("comm share", "two halves", "best n"):
            numbers = " | ".join(f"{row[n][key]:.1f}" for n in lengths)
            lines.append(f"| {model}, {wire} | {key} | {numbers} |")
        numbers = " | ".join(f"{row[n]['auto']:.1f} ({row[n]['auto n']})" for n in lengths)
        lines.append(f"| {model}, {wire} | auto (chunks) | {numbers} |")
    return "\n".join(lines)


def tokenweave_markdown(rows: Sequence[dict[str, float]]) -> str:
    """A row for each length, measured beside predicted."""
    lines = ["**TokenWeave**, Llama-3.3-70B on 8 x H100", ""]
    lines += [
        "| tokens | serial, predicted | measured | | TokenWeave, predicted | measured | gain, predicted | measured | |"
    ]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        off = 100 * (r["serial_ms"] / r["measured_serial_ms"] - 1)
        lines.append(
            f"| {r['tokens'] // 1024}k | {r['serial_ms']:.1f} ms | {r['measured_serial_ms']:g} ms | {off:+.1f} % "
            f"| {r['weave_ms']:.1f} ms | {r['measured_weave_ms']:g} ms "
            f"| {r['gain']:.1f} % | {r['measured_gain']:.1f} % | {r['gain'] - r['measured_gain']:+.1f} points |"
        )
    return "\n".join(lines)


def _mean_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


def plot(path: Path, cells: Sequence[dict[str, Any]], rows: Sequence[dict[str, float]]) -> None:
    """Reductions over lengths: ISO's grid on the left, TokenWeave's rows on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {"30B": "-", "70B": "--"}
    summary = {gpu: value for gpu, value, *_ in iso_summary(cells)}
    for number, machine in enumerate(dict.fromkeys(c["machine"] for c in cells)):
        for model, style in styles.items():
            wire = "int8" if "4090" in machine else "fp16"
            mine = [c for c in cells if (c["machine"], c["model"], c["wire"]) == (machine, model, wire)]
            label = f"{machine} {model} {wire}"
            left.plot([c["tokens"] for c in mine], [c["auto"] for c in mine], style, color=f"C{number}", label=label)
    for gpu, value in summary.items():
        left.axhline(value, color="black", linewidth=0.8, linestyle=":")
        left.annotate(f"published, {gpu}", (1 << 17, value), fontsize=8, va="bottom", ha="right")
    left.set_title("ISO's grid, predicted by auto", fontsize=10, loc="left")
    left.legend(fontsize=7, ncols=2)
    tokens = [r["tokens"] for r in rows]
    right.plot(tokens, [r["measured_gain"] for r in rows], "o", color="black", label="measured by TokenWeave")
    right.plot(tokens, [r["gain"] for r in rows], "-", color="C0", label="predicted")
    right.set_title("Llama-3.3-70B on 8 x H100", fontsize=10, loc="left")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
        axes.set_xlabel("tokens")
        axes.set_ylim(0, 55)
    left.set_ylabel("prefill time saved, %")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = parser(__doc__ or "").parse_args(arguments)
    cells, rows = iso_cells(), tokenweave_rows()
    text = markdown(cells, rows)
    print(text)
    if args.json:
        about = {**meta("none: predictions", ["torch"]), "fitted": FITTED, "assumed": ASSUMED}
        args.json.write_text(json.dumps({"meta": about, "iso": cells, "tokenweave": rows}, indent=1) + "\n")
    if args.markdown:
        page = args.markdown.read_text() if args.markdown.exists() else f"{BEGIN}\n{END}\n"
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        args.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    if args.plot:
        plot(args.plot, cells, rows)


if __name__ == "__main__":
    main()
