"""What `plan` says of long contexts on the papers' hardware, beside what they published; no ranks, no measurement.

Context Parallelism (arXiv:2411.01783): Llama-3.1-405B on hosts of 8 x H100, new tokens behind cached ones, with keys or
queries going round a ring of 4 hosts. Two constants are solved for, each on one number of its row of 2.5 % new tokens:
what attention reaches, and what a link does. Every other time, and which of the two is faster, is predicted.

Helix (arXiv:2507.07120): its example of overlapped requests, and what its exchange sends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import meta, parser

from seqpar.plan import RingCase, RingCosts, Slot, helix_volume, makespan, ring_costs, ring_method

PUBLISHED = json.loads((Path(__file__).parent / "published/long.json").read_text())
CP, HELIX = PUBLISHED["context-parallel"], PUBLISHED["helix"]
BEGIN, END = "<!-- begin of the generated tables -->", "<!-- end of the generated tables -->"
SOLVED_ROW = 3200
RULES = ("meta-1", "meta-5", "meta-fit", "cost")
TIMES = {
    "kv_hop_us": "keys, a hop",
    "q_hop_us": "queries, a hop",
    "attention_us": "attention, a step",
    "all_to_all_us": "answers, all at the end",
}


@dataclass(frozen=True)
class Rates:
    """What one GPU reaches in attention, and what it sends a second."""

    flops: float
    bytes_per_s: float

    @property
    def options(self) -> dict[str, float]:
        return {"flops": self.flops, "bytes_per_s": self.bytes_per_s}


def case(new: int) -> RingCase:
    """One GPU's heads: the hosts' tensor parallelism divides them, and what they send, by 8."""
    shape = CP["shape"]
    return RingCase(
        new,
        CP["total"] - new,
        CP["ranks"],
        shape["num_heads"] // shape["tp"],
        shape["num_kv_heads"] // shape["tp"],
        shape["head_dim"],
        shape["itemsize"],
    )


def solve() -> Rates:
    """From attention and a hop of keys in one row."""
    row = next(row for row in CP["rows"] if row["new"] == SOLVED_ROW)
    of = case(SOLVED_ROW)
    return Rates(of.step_flops / (1e-6 * row["attention_us"]), of.kv_bytes / (1e-6 * row["kv_hop_us"]))


def times_us(new: int, rates: Rates) -> dict[str, float]:
    """The parts of both rings."""
    of = case(new)
    sent = {"kv_hop_us": of.kv_bytes, "q_hop_us": of.q_bytes, "all_to_all_us": (of.ranks - 1) * of.answer_bytes}
    found = {name: 1e6 * n / rates.bytes_per_s for name, n in sent.items()}
    return {**found, "attention_us": 1e6 * of.step_flops / rates.flops}


def costs(new: int, rates: Rates, *, hops: bool) -> RingCosts:
    """With answers sent back under the next step, or as the paper does after the last one."""
    return ring_costs(case(new), **rates.options, answers="hops" if hops else "end")


def crossover(rates: Rates, *, hops: bool) -> int:
    """The fewest new tokens for which keys are the faster ones to send."""
    low, high = 1, CP["total"]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(middle, rates, hops=hops).method == "kv" else (middle + 1, high)
    return low


def rule_crossover(rule: str, rates: Rates) -> int | None:
    """The same by one of the paper's rules; None where it says one thing for all."""
    chosen = [(new, ring_method(case(new), rule=rule, **rates.options)) for new in range(100, CP["total"] + 1, 100)]
    return next((b for (_, before), (b, after) in pairwise(chosen) if before != after), None)


def rings(rates: Rates) -> list[dict[str, Any]]:
    """A cell for each row of new tokens: the parts, both rings in either form, and what each rule says."""
    peak = Rates(CP["peak"]["flops"], CP["peak"]["bytes_per_s"])
    found = []
    for row in CP["rows"]:
        new, times = row["new"], times_us(row["new"], rates)
        at_end, in_hops = (costs(new, rates, hops=hops) for hops in (False, True))
        found.append(
            {
                "new": new,
                "share": new / CP["total"],
                "better": row["better"],
                "basis": row["basis"],
                "predicted": {name: times[name] for name in TIMES},
                "published": {name: row.get(name) for name in TIMES},
                "solved": [name for name in ("kv_hop_us", "attention_us") if new == SOLVED_ROW],
                "at_end_us": {"kv": 1e6 * at_end.kv_s, "q": 1e6 * at_end.q_s},
                "in_hops_us": {"kv": 1e6 * in_hops.kv_s, "q": 1e6 * in_hops.q_s},
                "chosen": {"at_end": at_end.method, "in_hops": in_hops.method},
                "rules": {rule: ring_method(case(new), rule=rule, **peak.options) for rule in RULES[:-1]},
            }
        )
    return found


