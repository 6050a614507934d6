"""The check of launches: every difference is the same named error on every rank, and what agrees runs as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _get_default_store

from seqpar import comm
from seqpar.comm import Mark, ProcessGroup
from seqpar.hf import parallelize
from seqpar.partition import Interleave, ThreePhase, even_ranges
from tests.hf.tiny import tiny_model
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.ranks import run_mesh, thinned

X = torch.arange(12.0).view(4, 3)
Body = Callable[[ProcessGroup, int], object]


def other_op(group: ProcessGroup, rank: int) -> None:
    (comm.all_gather if rank == 1 else comm.all_reduce)(X, group=group, label="layers.3.mlp")


def other_label(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X, group=group, label=f"layers.{rank == 1:d}.mlp")


def other_shape(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X.t() if rank == 1 else X, group=group, label="mlp")


def other_dtype(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X.double() if rank == 1 else X, group=group, label="mlp")


def other_source(group: ProcessGroup, rank: int) -> None:
    comm.broadcast(X, src=int(rank == 1), group=group, label="mlp")


def other_sizes(group: ProcessGroup, rank: int) -> None:
    p = group.size()
    wrong = [5 if rank == 1 and r == 0 else 4 for r in range(p)]
    comm.all_gather(X, group=group, sizes=wrong, label="rows")


def other_order(group: ProcessGroup, rank: int) -> None:
    """The last step of a schedule: programs take turns in another order on rank 1."""

    def program(name: str) -> comm.Steps[None]:
        for step in range(2):
            yield from comm.all_reduce_steps(X, group=group, label=f"{name}{step}")

    comm.interleave([program(name) for name in ("ba" if rank == 1 else "ab")])


def other_yields(group: ProcessGroup, rank: int) -> None:
    """A program that launches once more on rank 1, between two launches of the others."""

    def program(name: str, times: int) -> comm.Steps[None]:
        for step in range(times):
            yield Mark(step)
            yield from comm.all_reduce_steps(X, group=group, label=f"{name}{step}")

    comm.interleave([program("a", 2), program("b", 2 if rank == 1 else 1), program("c", 2)])


def other_peer(group: ProcessGroup, rank: int) -> None:
    """Rank 1 sends fewer rows around the ring than the next one awaits."""
    p = group.size()
    rows = X[:2] if rank == 1 else X
    comm.send_recv(rows, dst=(rank + 1) % p, src=(rank - 1) % p, recv_shape=X.shape, group=group, label="ring")


def ends_early(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X, group=group, label="first")
    if rank != 1:
        comm.all_reduce(X, group=group, label="second")


def never_starts(group: ProcessGroup, rank: int) -> None:
    if rank != 1:
        comm.all_reduce(X, group=group, label="mlp")


def raises(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X, group=group, label="first")
    if rank == 1:
        raise RuntimeError("out of luck")
    comm.all_reduce(X, group=group, label="second")


def comes_late(group: ProcessGroup, rank: int) -> None:
    comm.all_reduce(X, group=group, label="first")
    if rank == 1:
        time.sleep(1.2)
    comm.all_reduce(X, group=group, label="second")


RULE = "; ranks must launch the same collectives in the same order"
SUM = "launched `all_reduce` of `mlp` [4, 3] float32"
DIFFERENCES: dict[Body, str] = {
    other_op: "rank 1 launched `all_gather` of `layers.3.mlp` [4, 3] float32 at step 1 of {group}, where rank 0 "
    "launched `all_reduce` of `layers.3.mlp` [4, 3] float32" + RULE,
    other_label: "rank 1 launched `all_reduce` of `layers.1.mlp` [4, 3] float32 at step 1 of {group}, where rank 0 "
    "launched `all_reduce` of `layers.0.mlp` [4, 3] float32" + RULE,
    other_shape: "rank 1 launched `all_reduce` of `mlp` [3, 4] float32 at step 1 of {group}, where rank 0 "
    + SUM
    + RULE,
    other_dtype: "rank 1 launched `all_reduce` of `mlp` [4, 3] float64 at step 1 of {group}, where rank 0 "
    + SUM
    + RULE,
    other_source: "rank 1 launched `broadcast` of `mlp` from rank 1 [4, 3] float32 at step 1 of {group}, where rank 0 "
    "launched `broadcast` of `mlp` from rank 0 [4, 3] float32" + RULE,
    other_sizes: "rank 1 launched `all_gather` of `rows` [4, 3] float32 at step 1 of {group} and awaits 15 elements of "
    "rank 0, which sends 12",
    other_order: "rank 1 launched `all_reduce` of `b0` [4, 3] float32 at step 1 of {group}, where rank 0 "
    "launched `all_reduce` of `a0` [4, 3] float32" + RULE,
    other_yields: "rank 1 launched `all_reduce` of `b1` [4, 3] float32 at step 5 of {group}, where rank 0 "
    "launched `all_reduce` of `c1` [4, 3] float32" + RULE,
    other_peer: "rank {most} launched `send_recv` of `ring` {shape} float32 at step 1 of {group} and {size}",
    ends_early: "rank 1 left `comm.check()` before step 2 of {group}, where rank {some} launched `all_reduce` of "
    "`second` [4, 3] float32; rank 1 last launched `all_reduce` of `first` [4, 3] float32 at step 1 of {group}",
    never_starts: "rank 1 left `comm.check()` before step 1 of {group}, where rank {some} " + SUM + "; rank 1 launched "
    "nothing",
    raises: "rank 1 of the world left `comm.check()` by RuntimeError: out of luck; it last launched `all_reduce` of "
    "`first` [4, 3] float32 at step 1 of {group}",
    comes_late: "rank 1 did not come within 0.5 s to step 2 of {group}, where rank {some} launched `all_reduce` of "
    "`second` [4, 3] float32; rank 1 last launched `all_reduce` of `first` [4, 3] float32 at step 1 of {group}",
}


def differ(mesh: comm.DeviceMesh, body: Body) -> str:
    """The error on this rank; afterwards the group works, with the check and without."""
    group = comm.groups(mesh).tp
    timeout_s = 0.5 if body is comes_late else 20.0
    with own_errors(), pytest.raises((ValueError, RuntimeError)) as raised, comm.check(timeout_s=timeout_s):
        body(group, group.rank())
    with comm.check():
        total = comm.all_reduce(X, group=group)
    assert torch.equal(total, X * group.size()) and torch.equal(comm.all_reduce(X, group=group), total)
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("body", DIFFERENCES, ids=lambda body: body.__name__)
def test_a_difference_is_the_same_error_on_every_rank(body: Body, p: int) -> None:
    errors = run_mesh((p, 1), differ, body)
    ring = {"most": 2, "shape": [4, 3], "size": "awaits 12 elements of rank 1, which sends 6"}
    if p == 2:
        ring = {"most": 1, "shape": [2, 3], "size": "sends 6 elements to rank 0, which awaits 12"}
    group = f"group `tp` (ranks {', '.join(map(str, range(p)))})"
    expected = {"ValueError: " + DIFFERENCES[body].format(group=group, some=some, **ring) for some in range(p)}
    if body is raises:
        assert errors.pop(1) == "RuntimeError: out of luck"
    assert len(set(errors)) == 1, errors
    assert errors[0] in expected


def another_group(mesh: comm.DeviceMesh) -> str:
    groups, rank = comm.groups(mesh), comm.groups(mesh).flat.rank()
    with own_errors(), pytest.raises(ValueError, match="group `sp`") as raised, comm.check(timeout_s=20.0):
        comm.all_reduce(X, group=groups.sp if rank == 2 else groups.tp, label="mlp")
    return str(raised.value)


def test_a_collective_of_another_group_fails_all_groups() -> None:
    """Rank 2 awaits rank 3 where rank 0 awaits it; ranks 1 and 3 are alike, and would end well."""
    assert set(run_mesh((2, 2), another_group)) == {
        "rank 1 left `comm.check()` before step 1 of group `sp` (ranks 2, 3), where rank 0 launched `all_reduce` of "
        "`mlp` [4, 3] float32; rank 1 last launched `all_reduce` of `mlp` [4, 3] float32 at step 1 of group `tp` "
        "(ranks 1, 3)"
    }


def everything(group: ProcessGroup) -> list[torch.Tensor]:
    """All collectives, with what ranks may have that others have not: rows, sources, partners; and their gradients."""
    rank, p = group.rank(), group.size()
    rows = list(range(p))  # rank 0 has none
    x = torch.randn(6, 2 * p, dtype=torch.float64, requires_grad=True)
    partner = {0: p - 1, p - 1: 0}.get(rank, rank)
    out = [
        comm.all_reduce(x, group=group, label="sum"),
        comm.all_reduce(torch.randn(1 << 18), group=group),  # by the backend for three ranks
        comm.all_gather(x[: rows[rank]], group=group, sizes=rows),
        comm.reduce_scatter(x, group=group, dim=1),
        comm.all_to_all(x[: sum(rows)], group=group, send_sizes=rows, recv_sizes=[rank] * p),
        comm.broadcast(x, src=p - 1, group=group),
        comm.send_recv(x, dst=(rank + 1) % p, src=(rank - 1) % p, group=group),
        comm.send_recv(x, dst=partner, src=partner, group=group, label=f"stage {rank}"),
        comm.seq_to_heads(
            x[: rows[rank]], columns=[(heads,) for heads in even_ranges(2 * p, p)], tokens=rows, group=group
        ),
    ]
    torch.stack([part.double().sum() for part in out]).sum().backward()
    assert x.grad is not None
    comm.agree(None, group=group)
    return [part.detach() for part in (*out, x.grad)]


def checked(mesh: comm.DeviceMesh) -> None:
    group = comm.groups(mesh).tp
    expected = everything(group)
    torch.manual_seed(0)  # as before each function here
    with comm.check():
        out = everything(group)
    assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_what_agrees_runs_as_without(p: int) -> None:
    run_mesh((p, 1), checked)


def generated(mesh: comm.DeviceMesh, options: dict[str, Any]) -> None:
    """Hugging Face's generate over interleaved stacks: the same logits, bit for bit."""
    ids = torch.arange(24).view(2, 12)
    model = tiny_model("llama", dtype=torch.float32)
    with parallelize(model, mesh, overlap=Interleave(3, min_tokens=4), **options):
        sampling = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        expected = model.generate(ids, **sampling)
        with comm.check():
            out = model.generate(ids, **sampling)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(map(torch.equal, out.logits, expected.logits))


@pytest.mark.parametrize(
    "layout", thinned([(1, 1), (2, 1), (1, 2), (2, 2)], ((1, 2), (2, 2)).__contains__), ids=name_of
)
def test_generation_runs_as_without(layout: tuple[int, int]) -> None:
    run_mesh(layout, generated, {})
    run_mesh(layout, generated, {"wire": "int8", "pipeline": ThreePhase(2, 2), "sequence_sharded": layout[0] > 1})


def keys(mesh: comm.DeviceMesh) -> None:
    """The same keys, however many steps."""
    group, counts = comm.groups(mesh).tp, []
    with comm.check():
        for _ in range(2):
            for _ in range(5):
                comm.all_reduce(X, group=group)
            comm.agree(None, group=group)  # nobody is behind,
            counts.append(_get_default_store().num_keys())
            comm.agree(None, group=group)  # and nobody ahead
    assert counts[0] == counts[1]


def test_steps_leave_no_keys() -> None:
    run_mesh((3, 1), keys)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`timeout_s` must be > 0, got 0\.0"), comm.check(timeout_s=0.0):
        pass
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with (
        pytest.raises(ValueError, match=r"`check` must be entered after the ranks have met.*call `init_mesh`"),
        comm.check(),
    ):
        pass
