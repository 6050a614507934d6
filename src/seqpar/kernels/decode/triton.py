"""Decodes with the keys of each request split over the processors, and the merge of what the parts found.

The few queries of a request and the heads that read a KV head are the rows of one tile, so a key is read once whatever
the ratio. Into how many parts keys are split is the host's choice (`plan.split_count`); where each ends follows on the
device from a request's own length, so a captured graph serves requests that grow. Partials are float32 and merged in
their order by `kernels.merge`; a part without keys writes no more than that it is empty. With one part there is nothing
to merge, and the kernel writes the result.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from seqpar.kernels.attention.triton import (
    LOG2E,
    Config,
    finish,
    fold_runs,
    load_rows,
    memory_of,
    narrowed,
    precision,
    rows_of,
    store_rows,
    takes_scales,
    variant,
)
from seqpar.kernels.dispatch import kernel_op
from seqpar.kernels.merge.triton import merge_into

__all__ = ["CONFIGS", "config_of", "decode_into", "decode_kernel", "variants"]

CONFIGS = (
    Config(64, 2, 16, 128, 4, 3, 80),
    Config(128, 2, 16, 64, 4, 3, 80),
    Config(128, 2, 64, 64, 4, 3, 90),
    Config(256, 2, 16, 32, 4, 3, 80),
    Config(64, 4, 16, 32, 4, 2, 80),
    Config(128, 4, 16, 32, 4, 2, 80),
    Config(256, 4, 16, 16, 4, 2, 80),
)
"""Of a head's size those for few rows, then those for many; rows are as many as there are, in powers of two."""


def config_of(dim: int, itemsize: int, rows: int, arch: int) -> Config:
    """The tile for heads of `dim` numbers and requests of so many rows, on sm_`arch`."""
    size = min(config.dim for config in CONFIGS if config.dim >= dim)
    fitting = [c for c in CONFIGS if (c.dim, c.itemsize) == (size, itemsize) and c.arch <= arch]
    chosen = next((config for config in fitting if config.rows >= rows), fitting[-1])
    return chosen._replace(rows=max(16, triton.next_power_of_2(rows)))


