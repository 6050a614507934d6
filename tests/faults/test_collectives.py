"""A rank that dies, stops or is late in every kind of collective: the others get an error that names what failed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.comm import CommError, Handle, ProcessGroup, Steps
from seqpar.comm.collectives import reduce_async
from seqpar.partition import Range
from tests.faults import bombs
from tests.ranks import run_ranks

TIMEOUT_S = 2.0
P, VICTIM = 3, 2
LABEL = "layers.3.mlp"


Launched = Handle | Steps[torch.Tensor]
Start = Callable[[], Launched]


def kinds(group: ProcessGroup) -> dict[str, Start]:
    """How every kind of collective is launched, for groups of three; much is more than sockets hold."""
    rank, x, much = group.rank(), torch.ones(6, 4), torch.ones(3 << 20)
    kw: dict[str, Any] = {"group": group, "label": LABEL}
    around = {"dst": (rank + 1) % P, "src": (rank - 1) % P}
    return {
        "all_reduce": partial(comm.all_reduce_async, x, **kw),
        "all_reduce by the backend": partial(comm.all_reduce_async, much, **kw),
        "all_reduce in int8": partial(comm.all_reduce_async, x, wire="int8", **kw),
        "all_gather": partial(comm.all_gather_async, x, **kw),
        "reduce_scatter": partial(comm.reduce_scatter_async, x, **kw),
        "all_to_all": partial(comm.all_to_all_async, x, send_sizes=[2] * P, recv_sizes=[2] * P, **kw),
        "all_to_all of much": partial(
            comm.all_to_all_async, much, send_sizes=[1 << 20] * P, recv_sizes=[1 << 20] * P, **kw
        ),
        "broadcast": partial(comm.broadcast_async, x, src=VICTIM, **kw),
        "broadcast of much": partial(comm.broadcast_async, much, src=0, **kw),
        "reduce of much": partial(reduce_async, much, dst=VICTIM, **kw),
        "send_recv of much": partial(comm.send_recv_async, much, **around, **kw),
        "seq_to_heads": partial(
            comm.seq_to_heads_steps, x, columns=[[Range(0, 1)], [Range(1, 2)], [Range(2, 4)]], tokens=[6] * P, **kw
        ),
    }


def launch(start: Start) -> Launched | CommError:
    try:
        launched = start()
        return launched if isinstance(launched, Handle) else comm.start(launched)
    except CommError as error:
        return error


def finish(launched: Launched | CommError) -> None:
    if isinstance(launched, CommError):
        raise launched
    if isinstance(launched, Handle):
        launched.wait()
    else:
        comm.run(launched)


def survive(rank: int, p: int, how: str, folder: str) -> tuple[dict[str, str], float]:
    """All kinds at once, each in a group of its own, so that they take one timeout together."""
    world = dist.group.WORLD
    assert world is not None
    starts = {}
    for name in kinds(world):
        group = dist.new_group(list(range(P)), timeout=timedelta(seconds=TIMEOUT_S), group_desc="mine")
        starts[name] = kinds(group)[name]
    comm.agree(None, group=world)
    for start in starts.values():
        finish(launch(start))  # all is well
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    comm.agree(None, group=world)
    if rank == VICTIM and how == "dies in flight":
        kept = [launch(start) for start in starts.values()]
        bombs.die()
        del kept
    if rank == VICTIM:
        {"dies": bombs.die, "stops": bombs.stop, "comes late": partial(time.sleep, 4 * TIMEOUT_S)}[how]()
    begin = time.monotonic()
    started = {name: launch(start) for name, start in starts.items()}
    errors = {}
    for name, start in starts.items():
        try:
            finish(started[name])
            finish(launch(start))  # what was already received from the dead is no failure
            finish(launch(start))
        except CommError as error:
            errors[name] = str(error)
        assert name in errors, f"`{name}` ended well"
    seconds = time.monotonic() - begin
    (Path(folder) / f"done-{rank}").touch()
    if rank == 0 and how == "stops":
        wake(Path(folder))
    return errors, seconds


def wake(folder: Path) -> None:
    while not (folder / "done-1").exists():
        time.sleep(0.01)
    os.kill(int((folder / f"pid-{VICTIM}").read_text()), signal.SIGCONT)


@pytest.mark.parametrize(
    "how",
    ["dies", "stops", *(pytest.param(how, marks=pytest.mark.slow) for how in ("dies in flight", "comes late"))],
)
def test_every_kind_names_what_failed(how: str, tmp_path: Path) -> None:
    dies = how.startswith("dies")
    reports = run_ranks(P, survive, how, str(tmp_path), isolated=True, may_die=[VICTIM] if dies else [])
    assert (reports[VICTIM] is None) == dies, "who wakes up has lost the others, and is told so"
    for rank, report in enumerate(reports):
        if report is None:
            continue
        errors, seconds = report
        for name, message in errors.items():
            op = "all_to_all" if name == "seq_to_heads" else name.split()[0]
            expected = (
                rf"`{op}` of `{LABEL}` on rank {rank} of group `mine` \(ranks 0, 1, 2\) failed after \d+ launches "
                "there; a rank died, raised, or was later than the timeout: "
            )
            assert re.match(expected, message), (name, message)
        assert seconds < 3 * TIMEOUT_S + 1, "one timeout, though not one for each collective"


def is_slow(rank: int, p: int) -> float:
    """A rank that needs its time, but not too much, is waited for."""
    group = comm.groups(comm.init_mesh(1, p, "cpu", timeout_s=30.0)).sp
    handle = comm.all_reduce_async(torch.ones(4), group=group) if rank == 0 else None
    if rank == 1:
        time.sleep(0.2)
        handle = comm.all_reduce_async(torch.ones(4), group=group)
    assert handle is not None
    return float(handle.wait().sum())


def test_a_slow_rank_is_no_failure() -> None:
    assert run_ranks(2, is_slow) == [8.0, 8.0]


def raises(rank: int, p: int) -> str:
    """What a process leaves behind that ends by an exception: its connections are closed."""
    group = comm.groups(comm.init_mesh(1, p, "cpu", timeout_s=30.0)).sp
    comm.all_reduce(torch.ones(4), group=group)
    if rank == 1:
        os._exit(1)
    begin = time.monotonic()
    with pytest.raises(comm.CommError) as info:
        for _ in range(3):
            comm.all_reduce(torch.ones(4), group=group, label=LABEL)
    assert time.monotonic() - begin < 15, "at once, not after the timeout"
    return str(info.value)


def test_a_rank_that_raises_and_ends_is_known_at_once() -> None:
    message, dead = run_ranks(2, raises, isolated=True, may_die=[1])
    assert dead is None and f"of `{LABEL}` on rank 0 of group" in message


def dies_under_the_check(rank: int, p: int, keeper: str, folder: Path) -> str:
    """The store is a file, or with the rank that dies."""
    if keeper == "rank 0":
        dist.destroy_process_group()
        port = folder / "port"
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, p, is_master=True, wait_for_workers=False)
            port.with_suffix(".part").write_text(str(store.port))
            port.with_suffix(".part").rename(port)
        else:
            while not port.exists():
                time.sleep(0.01)
            store = dist.TCPStore("127.0.0.1", int(port.read_text()), p, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=p)
    group = comm.groups(comm.init_mesh(1, p, "cpu", timeout_s=TIMEOUT_S)).sp
    with pytest.raises((ValueError, CommError)) as info, comm.check(timeout_s=1.0):
        comm.all_reduce(torch.ones(4), group=group, label="first")
        if rank == (keeper != "rank 0"):
            bombs.die()
        comm.all_reduce(torch.ones(4), group=group, label=LABEL)
    return f"{info.type.__name__}: {info.value}"


def test_a_rank_that_dies_under_the_check(tmp_path: Path) -> None:
    assert run_ranks(2, dies_under_the_check, "a file", tmp_path, isolated=True, may_die=[1])[0] == (
        f"ValueError: rank 1 did not come within 1 s to step 2 of group `sp` (ranks 0, 1), where rank 0 launched "
        f"`all_reduce` of `{LABEL}` [4] float32; rank 1 last launched `all_reduce` of `first` [4] float32 at step 1 of "
        "group `sp` (ranks 0, 1)"
    )


def test_the_keeper_of_the_store_dies_under_the_check(tmp_path: Path) -> None:
    message = run_ranks(2, dies_under_the_check, "rank 0", tmp_path, isolated=True, may_die=[0])[1]
    assert message.startswith(f"CommError: `all_reduce` of `{LABEL}` on rank 1 of group `sp` (ranks 0, 1) failed after")


def differs(rank: int, p: int) -> str:
    """Rank 1 sends more than rank 0 awaits, without the check."""
    group = comm.groups(comm.init_mesh(1, p, "cpu", timeout_s=TIMEOUT_S)).sp
    comm.all_reduce(torch.ones(4), group=group)
    with pytest.raises(CommError) as info:  # of this one or the next, as the other process ends
        comm.all_reduce(torch.ones(4 + 4 * rank), group=group, label=LABEL)
        comm.all_reduce(torch.ones(4), group=group, label=LABEL)
    return str(info.value)


def test_sizes_that_differ_without_the_check() -> None:
    """What the documentation says: gloo ends the process that gets more, and the other one hears of that."""
    dead, message = run_ranks(2, differs, isolated=True, may_die=[0])
    assert dead is None and message.startswith(f"`all_reduce` of `{LABEL}` on rank 1 of group `sp` (ranks 0, 1) failed")
