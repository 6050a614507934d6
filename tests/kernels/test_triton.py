"""Triton kernels around collectives and caches equal their definitions, in Triton's interpreter.

What they return is `torch.empty` before, which this suite fills with NaN, so that every element is seen to be written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import RopeConfig, add_rms_norm, norm_rotary, rms_norm, rope_table, rotary, swiglu
from seqpar.kernels.columns import KEY, OTHER, QUERY, ColumnPlan, pack_columns, pack_heads, unpack_columns
from seqpar.kernels.dispatch import choose_backend
from seqpar.kernels.quantize import Wire, decode, decode_sum, encode, recode_sum
from seqpar.kernels.rows import Span, append_rows, copy_spans
from seqpar.kernels.rows import triton as rows_in_triton
from tests.kernels import interpreter  # noqa: F401  puts bfloat16 right
from tests.kernels.own_errors import own_errors
from tests.kernels.test_quantize import numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
few = settings(max_examples=4, deadline=None)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
wires = pytest.mark.parametrize("wire", ["int8", "fp8"])


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with np.errstate(all="ignore"):  # of arithmetic that GPUs do without a word
        yield


def heads_of(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> Tensor:
    """Every second head of a wider buffer, as keys and values lie in a projection."""
    return torch.randn(tokens, 2 * heads + 1, dim).to(dtype)[:, 1::2]


def eps_of(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def test_auto_is_triton_on_a_gpu_for_what_it_takes() -> None:
    for op in ("columns", "norm_rotary", "quantize", "rms_norm", "rotary", "rows", "swiglu"):
        assert choose_backend(op, torch.device("cuda"), torch.bfloat16) == "triton"
        assert choose_backend(op, torch.device("cuda"), torch.float64) == "torch"
    assert choose_backend("experts", torch.device("cuda"), torch.bfloat16) == "torch"


@dtypes
@given(rows=st.integers(0, 9), columns=st.sampled_from([1, 3, 17, 64, 1000]), size=st.sampled_from([1e-4, 1, 1e3]))
@few
def test_rms_norm(dtype: torch.dtype, rows: int, columns: int, size: float) -> None:
    x, more = ((torch.randn(rows, columns + 3, dtype=torch.float64) * size).to(dtype)[:, 1:-2] for _ in range(2))
    weight = torch.randn(columns).to(dtype)
    got = rms_norm(x, weight, EPS, backend="triton")
    want = rms_norm(x.double(), weight.double(), EPS, backend="reference")
    assert got.dtype == dtype and got.is_contiguous()
    # the roundings of row, weight and result, and as many for the sum of squares
    assert ((got.double() - want).abs() <= 6 * eps_of(dtype) * want.abs() + torch.finfo(dtype).tiny).all()
    normed, total = add_rms_norm(x, more, weight, EPS, backend="triton")
    assert torch.equal(total, x + more)
    assert torch.equal(normed, rms_norm(x + more, weight, EPS, backend="triton"))


@given(tokens=st.integers(0, 5), heads=st.integers(1, 5), dim=st.sampled_from([8, 20, 128]))
@few
def test_rms_norm_of_heads_that_are_views(tokens: int, heads: int, dim: int) -> None:
    x, weight = heads_of(torch.float32, tokens, heads, dim), torch.randn(dim)
    want = rms_norm(x, weight, EPS, backend="reference")
    torch.testing.assert_close(rms_norm(x, weight, EPS, backend="triton"), want, rtol=1e-6, atol=1e-6)
    turned = rms_norm(x.transpose(0, 1), weight, EPS, backend="triton")
    assert torch.equal(turned, rms_norm(x, weight, EPS, backend="triton").transpose(0, 1))


def test_mixed_dtypes_promote() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    got = rms_norm(x, weight, EPS, backend="triton")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rms_norm(x, weight, EPS, backend="reference"), rtol=2**-7, atol=0)
    cos, sin = rope_table(RopeConfig(8), torch.arange(3))
    assert rotary(x[:, None], cos, sin, backend="triton").dtype == torch.float32


@dtypes
@given(
    tokens=st.integers(0, 3),
    heads=st.integers(0, 5),
    dims=st.sampled_from([(2, 2), (6, 6), (16, 16), (64, 64), (12, 6), (20, 16)]),
)
@few
def test_rotary(dtype: torch.dtype, tokens: int, heads: int, dims: tuple[int, int]) -> None:
    x, (cos, sin) = heads_of(dtype, tokens, heads, dims[0]), torch.randn(2, tokens, dims[1]).to(dtype)
    got = rotary(x, cos, sin, backend="triton")
    want = rotary(x.double(), cos.double(), sin.double(), backend="reference")
    bound = (
        eps_of(dtype) * largest(x) * (largest(cos) + largest(sin))
    )  # one rounding of at most this much, and float32's
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert got.dtype == dtype and got.is_contiguous()
    weight = torch.randn(dims[0]).to(dtype)
    got = norm_rotary(x, weight, EPS, cos, sin, backend="triton")
    want = rotary(rms_norm(x.double(), weight.double(), EPS), cos.double(), sin.double(), backend="reference")
    bound = 3 * eps_of(dtype) * largest(weight) * dims[0] ** 0.5 * (largest(cos) + largest(sin))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


@dtypes
@given(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=4) | st.just([2500, 2500]), tokens=st.integers(0, 3))
@few
def test_swiglu(dtype: torch.dtype, blocks: list[int], tokens: int) -> None:
    gate_up = (torch.randn(tokens, 2 * sum(blocks) + 3) * 4).to(dtype)[:, 3:]
    got = swiglu(gate_up, blocks, backend="triton")
    want = swiglu(gate_up.double(), blocks, backend="reference")
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(got.double(), want, rtol=eps_of(dtype) if dtype != torch.float32 else 1e-6, atol=tiny)
    assert got.is_contiguous()


@wires
@dtypes
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    n=st.integers(0, 200) | st.sampled_from([32, 64, 96, 128]),
    exponents=st.sampled_from([(-3, 3), (-149, -120), (-126, 126), (120, 128), (10, 17)]),
)
@settings(max_examples=4, deadline=None)
def test_wire_formats_are_those_of_the_definition_byte_for_byte(
    wire: Wire, dtype: torch.dtype, seed: int, rows: int, n: int, exponents: tuple[int, int]
) -> None:
    x = numbers(seed, rows, n, dtype, exponents)
    data = encode(x, wire, backend="triton")
    assert torch.equal(data, encode(x, wire, backend="reference"))
    for wanted in DTYPES:
        assert torch.equal(
            decode(data, n, wanted, wire, backend="triton"), decode(data, n, wanted, wire, backend="reference")
        )


@wires
@pytest.mark.parametrize("own", [None, 0, 1, 2])
@given(rows=st.integers(0, 4), n=st.sampled_from([5, 64, 150]), seed=st.integers(0, 99))
@settings(max_examples=2, deadline=None)
def test_sums_of_parts_wherever_they_lie(wire: Wire, own: int | None, rows: int, n: int, seed: int) -> None:
    """As collectives deliver them: all in one buffer, or the rank's own elsewhere."""
    make = torch.Generator().manual_seed(seed)
    received = encode(torch.randn(3 * rows, n, generator=make), wire)
    parts = list(received.view(3, rows, received.shape[1]).unbind(0))
    if own is not None:
        parts.insert(own, encode(-torch.randn(rows, n, generator=make), wire))
    for dtype in DTYPES:
        want = decode_sum(parts, n, dtype, wire, backend="reference")
        assert torch.equal(decode_sum(parts, n, dtype, wire, backend="triton"), want)
        data = recode_sum(parts, n, dtype, wire, backend="reference")
        assert torch.equal(recode_sum(parts, n, dtype, wire, backend="triton"), data)
    scattered = [part.clone() for part in parts]
    assert torch.equal(decode_sum(scattered, n, dtype, wire, backend="triton"), want)


