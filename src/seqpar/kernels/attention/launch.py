"""Attention on the Triton kernels: what they take, and which of a batch's requests go to which.

Requests of up to `MAX_QUERIES` new tokens are decodes, whose keys are split over the processors; the tokens of all
others are cut into tiles, which start longest first. Both write to their rows of one result. The plan is made once for
a batch from host integers, travels to its device, and serves every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar.kernels.attention.plan import HeadRun, head_runs, make_tiles
from seqpar.kernels.attention.triton import PLACED_ROWS, arch_of, attention_into, narrowed, takes_scales
from seqpar.kernels.attention.triton import config_of as tile_config
from seqpar.kernels.decode import MAX_QUERIES, SPLIT_KEYS, split_count
from seqpar.kernels.decode.triton import config_of as decode_config
from seqpar.kernels.decode.triton import decode_into
from seqpar.kernels.dispatch import refuse_dtype
from seqpar.kernels.rows import Scales
from seqpar.ragged import RaggedBatch

__all__ = ["attention", "check", "check_heads", "placed_attention"]

MOST_DIM = 256
BYTES = 16
"""Rows of heads start at multiples of so many."""


class _Tiles(NamedTuple):
    """The tiles of all but the decodes for one run of heads."""

    tiles: Tensor
    config: tuple[int, ...]


class _Decodes(NamedTuple):
    """The decodes of a batch for one run of heads."""

    requests: Tensor
    rows: Tensor
    splits: int
    config: tuple[int, ...]


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
    sinks: Float[Tensor, " h"] | None = None,
    scales: Scales | None = None,
    deterministic: bool = False,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """`seqpar.kernels.attention.reference`, without gradients; arguments that `check` has passed."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    for run in head_runs(kv_head_of):
        heads, kv_heads = slice(run.q_start, run.q_stop), slice(run.kv_start, run.kv_stop)
        parts = out[:, heads], lse[:, heads], q[:, heads], k[..., kv_heads, :], v[..., kv_heads, :]
        added = None if sinks is None else sinks[heads]
        own = (None, None) if scales is None else tuple(x[..., kv_heads] for x in scales)
        tiles, decodes = _plan(q, batch, run, window, deterministic, scales is not None)
        if decodes is not None:
            those = decodes.requests, decodes.rows, batch.cu_q, batch.cu_kv, batch.page_table
            split_keys = SPLIT_KEYS if deterministic else 0
            split = decodes.splits, split_keys, list(decodes.config)
            decode_into(*parts, *those, added, *own, softmax_scale, window or 0, *split)
        if tiles is not None:
            where = tiles.tiles, batch.cu_q, batch.cu_kv, batch.page_table
            rule = softmax_scale, window or 0, list(tiles.config)
            attention_into(*parts, *where, None, None, added, *own, *rule)
    return out, lse


