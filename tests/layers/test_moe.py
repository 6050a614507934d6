"""A mixture of experts under every layout and placement against one float64 process: outputs, gradients, bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar import comm
from seqpar.layers import (
    ParallelDecoderLayer,
    ParallelMoE,
    gather_state_dict,
    name_modules,
    sync_gradients,
)
from seqpar.partition import HeadMap, Layout, even_ranges, even_split, shard_range
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.layers.test_decoder import check_gradients
from tests.ranks import LAYOUTS, run_mesh

SIZE = 11


class Gate(nn.Module):
    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(num_experts, SIZE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        weights, ids = logits.softmax(-1).topk(self.top_k, -1)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, ids


class Experts(nn.Module):
    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * hidden, SIZE) / 3)
        self.down_proj = nn.Parameter(torch.randn(num_experts, SIZE, hidden) / 3)


class Mixture(nn.Module):
    """The oracle, with the parameters and names of Transformers' blocks: every expert for every token."""

    def __init__(self, num_experts: int, top_k: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.experts = Gate(num_experts, top_k), Experts(num_experts, hidden)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.gate(x)
        gate, up = torch.einsum("egm,tm->teg", self.experts.gate_up_proj, x).chunk(2, -1)
        each = torch.einsum("emf,tef->tem", self.experts.down_proj, F.silu(gate) * up)
        return (each.gather(1, ids[:, :, None].expand(-1, -1, SIZE)) * weights[:, :, None]).sum(1)


@dataclass(frozen=True)
class Case:
    """One shape; the ids read `e5k2f7t13` for 5 experts of 7 rows, 2 for each of 13 tokens."""

    experts: str
    num_experts: int = 5
    top_k: int = 2
    hidden: int = 7
    tokens: int = 13
    sequence_sharded: bool = False
    renormalise: bool = True
    same: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("sequence_sharded", "same") if getattr(self, name))
        return f"{self.experts}-e{self.num_experts}k{self.top_k}f{self.hidden}t{self.tokens}{flags}"


SHAPES: list[dict[str, Any]] = [
    {},
    {"num_experts": 3, "top_k": 3, "hidden": 2, "tokens": 2},  # K = E, and fewer experts, rows and tokens than ranks
    {"num_experts": 8, "tokens": 9, "same": True, "renormalise": False},  # all tokens to the same two experts
    {"tokens": 0},
    {"sequence_sharded": True, "num_experts": 6},
]
CASES = [Case(experts, **shape) for experts in ("tp", "ep") for shape in SHAPES]


def reference(case: Case, dtype: torch.dtype = torch.float64) -> Mixture:
    torch.manual_seed(3)
    block = Mixture(case.num_experts, case.top_k, case.hidden).to(dtype)
    if not case.renormalise:
        block.gate.norm_topk_prob = False
    return block


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(case.tokens, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(5))
    return x[:1].expand(len(x), -1).clone() if case.same else x


def parallel(case: Case, groups: comm.Groups, block: Mixture, **options: Any) -> ParallelMoE:
    layer = ParallelMoE.from_module(
        block, groups=groups, experts=case.experts, sequence_sharded=case.sequence_sharded, **options
    )
    name_modules(layer)
    return layer


def mine_of(case: Case, groups: comm.Groups) -> slice:
    """This rank's tokens."""
    mine = even_ranges(case.tokens, groups.sp.size())[groups.sp.rank()]
    if case.sequence_sharded:
        mine = even_ranges(mine.size, groups.tp.size())[groups.tp.rank()].shift(mine.start)
    return slice(*mine)


def call(layer: ParallelMoE, case: Case, groups: comm.Groups, x: Tensor, layout: Layout | None = None) -> Tensor:
    of_sp = even_split(case.tokens, groups.sp.size())[groups.sp.rank()]
    return layer(x, layout=layout, num_tokens=of_sp if case.sequence_sharded else None)


def parity(mesh: comm.DeviceMesh, case: Case) -> None:
    groups, oracle = comm.groups(mesh), reference(case)
    layer, x = parallel(case, groups, oracle), inputs(case)
    mine, x_ref = mine_of(case, groups), x.clone().requires_grad_()
    expected = oracle(x_ref)
    scale = torch.randn_like(expected)
    (expected * scale).sum().backward()
    local = x[mine].clone().requires_grad_()
    with comm.check():
        out = call(layer, case, groups, local)
        torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-12)
        (out * scale[mine]).sum().backward()
    assert local.grad is not None and x_ref.grad is not None
    torch.testing.assert_close(local.grad, x_ref.grad[mine], rtol=1e-10, atol=1e-12)
    sync_gradients(layer, groups)
    check_gradients(layer, oracle)
    frozen = call(layer, case, groups, x[mine])  # only the weights want gradients: every rank's graph is alike
    frozen.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_equals_one_process_forward_and_backward(layout: tuple[int, int]) -> None:
    for case in CASES:
        run_mesh(layout, parity, case)


