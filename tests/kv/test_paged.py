"""The paged cache as a dictionary of lists: any history of calls leaves each request exactly its own tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from seqpar.kernels import attention
from seqpar.kernels.attention.reference import request_keys
from seqpar.kv import PagedKV
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors

LAYERS, HEADS, DIM = 2, 2, 3


def rows(tokens: list[int], layer: int) -> Tensor:
    """Position-coded keys [t, g, d] of tokens, every element distinct."""
    base = torch.tensor(tokens, dtype=torch.float64).view(-1, 1, 1) * LAYERS + layer
    return base * HEADS * DIM + torch.arange(HEADS * DIM).view(HEADS, DIM)


def step(kv: PagedKV, news: dict[Hashable, list[int]]) -> RaggedBatch:
    """One step that appends these tokens in every layer."""
    batch = kv.batch(list(news), [len(tokens) for tokens in news.values()])
    flat = [token for tokens in news.values() for token in tokens]
    for layer in range(LAYERS):
        kv.append(layer, rows(flat, layer), -rows(flat, layer), batch)
    return batch


def held(kv: PagedKV, request: Hashable, layer: int) -> tuple[Tensor, Tensor]:
    """What a reader of the cache finds of one request."""
    batch = RaggedBatch.build([0], [kv.length(request)], [kv.pages(request)], kv.page_size)
    k, v = (request_keys(pages, batch, 0) for pages in kv.layer(layer))
    return k, v


def promise(kv: PagedKV, request: Hashable, length: int) -> RaggedBatch:
    """A step of one request whose newest token is its `length`-th, wherever that would lie."""
    pages = range(-(-length // kv.page_size))
    return RaggedBatch.build([min(length, 1)], [length], [pages], kv.page_size, requests=[request])


def check(kv: PagedKV, expected: dict[Hashable, list[int]]) -> None:
    kv.integrity()
    assert set(kv.ids) == set(expected)
    for request, tokens in expected.items():
        assert kv.length(request) == len(tokens)
        for layer in range(LAYERS):
            k, v = held(kv, request, layer)
            torch.testing.assert_close(k, rows(tokens, layer), rtol=0, atol=0)
            torch.testing.assert_close(v, -rows(tokens, layer), rtol=0, atol=0)
            kv.read(layer, promise(kv, request, len(tokens)))
            with pytest.raises(ValueError, match="must be read after its keys are appended"):
                kv.read(layer, promise(kv, request, len(tokens) + 1))
    assert kv.used_bytes == LAYERS * sum(map(len, expected.values())) * kv.token_bytes


def snapshot(kv: PagedKV) -> object:
    """All that an error must leave alone."""
    memory = [tensor.nan_to_num(-1.0).tolist() for layer in range(LAYERS) for tensor in kv.layer(layer)]
    return copy.deepcopy([kv.ids, [(kv.pages(r), kv.length(r)) for r in kv.ids], kv.free_pages, kv.nbytes, memory])


ids = st.integers(0, 4)
steps = st.dictionaries(ids, st.integers(0, 9), min_size=1, max_size=4)


class History(RuleBasedStateMachine):
    """Random calls, mirrored in a dictionary."""

    @initialize(pages=st.integers(0, 8), page_size=st.integers(1, 5), contiguous=st.booleans())
    def start(self, pages: int, page_size: int, contiguous: bool) -> None:
        make = PagedKV.contiguous if contiguous else PagedKV
        self.kv = make(LAYERS, pages, page_size, HEADS, DIM, dtype=torch.float64)
        self.expected: dict[Hashable, list[int]] = {}
        self.tokens = itertools.count()

    def fits(self, lengths: dict[Hashable, int], freed: int = 0) -> bool:
        """Whether requests of these lengths find room, counted from pages alone."""
        need = {r: -(-length // self.kv.page_size) for r, length in lengths.items()}
        limit = self.kv.pages_per_request
        lacking = sum(max(0, n - (len(self.kv.pages(r)) if r in self.kv else 0)) for r, n in need.items())
        return lacking <= self.kv.free_pages and (limit is None or max(need.values()) <= limit)

    @rule(news=steps)
    def append(self, news: dict[Hashable, int]) -> None:
        fits = self.fits({r: len(self.expected.get(r, [])) + n for r, n in news.items()})
        before = snapshot(self.kv)
        tokens = {r: [next(self.tokens) for _ in range(n)] for r, n in news.items()}
        if fits:
            batch = step(self.kv, tokens)
            for r, new in tokens.items():
                self.expected[r] = self.expected.get(r, []) + new
            assert batch.kv_lens == tuple(len(self.expected[r]) for r in news)
        else:
            with pytest.raises(ValueError, match="out of pages"):
                step(self.kv, tokens)
            assert snapshot(self.kv) == before

    @rule(news=steps)
    def reserve(self, news: dict[Hashable, int]) -> None:
        """Room found beforehand is room that a step then needs no free page for."""
        if not self.fits({r: len(self.expected.get(r, [])) + n for r, n in news.items()}):
            return
        self.kv.reserve(news)
        left = self.kv.free_pages
        tokens = {r: [next(self.tokens) for _ in range(n)] for r, n in news.items()}
        step(self.kv, tokens)
        assert self.kv.free_pages == left
        for r, new in tokens.items():
            self.expected[r] = self.expected.get(r, []) + new

    @rule(request=ids)
    def free(self, request: int) -> None:
        if request in self.expected:
            self.kv.free(request)
            del self.expected[request]
        else:
            with pytest.raises(ValueError, match=f"`request` must be held by the cache, got {request}"):
                self.kv.free(request)

    @rule(request=ids, data=st.data())
    def truncate(self, request: int, data: st.DataObject) -> None:
        if request in self.expected:
            length = data.draw(st.integers(0, len(self.expected[request])))
            self.kv.truncate(request, length)
            self.expected[request] = self.expected[request][:length]
            assert len(self.kv.pages(request)) == -(-length // self.kv.page_size)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if not self.expected:
            return
        sources = data.draw(st.dictionaries(ids, st.sampled_from(sorted(self.expected, key=str))))
        before = snapshot(self.kv)
        try:
            self.kv.select(sources)
        except ValueError as error:
            assert "out of pages: the copies must fit" in str(error)
            assert snapshot(self.kv) == before
            assert sum(-(-len(tokens) // self.kv.page_size) for tokens in self.selected(sources).values()) > (
                self.kv.num_pages - self.spare()
            )
        else:
            self.expected = self.selected(sources)

    def selected(self, sources: dict[Hashable, Hashable]) -> dict[Hashable, list[int]]:
        return {**self.expected, **{new: list(self.expected[old]) for new, old in sources.items()}}

    def spare(self) -> int:
        """Pages reserved beyond the tokens held; a selection keeps them."""
        return sum(len(self.kv.pages(r)) - -(-len(tokens) // self.kv.page_size) for r, tokens in self.expected.items())

    @rule(pages=st.integers(0, 4), longer=st.integers(0, 3))
    def grow(self, pages: int, longer: int) -> None:
        several = any(len(self.kv.pages(r)) > 1 for r in self.expected)
        if longer and several:
            before = snapshot(self.kv)
            with pytest.raises(ValueError, match=r"must stay .* while a request holds several pages"):
                self.kv.grow(num_pages=self.kv.num_pages + pages, page_size=self.kv.page_size + longer)
            assert snapshot(self.kv) == before
        else:
            free = self.kv.free_pages
            self.kv.grow(num_pages=self.kv.num_pages + pages, page_size=self.kv.page_size + longer)
            assert self.kv.free_pages == free + pages

    @invariant()
    def every_request_has_its_own_tokens(self) -> None:
        if hasattr(self, "kv"):
            check(self.kv, self.expected)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def filled(page_size: int = 4, num_pages: int = 9, **tokens: int) -> tuple[PagedKV, dict[Hashable, list[int]]]:
    """A cache in which requests a, b, ... hold that many distinct tokens each."""
    kv = PagedKV(LAYERS, num_pages, page_size, HEADS, DIM, dtype=torch.float64)
    count = itertools.count()
    expected: dict[Hashable, list[int]] = {r: [next(count) for _ in range(n)] for r, n in tokens.items()}
    step(kv, expected)
    return kv, expected


def test_a_permutation_of_requests_moves_no_token() -> None:
    kv, expected = filled(a=5, b=3, c=8)
    pages = {r: kv.pages(r) for r in "abc"}
    kv.select({"a": "b", "b": "c", "c": "a"})
    assert {r: kv.pages(r) for r in "abc"} == {"a": pages["b"], "b": pages["c"], "c": pages["a"]}
    check(kv, {"a": expected["b"], "b": expected["c"], "c": expected["a"]})


def test_a_fork_copies_only_tokens_held() -> None:
    """What was truncated stays behind: beyond the tokens, the copy's memory is as it was, NaN."""
    kv, expected = filled(a=7)
    kv.truncate("a", 5)
    del expected["a"][5:]
    kv.select({"new": "a"})
    check(kv, {"a": expected["a"], "new": expected["a"]})
    k, _ = kv.layer(0)
    assert k[list(kv.pages("new"))].flatten(0, 1)[5:].isnan().all()
    step(kv, {"new": [77]})
    check(kv, {"a": expected["a"], "new": [*expected["a"], 77]})


