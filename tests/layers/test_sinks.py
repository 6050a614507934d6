"""Attention with sinks under every layout against one float64 process whose softmax has one more column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import (
    HeadParameter,
    OverlappedAttention,
    ParallelAttention,
    PipelinedUlysses,
    ShardedModule,
    UlyssesAttention,
    gather_state_dict,
    iter_sources,
    sync_gradients,
)
from seqpar.partition import HeadMap, Layout, ThreePhase, even_ranges
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import Attention, name_of, rope, rotate
from tests.ranks import LAYOUTS, run_mesh

DIM, SIZE = 4, 7
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    """One attention block with biases on all four projections; ids read `h8g2` for 8 query and 2 KV heads."""

    num_heads: int
    num_kv_heads: int
    window: int | None = None
    q_lens: tuple[int, ...] = (7, 1, 3)
    sequence_sharded: bool = False
    pipeline: ThreePhase | None = None
    overlapped: bool = False

    def __str__(self) -> str:
        cut = "-cut" if self.pipeline else ""
        flags = "".join(f"-{name}" for name in ("window", "sequence_sharded", "overlapped") if getattr(self, name))
        return f"h{self.num_heads}g{self.num_kv_heads}{cut}{flags}"


PLAIN = [
    Case(4, 4),
    Case(8, 2, window=3),
    Case(6, 1, sequence_sharded=True),
    Case(5, 5, window=4),
    Case(14, 2, q_lens=(0, 2, 0)),
]
CUT = [
    Case(8, 4, pipeline=ThreePhase(2, 2, 1)),
    Case(14, 2, window=3, pipeline=ThreePhase(3, 2, 1)),
    Case(5, 5, pipeline=ThreePhase(1, 3, 1), overlapped=True),
]

SOME = [(1, 3), (2, 2)]
PAIRS = [(layout, PLAIN[0]) for layout in LAYOUTS] + [(layout, case) for case in PLAIN[1:] for layout in SOME]


class Sinks(Attention):
    """The oracle."""

    def __init__(self, case: Case) -> None:
        super().__init__(SIZE, case.num_heads, case.num_kv_heads, DIM, bias=True)
        self.sinks = nn.Parameter(2 * torch.randn(case.num_heads))
        self.window = case.window

    def forward(self, x: Tensor, q_lens: tuple[int, ...], cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (proj(x).unflatten(1, (-1, DIM)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = [self.attend(*qkv) for qkv in zip(*(t.split(q_lens) for t in (q, k, v)), strict=True)]
        return self.o_proj(torch.cat(out).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ratio = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        age = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (age < 0) | (age >= (self.window or len(q) + 1))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5).masked_fill(hidden, -torch.inf)
        columns = torch.cat([scores, self.sinks[:, None, None].expand(-1, len(q), 1)], -1)
        return torch.einsum("hqk,khd->qhd", columns.softmax(-1)[..., :-1], v)


def sides(case: Case, groups: comm.Groups) -> tuple[Sinks, ParallelAttention]:
    torch.manual_seed(3)
    oracle = Sinks(case).double()
    cls = OverlappedAttention if case.overlapped else ParallelAttention
    ours = cls.from_module(
        oracle,
        groups=groups,
        heads=HeadMap(case.num_heads, case.num_kv_heads, *groups.layout),
        window=case.window,
        sequence_sharded=case.sequence_sharded,
        pipeline=case.pipeline,
    )
    return oracle, ours


def my_rows(total: int, groups: comm.Groups, sequence_sharded: bool = False) -> slice:
    mine = even_ranges(total, groups.sp.size())[groups.sp.rank()]
    if sequence_sharded:
        mine = even_ranges(mine.size, groups.tp.size())[groups.tp.rank()].shift(mine.start)
    return slice(*mine)


def trained(mesh: comm.DeviceMesh, case: Case) -> None:
    """Output, and the gradients of the input and of every parameter; none of the sinks' travels."""
    groups = comm.groups(mesh)
    oracle, ours = sides(case, groups)
    total = sum(case.q_lens)
    batch = RaggedBatch.prefill(case.q_lens)
    cos, sin = rope(batch.positions, DIM)
    x = torch.randn(total, SIZE, dtype=torch.float64)
    full, mine = x.clone().requires_grad_(), my_rows(total, groups, case.sequence_sharded)
    expected = oracle(full, case.q_lens, cos, sin)
    seed = torch.randn_like(expected)
    (expected * seed).sum().backward()
    local = x[mine].clone().requires_grad_()
    options = {"num_tokens": my_rows(total, groups)} if case.sequence_sharded else {}
    options = {name: rows.stop - rows.start for name, rows in options.items()}
    out = ours(local, batch, cos, sin, **options)
    torch.testing.assert_close(out, expected[mine], **EXACT)
    (out * seed[mine]).sum().backward()
    assert local.grad is not None and full.grad is not None
    torch.testing.assert_close(local.grad, full.grad[mine], **EXACT)
    sinks = ours.core.sinks
    assert sinks is not None
    with comm.record() as sent:
        sinks.sync_gradients(groups)
    assert sent.total.calls == 0
    sync_gradients(ours, groups)
    seen = set()
    for name, owner, _, source in iter_sources(ours):
        grad = oracle.get_parameter(name).grad
        assert grad is not None
        pieces = [grad.narrow(p.dim, p.full.start, p.full.size) for p in source.pieces]
        got = ShardedModule._local(source, getattr(owner, source.param).grad)
        torch.testing.assert_close(got, torch.cat(pieces, source.dim), **EXACT, msg=f"gradient of {name}".__add__)
        seen.add(name)
    assert seen == {name for name, _ in oracle.named_parameters()}


