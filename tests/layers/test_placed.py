"""Attention over placed tokens as a layer takes it: equal to one process, and the cache holds what each rank owns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.kernels import attention
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import HeadParameter, PlacedCore, QShipDecodeAttention, RingAttention, UlyssesAttention, placed_rows
from seqpar.partition import HeadMap, Placement, Striping
from seqpar.ragged import RaggedBatch
from tests.layers.reference import Norm, name_of, rotate
from tests.ranks import run_mesh

PLACEMENTS: tuple[tuple[Placement, int], ...] = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3))


def test_every_token_lies_on_one_rank_and_cached_ones_count() -> None:
    batch = RaggedBatch.build((5, 0, 2), (9, 4, 2))
    for placement, interleave in PLACEMENTS:
        rows = placed_rows(batch, 2, placement, interleave=interleave)
        assert sorted([*rows[0], *rows[1]]) == list(range(7))
    assert placed_rows(batch, 2, "striped") == ((0, 2, 4, 5), (1, 3, 6))  # positions 4, 6, 8 and 0; 5, 7 and 1
    assert placed_rows(batch, 2, "contiguous") == ((0, 1, 2, 5), (3, 4, 6))


def attends(mesh: comm.DeviceMesh, placement: Placement, interleave: int, window: int | None) -> None:
    """A prompt, another one over it, and a decode that ships queries, in one cache: each as one process has it."""
    groups = comm.groups(mesh)
    rank, tp_rank = groups.sp.rank(), groups.tp.rank()
    heads = HeadMap(6, 2, *groups.layout)
    torch.manual_seed(0)
    norms = [Norm(8).double(), Norm(8).double()]
    options: dict[str, Any] = {"group": groups.sp, "tp_rank": tp_rank, "window": window}
    beside = UlyssesAttention(heads, 8, q_norm=norms[0], k_norm=norms[1], **options)
    ring = RingAttention(heads, 8, placement=placement, interleave=interleave, **options)
    layer = PlacedCore(ring, beside=beside)
    ship = QShipDecodeAttention(heads, 8, q_norm=norms[0], k_norm=norms[1], **options)
    q_heads, kv_heads = slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    striping = Striping(groups.layout.sp)
    kv = StripedKV(
        1, 40, 2 * striping.period, kv_heads.stop - kv_heads.start, 8, striping=striping, rank=rank, dtype=torch.float64
    )
    whole = PagedKV(1, 40, 4, 2, 8, dtype=torch.float64)
    for q_lens in ((7, 1, 12), (3, 5, 0), (1, 1, 1)):
        batch, every = kv.batch("abc", q_lens), whole.batch("abc", q_lens)
        tokens = batch.num_tokens
        q, k, v = (torch.randn(tokens, h, 8, dtype=torch.float64) for h in (6, 2, 2))
        cos, sin = torch.randn(2, tokens, 8, dtype=torch.float64)
        turned_q, turned_k = rotate(norms[0](q), cos, sin), rotate(norms[1](k), cos, sin)
        whole.append(0, turned_k.detach(), v, every)
        expected = attention(turned_q, *whole.read(0, every), every, window=window)[0]
        decode = max(q_lens) == 1
        rows = torch.arange(tokens).tensor_split(striping.ranks)[rank] if decode else layer.rows(batch)
        qkv = beside.pack(q[rows][:, q_heads], k[rows][:, kv_heads], v[rows][:, kv_heads])
        with torch.no_grad():
            out = (ship if decode else layer)(qkv, batch, cos, sin, kv)
        torch.testing.assert_close(out, expected[rows][:, q_heads].flatten(1), rtol=1e-12, atol=1e-12)
    for request in "abc":
        held = whole.gather(0, [request])
        mine = list(striping.tokens(0, whole.length(request), rank))
        for found, full in zip(kv.gather(0, [request]), held, strict=True):
            torch.testing.assert_close(found, full[mine][:, kv_heads], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("placement", "interleave"), PLACEMENTS)
@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (1, 3)], ids=name_of)
def test_prompts_and_decodes_share_a_striped_cache(
    layout: tuple[int, int], placement: Placement, interleave: int
) -> None:
    run_mesh(layout, attends, placement, interleave, None)


def test_windows() -> None:
    run_mesh((1, 2), attends, "striped", 1, 5)
    run_mesh((1, 2), attends, "zigzag", 1, 1)


def kinds(mesh: comm.DeviceMesh, placement: Placement) -> list[str]:
    """What a step yields, in order."""
    group, heads = comm.groups(mesh).sp, HeadMap(2, 1)
    layer = PlacedCore(
        RingAttention(heads, 4, group=group, placement=placement), beside=UlyssesAttention(heads, 4, group=group)
    )
    kv = StripedKV(1, 1, 8, 1, 4, striping=Striping(1), rank=0)
    program, found = layer.steps(torch.zeros(3, 16), kv.batch("a", [3]), kv=kv), []
    try:
        item = next(program)
        while True:
            found.append(item.kind if isinstance(item, comm.Mark) else "handle")
            item = program.send(item.wait())
    except StopIteration:
        return found


def test_later_chunks_wait_until_the_keys_are_cached() -> None:
    assert run_mesh((1, 1), kinds, "striped") == [["mark"]]
    assert run_mesh((1, 1), kinds, "contiguous") == [["open", "handle", "close"]]


def refused(mesh: comm.DeviceMesh) -> None:
    group, heads = comm.groups(mesh).sp, HeadMap(4, 2, 1, 2)
    beside = UlyssesAttention(heads, 8, group=group)
    layer = PlacedCore(RingAttention(heads, 8, group=group), beside=beside)
    batch = RaggedBatch.prefill((5,))
    x = torch.zeros(len(layer.rows(batch)), 8 * 8)
    with comm.record() as sent:
        with pytest.raises(ValueError, match="`inner` must have the heads, head_dim, window and scale of the layer"):
            PlacedCore(RingAttention(heads, 8, group=group, window=3), beside=beside)
        sinks = HeadParameter.from_tensor("sinks", torch.zeros(4), heads=heads, group=group)
        with pytest.raises(ValueError, match="`inner` must have the sinks of the layer beside it, got RingAttention"):
            PlacedCore(
                RingAttention(heads, 8, group=group), beside=UlyssesAttention(heads, 8, group=group, sinks=sinks)
            )
        with pytest.raises(ValueError, match=r"`qkv` must have shape \[\d, 64\] \(the tokens `rows\(batch\)`"):
            layer(x[1:], batch)
        with pytest.raises(ValueError, match=r"`cos` and `sin` must have shape \[5, 8\]"):
            layer(x, batch, x, x)
        with pytest.raises(ValueError, match=r"`kv` must be the `StripedKV` of rank \d of the group's 2, got PagedKV"):
            layer(x, batch, kv=PagedKV(1, 1, 8, 2, 8))
    assert not sent.counts


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    run_mesh((1, 2), refused)
