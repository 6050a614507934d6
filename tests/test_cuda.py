"""What only a GPU can show: the same layers on CUDA, NCCL's one-rank groups, streams, graphs, simulated links.

Run by `benchmarks/gpu.sh`; one GPU is enough. Several NCCL ranks remain unverified until there are several GPUs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqpar import comm, kernels
from seqpar.kernels.attention import reference
from seqpar.kernels.quantize import Wire, decode, encode
from seqpar.kernels.spin import spin
from seqpar.kernels.tile import placed_attention
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, Range
from seqpar.ragged import RaggedBatch
from tests import cuda_cases
from tests.cuda_cases import CASES, inputs, link
from tests.layers.reference import DecoderLayer, rope

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "tiny-llama"
compiles = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] == "1", reason="Triton interprets: set TRITON_INTERPRET=0, as benchmarks/gpu.sh does"
)


@pytest.fixture(scope="module")
def mesh() -> comm.DeviceMesh:
    return comm.init_mesh(tp=1, sp=1, device="cuda")


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("cached", [False, True], ids=["flat", "paged"])
def test_attention_is_as_exact_as_pytorchs(dtype: torch.dtype, window: int | None, cached: bool) -> None:
    """At most twice the error of the definition run in the same dtype; the log-sum-exp within a few float32 steps."""
    torch.manual_seed(0)
    q_lens, kv_lens = (33, 1, 64), (70, 129, 64)
    if not cached:
        kv_lens = q_lens
    pages = [[3, 0, 7, 1, 2], [4, 9, 5, 6, 8, 10, 11, 12, 13], [14, 15, 16, 17]]
    batch = RaggedBatch.build(q_lens, kv_lens, *((pages, 16) if cached else ()), device="cuda")
    shape = (18, 16, 2, 64) if cached else (sum(kv_lens), 2, 64)
    q = torch.randn(sum(q_lens), 8, 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    exact, exact_lse = kernels.attention(q.double(), k.double(), v.double(), batch, window=window, backend="reference")
    plain = reference.attention(q, k, v, batch, softmax_scale=64**-0.5, window=window, kv_head_of=(0,) * 4 + (1,) * 4)[
        0
    ]
    out, lse = kernels.attention(q, k, v, batch, window=window)
    assert error(out, exact) <= 2 * error(plain, exact) + 1e-5
    assert error(lse, exact_lse) <= (2e-2 if dtype != torch.float32 else 1e-4)


@compiles
@pytest.mark.parametrize("dim", [64, 72, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_kernels_at_their_own_sizes(dtype: torch.dtype, dim: int) -> None:
    """Tiles as they are launched: prompts, decodes of split keys, stripes, block lists."""
    torch.manual_seed(0)
    q_lens, kv_lens, size = (300, 1, 5, 70), (700, 2100, 33, 70), 48
    pages = torch.randperm(80).tolist()
    rows = [[pages.pop() for _ in range(-(-keys // size))] for keys in kv_lens]
    batch = RaggedBatch.build(q_lens, kv_lens, rows, size, device="cuda")
    q = torch.randn(sum(q_lens), 8, dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 80, size, 2, dim, device="cuda", dtype=dtype)
    sinks = torch.randn(8, device="cuda")
    for window in (None, 100):
        for deterministic in (False, True):
            options = {"window": window, "sinks": sinks}
            exact = kernels.attention(q.double(), k.double(), v.double(), batch, backend="reference", **options)
            plain = kernels.attention(q, k, v, batch, backend="reference", **options)
            found = kernels.attention(q, k, v, batch, backend="triton", deterministic=deterministic, **options)
            assert error(found[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 1e-5
            assert error(found[1], exact[1]) <= 1e-4
    heads = (0,) * 4 + (1,) * 4
    flat = [x.flatten(0, 1)[:700] for x in (k, v)]
    at = torch.arange(700, device="cuda")
    stripes = {"q_lens": (300,), "kv_lens": (700,), "positions": (at[:300] * 3 + 1, at * 2)}
    rule = {**stripes, "softmax_scale": 0.1, "kv_head_of": heads, "window": 250}
    exact = placed_attention(q[:300].double(), *(x.double() for x in flat), backend="reference", **rule)
    plain = placed_attention(q[:300], *flat, backend="reference", **rule)
    found = placed_attention(q[:300], *flat, backend="triton", **rule)
    assert error(found[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 1e-5
    blocks = tuple(Range(start, start + 50) for start in range(0, 1400, 50))
    lists = kernels.BlockLists((Range(0, 300), Range(300, 376)), blocks, (((0, 3, 9), (20,)), ((), (1, 2, 27))))
    keys = [x.flatten(0, 2)[:1400] for x in (k, v)]
    where = {"q_positions": torch.arange(376) * 2, "k_positions": torch.randperm(1400), "softmax_scale": 0.1}
    exact = kernels.sparse_attention(
        q.double(), *(x.double() for x in keys), lists, backend="reference", kv_head_of=heads, **where
    )
    plain = kernels.sparse_attention(q, *keys, lists, backend="reference", kv_head_of=heads, **where)
    found = kernels.sparse_attention(q, *keys, lists, backend="triton", kv_head_of=heads, **where)
    assert error(found[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 1e-5
    assert torch.equal(found[1] == -torch.inf, exact[1] == -torch.inf)


@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_are_as_exact_as_one_product_each(dtype: torch.dtype, width: int) -> None:
    """In bfloat16 and with sizes that are multiples of eight by a grouped product."""
    torch.manual_seed(0)
    x, counts = torch.randn(200, 64, device="cuda", dtype=dtype), torch.tensor([0, 150, 0, 1, 49, 0])
    gate_up, down = (torch.randn(6, *shape, device="cuda", dtype=dtype) / 8 for shape in ((2 * width, 64), (64, width)))
    blocks = [width // 2, width - width // 2]
    exact = kernels.experts(x.double(), gate_up.double(), down.double(), counts, blocks, backend="reference")
    plain = kernels.experts(x, gate_up, down, counts, blocks, backend="reference")
    assert error(kernels.experts(x, gate_up, down, counts.cuda(), blocks), exact) <= 2 * error(plain, exact) + 1e-5


def test_every_collective_of_one_nccl_rank_keeps_its_argument(mesh: comm.DeviceMesh) -> None:
    group = comm.groups(mesh).flat
    x = torch.randn(6, 4, device="cuda")
    kept = x.clone()
    for out in (
        comm.all_reduce(x, group=group),
        comm.all_gather(x, group=group),
        comm.reduce_scatter(x, group=group),
        comm.all_to_all(x, group=group, send_sizes=[6], recv_sizes=[6]),
        comm.broadcast(x, src=0, group=group),
    ):
        assert torch.equal(out, kept)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wire_formats_round_as_on_a_cpu(dtype: torch.dtype, wire: Wire) -> None:
    """To within one more code: libraries may round the inverse of a scale differently."""
    x = (torch.randn(300, 200) * torch.logspace(-3, 3, 300)[:, None]).to(dtype)
    want = decode(encode(x, wire), 200, torch.float32, wire)
    got = decode(encode(x.cuda(), wire), 200, torch.float32, wire).cpu()
    largest = x.float().abs().amax(1, keepdim=True)
    step = largest / 126 if wire == "int8" else torch.maximum(want.abs() / 8, largest / 2e5)
    assert ((got - want).abs() <= step).all()
    assert decode(encode(torch.full((1, 64), torch.inf, device="cuda"), wire), 64, dtype, wire).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoder_layer_equals_one_float64_process(mesh: comm.DeviceMesh, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    groups, q_lens = comm.groups(mesh), (40, 3)
    oracle = DecoderLayer(64, 8, 2, 16, 96, qk_norm=True)
    layer = ParallelDecoderLayer.from_module(oracle.to("cuda", dtype), groups=groups, heads=HeadMap(8, 2))
    x = torch.randn(43, 64, device="cuda", dtype=dtype)
    batch = RaggedBatch.prefill(q_lens, device="cuda")
    cos, sin = (table.to("cuda") for table in rope(batch.positions.cpu(), 16))
    exact = oracle.double()(x.double(), q_lens, cos, sin)
    oracle.to(dtype)
    plain = oracle(x, q_lens, cos.to(dtype), sin.to(dtype))
    kv = PagedKV.contiguous(1, 2, 64, 2, 16, dtype=dtype, device="cuda")
    kv.reserve(dict(enumerate(q_lens)))
    with torch.no_grad():
        out = layer(x, kv.batch([0, 1], q_lens), cos.to(dtype), sin.to(dtype), kv)
    assert error(out, exact) <= 2 * error(plain, exact) + 1e-5


def test_generate_equals_transformers(mesh: comm.DeviceMesh) -> None:
    from transformers import AutoModelForCausalLM

    from seqpar import hf

    ids = torch.arange(3, 200, device="cuda")[None]
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    theirs = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).to("cuda").eval()
    ours = hf.load(CHECKPOINT, mesh, dtype=torch.float32)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_a_handle_waited_for_on_another_stream_keeps_its_memory(mesh: comm.DeviceMesh) -> None:
    """A delay before the collective: without the stream order of `Handle`, the buffers are handed out and written."""
    group = comm.groups(mesh).flat
    side = torch.cuda.Stream()
    x = torch.full((1 << 22,), 3.0, device="cuda")
    torch.cuda._sleep(200_000_000)
    handle = comm.all_reduce_async(x, group=group)
    del x
    with torch.cuda.stream(side):
        result = handle.wait()
        total = result.sum()
    del handle, result
    for _ in range(4):
        torch.full((1 << 22,), -1.0, device="cuda")
    torch.cuda.synchronize()
    assert total.item() == 3.0 * (1 << 22)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_wire_formats_are_those_of_a_cpu(wire: Wire, dtype: torch.dtype) -> None:
    """Byte for byte, but for a code in a thousand where a quotient rounds the other way."""
    torch.manual_seed(5)
    x = torch.randn(33, 200).to(dtype)
    there, here = encode(x.to("cuda"), wire), encode(x, wire)
    assert (there.cpu() != here).double().mean() <= 1e-3
    assert torch.equal(decode(here.to("cuda"), 200, dtype, wire).cpu(), decode(here, 200, dtype, wire))


# Collectives and schedules: on another stream, in a graph, under the sanitizer.


def test_a_result_waited_for_on_another_stream_has_been_computed(mesh: comm.DeviceMesh) -> None:
    """A delay before what makes it: without the order that `Handle` gives, the other stream reads what was there."""
    group = comm.groups(mesh).flat
    x = torch.zeros(1 << 22, device="cuda")
    torch.cuda.synchronize()
    sleep(0.1)
    x.fill_(3.0)
    handle = comm.all_reduce_async(x, group=group)
    with torch.cuda.stream(torch.cuda.Stream()):
        total = handle.wait().sum()
    torch.cuda.synchronize()
    assert total.item() == 3.0 * (1 << 22)


@pytest.mark.parametrize("name", cuda_cases.BACKEND)
def test_what_nccl_returns_on_another_stream_keeps_its_memory(mesh: comm.DeviceMesh, name: str) -> None:
    """Behind a delay, with the memory asked for again at once by the stream that launched."""
    group, start = comm.groups(mesh).flat, cuda_cases.BACKEND[name]
    start(group, inputs("cuda")).wait()  # NCCL makes its communicator
    torch.cuda.synchronize()
    sleep(0.1)
    handle = start(group, inputs("cuda") * 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = handle.wait() * 1
    del handle
    for _ in range(8):
        torch.full_like(inputs("cuda"), -1.0)
    torch.cuda.synchronize()
    assert torch.equal(out, inputs("cuda"))


@compiles
@pytest.mark.parametrize("name", CASES)
def test_a_graph_replays_what_ran_eagerly(mesh: comm.DeviceMesh, name: str) -> None:
    group, x = comm.groups(mesh).flat, inputs("cuda")
    with link(1e-5).on(group):
        replay = captured(lambda: CASES[name](group, x))
    for offset in (0.0, 1.0):
        x.copy_(inputs("cuda") + offset)
        with link(1e-5).on(group):
            eager = CASES[name](group, x)
        assert torch.equal(replay(), eager) and torch.equal(eager, inputs("cuda") + offset)


@compiles
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_of_a_prompt_in_a_graph_equal_the_same_chunks_one_after_another(
    mesh: comm.DeviceMesh, chunks: int
) -> None:
    """A decoder layer over a paged cache, bit for bit."""
    torch.manual_seed(3)
    groups, tokens, dtype = comm.groups(mesh), 96, torch.bfloat16
    module = DecoderLayer(64, 8, 2, 16, 96, qk_norm=False).to("cuda", dtype)
    layer = ParallelDecoderLayer.from_module(module, groups=groups, heads=HeadMap(8, 2))
    x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
    kv = PagedKV.contiguous(1, 1, tokens, 2, 16, dtype=dtype, device="cuda")
    batch = kv.batch([0], [tokens])
    cos, sin = (table.to("cuda", dtype) for table in rope(batch.positions.cpu(), 16))
    cuts = [tokens * i // chunks for i in range(1, chunks)]
    spans = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]

    parts = batch.split(cuts)  # once: what they hold on the device is made at the first run, before the capture

    def programs() -> list[comm.Steps[Tensor]]:
        chunks = zip(spans, parts, strict=True)
        return [layer.steps(x[span], part, cos[span], sin[span], kv) for span, part in chunks]

    with torch.no_grad(), link(2e-5).on(groups.tp):
        serial = torch.cat([comm.run(steps) for steps in programs()])
        assert torch.equal(torch.cat(comm.interleave(programs())), serial)
        replay = captured(lambda: torch.cat(comm.interleave(programs())))
    for _ in range(2):
        assert torch.equal(replay(), serial)


@compiles
def test_recorded_steps_equal_eager_ones_bit_for_bit(mesh: comm.DeviceMesh) -> None:
    """A replay does not call the step; to be recorded it is called twice."""
    assert cuda_cases.check_graphs("cuda") == (5, 1, 2 * 2 + 1)


@compiles
def test_recorded_decodes_over_a_cache_that_grows(mesh: comm.DeviceMesh) -> None:
    assert cuda_cases.check_decodes("cuda") == (11, 12)


@compiles
def test_the_sanitizer_finds_nothing_but_the_race_planted_for_it() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cuda_cases"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    printed = ran.stdout.splitlines()
    assert printed[-1] == "the race was found"
    assert len(printed) - 1 == len(CASES) + len(cuda_cases.STARTS)


# Simulated links.


@compiles
@pytest.mark.parametrize("seconds", [5e-4, 2e-3])
@pytest.mark.parametrize("ctas", [1, 4, 24])
def test_a_spin_takes_its_time(seconds: float, ctas: int) -> None:
    assert timed(lambda: spin(seconds, ctas=ctas)) == pytest.approx(seconds, rel=0.02)


@compiles
def test_longer_transfers_take_longer_by_what_they_send() -> None:
    """What a launch itself takes drops out; as short as the sums of one layer."""
    short, long = (statistics.median(timed(lambda t=t: spin(t, ctas=4)) for _ in range(9)) for t in (5e-5, 2.5e-4))
    assert long - short == pytest.approx(2e-4, rel=0.02)


@compiles
def test_transfers_follow_one_another_and_compute_hides_them(mesh: comm.DeviceMesh) -> None:
    group, x, one = comm.groups(mesh).flat, inputs("cuda"), 2e-3

    def transfers(count: int) -> list[comm.Handle]:
        with link(one).on(group):
            return [comm.all_reduce_async(x, group=group) for _ in range(count)]

    def wait_for(handles: list[comm.Handle], compute_s: float) -> None:
        sleep(compute_s)
        for handle in handles:
            handle.wait()

    alone = timed(lambda: sleep(4 * one))
    assert timed(lambda: wait_for(transfers(3), 0.0)) == pytest.approx(3 * one, rel=0.05)
    assert timed(lambda: wait_for(transfers(2), 4 * one)) == pytest.approx(alone, rel=0.05)


@compiles
def test_a_wait_blocks_the_stream_and_not_the_host(mesh: comm.DeviceMesh) -> None:
    group, x = comm.groups(mesh).flat, inputs("cuda")
    with link(0.5).on(group):
        handle = comm.all_reduce_async(x, group=group)
        assert handle.wait() is x
        assert not handle.done() and not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert handle.done()


@compiles
def test_a_graph_takes_the_time_of_its_transfers(mesh: comm.DeviceMesh) -> None:
    group, x = comm.groups(mesh).flat, inputs("cuda")
    with link(1e-3).on(group):
        replay = captured(lambda: CASES["interleave 2"](group, x))  # two chunks of four layers
    assert timed(replay) == pytest.approx(8e-3, rel=0.05)


def sleep(seconds: float) -> None:
    """Keep the current stream busy for about that long."""
    torch.cuda._sleep(int(seconds * 1.7e9))


def timed(run: Callable[[], object]) -> float:
    """Seconds on the device; the host is ahead, so that its launches cost nothing."""
    run()
    found = []
    for _ in range(9):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep(2e-3)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(found)


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a graph; the result is the same tensor at each replay.

    Errors of other threads are not this capture's: NCCL's watchdog asks for events when it likes.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
