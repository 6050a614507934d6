"""What only a GPU can show: the same layers on CUDA, NCCL's one-rank groups, handles across streams.

Run by `benchmarks/gpu.sh`; one GPU is enough. Several NCCL ranks remain unverified until there are several GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqpar import comm, kernels
from seqpar.kernels.attention import reference
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, rope

pytestmark = pytest.mark.gpu
CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def mesh() -> comm.DeviceMesh:
    return comm.init_mesh(tp=1, sp=1, device="cuda")


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().max())


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
