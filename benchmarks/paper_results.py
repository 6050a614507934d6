"""Every published number that is known, beside what the cost model says of it; no ranks, no measurement.

Which numbers constants were solved for, and of which the set-up is not known, is in `published/labels.json`, which was
committed before the predictions were computed; why some are far off is in `misses.json`. Everything else is predicted,
nothing is tuned for a row: hardware is that of `seqpar.plan.HARDWARE`, and constants solved for on one table predict
another.

The rows of ISO, TokenWeave's dense model, Shift Parallelism, Context Parallelism and Helix are those of
`paper_overlap.py`, `paper_shift.py` and `paper_long.py`, which say how each is predicted; all others are here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import paper_capacity
import paper_long
import paper_overlap
import paper_pipeline
import paper_shift
from common import meta, parser

from seqpar.partition import HeadMap, Interleave, Layout
from seqpar.plan import HARDWARE, Costs, Grid, Hardware, Model, ModelShape, Options, StepWork, closed_volume, cost

PUBLISHED = Path(__file__).parent / "published"
BEGIN, END = "<!-- begin of the generated tables -->", "<!-- end of the generated tables -->"
MISS = 0.3

TITLES = {
    "iso": "ISO",
    "tokenweave": "TokenWeave",
    "shift": "Shift Parallelism",
    "sarathi": "SARATHI",
    "sarathi-serve": "Sarathi-Serve",
    "flover": "Flover",
    "meta": "Context Parallelism",
    "helix": "Helix",
    "csps": "CSPS",
}


@dataclass(frozen=True)
class Row:
    """One published number.

    Args:
        paper: key of `TITLES`.
        name: of the row, unique in its paper.
        published: the value.
        predicted: ours; None where there is none.
        unit: of both.
        formula: the paper's own formula, or what is given, makes up nearly all of it, so agreement says little.
    """

    paper: str
    name: str
    published: float
    predicted: float | None
    unit: str
    formula: bool = False

    @property
    def ratio(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published

    @property
    def status(self) -> str:
        """fitted, unknown or predicted, as labelled before."""
        labels = read("labels")["papers"][self.paper]
        for status in ("fitted", "unknown"):
            if any(self.name.startswith(prefix) for prefix in labels[status]):
                return status
        return "predicted"

    @property
    def off(self) -> float:
        """How far the ratio is from 1."""
        assert self.ratio is not None
        return abs(self.ratio - 1)


@cache
def read(name: str) -> Any:
    """A file of published numbers."""
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def rows(generations: int = 4, requests: int = 10_000, served: int = 150) -> list[Row]:
    """All of them, paper by paper; throughputs, the pipeline and capacities are replayed, of so many requests."""
    return [
        *iso(),
        *tokenweave(),
        *shift(generations),
        *sarathi(),
        *pipeline(requests),
        *sarathi_serve(),
        *capacities(served),
        *flover(),
        *context_parallel(),
        *helix(),
        *csps(),
    ]


def iso() -> Iterator[Row]:
    for gpu, value, mean, _, _ in paper_overlap.iso_summary(paper_overlap.iso_cells()):
        yield Row("iso", f"{gpu}, prefill time saved", value, mean, "%")


def tokenweave() -> Iterator[Row]:
    """The dense model from the paper's kernel times; the mixture by `plan.cost`."""
    for each in paper_overlap.tokenweave_rows():
        length = f"{int(each['tokens']) // 1024}k"
        yield Row("tokenweave", f"serial {length}", each["measured_serial_ms"], each["serial_ms"], "ms")
        yield Row("tokenweave", f"overlapped {length}", each["measured_weave_ms"], each["weave_ms"], "ms")
    table = read("tokenweave-moe")
    model = Model.from_config(table["model"], name="Mixtral-8x22B")
    hardware = weaving(HARDWARE["h100"])
    for tokens, published in zip(table["tokens"], table["speedup"], strict=True):
        serial = cost(model, hardware, Grid(8), [tokens]).total_s
        halves = Options(overlap=Interleave(2, min_tokens=2), fused_norms=True)
        woven = cost(model, hardware, Grid(8), [tokens], options=halves).total_s
        yield Row("tokenweave", f"Mixtral-8x22B {tokens // 1024}k, speed-up", published, serial / woven, "x")