def test_every_8_bit_float_and_what_lies_between() -> None:
    """Also the smallest, which a random row has none of beside its largest number."""
    codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.stack([between, between * (1 - 2**-20), between * (1 + 2**-20), codes[1:]], 1).flatten()
    x = torch.cat([near, -near]).view(-1, 63)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], 1)
    assert torch.equal(encode(x, "fp8", backend="triton"), encode(x, "fp8", backend="reference"))


@wires
def test_what_is_not_finite_makes_its_group_nan_and_no_other(wire: Wire) -> None:
    x = torch.randn(3, 150)
    x[1, 70], x[2, 149] = torch.nan, -torch.inf
    got = decode(encode(x, wire, backend="triton"), 150, x.dtype, wire, backend="triton")
    want = decode(encode(x, wire), 150, x.dtype, wire)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    zeros = decode(encode(-torch.zeros(1, 64), wire), 64, x.dtype, wire, backend="triton")
    assert zeros.signbit().all() == (wire == "fp8")  # which has a zero with a sign


Parts = tuple[tuple[tuple[int, ...], ...], int, tuple[int, ...]]
"""What a `ColumnPlan` is made of; a strategy that made one would find the checker of types drawing numbers."""


@st.composite
def plans(draw: st.DrawFn, *, tiles: bool = False) -> Parts:
    units, unit = draw(st.integers(1, 6)), draw(st.sampled_from([2, 6, 16, 1100] if tiles else [2, 6, 16]))
    kinds = tuple(draw(st.lists(st.sampled_from([OTHER, QUERY, KEY]), min_size=units, max_size=units)))
    if tiles:
        cuts = sorted(draw(st.lists(st.integers(0, units), max_size=3)))
        order = draw(st.permutations(range(units)))
        bounds = zip([0, *cuts], [*cuts, units], strict=True)
        return tuple(tuple(order[a:b]) for a, b in bounds), unit, kinds
    blocks = draw(st.lists(st.lists(st.integers(0, units - 1), max_size=4), min_size=1, max_size=4))
    return tuple(map(tuple, blocks)), unit, kinds


