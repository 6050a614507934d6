"""A decoder layer under every layout against one float64 process: outputs, gradients, cache, layouts, wrappers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import (
    ParallelDecoderLayer,
    QKVParallelLinear,
    ShardedModule,
    iter_sources,
    name_modules,
    sync_gradients,
)
from seqpar.partition import HeadMap, Layout, even_ranges
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import LAYOUTS, run_mesh

HEAD_DIM = 6


@dataclass(frozen=True)
class Case:
    """One model shape; the ids read `h8g2` for 8 query and 2 KV heads."""

    num_heads: int
    num_kv_heads: int
    hidden: int = 25
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    q_lens: tuple[int, ...] = (7, 1, 3)
    sequence_sharded: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("bias", "qk_norm", "window", "sequence_sharded") if getattr(self, name))
        return f"h{self.num_heads}g{self.num_kv_heads}f{self.hidden}t{sum(self.q_lens)}{flags}"


CASES = [
    Case(8, 8),
    Case(8, 2, qk_norm=True, sequence_sharded=True),
    Case(8, 1, hidden=24, bias=True),
    Case(5, 5, bias=True, window=3),
    Case(14, 2, hidden=7, qk_norm=True, q_lens=(0, 2, 0)),
    Case(6, 3, sequence_sharded=True, bias=True, window=4),
]


def reference(case: Case, dtype: torch.dtype = torch.float64) -> DecoderLayer:
    torch.manual_seed(7)
    layer = DecoderLayer(
        11, case.num_heads, case.num_kv_heads, HEAD_DIM, case.hidden, bias=case.bias, qk_norm=case.qk_norm
    )
    return layer.to(dtype)


def parallel(case: Case, mesh: comm.DeviceMesh, layer: DecoderLayer) -> ParallelDecoderLayer:
    groups = comm.groups(mesh)
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    return ParallelDecoderLayer.from_module(
        layer, groups=groups, heads=heads, window=case.window, sequence_sharded=case.sequence_sharded
    )


def inputs(case: Case) -> tuple[Tensor, RaggedBatch, Tensor, Tensor]:
    batch = RaggedBatch.prefill(case.q_lens, device="cpu")
    cos, sin = rope(batch.positions, HEAD_DIM)
    return torch.randn(sum(case.q_lens), 11, dtype=torch.float64), batch, cos, sin


def my_tokens(case: Case, groups: comm.Groups, total: int, layout: Layout | None = None) -> slice:
    """The rows of the global token tensor that this rank holds."""
    mine = even_ranges(total, groups.sp.size())[groups.sp.rank()]
    if case.sequence_sharded:
        mine = even_ranges(mine.size, groups.tp.size())[groups.tp.rank()].shift(mine.start)
    return slice(*mine)


def check_gradients(module: nn.Module, expected: nn.Module) -> None:
    """Every gradient equals this rank's pieces of the unsharded one."""
    full = dict(expected.named_parameters())
    seen = set()
    for name, owner, _, source in iter_sources(module):
        grad = full[name].grad
        assert grad is not None
        pieces = [grad.narrow(p.dim, p.full.start, p.full.size) for p in source.pieces]
        local = ShardedModule._local(source, getattr(owner, source.param).grad)
        torch.testing.assert_close(
            local, torch.cat(pieces, source.dim), rtol=1e-10, atol=1e-12, msg=f"gradient of {name}".__add__
        )
        seen.add(name)
    assert seen == set(full)


def parity(mesh: comm.DeviceMesh, case: Case) -> None:
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, mesh, oracle)
    x, batch, cos, sin = inputs(case)
    x_ref, mine = x.clone().requires_grad_(), my_tokens(case, groups, len(x))
    out_ref = oracle(x_ref, case.q_lens, cos, sin, case.window)
    weights = torch.randn_like(out_ref)
    (out_ref * weights).sum().backward()
    x_local = x[mine].clone().requires_grad_()
    out = layer(x_local, batch, cos, sin)
    torch.testing.assert_close(out, out_ref[mine], rtol=1e-10, atol=1e-12)
    (out * weights[mine]).sum().backward()
    assert x_local.grad is not None and x_ref.grad is not None
    torch.testing.assert_close(x_local.grad, x_ref.grad[mine], rtol=1e-10, atol=1e-12)
    sync_gradients(layer, groups)
    check_gradients(layer, oracle)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_forward_and_backward(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, parity, case)


