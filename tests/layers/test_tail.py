"""A last layer that computes only the rows asked for: those rows and the cache are what all rows would have given."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.kv import PagedKV
from seqpar.layers import ParallelDecoderLayer, name_modules, sync_gradients
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer, name_of, rope, written_rows
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned

HEAD_DIM, PAGE = 6, 4
STEPS = ((5, 0, 3), (2, 4, 1), (1, 1, 1))  # new tokens of three requests: prompts, chunks after a prefix, decodes
ROWS = [(), (0,), (7,), (4, 7), (3, 5, 6), (2, 1)]


def build(mesh: comm.DeviceMesh, window: int | None = None, **options: bool) -> ParallelDecoderLayer:
    """The same layer at every call: 6 query and 2 KV heads, biases, q/k norms."""
    groups = comm.groups(mesh)
    torch.manual_seed(7)
    oracle = DecoderLayer(11, 6, 2, HEAD_DIM, 25, bias=True, qk_norm=True).double()
    heads = HeadMap(6, 2, *groups.layout)
    layer = ParallelDecoderLayer.from_module(oracle, groups=groups, heads=heads, window=window, **options)
    name_modules(layer)
    return layer


def mine_of(mesh: comm.DeviceMesh, total: int, sequence_sharded: bool = False) -> slice:
    """This rank's rows of all tokens."""
    sp, tp = comm.groups(mesh).sp, comm.groups(mesh).tp
    mine = even_ranges(total, sp.size())[sp.rank()]
    if sequence_sharded:
        mine = even_ranges(mine.size, tp.size())[tp.rank()].shift(mine.start)
    return slice(*mine)


def cached(mesh: comm.DeviceMesh, window: int | None, sequence_sharded: bool) -> None:
    """Steps over a cache, each computed whole and with every choice of rows."""
    layer = build(mesh, window, sequence_sharded=sequence_sharded)
    core = layer.self_attn.core
    caches = [PagedKV(1, 12, PAGE, core.num_kv_heads, HEAD_DIM, dtype=torch.float64, device="cpu") for _ in range(2)]
    torch.manual_seed(1)
    for q_lens in STEPS:
        whole, other = (kv.batch([0, 1, 2], q_lens) for kv in caches)
        x, (cos, sin) = torch.randn(sum(q_lens), 11).double(), rope(whole.positions, HEAD_DIM)
        mine = mine_of(mesh, len(x), sequence_sharded)
        with torch.no_grad():
            expected = layer(x[mine], whole, cos, sin, caches[0])
            for rows in ROWS:
                tail = other.tail([row for row in rows if row < len(x)])
                out = layer(x[mine], other, cos, sin, caches[1], tail=tail)
                kept = [row - mine.start for row in tail.within(mine.start, mine.stop)]
                torch.testing.assert_close(out, expected[kept], rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(caches[1].layer(0), caches[0].layer(0), strict=True):
            written = written_rows(caches[0])
            assert torch.equal(ours.flatten(0, 1)[written], theirs.flatten(0, 1)[written])


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
def test_rows_and_cache_are_those_of_the_whole_batch(layout: tuple[int, int]) -> None:
    run_mesh(layout, cached, None, layout[0] > 1)
    run_mesh(layout, cached, 3, False)


def given_keys(mesh: comm.DeviceMesh, seed: int, sequence_sharded: bool) -> None:
    """Whole prompts without a cache: outputs and all gradients of random rows."""
    draw = random.Random(seed)
    q_lens = [draw.randint(0, 5) for _ in range(4)] + [1]
    batch = RaggedBatch.prefill(q_lens, device="cpu")
    total = sum(q_lens)
    tail = batch.tail(draw.sample(range(total), draw.randint(1, min(3, total))))
    layer, mine = build(mesh, sequence_sharded=sequence_sharded), mine_of(mesh, total, sequence_sharded)
    cos, sin = rope(batch.positions, HEAD_DIM)
    torch.manual_seed(seed)
    x, weights = torch.randn(total, 11).double(), torch.randn(total, 11).double()
    kept = list(tail.within(mine.start, mine.stop))
    grads = []
    for chosen in (None, tail):
        local = x[mine].clone().requires_grad_()
        out = layer(local, batch, cos, sin, tail=chosen)
        rows = out if chosen else out[[row - mine.start for row in kept]]
        assert rows.shape == (len(kept), 11)
        layer.zero_grad()
        (rows * weights[kept]).sum().backward()
        sync_gradients(layer, comm.groups(mesh))
        grads.append([rows, local.grad, *(param.grad for param in layer.parameters())])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)], ids=name_of)
