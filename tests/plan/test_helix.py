"""Helix: its example, its overlap as a schedule of the library, and its volume against what the layer sends."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from seqpar import comm
from seqpar.kv import StripedKV
from seqpar.layers import QShipDecodeAttention
from seqpar.partition import HeadMap, Layout, Striping
from seqpar.plan import Slot, helix_volume, makespan
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh


def test_the_example_of_the_paper() -> None:
    """Eight requests of 2 units of attention and 1.2 of exchange: 25.6 units one after another, published as 17."""
    alone, together = [[Slot(2.0, 1.2)] * 8], [[Slot(2.0, 1.2)]] * 8
    assert makespan(alone).total_s == pytest.approx(25.6)
    assert makespan(together).total_s == pytest.approx(17.2)  # the last exchange is exposed


@pytest.mark.parametrize(("compute", "exchange"), [(2.0, 1.2), (1.0, 3.0), (1.0, 1.0)])
def test_the_overlap_of_requests_in_general(compute: float, exchange: float) -> None:
    found = makespan([[Slot(compute, exchange)]] * 5).total_s
    assert found == pytest.approx(5 * max(compute, exchange) + min(compute, exchange))


def sent(mesh: comm.DeviceMesh, tokens: int) -> int:
    groups = comm.groups(mesh)
    layouts = comm.layout_groups(groups)
    full = Layout(groups.layout.size, 1)
    heads = HeadMap(8, 4, *groups.layout)
    core = QShipDecodeAttention(heads, 16, group=groups.sp, tp_rank=groups.tp.rank())
    core.add_layout(full, group=layouts[full].sp)
    striping, rank = Striping(groups.sp.size()), groups.sp.rank()
    kv_heads = heads.kv_shard(groups.tp.rank()).size
    kv = StripedKV(1, 8, 32, kv_heads, 16, striping=striping, rank=rank, dtype=torch.bfloat16)
    for lens in ((70, 3), (1, tokens - 1)):
        batch = kv.batch(["a", "b"], lens)
        q, k, v = (
            torch.ones(sum(lens), h, 16, dtype=torch.bfloat16) for h in (8 // groups.layout.tp, kv_heads, kv_heads)
        )
        with comm.record() as found, torch.no_grad():
            core(core.pack(q, k, v), batch, kv=kv, layout=full, whole=True)
    return found.total.num_bytes


@pytest.mark.parametrize("layout", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_the_layer_sends_what_the_formula_says(layout: tuple[int, int]) -> None:
    tpa, kvp = layout
    wanted = helix_volume(5, num_heads=8, head_dim=16, kvp=kvp, tpa=tpa)
    assert run_mesh(layout, sent, 5) == [wanted] * (tpa * kvp)


def test_the_formula_by_hand() -> None:
    """(KVP - 1) B H / (KVP TPA) elements, and as many heads of 4 bytes; nothing of the context."""
    assert helix_volume(1, num_heads=128, head_dim=128, kvp=8, tpa=8) == 7 * 2 * (256 + 4)
    assert helix_volume(3, num_heads=2, head_dim=64, kvp=4, tpa=1) == Fraction(9, 2) * 132
    with own_errors(), pytest.raises(ValueError, match="sizes must be at least 1, and `tokens` at least 0"):
        helix_volume(1, num_heads=128, head_dim=128, kvp=0, tpa=8)
