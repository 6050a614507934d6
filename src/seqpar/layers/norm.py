"""RMSNorm with a replicated weight; it normalises whichever tokens it is given, so sequence shards need no more."""

from __future__ import annotations

from typing import ClassVar, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Groups, ProcessGroup
from seqpar.kernels import rms_norm
from seqpar.kernels.rms_norm import check_eps
from seqpar.layers.base import ShardedModule, Source, check_covered, check_new

__all__ = ["RMSNorm", "is_plain"]


class RMSNorm(ShardedModule):
    """Root-mean-square norm over the last dim (arXiv:1910.07467).

    In, Out: [..., M], any placement of the tokens.
    Grad:  of the weight: partial over every group that the tokens, or the heads it is applied to, are sharded over.

    Args:
        size: M.
        eps: added to the mean square.
        over_tp: the norm sees other tokens or heads on each tensor-parallel rank (sequence-sharded activations, q/k
            norms), so that `sync_gradients` sums over `tp` too.
    """

    segments: ClassVar[tuple[str, ...]] = ("normalise",)
    normalise = staticmethod(rms_norm)

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        over_tp: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_new(dtype, size=size)
        check_eps(eps)
        self.eps, self.over_tp = eps, over_tp
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    @classmethod
    def from_module(cls, norm: nn.Module, *, over_tp: bool = False) -> RMSNorm:
        """Copy an RMS norm with a `weight` and an `eps` or `variance_epsilon` (Transformers' name).

        Raises:
            TypeError: it has no weight or no eps.
            ValueError: it has other parameters, or does not compute an RMS norm (tried on a row, unless on meta).
        """
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = norm.weight
        if not isinstance(weight, Tensor) or not isinstance(eps, float):
            raise TypeError(f"`norm` must have a `weight` and an `eps`, got {type(norm).__name__}")
        new = cls(weight.shape[0], eps, over_tp=over_tp, device="meta", dtype=weight.dtype)
        new.load_unsharded({"weight": weight})
        new.weight.requires_grad_(weight.requires_grad)
        check_covered(norm, new)
        new._check_like(norm)
        return new

    def _check_like(self, norm: nn.Module) -> None:
        """Raise ValueError unless `norm` gives what this module gives."""
        if self.weight.is_meta:
            return
        size = self.weight.shape[0]
        row = torch.linspace(-1, 2, size, dtype=self.weight.dtype, device=self.weight.device).view(1, size)
        with torch.no_grad():
            if not torch.allclose(norm(row), self(row), rtol=2e-2, atol=1e-3):
                raise ValueError(f"`norm` must be an RMS norm, weight times the normed input, got {norm}")

    def forward(self, x: Float[Tensor, "*tokens m"]) -> Float[Tensor, "*tokens m"]:
        comm.refuse_dtensor(x, "x")
        return self.normalise(x, self.weight, self.eps)

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        return {"weight": Source.whole(tuple(self.weight.shape), "weight")}

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        return (groups.tp, groups.sp) if self.over_tp else (groups.sp,)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    """Whether what a norm computes may be computed together with what stands around it: nothing sees its call."""
    return type(norm) is RMSNorm and not comm.is_wrapped(norm)
