"""seqpar beside every peer that runs on a CPU: one command, results checked first, ratios, and where the time goes.

Parts, each on gloo ranks of one compute thread, float32, shapes of Llama 3.2 1B where nothing else is said:

*layer*, 2 ranks: a decoder layer under tensor parallelism, against PyTorch's `parallelize_module` (DTensor) and
transformers' `tp_plan`, as `benchmarks/layers.py` has it.

*mlp*, 2 ranks: the gated MLP from column- and row-parallel linears, against those of FairScale, Megatron-Core and
DTensor; *train* is forward and backward, up to the gradients of input and weights.

*ulysses*, 2 ranks: causal attention of tokens that are sharded, against DeepSpeed's `DistributedAttention`, its form
for Transformers (`UlyssesSPAttentionHF`) and yunchang.

*ring*, 2 ranks, tokens in zigzag: against ring-flash-attn, yunchang and PyTorch's `context_parallel`. *hybrid*, 4 ranks
in rows of 2: against yunchang, tokens in slices. The peers call the flash-attn that a GPU would have; here a stand-in
(`stubs/flash_attn`) gives them the same fused operator of PyTorch that all others use.

*batching*, 1 rank: the seeded trace of `benchmarks/batching.py` under the policy `StallFree`, against Transformers'
continuous batching.

Every contender gets the same weights and inputs, and must give the result of one process in float64 (*batching*: the
greedy tokens of each request alone); a wrong one ends the run with exit status 1 and no numbers. Then they take turns
in every round. A ratio is our time by the peer's, paired, with a 95 % interval. Where we are not ahead, both are
profiled there and then: milliseconds in matrix products, attention, other operators, and the rest, which is waiting for
the other rank and Python. `make peers` installs what is compared with; a peer that does not run is listed with its
error.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import batching
import layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Contender, Row, Timing, launch, meta, parser, progress, ratio, report
from layers import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, Case, Guard, Result
from torch import Tensor, nn

PACKAGES = (
    *("seqpar", "torch", "transformers", "accelerate", "deepspeed", "yunchang"),
    *("ring-flash-attn", "fairscale", "megatron-core"),
)
CASES = (
    *(Case("decode", 1, 40), Case("decode", 8, 30), Case("decode", 64, 16), Case("prefill", 512, 10)),
    *(Case("mlp", 8, 40), Case("mlp", 64, 30), Case("mlp", 512, 12), Case("train", 512, 8)),
    *(Case("ulysses", 64, 60), Case("ulysses", 512, 40), Case("ulysses", 2048, 10)),
    *(Case("ring", 512, 40), Case("ring", 2048, 10)),
)
HYBRID = (Case("hybrid", 1024, 20),)
QUICK = (Case("decode", 8, 6), Case("mlp", 64, 6), Case("train", 64, 3), Case("ulysses", 512, 6), Case("ring", 512, 6))
QUICK_HYBRID = (Case("hybrid", 512, 4),)
PROFILED_CALLS = 5
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


# Where the time goes.


class Spent(NamedTuple):
    """Milliseconds of one call on rank 0."""

    products: float
    attention: float
    others: float
    rest: float

    def __str__(self) -> str:
        return (
            f"{self.products:.2f} products, {self.attention:.2f} attention, {self.others:.2f} other operators, "
            f"{self.rest:.2f} waiting and Python"
        )


def profiled(contender: Contender) -> Spent:
    """What a contender does in its time, by PyTorch's profiler; all ranks call it."""
    from torch.profiler import ProfilerActivity, profile

    wall_ms = 0.0
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED_CALLS):
            contender.prepare()
            dist.barrier()
            with torch.profiler.record_function("peers::call"):
                contender.run()
    spent = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for event in found.events():
        inside, at = False, event
        while at is not None and not inside:
            inside, at = at.name == "peers::call", at.cpu_parent
        if event.name == "peers::call":
            wall_ms += event.cpu_time_total / 1e3
        elif inside and event.name.startswith(("aten::", "mkldnn::")):
            kind = next((kind for kind, names in KINDS.items() if event.name in names), "others")
            spent[kind] += event.self_cpu_time_total / 1e3
    each = {kind: ms / PROFILED_CALLS for kind, ms in spent.items()}
    return Spent(**each, rest=wall_ms / PROFILED_CALLS - sum(each.values()))


