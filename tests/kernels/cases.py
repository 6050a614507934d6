"""Attention inputs for tests: ragged shapes, uneven heads, and pages whose unwritten memory is NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from seqpar.ragged import RaggedBatch


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    batch: RaggedBatch


@dataclass(frozen=True)
class Case:
    """One attention problem; `page_size` 0 is a batch without a cache."""

    q_lens: tuple[int, ...]
    prefixes: tuple[int, ...]
    kv_head_of: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None
    page_size: int
    seed: int

    @property
    def kv_lens(self) -> tuple[int, ...]:
        return tuple(new + old for new, old in zip(self.q_lens, self.prefixes, strict=True))

    def batch(self) -> RaggedBatch:
        if not self.page_size:
            return RaggedBatch.build(self.q_lens, self.kv_lens)
        needs = [-(-keys // self.page_size) for keys in self.kv_lens]
        pool = list(range(sum(needs) + 2))
        if self.seed % 2:  # else neighbours, as a fresh cache hands them out
            random.Random(self.seed).shuffle(pool)
        pages = [[pool.pop(0) for _ in range(count)] for count in needs]
        return RaggedBatch.build(self.q_lens, self.kv_lens, pages, self.page_size)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Random q, k, v as column slices of one buffer, the way a fused projection leaves them."""
        batch = self.batch()
        rng = torch.Generator().manual_seed(self.seed)
        heads, kv_heads, dim = len(self.kv_head_of), self.num_kv_heads, self.head_dim
        fused = torch.randn(batch.num_tokens, heads + 1, dim, generator=rng, dtype=torch.float64).to(dtype)
        pairs = torch.randn(batch.kv_starts[-1], 2 * kv_heads, dim, generator=rng, dtype=torch.float64).to(dtype)
        k, v = pairs[:, ::2], pairs[:, 1::2]
        return Inputs(fused[:, 1:], in_pages(k, batch), in_pages(v, batch), batch)


def in_pages(x: Tensor, batch: RaggedBatch) -> Tensor:
    """Flat keys laid into the pages of a batch; without a cache, as they are."""
    if not batch.has_cache:
        return x
    count = 1 + max((page for row in batch.pages for page in row), default=0)
    pages = x.new_full((count, batch.page_size, *x.shape[1:]), torch.nan)
    for request, row in enumerate(batch.pages):
        keys = x[slice(*batch.kv_starts[request : request + 2])]
        for page, part in zip(row, keys.split(batch.page_size), strict=False):  # no keys split into one empty part
            pages[page, : len(part)] = part
    return pages


def heads() -> st.SearchStrategy[tuple[tuple[int, ...], int]]:
    """(kv_head_of, num_kv_heads): MHA, GQA, MQA and what an uneven split of heads leaves on a rank."""
    uniform = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(
        lambda size: (tuple(kv for kv in range(size[0]) for _ in range(size[1])), size[0])
    )
    uneven = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(
        lambda ratios: (tuple(kv for kv, ratio in enumerate(ratios) for _ in range(ratio)), len(ratios))
    )
    return uniform | uneven


@st.composite
def cases(draw: st.DrawFn, paged: bool | None = None) -> Case:
    lengths = st.sampled_from([0, 1, 1, 2, 5, 17, 70])
    same = draw(st.booleans())  # equal requests, which one call serves
    count = draw(st.integers(0, 4))
    q_lens = (draw(lengths),) * count if same else tuple(draw(lengths) for _ in range(count))
    prefix = st.sampled_from([0, 1, 4, 30])
    prefixes = (draw(prefix),) * count if same else tuple(draw(prefix) for _ in range(count))
    prefixes = tuple(old if new else 0 for new, old in zip(q_lens, prefixes, strict=True))
    with_pages = draw(st.booleans()) if paged is None else paged
    kv_head_of, num_kv_heads = draw(heads())
    return Case(
        q_lens,
        prefixes,
        kv_head_of,
        num_kv_heads,
        draw(st.sampled_from([1, 2, 5, 16])),
        draw(st.none() | st.sampled_from([1, 2, 3, 20, 66, 1000])),
        draw(st.sampled_from([1, 3, 8, 128])) if with_pages else 0,
        draw(st.integers(0, 99)),
    )
