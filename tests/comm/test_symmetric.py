"""The sum with residual and norm: by collectives, and by kernels of several processes on memory that they share.

Triton's interpreter runs the kernels; files mapped by all ranks stand in for symmetric memory.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import DeviceMesh, ProcessGroup, symmetric
from seqpar.kernels import add_rms_norm
from seqpar.kernels.all_reduce_norm import ArenaPlan, reference
from seqpar.partition import even_ranges
from tests.kernels.interpreter import interpreted
from tests.ranks import run_mesh, thinned

EPS, WIDTH = 1e-5, 24


@contextmanager
def mapped_files(folder: str) -> Iterator[None]:
    """Symmetric memory on a CPU: a file of each rank, which all of them map."""

    def allocate(plan: ArenaPlan, group: ProcessGroup, device: torch.device) -> tuple[Tensor, list[int], int]:
        assert device.type == "cpu"
        files = [Path(folder) / f"arena-{rank}" for rank in range(group.size())]
        files[group.rank()].write_bytes(bytes(plan.staged) + b"\xff" * (plan.num_bytes - plan.staged))
        comm.agree(None, group=group)
        arenas = [torch.from_file(str(file), shared=True, size=plan.num_bytes, dtype=torch.uint8) for file in files]
        KEPT.extend(arenas)
        return arenas[group.rank()], [arena.data_ptr() for arena in arenas], 0

    with patch.object(symmetric, "_allocate", allocate), patch.object(symmetric, "_DEVICES", {"cpu"}), interpreted():
        yield


KEPT: list[Tensor] = []
"""Mapped for as long as the process lives, since others write there."""


def inputs(p: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Partials of all ranks, the residual, the weight: the same on every rank."""
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(p + 1, tokens, WIDTH, generator=draw).to(dtype)
    return x[:p], x[p], torch.randn(WIDTH, generator=draw).to(dtype)


def check(found: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, weight: Tensor, rows: slice) -> None:
    normed, total = reference.all_reduce_norm(list(x), residual, weight, EPS)
    assert torch.equal(found[1], total[rows])
    torch.testing.assert_close(found[0], normed, rtol=2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-22, atol=1e-6)