class Findings:
    """What has been measured so far, with the profiles of those that are behind and of whom they are behind."""

    def __init__(self) -> None:
        self.profiles: dict[str, Spent] = {}

    def measure(
        self, case: Case, contenders: Sequence[Contender], expected: Tensor, guard: Guard, result: Result
    ) -> None:
        """As `layers.measure_all`; then a profile where a peer is as fast as ours, by times all ranks agree on."""
        layers.measure_all(case, contenders, expected, guard, result)
        running = {c.name: c for c in contenders if f"{case.name} {c.name}" in result.errors}
        ours, *peers = result.timings[case.name]
        behind = [peer.name for peer in peers if ratio(ours, peer).value >= 1]
        for name in (ours.name, *behind) if behind else ():
            self.profiles[f"{case.name} {name}"] = profiled(running[name])


# The gated MLP.


class Projections(NamedTuple):
    """Unsharded weights, [out, in]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class PeerMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) from a peer's linears."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return _first(self.down_proj(F.silu(_first(self.gate_proj(x))) * _first(self.up_proj(x))))


def _first(out: Any) -> Tensor:
    """The output of a linear that may return its bias beside it."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def projections() -> Projections:
    torch.manual_seed(0)
    shapes = ((MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP))
    return Projections(*(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes))


def plain_mlp(weights: Projections) -> PeerMLP:
    linears = [nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight.clone())
    return PeerMLP(*linears)


def fill(linears: Sequence[nn.Module], weights: Projections) -> None:
    """Give a peer's two column-parallel and one row-parallel linear this rank's slices."""
    with torch.no_grad():
        for linear, weight, dim in zip(linears, weights, (0, 0, 1), strict=True):
            own: Any = linear.weight
            own.copy_(weight.chunk(dist.get_world_size(), dim)[dist.get_rank()])


def seqpar_mlp(weights: Projections) -> nn.Module:
    from seqpar import comm
    from seqpar.layers import ParallelMLP

    group = comm.groups(comm.init_mesh(tp=dist.get_world_size(), sp=1)).tp
    return ParallelMLP.from_module(plain_mlp(weights), group=group)


def dtensor_mlp(weights: Projections) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    plan["down_proj"] = RowwiseParallel()
    return parallelize_module(plain_mlp(weights), init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def fairscale_mlp(weights: Projections) -> nn.Module:
    from fairscale.nn.model_parallel import initialize_model_parallel
    from fairscale.nn.model_parallel.initialize import model_parallel_is_initialized
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if not model_parallel_is_initialized():
        initialize_model_parallel(dist.get_world_size())
    columns = [ColumnParallelLinear(HIDDEN, MLP, bias=False, gather_output=False) for _ in range(2)]
    row = RowParallelLinear(MLP, HIDDEN, bias=False, input_is_parallel=True)
    fill((*columns, row), weights)
    return PeerMLP(*columns, row)


def megatron_mlp(weights: Projections) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size())
    config = ModelParallelConfig(tensor_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True)
    options: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": False}
    columns = [ColumnParallelLinear(HIDDEN, MLP, gather_output=False, **options) for _ in range(2)]
    row = RowParallelLinear(MLP, HIDDEN, input_is_parallel=True, **options)
    fill((*columns, row), weights)
    return PeerMLP(*columns, row)


