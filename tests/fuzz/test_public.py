"""Every public function, constructor and method, called with values of its types: a result or a refusal.

A refusal is a ValueError or a TypeError, or an OSError of a file. A result of finite numbers is finite, and arguments
are as they were. What is drawn is fixed in the suite; `make fuzz` draws anew for an hour (`SEQPAR_FUZZ_SECONDS`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import seqpar
from seqpar import comm, layers
from seqpar.batching import Policy, StallFree
from seqpar.ragged import RaggedBatch
from tests.fuzz.values import Never, Unknown, Values
from tests.kernels.own_errors import own_errors
from tests.ranks import run_ranks

SECONDS = float(os.environ.get("SEQPAR_FUZZ_SECONDS", "0"))
PACKAGES = ("partition", "ragged", "batching", "kv", "kernels", "comm", "layers", "plan", "hf")
EXAMPLES = 4

_RECORD = "what a valid one gives is tested; `place_tokens` makes them"
_ORDER = "asked by schedules alone, for ranks and hops that there are"
_PLAN = "of `compaction.plan`, whose laws are tested"
_FLIGHT = "told by collectives in flight and by schedules, which have laws of their own"
_MODEL = "made or called by a model that `load` or `parallelize` has put together"
_BASE = "of a base class, which its subclasses define"
_TIMES = "times real layers, which takes its time"
_GIVEN = "runs modules that it was given"
_WRAPPERS = ("ParallelAttention", "ParallelDecoderLayer", "PipelineStage")
_CHECKED = "called by `CSAAttention`, which has checked what it hands over"
_MADE = "a record that layers make"
_CALLS = "takes somebody's function"
_LOOP = "needs a model; loops have state machines of their own"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("partition.Run.position", "partition.Run.below", "partition.gather_held"), _RECORD),
    **{
        f"partition.RingOrder.{name}": _ORDER
        for name in ("keys_at", "seen_at", "queries_at", "answered_at", "tiles", "visible")
    },
    **{f"kv.CompactionPlan.{name}": _PLAN for name in ("apply", "reorder")},
    **{f"batching.{name}": _LOOP for name in ("TemporalFusion", "PipelineFusion", "Generation", "Words")},
    **dict.fromkeys(("hf.AutoDecode.ships", "hf.AutoDecode.measure", "hf.AutoOverlap.cuts_of"), _MODEL),
    **dict.fromkeys(("hf.AutoShift.layout_of", "hf.LMHead", "hf.ParallelBackbone", "hf.Stage"), _MODEL),
    **{f"plan.{name}": _TIMES for name in ("calibrate", "calibrate_decode", "calibrate_layers", "calibrate_layouts")},
    **dict.fromkeys(("plan.ring_volumes", "plan.strided_volumes", "plan.usp_volumes"), _ORDER),
    **dict.fromkeys(("plan.simulate", "batching.Journal.text"), _CALLS),
    "kv.compaction.CompactionPlan": _PLAN,
    "hf.Parallelized.__init__": _MODEL,
    "hf.Parallelized.undo": "ends what the other calls need; its laws are tested",
    **dict.fromkeys(("comm.Handle", "comm.StepGraphs"), _FLIGHT),
    **{f"comm.SimulatedLink.{name}": _FLIGHT for name in ("book", "carry", "has_passed", "sleep_until", "stream")},
    **{f"comm.Trace.{name}": _FLIGHT for name in ("add", "begin", "end", "waiting")},
    **dict.fromkeys(("comm.call", "comm.on_shards", "comm.on_whole"), _CALLS),
    **{f"layers.ShardedModule.{name}": _BASE for name in ("gather_source", "load_source", "load_unsharded", "sources")},
    **dict.fromkeys(("layers.Source", "layers.CSAResult", "layers.Shard"), _MADE),
    **{f"layers.{name}.steps": _CHECKED for name in ("Certified", "Strided", "TopMass")},
    **{f"layers.{name}.{how}": _GIVEN for name in _WRAPPERS for how in ("steps", "forward")},
    "layers.OverlappedAttention.steps": _GIVEN,
    "layers.UlyssesAttention.prepare": "applies somebody's norm",
    **dict.fromkeys(("layers.CSAAttention.reads", "layers.Strided.cut", "layers.TopMass.cut"), _ORDER),
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
        if inspect.ismodule(value):
            yield from targets(f"{package}.{name}")
        elif uncalled(value):
            continue
        elif inspect.isclass(value):
            yield f"{package}.{name}", value, None
            for method, function in vars(value).items():
                plain = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
                if not method.startswith("_") and inspect.isfunction(plain):
                    owner = None if plain is not function else value
                    yield f"{package}.{name}.{method}", getattr(value, method), owner
        else:
            yield f"{package}.{name}", value, None


def left_out(name: str) -> bool:
    """Whether it is, or the class that it is of; of a class perhaps the constructor alone."""
    return not LEFT_OUT.keys().isdisjoint((name, name.rpartition(".")[0], f"{name}.__init__"))


def uncalled(value: Any) -> str:
    """Why a public name is none to call, if it is none."""
    if not inspect.isclass(value):
        return "" if inspect.isroutine(value) or inspect.ismodule(value) else "a value, or another name of a type"
    if issubclass(value, BaseException):
        return "raised"
    if getattr(value, "_is_protocol", False):
        return "written by others"
    return "" if value.__module__.startswith("seqpar.") else "PyTorch's"


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
    made = values.of(owner) if owner is not None else None
    if made is not None:
        fn = getattr(made, fn.__name__)
    arguments = values.call(fn)
    before = {key: copy.deepcopy(value) if plain(value) else None for key, value in arguments.items()}
    try:
        result = fn(**arguments)
        if inspect.isgenerator(result):
            result = drive(result)
        elif isinstance(result, comm.Handle):
            result = result.wait()
        elif isinstance(result, AbstractContextManager) and not isinstance(result, Tensor):
            with result:
                result = None
    except (ValueError, TypeError, OSError) as error:
        assert str(error) or name == "comm.agree", "a refusal says why"
        assert not isinstance(error, TypeError) or "NoneType" not in str(error) or "must" in str(error), error
        return
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename.endswith("torch/nn/modules/linear.py"):
            return  # somebody's module, which stands for a part of ours, refuses in its own words
        error.add_note(f"of {arguments}")
        raise
    if all(map(finite, arguments.values())) and name not in UNWRITTEN and not re.search(r"\b(nan|inf)\b", repr(made)):
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


def models(mesh: comm.DeviceMesh, folder: Path) -> dict[Any, Any]:
    """Values of Transformers' types: a model of its own, and one that is parallelized, in turns; a checkpoint."""
    from transformers import PreTrainedModel

    from seqpar import hf
    from tests.hf.tiny import tiny_model

    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
    plain, ours = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    swapped = hf.parallelize(ours, mesh)
    turns = itertools.cycle([lambda: copy.deepcopy(plain), lambda: ours])
    return {PreTrainedModel: lambda: next(turns)(), hf.Parallelized: swapped}