@pytest.mark.parametrize(("layout", "case"), PAIRS, ids=lambda x: str(x) if isinstance(x, Case) else name_of(x))
def test_equals_one_process_forward_and_backward(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, trained, case)


@pytest.mark.parametrize("layout", [(1, 3), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", CUT, ids=str)
def test_parts_in_flight_get_the_sinks_of_their_heads(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, trained, case)


def shifted(mesh: comm.DeviceMesh, case: Case) -> None:
    """Chunks of a prompt and decodes, each under another layout, over one cache; nothing stored changes."""
    base = comm.groups(mesh)
    oracle, ours = sides(case, base)
    layouts = comm.layout_groups(base)
    for layout, groups in layouts.items():
        if layout != base.layout:
            ours.add_layout(layout, groups=groups)
    sinks = ours.core.sinks
    assert sinks is not None
    own = slice(*sinks.heads.q_ranges[base.flat.rank()])
    torch.testing.assert_close(sinks(), oracle.sinks[own], rtol=0, atol=0)
    total = (9, 6)
    x = torch.randn(sum(total), SIZE, dtype=torch.float64)
    cos, sin = rope(torch.cat([torch.arange(n) for n in total]), DIM)
    expected = oracle(x, total, cos, sin)
    kv = PagedKV(1, 8, 3, ours.core.num_kv_heads, DIM, dtype=torch.float64, device="cpu")
    done = [0, 0]
    for step, chunk in enumerate(((4, 3), (2, 0), (1, 1), (1, 1), (1, 1))):
        layout = list(layouts)[step % len(layouts)]
        kv.reserve(dict(enumerate(chunk)))
        batch = kv.batch([0, 1], chunk)
        rows = torch.cat([torch.arange(sum(total[:r]) + done[r], sum(total[:r]) + done[r] + chunk[r]) for r in (0, 1)])
        mine = rows[my_rows(len(rows), layouts[layout])]
        with torch.no_grad():
            out = ours(x[mine], batch, cos[rows], sin[rows], kv, layout=layout)
            torch.testing.assert_close(out, expected[mine], **EXACT)
        done = [a + b for a, b in zip(done, chunk, strict=True)]
    assert done == list(total)


@pytest.mark.parametrize("layout", [(1, 4), (2, 2)], ids=name_of)
@pytest.mark.parametrize("case", [PLAIN[1], PLAIN[3], Case(14, 2), CUT[1]], ids=str)
def test_every_layout_reads_one_cache_and_the_same_sinks(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, shifted, case)


def tailed(mesh: comm.DeviceMesh, case: Case) -> None:
    """The last tokens of each request alone."""
    groups = comm.groups(mesh)
    oracle, ours = sides(case, groups)
    batch = RaggedBatch.prefill(case.q_lens)
    cos, sin = rope(batch.positions, DIM)
    x = torch.randn(batch.num_tokens, SIZE, dtype=torch.float64)
    tail, mine = batch.tail(batch.last_idx.tolist()), my_rows(batch.num_tokens, groups)
    with torch.no_grad():
        out = ours(x[mine], batch, cos, sin, tail=tail)
        torch.testing.assert_close(out, tail.take(oracle(x, case.q_lens, cos, sin)[mine], mine.start), **EXACT)


@pytest.mark.parametrize("layout", [(1, 2), (2, 2)], ids=name_of)
def test_tails(layout: tuple[int, int]) -> None:
    run_mesh(layout, tailed, Case(8, 2, window=3))


def stored(mesh: comm.DeviceMesh, case: Case) -> None:
    """State under the unsharded name, by slices; loaded from the whole and from slices; gathered whole."""
    groups = comm.groups(mesh)
    oracle, ours = sides(case, groups)
    whole = {name: tensor.detach() for name, tensor in oracle.state_dict().items()}
    state = ours.state_dict()
    assert set(state) == set(whole)
    own = slice(*even_ranges(case.num_heads, groups.flat.size())[groups.flat.rank()])
    torch.testing.assert_close(state["sinks"], whole["sinks"][own], rtol=0, atol=0)
    for name, tensor in gather_state_dict(ours).items():
        torch.testing.assert_close(tensor, whole.pop(name), rtol=0, atol=0)
    assert not whole
    for given in (oracle.state_dict(), {name: tensor.clone() for name, tensor in state.items()}):
        with torch.no_grad():
            for param in ours.parameters():
                param.zero_()
        ours.load_state_dict(given)
        torch.testing.assert_close(ours.core.sinks(), oracle.sinks[own], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=rf"sinks` must have shape \({case.num_heads},\) \(whole\) or"):
        ours.load_state_dict(oracle.state_dict() | {"sinks": torch.zeros(case.num_heads + 1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*sinks"'):
        ours.load_state_dict({name: tensor for name, tensor in state.items() if name != "sinks"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"slopes"'):
        ours.load_state_dict(oracle.state_dict() | {"slopes": state["sinks"]})


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (3, 1)], ids=name_of)
@pytest.mark.parametrize("case", [Case(8, 2), Case(5, 5)], ids=str)
def test_state_is_the_unsharded_modules(case: Case, layout: tuple[int, int]) -> None:
    run_mesh(layout, stored, case)


def from_meta(mesh: comm.DeviceMesh) -> None:
    """A module without data is sliced without data, and loaded later; a frozen one stays frozen."""
    groups, case = comm.groups(mesh), Case(5, 5)
    with torch.device("meta"):
        skeleton = Sinks(case)
    skeleton.sinks.requires_grad_(False)
    ours = ParallelAttention.from_module(skeleton, groups=groups, heads=HeadMap(5, 5, *groups.layout))
    sinks = ours.core.sinks
    assert sinks is not None and sinks().is_meta and not sinks().requires_grad
    sinks.load_source("sinks", torch.arange(5.0))
    assert sinks().tolist() == list(range(*even_ranges(5, groups.flat.size())[groups.flat.rank()]))
    assert not sinks().requires_grad and "sinks, (" in repr(ours)


def test_a_module_without_data() -> None:
    run_mesh((1, 2), from_meta)


def alone(mesh: comm.DeviceMesh) -> None:
    """A core without a block around it: its state has the sinks' own name; a row of each head is possible."""
    groups, heads = comm.groups(mesh), HeadMap(6, 2, 1, 2)
    sinks = HeadParameter.from_tensor("sinks", torch.arange(6.0), heads=heads, group=groups.flat)
    for cls in (UlyssesAttention, PipelinedUlysses):
        core = cls(heads, DIM, group=groups.sp, sinks=sinks)
        assert list(core.state_dict()) == ["sinks"] and list(gather_state_dict(core)) == ["sinks"]
    rows = HeadParameter.from_tensor("scale", torch.arange(18.0).view(6, 3), heads=heads, group=groups.flat)
    torch.testing.assert_close(rows(), torch.arange(18.0).view(6, 3).chunk(2)[groups.flat.rank()])
    torch.testing.assert_close(gather_state_dict(rows)["scale"], torch.arange(18.0).view(6, 3))
    assert not HeadParameter("sinks", heads, group=groups.flat)().any()


def test_a_core_alone() -> None:
    run_mesh((1, 2), alone)


@own_errors()
def refused(mesh: comm.DeviceMesh) -> list[str]:
    """The same message on every rank, before anything travels."""
    groups, case = comm.groups(mesh), Case(8, 2)
    heads = HeadMap(8, 2, *groups.layout)

    def message(build: Any) -> str:
        with pytest.raises(ValueError) as caught:
            build()
        return str(caught.value)

    wrong = Sinks(case)
    wrong.sinks = nn.Parameter(torch.zeros(6))
    column = HeadParameter("sinks", heads, group=groups.flat, shape=(1,))
    other = HeadParameter("sinks", HeadMap(12, 2, *groups.layout), group=groups.flat)

    def core(sinks: HeadParameter) -> UlyssesAttention:
        return UlyssesAttention(heads, DIM, group=groups.sp, tp_rank=groups.tp.rank(), sinks=sinks)

    with comm.record() as sent:
        found = [
            message(lambda: ParallelAttention.from_module(wrong, groups=groups, heads=heads)),
            message(lambda: HeadParameter("sinks", HeadMap(8, 2, 1, 1), group=groups.flat)),
            message(lambda: core(column)).split("flat rank")[0],
            message(lambda: core(other)).split("flat rank")[0],
        ]
    assert sent.total.calls == 0
    return found


def test_wrong_sinks_are_refused_alike_on_every_rank() -> None:
    ranks = run_mesh((2, 2), refused)
    assert all(messages == ranks[0] for messages in ranks)
    assert ranks[0] == [
        "`sinks` must have shape [8], got [6]",
        "`group` must be all 1 ranks of `heads`, got 4; pass groups.flat",
        "`sinks` must be a number for each of the heads of ",
        "`sinks` must be a number for each of the heads of ",
    ]


def test_the_same_heads_under_another_layout_are_the_same_sinks() -> None:
    run_mesh((1, 4), other_layout)


def other_layout(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    sinks = HeadParameter("sinks", HeadMap(8, 2, 4, 1), group=groups.flat)
    core = UlyssesAttention(HeadMap(8, 2, 1, 4), DIM, group=groups.sp, sinks=sinks)
    assert core.sinks is sinks and core.heads.layout == Layout(1, 4)
