"""The table of what composes: no cell is missing, its tests exist, its refusals are raised, its page is fresh."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm, layers
from seqpar.layers import (
    ColumnParallelLinear,
    CSAAttention,
    OverlappedAttention,
    OverlappedMLP,
    ParallelLMHead,
    ParallelMLP,
    ParallelMoE,
    PipelinedUlysses,
    PipelineStage,
    PlacedCore,
    QShipDecodeAttention,
    RingAttention,
    RMSNorm,
    RowParallelLinear,
    Strided,
    UlyssesAttention,
    USPAttention,
    VocabParallelEmbedding,
    compile_segments,
)
from seqpar.partition import GraphKeys, HeadMap, Layout, ThreePhase
from seqpar.ragged import RaggedBatch
from tests.composition import COLUMNS, LAYERS, PAGE, REFUSALS, ROOT, NoArgument, Refused, named_tests, page
from tests.kernels.own_errors import own_errors
from tests.layers.reference import Attention
from tests.ranks import run_mesh

NOT_LAYERS = {"HeadParameter", "ShardedModule"}  # a parameter, of attention with sinks; the base of all


def test_every_public_layer_has_a_cell_in_every_column() -> None:
    public = {name for name in layers.__all__ if inspect.isclass(getattr(layers, name))}
    modules = {name for name in public if issubclass(getattr(layers, name), nn.Module)} - NOT_LAYERS
    assert modules == set(LAYERS)
    for name, row in LAYERS.items():
        assert set(row) == set(COLUMNS), name


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", named_tests(LAYERS))
def test_a_test_that_is_named_exists(test: str) -> None:
    file, name = test.split("::")
    assert name.startswith("test_") and name in functions_in(file)


def arguments(kind: type, method: str) -> set[str]:
    """Names that a method takes, those included that it hands on to the class above it."""
    found: set[str] = set()
    for base in kind.__mro__:
        if method in base.__dict__:
            parameters = inspect.signature(getattr(base, method)).parameters
            found |= set(parameters)
            if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
                break
    return found


def test_what_has_no_argument_has_none() -> None:
    in_hf = "".join(path.read_text() for path in (ROOT / "src" / "seqpar" / "hf").glob("*.py"))
    for name, row in LAYERS.items():
        for cell in row.values():
            if isinstance(cell, NoArgument) and cell.where == "hf":
                assert not re.search(rf"\b{cell.argument}\b", in_hf), name
            elif isinstance(cell, NoArgument):
                assert cell.argument not in arguments(getattr(layers, name), cell.where), (name, cell)


def test_the_page_is_made_of_this_table() -> None:
    text = PAGE.read_text()
    assert text == page(text), "run `python -m tests.composition`"


def made(groups: comm.Groups) -> dict[str, nn.Module]:
    """One of each layer that something refuses."""
    heads = HeadMap(4, 2, *groups.layout)
    core = UlyssesAttention(heads, 4, group=groups.sp)
    ring = RingAttention(heads, 4, group=groups.sp)
    source = Attention(6, 4, 2, 4, bias=False)
    cut = ThreePhase(1, 2, 0)
    stages = comm.stages(comm.init_mesh(tp=1, sp=1, pp=1, device="cpu"))
    linear: dict[str, Any] = {"group": groups.tp}
    return {
        "ColumnParallelLinear": ColumnParallelLinear(6, 4, **linear),
        "RowParallelLinear": RowParallelLinear(6, 4, **linear),
        "GateUpParallelLinear": layers.GateUpParallelLinear(6, 4, **linear),
        "QKVParallelLinear": layers.QKVParallelLinear(6, heads, 4, **linear),
        "VocabParallelEmbedding": VocabParallelEmbedding(5, 6, **linear),
        "ParallelLMHead": ParallelLMHead(6, 5, group=groups.flat, seq_group=groups.sp),
        "ParallelMoE": ParallelMoE(6, 4, 2, 1, groups=groups),
        "PipelinedUlysses": PipelinedUlysses(heads, 4, group=groups.sp),
        "RingAttention": ring,
        "USPAttention": USPAttention(heads, 4, groups=comm.split_groups(groups.sp, 1)),
        "CSAAttention": CSAAttention(heads, 4, group=groups.sp, policy=Strided(((1, 1),))),
        "PlacedCore": PlacedCore(ring, beside=core),
        "QShipDecodeAttention": QShipDecodeAttention(heads, 4, group=groups.sp),
        "OverlappedAttention": OverlappedAttention.from_module(source, groups=groups, heads=heads, pipeline=cut),
        "OverlappedMLP": OverlappedMLP(6, 4, **linear),
        "PipelineStage": PipelineStage(
            [nn.Linear(6, 6)],
            stages=stages,
            hidden_size=6,
            embed_tokens=nn.Embedding(5, 6),
            norm=nn.Identity(),
            lm_head=nn.Identity(),
        ),
    }


def in_a_graph(layer: nn.Module, groups: comm.Groups) -> None:
    def step(layout: Layout, real: Tensor, x: Tensor) -> Tensor:
        return x

    comm.StepGraphs(step, GraphKeys.every([Layout(1, 1)], [1]), [torch.empty(0)], modules=[layer], group=groups.flat)


def sequence_sharded(layer: nn.Module, groups: comm.Groups) -> None:
    if isinstance(layer, OverlappedMLP):
        OverlappedMLP(6, 4, group=groups.tp, sequence_sharded=True)
    source = Attention(6, 4, 2, 4, bias=False)
    heads = HeadMap(4, 2, *groups.layout)
    OverlappedAttention.from_module(
        source, groups=groups, heads=heads, pipeline=ThreePhase(1, 2, 0), sequence_sharded=True
    )


def with_gradient(layer: nn.Module, groups: comm.Groups) -> None:
    batch = RaggedBatch.prefill([2])
    if isinstance(layer, CSAAttention):
        q, k = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, 2, 4)
        layer(q, k, k, batch)
    elif isinstance(layer, PipelineStage):
        layer(torch.arange(2), batch, rows=[0])
    else:
        from seqpar.kv import StripedKV
        from seqpar.partition import Striping

        kv = StripedKV(1, 2, 2, 2, 4, striping=Striping(1), rank=0)
        layer(torch.randn(1, 32, requires_grad=True), kv.batch(["a"], [1]), kv=kv)


RAISES: dict[str, Callable[[nn.Module, comm.Groups], object]] = {
    "segments": lambda layer, groups: compile_segments(layer),
    "graph": in_a_graph,
    "overlapped tokens": sequence_sharded,
    "qship gradient": with_gradient,
    "csa gradient": with_gradient,
    "stage gradient": with_gradient,
}


def refused(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    built = made(groups)
    for name, row in LAYERS.items():
        for column, cell in row.items():
            if isinstance(cell, Refused):
                message = r".*".join(re.escape(part) for part in REFUSALS[cell.name].split("..."))
                with own_errors(), pytest.raises((ValueError, TypeError), match=f"^{message}$"):
                    RAISES[cell.name](built[name], groups)
                assert name in built, (name, column)


def test_what_is_refused_is_refused_with_that_message() -> None:
    assert set(RAISES) == set(REFUSALS)
    run_mesh((1, 1), refused)


class Steps(nn.Module):
    """Ids to logits, through layers that a graph can hold."""

    def __init__(self, groups: comm.Groups) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = VocabParallelEmbedding(7, 6, group=groups.tp, dtype=torch.float64)
        self.parts = nn.ModuleList(
            [
                RMSNorm(6, dtype=torch.float64),
                ParallelMLP(6, 10, group=groups.tp, dtype=torch.float64),
                OverlappedMLP(6, 10, group=groups.tp, dtype=torch.float64),
            ]
        )
        self.head = ParallelLMHead(6, 7, group=groups.flat, seq_group=groups.sp, dtype=torch.float64)

    def forward(self, layout: Layout, real: Tensor, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for part in self.parts:
            x = part(x)
        logits: Tensor = self.head(x)
        return logits


@torch.no_grad()
def held(mesh: comm.DeviceMesh) -> None:
    """Padded to the next size that was recorded, rows are what they are alone."""
    groups = comm.groups(mesh)
    model, layout = Steps(groups), groups.layout
    keys, like = GraphKeys.every([layout], [2, 5]), [torch.empty(0, dtype=torch.int64)]
    graphs = comm.StepGraphs(model, keys, like, modules=[model], group=groups.flat)
    for tokens in (1, 2, 4, 5, 6):
        ids = torch.arange(tokens) % 7
        alone = model(layout, torch.ones(tokens, dtype=torch.bool), ids)
        torch.testing.assert_close(graphs(layout, ids), alone, rtol=1e-12, atol=1e-12)
    assert (graphs.replays, graphs.eager) == (4, 1)


def test_steps_of_graphs_hold_these_layers() -> None:
    run_mesh((2, 1), held)