def cached(mesh: comm.DeviceMesh, case: Case) -> None:
    """Prefill in chunks, then decode, over a paged cache: every step equals the whole sequence at once."""
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, mesh, oracle)
    total = (9, 5)
    x = torch.randn(sum(total), 11, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in total])
    cos, sin = rope(positions, HEAD_DIM)
    expected = oracle(x, total, cos, sin, case.window)
    core = layer.self_attn.core
    kv = PagedKV(1, 8, 3, core.num_kv_heads, HEAD_DIM, dtype=torch.float64, device="cpu")
    done = [0, 0]
    for chunk in ((4, 2), (3, 2), (1, 0), (1, 1)):
        kv.reserve(dict(enumerate(chunk)))
        batch = kv.batch([0, 1], chunk)
        rows = torch.cat([torch.arange(sum(total[:r]) + done[r], sum(total[:r]) + done[r] + chunk[r]) for r in (0, 1)])
        mine = rows[my_tokens(case, groups, len(rows))]
        with torch.no_grad():
            out = layer(x[mine], batch, cos[rows], sin[rows], kv)
        torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-12)
        done = [a + b for a, b in zip(done, chunk, strict=True)]
    assert done == list(total)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 2), Case(5, 5, window=3, qk_norm=True)], ids=str)
def test_chunked_prefill_and_decode_over_a_cache(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, cached, case)


def shifted(mesh: comm.DeviceMesh, case: Case) -> None:
    """Layouts with a larger tp run on views of the same storage and give the same result."""
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, mesh, oracle)
    x, batch, cos, sin = inputs(case)
    expected = oracle(x, case.q_lens, cos, sin, case.window)
    stored = {name: param.untyped_storage().data_ptr() for name, param in layer.named_parameters()}
    tps = [tp for tp in range(groups.layout.tp, groups.layout.size + 1) if groups.layout.size % tp == 0]
    for tp in tps:
        other = Layout(tp, groups.layout.size // tp)
        if not groups.layout.reaches(other):
            continue
        others = comm.groups(comm.init_mesh(tp=other.tp, sp=other.sp, device="cpu"))
        if other != groups.layout:
            layer.add_layout(other, groups=others)
        mine = my_tokens(case, others, len(x))
        with torch.no_grad():
            out = layer(x[mine], batch, cos, sin, layout=other)
        if other != groups.layout:
            with (
                own_errors(),
                pytest.raises(ValueError, match="where gradients of replicated parameters"),
            ):
                layer(x[mine], batch, cos, sin, layout=other)
        torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-12)
    assert stored == {name: param.untyped_storage().data_ptr() for name, param in layer.named_parameters()}
    views = layer.mlp.down_proj.shards[Layout(groups.layout.size, 1)].views
    assert len(views) == 1


@pytest.mark.parametrize("layout", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 8), Case(8, 2, bias=True), Case(5, 5), Case(14, 2)], ids=str)
def test_every_larger_tp_runs_on_views_of_the_stored_weights(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, shifted, case)


def traffic(mesh: comm.DeviceMesh, case: Case) -> list[tuple[str, str, int, int]]:
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, mesh, oracle)
    name_modules(layer)
    x, batch, cos, sin = inputs(case)
    with comm.record() as recorder, torch.no_grad():
        layer(x[my_tokens(case, groups, len(x))], batch, cos, sin)
    return sorted((op, label, count.calls, count.num_bytes) for (op, label), count in recorder.counts.items())