def test_gradients_of_some_rows(layout: tuple[int, int]) -> None:
    for seed in range(3):
        run_mesh(layout, given_keys, seed, bool(seed % 2))


def sent(mesh: comm.DeviceMesh, rows: list[int] | None) -> dict[tuple[str, str], tuple[int, int]]:
    layer, batch = build(mesh), RaggedBatch.prefill([7, 5], device="cpu")
    cos, sin = rope(batch.positions, HEAD_DIM)
    with torch.no_grad(), comm.record() as recorder:
        layer(torch.ones(12, 11).double()[mine_of(mesh, 12)], batch, cos, sin, tail=rows and batch.tail(rows))
    return {key: (count.calls, count.num_bytes) for key, count in recorder.counts.items()}


def test_only_the_rows_asked_for_travel() -> None:
    """Of 12 tokens the last of each request: rows 6 and 11, both on the second of two sequence ranks."""
    for rows, count in ((None, 12), ([6, 11], 2)):
        found = run_mesh((2, 1), sent, rows)[0]
        assert found == {("all_reduce", f"{name}_proj"): (1, count * 11 * 8) for name in ("self_attn.o", "mlp.down")}
    there, back = 6 * (3 + 2) * HEAD_DIM * 8, 3 * HEAD_DIM * 8  # 6 tokens of 3 + 2 heads, a row of 3 heads
    for rank, rows in ((0, 2), (1, 0)):
        assert run_mesh((1, 2), sent, [6, 11])[rank] == {("all_to_all", "self_attn.core"): (2, there + rows * back)}


def nothing(mesh: comm.DeviceMesh) -> list[str]:
    """What a layer yields that nobody asks for a row of."""
    layer, batch = build(mesh), RaggedBatch.prefill([7, 5], device="cpu")
    steps, value, seen = (
        layer.steps(torch.ones(12, 11).double()[mine_of(mesh, 12)], batch, tail=batch.tail([])),
        None,
        [],
    )
    while True:
        try:
            item = steps.send(value)
        except StopIteration as stop:
            assert stop.value.shape == (0, 11)
            return seen
        seen.append(f"mark {item.layer}" if isinstance(item, comm.Mark) else item.op)
        value = item.wait()


def test_without_rows_a_layer_ends_with_its_append() -> None:
    assert run_mesh((2, 1), nothing)[0] == ["mark 0"]
    assert run_mesh((2, 2), nothing)[0] == ["all_to_all", "mark 0"]


def refusals(mesh: comm.DeviceMesh) -> None:
    batch = RaggedBatch.prefill([4], device="cpu")
    x, layer = torch.ones(4, 11).double(), build(mesh)
    with own_errors(), comm.record() as recorder:
        with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 4\), got 4"):
            batch.tail([1, 4])
        with pytest.raises(ValueError, match="`tail` must be of this `batch`, got another's"):
            layer(x, batch, tail=RaggedBatch.prefill([4], device="cpu").tail([3]))
    assert not recorder.counts
    for part in (layer, layer.self_attn.core, layer.mlp.down_proj, layer.post_attention_layernorm):
        hook = part.register_forward_hook(lambda *_: None)
        assert not layer.takes_tail()
        hook.remove()
    assert layer.takes_tail()


def test_what_cannot_be_left_out_is_refused() -> None:
    run_mesh((2, 1), refusals)


def test_a_tail_of_consecutive_rows_is_a_view() -> None:
    batch, x = RaggedBatch.prefill([3, 4], device="cpu"), torch.arange(7)
    tail = batch.tail([2, 5])
    assert tail.rows == (2, 5, 6) and tail.q_lens == (1, 2)
    assert tail.take(x).tolist() == [2, 5, 6] and tail.take(x[3:], 3).tolist() == [5, 6]
    assert shares(tail.take(x[3:], 3), x) and tail.take(x[:2]).tolist() == []


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
