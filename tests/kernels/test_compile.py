"""Whole attention entries under `torch.compile(fullgraph=True)` and `torch.export`, and their operators' own checks.

The batch is the program's, not its input: its lengths are what the graph is made for, another batch is another graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar.kernels import add_sinks, attention, merge
from seqpar.kernels.attention import launch
from seqpar.kernels.rows import FP8, append_rows
from seqpar.kernels.rows import triton as rows
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.kernels.tiles import small_tiles

GQA = (0, 0, 1)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_tiles():
        yield


class Step(torch.nn.Module):
    """A prompt beside a decode over pages, in both ways of storing them; a prompt by itself; their merge with sinks."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend
        self.paged = RaggedBatch.build([9, 1], [11, 6], [[2, 0], [1]], 8)
        self.flat = RaggedBatch.prefill([7, 3])

    def forward(self, q: Tensor, kv: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"kv_head_of": GQA, "window": 6, "backend": self.backend}
        k, v = kv.unbind(2)
        pages = [torch.ones(3, 8, 2, 16) for _ in range(2)]
        flat = [x.flatten(0, 1) for x in pages]
        append_rows(flat[0], flat[1], k, v, self.paged.slots, backend=self.backend)
        one = attention(q, pages[0], pages[1], self.paged, sinks=sinks, **options)
        codes = [torch.zeros(24, 2, 16, dtype=torch.uint8).view(FP8) for _ in range(2)]
        first, second = (torch.ones(24, 2, dtype=torch.uint8) for _ in range(2))
        append_rows(codes[0], codes[1], k, v, self.paged.slots, scales=(first, second), backend=self.backend)
        stored = (x.view(3, 8, 2, 16) for x in codes)
        scales = first.view(3, 8, 2), second.view(3, 8, 2)
        two = attention(q.bfloat16(), *stored, self.paged, scales=scales, **options)
        three = attention(q, k, v, self.flat, **options)
        out, lse = merge([one[0], two[0].float(), three[0]], [one[1], two[1], three[1]], backend=self.backend)
        return add_sinks(out, lse, sinks)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=rng) for shape in ((10, 3, 16), (10, 2, 2, 16), (3,)))


@own_errors()
def test_decodes_compile_into_one_graph() -> None:
    batch = RaggedBatch.build([1, 2], [4, 7], [[1], [0]], 8)

    def step(q: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, pages, pages, batch, kv_head_of=GQA, backend="triton")
        return merge([out, out], [lse, lse], backend="triton")

    given = inputs()[0][:3], torch.randn(2, 8, 2, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="`batch` must have been attended to once before it is tr"):
        compiled(*given)
    want = step(*given)
    for ours, exact in zip(compiled(*given), want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@own_errors()
def test_a_step_compiles_into_one_graph_and_is_exported_whole(backend: str) -> None:
    step = Step(backend)
    want = step(*inputs())
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs())
    exported = torch.export.export(step, inputs())
    for found in (got, exported.module()(*inputs())):
        for ours, exact in zip(found, want, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=0)
    if backend == "triton":
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        names = ("attention", "decode", "merge", "append_rows", "append_encoded")
        assert {f"seqpar.{name}.default" for name in names} <= called


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by PyTorch itself
@pytest.mark.parametrize("sinks", [False, True])
@own_errors()
def test_gradients_through_a_compiled_entry(sinks: bool) -> None:
    """Through the definition; of PyTorch's operators `lse` refuses its gradient by an error, which tracing meets."""
    batch = RaggedBatch.prefill([7, 3])
    q, kv, added = inputs()

    def fn(backend: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        chosen = added if sinks else None
        return attention(q, k, v, batch, kv_head_of=GQA, sinks=chosen, backend=backend)[0]

    leaves = [x.clone().requires_grad_() for x in (q, *kv.unbind(2), added)]
    found = []
    for call in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        out = call("reference", *leaves)
        found.append((out, *torch.autograd.grad(out.cos().sum(), leaves[: 4 if sinks else 3])))
    for ours, exact in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    if not sinks:
        fn("torch", *leaves)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="`lse` must not be differentiated with backend="):
            torch.compile(fn, fullgraph=True, backend="aot_eager")("torch", *leaves)


def test_operators_are_what_they_say() -> None:
    """Schema, fakes and tracing of those that the entries launch, by PyTorch's own checks."""
    paged, flat = RaggedBatch.build([9, 1], [11, 6], [[2, 0], [1]], 8), RaggedBatch.prefill([9])
    q, kv, _ = inputs()
    called: list[tuple[str, tuple[Any, ...]]] = []

    def kept(name: str) -> Any:
        return lambda *args: called.append((name, args))

    with pytest.MonkeyPatch.context() as patch, own_errors():
        patch.setattr(launch, "decode_into", kept("decode"))
        patch.setattr(launch, "attention_into", kept("attention"))
        patch.setattr(rows, "_append_encoded_op", kept("append_encoded"))
        pages = torch.randn(3, 8, 2, 16)
        attention(q, pages, pages, paged, kv_head_of=(0, 0, 1), backend="triton")
        k, v = kv[:9].unbind(2)
        attention(q[:9], k, v, flat, kv_head_of=(0, 1, 1), backend="triton")
        codes, scales = torch.zeros(24, 2, 16, dtype=torch.uint8).view(FP8), torch.zeros(24, 2, dtype=torch.uint8)
        append_rows(codes, codes.clone(), k, v, torch.arange(9), scales=(scales, scales.clone()), backend="triton")
        assert [name for name, _ in called] == ["decode", "attention"] * 2 + ["attention"] * 2 + ["append_encoded"]
        for name, args in (called[0], called[1], called[-1]):
            operator = getattr(torch.ops.seqpar, name).default
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
