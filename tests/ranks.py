"""Run functions on several ranks: a persistent pool of gloo processes for each world size.

`run_ranks(p, fn, *args)` calls `fn(rank, p, *args)` on p ranks, and `run_mesh((tp, sp), fn, *args)`, or of
(pp, tp, sp), calls `fn(mesh, *args)`, with the mesh cached in the worker. Both return the ranks' results as a list in
rank order. `fn` is a module-level function; arguments and results travel by pickle (a tensor is copied).

    def body(mesh, n):
        x = torch.arange(n, dtype=torch.float64)
        torch.testing.assert_close(comm.all_reduce(x, group=comm.groups(mesh).tp), 2 * x)

    def test_sum():
        run_mesh((2, 1), body, 5)

A rank starts by fork from a server that has imported `tests.preload` once: about 0.1 s for a pool, and a few
milliseconds for a call on a running one. Where a rank raises, dies or hangs, the error names it, shows every rank's
traceback, and the pool is replaced. `isolated=True` takes a pool of its own, for tests that break things.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from math import prod
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

__all__ = ["LAYOUTS", "SMALL", "RankError", "poison", "run_mesh", "run_ranks", "stop_pools", "thinned"]

LAYOUTS = tuple((tp, sp) for tp in (1, 2, 3, 4) for sp in (1, 2, 3, 4) if tp * sp <= 4)
"""Every tp x sp of up to four ranks."""

SMALL = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Those that every test of layouts should run."""

GRACE_S = 2.0
"""How long the other ranks may take to report after a first one failed."""


class RankError(AssertionError):
    """Ranks failed; `failures` maps each of them to its traceback or its way of dying."""

    def __init__(self, what: str, failures: dict[int, str]) -> None:
        self.failures = failures
        reports = [f"--- rank {rank} ---\n{report.rstrip()}" for rank, report in failures.items()]
        super().__init__("\n".join([f"{what}: rank {', '.join(map(str, failures))} failed", *reports]))


