"""Fixtures for kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def own_errors() -> Iterator[None]:
    """Switch off the shape checker of tests, which would speak before the checks that users meet."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
