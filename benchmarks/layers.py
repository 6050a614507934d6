"""One decoder layer and one Ulysses attention against the peers, on two CPU ranks of one thread each.

The layer is that of Llama 3.2 1B (model dim 2048, 32 query and 8 KV heads, MLP dim 8192) in float32, tensor-parallel
over 2 ranks. Decode: T requests of one new token each over a cache of 512 tokens. Prefill: one prompt of T tokens into
an empty cache. Peers run Hugging Face's own layer with its DynamicCache, sharded by PyTorch's `parallelize_module`
(DTensor) or by transformers' `tp_plan`. All get the same weights and inputs; caches, masks and rotary tables, which a
model makes once per step and not once per layer, are made outside the timed call.

Ulysses attention: q, k, v of T tokens sharded over 2 sequence ranks, causal, against DeepSpeed's DistributedAttention
and yunchang's UlyssesAttention. The peers call PyTorch's fused attention; ours is built on the same operator.

`make peers` installs what is compared with; a peer that does not run is listed with its error.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    Contender,
    Row,
    Timing,
    check,
    launch,
    meta,
    parser,
    progress,
    ratio,
    report,
    time_rounds,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 2
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2048, 8192, 32, 8, 64, 512
# float32 against one process in float64: sums over 2048 and 8192 terms leave about 1e-6.
TOLERANCE = 1e-5
PACKAGES = ("seqpar", "torch", "transformers", "accelerate", "deepspeed", "yunchang")


@dataclass(frozen=True)
class Case:
    """How many tokens, how they are divided into requests, and how often to time it."""

    phase: str
    tokens: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.phase} {self.tokens}"

    @property
    def requests(self) -> int:
        return self.tokens if self.phase == "decode" else 1

    @property
    def new(self) -> int:
        return self.tokens // self.requests

    @property
    def context(self) -> int:
        return CONTEXT if self.phase == "decode" else 0


LAYER_CASES = (
    Case("decode", 1, 100),
    Case("decode", 8, 60),
    Case("decode", 64, 30),
    Case("prefill", 512, 20),
    Case("prefill", 2048, 12),
)
QUICK_LAYER_CASES = (Case("decode", 1, 20), Case("decode", 8, 10), Case("decode", 64, 6), Case("prefill", 512, 4))
ULYSSES_CASES = (
    Case("ulysses", 8, 100),
    Case("ulysses", 64, 100),
    Case("ulysses", 512, 60),
    Case("ulysses", 2048, 25),
)
QUICK_ULYSSES_CASES = (Case("ulysses", 64, 20), Case("ulysses", 512, 10))
TARGETS = {"decode": 0.5, "prefill": 0.95, "ulysses": 0.8}


class Inputs(NamedTuple):
    """What all contenders of a layer case are given."""

    x: Tensor  # [T, M]
    cos: Tensor  # [T, D]
    sin: Tensor
    past_k: Tensor  # [N, G, context, D]
    past_v: Tensor


class Result(NamedTuple):
    """What rank 0 hands back."""

    timings: dict[str, list[Timing]]
    errors: dict[str, float]
    missing: dict[str, str]
    collectives: dict[str, int]


# One decoder layer.


def reference_model(folder: Path) -> nn.Module:
    """A one-layer Llama with random weights, the same on every rank, saved once for those who load from disk."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model


def make_inputs(case: Case, model: nn.Module) -> Inputs:
    torch.manual_seed(case.tokens)
    x = torch.randn(case.tokens, HIDDEN)
    positions = torch.arange(case.new).add(case.context).repeat(case.requests)[None]
    cos, sin = model.model.rotary_emb(x, positions)
    past_k, past_v = torch.randn(2, case.requests, KV_HEADS, case.context, HEAD_DIM)
    return Inputs(x, cos[0], sin[0], past_k, past_v)


def hf_contender(name: str, case: Case, layer: nn.Module, inputs: Inputs, kv_heads: slice) -> Contender:
    """Hugging Face's layer, whole or sharded, with a cache that is put back before every call."""
    from transformers import DynamicCache

    dtype = next(layer.parameters()).dtype
    hidden = inputs.x.to(dtype).view(case.requests, case.new, HIDDEN)
    tables = tuple(t.to(dtype).view(case.requests, case.new, HEAD_DIM) for t in (inputs.cos, inputs.sin))
    past = [t[:, kv_heads].to(dtype).contiguous() for t in (inputs.past_k, inputs.past_v)]
    state = {"cache": DynamicCache()}

    def prepare() -> None:
        state["cache"] = DynamicCache()
        if case.context:
            state["cache"].update(*past, 0)

    def run() -> Tensor:
        out = layer(hidden, position_embeddings=tables, past_key_values=state["cache"], use_cache=True)
        return (out[0] if isinstance(out, tuple) else out).reshape(case.tokens, HIDDEN)

    return Contender(name, run, prepare)