def placed_attention(
    q: Float[Tensor, "s h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    positions: tuple[Int[Tensor, " s"], Int[Tensor, " n"]],
    softmax_scale: float,
    runs: Sequence[HeadRun],
    window: int | None,
) -> tuple[Float[Tensor, "s h d"], Float[Tensor, "s h"]]:
    """`seqpar.kernels.tile.placed_attention`; arguments that `check_heads` has passed."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    own, others = (x.to(q.device, torch.int32) for x in positions)
    asking = [r for r, new in enumerate(q_lens) if new]
    starts = [_on_device((0, *accumulate(lens)), q) for lens in (q_lens, kv_lens)]
    for run in runs if asking else ():
        heads, kv_heads = slice(run.q_start, run.q_stop), slice(run.kv_start, run.kv_stop)
        ratio = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
        tiles = _tiles(q, q_lens, kv_lens, asking, ratio, PLACED_ROWS, False)
        parts = out[:, heads], lse[:, heads], q[:, heads], k[:, kv_heads], v[:, kv_heads]
        where = tiles.tiles, *starts, tiles.tiles
        rule = softmax_scale, window or 0, list(tiles.config)
        attention_into(*parts, *where, own, others, None, None, None, *rule)
    return out, lse


def _plan(
    q: Tensor, batch: RaggedBatch, run: HeadRun, window: int | None, deterministic: bool, scaled: bool
) -> tuple[_Tiles | None, _Decodes | None]:
    kv_heads = run.kv_stop - run.kv_start
    ratio = (run.q_stop - run.q_start) // kv_heads
    key = ("attention.triton", q.shape[2], q.itemsize, q.device, ratio, kv_heads, window, deterministic, scaled)
    plan: tuple[_Tiles | None, _Decodes | None] | None = batch.plans.get(key)
    if plan is None:
        few = [r for r, new in enumerate(batch.q_lens) if 0 < new <= MAX_QUERIES]
        many = [r for r, new in enumerate(batch.q_lens) if new > MAX_QUERIES]
        with torch.inference_mode(False):
            decodes = _decodes(q, batch, few, ratio, kv_heads, window, deterministic, scaled) if few else None
            rows = max((batch.q_lens[r] for r in many), default=0) * ratio
            tiles = _tiles(q, batch.q_lens, batch.kv_lens, many, ratio, rows, scaled) if many else None
            plan = batch.plans[key] = tiles, decodes
    return plan


def _tiles(
    q: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    requests: Sequence[int],
    ratio: int,
    rows: int,
    scaled: bool,
) -> _Tiles:
    config = tile_config(q.shape[2], q.itemsize, rows, arch_of(q.device))
    config = narrowed(config) if scaled else config
    return _Tiles(_on_device(make_tiles(q_lens, kv_lens, requests, ratio, config.rows), q), tuple(config))


def _decodes(
    q: Tensor,
    batch: RaggedBatch,
    requests: Sequence[int],
    ratio: int,
    kv_heads: int,
    window: int | None,
    deterministic: bool,
    scaled: bool,
) -> _Decodes:
    queries = max(batch.q_lens[r] for r in requests)
    config = decode_config(q.shape[2], q.itemsize, queries * ratio, arch_of(q.device))
    config = narrowed(config) if scaled else config
    longest = max(batch.kv_lens[r] for r in requests)
    if deterministic:
        splits = -(-longest // SPLIT_KEYS)
    else:
        read = longest if window is None else min(longest, window + queries + config.keys)
        splits = split_count(len(requests) * kv_heads, -(-read // config.keys), _slots(q.device))
    rows = [batch.q_starts[r] + token if token < batch.q_lens[r] else -1 for r in requests for token in range(queries)]
    return _Decodes(_on_device(requests, q), _on_device(rows, q), splits, tuple(config))


def _on_device(values: Sequence[Any], like: Tensor) -> Tensor:
    found = torch.tensor(values, dtype=torch.int32)
    return found.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else found.to(like.device)


@cache
def _slots(device: torch.device) -> int:
    """Blocks of threads of a decode that run at a time: two on each multiprocessor, by their shared memory."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def check(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, *, softmax_scale: float, grad: bool, encoded: bool
) -> None:
    """Raise ValueError for what the kernels do not take, and another backend does."""
    check_heads(q, k, v, softmax_scale=softmax_scale)
    if encoded and not takes_scales(q.shape[2], q.itemsize):
        raise ValueError(
            '`q` must be bfloat16 or float16 with a head_dim of at most 128 over keys in 8 bits for backend="triton", '
            f'got {q.dtype} and {q.shape[2]}; backend="torch" takes it'
        )
    if grad:
        raise ValueError(
            '`q`, `k`, `v` and `sinks` must need no gradient for backend="triton", got one that does; '
            'backend="torch" takes them'
        )
    if batch.device != q.device:
        raise ValueError(f"`batch` must be on the device of `q` ({q.device}), got {batch.device}; use `batch.to`")
    if batch.has_cache and batch.exact and not 0 <= _last_page(batch) < max(len(k), 1):
        raise ValueError(f"`batch` must have pages of the {len(k)} that `k` has, got page {_last_page(batch)}")


def _last_page(batch: RaggedBatch) -> int:
    key = "attention.last_page"
    if key not in batch.plans:
        pages = [page for row in batch.pages for page in row]
        batch.plans[key] = min(pages) if min(pages, default=0) < 0 else max(pages, default=0)
    found: int = batch.plans[key]
    return found


def check_heads(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> None:
    """Raise ValueError unless heads are of a size, a dtype and at places that the kernels read."""
    refuse_dtype("q", q.dtype)
    dim, vector = q.shape[2], BYTES // min(q.itemsize, k.itemsize)
    if dim % vector or not BYTES <= dim <= MOST_DIM:
        raise ValueError(
            f"`q` must have a head_dim that is a multiple of {vector}, from {BYTES} to {MOST_DIM}, for "
            f'backend="triton", got {dim}; backend="torch" takes it'
        )
    if not softmax_scale > 0:
        raise ValueError(
            f'`softmax_scale` must be positive for backend="triton", got {softmax_scale}; backend="torch" takes it'
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        vector = BYTES // x.itemsize
        if x.numel() and (x.stride(-1) != 1 or any(stride % vector for stride in x.stride()[:-1])):
            raise ValueError(
                f"`{name}` must have unit stride in head_dim and others that are multiples of {vector}, for "
                f'backend="triton", got {list(x.stride())}; backend="torch" takes it'
            )
        if not torch.compiler.is_compiling() and x.data_ptr() % BYTES:  # what is traced has no address yet
            raise ValueError(
                f'`{name}` must start at a multiple of {BYTES} bytes for backend="triton", got {x.data_ptr()}; '
                'backend="torch" takes it'
            )
