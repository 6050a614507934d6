"""An engine in one file: continuous batching of many requests, on the parts of seqpar. Copy it to begin your own.

    torchrun --nproc-per-node 2 examples/engine.py --sp 2 --shift 16 --plot engine.png        # or --tp 2, or --pp 2
    python examples/engine.py --jsonl requests.jsonl --out answers.jsonl --journal tokens.jsonl

Requests come from a JSONL file or a generated trace. Rank 0 hears of them as they arrive and leads; the others follow.
A line of the file is an object with `prompt` (text or token ids) and, as wanted, `id`, `max_new_tokens`, `at_s` (when
it arrives), `temperature`, `top_k`, `top_p`, `seed`, `stop` (texts). A line that is none is reported with its number,
and the others are served. At the end comes a table: time to first token (TTFT), between tokens (TBT), tokens/s, cache.
An engine that is started again with its journal goes on from the tokens that are there; torchrun --max-restarts does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque, namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

import seqpar
from seqpar import batching, comm
from seqpar.batching import Budget, Journal, PipelineFusion, Request, Sampling, TemporalFusion
from seqpar.partition import Interleave

CHECKPOINT = Path(__file__).parent / "tiny-llama"
POLICIES = {
    "stall-free": lambda options: batching.StallFree(options.tau),
    "decode-maximal": lambda options: batching.DecodeMaximal(options.tau),
    "full-hybrid": lambda options: batching.FullHybrid(),
    "prefill-first": lambda options: batching.PrefillFirst(),
    "request-level": lambda options: batching.RequestLevel(),
    "exclusive": lambda options: batching.Exclusive(),
}


class Record(NamedTuple):
    """A request, when it came, and when its tokens did."""

    request: Request
    at_s: float
    times: list[float]


Sample = namedtuple("Sample", "at_s running waiting tokens kv")  # the state after a step
Arrivals, Records, Samples = list[tuple[float, Request, str]], list[Record], list[Sample]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    loop, tokenizer, group = start(options)
    if group.rank():
        loop.follow()
        return 0
    arrivals, refused = (read_jsonl if options.jsonl else generate_trace)(options, tokenizer)
    with Journal(options.journal) as journal, loop:
        records, samples = serve(loop, arrivals, refused, journal)
    sys.stderr.writelines(f"refused: {message}\n" for message in refused)
    if options.out:
        write_answers(options.out, records, journal, tokenizer)
    print(table(options, records, samples, len(refused), loop.reused))
    if options.plot:
        plot(options.plot, records, samples)
    return 1 if refused else 0


def start(options: argparse.Namespace) -> tuple[TemporalFusion, Any, comm.ProcessGroup]:
    """The loop over the model on all ranks, of which the first leads, and the model's tokenizer."""
    torch.set_num_threads(1)
    mesh = seqpar.init_mesh(options.tp, options.sp, pp=options.pp, timeout_s=options.timeout)
    overlap = Interleave(2, min_tokens=options.overlap) if options.overlap else "off"
    how = {"dtype": torch.float32, "progress": False, "shift": options.shift or "off", "overlap": overlap}
    pages = {"num_pages": options.pages, "page_size": options.page_size}
    if options.pp:
        model, group = seqpar.hf.load_stage(options.model, mesh, **how, **pages), comm.stages(mesh).whole
    else:
        model, group = seqpar.hf.Stepper(seqpar.hf.load(options.model, mesh, **how), **pages), comm.groups(mesh).flat
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    budget = Budget(options.max_tokens, options.max_requests, options.admission)
    how = {"policy": POLICIES[options.policy](options), "budget": budget, "preemption": options.preemption}
    how |= {"vocab_size": model.vocab_size, "share_prefixes": options.share_prefixes, "text": tokenizer.decode}
    loop = PipelineFusion if options.pp else TemporalFusion
    return loop(model, model.kv, **how, lead=group), tokenizer, group


