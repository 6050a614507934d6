"""Balls around blocks of keys, bounds of scores with them, masses of blocks, and the fewest that cover a softmax.

A row of masses stays in the registers of its block of threads, and the choice is not sorted: the least mass that is
chosen is found bit by bit, as float32 numbers that are not negative are ordered as their bits are. Among equal masses
the first ones are chosen, as a stable sort would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from seqpar.kernels.attention.plan import head_runs
from seqpar.kernels.attention.triton import precision
from seqpar.kernels.dispatch import kernel_op
from seqpar.partition import Range

__all__ = ["block_balls", "block_masses", "score_bounds", "smallest_cover", "variants"]

BALL_KEYS = 32
BOUND_ROWS, BOUND_BLOCKS, BOUND_DIMS = 64, 32, 64
MASS_KEYS = 2048
"""Keys of which a block of threads holds the scores at a time."""


@triton.jit(do_not_specialize=["heads"])
def balls_kernel(
    k: tl.tensor,
    starts: tl.tensor,
    centre: tl.tensor,
    radius: tl.tensor,
    heads: int,
    k_row: int,
    k_head: int,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The ball of one block and head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + block)
    stop = tl.load(starts + block + 1)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for n in range(start, stop, BLOCK_N):
        row = n + tl.arange(0, BLOCK_N)
        there = (row < stop)[:, None] & (dims < DIM)[None, :]
        at = k + (row.to(tl.int64) * k_row)[:, None] + head * k_head + dims[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0).to(tl.float32), 0)
    mean = total / (stop - start)
    furthest = tl.zeros([BLOCK_N], tl.float32)
    for n in range(start, stop, BLOCK_N):
        row = n + tl.arange(0, BLOCK_N)
        there = (row < stop)[:, None] & (dims < DIM)[None, :]
        at = k + (row.to(tl.int64) * k_row)[:, None] + head * k_head + dims[None, :]
        apart = tl.where(there, tl.load(at, mask=there, other=0.0).to(tl.float32) - mean[None, :], 0.0)
        furthest = tl.maximum(furthest, tl.sum(apart * apart, 1))
    place = block * heads + head
    tl.store(centre + place.to(tl.int64) * DIM + dims, mean, mask=dims < DIM)
    tl.store(radius + place, tl.sqrt(tl.max(furthest, 0)))


@triton.jit(do_not_specialize=["rows", "blocks"])
def bounds_kernel(
    q: tl.tensor,
    centre: tl.tensor,
    radius: tl.tensor,
    out: tl.tensor,
    scale: float,
    rows: int,
    blocks: int,
    q_token: int,
    q_head: int,
    centre_row: int,
    centre_head: int,
    radius_row: int,
    out_heads: int,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Some of the rows of one KV head, of which a query has RATIO, with some blocks."""
    kv_head = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = row // RATIO
    head = kv_head * RATIO + row % RATIO
    at = q + (token.to(tl.int64) * q_token + head * q_head)[:, None]
    around = centre + (block.to(tl.int64) * centre_row + kv_head * centre_head)[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, DIM, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        there = (row < rows)[:, None] & (dims < DIM)[None, :]
        queries = tl.load(at + dims[None, :], mask=there, other=0.0).to(tl.float32)
        near = (block < blocks)[None, :] & (dims < DIM)[:, None]
        product = tl.dot(
            queries, tl.load(around + dims[:, None], mask=near, other=0.0), product, input_precision=PRECISION
        )
        square += tl.sum(queries * queries, 1)
    reach = tl.load(radius + block * radius_row + kv_head, mask=block < blocks, other=0.0)
    most = product + tl.sqrt(square)[:, None] * reach[None, :]
    place = out + ((token.to(tl.int64) * out_heads + head) * blocks)[:, None] + block[None, :]
    tl.store(place, most * scale, mask=(row < rows)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=["keys", "blocks"])
def masses_kernel(
    scores: tl.tensor,
    so_far: tl.tensor,
    starts: tl.tensor,
    shares: tl.tensor,
    base: tl.tensor,
    keys: int,
    blocks: int,
    BLOCK_B: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """One row: BLOCK_B blocks of up to SIZE keys at a time, once for the mass of all and once for that of each."""
    row = tl.program_id(0)
    own = scores + row.to(tl.int64) * keys
    before = tl.load(so_far + row)
    top = before
    total = tl.exp(before - before)
    for b in range(0, blocks, BLOCK_B):
        block = b + tl.arange(0, BLOCK_B)
        start = tl.load(starts + block, mask=block < blocks, other=0)
        stop = tl.load(starts + block + 1, mask=block < blocks, other=0)
        key = start[:, None] + tl.arange(0, SIZE)[None, :]
        score = tl.load(own + key, mask=key < stop[:, None], other=float("-inf"))
        highest = tl.maximum(top, tl.max(tl.max(score, 1), 0))
        total = total * tl.exp(top - highest) + tl.sum(tl.sum(tl.exp(score - highest), 1), 0)
        top = highest
    every = top + tl.log(total)
    tl.store(base + row, tl.exp(before - every))
    for b in range(0, blocks, BLOCK_B):
        block = b + tl.arange(0, BLOCK_B)
        start = tl.load(starts + block, mask=block < blocks, other=0)
        stop = tl.load(starts + block + 1, mask=block < blocks, other=0)
        key = start[:, None] + tl.arange(0, SIZE)[None, :]
        score = tl.load(own + key, mask=key < stop[:, None], other=float("-inf"))
        share = tl.sum(tl.exp(score - every), 1)
        tl.store(shares + row.to(tl.int64) * blocks + block, share, mask=block < blocks)


@triton.jit(do_not_specialize=["blocks"])
def cover_kernel(
    mass: tl.tensor, base: tl.tensor, chosen: tl.tensor, coverage: float, blocks: int, BLOCK_B: tl.constexpr
) -> None:
    """One row: blocks heavier than the lightest that is chosen, and as many of its weight as are needed."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK_B)
    there = block < blocks
    own = tl.load(mass + row.to(tl.int64) * blocks + block, mask=there, other=0.0)
    before = tl.load(base + row)
    wanted = coverage * (before + tl.sum(own, 0))
    bits = own.to(tl.int32, bitcast=True)
    low = row * 0  # the least weight of which all heavier blocks together are not enough lies in [low, high]
    high = low + 0x7F800000
    for _ in range(31):
        middle = low + (high - low) // 2
        lacks = before + tl.sum(tl.where(bits > middle, own, 0.0), 0) < wanted
        low = tl.where(lacks, low, middle + 1)
        high = tl.where(lacks, middle, high)
    heavier = before + tl.sum(tl.where(bits > low, own, 0.0), 0)
    equal = bits == low
    earlier = tl.cumsum(equal.to(tl.int32), 0) - 1
    needed = (bits > low) | (equal & (heavier + earlier.to(tl.float32) * own < wanted))
    tl.store(chosen + row.to(tl.int64) * blocks + block, needed & (own > 0), mask=there)


def _launch_balls(k: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    centre, radius = _fake_balls(k, starts)
    blocks, heads, dim = centre.shape
    balls_kernel[(blocks, heads)](
        k,
        starts,
        centre,
        radius,
        heads,
        k.stride(0),
        k.stride(1),
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=BALL_KEYS,
        num_warps=4,
    )
    return centre, radius


def _fake_balls(k: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    centre = k.new_empty(len(starts) - 1, *k.shape[1:], dtype=torch.float32)
    return centre, centre.new_empty(centre.shape[:2])


def _launch_bounds(out: Tensor, q: Tensor, centre: Tensor, radius: Tensor, scale: float) -> None:
    (tokens, heads, dim), (blocks, kv_heads) = q.shape, radius.shape
    rows = tokens * heads // kv_heads
    grid = (triton.cdiv(rows, BOUND_ROWS), triton.cdiv(blocks, BOUND_BLOCKS), kv_heads)
    bounds_kernel[grid](
        q,
        centre,
        radius,
        out,
        scale,
        rows,
        blocks,
        q.stride(0),
        q.stride(1),
        centre.stride(0),
        centre.stride(1),
        radius.stride(0),
        out.stride(0) // blocks,
        RATIO=heads // kv_heads,
        DIM=dim,
        BLOCK_M=BOUND_ROWS,
        BLOCK_D=BOUND_DIMS,
        BLOCK_N=BOUND_BLOCKS,
        PRECISION=precision(torch.float32, BOUND_DIMS),
        num_warps=8,
    )


def _launch_masses(scores: Tensor, so_far: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    shares, base = _fake_masses(scores, so_far, starts, size)
    rows, keys = scores.shape
    size = triton.next_power_of_2(size)
    masses_kernel[(rows,)](
        scores, so_far, starts, shares, base, keys, len(starts) - 1, BLOCK_B=MASS_KEYS // size, SIZE=size, num_warps=4
    )
    return shares, base


def _fake_masses(scores: Tensor, so_far: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(len(scores), len(starts) - 1), torch.empty_like(so_far)


def _launch_cover(mass: Tensor, base: Tensor, coverage: float) -> Tensor:
    chosen = _fake_cover(mass, base, coverage)
    rows, blocks = mass.shape
    size = max(16, triton.next_power_of_2(blocks))
    cover_kernel[(rows,)](mass, base, chosen, coverage, blocks, BLOCK_B=size, num_warps=_cover_warps(size))
    return chosen


def _cover_warps(size: int) -> int:
    return min(16, max(1, size // 512))


def _fake_cover(mass: Tensor, base: Tensor, coverage: float) -> Tensor:
    return torch.empty_like(mass, dtype=torch.bool)


_balls = kernel_op("block_balls(Tensor k, Tensor starts) -> (Tensor, Tensor)", _launch_balls, fake=_fake_balls)
_bounds = kernel_op(
    "score_bounds(Tensor(a!) out, Tensor q, Tensor centre, Tensor radius, float scale) -> ()",
    _launch_bounds,
    fake=lambda *args: None,
    mutates=("out",),
)
_masses = kernel_op(
    "block_masses(Tensor scores, Tensor so_far, Tensor starts, int size) -> (Tensor, Tensor)",
    _launch_masses,
    fake=_fake_masses,
)
_cover = kernel_op(
    "smallest_cover(Tensor mass, Tensor base, float coverage) -> Tensor", _launch_cover, fake=_fake_cover
)


def block_balls(
    k: Float[Tensor, "n g d"], blocks: Sequence[Range]
) -> tuple[Float[Tensor, "b g d"], Float[Tensor, "b g"]]:
    """See `seqpar.kernels.blocks`."""
    centre, radius = _balls(k, _starts(blocks, k))
    return centre, radius


def score_bounds(
    q: Float[Tensor, "s h d"],
    centre: Float[Tensor, "b g d"],
    radius: Float[Tensor, "b g"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
) -> Float[Tensor, "s h b"]:
    """See `seqpar.kernels.blocks`."""
    out = centre.new_empty(*q.shape[:2], len(centre))
    centre, radius = centre.contiguous(), radius.contiguous()
    for run in head_runs(kv_head_of) if out.numel() else ():
        heads, kv_heads = slice(run.q_start, run.q_stop), slice(run.kv_start, run.kv_stop)
        _bounds(out[:, heads], q[:, heads], centre[:, kv_heads], radius[:, kv_heads], softmax_scale)
    return out


def block_masses(
    scores: Float[Tensor, "*rows n"], so_far: Float[Tensor, "*rows"], blocks: Sequence[Range]
) -> tuple[Float[Tensor, "*rows b"], Float[Tensor, "*rows"]]:
    """See `seqpar.kernels.blocks`."""
    largest = max((block.size for block in blocks), default=0)
    flat = scores.reshape(so_far.numel(), scores.shape[-1]).contiguous()
    shares, base = _masses(flat, so_far.reshape(-1).float(), _starts(blocks, scores), max(1, largest))
    return shares.view(*so_far.shape, len(blocks)), base.view(so_far.shape)


def smallest_cover(
    mass: Float[Tensor, "*rows b"], base: Float[Tensor, "*rows"], coverage: float
) -> Bool[Tensor, "*rows b"]:
    """See `seqpar.kernels.blocks`."""
    flat = mass.reshape(base.numel(), mass.shape[-1]).contiguous()
    chosen: Tensor = _cover(flat, base.reshape(-1).float(), coverage)
    return chosen.view(mass.shape)


def _starts(blocks: Sequence[Range], like: Tensor) -> Int32[Tensor, " starts"]:
    """First key of each block, and the number of keys."""
    found = torch.tensor([0, *accumulate(block.size for block in blocks)], dtype=torch.int32)
    return found.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else found.to(like.device)


def variants() -> Iterator[tuple[Any, ...]]:
    """Every way in which the kernels are launched, for the compiler; see `seqpar.kernels.targets`."""
    for name in ("bf16", "fp32"):
        pointers = {"k": name, "starts": "i32", "centre": "fp32", "radius": "fp32"}
        yield _variant(balls_kernel, name, pointers, {"DIM": 128, "BLOCK_D": 128, "BLOCK_N": BALL_KEYS}, 4)
    tile = {"BLOCK_M": BOUND_ROWS, "BLOCK_D": BOUND_DIMS, "BLOCK_N": BOUND_BLOCKS, "PRECISION": "tf32x3"}
    pointers = {"q": "bf16", "centre": "fp32", "radius": "fp32", "out": "fp32"}
    bounds = _variant(bounds_kernel, "bf16", pointers, {"RATIO": 4, "DIM": 128, **tile}, 8)
    nvidia = ("sm_80", "sm_90", "sm_100")
    yield *bounds, {}, nvidia
    pointers = dict.fromkeys(("scores", "so_far", "shares", "base"), "fp32") | {"starts": "i32"}
    for size in (4, 1024):
        yield _variant(masses_kernel, f"{size}", pointers, {"BLOCK_B": MASS_KEYS // size, "SIZE": size}, 4)
    for size in (256, 8192):
        pointers = {"mass": "fp32", "base": "fp32", "chosen": "i1"}
        cover = _variant(cover_kernel, f"{size}", pointers, {"BLOCK_B": size}, _cover_warps(size))
        yield *cover, {}, (nvidia if size > 4096 else (*nvidia, "gfx942"))  # where the largest spills


def _variant(
    kernel: Any, name: str, pointers: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> tuple[Any, ...]:
    signature = {
        arg: f"*{pointers[arg]}" if arg in pointers else "fp32" if arg in ("scale", "coverage") else "i32"
        for arg in kernel.arg_names
        if arg not in constexprs
    }
    return name, kernel, signature, constexprs, num_warps, 3
