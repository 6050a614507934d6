"""What layers compute between their yields compiles into whole graphs, in every layout, and gives the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import (
    ParallelDecoderLayer,
    PlacedCore,
    QShipDecodeAttention,
    RingAttention,
    compile_segments,
    restore_segments,
    sync_gradients,
)
from seqpar.partition import HeadMap, Layout, Striping
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.layers.test_decoder import HEAD_DIM, Case, inputs, my_tokens, parallel, reference
from tests.layers.test_dtypes import own_tokens
from tests.ranks import LAYOUTS, run_mesh

CASE = Case(8, 2, bias=True, qk_norm=True, q_lens=(5, 2))
NAMES = {"join", "activate", "normalise", "turn", "norm_turn"}


def graphs_of(layer: nn.Module, backend: str) -> list[int]:
    """Compile, and count the graphs that come to be."""
    made: list[int] = []

    def counted(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        made.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, example)

    torch._dynamo.reset()
    names = compile_segments(layer, backend=counted)
    assert {name.split(".")[-1] for name in names} == NAMES
    assert "mlp.activate" in names and "join" in names
    return made


def trained(layer: ParallelDecoderLayer, case: Case, groups: comm.Groups) -> list[Tensor]:
    """Output, and all gradients."""
    torch.manual_seed(1)
    x, batch, cos, sin = inputs(case)
    local = x[my_tokens(case, groups, len(x))].clone().requires_grad_()
    layer.zero_grad()
    out = layer(local, batch, cos, sin)
    out.square().sum().backward()
    sync_gradients(layer, groups)
    assert local.grad is not None
    return [out.detach(), local.grad, *(param.grad for param in layer.parameters() if param.grad is not None)]


@torch.no_grad()
def inferred(layer: ParallelDecoderLayer, case: Case, groups: comm.Groups) -> list[Tensor]:
    """A prompt and a decode over a cache, in the stored layout and in pure tensor parallelism."""
    torch.manual_seed(1)
    x, _, cos, sin = inputs(case)
    found = []
    for layout in dict.fromkeys((groups.layout, Layout(groups.layout.size, 1))):
        held = comm.layout_groups(groups, [layout])[layout]
        if layout != groups.layout and layout not in layer.ranks:
            layer.add_layout(layout, groups=held)
        kv = PagedKV(1, 4, 4, layer.self_attn.core.num_kv_heads, HEAD_DIM, dtype=torch.float64)
        for q_lens in ((4, 1), (1, 1)):
            kv.reserve(dict(enumerate(q_lens)))
            batch, tokens = kv.batch([0, 1], q_lens), sum(q_lens)
            mine = my_tokens(case, held, tokens)
            found.append(layer(x[:tokens][mine], batch, cos[:tokens], sin[:tokens], kv, layout=layout))
    return found


def compiled(mesh: comm.DeviceMesh, case: Case, backend: str) -> None:
    groups = comm.groups(mesh)
    layer = parallel(case, mesh, reference(case))
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of Inductor's own imports
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)  # Dynamo looks at every tensor's
    with own_errors():  # the checker of shapes is no part of the library, and breaks graphs
        runs = [trained] if case.sequence_sharded else [trained, inferred]
        want = [run(layer, case, groups) for run in runs]
        made = graphs_of(layer, backend)
        # The checker makes one code object of all functions, to which the limit of recompilations then applies.
        with torch._dynamo.config.patch(recompile_limit=64):
            got = [run(layer, case, groups) for run in runs]
        assert made, "nothing was compiled"
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        restore_segments(layer)
        before = len(made)
        torch.testing.assert_close([run(layer, case, groups) for run in runs], want, rtol=0, atol=0)
        assert len(made) == before and not any(name in layer.__dict__ for name in NAMES)


def replaced(mesh: comm.DeviceMesh) -> set[str]:
    """The names of what runs in place of the functions of every layer; compiling for real takes seconds a rank."""
    groups = comm.groups(mesh)
    layer = parallel(CASE, mesh, reference(CASE))
    ran: set[str] = set()

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"fullgraph": True, "backend": "chosen"}

        def run(*args: Any, **kwargs: Any) -> Any:
            ran.add(function.__name__)
            return function(*args, **kwargs)

        return run

    want = [trained(layer, CASE, groups), inferred(layer, CASE, groups)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiler)
        names = compile_segments(layer, backend="chosen")
    assert {name.split(".")[-1] for name in names} == NAMES and "mlp.activate" in names
    torch.testing.assert_close([trained(layer, CASE, groups), inferred(layer, CASE, groups)], want, rtol=0, atol=0)
    found, _ = set(ran), ran.clear()
    restore_segments(layer)
    trained(layer, CASE, groups)
    assert not ran
    return found


def test_every_segment_of_a_layer_runs_compiled_in_every_layout() -> None:
    for ran in run_mesh((2, 2), replaced):
        assert ran == {"add_rms_norm", "swiglu", "rms_norm", "norm_rotary"}  # no heads without a norm here


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_segments_compile_whole_and_give_the_same(layout: tuple[int, int]) -> None:
    run_mesh(layout, compiled, CASE, "aot_eager", timeout_s=300.0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=name_of)
def test_segments_of_sequence_sharded_layers(layout: tuple[int, int]) -> None:
    run_mesh(layout, compiled, Case(8, 2, qk_norm=True, sequence_sharded=True), "aot_eager", timeout_s=300.0)


@pytest.mark.slow
def test_segments_compile_with_inductor() -> None:
    run_mesh((2, 1), compiled, CASE, "inductor", timeout_s=600.0)


def without(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    with own_errors():
        ring = RingAttention(HeadMap(2, 2, *groups.layout), 2, group=groups.sp)
        with pytest.raises(ValueError, match="`root` must hold a layer with named segments, got RingAttention without"):
            compile_segments(ring)


def test_a_layer_without_segments_is_refused() -> None:
    run_mesh((1, 1), without)


class Calls(nn.Module):
    """A function as a module, which `torch.export` asks for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def exported(mesh: comm.DeviceMesh) -> None:
    """Each segment is exported whole, with a number of tokens that stays open."""
    layer = parallel(CASE, mesh, reference(CASE))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    x, heads = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 2, HEAD_DIM, dtype=torch.float64)
    norm, table = layer.input_layernorm, torch.randn(2, 6, HEAD_DIM, dtype=torch.float64)
    up = layer.mlp.gate_up_proj
    packed = torch.randn(6, 2 * sum(up.blocks()), dtype=torch.float64)
    weight = torch.randn(HEAD_DIM, dtype=torch.float64)
    calls = {
        "normalise": (lambda x: norm.normalise(x, norm.weight.detach(), norm.eps), (x,)),
        "join": (lambda x, y: layer.join(x, y, norm.weight.detach(), norm.eps), (x, x + 1)),
        "activate": (lambda x: layer.mlp.activate(x, up.blocks()), (packed,)),
        "turn": (lambda x, c, s: layer.self_attn.core.turn(x, c, s), (heads, *table)),
        "norm_turn": (lambda x, c, s: layer.self_attn.core.norm_turn(x, weight, 1e-6, c, s), (heads, *table)),
    }
    assert set(calls) == NAMES
    for name, (call, args) in calls.items():
        module = Calls(call)
        with own_errors():
            program = torch.export.export(module, args, dynamic_shapes=(({0: tokens},) * len(args),))
            fewer = tuple(arg[:4] for arg in args)
            torch.testing.assert_close(program.module()(*fewer), call(*fewer), rtol=1e-12, atol=1e-12, msg=name)


