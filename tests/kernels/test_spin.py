"""The stand-in for a collective: what it takes of GPUs, since the interpreter knows no clock; its host side."""

from __future__ import annotations

import math

import pytest

from seqpar.kernels.spin import spin
from tests.kernels.test_targets import TABLE, VARIANTS


def test_a_cta_takes_a_whole_multiprocessor() -> None:
    """Seven eighths of 65536 registers, so that nothing larger than an eighth fits in beside it; none spilled.

    What the table says is what is compiled: `test_targets.py`.
    """
    found = [
        (variant.constexprs["THREADS"], need)
        for name, variant in VARIANTS.items()
        if name.startswith("spin/")
        for need in TABLE[name]["targets"].values()
    ]
    assert len(found) == 6
    for threads, (registers, spilled, shared) in found:
        assert threads * registers >= 65536 * 7 // 8
        assert (spilled, shared) == (0, 0)


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
