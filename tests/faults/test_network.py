"""Two hosts, as network namespaces with a cable between them: the cable is pulled, and both say what failed."""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import socket
import subprocess
import time
import traceback
from pathlib import Path

import pytest

TIMEOUT_S = 2.0
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
CABLES = ("left", "right")


def enter_namespace() -> None:
    """A network of this process's own, with the rights to configure it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) == 0:
        return
    user = os.getuid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no namespaces")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def plug(host: int) -> None:
    ip("address", "add", f"10.77.0.{host + 1}/30", "dev", CABLES[host])
    ip("link", "set", CABLES[host], "up")


def both_hosts(folder: str) -> None:
    """The left host; the right one is its child, in a namespace further down."""
    here, there = socket.socketpair()
    right = 0
    try:
        enter_namespace()
        right = os.fork()
        if right == 0:
            here.close()
            right_host(folder, there)
        there.close()
        if not here.recv(1):
            raise OSError("no namespace in a namespace")
        ip("link", "add", "name", CABLES[0], "type", "veth", "peer", "name", CABLES[1], "netns", str(right))
        plug(0)
        here.send(b"the cable is there")
        report(folder, 0)
    except (OSError, subprocess.CalledProcessError) as error:
        (Path(folder) / "skipped").write_text(str(error))
    here.close()
    if right:
        os.waitpid(right, 0)


def right_host(folder: str, left: socket.socket) -> None:
    """Never returns: this is a process of its own."""
    try:
        enter_namespace()
        left.send(b"r")
        if left.recv(1):
            plug(1)
            report(folder, 1)
    finally:
        os._exit(0)


def report(folder: str, host: int) -> None:
    try:
        said = lose_connection(folder, host)
    except BaseException:
        said = {"error": traceback.format_exc()}
    (Path(folder) / f"host-{host}").write_text(json.dumps(said))


def lose_connection(folder: str, host: int) -> dict[str, object]:
    import torch
    import torch.distributed as dist

    from seqpar import comm

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = CABLES[host]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 2), rank=host, world_size=2)
    group = comm.groups(comm.init_mesh(1, 2, "cpu", timeout_s=TIMEOUT_S)).sp
    for _ in range(3):
        total = comm.all_reduce(torch.ones(5), group=group, label="layers.3.mlp")
    if host == 0:
        ip("link", "set", CABLES[0], "down")
    begin = time.monotonic()
    try:
        for _ in range(3):
            comm.all_reduce(torch.ones(5), group=group, label="layers.3.mlp")
    except comm.CommError as error:
        return {"total": total.tolist(), "error": str(error), "seconds": time.monotonic() - begin}
    return {"error": "none"}


def test_a_cable_that_is_pulled(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    hosts = context.Process(target=both_hosts, args=(str(tmp_path),))
    hosts.start()
    hosts.join(60.0)
    if hosts.is_alive():
        hosts.kill()
        hosts.join()
        pytest.fail("hosts without a connection hang")
    if (tmp_path / "skipped").exists():
        pytest.skip(f"needs network namespaces and veth: {(tmp_path / 'skipped').read_text()}")
    for host in range(2):
        said = json.loads((tmp_path / f"host-{host}").read_text())
        name = f"`all_reduce` of `layers.3.mlp` on rank {host} of group `sp` (ranks 0, 1) failed after"
        assert said["error"].startswith(name), said["error"]
        assert said["total"] == [2.0] * 5 and said["seconds"] < 3 * TIMEOUT_S
