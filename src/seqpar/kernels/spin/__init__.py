"""Time spent on some multiprocessors of a GPU: the stand-in for a collective that is not there."""

from __future__ import annotations

from math import isfinite

__all__ = ["spin"]


def spin(seconds: float, *, ctas: int) -> None:
    """Keep `ctas` multiprocessors of the current CUDA device from other work for some time, on the current stream.

    The time is the device's, from the start of each CTA; one that has to wait for its multiprocessor ends later.

    Raises:
        ValueError: a time that is negative or not finite, or fewer than one CTA.
    """
    if not (isfinite(seconds) and seconds >= 0):
        raise ValueError(f"`seconds` must be finite and >= 0, got {seconds}")
    if ctas < 1:
        raise ValueError(f"`ctas` must be at least 1, got {ctas}")
    from seqpar.kernels.spin import triton

    triton.spin(round(seconds * 1e9), ctas)