def shifted(mesh: comm.DeviceMesh, case: Case) -> None:
    """Every reachable layout gives the same, on views of one storage."""
    base = comm.groups(mesh)
    oracle, x = reference(case), inputs(case)
    layer, expected = parallel(case, base, oracle), oracle(x)
    stored = {name: param.untyped_storage().data_ptr() for name, param in layer.named_parameters()}
    for layout, groups in comm.layout_groups(base).items():
        if layout != base.layout:
            layer.add_layout(layout, groups=groups)
        mine = mine_of(case, groups)
        with torch.no_grad():
            out = call(layer, case, groups, x[mine], layout)
        torch.testing.assert_close(out, expected[mine], rtol=1e-10, atol=1e-12)
        gate_up, down = layer.experts.weights(layout)
        assert [view.untyped_storage().data_ptr() for view in (gate_up, down)] == list(stored.values())[1:]
        width = shard_range(case.hidden, layout, groups.tp.rank()).size if case.experts == "tp" else case.hidden
        assert (gate_up.shape[1], down.shape[2]) == (2 * width, width)
    assert stored == {name: param.untyped_storage().data_ptr() for name, param in layer.named_parameters()}


@pytest.mark.parametrize("layout", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=name_of)
def test_every_reachable_layout_runs_on_what_is_stored(layout: tuple[int, int]) -> None:
    for case in CASES:
        run_mesh(layout, shifted, case)


def traffic(mesh: comm.DeviceMesh, case: Case, dtype: torch.dtype, wire: Any) -> tuple[dict[Any, Any], Tensor]:
    """What this rank sent, and the experts of its own tokens."""
    groups, oracle = comm.groups(mesh), reference(case, dtype)
    layer = parallel(case, groups, oracle, wire=wire)
    with comm.record() as sent, torch.no_grad():
        call(layer, case, groups, inputs(case, dtype)[mine_of(case, groups)])
    return {key: (count.calls, count.num_bytes) for key, count in sent.counts.items()}, oracle.gate(
        inputs(case, dtype)
    )[2]


