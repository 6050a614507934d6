"""Seconds of a step under any layout, from a model's sizes and a machine's rates: where there is nothing to time.

A roofline of each product: a rank reads its share of the weights, a tp-th, and multiplies its share of the tokens, an
sp-th, and takes the longer of both. So below some number of tokens a step costs what reading the weights does, sp times
as much as under pure tensor parallelism; above it products cost the same under every layout. Attention does too, since
ranks have the same heads; norms are over an sp-th of the tokens on all tp ranks. Collectives take a latency, and the
busiest rank's bytes (`layer_volumes`) at the fabric's rate. Nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from seqpar.partition import HeadMap, Layout
from seqpar.plan.costs import Curve
from seqpar.plan.hardware import Accelerator, Fabric, Machine
from seqpar.plan.model import StepWork
from seqpar.plan.prefill import ModelShape
from seqpar.plan.shift import StepCosts
from seqpar.plan.volumes import layer_volumes

__all__ = ["step_costs", "step_seconds"]

_HALF = 2  # bytes of activations and of the cache
_NORM_PASSES = 8  # of the activations through memory: around each half the sum, the residual twice, the norm
_SIZES = tuple(1 << i for i in range(17))


def step_seconds(
    shape: ModelShape, machine: Machine, layout: Layout, work: StepWork, *, weight_itemsize: int = 2
) -> float:
    """The layers of a model over one step, without embedding and head.

    Args:
        shape: of the model.
        machine: see `MACHINES`; its memory's rate is taken to be reached.
        layout: of up to as many ranks as the machine has.
        work: of the step.
        weight_itemsize: bytes of a weight; products of one-byte weights run at twice the half-precision rate.
    """
    device = machine.accelerator
    heads = HeadMap(shape.num_heads, shape.num_kv_heads, *layout)
    rows = ceil(work.tokens / layout.sp)
    seconds = sum(
        _product_s(device, rows, elements / layout.tp, weight_itemsize)
        for elements in (
            shape.hidden_size * shape.qkv_size,
            shape.hidden_size * shape.num_heads * shape.head_dim,
            2 * shape.hidden_size * shape.intermediate_size,
            shape.hidden_size * shape.intermediate_size,
        )
    )
    row = _NORM_PASSES * shape.hidden_size + (2 * shape.qkv_size + 3 * shape.intermediate_size) / layout.tp
    seconds += rows * row * _HALF / device.hbm_bytes_per_s
    most_q, most_kv = (max(r.size for r in ranges) for ranges in (heads.q_ranges, heads.kv_ranges))
    seconds += 4 * work.pairs * most_q * shape.head_dim / (device.flops * device.attention_efficiency)
    seconds += 2 * work.cached * most_kv * shape.head_dim * _HALF / device.hbm_bytes_per_s
    return shape.num_layers * (seconds + _collectives_s(shape, machine.fabric, heads, work.tokens))


def step_costs(
    shape: ModelShape,
    machine: Machine,
    *,
    layouts: Sequence[Layout] | None = None,
    context: int = 0,
    weight_itemsize: int = 2,
    overhead_s: float = 0.0,
    sizes: Sequence[int] = _SIZES,
) -> StepCosts:
    """Costs of steps of any number of tokens, as `shift` takes them.

    Args:
        shape: of the model.
        machine: see `MACHINES`.
        layouts: to choose among; all that pure sequence parallelism reaches by default.
        context: keys that every token reads.
        weight_itemsize: bytes of a weight.
        overhead_s: of a step, beside its layers.
        sizes: numbers of tokens to predict, increasing.
    """
    curves = {
        layout: Curve(
            tuple(sizes),
            tuple(
                overhead_s
                + step_seconds(shape, machine, layout, StepWork(n, cached=n * context), weight_itemsize=weight_itemsize)
                for n in sizes
            ),
        )
        for layout in layouts or Layout(1, machine.fabric.ranks).reachable
    }
    return StepCosts(curves, f"predicted for {machine.fabric.ranks} x {machine.accelerator.name}")


def _product_s(device: Accelerator, rows: int, elements: float, itemsize: int) -> float:
    """A product with that many weights on one rank: the longer of reading them and of multiplying."""
    rate = device.flops * device.gemm_efficiency * _HALF / itemsize
    return max(elements * itemsize / device.hbm_bytes_per_s, 2 * rows * elements / rate)


def _collectives_s(shape: ModelShape, fabric: Fabric, heads: HeadMap, tokens: int) -> float:
    """Two all-to-alls over sp and two all-reduces over tp, where there are several ranks."""
    volumes = layer_volumes(
        heads.layout, tokens, heads, hidden_size=shape.hidden_size, head_dim=shape.head_dim, itemsize=_HALF
    )
    latency = 2 * (heads.tp > 1) * fabric.alpha_s + 2 * (heads.sp > 1) * fabric.exchange_alpha_s
    return latency + max(float(volume.total) for volume in volumes) / fabric.bytes_per_s
