"""Meshes: who is where, whose groups, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar import comm
from seqpar.partition import Layout
from tests.ranks import LAYOUTS, run_mesh, run_ranks

AXES = ("tp", "sp")


def places(mesh):
    g = comm.groups(mesh)
    ranks = [dist.get_process_group_ranks(group) for group in (g.tp, g.sp, g.flat)]
    return g.layout, (g.tp.rank(), g.sp.rank(), g.flat.rank()), ranks, mesh.mesh_dim_names


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_sequence_axis_is_fastest(layout):
    tp, sp = layout
    for rank, (found, place, ranks, names) in enumerate(run_mesh(layout, places)):
        t, s = divmod(rank, sp)
        assert (found, place, names) == (layout, (t, s, rank), ("tp", "sp"))
        assert ranks == [[i * sp + s for i in range(tp)], [t * sp + i for i in range(sp)], list(range(tp * sp))]


def replicas(rank, p):
    mesh = comm.init_mesh(2, 1, "cpu")
    assert mesh.mesh.tolist() == [[rank // 2 * 2], [rank // 2 * 2 + 1]]
    return places(mesh)[2]


def test_a_larger_world_holds_replicas():
    assert run_ranks(4, replicas, isolated=True) == [
        [[0, 1], [0], [0, 1]],
        [[0, 1], [1], [0, 1]],
        [[2, 3], [2], [2, 3]],
        [[2, 3], [3], [2, 3]],
    ]


def refused(rank, p):
    for (tp, sp), message in (
        ((3, 1), r"`tp` \* `sp` must divide the number of ranks \(2\), got 3 \* 1 = 3; start 3 ranks"),
        ((2, 2), r"got 2 \* 2 = 4; start 4 ranks, such as with `torchrun --nproc-per-node 4`"),
        ((0, 1), r"`tp` and `sp` must be at least 1, got tp=0, sp=1"),
    ):
        with pytest.raises(ValueError, match=message):
            comm.init_mesh(tp, sp, "cpu")
    with pytest.raises(ValueError, match='`device` must be "cpu" or "cuda", got "tpu"'):
        comm.init_mesh(2, 1, "tpu")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(ValueError, match=r'`mesh` must have the axes \("tp", "sp"\), got \(\'tp\',\)'):
        comm.init_mesh(mesh=mesh)
    with pytest.raises(ValueError, match="`mesh` must come alone"):
        comm.init_mesh(2, mesh=mesh)


def test_what_cannot_be_is_refused_on_every_rank():
    run_ranks(2, refused)
    run_ranks(3, remainder)


def remainder(rank, p):
    with pytest.raises(ValueError, match=r"must divide the number of ranks \(3\), got 2 \* 1 = 2"):
        comm.init_mesh(2, 1, "cpu")


def own_mesh(rank, p):
    whole = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "tp", "sp"))
    mesh = comm.init_mesh(mesh=whole["tp", "sp"])
    g = comm.groups(mesh)
    assert g.sp is whole.get_group("sp")
    assert g.tp is whole.get_group("tp")
    assert dist.get_process_group_ranks(g.flat) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert comm.groups(mesh).flat is g.flat
    assert [comm.is_deterministic(group) for group in g[1:]] == [False] * 3


def test_a_mesh_of_the_users_own_keeps_its_groups():
    run_ranks(4, own_mesh, isolated=True)


def marks(mesh):
    return [comm.is_deterministic(group) for group in comm.groups(mesh)[1:]]


def own_marks(rank, p):
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp"))
    mesh = comm.init_mesh(mesh=whole)
    assert marks(mesh) == [False] * 3
    assert marks(comm.init_mesh(mesh=mesh, deterministic=True)) == [True] * 3
    assert marks(comm.init_mesh(mesh=mesh)) == marks(whole) == [True] * 3  # nothing asked, nothing lost
    made = comm.init_mesh(2, 2, "cpu", deterministic=True)
    assert marks(comm.init_mesh(mesh=made)) == [True] * 3
    sharing = DeviceMesh.from_group(
        [made.get_group("tp"), whole.get_group("sp")], "cpu", mesh=made.mesh, mesh_dim_names=AXES
    )
    plain = comm.init_mesh(2, 2, "cpu")
    for asked in (whole, made, sharing):
        with pytest.raises(
            ValueError,
            match=r"`deterministic` must be True or left out for groups that are deterministic already \(tp, sp.*\), "
            "got False; give this mesh groups of its own",
        ):
            comm.init_mesh(mesh=asked, deterministic=False)
    assert marks(whole) == marks(made) == [True] * 3
    assert marks(comm.init_mesh(mesh=plain, deterministic=False)) == [False] * 3


def test_a_mark_once_set_stays():
    run_ranks(4, own_marks, isolated=True)


def deterministic(mesh):
    return marks(mesh), comm.describe(comm.groups(mesh).sp)


def test_deterministic_is_a_property_of_the_mesh():
    assert run_mesh((1, 2), deterministic, deterministic=True)[0] == (
        [True] * 3,
        "group `sp deterministic` (ranks 0, 1)",
    )
    assert run_mesh((1, 2), deterministic)[0] == ([False] * 3, "group `sp` (ranks 0, 1)")


def in_a_plain_process(script, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout


def test_one_plain_process_needs_no_launcher():
    script = (
        "import torch; from seqpar import comm; mesh = comm.init_mesh(device='cpu'); g = comm.groups(mesh);"
        "print(g.layout, comm.all_reduce(torch.ones(2), group=g.flat).tolist())"
    )
    assert in_a_plain_process(script) == "Layout(tp=1, sp=1) [1.0, 1.0]\n"


def test_torchruns_environment_is_used(free_port):
    script = """
