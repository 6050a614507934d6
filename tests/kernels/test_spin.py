"""The stand-in for a collective: compiled for GPUs, since the interpreter knows no clock; its host side."""

from __future__ import annotations

import math

import pytest

from seqpar.kernels.spin import spin
from tests.kernels.compiled import Resources, compiled_apart

CODE = """
import json
from seqpar.kernels.spin.triton import THREADS, spin_kernel
from tests.kernels.compiled import compile_for
found = [
    compile_for(arch, spin_kernel, nanoseconds, 0, THREADS=THREADS, num_warps=THREADS // 32)
    for arch, nanoseconds in [(80, 500), (90, 500), (100, 500), (90, 1 << 40)]
]
print(json.dumps([THREADS, found]))
"""


def test_a_cta_takes_a_whole_multiprocessor() -> None:
    """Seven eighths of 65536 registers, so that nothing larger than an eighth fits in beside it; none spilled."""
    threads, found = compiled_apart(CODE)
    assert len(found) == 4
    for registers, stack, shared in (Resources(*one) for one in found):
        assert threads * registers >= 65536 * 7 // 8
        assert (stack, shared) == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "ctas", "message"),
    [
        (-1.0, 1, "`seconds` must be finite and >= 0, got -1.0"),
        (math.inf, 1, "`seconds` must be finite and >= 0, got inf"),
        (math.nan, 1, "`seconds` must be finite and >= 0, got nan"),
        (1.0, 0, "`ctas` must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(seconds: float, ctas: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        spin(seconds, ctas=ctas)
    assert str(error.value) == message


def test_nanoseconds_are_what_the_kernel_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar.kernels.spin import triton

    launched: list[tuple[int, int]] = []
    monkeypatch.setattr(triton, "spin", lambda nanoseconds, ctas: launched.append((nanoseconds, ctas)))
    spin(12.7e-6, ctas=4)
    assert launched == [(12700, 4)]
