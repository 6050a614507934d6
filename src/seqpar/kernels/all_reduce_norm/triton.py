"""A sum over ranks, the residual added to it and the norm of the total, in one kernel on memory that the ranks share.

Every rank launches the same kernel with as many blocks, and block b of a rank meets block b of the others:

    stage     its rows of this rank's partial into this rank's arena
    meet
    reduce    those of its rows that this rank owns: out of all arenas, added in float32 in rank order, rounded once
    gather    in two shots: push what was reduced into all arenas, meet, and copy it from the own one

In one shot every rank owns all rows, and there is one meeting. In two, rank r owns part r of an even split. Residual
and norm follow the sum where the residual is: where it is sharded by tokens, at the owner, so that a row is normed once
and its total never travels (TokenWeave, arXiv:2505.11329); else at everyone, after the gathering.

**Meetings.** A flag holds the number of the last call in which its writer came to a meeting; it is written by that rank
alone, and lies in the memory of the one that waits. Numbers grow, so a flag is never reset, and a rank that is late
reads the number of a later call as well as its own. A block counts its calls in its arena: a recorded graph replays
without a host that would count. All threads of a block have written when one of them signals (barrier [A], release at
system scope), and none reads before all signals are seen (acquire at system scope, barrier [B]).

**Reuse.** There is no closing meeting; the halves that partials are staged in take turns instead, which costs memory
and no latency. Call n writes over what the others read in call n - 2. It starts when call n - 1 has ended here, which
waited for every rank to come to call n - 1; launches of a rank follow one another, so that rank had ended call n - 2.
What is gathered needs one place only: others write to it in call n after this rank has come to call n, and it had ended
n - 1, and with it its reading, by then. That holds for any mix of one and two shots and of sizes, as long as
all calls on an arena are in one order, the same on all ranks, and no two at a time.

`tests/kernels/test_all_reduce_norm.py` checks this on what the kernel does: every two accesses to the same bytes are
ordered by launches, barriers and signals.

Blocks wait for their like only, and GPUs start blocks in their order, so no number of them can wait for one that cannot
start. Where a rank never comes, the others spin until their process ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.all_reduce_norm.plan import ArenaPlan
from seqpar.kernels.dispatch import kernel_op
from seqpar.kernels.targets import Variant

__all__ = ["LONGEST", "all_reduce_norm", "variants"]

LONGEST = 1 << 14
"""Numbers of a row that fit into the registers of a block, with those of a part to add."""


@triton.jit
def half_of(epoch):
    """Which half a call stages in."""
    return epoch % 2


@triton.jit
def share(tokens, owner, OWNERS: tl.constexpr):
    """The rows of one of OWNERS, from first to end, as `partition.even_ranges` has them."""
    size = tokens // OWNERS
    extra = tokens % OWNERS
    first = owner * size + tl.minimum(owner, extra)
    return first, first + size + tl.where(owner < extra, 1, 0)


@triton.jit
def in_arena(addresses_ptr, rank, offset, like_ptr):
    """A pointer into the arena of `rank`."""
    return tl.multiple_of((tl.load(addresses_ptr + rank) + offset).to(like_ptr.dtype), 16)


@triton.jit
def signal(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    """Tell this block of all ranks that it has come here on this one."""
    peer = tl.arange(0, PADDED)
    there = peer < RANKS
    arenas = tl.load(addresses_ptr + peer, mask=there, other=0)
    flag = (arenas + flags + (block * RANKS + rank) * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flag, epoch, mask=there, sem="release", scope="sys")


@triton.jit
def await_all(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    """Return when this block has come here on every rank, or further."""
    peer = tl.arange(0, PADDED)
    there = peer < RANKS
    flag = (tl.load(addresses_ptr + rank) + flags + (block * RANKS + peer) * 8).to(tl.pointer_type(tl.int64))
    seen = tl.atomic_add(flag, 0, mask=there, sem="acquire", scope="sys")
    while tl.min(tl.where(there, seen, epoch), axis=0) < epoch:
        seen = tl.atomic_add(flag, 0, mask=there, sem="acquire", scope="sys")


@triton.jit
def meet(addresses_ptr, flags, rank, block, epoch, RANKS: tl.constexpr, PADDED: tl.constexpr):
    """What this block of any rank wrote before, it may read on every rank afterwards."""
    tl.debug_barrier()  # [A] all threads have written
    signal(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)
    await_all(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)
    tl.debug_barrier()  # [B] before any thread reads


@triton.jit
def reduced(addresses_ptr, offset, at, inside, like_ptr, RANKS: tl.constexpr):
    """A row of all arenas, added in rank order."""
    total = tl.load(in_arena(addresses_ptr, 0, offset, like_ptr) + at, mask=inside, other=0.0).to(tl.float32)
    for peer in tl.static_range(1, RANKS):
        part = tl.load(in_arena(addresses_ptr, peer, offset, like_ptr) + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    return total.to(like_ptr.dtype.element_ty)


@triton.jit
def normed_with(residual, row, weight, width, eps):
    """The total of a row and its residual, and its norm, rounded where `kernels.rms_norm` rounds."""
    total = (residual.to(tl.float32) + row.to(tl.float32)).to(residual.dtype)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    out = (wide * scale).to(residual.dtype).to(tl.float32) * weight.to(tl.float32)
    return total, out.to(residual.dtype)


@triton.jit
def words_of(row, BLOCK: tl.constexpr):
    """A row as four tensors of 32-bit words, those of a 16-byte vector at the same place."""
    bits: tl.constexpr = row.dtype.primitive_bitwidth
    if bits == 16:
        low, high = tl.split(tl.reshape(row.to(tl.int16, bitcast=True), [BLOCK // 2, 2]))
        words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        words = row.to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(words, [BLOCK * bits // 128, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def row_of(first, second, third, fourth, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """The row of such words."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK * bits // 32])
    if bits == 16:
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        row = tl.reshape(halves, [BLOCK]).to(dtype, bitcast=True)
    else:
        row = words.to(dtype, bitcast=True)
    return row


