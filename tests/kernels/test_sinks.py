"""Attention sinks: one more column in the softmax, and a partial like any other."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.kernels import add_sinks, attention, merge
from seqpar.kernels.attention import varlen
from seqpar.kernels.attention.reference import request_keys
from seqpar.ragged import RaggedBatch
from tests.kernels.cases import Case, cases
from tests.kernels.own_errors import own_errors
from tests.kernels.test_attention import DEVICES, LSE_ATOL, play_varlen

BACKENDS = ["torch", "reference"]
INF = torch.inf

# As without sinks, and one more rounding to the output's dtype.
OUT_ATOL = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3 * 2**-9 * 4}

logits = st.sampled_from([0.0, 0.7, -1.3, 5.0, 1e4, -1e4, -INF])


def sinks_of(case: Case, values: list[float]) -> Tensor:
    """One for each head of the case, out of some values in turn; exact in every dtype but bfloat16."""
    return torch.tensor(values, dtype=torch.float64).repeat(len(case.kv_head_of))[: len(case.kv_head_of)]


def options(case: Case) -> dict[str, Any]:
    return {"window": case.window, "kv_head_of": case.kv_head_of}


def by_hand(case: Case, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, head by head: a softmax over the scores and the sink, whose weight is dropped."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    row = 0
    for request, (new, keys) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        flat_k, flat_v = (request_keys(x, batch, request).double() for x in (k, v))
        for own in range(keys - new, keys):
            seen = list(range(max(0, own + 1 - (case.window or own + 1)), own + 1))
            for head, kv_head in enumerate(case.kv_head_of):
                scores = flat_k[seen, kv_head] @ q[row, head].double() / math.sqrt(case.head_dim)
                scores = torch.cat([scores, sinks[head : head + 1]])
                out[row, head] = scores.softmax(0)[:-1] @ flat_v[seen, kv_head]
                lse[row, head] = scores.logsumexp(0)
            row += 1
    return out, lse


@given(cases(), st.lists(logits, min_size=1, max_size=3))
@settings(max_examples=40)
def test_reference_is_the_definition(case: Case, values: list[float]) -> None:
    inputs, sinks = case.inputs(torch.float64), sinks_of(case, values)
    got = attention(*inputs, sinks=sinks, backend="reference", **options(case))
    for x, want in zip(got, by_hand(case, *inputs, sinks), strict=True):
        torch.testing.assert_close(x, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@given(case=cases(), values=st.lists(logits, min_size=1, max_size=3))
@settings(max_examples=60)
@example(case=Case((300, 517), (0, 0), (0, 0, 1, 1), 2, 16, None, 0, 0), values=[0.7, -1.3, 5.0])  # triangles, squares
@example(case=Case((257, 257), (31, 31), (0, 0, 1), 2, 16, None, 64, 0), values=[0.7, -1.3, 5.0])  # over cached keys
def test_torch_is_the_reference(device: str, dtype: torch.dtype, case: Case, values: list[float]) -> None:
    q, k, v, batch = case.inputs(dtype)
    sinks = sinks_of(case, values)
    if dtype == torch.bfloat16:
        sinks = sinks.to(dtype)
    want = attention(q.double(), k.double(), v.double(), batch, sinks=sinks, backend="reference", **options(case))
    before = sinks.clone()
    moved = (x.to(device) for x in (q, k, v, batch))
    out, lse = (x.cpu() for x in attention(*moved, sinks=sinks.to(device), backend="torch", **options(case)))
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=OUT_ATOL[dtype])
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-7, atol=LSE_ATOL[dtype])
    torch.testing.assert_close(sinks, before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_equal_scores_share_alike_exactly(backend: str, grad: bool) -> None:
    """Keys and a sink of score 0: with seven keys the sink takes an eighth; one of -inf changes no bit."""
    v = torch.arange(7 * 2 * 3, dtype=torch.float64).view(7, 2, 3)
    q, k = torch.zeros(7, 2, 3, dtype=torch.float64, requires_grad=grad), torch.zeros_like(v)
    batch = RaggedBatch.prefill([7])
    plain = attention(q, k, v, batch, backend=backend)
    out, lse = attention(q, k, v, batch, sinks=torch.tensor([0.0, -INF]), backend=backend)
    torch.testing.assert_close(out[6, 0], v[:, 0].sum(0) / 8, rtol=1e-15, atol=0)
    torch.testing.assert_close(lse[6, 0].exp().item(), 8.0, rtol=1e-15, atol=0)
    for got, want in zip((out, lse), plain, strict=True):
        torch.testing.assert_close(got[:, 1], want[:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), values=st.lists(logits, min_size=1, max_size=3), trained=st.sampled_from(["all", "q", "sinks"]))
@settings(max_examples=80)
@example(case=Case((300,), (0,), (0, 0, 1, 1), 2, 16, None, 0, 0), values=[0.7, -1.3, 5.0], trained="all")
@example(case=Case((70, 70), (0, 0), (0, 0, 1, 1), 2, 16, 20, 0, 0), values=[0.7, -1.3], trained="all")
@example(case=Case((65, 65), (30, 30), (0, 1, 1), 2, 16, 66, 3, 1), values=[0.7, -1.3], trained="all")  # 65: one alone
@example(case=Case((1, 1), (30, 30), (0, 0, 1, 1), 2, 16, None, 128, 0), values=[0.7, -1.3], trained="sinks")
def test_gradients_are_the_references(device: str, case: Case, values: list[float], trained: str) -> None:
    grads = {}
    for backend in BACKENDS:
        leaves = [*case.inputs(torch.float64)[:3], sinks_of(case, values)]
        leaves = [x.float().to(device) if device == "cuda" and backend == "torch" else x for x in leaves]
        chosen = {"all": leaves, "q": leaves[:1], "sinks": leaves[3:]}[trained]
        for leaf in chosen:
            leaf.requires_grad_()
        q, k, v, sinks = leaves
        batch = case.batch().to(q.device)
        out, _ = attention(q, k, v, batch, sinks=sinks, backend=backend, **options(case))
        weight = torch.arange(out.numel(), dtype=out.dtype, device=out.device).view(out.shape).cos()
        grads[backend] = torch.autograd.grad((out * weight).sum(), chosen)
    for got, want in zip(*grads.values(), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-11 if device == "cpu" else 1e-3)


def test_an_expanded_gradient_is_what_a_dense_one_is() -> None:
    grads = []
    for seed, backend in ((torch.ones(()), "torch"), (torch.ones(8, 2, 8), "reference")):
        q, k, v, batch = Case((5, 3), (0, 0), (0, 0), 1, 8, None, 0, 0).inputs(torch.float64)
        sinks = torch.tensor([0.3, -0.2], dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        out, _ = attention(*leaves[:3], batch, sinks=sinks, backend=backend)
        grads.append(torch.autograd.grad(out, leaves, seed.double().expand(out.shape)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@given(
    case=cases(),
    values=st.lists(logits | st.floats(-1e4, 1e4, width=16), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    deterministic=st.booleans(),
)
@settings(max_examples=40)
def test_gradients_round_as_their_dtype_does(
    device: str, case: Case, values: list[float], dtype: torch.dtype, deterministic: bool
) -> None:
    """Within 32 eps of the largest entry of float64's on these inputs: three times the worst of 1500 random cases."""
    inputs = [x.to(dtype) for x in (*case.inputs(torch.float64)[:3], sinks_of(case, values))]
    grads = []
    for backend, kind in (("torch", {"dtype": dtype, "device": device}), ("reference", {"dtype": torch.float64})):
        leaves = [x.detach().clone().to(**kind).requires_grad_() for x in inputs]
        fixed = {"deterministic": deterministic, "backend": backend, **options(case)}
        out, _ = attention(*leaves[:3], case.batch().to(leaves[0].device), sinks=leaves[3], **fixed)
        weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(dtype).to(**kind)
        grads.append([x.cpu() for x in torch.autograd.grad((out * weight).sum(), leaves)])
    for got, want in zip(*grads, strict=True):
        assert got.dtype == dtype
        largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * torch.finfo(dtype).eps * largest)


