"""Meshes of ranks, and the groups that layers take.

Ranks of a `tp` x `sp` mesh are numbered with the sequence axis fastest, as `seqpar.partition` numbers the flat map. The
stages of a pipeline are one more axis around these, `pp`: neighbours in a stage have the faster links, for a stage
talks in every layer and stages hand over once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from seqpar.partition import Layout, layout_names

__all__ = [
    "Groups",
    "SplitGroups",
    "Stages",
    "describe",
    "groups",
    "init_mesh",
    "is_deterministic",
    "layout_groups",
    "split_groups",
    "stages",
]

AXES: tuple[str, ...] = ("tp", "sp")
FLAT = "tp_sp"
STAGED = ("pp", *AXES)
WHOLE = "pp_tp_sp"
_DETERMINISTIC = " deterministic"
_MOST_S = 1e8  # three years; backends count milliseconds in 64 bits, and Python days in 32


class Groups(NamedTuple):
    """The process groups of a mesh for this rank.

    Attributes:
        layout: sizes of the axes.
        tp: ranks with the same sequence rank.
        sp: ranks with the same tensor-parallel rank; their rank order is sequence order.
        flat: all ranks, numbered `tp_rank * layout.sp + sp_rank`.
    """

    layout: Layout
    tp: ProcessGroup
    sp: ProcessGroup
    flat: ProcessGroup


class Stages(NamedTuple):
    """The process groups of a pipeline for this rank.

    Attributes:
        groups: of this rank's stage.
        pp: ranks with the same place in every stage; their rank order is that of the stages.
        whole: all ranks, numbered `pp.rank() * groups.layout.size + groups.flat.rank()`.
    """

    groups: Groups
    pp: ProcessGroup
    whole: ProcessGroup


class SplitGroups(NamedTuple):
    """A group as a grid of rows: rank r * inner.size() + c of `whole` is column c of row r.

    Attributes:
        whole: all of it.
        inner: this rank's row, neighbours in `whole`.
        outer: this rank's column, a rank of every row.
    """

    whole: ProcessGroup
    inner: ProcessGroup
    outer: ProcessGroup


def init_mesh(
    tp: int | None = None,
    sp: int | None = None,
    device: str | None = None,
    *,
    pp: int | None = None,
    mesh: DeviceMesh | None = None,
    deterministic: bool | None = None,
    timeout_s: float = 300.0,
) -> DeviceMesh:
    """A mesh with the axes "tp" and "sp", sequence axis fastest; every rank calls it with the same arguments.

    Starts the default process group where there is none: from the environment that torchrun sets (gloo on CPU, NCCL
    on CUDA), or of this one process alone. Where the world is a multiple of pp * tp * sp, consecutive ranks form one
    replica each, and each rank gets its own replica's mesh.

    Args:
        tp: number of tensor-parallel ranks, default 1.
        sp: number of sequence-parallel ranks, default 1.
        device: "cpu" or "cuda"; default is "cuda" where there is one.
        pp: number of pipeline stages. With it, 1 included, the mesh has one more axis "pp" around the others
            (`stages`); without, there is none.
        mesh: take this mesh, or this slice of one, with its own groups, instead of making one.
        deterministic: reductions of the groups of this mesh are float32 sums in rank order, rounded once; so they then
            are in every mesh of the user's own that shares a group with it. Layers then attend so that cuts do not
            change the bits either, see `seqpar.kernels.is_cut_invariant`. None leaves the groups of `mesh` as they are,
            and is False where the mesh is made here.
        timeout_s: how long a collective of this mesh may wait for its slowest rank; with `mesh=` that is its own.

    Raises:
        ValueError: the mesh does not fit into the world, `timeout_s` is no time, `mesh` has other axes, or its groups
            are deterministic already where `deterministic` is False.
    """
    if mesh is None:
        mesh = _make_mesh(Layout(1 if tp is None else tp, 1 if sp is None else sp), pp, device, timeout_s)
    elif (tp, sp, device, pp) != (None, None, None, None):
        raise ValueError("`mesh` must come alone, got `tp`, `sp`, `pp` or `device` with it; leave them out")
    made = stages(mesh).groups if mesh.mesh_dim_names == STAGED else groups(mesh)
    if deterministic is not None:
        _mark(made, deterministic)
    return mesh


def groups(mesh: DeviceMesh) -> Groups:
    """The groups of a mesh with the axes "tp" and "sp"; the first call for a mesh of the user's own is collective.

    Raises:
        ValueError: `mesh` has other axes, or its order is not sequence axis fastest.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(
            f'`mesh` must have the axes ("tp", "sp"), got {mesh.mesh_dim_names}; pass the slice mesh["tp", "sp"]'
        )
    layout = Layout(mesh.size(0), mesh.size(1))
    return Groups(layout, mesh.get_group("tp"), mesh.get_group("sp"), _flattened(mesh, FLAT))