def test_counts_and_bytes_are_the_formulas() -> None:
    """shift.md 3.1, 12 tokens, 8/4 heads of 6, M = 11, float64: what each of two ranks sends in one layer."""
    case = Case(8, 4, q_lens=(7, 2, 3))
    tp, sp = run_mesh((2, 1), traffic, case)[0], run_mesh((1, 2), traffic, case)[0]
    assert tp == [("all_reduce", "mlp.down_proj", 1, 12 * 11 * 8), ("all_reduce", "self_attn.o_proj", 1, 12 * 11 * 8)]
    there, back = 6 * (8 + 2 * 4) // 2 * HEAD_DIM * 8, 6 * 8 // 2 * HEAD_DIM * 8
    assert sp == [("all_to_all", "self_attn.core", 2, there + back)]


def program(mesh: comm.DeviceMesh, case: Case) -> list[str]:
    """What the layer yields, in order."""
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, mesh, oracle)
    x, batch, cos, sin = inputs(case)
    steps, value, seen = layer.steps(x[my_tokens(case, groups, len(x))], batch, cos, sin), None, []
    try:
        while True:
            item = steps.send(value)
            seen.append(f"mark {item.layer}" if isinstance(item, comm.Mark) else item.op)
            value = item.wait()
    except StopIteration:
        return seen


def test_the_program_marks_its_cache_append_between_the_exchanges() -> None:
    case = Case(8, 2, q_lens=(7, 2, 3))
    assert run_mesh((1, 2), program, case)[0] == ["all_to_all", "mark 0", "all_to_all"]
    assert run_mesh((2, 1), program, case)[0] == ["mark 0", "all_reduce", "all_reduce"]
    both = ["all_to_all", "mark 0", "all_to_all", "all_reduce", "all_reduce"]
    assert run_mesh((2, 2), program, case)[3] == both


