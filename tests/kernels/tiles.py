"""Attention in Triton's interpreter, in tiles so small that few tokens make many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import tests.kernels.interpreter  # noqa: F401  puts bfloat16 right
from seqpar.kernels.attention import launch
from seqpar.kernels.attention.triton import Config
from seqpar.kernels.sparse import triton as sparse

ROWS = KEYS = 16


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16 rows, or as many as a decode has, and 16 keys."""

    def tile(dim: int, itemsize: int, rows: int, arch: int) -> Config:
        return Config(dim, itemsize, ROWS, KEYS, 4, 2, 80)

    def decode(dim: int, itemsize: int, rows: int, arch: int) -> Config:
        return Config(dim, itemsize, max(ROWS, 1 << (rows - 1).bit_length()), KEYS, 4, 2, 80)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile_config", tile)
        patch.setattr(launch, "decode_config", decode)
        patch.setattr(sparse, "config_of", tile)
        yield
