"""A decoder layer whose entries choose Triton, in its interpreter: the kernels fit into the layers and the cache."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from seqpar import comm
from seqpar.kernels.columns import triton as columns
from seqpar.kernels.quantize import triton as quantize
from seqpar.kernels.rms_norm import triton as rms_norm
from seqpar.kernels.rows import triton as rows
from seqpar.kv import PagedKV, compaction
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, even_ranges
from tests.kernels.interpreter import interpreted
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.ranks import run_mesh, thinned

OPS = ("columns", "norm_rotary", "quantize", "rms_norm", "rotary", "rows", "swiglu")


def prefill_and_decode(mesh: comm.DeviceMesh, heads: tuple[int, int], qk_norm: bool, wire: comm.Wire | None) -> None:
    groups = comm.groups(mesh)
    torch.manual_seed(3)
    oracle = DecoderLayer(12, *heads, 6, 10, qk_norm=qk_norm).double()
    options = {"groups": groups, "heads": HeadMap(*heads, *groups.layout)}
    total = (4, 3)
    x = torch.randn(sum(total), 12, dtype=torch.float64)
    cos, sin = rope(torch.cat([torch.arange(n) for n in total]), 6)
    expected = oracle(x, total, cos, sin)
    layer = ParallelDecoderLayer.from_module(oracle.float(), **options, wire=wire)
    kv = PagedKV(1, 8, 2, layer.self_attn.core.num_kv_heads, 6, device="cpu")
    with (
        interpreted(*OPS),
        torch.no_grad(),
        patch.object(columns, "pack_heads", wraps=columns.pack_heads) as packed,
        patch.object(rms_norm, "add_rms_norm", wraps=rms_norm.add_rms_norm) as added,
        patch.object(rows, "append_rows", wraps=rows.append_rows) as appended,
        patch.object(quantize, "encode", wraps=quantize.encode) as encoded,
    ):
        for chunk in (torch.tensor([0, 1, 2, 4, 5]), torch.tensor([3, 6])):
            batch = kv.batch([0, 1], (3, 2) if len(chunk) == 5 else (1, 1))
            mine = chunk[slice(*even_ranges(len(chunk), groups.sp.size())[groups.sp.rank()])]
            out = layer(x[mine].float(), batch, cos[chunk].float(), sin[chunk].float(), kv)
            error = (out.double() - expected[mine]).abs().max()
            assert error <= (2e-5 if wire is None else 0.1)
    assert packed.call_count == (2 if groups.sp.size() > 1 and wire is None else 0)
    assert added.call_count == 2
    assert appended.called and encoded.called == (wire is not None and groups.layout.size > 1)


@pytest.mark.parametrize("layout", thinned([(1, 1), (1, 2), (2, 1)], lambda layout: layout == (1, 2)), ids=name_of)
def test_equals_one_process(layout: tuple[int, int]) -> None:
    run_mesh(layout, prefill_and_decode, (4, 2), True, None)


def test_shared_heads_and_wire_formats() -> None:
    run_mesh((1, 2), prefill_and_decode, (3, 1), False, None)
    run_mesh((1, 2), prefill_and_decode, (4, 2), True, "int8")


def test_a_cache_moves_and_gathers() -> None:
    """The same whether Triton or PyTorch moves it; pages in a chain one after another."""
    found = []
    for ops in ((), OPS):
        kv = PagedKV(2, 9, 2, 1, 4, device="cpu")
        torch.manual_seed(0)
        with interpreted(*ops):
            for request, tokens in ((0, 3), (1, 5), (2, 1), (3, 4)):
                batch = kv.batch([request], [tokens])
                for layer in range(2):
                    kv.append(layer, *torch.randn(2, tokens, 1, 4), batch)
            kv.free(0)
            for strategy in ("window", "stable"):
                kv.compact(strategy)
                kv.integrity()
            found.append([kv.gather(layer, [3, 1, 2]) for layer in range(2)])
    for (k, v), (k_torch, v_torch) in zip(*found, strict=True):
        assert torch.equal(k, k_torch) and torch.equal(v, v_torch) and k.isfinite().all()
    plan = compaction.plan([True, False, True, True], "stable")
    moved = torch.arange(8.0).view(4, 2)
    with interpreted("rows"):
        plan.apply(moved, lengths=[2, 0, 2, 1])
    assert plan.moves and moved[plan.start].tolist() == [0.0, 1.0]