def seqpar_contender(case: Case, layer: nn.Module, inputs: Inputs) -> Contender:
    """Our layer, tensor-parallel over all ranks, with a contiguous cache that is put back before every call."""
    from seqpar.kv import PagedKV

    kv_heads = own_kv_heads()
    requests = range(case.requests)
    kv = PagedKV.contiguous(1, case.requests, case.context + case.new, kv_heads.stop - kv_heads.start, HEAD_DIM)
    if case.context:
        filled = kv.batch(requests, [case.context] * case.requests)
        kv.append(0, *(flat_tokens(t[:, kv_heads]) for t in (inputs.past_k, inputs.past_v)), filled)
    batch = kv.batch(requests, [case.new] * case.requests)
    return Contender("seqpar", lambda: layer(inputs.x, batch, inputs.cos, inputs.sin, kv))


def flat_tokens(heads_first: Tensor) -> Tensor:
    """[N, G, S, D] to [N*S, G, D]."""
    return heads_first.transpose(1, 2).flatten(0, 1)


def own_kv_heads() -> slice:
    share = KV_HEADS // RANKS
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def seqpar_layer(model: nn.Module) -> nn.Module:
    from seqpar import comm
    from seqpar.layers import ParallelDecoderLayer
    from seqpar.partition import HeadMap

    groups = comm.groups(comm.init_mesh(tp=RANKS, sp=1))
    return ParallelDecoderLayer.from_module(
        model.model.layers[0], groups=groups, heads=HeadMap(HEADS, KV_HEADS, RANKS, 1)
    )