@dtypes
@given(data=st.data(), tokens=st.integers(0, 4))
@few
def test_columns_go_where_the_plan_says_and_back(dtype: torch.dtype, data: st.DataObject, tokens: int) -> None:
    plan = ColumnPlan(*data.draw(plans()))
    x = torch.randn(tokens, len(plan.kinds) * plan.unit + 5).to(dtype)[:, 5:]
    assert torch.equal(pack_columns(x, plan, backend="triton"), pack_columns(x, plan, backend="reference"))
    plan = ColumnPlan(*data.draw(plans(tiles=True)))
    x = torch.randn(tokens, len(plan.kinds) * plan.unit).to(dtype)
    packed = pack_columns(x, plan, backend="triton")
    assert torch.equal(packed, pack_columns(x, plan, backend="reference"))
    for backend in ("triton", "reference"):
        assert torch.equal(unpack_columns(packed, plan, tokens, backend=backend), x)


@dtypes
@given(parts=plans(), tokens=st.integers(0, 4), turn=st.booleans(), norms=st.integers(0, 3))
@few
def test_heads_are_prepared_on_the_way(dtype: torch.dtype, parts: Parts, tokens: int, turn: bool, norms: int) -> None:
    plan = ColumnPlan(*parts)
    x = torch.randn(tokens, len(plan.kinds) * plan.unit + 5).to(dtype)[:, 5:]
    cos, sin = torch.randn(2, tokens, plan.unit).clamp(-1, 1).to(dtype)
    weight = torch.randn(2, plan.unit).clamp(-1, 1).to(dtype)
    options: dict[str, Any] = {"cos": cos, "sin": sin} if turn else {}
    options |= {f"{name}_norm": (weight[i], EPS) for i, name in enumerate("qk") if norms >> i & 1}
    got = pack_heads(x, plan, **options, backend="triton")
    exact: dict[str, Any] = {
        key: value.double() if isinstance(value, Tensor) else (value[0].double(), EPS) for key, value in options.items()
    }
    want = pack_heads(x.double(), plan, **exact, backend="reference")
    most = max(largest(x), plan.unit**0.5)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * eps_of(dtype) * most)
    plain = pack_columns(x, plan, backend="reference")
    kinds = torch.tensor(plan.kinds).repeat_interleave(plan.unit).expand_as(x)
    moved = pack_columns(kinds, plan, backend="reference") == OTHER
    assert torch.equal(got[moved], plain[moved])


