"""Handles: waiting, and in what order streams are tied before memory is let go."""

from contextlib import contextmanager

import pytest
import torch

from seqpar import comm
from seqpar.comm import handle as handles
from seqpar.comm.stream import CPU_STREAM, current_stream, hold_for, use_stream
from tests.ranks import run_mesh


class Work:
    """What a backend has in flight."""

    def __init__(self, log, streams, error=None):
        self.log, self.streams, self.error = log, streams, error

    def wait(self):
        self.log.append(f"{self.streams[-1]} after the collective")
        if self.error:
            raise self.error

    def is_completed(self):
        return False


class Buffer:
    """A tensor that says who else holds it."""

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, torch.device("cuda")

    def record_stream(self, stream):
        self.log.append(f"{self.name} held for {stream}")


class Stack(list):
    """Streams by name, and which followed which."""


@pytest.fixture
def streams(monkeypatch):
    """Streams by name: the last is current. `Handle` thinks that they are CUDA's."""
    stack, ordered = Stack(["launcher"]), []
    stack.ordered = ordered

    @contextmanager
    def use(stream):
        stack.append(stream)
        yield
        stack.pop()

    def hold(stream, tensors):
        for tensor in tensors:
            tensor.record_stream(stream)

    monkeypatch.setattr(handles, "current_stream", lambda device: stack[-1])
    monkeypatch.setattr(handles, "use_stream", use)
    monkeypatch.setattr(handles, "hold_for", hold)
    monkeypatch.setattr(handles, "follow", lambda stream: stack[-1] == stream or ordered.append((stack[-1], stream)))
    return stack


def launch(log, streams, works=1):
    result = Buffer("result", log)

    def finish():
        log.append(f"finish on {streams[-1]}")
        return result

    buffers = (Buffer("buffer", log),)
    # Past the annotation checker, which knows these for no tensors.
    make = getattr(handles.Handle.__init__, "__wrapped__", handles.Handle.__init__)
    handle = handles.Handle.__new__(handles.Handle)
    make(handle, "op", "label", None, (Work(log, streams),) * works, finish, buffers)
    return handle, result


def wait(handle):
    return getattr(handles.Handle.wait, "__wrapped__", handles.Handle.wait)(handle)


def test_waiting_on_the_stream_that_launched_ties_only_that(streams):
    log = []
    handle, result = launch(log, streams)
    assert wait(handle) is result
    assert log == ["launcher after the collective", "finish on launcher"]


def test_waiting_on_another_stream_also_ties_the_one_that_allocated(streams):
    log = []
    handle, _ = launch(log, streams)
    streams.append("other")
    wait(handle)
    assert log == [
        "other after the collective",
        "finish on other",
        "launcher after the collective",
        "buffer held for other",
        "result held for other",
    ]


def test_with_nothing_in_flight_another_stream_follows_the_one_that_made_the_result(streams):
    log = []
    handle, _ = launch(log, streams, works=0)
    streams.append("other")
    wait(handle)
    assert streams.ordered == [("other", "launcher")]
    assert log == ["finish on other", "buffer held for other", "result held for other"]


def test_a_second_wait_does_nothing(streams):
    log = []
    handle, result = launch(log, streams)
    wait(handle)
    log.clear()
    assert wait(handle) is result
    assert log == []


def test_the_buffers_are_held_until_the_wait_and_not_longer(streams):
    log = []
    handle, _ = launch(log, streams)
    assert handle._buffers
    wait(handle)
    assert handle._buffers == ()
    assert handle._finish is None


def test_on_a_cpu_streams_are_one_and_everything_is_a_no_op():
    stream = current_stream(torch.device("cpu"))
    assert stream is CPU_STREAM
    assert repr(stream) == "CPUStream()"
    with use_stream(stream):
        hold_for(stream, [torch.ones(1)])


def real(mesh):
    group = comm.groups(mesh).tp
    handle = comm.all_reduce_async(torch.ones(3), group=group, label="l").then(lambda out: out * 10)
    assert repr(handle) == "Handle(all_reduce, 'l', in flight)"
    out = handle.wait()
    assert out.tolist() == [20.0] * 3
    assert repr(handle) == "Handle(all_reduce, 'l', done)"
    assert handle.done()


def test_then_changes_the_result():
    run_mesh((2, 1), real)
