"""Resharding between tokens and heads: the two all-to-alls around Ulysses attention.

`seq_to_heads` sends column blocks of a token-sharded matrix, `heads_to_seq` sends them back. They are one pair of
adjoint maps over one plan: rank d gets the columns `columns[d]`, which may overlap (a KV head that several ranks need
is copied in the send buffer, and its gradients are summed on the way back). q, k and v travel together, so this is one
collective where DeepSpeed's attention makes three; KV heads fewer than ranks need no second one to replicate them.

The rows of the tall matrix [T, c] lie in rank order of their owners, so the received (or, on the way back, the sent)
buffer is that matrix: only the wide side [T_r, C] is ever packed, with one transposing copy where the blocks are equal.

Source: DeepSpeed-Ulysses, arXiv:2309.14509; replication in the send buffer: Shift Parallelism, arXiv:2509.16495.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import gcd

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.comm.collectives import exchange
from seqpar.comm.differentiable import _back, _plain, with_adjoint
from seqpar.comm.handle import Handle
from seqpar.comm.mesh import describe
from seqpar.comm.record import count
from seqpar.comm.steps import Steps
from seqpar.comm.wire import Code, Wire, check_wire
from seqpar.kernels.columns import ColumnPlan, pack_columns, unpack_columns
from seqpar.kernels.dispatch import choose_backend
from seqpar.partition import Range

__all__ = ["heads_to_seq", "heads_to_seq_steps", "seq_to_heads", "seq_to_heads_steps"]


Pack = Callable[[Tensor], Tensor]
"""Makes the flat send buffer of a matrix."""


@dataclass(frozen=True)
class Reshard:
    """Which columns of a [T_r, width] matrix each rank gets, and how many rows each rank holds."""

    columns: tuple[tuple[Range, ...], ...]
    tokens: tuple[int, ...]
    width: int

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return tuple(sum(r.size for r in ranges) for ranges in self.columns)

    @cached_property
    def tiles(self) -> bool:
        """Whether the columns of the ranks, one after another, are all columns once and in order."""
        ranges = [r for ranges in self.columns for r in ranges if r.size]
        starts = [0, *(r.stop for r in ranges)]
        return starts == [*(r.start for r in ranges), self.width]

    def wide_sizes(self, rank: int) -> list[int]:
        """Elements that rank `rank` exchanges with each rank on its wide side."""
        return [self.tokens[rank] * width for width in self.widths]

    def tall_sizes(self, rank: int) -> list[int]:
        """Elements that rank `rank` exchanges with each rank on its tall side."""
        return [tokens * self.widths[rank] for tokens in self.tokens]

    @cached_property
    def equal(self) -> bool:
        """Whether the columns tile in blocks of one width."""
        return self.tiles and len(set(self.widths)) == 1

    @cached_property
    def units(self) -> ColumnPlan:
        """The same in the largest units that all ranges are made of."""
        unit = gcd(self.width, *(bound for ranges in self.columns for r in ranges for bound in r)) or 1
        blocks = (tuple(c // unit for r in ranges for c in range(*r, unit)) for ranges in self.columns)
        return ColumnPlan(tuple(blocks), unit)

    def pack(self, x: Tensor) -> Tensor:
        """The columns of each rank as one block after another, flat."""
        if choose_backend("columns", x.device, x.dtype) == "triton":
            return pack_columns(x, self.units)
        if self.equal:
            return x.view(len(x), len(self.widths), self.widths[0]).transpose(0, 1).contiguous().view(-1)
        blocks = x.new_empty(len(x) * sum(self.widths))
        for block, ranges in zip(self._blocks(blocks, len(x)), self.columns, strict=True):
            at = 0
            for r in ranges:
                block[:, at : at + r.size] = x[:, r.start : r.stop]
                at += r.size
        return blocks

    def unpack(self, flat: Tensor, rows: int) -> Tensor:
        """The adjoint of `pack`: every block back at its columns, summed where they overlap."""
        if self.tiles:
            if choose_backend("columns", flat.device, flat.dtype) == "triton":
                return unpack_columns(flat, self.units, rows)
            if self.equal:
                return flat.view(len(self.widths), rows, self.widths[0]).transpose(0, 1).reshape(rows, self.width)
            return torch.cat(self._blocks(flat, rows), 1)
        wide = torch.promote_types(flat.dtype, torch.float32) if flat.is_floating_point() else flat.dtype
        x = flat.new_zeros(rows, self.width, dtype=wide)
        for block, ranges in zip(self._blocks(flat, rows), self.columns, strict=True):
            at = 0
            for r in ranges:
                x[:, r.start : r.stop] += block[:, at : at + r.size]
                at += r.size
        return x.to(flat.dtype)

    def unit(self, head_dim: int | None) -> int:
        """Columns that a wire format encodes as one row: a head's, or as many as divide every rank's columns.

        Raises:
            ValueError: the ranks' columns are not whole heads.
        """
        if head_dim is None:
            return gcd(*self.widths) or 1
        if head_dim < 1 or any(width % head_dim for width in self.widths):
            raise ValueError(f"`head_dim` must divide the columns of every rank ({self.widths}), got {head_dim}")
        return head_dim

    def _blocks(self, flat: Tensor, rows: int) -> list[Tensor]:
        parts = flat.split([rows * width for width in self.widths])
        return [part.view(rows, width) for part, width in zip(parts, self.widths, strict=True)]


# Plans are few and layers ask for the same one at every step; making one takes as long as an exchange's launch.
@lru_cache(maxsize=1024)
def _plan(columns: tuple[tuple[Range, ...], ...], tokens: tuple[int, ...], width: int) -> Reshard:
    if any(not 0 <= r.start <= r.stop <= width for ranges in columns for r in ranges):
        raise ValueError(f"`columns` must lie within the columns of `x` ({width}), got {columns}")
    return Reshard(columns, tokens, width)


@lru_cache(maxsize=1024)
def _tiling(widths: tuple[int, ...], tokens: tuple[int, ...]) -> Reshard:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    columns = tuple((Range(end - width, end),) for width, end in zip(widths, ends, strict=True))
    return Reshard(columns, tokens, sum(widths))


def seq_to_heads_steps(
    x: Shaped[Tensor, "t_local c"],
    *,
    columns: Sequence[Sequence[Range]],
    tokens: Sequence[int],
    group: ProcessGroup,
    label: str = "",
    wire: Wire | None = None,
    head_dim: int | None = None,
    pack: Pack | None = None,
) -> Steps[Tensor]:
    """Reshard a token-sharded matrix by columns (heads), in one all-to-all.

    In:    x[T_r, C]; rank order is sequence order; rank r holds `tokens[r]` rows.
    Out:   [T, c]; the column ranges `columns[rank]` of all rows, one after another.
    Grad:  sharded as the output; sent back as it is, summed over the ranks that share columns.
    Comm:  each rank sends T_r * (sum of the others' widths) elements; a `wire` format encodes each head of `head_dim`
        columns by itself, so that no scale serves two, and gives every rank's part, its own too, back rounded.

    With `pack` another function fills the send buffer, and may change what is sent on the way: where there are several
    ranks, and no gradient is wanted, which would be that of the columns as they are.

    Raises:
        ValueError: `columns`, `tokens` or `x` do not fit; heads that do not fit the columns; a wire format that is
            none, or that the dtype cannot take.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509.
    """
    plan = _plan(tuple(map(tuple, columns)), tuple(tokens), x.shape[1])
    _check_ranks(plan, group)
    _check(plan, x, plan.tokens[group.rank()], plan.width, group)
    code = _code(plan, x, wire, head_dim)
    return (yield from _to_heads_steps(x, plan=plan, group=group, label=label, code=code, pack=pack))


def heads_to_seq_steps(
    x: Shaped[Tensor, "t c"],
    *,
    widths: Sequence[int],
    tokens: Sequence[int],
    group: ProcessGroup,
    label: str = "",
    wire: Wire | None = None,
    head_dim: int | None = None,
) -> Steps[Tensor]:
    """Reshard a column-sharded (head-sharded) matrix by tokens, in one all-to-all.

    In:    x[T, c]; rank r holds `widths[r]` columns.
    Out:   [T_r, C]; all columns in rank order of `tokens[rank]` rows; rank order is sequence order.
    Grad:  `seq_to_heads` of the output gradient.
    Comm:  each rank sends (T - T_r) * c elements; `wire` as in `seq_to_heads`.

    Raises:
        ValueError: `widths`, `tokens` or `x` do not fit; heads that do not fit the columns; a wire format that is
            none, or that the dtype cannot take.

    Source: DeepSpeed-Ulysses, arXiv:2309.14509.
    """
    plan = _tiling(tuple(widths), tuple(tokens))
    _check_ranks(plan, group)
    _check(plan, x, sum(plan.tokens), plan.widths[group.rank()], group)
    code = _code(plan, x, wire, head_dim)
    return (yield from _to_seq_steps(x, plan=plan, group=group, label=label, code=code))


def _to_heads_steps(
    x: Tensor,
    *,
    plan: Reshard,
    group: ProcessGroup,
    label: str,
    code: Code | None = None,
    pack: Pack | None = None,
) -> Steps[Tensor]:
    if group.size() == 1:
        return _select(x, plan)
    rank = group.rank()
    rows, width = sum(plan.tokens), plan.widths[rank]
    handle = _exchange(
        (pack or plan.pack)(x.detach()),
        plan.wide_sizes(rank),
        plan.tall_sizes(rank),
        group,
        label,
        code,
        x.shape,
        lambda recv: recv.view(rows, width),
    )
    result = yield handle
    return with_adjoint(x, result, partial(_to_seq, plan=plan, group=group, label=_back(label)))


def _to_seq_steps(
    x: Tensor, *, plan: Reshard, group: ProcessGroup, label: str, code: Code | None = None
) -> Steps[Tensor]:
    if group.size() == 1:
        return x
    rank, tall = group.rank(), x.detach().contiguous().view(-1)
    rows = plan.tokens[rank]
    handle = _exchange(
        tall,
        plan.tall_sizes(rank),
        plan.wide_sizes(rank),
        group,
        label,
        code,
        x.shape,
        lambda recv: plan.unpack(recv, rows),
    )
    result = yield handle
    return with_adjoint(x, result, partial(_to_heads, plan=plan, group=group, label=_back(label)))


def _exchange(
    flat: Tensor,
    send_sizes: Sequence[int],
    recv_sizes: Sequence[int],
    group: ProcessGroup,
    label: str,
    code: Code | None,
    shape: Sequence[int],
    finish: Callable[[Tensor], Tensor],
) -> Handle:
    """Launch the all-to-all of a flat buffer, of a tensor of that shape; `finish` gets what arrives."""
    code = Code.of(flat, None) if code is None else code
    sent, rank = code.encode(flat), group.rank()
    send, received = ([code.size(size) for size in sizes] for sizes in (send_sizes, recv_sizes))
    recv = sent.new_empty(sum(received))
    count("all_to_all", label, (sent.numel() - send[rank]) * sent.itemsize)
    return exchange(
        "all_to_all", label, group, (sent, send), (recv, received), lambda: finish(code.decode(recv)), shape=shape
    )


def _code(plan: Reshard, x: Tensor, wire: Wire | None, head_dim: int | None) -> Code | None:
    check_wire(wire, x)
    return None if wire is None else Code.of(x, wire, plan.unit(head_dim))


def _select(x: Tensor, plan: Reshard) -> Tensor:
    """The columns of the only rank, which are `x` itself where they are all, in order."""
    if plan.tiles:
        return x
    return torch.cat([x[:, r.start : r.stop] for r in plan.columns[0]], 1)


def _check_ranks(plan: Reshard, group: ProcessGroup) -> None:
    p = group.size()
    if len(plan.columns) != p or len(plan.tokens) != p:
        raise ValueError(
            f"columns and `tokens` must have an entry for each rank of {describe(group)}, "
            f"got {len(plan.columns)} and {len(plan.tokens)}"
        )


def _check(plan: Reshard, x: Tensor, rows: int, width: int, group: ProcessGroup) -> None:
    if tuple(x.shape) != (rows, width):
        raise ValueError(
            f"`x` must be [{rows}, {width}] on rank {group.rank()} of {describe(group)}, got {list(x.shape)}"
        )


_to_heads = _plain(_to_heads_steps)
_to_seq = _plain(_to_seq_steps)
seq_to_heads = _plain(seq_to_heads_steps)
heads_to_seq = _plain(heads_to_seq_steps)
