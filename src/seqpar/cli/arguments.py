"""What arguments the commands take; no PyTorch, so that help and bad values need not wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seqpar.cli.parsing import Parser, Tuned, count, duration, positive, shares, whole_file

__all__ = ["parser"]

_OBJECTIVES = ("throughput", "latency", "ttft", "tpot", "memory")
_POLICIES = ("stall-free", "decode-maximal", "full-hybrid", "prefill-first", "request-level", "exclusive")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

_DESCRIPTION = """\
Plan, measure and simulate parallel inference.

  plan       which layout and which techniques, for a model, an accelerator and a number of ranks
  calibrate  measure steps under every layout on the ranks at hand (under torchrun)
  simulate   serve a trace of requests in virtual time, on ranks that need not exist
  info       versions, devices, and which kernels would run here
"""
_EPILOG = """\
`python -m seqpar COMMAND --help` says the rest. Sizes may be written 32k or 1m, with k = 1024.
Bad values get one line on stderr and exit status 2."""

_PLAN = """\
Every line is a plan that no other one beats in latency, throughput and memory at once, the best by --objective
first: replicas x (tp x sp [x pipeline stages]), and what it uses. TTFT and TPOT are of one request on an idle
server; tokens/s, in and out, of a saturated one.

  python -m seqpar plan --model config.json --hardware h200 --ranks 8 --prompt 32k
  python -m seqpar plan --model config.json --hardware 4090 --ranks 8 --prompt 2k --new 512 --objective latency
  python -m seqpar plan --model config.json --hardware h100 --ranks 128 --network ib-ndr400 --json

What is predicted is of data sheets and published measurements (`plan.HARDWARE` names every source), or of the
machine at hand, where --hardware is a file of `calibrate`."""

_CALIBRATE = """\
One rank alone:    python -m seqpar calibrate --model config.json --out costs.json
Eight ranks:       torchrun --nproc-per-node 8 -m seqpar calibrate --model config.json --sp 8 --out costs.json
For `plan`:        torchrun --nproc-per-node 8 -m seqpar calibrate --model config.json --sp 8 --hardware here.json

The layers have random weights of the model's sizes, so a config.json is enough. Every layout that the stored one
reaches is measured: (1, 8) reaches (2, 4), (4, 2) and (8, 1). `--out` is what `simulate --costs` and
`plan.StepCosts.load` read: seconds of steps by their tokens. `--hardware` is what `plan --hardware` and
`plan.Hardware.load` read: operators and links by size, of which any step is made up."""

_SIMULATE = """\
A trace is JSONL, a line for each request:  {"at_s": 0.25, "prompt_tokens": 812, "new_tokens": 64}
Without one, requests are drawn from --seed: --requests, --rate, --prompt, --new.

Costs of steps are predicted for --model on --hardware, or those that `calibrate` measured (--costs), which
depend on a step's number of tokens alone.