@pytest.mark.parametrize(("dtype", "wire"), [(torch.float64, None), (torch.float32, "int8")], ids=str)
@pytest.mark.parametrize("layout", [(2, 1), (1, 3), (2, 2), (4, 1)], ids=name_of)
def test_bytes_are_the_formulas(layout: tuple[int, int], dtype: torch.dtype, wire: Any) -> None:
    """Of the class: counted from the experts of every token alone."""
    (tp, sp), p = layout, layout[0] * layout[1]
    row = SIZE * dtype.itemsize if wire is None else SIZE + 2  # one scale, for up to 64 numbers
    case = Case("ep", tokens=19)
    found = run_mesh(layout, traffic, case, dtype, wire)
    owned = even_ranges(case.num_experts, p)
    of_expert = [next(rank for rank, own in enumerate(owned) if e in range(*own)) for e in range(case.num_experts)]
    shares = [
        share.shift(mine.start)
        for mine in even_ranges(19, sp)
        for share in even_ranges(mine.size, tp)  # [sp, tp]
    ]
    asked = torch.zeros(p, p, dtype=torch.int64)  # rows that go from one rank to another
    for i, share in enumerate(shares):
        for experts in found[0][1][slice(*share)].tolist():
            for e in experts:
                asked[i % tp * sp + i // tp, of_expert[e]] += 1
    for rank, (counts, _) in enumerate(found):
        own = int(asked[rank, rank])
        sent = int(asked[rank].sum() + asked[:, rank].sum()) - 2 * own
        expected = {
            ("all_to_all", "experts.counts"): (1, 8 * (case.num_experts - owned[rank].size)),
            ("all_to_all", "experts"): (2, sent * row),
        }
        if tp > 1:
            expected["all_gather", ""] = (1, (tp - 1) * shares[rank % sp * tp + rank // sp].size * row)
        assert counts == expected
    if tp > 1:
        numbers = even_split(19, sp)[0] * SIZE  # of rank 0, whose part of the sum is the largest
        whole, part = numbers * dtype.itemsize, -(-numbers // tp) * dtype.itemsize
        (counts, _), *_ = run_mesh(layout, traffic, replace(case, experts="tp"), dtype, None)
        assert counts == {("all_reduce", ""): (1, whole + (tp - 2) * part)}


def test_bytes_of_sequence_sharded_activations() -> None:
    """On two ranks of `tp`, 10 and 9 of 19 tokens: "tp" gathers and scatters them, "ep" sends nothing but rows."""
    row, case = SIZE * 8, Case("tp", tokens=19, sequence_sharded=True)
    for rank, (counts, _) in enumerate(run_mesh((2, 1), traffic, case, torch.float64, None)):
        mine = 10 - rank
        assert counts == {("all_gather", ""): (1, mine * row), ("reduce_scatter", ""): (1, (19 - mine) * row)}
    sharded, whole = (
        run_mesh((2, 1), traffic, replace(case, experts="ep", sequence_sharded=flag), torch.float64, None)
        for flag in (True, False)
    )
    for rank, ((counts, _), (more, _)) in enumerate(zip(sharded, whole, strict=True)):
        assert more == counts | {("all_gather", ""): (1, (10 - rank) * row)}


def decoder(mesh: comm.DeviceMesh, case: Case) -> None:
    """In a decoder layer: whole, and a last layer's tail, whose rows the ranks hold unevenly; some hold none."""
    groups = comm.groups(mesh)
    torch.manual_seed(2)
    oracle = DecoderLayer(SIZE, 4, 2, 6, 5).double()
    oracle.mlp = reference(case)
    layer = ParallelDecoderLayer.from_module(
        oracle,
        groups=groups,
        heads=HeadMap(4, 2, *groups.layout),
        sequence_sharded=case.sequence_sharded,
        experts=case.experts,
    )
    assert isinstance(layer.mlp, ParallelMoE) and layer.mlp.placement == case.experts and layer.takes_tail()
    batch = RaggedBatch.prefill((9, 4), device="cpu")
    cos, sin = rope(batch.positions, 6)
    x = inputs(case)
    expected = oracle(x, (9, 4), cos, sin)
    for layout, other in comm.layout_groups(groups).items():
        if layout != groups.layout:
            layer.add_layout(layout, groups=other)
        mine = mine_of(case, other)
        for rows in (None, [12], [3, 8, 12], []):
            tail = None if rows is None else batch.tail(rows)
            with torch.no_grad():
                out = layer(x[mine], batch, cos, sin, layout=layout, tail=tail)
            want = expected[mine] if tail is None else tail.take(expected[mine], mine.start)
            torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [(2, 1), (1, 3), (2, 2)], ids=name_of)
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sequence_sharded"])
@pytest.mark.parametrize("experts", ["tp", "ep"])
def test_in_a_decoder_layer_with_tails(experts: str, sharded: bool, layout: tuple[int, int]) -> None:
    run_mesh(layout, decoder, Case(experts, sequence_sharded=sharded))


def state(mesh: comm.DeviceMesh, case: Case) -> None:
    """Names and slices are those of the unsharded block; whole tensors and slices load."""
    groups, oracle = comm.groups(mesh), reference(case)
    layer = parallel(case, groups, oracle)
    whole = oracle.state_dict()
    gathered = gather_state_dict(layer)
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in gathered.items())
    local = layer.state_dict()
    if case.experts == "ep":
        mine = slice(*even_ranges(case.num_experts, groups.layout.size)[groups.flat.rank()])
        assert torch.equal(local["experts.gate_up_proj"], whole["experts.gate_up_proj"][mine])
    else:
        mine = slice(*shard_range(case.hidden, groups.layout, groups.tp.rank()))
        gate, up = (part[:, mine] for part in whole["experts.gate_up_proj"].chunk(2, 1))
        assert torch.equal(local["experts.gate_up_proj"], torch.cat([gate, up], 1))
        assert torch.equal(local["experts.down_proj"], whole["experts.down_proj"][:, :, mine])
    for source in (whole, {name: tensor.clone() for name, tensor in local.items()}):
        torch.manual_seed(0)
        fresh = ParallelMoE(
            SIZE, case.hidden, case.num_experts, case.top_k, groups=groups, experts=case.experts, dtype=torch.float64
        )
        drawn = gather_state_dict(fresh)
        assert all(not torch.equal(drawn[name], tensor) for name, tensor in whole.items())
        fresh.load_state_dict(source)
        assert all(torch.equal(tensor, local[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=name_of)
def test_state_dicts_are_those_of_the_unsharded_block(layout: tuple[int, int]) -> None:
    for case in (Case("tp"), Case("ep"), Case("ep", num_experts=3)):
        run_mesh(layout, state, case)


def encoded(mesh: comm.DeviceMesh, case: Case, wire: Any) -> Tensor:
    """The result in 8 bits a number is near the exact one; hooks on the parts fire and change nothing."""
    groups, oracle, x = comm.groups(mesh), reference(case, torch.float32), inputs(case, torch.float32)
    mine, fired = mine_of(case, groups), []
    layer, expected = parallel(case, groups, oracle, wire=wire), oracle(x)
    with torch.no_grad():
        out = call(layer, case, groups, x[mine])
        for part in (layer.gate, layer.experts):
            part.register_forward_hook(lambda module, *_: fired.append(module))
        assert torch.equal(call(layer, case, groups, x[mine]), out) and len(fired) == 2
    error = (out - expected[mine]).abs().max() if len(out) else torch.zeros(())
    # A number is off by half a step of 1/127 of its row's largest on each of three ways (int8; fp8: by 1/16 of itself).
    assert error < 0.2 * expected.abs().max()
    if groups.layout.size > 1:
        assert not torch.equal(out, call(parallel(case, groups, oracle), case, groups, x[mine])) or not len(out)
    return out


@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("experts", ["tp", "ep"])
def test_wire_formats(experts: str, wire: str) -> None:
    for layout in ((2, 1), (2, 2)):
        outs = run_mesh(layout, encoded, Case(experts), wire)
        for rank, out in enumerate(outs):  # the ranks of a tp group hold the same bits
            assert torch.equal(out, outs[rank % layout[1]])


def refusals(mesh: comm.DeviceMesh) -> None:
    groups, case = comm.groups(mesh), Case("tp")
    layers = [parallel(replace(case, experts=experts), groups, reference(case)) for experts in ("tp", "ep")]
    x = inputs(case)
    with own_errors(), comm.record() as sent:
        for layer in layers:
            with pytest.raises(ValueError, match=r"`x` must have shape \[T, 11\], got \[13, 10\]"):
                layer(x[:, :10])
            with pytest.raises(
                TypeError, match=r"`x` must have the layer's dtype \(torch.float64\), got torch.float32"
            ):
                layer(x.float())
            with pytest.raises(ValueError, match=r"`layout` must be one of \(2, 1\), got Layout\(tp=4, sp=1\)"):
                layer(x, layout=Layout(4, 1))
        with pytest.raises(ValueError, match="`layout` must split the stored shard"):
            layers[0].add_layout(Layout(1, 2), groups=groups)
        with pytest.raises(ValueError, match=r"`layout` must be that of `groups`, over the 2 ranks that own the exper"):
            layers[1].add_layout(Layout(1, 2), groups=groups)
        wrapped = parallel(case, groups, reference(case))
        wrapped.experts = nn.Sequential(wrapped.experts)
        with pytest.raises(TypeError, match="`experts` must be a _Experts to run in other layouts, got Sequential"):
            wrapped.add_layout(Layout(2, 1), groups=groups)
        with pytest.raises(ValueError, match='`experts` must be "tp" or "ep", got \'all\''):
            ParallelMoE(SIZE, 4, 3, 2, groups=groups, experts="all")
        with pytest.raises(ValueError, match=r"`top_k` must lie in \[1, 3\] \(the experts\), got 4"):
            ParallelMoE(SIZE, 4, 3, 4, groups=groups)
        with pytest.raises(
            ValueError, match="`weight` must be float32, bfloat16 or float16 to travel in a wire format"
        ):
            parallel(case, groups, reference(case), wire="int8")
        with pytest.raises(ValueError, match="`num_tokens` must be given to a sequence-sharded layer, got None"):
            parallel(replace(case, sequence_sharded=True), groups, reference(case))(x)
        for change, error, message in REFUSED:
            block = reference(case)
            change(block)
            with pytest.raises(error, match=message):
                parallel(case, groups, block)
    assert not sent.counts


REFUSED: list[tuple[Any, Any, str]] = [
    (lambda b: setattr(b, "jitter_noise", 0.1), ValueError, r"`jitter_noise` must be 0, got 0\.1"),
    (lambda b: setattr(b.experts, "act_fn", F.gelu), ValueError, "`act_fn` must be a SiLU"),
    (
        lambda b: setattr(b, "extra", nn.Linear(2, 2)),
        ValueError,
        "must have no other parameters than ParallelMoE stores",
    ),
    (lambda b: delattr(b.gate, "top_k"), TypeError, "`block` must have a gate with `weight` and `top_k`, and experts"),
    (
        lambda b: setattr(b.gate, "forward", lambda x: (x, 2 * x[:, :2], Gate.forward(b.gate, x)[2])),
        ValueError,
        "`gate` must give the largest probabilities of a softmax, got",
    ),
]


def test_what_cannot_be_honoured_is_refused() -> None:
    run_mesh((2, 1), refusals)