def weaving(hardware: Hardware) -> Hardware:
    """Hardware beside whose sums as much of the compute rate is lost as was solved for on the dense model."""
    sms = round(paper_overlap.FITTED["contention"] * hardware.accelerator.sms)
    tiers = (
        replace(tier, fabrics=tuple(replace(fabric, comm_sms=sms) for fabric in tier.fabrics))
        for tier in hardware.tiers
    )
    return replace(hardware, tiers=tuple(tiers))


def shift(generations: int) -> Iterator[Row]:
    names = {"ttft_ms": ("TTFT", "ms"), "tpot_ms": ("TPOT", "ms"), "tokens_per_s": ("throughput", "tokens/s")}
    cells, _ = paper_shift.cells(generations)
    for cell in cells:
        if cell["constants"] == paper_shift.SHARED:  # the other set takes two of its numbers from the held-out model
            what, unit = names[cell["metric"]]
            yield Row("shift", f"{cell['model']} {cell['way']} {what}", cell["published"], cell["predicted"], unit)
    trace = read("shift-trace")
    for way, values in trace["results"].items():
        for metric, value in zip(trace["metrics"], values, strict=True):
            yield Row("shift", f"trace, {way} {metric}", value, None, metric.split("_", 1)[1].replace("_", " "))
    for name, each in trace["volumes"]["models"].items():
        for layout in ((8, 1), (4, 2), (2, 4), (1, 8)):
            heads = HeadMap(each["num_heads"], each["num_kv_heads"], *layout)
            sizes = {"hidden_size": each["hidden_size"], "head_dim": each["head_dim"]}
            sent = float(closed_volume(Layout(*layout), 1, heads, **sizes).total) / 1024
            key = f"{layout[0]}x{layout[1]}"
            yield Row("shift", f"volume, {name} {key}", each[key], sent, "KiB", formula=True)


LINEAR = ("qkv", "o", "gate, up", "down")


@cache
def sarathi_shares() -> dict[str, float]:
    """What an A6000 reaches of its peaks, from two rows of SARATHI's Table 2."""
    table = read("sarathi")
    model, plain = Model.from_config(table["models"]["13B"]), HARDWARE["a6000"]
    prefill, decode = table["iterations"]["prefill only"], table["iterations"]["decode only"]

    def solved(share: str, want_ms: float, told: Callable[[Hardware], float]) -> float:
        low, high = 1e-3, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            ms = told(with_shares(plain, {share: middle}))
            low, high = (middle, high) if ms > want_ms else (low, middle)
        return (low + high) / 2

    def of_prompt(hardware: Hardware) -> dict[str, float]:
        return iteration(model, hardware, prefill["prompt"], 0)

    return {
        "gemm_efficiency": solved("gemm_efficiency", prefill["linear_ms"], lambda hw: of_prompt(hw)["linear_ms"]),
        "hbm_efficiency": solved(
            "hbm_efficiency", decode["linear_ms"], lambda hw: iteration(model, hw, 0, decode["decodes"])["linear_ms"]
        ),
        "attention_efficiency": solved(
            "attention_efficiency", prefill["attention_ms"], lambda hw: of_prompt(hw)["attention_ms"]
        ),
    }


def with_shares(hardware: Hardware, shares: dict[str, float]) -> Hardware:
    return replace(hardware, accelerator=replace(hardware.accelerator, **shares))


def ampere(name: str) -> Hardware:
    """A GPU that reaches what SARATHI's A6000 does."""
    return with_shares(HARDWARE[name], sarathi_shares())


