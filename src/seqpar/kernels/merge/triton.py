"""Merging in one pass over the partials, wherever they lie: their strides are arguments.

So partials are read straight out of the buffer in which they arrived, with the log-sum-exp beside each row, and decodes
whose keys were split are put together row by row into the batch. Partials are added in their order, one that saw no key
adds nothing and is not read, so neither the number of empty ones nor other rows change any bit of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op

__all__ = ["CONFIGS", "Config", "merge", "merge_into", "merge_kernel", "variants"]


class Config(NamedTuple):
    """Values that a block holds at a time, of whole rows, and its warps."""

    values: int
    num_warps: int


CONFIGS = (Config(1024, 4),)
"""Eight values a thread, so that even a decode of one request has blocks for many processors."""


@triton.jit(do_not_specialize=["tokens", "heads", "partials"])
def merge_kernel(
    outs: tl.tensor,
    lses: tl.tensor,
    more_out: tl.tensor,
    more_lse: tl.tensor,
    sinks: tl.tensor,
    where: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tokens: int,
    heads: int,
    partials: int,
    outs_partial: int,
    outs_row: int,
    lses_partial: int,
    lses_row: int,
    more_row: int,
    more_lse_row: int,
    out_heads: int,
    DIM: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MORE: tl.constexpr,
    SINKS: tl.constexpr,
    WHERE: tl.constexpr,
) -> None:
    """One partial more than `partials` with MORE; row (token, head) goes to token `where[token]`, if that is >= 0.

    Strides of `outs` and `more_out` are in units of VEC elements, so that the compiler knows how wide a load may be.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    token, head = row // heads, row % heads
    inside = token < tokens
    target = token
    if WHERE:
        target = tl.load(where + token, mask=inside, other=-1)
        inside = inside & (target >= 0)
    lse_at = lses + row.to(tl.int64) * lses_row
    out_at = outs + row.to(tl.int64)[:, None] * (outs_row * VEC) + dims[None, :]
    columns = inside[:, None] & (dims < DIM)[None, :]

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if MORE:
        more_mass = tl.load(more_lse + row.to(tl.int64) * more_lse_row, mask=inside, other=float("-inf"))
        top = more_mass
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, sink)
    mass_at = lse_at
    for _ in range(partials):
        top = tl.maximum(top, tl.load(mass_at, mask=inside, other=float("-inf")))
        mass_at += lses_partial
    shift = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if SINKS:
        total += tl.exp(sink - shift)
    if MORE:
        weight = tl.exp(more_mass - shift)
        total += weight
        more_at = more_out + row.to(tl.int64)[:, None] * (more_row * VEC) + dims[None, :]
        seen = columns & (more_mass > float("-inf"))[:, None]
        acc += tl.load(more_at, mask=seen, other=0.0).to(tl.float32) * weight[:, None]
    for _ in range(partials):
        mass = tl.load(lse_at, mask=inside, other=float("-inf"))
        weight = tl.exp(mass - shift)
        total += weight
        seen = columns & (mass > float("-inf"))[:, None]
        acc += tl.load(out_at, mask=seen, other=0.0).to(tl.float32) * weight[:, None]
        lse_at += lses_partial
        out_at += outs_partial * VEC

    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    place = target.to(tl.int64) * out_heads + head
    merged = (acc / safe[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * DIM + dims[None, :], merged, mask=columns)
    tl.store(lse + place, tl.where(empty, float("-inf"), shift + tl.log(safe)), mask=inside)


def _launch(
    out: Float[Tensor, "t h d"],
    lse: Float[Tensor, "t h"],
    outs: Float[Tensor, "n r d"],
    lses: Float[Tensor, "n r"],
    more_out: Float[Tensor, "r d"] | None,
    more_lse: Float[Tensor, " r"] | None,
    sinks: Float[Tensor, " h"] | None,
    where: Int32[Tensor, " own"] | None,
) -> None:
    heads, dim = out.shape[1:]
    partials, rows = lses.shape
    if not rows:
        return
    more = outs[0] if more_out is None else more_out
    vec = _vector(outs, more)
    config = CONFIGS[0]
    block_d = triton.next_power_of_2(max(1, dim))
    block_r = max(1, config.values // block_d)
    merge_kernel[(triton.cdiv(rows, block_r),)](
        outs,
        lses,
        more,
        lses if more_lse is None else more_lse,
        lse if sinks is None else sinks,
        lse if where is None else where,
        out,
        lse,
        rows // heads,
        heads,
        partials,
        outs.stride(0) // vec,
        outs.stride(1) // vec,
        lses.stride(0),
        lses.stride(1),
        more.stride(-2) // vec,
        0 if more_lse is None else more_lse.stride(0),
        out.stride(0) // max(1, dim),
        DIM=dim,
        VEC=vec,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        MORE=more_out is not None,
        SINKS=sinks is not None,
        WHERE=where is not None,
        num_warps=config.num_warps,
    )


def _vector(*tensors: Tensor) -> int:
    """The most elements, of 16 bytes at most, that all rows of all of them start at a multiple of."""
    width = 16 // tensors[0].itemsize
    for x in tensors:
        width = gcd(width, x.data_ptr() // x.itemsize, *x.stride()[:-1])
    return width


merge_into = kernel_op(
    "merge(Tensor(a!) out, Tensor(b!) lse, Tensor outs, Tensor lses, Tensor? more_out, Tensor? more_lse, "
    "Tensor? sinks, Tensor? where) -> ()",
    _launch,
    fake=lambda *args: None,
    mutates=("out", "lse"),
)
"""Merge partials [n, rows, d] and perhaps one more into `out` and `lse`, some heads of all.

Rows are the heads of tokens, one after another; token i is written to `where[i]`, unless that is negative. `outs` and
`more_out` have one dtype and unit stride in d, and any strides else.
"""


def merge(
    outs: Sequence[Float[Tensor, "*rows d"]],
    lses: Sequence[Float[Tensor, "*rows"]],
    sinks: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows"]]:
    """`seqpar.kernels.merge.reference`, and the sinks added."""
    shape = outs[0].shape
    found, mass = outs[0].new_empty(shape), lses[0].new_empty(shape[:-1])
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (x.reshape(-1, shape[-1]) for x in outs)]
    masses = [x.reshape(-1) for x in lses]
    more: tuple[Tensor | None, Tensor | None] = None, None
    both = _stacked(rows), _stacked(masses)
    if (both[0] is None or both[1] is None) and len(rows) > 1:
        both, more = (_stacked(rows[1:]), _stacked(masses[1:])), (rows[0], masses[0])
    if both[0] is None or both[1] is None:
        both, more = (torch.stack(rows), torch.stack(masses)), (None, None)
    heads = shape[-2] if len(shape) > 1 else 1
    merge_into(found.view(-1, heads, shape[-1]), mass.view(-1, heads), *both, *more, sinks, None)
    return found, mass


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie evenly spaced in one buffer as one; None if they do not."""
    if torch.compiler.is_compiling():
        return None  # what is traced lies nowhere yet
    first, *others = tensors
    starts = [x.storage_offset() for x in tensors]
    step = starts[1] - starts[0] if others else 0
    alike = all(
        (x.shape, x.stride(), x.untyped_storage().data_ptr())
        == (first.shape, first.stride(), first.untyped_storage().data_ptr())
        for x in others
    )
    if step < 0 or not alike or any(start != starts[0] + i * step for i, start in enumerate(starts)):
        return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def variants() -> Iterator[tuple[Any, ...]]:
    """Every way in which the kernel is launched, for the compiler; see `seqpar.kernels.targets`."""
    strides = ["outs_partial", "outs_row", "lses_partial", "lses_row", "more_row", "more_lse_row"]
    ints = ["tokens", "heads", "partials", *strides, "out_heads"]
    for config in CONFIGS:
        sizes = {"DIM": 128, "BLOCK_R": config.values // 128, "BLOCK_D": 128}
        for name, width in (("fp32", 4), ("bf16", 8), ("fp16", 8)):
            # Splits of decodes, float32; the rows of a message, whose log-sum-exp is in the columns beside.
            for use, read, flags in (
                ("splits", "fp32", {"VEC": 4, "MORE": False, "SINKS": True, "WHERE": True}),
                ("packed", name, {"VEC": width // 4, "MORE": True, "SINKS": True, "WHERE": False}),
            ):
                pointers = {"outs": read, "lses": "fp32", "more_out": read, "more_lse": "fp32", "sinks": "fp32"}
                pointers |= {"where": "i32", "out": name, "lse": "fp32"}
                signature = {key: f"*{value}" for key, value in pointers.items()} | dict.fromkeys(ints, "i32")
                yield f"{name} {use} {config.values}", merge_kernel, signature, sizes | flags, config.num_warps, 3
