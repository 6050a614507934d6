"""Attention with sinks against Transformers' own, gpt-oss's, in its definition (eager)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from seqpar import comm
from seqpar.layers import ParallelAttention, ShardedModule, iter_sources, sync_gradients
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import name_of, rope
from tests.ranks import run_mesh

EXACT = {"rtol": 1e-10, "atol": 1e-12}
TOKENS, WINDOW, DIM = 11, 4, 6


def theirs(num_heads: int, num_kv_heads: int, kind: str) -> GptOssAttention:
    config = GptOssConfig(
        hidden_size=20,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=DIM,
        num_hidden_layers=1,
        layer_types=[kind],
        sliding_window=WINDOW,
        attention_bias=True,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = GptOssAttention(config, 0).double()
    for param in attention.parameters():
        nn.init.normal_(param)
    return attention


def block(mesh: comm.DeviceMesh, num_heads: int, num_kv_heads: int, kind: str) -> None:
    """Output and all gradients of one request, with biases on all four projections."""
    groups = comm.groups(mesh)
    attention = theirs(num_heads, num_kv_heads, kind)
    window = WINDOW if kind == "sliding_attention" else None
    heads = HeadMap(num_heads, num_kv_heads, *groups.layout)
    ours = ParallelAttention.from_module(attention, groups=groups, heads=heads, window=window)
    cos, sin = rope(torch.arange(TOKENS), DIM)
    age = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    hidden = (age < 0) | (age >= (window or TOKENS))
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -torch.inf)
    x = torch.randn(TOKENS, 20, dtype=torch.float64)
    full = x.clone().requires_grad_()
    half = slice(DIM // 2)  # gpt-oss's tables hold each angle once
    expected, _ = attention(full[None], (cos[None, :, half], sin[None, :, half]), mask[None, None])
    seed = torch.randn(TOKENS, 20, dtype=torch.float64)
    (expected[0] * seed).sum().backward()
    mine = slice(*even_ranges(TOKENS, groups.sp.size())[groups.sp.rank()])
    local = x[mine].clone().requires_grad_()
    out = ours(local, RaggedBatch.prefill([TOKENS]), cos, sin)
    torch.testing.assert_close(out, expected[0, mine], **EXACT)
    (out * seed[mine]).sum().backward()
    assert local.grad is not None and full.grad is not None
    torch.testing.assert_close(local.grad, full.grad[mine], **EXACT)
    sync_gradients(ours, groups)
    names = set()
    for name, owner, _, source in iter_sources(ours):
        grad = attention.get_parameter(name).grad
        assert grad is not None
        pieces = [grad.narrow(p.dim, p.full.start, p.full.size) for p in source.pieces]
        got = ShardedModule._local(source, getattr(owner, source.param).grad)
        torch.testing.assert_close(got, torch.cat(pieces, source.dim), **EXACT)
        names.add(name)
    assert names == {name for name, _ in attention.named_parameters()} and "o_proj.bias" in names


@pytest.mark.parametrize("layout", [(1, 3), (2, 2)], ids=name_of)
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (6, 6), (7, 1)])
def test_equals_gpt_oss(num_heads: int, num_kv_heads: int, kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, block, num_heads, num_kv_heads, kind)
