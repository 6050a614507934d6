"""The machine at hand as hardware: parts add up to layers that were timed, links to what they take, files to it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from seqpar import comm
from seqpar.partition import Interleave, Layout
from seqpar.plan import (
    HARDWARE,
    Around,
    Curve,
    Grid,
    Hardware,
    Model,
    ModelShape,
    Operators,
    Options,
    Product,
    Slot,
    Workload,
    best,
    calibrate,
    cost,
    makespan,
)
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

MODEL = Model(ModelShape(16, 2, 4, 2, 4, 24), 32)
FULL = Options(weight_itemsize=4, kv_itemsize=4, itemsize=4)
ALPHA, RATE = 1e-3, 1e6
OUTSIDE = ("ends", "head", "engine", "embedding", "rows", "logits")


class Clock:
    """Seconds that only transfers take."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def made_up(segments: list[float]) -> list[float]:
    """As many, of other lengths each."""
    return [0.01 * (1 + at % 5) for at in range(len(segments))]


def measured(mesh: comm.DeviceMesh) -> tuple[Hardware, list[tuple[int, int]]]:
    """Products take a tenth of a millisecond each, and what lies between collectives what `made_up` says."""
    clock = Clock()
    link = comm.SimulatedLink(ALPHA, RATE, clock=clock.read, sleep=clock.sleep)
    from importlib import import_module

    module = import_module("seqpar.plan.calibrate")
    driven: Callable[..., list[float]] = module._driven
    told: list[tuple[int, int]] = []
    with (
        patch.object(module, "_driven", lambda made, timer: made_up(driven(made, timer))),
        patch.object(module._Timer, "seconds", lambda timer, work: work() is not None and 1e-4),
    ):
        found = calibrate(
            mesh,
            model=MODEL,
            tokens=(1, 8),
            decodes=(1, 2),
            rounds=1,
            link=link,
            progress=lambda *counts: told.append(counts),
        )
    return found, told


@cache
def on(p: int) -> list[Any]:
    """What all ranks say."""
    return run_mesh((1, p), measured)


