"""The sum over ranks with residual and norm on symmetric memory: checked across processes, then timed.

Ranks are processes, each on a GPU of its own where there are as many, else all on one: PyTorch lets them share one
(`TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`, set here), where they take turns in time slices, so that only whether
results are right is seen. Every call is compared with the definition: the total bit for bit, the norm to twice the
error of the definition in its dtype. Calls are of drawn kinds and sizes, one after another on one memory, each rank
late by a drawn time before its kernel (a kernel that spins) or before its launch; then a recorded graph is replayed
with new numbers. The first wrong result ends the run with exit status 1 and no numbers.

Times are of one rank, whose kernel reads and writes what each of several would in its own memory, against a copy of as
many bytes and against `add_rms_norm`; and, where each rank has a GPU, of all ranks against the group's all-reduce
followed by `add_rms_norm`.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from common import Row, WrongResultError, launch, meta, parser, report
from torch import Tensor

from seqpar import comm
from seqpar.kernels import add_rms_norm
from seqpar.kernels.all_reduce_norm import Shots, reference
from seqpar.kernels.spin import spin
from seqpar.partition import even_ranges

EPS, TARGET = 1e-5, 0.85
KINDS: tuple[Shots, ...] = ("one_shot", "two_shot", "sharded")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def partials(p: int, tokens: int, width: int, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """[p + 2, T, M]: those of all ranks, the residual, and rows of which the first is the weight."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(p + 2, max(tokens, 1), width, generator=draw).to(dtype).to(device)


def check_call(found: tuple[Tensor, Tensor], x: Tensor, rows: slice, what: str) -> None:
    """Raise WrongResultError unless a call gave what the definition gives."""
    normed, total = reference.all_reduce_norm(list(x[:-2]), x[-2], x[-1, 0], EPS)
    wide = x.double()
    exact, _ = reference.all_reduce_norm([total.double()], torch.zeros_like(wide[0]), wide[-1, 0], EPS)
    if not torch.equal(found[1], total[rows]):
        raise WrongResultError(f"{what}: the total differs")
    bound = 2 * (normed.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    error = (found[0].double() - exact).abs().max()
    if not error <= bound:
        raise WrongResultError(f"{what}: error {error:.3g} above {bound:.3g}")


def soak(memory: comm.SymmetricMemory, width: int, tokens: int, calls: int, late_s: float) -> int:
    """Calls of drawn kinds and sizes with ranks that are late; how many were made."""
    p, rank, device = memory.group.size(), memory.group.rank(), memory.device
    draw, late = random.Random(0), random.Random(rank + 1)
    for call in range(calls):
        n, kind, dtype = draw.randint(1, tokens), draw.choice(KINDS), draw.choice(DTYPES)
        x = partials(p, n, width, dtype, call, device)
        rows = slice(*even_ranges(n, p)[rank]) if kind == "sharded" else slice(None)
        if late.random() < 0.3:
            time.sleep(late_s * late.random())
        if device.type == "cuda" and late.random() < 0.3:
            spin(late_s * late.random(), ctas=1)
        handle, total = memory.launch(x[rank], x[-2][rows], x[-1, 0], EPS, shots=kind)
        check_call((handle.wait(), total), x, rows, f"call {call}, {kind} of {n} x {width} {dtype}")
    return calls


def replay(memory: comm.SymmetricMemory, width: int, replays: int) -> int:
    """A graph of three calls, replayed with new numbers in the same tensors; an odd number, so halves alternate."""
    p, rank, device = memory.group.size(), memory.group.rank(), memory.device
    x = partials(p, 8, width, torch.bfloat16, 0, device)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    rows = slice(*even_ranges(8, p)[rank])

    def calls() -> list[tuple[Tensor, Tensor, slice]]:
        found = []
        for kind in KINDS:
            here = rows if kind == "sharded" else slice(None)
            handle, total = memory.launch(x[rank], x[-2][here], x[-1, 0], EPS, shots=kind)
            found.append((handle.wait(), total, here))
        return found

    with torch.cuda.stream(side):
        calls()  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        found = calls()
    for number in range(replays):
        x.copy_(partials(p, 8, width, torch.bfloat16, number, device))
        graph.replay()
        for kind, (normed, total, here) in zip(KINDS, found, strict=True):
            check_call((normed, total), x, here, f"replay {number}, {kind}")
    return replays


def checked(width: int, tokens: int, calls: int) -> tuple[int, int]:
    """On each rank: the soak, on the caller's stream and on one of the memory's, and graphs."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    group = comm.groups(comm.init_mesh(tp=int(os.environ["WORLD_SIZE"]), device="cpu")).tp
    made = replayed = 0
    for overlap in (False, True):
        memory = comm.SymmetricMemory(tokens * width * 4, group=group, device=device, blocks=16, overlap=overlap)
        made += soak(memory, width, tokens, calls, 0.005)
        replayed += replay(memory, width, 5)
    return made, replayed


def times_of(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median microseconds of each in graphs of ten, all by turns."""
    graphs = {}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], capture_error_mode="thread_local"):
            for _ in range(10):
                run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) * 100)
    return {name: statistics.median(each) for name, each in found.items()}


