"""Simulated links: deadlines exactly in virtual time, results and hiding on real ranks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.comm import link as links
from seqpar.comm.collectives import reduce_async
from seqpar.comm.flight import Flight
from seqpar.comm.link import link_of
from seqpar.partition import Range
from tests.comm.fakes import Clock, FakeGroup
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh


def virtual(alpha_s: float = 2.0, bytes_per_s: float = 4.0) -> tuple[Clock, comm.SimulatedLink]:
    clock = Clock()
    return clock, comm.SimulatedLink(alpha_s, bytes_per_s, clock=clock, sleep=clock.sleep)


def launch(group: FakeGroup, num_bytes: int, label: str = "") -> comm.Handle:
    """An exchange that sends `num_bytes` to the other rank, and keeps 5."""
    x = torch.ones(5 + num_bytes, dtype=torch.uint8)
    sizes = [5, num_bytes]
    return comm.all_to_all_async(x, group=group, send_sizes=sizes, recv_sizes=sizes, label=label)


def test_seconds() -> None:
    link = comm.SimulatedLink(2.0, 4.0)
    assert [link.seconds(n) for n in (0, 4, 10)] == [2.0, 3.0, 4.5]
    assert comm.SimulatedLink(2.0, math.inf).seconds(1 << 40) == 2.0


def test_a_transfer_is_waited_for_until_its_deadline() -> None:
    group, (clock, link) = FakeGroup(), virtual()
    with link.on(group):
        handle = launch(group, 4)
        assert not handle.done()
        clock.advance(1.0)
        assert handle.wait().tolist() == [1] * 9
        assert clock.now_s == 3.0 and clock.slept == [2.0] and handle.done()
        handle.wait()
    assert clock.slept == [2.0]


def test_transfers_follow_one_another_on_a_link() -> None:
    group, (clock, link) = FakeGroup(), virtual()
    with link.on(group):
        handles = [launch(group, num_bytes) for num_bytes in (4, 0, 8)]
        clock.advance(1.0)
        ends = []
        for handle in handles:
            handle.wait()
            ends.append(clock.now_s)
        assert ends == [3.0, 5.0, 9.0]
        clock.advance(10.0)  # by now the link has long been free
        launch(group, 4).wait()
        assert clock.now_s == 22.0


def test_compute_hides_a_transfer() -> None:
    group, (clock, link) = FakeGroup(), virtual()
    with link.on(group):
        handle = launch(group, 4)
        clock.advance(3.0)
        assert handle.done()
        handle.wait()
    assert clock.now_s == 3.0 and clock.slept == []


def test_groups_may_share_a_link_or_have_their_own() -> None:
    tp, sp = FakeGroup("tp"), FakeGroup("sp")
    clock, link = virtual()
    with link.on(tp, sp):
        launch(tp, 4)
        launch(sp, 4).wait()
    assert clock.now_s == 6.0
    clock, link = virtual()
    other = comm.SimulatedLink(1.0, 1.0, clock=clock, sleep=clock.sleep)
    with link.on(tp), other.on(sp):
        launch(tp, 4)
        launch(sp, 4).wait()
    assert clock.now_s == 5.0


def test_the_innermost_link_is_in_force_and_only_inside_and_in_this_thread() -> None:
    tp, sp = FakeGroup("tp"), FakeGroup("sp")
    outer, inner = virtual()[1], virtual()[1]
    seen: list[Any] = []
    with outer.on(tp, sp) as link:
        assert link is outer
        with inner.on(tp):
            assert link_of(tp) is inner and link_of(sp) is outer
            thread = threading.Thread(target=lambda: seen.append(link_of(tp)))
            thread.start()
            thread.join()
        assert link_of(tp) is outer
    assert link_of(tp) is None and seen == [None]
    launch(tp, 4).wait()
    assert outer.busy_until_s == inner.busy_until_s == -math.inf


def test_reset_frees_the_link() -> None:
    group, (clock, link) = FakeGroup(), virtual()
    with link.on(group):
        launch(group, 400)
        link.reset()
        launch(group, 4).wait()
    assert clock.now_s == 3.0


def test_it_says_that_it_is_simulated() -> None:
    group, (_, link) = FakeGroup(), virtual()
    assert repr(link) == "SimulatedLink(alpha_s=2, bytes_per_s=4)"
    with link.on(group):
        handle = launch(group, 4, "mlp")
    assert repr(handle) == "Handle(all_to_all, 'mlp', in flight, SimulatedLink(alpha_s=2, bytes_per_s=4))"
    handle.wait()
    assert repr(handle) == "Handle(all_to_all, 'mlp', done, SimulatedLink(alpha_s=2, bytes_per_s=4))"


LARGE = (8 << 20) + 4  # past the largest one-shot, and even


def test_a_sum_of_two_phases_pays_for_each_and_the_backends_for_one() -> None:
    x = torch.zeros(LARGE, dtype=torch.uint8)
    clock, link = virtual(1.0, float(LARGE))
    group = FakeGroup("fake deterministic")
    with link.on(group):
        comm.all_reduce(x, group=group)
    assert clock.now_s == 2 * 1.5
    clock.now_s = 0.0
    link.reset()
    with link.on(group):
        comm.all_reduce_async(x, group=group).wait()
    assert clock.now_s == 2 * 1.5
    clock, link = virtual(1.0, float(LARGE))
    group = FakeGroup()
    with link.on(group):
        comm.all_reduce(x, group=group)
    assert clock.now_s == 2.0


def test_a_broadcast_sends_from_its_source_and_pays_latency_elsewhere() -> None:
    group, (clock, link) = FakeGroup(), virtual()
    with link.on(group):
        comm.broadcast_async(torch.ones(4, dtype=torch.uint8), src=0, group=group).wait()
        assert clock.now_s == 3.0
        comm.broadcast_async(torch.ones(4, dtype=torch.uint8), src=1, group=group).wait()
    assert clock.now_s == 5.0


@pytest.mark.parametrize(
    ("alpha_s", "bytes_per_s", "message"),
    [
        (-1.0, 1.0, "`alpha_s` must be finite and >= 0, got -1.0"),
        (math.nan, 1.0, "`alpha_s` must be finite and >= 0, got nan"),
        (0.0, 0.0, "`bytes_per_s` must be > 0, got 0.0"),
        (0.0, math.nan, "`bytes_per_s` must be > 0, got nan"),
    ],
)
def test_costs_out_of_range(alpha_s: float, bytes_per_s: float, message: str) -> None:
    with pytest.raises(ValueError) as error:
        comm.SimulatedLink(alpha_s, bytes_per_s)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sm": 0}, "`sm` must be at least 1, got 0"),
        ({"ranks": 1}, "`ranks` must be at least 2, got 1; leave it out for the ranks that there are"),
    ],
)
def test_options_out_of_range(option: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as error:
        comm.SimulatedLink(0.0, 1.0, **option)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_presets() -> None:
    link = comm.SimulatedLink.preset("h100-nccl-8")
    assert (link.alpha_s, link.bytes_per_s) == pytest.approx((39e-6, 368e9))
    assert all(comm.SimulatedLink.preset(name).seconds(1 << 20) < 1e-3 for name in comm.LINK_PRESETS)
    with pytest.raises(ValueError, match=r'`name` must be one of a100-dgx-2, .*, got "infiniband"'):
        comm.SimulatedLink.preset("infiniband")
    with pytest.raises(TypeError):
        comm.LINK_PRESETS["mine"] = comm.LinkCosts(0.0, 1.0)  # type: ignore[index]


def test_no_group_and_other_devices() -> None:
    group, (_, link) = FakeGroup(), virtual()
    with pytest.raises(ValueError, match="`groups` must be at least one group, got none"), link.on():
        pass
    x = torch.ones(3, device="meta")
    with (
        link.on(group),
        pytest.raises(ValueError, match="simulated links must be used on CPU or CUDA tensors, got `broadcast`"),
    ):
        comm.broadcast_async(x, src=0, group=group)


ALONE: dict[str, tuple[Callable[[torch.Tensor, FakeGroup], comm.Handle], int]] = {
    "all_reduce": (lambda x, group: comm.all_reduce_async(x, group=group), 7 * 64),  # in one shot
    "all_gather": (lambda x, group: comm.all_gather_async(x, group=group), 56),
    "reduce_scatter": (lambda x, group: comm.reduce_scatter_async(x, group=group), 56),
    "all_to_all": (lambda x, group: comm.all_to_all_async(x, group=group, send_sizes=[64], recv_sizes=[64]), 56),
    "broadcast": (lambda x, group: comm.broadcast_async(x, src=0, group=group), 7 * 64),
    "reduce": (lambda x, group: reduce_async(x, dst=0, group=group), 0),
}


@pytest.mark.parametrize("op", ALONE)
def test_a_collective_of_one_rank_takes_the_time_of_eight(op: str) -> None:
    start, num_bytes = ALONE[op]
    group, clock, x = FakeGroup(size=1), Clock(), torch.arange(64, dtype=torch.uint8)
    link = comm.SimulatedLink(1.0, 1.0, ranks=8, clock=clock, sleep=clock.sleep)
    assert start(x, group).done()
    with link.on(group), comm.record() as counts, comm.trace(clock=clock) as trace:
        handle = start(x, group)
        assert not handle.done() and repr(handle).endswith(
            "in flight, SimulatedLink(alpha_s=1, bytes_per_s=1, ranks=8))"
        )
        assert handle.wait() is x
    assert clock.now_s == 1 + num_bytes
    (seen,) = (interval for interval in trace.intervals if interval.kind == "comm")
    assert (seen.op, seen.num_bytes, seen.simulated) == (op, num_bytes, True)
    assert not counts.counts  # nothing was sent


@pytest.mark.parametrize(("name", "expected_s"), [("fake", [1 + 2 * 0.875]), ("fake deterministic", [1.875, 1.875])])
def test_a_large_sum_of_one_rank_has_the_phases_of_eight(name: str, expected_s: list[float]) -> None:
    group, clock, x = FakeGroup(name, size=1), Clock(), torch.zeros(LARGE, dtype=torch.uint8, requires_grad=False)
    link = comm.SimulatedLink(1.0, float(LARGE), ranks=8, clock=clock, sleep=clock.sleep)
    slept = []
    with link.on(group):
        steps = comm.all_reduce_steps(x, group=group)
        try:
            value = None
            while True:
                value = steps.send(value).wait()
                slept.append(clock.now_s)
        except StopIteration as stop:
            assert stop.value is x
    assert [b - a for a, b in zip([0.0, *slept], slept, strict=False)] == pytest.approx(expected_s, rel=1e-6)


def test_a_sum_of_one_rank_hides_under_the_other_programs_compute_and_has_a_gradient() -> None:
    group, clock = FakeGroup(size=1), Clock()
    link = comm.SimulatedLink(1.0, math.inf, ranks=8, clock=clock, sleep=clock.sleep)

    def program(x: torch.Tensor) -> comm.Steps[torch.Tensor]:
        for _ in range(3):
            clock.advance(1.0)
            x = 2 * (yield from comm.all_reduce_steps(x, group=group))
        return x

    x = torch.ones(2, requires_grad=True)
    with link.on(group):
        parts = comm.interleave([program(x[:1]), program(x[1:])])
    assert clock.now_s == 7.0  # of the last program's last sum nothing is hidden
    torch.cat(parts).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [8.0, 8.0]


def test_reshards_and_sends_to_itself_stay_free() -> None:
    group, (clock, _), x = FakeGroup(size=1), virtual(), torch.ones(3, 4)
    link = comm.SimulatedLink(1.0, 1.0, ranks=8, clock=clock, sleep=clock.sleep)
    with link.on(group):
        comm.seq_to_heads(x, columns=[[Range(0, 4)]], tokens=[3], group=group)
        comm.heads_to_seq(x, widths=[4], tokens=[3], group=group)
        comm.send_recv(x, dst=0, src=0, group=group)
    assert clock.now_s == 0.0


def test_ranks_are_for_groups_of_one() -> None:
    link = comm.SimulatedLink.preset("h100-nccl-8", sm=24, ranks=8)
    assert (link.sm, link.ranks) == (24, 8)
    with pytest.raises(ValueError) as error, link.on(FakeGroup(size=1), FakeGroup()):
        pass
    assert str(error.value) == "`groups` must be of one rank on a link that sets `ranks` (8), got one of 2"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Streams by name pass for CUDA's, also with the annotation checker."""
    with own_errors():
        yield Streams(monkeypatch)