def by_collectives(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    group = comm.groups(mesh).tp
    p, rank = group.size(), group.rank()
    for tokens in (5, 1):
        x, residual, weight = inputs(p, tokens, dtype)
        with comm.record() as counts:
            found = comm.all_reduce_norm(x[rank], residual, weight, EPS, group=group, label="l")
        again = add_rms_norm(residual, comm.all_reduce(x[rank], group=group), weight, EPS)
        assert all(map(torch.equal, found, again))
        check(found, x, residual, weight, slice(None))
        assert set(counts.counts) == ({("all_reduce", "l")} if p > 1 else set())
        rows = slice(*even_ranges(tokens, p)[rank])
        check(
            comm.all_reduce_norm(x[rank], residual[rows], weight, EPS, group=group, sharded=True),
            x,
            residual,
            weight,
            rows,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_by_collectives(p: int, dtype: torch.dtype) -> None:
    run_mesh((p, 1), by_collectives, dtype, deterministic=True)


def gradients(mesh: DeviceMesh, sharded: bool) -> None:
    """Those of one process which sums itself; every rank's loss is the same one, or its own share of it."""
    group = comm.groups(mesh).tp
    p, rank = group.size(), group.rank()
    x, residual, weight = (tensor.double() for tensor in inputs(p, 5, torch.float32))
    rows = slice(*even_ranges(5, p)[rank]) if sharded else slice(None)
    leaves = [tensor.clone().requires_grad_() for tensor in (x[rank], residual[rows], weight)]
    factors = torch.arange(2 * 5 * WIDTH, dtype=torch.float64).view(2, 5, WIDTH) / 100
    normed, total = comm.all_reduce_norm(*leaves, EPS, group=group, sharded=sharded)
    ((normed * factors[0]).sum() / (p if sharded else 1) + (total * factors[1][rows]).sum()).backward()
    whole = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    out, kept = add_rms_norm(whole[1], whole[0].sum(0), whole[2], EPS)
    ((out * factors[0]).sum() + (kept * factors[1]).sum()).backward()
    assert all(leaf.grad is not None for leaf in (*leaves, *whole))
    torch.testing.assert_close(leaves[0].grad, whole[0].grad[rank])  # type: ignore[index]
    torch.testing.assert_close(leaves[1].grad, whole[1].grad[rows])  # type: ignore[index]
    of_weight = comm.all_reduce(leaves[2].grad, group=group) if sharded else leaves[2].grad  # type: ignore[arg-type]
    torch.testing.assert_close(of_weight, whole[2].grad)


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_by_collectives(sharded: bool) -> None:
    run_mesh((2, 1), gradients, sharded)


def by_kernels(mesh: DeviceMesh, folder: str, calls: int, delay_s: float) -> dict[Any, Any]:
    """Calls of all kinds and sizes one after another, each rank late now and then; what was counted."""
    group = comm.groups(mesh).tp
    p, rank = group.size(), group.rank()
    draw, late = random.Random(0), random.Random(rank)
    with mapped_files(folder), comm.record() as counts, torch.no_grad():
        memory = comm.SymmetricMemory(5 * WIDTH * 4, group=group, device="cpu", blocks=2)
        for _ in range(calls):
            tokens, sharded, dtype = draw.randint(0, 5), draw.random() < 0.4, draw.choice(DTYPES)
            x, residual, weight = inputs(p, tokens, dtype)
            rows = slice(*even_ranges(tokens, p)[rank]) if sharded else slice(None)
            time.sleep(delay_s * late.random() * (late.random() < 0.3))
            two_shot = patch.object(symmetric, "all_reduce_algorithm", lambda *_: "two_shot")
            with two_shot if draw.random() < 0.5 else nullcontext():
                steps = comm.all_reduce_norm_steps(
                    x[rank], residual[rows], weight, EPS, group=group, memory=memory, sharded=sharded, label="l"
                )
                found = comm.run(steps)
            check(found, x, residual, weight, rows)
    return dict(counts.counts)


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("p", thinned([2, 3, 1], lambda p: p == 2))
def test_by_kernels(p: int, tmp_path: Path) -> None:
    run_mesh((p, 1), by_kernels, str(tmp_path), 4, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("p", [2, 3])
def test_by_kernels_for_long(p: int, tmp_path: Path) -> None:
    run_mesh((p, 1), by_kernels, str(tmp_path), 150, 0.02, timeout_s=600.0)


def soaked(mesh: DeviceMesh, folder: str) -> None:
    """The GPU script's soak, and that it would speak."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import fused_cuda

    with mapped_files(folder), torch.no_grad():
        memory = comm.SymmetricMemory(4 * WIDTH * 4, group=comm.groups(mesh).tp, device="cpu", blocks=2)
        assert fused_cuda.soak(memory, WIDTH, 4, 20, 0.01) == 20
        with (
            patch.object(fused_cuda, "EPS", 0.5),
            patch.object(memory, "launch", partial(wrong, memory)),
            pytest.raises(fused_cuda.WrongResultError, match=r"call 0, .*: error"),
        ):
            fused_cuda.soak(memory, WIDTH, 4, 1, 0.0)


def wrong(memory: comm.SymmetricMemory, x: Tensor, residual: Tensor, weight: Tensor, eps: float, **options: Any) -> Any:
    return comm.SymmetricMemory.launch(memory, x, residual, weight, EPS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("p", [2, 3])
def test_the_soak_of_the_gpu_script(p: int, tmp_path: Path) -> None:
    run_mesh((p, 1), soaked, str(tmp_path))


def launches(mesh: DeviceMesh, folder: str) -> None:
    """A sum in steps is one launch that a check and a trace see, with its bytes."""
    group = comm.groups(mesh).tp
    x, residual, weight = inputs(2, 4, torch.float32)
    with mapped_files(folder):
        memory = comm.SymmetricMemory(1000, group=group, device="cpu", blocks=1)
        assert "SymmetricMemory(1000 bytes, blocks=1, group" in repr(memory)
        options: dict[str, Any] = {"group": group, "memory": memory, "label": "l"}
        with comm.check(), comm.trace() as trace, comm.record() as counts:
            steps = comm.all_reduce_norm_steps(x[group.rank()], residual, weight, EPS, **options)
            handle = next(steps)
            assert isinstance(handle, comm.Handle) and (handle.op, handle.label) == ("all_reduce_norm", "l")
            with pytest.raises(StopIteration) as stop:
                steps.send(handle.wait())
        check(stop.value.value, x, residual, weight, slice(None))
        assert counts.counts == {("all_reduce_norm", "l"): (1, x[0].nbytes, x[0].nbytes)}
        assert [one.num_bytes for one in trace.intervals if one.kind == "comm"] == [x[0].nbytes]
        other = comm.groups(mesh).flat if comm.groups(mesh).flat is not group else comm.groups(mesh).sp
        for change, message in (
            ({"group": other}, "`memory` must be of group `"),
            ({"wire": "int8"}, "`wire` must be None with `memory`, which is read as it is, got 'int8'"),
        ):
            with pytest.raises(ValueError) as error:
                comm.all_reduce_norm(x[0], residual, weight, EPS, **{**options, **change})
            assert str(error.value).startswith(message)
        with pytest.raises(ValueError, match="must need no gradient with `memory`"):
            comm.all_reduce_norm(x[0].clone().requires_grad_(), residual, weight, EPS, **options)
        for arguments, message in (
            ({"blocks": 0}, "`blocks` must be at least 1, got 0"),
            ({"capacity": 100 + group.rank()}, "`blocks`, `capacity` and `multimem` must be the same on all ranks"),
            ({"multimem": True}, "`multimem` must be left out where no switch reaches all GPUs, got True for group"),
        ):
            with pytest.raises(ValueError) as error:
                comm.SymmetricMemory(**{"capacity": 100, "group": group, "device": "cpu", **arguments})  # type: ignore[arg-type]
            assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match=r'`device` must be a CUDA device, got "cpu"; without `memory=` collectives'):
        comm.SymmetricMemory(100, group=group, device="cpu")


def test_a_launch_is_seen_and_refused_alike(tmp_path: Path) -> None:
    run_mesh((2, 1), launches, str(tmp_path))