@pytest.mark.parametrize("p", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_add_up_to_the_layers_that_were_timed(p: int) -> None:
    (hardware, told), *others = on(p)
    assert all(other[0] == hardware for other in others)
    layouts = [each.layout for each in hardware.accelerator.operators.around]
    assert layouts == [Layout(tp, d // tp) for d in (1, 2, 4)[: p.bit_length()] for tp in (1, 2, 4) if d % tp == 0]
    assert told[-1] == (3 + len(layouts),) * 2
    for layout in layouts:
        launches = 2 * ((layout.tp > 1) + (layout.sp > 1)) * MODEL.num_layers
        whole = sum(made_up([0.0] * (launches + 1)))
        for tokens in (1, 8):
            found = cost(MODEL, hardware, layout, [tokens], options=FULL)
            inner = [part for part in found.parts if part.name not in OUTSIDE]
            assert sum(part.seconds for part in inner if part.kind != "link") == pytest.approx(whole)
        behind = cost(MODEL, hardware, layout, [4], [4], options=FULL)
        assert sum(part.seconds for part in behind.parts if part.kind != "link") > 0


def test_links_take_what_they_take() -> None:
    """A sum of two ranks sends all of it at once; an exchange half of what a rank holds."""
    hardware = on(2)[0][0]
    for size in (1 << 12, 1 << 20):
        assert hardware.all_reduce_s(size, 2) == pytest.approx(ALPHA + size / RATE)
        assert hardware.pass_s(size, 2) == pytest.approx(ALPHA + size / RATE)
    (fabric,) = hardware.tiers[0].fabrics
    assert (fabric.alpha_s, fabric.bytes_per_s) == pytest.approx((ALPHA + 1024 / RATE, RATE))
    step = cost(MODEL, hardware, (1, 2), [8], options=FULL)
    heads = 4 * 4 * 4  # half of the tokens, the four heads that a rank hands over in, dim, bytes
    assert sum(part.seconds for part in step.parts if part.name == "exchange in") == pytest.approx(
        MODEL.num_layers * (ALPHA + 4 * 4 * 4 * 4 / RATE)
    ), heads
    with pytest.raises(ValueError, match="`layout` must have at most the 2 ranks"):
        cost(MODEL, hardware, (1, 4), [8], options=FULL)


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    hardware = on(2)[0][0]
    for each in (hardware, HARDWARE["a100"], HARDWARE["4090"]):
        each.save(tmp_path / "here.json")
        assert Hardware.load(tmp_path / "here.json") == each
    with own_errors():
        found = best(MODEL, hardware, Workload(8, 2), "latency", ranks=2, options=FULL, budgets=(8,))
    assert found.chosen.latency_s > 0
    content = json.loads((tmp_path / "here.json").read_text())
    content["accelerator"]["flops"] = -1.0
    (tmp_path / "here.json").write_text(json.dumps(content))
    for name, text in (("here.json", "`flops`, `hbm_bytes_per_s` and `sms` must be positive"), ("none", "No such")):
        with own_errors(), pytest.raises((ValueError, OSError), match=text):
            Hardware.load(tmp_path / name)


LINE = Curve((1, 101), (1.0, 101.0))
NONE = Curve((1,), (0.0,))
OPERATORS = Operators(
    (Product(4, 2, LINE), Product(40, 20, Curve((1, 101), (10.0, 1010.0)))),
    prompts=LINE,
    behind=Curve((1, 101), (2.0, 202.0)),
    decode_s=0.5,
    key_s=0.25,
    around=(
        Around(Layout(1, 1), (LINE,) * 4, LINE),
        Around(Layout(1, 4), (Curve((1, 101), (3.0, 303.0)),) * 4, NONE),
    ),
    width=16,
    itemsize=4,
)


def test_operators_are_told_by_the_nearest() -> None:
    assert OPERATORS.product_s(3, 4, 2) == 3.0 and OPERATORS.product_s(3, 8, 2) == 6.0
    assert OPERATORS.product_s(3, 44, 22) == pytest.approx(30.0 * 44 * 22 / 800)
    assert OPERATORS.prompts_s(7.0, cached=False) == 7.0 and OPERATORS.prompts_s(7.0, cached=True) == 14.0
    assert OPERATORS.decodes_s(3, 8.0) == 1.5 + 2.0
    assert OPERATORS.around_s(Layout(1, 1), 5, 16) == (5.0,) * 4
    assert OPERATORS.around_s(Layout(1, 1), 5, 32) == (10.0,) * 4
    assert OPERATORS.around_s(Layout(1, 8), 16, 16) == pytest.approx(
        (24.0,) * 4
    )  # 2 rows a rank, as 8 tokens of 4 have
    assert OPERATORS.ends_s(Layout(2, 1), 5, 16) == 5.0, "the nearest splits no tokens"


def test_a_step_is_made_of_them() -> None:
    """One layer of a model whose products are those two, on one rank: by hand."""
    device = replace(HARDWARE["a100"].accelerator, operators=OPERATORS)
    hardware = replace(HARDWARE["a100"], accelerator=device)
    model = Model(ModelShape(16, 1, 4, 2, 4, 24), 32)
    shapes = ((32, 16), (16, 16), (48, 16), (16, 24))
    products = sum(OPERATORS.product_s(6, *shape) for shape in shapes)
    found = cost(model, hardware, Grid(), [6], [10], options=replace(FULL, overhead_s=0.125))
    pairs = 6 * 10 + 21
    head = OPERATORS.product_s(1, 32, 16)
    assert found.total_s == pytest.approx(products + 2 * pairs * 16 + 4 * 6.0 + 6.0 + head + 0.125)
    decode = cost(model, hardware, Grid(), [1, 1], [10, 20], options=FULL)
    (attention,) = (part.seconds for part in decode.parts if part.name == "attention, decodes")
    assert attention == pytest.approx(2 * 0.5 + 0.25 * (11 + 21) * 16)


def test_chunks_of_a_measured_step_take_turns() -> None:
    """A cut pays its launches twice, and the later chunk attends behind the earlier one."""
    hardware = on(2)[0][0]
    cut = replace(FULL, overlap=Interleave(cuts=(4,), min_tokens=2))
    whole, halves = (cost(MODEL, hardware, (2, 1), [8], options=each) for each in (FULL, cut))
    outside = sum(part.seconds for part in halves.parts if part.name in OUTSIDE)
    operators = hardware.accelerator.operators
    one = cost(MODEL, hardware, (2, 1), [4], options=FULL)
    layer_s = sum(part.seconds for part in one.parts if part.kind != "link" and part.name not in OUTSIDE)
    assert halves.total_s - outside > 1.5 * layer_s and operators is not None
    assert makespan([[Slot(1.0, 0.5)]]).total_s == 1.5 and halves.hidden_s < whole.total_s


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(OPERATORS, products=()), "`products` and `around` must not be empty, of 4 slots each, got 0"),
        (
            lambda: replace(OPERATORS, around=(Around(Layout(1, 1), (LINE,), LINE),)),
            r"of 4 slots each, got 2 and \[1\]",
        ),
        (lambda: replace(OPERATORS, width=0), "sizes must be at least 1 and seconds finite and >= 0, got 0"),
        (
            lambda: replace(OPERATORS, key_s=inf),
            "sizes must be at least 1 and seconds finite and >= 0, got 2, 0.5 and inf",
        ),
        (lambda: Options(itemsize=1), "`weight_itemsize` and `kv_itemsize` must be 1, 2 or 4 and `itemsize` 2 or 4"),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[[], Any], message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message):
        make()


def refusals(mesh: comm.DeviceMesh) -> None:
    for text, options in {
        r"`tokens` must be at least 1 and increasing, got \[8, 8\]": {"tokens": (8, 8)},
        r"`decodes` must be at least 1 and increasing, got \[0\]": {"decodes": (0,)},
        "`rounds` and `layers` must be at least 1, got 0 and 2": {"rounds": 0},
    }.items():
        with own_errors(), pytest.raises(ValueError, match=text):
            calibrate(mesh, **options)  # type: ignore[arg-type]


def test_refusals() -> None:
    run_mesh((1, 1), refusals)