@triton.jit(do_not_specialize=["window", "table_row", "splits", "queries"])
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    requests: tl.tensor,
    cu_q: tl.tensor,
    cu_kv: tl.tensor,
    table: tl.tensor,
    sinks: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    scale: float,
    window: int,
    table_row: int,
    splits: int,
    queries: int,
    q_token: int,
    q_head: int,
    k_page: int,
    k_token: int,
    k_head: int,
    v_page: int,
    v_token: int,
    v_head: int,
    s_page: int,
    s_token: int,
    s_head: int,
    out_heads: int,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    VEC: tl.constexpr,
    KV_VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    PARTIAL: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One part of one KV head of one of `requests`, of SPLIT_KEYS keys, or if that is 0 as long as the others.

    With PARTIAL into row (split, place in `requests`, token of `queries`) of `out` and `lse`, else into the batch's.
    """
    place = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = tl.load(requests + place)
    q_start = tl.load(cu_q + request)
    q_len = tl.load(cu_q + request + 1) - q_start
    kv_start = tl.load(cu_kv + request)
    kv_len = tl.load(cu_kv + request + 1) - kv_start

    token, head, inside = rows_of(0, kv_head, q_len, RATIO, BLOCK_M)
    if PARTIAL:
        target = ((split * tl.num_programs(0) + place) * queries + token).to(tl.int64) * out_heads + head
    else:
        target = (q_start + token).to(tl.int64) * out_heads + head

    full_stop = kv_len - q_len + 1  # what the first token sees, and the last one
    full_start = kv_len * 0
    start = kv_len * 0
    if WINDOWED:
        start = tl.maximum(full_stop - window, 0) // BLOCK_N * BLOCK_N
        full_start = tl.maximum(kv_len - window, 0)
    if SPLIT_KEYS > 0:
        size = SPLIT_KEYS
        begin = split * size
    else:
        size = tl.cdiv(tl.cdiv(kv_len - start, BLOCK_N), splits) * BLOCK_N
        begin = start + split * size
    end = tl.minimum(begin + size, kv_len)
    begin = tl.maximum(begin, start)
    if PARTIAL:  # noqa: SIM102 (of a constant and a value)
        if begin >= end:
            tl.store(lse + target, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=inside)
            return

    rows = load_rows(q, q_start + token, head, inside, q_token * VEC, q_head * VEC, DIM, BLOCK_D)
    memory = (
        k + kv_head * (k_head * KV_VEC), v + kv_head * (v_head * KV_VEC), k_scales + kv_head * s_head,
        v_scales + kv_head * s_head, table + request * table_row, table, kv_start.to(tl.int64),
        k_page * KV_VEC, k_token * KV_VEC, v_page * KV_VEC, v_token * KV_VEC, s_page, s_token,
    )  # fmt: skip
    acc, total, top = fold_runs(
        rows, kv_len - q_len + token, begin, full_start, tl.minimum(full_stop, end), end, memory, scale, window,
        DIM, BLOCK_D, BLOCK_M, BLOCK_N, PAGE, WINDOWED, False, SCALED, PRECISION,
    )  # fmt: skip
    result, mass = finish(acc, total, top, sinks + head, inside, SINKS)
    store_rows(out, lse, target, result, mass, inside, DIM, BLOCK_D)


def _launch(
    out: Float[Tensor, "t h d"],
    lse: Float[Tensor, "t h"],
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    requests: Int32[Tensor, " n"],
    rows: Int32[Tensor, " own"],
    cu_q: Int32[Tensor, " starts"],
    cu_kv: Int32[Tensor, " starts"],
    table: Int32[Tensor, "all pages"],
    sinks: Float[Tensor, " h"] | None,
    k_scales: UInt8[Tensor, "*keys g"] | None,
    v_scales: UInt8[Tensor, "*keys g"] | None,
    scale: float,
    window: int,
    splits: int,
    split_keys: int,
    config: list[int],
) -> None:
    tile = Config(*config)
    heads, dim = q.shape[1:]
    queries = len(rows) // len(requests)
    vec, partial, memory = 16 // q.itemsize, splits > 1, memory_of(k, v, k_scales, v_scales)
    found, mass, added = out, lse, sinks
    if partial:
        added = None
        found = q.new_empty(splits, len(rows), heads, dim, dtype=torch.float32)
        mass = lse.new_empty(splits, len(rows), heads)
    decode_kernel[(len(requests), k.shape[-2], splits)](
        q,
        memory.k,
        memory.v,
        found,
        mass,
        requests,
        cu_q,
        cu_kv,
        table,
        lse if added is None else added,
        memory.k_scales,
        memory.v_scales,
        scale * LOG2E.value,
        window,
        table.stride(0),
        splits,
        queries,
        q.stride(0) // vec,
        q.stride(1) // vec,
        *memory.strides,
        heads if partial else out.stride(0) // dim,
        RATIO=heads // k.shape[-2],
        DIM=dim,
        VEC=vec,
        KV_VEC=memory.vec,
        BLOCK_M=tile.rows,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=tile.keys,
        PAGE=k.shape[1] if k.dim() == 4 else 0,
        WINDOWED=window > 0,
        SINKS=added is not None,
        PARTIAL=partial,
        SPLIT_KEYS=split_keys,
        SCALED=memory.scaled,
        PRECISION=precision(q.dtype, dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if partial:
        merge_into(out, lse, found.view(splits, -1, dim), mass.view(splits, -1), None, None, sinks, rows)


decode_into = kernel_op(
    "decode(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor requests, Tensor rows, Tensor cu_q, "
    "Tensor cu_kv, Tensor table, Tensor? sinks, Tensor? k_scales, Tensor? v_scales, float scale, int window, "
    "int splits, int split_keys, int[] config) -> ()",
    _launch,
    fake=lambda *args: None,
    mutates=("out", "lse"),
)
"""Attention of the tokens of `requests`, all heads of which share KV heads in one ratio, into `out` and `lse`.

`rows` are those of their tokens in the batch, of each request as many, -1 where it has fewer; see `plan`.
"""


def variants() -> Iterator[tuple[Any, ...]]:
    """Every configuration at its most demanding, and the others of the commonest; see `seqpar.kernels.targets`."""
    most = {"RATIO": 8, "WINDOWED": True, "SINKS": False, "PARTIAL": True, "SPLIT_KEYS": 0, "SCALED": False}
    for config in CONFIGS:
        name = "fp32" if config.itemsize == 4 else "bf16"
        uses = [("pages of 16, window", 16, most)]
        if takes_scales(config.dim, config.itemsize):
            uses.append(("8 bits in pages of 16, window", 16, most | {"SCALED": True}))
        if config == config_of(128, 2, 16, 90):
            plain = most | {"WINDOWED": False}
            uses += [
                ("whole", 16, plain | {"PARTIAL": False, "SINKS": True}),
                ("deterministic", 16, plain | {"SPLIT_KEYS": 1024}),
            ]
        for use, page, flags in uses:
            tile = narrowed(config) if flags["SCALED"] else config
            yield variant(decode_kernel, f"{name} {use}", name, tile, page, flags)
