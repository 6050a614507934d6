"""Three-phase pipelining of one Ulysses attention against the plain one, on two CPU ranks and a simulated link.

The attention is that of a Llama 3.2 1B layer (32 query and 8 KV heads of 64), float32, one prompt, sharded over 2
sequence ranks of one thread each. The link is simulated (`seqpar.comm.SimulatedLink`): exchanges are real, and none
ends before it would at a rate that is set from the attention time measured first, so that communication takes a given
share of the serial time. Serial and pipelined runs alternate.

The efficiency is (T_serial - T_pipelined) / min(C, X), with X the serial run's link time, which follows from its bytes,
and C = T_serial - X. What parts can reach is bounded: with ways in x_i and ways back y_i on the link, and attention
c_i of the parts in their order, no schedule of theirs takes less than

    T_bound = max(x_0 + sum c + y_last,  sum x + c_last + y_last,  sum x + sum y)

where x_0 is the first K, Q and V together. The x_i and y_i follow from the parts' bytes; the c_i are C shared out by
heads and by the keys that each chunk's queries see, as if cutting attention cost nothing: what it does cost counts
against the pipeline. "of the bound" is (T_serial - T_pipelined) / (T_serial - T_bound).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Contender, Row, Timing, check, launch, meta, parser, progress, report, time_rounds
from torch import Tensor

RANKS, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 8, 64
ALPHA_S = 50e-6
TOLERANCE = 1e-5  # float32 sums over some thousand keys in another order leave about 1e-6
TARGET = 0.8
PACKAGES = ("seqpar", "torch")


@dataclass(frozen=True)
class Case:
    """A prompt, the link's share of the serial time, and the parts."""

    tokens: int
    share: float
    head_groups: int
    query_chunks: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, f={self.share:g}, {self.head_groups}x{self.query_chunks} parts"


CASES = (
    *(Case(4096, share, 4, 4, 15) for share in (0.3, 0.5, 0.65)),
    Case(4096, 0.5, 2, 2, 15),
    Case(2048, 0.5, 4, 2, 25),
)
QUICK_CASES = (Case(1024, 0.5, 2, 2, 8),)


