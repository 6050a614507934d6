"""Block-sparse attention with the log-sum-exp: each tile of queries reads the keys that its list names, in any blocks.

What the device gets is, for every tile and KV head, the rows of the keys: four bytes beside the hundreds that a key
has. Blocks of keys may then be of any size and lie anywhere, and a tile's keys fill whole blocks of the kernel whatever
they are, so that the time is that of as many keys side by side. Keys that all rows of a tile see come first and need no
mask, those that some see after them, and those that none sees are not in the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from seqpar.kernels.attention.plan import HeadRun, head_runs
from seqpar.kernels.attention.triton import (
    CONFIGS,
    LOG2E,
    Config,
    arch_of,
    config_of,
    finish,
    hidden_out,
    load_block,
    load_rows,
    precision,
    rows_of,
    store_rows,
    variant,
    weigh_scores,
)
from seqpar.kernels.dispatch import kernel_op
from seqpar.kernels.sparse.plan import BlockLists
from seqpar.partition import Range

__all__ = ["sparse_attention", "sparse_into", "sparse_kernel", "variants"]


@triton.jit
def _fold_listed(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    listed: tl.tensor,
    k_positions: tl.tensor,
    scale: float,
    window: int,
    k_row: int,
    v_row: int,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums of a tile with the keys of entries [start, stop) of its list in them."""
    dims = tl.arange(0, BLOCK_D)
    PADDED: tl.constexpr = DIM != BLOCK_D
    for n in range(start, stop, BLOCK_N):
        entry = n + tl.arange(0, BLOCK_N)
        there = entry < stop
        if MASKED:
            row = tl.load(listed + entry, mask=there, other=0)
        else:
            row = tl.load(listed + entry)
        at = row.to(tl.int64)
        keys = load_block(
            k + (at * k_row)[None, :] + dims[:, None], there[None, :], (dims < DIM)[:, None], MASKED, PADDED
        )
        score = tl.dot(q, keys, input_precision=PRECISION)
        if MASKED:
            position = tl.load(k_positions + row, mask=there, other=0)
            score = hidden_out(score, there, position, positions, window, WINDOWED)
        weight, keep, total, top = weigh_scores(score, total, top, scale, MASKED)
        acc = acc * keep[:, None]
        values = load_block(
            v + (at * v_row)[:, None] + dims[None, :], there[:, None], (dims < DIM)[None, :], MASKED, PADDED
        )
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["window"])
def sparse_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tiles: tl.tensor,
    bounds: tl.tensor,
    listed: tl.tensor,
    q_positions: tl.tensor,
    k_positions: tl.tensor,
    scale: float,
    window: int,
    q_token: int,
    q_head: int,
    k_row: int,
    v_row: int,
    out_heads: int,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Tile (first query, queries) of one KV head: entries [start, stop) of `listed`; all rows see those to `full`."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(tiles + 2 * tile)
    queries = tl.load(tiles + 2 * tile + 1)
    own = bounds + 3 * (tile * tl.num_programs(1) + kv_head)
    start = tl.load(own)
    full = tl.load(own + 1)
    stop = tl.load(own + 2)

    token, head, inside = rows_of(0, kv_head, queries, RATIO, BLOCK_M)
    rows = load_rows(q, first + token, head, inside, q_token * VEC, q_head * VEC, DIM, BLOCK_D)
    positions = tl.load(q_positions + first + token, mask=inside, other=-1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, top = _fold_listed(
        acc, total, top, rows, positions, start, full, k, v, listed, k_positions, scale, window,
        k_row * VEC, v_row * VEC, DIM, BLOCK_D, BLOCK_N, False, WINDOWED, PRECISION,
    )  # fmt: skip
    acc, total, top = _fold_listed(
        acc, total, top, rows, positions, full, stop, k, v, listed, k_positions, scale, window,
        k_row * VEC, v_row * VEC, DIM, BLOCK_D, BLOCK_N, True, WINDOWED, PRECISION,
    )  # fmt: skip
    result, mass = finish(acc, total, top, lse, inside, False)
    place = (first + token).to(tl.int64) * out_heads + head
    store_rows(out, lse, place, result, mass, inside, DIM, BLOCK_D)


def _launch(
    out: Float[Tensor, "s h d"],
    lse: Float[Tensor, "s h"],
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    tiles: Int32[Tensor, "tiles two"],
    bounds: Int32[Tensor, "tiles g three"],
    listed: Int32[Tensor, " entries"],
    q_positions: Int32[Tensor, " s"],
    k_positions: Int32[Tensor, " n"],
    scale: float,
    window: int,
    config: list[int],
) -> None:
    tile = Config(*config)
    heads, dim = q.shape[1:]
    kv_heads, vec = bounds.shape[1], 16 // q.itemsize
    sparse_kernel[(len(tiles), kv_heads)](
        q,
        k,
        v,
        out,
        lse,
        tiles,
        bounds,
        listed,
        q_positions,
        k_positions,
        scale * LOG2E.value,
        window,
        q.stride(0) // vec,
        q.stride(1) // vec,
        k.stride(0) // vec,
        v.stride(0) // vec,
        out.stride(0) // dim,
        RATIO=heads // kv_heads,
        DIM=dim,
        VEC=vec,
        BLOCK_M=tile.rows,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=tile.keys,
        WINDOWED=window > 0,
        PRECISION=precision(q.dtype, dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


sparse_into = kernel_op(
    "sparse(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor tiles, Tensor bounds, Tensor listed, "
    "Tensor q_positions, Tensor k_positions, float scale, int window, int[] config) -> ()",
    _launch,
    fake=lambda *args: None,
    mutates=("out", "lse"),
)
"""Attention of the queries of `tiles`, all heads of which share KV heads in one ratio, into `out` and `lse`."""


def sparse_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    lists: BlockLists,
    q_positions: Int64[Tensor, " s"],
    k_positions: Int64[Tensor, " n"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    window: int | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """`seqpar.kernels.sparse.reference`; the lists become the kernel's on the host, where the positions are."""
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    own, others = _sent(q_positions.int(), q), _sent(k_positions.int(), q)
    most = max((rows.size for rows in lists.rows), default=0)
    for run in head_runs(kv_head_of):
        ratio = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
        config = config_of(q.shape[2], q.itemsize, most * ratio, arch_of(q.device))
        step = config.rows // ratio
        if not step:
            raise ValueError(
                f'`kv_head_of` must have at most {config.rows} query heads a KV head for backend="triton", '
                f'got {ratio}; backend="torch" takes them'
            )
        tiles, bounds, listed = _plan(lists, q_positions, k_positions, run, window, step, config.keys)
        if tiles:
            heads = slice(run.q_start, run.q_stop)
            where = [_sent(x, q) for x in (torch.tensor(tiles, dtype=torch.int32), bounds, listed)]
            parts = out[:, heads], lse[:, heads], q[:, heads], k, v
            sparse_into(*parts, *where, own, others, softmax_scale, window or 0, list(config))
    return out, lse


def _plan(
    lists: BlockLists, q_positions: Tensor, k_positions: Tensor, run: HeadRun, window: int | None, step: int, keys: int
) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Tiles (first query, queries), and for each and each KV head its bounds in the keys that are listed for all."""
    tiles: list[tuple[int, int]] = []
    bounds: list[int] = []
    listed: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    at = 0
    for block, rows in enumerate(lists.rows):
        named = [_rows_of(lists.spans(block, head)) for head in range(run.kv_start, run.kv_stop)]
        for first in range(rows.start, rows.stop, step):
            own = q_positions[first : min(first + step, rows.stop)]
            tiles.append((first, len(own)))
            low, high = int(own.min()), int(own.max())
            for those in named:
                places = k_positions[those]
                some, every = places <= high, places <= low
                if window is not None:
                    some, every = some & (places > low - window), every & (places > high - window)
                whole, part = those[every], those[some & ~every]
                listed += [whole, part]
                bounds += [at, at + len(whole) // keys * keys, at + len(whole) + len(part)]
                at += len(whole) + len(part)
    shape = (len(tiles), run.kv_stop - run.kv_start, 3)
    return tiles, torch.tensor(bounds, dtype=torch.int32).view(shape), torch.cat(listed).int()


def _rows_of(spans: Sequence[Range]) -> Int64[Tensor, " n"]:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*span) for span in spans)])


def _sent(x: Tensor, like: Tensor) -> Tensor:
    """A host tensor on the device of another."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x.to(like.device)


def variants() -> Iterator[tuple[Any, ...]]:
    """The configurations of the commonest heads; see `seqpar.kernels.targets`."""
    for config in (config for config in CONFIGS if config.dim == 128):
        name = "fp32" if config.itemsize == 4 else "bf16"
        yield variant(sparse_kernel, f"{name} window", name, config, None, {"RATIO": 4, "WINDOWED": True})