def test_selecting_an_unknown_request_changes_nothing() -> None:
    kv, expected = filled(a=5, b=3)
    with pytest.raises(ValueError, match="`request` must be held by the cache, got 'c'"):
        kv.select({"a": "b", "b": "c"})
    check(kv, expected)


def test_a_lone_request_lies_in_consecutive_pages() -> None:
    kv = PagedKV(LAYERS, 8, 4, HEADS, DIM, dtype=torch.float64)
    step(kv, {"a": [0], "b": [1]})
    kv.free("a")
    kv.free("b")
    for token in range(20):
        batch = step(kv, {"c": [token]})
    assert kv.pages("c") == (0, 1, 2, 3, 4) and batch.slot_runs == ((0, 19, 1),)


def test_a_contiguous_cache_doubles_under_its_requests() -> None:
    kv = PagedKV.contiguous(LAYERS, 2, 2, HEADS, DIM, dtype=torch.float64)
    expected: dict[Hashable, list[int]] = {0: [1, 2], 1: [3]}
    step(kv, expected)
    with pytest.raises(
        ValueError, match=r"a request must fit into 1 pages of 2 tokens, got 2 \+ 1 tokens for request 0"
    ):
        kv.reserve({1: 1, 0: 1})
    old = kv.batch([1], [1])
    kv.truncate(1, 1)
    kv.grow(page_size=2 * kv.page_size)
    check(kv, expected)
    with pytest.raises(ValueError, match=r"`batch` must have the cache's page size \(4\), got 2"):
        kv.append(0, rows([9], 0), rows([9], 0), old)
    step(kv, {0: [4, 5], 1: [6, 7, 8]})
    check(kv, {0: [1, 2, 4, 5], 1: [3, 6, 7, 8]})