def stages(mesh: DeviceMesh) -> Stages:
    """The groups of a mesh with the axes "pp", "tp" and "sp"; the first call for one of the user's own is collective.

    Raises:
        ValueError: `mesh` has other axes, or its order is not sequence axis fastest and stages slowest.
    """
    if mesh.mesh_dim_names != STAGED:
        raise ValueError(
            f'`mesh` must have the axes ("pp", "tp", "sp"), got {mesh.mesh_dim_names}; make it with `init_mesh(pp=...)`'
        )
    return Stages(groups(mesh["tp", "sp"]), mesh.get_group("pp"), _flattened(mesh, WHOLE))


def _flattened(mesh: DeviceMesh, name: str) -> ProcessGroup:
    """All ranks of a mesh, in the order of its axes."""
    made = mesh._get_root_mesh()._flatten_mapping.get(name)  # PyTorch 2.11 would not take that of `_make_mesh` itself
    flat = (mesh._flatten(name) if made is None else made).get_group()
    if dist.get_process_group_ranks(flat) != mesh.mesh.flatten().tolist():
        raise ValueError(f"ranks of `mesh` must increase along its axes, got {mesh.mesh.tolist()}")
    return flat


def layout_groups(base: Groups, layouts: Sequence[Layout] | None = None) -> dict[Layout, Groups]:
    """The groups of other layouts of the same ranks, which steps can be shifted to.

    Every rank of `base` calls it with the same arguments; ranks outside need not. Every group is made once, with the
    timeout of `base.flat`, and reduces as that one does (`is_deterministic`). One whose ranks are those of `base.tp`,
    `base.sp` or `base.flat` is that group.

    Args:
        base: of the layout that weights are stored in (`groups`).
        layouts: those wanted; by default all that `base.layout` reaches, itself included.

    Raises:
        ValueError: a layout that needs weights which the stored ones do not contain; no group has been made then.
    """
    wanted = base.layout.reachable if layouts is None else tuple(Layout(*layout) for layout in layouts)
    unreachable = [tuple(layout) for layout in wanted if not base.layout.reaches(layout)]
    if unreachable:
        raise ValueError(
            f"`layouts` must be reachable from the stored {tuple(base.layout)}, got {unreachable[0]}; "
            f"reachable are {layout_names(base.layout.reachable)}"
        )
    flat = dist.get_process_group_ranks(base.flat)
    made = {tuple(dist.get_process_group_ranks(group)): group for group in (base.tp, base.sp, base.flat)}
    found = {}
    for layout in wanted:
        grid = torch.tensor(flat).view(layout.tp, layout.sp)
        tp_rank, sp_rank = divmod(base.flat.rank(), layout.sp)
        tp, sp = (
            _local_group(f"{axis} of {layout.tp}x{layout.sp}", tuple(ranks.tolist()), base.flat, made)
            for axis, ranks in (("tp", grid[:, sp_rank]), ("sp", grid[tp_rank]))
        )
        found[layout] = Groups(layout, tp, sp, base.flat)
    return found


def split_groups(group: ProcessGroup, inner: int) -> SplitGroups:
    """The rows of `inner` neighbours in a group, and the columns across them: two smaller groups for each rank.

    Every rank of `group` calls it with the same arguments, once for all layers that use the split; others need not. The
    groups have its timeout, and reduce as it does. One that would have all of its ranks is `group` itself.

    Args:
        group: what to split. Neighbours in it are those with the faster links, by the order of a mesh.
        inner: ranks of a row.

    Raises:
        ValueError: rows that do not divide the group; no group has been made then.
    """
    size = group.size()
    if inner < 1 or size % inner:
        raise ValueError(f"`inner` must be at least 1 and divide the {size} ranks of {describe(group)}, got {inner}")
    ranks = dist.get_process_group_ranks(group)
    made = {tuple(ranks): group}
    first, column = group.rank() // inner * inner, group.rank() % inner
    row, across = (
        _local_group(f"{name} of {inner} in {group.group_desc}", tuple(of), group, made)
        for name, of in (("row", ranks[first : first + inner]), ("column", ranks[column::inner]))
    )
    return SplitGroups(group, row, across)


def _local_group(
    name: str, ranks: tuple[int, ...], flat: ProcessGroup, made: dict[tuple[int, ...], ProcessGroup]
) -> ProcessGroup:
    """A group of these ranks, made by them alone unless `made` has one."""
    if ranks not in made:
        timeout: timedelta = flat._get_backend(flat._device_types[0]).options._timeout
        group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=name)
        if is_deterministic(flat):
            group._set_group_desc(group.group_desc + _DETERMINISTIC)
        made[ranks] = group
    return made[ranks]