import torch, torch.distributed as dist
from seqpar import comm
from seqpar.partition import Layout
groups = comm.groups(comm.init_mesh(device="cpu", timeout_s=7))
print(groups.layout, dist.get_world_size(), groups.flat._get_backend(torch.device("cpu")).options._timeout)
"""
    out = in_a_plain_process(script, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free_port))
    assert out == "Layout(tp=1, sp=1) 1 0:00:07\n"


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def shifted(mesh):
    base = comm.groups(mesh)
    found = comm.layout_groups(base)
    assert found[base.layout] == base
    for layout, groups in found.items():
        t, s = divmod(base.flat.rank(), layout.sp)
        flat = dist.get_process_group_ranks(base.flat)
        assert (groups.layout, groups.tp.rank(), groups.sp.rank(), groups.flat) == (layout, t, s, base.flat)
        assert dist.get_process_group_ranks(groups.tp) == [flat[i * layout.sp + s] for i in range(layout.tp)]
        assert dist.get_process_group_ranks(groups.sp) == [flat[t * layout.sp + i] for i in range(layout.sp)]
        assert comm.is_deterministic(groups.tp) == comm.is_deterministic(base.flat)
        total = comm.all_reduce(torch.tensor([float(base.flat.rank())]), group=groups.tp)
        assert total.item() == sum(i * layout.sp + s for i in range(layout.tp))
    assert found[Layout(base.layout.size, 1)].tp is base.flat
    with pytest.raises(
        ValueError, match=r"must be reachable from the stored \(1, 4\), got \(3, 1\); reachable are \(1,"
    ):
        comm.layout_groups(base, [base.layout, Layout(3, 1)])
    return list(found)


def test_groups_of_every_layout_that_can_be_shifted_to():
    assert run_mesh((1, 4), shifted)[3] == [(1, 4), (2, 2), (4, 1)]


def shifted_replica(rank, p):
    base = comm.groups(comm.init_mesh(1, 2, "cpu", timeout_s=33.0, deterministic=True))
    made = comm.layout_groups(base, [Layout(2, 1)])[Layout(2, 1)]
    assert dist.get_process_group_ranks(made.tp) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_process_group_ranks(made.sp) == [rank] and comm.is_deterministic(made.sp)
    assert made.sp._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 33


def shifted_like_its_base(rank, p):
    base = comm.groups(comm.init_mesh(1, 4, "cpu", timeout_s=33.0, deterministic=True))
    for group in comm.layout_groups(base)[Layout(2, 2)][1:3]:
        assert group is not base.flat and group.size() == 2 and comm.is_deterministic(group)
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 33


def test_a_replica_shifts_alone():
    run_ranks(4, shifted_replica, isolated=True)


def test_new_groups_reduce_and_wait_as_their_base_does():
    run_ranks(4, shifted_like_its_base, isolated=True)


def split(mesh):
    """Rows and columns of the group, which sum as it does; a split that is none is refused on every rank."""
    group = comm.groups(mesh).sp
    whole = dist.get_process_group_ranks(group)
    for inner in (1, 2, 4):
        grid = comm.split_groups(group, inner)
        row, column = divmod(group.rank(), inner)
        assert grid.whole is group
        assert dist.get_process_group_ranks(grid.inner) == whole[row * inner : (row + 1) * inner]
        assert dist.get_process_group_ranks(grid.outer) == whole[column::inner]
        assert (grid.inner.rank(), grid.outer.rank()) == (column, row)
        assert comm.is_deterministic(grid.inner) == comm.is_deterministic(grid.outer) == comm.is_deterministic(group)
        total = comm.all_reduce(torch.tensor([float(group.rank())]), group=grid.outer)
        assert total.item() == sum(range(4)[column::inner])
    assert comm.split_groups(group, 4).inner is group and comm.split_groups(group, 1).outer is group
    for inner in (0, 3):
        with pytest.raises(ValueError, match=rf"`inner` must be at least 1 and divide the 4 ranks of .*, got {inner}"):
            comm.split_groups(group, inner)


def test_a_group_splits_into_rows_and_columns():
    run_mesh((1, 4), split)
    run_mesh((1, 4), split, deterministic=True)