def test_a_step_may_be_written_after_the_cache_has_grown() -> None:
    kv, expected = filled(a=5)
    batch = kv.batch(["a"], [4])
    kv.grow(num_pages=12)
    for layer in range(LAYERS):
        kv.append(layer, rows([6, 7, 8, 9], layer), -rows([6, 7, 8, 9], layer), batch)
    check(kv, {"a": [*expected["a"], 6, 7, 8, 9]})


@pytest.mark.parametrize(
    "change",
    [
        lambda kv: (kv.free("a"), kv.batch(["c"], [6])),
        lambda kv: (kv.truncate("a", 5), kv.batch(["c"], [6])),
        lambda kv: kv.select({"a": "b", "b": "a"}),
    ],
    ids=["free", "truncate", "select"],
)
def test_a_stale_step_overwrites_nobody(change: Callable[[PagedKV], object]) -> None:
    kv, _ = filled(a=5, b=3)
    stale = kv.batch(["a"], [4])
    parts = [*stale.split([1]), stale.to("cpu")]
    change(kv)
    before = snapshot(kv)
    for batch in (stale, *parts):
        new = rows(list(range(batch.num_tokens)), 0)
        with own_errors(), pytest.raises(ValueError, match=r"`batch` must be made after .* \(version [12]\), got 0; "):
            kv.append(0, new, new, batch)
    assert snapshot(kv) == before


def test_what_is_refused_makes_no_step_stale() -> None:
    kv, _ = filled(a=5)
    batch = kv.batch(["a"], [1])
    for change in (
        lambda: kv.free("b"),
        lambda: kv.truncate("a", 9),
        lambda: kv.select({"b": "c"}),
        lambda: kv.select(dict.fromkeys("bcdefg", "a")),
    ):
        with pytest.raises(ValueError, match="must"):
            change()
    kv.append(0, rows([9], 0), rows([9], 0), batch)


def test_a_cache_made_in_inference_mode_serves_without_it() -> None:
    with torch.inference_mode():
        kv, expected = filled(a=5)
        kv.grow(num_pages=12)
    with torch.no_grad():
        step(kv, {"a": [70, 71]})
    step(kv, {"a": [72]})
    check(kv, {"a": [*expected["a"], 70, 71, 72]})
    with torch.inference_mode():
        step(kv, {"b": [73]})
        kv.select({"a": "b", "b": "a"})
    check(kv, {"b": [*expected["a"], 70, 71, 72], "a": [73]})