def test_a_gradient_through_lse_is_an_error() -> None:
    q, k, v, batch = Case((4,), (0,), (0, 0), 1, 8, None, 0, 0).inputs(torch.float32)
    sinks = torch.zeros(2, requires_grad=True)
    out, lse = attention(q, k, v, batch, sinks=sinks, backend="torch")
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        (out.sum() + lse.sum()).backward()


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    q, k, v, batch = Case((4,), (0,), (0, 0), 1, 8, None, 0, 0).inputs(torch.float32)
    sinks = torch.zeros(2, requires_grad=True)
    out, _ = attention(q, k, v, batch, sinks=sinks)
    (grad,) = torch.autograd.grad(out.square().sum(), sinks, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class CountCalls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_training_with_sinks_calls_the_operators_as_often_as_without() -> None:
    counts = []
    for sinks in (None, torch.zeros(3)):
        case = Case((70, 5, 1), (0, 9, 9), (0, 0, 1), 2, 8, 30, 8, 0)
        q, k, v, batch = case.inputs(torch.float32)
        with CountCalls() as counter:
            out, _ = attention(q.requires_grad_(), k, v, batch, sinks=sinks, **options(case))
            out.sum().backward()
        counts.append({name: count for name, count in counter.calls.items() if "attention" in name})
    assert counts[0] == counts[1] and len(counts[0]) == 2


# The algebra.


@given(
    lses=st.lists(st.sampled_from([0.0, 1.5, -80.0, 300.0, 1e4, -1e4, -INF]), min_size=1, max_size=4),
    values=st.tuples(logits, logits),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_adding_sinks_is_merging_with_one_more_partial(
    lses: list[float], values: tuple[float, float], dtype: torch.dtype
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.tensor(lses, dtype=wide)[:, None].repeat(1, 2)
    out = torch.randn(len(lses), 2, 3).to(dtype).masked_fill(lse[..., None] == -INF, 0)
    sinks = torch.tensor(values, dtype=wide)
    got = add_sinks(out, lse, sinks)
    want = merge((out, torch.zeros_like(out)), (lse, sinks.expand_as(lse)), backend="reference")
    assert [x.dtype for x in got] == [dtype, wide]
    torch.testing.assert_close(got[0].to(wide), want[0].to(wide), rtol=2 * torch.finfo(dtype).eps, atol=1e-30)
    torch.testing.assert_close(got[1], want[1], rtol=2e-7, atol=2e-7)


@given(
    lses=st.lists(st.sampled_from([0.0, 1.5, -80.0, 1e4, -1e4, -INF]), min_size=1, max_size=4),
    values=st.tuples(logits, logits),
)
def test_adding_sinks_has_the_gradients_of_merging(lses: list[float], values: tuple[float, float]) -> None:
    grads = []
    for form in (add_sinks, lambda out, lse, x: merge((out, torch.zeros_like(out)), (lse, x.expand_as(lse)))):
        torch.manual_seed(0)
        lse = torch.tensor(lses, dtype=torch.float64)[:, None].repeat(1, 2).requires_grad_()
        out = torch.randn(len(lses), 2, 3, dtype=torch.float64).masked_fill(lse[..., None] == -INF, 0).requires_grad_()
        sinks = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        new_out, new_lse = form(out, lse, sinks)
        finite = new_lse.masked_fill(new_lse == -INF, 0)
        grads.append(torch.autograd.grad((new_out.cos().sum() + finite.sin().sum()), (out, lse, sinks)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(split=st.integers(0, 9), values=st.tuples(logits, logits))
@settings(max_examples=40)
def test_merged_partials_get_their_sinks_once(backend: str, split: int, values: tuple[float, float]) -> None:
    """The last token over 10 keys in two partials, the sinks in either of them or added to both together."""
    q, k, v, whole = Case((1,), (9,), (0, 0), 1, 8, None, 0, 3).inputs(torch.float64)
    sinks = torch.tensor(values, dtype=torch.float64)
    want = attention(q, k, v, whole, sinks=sinks, backend=backend)

    def part(keys: slice, own: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, count = (k[keys], v[keys]), len(k[keys])
        if not count:
            empty = torch.zeros_like(q), q.new_full(q.shape[:2], -INF)
            return empty if own is None else add_sinks(*empty, own)
        return attention(q, *rows, RaggedBatch.build([1], [count]), sinks=own, backend=backend)

    first, second = slice(split), slice(split, None)
    plain = [part(keys, None) for keys in (first, second)]
    for parts in (
        [part(first, sinks), plain[1]],
        [plain[0], part(second, sinks)],
        [add_sinks(*plain[0], sinks), plain[1]],
    ):
        for got, expected in zip(merge(*zip(*parts, strict=True)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for got, expected in zip(add_sinks(*merge(*zip(*plain, strict=True)), sinks), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 3, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_rows_have_the_same_bits_alone_and_together(heads: int, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    out, lse, sinks = torch.randn(67, heads, 5).to(dtype), 3 * torch.randn(67, heads, dtype=wide), torch.randn(heads)
    whole = add_sinks(out, lse, sinks)
    for rows in (1, 7, 64):
        parts = [add_sinks(*part, sinks) for part in zip(out.split(rows), lse.split(rows), strict=True)]
        for got, want in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(got), want)


def test_chunks_of_a_deterministic_prompt_have_its_bits() -> None:
    q, k, v, batch = Case((150,), (0,), (0, 0, 1), 2, 16, None, 0, 0).inputs(torch.float32)
    fixed = {"kv_head_of": (0, 0, 1), "sinks": torch.tensor([0.5, -1.0, 2.0]), "deterministic": True}
    whole = attention(q, k, v, batch, **fixed)
    parts = [
        attention(q[a:b], k[:b], v[:b], RaggedBatch.build([b - a], [b]), **fixed)
        for a, b in ((0, 64), (64, 128), (128, 150))
    ]
    for got, want in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(got), want)


# Nothing in, bad input, other devices.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(backend: str, tokens: int, heads: int) -> None:
    q, k = torch.zeros(tokens, heads, 8), torch.zeros(tokens, min(heads, 2), 8)
    sinks = torch.zeros(heads, requires_grad=True)
    out, lse = attention(q, k, k, RaggedBatch.prefill([tokens]), sinks=sinks, backend=backend)
    assert out.shape == (tokens, heads, 8) and lse.shape == (tokens, heads)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), sinks)
    assert grad.tolist() == [0] * heads


Q, K = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(3), r"`sinks` must be floating, of shape \[4\] \(one for each query head\) and on cpu, got"),
        (torch.zeros(4, 1), r"got torch.float32, \[4, 1\], cpu"),
        (torch.zeros(4, dtype=torch.int64), r"got torch.int64, \[4\], cpu"),
        (torch.zeros(4, device="meta"), r"got torch.float32, \[4\], meta"),
    ],
)
@own_errors()
def test_bad_sinks_are_refused(sinks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(Q, K, K, RaggedBatch.prefill([4]), sinks=sinks)
    with pytest.raises(ValueError, match=message):
        add_sinks(Q, torch.zeros(4, 4), sinks)


@own_errors()
def test_bad_partials_are_refused() -> None:
    with pytest.raises(ValueError, match=r"partials must be \[\.\.\., heads, d\] and \[\.\.\., heads\], got"):
        add_sinks(Q, torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"`lse` must be float32 or float64, got torch.bfloat16"):
        add_sinks(Q, torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([4, 4], [4, 4]), ([1, 1], [5, 5]), ([3], [9]), ([70], [90])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_devices_than_the_cpu_give_the_same_shapes(
    window: int | None, q_lens: list[int], kv_lens: list[int], dtype: torch.dtype
) -> None:
    """Through the operator for CUDA and its backward pass, on tensors without data."""
    q = torch.empty(sum(q_lens), 4, 8, device="meta", dtype=dtype, requires_grad=True)
    k = torch.empty(sum(kv_lens), 2, 8, device="meta", dtype=dtype, requires_grad=True)
    sinks = torch.empty(4, device="meta", requires_grad=True)
    batch = RaggedBatch.build(q_lens, kv_lens)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, lse = attention(q, k, k, batch, window=window, sinks=sinks, backend="torch")
        assert out.shape == q.shape and out.is_contiguous() and out.dtype == dtype
        assert lse.shape == q.shape[:2] and lse.is_contiguous() and lse.dtype == torch.float32
        if grad:
            grads = torch.autograd.grad(out.sum(), (q, k, sinks))
            assert [x.shape for x in grads] == [q.shape, k.shape, sinks.shape]


@given(case=cases(), values=st.lists(logits, min_size=1, max_size=3))
@settings(max_examples=30)
def test_the_cuda_path_serves_inference_with_sinks_and_leaves_training_to_the_other(
    case: Case, values: list[float]
) -> None:
    q, k, v, batch = case.inputs(torch.float64)
    sinks = sinks_of(case, values)
    want = attention(q, k, v, batch, sinks=sinks, backend="reference", **options(case))
    results = []
    for operator, leaf in ((play_varlen, sinks), (refuse, sinks.clone().requires_grad_())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(varlen, "serves", lambda q: True)
            patch.setattr("torch.nn.attention.varlen.varlen_attn", operator)
            results.append(attention(q, k, v, batch, sinks=leaf, backend="torch", **options(case)))
    for result in results:
        for x, y in zip(result, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def refuse(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    raise AssertionError("not this operator")