Ranks are numbered by replicas, in them by pipeline stages, in them as tp x sp meshes are; there are
ranks / (tp * sp * stages) replicas.

  python -m seqpar simulate --model config.json --hardware h200 --ranks 1024 --tp 8 --rate 400 --requests 100k
  python -m seqpar simulate --costs costs.json --trace trace.jsonl --sp 2 --shift 64 --pages 4096
  python -m seqpar simulate ... --straggler 3:1.5 --fail 17:60:120 --json"""


def parser() -> Parser:
    """All commands."""
    whole = Parser(prog="python -m seqpar", description=_DESCRIPTION, epilog=_EPILOG)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for add in (_plan, _calibrate, _simulate, _info):
        add(commands)
    return whole


def _plan(commands: Any) -> None:
    about = "Search for the best ways to run a model, by the cost model."
    parser = commands.add_parser("plan", help="which layout, which techniques", description=about, epilog=_PLAN)
    add = parser.add_argument
    add("--model", type=whole_file, required=True, help="a Hugging Face config.json, or the folder that it is in")
    add("--hardware", required=True, metavar="NAME", help="an accelerator of `plan.HARDWARE`, such as h200 or 4090, or "
        "a file that `calibrate --hardware` wrote")  # fmt: skip
    add("--network", metavar="NAME", help="between hosts, of `plan.NETWORKS`, instead of the usual one")
    add("--ranks", type=count, metavar="N", help="that there are (default: those of a host)")
    add("--prompt", type=count, default=2048, metavar="N", help="tokens of a prompt (default: 2k)")
    add("--new", type=count, default=256, metavar="N", help="tokens generated for a request (default: 256)")
    add("--requests", type=count, metavar="N", help="that run at a time (default: as many as fit)")
    add("--objective", choices=_OBJECTIVES, default="throughput", help="what the best comes first by")
    add("--wire", choices=("int8", "fp8"), action="append", default=[], help="try this lossy format, too; repeatable")
    add("--weight-bytes", type=int, choices=(1, 2, 4), help="of a weight (default: 2, or as measured)")
    add("--kv-bytes", type=int, choices=(1, 2, 4), help="of a number in the cache (default: 2, or as measured)")
    add("--overhead", type=duration, default=0.0, metavar="S", help="seconds of every step beside the model's")
    add("--most", type=count, default=12, metavar="N", help="lines to print (default: 12)")
    add("--explain", action="store_true", help="also what the best plan's steps are made of")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--plot", type=Path, metavar="FILE", help="write a picture of latency and throughput (needs matplotlib)")


def _calibrate(commands: Any) -> None:
    about = "Measure what a step takes, by its number of tokens, under every layout of the ranks at hand."
    parser = commands.add_parser("calibrate", help="measure the ranks at hand", description=about, epilog=_CALIBRATE)
    add = parser.add_argument
    add("--model", type=whole_file, required=True, help="a Hugging Face config.json, or the folder that it is in")
    add("--tp", type=count, default=1, help="tensor-parallel ranks of the stored layout (default: 1)")
    add("--sp", type=count, default=1, help="sequence-parallel ranks (default: 1)")
    add("--tokens", type=count, nargs="+", default=_SIZES, metavar="N", help="sizes of steps (default: 1 to 4096)")
    add("--rounds", type=count, default=3, help="measurements of each, of which the fastest counts (default: 3)")
    add("--layers", type=count, default=2, help="that are measured, for the whole stack (default: 2)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--out", type=Path, metavar="FILE", help="where the costs of steps go, as JSON")
    add("--hardware", type=Path, metavar="FILE", help="measure operators and links instead, and write them here")
    add("--json", action="store_true", help="print the costs as JSON instead of the table")


def _simulate(commands: Any) -> None:
    about = "Serve requests in virtual time, by the library's own policies, on ranks that need not exist."
    parser = commands.add_parser("simulate", help="serve a trace in virtual time", description=about, epilog=_SIMULATE)
    group = parser.add_argument_group("requests")
    add = group.add_argument
    add("--trace", type=whole_file, metavar="FILE", help="JSONL; see below")
    add("--requests", type=count, default=1000, metavar="N", help="to draw, without --trace (default: 1000)")
    add("--rate", type=positive, default=10.0, metavar="R", help="arrivals a second, over all replicas (default: 10)")
    add("--prompt", type=count, default=1024, metavar="N", help="tokens of a prompt, on average (default: 1024)")
    add("--new", type=count, default=128, metavar="N", help="tokens generated, on average (default: 128)")
    add("--spread", type=duration, default=0.5, help="of lengths: sigma of their logarithms (default: 0.5; 0: alike)")
    add("--bursts", type=positive, default=1.0, help="of arrivals: 1 is Poisson, more is burstier (default: 1)")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add("--write-trace", type=Path, metavar="FILE", help="write the requests as a trace")
    group = parser.add_argument_group("costs")
    add = group.add_argument
    add("--model", type=whole_file, help="a Hugging Face config.json, or the folder that it is in")
    add("--hardware", metavar="NAME", help="an accelerator of `plan.HARDWARE`, such as h200, or a file of `calibrate`")
    add("--costs", type=whole_file, metavar="FILE", help="what `calibrate --out` wrote, instead of both")
    add("--overhead", type=duration, default=0.0, metavar="S", help="seconds of every step beside the model's")
    group = parser.add_argument_group("ranks")
    add = group.add_argument
    add("--ranks", type=count, metavar="N", help="in all (default: one replica's)")
    add("--tp", type=count, default=1, help="tensor-parallel ranks (default: 1)")
    add("--sp", type=count, default=1, help="sequence-parallel ranks (default: 1)")
    add("--stages", type=shares, default=(1.0,), metavar="N", help="of a pipeline: how many, or weights such as 3,3,2")
    add("--shift", type=count, metavar="N", help="up to so many tokens a step is tensor-parallel over tp * sp")
    add("--straggler", type=_straggler, action="append", default=[], metavar="RANK:FACTOR[:FROM[:UNTIL]]",
        help="a rank that is slower by a factor, from and until some second")  # fmt: skip
    add("--fail", type=_failure, action="append", default=[], metavar="RANK:AT[:BACK]",
        help="a rank that dies at a second, and after how many its replica is back (default: never)")  # fmt: skip
    group = parser.add_argument_group("policy and cache")
    add = group.add_argument
    add("--policy", choices=_POLICIES, default="stall-free", help="(default: stall-free)")
    add("--tau", type=count, default=512, metavar="N", help="tokens of a step, or of a chunk (default: 512)")
    add("--tile", type=count, default=1, metavar="N", help="rows that products are computed in (default: 1)")
    add("--max-tokens", type=count, default=8192, metavar="N", help="of a step under any policy (default: 8k)")
    add("--max-requests", type=count, default=256, metavar="N", help="that run at a time in a replica (default: 256)")
    add(
        "--admission", choices=("whole", "known"), default="whole", help="by all tokens that a request may have, or has"
    )
    add("--pages", type=count, metavar="N", help="of each replica's cache (default: what memory holds)")
    add("--page-size", type=count, default=16, metavar="N", help="tokens in a page (default: 16)")
    group = parser.add_argument_group("what comes out")
    add = group.add_argument
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--rows", type=Path, metavar="FILE", help="write a row for each request, as JSONL")
    add("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")


def _info(commands: Any) -> None:
    about = "Versions, devices, collectives, and which implementation each kernel would run here."
    parser = commands.add_parser("info", help="versions, devices, kernels", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _straggler(text: str) -> Tuned:
    return Tuned.parse(text, 3, "RANK:FACTOR[:FROM[:UNTIL]]")


def _failure(text: str) -> Tuned:
    return Tuned.parse(text, 2, "RANK:AT[:BACK]")