def timed_alone(width: int, tokens: int, rounds: int) -> dict[str, tuple[float, dict[str, float]]]:
    """Kinds of a group of one: bytes that the kernel moves, and times of it, of a copy of them, of `add_rms_norm`."""
    group = comm.groups(comm.init_mesh(tp=1, device="cpu")).tp
    memory = comm.SymmetricMemory(
        tokens * width * 2, group=group, blocks=torch.cuda.get_device_properties(0).multi_processor_count
    )
    x = partials(1, tokens, width, torch.bfloat16, 0, memory.device)
    found = {}
    for kind in KINDS:
        moved = (6 if kind == "one_shot" else 8) * x[0].nbytes
        source = torch.empty(moved // 2, dtype=torch.uint8, device=memory.device)
        target = torch.empty_like(source)
        runs: dict[str, Callable[[], Any]] = {
            "kernel": lambda kind=kind: memory.launch(x[0], x[-2], x[-1, 0], EPS, shots=kind)[0].wait(),  # type: ignore[misc]
            "copy": lambda target=target, source=source: target.copy_(source),  # type: ignore[misc]
            "add_rms_norm": lambda: add_rms_norm(x[-2], x[0], x[-1, 0], EPS),
        }
        found[kind] = (float(moved), times_of(runs, rounds))
    return found


def timed_together(width: int, tokens: int, rounds: int) -> dict[str, float]:
    """On each rank with a GPU of its own: microseconds of each kind, and of NCCL's sum with `add_rms_norm` after it."""
    device = torch.device("cuda", int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    p, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    comm.init_mesh(tp=p, device="cpu")
    group = torch.distributed.new_group(backend="nccl")
    found = {}
    x = partials(p, tokens, width, torch.bfloat16, 0, device)
    rows = slice(*even_ranges(tokens, p)[rank])
    runs: dict[str, Callable[[], Any]] = {
        "collectives": lambda: comm.all_reduce_norm(x[rank], x[-2], x[-1, 0], EPS, group=group)
    }
    for multimem in (False, True):
        with suppress(ValueError):  # no switch
            memory = comm.SymmetricMemory(x[0].nbytes, group=group, device=device, multimem=multimem)
            for kind in KINDS:
                part = x[-2][rows] if kind == "sharded" else x[-2]
                runs[f"{kind}{' multimem' if multimem else ''}"] = lambda kind=kind, part=part, memory=memory: (
                    memory.launch(  # type: ignore[misc]
                        x[rank], part, x[-1, 0], EPS, shots=kind
                    )[0].wait()
                )
    found.update(times_of(runs, rounds))
    return found


def main() -> int:
    """Check everything, then time what this machine can."""
    args = parser(__doc__ or "")
    args.add_argument("--ranks", type=int, default=2)
    args.add_argument("--check-only", action="store_true", help="no times: for a run under a sanitizer")
    given = args.parse_args()
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    calls, rounds = (40, 5) if given.quick else (300, 20)
    width, tokens = 1024, 64
    made, replayed = launch(given.ranks, checked, width, tokens, calls)
    print(f"{given.ranks} ranks on {torch.cuda.device_count()} GPU(s): {made} calls and {replayed} replays, all right")
    if given.check_only:
        return 0
    rows = [Row("calls checked", made, "calls"), Row("replays checked", replayed, "replays")]
    for m, t in ((4096, 1), (4096, 64), (8192, 64), (4096, 4096), (8192, 16384)):
        for kind, (_, times) in launch(1, timed_alone, m, t, rounds).items():
            share = times["copy"] / times["kernel"]
            rows.append(
                Row(f"{kind} {t} x {m}, one rank", share, "copy", TARGET, share >= TARGET if t >= 4096 else None)
            )
            rows.append(Row(f"{kind} {t} x {m}, one rank", times["kernel"], "us"))
            rows.append(Row(f"{kind} {t} x {m}, one rank, add_rms_norm alone", times["add_rms_norm"], "us"))
    if torch.cuda.device_count() >= given.ranks:
        for m, t in ((4096, 1), (4096, 64), (8192, 64), (8192, 1024), (8192, 16384)):
            for name, time_us in launch(given.ranks, timed_together, m, t, rounds).items():
                rows.append(Row(f"{name} {t} x {m}, {given.ranks} ranks", time_us, "us"))
    name = torch.cuda.get_device_name()
    report(given, meta(name, ["torch", "triton"], ranks=given.ranks), rows, "Sum over ranks with residual and norm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