def iteration(model: Model, hardware: Hardware, prompt: int, decodes: int, context: int = 1024) -> dict[str, float]:
    """One iteration as Table 2 has it: a chunk at the begin of a prompt beside decodes."""
    new = [1] * decodes + ([prompt] if prompt else [])
    step = cost(model, hardware, Grid(), new, [context] * decodes + ([0] if prompt else []))
    linear = sum(part.seconds for part in step.parts if part.name in LINEAR)
    attention = sum(part.seconds for part in step.parts if part.name.startswith("attention"))
    return {"linear_ms": 1e3 * linear, "attention_ms": 1e3 * attention, "total_ms": 1e3 * (linear + attention)}


def sarathi() -> Iterator[Row]:
    table = read("sarathi")
    models = {name: Model.from_config(config, name=name) for name, config in table["models"].items()}
    small, a6000 = models["13B"], ampere("a6000")
    found = {}
    for name in ("prefill only", "decode only", "decode-maximal"):
        each = table["iterations"][name]
        found[name] = iteration(small, a6000, each["prompt"], each["decodes"])
        for part, ms in found[name].items():
            yield Row("sarathi", f"{name}, {part[:-3]}", each[part], ms, "ms")
    more = found["decode-maximal"]["total_ms"] - found["prefill only"]["total_ms"]
    decodes = table["iterations"]["decode-maximal"]["decodes"]
    yield Row("sarathi", "a decode beside a prompt", table["marginal_decode_ms"], more / decodes, "ms")
    for count, ms in table["tiles"]["ms"].items():
        yield Row("sarathi", f"linear, {count} rows", ms, iteration(small, a6000, int(count), 0)["linear_ms"], "ms")
    for name, fits in table["most_requests"].items():
        for length, requests in fits.items():
            costs = Costs(models[name], ampere(table["hardware"][name]), Grid())
            fit = costs.tokens_that_fit(int(length)) // int(length)
            yield Row("sarathi", f"{name}, requests of {length} that fit", requests, fit, "")
    for chunk, slower in table["chunked_prefill_slowdown"].items():
        yield Row("sarathi", f"chunks of {chunk}, prompt", slower, chunked(small, a6000, 1024, int(chunk)), "x")
    for each in table["peaks"]:
        at = f"{each['model']} {each['length'] // 1024}K"
        gain, speedup = decode_maximal(models[each["model"]], ampere(table["hardware"][each["model"]]), each)
        yield Row("sarathi", f"{at}, decodes", each["decode_speedup"], speedup, "x")
        yield Row("sarathi", f"{at}, end to end", each["gain"], gain, "x")


def pipeline(requests: int) -> Iterator[Row]:
    """GPT-3 in eight stages."""
    found = paper_pipeline.ratios(paper_pipeline.predict(ampere("a100"), requests))
    for name, value in read("sarathi")["pipeline"].items():
        if name != "note":
            yield Row("sarathi", f"pipeline, {name.replace('_', ' ')}", value, found[name], "x")


def chunked(model: Model, hardware: Hardware, prompt: int, chunk: int, grid: Grid = Grid()) -> float:  # noqa: B008
    """A prompt in chunks, divided by the prompt as a whole."""
    starts = range(0, prompt, chunk)
    parts = sum(cost(model, hardware, grid, [min(chunk, prompt - at)], [at]).total_s for at in starts)
    return parts / cost(model, hardware, grid, [prompt]).total_s


