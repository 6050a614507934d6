"""Faults at every stage of a step of the loop, and what is left of it.

Survivors say what failed and where, their requests and caches agree, and a new group finishes every request from the
journal, with the tokens that it would have had.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.batching import Budget, Journal, Request, Sampling, StallFree, TemporalFusion
from seqpar.hf import Stepper, parallelize
from tests.batching.test_fusion import check
from tests.faults import bombs
from tests.hf.tiny import tiny_model
from tests.ranks import run_mesh, run_ranks, thinned

TIMEOUT_S = 2.0
STEP = 4
"""The step in which the fault is: some requests decode, one is in its prompt, one waits, one has ended."""

Layout = tuple[int, int]
LAYOUTS: tuple[Layout, ...] = ((1, 2), (2, 1))
FAULTS = ("dies", "stops", "runs out of memory", "runs out of pages")
STAGES = ("orders", "first layer", "last layer", "logits")


def requests() -> list[Request]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for number, (prompt, new) in enumerate([(5, 2), (3, 9), (8, 7), (13, 6), (4, 5)]):
        ids = torch.randint(1, 67, (prompt,), generator=draw).tolist()
        made.append(Request(number, ids, new, Sampling(0.7, seed=number) if number % 2 else Sampling()))
    return made


def loop_over(mesh: comm.DeviceMesh, model: Any) -> TemporalFusion:
    parallelize(model, mesh)
    stepper = Stepper(model, num_pages=12, page_size=4)
    how: dict[str, Any] = {"policy": StallFree(8), "budget": Budget(8, 4, "known"), "lead": comm.groups(mesh).flat}
    return TemporalFusion(stepper, stepper.kv, vocab_size=stepper.vocab_size, **how)


def steps(loop: TemporalFusion, folder: Path, rank: int) -> Iterator[None]:
    """Serve what is left of all requests; the others follow."""
    if rank:
        while True:
            loop.step()
            yield
    with Journal(folder / "journal") as journal:
        for request in requests():
            if (rest := journal.rest(request)) is not None:
                loop.add(rest)
        while loop.live:
            journal.add(loop.step())
            yield


def fault_of(how: str, loop: TemporalFusion) -> bombs.Fault:
    pages = {"thief": loop.kv.free_pages * loop.kv.page_size}
    reserve = partial(loop.kv.reserve, pages)
    faults = {"dies": bombs.die, "stops": bombs.stop, "runs out of memory": bombs.run_out, "runs out of pages": reserve}
    return faults[how]


def fail(rank: int, p: int, layout: Layout, how: str, at: int | None, victim: int, folder: Path) -> Any:
    """Steps that are well, then one with the fault before a launch of it; without one, what that step launches."""
    mesh = comm.init_mesh(*layout, "cpu", timeout_s=TIMEOUT_S)
    model = tiny_model("llama", num_hidden_layers=2)
    loop = loop_over(mesh, model)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    serving = steps(loop, folder, rank)
    for _ in range(STEP - 1):
        next(serving)
    begin = time.monotonic()
    try:
        with bombs.planted(fault_of(how, loop), at if rank == victim else None) as launches:
            next(serving)
        if at is None:
            return launches
        next(serving)  # all that the step needed may have come before
    except Exception as error:
        seconds = time.monotonic() - begin
        if "thief" in loop.kv:
            loop.kv.free("thief")
        check(loop)
        if rank != victim and how == "stops":
            os.kill(int((folder / f"pid-{victim}").read_text()), signal.SIGCONT)
        if rank == victim and how != "stops":
            (folder / "raised").write_text(str(error))
            os._exit(1)  # as a process does that nobody catches it in
        return str(error), seconds
    return "nothing happened"


def finish(mesh: comm.DeviceMesh, folder: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    loop = loop_over(mesh, model)
    rank = comm.groups(mesh).flat.rank()
    if rank:
        loop.follow()
        return
    with loop:
        list(steps(loop, folder, rank))


def answers(layout: Layout, folder: Path) -> dict[int, tuple[list[int], str]]:
    """What is in the journal after a group has finished all that was left."""
    run_mesh(layout, finish, folder)
    tokens: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    for line in (folder / "journal").read_text().splitlines():
        for request, token, why in json.loads(line):
            assert request not in ends, "a request that has ended is not run again"
            tokens.setdefault(request, []).append(token)
            if why:
                ends[request] = why
    return {request: (tokens[request], ends[request]) for request in sorted(tokens)}


_EXPECTED: dict[Layout, dict[int, tuple[list[int], str]]] = {}
_LAUNCHES: dict[Layout, list[bombs.Launch]] = {}


def well(layout: Layout, folder: Path) -> None:
    """Once for each layout: what is generated without a fault, and what the step launches."""
    if layout not in _LAUNCHES:
        for name in ("whole", "part"):
            (folder / name).mkdir()
        _EXPECTED[layout] = answers(layout, folder / "whole")
        assert [len(tokens) for tokens, _ in _EXPECTED[layout].values()] == [2, 9, 7, 6, 5]
        _LAUNCHES[layout] = run_ranks(2, fail, layout, "dies", None, 1, folder / "part")[1]


def place(stage: str | int, launches: list[bombs.Launch]) -> int:
    """Which launch of the step that is."""
    if isinstance(stage, int):
        return stage
    layers = [number for number, (_, label) in enumerate(launches) if "layers." in label]
    return {"orders": 0, "first layer": layers[0], "last layer": layers[-1], "logits": len(launches) - 1}[stage]


def inject(layout: Layout, how: str, stage: str | int, victim: int, tmp_path: Path) -> None:
    well(layout, tmp_path)
    folder = tmp_path / f"{how} {stage}"
    folder.mkdir()
    at = place(stage, _LAUNCHES[layout])
    may_die = [] if how == "stops" else [victim]
    reports = run_ranks(2, fail, layout, how, at, victim, folder, isolated=True, may_die=may_die)
    for rank in (0, 1) if how == "stops" else (1 - victim,):  # who is woken has lost the other
        message, seconds = reports[rank]
        named = rf"step [{STEP}{STEP + 1}] of the loop: `\w+` of `[\w.]+` on rank {rank} of group `\w+` \(ranks 0, 1\) "
        assert re.match(named, message), message
        assert seconds < 3 * TIMEOUT_S + 1
    if how.startswith("runs out"):
        assert {"memory": "out of memory", "pages": "pages"}[how.split()[-1]] in (folder / "raised").read_text()
    before = (folder / "journal").read_bytes()
    (folder / "journal").write_bytes(before + b"[[1, 5")  # as one leaves it who died in the middle of a line
    assert answers(layout, folder) == _EXPECTED[layout]
    assert (folder / "journal").read_bytes().startswith(before)


CASES = (
    ((1, 2), "dies", "first layer", 0),
    ((1, 2), "stops", "last layer", 1),
    ((1, 2), "runs out of pages", "orders", 1),
)


@pytest.mark.parametrize(
    "case",
    thinned(
        [
            (layout, how, stage, who)
            for layout in LAYOUTS
            for how in FAULTS
            for stage in (STAGES[:1] if how == "runs out of pages" else STAGES)  # a step takes all its pages at once
            for who in (0, 1)
        ],
        CASES.__contains__,
    ),
    ids=str,
)
def test_a_fault_in_a_stage(case: tuple[Layout, str, str, int], tmp_path: Path) -> None:
    inject(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("how", ["dies", "runs out of memory"])
def test_a_fault_before_every_launch(layout: Layout, how: str, tmp_path: Path) -> None:
    well(layout, tmp_path)
    for at in range(len(_LAUNCHES[layout])):
        inject(layout, how, at, at % 2, tmp_path)
