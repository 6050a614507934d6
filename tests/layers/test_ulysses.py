"""Ulysses attention and the MLP alone, on every layout, against one float64 process."""

from __future__ import annotations

import pytest
import torch

from seqpar import comm
from seqpar.layers import ParallelMLP, ShardedModule, UlyssesAttention, iter_sources, sync_gradients
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import MLP, attend, name_of
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned

HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (6, 1), "uneven": (5, 5), "straddled": (14, 2)}


def attention(mesh: comm.DeviceMesh, num_heads: int, num_kv_heads: int, window: int | None) -> int:
    """Outputs and the gradients of q, k and v, for this rank's tokens and this tensor-parallel rank's heads."""
    groups, q_lens, dim = comm.groups(mesh), (6, 1, 4), 4
    heads = HeadMap(num_heads, num_kv_heads, *groups.layout)
    tp_rank = groups.tp.rank()
    core = UlyssesAttention(heads, dim, group=groups.sp, tp_rank=tp_rank, window=window)
    torch.manual_seed(1)
    full = [torch.randn(11, h, dim, dtype=torch.float64, requires_grad=True) for h in (num_heads, *[num_kv_heads] * 2)]
    seed = torch.randn(11, num_heads, dim, dtype=torch.float64)
    tokens = slice(*even_ranges(11, groups.sp.size())[groups.sp.rank()])
    q_rows, kv_rows = slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    parts = zip(*(x.split(q_lens) for x in full), strict=True)
    expected = torch.cat([attend(*part, window) for part in parts])
    # KV heads that tp ranks share get from this one the gradient of its own query heads only.
    (expected[:, q_rows] * seed[:, q_rows]).sum().backward()
    local = [
        x.detach()[tokens, rows].clone().requires_grad_()
        for x, rows in zip(full, (q_rows, kv_rows, kv_rows), strict=True)
    ]
    with comm.record() as sent:
        out = core(core.pack(*local), RaggedBatch.prefill(q_lens))
    torch.testing.assert_close(out, expected[tokens, q_rows].flatten(1), rtol=1e-12, atol=1e-12)
    (out * seed[tokens, q_rows].flatten(1)).sum().backward()
    for ours, theirs, rows in zip(local, full, (q_rows, kv_rows, kv_rows), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad[tokens, rows], rtol=1e-12, atol=1e-12)
    return sent.total.calls


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
@pytest.mark.parametrize("kind", HEADS)
def test_attention_alone_equals_one_process(kind: str, layout: tuple[int, int]) -> None:
    for window in (None, 3):
        assert set(run_mesh(layout, attention, *HEADS[kind], window)) == {2 * (layout[1] > 1)}


def mlp(mesh: comm.DeviceMesh, hidden: int, sequence_sharded: bool) -> None:
    """Outputs and all gradients, on this rank's tokens."""
    groups = comm.groups(mesh)
    torch.manual_seed(2)
    oracle = MLP(6, hidden, bias=True).double()
    ours = ParallelMLP.from_module(oracle, group=groups.tp, sp=groups.layout.sp, sequence_sharded=sequence_sharded)
    x, seed = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    share = even_ranges(11, groups.sp.size())[groups.sp.rank()]
    mine = share
    if sequence_sharded:
        mine = even_ranges(share.size, groups.tp.size())[groups.tp.rank()].shift(share.start)
    full, local = x.clone().requires_grad_(), x[slice(*mine)].clone().requires_grad_()
    expected = oracle(full)
    (expected * seed).sum().backward()
    out = ours(local, num_tokens=share.size)
    torch.testing.assert_close(out, expected[slice(*mine)], rtol=1e-12, atol=1e-12)
    (out * seed[slice(*mine)]).sum().backward()
    assert local.grad is not None and full.grad is not None
    torch.testing.assert_close(local.grad, full.grad[slice(*mine)], rtol=1e-12, atol=1e-12)
    sync_gradients(ours, groups)
    grads = {name: param.grad for name, param in oracle.named_parameters()}
    for name, owner, _, source in iter_sources(ours):
        pieces = [grads[name].narrow(p.dim, p.full.start, p.full.size) for p in source.pieces]
        got = ShardedModule._local(source, getattr(owner, source.param).grad)
        torch.testing.assert_close(got, torch.cat(pieces, source.dim), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
@pytest.mark.parametrize("hidden", [8, 13, 3])
def test_mlp_alone_equals_one_process(hidden: int, layout: tuple[int, int]) -> None:
    run_mesh(layout, mlp, hidden, False)
    run_mesh(layout, mlp, hidden, True)