def test_a_step_knows_its_pages_without_asking_the_device() -> None:
    kv = PagedKV(1, 8, 4, HEADS, DIM, device="meta")
    batch = kv.batch(["a", "b"], [5, 3])
    assert batch.pages == batch.to("meta").pages == (kv.pages("a"), kv.pages("b"))
    kv.reserve({"a": 4})
    assert [chunk.pages for chunk in kv.batch(["a"], [2]).split([1])] == [(kv.pages("a")[:2],)] * 2


def put(kv: PagedKV, layer: int, batch: RaggedBatch, heads: Range | None = None) -> None:
    """Append distinct numbers for a batch, or for some heads of it."""
    new = rows(list(range(batch.num_tokens)), layer)
    new = new if heads is None else new[:, heads.start : heads.stop]
    kv.append(layer, new, -new, batch, heads=heads)


def late(kv: PagedKV, layer: int, batch: RaggedBatch, *what: str, heads: Range | None = None) -> None:
    """Reading `batch` is refused, and the error says all of `what`."""
    with pytest.raises(ValueError, match=r"`batch` must be read after its keys are appended") as error:
        kv.read(layer, batch, heads=heads)
    assert all(part in str(error.value) for part in what), error.value


def test_a_chunk_is_not_read_before_the_chunks_before_it_are_there() -> None:
    kv, _ = filled(a=3, b=2)
    first, second = kv.batch(["a", "b"], [4, 2]).split([3])
    late(kv, 0, first, "layer 0, request 'a': 6 tokens promised", "got 3 appended", "each with its `Mark`")
    put(kv, 0, second)
    late(kv, 0, second, "request 'a': 7 tokens promised", "got 3 appended")
    put(kv, 0, first)
    kv.read(0, first)
    late(kv, 0, second, "request 'a'", "got 6 appended")
    put(kv, 0, second)
    kv.read(0, second)
    kv.read(0, first)  # attention of an early chunk may come late
    late(kv, 1, first, "layer 1")
    put(kv, 0, first)  # a step repeated takes nothing back
    kv.read(0, second)


def test_a_step_that_failed_midway_is_not_read_over() -> None:
    kv, _ = filled(a=3)
    failed = kv.batch(["a"], [2])
    put(kv, 0, failed)
    onward = kv.batch(["a"], [1])
    for layer in range(LAYERS):
        put(kv, layer, onward)
    kv.read(0, onward)
    late(kv, 1, onward, "layer 1, request 'a': 6 tokens promised", "got 3 appended")
    kv.truncate("a", 3)
    again = kv.batch(["a"], [2])
    late(kv, 0, again, "got 3 appended")
    put(kv, 1, again)
    kv.read(1, again)


def test_what_a_request_has_goes_where_it_goes() -> None:
    kv, _ = filled(a=5, b=3)
    half = kv.batch(["a"], [2])
    put(kv, 0, half)
    kv.select({"a": "b", "b": "a", "c": "a"})
    for request, appended in (("a", 3), ("b", 5), ("c", 5)):
        late(kv, 1, promise(kv, request, 9), f"got {appended} appended")
    late(kv, 0, promise(kv, "c", 9), "got 7 appended")
    kv.free("c")
    kv.batch(["c"], [2])
    late(kv, 0, promise(kv, "c", 1), "got 0 appended")


def test_heads_are_appended_in_parts() -> None:
    kv, expected = filled(a=3, b=6)
    batch = kv.batch(["a", "b"], [1, 2])
    new = rows([50, 60, 61], 1)
    for layer in range(LAYERS):
        new = rows([50, 60, 61], layer)
        kv.append(layer, new[:, 1:], -new[:, 1:], batch, heads=Range(1, 2))
        k, v = kv.read(layer, batch, heads=Range(1, 2))
        assert k.shape == v.shape == (9, 4, 1, DIM) and k.data_ptr() == kv.layer(layer)[0][:, :, 1:].data_ptr()
        late(kv, layer, batch, "request 'a': 4 tokens promised", "got 3", heads=Range(0, 1))
        late(kv, layer, batch)
        kv.append(layer, new[:, :1], -new[:, :1], batch, heads=Range(0, 1))
        kv.read(layer, batch)
    check(kv, {"a": [*expected["a"], 50], "b": [*expected["b"], 60, 61]})
    with pytest.raises(ValueError, match=r"`heads` must lie within the 2 heads held, got Range\(start=1, stop=3\)"):
        kv.append(0, new, new, batch, heads=Range(1, 3))
    with own_errors(), pytest.raises(ValueError, match=r"`k` and `v` must be \[3, 1, 3\] in torch.float64"):
        kv.append(0, new, new, batch, heads=Range(1, 2))