def fuzz(rank: int, p: int, package: str, folder: Path, seconds: float, only: str = "") -> list[str]:
    """What goes wrong, by target."""
    mesh = comm.init_mesh(1, 1, "cpu")
    world = {
        comm.ProcessGroup: comm.groups(mesh).flat,
        comm.DeviceMesh: mesh,
        comm.Groups: comm.groups(mesh),
        Policy: StallFree(4),
        RaggedBatch: RaggedBatch.prefill([3, 1]),
        layers.Policy: lambda: layers.TopMass(),
        nn.Module: lambda: nn.Linear(4, 4),
        nn.Linear: lambda: nn.Linear(4, 8),
        nn.Embedding: lambda: nn.Embedding(7, 4),
    }
    if package == "hf":
        world |= models(mesh, folder)
    (folder / "garbage").write_bytes(b"\x80\x04garbage")
    wrong = []
    listed = [each for each in targets(package) if not left_out(each[0]) and only in each[0]]
    for target in listed:
        examples = examples_of(target, world, folder)
        end = time.monotonic() + seconds / len(listed)
        draw = crc32(target[0].encode())  # of its name, so that a new one changes nothing for the others
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
    assert names >= {name.removesuffix(".__init__") for name in LEFT_OUT} | UNWRITTEN
    assert all(LEFT_OUT.values())


def test_every_public_name_is_called_or_has_a_reason() -> None:
    rooms = {name for name in seqpar.__all__ if inspect.ismodule(getattr(seqpar, name))}
    assert rooms == set(PACKAGES), "a new package is called, too"
    assert set(seqpar.__all__) - rooms == {"__version__", "init_mesh"} and seqpar.init_mesh is comm.init_mesh
    for package in PACKAGES:
        module = import_module(f"seqpar.{package}")
        called = {name.split(".")[1] for name, _, _ in targets(package)}
        for name in module.__all__:
            value = getattr(module, name)
            assert (name in called) != bool(uncalled(value)), f"{package}.{name}"