def serve(loop: TemporalFusion, arrivals: Arrivals, refused: list[str], journal: Journal) -> tuple[Records, Samples]:
    """Let requests join as they arrive, and step until none is left; adds to what is refused and to the journal."""
    queue, records, samples = deque(sorted(arrivals, key=lambda each: each[0])), dict[Any, Record](), Samples()
    total, shown, start = len(queue), 0.0, time.perf_counter()
    while queue or loop.live:
        now = time.perf_counter() - start
        while queue and queue[0][0] <= now:
            at_s, request, where = queue.popleft()
            try:
                if request.id in records:
                    raise ValueError(f"`id` must be of no other request, got {request.id!r} again")
                if (rest := journal.rest(request)) is not None:
                    loop.add(rest)
                records[request.id] = Record(request, at_s, [])
            except (ValueError, TypeError) as error:  # of this one alone
                refused.append(f"{where}{error}")
        if not loop.live:
            time.sleep(min(max(0.0, queue[0][0] - now), 0.05) if queue else 0.0)
            continue
        journal.add(emitted := loop.step())
        now = time.perf_counter() - start
        for each in emitted:
            records[each.id].times.append(now)
        kv, tokens = 1 - loop.kv.free_pages / loop.kv.num_pages, loop.latest.num_tokens if loop.latest else 0
        samples.append(Sample(now, len(loop.running), len(loop.waiting), tokens, kv))
        if sys.stderr.isatty() and now - shown > 0.1:
            shown = now
            line = f"{len(records) - len(loop.live)}/{total} done, {len(loop.running)} run, {len(loop.waiting)} wait"
            print(f"\r{now:6.1f} s  {line}, cache {kv:4.0%}, {tokens} tokens a step\033[K", end="", file=sys.stderr)
    if shown:
        print("\r\033[K", end="", file=sys.stderr)
    return list(records.values()), samples


def read_jsonl(options: argparse.Namespace, tokenizer: Any) -> tuple[Arrivals, list[str]]:
    """The requests of a file, and what is wrong with the lines that are none."""
    arrivals, bad = [], []
    for number, line in enumerate(options.jsonl.read_bytes().splitlines(), 1):
        where = f"{options.jsonl}:{number}: "
        try:
            if line.strip():
                arrivals.append((*parse_line(json.loads(line), number, tokenizer, options.new_tokens), where))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            bad.append(f"{where}{error}")
    return arrivals, bad


def parse_line(content: Any, number: int, tokenizer: Any, new_tokens: int) -> tuple[float, Request]:
    """The request of one line, and when it comes; TypeError, ValueError or OverflowError where it is none."""
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str | list):
        raise ValueError("a line must be an object with a `prompt` (text or token ids), got something else")
    ids = tokenizer(prompt).input_ids if isinstance(prompt := content.pop("prompt"), str) else prompt
    at_s, name, stop = float(content.pop("at_s", 0.0)), content.pop("id", number), content.pop("stop", [])
    if not 0 <= at_s < float("inf"):
        raise ValueError(f"`at_s` must be finite and at least 0, got {at_s}")
    options = {key: content.pop(key) for key in ("top_k", "seed") if key in content}
    options |= {key: float(content.pop(key)) for key in ("temperature", "top_p") if key in content}
    new, stop = content.pop("max_new_tokens", new_tokens), [stop] if isinstance(stop, str) else stop
    ends = {"stop_tokens": {tokenizer.eos_token_id}, "stop_strings": stop}
    if content:
        raise ValueError(f"a line must have no other keys, got {sorted(content)}")
    return at_s, Request(name, ids, new, Sampling(**options), **ends)


