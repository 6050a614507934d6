"""A sum over ranks, the residual added to it and the norm of the total: one kernel on memory that the ranks share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from seqpar.kernels.all_reduce_norm.plan import ArenaPlan
from seqpar.kernels.dispatch import refuse_dtype
from seqpar.kernels.rms_norm import check_weight
from seqpar.partition import even_split

__all__ = ["Arena", "ArenaPlan", "Shots", "all_reduce_norm"]

Shots = Literal["one_shot", "two_shot", "sharded"]
"""Who sums what.

one_shot: every rank all rows; one meeting, (p-1)*T*M numbers read from the others.
two_shot: rank r its part of an even split, then the parts are gathered; two meetings, 2*T*M*(p-1)/p numbers.
sharded: the same where the residual is sharded by tokens: a row is normed by its owner alone.
"""


class Arena(NamedTuple):
    """The memory in which kernels of several ranks meet, as one of them sees it.

    All zeros before the first call. Calls on an arena follow one another, in one order on all ranks.

    Attributes:
        own: this rank's, `plan.num_bytes`.
        addresses: of every rank's, where this rank sees it.
        rank: of this one among them.
        plan: what lies where, the same on every rank.
        multicast: an address that stands for all arenas at once, where a switch adds and copies; else 0.
    """

    own: UInt8[Tensor, " num_bytes"]
    addresses: Int64[Tensor, " ranks"]
    rank: int
    plan: ArenaPlan
    multicast: int = 0


def all_reduce_norm(
    partial: Float[Tensor, "t m"],
    residual: Float[Tensor, "t_residual m"],
    weight: Float[Tensor, " m"],
    eps: float,
    *,
    arena: Arena,
    shots: Shots,
) -> tuple[Float[Tensor, "t m"], Float[Tensor, "t_residual m"]]:
    """Sum `partial` over the ranks, add the residual, and norm the total; a Triton kernel, on every rank at once.

    In:    partial[T, M]{partial}, residual[T, M] replicated, weight[M]; all in one dtype. "sharded": residual[T/p, M]
           by `even_split`.
    Out:   the norm [T, M], replicated; the total, placed as the residual. Both new. The total is bit for bit
           `seqpar.kernels.all_reduce_norm.reference`, the norm up to rounding; with `arena.multicast` a switch adds
           in an order of its own, and the total is so too up to rounding.
    Grad:  none.

    Raises:
        ValueError: shapes or dtypes differ or are not the kernel's, a partial larger than the arena holds, or `shots`
            that are none.
    """
    if shots not in ("one_shot", "two_shot", "sharded"):
        raise ValueError(f'`shots` must be "one_shot", "two_shot" or "sharded", got {shots!r}')
    check_weight(partial, weight, eps)
    _check(partial, residual, weight, arena.plan)
    rows = even_split(len(partial), arena.plan.ranks)[arena.rank] if shots == "sharded" else len(partial)
    if residual.shape != (rows, partial.shape[1]):
        raise ValueError(
            f'`residual` must be {rows} x {partial.shape[1]} for `shots` "{shots}" on rank {arena.rank} of '
            f"{arena.plan.ranks}, got {list(residual.shape)}"
        )
    from seqpar.kernels.all_reduce_norm import triton

    plan = arena.plan
    out, total = triton.all_reduce_norm(
        arena.own,
        arena.addresses,
        arena.multicast,
        arena.rank,
        plan.blocks,
        plan.capacity,
        partial,
        residual,
        weight,
        eps,
        shots != "one_shot",
        shots == "sharded",
    )
    return out, total


def _check(partial: Tensor, residual: Tensor, weight: Tensor, plan: ArenaPlan) -> None:
    """Raise ValueError for what the kernel does not take; a sum by `comm.all_reduce`, and a norm after it, do."""
    refuse_dtype("partial", partial.dtype)
    for name, other in (("residual", residual), ("weight", weight)):
        if other.dtype != partial.dtype:
            raise ValueError(f"`{name}` must have the dtype of `partial` ({partial.dtype}), got {other.dtype}")
    from seqpar.kernels.all_reduce_norm.triton import LONGEST

    width, row_bytes, num_bytes = partial.shape[1], partial.shape[1] * partial.itemsize, partial.nbytes
    if width > LONGEST or row_bytes % 16:
        raise ValueError(
            f"`partial` must have at most {LONGEST} columns, and rows of a multiple of 16 bytes, got {width} of "
            f"{partial.dtype}; `comm.all_reduce` and a norm after it take it"
        )
    if num_bytes > plan.capacity:
        raise ValueError(
            f"`partial` must have at most the {plan.capacity} bytes of the arena, got {num_bytes}; make a larger one"
        )