def dtensor_layer(folder: Path) -> nn.Module:
    """The plan of PyTorch's tensor-parallel tutorial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from transformers import LlamaForCausalLM

    layer = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model.layers[0]
    column = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in column}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), plan)


def tp_plan_layer(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)
    return model.eval().model.layers[0]


# Ulysses attention.


def ulysses_inputs(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """This rank's [T/p, heads, D] slices of q, k, v, and of what attention over all tokens gives, [T/p, H*D]."""
    torch.manual_seed(case.tokens)
    whole = [torch.randn(case.tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (x.double().transpose(0, 1)[None] for x in whole)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    share = case.tokens // RANKS
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    q, k, v = (x[mine].contiguous() for x in whole)
    return (q, k, v), expected[mine]


def seqpar_ulysses(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Ours takes the fused projection, as `QKVParallelLinear` gives it."""
    from seqpar import comm
    from seqpar.layers import UlyssesAttention
    from seqpar.partition import HeadMap
    from seqpar.ragged import RaggedBatch

    groups = comm.groups(comm.init_mesh(tp=1, sp=RANKS))
    attention = UlyssesAttention(HeadMap(HEADS, KV_HEADS, 1, RANKS), HEAD_DIM, group=groups.sp)
    batch, qkv = RaggedBatch.prefill([case.tokens]), attention.pack(q, k, v)
    return Contender("seqpar", lambda: attention(qkv, batch))


class LocalAttention(nn.Module):
    """What DeepSpeed calls between its all-to-alls: q[B, S, H, D], k, v[B, S, G, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def deepspeed_ulysses(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.comm.init_distributed("gloo", verbose=False)
    attention = DistributedAttention(LocalAttention(), dist.group.WORLD, scatter_idx=2, gather_idx=1)
    q, k, v = (x[None] for x in (q, k, v))
    return Contender("deepspeed", lambda: attention(q, k, v, 0).reshape(-1, HEADS * HEAD_DIM))


def stand_in_for_flash_attn() -> None:
    """Let peers import one where there is none; see `stubs/flash_attn`."""
    if importlib.util.find_spec("flash_attn") is None:
        sys.path.append(str(Path(__file__).parent / "stubs"))


def yunchang_ulysses(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    stand_in_for_flash_attn()
    from yunchang.kernels import AttnType
    from yunchang.ulysses import UlyssesAttention

    attention = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.FA)
    q, k, v = (x[None] for x in (q, k, v))
    return Contender("yunchang", lambda: attention(q, k, v, causal=True).reshape(-1, HEADS * HEAD_DIM))


class CollectiveCounter(TorchDispatchMode):
    """Counts what reaches the process group, whoever calls it and by whichever interface."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        self.count += (
            name.startswith(("c10d::", "_c10d_functional::")) and "_tensor" not in name
        )  # neither wait nor wrap
        return func(*args, **(kwargs or {}))


def count_collectives(run: Callable[[], Tensor]) -> int:
    """Collectives of one call."""
    with CollectiveCounter() as counter:
        run()
    return counter.count


# The ranks' program.


class Guard:
    """Which peers run here; the error of one that does not, the same on all ranks."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or None when it fails on any rank."""
        made, error = None, None
        try:
            made = make()
        except Exception as caught:
            error = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else ''}"
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        first = next((found for found in errors if found), None)
        if first is not None:
            self.missing[name] = first
            return None
        return made


@torch.no_grad()
def ranks(cases: Sequence[Case], folder: Path) -> Result:
    guard, result = Guard(), Result({}, {}, {}, {})
    layer_cases = [case for case in cases if case.phase != "ulysses"]
    if layer_cases:
        run_layers(layer_cases, folder, guard, result, total=len(cases))
    for at, case in enumerate(case for case in cases if case.phase == "ulysses"):
        progress(len(layer_cases) + at, len(cases), case.name)
        run_ulysses(case, guard, result)
    progress(len(cases), len(cases), "done")
    result.missing.update(guard.missing)
    return result


Measure = Callable[[Case, Sequence[Contender], Tensor, Guard, Result], None]


def run_layers(
    cases: Sequence[Case], folder: Path, guard: Guard, result: Result, total: int, measure: Measure | None = None
) -> None:
    """Build the layers, and have every case measured, by `measure_all` unless another function is given."""
    measure = measure or measure_all
    progress(0, total, "building the layers")
    model = reference_model(folder)
    ours = seqpar_layer(model)
    peers = {
        "DTensor": guard.attempt("DTensor", lambda: dtensor_layer(folder)),
        "tp_plan": guard.attempt("tp_plan", lambda: tp_plan_layer(folder)),
    }
    oracle = model.model.layers[0].double()
    for at, case in enumerate(cases):
        progress(at, total, case.name)
        inputs = make_inputs(case, model)
        reference = hf_contender("one process", case, oracle, inputs, slice(None))
        reference.prepare()
        expected = reference.run()
        contenders = [seqpar_contender(case, ours, inputs)]
        contenders += [
            hf_contender(name, case, layer, inputs, own_kv_heads())
            for name, layer in peers.items()
            if layer is not None
        ]
        measure(case, contenders, expected, guard, result)


def run_ulysses(case: Case, guard: Guard, result: Result) -> None:
    shards, expected = ulysses_inputs(case)
    contenders = [seqpar_ulysses(case, *shards)]
    for name, make in (("deepspeed", deepspeed_ulysses), ("yunchang", yunchang_ulysses)):
        made = guard.attempt(name, lambda make=make: make(case, *shards))
        contenders += [] if made is None else [made]
    measure_all(case, contenders, expected, guard, result)


def measure_all(case: Case, contenders: Sequence[Contender], expected: Tensor, guard: Guard, result: Result) -> None:
    """Check every contender's result, count its collectives, then time those that run."""
    running = []
    for contender in contenders:

        def once(contender: Contender = contender) -> Tensor:
            contender.prepare()
            return contender.run()

        name = f"{case.name} {contender.name}"
        out = once() if contender.name == "seqpar" else guard.attempt(contender.name, once)
        if out is None:
            continue
        result.errors[name] = check(name, out, expected, TOLERANCE)
        contender.prepare()
        result.collectives[name] = count_collectives(contender.run)
        running.append(contender)
    result.timings[case.name] = time_rounds(running, case.rounds)


# The report.


def rows_of(cases: Sequence[Case], result: Result) -> list[Row]:
    rows = []
    for case in cases:
        ours, *peers = result.timings[case.name]
        for peer in peers:
            found = ratio(ours, peer)
            # The promise for a layer is against DTensor; tp_plan is built on it and is shown beside.
            target = TARGETS[case.phase] if peer.name != "tp_plan" else None
            ok = found.value <= target if target is not None else None
            rows.append(Row(f"{case.name}: ÷ {peer.name}", found.value, "x", target, ok, (found.low, found.high)))
    for case in cases:
        for timing in result.timings[case.name]:
            rows.append(Row(f"{case.name}: {timing.name}", timing.median_ms, "ms"))
    for case in cases:
        for timing in result.timings[case.name]:
            count = result.collectives[f"{case.name} {timing.name}"]
            target = 2 if case.phase == "ulysses" and timing.name == "seqpar" else None
            ok = None if target is None else count <= target
            rows.append(Row(f"{case.name}: {timing.name} collectives", count, "calls", target, ok))
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", default="", help="cases whose name contains this, e.g. 'decode'")
    args = arguments.parse_args()
    cases = (*QUICK_LAYER_CASES, *QUICK_ULYSSES_CASES) if args.quick else (*LAYER_CASES, *ULYSSES_CASES)
    cases = tuple(case for case in cases if args.only in case.name)
    with tempfile.TemporaryDirectory() as folder:
        result = launch(RANKS, ranks, cases, Path(folder))
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        ranks=RANKS,
        threads_per_rank=1,
        dtype="float32",
        layer={"hidden": HIDDEN, "mlp": MLP, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        context=CONTEXT,
        rounds={case.name: case.rounds for case in cases},
        largest_relative_error=max(result.errors.values()),
        tolerance=TOLERANCE,
        peers_that_did_not_run=result.missing,
    )
    report(args, about, rows_of(cases, result), "time of seqpar ÷ time of the peer, 2 gloo ranks, 1 thread each")
    print(f"  results checked: largest relative error {max(result.errors.values()):.1e} (tolerance {TOLERANCE:.0e})")
    for name, error in result.missing.items():
        print(f"  not run: {name}: {error}")
    spread = [max(t.rounds) / statistics.median(t.rounds) for ts in result.timings.values() for t in ts]
    print(f"  slowest round of any contender: {max(spread):.1f} times its median")


if __name__ == "__main__":
    main()