def decode_maximal(
    model: Model, hardware: Hardware, case: dict[str, Any], rows_of_step: int = 256
) -> tuple[float, float]:
    """End to end and for a decode: batches that prompt and then decode, divided by decodes beside chunks."""
    batch, length = case["batch"], case["length"]
    output = length / (1 + case["prompt_to_decode"])
    prompt = length - output
    costs = Costs(model, hardware, Grid())
    context = prompt + output / 2

    def decoding(count: int) -> float:
        return costs.seconds(StepWork(count, cached=count * context, decodes=count, rows=count))

    def mixed(chunk: int, decodes: int) -> float:
        """A chunk halfway through its prompt."""
        work = StepWork(
            chunk + decodes,
            pairs=chunk * (prompt + 1) / 2,
            keys=chunk + prompt / 2,
            cached=decodes * context,
            decodes=decodes,
            rows=1 + decodes,
        )
        return costs.seconds(work)

    whole = costs.seconds(StepWork(round(prompt), pairs=prompt * (prompt + 1) / 2, keys=prompt, rows=1))
    before = batch * whole + output * decoding(batch)
    chunk = rows_of_step - (batch - 1)
    steps = batch * prompt / chunk
    carried = min(batch * output, steps * (batch - 1))
    beside = carried / steps
    full, bare = mixed(chunk, batch - 1), mixed(rows_of_step, 0)
    share = beside / (batch - 1)
    after = steps * (share * full + (1 - share) * bare) + (batch * output - carried) / batch * decoding(batch)
    return before / after, (decoding(batch) / batch) / ((full - bare) / (batch - 1))


def sarathi_serve() -> Iterator[Row]:
    table = read("sarathi-serve")
    models = {name: Model.from_config(config, name=name) for name, config in table["models"].items()}
    for name, server in table["servers"].items():
        step = cost(
            models[name], ampere(server["hardware"]), Grid(server["tp"], 1, server["pp"]), [1] * 32, [4096] * 32
        )
        yield Row("sarathi-serve", f"{name}, strict bound", server["strict_s"], 5 * step.total_s, "s")
    for name, tokens in table["compute_bound_tokens"].items():
        device = HARDWARE["a100"].accelerator
        yield Row(
            "sarathi-serve", f"{name}, bound by compute from", tokens, device.flops / device.hbm_bytes_per_s, "tokens"
        )
    chunks = table["chunk_overhead"]
    for chunk in ("512", "2048"):
        slower = chunked(models[chunks["model"]], ampere("a100"), 8192, int(chunk), Grid(2))
        yield Row("sarathi-serve", f"chunks of {chunk}, prompt", chunks[chunk], slower, "x")


# Which of the servers and whose policy a row of capacities is about; Falcon is no Llama.
CAPACITIES = {
    "Mistral-7B, over vLLM": ("Mistral-7B", "vLLM"),
    "Yi-34B strict, over vLLM": ("Yi-34B", "vLLM"),
    "Yi-34B strict, over Orca": ("Yi-34B", "Orca"),
    "LLaMA2-70B, over vLLM": ("LLaMA2-70B", "vLLM"),
    "LLaMA2-70B, over Orca": ("LLaMA2-70B", "Orca"),
}


def capacities(requests: int) -> Iterator[Row]:
    """Requests a second within the strict bound, the better of both traces, since the paper says up to."""
    table = read("sarathi-serve")
    traces = [trace for name, trace in table["traces"].items() if name != "note"]

    @cache
    def told(name: str, policy: str, at: int) -> float:
        of = table["servers"][name]
        model = Model.from_config(table["models"][name], name=name)
        costs = Costs(model, ampere(of["hardware"]), Grid(of["tp"], 1, of["pp"]))
        return paper_capacity.capacity(paper_capacity.Server(costs, of["strict_s"]), policy, traces[at], requests)

    for row, value in table["capacity"].items():
        if row in CAPACITIES:
            name, policy = CAPACITIES[row]
            best = max(told(name, "Sarathi", at) / told(name, policy, at) for at in range(len(traces)))
            yield Row("sarathi-serve", f"capacity, {row}", value, best, "x")
        elif row != "note":
            yield Row("sarathi-serve", f"capacity, {row}", value, None, "x")


GPT_J = Model(ModelShape(4096, 28, 16, 16, 256, 16384), 50400, gated=False, name="GPT-J 6B")


def llama(hidden: int, layers: int, heads: int, intermediate: int) -> Model:
    """One of the first Llamas."""
    return Model(ModelShape(hidden, layers, heads, heads, 128, intermediate), 32000)


