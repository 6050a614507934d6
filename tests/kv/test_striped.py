"""Striped caches of all ranks beside one cache of everything: the same bookkeeping, every token on one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import attention
from seqpar.kv import PagedKV, StripedKV
from seqpar.partition import Range, Striping
from seqpar.ragged import RaggedBatch

LAYERS, HEADS, DIM = 2, 2, 3


def rows(count: int, seed: int) -> Tensor:
    """Position-coded keys [t, g, d], every element distinct over all steps."""
    first = seed * 10_000.0
    return (first + torch.arange(count * HEADS * DIM, dtype=torch.float64)).view(count, HEADS, DIM)


class Ranks:
    """The caches of all ranks, and one of everything."""

    def __init__(self, striping: Striping, rounds: int, pages: int) -> None:
        sizes = (LAYERS, pages, rounds * striping.period, HEADS, DIM)
        self.striping, self.steps = striping, 0
        self.whole = PagedKV(*sizes, dtype=torch.float64)
        self.ranks = [
            StripedKV(*sizes, striping=striping, rank=rank, dtype=torch.float64) for rank in range(striping.ranks)
        ]

    def all(self, call: Callable[[PagedKV], object]) -> None:
        """Call alike on all of them; either none refuses, or all do and with the same words."""
        said = []
        for kv in (self.whole, *self.ranks):
            try:
                call(kv)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert len(set(said)) == 1, said

    def step(self, news: dict[int, int]) -> None:
        self.steps += 1

        def call(kv: PagedKV) -> None:
            batch = kv.batch(list(news), list(news.values()))
            for layer in range(LAYERS):
                new = rows(batch.num_tokens, self.steps * LAYERS + layer)
                kv.append(layer, new, -new, batch)

        self.all(call)

    def check(self) -> None:
        for kv in self.ranks:
            kv.integrity()
            assert kv.ids == self.whole.ids and kv.free_pages == self.whole.free_pages
            assert [kv.pages(r) for r in kv.ids] == [self.whole.pages(r) for r in kv.ids]
            assert kv.nbytes == sum(x.nbytes for layer in range(LAYERS) for x in kv.layer(layer))
        assert sum(kv.nbytes for kv in self.ranks) == self.whole.nbytes
        assert sum(kv.used_bytes for kv in self.ranks) == self.whole.used_bytes
        for layer in range(LAYERS):
            for request in self.whole.ids:
                k, v = self.whole.gather(layer, [request])
                for kv in self.ranks:
                    own = list(self.striping.tokens(0, self.whole.length(request), kv.rank))
                    torch.testing.assert_close(kv.gather(layer, [request]), (k[own], v[own]), rtol=0, atol=0)


requests = st.integers(0, 3)
operations = st.one_of(
    st.tuples(st.just("step"), st.dictionaries(requests, st.integers(0, 9), min_size=1, max_size=3)),
    st.tuples(st.just("free"), requests),
    st.tuples(st.just("truncate"), requests, st.integers(0, 9)),
    st.tuples(st.just("select"), st.dictionaries(requests, requests, min_size=1, max_size=3)),
    st.tuples(st.just("grow"), st.integers(0, 3)),
    st.tuples(st.just("fork"), requests, requests),
    st.tuples(st.just("share"), requests),
    st.tuples(st.just("reuse"), requests, requests, st.integers(0, 40)),
    st.tuples(st.just("compact"), st.sampled_from(["tail", "window", "stable"])),
)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.lists(operations, max_size=12))
def test_any_history_leaves_every_token_on_its_owner(ranks: int, run: int, rounds: int, history: list[tuple]) -> None:
    caches = Ranks(Striping(ranks, run), rounds, pages=8)
    for name, *args in history:
        if name == "step":
            caches.step(args[0])
        elif name == "grow":
            caches.all(lambda kv, more=args[0]: kv.grow(num_pages=kv.num_pages + more))
        elif name == "share":  # as if all tokens of a request were one
            caches.all(lambda kv, r=args[0]: kv.share(r, [r] * 40))
        elif name == "reuse":
            caches.all(lambda kv, args=args: kv.reuse(args[0], [args[1]] * args[2]))
        else:
            caches.all(lambda kv, name=name, args=args: getattr(kv, name)(*args))
        caches.check()


def test_steps_tell_which_rows_are_whose_and_what_came_before() -> None:
    kv = StripedKV(1, 8, 8, HEADS, DIM, striping=Striping(2, 2), rank=1)
    kv.batch(["a", "b"], [5, 0])
    batch = kv.batch(["b", "a"], [3, 4])
    assert kv.own(batch) == (2, 4, 5)  # token 2 of "b"; tokens 6 and 7 of "a", whose step begins with 5
    assert kv.own(batch, 0) == (0, 1, 3, 6)  # tokens 5 and 8
    assert kv.context(batch) == (0, 2)


def test_a_rank_attends_to_its_tokens_in_place() -> None:
    """Its share reads as an ordinary paged request, over scattered pages too."""
    striping = Striping(3, 2)
    kv = StripedKV(1, 8, 6, HEADS, DIM, striping=striping, rank=1, dtype=torch.float64)
    torch.manual_seed(0)
    for news in ({"a": 7, "b": 3}, {"a": 5, "b": 9}):
        batch = kv.batch(list(news), list(news.values()))
        k, v = torch.randn(2, batch.num_tokens, HEADS, DIM, dtype=torch.float64)
        kv.append(0, k, v, batch)
    q = torch.randn(2, 4, DIM, dtype=torch.float64)
    lengths = [striping.local_len(12, 1)] * 2
    share = RaggedBatch.build([1, 1], lengths, [kv.pages("a"), kv.pages("b")], kv.local_page_size)
    k, v = kv.gather(0, ["a", "b"])
    expected = attention(q, k, v, RaggedBatch.build([1, 1], lengths))
    torch.testing.assert_close(attention(q, *kv.read(0, batch), share), expected, rtol=1e-12, atol=1e-12)


def test_own_rows_alone_are_as_good() -> None:
    options = {"striping": Striping(2, 2), "rank": 0, "dtype": torch.float64}
    one, two = (StripedKV(1, 2, 8, HEADS, DIM, **options) for _ in range(2))
    batch = one.batch(["a"], [7])
    k = rows(7, 1)
    one.append(0, k, -k, batch)
    own = list(two.own(two.batch(["a"], [7])))
    two.append_own(0, k[own], -k[own], batch)
    torch.testing.assert_close(one.gather(0, ["a"]), two.gather(0, ["a"]), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`k` and `v` must be \[4, 2, 3\]"):
        two.append_own(0, k, -k, batch)


def test_some_heads_at_a_time() -> None:
    kv = StripedKV(1, 2, 4, HEADS, DIM, striping=Striping(2), rank=1, dtype=torch.float64)
    batch, k = kv.batch(["a"], [3]), rows(3, 1)
    kv.append(0, k[:, 1:], -k[:, 1:], batch, heads=Range(1, 2))
    with pytest.raises(ValueError, match="after their keys are appended"):
        kv.gather(0, ["a"])
    kv.append(0, k[:, :1], -k[:, :1], batch, heads=Range(0, 1))
    torch.testing.assert_close(kv.gather(0, ["a"]), (k[1:2], -k[1:2]), rtol=0, atol=0)


def test_a_contiguous_cache_rounds_its_page_up() -> None:
    kv = StripedKV.contiguous(1, 2, 10, HEADS, DIM, striping=Striping(3, 2), rank=2)
    assert (kv.page_size, kv.local_page_size, kv.num_pages) == (12, 4, 2)
    kv.reserve({0: 12})
    with pytest.raises(ValueError, match="out of pages: a request must fit into 1 pages"):
        kv.reserve({0: 13})
    kv.grow(page_size=18)
    kv.reserve({0: 18})


def test_bad_input_is_refused_before_anything_is_written() -> None:
    options = {"striping": Striping(2, 4), "rank": 0}
    with pytest.raises(ValueError, match=r"`page_size` must be a multiple of ranks x interleave \(2 x 4\), got 12"):
        StripedKV(1, 2, 12, HEADS, DIM, **options)
    with pytest.raises(ValueError, match=r"`rank` must be one of the striping's 2, got 2"):
        StripedKV(1, 2, 8, HEADS, DIM, striping=Striping(2), rank=2)
    kv = StripedKV(1, 2, 8, HEADS, DIM, **options)
    with pytest.raises(ValueError, match="`page_size` must be a multiple"):
        kv.grow(page_size=12)
    with pytest.raises(ValueError, match="out of pages: the new tokens must fit into the free pages"):
        kv.batch(["a", "b"], [16, 1])
    assert kv.ids == () and kv.free_pages == 2
    batch = kv.batch(["a"], [3])
    with pytest.raises(ValueError, match="`batch` must have the cache's page size"):
        kv.append(0, *torch.zeros(2, 3, HEADS, DIM), PagedKV(1, 2, 4, HEADS, DIM).batch(["a"], [3]))
    kv.free("a")
    with pytest.raises(ValueError, match="`batch` must be made after the last free"):
        kv.append(0, *torch.zeros(2, 3, HEADS, DIM), batch)
    with pytest.raises(ValueError, match="`request` must be held"):
        kv.gather(0, ["a"])
