"""Attention over flat or paged keys with the log-sum-exp, a tile of queries at a time.

The query heads that read a KV head are rows of one tile, token after token, so that a key is read once for all of them
and a chunk of a few tokens fills a tile. What a tile sees is three runs of blocks of keys: those that a window cuts
through, those that every row sees, which need no mask and no bound, and those on the diagonal. Where positions are
given, as those of a rank that holds every n-th token, the same three runs are found by bisection.

The softmax is that of base 2, its factor folded into the exponent. A row's sums run over blocks of keys that are
counted from the request's first key, and a block of which a row sees nothing changes none of its bits: so what a token
gathers depends neither on the chunk that it came in nor on other requests.

Queries are loaded once, keys and values by an asynchronous pipeline of `num_stages`. Strides are given in units of 16
bytes, which says at compile time that rows are aligned, also where a head's size is no power of two.

Source: FlashAttention-2, arXiv:2307.08691; the exponent, and grouped heads as rows, as in its decoding kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from seqpar.kernels.dispatch import kernel_op

__all__ = [
    "CONFIGS",
    "PLACED_ROWS",
    "Config",
    "arch_of",
    "attention_into",
    "attention_kernel",
    "config_of",
    "finish",
    "fold_runs",
    "hidden_out",
    "load_block",
    "load_rows",
    "memory_of",
    "narrowed",
    "precision",
    "rows_of",
    "store_rows",
    "takes_scales",
    "variant",
    "variants",
    "weigh_scores",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PLACED_ROWS = 1 << 30
"""Where positions are given, every request takes the largest tile: in smaller ones registers would spill."""


class Config(NamedTuple):
    """A tile's rows and keys at a time, for heads of up to `dim` numbers of `itemsize` bytes, from sm_`arch` on."""

    dim: int
    itemsize: int
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    arch: int


CONFIGS = (
    Config(64, 2, 128, 64, 8, 3, 80),
    Config(64, 2, 64, 64, 4, 3, 80),
    Config(128, 2, 128, 64, 8, 3, 90),
    Config(128, 2, 64, 64, 4, 3, 90),
    Config(128, 2, 64, 32, 8, 3, 80),
    Config(256, 2, 64, 32, 8, 2, 80),
    Config(64, 4, 64, 32, 4, 2, 90),
    Config(64, 4, 32, 32, 4, 2, 80),
    Config(128, 4, 16, 32, 4, 2, 80),
    Config(256, 4, 16, 16, 4, 2, 80),
)
"""Of the tiles of a head's size the first that a request fills, else the last. None spills: on an A100 the operands of
a product are in registers, on an H100 in shared memory."""


def config_of(dim: int, itemsize: int, rows: int, arch: int) -> Config:
    """The tile for heads of `dim` numbers and requests of up to `rows` rows, on sm_`arch`."""
    size = min(config.dim for config in CONFIGS if config.dim >= dim)
    fitting = [c for c in CONFIGS if (c.dim, c.itemsize) == (size, itemsize) and c.arch <= arch]
    latest = [config for config in fitting if config.arch == max(c.arch for c in fitting)]
    return next((config for config in latest if config.rows <= rows), latest[-1])


def takes_scales(dim: int, itemsize: int) -> bool:
    """Whether queries of such heads attend to keys in 8 bits: in the tiles of all others registers would spill."""
    return itemsize == 2 and dim <= 128