def generate_trace(options: argparse.Namespace, tokenizer: Any) -> tuple[Arrivals, list[str]]:
    """Poisson arrivals of real text, this file's, with random lengths of prompts and answers."""
    draw, text = random.Random(options.seed), tokenizer(Path(__file__).read_text()).input_ids
    arrivals, now = Arrivals(), 0.0
    for number in range(options.requests):
        start, length = draw.randrange(len(text) // 2), draw.randint(1, options.prompt_tokens)
        arrivals.append((now, Request(number, (text[start:] + text)[:length], draw.randint(1, options.new_tokens)), ""))
        now += draw.expovariate(options.rate)
    return arrivals, []


def write_answers(path: Path, records: Records, journal: Journal, tokenizer: Any) -> None:
    with path.open("w") as file:
        for request, _, _ in records:
            answer = {"id": request.id, "finish": journal.finish[request.id], "tokens": journal.tokens[request.id]}
            file.write(json.dumps({**answer, "text": journal.text(request, tokenizer.decode)}) + "\n")


def table(options: argparse.Namespace, records: Records, samples: Samples, refused: int, reused: int) -> str:
    """What was measured, for people."""
    seconds, new = samples[-1].at_s if samples else 0.0, sum(len(record.times) for record in records)
    layout = f"pp={options.pp or 1} tp={options.tp} sp={options.sp}"
    lines = [f"{layout} {options.policy}: {len(records)} served, {refused} refused"]
    lines.append(f"{'ms':>6} {'p50':>9} {'p90':>9} {'p99':>9} {'most':>9}")
    for name, values in latencies(records).items():
        cells = torch.tensor(values or [0.0]).mul(1e3).quantile(torch.tensor([0.5, 0.9, 0.99, 1.0]))
        lines.append(f"{name:>6} " + " ".join(f"{cell:9.1f}" for cell in cells.tolist()))
    rows, most = sum(each.tokens for each in samples) / max(1, len(samples)), max([0.0, *[each.kv for each in samples]])
    lines.append(f"{new / max(seconds, 1e-9):,.1f} tokens/s; {len(samples)} steps of {rows:.1f} tokens on average")
    lines.append(f"cache at most {most:.0%} of {options.pages} pages; {reused} tokens found in it")
    return "\n".join(lines)


def latencies(records: Records) -> dict[str, list[float]]:
    """Seconds to the first tokens, and between tokens."""
    first = [record.times[0] - record.at_s for record in records if record.times]
    return {"TTFT": first, "TBT": [b - a for record in records for a, b in pairwise(record.times)]}


def plot(path: str, records: Records, samples: Samples) -> None:
    """What ran and waited over time, and how long tokens took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    over_time, times = figure.subplots(2)
    at = [sample.at_s for sample in samples]
    over_time.step(at, [sample.running for sample in samples], label="running", where="post")
    over_time.step(at, [sample.waiting for sample in samples], label="waiting", where="post")
    over_time.step(at, [sample.kv * 100 for sample in samples], label="cache, %", where="post")
    over_time.set(xlabel="s")
    for name, values in latencies(records).items():
        times.ecdf([1e3 * value for value in values] or [0.0], label=name)
    times.set(xlabel="ms", ylabel="share", xscale="log")
    for axes in (over_time, times):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled one)")
    add("--jsonl", type=Path, help="requests; a trace is generated without it")
    add("--out", type=Path, help="where answers go, as JSONL")
    add("--journal", type=Path, help="where each token goes as it comes; what is there already is gone on from")
    add("--timeout", type=float, default=300.0, help="seconds after which a rank that does not come is given up")
    add("--plot", help="where a picture goes")
    add("--pp", type=int, help="stages, each with layers of its own and tp x sp ranks")
    add("--tp", type=int, default=1, help="tensor-parallel ranks")
    add("--sp", type=int, default=1, help="sequence-parallel ranks")
    add("--shift", type=int, default=0, help="up to so many tokens a step is tensor-parallel over all ranks")
    add("--overlap", type=int, default=0, help="cut steps of at least so many tokens into two that take turns")
    add("--policy", choices=POLICIES, default="stall-free")
    add("--tau", type=int, default=64, help="tokens of a step, or of a chunk, that the policy goes by")
    add("--max-tokens", type=int, default=512, help="tokens of a step under any policy")
    add("--max-requests", type=int, default=32, help="that run at a time")
    add("--pages", type=int, default=256)
    add("--page-size", type=int, default=16)
    add("--admission", choices=("whole", "known"), default="whole")
    add("--preemption", choices=("recompute", "swap"), default="recompute")
    add("--share-prefixes", action="store_true", help="begin on what the cache has of equal beginnings")
    add("--requests", type=int, default=32, help="of the trace")
    add("--rate", type=float, default=20.0, help="arrivals a second")
    add("--prompt-tokens", type=int, default=200, help="at most")
    add("--new-tokens", type=int, default=32, help="at most")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
