"""What is equal bit for bit: interleaved chunks and the same chunks in turn, always; the whole batch where rows are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seqpar import comm, kernels
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, even_ranges, even_split
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of, rope, written_rows
from tests.ranks import run_mesh, thinned

DIM, LAYERS, HIDDEN = 64, 3, 96
LAYOUTS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 4), (4, 1)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stack(NamedTuple):
    """Three decoder layers over the ranks of a mesh: 4 query and 2 KV heads of 16."""

    layers: list[ParallelDecoderLayer]
    groups: comm.Groups
    dtype: torch.dtype

    @classmethod
    def build(cls, mesh: comm.DeviceMesh, dtype: torch.dtype, window: int | None = None) -> Stack:
        groups = comm.groups(mesh)
        heads = HeadMap(4, 2, *groups.layout)
        torch.manual_seed(5)
        oracles = [DecoderLayer(DIM, 4, 2, 16, HIDDEN).to(dtype).requires_grad_(False) for _ in range(LAYERS)]
        layers = [
            ParallelDecoderLayer.from_module(oracle, groups=groups, heads=heads, layer_index=i, window=window)
            for i, oracle in enumerate(oracles)
        ]
        return cls(layers, groups, dtype)

    def cache(self) -> PagedKV:
        heads = self.layers[0].self_attn.core.num_kv_heads
        return PagedKV(LAYERS, 24, 16, heads, 16, dtype=self.dtype, device="cpu")

    def program(
        self, x: Tensor, batch: RaggedBatch, kv: PagedKV, extras: Sequence[int] = (0,) * LAYERS
    ) -> comm.Steps[Tensor]:
        """This rank's rows of a batch through the layers, with some more collectives before each."""
        cos, sin = (table.to(self.dtype) for table in rope(batch.positions, 16))
        mine = even_ranges(batch.num_tokens, self.groups.sp.size())[self.groups.sp.rank()]
        x = x[slice(*mine)]
        for layer, more in zip(self.layers, extras, strict=True):
            for kind in range(more):
                yield from extra(kind, self.groups.flat)
            x = yield from comm.call(layer, x, batch, cos, sin, kv)
        return x

    def gather(self, locals_: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
        """All rows of the chunks between `bounds`, out of every sequence rank's."""
        sizes = [even_split(b - a, self.groups.sp.size()) for a, b in pairwise(bounds)]
        group = self.groups.sp
        return torch.cat([comm.all_gather(x, group=group, sizes=s) for x, s in zip(locals_, sizes, strict=True)])

    def per_batch(self) -> int:
        """Collectives of the layers for one batch."""
        return LAYERS * 2 * sum(size > 1 for size in self.groups.layout)


def extra(kind: int, group: comm.ProcessGroup) -> comm.Steps[None]:
    """A small collective with a known result."""
    p, mine = group.size(), torch.full((2,), float(group.rank()))
    if kind % 3 == 0:
        total = yield from comm.all_reduce_steps(mine, group=group)
        assert total.tolist() == [p * (p - 1) / 2] * 2
    elif kind % 3 == 1:
        every = yield from comm.all_gather_steps(mine, group=group)
        assert every.tolist() == [float(rank) for rank in range(p) for _ in range(2)]
    else:
        first = yield from comm.broadcast_steps(mine, src=p - 1, group=group)
        assert first.tolist() == [p - 1.0] * 2


def written(kv: PagedKV) -> list[Tensor]:
    """Every key and value that the cache holds."""
    at = written_rows(kv)
    return [pages.flatten(0, 1)[at] for layer in range(LAYERS) for pages in kv.layer(layer)]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def random_chunks(mesh: comm.DeviceMesh, dtype: torch.dtype, seed: int) -> None:
    """A mixed batch over filled caches, cut anywhere into 2 to 4 chunks whose programs yield unequally often."""
    draw, stack = random.Random(seed), Stack.build(mesh, dtype, window=random.Random(seed).choice([None, 7]))
    requests = range(draw.randint(1, 4))
    prefix, q_lens = ([draw.choice(lengths) for _ in requests] for lengths in ((0, 3, 20), (0, 1, 1, 9, 30)))
    q_lens[0] += draw.randint(1, 12)
    n, total = draw.randint(2, 4), sum(q_lens)
    cuts = sorted(draw.randint(0, total) for _ in range(n - 1))
    extras = [[draw.choice((0, 0, 1, 3)) for _ in range(LAYERS)] for _ in range(n)]
    torch.manual_seed(seed)
    before, x = torch.randn(sum(prefix), DIM).to(dtype), torch.randn(total, DIM).to(dtype)
    outs, caches, counts = [], [], []
    for how in ("interleaved", "in turn", "whole"):
        kv = stack.cache()
        with torch.no_grad(), comm.record() as sent:
            comm.run(stack.program(before, kv.batch(requests, prefix), kv))
            batch = kv.batch(requests, q_lens)
            bounds = [0, *cuts, total] if how != "whole" else [0, total]
            parts = zip(pairwise(bounds), batch.split(bounds[1:-1]), extras, strict=how != "whole")
            programs = [stack.program(x[a:b], part, kv, more) for (a, b), part, more in parts]
            local = comm.interleave(programs) if how == "interleaved" else [comm.run(each) for each in programs]
        outs.append(stack.gather(local, bounds))
        caches.append(written(kv))
        counts.append(sent.total.calls)
    same([outs[0], *caches[0]], [outs[1], *caches[1]])
    if dtype == torch.float64:
        for ours, theirs in zip([outs[0], *caches[0]], [outs[2], *caches[2]], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    if stack.groups.flat.size() > 1:
        assert counts[0] == counts[1] == (n + 1) * stack.per_batch() + sum(map(sum, extras))
        assert counts[2] == 2 * stack.per_batch() + sum(extras[0])


@pytest.mark.parametrize("layout", thinned(LAYOUTS, ((1, 2), (2, 2)).__contains__), ids=name_of)
def test_interleaved_chunks_are_the_chunks_in_turn(layout: tuple[int, int]) -> None:
    for seed, dtype in enumerate([*DTYPES.values(), torch.float64, torch.float64]):
        run_mesh(layout, random_chunks, dtype, 10 * sum(layout) + seed)


def large_sums(mesh: comm.DeviceMesh) -> None:
    """Chunks whose sums go by the backend's own algorithm, beside some that do not."""
    stack, kvs = Stack.build(mesh, torch.float32), []
    x, cuts, outs = torch.randn(1500, DIM), (30, 1460), []
    assert comm.all_reduce_algorithm(1430 * DIM * 4, 4, False, "cpu") == "backend"
    for drive in (comm.interleave, lambda programs: [comm.run(each) for each in programs]):
        kv = PagedKV.contiguous(LAYERS, 1, 1500, stack.layers[0].self_attn.core.num_kv_heads, 16, device="cpu")
        parts = zip(pairwise((0, *cuts, 1500)), kv.batch([0], [1500]).split(cuts), strict=True)
        with torch.no_grad():
            outs.append(drive([stack.program(x[a:b], part, kv) for (a, b), part in parts]))
        kvs.append(written(kv))
    same([*outs[0], *kvs[0]], [*outs[1], *kvs[1]])


def test_so_are_those_that_the_backend_sums() -> None:
    run_mesh((4, 1), large_sums)


def rows_are_invariant(stack: Stack, batch: RaggedBatch, cuts: Sequence[int], window: int | None) -> bool:
    """What the checks say of every product and of attention on this rank."""
    core = stack.layers[0].self_attn.core
    weights = [param for layer in stack.layers for param in layer.parameters() if param.dim() == 2]
    sp = stack.groups.sp.size()
    return all(kernels.is_row_invariant(weight, batch.num_tokens, cuts, sp=sp) for weight in weights) and (
        kernels.is_cut_invariant(
            batch,
            cuts,
            num_heads=core.num_heads,
            num_kv_heads=core.num_kv_heads,
            head_dim=16,
            dtype=stack.dtype,
            window=window,
            deterministic=True,
        )
    )


def unchunked(
    mesh: comm.DeviceMesh, dtype: torch.dtype, q_lens: Sequence[int], cuts: Sequence[int], window: Any
) -> Any:
    """Whether the checks hold on every rank; where they do, chunks by turns are the whole batch bit for bit."""
    stack = Stack.build(mesh, dtype, window)
    torch.manual_seed(3)
    x, total = torch.randn(sum(q_lens), DIM).to(dtype), sum(q_lens)
    outs, caches = [], []
    for at in ((), tuple(cuts)):
        kv = stack.cache()
        batch = kv.batch(range(len(q_lens)), q_lens)
        parts = zip(pairwise((0, *at, total)), batch.split(at), strict=True)
        with torch.no_grad():
            local = comm.interleave([stack.program(x[a:b], part, kv) for (a, b), part in parts])
        outs.append(stack.gather(local, (0, *at, total)))
        caches.append(written(kv))
    holds = rows_are_invariant(stack, batch, cuts, window)
    everywhere = comm.all_reduce(torch.tensor(float(not holds)), group=stack.groups.flat).item() == 0
    if everywhere:
        same([outs[0], *caches[0]], [outs[1], *caches[1]])
    return everywhere


WHOLE_REQUESTS = ((64, 32, 96), (64, 96), None)
INSIDE_A_REQUEST = ((192, 65), (64, 128, 192), None)
UNDER_A_WINDOW = ((192, 65), (64, 128, 192), 33)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case", [WHOLE_REQUESTS, INSIDE_A_REQUEST, UNDER_A_WINDOW], ids=["whole-requests", "inside", "windowed"]
)
@pytest.mark.parametrize(
    "layout", thinned([(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)], ((2, 1), (2, 2)).__contains__), ids=name_of
)
def test_chunks_are_the_whole_batch_where_rows_and_sums_are_invariant(
    layout: tuple[int, int], case: Any, dtype: torch.dtype
) -> None:
    """On random values, with deterministic sums."""
    found = run_mesh(layout, unchunked, dtype, *case, deterministic=True)
    assert len(set(found)) == 1
    if not found[0]:
        pytest.skip("this machine's products of these sizes depend on the number of rows")


def errors(mesh: comm.DeviceMesh, dtype: torch.dtype) -> tuple[float, float]:
    """Root mean square errors against float64 of the whole batch, and of chunks whose rows round otherwise."""
    q_lens, total = (150, 1, 49), 200
    outs = []
    torch.manual_seed(3)
    x = torch.randn(total, DIM).to(dtype)
    for precision, at in ((torch.float64, ()), (dtype, ()), (dtype, (1, 5, 70, 171))):
        stack = Stack.build(mesh, dtype)
        for layer in stack.layers:
            layer.to(precision)
        stack = stack._replace(dtype=precision)
        kv = stack.cache()
        parts = zip(pairwise((0, *at, total)), kv.batch(range(3), q_lens).split(at), strict=True)
        with torch.no_grad():
            local = comm.interleave([stack.program(x.to(precision)[a:b], part, kv) for (a, b), part in parts])
        outs.append(stack.gather(local, (0, *at, total)).double())
    whole, chunks = ((out - outs[0]).square().mean().sqrt().item() for out in outs[1:])
    return whole, chunks


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=name_of)
def test_elsewhere_chunks_err_as_the_whole_does(layout: tuple[int, int], dtype: torch.dtype) -> None:
    """Every rounding has the same bound in both, so the errors have one size; some 13,000 of them average out."""
    whole, chunks = run_mesh(layout, errors, dtype)[0]
    assert 0 < chunks <= 1.2 * whole