def test_segments_are_exported_for_any_number_of_tokens() -> None:
    run_mesh((1, 1), exported)


def other_layers(mesh: comm.DeviceMesh) -> None:
    """Layers that cut their tokens, and cores that place them: compiled segments give what eager ones give."""
    groups, case = comm.groups(mesh), Case(8, 2, qk_norm=True)
    x, batch, cos, sin = inputs(case)
    layer = own_tokens(case, mesh, reference(case))
    mine = my_tokens(case, groups, len(x))
    core = layer.self_attn.core
    ring = PlacedCore(RingAttention(core.heads, HEAD_DIM, group=groups.sp, tp_rank=groups.tp.rank()), beside=core)
    ship = QShipDecodeAttention(
        core.heads, HEAD_DIM, group=groups.sp, tp_rank=groups.tp.rank(), q_norm=core.q_norm, k_norm=core.k_norm
    )
    striping = Striping(groups.layout.sp)
    columns = core.heads.width(groups.tp.rank()) * HEAD_DIM

    def run() -> list[Tensor]:
        torch.manual_seed(4)
        kv = StripedKV(
            *(1, 40, 2 * striping.period, core.heads.kv_shard(groups.tp.rank()).size, HEAD_DIM),
            striping=striping,
            rank=groups.sp.rank(),
            dtype=torch.float64,
        )
        found = [layer(x[mine], batch, cos, sin)]
        for each, q_lens in ((ring, (5, 3)), (ship, (1, 1))):
            step = kv.batch("ab", q_lens)
            rows = each.rows(step) if each is ring else torch.arange(sum(q_lens)).tensor_split(striping.ranks)
            tokens = len(rows if each is ring else rows[groups.sp.rank()])
            qkv = torch.randn(tokens, columns, dtype=torch.float64)
            found.append(each(qkv, step, cos[: sum(q_lens)], sin[: sum(q_lens)], kv))
        return found

    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    with own_errors(), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        want = run()
        for module in (layer, ring, ship):
            assert compile_segments(module, backend="aot_eager")
        torch.testing.assert_close(run(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_segments_of_layers_that_cut_their_own_tokens() -> None:
    run_mesh((1, 2), other_layers, timeout_s=300.0)