LOAD_BF16 = """{ .reg .pred p; setp.ne.s32 p, $5, 0;
@!p mov.b32 $0, 0; @!p mov.b32 $1, 0; @!p mov.b32 $2, 0; @!p mov.b32 $3, 0;
@p multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4]; }"""
STORE_BF16 = """{ .reg .pred p; setp.ne.s32 p, $6, 0;
@p multimem.st.relaxed.sys.global.v4.bf16x2 [$5], {$1, $2, $3, $4}; mov.b32 $0, 0; }"""

LOADS = {
    "bf16": LOAD_BF16,
    "fp16": LOAD_BF16.replace("bf16x2", "f16x2"),
    "fp32": LOAD_BF16.replace(".acc::f32.v4.bf16x2", ".v4.f32"),
}
STORES = {
    "bf16": STORE_BF16,
    "fp16": STORE_BF16.replace("bf16x2", "f16x2"),
    "fp32": STORE_BF16.replace("bf16x2", "f32"),
}


@triton.jit
def reduced_by_switch(address, width, dtype: tl.constexpr, BLOCK: tl.constexpr, LOAD: tl.constexpr):
    """A row of all arenas, added by the switch in an order of its own; `address` is that of the row in all of them."""
    vectors: tl.constexpr = BLOCK * dtype.primitive_bitwidth // 128
    vector = tl.arange(0, vectors)
    there = (vector * (BLOCK // vectors) < width).to(tl.int32)
    words = tl.inline_asm_elementwise(
        LOAD,
        "=r,=r,=r,=r,l,r",
        [address + vector * 16, there],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )
    return row_of(words[0], words[1], words[2], words[3], dtype, BLOCK)


@triton.jit
def pushed_by_switch(address, row, width, BLOCK: tl.constexpr, STORE: tl.constexpr):
    """Write a row into all arenas."""
    vectors: tl.constexpr = BLOCK * row.dtype.primitive_bitwidth // 128
    vector = tl.arange(0, vectors)
    there = (vector * (BLOCK // vectors) < width).to(tl.int32)
    first, second, third, fourth = words_of(row, BLOCK)
    tl.inline_asm_elementwise(
        STORE,
        "=r,r,r,r,r,l,r",
        [first, second, third, fourth, address + vector * 16, there],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["multicast", "rank", "tokens"])
def all_reduce_norm_kernel(
    addresses_ptr,
    multicast,
    partial_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    flags,
    staged,
    half,
    gathered,
    rank,
    tokens,
    width,
    eps,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LOAD: tl.constexpr,
    STORE: tl.constexpr,
):
    """One call; see above.

    Arenas of the ranks are at the RANKS addresses, and `multicast` is that of all of them at once, for the instructions
    LOAD and STORE of a switch where these are not empty. Offsets in an arena are those of `ArenaPlan`. PADDED is the
    next power of two.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    OWNERS: tl.constexpr = RANKS if TWO_SHOT else 1
    item: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth // 8
    counter = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64)) + block
    epoch = tl.load(counter) + 1
    staged += half_of(epoch) * half
    column = tl.arange(0, BLOCK)
    inside = column < width
    stride = tl.cast(width, tl.int64)

    own = in_arena(addresses_ptr, rank, staged, out_ptr)
    for owner in range(OWNERS):
        first, end = share(tokens, owner, OWNERS)
        for row in range(first + block, end, blocks):
            at = row * stride + column
            tl.store(own + at, tl.load(partial_ptr + at, mask=inside), mask=inside)
    meet(addresses_ptr, flags, rank, block, epoch, RANKS, PADDED)

    AT_OWNER: tl.constexpr = SHARDED or not TWO_SHOT
    if AT_OWNER:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    first, end = share(tokens, rank if TWO_SHOT else 0, OWNERS)
    for row in range(first + block, end, blocks):
        at = row * stride + column
        if LOAD == "":
            result = reduced(addresses_ptr, staged, at, inside, out_ptr, RANKS)
        else:
            result = reduced_by_switch(
                multicast + staged + row * stride * item, width, out_ptr.dtype.element_ty, BLOCK, LOAD
            )
        if AT_OWNER:
            kept = at - first * stride if SHARDED else at
            residual = tl.load(residual_ptr + kept, mask=inside, other=0.0)
            total, result = normed_with(residual, result, weight, width, eps)
            tl.store(total_ptr + kept, total, mask=inside)
        if not TWO_SHOT:
            tl.store(out_ptr + at, result, mask=inside)
        elif STORE == "":
            for peer in range(RANKS):
                tl.store(in_arena(addresses_ptr, peer, gathered, out_ptr) + at, result, mask=inside)
        else:
            pushed_by_switch(multicast + gathered + row * stride * item, result, width, BLOCK, STORE)

    if TWO_SHOT:
        meet(addresses_ptr, flags + blocks * RANKS * 8, rank, block, epoch, RANKS, PADDED)
        own = in_arena(addresses_ptr, rank, gathered, out_ptr)
        if not AT_OWNER:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        for owner in range(OWNERS):
            first, end = share(tokens, owner, OWNERS)
            for row in range(first + block, end, blocks):
                at = row * stride + column
                result = tl.load(own + at, mask=inside, other=0.0)
                if not AT_OWNER:
                    residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
                    total, result = normed_with(residual, result, weight, width, eps)
                    tl.store(total_ptr + at, total, mask=inside)
                tl.store(out_ptr + at, result, mask=inside)
    tl.store(counter, epoch)


def configuration(width: int) -> tuple[int, int, dict[str, int]]:
    """BLOCK, warps and other options for rows of `width` numbers: 8 numbers a thread, as long as there are threads.

    The assembler would spill a few bytes to save registers that nobody else needs, unless it is told how many it has.
    """
    block = triton.next_power_of_2(max(width, 16))
    warps = min(32 if block == LONGEST else 16, max(1, block // 256))
    return block, warps, {"maxnreg": 128} if warps < 32 else {}


def variants() -> Iterator[Variant]:
    shapes = [("bf16", 8, width) for width in (2048, 4096, 8192, LONGEST)]
    shapes += [("bf16", 2, 8192), ("bf16", 3, 8192), ("fp16", 8, 4096), ("fp32", 8, 4096), ("fp32", 8, LONGEST)]
    for dtype, ranks, width in shapes:
        for name, two_shot, sharded in (("one", False, False), ("two", True, False), ("sharded", True, True)):
            for switch in (False, True):
                if switch and (ranks, width) not in ((8, 4096), (8, 8192)):
                    continue
                block, warps, options = configuration(width)
                yield Variant(
                    f"{dtype}-{width}x{ranks}-{name}{'-multimem' if switch else ''}",
                    all_reduce_norm_kernel,
                    {
                        "addresses_ptr": "*i64",
                        **dict.fromkeys(("partial_ptr", "residual_ptr", "weight_ptr"), f"*{dtype}"),
                        **dict.fromkeys(("out_ptr", "total_ptr"), f"*{dtype}"),
                        "multicast": "i64",
                        **dict.fromkeys(("flags", "staged", "half", "gathered", "width"), "i32:16"),
                        **dict.fromkeys(("rank", "tokens"), "i32"),
                        "eps": "fp32",
                    },
                    {
                        **_constants(ranks, block, two_shot, sharded),
                        "LOAD": LOADS[dtype] if switch else "",
                        "STORE": STORES[dtype] if switch else "",
                    },
                    warps,
                    1,
                    options,
                    targets=("sm_90", "sm_100") if switch else ("sm_80", "sm_90", "sm_100", "gfx942"),
                )


def _constants(ranks: int, block: int, two_shot: bool, sharded: bool) -> dict[str, int | bool]:
    padded = triton.next_power_of_2(ranks)
    return {"RANKS": ranks, "PADDED": padded, "TWO_SHOT": two_shot, "SHARDED": sharded, "BLOCK": block}


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _launch(
    own: Tensor,
    addresses: Tensor,
    multicast: int,
    rank: int,
    blocks: int,
    capacity: int,
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    two_shot: bool,
    sharded: bool,
) -> tuple[Tensor, Tensor]:
    """`own` is this rank's arena, which the kernel reaches by its address, as others do."""
    out, total = _fake(
        own, addresses, multicast, rank, blocks, capacity, partial, residual, weight, eps, two_shot, sharded
    )
    tokens, width = partial.shape
    if not tokens:
        return out, total
    plan = ArenaPlan(addresses.numel(), blocks, capacity)
    block, warps, options = configuration(width)
    switch = _NAMES[partial.dtype] if multicast else ""
    all_reduce_norm_kernel[(blocks,)](
        addresses,
        multicast,
        partial.contiguous(),
        residual.contiguous(),
        weight.contiguous(),
        out,
        total,
        plan.flags,
        plan.staged,
        plan.half,
        plan.gathered,
        rank,
        tokens,
        width,
        eps,
        **_constants(plan.ranks, block, two_shot, sharded),
        LOAD=LOADS.get(switch, ""),
        STORE=STORES.get(switch, ""),
        num_warps=warps,
        num_stages=1,
        **(options if torch.version.hip is None else {}),
    )
    return out, total


def _fake(
    own: Tensor,
    addresses: Tensor,
    multicast: int,
    rank: int,
    blocks: int,
    capacity: int,
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    two_shot: bool,
    sharded: bool,
) -> tuple[Tensor, Tensor]:
    return partial.new_empty(partial.shape), residual.new_empty(residual.shape)


all_reduce_norm = kernel_op(
    "all_reduce_norm(Tensor(a!) own, Tensor addresses, int multicast, int rank, int blocks, int capacity, "
    "Tensor partial, Tensor residual, Tensor weight, float eps, bool two_shot, bool sharded) -> (Tensor, Tensor)",
    _launch,
    fake=_fake,
    mutates=("own",),
)
