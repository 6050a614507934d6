"""Machines that are not at hand: an accelerator, how many, and the fabric between them.

Every number names its source, and whether it was published, fitted to something published, or assumed. None of them is
a measurement of ours; `calibrate` replaces them all by measurements of the machine at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["MACHINES", "Accelerator", "Fabric", "Machine"]


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

    def __post_init__(self) -> None:
        for name in ("gemm_efficiency", "attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {getattr(self, name)}")
        if not (self.flops > 0 and self.hbm_bytes_per_s > 0 and self.sms >= 1 and self.kernel_s >= 0):
            raise ValueError(
                "`flops`, `hbm_bytes_per_s` and `sms` must be positive and `kernel_s` >= 0, got "
                f"{self.flops}, {self.hbm_bytes_per_s}, {self.sms}, {self.kernel_s}"
            )


@dataclass(frozen=True)
class Fabric:
    """What an all-reduce over all ranks takes, and what it takes away from the compute beside it.

    Args:
        ranks: p.
        alpha_s: latency of one all-reduce.
        bytes_per_s: bus bandwidth: an all-reduce of n bytes takes alpha + 2 (p - 1) / p * n / this.
        comm_sms: processors that the collective's kernel occupies.
        source: of the numbers.
        all_to_all_alpha_s: latency of one all-to-all with what packs it; that of an all-reduce by default.
    """

    ranks: int
    alpha_s: float
    bytes_per_s: float
    comm_sms: int = 0
    source: str = ""
    all_to_all_alpha_s: float | None = None

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

    def all_reduce_s(self, num_bytes: int) -> float:
        """Seconds of one all-reduce; nothing over one rank."""
        if self.ranks == 1:
            return 0.0
        return self.alpha_s + 2 * (self.ranks - 1) / self.ranks * num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """Accelerators and the fabric that joins them."""

    accelerator: Accelerator
    fabric: Fabric

    @property
    def contention(self) -> float:
        """Share of the compute rate that a collective under way takes: its processors of all."""
        return min(0.99, self.fabric.comm_sms / self.accelerator.sms)


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
