"""Programs of steps: the serial schedule, and when `call` joins a child's steps."""

import pytest
import torch
from torch import nn

from seqpar import comm
from seqpar.comm.steps import splits


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


def test_a_mark_names_its_layer():
    assert comm.Mark(4).layer == 4
    assert repr(comm.Mark(4)) == "Mark(4)"
    assert comm.Mark(4).wait() is None
    assert torch.is_tensor(comm.run(iter_of(torch.ones(1))))


def iter_of(value):
    return value
    yield
