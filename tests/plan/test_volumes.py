"""What a layer sends: the formulas against what the collectives count, against the paper's, and its table."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from seqpar import comm
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap, Layout
from seqpar.plan import Volume, closed_volume, layer_volumes
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, name_of, rope
from tests.layers.test_decoder import HEAD_DIM, Case, my_tokens
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned

HIDDEN = 11  # divides by nothing
CASES = [
    Case(8, 4),
    Case(4, 1),  # every rank needs the only KV head
    Case(14, 2),  # a boundary falls inside a group of query heads
    Case(5, 5),
    Case(6, 3, sequence_sharded=True),
]
OPS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")


def counted(mesh: comm.DeviceMesh, case: Case, sizes: tuple[int, ...]) -> dict[tuple[Layout, int], comm.Recorder]:
    """What this rank counts under every layout that the mesh's reaches."""
    groups = comm.groups(mesh)
    torch.manual_seed(7)
    whole = DecoderLayer(HIDDEN, case.num_heads, case.num_kv_heads, HEAD_DIM, case.hidden).double()
    layer = ParallelDecoderLayer.from_module(
        whole,
        groups=groups,
        heads=HeadMap(case.num_heads, case.num_kv_heads, *groups.layout),
        sequence_sharded=case.sequence_sharded,
    )
    found = {}
    for layout, others in comm.layout_groups(groups).items():
        layer.add_layout(layout, groups=others)
        for n in sizes:
            batch = RaggedBatch.prefill((n,), device="cpu")
            x = torch.randn(n, HIDDEN, dtype=torch.float64)[my_tokens(case, others, n)]
            with comm.record() as recorder, torch.no_grad():
                layer(x, batch, *rope(batch.positions, HEAD_DIM), layout=layout)
            found[layout, n] = recorder
    return found


@pytest.mark.parametrize("base", thinned(LAYOUTS, SMALL.__contains__), ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_sends_what_the_formulas_say(case: Case, base: tuple[int, int]) -> None:
    """Every collective, rank and reachable layout, to the byte: the least, and what the algorithms chosen send."""
    heads = HeadMap(case.num_heads, case.num_kv_heads, *base)
    ranks = run_mesh(base, counted, case, (1, 5, 8))
    assert {layout for layout, _ in ranks[0]} == set(Layout(*base).reachable)
    for layout, n in ranks[0]:
        least, sent = (
            layer_volumes(
                layout,
                n,
                heads,
                hidden_size=HIDDEN,
                head_dim=HEAD_DIM,
                itemsize=8,
                sequence_sharded=case.sequence_sharded,
                device=device,
            )
            for device in (None, "cpu")
        )
        for rank, recorders in enumerate(ranks):
            by_op = recorders[layout, n].by_op()
            counts = [by_op.get(op, comm.Count()) for op in OPS]
            assert Volume(*(count.num_bytes for count in counts)) == least[rank]
            assert Volume(*(count.sent_bytes for count in counts)) == sent[rank]
            expected = {"all_to_all": layout.sp > 1} | dict.fromkeys(
                ("all_gather", "reduce_scatter") if case.sequence_sharded else ("all_reduce",), layout.tp > 1
            )
            assert {op: count.calls for op, count in by_op.items()} == {op: 2 for op, any_ in expected.items() if any_}


def test_sums_over_more_bytes_take_two_shots() -> None:
    """8 ranks of a deterministic group and 4,096 tokens; by hand 2 * 7/8 of each of two sums, and 7 for 1 token."""
    heads, sizes = HeadMap(8, 8, 8, 1), {"hidden_size": 1024, "head_dim": 128}
    many = layer_volumes(Layout(8, 1), 4096, heads, device="cpu", deterministic=True, **sizes)
    assert many == (Volume(all_reduce=2 * 2 * 7 * 4096 * 1024 * 2 // 8),) * 8
    few = layer_volumes(Layout(8, 1), 1, heads, device="cpu", deterministic=True, **sizes)
    assert few == (Volume(all_reduce=2 * 7 * 1024 * 2),) * 8
    on_cuda = layer_volumes(Layout(8, 1), 1, heads, device="cuda", **sizes)
    assert on_cuda == layer_volumes(Layout(8, 1), 1, heads, **sizes) == (Volume(all_reduce=2 * 2 * 7 * 128 * 2),) * 8


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 16])
def test_where_everything_divides_the_closed_form_is_every_ranks(size: int, num_kv_heads: int) -> None:
    sizes = {"hidden_size": 48, "head_dim": 6, "itemsize": 2}
    for layout in Layout(1, size).reachable:
        heads = HeadMap(16, num_kv_heads, *layout)
        closed = closed_volume(layout, 40, heads, **sizes)
        assert layer_volumes(layout, 40, heads, **sizes) == (closed,) * size
        gathered = layer_volumes(layout, 40, heads, sequence_sharded=True, **sizes)
        assert {volume.total for volume in gathered} == {closed.total}


def test_uneven_shares_add_up_to_the_closed_form_of_their_means() -> None:
    """Tokens that do not divide: the sum over ranks of what two all-reduces send is the formula's."""
    heads = HeadMap(8, 8, 2, 2)
    for n in (1, 3, 7):
        each = layer_volumes(Layout(2, 2), n, heads, hidden_size=11, head_dim=6)
        closed = closed_volume(Layout(2, 2), n, heads, hidden_size=11, head_dim=6)
        assert sum(volume.all_reduce for volume in each) == 4 * closed.all_reduce
        assert sum(volume.all_to_all for volume in each) == 4 * closed.all_to_all


# KiB a token, layer and GPU in half precision on 8 of them; all-to-alls and all-reduces apart.
TABLE = {
    "Llama-70B": ((64, 8, 8192), ((0, 56), (2.25, 24), (3.375, 8), (3.9375, 0))),
    "Qwen-32B": ((64, 8, 5120), ((0, 35), (2.25, 15), (3.375, 5), (3.9375, 0))),
    "Llama-17B-16E": ((40, 8, 5120), ((0, 35), (1.5, 15), (2.25, 5), (2.625, 0))),
    "Qwen-30B-A3B": ((32, 4, 2048), ((0, 14), (1.25, 6), (1.875, 2), (2.1875, 0))),
}


@pytest.mark.parametrize("model", TABLE)
def test_the_papers_models(model: str) -> None:
    (num_heads, num_kv_heads, hidden), expected = TABLE[model]
    for tp, (all_to_all, all_reduce) in zip((8, 4, 2, 1), expected, strict=True):
        layout = Layout(tp, 8 // tp)
        heads = HeadMap(num_heads, num_kv_heads, *layout)
        one = closed_volume(layout, 1, heads, hidden_size=hidden, head_dim=128)
        assert one == Volume(Fraction(all_to_all) * 1024, Fraction(all_reduce) * 1024)
        whole = layer_volumes(layout, 4096, heads, hidden_size=hidden, head_dim=128)
        assert {volume.total for volume in whole} == {4096 * one.total}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`layout` must be of the 4 ranks that `heads` are split over"):
        layer_volumes(Layout(2, 1), 4, HeadMap(8, 8, 2, 2), hidden_size=8, head_dim=2)