def thinned(values: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test, those that `keep` does not hold for in the slow suite only."""
    return [pytest.param(value, marks=() if keep(value) else pytest.mark.slow) for value in values]


def run_ranks(
    p: int,
    fn: Callable[..., Any],
    *args: Any,
    isolated: bool = False,
    timeout_s: float = 60.0,
    group_timeout_s: float = 30.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call `fn(rank, p, *args)` on p ranks; the results in rank order.

    Args:
        p: number of ranks.
        fn: a module-level function.
        args: what every rank gets.
        isolated: use a new pool, and end it.
        timeout_s: after this a rank that has not reported hangs.
        group_timeout_s: timeout of the default process group of an isolated pool.
        may_die: ranks whose death is no failure; their result is None.

    Raises:
        RankError: a rank raised, died or hung.
    """
    if not isolated:
        return _pool(p).run(fn, args, timeout_s, may_die)
    pool = _Pool(p, group_timeout_s, isolated=True)
    try:
        return pool.run(fn, args, timeout_s, may_die)
    finally:
        pool.stop()


def run_mesh(
    layout: tuple[int, ...], fn: Callable[..., Any], *args: Any, deterministic: bool = False, **options: Any
) -> list[Any]:
    """Call `fn(mesh, *args)` on the ranks of `layout`, (tp, sp) or (pp, tp, sp); options as `run_ranks`."""
    return run_ranks(prod(layout), _on_mesh, fn, (tuple(layout), deterministic), args, **options)


def stop_pools() -> None:
    """End all pools."""
    for pool in list(_POOLS.values()):
        pool.stop()
    _POOLS.clear()


def poison() -> None:
    """Make torch fill `empty` with NaN, so that what is never written is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


class _Pool:
    """p workers, each with one pipe to here."""

    def __init__(self, p: int, group_timeout_s: float, isolated: bool) -> None:
        self.p = p
        self.stopped = False
        self.folder = tempfile.TemporaryDirectory(prefix="seqpar-ranks-")
        self.workers: list[Any] = []
        self.pipes: list[Connection] = []
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        for rank in range(p):
            ours, theirs = context.Pipe()
            args = (rank, p, self.folder.name, theirs, group_timeout_s, list(sys.path), isolated)
            worker = context.Process(target=_work, args=args, daemon=True)  # type: ignore[attr-defined]
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(ours)

    def run(self, fn: Callable[..., Any], args: Sequence[Any], timeout_s: float, may_die: Collection[int]) -> list[Any]:
        job = pickle.dumps((fn, args))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        results: list[Any] = [None] * self.p
        failures: dict[int, str] = {}
        waiting = set(range(self.p))
        deadline = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            wait([self.pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
            for rank in [rank for rank in waiting if self.pipes[rank].poll()]:
                waiting.remove(rank)
                ok, value = self._report(rank)
                if ok:
                    results[rank] = value
                elif value is not None or rank not in may_die:
                    failures[rank] = value or self._death(rank)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in sorted(waiting):
            why = "while another rank had failed" if failures else f"for {timeout_s:g} s"
            failures[rank] = f"hung {why} in\n{self._stack(rank)}"
        if failures:
            self.stop()
            raise RankError(f"{fn.__module__}.{fn.__qualname__} on {self.p} ranks", failures)
        return results

    def stop(self) -> None:
        if self.stopped:
            return
        self.stopped = True
        for worker in self.workers:
            worker.kill()
        for worker, pipe in zip(self.workers, self.pipes, strict=True):
            worker.join()
            pipe.close()
        self.folder.cleanup()

    def _report(self, rank: int) -> tuple[bool, Any]:
        """What a rank says: (True, result), (False, traceback), or (False, None) when it is dead."""
        try:
            report: tuple[bool, Any] = pickle.loads(self.pipes[rank].recv_bytes())
            return report
        except (EOFError, OSError):
            return False, None

    def _death(self, rank: int) -> str:
        self.workers[rank].join(GRACE_S)
        code = self.workers[rank].exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"died ({how})\n{_crash_file(self.folder.name, rank).read_text()}"

    def _stack(self, rank: int) -> str:
        """Where a rank that hangs is, all threads."""
        path = _crash_file(self.folder.name, rank)
        os.kill(self.workers[rank].pid, signal.SIGUSR1)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and not path.read_text().rstrip():
            time.sleep(0.02)
        time.sleep(0.02)
        return path.read_text()


_POOLS: dict[int, _Pool] = {}


def _pool(p: int) -> _Pool:
    if p not in _POOLS or _POOLS[p].stopped:
        _POOLS[p] = _Pool(p, group_timeout_s=30.0, isolated=False)
    return _POOLS[p]


def _crash_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"crash-{rank}"


def _work(
    rank: int, p: int, folder: str, pipe: Connection, group_timeout_s: float, path: list[str], isolated: bool
) -> None:
    """A worker: start the process group, then run what comes through the pipe, for ever."""
    crash = _crash_file(folder, rank).open("w")
    faulthandler.enable(crash)
    faulthandler.register(signal.SIGUSR1, crash)
    sys.path[:] = path
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    poison()
    if not isolated:
        _share_gloo_device()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/rendezvous", p),
        rank=rank,
        world_size=p,
        timeout=timedelta(seconds=group_timeout_s),
    )
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        pipe.send_bytes(_report_of(job, rank, p))


def _share_gloo_device() -> None:
    """Let all groups of this process have one gloo device.

    A device has a thread that wakes up a hundred times a second, and each group makes one of its own. Workers live as
    long as the suite and keep the groups of every mesh: their threads took three quarters of two cores.
    """
    from datetime import timedelta

    from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

    device = ProcessGroupGloo.create_default_device()

    class Shared(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta, **newer: object) -> None:
            # What later releases of PyTorch add (2.15: `enable_reconfigure`) is off by default.
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Shared  # type: ignore[misc]


def _report_of(job: bytes, rank: int, p: int) -> bytes:
    import torch

    try:
        fn, args = pickle.loads(job)
        torch.manual_seed(0)
        random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation", UserWarning)
            return pickle.dumps((True, fn(rank, p, *args)))
    except BaseException as error:
        return pickle.dumps((False, _traceback(error)))


def _traceback(error: BaseException) -> str:
    """The traceback without the frames of the annotation checker."""
    report = link = traceback.TracebackException.from_exception(error)
    while link is not None:
        link.stack = traceback.StackSummary.from_list(
            [
                frame
                for frame in link.stack
                if not any(name in frame.filename for name in ("jaxtyping", "beartype", "typed.py"))
            ]
        )
        link = link.__cause__ or link.__context__
    return "".join(report.format())


_MESHES: dict[tuple[tuple[int, ...], bool], Any] = {}


def _on_mesh(rank: int, p: int, fn: Callable[..., Any], key: tuple[tuple[int, ...], bool], args: Sequence[Any]) -> Any:
    from seqpar.comm import init_mesh

    if key not in _MESHES:
        (*pp, tp, sp), deterministic = key
        _MESHES[key] = init_mesh(tp, sp, "cpu", pp=pp[0] if pp else None, deterministic=deterministic)
    return fn(_MESHES[key], *args)
