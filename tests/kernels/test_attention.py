"""Attention against its definition: exactly where nothing rounds, else within what the dtype allows."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.kernels import attention, choose_backend
from seqpar.kernels.attention import varlen
from seqpar.kernels.attention.plan import head_runs, make_groups
from seqpar.kernels.attention.reference import request_keys, visible
from seqpar.ragged import RaggedBatch
from tests.kernels.cases import Case, cases, heads, in_pages
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Scores of order 1 over at most 100 keys: float32 and float64 lose some ulps in sums. With bfloat16 inputs the operator
# rounds each weight and the output once, 2**-9 each, of values up to about 4; lse is float32, of exponentials that the
# operator takes to 20 bits for half types.
OUT_ATOL = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2 * 2**-9 * 4}
LSE_ATOL = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-4}


def by_hand(case: Case, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Token by token, head by head, over an explicit list of keys: shares nothing with the implementation."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    row = 0
    for request, (new, keys) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        flat_k, flat_v = (request_keys(x, batch, request).double() for x in (k, v))
        for own in range(keys - new, keys):
            seen = list(range(max(0, own + 1 - (case.window or own + 1)), own + 1))
            for head, kv_head in enumerate(case.kv_head_of):
                scores = flat_k[seen, kv_head] @ q[row, head].double() / math.sqrt(case.head_dim)
                out[row, head] = scores.softmax(0) @ flat_v[seen, kv_head]
                lse[row, head] = scores.logsumexp(0)
            row += 1
    return out, lse


@given(cases())
@settings(max_examples=60, deadline=None)
def test_reference_is_the_definition(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    out, lse = attention(*inputs, window=case.window, kv_head_of=case.kv_head_of, backend="reference")
    want_out, want_lse = by_hand(case, *inputs)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@given(case=cases())
@settings(max_examples=120, deadline=None)
@example(case=Case((70, 70), (0, 0), (0, 0, 1, 1), 2, 16, 20, 0, 0))  # a window over equal prompts
@example(case=Case((1,) * 4, (30,) * 4, (0, 0, 1, 1), 2, 16, None, 128, 0))  # decodes in adjacent pages
@example(case=Case((2, 5), (30, 30), (0, 1, 1), 2, 16, 66, 3, 1))  # scattered pages, uneven heads
@example(case=Case((300, 517), (0, 0), (0, 0, 1, 1), 2, 16, None, 0, 0))  # long enough for triangles and squares
@example(case=Case((257, 257), (31, 31), (0, 0, 1), 2, 16, None, 64, 0))  # the same after cached keys
def test_torch_is_the_reference(device: str, dtype: torch.dtype, case: Case) -> None:
    q, k, v, batch = case.inputs(dtype)
    options = {"window": case.window, "kv_head_of": case.kv_head_of}
    want_out, want_lse = attention(q.double(), k.double(), v.double(), batch, backend="reference", **options)
    q, k, v, batch = q.to(device), k.to(device), v.to(device), batch.to(device)
    before = [x.clone() for x in (q, k, v)]
    out, lse = (x.cpu() for x in attention(q, k, v, batch, backend="torch", **options))
    assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse.is_contiguous()
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=OUT_ATOL[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=LSE_ATOL[dtype])
    for now, then in zip((q, k, v), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_every_token_reads_the_right_key(backend: str, case: Case) -> None:
    """Each query picks one visible key by a score so high that its value comes out exactly, position-coded."""
    batch = case.batch()
    dim = max((*case.kv_lens, 2))
    index = torch.cat([torch.arange(n) for n in case.kv_lens] or [torch.zeros(0, dtype=torch.int64)])
    k = torch.nn.functional.one_hot(index, dim).float()[:, None].repeat(1, case.num_kv_heads, 1)
    v = torch.arange(k.numel(), dtype=torch.float32).view(k.shape)
    wanted, picks = [], []
    draw = random.Random(case.seed)
    for request in range(batch.num_requests):
        for seen in visible(batch, request, case.window):
            key = draw.choice(seen.nonzero().flatten().tolist())
            picks.append(key)
            wanted.append(v[batch.kv_starts[request] + key, list(case.kv_head_of)])
    q = torch.nn.functional.one_hot(torch.tensor(picks, dtype=torch.int64), dim).float() * 1024
    q = q[:, None].repeat(1, len(case.kv_head_of), 1)
    out, lse = attention(
        q,
        in_pages(k, batch),
        in_pages(v, batch),
        batch,
        softmax_scale=1.0,
        window=case.window,
        kv_head_of=case.kv_head_of,
        backend=backend,
    )
    want = torch.stack(wanted) if wanted else q
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 1024), rtol=0, atol=0)


@given(cases(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_gradients_are_the_references(case: Case, frozen_keys: bool) -> None:
    grads = {}
    for backend in BACKENDS:
        q, k, v, batch = case.inputs(torch.float64)
        q.requires_grad_()
        leaves = [q] if frozen_keys else [q, k.requires_grad_(), v.requires_grad_()]
        out, _ = attention(q, k, v, batch, window=case.window, kv_head_of=case.kv_head_of, backend=backend)
        weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos()
        grads[backend] = torch.autograd.grad((out * weight).sum(), leaves)
    for got, want in zip(*grads.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_gradient_through_lse_is_an_error() -> None:
    q, k, v, batch = Case((4,), (0,), (0, 0), 1, 8, None, 0, 0).inputs(torch.float32)
    q.requires_grad_()
    out, lse = attention(q, k, v, batch, backend="torch")
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        (out.sum() + lse.sum()).backward()


@given(cases())
@settings(deadline=None)
def test_groups_cover_every_row_once(case: Case) -> None:
    groups = make_groups(case.batch(), case.window)
    rows = [row for group in groups for row in range(group.row, group.row + group.requests * group.q_len)]
    assert rows == list(range(sum(case.q_lens)))


@given(heads())
def test_head_runs_say_what_kv_head_of_says(heads: tuple[tuple[int, ...], int]) -> None:
    kv_head_of, _ = heads
    said = []
    for run in head_runs(kv_head_of):
        ratio = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
        said += [kv for kv in range(run.kv_start, run.kv_stop) for _ in range(ratio)]
    assert tuple(said) == kv_head_of


class CountCalls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})

    @property
    def attention(self) -> int:
        return self.calls["_scaled_dot_product_flash_attention_for_cpu"]


EVEN = (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (Case((1,) * 5, (30,) * 5, EVEN, 2, 8, None, 64, 0), 1),  # equal decodes, adjacent pages
        (Case((1,) * 5, (30, 40, 50, 60, 63), EVEN, 2, 8, None, 64, 0), 5),
        (Case((1,) * 5, (30,) * 5, EVEN, 2, 8, None, 8, 0), 1),  # several adjacent pages each
        (Case((1,) * 5, (30,) * 5, EVEN, 2, 8, 7, 64, 0), 1),  # the window only moves the first key
        (Case((1,) * 5, (30,) * 5, (0, 0, 1), 2, 8, None, 64, 0), 2),  # one for each ratio of heads
        (Case((6,) * 5, (0,) * 5, EVEN, 2, 8, None, 0, 0), 1),  # equal prompts
        (Case((6, 0, 6, 5), (0,) * 4, EVEN, 2, 8, None, 0, 0), 2),  # an empty request does not separate
        (Case((6,), (30,), EVEN, 2, 8, None, 64, 0), 2),  # cached, then new
        (Case((6,), (30,), EVEN, 2, 8, 36, 64, 0), 2),  # a window that hides nothing costs nothing
    ],
)
def test_few_calls_and_no_copies_of_keys(case: Case, calls: int) -> None:
    inputs = case.inputs(torch.float32)
    with CountCalls() as counter:
        attention(*inputs, window=case.window, kv_head_of=case.kv_head_of)
        assert counter.attention == calls
        assert not {"clone", "index", "index_select", "_to_copy"} & {
            name
            for name, count in counter.calls.items()
            if count > 2 * calls  # two small results may be made contiguous
        }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_lens", [(), (0,), (0, 0)])
def test_nothing_in_nothing_out(backend: str, q_lens: tuple[int, ...]) -> None:
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    out, lse = attention(q, k, k, RaggedBatch.prefill(q_lens), backend=backend)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)


@pytest.mark.parametrize("window", [12, 76])
def test_one_batch_serves_every_dtype_and_length(window: int) -> None:
    """What a batch remembers of one call does not leak into the next."""
    case = Case((5, 70), (9, 30), EVEN, 2, 8, window, 8, 1)
    batch = case.inputs(torch.float64).batch
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v, _ = case.inputs(dtype)
        q.requires_grad_()
        out, _ = attention(q, k, v, batch, window=case.window)
        want, _ = attention(q.double(), k.double(), v.double(), batch, window=case.window, backend="reference")
        torch.testing.assert_close(out.double(), want, rtol=0, atol=OUT_ATOL[dtype])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_served_inference_serves_training(backend: str, window: int | None) -> None:
    q, k, v = (torch.randn(9, 2, 4, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        batch = RaggedBatch.prefill([9])
        attention(q, k, v, batch, window=window, backend=backend)
        assert batch.last_idx.tolist() == [8]
    out, _ = attention(q, k, v, batch, window=window, backend=backend)
    out[batch.last_idx].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_heads(backend: str) -> None:
    q, k = torch.zeros(3, 0, 8), torch.zeros(3, 0, 8)
    out, lse = attention(q, k, k, RaggedBatch.prefill([3]), backend=backend)
    assert out.shape == (3, 0, 8) and lse.shape == (3, 0)


def test_inputs_of_any_strides() -> None:
    q, k, v, batch = Case((5, 3), (2, 0), (0, 0, 1, 1), 2, 8, None, 4, 1).inputs(torch.float64)
    want = attention(q, k, v, batch)
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    for got, same in zip(attention(q, k, v, batch), want, strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=1e-14)
    apart = torch.full((*k.shape[:1], k.shape[1] + 1, *k.shape[2:]), torch.nan, dtype=k.dtype)
    apart[:, :-1] = k
    for got, same in zip(attention(q, apart[:, :-1], v, batch), want, strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=1e-14)


def test_the_choice_can_be_asked() -> None:
    assert choose_backend("attention", torch.device("cpu"), torch.float64) == "torch"
    assert choose_backend("attention", torch.device("cuda"), torch.bfloat16) == "triton"
    assert choose_backend("attention", torch.device("cuda"), torch.float64) == "reference"


Q, K = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
PAGES = torch.zeros(2, 4, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (Q[:3], K, K, {}, r"`q` must be \[4 tokens, heads, head_dim\], got \[3, 4, 8\]"),
        (Q, K, K[:, :1], {}, r"`v` must have the shape of `k` \(\[4, 2, 8\]\), got \[4, 1, 8\]"),
        (Q, K[:3], K[:3], {}, r"`k` must be \[4 keys, kv_heads, head_dim\], got \[3, 2, 8\]"),
        (Q, PAGES, PAGES, {}, r"`k` must be \[4 keys, kv_heads, head_dim\], got \[2, 4, 2, 8\]"),
        (Q, K[..., :4], K[..., :4], {}, r"`k` must have the head_dim of `q` \(8\), at least 1, got 4"),
        (Q, K.double(), K.double(), {}, r"must have one floating dtype, got torch.float32, torch.float64"),
        (Q, K.to("meta"), K.to("meta"), {}, r"must be on one device, got cpu, meta, meta"),
        (Q, K, K, {"window": 0}, r"`window` must be at least 1, since a token sees itself, got 0; None is no window"),
        (Q[:, :3], K, K, {}, r"`q` must have a multiple of the KV heads \(2\), got 3; pass `kv_head_of`"),
        (Q, K, K, {"kv_head_of": (0, 0, 1)}, r"`kv_head_of` must give each of 4 query heads one of 2 KV heads"),
        (Q, K, K, {"kv_head_of": (0, 0, 1, 2)}, r"non-decreasing, got \(0, 0, 1, 2\)"),
        (Q, K, K, {"kv_head_of": (1, 0, 0, 0)}, r"non-decreasing, got \(1, 0, 0, 0\)"),
        (
            Q,
            K,
            K,
            {"backend": "fast"},
            r'"auto", "torch", "reference", "triton", "flashinfer", "flash_attn", got \'fast\'',
        ),
    ],
)
@own_errors()
def test_bad_input_is_refused(q: Tensor, k: Tensor, v: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, RaggedBatch.prefill([4]), **options)


@own_errors()
def test_pages_of_another_size_are_refused() -> None:
    batch = RaggedBatch.build([4], [4], [[0]], 8)
    with pytest.raises(ValueError, match=r"`k` must be pages \[pages, 8, kv_heads, head_dim\], got \[2, 4, 2, 8\]"):
        attention(Q, PAGES, PAGES, batch)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([4, 4], [4, 4]), ([1, 1], [5, 5]), ([3], [9]), ([70], [90])])
def test_other_devices_than_the_cpu_give_the_same_shapes(
    window: int | None, q_lens: list[int], kv_lens: list[int]
) -> None:
    """Through the operator for CUDA in float32, on tensors without data."""
    q, k = torch.empty(sum(q_lens), 4, 8, device="meta"), torch.empty(sum(kv_lens), 2, 8, device="meta")
    out, lse = attention(q, k, k, RaggedBatch.build(q_lens, kv_lens), window=window, backend="torch")
    assert out.shape == q.shape and out.is_contiguous()
    assert lse.shape == q.shape[:2] and lse.is_contiguous() and lse.dtype == torch.float32


# The CUDA path, with the operator's documented meaning played by the reference: what it is asked for is tested here,
# what it answers on a machine that has it.


def play_varlen(
    q, k, v, cu_q, cu_kv, max_q, max_k, *, return_aux, scale, window_size, enable_gqa, seqused_k=None, block_table=None
):  # type: ignore[no-untyped-def]
    assert return_aux.lse and enable_gqa and window_size[1] == 0 and q.shape[1] % k.shape[-2] == 0
    q_lens = cu_q.diff().tolist()
    kv_lens = (cu_kv.diff() if seqused_k is None else seqused_k).tolist()
    assert (max_q, max_k) == (max(q_lens), max(kv_lens))
    pages = None if block_table is None else block_table.tolist()
    batch = RaggedBatch.build(q_lens, kv_lens, pages, k.shape[1] if pages else 0)
    window = None if window_size[0] == -1 else window_size[0] + 1
    out, lse = attention(q, k, v, batch, softmax_scale=scale, window=window, backend="reference")
    return out, lse.transpose(0, 1).contiguous()


def play_varlen_of_2_11(q, k, v, cu_q, cu_kv, max_q, max_k, *, return_aux, scale, window_size):  # type: ignore[no-untyped-def]
    options = {"return_aux": return_aux, "scale": scale, "window_size": window_size, "enable_gqa": True}
    return play_varlen(q, k, v, cu_q, cu_kv, max_q, max_k, **options)


@pytest.mark.parametrize(
    ("page_multiple", "operator"),
    [(8, play_varlen), (1 << 20, play_varlen), (8, play_varlen_of_2_11)],
    ids=["in-place", "gathered", "2.11"],
)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_the_cuda_path_asks_for_the_right_thing(page_multiple: int, operator: Any, case: Case) -> None:
    inputs = case.inputs(torch.float64)
    options = {"window": case.window, "kv_head_of": case.kv_head_of}
    want = attention(*inputs, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "serves", lambda q: True)
        patch.setattr(varlen, "PAGE_MULTIPLE", page_multiple)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", operator)
        got = attention(*inputs, backend="torch", **options)
    for x, y in zip(got, want, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