def prefills(rates: Rates) -> list[dict[str, Any]]:
    """Whole prompts, as if all of it ran at the rate of attention and nothing were exposed: a bound."""
    shape, found = CP["shape"], []
    for row in CP["prefill"]:
        n = row["tokens"]
        pairs = n * (n + 1) / 2
        attention = 4 * shape["num_heads"] * shape["head_dim"] * pairs * shape["layers"]
        seconds = (2 * CP["dense_parameters"] * n + attention) / (row["hosts"] * shape["tp"] * rates.flops)
        found.append({**row, "predicted": seconds, "off": seconds / row["seconds"] - 1})
    return found


def decodes() -> list[dict[str, Any]]:
    """Attention of one token: a fixed time and a share of the reading, solved for on one and two hosts."""
    one, two = (row["attention_us"] for row in CP["decode"][:2])
    read, fixed = 2 * (one - two), 2 * two - one
    found = []
    for row in CP["decode"]:
        hosts = row["hosts"]
        hop = None if row["hop_us"] is None else CP["decode"][1]["hop_us"] * (hosts - 1)
        found.append({**row, "predicted_us": fixed + read / hosts, "predicted_hop_us": hop, "solved": hosts < 4})
    return found


def helix() -> dict[str, Any]:
    """The example by the schedule, and the bytes that a GPU sends for one token of Llama-405B on 64 of them."""
    slot, n = Slot(HELIX["compute"], HELIX["exchange"]), HELIX["requests"]
    shape = CP["shape"]
    options = {"num_heads": shape["num_heads"], "head_dim": shape["head_dim"], "itemsize": shape["itemsize"]}
    return {
        "serial": makespan([[slot] * n]).total_s,
        "overlapped": makespan([[slot]] * n).total_s,
        "bytes": {
            f"{kvp} x {tpa}": float(helix_volume(1, **options, kvp=kvp, tpa=tpa))
            for kvp, tpa in ((8, 8), (16, 4), (32, 2))
        },
    }


def report(rates: Rates) -> dict[str, Any]:
    peak = Rates(CP["peak"]["flops"], CP["peak"]["bytes_per_s"])
    return {
        "rates": rates.options,
        "rings": rings(rates),
        "crossover": {
            "measured": 6400,
            "answers at the end": crossover(rates, hops=False),
            "answers in hops": crossover(rates, hops=True),
            **{f"{rule}, peak rates": rule_crossover(rule, peak) for rule in RULES[:-1]},
            **{f"{rule}, solved rates": rule_crossover(rule, rates) for rule in RULES[:2]},
        },
        "prefill": prefills(rates),
        "decode": decodes(),
        "helix": helix(),
    }