def narrowed(config: Config) -> Config:
    """The tile for keys in 8 bits: half as many at a time, since on their way to a product they are in registers."""
    return config._replace(keys=max(16, config.keys // 2))


@triton.jit
def _places(
    n: int,
    pages: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The page of each of the keys from n on, and its place there; without pages all lie in one, from `first` on."""
    index = n + tl.arange(0, BLOCK_N)
    if PAGE == 0:
        return first, index.to(tl.int64)
    elif PAGE % BLOCK_N == 0:  # all in one
        return tl.load(pages + n // PAGE).to(tl.int64), (n % PAGE + tl.arange(0, BLOCK_N)).to(tl.int64)
    else:
        if MASKED:
            page = tl.load(pages + index // PAGE, mask=index < stop, other=0)
        else:
            page = tl.load(pages + index // PAGE)
        return page.to(tl.int64), (index % PAGE).to(tl.int64)


@triton.jit
def load_block(
    at: tl.tensor, keys: tl.tensor, dims: tl.tensor, MASKED: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """A block of keys or values; what is not there is zero, since even an unseen value must be a number."""
    if MASKED and PADDED:
        return tl.load(at, mask=keys & dims, other=0)
    elif MASKED:
        return tl.load(at, mask=keys, other=0)
    elif PADDED:
        return tl.load(at, mask=dims, other=0)
    else:
        return tl.load(at)


@triton.jit
def _load_scales(at: tl.tensor, there: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """The scales of a block of keys or values in 8 bits, times 256 for `_widened`; NaN for those of no numbers."""
    if MASKED:
        exponent = tl.load(at, mask=there, other=127).to(tl.int32)
    else:
        exponent = tl.load(at).to(tl.int32)
    return tl.where(exponent == 255, float("nan"), (exponent + 8 << 23).to(tl.float32, bitcast=True))


@triton.jit
def _widened(codes: tl.tensor, scales: tl.tensor, like: tl.tensor) -> tl.tensor:
    """8-bit floats times scales that broadcast, exact in the dtype of `like`; float16 counts exponents from 8 lower."""
    bits = codes.to(tl.int32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return (half.to(tl.float32) * scales).to(like.dtype)


@triton.jit
def hidden_out(
    score: tl.tensor,
    there: tl.tensor,
    key_positions: tl.tensor,
    positions: tl.tensor,
    window: int,
    WINDOWED: tl.constexpr,
) -> tl.tensor:
    """Scores, -inf where a row does not see a key: one that is not there, after its own position, before its window."""
    seen = there[None, :] & (key_positions[None, :] <= positions[:, None])
    if WINDOWED:
        seen = seen & (key_positions[None, :] > positions[:, None] - window)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def weigh_scores(
    score: tl.tensor, total: tl.tensor, top: tl.tensor, scale: float, MASKED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The weights of a block, what older sums are to be multiplied by, the new total, and the new maximum."""
    highest = tl.maximum(top, tl.max(score, 1) * scale)
    shift = highest
    if MASKED:
        shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(score * scale - shift[:, None])
    keep = tl.exp2(top - shift)
    return weight, keep, total * keep + tl.sum(weight, 1), highest


@triton.jit
def _fold_keys(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    memory: tl.tuple,
    scale: float,
    window: int,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PLACED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums with keys [start, stop) in them; BLOCK_N divides `start`, and if not MASKED `stop` too."""
    k, v, k_scales, v_scales, pages, key_positions, first, k_page, k_token, v_page, v_token, s_page, s_token = memory
    dims = tl.arange(0, BLOCK_D)
    PADDED: tl.constexpr = DIM != BLOCK_D
    for n in range(start, stop, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        there = index < stop
        page, slot = _places(n, pages, first, stop, BLOCK_N, PAGE, MASKED)
        keys = load_block(
            k + (page * k_page + slot * k_token)[None, :] + dims[:, None],
            there[None, :],
            (dims < DIM)[:, None],
            MASKED,
            PADDED,
        )
        if SCALED:
            keys = _widened(keys, _load_scales(k_scales + page * s_page + slot * s_token, there, MASKED)[None, :], q)
        score = tl.dot(q, keys, input_precision=PRECISION)
        if MASKED:
            position = index
            if PLACED:
                position = tl.load(key_positions + index, mask=there, other=0)
            score = hidden_out(score, there, position, positions, window, WINDOWED)
        weight, keep, total, top = weigh_scores(score, total, top, scale, MASKED)
        acc = acc * keep[:, None]
        values = load_block(
            v + (page * v_page + slot * v_token)[:, None] + dims[None, :],
            there[:, None],
            (dims < DIM)[None, :],
            MASKED,
            PADDED,
        )
        if SCALED:
            values = _widened(
                values, _load_scales(v_scales + page * s_page + slot * s_token, there, MASKED)[:, None], q
            )
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit
def fold_runs(
    q: tl.tensor,
    positions: tl.tensor,
    start: tl.tensor,
    full_start: tl.tensor,
    full_stop: tl.tensor,
    stop: tl.tensor,
    memory: tl.tuple,
    scale: float,
    window: int,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    PLACED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What rows gather from keys [start, stop), of which each sees [full_start, full_stop); BLOCK_N divides `start`.

    Where keys lie is `memory`: k, v, k_scales, v_scales, pages, key_positions, first, and the strides k_page, k_token,
    v_page, v_token, s_page, s_token in elements.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Blocks that all rows see wholly are those between here and there.
    here = start
    if WINDOWED:
        here = tl.maximum(start, tl.cdiv(full_start, BLOCK_N) * BLOCK_N)
    there = tl.maximum(here, full_stop // BLOCK_N * BLOCK_N)
    if WINDOWED:
        acc, total, top = _fold_keys(
            acc, total, top, q, positions, start, tl.minimum(here, stop), memory, scale, window,
            DIM, BLOCK_D, BLOCK_N, PAGE, True, True, PLACED, SCALED, PRECISION,
        )  # fmt: skip
    acc, total, top = _fold_keys(
        acc, total, top, q, positions, here, there, memory, scale, window,
        DIM, BLOCK_D, BLOCK_N, PAGE, False, WINDOWED, PLACED, SCALED, PRECISION,
    )  # fmt: skip
    acc, total, top = _fold_keys(
        acc, total, top, q, positions, there, stop, memory, scale, window,
        DIM, BLOCK_D, BLOCK_N, PAGE, True, WINDOWED, PLACED, SCALED, PRECISION,
    )  # fmt: skip
    return acc, total, top


@triton.jit
def rows_of(
    first: tl.tensor, kv_head: tl.tensor, q_len: tl.tensor, RATIO: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Token and head of a tile's rows from row `first` on, and which of them there are."""
    row = first + tl.arange(0, BLOCK_M)
    token = row // RATIO
    return token, kv_head * RATIO + row % RATIO, token < q_len


@triton.jit
def load_rows(
    q: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    inside: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """The queries of a tile, zeros where there are none; strides in elements."""
    dims = tl.arange(0, BLOCK_D)
    at = token.to(tl.int64) * q_token + head * q_head
    return tl.load(q + at[:, None] + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(
    out: tl.tensor,
    lse: tl.tensor,
    place: tl.tensor,
    result: tl.tensor,
    mass: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A tile's rows of `out` and `lse`, which are `place` rows of a head from the first one."""
    dims = tl.arange(0, BLOCK_D)
    stored = inside[:, None] & (dims < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + place, mass, mask=inside)


@triton.jit
def finish(
    acc: tl.tensor, total: tl.tensor, top: tl.tensor, sinks: tl.tensor, inside: tl.tensor, SINKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Output and log-sum-exp of finished sums, with each row's sink at `sinks`; (0, -inf) for those of nothing."""
    if SINKS:
        sink = tl.load(sinks, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        highest = tl.maximum(top, sink)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        keep = tl.exp2(top - shift)
        total = total * keep + tl.exp2(sink - shift)
        acc = acc * keep[:, None]
        top = highest
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    mass = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN2)
    return acc / safe[:, None], mass


@triton.jit
def _count_below(positions: tl.tensor, count: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """How many of increasing positions are less than a bound."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        less = tl.load(positions + middle) < bound
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low


@triton.jit(do_not_specialize=["window", "table_row"])
def attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tiles: tl.tensor,
    cu_q: tl.tensor,
    cu_kv: tl.tensor,
    table: tl.tensor,
    q_positions: tl.tensor,
    k_positions: tl.tensor,
    sinks: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    scale: float,
    window: int,
    table_row: int,
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
    PLACED: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Tile (request, number of its rows) of one KV head; strides of q in units of VEC elements, k and v of KV_VEC."""
    request = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    q_start = tl.load(cu_q + request)
    q_len = tl.load(cu_q + request + 1) - q_start
    kv_start = tl.load(cu_kv + request)
    kv_len = tl.load(cu_kv + request + 1) - kv_start

    token, head, inside = rows_of(tile * BLOCK_M, kv_head, q_len, RATIO, BLOCK_M)
    queries = load_rows(q, q_start + token, head, inside, q_token * VEC, q_head * VEC, DIM, BLOCK_D)

    begin = tile * BLOCK_M // RATIO
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // RATIO, q_len - 1)
    keys_at = k_positions + kv_start
    full_start = kv_len * 0
    start = kv_len * 0
    if PLACED:
        positions = tl.load(q_positions + q_start + token, mask=inside, other=-1)
        low = tl.load(q_positions + q_start + begin)
        high = tl.load(q_positions + q_start + end)
        full_stop = _count_below(keys_at, kv_len, low + 1)
        stop = _count_below(keys_at, kv_len, high + 1)
        if WINDOWED:
            start = _count_below(keys_at, kv_len, low + 1 - window)
            full_start = _count_below(keys_at, kv_len, high + 1 - window)
    else:
        positions = kv_len - q_len + token
        full_stop = kv_len - q_len + begin + 1
        stop = kv_len - q_len + end + 1
        if WINDOWED:
            start = tl.maximum(full_stop - window, 0)
            full_start = tl.maximum(stop - window, 0)
    start = start // BLOCK_N * BLOCK_N
    memory = (
        k + kv_head * (k_head * KV_VEC), v + kv_head * (v_head * KV_VEC), k_scales + kv_head * s_head,
        v_scales + kv_head * s_head, table + request * table_row, keys_at, kv_start.to(tl.int64),
        k_page * KV_VEC, k_token * KV_VEC, v_page * KV_VEC, v_token * KV_VEC, s_page, s_token,
    )  # fmt: skip
    acc, total, top = fold_runs(
        queries, positions, start, full_start, full_stop, stop, memory, scale, window,
        DIM, BLOCK_D, BLOCK_M, BLOCK_N, PAGE, WINDOWED, PLACED, SCALED, PRECISION,
    )  # fmt: skip
    result, mass = finish(acc, total, top, sinks + head, inside, SINKS)
    place = (q_start + token).to(tl.int64) * out_heads + head
    store_rows(out, lse, place, result, mass, inside, DIM, BLOCK_D)


class Memory(NamedTuple):
    """Where keys and values lie, as kernels are told: `strides` of page, token and head of k, of v, and of scales."""

    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor
    strides: tuple[int, ...]
    vec: int
    scaled: bool


def memory_of(k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> Memory:
    """Strides of k and v are in units of 16 bytes; without scales something stands in their place that is not read."""
    vec = 16 // k.itemsize
    strides = [x.stride(dim) // vec for x in (k, v) for dim in (0, -3, -2)]
    if k_scales is None or v_scales is None:
        return Memory(k, v, k, k, (*strides, 0, 0, 0), vec, False)
    of_scales = (k_scales.stride(0), k_scales.stride(-2), k_scales.stride(-1))
    return Memory(k.view(torch.uint8), v.view(torch.uint8), k_scales, v_scales, (*strides, *of_scales), vec, True)


def _launch(
    out: Float[Tensor, "t h d"],
    lse: Float[Tensor, "t h"],
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    tiles: Int32[Tensor, "n two"],
    cu_q: Int32[Tensor, " starts"],
    cu_kv: Int32[Tensor, " starts"],
    table: Int32[Tensor, "requests pages"],
    q_positions: Int32[Tensor, " t"] | None,
    k_positions: Int32[Tensor, " keys"] | None,
    sinks: Float[Tensor, " h"] | None,
    k_scales: UInt8[Tensor, "*keys g"] | None,
    v_scales: UInt8[Tensor, "*keys g"] | None,
    scale: float,
    window: int,
    config: list[int],
) -> None:
    tile = Config(*config)
    heads, dim = q.shape[1:]
    paged, vec = k.dim() == 4, 16 // q.itemsize
    placed = q_positions is not None
    memory = memory_of(k, v, k_scales, v_scales)
    attention_kernel[(len(tiles), k.shape[-2])](
        q,
        memory.k,
        memory.v,
        out,
        lse,
        tiles,
        cu_q,
        cu_kv,
        table,
        q_positions if placed else cu_q,
        k_positions if placed else cu_q,
        lse if sinks is None else sinks,
        memory.k_scales,
        memory.v_scales,
        scale * LOG2E.value,
        window,
        table.stride(0),
        q.stride(0) // vec,
        q.stride(1) // vec,
        *memory.strides,
        out.stride(0) // dim,
        RATIO=heads // k.shape[-2],
        DIM=dim,
        VEC=vec,
        KV_VEC=memory.vec,
        BLOCK_M=tile.rows,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=tile.keys,
        PAGE=k.shape[1] if paged else 0,
        WINDOWED=window > 0,
        PLACED=placed,
        SINKS=sinks is not None,
        SCALED=memory.scaled,
        PRECISION=precision(q.dtype, dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@cache
def arch_of(device: torch.device) -> int:
    """The architecture of a CUDA device as sm_`arch`; for what interprets, the one that the tiles are made for."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 90 if device.type != "cuda" else 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype, dim: int) -> str:
    """How products of float32 are made: of three in tf32, which loses no more than sums do, as far as registers go."""
    return "tf32x3" if dtype == torch.float32 and dim <= 128 and torch.version.hip is None else "ieee"


attention_into = kernel_op(
    "attention(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor tiles, Tensor cu_q, Tensor cu_kv, "
    "Tensor table, Tensor? q_positions, Tensor? k_positions, Tensor? sinks, Tensor? k_scales, Tensor? v_scales, "
    "float scale, int window, int[] config) -> ()",
    _launch,
    fake=lambda *args: None,
    mutates=("out", "lse"),
)
"""Attention of the rows in `tiles`, whose heads share KV heads in one ratio, into `out` and `lse`; see `plan`."""


def variants() -> Iterator[tuple[Any, ...]]:
    """Every configuration at its most demanding, and the others of the commonest; see `seqpar.kernels.targets`."""
    most = {"WINDOWED": True, "PLACED": False, "SINKS": True, "SCALED": False}
    for config in CONFIGS:
        name = "fp32" if config.itemsize == 4 else "bf16"
        uses = [("pages of 16, window, sinks", 16, most)]
        if takes_scales(config.dim, config.itemsize):
            uses.append(("8 bits in pages of 16, window", 16, most | {"SCALED": True}))
        if config == config_of(128, 2, PLACED_ROWS, 90):
            uses += [("placed", 0, most | {"PLACED": True}), ("flat", 0, {**most, "WINDOWED": False, "SINKS": False})]
        for use, page, flags in uses:
            tile = narrowed(config) if flags["SCALED"] else config
            yield variant(attention_kernel, f"{name} {use}", name, tile, page, {"RATIO": 4, **flags})


def variant(
    kernel: Any, name: str, dtype: str, config: Config, page: int | None, constexprs: dict[str, Any]
) -> tuple[Any, ...]:
    """A configuration of one of the attention kernels, whose arguments have the same types where they are the same."""
    pointers = dict.fromkeys(("q", "k", "v", "out"), dtype) | {"lse": "fp32", "sinks": "fp32"}
    pointers |= dict.fromkeys(("tiles", "bounds", "listed", "requests", "cu_q", "cu_kv", "table"), "i32")
    pointers |= dict.fromkeys(("q_positions", "k_positions"), "i32")
    scaled = constexprs.get("SCALED", False)
    pointers |= dict.fromkeys(("k_scales", "v_scales"), "u8" if scaled else dtype)
    if scaled:
        pointers |= dict.fromkeys(("k", "v"), "u8")
    if "SCALED" in constexprs:
        constexprs = constexprs | {"KV_VEC": 16 if scaled else 16 // config.itemsize}
    constants = constexprs | {
        "DIM": config.dim,
        "VEC": 16 // config.itemsize,
        "BLOCK_M": config.rows,
        "BLOCK_D": config.dim,
        "BLOCK_N": config.keys,
        "PRECISION": "tf32x3" if dtype == "fp32" and config.dim <= 128 else "ieee",
    }
    if page is not None:
        constants["PAGE"] = page
    signature = {
        arg: f"*{pointers[arg]}" if arg in pointers else "fp32" if arg == "scale" else "i32"
        for arg in kernel.arg_names
        if arg not in constants
    }
    # Float32 heads of more than 128 numbers are launched on sm_80 too, where a few bytes of theirs spill.
    targets = ("sm_80", "sm_90") if config.arch == 80 and config.dim * config.itemsize <= 512 else ("sm_90",)
    label = f"{name} {config.dim} {config.rows}x{config.keys}"
    return label, kernel, signature, constants, config.num_warps, config.num_stages, {}, targets