def test_batches_made_by_hand_promise_nothing() -> None:
    kv, _ = filled(a=3)
    kv.read(0, RaggedBatch.build([1], [9], [[0, 1, 2]], 4))


def test_bytes() -> None:
    kv = PagedKV(3, 5, 4, 2, 8, dtype=torch.bfloat16)
    assert kv.token_bytes == 2 * 2 * 8 * 2
    assert kv.nbytes == sum(x.nbytes for layer in range(3) for x in kv.layer(layer)) == 3 * 5 * 4 * kv.token_bytes
    kv.batch(["a"], [7])
    assert kv.used_bytes == 3 * 7 * kv.token_bytes and kv.free_pages == 3


def test_history_of_gradients_is_not_stored() -> None:
    kv, _ = filled(a=1)
    batch = kv.batch(["a"], [1])
    new = rows([5], 0).requires_grad_()
    kv.append(0, new, new, batch)
    assert not kv.layer(0)[0].requires_grad


def test_a_rank_without_kv_heads_keeps_the_accounts() -> None:
    kv = PagedKV(1, 4, 2, 0, DIM)
    batch = kv.batch(["a"], [3])
    kv.append(0, torch.zeros(3, 0, DIM), torch.zeros(3, 0, DIM), batch)
    assert kv.length("a") == 3 and kv.nbytes == 0


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_chunking_attends_as_the_whole(page_size: int) -> None:
    """Two requests in turns, chunk by chunk through the cache, against one call without it."""
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 20, heads, 8, generator=rng, dtype=torch.float64) for heads in (4, 2, 2))
    want = [attention(*(x[r] for x in (q, k, v)), RaggedBatch.prefill([20]), backend="reference") for r in (0, 1)]
    kv = PagedKV(1, -(-20 // page_size) * 2, page_size, 2, 8, dtype=torch.float64)
    done = [0, 0]
    for chunk in ([7, 0], [1, 1], [5, 9], [1, 1], [6, 9]):
        batch = kv.batch([0, 1], chunk)
        now = [torch.cat([x[r, done[r] : done[r] + n] for r, n in enumerate(chunk)]) for x in (q, k, v)]
        kv.append(0, now[1], now[2], batch)
        got = attention(now[0], *kv.layer(0), batch)
        expected = [torch.cat([want[r][i][done[r] : done[r] + n] for r, n in enumerate(chunk)]) for i in (0, 1)]
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
        done = [at + n for at, n in zip(done, chunk, strict=True)]
    assert done == [20, 20]


def test_bad_input_is_refused_and_nothing_changes() -> None:
    kv, expected = filled(a=5, b=3)
    batch = RaggedBatch.build([1], [1], [[8]], 4)
    key = rows([5], 0)
    with own_errors():
        for call, message in [
            (lambda: kv.batch(["a", "a"], [1, 1]), r"`requests` must be distinct, .* got \['a', 'a'\] and \[1, 1\]"),
            (lambda: kv.batch(["a", "b"], [1]), r"`requests` must be distinct, with one of `q_lens` each"),
            (lambda: kv.batch(["a"], [-1]), "`q_lens` must be at least 0, got -1 for request 'a'"),
            (
                lambda: kv.batch(["a"], [2], positions=torch.zeros(1, dtype=torch.int64)),
                r"`positions` must have one entry per new token \(2\), got \[1\]",
            ),
            (
                lambda: kv.reserve({"a": 99}),
                r"fit into the free pages \(6 of 9, 4 tokens each\), got 24 wanted; free req",
            ),
            (lambda: kv.truncate("a", 6), r"`length` must be 0 to the tokens of request 'a' \(5\), got 6"),
            (lambda: kv.truncate("a", -1), "got -1"),
            (lambda: kv.grow(num_pages=1), r"a cache must not shrink \(below 9 pages of 4\), got 1 pages of 4"),
            (
                lambda: kv.append(0, key[:, :1], key, batch),
                r"`k` and `v` must be \[1, 2, 3\] in torch.float64, got \[1, 1, 3\]",
            ),
            (lambda: kv.append(0, key, key.float(), batch), r"and \[1, 2, 3\] in torch.float32"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
            check(kv, expected)
        with pytest.raises(ValueError, match=r"`page_size` must be at least 1 .* got .*page_size=0"):
            PagedKV(1, 1, 0, 1, 1)