def markdown(found: dict[str, Any]) -> str:
    """A table for each part of it."""
    rates = found["rates"]
    lines = [
        f"Solved for on the row of {SOLVED_ROW:,} new tokens: attention at {rates['flops'] / 1e12:.0f} TFLOP/s a GPU, "
        f"links at {rates['bytes_per_s'] / 1e9:.1f} GB/s a GPU.",
        "",
        "**The parts of both rings**, microseconds: published, predicted",
        "",
        "| new tokens | share | " + " | ".join(TIMES.values()) + " |",
        "|---:|---:|" + "---:|" * len(TIMES),
    ]
    for row in found["rings"]:
        parts = [_pair(row["published"][name], row["predicted"][name], name in row["solved"]) for name in TIMES]
        lines.append(f"| {row['new']:,} | {row['share']:.1%} | " + " | ".join(parts) + " |")
    lines += ["", "**What to send round**: keys or queries, microseconds of a layer's attention", ""]
    lines += [
        "| new tokens | answers at the end: keys | queries | faster | answers in hops: keys | queries | faster | "
        "meta-1 | meta-5 | meta-fit | published |",
        "|---:|" + "---:|---:|:---:|" * 2 + ":---:|" * 4,
    ]
    for row in found["rings"]:
        cells = []
        for form in ("at_end", "in_hops"):
            us, chosen = row[f"{form}_us"], row["chosen"][form]
            cells += [f"{us['kv']:,.0f}", f"{us['q']:,.0f}", _verdict(chosen, row["better"])]
        cells += [_verdict(chosen, row["better"]) for chosen in row["rules"].values()]
        better = "equal" if row["better"] is None else row["better"]
        lines.append(f"| {row['new']:,} | " + " | ".join(cells) + f" | {better} ({row['basis']}) |")
    lines += ["", "| crossover to keys | new tokens | share |", "|---|---:|---:|"]
    for name, new in found["crossover"].items():
        share = "none" if new is None else f"{new / CP['total']:.2%}"
        lines.append(f"| {name} | {'none' if new is None else f'{new:,}'} | {share} |")
    lines += ["", "| whole prompts | hosts | published, s | compute alone, s | |", "|---:|---:|---:|---:|---:|"]
    for row in found["prefill"]:
        cells = f"{row['hosts']} | {row['seconds']:g} | {row['predicted']:.2f} | {row['off']:+.0%}"
        lines.append(f"| {row['tokens']:,} | {cells} |")
    lines += ["", "| decode, CP | attention, us | a ring's hops, us | all of it, us | between tokens, ms |"]
    lines += ["|---:|---:|---:|---:|---:|"]
    for row in found["decode"]:
        attention = _pair(row["attention_us"], row["predicted_us"], row["solved"])
        hops = "" if row["hop_us"] is None else _pair(row["hop_us"], row["predicted_hop_us"], row["solved"])
        lines.append(f"| {row['hosts']} | {attention} | {hops} | {row['whole_us']:g} | {row['ttit_ms']:g} |")
    each = found["helix"]
    lines += ["", "| Helix's example | published | replayed |", "|---|---:|---:|"]
    lines += [f"| {way} | {HELIX[way]:g} | {each[way]:g} |" for way in ("serial", "overlapped")]
    lines += ["", "| KVP x TPA, Llama-405B | bytes a token, layer and GPU, of any context |", "|---|---:|"]
    lines += [f"| {name} | {n:,.0f} |" for name, n in each["bytes"].items()]
    return "\n".join(lines)


def _pair(published: float | None, predicted: float, solved: bool) -> str:
    if published is None:
        return f"unknown, {predicted:,.0f}"
    return (
        f"{published:,g}, solved" if solved else f"{published:,g}, {predicted:,.0f} ({predicted / published - 1:+.0%})"
    )


def _verdict(chosen: str, better: str | None) -> str:
    return chosen if better in (None, chosen) else f"**{chosen}**"


def plot(path: Path, rates: Rates) -> None:
    """Both rings over the share of new tokens, and what was measured to be faster."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    news = [round(CP["total"] ** (i / 90)) for i in range(54, 91)]
    shares = [100 * new / CP["total"] for new in news]
    forms = [(new, costs(new, rates, hops=False), costs(new, rates, hops=True)) for new in news]
    base = [at_end.kv_s for _, at_end, _ in forms]
    for name, values, style in (
        ("keys", base, "k-"),
        ("queries, answers at the end (published form)", [at_end.q_s for _, at_end, _ in forms], "C1--"),
        ("queries, answers in hops (this library)", [in_hops.q_s for *_, in_hops in forms], "C0-"),
    ):
        axes.plot(shares, [v / b for v, b in zip(values, base, strict=True)], style, label=name)
    for row in CP["rows"]:
        label, colour = {"q": ("queries faster", "C1"), "kv": ("keys faster", "k"), None: ("equal", "C2")}[
            row["better"]
        ]
        axes.annotate(label, (100 * row["new"] / CP["total"], 1.51), color=colour, fontsize=8, ha="center", rotation=30)
        axes.axvline(100 * row["new"] / CP["total"], color="#d5d9df", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log", ylim=(0.7, 1.65), xlabel="new tokens, % of 128,000", ylabel="time ÷ that with keys sent round"
    )
    axes.set_title(
        "A layer's attention, Llama-405B on 4 hosts: predicted, and what was published", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = parser(__doc__ or "").parse_args(arguments)
    rates = solve()
    found = report(rates)
    text = markdown(found)
    print(text)
    if args.json:
        about = {**meta("none: predictions", ["torch"]), "source": [CP["source"], HELIX["source"]]}
        args.json.write_text(json.dumps({"meta": about, **found}, indent=1) + "\n")
    if args.markdown:
        page = args.markdown.read_text() if args.markdown.exists() else f"{BEGIN}\n{END}\n"
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        args.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    if args.plot:
        plot(args.plot, rates)


if __name__ == "__main__":
    main()
