"""Programs of steps: the serial schedule, and when `call` joins a child's steps."""

import pytest
import torch
from torch import nn

from seqpar import comm
from seqpar.comm.steps import splits
from tests.ranks import run_mesh


class Ready:
    """A stand-in for a handle."""

    def __init__(self, value, log):
        self.value, self.log = value, log

    def wait(self):
        self.log.append(self.value)
        return self.value


class Doubler(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def steps(self, x):
        return 2 * (yield Ready(x, self.log))

    def forward(self, x):
        self.log.append("forward")
        return comm.run(self.steps(x))


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def steps(self, x):
        yield comm.Mark(3)
        y = yield from comm.call(self.child, x)
        return y + 1


def run_parent(child):
    return comm.run(Parent(child).steps(5))


def test_run_sends_back_what_each_yield_waited_for():
    log = []

    def program():
        a = yield Ready(1, log)
        mark = yield comm.Mark(0)
        b = yield Ready(2, log)
        return a, mark, b

    assert comm.run(program()) == (1, None, 2)
    assert log == [1, 2]


def test_run_of_a_program_without_steps_returns_its_value():
    def program():
        return 7
        yield

    assert comm.run(program()) == 7


def test_an_error_in_a_program_passes_through():
    def program():
        yield comm.Mark(0)
        raise KeyError("k")

    with pytest.raises(KeyError):
        comm.run(program())


def test_call_joins_the_steps_of_a_plain_child():
    log = []
    assert run_parent(Doubler(log)) == 11
    assert log == [5]


def test_call_of_a_module_without_steps_and_of_a_function():
    assert run_parent(nn.Identity()) == 6
    assert run_parent(nn.Identity().forward) == 6


class Inherits(Doubler):
    pass


class OverridesBoth(Doubler):
    def steps(self, x):
        return 3 * (yield Ready(x, self.log))

    def forward(self, x):
        return comm.run(self.steps(x))


class OverridesSteps(Doubler):
    def steps(self, x):
        return 3 * (yield Ready(x, self.log))


class OverridesForward(Doubler):
    def forward(self, x):
        return 10 * super().forward(x)


class OverridesCall(Doubler):
    def __call__(self, x):
        return 10 * super().__call__(x)


@pytest.mark.parametrize(
    ("cls", "joins", "value"),
    [
        (Inherits, True, 11),
        (OverridesBoth, True, 16),
        (OverridesSteps, True, 16),
        (OverridesForward, False, 101),
        (OverridesCall, False, 101),
    ],
)
def test_call_respects_what_a_subclass_overrides(cls, joins, value):
    child = cls([])
    assert splits(child) is joins
    assert run_parent(child) == value
    assert ("forward" in child.log) is (cls in (OverridesForward, OverridesCall))


def ten_times(module, args, out):
    return 10 * out


def forward_hook(child):
    child.register_forward_hook(ten_times)


def pre_hook(child):
    child.register_forward_pre_hook(lambda module, args: (10 * args[0],))


def instance_forward(child):
    inner = child.forward
    child.forward = lambda x: 10 * inner(x)


@pytest.mark.parametrize("wrap", [forward_hook, pre_hook, instance_forward])
def test_what_wraps_a_child_takes_part(wrap):
    child = Doubler([])
    wrap(child)
    assert not splits(child)
    assert run_parent(child) == 101


def test_hooks_on_all_modules_and_backward_hooks_and_compiled_children_are_called_whole():
    child = Doubler([])
    with nn.modules.module.register_module_forward_hook(ten_times):
        assert run_parent(child) == 101
    assert splits(child)
    with child.register_full_backward_hook(lambda *_: None):
        assert not splits(child)
    with child.register_full_backward_pre_hook(lambda *_: None):
        assert not splits(child)
    child.compile(backend="eager")
    assert not splits(child)


def test_a_wrapper_around_a_child_sees_the_call():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 100

    assert run_parent(Adapter(Doubler([]))) == 111


def launch(log, *values):
    """A program of one collective after another, which says when it is closed before its end."""
    got = []
    try:
        for value in values:
            log.append(("launch", value))
            got.append((yield Ready(value, log)))
        return got
    except GeneratorExit:
        log.append("closed")
        raise


def test_started_programs_are_in_flight_together_and_waited_for_where_they_are_asked():
    log = []

    def owner():
        a, b = comm.start(launch(log, 1)), comm.start(launch(log, 2, 3))
        log.append("between")
        first = yield from a
        log.append("after a")
        return first, (yield from b)

    assert comm.run(owner()) == ([1], [2, 3])
    assert log == [("launch", 1), ("launch", 2), "between", 1, "after a", 2, ("launch", 3), 3]


def test_a_started_program_may_end_at_once_or_stand_at_a_mark():
    def at_once():
        return 7
        yield

    def marked():
        yield comm.Mark(1)
        return 8

    def owner():
        return (yield from comm.start(at_once())), (yield from comm.start(marked()))

    assert comm.run(owner()) == (7, 8)
    assert [repr(item) for item in comm.start(marked())] == ["Mark(1)"]


def test_an_error_before_the_first_yield_is_raised_by_start():
    def failing():
        raise KeyError("k")
        yield

    with pytest.raises(KeyError):
        comm.start(failing())


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_started_program_that_is_closed_waits_for_what_is_in_flight(asked):
    log = []
    started = comm.start(launch(log, 1, 2, 3))
    if asked:
        item = next(started)
    for _ in range(1, asked):
        item = started.send(item.wait())
    waited = [entry for entry in log if isinstance(entry, int)]
    started.close()
    flying = max(1, asked)
    assert [entry for entry in log if isinstance(entry, int)] == [*waited, flying] and log[-1] == "closed"
    started.close()
    assert log.count("closed") == 1


@pytest.mark.parametrize("how", ["fails", "is closed", "is interleaved"])
def test_what_an_owner_has_in_flight_is_waited_for_when_it_ends_early(how):
    log = []

    def owner():
        ins = [comm.start(launch(log, value)) for value in (1, 2, 3)]
        try:
            yield from ins[0]
            if how == "fails":
                raise KeyError("k")
            yield Ready(4, log)
            yield from ins[1]
            yield from ins[2]
        finally:
            for each in ins:
                each.close()

    def other():
        yield Ready(5, log)
        raise KeyError("k")

    if how == "is closed":
        program = owner()
        next(program)
        program.close()
    else:
        with pytest.raises(KeyError):
            comm.run(owner()) if how == "fails" else comm.interleave([owner(), other()])
    assert {1, 2, 3} <= set(log)


def test_a_started_program_that_is_dropped_waits_too():
    log = []
    comm.start(launch(log, 1))
    assert log == [("launch", 1), 1, "closed"]


def test_run_closes_a_program_whose_wait_failed():
    class Broken:
        def wait(self):
            raise RuntimeError("lost")

    log = []

    def owner():
        started = comm.start(launch(log, 1))
        try:
            yield Broken()
        finally:
            started.close()

    program = owner()
    with pytest.raises(RuntimeError, match="lost"):
        comm.run(program)
    assert 1 in log


def several(mesh):
    """Two programs of two sums in flight each: results, and what a trace says of who computed and sent."""
    group = comm.groups(mesh).tp

    def owner(value):
        x = torch.full((4,), float(value))
        ins = [comm.start(comm.all_reduce_steps(x * n, group=group, label=f"{value}{n}")) for n in (1, 2)]
        a = yield from ins[0]
        b = yield from ins[1]
        return a + b

    with comm.trace() as t:
        found = comm.interleave([owner(1), owner(10)])
    assert [x.tolist() for x in found] == [[6.0] * 4, [60.0] * 4]
    sent = {(i.program, i.label) for i in t.intervals if i.kind == "comm"}
    assert sent == {((0,), "11"), ((0,), "12"), ((1,), "101"), ((1,), "102")}
    compute = [(i.program, i.op, i.label) for i in t.intervals if i.kind == "compute" and i.program]
    assert ((0,), "launch", "12") in compute and ((1,), "launch", "102") in compute
    assert {program for program, *_ in compute} == {(0,), (1,)}


def test_a_trace_sees_started_programs_as_their_owner():
    run_mesh((2, 1), several)


def test_a_mark_names_its_layer():
    assert comm.Mark(4).layer == 4
    assert repr(comm.Mark(4)) == "Mark(4)"
    assert comm.Mark(4).wait() is None
    assert torch.is_tensor(comm.run(iter_of(torch.ones(1))))


def iter_of(value):
    return value
    yield