def waited(x: Tensor) -> Tensor:
    """A result of DTensor's may still be on its way; in a model the next operator would wait for it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x


def mlp_contender(name: str, mlp: nn.Module, x: Tensor, upstream: Tensor | None) -> Contender:
    """Forward, or with an upstream gradient also backward, giving the gradient of the input."""
    if upstream is None:
        return Contender(name, lambda: waited(mlp(x)))
    given = x.clone().requires_grad_()

    def prepare() -> None:
        given.grad = None
        mlp.zero_grad()

    def run() -> Tensor:
        with torch.enable_grad():
            out = mlp(given)
            waited(out)
            out.backward(upstream)
        assert given.grad is not None
        return waited(given.grad)

    return Contender(name, run, prepare)


def run_mlp(cases: Sequence[Case], guard: Guard, result: Result, findings: Findings) -> None:
    weights = projections()
    makes = {"DTensor": dtensor_mlp, "FairScale": fairscale_mlp, "Megatron": megatron_mlp}
    made = {name: guard.attempt(name, lambda make=make: make(weights)) for name, make in makes.items()}
    mlps = {"seqpar": seqpar_mlp(weights), **{name: mlp for name, mlp in made.items() if mlp is not None}}
    oracle = plain_mlp(weights).double()
    for case in cases:
        progress(0, 1, case.name)
        torch.manual_seed(case.tokens)
        x, upstream = torch.randn(2, case.tokens, HIDDEN)
        wanted = upstream if case.phase == "train" else None
        reference = mlp_contender("one process", oracle, x.double(), None if wanted is None else wanted.double())
        expected = reference.run()
        contenders = [mlp_contender(name, mlp, x, wanted) for name, mlp in mlps.items()]
        findings.measure(case, contenders, expected, guard, result)


# Attention over sharded tokens.


class HFAttention(nn.Module):
    """What Transformers' attention functions read of the module that calls them."""

    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def deepspeed_hf(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    import deepspeed.comm
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.comm.init_distributed("gloo", verbose=False)
    attention = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS["sdpa"],
        batch_size=1,
        attn_head_count=HEADS,
        attn_head_size=HEAD_DIM,
        kv_head_count=KV_HEADS,
        num_hidden_layers=1,
        process_group=dist.group.WORLD,
        local_seq_length=len(q),
        global_seq_length=case.tokens,
    )
    owner = HFAttention().eval()
    positions = (torch.arange(len(q)) + dist.get_rank() * len(q))[None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

    def run() -> Tensor:
        out, _ = attention(owner, q, k, v, None, position_ids=positions, dropout=0.0, scaling=HEAD_DIM**-0.5)
        return out[0]

    return Contender("deepspeed HF", run)


def run_ulysses(case: Case, guard: Guard, result: Result, findings: Findings) -> None:
    shards, expected = layers.ulysses_inputs(case)
    contenders = [layers.seqpar_ulysses(case, *shards)]
    makes = (
        ("deepspeed", layers.deepspeed_ulysses),
        ("deepspeed HF", deepspeed_hf),
        ("yunchang", layers.yunchang_ulysses),
    )
    for name, make in makes:
        made = guard.attempt(name, lambda make=make: make(case, *shards))
        contenders += [] if made is None else [made]
    findings.measure(case, contenders, expected, guard, result)


def attention_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Whole q, k, v[T, heads, D], and what attention over all tokens gives, [T, H, D] in float64."""
    torch.manual_seed(case.tokens)
    whole = [torch.randn(case.tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (x.double().transpose(0, 1)[None] for x in whole)
    return whole, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def ring_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    layers.stand_in_for_flash_attn()
    if "ring_flash_attn" not in sys.modules:
        # Its package imports adapters first, which need a name that Transformers 5 no longer has.
        found = importlib.util.find_spec("ring_flash_attn")
        if found is None:
            raise ModuleNotFoundError("No module named 'ring_flash_attn'")
        package = types.ModuleType("ring_flash_attn")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["ring_flash_attn"] = package
    from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

    q, k, v = (x[None] for x in (q, k, v))
    return Contender(
        "ring-flash-attn", lambda: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD)[0]
    )


def yunchang_grid(columns: int, ring: str, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Rows of `columns` ranks exchange heads, the columns are rings."""
    layers.stand_in_for_flash_attn()
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    ranks = dist.get_world_size()
    set_seq_parallel_pg(columns, ranks // columns, dist.get_rank(), ranks)
    attention = LongContextAttention(ring_impl_type=ring, attn_type=AttnType.FA)
    q, k, v = (x[None] for x in (q, k, v))
    return Contender("yunchang", lambda: attention(q, k, v, causal=True)[0])


def context_parallel(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """PyTorch's, which patches `scaled_dot_product_attention` inside of a context and takes the head-tail placement."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as context

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    group = HEADS // KV_HEADS

    def run() -> Tensor:
        with context(mesh, buffers=[torch.zeros(4 * dist.get_world_size())], buffer_seq_dims=[0]):
            out = F.scaled_dot_product_attention(
                q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
            )
        return out[0].transpose(0, 1)

    return Contender("context_parallel", run)


def run_ring(case: Case, guard: Guard, result: Result, findings: Findings) -> None:
    from seqpar import comm
    from seqpar.layers import RingAttention
    from seqpar.partition import HeadMap
    from seqpar.ragged import RaggedBatch

    group = comm.groups(comm.init_mesh(tp=1, sp=dist.get_world_size())).sp
    ring = RingAttention(HeadMap(HEADS, KV_HEADS, 1, group.size()), HEAD_DIM, group=group, placement="zigzag")
    whole, expected = attention_inputs(case)
    batch = RaggedBatch.prefill([case.tokens])
    mine = ring.rows(batch)
    q, k, v = (x[mine].contiguous() for x in whole)
    contenders = [Contender("seqpar", lambda: ring(q, k, v, batch))]
    makes: tuple[tuple[str, Callable[[], Contender]], ...] = (
        ("ring-flash-attn", lambda: ring_flash_attn(q, k, v)),
        ("yunchang", lambda: yunchang_grid(1, "zigzag", q, k, v)),
        ("context_parallel", lambda: context_parallel(q, k, v)),
    )
    for name, make in makes:
        made = guard.attempt(name, make)
        contenders += [] if made is None else [made]
    findings.measure(case, contenders, expected[mine], guard, result)


def run_hybrid(case: Case, guard: Guard, result: Result, findings: Findings) -> None:
    from seqpar import comm
    from seqpar.layers import USPAttention
    from seqpar.partition import HeadMap
    from seqpar.ragged import RaggedBatch

    ranks = dist.get_world_size()
    groups = comm.split_groups(comm.groups(comm.init_mesh(tp=1, sp=ranks)).sp, 2)
    grid = USPAttention(HeadMap(HEADS, KV_HEADS, 1, ranks), HEAD_DIM, groups=groups, placement="contiguous")
    whole, expected = attention_inputs(case)
    batch = RaggedBatch.prefill([case.tokens])
    mine = grid.rows(batch)
    q, k, v = (x[mine].contiguous() for x in whole)
    contenders = [Contender("seqpar", lambda: grid(q, k, v, batch))]
    made = guard.attempt("yunchang", lambda: yunchang_grid(2, "basic", q, k, v))
    contenders += [] if made is None else [made]
    findings.measure(case, contenders, expected[mine], guard, result)


# Requests that come one by one.


PEER = "continuous batching"
METRICS: dict[str, Callable[[batching.Served], float]] = {
    "to the last token": lambda run: run.seconds,
    "longest wait for a token": lambda run: max(run.gaps_s),
}


class Serving(NamedTuple):
    """Every round of ours and of the peer, and why that did not run."""

    served: dict[str, list[batching.Served]]
    error: str | None


@torch.no_grad()
def serving(rounds: int, quick: bool) -> Serving:
    import seqpar
    from seqpar import comm
    from seqpar.batching import FullHybrid, StallFree

    model = batching.quick(batching.BUNDLED) if quick else batching.BUNDLED
    mesh = comm.init_mesh(tp=1, sp=1, device="cpu")
    loaded = seqpar.hf.load(batching.CHECKPOINT, mesh, dtype=torch.float32, progress=False)
    stepper = seqpar.hf.Stepper(loaded, num_pages=2 * batching.LIVE + 1, page_size=batching.PAGE)
    arrivals = batching.trace(model, stepper.vocab_size, batching.LIVE)
    unit_s, group = batching.lone_prompt_s(stepper, model.long), comm.groups(mesh).flat
    margins = batching.Margins(stepper)
    options = (stepper.kv, stepper.vocab_size, arrivals, unit_s)
    alone = batching.through(margins, *options, FullHybrid(), 1, group)
    assert alone is not None
    left = iter(margins.found)
    close = [[next(left) for _ in tokens] for tokens in alone.tokens]
    peer, error = batching.open_peer(batching.CHECKPOINT, arrivals)
    policy = StallFree(model.tau, batching.TILE)
    served: dict[str, list[batching.Served]] = {}
    names = ["seqpar", *([PEER] if peer else [])]
    for turn in range(rounds):
        progress(turn, rounds, "batching")
        for at in range(len(names)):
            name = names[(at + turn) % len(names)]
            if name == "seqpar":
                run = batching.through(stepper, *options, policy, batching.LIVE, group)
            elif peer is not None:
                try:
                    run = peer.serve(arrivals, unit_s)
                except Exception as failed:  # whatever it is, it is theirs
                    peer, error = None, f"{type(failed).__name__}: {failed}"
                    continue
            assert run is not None
            batching.compare(name, run, alone, close)
            served.setdefault(name, []).append(run)
    if peer is None:
        served.pop(PEER, None)
    else:
        peer.close()
    return Serving(served, error)


# The ranks' programs.


class Found(NamedTuple):
    """What rank 0 of a launch hands back."""

    result: Result
    profiles: dict[str, Spent]


@torch.no_grad()
def ranks(cases: Sequence[Case], folder: Path) -> Found:
    guard, result, findings = Guard(), Result({}, {}, {}, {}), Findings()
    of_layers = [case for case in cases if case.phase in ("decode", "prefill")]
    if of_layers:
        layers.run_layers(of_layers, folder, guard, result, len(of_layers), findings.measure)
    of_mlps = [case for case in cases if case.phase in ("mlp", "train")]
    if of_mlps:
        run_mlp(of_mlps, guard, result, findings)
    runs = {"ulysses": run_ulysses, "ring": run_ring, "hybrid": run_hybrid}
    for case in cases:
        if case.phase in runs:
            progress(0, 1, case.name)
            runs[case.phase](case, guard, result, findings)
    result.missing.update(guard.missing)
    return Found(result, findings.profiles)


# The report.


class Pair(NamedTuple):
    """Ours beside one peer in one case."""

    case: str
    ours: Timing
    peer: Timing

    @property
    def row(self) -> Row:
        found = ratio(self.ours, self.peer)
        return Row(f"{self.case}: ÷ {self.peer.name}", found.value, "x", 1.0, found.value < 1, (found.low, found.high))


def pairs_of(result: Result) -> list[Pair]:
    return [Pair(case, ours, peer) for case, (ours, *peers) in result.timings.items() for peer in peers]


def pairs_of_serving(found: Serving) -> list[Pair]:
    if PEER not in found.served:
        return []
    timings = [
        [Timing(name, tuple(metric(run) for run in found.served[name])) for name in ("seqpar", PEER)]
        for metric in METRICS.values()
    ]
    return [Pair(f"batching, {what}", ours, peer) for what, (ours, peer) in zip(METRICS, timings, strict=True)]


def table(pairs: Sequence[Pair], profiles: dict[str, Spent], missing: dict[str, str]) -> str:
    lines = ["| case | peer | seqpar | peer | ratio | 95 % interval | |", "|---|---|---:|---:|---:|:---:|---|"]
    for pair in pairs:
        row = pair.row
        assert row.interval is not None
        low, high = row.interval
        verdict = "ahead" if high < 1 else "**behind**" if low > 1 else "level"
        lines.append(
            f"| {pair.case} | {pair.peer.name} | {pair.ours.median_ms:.3g} ms | {pair.peer.median_ms:.3g} ms "
            f"| {row.value:.2f} | {low:.2f} to {high:.2f} | {verdict} |"
        )
    if profiles:
        lines += ["", "Where a median is not ahead, one call on rank 0, in milliseconds:", ""]
        lines += ["| | products | attention | other operators | waiting and Python |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in spent) + " |" for name, spent in profiles.items()]
    lines += ["", "Not run here:", ""] if missing else []
    lines += [f"* {name}: `{error}`" for name, error in missing.items()]
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", default="", help="cases whose name contains this, e.g. 'ring'")
    args = arguments.parse_args()
    cases, hybrid = (QUICK, QUICK_HYBRID) if args.quick else (CASES, HYBRID)
    cases, hybrid = (tuple(c for c in some if args.only in c.name) for some in (cases, hybrid))
    pairs: list[Pair] = []
    profiles: dict[str, Spent] = {}
    missing: dict[str, str] = {}
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count, some in ((2, cases), (4, hybrid)):
            if some:
                found = launch(count, ranks, some, Path(folder))
                pairs += pairs_of(found.result)
                profiles |= found.profiles
                missing |= found.result.missing
                errors |= found.result.errors
    if args.only in "batching":
        served = launch(1, serving, 1 if args.quick else 5, args.quick)
        pairs += pairs_of_serving(served)
        missing |= {} if served.error is None else {"continuous batching": served.error}
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        dtype="float32",
        rounds={case.name: case.rounds for case in (*cases, *hybrid)},
        largest_relative_error=max(errors.values(), default=0.0),
        tolerance=layers.TOLERANCE,
        profiles={name: spent._asdict() for name, spent in profiles.items()},
        peers_that_did_not_run=missing,
    )
    rows = [pair.row for pair in pairs]
    report(
        args, about, rows, "time of seqpar ÷ time of the peer, gloo, 1 thread a rank", table(pairs, profiles, missing)
    )
    if errors:
        print(
            f"  results checked: largest relative error {max(errors.values()):.1e} (tolerance {layers.TOLERANCE:.0e})"
        )
    for name, spent in profiles.items():
        print(f"  {name}: {spent}")
    for name, error in missing.items():
        print(f"  not run: {name}: {error}")
    behind = [row.name for row in rows if not row.ok]
    print(
        f"  ahead in {len(rows) - len(behind)} of {len(rows)} rows"
        + (f"; not in {', '.join(behind)}" if behind else "")
    )
    slowest = [max(p.ours.rounds) / statistics.median(p.ours.rounds) for p in pairs]
    print(f"  slowest round of ours: {max(slowest, default=0):.1f} times its median")


if __name__ == "__main__":
    main()
