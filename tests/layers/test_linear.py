"""Linears, embedding and head alone: exact layouts, exact sums, state dicts, adjoint gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.layers import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_rows,
    gather_state_dict,
    iter_sources,
    sync_gradients,
)
from seqpar.partition import HeadMap, even_ranges, shard_range
from tests.kernels.own_errors import own_errors
from tests.layers.reference import MLP, name_of
from tests.ranks import LAYOUTS, run_mesh


def coded(linear: nn.Linear) -> nn.Linear:
    """Weights that name their own position; integers, so that sums are exact."""
    with torch.no_grad():
        linear.weight.copy_(torch.arange(linear.weight.numel()).view_as(linear.weight) % 1009)
        if linear.bias is not None:
            linear.bias.copy_(torch.arange(linear.bias.numel()) * 1013)
    return linear


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, dtype=torch.float64)


def linears(mesh: comm.DeviceMesh, sequence_sharded: bool) -> None:
    """Column then row with integer values: equal to the unsharded pair bit for bit, forward and backward."""
    groups = comm.groups(mesh)
    up, down = coded(nn.Linear(7, 19).double()), coded(nn.Linear(19, 5).double())
    column = ColumnParallelLinear.from_linear(
        up, group=groups.tp, sp=groups.layout.sp, sequence_sharded=sequence_sharded
    )
    row = RowParallelLinear.from_linear(down, group=groups.tp, sp=groups.layout.sp, sequence_sharded=sequence_sharded)
    rows = slice(*shard_range(19, groups.layout, groups.tp.rank()))
    assert torch.equal(column.weight, up.weight[rows]) and torch.equal(row.weight, down.weight[:, rows])
    x, seed = integers(11, 7), integers(11, 5)
    mine = slice(*even_ranges(11, groups.tp.size())[groups.tp.rank()]) if sequence_sharded else slice(0, 11)
    full, local = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    expected = down(up(full))
    (expected * seed).sum().backward()
    kept = local.detach().clone()
    out = row(column(local, num_tokens=11), num_tokens=11)
    (out * seed[mine]).sum().backward()
    assert torch.equal(out, expected[mine]) and torch.equal(local.detach(), kept)
    assert torch.equal(local.grad, full.grad[mine])
    assert torch.equal(column.weight.grad, up.weight.grad[rows])
    assert torch.equal(column.bias.grad, up.bias.grad[rows])
    assert torch.equal(row.weight.grad, down.weight.grad[:, rows])
    bias = comm.all_reduce(row.bias.grad, group=groups.tp) if sequence_sharded else row.bias.grad
    assert torch.equal(bias, down.bias.grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("sequence_sharded", [False, True], ids=["replicated", "sequence"])
def test_column_and_row_equal_the_unsharded_pair_exactly(layout: tuple[int, int], sequence_sharded: bool) -> None:
    run_mesh(layout, linears, sequence_sharded)


def storage(mesh: comm.DeviceMesh) -> None:
    """Fused rows lie where the head map says, and gather back to the unsharded tensors exactly."""
    groups, head_dim = comm.groups(mesh), 3
    for num_heads, num_kv_heads in ((8, 8), (8, 2), (5, 5), (14, 2), (4, 1)):
        heads = HeadMap(num_heads, num_kv_heads, *groups.layout)
        q, k, v = (coded(nn.Linear(5, n * head_dim)) for n in (num_heads, num_kv_heads, num_kv_heads))
        qkv = QKVParallelLinear.from_linears(q, k, v, heads=heads, group=groups.tp)
        expected = []
        for segment in heads.storage(groups.tp.rank()):
            for head in range(*segment.heads):
                rows = slice(head * head_dim, (head + 1) * head_dim)
                expected += [q.weight[rows]] if segment.kind == "q" else [k.weight[rows], v.weight[rows]]
        assert torch.equal(qkv.weight, torch.cat(expected))
        gathered = gather_state_dict(qkv)
        for name, linear in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            assert torch.equal(gathered[f"{name}.weight"], linear.weight), name
            assert torch.equal(gathered[f"{name}.bias"], linear.bias), name
    gate, up = coded(nn.Linear(5, 13, bias=False)), coded(nn.Linear(5, 13, bias=False))
    with torch.no_grad():
        up.weight += 5000
    fused = GateUpParallelLinear.from_linears(gate, up, group=groups.tp, sp=groups.layout.sp)
    blocks = even_ranges(13, groups.layout.size)[groups.tp.rank() * groups.layout.sp :][: groups.layout.sp]
    assert torch.equal(fused.weight, torch.cat([w[a:b] for a, b in blocks for w in (gate.weight, up.weight)]))
    gathered = gather_state_dict(fused)
    assert torch.equal(gathered["gate_proj.weight"], gate.weight) and torch.equal(gathered["up_proj.weight"], up.weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_fused_rows_lie_where_the_map_says(layout: tuple[int, int]) -> None:
    run_mesh(layout, storage)


def state(mesh: comm.DeviceMesh) -> None:
    """state_dict has unsharded names; whole tensors and slices both load; mistakes are named."""
    groups = comm.groups(mesh)
    torch.manual_seed(3)
    source = MLP(6, 10, bias=True)
    mlp = ParallelMLP.from_module(source, group=groups.tp, sp=groups.layout.sp)
    mine = mlp.state_dict()
    assert sorted(mine) == sorted(source.state_dict())
    kwargs = {"group": groups.tp, "sp": groups.layout.sp, "bias": True}
    for given in (source.state_dict(), mine):
        fresh = ParallelMLP(6, 10, **kwargs)
        fresh.load_state_dict(given)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), mlp.parameters(), strict=True))
    meta = ParallelMLP(6, 10, device="meta", **kwargs)
    meta.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(meta.parameters(), mlp.parameters(), strict=True))
    wrong = source.state_dict() | {"up_proj.bias": torch.zeros(99)}
    with pytest.raises(RuntimeError, match=r"up_proj.bias` must have shape \(10,\) \(whole\) or \(\d+,\).*got \(99,\)"):
        mlp.load_state_dict(wrong)
    missing = {name: tensor for name, tensor in source.state_dict().items() if name != "down_proj.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"down_proj.weight\""):
        mlp.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"down_proj.scale\""):
        mlp.load_state_dict(source.state_dict() | {"down_proj.scale": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="`assign` must be False: slices of several tensors share one parameter"):
        mlp.load_state_dict(source.state_dict(), assign=True)
    partly = ParallelMLP(6, 10, device="meta", **kwargs)
    partly.load_state_dict({"up_proj.weight": source.up_proj.weight}, strict=False)
    assert partly.gate_up_proj.weight.is_meta  # half of a fused weight is not made up
    seen: list[str] = []
    mlp.down_proj.register_load_state_dict_pre_hook(lambda _module, _state, prefix, *_: seen.append(prefix))
    mlp.load_state_dict(source.state_dict())
    assert seen == ["down_proj."]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (3, 1), (2, 2)], ids=name_of)
def test_state_dict_loads_from_and_saves_to_unsharded_names(layout: tuple[int, int]) -> None:
    run_mesh(layout, state)


def fresh(mesh: comm.DeviceMesh) -> None:
    """Built without a module, a layer draws what the unsharded one draws from the same seed."""
    groups = comm.groups(mesh)
    torch.manual_seed(11)
    row = RowParallelLinear(12, 4, group=groups.tp, sp=groups.layout.sp)
    gathered = gather_state_dict(row)
    torch.manual_seed(11)
    bound = 12**-0.5
    assert torch.equal(gathered["weight"], torch.empty(4, 12).uniform_(-bound, bound))
    assert torch.equal(gathered["bias"], torch.empty(4).uniform_(-bound, bound))
    torch.manual_seed(12)
    column = ColumnParallelLinear(5, 7, group=groups.tp, bias=False, dtype=torch.bfloat16)
    assert column.weight.dtype == torch.bfloat16 and column.bias is None and column.weight.isfinite().all()


def test_fresh_layers_are_slices_of_one_draw() -> None:
    run_mesh((2, 1), fresh)
    run_mesh((1, 2), fresh)


def vocabulary(mesh: comm.DeviceMesh, vocab: int, tied: bool) -> None:
    """Embedding and head with a vocabulary that does not divide: exact lookups, logits and gradients."""
    groups = comm.groups(mesh)
    torch.manual_seed(5)
    embedding, head = nn.Embedding(vocab, 6, padding_idx=1).double(), nn.Linear(6, vocab, bias=not tied).double()
    with torch.no_grad():
        embedding.weight.copy_(integers(vocab, 6))
        head.weight.copy_(integers(vocab, 6))
    if tied:
        head.weight = embedding.weight
    ours = VocabParallelEmbedding.from_module(embedding, group=groups.tp, sp=groups.layout.sp)
    ours_head = ParallelLMHead.tied(ours, groups=groups) if tied else ParallelLMHead.from_linear(head, groups=groups)
    ids = torch.randint(vocab, (9,))
    ids[3] = 1
    mine, rows = slice(*even_ranges(9, groups.sp.size())[groups.sp.rank()]), [8, 0, 5]
    hidden = embedding(ids)
    logits = head(hidden[rows])
    seed = integers(*logits.shape)
    (logits * seed).sum().backward()
    out = ours(ids[mine])
    assert torch.equal(out, hidden[mine])
    out_logits = ours_head(out, rows=rows, num_tokens=9)
    assert torch.equal(out_logits, logits)
    (out_logits * seed).sum().backward()
    both = nn.ModuleDict({"embedding": ours, "head": ours_head})
    sync_gradients(both, groups)
    own = slice(*shard_range(vocab, groups.layout, groups.tp.rank()))
    assert torch.equal(ours.weight.grad, embedding.weight.grad[own])
    if not tied:
        flat = slice(*even_ranges(vocab, groups.flat.size())[groups.flat.rank()])
        assert torch.equal(ours_head.weight.grad, head.weight.grad[flat])
        assert torch.equal(ours_head.bias.grad, head.bias.grad[flat])
    assert torch.equal(gather_state_dict(both)["embedding.weight"], embedding.weight)
    whole = {"embedding.weight": embedding.weight, "head.weight": head.weight}
    gathered = gather_state_dict(both)
    assert all(torch.equal(gathered[name], tensor) for name, tensor in whole.items())
    assert sorted(both.state_dict()) == sorted(gathered)
    both.load_state_dict(gathered)
    assert [name for name, *_ in iter_sources(both)] == (
        ["embedding.weight"] if tied else ["embedding.weight", "head.weight", "head.bias"]
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize(("vocab", "tied"), [(13, False), (13, True), (3, False)], ids=["13", "13-tied", "3"])
def test_vocabulary_need_not_divide(layout: tuple[int, int], vocab: int, tied: bool) -> None:
    run_mesh(layout, vocabulary, vocab, tied)


def rows_travel(mesh: comm.DeviceMesh) -> int:
    groups = comm.groups(mesh)
    x = torch.arange(20.0).view(10, 2)
    mine = x[slice(*even_ranges(10, groups.sp.size())[groups.sp.rank()])]
    for rows in ([9], [0, 9, 4], [], None):
        expected = x if rows is None else x[torch.tensor(rows, dtype=torch.long)]
        assert torch.equal(gather_rows(mine, rows=rows, num_tokens=10, group=groups.sp), expected)
    with comm.record() as recorder:
        gather_rows(mine, rows=[9], num_tokens=10, group=groups.sp)
    with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 10\), got \[10\]"):
        gather_rows(mine, rows=[1, 10], num_tokens=10, group=groups.sp)
    return recorder.total.num_bytes


def test_only_the_rows_asked_for_travel() -> None:
    assert run_mesh((1, 3), rows_travel) == [0, 0, 2 * 2 * 4]  # the last rank sends one row of 2 floats to two ranks


def norms(mesh: comm.DeviceMesh) -> None:
    norm = RMSNorm.from_module(nn.RMSNorm(6, eps=1e-5))
    x = torch.randn(4, 6)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (6,), eps=1e-5))
    assert sorted(norm.state_dict()) == ["weight"]
    with pytest.raises(TypeError, match="`norm` must have a `weight` and an `eps`, got Linear"):
        RMSNorm.from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`LayerNorm` must have no other parameters than RMSNorm stores, got bias"):
        RMSNorm.from_module(nn.LayerNorm(6))
    with pytest.raises(ValueError, match="`norm` must be an RMS norm, weight times the normed input"):
        RMSNorm.from_module(nn.LayerNorm(6, bias=False))


def test_norm_is_sliced_from_any_rms_norm() -> None:
    run_mesh((1, 1), norms)


def refusals(mesh: comm.DeviceMesh) -> None:
    groups = comm.groups(mesh)
    row = RowParallelLinear(8, 4, group=groups.tp)
    with pytest.raises(ValueError, match=r"`layout` must be one of \(2, 1\), got"):
        row(torch.zeros(1, 4), layout=HeadMap(8, 8, 1, 2).layout)
    with pytest.raises(ValueError, match="`layout` must split the stored shard"):
        row.add_layout(HeadMap(8, 8, 1, 2).layout, group=groups.tp)
    with pytest.raises(ValueError, match=r"`heads.tp` must be the group size \(2\), got 1"):
        QKVParallelLinear(4, HeadMap(8, 8), 4, group=groups.tp)
    with pytest.raises(ValueError, match=r"`k_proj` must have 2 heads x 3 rows, got 9 rows"):
        parts = (nn.Linear(4, n) for n in (12, 9, 6))
        QKVParallelLinear.from_linears(*parts, heads=HeadMap(4, 2, 2, 1), group=groups.tp)
    with pytest.raises(ValueError, match=r"`ids` must lie in \[0, 5\), got values in \[0, 5\]"):
        VocabParallelEmbedding(5, 2, group=groups.tp)(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"`in_features` must be a multiple of `unit` \(3\), got 8"):
        RowParallelLinear(8, 4, group=groups.tp, unit=3)
    with pytest.raises(TypeError, match="`mlp` must have linear gate_proj, up_proj and down_proj, got Linear"):
        ParallelMLP.from_module(nn.Linear(2, 2), group=groups.tp)
    mlp = MLP(4, 6, bias=False)
    mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="`act_fn` must be a SiLU, got GELU"):
        ParallelMLP.from_module(mlp, group=groups.tp)
    mlp = MLP(4, 6, bias=False)
    mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`MLP` must have no other parameters than ParallelMLP stores, got extra"):
        ParallelMLP.from_module(mlp, group=groups.tp)
    with pytest.raises(ValueError, match=r"`up_proj.weight` must have shape \[6, 4\], got \[9, 4\]"):
        GateUpParallelLinear.from_linears(nn.Linear(4, 6), nn.Linear(4, 9), group=groups.tp)
    frozen = nn.Linear(4, 6).requires_grad_(False)
    with pytest.raises(ValueError, match="`up_proj` must have the input features, bias, dtype and requires_grad"):
        GateUpParallelLinear.from_linears(nn.Linear(4, 6), frozen, group=groups.tp)
    with pytest.raises(ValueError, match="`embedding` must have no max_norm, scale_grad_by_freq or sparse"):
        VocabParallelEmbedding.from_module(nn.Embedding(5, 2, max_norm=0.1), group=groups.tp)
    with comm.record() as sent, own_errors():
        sharded = ColumnParallelLinear(4, 6, group=groups.tp, sequence_sharded=True)
        with pytest.raises(ValueError, match="`num_tokens` must be given to a sequence-sharded layer, got None"):
            sharded(torch.zeros(3 - groups.tp.rank(), 4))
    assert sent.total.calls == 0


def test_bad_input_is_refused() -> None:
    run_mesh((2, 1), refusals)
