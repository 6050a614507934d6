"""Layers as programs of steps, and the serial schedule.

A layer that communicates is a generator: local work between yields, at each yield a `Handle` just launched; whoever
drives it sends back the finished tensor. A schedule is a function that drives one or several such programs. Callbacks
lost (the order of a layer's work is no longer the order of its lines), and so did a thread or a stream for each program
(collective order would depend on timing).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from seqpar.comm.handle import Handle, Mark
from seqpar.comm.trace import current_trace

__all__ = ["Steps", "call", "is_wrapped", "resume", "run", "splits", "start"]

T = TypeVar("T")
Y = TypeVar("Y")
Steps: TypeAlias = Generator[Handle | Mark, Any, T]


def run(steps: Steps[T]) -> T:
    """Drive one program, waiting at once for everything that it launches: the serial schedule."""
    value = None
    try:
        while True:
            value = resume(steps, value).wait()
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()  # after an error, so that a program waits for whatever else it has in flight


def start(steps: Steps[T]) -> Steps[T]:
    """Run a program to its first yield now; what is returned goes on from there, yielding that item first.

    So one program has several collectives in flight, and waits for each where it needs it:

        k_in, v_in = comm.start(exchange(k)), comm.start(exchange(v))
        k = yield from k_in             # v is under way, and so it is during what is computed from k
        v = yield from v_in

    Every rank starts the same programs in the same order. One that is closed or dropped before it is asked to go on
    waits for what it has launched, since buffers must outlive their collective; an owner that may fail in between
    closes those that it has started.
    """
    try:
        item = resume(steps, None)
    except StopIteration as stop:
        return _ended(stop.value)
    started = _from(item, steps)
    next(started)  # into its `try`: a generator that has not begun would end without it
    return started


def _ended(value: T) -> Steps[T]:
    return value
    yield


def _from(item: Y, steps: Generator[Y, Any, T]) -> Generator[Y, Any, T]:
    """The program that stands at `item`, behind a first yield that `start` takes."""
    pending: Any = item
    try:
        yield item
        while True:
            value = yield item
            pending = None
            pending = item = steps.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        if pending is not None:
            with suppress(RuntimeError):  # the error that ends the owner is already on its way
                pending.wait()
        steps.close()


def resume(steps: Generator[Y, Any, Any], value: Any, *index: int) -> Y:
    """`steps.send(value)`, which the trace in force sees as compute; `index` is the program's place in a schedule."""
    trace = current_trace()
    if trace is None:
        return steps.send(value)
    trace.begin((*trace.program, *index))
    reached: tuple[str, str, int] = ("end", "", -1)
    try:
        item = steps.send(value)
        reached = _reached(item)
        return item
    finally:
        trace.end(*reached)


def _reached(item: object) -> tuple[str, str, int]:
    """What a trace is told of a yield."""
    if isinstance(item, Handle):
        return "launch", item.label or item.op, item.number
    return item.kind if isinstance(item, Mark) else "mark", repr(item), -1


def call(child: Callable[..., Any], *args: Any, **kwargs: Any) -> Steps[Any]:
    """Call a child of a layer, joining its steps where it has steps that nothing wraps.

    Out: what `child(*args, **kwargs)` returns.

    A child with hooks, with a replaced `forward`, a compiled one, or one whose class wraps `__call__` is called as a
    whole, so hooks, PEFT wrappers and FSDP keep working; its collectives are then waited for inside.
    """
    if splits(child):
        return (yield from child.steps(*args, **kwargs))  # type: ignore[attr-defined]
    return child(*args, **kwargs)


def splits(child: object) -> bool:
    """Whether `call` joins the steps of `child` instead of calling it as a whole."""
    return isinstance(child, nn.Module) and _defines_steps(type(child)) and not is_wrapped(child)


def _defines_steps(cls: type) -> bool:
    """Whether the `forward` of `cls` is its `steps`: no class nearer than the one with `steps` overrides it."""
    for base in cls.__mro__:
        if "steps" in base.__dict__:
            return cls.__call__ is nn.Module.__call__
        if "forward" in base.__dict__:
            return False
    return False


def is_wrapped(child: nn.Module) -> bool:
    """Whether hooks, a replaced `forward` or a compiled one would see or change a call of `child`."""
    return bool(
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or "forward" in child.__dict__
        or child._compiled_call_impl is not None
        or _has_any_global_hook()
    )