def describe(group: ProcessGroup) -> str:
    """A group for people: its description and its global ranks."""
    ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
    return f"group `{group.group_desc}` (ranks {ranks})"


def is_deterministic(group: ProcessGroup) -> bool:
    """Whether reductions over `group` are float32 sums in rank order, rounded once."""
    return group.group_desc.endswith(_DETERMINISTIC)


def _mark(made: Groups, deterministic: bool) -> None:
    """Set what `is_deterministic` reads: the description is all that a process group can carry.

    A mark stays: another mesh that shares the group may rely on it.
    """
    named = {name: group for name, group in made._asdict().items() if name != "layout"}
    marked = [name for name, group in named.items() if is_deterministic(group)]
    if marked and not deterministic:
        raise ValueError(
            f"`deterministic` must be True or left out for groups that are deterministic already "
            f"({', '.join(marked)}), got False; give this mesh groups of its own"
        )
    for group in named.values():
        if deterministic and not is_deterministic(group):  # two axes may have one group
            group._set_group_desc(group.group_desc + _DETERMINISTIC)


def _make_mesh(layout: Layout, pp: int | None, device: str | None, timeout_s: float) -> DeviceMesh:
    layout.check()
    if pp is not None and pp < 1:
        raise ValueError(f"`pp` must be at least 1, got {pp}; leave it out for no pipeline")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f'`device` must be "cpu" or "cuda", got "{device}"')
    if not 0 < timeout_s <= _MOST_S:
        raise ValueError(f"`timeout_s` must be positive and at most {_MOST_S:g}, got {timeout_s}")
    timeout = timedelta(seconds=timeout_s)
    _start(device, timeout)
    grids = _replicas(layout, pp)
    rank = dist.get_rank()
    made: dict[tuple[int, ...], object] = {}

    def own(name: str, rows: torch.Tensor) -> ProcessGroup:
        return _own_group(name, rows.reshape(-1, rows.shape[-1]).tolist(), rank, timeout, made)

    axes = [own("tp", grids.transpose(2, 3)), own("sp", grids)]
    flat = {FLAT: own("flat", grids.flatten(2))}
    replica, stage = divmod(rank // layout.size, pp or 1)
    grid, names = grids[replica, stage], AXES
    if pp is not None:
        axes.insert(0, own("pp", grids.movedim(1, -1)))
        flat[WHOLE] = own("whole", grids.flatten(1))
        grid, names = grids[replica], STAGED
    mesh = DeviceMesh.from_group(axes, device, mesh=grid, mesh_dim_names=names)
    for name, group in flat.items():
        # `_flatten` would make a group with the default timeout, or take the world's; it finds this one instead.
        ranks = torch.tensor(dist.get_process_group_ranks(group))
        mesh._flatten_mapping[name] = DeviceMesh.from_group(group, device, mesh=ranks, mesh_dim_names=(name,))
    return mesh


def _replicas(layout: Layout, pp: int | None) -> torch.Tensor:
    """The ranks of the world, [replica, pp, tp, sp]."""
    world, size = dist.get_world_size(), layout.size * (pp or 1)
    if world % size:
        terms, sizes = "`tp` * `sp`", f"{layout.tp} * {layout.sp}"
        if pp is not None:
            terms, sizes = f"`pp` * {terms}", f"{pp} * {sizes}"
        raise ValueError(
            f"{terms} must divide the number of ranks ({world}), got {sizes} = {size}; "
            f"start {size} ranks, such as with `torchrun --nproc-per-node {size}`"
        )
    return torch.arange(world).view(-1, pp or 1, layout.tp, layout.sp)


def _own_group(
    name: str, rows: Sequence[Sequence[int]], rank: int, timeout: timedelta, made: dict[tuple[int, ...], object]
) -> ProcessGroup:
    """Make one group for each row of ranks, unless an earlier axis has made it; the one of this rank."""
    mine: object = None
    for ranks in map(tuple, rows):
        if ranks not in made:  # every rank of the world makes every group, also those that it is not in
            made[ranks] = dist.new_group(list(ranks), timeout=timeout, group_desc=name)
        if rank in ranks:
            mine = made[ranks]
    assert isinstance(mine, ProcessGroup)
    return mine


def _start(device: str, timeout: timedelta) -> None:
    """Start the default process group, unless the caller has.

    The environment is read here alone: it is how torchrun tells a process which rank and which device it has.
    """
    if dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # torchrun keeps one store through its restarts, in which the addresses of processes that ended are still found.
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