@dtypes
@given(tokens=st.integers(0, 6), heads=st.integers(0, 5), dim=st.sampled_from([1, 6, 64]), seed=st.integers(0, 99))
@few
def test_rows_are_appended_at_their_slots(dtype: torch.dtype, tokens: int, heads: int, dim: int, seed: int) -> None:
    stores = torch.full((2, 2, 9, heads + 2, dim), torch.nan).to(
        dtype
    )  # one for either backend; heads of others beside
    new = torch.randn(tokens, heads, 2, dim).to(dtype)
    slots = torch.tensor(random.Random(seed).sample(range(9), tokens), dtype=torch.int64)
    for backend, store in zip(("triton", "reference"), stores, strict=True):
        append_rows(store[0][:, 1:-1], store[1][:, 1:-1], *new.unbind(2), slots, backend=backend)
    assert torch.equal(stores[0].view(torch.uint8), stores[1].view(torch.uint8))
    assert stores.isfinite().sum() == 2 * new.numel()


def test_a_slot_that_is_not_there_is_not_written() -> None:
    store = torch.zeros(3, 4, 1, 2)
    append_rows(
        store[0], store[1], torch.ones(3, 1, 2), torch.ones(3, 1, 2), torch.tensor([4, -1, 2]), backend="triton"
    )
    assert store.nonzero()[:, 1].unique().tolist() == [2] and store[2].count_nonzero() == 0


@dtypes
@given(data=st.data(), width=st.sampled_from([1, 6, 4096]), in_place=st.booleans())
@few
def test_spans_are_copied_as_one_after_another(
    dtype: torch.dtype, data: st.DataObject, width: int, in_place: bool
) -> None:
    drawn = data.draw(st.lists(st.tuples(*[st.integers(0, 8)] * 2, st.integers(0, 3)), max_size=4))
    spans: list[Span] = [one for one in drawn if not in_place or one[0] == one[1] or abs(one[0] - one[1]) >= one[2]]
    rows = torch.arange(11 * width).view(11, width).to(dtype)
    found = []
    for backend in ("triton", "reference"):
        source = rows.clone()
        target = source if in_place else torch.full_like(rows, -1)
        copy_spans(target, source, spans, backend=backend)
        found.append(target)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("spans", "in_place", "apart"),
    [
        ([(0, 4, 2), (6, 8, 2)], True, True),
        ([(0, 4, 2), (5, 8, 2)], True, False),  # reads the last row that the first writes
        ([(3, 4, 1), (4, 6, 1)], True, False),
        ([(0, 4, 2), (5, 8, 2)], False, True),
        ([(0, 4, 2), (6, 5, 1)], False, False),
        ([(0, 4, 2), (0, 6, 2)], True, True),
        ([(4, 4, 2), (0, 2, 2)], True, True),
    ],
)
def test_spans_are_one_launch_where_their_order_does_not_matter(spans: list[Span], in_place: bool, apart: bool) -> None:
    """The interpreter runs one program after another, and would not show it."""
    assert rows_in_triton._apart(spans, in_place=in_place) == apart


# Gradients, and what PyTorch sees of a kernel.

ENTRIES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS, backend="triton"), [torch.randn(3, 2, 8), torch.randn(8)]),
    "add_rms_norm": (
        lambda x, y, w: add_rms_norm(x, y, w, EPS, backend="triton"),
        [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)],
    ),
    "rotary": (
        lambda x, c, s: rotary(x, c, s, backend="triton"),
        [torch.randn(3, 2, 8), torch.randn(3, 6), torch.randn(3, 6)],
    ),
    "swiglu": (lambda x: swiglu(x, (3, 2, 2), backend="triton"), [torch.randn(3, 14)]),
}