FLOVER = {
    "GPT-J 6B": GPT_J,
    "LLaMA-13B": llama(5120, 40, 40, 13824),
    "LLaMA-33B": llama(6656, 60, 52, 17920),
    "LLaMA-65B": llama(8192, 80, 64, 22016),
}


def fused_total(model: Model, tp: int, single_s: float, output: int, arrivals: Sequence[float]) -> tuple[float, int]:
    """Seconds and iterations of one forward for all live requests, the engine's share solved for on a single one."""
    costs = Costs(model, HARDWARE["a100"], Grid(tp))

    def step(live: int) -> float:
        return costs.seconds(StepWork(live, cached=live * output / 2, decodes=live, rows=live))

    engine = single_s / output - step(1)
    now, count, left = 0.0, 0, []
    waiting = list(arrivals)
    while waiting or left:
        if not left:
            now = max(now, waiting[0])
        while waiting and waiting[0] <= now:
            left.append(output)
            waiting.pop(0)
        now += step(len(left)) + engine
        count += 1
        left = [each - 1 for each in left if each > 1]
    return now, count


def flover() -> Iterator[Row]:
    table = read("flover")
    output, gap = table["output"], table["interval_s"]
    for name, totals in table["total_s"].items():
        single = totals[0]
        for requests, total in zip(table["requests"], totals, strict=True):
            arrivals = [gap * at for at in range(requests)]
            found, _ = fused_total(FLOVER[name], table["gpus"][name], single, output, arrivals)
            # Most of the time is arrivals, which are given.
            which = f"{requests} request{'s' * (requests > 1)}, {name}"
            yield Row("flover", which, total, found, "s", formula=requests > 1)
            if requests == 32:
                # Instances that share nothing read the weights for each request: as long as one after another.
                speedup = requests * single / found
                yield Row("flover", f"32 requests, {name}, speed-up", table["speedup_32"][name], speedup, "x")
    poisson = table["poisson"]
    for ms, published in zip(poisson["gap_ms"], poisson["speedup"], strict=True):
        arrivals = [ms * 1e-3 * at for at in range(32)]
        found, _ = fused_total(GPT_J, 1, poisson["single_s"], output, arrivals)
        alone = 0.0
        for arrival in arrivals:
            alone = max(alone, arrival) + poisson["single_s"]
        yield Row("flover", f"Poisson, gaps of {ms} ms", published, alone / found, "x")


def context_parallel() -> Iterator[Row]:
    """Rings as `paper_long.py` has them; whole prompts and times between tokens by `plan.cost`."""
    rates = paper_long.solve()
    found = paper_long.report(rates)
    for each in found["rings"]:
        for key, what in paper_long.TIMES.items():
            if each["published"][key] is not None:
                yield Row("meta", f"{what} {each['new']}", each["published"][key], each["predicted"][key], "us")
    crossings = found["crossover"]
    yield Row("meta", "keys are faster from", crossings["measured"], crossings["answers at the end"], "new tokens")
    hidden = paper_long.CP["peak"]["hidden_from"]
    yield Row("meta", "keys hide from, their rule", hidden, crossings["meta-1, peak rates"], "new tokens", formula=True)
    for each in found["decode"]:
        yield Row("meta", f"decode attention CP{each['hosts']}", each["attention_us"], each["predicted_us"], "us")
        if each["hop_us"] is not None:
            yield Row("meta", f"decode hops CP{each['hosts']}", each["hop_us"], each["predicted_hop_us"], "us")
    model = Model(ModelShape(16384, 126, 128, 8, 128, 53248), 128256, name="Llama-3.1-405B")
    tp = paper_long.CP["shape"]["tp"]
    for each in paper_long.CP["prefill"]:
        options = Options(prefill="ring", near="tp")
        step = cost(model, HARDWARE["h100"], Grid(tp, each["hosts"]), [each["tokens"]], options=options)
        yield Row("meta", f"{each['tokens']:,} tokens on {each['hosts']} hosts", each["seconds"], step.total_s, "s")
    for each in paper_long.CP["decode"]:
        options = Options(decode="qship", prefill="ring", near="tp")
        grid = Grid(tp, each["hosts"])
        step = cost(model, HARDWARE["h100"], grid, [1], [paper_long.CP["total"]], options=options)
        yield Row("meta", f"between tokens, CP{each['hosts']}", each["ttit_ms"], 1e3 * step.total_s, "ms")