class Result(NamedTuple):
    """What rank 0 hands back for a case."""

    serial: Timing
    pipelined: Timing
    link_s: float
    ways_in: list[float]
    ways_back: list[float]
    error: float


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of all tokens in one call of PyTorch's operator."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def run_case(case: Case) -> Result:
    """Check, set the link, time."""
    import seqpar
    from seqpar import comm
    from seqpar.layers import PipelinedUlysses, UlyssesAttention
    from seqpar.partition import HeadMap, even_ranges
    from seqpar.ragged import RaggedBatch

    groups = comm.groups(seqpar.init_mesh(sp=RANKS, device="cpu"))
    heads, group = HeadMap(HEADS, KV_HEADS, 1, RANKS), groups.sp
    plain = UlyssesAttention(heads, HEAD_DIM, group=group)
    ours = PipelinedUlysses(heads, HEAD_DIM, group=group, head_groups=case.head_groups, query_chunks=case.query_chunks)
    torch.manual_seed(0)
    q, k, v = (torch.randn(case.tokens, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    mine = slice(*even_ranges(case.tokens, RANKS)[group.rank()])
    batch, qkv, want = (
        RaggedBatch.prefill([case.tokens]),
        plain.pack(q[mine], k[mine], v[mine]),
        expected(q, k, v)[mine],
    )
    angles = torch.zeros(case.tokens, HEAD_DIM)
    cos, sin = angles.cos(), angles.sin()  # the identity: its time counts, its values need no oracle

    def attend(core: UlyssesAttention) -> Callable[[], Tensor]:
        return lambda: core(qkv, batch, cos, sin)

    with torch.no_grad():
        errors = [check(f"{case.name} {core}", attend(core)(), want, TOLERANCE) for core in (plain, ours)]
        with comm.record() as sent:
            plain(qkv, batch, cos, sin)
        alone = time_rounds([Contender("alone", attend(plain))], 5)[0]
        compute_s = statistics.median(alone.rounds)  # the slowest rank's, alike on all
        link_s = compute_s * case.share / (1 - case.share)
        link = comm.SimulatedLink(alpha_s=ALPHA_S, bytes_per_s=sent.total.num_bytes / (link_s - 2 * ALPHA_S))
        with comm.trace() as t:
            ours(qkv, batch, cos, sin)
        transfers = sorted((i.launched_s, link.seconds(i.num_bytes)) for i in t.intervals if i.kind == "comm")
        ways = [seconds for _, seconds in transfers]
        num_in = case.head_groups * (2 + case.query_chunks)
        with link.on(group):
            contenders = [
                Contender(name, attend(core), link.reset) for name, core in (("serial", plain), ("pipelined", ours))
            ]
            serial, pipelined = time_rounds(contenders, case.rounds)
    return Result(serial, pipelined, link_s, ways[:num_in], ways[num_in:], max(errors))


def ranks(cases: Sequence[Case]) -> list[Result]:
    results = []
    for done, case in enumerate(cases):
        progress(done, len(cases), case.name)
        results.append(run_case(case))
    progress(len(cases), len(cases), "done")
    return results


def bound_s(case: Case, result: Result, compute_s: float) -> float:
    """The least time that the parts can take: see the module."""
    n = case.query_chunks
    piece = case.tokens / RANKS / n
    # Keys that the queries of chunk c see: the mean position of its pieces, one in each rank's slice.
    seen = [sum(rank * case.tokens / RANKS + (c + 0.5) * piece for rank in range(RANKS)) for c in range(n)]
    last = compute_s * seen[-1] / sum(seen) / case.head_groups
    ways_in, ways_back = sum(result.ways_in), sum(result.ways_back)
    return max(
        sum(result.ways_in[:3]) + compute_s + result.ways_back[-1],
        ways_in + last + result.ways_back[-1],
        ways_in + ways_back,
    )


class Efficiency(NamedTuple):
    """Medians over the rounds, each of which pairs a serial and a pipelined run."""

    of_all: float
    of_bound: float
    interval: tuple[float, float]


def efficiency(case: Case, result: Result, *, draws: int = 2000) -> Efficiency:
    """How much of what could be hidden was, with a 95 % interval by the bootstrap over rounds."""
    all_, bound = [], []
    for serial, pipelined in zip(result.serial.rounds, result.pipelined.rounds, strict=True):
        compute_s = serial - result.link_s
        all_.append((serial - pipelined) / min(compute_s, result.link_s))
        bound.append((serial - pipelined) / (serial - bound_s(case, result, compute_s)))
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(bound, k=len(bound))) for _ in range(draws))
    interval = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    return Efficiency(statistics.median(all_), statistics.median(bound), interval)


def rows_of(cases: Sequence[Case], results: Sequence[Result]) -> list[Row]:
    rows = []
    found = [efficiency(case, result) for case, result in zip(cases, results, strict=True)]
    for case, each in zip(cases, found, strict=True):
        rows.append(
            Row(f"{case.name}: of the bound", each.of_bound, "", TARGET, each.of_bound >= TARGET, each.interval)
        )
    for case, result, each in zip(cases, results, found, strict=True):
        rows.append(Row(f"{case.name}: efficiency", each.of_all, ""))
        rows.append(Row(f"{case.name}: serial", result.serial.median_ms, "ms"))
        rows.append(Row(f"{case.name}: pipelined", result.pipelined.median_ms, "ms"))
        compute_s = statistics.median(result.serial.rounds) - result.link_s
        rows.append(Row(f"{case.name}: bound of the parts", bound_s(case, result, compute_s) * 1e3, "ms"))
    return rows


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    cases = QUICK_CASES if args.quick else CASES
    results = launch(RANKS, ranks, cases)
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        ranks=RANKS,
        threads_per_rank=1,
        dtype="float32",
        link="simulated",
        alpha_s=ALPHA_S,
        rounds={case.name: case.rounds for case in cases},
        largest_relative_error=max(result.error for result in results),
        tolerance=TOLERANCE,
    )
    report(args, about, rows_of(cases, results), "three-phase pipeline, 2 gloo ranks, 1 thread each, SIMULATED link")
    spread = [max(t.rounds) / statistics.median(t.rounds) for r in results for t in (r.serial, r.pipelined)]
    print(f"  slowest round of any contender: {max(spread):.1f} times its median")


if __name__ == "__main__":
    main()
