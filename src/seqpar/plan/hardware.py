"""Machines that are not at hand: an accelerator, how many, and the fabric between them.

`MACHINES` are those of single published results; `HARDWARE` are accelerators with tiers of links, for any number of
ranks. Every number names its source, and whether it was published, fitted to something published, or assumed. None of
them is a measurement of ours; `calibrate` replaces them all by measurements of the machine at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, inf
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from seqpar.plan.costs import Curve, curve_of
from seqpar.plan.operators import Operators

__all__ = ["HARDWARE", "MACHINES", "NETWORKS", "Accelerator", "Fabric", "Hardware", "Machine", "Tier"]

Number: TypeAlias = int | float


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Args:
        name: for people.
        flops: dense half-precision rate with float32 accumulation, from the data sheet.
        hbm_bytes_per_s: memory rate, from the data sheet.
        sms: processors that work on one tile of a matrix product each.
        gemm_efficiency: share of `flops` that a large matrix product reaches.
        attention_efficiency: share of `flops` that causal attention reaches.
        tile: rows and columns of the tile of a product; None to leave out how tiles fill the processors.
        kernel_s: what every kernel takes beyond its work.
        source: of the efficiencies.
        memory_bytes: of the device; 0 where nobody asks.
        hbm_efficiency: share of the memory rate that is reached.
        fp8_flops: rate of 8-bit products, from the data sheet; twice `flops` by default, the same where there is no
            unit for them. Products of 4-byte numbers run at half of `flops`.
        operators: what was measured here; it stands in the place of all rates.
    """

    name: str
    flops: float
    hbm_bytes_per_s: float
    sms: int
    gemm_efficiency: float
    attention_efficiency: float
    tile: tuple[int, int] | None = None
    kernel_s: float = 0.0
    source: str = ""
    memory_bytes: float = 0.0
    hbm_efficiency: float = 1.0
    fp8_flops: float | None = None
    operators: Operators | None = None

    def __post_init__(self) -> None:
        for name in ("gemm_efficiency", "attention_efficiency", "hbm_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {getattr(self, name)}")
        if not (self.flops > 0 and self.hbm_bytes_per_s > 0 and self.sms >= 1 and self.kernel_s >= 0):
            raise ValueError(
                "`flops`, `hbm_bytes_per_s` and `sms` must be positive and `kernel_s` >= 0, got "
                f"{self.flops}, {self.hbm_bytes_per_s}, {self.sms}, {self.kernel_s}"
            )
        if not (self.memory_bytes >= 0 and (self.fp8_flops is None or self.fp8_flops > 0)):
            raise ValueError(
                f"`memory_bytes` must be >= 0 and `fp8_flops` positive, got {self.memory_bytes} and {self.fp8_flops}"
            )

    @property
    def memory_rate(self) -> float:
        """Bytes a second that are reached."""
        return self.hbm_bytes_per_s * self.hbm_efficiency

    def product_rate(self, itemsize: int) -> float:
        """Operations a second of large products whose weights have so many bytes."""
        low = 2 * self.flops if self.fp8_flops is None else self.fp8_flops
        return (low if itemsize == 1 else self.flops / 2 if itemsize == 4 else self.flops) * self.gemm_efficiency

    def multiply_s(self, rows: int, columns: Number, inner: Number, itemsize: int = 2, *, count: int = 1) -> float:
        """Seconds of `count` products [rows, inner] x [inner, columns] side by side, their weights at hand.

        In whole waves of tiles where there is a tile. Few rows take a lower tile, down to 16 rows, and where tiles are
        fewer than processors several share one along the inner dimension.
        """
        if self.tile is None:
            return count * 2 * rows * columns * inner / self.product_rate(itemsize)
        tall, wide = self.tile
        tall = min(tall, max(16, 1 << (rows - 1).bit_length()))
        tiles = count * ceil(rows / tall) * ceil(columns / wide)
        split = max(1, self.sms // tiles)
        waves = ceil(tiles * split / self.sms)
        return waves * self.sms * 2 * tall * wide * inner / split / self.product_rate(itemsize)

    def product_s(self, rows: int, columns: Number, inner: Number, itemsize: int = 2, *, count: int = 1) -> float:
        """The longer of multiplying and of reading the weights; or as measured."""
        if not rows or not count:
            return 0.0
        if self.operators is not None:
            return count * self.operators.product_s(rows, columns, inner)
        read = count * columns * inner * itemsize / self.memory_rate
        return max(read, self.multiply_s(rows, columns, inner, itemsize, count=count))


@dataclass(frozen=True)
class Fabric:
    """What an all-reduce over all ranks takes, and what it takes away from the compute beside it.

    Args:
        ranks: p.
        alpha_s: latency of one all-reduce.
        bytes_per_s: bus bandwidth: an all-reduce of n bytes takes alpha + 2 (p - 1) / p * n / this.
        comm_sms: processors that the collective's kernel occupies.
        source: of the numbers.
        all_to_all_alpha_s: latency of one all-to-all with what packs it; that of an all-reduce by default, infinite for
            an algorithm that only sums.
        sums: seconds of an all-reduce by its bytes, where they were measured, instead of latency and rate.
        passes: seconds of an exchange by the bytes that a rank sends, likewise.
    """

    ranks: int
    alpha_s: float
    bytes_per_s: float
    comm_sms: int = 0
    source: str = ""
    all_to_all_alpha_s: float | None = None
    sums: Curve | None = None
    passes: Curve | None = None

    def __post_init__(self) -> None:
        least = min(self.alpha_s, self.comm_sms, self.exchange_alpha_s)
        if self.ranks < 1 or not (self.bytes_per_s > 0 and least >= 0):
            raise ValueError(
                "`ranks` must be at least 1, `bytes_per_s` positive and the rest >= 0, got "
                f"{self.ranks}, {self.bytes_per_s}, {self.alpha_s}, {self.comm_sms}, {self.all_to_all_alpha_s}"
            )

    @property
    def exchange_alpha_s(self) -> float:
        """Latency of one all-to-all."""
        return self.alpha_s if self.all_to_all_alpha_s is None else self.all_to_all_alpha_s

    def all_reduce_s(self, num_bytes: Number) -> float:
        """Seconds of one all-reduce; nothing over one rank."""
        if self.ranks == 1:
            return 0.0
        if self.sums is not None:
            return self.sums(round(num_bytes))
        return self.alpha_s + 2 * (self.ranks - 1) / self.ranks * num_bytes / self.bytes_per_s

    def pass_s(self, sent_bytes: Number) -> float:
        """Seconds of an all-gather, reduce-scatter or all-to-all in which every rank sends so much."""
        if self.passes is not None:
            return self.passes(round(sent_bytes))
        return self.exchange_alpha_s + sent_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """Accelerators and the fabric that joins them."""

    accelerator: Accelerator
    fabric: Fabric

    @property
    def contention(self) -> float:
        """Share of the compute rate that a collective under way takes: its processors of all."""
        return min(0.99, self.fabric.comm_sms / self.accelerator.sms)


@dataclass(frozen=True)
class Tier:
    """What joins ranks up to some number: the links within a host, or the network between hosts.

    Args:
        name: for people.
        ranks: that it joins, all tiers within it included; None for any number.
        fabrics: for groups of several sizes, and several algorithms for one size, of which the faster one runs.
        message_s: latency of one message between two ranks.
        message_bytes_per_s: its rate.
    """

    name: str
    ranks: int | None
    fabrics: tuple[Fabric, ...]
    message_s: float
    message_bytes_per_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "fabrics", tuple(self.fabrics))
        if not self.fabrics or (self.ranks is not None and self.ranks < 1):
            raise ValueError(f"`fabrics` must not be empty and `ranks` at least 1, got {self.fabrics}, {self.ranks}")
        if not (self.message_s >= 0 and self.message_bytes_per_s > 0):
            raise ValueError(
                "`message_s` must be >= 0 and `message_bytes_per_s` positive, got "
                f"{self.message_s} and {self.message_bytes_per_s}"
            )

    def options(self, ranks: int) -> tuple[Fabric, ...]:
        """The algorithms for a group of so many ranks, each as measured for the nearest size that is no smaller."""
        found = self._of_ranks.get(ranks)
        if found is None:
            sizes = sorted({fabric.ranks for fabric in self.fabrics})
            size = next((size for size in sizes if size >= ranks), sizes[-1])
            found = tuple(replace(fabric, ranks=ranks) for fabric in self.fabrics if fabric.ranks == size)
            self._of_ranks[ranks] = found
        return found

    @cached_property
    def _of_ranks(self) -> dict[int, tuple[Fabric, ...]]:
        """What `options` has worked out."""
        return {}

    def best(self, num_bytes: Number, ranks: int) -> Fabric:
        """The algorithm that sums so many bytes the fastest."""
        return min(self.options(ranks), key=lambda fabric: fabric.all_reduce_s(num_bytes))

    def pass_s(self, sent_bytes: Number, ranks: int) -> float:
        """An all-gather, reduce-scatter or all-to-all in which every rank sends so much."""
        return min(fabric.pass_s(sent_bytes) for fabric in self.options(ranks))


