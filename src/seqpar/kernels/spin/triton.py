"""CTAs that watch the device's clock, each on a multiprocessor of its own.

A CTA of a collective has hundreds of threads with many registers each, so that no matrix product runs beside it. One
that only waits would need ten registers, fit in everywhere, and cost others nothing. Here 1024 threads carry 32 values
each through the wait, and store them if time has run backwards, which no compiler knows to be impossible: 64 registers
a thread, all that a multiprocessor has (`tests/kernels/test_spin.py` looks them up in the table of what kernels need).
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from seqpar.kernels.targets import Variant

__all__ = ["THREADS", "spin", "spin_kernel", "variants"]

THREADS = 1024


@triton.jit
def _now() -> tl.tensor:
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _other(values: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise("not.b32 $0, $1;", "=r,r", [values], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["nanoseconds", "nowhere"])
def spin_kernel(nanoseconds: int, nowhere: int, THREADS: tl.constexpr) -> None:
    """Return `nanoseconds` after the start; `nowhere` is an address that nothing is stored at."""
    start = _now()
    index = tl.arange(0, 32 * THREADS)
    values = index
    now = start
    while now - start < nanoseconds:
        now = _now()
        if now < start:
            values = _other(values)
    if now < start:
        tl.store((nowhere + index.to(tl.int64) * 4).to(tl.pointer_type(tl.int32)), values)


def variants() -> Iterator[Variant]:
    for type_ in ("i32", "i64"):
        signature = {"nanoseconds": type_, "nowhere": "i32"}
        cuda = ("sm_80", "sm_90", "sm_100")  # the clock is read by PTX
        yield Variant(type_, spin_kernel, signature, {"THREADS": THREADS}, THREADS // 32, 3, targets=cuda)


def spin(nanoseconds: int, ctas: int) -> None:
    """Launch on the current stream of the current device."""
    spin_kernel[(ctas,)](nanoseconds, 0, THREADS=THREADS, num_warps=THREADS // 32)
