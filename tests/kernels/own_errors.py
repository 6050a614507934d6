"""Seeing the errors that users see: the shape checker of the tests would speak before the library's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config


@contextmanager
def own_errors() -> Iterator[None]:
    """Switch the shape checker off."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
