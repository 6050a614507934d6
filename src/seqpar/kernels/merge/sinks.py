"""Attention sinks: one learned score per query head that joins the softmax and has no value (gpt-oss).

A sink is a partial like any other, (0, sink), so it is added by a merge: once, to one of the partials or to their sum.
The weights are made of exact operations, `exp` and `log`, which PyTorch computes alike wherever in a tensor an element
lies, so that a chunk of rows has the bits it has among all. The sigmoid of lse - sink lost: a CPU rounds its last few
elements otherwise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["add_sinks", "check_sinks", "weigh"]


def add_sinks(
    out: Float[Tensor, "*rows h d"], lse: Float[Tensor, "*rows h"], sinks: Float[Tensor, " h"]
) -> tuple[Float[Tensor, "*rows h d"], Float[Tensor, "*rows h"]]:
    """The partial of the same keys and each head's sink: `merge` with (0, sinks).

    In:    out[T, H, D], lse[T, H] in natural log, float32 or float64; sinks[H] in any floating dtype, -inf for none.
           Of partials that are merged exactly one may have the sinks in it, or none before and the merged one after.
    Out:   out[T, H, D] in its dtype, computed in that of `lse`; lse[T, H], the sink's mass included. (0, sink) where no
           key was seen.
    Grad:  to all three, through both results.

    Raises:
        ValueError: shapes, dtypes or devices that contradict each other.
    """
    if out.dim() < 2 or out.shape[:-1] != lse.shape:
        raise ValueError(f"partials must be [..., heads, d] and [..., heads], got {list(out.shape)}, {list(lse.shape)}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`lse` must be float32 or float64, got {lse.dtype}")
    check_sinks(sinks, out)
    share, total = weigh(lse, sinks)
    return (out * share[..., None]).to(out.dtype), total


def check_sinks(sinks: Tensor, like: Tensor) -> None:
    """Raise ValueError unless there is a floating sink for each head of `like` [..., H, D], on its device."""
    if sinks.shape != like.shape[-2:-1] or not sinks.is_floating_point() or sinks.device != like.device:
        raise ValueError(
            f"`sinks` must be floating, of shape [{like.shape[-2]}] (one for each query head) and on {like.device}, "
            f"got {sinks.dtype}, {list(sinks.shape)}, {sinks.device}"
        )


def weigh(lse: Float[Tensor, "*rows"], sinks: Float[Tensor, "*heads"]) -> tuple[Tensor, Tensor]:
    """What share of the softmax is left to the keys of mass `lse`, and the mass with the sinks, which broadcast."""
    sinks = sinks.to(lse.dtype)
    top = torch.maximum(lse.detach(), sinks.detach())
    finite = top.clamp_min(torch.finfo(lse.dtype).min)
    seen = (lse - finite).exp()
    both = (seen + (sinks - finite).exp()).clamp_min(1)  # less than 1 only where neither has any mass
    return seen / both, top + both.log()
