"""`torchrun -m seqpar calibrate`: seconds of a step under every layout, measured on the ranks at hand."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from seqpar import comm, layers, plan
from seqpar.comm import Groups
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import HeadMap
from seqpar.plan import ModelShape, StepCosts

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Measure, print on rank 0, write."""
    if list(options.tokens) != sorted(set(options.tokens)):
        raise ValueError(f"`--tokens` must increase, got {' '.join(map(str, options.tokens))}")
    model = plan.Model.from_config(options.model)
    if model.moe_layers:
        raise ValueError("`--model` must be dense, got a mixture of experts; `shift='auto'` measures the loaded model")
    torch.set_num_threads(1)
    mesh = comm.init_mesh(tp=options.tp, sp=options.sp, device=options.device)
    groups = comm.groups(mesh)
    costs = _measure(options, model.shape, groups, mesh.device_type)
    if groups.flat.rank() == 0:
        print(costs.to_json() if options.json else plan.shift(costs).explain())
        if options.out is not None:
            costs.save(options.out)
    return 0


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

    def tell(done: int, total: int) -> None:
        if groups.flat.rank() == 0 and sys.stderr.isatty():
            print(f"\r{done}/{total} measurements\033[K", end="" if done < total else "\n", file=sys.stderr)

    return plan.calibrate_layouts(
        stack,
        layouts=list(every),
        group=groups.flat,
        num_layers=shape.num_layers,
        tokens=tuple(options.tokens),
        rounds=options.rounds,
        progress=tell,
    )


def random_layer(shape: ModelShape, groups: Groups, index: int, **made: Any) -> ParallelDecoderLayer:
    """This rank's slices of a decoder layer of those sizes, with random weights.

    Args:
        shape: of the model.
        groups: the ranks.
        index: of the layer.
        made: device and dtype of the weights.
    """
    m, d = shape.hidden_size, shape.head_dim
    heads = HeadMap(shape.num_heads, shape.num_kv_heads, *groups.layout)
    qkv = layers.QKVParallelLinear(m, heads, d, group=groups.tp, **made)
    core = layers.UlyssesAttention(heads, d, group=groups.sp, tp_rank=groups.tp.rank(), layer_index=index)
    width = shape.num_heads * d
    out = layers.RowParallelLinear(width, m, group=groups.tp, sp=groups.layout.sp, bias=False, unit=d, **made)
    mlp = layers.ParallelMLP(m, shape.intermediate_size, group=groups.tp, sp=groups.layout.sp, **made)
    norms = [layers.RMSNorm(m, **made) for _ in range(2)]
    layer = layers.ParallelDecoderLayer(layers.ParallelAttention(qkv, core, out), mlp, *norms, groups=groups)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=m**-0.5)
    return layer
