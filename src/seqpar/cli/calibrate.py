"""`torchrun -m seqpar calibrate`: seconds of a step under every layout, measured on the ranks at hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from seqpar import comm, plan
from seqpar.comm import Groups
from seqpar.plan import ModelShape, StepCosts
from seqpar.plan.calibrate_layers import random_layer

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Measure, print on rank 0, write."""
    if list(options.tokens) != sorted(set(options.tokens)):
        raise ValueError(f"`--tokens` must increase, got {' '.join(map(str, options.tokens))}")
    model = plan.Model.from_config(options.model)
    if model.moe_layers:
        raise ValueError("`--model` must be dense, got a mixture of experts; `shift='auto'` measures the loaded model")
    if options.hardware is not None and options.out is not None:
        raise ValueError("`--out` and `--hardware` must be given one at a time, got both; each measures something else")
    torch.set_num_threads(1)
    mesh = comm.init_mesh(tp=options.tp, sp=options.sp, device=options.device)
    groups = comm.groups(mesh)
    if options.hardware is not None:
        _measure_hardware(options, model, mesh, groups)
        return 0
    costs = _measure(options, model.shape, groups, mesh.device_type)
    if groups.flat.rank() == 0:
        print(costs.to_json() if options.json else plan.shift(costs).explain())
        if options.out is not None:
            costs.save(options.out)
    return 0


def _measure_hardware(options: argparse.Namespace, model: plan.Model, mesh: comm.DeviceMesh, groups: Groups) -> None:
    """Operators and links, to a file and for people."""
    found = plan.calibrate(
        mesh,
        model=model,
        tokens=tuple(options.tokens),
        rounds=options.rounds,
        layers=options.layers,
        dtype=getattr(torch, options.dtype),
        progress=_teller(groups),
    )
    if groups.flat.rank() == 0:
        found.save(options.hardware)
        print(options.hardware.read_text() if options.json else found.explain())


def _teller(groups: Groups) -> Callable[[int, int], None]:
    """A line on rank 0, redrawn."""

    def tell(done: int, total: int) -> None:
        if groups.flat.rank() == 0 and sys.stderr.isatty():
            print(f"\r{done}/{total} measurements\033[K", end="" if done < total else "\n", file=sys.stderr)

    return tell


def _measure(options: argparse.Namespace, shape: ModelShape, groups: Groups, device: str) -> StepCosts:
    """Steps of the whole stack under every layout that the stored one reaches."""
    torch.manual_seed(0)
    made = {"device": device, "dtype": getattr(torch, options.dtype)}
    stack = [random_layer(shape, groups, index, **made) for index in range(options.layers)]
    every = comm.layout_groups(groups)
    for layer in stack:
        for layout, others in every.items():
            if layout != groups.layout:
                layer.add_layout(layout, groups=others)

    return plan.calibrate_layouts(
        stack,
        layouts=list(every),
        group=groups.flat,
        num_layers=shape.num_layers,
        tokens=tuple(options.tokens),
        rounds=options.rounds,
        progress=_teller(groups),
    )