def helix() -> Iterator[Row]:
    found = paper_long.helix()
    for way in ("serial", "overlapped"):
        yield Row("helix", f"example, {way}", paper_long.HELIX[way], found[way], "")


def csps() -> Iterator[Row]:
    for name, value in read("csps")["factors"].items():
        yield Row("csps", f"{name}, up to", value, None, "x")


def why(row: Row) -> str:
    """What is known of a row that is far off."""
    reasons = read("misses")["papers"].get(row.paper, {})
    return next((line for prefix, line in reasons.items() if row.name.startswith(prefix)), "")


def summary(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """What a median is taken over."""
    told = [row for row in found if row.predicted is not None and row.status != "fitted"]
    known = [row for row in told if row.status == "predicted"]
    return [
        ("all rows that are not fitted", told),
        ("without those whose set-up is unknown", known),
        (
            "and without those that a given formula or the given arrivals make up",
            [row for row in known if not row.formula],
        ),
    ]


def markdown(found: Sequence[Row]) -> str:
    """The medians, what was missed, and a table for each paper."""
    lines = ["| median of \\|ratio - 1\\| | rows | median | within 15 % | within 30 % |", "|---|---:|---:|---:|---:|"]
    for name, several in summary(found):
        near = [sum(row.off <= bound for row in several) / len(several) for bound in (0.15, MISS)]
        median = statistics.median(row.off for row in several)
        lines.append(f"| {name} | {len(several)} | {median:.1%} | {near[0]:.0%} | {near[1]:.0%} |")
    silent = [row for row in found if row.predicted is None]
    fitted = sum(row.status == "fitted" for row in found)
    lines += ["", f"{fitted} rows are fitted and in no median; of {len(silent)} nothing is predicted."]
    lines += ["", "**Missed by more than 30 %**", "", "| paper | row | ratio | why |", "|---|---|---:|---|"]
    for row in found:
        if row.ratio is not None and row.status != "fitted" and row.off > MISS:
            lines.append(f"| {TITLES[row.paper]} | {row.name} | {row.ratio:.2f} | {why(row)} |")
    for paper, title in TITLES.items():
        labels = read("labels")["papers"][paper]
        lines += ["", f"**{title}**: {labels['split']}.", ""]
        lines += ["| | published | predicted | ratio | |", "|---|---:|---:|---:|---|"]
        for row in (row for row in found if row.paper == paper):
            told = ("", "") if row.ratio is None else (_number(row.predicted or 0.0), f"{row.ratio:.2f}")
            note = "" if row.status == "predicted" else row.status
            note = "given" if row.formula and not note else note
            note += ", not predicted" if row.predicted is None else ""
            lines.append(
                f"| {row.name} | {_number(row.published)} {row.unit} | {told[0]} | {told[1]} | {note.lstrip(', ')} |"
            )
        lines += [f"\n{prefix or 'All'}: set-up unknown, {reason}." for prefix, reason in labels["unknown"].items()]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = parser(__doc__ or "").parse_args(arguments)
    found = rows(1, 100, 30) if args.quick else rows()
    text = markdown(found)
    print(text)
    if args.json:
        content = [{**vars(row), "status": row.status} for row in found]
        about = {**meta("none: predictions", ["torch"]), "a6000": sarathi_shares()}
        args.json.write_text(json.dumps({"meta": about, "rows": content}, indent=1) + "\n")
    if args.markdown:
        page = args.markdown.read_text() if args.markdown.exists() else f"{BEGIN}\n{END}\n"
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        args.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