def hooked(mesh: comm.DeviceMesh) -> None:
    """Hooks fire, and gradients are those of the plain layer."""
    case = Case(8, 2)
    groups, oracle = comm.groups(mesh), reference(case)
    x, batch, cos, sin = inputs(case)
    mine = my_tokens(case, groups, len(x))
    plain, layer = parallel(case, mesh, oracle), parallel(case, mesh, oracle)
    fired: list[str] = []
    layer.mlp.down_proj.register_forward_hook(lambda *_: fired.append("down_proj"))
    layer.self_attn.register_forward_pre_hook(lambda *_: fired.append("self_attn"))
    grads = []
    for module in (plain, layer):
        local = x[mine].clone().requires_grad_()
        module(local, batch, cos, sin).square().sum().backward()
        grads.append((local.grad, module.mlp.down_proj.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert fired == ["self_attn", "down_proj"]


def kept_by_a_hook(mesh: comm.DeviceMesh) -> None:
    """What a hook saw of the gate and up projection is not overwritten by the activation."""
    case = Case(8, 2)
    layer = parallel(case, mesh, reference(case))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.mlp.gate_up_proj.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    x, batch, cos, sin = inputs(case)
    with torch.no_grad():
        layer(x[my_tokens(case, comm.groups(mesh), len(x))], batch, cos, sin)
    ((x, out),) = seen
    assert torch.equal(out, torch.nn.functional.linear(x, layer.mlp.gate_up_proj.weight))


def test_a_hook_may_keep_what_it_saw() -> None:
    run_mesh((2, 1), kept_by_a_hook)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_hooks_fire_and_change_nothing(layout: tuple[int, int]) -> None:
    run_mesh(layout, hooked)


class LowRank(nn.Module):
    """A PEFT-style wrapper: the base layer plus a trained low-rank path."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(mesh: comm.DeviceMesh, case: Case) -> None:
    """A low-rank adapter around the fused projection trains as one around the three unsharded ones."""
    groups, oracle = comm.groups(mesh), reference(case)
    x, batch, cos, sin = inputs(case)
    mine = my_tokens(case, groups, len(x))
    layer = parallel(case, mesh, oracle)
    ups = [nn.Linear(2, proj.out_features, bias=False).double() for proj in attention_projections(oracle)]
    down = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    heads = HeadMap(case.num_heads, case.num_kv_heads, *groups.layout)
    fused_up = QKVParallelLinear.from_linears(*ups, heads=heads, group=groups.tp)
    adapter = LowRank(layer.self_attn.qkv_proj, down.detach(), fused_up.weight.detach())
    layer.self_attn.qkv_proj = adapter
    with pytest.raises(
        ValueError, match=r"`self_attn.qkv_proj.down` must say over which groups its gradient is partial"
    ):
        sync_gradients(layer, groups)
    adapter.down.gradient_groups, adapter.up.gradient_groups = (groups.tp, groups.sp), (groups.sp,)

    merged = {
        f"self_attn.{name}_proj.weight": proj.weight + up.weight @ down
        for name, proj, up in zip("qkv", attention_projections(oracle), ups, strict=True)
    }
    full, local = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    expected = torch.func.functional_call(oracle, merged, (full, case.q_lens, cos, sin, case.window))
    expected.square().sum().backward()
    out = layer(local, batch, cos, sin)
    torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-10)
    out.square().sum().backward()
    sync_gradients(layer, groups)
    torch.testing.assert_close(local.grad, full.grad[mine], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapter.down.grad, down.grad, rtol=1e-9, atol=1e-9)
    for piece in heads.pieces(groups.tp.rank(), "q", HEAD_DIM):
        ours, theirs = adapter.up.grad[slice(*piece.local)], ups[0].weight.grad[slice(*piece.full)]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def attention_projections(layer: DecoderLayer) -> list[nn.Linear]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 2), Case(8, 2, sequence_sharded=True)], ids=str)
def test_an_adapter_around_a_linear_trains_as_unsharded(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, adapted, case)


def refusals(mesh: comm.DeviceMesh) -> None:
    groups, case = comm.groups(mesh), Case(8, 2)
    layer = parallel(case, mesh, reference(case))
    x, batch, cos, sin = inputs(case)
    with pytest.raises(ValueError, match=r"`x` must hold this rank's \d+ of 11 tokens, got shape \[2, 11\]"):
        layer(x[:2], batch, cos, sin)
    mine = x[my_tokens(case, groups, len(x))]
    with comm.record() as sent, own_errors():
        with pytest.raises(ValueError, match=r"`cos` and `sin` must have shape \[11, 6\] \(all tokens of the batch\)"):
            layer(mine, batch, cos[: len(mine)][:3], sin[: len(mine)][:3])
        with pytest.raises(ValueError, match="`cos` and `sin` must be given together, got Tensor, NoneType"):
            layer(mine, batch, cos)
        for heads, dtype in ((9, torch.float64), (layer.self_attn.core.num_kv_heads, torch.float32)):
            kv = PagedKV.contiguous(1, 3, 16, heads, HEAD_DIM, dtype=dtype, device="cpu")
            kv.reserve(dict(enumerate(case.q_lens)))
            with pytest.raises(ValueError, match=r"`kv` must hold this rank's KV heads \(\d, 6, torch.float64\)"):
                layer(mine, kv.batch([0, 1, 2], case.q_lens), cos, sin, kv)
    assert sent.total.calls == 0
    with pytest.raises(TypeError, match=r"`x` must have the layer's dtype \(torch.float64\), got torch.float32"):
        layer.mlp(mine.float())
    with pytest.raises(ValueError, match=r"`x` must have shape \[T, 11\], got \[\d+, 10\]"):
        layer.mlp(mine[:, :10])
    with pytest.raises(ValueError, match=r"`layout` must be one of \(.*, got"):
        layer(mine, batch, cos, sin, layout=Layout(9, 1))
    with pytest.raises(ValueError, match="`kv` must be given for a batch with cached tokens"):
        later = RaggedBatch.build((7, 1, 3), (8, 1, 3), [[0], [1], [2]], 16)
        layer.self_attn(mine, later, cos, sin)
    with pytest.raises(ValueError, match=r"`heads` must be split as the groups are"):
        ParallelDecoderLayer.from_module(reference(case), groups=groups, heads=HeadMap(8, 2, 8, 1))


def test_bad_input_is_refused_before_any_collective() -> None:
    run_mesh((1, 2), refusals)
    run_mesh((2, 1), refusals)
