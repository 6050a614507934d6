"""Recorded steps: which graphs serve whom, results beside eager ones, what is refused, in what order streams record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import graphs
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import GraphKey, GraphKeys, HeadMap, Layout, Shift, even_ranges, even_split
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, rope
from tests.ranks import run_mesh, run_ranks

TP, SP = Layout(2, 1), Layout(1, 2)

# Which graphs.

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True)
STARTS = st.lists(st.integers(2, 70), max_size=3, unique=True).map(sorted)


@given(SIZES, STARTS)
def test_the_graphs_of_a_rule_are_those_that_its_steps_find(sizes: list[int], starts: list[int]) -> None:
    layouts = Layout(1, 8).reachable
    shift = Shift(tuple((start, layouts[-1 - i]) for i, start in enumerate([1, *starts])))
    every, own = GraphKeys.every(layouts, sizes), GraphKeys.of(shift, sizes)
    steps = [(shift.layout_of(n), n) for n in range(1, max(sizes) + 1)]
    found = [own.key_of(*step) for step in steps]
    assert set(found) == set(own.keys)  # none is missing, and none is there in vain
    assert found == [every.key_of(*step) for step in steps]
    assert [key and key.num_tokens for key in found] == [min(s for s in sizes if s >= n) for _, n in steps]
    assert own.key_of(layouts[-1], max(sizes) + 1) is None
    assert all(key == own.key_of(*key) for key in own.keys)


def test_no_graph_serves_a_layout_that_has_none() -> None:
    keys = GraphKeys.every([SP], [8, 2])
    assert keys.keys == ((SP, 2), (SP, 8))
    assert keys.key_of(TP, 2) is None and keys.key_of(SP, 3) == GraphKey(SP, 8)
    assert GraphKeys(()).keys == () and GraphKeys(()).key_of(SP, 1) is None
    for wrong in ([4, 4], [0]):
        with pytest.raises(ValueError, match=r"`keys` must be different and of at least 1 token, got \["):
            GraphKeys.every([SP], wrong)


# Steps of two decoder layers without a cache, one prompt: what lies behind a token cannot change it.

M, DIM = 12, 4


class Stack(nn.Module):
    def __init__(self, mesh: comm.DeviceMesh) -> None:
        super().__init__()
        self.layouts = comm.layout_groups(comm.groups(mesh))
        base = next(iter(self.layouts))
        torch.manual_seed(2)
        self.oracles = [DecoderLayer(M, 6, 3, DIM, 10).double().requires_grad_(False) for _ in range(2)]
        self.layers = nn.ModuleList(
            ParallelDecoderLayer.from_module(oracle, groups=self.layouts[base], heads=HeadMap(6, 3, *base))
            for oracle in self.oracles
        )
        for layer in self.layers:
            for layout in base.reachable[1:]:
                layer.add_layout(layout, groups=self.layouts[layout])
        self.seen: list[tuple[Layout, list[bool], bool]] = []
        self.batch = cache(lambda n: RaggedBatch.prefill([n]))

    def step(self, layout: Layout, real: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """All rows of the prompt, each times its scale."""
        self.seen.append((layout, real.tolist(), bool((x[~real] == 0).all() and (scale[~real] == 0).all())))
        batch, sp = self.batch(len(x)), self.layouts[layout].sp
        cos, sin = rope(batch.positions, DIM)
        out = x[slice(*even_ranges(len(x), sp.size())[sp.rank()])]
        for layer in self.layers:
            out = layer(out, batch, cos, sin, layout=layout)
        return comm.all_gather(out, group=sp, sizes=even_split(len(x), sp.size())) * scale[:, None]

    def expected(self, x: Tensor, scale: Tensor) -> Tensor:
        cos, sin = rope(torch.arange(len(x)), DIM)
        for layer in self.oracles:
            x = layer(x, (len(x),), cos, sin)
        return x * scale[:, None]


LIKE = (torch.empty(0, M, dtype=torch.float64), torch.empty(0, dtype=torch.float64))


def served(mesh: comm.DeviceMesh) -> tuple[tuple[GraphKey, ...], int, int]:
    stack = Stack(mesh)
    keys = GraphKeys.of(Shift(((1, TP), (4, SP))), [2, 5, 8])
    ours = comm.StepGraphs(stack.step, keys, LIKE, modules=[stack.layers], group=stack.layouts[SP].flat)
    assert [(layout, len(real)) for layout, real, _ in stack.seen] == list(ours.recorded)
    served = [(SP, 8), (SP, 7), (TP, 3), (TP, 1), (SP, 1), (SP, 4), (TP, 2), (TP, 5), (TP, 6), (SP, 9), (TP, 2)]
    for layout, n in served:
        x, scale = torch.randn(n, M, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
        stack.seen.clear()
        out = ours(layout, x, scale)
        torch.testing.assert_close(out, stack.expected(x, scale), rtol=1e-11, atol=1e-12)
        key = keys.key_of(layout, n)
        rows = n if key is None else key.num_tokens
        assert stack.seen == [(layout, [True] * n + [False] * (rows - n), True)]
    return ours.recorded, ours.replays, ours.eager


def test_steps_by_graphs_equal_eager_ones_whatever_their_size() -> None:
    """Recorded alike on all ranks; steps of 6 and 9 tokens, for which there is no graph, run as they are."""
    recorded = ((SP, 8), (SP, 5), (TP, 5), (TP, 2))
    assert run_mesh((1, 2), served) == [(recorded, 9, 2)] * 2


def in_place(mesh: comm.DeviceMesh) -> None:
    """Graphs read the parameters where they are: what changes in place is seen, what moves is refused."""
    stack = Stack(mesh)
    with torch.inference_mode():  # and called without it
        keys = GraphKeys.every([SP], [4])
        ours = comm.StepGraphs(stack.step, keys, LIKE, modules=[stack.layers], group=stack.layouts[SP].flat)
    x, scale = torch.randn(4, M, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    before = ours(SP, x, scale.requires_grad_())
    weight = stack.layers[1].mlp.down_proj.weight
    weight.mul_(2)
    with torch.inference_mode():
        after = ours(SP, x, scale)
    assert not torch.equal(before, after)
    assert torch.equal(after, stack.step(SP, torch.ones(4, dtype=torch.bool), x, scale))
    for moved in (weight.clone(), None):
        stack.layers[1].mlp.down_proj.weight = None if moved is None else nn.Parameter(moved)
        with pytest.raises(
            ValueError, match=r"`1.mlp.down_proj.weight` must stay where it was when the graphs were re"
        ):
            ours(SP, x, scale)
    assert ours.replays == 2


def test_parameters_may_change_but_not_move() -> None:
    run_mesh((1, 2), in_place)


@own_errors()
def refusals(rank: int, p: int) -> None:
    group = comm.groups(comm.init_mesh(1, p, "cpu")).flat
    x = torch.randn(3, 2)

    def made(step: Callable[..., Any], like: Sequence[Tensor] = (x,), sizes: Sequence[int] = (4,)) -> comm.StepGraphs:
        return comm.StepGraphs(step, GraphKeys.every([SP], sizes), like, modules=[], group=group)

    with pytest.raises(ValueError, match=r"`like` must be tensors on one device, got 0 on 0 devices"):
        made(lambda layout, real: real, like=())
    with pytest.raises(
        ValueError, match=r"`step` must return a row for each of the 4 rows of its inputs, got \[2, 2\]; g"
    ):
        made(lambda layout, real, x: x[:2] if rank == 1 else x)  # on one rank alone
    with pytest.raises(TypeError, match=r"`step` must return a tensor, got tuple"):
        made(lambda layout, real, x: (x, x) if rank == 1 else x)
    same = made(lambda layout, real, x: x)  # the buffer itself
    kept = same(SP, x)
    same(SP, 0 * x)
    assert torch.equal(kept, x)  # a result is the caller's own
    ours = made(lambda layout, real, x: x[:4] * 2)
    assert torch.equal(ours(SP, x), 2 * x)
    with pytest.raises(ValueError, match=r"`step` must return a row for each of the 5 rows .* got \[4, 2\]"):
        ours(SP, torch.ones(5, 2))  # eagerly
    with pytest.raises(ValueError, match=r"`inputs` must be 1, as many as `like`, got 2"):
        ours(SP, x, x)
    for wrong in (x.double(), x[:, :1], x[0], x.to("meta")):
        with pytest.raises(
            ValueError, match=r"`inputs\[0\]` must be \[\d, 2\] torch.float32 on cpu, as `like` announced"
        ):
            ours(SP, wrong)
    with pytest.raises(ValueError, match=r"`inputs\[1\]` must be \[3, 2\] .* the rows of the first, got \[2, 2\]"):
        made(lambda layout, real, x, y: x, like=(x, x))(SP, x, x[:2])
    none = made(lambda layout, real, x: x + 1, sizes=())
    assert torch.equal(none(SP, x), x + 1) and none.recorded == () and none.eager == 1


def test_what_cannot_be_recorded_or_replayed_is_refused_on_all_ranks() -> None:
    run_ranks(2, refusals)


# Recording on streams, where all that is done is written down.


def on_streams(rank: int, p: int) -> list[str]:
    group, log = comm.groups(comm.init_mesh(1, 1, "cpu")).flat, list[str]()
    stack = ["here"]

    class Graph:
        def replay(self) -> None:
            log.append(f"replay on {stack[-1]}")

    @contextmanager
    def use(stream: str) -> Iterator[None]:
        stack.append(stream)
        yield
        stack.pop()

    @contextmanager
    def record(graph: Graph, *, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert isinstance(graph, Graph) and capture_error_mode == "thread_local"
        log.append(f"record into {pool}")
        yield
        log.append("end")

    def step(layout: Layout, real: Tensor, x: Tensor) -> Tensor:
        log.append(f"{len(x)} rows on {stack[-1]}")
        return x

    with pytest.MonkeyPatch.context() as patch, own_errors():
        patch.setattr(graphs, "current_stream", lambda device: stack[-1])
        patch.setattr(graphs, "new_stream", lambda device: "side")
        patch.setattr(graphs, "use_stream", use)
        patch.setattr(graphs, "follow", lambda stream: log.append(f"{stack[-1]} after {stream}"))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", record)
        one = Layout(1, 1)
        keys = GraphKeys.every([one], [2, 4])
        ours = comm.StepGraphs(step, keys, [torch.empty(0, 3)], modules=[], group=group)
        assert ours(one, torch.ones(3, 3)).shape == (3, 3)
    return log


def test_each_graph_is_warmed_up_on_another_stream_and_recorded_into_one_pool() -> None:
    def of(rows: int) -> list[str]:
        warm = ["side after here", f"{rows} rows on side", "here after side"]
        return [*warm, "record into the pool", f"{rows} rows on here", "end"]

    assert run_ranks(1, on_streams) == [[*of(4), *of(2), "replay on here"]]
