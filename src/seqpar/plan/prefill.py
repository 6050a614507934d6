"""Costs of a layer from its sizes and a machine's rates: a prediction where `calibrate_layers` has nothing to measure.

A roofline under tensor parallelism. Matrix products run at a share of the peak, or, where the accelerator has a tile,
in whole waves of tiles over its processors; attention at a share of its own; norms and the activation at the memory
rate. What a kernel repeats for every chunk (launch, the last wave) is what makes cutting cost something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from seqpar.kernels.quantize import Wire, check_wire, encoded_width
from seqpar.plan.costs import Curve, LayerCosts, SlotCosts
from seqpar.plan.hardware import Accelerator, Machine

__all__ = ["ModelShape", "prefill_costs"]

_HALF = 2  # bytes
_NORM_PASSES = 4  # of the activations through memory: the sum and the residual in, the residual and the norm out
_KERNELS = (5, 3)  # qkv, rotary, append, attention, o; gate and up, activation, down


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-family decoder.

    Args:
        hidden_size: M.
        num_layers: L.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        intermediate_size: F.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError(f"sizes of a model must be at least 1, got {self}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The numbers of a Hugging Face `config.json`.

        Raises:
            ValueError: one of them is missing.
        """
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return cls(
                hidden,
                int(config["num_hidden_layers"]),
                heads,
                int(config.get("num_key_value_heads") or heads),
                int(config.get("head_dim") or hidden // heads),
                int(config["intermediate_size"]),
            )
        except KeyError as missing:
            raise ValueError(
                f"`config` must have the sizes of a Llama-family model, got none named {missing}"
            ) from None

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def prefill_costs(
    shape: ModelShape, machine: Machine, *, wire: Wire | None = None, norms: bool = True, most: int = 1 << 17
) -> LayerCosts:
    """Costs of a layer under tensor parallelism over all ranks of a machine, in half precision.

    Args:
        shape: of the model.
        machine: see `MACHINES`.
        wire: the format that sums travel in; quantising itself is not charged.
        norms: charge the norms, which a collective that is fused with them does not leave to the compute.
        most: tokens up to which waves of tiles are told apart.

    Raises:
        ValueError: an unknown format.
    """
    check_wire(wire)
    device, fabric = machine.accelerator, machine.fabric
    p, m, f = fabric.ranks, shape.hidden_size, shape.intermediate_size
    heads = shape.num_heads * shape.head_dim
    products = (((shape.qkv_size // p, m), (m, heads // p)), ((2 * f // p, m), (m, f // p)))
    passes = (2 * shape.qkv_size // p, 3 * f // p)  # elements a token: rotary and append; activation
    row = m * _HALF if wire is None else encoded_width(m, wire)

    def compute(tokens: int, half: int) -> float:
        memory = passes[half] * (device.tile is not None) + (_NORM_PASSES * m if norms else 0)
        work = sum(_product_s(device, tokens, *product) for product in products[half])
        return work + memory * _HALF * tokens / device.hbm_bytes_per_s + _KERNELS[half] * device.kernel_s

    sizes = (1, *range(device.tile[0], most + 1, device.tile[0])) if device.tile else (0, most)
    sends = Curve.line(fabric.all_reduce_s(0), fabric.all_reduce_s(row) - fabric.all_reduce_s(0))
    per_pair = 4 * heads / p / (device.flops * device.attention_efficiency)
    attention, mlp = (Curve(sizes, tuple(compute(n, half) for n in sizes)) for half in (0, 1))
    comm = sends if p > 1 else None
    slots = (SlotCosts(attention, comm, per_pair), SlotCosts(mlp, comm))
    append = _only_qkv(device, products[0][0], sizes)
    source = f"predicted for {p} x {device.name}{'' if wire is None else f', {wire}'}"
    return LayerCosts(slots, contention=machine.contention, last=(SlotCosts(append),), source=source)


def _only_qkv(device: Accelerator, product: tuple[int, int], sizes: tuple[int, ...]) -> Curve:
    """What a last layer computes for tokens whose output nobody wants."""
    return Curve(sizes, tuple(_product_s(device, n, *product) + device.kernel_s for n in sizes))


def _product_s(device: Accelerator, rows: int, columns: int, inner: int) -> float:
    """Seconds of a matrix product [rows, inner] x [inner, columns] on one rank."""
    rate = device.flops * device.gemm_efficiency
    if device.tile is None:
        return 2 * rows * columns * inner / rate
    tall, wide = device.tile
    waves = ceil(ceil(rows / tall) * ceil(columns / wide) / device.sms)
    return waves * device.sms * 2 * tall * wide * inner / rate