def gradients(fn: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum((out * torch.arange(out.numel()).view_as(out)).sum() for out in outs)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", ENTRIES)
def test_gradients_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, inputs = ENTRIES[name]
    got = gradients(fn, inputs)
    plain: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w: rms_norm(x, w, EPS, backend="reference"),
        "add_rms_norm": lambda x, y, w: add_rms_norm(x, y, w, EPS, backend="reference"),
        "rotary": lambda x, c, s: rotary(x, c, s, backend="reference"),
        "swiglu": lambda x: swiglu(x, (3, 2, 2), backend="reference"),
    }
    want = gradients(plain[name], [x.double() for x in inputs])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


PLAN = ColumnPlan(((0, 1), (1, 0)), 8, (QUERY, KEY))


def every_entry(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
    """All entries, one after another, on heads [t, h, d]."""
    x, total = add_rms_norm(x, x, weight, EPS, backend="triton")
    x = rotary(rms_norm(x + total, weight, EPS, backend="triton"), cos, sin, backend="triton")
    x = norm_rotary(x, weight, EPS, cos, sin, backend="triton")
    packed = pack_heads(x.flatten(1), PLAN, cos=cos, sin=sin, backend="triton")
    x = swiglu(packed.view(len(x), -1), (x.shape[2],) * 2, backend="triton").view(len(x), 2, -1)
    append_rows(keys, keys + 1, x, x, slots, backend="triton")
    data = encode(x.flatten(1), "int8", backend="triton")
    return decode(data, x[0].numel(), x.dtype, "int8", backend="triton") + keys.sum()


def test_all_compile_into_one_graph() -> None:
    heads, table = torch.randn(3, 2, 8), torch.randn(2, 3, 8)
    inputs = (heads, torch.randn(8), *table, torch.zeros(5, 2, 8), torch.tensor([4, 0, 2]))
    kept = inputs[4].clone()
    want = every_entry(*inputs)
    inputs[4].copy_(kept)
    with own_errors():  # the checker of shapes is no part of the library, and breaks graphs
        got = torch.compile(every_entry, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_all_are_exported_whole() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return swiglu(add_rms_norm(x, x, weight, EPS, backend="triton")[0], (4,), backend="triton")

    inputs = (torch.randn(3, 8), torch.randn(8))
    with own_errors():
        exported = torch.export.export(Both(), inputs)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"seqpar.add_rms_norm.default", "seqpar.swiglu.default"} <= called
    torch.testing.assert_close(exported.module()(*inputs), Both()(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.zeros(1, 40000), torch.zeros(40000), EPS, backend="triton"), "at most 32768 columns"),
        (lambda: rms_norm(torch.zeros(1, 2).double(), torch.zeros(2), EPS, backend="triton"), "float32, bfloat16 or"),
        (lambda: add_rms_norm(torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(2), EPS), "`more` must have the shape"),
        (lambda: swiglu(torch.zeros(1, 2).double(), (1,), backend="triton"), 'backend="torch" takes it'),
        (lambda: decode_sum([], 4, torch.float32, "int8"), "`parts` must be one or more of one shape"),
        (lambda: pack_columns(torch.zeros(1, 6), ColumnPlan(((3,),), 2)), "`plan` must have units of 2 columns within"),
        (lambda: unpack_columns(torch.zeros(4), ColumnPlan(((0,), (0,)), 2), 1), "of a plan that has each once"),
        (lambda: copy_spans(torch.zeros(2, 1), torch.zeros(2, 1), [(1, 0, 2)]), "`spans` must lie within 2 rows and 2"),
        (
            lambda: append_rows(*torch.zeros(2, 4, 1, 2), *torch.zeros(2, 3, 1, 2), torch.zeros(2, dtype=torch.int64)),
            r"`k` and `v` must be \[2, 1, 2\]",
        ),
    ],
)
@own_errors()
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
