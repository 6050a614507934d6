"""Meshes with stages: who is where, whose groups, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from seqpar import comm
from tests.ranks import run_mesh, run_ranks, thinned


def places(mesh: comm.DeviceMesh) -> tuple[Any, ...]:
    found = comm.stages(mesh)
    all_of = (found.pp, found.whole, found.groups.tp, found.groups.sp, found.groups.flat)
    ranks = [dist.get_process_group_ranks(group) for group in all_of]
    return ranks, [group.rank() for group in all_of], found.groups.layout, comm.groups(mesh["tp", "sp"]) == found.groups


@pytest.mark.parametrize(
    "shape",
    thinned([(2, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 2), (4, 1, 1), (3, 1, 1)], lambda s: s < (2, 1, 2)),
    ids=str,
)
def test_stages_are_the_slowest_axis(shape: tuple[int, int, int]) -> None:
    pp, tp, sp = shape
    for rank, (ranks, at, layout, same) in enumerate(run_mesh(shape, places)):
        stage, place = divmod(rank, tp * sp)
        t, s = divmod(place, sp)
        first = stage * tp * sp
        assert ranks == [
            [i * tp * sp + place for i in range(pp)],
            list(range(pp * tp * sp)),
            [first + i * sp + s for i in range(tp)],
            [first + t * sp + i for i in range(sp)],
            list(range(first, first + tp * sp)),
        ]
        assert (at, layout, same) == ([stage, rank, t, s, place], (tp, sp), True)


def refused(rank: int, p: int) -> None:
    for pp, tp, message in (
        (3, 1, r"`pp` \* `tp` \* `sp` must divide the number of ranks \(2\), got 3 \* 1 \* 1 = 3; start 3 ranks"),
        (2, 2, r"must divide the number of ranks \(2\), got 2 \* 2 \* 1 = 4; start 4 ranks"),
        (0, 2, "`pp` must be at least 1, got 0; leave it out for no pipeline"),
        (2, 0, "`tp` and `sp` must be at least 1, got tp=0"),
    ):
        with pytest.raises(ValueError, match=message):
            comm.init_mesh(tp, 1, "cpu", pp=pp)
    plain = comm.init_mesh(2, 1, "cpu")
    with pytest.raises(
        ValueError, match=r'`mesh` must have the axes \("pp", "tp", "sp"\), got \(\'tp\', \'sp\'\); make'
    ):
        comm.stages(plain)
    staged = comm.init_mesh(1, 1, "cpu", pp=2)
    with pytest.raises(
        ValueError, match=r'`mesh` must have the axes \("tp", "sp"\), got \(\'pp\', \'tp\', \'sp\'\); pass'
    ):
        comm.groups(staged)
    with pytest.raises(ValueError, match="`mesh` must come alone, got `tp`, `sp`, `pp` or `device` with it"):
        comm.init_mesh(pp=2, mesh=staged)


def test_what_cannot_be_is_refused_on_every_rank() -> None:
    run_ranks(2, refused)


def own_mesh(rank: int, p: int) -> None:
    """A mesh of the user's own; marks of the stage's groups; replicas of a pipeline."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "tp", "sp"))
    found = comm.stages(comm.init_mesh(mesh=mesh, deterministic=True))
    assert found.pp is mesh.get_group("pp") and comm.stages(mesh).whole is found.whole
    assert dist.get_process_group_ranks(found.pp) == [rank % 2, rank % 2 + 2]
    assert dist.get_process_group_ranks(found.groups.flat) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert all(comm.is_deterministic(group) for group in found.groups[1:])
    replica = comm.stages(comm.init_mesh(1, 1, "cpu", pp=2))
    assert dist.get_process_group_ranks(replica.whole) == [rank // 2 * 2, rank // 2 * 2 + 1]


@pytest.mark.slow
def test_a_mesh_of_the_users_own_and_replicas() -> None:
    run_ranks(4, own_mesh, isolated=True)
