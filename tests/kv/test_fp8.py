"""A cache in 8 bits holds what a cache of the rounded numbers holds, whatever becomes of its requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.hf import Stepper, parallelize
from seqpar.kernels.rows import FP8
from seqpar.kernels.rows.fp8 import decode, encode
from seqpar.kv import PagedKV, SavedKV, load_request, save_request
from seqpar.partition import Range, ThreePhase
from seqpar.ragged import RaggedBatch
from tests.hf.tiny import tiny_model
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

LAYERS, PAGE, HEADS, DIM = 2, 3, 2, 4


def rounded(x: Tensor) -> Tensor:
    """What 8 bits leave of rows."""
    return decode(*encode(x), x.dtype)


class Rounded(PagedKV):
    """A cache in the dtype, of numbers that have been through 8 bits."""

    def append(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch, *, heads: Range | None = None) -> None:
        super().append(layer, rounded(k), rounded(v), batch, heads=heads)


class Both:
    """The cache in 8 bits and the one of rounded numbers, to which the same is done."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.ours = PagedKV(LAYERS, 9, PAGE, HEADS, DIM, dtype=dtype, stored=FP8)
        self.exact = Rounded(LAYERS, 9, PAGE, HEADS, DIM, dtype=dtype)
        self.rng = torch.Generator().manual_seed(0)

    def append(self, requests: dict[str, int], parts: bool = False) -> None:
        tokens = sum(requests.values())
        k, v = (torch.randn(2, LAYERS, tokens, HEADS, DIM, generator=self.rng) * 5).to(self.ours.dtype)
        for kv in (self.ours, self.exact):
            batch = kv.batch(list(requests), list(requests.values()))
            for layer in range(LAYERS):
                for heads in (Range(0, 1), Range(1, 2)) if parts else (None,):
                    those = slice(None) if heads is None else slice(*heads)
                    kv.append(layer, k[layer][:, those], v[layer][:, those], batch, heads=heads)
        self.check()

    def each(self, change: Any) -> None:
        for kv in (self.ours, self.exact):
            change(kv)
        self.check()

    def check(self) -> None:
        """All that is held, read in pages and gathered."""
        ours, exact = self.ours, self.exact
        assert ours.ids == exact.ids
        for layer in range(LAYERS):
            for got, want in zip(ours.gather(layer, ours.ids), exact.gather(layer, exact.ids), strict=True):
                assert got.dtype == ours.dtype and torch.equal(got, want)
            batch = ours.batch(ours.ids, [0] * len(ours.ids))
            heads = Range(1, 2)
            scales = ours.scales(layer, heads=heads)
            assert scales is not None and exact.scales(layer) is None
            read = zip(ours.read(layer, batch, heads=heads), scales, exact.read(layer, batch, heads=heads), strict=True)
            for codes, scale, want in read:
                assert codes.dtype == FP8
                for request, pages in zip(ours.ids, batch.pages, strict=True):
                    last = ours.length(request) - PAGE * (len(pages) - 1)
                    for i, page in enumerate(pages):
                        rows = slice(0, last if i + 1 == len(pages) else PAGE)
                        assert torch.equal(decode(codes[page, rows], scale[page, rows], want.dtype), want[page, rows])
        ours.integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_done_to_it(dtype: torch.dtype, tmp_path: Path) -> None:
    both = Both(dtype)
    both.append({"a": 4, "b": 2})
    both.append({"b": 3, "a": 1}, parts=True)
    both.append({"c": 2})
    both.each(lambda kv: kv.truncate("a", 4))
    both.each(lambda kv: kv.fork("b", "d"))
    both.append({"d": 1, "b": 1})  # in a page of both
    both.each(lambda kv: kv.free("a"))
    both.each(lambda kv: kv.compact("tail"))
    both.each(lambda kv: kv.grow(num_pages=12))

    def swapped(kv: PagedKV) -> None:
        saved = SavedKV.of(kv, "b")
        save_request(kv, "c", tmp_path / "c")
        kv.free("b")
        kv.free("c")
        load_request(kv, "c", tmp_path / "c")
        saved.restore(kv, "b")

    both.each(swapped)  # nothing is lost on the way
    both.append({"b": 2, "c": 2})


def test_bytes() -> None:
    kv = PagedKV(3, 5, 4, 2, 128, dtype=torch.bfloat16, stored=FP8)
    assert kv.token_bytes == 2 * 2 * (128 + 1) and kv.nbytes == 3 * 5 * 4 * kv.token_bytes
    assert kv.dtype == torch.bfloat16 and kv.stored == FP8
    scales = kv.scales(0)
    assert scales is not None
    assert kv.nbytes == 3 * sum(x.nbytes for x in (*kv.layer(0), *scales))
    plain = PagedKV(3, 5, 4, 2, 128, dtype=torch.bfloat16)
    assert plain.stored == plain.dtype and plain.token_bytes == 2 * 2 * 256


@own_errors()
def test_what_is_refused() -> None:
    for options in ({"stored": torch.float8_e5m2}, {"stored": FP8, "dtype": torch.float64}):
        with pytest.raises(
            ValueError, match=r"`stored` must be None, or torch.float8_e4m3fn for a `dtype` of torch.float"
        ):
            PagedKV(1, 1, 1, 1, 4, **options)
    with pytest.raises(
        ValueError, match=r"and heads of at least 1, got torch.float8_e4m3fn for torch.float32 and heads o"
    ):
        PagedKV(1, 1, 1, 1, 0, stored=FP8)


def of_a_model(mesh: comm.DeviceMesh, options: dict[str, Any]) -> None:
    """Layers read what they have stored: logits are those over rounded keys and values, and not the model's own."""
    model = tiny_model("llama", dtype=torch.float32)
    with parallelize(model, mesh, **options):
        steppers = [Stepper(model, num_pages=9, page_size=3, stored=stored) for stored in (FP8, None, None)]
        spec = steppers[1].kv
        sizes = (spec.num_layers, spec.num_pages, spec.page_size, spec.num_kv_heads, spec.head_dim)
        steppers[1].kv = Rounded(*sizes, dtype=spec.dtype)
        for requests in ({0: 5, 1: 1}, {0: 1, 1: 4}, {1: 1, 0: 1}):
            tokens = torch.arange(sum(requests.values())) + requests[1]
            found = []
            for stepper in steppers:
                batch = stepper.kv.batch(list(requests), list(requests.values()))
                found.append(stepper(batch, tokens, batch.last_idx.tolist()))
            torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        assert (found[0] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layout", "options"),
    [((1, 1), {}), ((1, 2), {"pipeline": ThreePhase(2, 1, min_tokens=1)})],
    ids=["whole", "three-phase"],
)
def test_a_model_over_8_bits(layout: tuple[int, int], options: dict[str, Any]) -> None:
    run_mesh(layout, of_a_model, options)