class Streams:
    """CUDA's streams by name, of which the last is current; and what happened on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stack, self.log = ["launcher"], list[str]()
        for name in ("current_stream", "follow", "new_stream", "record_event", "use_stream", "wait_event", "spin"):
            monkeypatch.setattr(links, name, getattr(self, name))

    def current_stream(self, device: torch.device) -> str:
        return self.stack[-1]

    def new_stream(self, device: torch.device, *, priority: int) -> str:
        assert priority < 0
        return "link"

    @contextmanager
    def use_stream(self, stream: str) -> Iterator[None]:
        self.stack.append(stream)
        yield
        self.stack.pop()

    def follow(self, stream: str) -> None:
        self.log.append(f"{self.stack[-1]} after {stream}")

    def record_event(self, device: torch.device) -> Event:
        self.log.append(f"{self.stack[-1]} signals")
        return Event()

    def wait_event(self, event: Event, device: torch.device) -> None:
        self.log.append(f"{self.stack[-1]} awaits the signal")

    def spin(self, seconds: float, *, ctas: int) -> None:
        self.log.append(f"{self.stack[-1]} spins {ctas} x {seconds:g} s")


class Event:
    def query(self) -> bool:
        return False


def test_on_cuda_a_transfer_is_a_kernel_on_the_links_stream(streams: Streams) -> None:
    device = torch.device("cuda", 0)
    link = comm.SimulatedLink(2.0, 4.0, sm=3, sleep=lambda _: pytest.fail("the host slept"))
    flights = [Flight("op", "", device, num_bytes, link, None) for num_bytes in (4, 0)]
    assert streams.log == [
        "link after launcher",
        "link spins 3 x 3 s",
        "link signals",
        "link after launcher",
        "link spins 3 x 2 s",
        "link signals",
    ]
    assert not flights[0].arrived() and link.busy_until_s == -math.inf
    streams.log.clear()
    flights[0].land(lambda: streams.log.append("launcher after the collective"))
    assert streams.log == ["launcher after the collective", "launcher awaits the signal"]


def test_reset_gives_cuda_a_new_stream(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    link, device = comm.SimulatedLink(2.0, 4.0), torch.device("cuda", 0)
    first = link.stream(device)
    monkeypatch.setattr(links, "new_stream", lambda device, priority: "another")
    assert link.stream(device) is first
    link.reset()
    assert link.stream(device) == "another"


def every_collective(mesh: comm.DeviceMesh) -> None:
    """Each under a link of 20 ms: no sooner, also where nothing is sent, and right."""
    group = comm.groups(mesh).tp
    rank, other = group.rank(), 1 - group.rank()
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    whole = torch.cat([torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) + 10])
    total = whole[:2] + whole[2:]
    link = comm.SimulatedLink(0.02, 1e9)
    cases = {
        "all_reduce": (lambda: comm.all_reduce_async(x, group=group), total),
        "all_gather": (lambda: comm.all_gather_async(x, group=group), whole),
        "reduce_scatter": (lambda: comm.reduce_scatter_async(x, group=group), total[rank : rank + 1]),
        "all_to_all": (
            lambda: comm.all_to_all_async(x, group=group, send_sizes=[1, 1], recv_sizes=[1, 1]),
            whole[rank::2],
        ),
        "nothing sent": (
            lambda: comm.all_to_all_async(x[:0], group=group, send_sizes=[0, 0], recv_sizes=[0, 0]),
            x[:0],
        ),
        "broadcast": (lambda: comm.broadcast_async(x, src=1, group=group), whole[2:]),
        "send_recv": (lambda: comm.send_recv_async(x, dst=other, src=other, group=group), total - x),
    }
    for name, (start, expected) in cases.items():
        began = time.perf_counter()
        with link.on(group):
            handle = start()
        out = handle.wait()
        assert time.perf_counter() - began >= 0.02, name
        torch.testing.assert_close(out, expected, rtol=0, atol=0, msg=name)


def hidden(mesh: comm.DeviceMesh) -> None:
    """What computes for longer than the transfer takes does not sleep for it."""
    group, slept = comm.groups(mesh).tp, []
    link = comm.SimulatedLink(0.02, 1e9, sleep=slept.append)
    with link.on(group):
        handle = comm.all_reduce_async(torch.ones(3), group=group)
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < 0.025 or (not handle.done() and passed < 20):
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert handle.done() and handle.wait().tolist() == [2.0] * 3 and not slept


def test_every_collective_takes_its_time_and_is_right() -> None:
    run_mesh((2, 1), every_collective)


def test_compute_hides_a_real_transfer() -> None:
    run_mesh((2, 1), hidden)