@dataclass(frozen=True)
class Hardware:
    """An accelerator, and tiers of links from the nearest ranks outward.

    A group of ranks, each `stride` flat ranks from the next, spans the tiers that its extent crosses. Sums over several
    tiers go in three parts (within hosts, between them, within) or in one ring over the outer tier, whichever is
    faster; exchanges take the outer tier's time for what leaves the inner one.

    Args:
        name: for people.
        accelerator: every rank's.
        tiers: their `ranks` increasing, each a multiple of the one before; the last may be without end.

    Raises:
        ValueError: tiers that are not as said.
    """

    name: str
    accelerator: Accelerator
    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        ends = [tier.ranks for tier in self.tiers]
        pairs = pairwise(end for end in ends if end is not None)
        if not ends or None in ends[:-1] or any(b <= a or b % a for a, b in pairs):
            raise ValueError(f"`tiers` must join increasing multiples of ranks, only the last without end, got {ends}")

    @property
    def most_ranks(self) -> int | None:
        """Ranks that are joined; None for any number."""
        return self.tiers[-1].ranks

    @cached_property
    def host_ranks(self) -> int:
        """Ranks of the first tiers that are not the network."""
        return max((tier.ranks for tier in self.tiers if tier.ranks), default=1)

    def tier_of(self, extent: int) -> Tier:
        """The first tier that joins so many neighbouring ranks.

        Raises:
            ValueError: there is none.
        """
        for tier in self.tiers:
            if tier.ranks is None or tier.ranks >= extent:
                return tier
        raise ValueError(f"`ranks` must be at most {self.most_ranks} on {self.name}, got {extent}; give it a network")

    def _parts(self, ranks: int, stride: int) -> tuple[Tier, Tier | None, int]:
        """The tier that a group spans, the one within it, and how many of the group that one joins."""
        outer = self.tier_of((ranks - 1) * stride + 1)
        at = self.tiers.index(outer)
        inner = self.tiers[at - 1] if at else None
        near = max(1, (inner.ranks or 1) // stride) if inner else 1
        return outer, inner, min(near, ranks) if ranks % min(near, ranks) == 0 else 1

    def all_reduce_s(self, num_bytes: Number, ranks: int, stride: int = 1) -> float:
        """One sum over a group; nothing over one rank."""
        if ranks == 1:
            return 0.0
        outer, inner, near = self._parts(ranks, stride)
        flat = outer.best(num_bytes, ranks).all_reduce_s(num_bytes)
        if inner is None or near == 1:
            return flat
        far = ranks // near
        within = 2 * inner.pass_s((near - 1) / near * num_bytes, near)
        return min(flat, within + outer.best(num_bytes / near, far).all_reduce_s(num_bytes / near))

    def pass_s(self, sent_bytes: Number, ranks: int, stride: int = 1) -> float:
        """An all-gather, reduce-scatter or all-to-all in which every rank sends so much, evenly to all others."""
        if ranks == 1:
            return 0.0
        outer, inner, near = self._parts(ranks, stride)
        if inner is None or near == 1:
            return outer.pass_s(sent_bytes, ranks)
        away = sent_bytes * (ranks - near) / (ranks - 1)
        return max(outer.pass_s(away, ranks), inner.pass_s(sent_bytes - away, near))

    def message_s(self, num_bytes: Number, stride: int = 1) -> float:
        """One message to the rank `stride` further."""
        tier = self.tier_of(stride + 1)
        return tier.message_s + num_bytes / tier.message_bytes_per_s

    def contention(self, num_bytes: Number, ranks: int, stride: int = 1) -> float:
        """Share of the compute rate that a sum under way takes: its processors of all."""
        if ranks == 1:
            return 0.0
        fabric = self._parts(ranks, stride)[0].best(num_bytes, ranks)
        return min(0.99, fabric.comm_sms / self.accelerator.sms)

    def machine(self, ranks: int, num_bytes: Number = 1 << 24) -> Machine:
        """So many neighbouring ranks as one machine, with the algorithm that is the fastest for so many bytes."""
        tier = self.tier_of(ranks)
        exchange = min(fabric.exchange_alpha_s for fabric in tier.options(ranks))
        return Machine(self.accelerator, replace(tier.best(num_bytes, ranks), all_to_all_alpha_s=exchange))

    def over(self, network: Tier) -> Hardware:
        """The same hosts joined by another network."""
        return replace(self, tiers=(*(tier for tier in self.tiers if tier.ranks is not None), network))

    def explain(self) -> str:
        """The rates, for people."""
        device = self.accelerator
        lines = [
            f"{self.name}: {device.source}",
            f"products up to {device.flops * device.gemm_efficiency / 1e9:,.1f} GFLOP/s, attention "
            f"{device.flops * device.attention_efficiency / 1e9:,.1f}, memory {device.memory_rate / 1e9:,.1f} GB/s, "
            f"{device.memory_bytes / 1e9:,.1f} GB",
        ]
        for tier in self.tiers:
            lines.append(f"{tier.name}, {tier.ranks or 'any number of'} rank(s):")
            for each in tier.fabrics:
                lines.append(
                    f"  sums over {each.ranks}: {1e6 * each.alpha_s:,.0f} us and {each.bytes_per_s / 1e9:,.2f} GB/s; "
                    f"exchanges from {1e6 * each.exchange_alpha_s:,.0f} us"
                )
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Hardware:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold hardware, or impossible numbers.
        """
        try:
            content = json.loads(Path(path).read_text())
            device = dict(content["accelerator"])
            operators = device.pop("operators")
            tile = device.pop("tile")
            return cls(
                content["name"],
                Accelerator(
                    **device,
                    tile=tile and tuple(tile),
                    operators=operators and Operators.from_content(operators),
                ),
                tuple(_tier(each) for each in content["tiers"]),
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"`path` must hold hardware as `save` writes it, got {path}: {error}") from None


def _tier(content: dict[str, Any]) -> Tier:
    """Of what JSON holds."""
    fabrics = []
    for each in content["fabrics"]:
        curves = {name: each[name] and curve_of(**each[name]) for name in ("sums", "passes")}
        fabrics.append(Fabric(**{**each, **curves}))
    return Tier(**{**content, "fabrics": tuple(fabrics)})


_ASSUMED = "assumed, typical of large prefills"
_RTX4090 = Accelerator("RTX 4090", 165e12, 1.008e12, 128, 0.75, 0.6, source=_ASSUMED)
_A800 = Accelerator("A800", 312e12, 2.039e12, 108, 0.75, 0.55, source=_ASSUMED)
_H100 = Accelerator("H100 SXM", 989e12, 3.35e12, 132, 0.65, 0.5, source=_ASSUMED)
_H200 = Accelerator("H200 SXM", 989e12, 4.8e12, 132, 0.65, 0.5, source=_ASSUMED)
_PCIE = "assumed: PCIe 4.0 through the host, no peer-to-peer, NCCL's ring over shared memory"
_NVLINK = "latency and rate as fitted to Vidur's A100 measurements (arXiv:2405.05465), the A800's links cut to 400 GB/s"
_TOKENWEAVE = "fitted to TokenWeave's measured all-reduces of 64 to 32,768 tokens (arXiv:2505.11329)"
_MIXED = (
    "latency of a one-shot or switch all-reduce, which engines use for small sums, rate of NCCL, which they use for "
    f"large ones, on H100s with the same links: {_TOKENWEAVE}"
)

MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "rtx4090-x4": Machine(_RTX4090, Fabric(4, 40e-6, 12e9, 8, _PCIE)),
        "rtx4090-x8": Machine(_RTX4090, Fabric(8, 60e-6, 9e9, 8, f"{_PCIE}, across sockets")),
        "a800-x4": Machine(_A800, Fabric(4, 45e-6, 150e9, 24, _NVLINK)),
        "a800-x8": Machine(_A800, Fabric(8, 50e-6, 140e9, 24, _NVLINK)),
        "h100-x8-nccl": Machine(_H100, Fabric(8, 39e-6, 368e9, 24, _TOKENWEAVE)),
        "h100-x8-multimem": Machine(_H100, Fabric(8, 12.7e-6, 480e9, 8, _TOKENWEAVE)),
        "h200-x8": Machine(_H200, Fabric(8, 12.7e-6, 368e9, 24, _MIXED)),
    }
)
"""Machines of published results. Rates of the accelerators are the data sheets'; how many processors a collective
occupies is assumed (NCCL's channels; a switch all-reduce saturates with 4 to 8)."""


_SARATHI = (
    "shares of products and memory as an A6000 reaches them, solved for on two rows of SARATHI (arXiv:2308.16369); "
    "that of attention is assumed: SARATHI's kernels reach 0.28"
)
_WEAVE = (
    "shares of products and attention solved for on TokenWeave's times of 16k and 64k tokens (arXiv:2505.11329), "
    "of the memory on Shift Parallelism's decodes of Llama-70B (arXiv:2509.16495); 2 us a kernel is assumed"
)
_TILE = (128, 128)
_GIB = float(1 << 30)  # what data sheets call a GB of memory where drivers show so many


def _ampere(name: str, flops: float, hbm: float, sms: int, memory: float, fp8: float | None = None) -> Accelerator:
    """GPUs that take what an A6000 reaches."""
    shares: dict[str, Any] = {"gemm_efficiency": 0.774, "attention_efficiency": 0.55, "hbm_efficiency": 0.746}
    return Accelerator(
        name, flops, hbm, sms, **shares, tile=_TILE, source=_SARATHI, memory_bytes=memory, fp8_flops=fp8 or flops
    )


def _hopper(name: str, flops: float, hbm: float, sms: int, memory: float, fp8: float, more: str = "") -> Accelerator:
    """GPUs that take what an H100 reaches."""
    shares: dict[str, Any] = {"gemm_efficiency": 0.661, "attention_efficiency": 0.546, "hbm_efficiency": 0.863}
    return Accelerator(
        name,
        flops,
        hbm,
        sms,
        **shares,
        tile=_TILE,
        kernel_s=2e-6,
        source=_WEAVE + more,
        memory_bytes=memory,
        fp8_flops=fp8,
    )


def _sizes(fits: Mapping[int, tuple[float, float]], comm_sms: int, source: str) -> tuple[Fabric, ...]:
    """An algorithm as measured for groups of several sizes: microseconds, GB/s."""
    return tuple(Fabric(p, us * 1e-6, rate * 1e9, comm_sms, source) for p, (us, rate) in fits.items())


def _switch(rate: float, source: str) -> tuple[Fabric, ...]:
    """Sums that a switch adds up."""
    return tuple(Fabric(p, 12.7e-6, rate * 1e9, 8, source, all_to_all_alpha_s=inf) for p in (2, 4, 8))


_VIDUR = "fitted to NCCL's all-reduces as measured for Vidur (arXiv:2405.05465); 24 channels are assumed"
_MULTIMEM = f"switch all-reduce, {_TOKENWEAVE}; it runs on 8 processors"
_A100_NCCL = {2: (43.0, 169.0), 4: (47.0, 171.0), 8: (51.0, 161.0)}
_H100_NCCL = {2: (24.0, 318.0), 4: (26.0, 358.0), 8: (31.0, 348.0)}
_SCALED = "scaled by the data sheets' link rates from "

_NVSWITCH_A100 = Tier("NVSwitch, NVLink 3", 8, _sizes(_A100_NCCL, 24, _VIDUR), 10e-6, 240e9)
_NVSWITCH_A800 = Tier(
    "NVSwitch, 400 GB/s", 8, (Fabric(4, 45e-6, 150e9, 24, _NVLINK), Fabric(8, 50e-6, 140e9, 24, _NVLINK)), 10e-6, 160e9
)
_NVSWITCH_H100 = Tier(
    "NVSwitch, NVLink 4",
    8,
    (*_sizes(_H100_NCCL, 24, _VIDUR), *_switch(480.0, _MULTIMEM)),
    10e-6,
    360e9,
)
_NVSWITCH_B200 = Tier(
    "NVSwitch, NVLink 5",
    8,
    (
        *_sizes({p: (us, 2 * rate) for p, (us, rate) in _H100_NCCL.items()}, 24, f"{_SCALED}{_VIDUR}"),
        *_switch(960.0, f"{_SCALED}{_MULTIMEM}"),
    ),
    10e-6,
    720e9,
)
_PAIRS = Tier(
    "NVLink bridge", 2, _sizes({2: (43.0, 40.0)}, 8, "assumed: 56 GB/s a direction, 70 % of it reached"), 10e-6, 40e9
)
_PAIRS_A100 = Tier(
    "NVLink pairs",
    4,
    _sizes({2: (43.0, 169.0), 4: (63.0, 24.0)}, 24, f"{_VIDUR}, hosts whose NVLinks join pairs"),
    10e-6,
    24e9,
)
_PAIRS_H100 = Tier(
    "NVLink pairs",
    4,
    _sizes({2: (24.0, 318.0), 4: (51.0, 50.0)}, 24, f"{_VIDUR}, hosts whose NVLinks join pairs"),
    10e-6,
    50e9,
)
_PCIE_HOST = Tier(
    "PCIe 4.0", 8, (Fabric(4, 40e-6, 12e9, 8, _PCIE), Fabric(8, 60e-6, 9e9, 8, f"{_PCIE}, across sockets")), 20e-6, 12e9
)
_XGMI = Tier(
    "Infinity Fabric", 8, _sizes({8: (25.0, 310.0)}, 24, "assumed: 70 % of the data sheet's 448 GB/s"), 10e-6, 45e9
)


def _network(name: str, us: float, rate: float, source: str) -> Tier:
    """Between hosts: microseconds, GB/s that a rank sends."""
    return Tier(name, None, (Fabric(2, us * 1e-6, rate * 1e9, 8, source),), us / 2 * 1e-6, rate * 1e9)


_SHARE = "data sheet's rate for each GPU, 80 % of it reached and the latency assumed"
NETWORKS: Mapping[str, Tier] = MappingProxyType(
    {
        "ib-hdr200": _network("InfiniBand HDR, 200 Gb/s a GPU", 40.0, 20.0, _SHARE),
        "ib-ndr400": _network("InfiniBand NDR, 400 Gb/s a GPU", 40.0, 40.0, _SHARE),
        "ethernet-100": _network(
            "Ethernet, 100 Gb/s a host of 8", 80.0, 1.25, "assumed: shared by the 8 GPUs of a host, 80 % reached"
        ),
    }
)
"""Networks between hosts, for `Hardware.over`."""

_HDR, _NDR, _ETHERNET = NETWORKS.values()


def _on(name: str, accelerator: Accelerator, *tiers: Tier) -> tuple[str, Hardware]:
    return name, Hardware(name, accelerator, tiers)


_A100 = _ampere("A100 SXM 80 GB", 312e12, 2.039e12, 108, 80 * _GIB)
HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    dict(
        (
            _on("4090", _ampere("RTX 4090", 165e12, 1.008e12, 128, 24 * _GIB, 330e12), _PCIE_HOST, _ETHERNET),
            _on("a6000", _ampere("RTX A6000", 154.8e12, 0.768e12, 84, 48 * _GIB), _PAIRS, _PCIE_HOST, _ETHERNET),
            _on("a40", _ampere("A40", 149.7e12, 0.696e12, 84, 48 * _GIB), _PAIRS, _PCIE_HOST, _ETHERNET),
            _on("a100", _A100, _NVSWITCH_A100, _HDR),
            _on("a100-pairs", _A100, _PAIRS_A100, _ETHERNET),
            _on("a800", _ampere("A800", 312e12, 2.039e12, 108, 80 * _GIB), _NVSWITCH_A800, _HDR),
            _on("h100", _hopper("H100 SXM", 989e12, 3.35e12, 132, 80 * _GIB, 1979e12), _NVSWITCH_H100, _NDR),
            _on("h100-pairs", _hopper("H100", 989e12, 3.35e12, 132, 80 * _GIB, 1979e12), _PAIRS_H100, _NDR),
            _on("h200", _hopper("H200 SXM", 989e12, 4.8e12, 132, 141e9, 1979e12), _NVSWITCH_H100, _NDR),
            _on(
                "b200",
                _hopper("B200", 2250e12, 8.0e12, 148, 180e9, 4500e12, ", of an H100; none of a B200"),
                _NVSWITCH_B200,
                _NDR,
            ),
            _on(
                "mi300x",
                _hopper("MI300X", 1307e12, 5.3e12, 304, 192 * _GIB, 2615e12, ", of an H100; none of an MI300X"),
                _XGMI,
                _NDR,
            ),
        )
    )
)
"""Accelerators with their usual links. Rates, memory and numbers of processors are the data sheets' (dense, without
sparsity); every other number says in `source` where it is from."""
