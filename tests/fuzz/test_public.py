"""Every public function, constructor and method, called with values of its types: a result or a refusal.

A refusal is a ValueError or a TypeError, or an OSError of a file. A result of finite numbers is finite, and arguments
are as they were. What is drawn is fixed in the suite; `make fuzz` draws anew for an hour (`SEQPAR_FUZZ_SECONDS`).
"""

from __future__ import annotations

import copy
import inspect
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar import comm
from seqpar.batching import Policy, StallFree
from seqpar.ragged import RaggedBatch
from tests.fuzz.values import Never, Unknown, Values
from tests.kernels.own_errors import own_errors
from tests.ranks import run_ranks

SECONDS = float(os.environ.get("SEQPAR_FUZZ_SECONDS", "0"))
PACKAGES = ("partition", "ragged", "batching", "kv")
EXAMPLES = 6

_RECORD = "what a valid one gives is tested; `place_tokens` makes them"
_ORDER = "asked by the schedule of the ring alone, for ranks and hops that there are"
_PLAN = "of `compaction.plan`, whose laws are tested"
_LOOP = "needs a model; loops have state machines of their own"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("partition.Run.position", "partition.Run.below", "partition.gather_held"), _RECORD),
    **{
        f"partition.RingOrder.{name}": _ORDER
        for name in ("keys_at", "seen_at", "queries_at", "answered_at", "tiles", "visible")
    },
    **{f"kv.CompactionPlan.{name}": _PLAN for name in ("apply", "reorder")},
    **{f"batching.{name}": _LOOP for name in ("TemporalFusion", "PipelineFusion", "Generation", "Words")},
    "batching.Room.pages": "a record; `compose` refuses one that is none",
    "batching.MicroBatchQueue.push": "of a step that was composed of this very progress",
    "ragged.Tail": "of `RaggedBatch.tail`, whose laws are tested",
    "kv.PageAllocator.integrity": "raises AssertionError, as it says",
    "kv.PagedKV.integrity": "raises AssertionError, as it says",
}
"""What is not called, and why."""

UNWRITTEN = {"kv.PagedKV.layer", "kv.PagedKV.read"}
"""What gives whole pages, written or not."""

Target = tuple[str, Callable[..., Any], type | None]


def targets(package: str) -> Iterator[Target]:
    """Names, what is called, and the class of what it is called on."""
    module = import_module(f"seqpar.{package}")
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) and value.__module__.startswith("seqpar."):
            if getattr(value, "_is_protocol", False) or issubclass(value, BaseException):
                continue
            yield f"{package}.{name}", value, None
            for method, function in vars(value).items():
                plain = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
                if not method.startswith("_") and inspect.isfunction(plain):
                    owner = None if plain is not function else value
                    yield f"{package}.{name}.{method}", getattr(value, method), owner
        elif inspect.isroutine(value):
            yield f"{package}.{name}", value, None


def left_out(name: str) -> bool:
    """Whether it is, or the class that it is of."""
    return name in LEFT_OUT or name.rpartition(".")[0] in LEFT_OUT


def finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(finite, value))
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or (value == value and abs(value) != float("inf"))


def has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(torch.isnan(value).any())
    if isinstance(value, (tuple, list)):
        return any(map(has_nan, value))
    return isinstance(value, float) and value != value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, str, bytes)):
        return bool(a == b)
    return True


def once(target: Target, values: Values) -> None:
    name, fn, owner = target
    if owner is not None:
        fn = getattr(values.make(owner), fn.__name__)
    arguments = values.call(fn)
    before = {key: copy.deepcopy(value) if plain(value) else None for key, value in arguments.items()}
    try:
        result = fn(**arguments)
        if inspect.isgenerator(result):
            result = drive(result)
    except (ValueError, TypeError, OSError) as error:
        assert str(error), "a refusal says why"
        assert not isinstance(error, TypeError) or "NoneType" not in str(error) or "must" in str(error), error
        return
    except Exception as error:
        error.add_note(f"of {arguments}")
        raise
    if all(map(finite, arguments.values())) and name not in UNWRITTEN:
        assert not has_nan(result), f"NaN of {arguments}"
    for key, value in arguments.items():
        assert before[key] is None or same(before[key], value), f"`{key}` was written to"


def plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(plain, value))
    return isinstance(value, (Tensor, int, float, str, bytes))


def drive(generator: Any) -> Any:
    """What comes of steps, or the items of another generator."""
    items = []
    try:
        item = next(generator)
        while len(items) < 1000:
            items.append(item)
            item = generator.send(item.wait()) if hasattr(item, "wait") else next(generator)
    except StopIteration as stop:
        return stop.value if stop.value is not None else items
    return items


def examples_of(target: Target, world: dict[Any, Any], folder: Path) -> Callable[[], None]:
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def examples(data: st.DataObject) -> None:
        try:
            with suppress(Never):
                once(target, Values(data.draw, world, folder))
        except Unknown as error:
            raise AssertionError(f"no values: {error}") from None

    return examples


def where(error: BaseException) -> str:
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "/seqpar/" in each.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def fuzz(rank: int, p: int, package: str, folder: Path, seconds: float, only: str = "") -> list[str]:
    """What goes wrong, by target."""
    mesh = comm.init_mesh(1, 1, "cpu")
    world = {
        comm.ProcessGroup: comm.groups(mesh).flat,
        comm.DeviceMesh: mesh,
        comm.Groups: comm.groups(mesh),
        Policy: StallFree(4),
        RaggedBatch: RaggedBatch.prefill([3, 1]),
    }
    (folder / "garbage").write_bytes(b"\x80\x04garbage")
    wrong = []
    listed = [each for each in targets(package) if not left_out(each[0]) and only in each[0]]
    for number, target in enumerate(listed):
        examples = examples_of(target, world, folder)
        end = time.monotonic() + seconds / len(listed)
        draw = number
        with own_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                while True:
                    seed(draw)(examples)()
                    draw = time.monotonic_ns()
                    if time.monotonic() >= end:
                        break
            except Exception as error:
                notes = "".join(getattr(error, "__notes__", ()))[:200]
                wrong.append(f"{target[0]}: {type(error).__name__}: {str(error)[:200]} {notes} at {where(error)}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_a_result_or_a_refusal(package: str, tmp_path: Path) -> None:
    seconds = SECONDS / len(PACKAGES)
    (wrong,) = run_ranks(1, fuzz, package, tmp_path, seconds, timeout_s=60.0 + 2 * seconds)
    assert not wrong, "\n".join(wrong)


def test_what_is_left_out_is_there() -> None:
    names = {name for package in PACKAGES for name, _, _ in targets(package)}
    assert names >= LEFT_OUT.keys() | UNWRITTEN
