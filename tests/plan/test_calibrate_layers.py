"""Costs measured on real ranks: what a link costs, what a slow rank does to the others, that all ranks agree."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch

from seqpar import comm
from seqpar.layers import ParallelDecoderLayer, name_modules
from seqpar.partition import HeadMap, Layout
from seqpar.plan import LayerCosts, calibrate_layers, calibrate_layouts, overlap, shift
from tests.kernels.own_errors import own_errors
from tests.layers.reference import DecoderLayer
from tests.ranks import run_mesh


def stack(
    mesh: comm.DeviceMesh, *, sequence_sharded: bool = False, windows: tuple[int | None, ...] = (None, None)
) -> Any:
    groups = comm.groups(mesh)
    heads = HeadMap(4, 2, *groups.layout)
    torch.manual_seed(0)
    layers = [
        ParallelDecoderLayer.from_module(
            DecoderLayer(16, 4, 2, 4, 24),
            groups=groups,
            heads=heads,
            layer_index=index,
            window=window,
            sequence_sharded=sequence_sharded,
        )
        for index, window in enumerate(windows)
    ]
    return layers, groups


def shapes(mesh: comm.DeviceMesh, sequence_sharded: bool, window: int | None) -> LayerCosts:
    layers, groups = stack(mesh, sequence_sharded=sequence_sharded, windows=(window, window))
    told: list[tuple[int, int]] = []
    with comm.record() as sent:
        costs = calibrate_layers(
            layers, group=groups.flat, tokens=(8, 20), rounds=2, progress=lambda *counts: told.append(counts)
        )
    probes = 5  # two sizes, one behind a prefix, two of a last layer
    assert told == [(i, 3 * probes) for i in range(1, 3 * probes + 1)] and costs.window == window
    gathers = 3  # whether there is a last layer to measure, and the results
    assert sent.by_label().get("calibrate", comm.Count()).calls == (
        3 * probes + gathers if groups.flat.size() > 1 else 0
    )
    assert all(slot.compute.tokens == (8, 20) for slot in costs.slots)
    assert sum(slot.per_pair_s > 0 for slot in costs.slots) <= 1
    return costs


@pytest.mark.parametrize(
    ("layout", "sharded", "sends"),
    [((1, 1), False, 0), ((2, 1), False, 2), ((1, 2), False, 2), ((2, 2), False, 4), ((2, 1), True, 4)],
    ids=str,
)
def test_a_slot_for_each_collective_and_the_same_numbers_on_all_ranks(
    layout: tuple[int, int], sharded: bool, sends: int
) -> None:
    costs = run_mesh(layout, shapes, sharded, 5 if sharded else None)
    assert all(other == costs[0] for other in costs)
    assert [slot.comm is not None for slot in costs[0].slots] == [True] * sends + [False]
    assert overlap(costs[0], 20, num_layers=3).predicted_s > 0
    # Of a last layer without wanted rows all that travels is its input when that is sharded, and QKV over `sp`.
    assert [slot.comm is not None for slot in costs[0].last] == [True] * (sharded + (layout[1] > 1)) + [False]
    assert overlap(costs[0], 20, num_layers=3, last_rows=2).predicted_s > 0


def on_a_link(mesh: comm.DeviceMesh) -> None:
    layers, groups = stack(mesh)
    link = comm.SimulatedLink(alpha_s=0.01, bytes_per_s=2e5)
    with link.on(groups.tp):
        costs = calibrate_layers(layers[:1], group=groups.flat, tokens=(32, 64), rounds=3)
    assert "simulated link" in costs.source
    for slot in costs.slots[:2]:
        for tokens in (32, 64):
            seconds = 0.01 + tokens * 16 * 4 / 2e5
            assert slot.comm is not None and seconds <= slot.comm(tokens) <= 3 * seconds


def test_a_simulated_link_is_what_is_measured() -> None:
    run_mesh((2, 1), on_a_link)


def skewed(mesh: comm.DeviceMesh) -> LayerCosts:
    layers, groups = stack(mesh)
    if groups.flat.rank() == 1:
        for layer in layers:
            layer.post_attention_layernorm.register_forward_hook(lambda *_: time.sleep(0.08))
    return calibrate_layers(layers, group=groups.flat, tokens=(8, 16), rounds=3)


def test_a_slow_rank_is_computing_and_the_others_are_not_communicating() -> None:
    costs = run_mesh((2, 1), skewed)
    assert costs[0] == costs[1]
    mlp = costs[0].slots[1]
    assert mlp.compute(8) >= 0.08
    assert mlp.comm is not None and mlp.comm(8) < 0.04


def two_shot(mesh: comm.DeviceMesh, named: bool) -> LayerCosts:
    """Three ranks, a limit of a third of a megabyte: 64 bytes a token, one step below 5461 tokens and two above."""
    layers, groups = stack(mesh)
    if named:
        name_modules(torch.nn.ModuleList(layers))
    return calibrate_layers(layers[:1], group=groups.flat, tokens=(64, 6000), rounds=1)


def test_an_all_reduce_may_take_more_steps_at_one_size_than_at_another() -> None:
    costs = run_mesh((3, 1), two_shot, True, deterministic=True)[0]
    assert len(costs.slots) == 3
    with pytest.raises(Exception, match=r"`layers` must launch the same collectives at every size.*got \[2, 4\]"):
        run_mesh((3, 1), two_shot, False, deterministic=True)


def refusals(mesh: comm.DeviceMesh) -> None:
    layers, groups = stack(mesh, windows=(None, 3))
    for text, options in {
        "`layers` and `rounds` must be at least 1, got 1 and 0": {"layers": layers[:1], "rounds": 0},
        r"`tokens` must be at least 1 and increasing, got \[4, 4\]": {"layers": layers[:1], "tokens": (4, 4)},
        r"`layers` must attend to windows of one size, got \['3', 'None'\]": {"layers": layers},
    }.items():
        with own_errors(), pytest.raises(ValueError, match=text):
            calibrate_layers(group=groups.flat, **options)


def test_refusals() -> None:
    run_mesh((1, 1), refusals)


def made_up(bench: object, tokens: int, layout: Layout) -> float:
    """Seconds of two layers."""
    return tokens * 1e-3 if layout.tp == 2 else 20.5e-3


def in_layouts(mesh: comm.DeviceMesh) -> Any:
    """On a link that takes a tenth of a millisecond for a token's activations; heads take a fifth of that."""
    layers, groups = stack(mesh)
    layouts = comm.layout_groups(groups)
    for layout, other in layouts.items():
        for layer in layers:
            layer.add_layout(layout, groups=other)
    told: list[tuple[int, int]] = []
    link = comm.SimulatedLink(alpha_s=0.0, bytes_per_s=16 * 4 * 1e4)
    with link.on(groups.flat):
        costs = calibrate_layouts(
            layers,
            layouts=list(layouts),
            group=groups.flat,
            num_layers=6,
            tokens=(1, 24, 80),
            rounds=1,
            refine=0,
            progress=lambda *counts: told.append(counts),
        )
        assert told[-1] == (24, 24) and len(told) == 24  # two layouts of 1 + 4, 1 + 4 and 1 + 1
    told.clear()
    with patch("seqpar.plan.calibrate_layers.Bench.time", made_up):
        finer = calibrate_layouts(
            layers,
            layouts=list(layouts),
            group=groups.flat,
            num_layers=6,
            tokens=(1, 80),
            progress=lambda *counts: told.append(counts),
        )
    assert told[-1][0] == told[-1][1] == len(told) == 86  # two layouts of 13 and 4, then of 13, then of 13
    with own_errors():
        for wrong in ([], [Layout(1, 1)]):
            with pytest.raises(ValueError, match="`layouts` must be some that were added to the layers, got"):
                calibrate_layouts(layers, layouts=wrong, group=groups.flat, num_layers=2)
        with pytest.raises(ValueError, match="`refine` must be at least 0, got -1"):
            calibrate_layouts(layers, layouts=list(layouts), group=groups.flat, num_layers=2, refine=-1)
    return costs, finer


def test_layouts_are_timed_alike_on_all_ranks() -> None:
    (first, finer), second = run_mesh((1, 2), in_layouts)
    assert (first, finer) == second and sorted(first.curves) == sorted(finer.curves) == [(1, 2), (2, 1)]
    assert {curve.tokens for curve in finer.curves.values()} == {(1, 20, 40, 80)}  # they cross at 20
    assert finer.curves[Layout(2, 1)].seconds == pytest.approx((3e-3, 60e-3, 120e-3, 240e-3))
    tensor = first.curves[Layout(2, 1)]
    assert tensor.tokens == (1, 24, 80)
    assert all(tensor(n) >= n * 1.2e-3 for n in tensor.tokens)  # six layers of two sums
    assert shift(first).layout_of(80) == (1, 2)
