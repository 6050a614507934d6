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
from seqpar.kv import OutOfPages, PagedKV, SavedKV, StripedKV, compaction
from seqpar.partition import Range, Striping
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
    stored = {p * kv.page_size + i % kv.page_size for r, p, i in places(kv)}
    assert kv.used_bytes == LAYERS * len(stored) * kv.token_bytes


def places(kv: PagedKV) -> list[tuple[Hashable, int, int]]:
    """The request, page and index of every token."""
    return [(r, kv.pages(r)[i // kv.page_size], i) for r in kv.ids for i in range(kv.length(r))]


def snapshot(kv: PagedKV) -> object:
    """All that an error must leave alone."""
    memory = [tensor.nan_to_num(-1.0).tolist() for layer in range(LAYERS) for tensor in kv.layer(layer)]
    return copy.deepcopy([kv.ids, [(kv.pages(r), kv.length(r)) for r in kv.ids], kv.free_pages, kv.nbytes, memory])


ids = st.integers(0, 4)
steps = st.dictionaries(ids, st.integers(0, 9), min_size=1, max_size=4)
cut = st.integers(0, 2)


class History(RuleBasedStateMachine):
    """Random calls, mirrored in a dictionary; what was shared, in a dictionary of what may be found."""

    @initialize(pages=st.integers(0, 8), page_size=st.integers(1, 5), contiguous=st.booleans())
    def start(self, pages: int, page_size: int, contiguous: bool) -> None:
        make = PagedKV.contiguous if contiguous else PagedKV
        self.kv = make(LAYERS, pages, page_size, HEADS, DIM, dtype=torch.float64)
        self.expected: dict[Hashable, list[int]] = {}
        self.tokens = itertools.count()
        self.flying: list[tuple[RaggedBatch, list[int]]] = []

    def wanted(self, news: dict[Hashable, int]) -> int | None:
        """Free pages that a step takes, from the page tables alone; None where a request could never hold as many."""
        kv, taken = self.kv, 0
        tables = {r: list(kv.pages(r)) for r in kv.ids}
        for r, new in news.items():
            length, table = len(self.expected.get(r, [])), tables.setdefault(r, [])
            if kv.pages_per_request is not None and -(-(length + new) // kv.page_size) > kv.pages_per_request:
                return None
            at = length // kv.page_size
            if new and length % kv.page_size and sum(table[at] in other for other in tables.values()) > 1:
                table[at], taken = -1 - taken, taken + 1
            while len(table) * kv.page_size < length + new:
                table, taken = [*table, -1 - taken], taken + 1
        return taken

    def draw(self, news: dict[Hashable, int], data: st.DataObject) -> dict[Hashable, list[int]]:
        """Tokens for a step: new ones, or what another request has there, so that prefixes are found."""
        drawn = {}
        for r, count in news.items():
            at, other = len(self.expected.get(r, [])), self.expected.get(data.draw(ids), [])
            like = other[at : at + count] if data.draw(st.booleans()) else []
            drawn[r] = [*like, *(next(self.tokens) for _ in range(count - len(like)))]
        return drawn

    @rule(news=steps, data=st.data())
    def append(self, news: dict[Hashable, int], data: st.DataObject) -> None:
        self.landed(*news)
        wanted, before, free = self.wanted(news), snapshot(self.kv), self.kv.free_pages
        tokens = self.draw(news, data)
        if wanted is not None:
            assert self.kv.wanted(news) == wanted
        if wanted is not None and wanted <= free:
            batch = step(self.kv, tokens)
            assert self.kv.free_pages == free - wanted
            self.count(batch, tokens)
        else:
            with pytest.raises(ValueError if wanted is None else OutOfPages, match="out of pages"):
                step(self.kv, tokens)
            assert snapshot(self.kv) == before

    def count(self, batch: RaggedBatch, tokens: dict[Hashable, list[int]]) -> None:
        for r, new in tokens.items():
            self.expected[r] = self.expected.get(r, []) + new
        assert batch.kv_lens == tuple(len(self.expected[r]) for r in tokens)
        slots = batch.slots.tolist()
        assert len(set(slots)) == len(slots)
        written = {slot // self.kv.page_size for slot in slots}
        assert written <= {page for page in range(self.kv.num_pages) if sum(page in t for t in self.tables()) == 1}

    def tables(self) -> list[tuple[int, ...]]:
        return [self.kv.pages(r) for r in self.kv.ids]

    @rule(news=steps)
    def reserve(self, news: dict[Hashable, int]) -> None:
        """Room found beforehand is room that a step then needs no free page for."""
        self.landed(*news)
        wanted = self.wanted(news)
        if wanted is None or wanted > self.kv.free_pages:
            return
        self.kv.reserve(news)
        left = self.kv.free_pages
        tokens = {r: [next(self.tokens) for _ in range(n)] for r, n in news.items()}
        self.count(step(self.kv, tokens), tokens)
        assert self.kv.free_pages == left

    @rule(request=ids, count=st.integers(1, 3))
    def launch(self, request: int, count: int) -> None:
        """A step that is written later; until then nobody may read the request, so that the check leaves it out."""
        wanted = self.wanted({request: count})
        if wanted is None or wanted > self.kv.free_pages or request in (r for b, _ in self.flying for r in b.requests):
            return
        tokens = [next(self.tokens) for _ in range(count)]
        self.flying.append((self.kv.batch([request], [count]), tokens))
        self.expected[request] = self.expected.get(request, []) + tokens

    def landed(self, *requests: Hashable) -> None:
        """Write the steps in flight of these requests, which are to change; by default of all."""
        for batch, tokens in [each for each in self.flying if not requests or each[0].requests[0] in requests]:
            for layer in range(LAYERS):
                self.kv.append(layer, rows(tokens, layer), -rows(tokens, layer), batch)
            self.flying = [each for each in self.flying if each[0] is not batch]

    @rule()
    def land(self) -> None:
        self.landed()

    @rule(request=ids)
    def free(self, request: int) -> None:
        if request in self.expected:
            self.landed(request)
            self.kv.free(request)
            del self.expected[request]
        else:
            with pytest.raises(ValueError, match=f"`request` must be held by the cache, got {request}"):
                self.kv.free(request)

    @rule(request=ids, data=st.data())
    def truncate(self, request: int, data: st.DataObject) -> None:
        if request in self.expected:
            self.landed(request)
            length = data.draw(st.integers(0, len(self.expected[request])))
            self.kv.truncate(request, length)
            self.expected[request] = self.expected[request][:length]
            assert len(self.kv.pages(request)) == -(-length // self.kv.page_size)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """It takes no page, and gives back those that nobody holds any more."""
        if not self.expected:
            return
        sources = data.draw(st.dictionaries(ids, st.sampled_from(sorted(self.expected, key=str))))
        self.landed()
        tables = {r: self.kv.pages(r) for r in self.kv.ids}
        self.kv.select(sources)
        self.expected |= {new: list(self.expected[old]) for new, old in sources.items()}
        for new, old in sources.items():
            keep = -(-len(self.expected[new]) // self.kv.page_size)
            assert self.kv.pages(new) == (tables[old][:keep] if new != old else tables[old])

    @rule(request=ids, new=ids)
    def fork(self, request: int, new: int) -> None:
        if request in self.expected and new not in self.expected:
            self.landed(request)
            free = self.kv.free_pages
            self.kv.fork(request, new)
            self.expected[new] = list(self.expected[request])
            assert self.kv.free_pages == free
        else:
            with pytest.raises(ValueError, match="must not be held yet" if new in self.expected else "must be held"):
                self.kv.fork(request, new)

    @rule(request=ids, extra=st.lists(st.just(-1), max_size=3))
    def share(self, request: int, extra: list[int]) -> None:
        if request in self.expected:
            self.kv.share(request, [*self.expected[request], *extra])
            there = len(self.expected[request]) - sum(len(t) for b, t in self.flying if b.requests == (request,))
            full = there // self.kv.page_size * self.kv.page_size
            assert self.kv.reusable([*self.expected[request][:there], -1]) == full

    @rule(request=ids, other=ids, data=st.data())
    def reuse(self, request: int, other: int, data: st.DataObject) -> None:
        """Whatever is found is right, which the invariant sees; and it is whole pages, but for the last token."""
        like = self.expected.get(other, [])
        tokens = [*like[: data.draw(st.integers(0, len(like)))], *(next(self.tokens) for _ in range(data.draw(cut)))]
        if request in self.expected:
            with pytest.raises(ValueError, match=f"`request` must not be held yet, got {request}"):
                self.kv.reuse(request, tokens)
            return
        found = self.kv.reusable(tokens)
        assert self.kv.reuse(request, tokens) == found == self.kv.length(request) <= max(0, len(tokens) - 1)
        assert found % self.kv.page_size == 0 or found == len(tokens) - 1
        self.expected[request] = tokens[:found]

    @rule(request=ids, new=ids)
    def save_and_restore(self, request: int, new: int) -> None:
        """To the host and back, under another name and in other pages."""
        if request not in self.expected:
            return
        self.landed(request)
        saved = SavedKV.of(self.kv, request)
        if new in self.expected and new != request:
            with pytest.raises(ValueError, match="`request` must not be held yet"):
                saved.restore(self.kv, new)
            return
        self.kv.free(request)
        tokens = self.expected.pop(request)
        if -(-len(tokens) // self.kv.page_size) <= self.kv.free_pages:
            saved.restore(self.kv, new)
            self.expected[new] = tokens

    @rule(strategy=st.sampled_from(["none", "tail", "window", "stable"]))
    def compact(self, strategy: compaction.Strategy) -> None:
        self.landed()
        free = self.kv.free_pages
        plan = self.kv.compact(strategy)
        held = {page for table in self.tables() for page in table}
        assert held <= set(range(plan.start, plan.start + plan.size)) and self.kv.free_pages == free
        if strategy != "none":
            assert len(held) == plan.size

    @rule(pages=st.integers(0, 4), longer=st.integers(0, 3))
    def grow(self, pages: int, longer: int) -> None:
        several = any(len(self.kv.pages(r)) > 1 for r in self.expected)
        self.landed()
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
        if not hasattr(self, "kv"):
            return
        assert len({page for table in self.tables() for page in table}) + self.kv.free_pages == self.kv.num_pages
        assert self.kv.idle_pages <= self.kv.free_pages
        for request, tokens in self.expected.items():
            assert self.kv.length(request) == len(tokens)
        if not self.flying:
            check(self.kv, self.expected)

    def teardown(self) -> None:
        """Nothing leaks: once all are freed, all pages are free."""
        if hasattr(self, "kv"):
            for request in self.kv.ids:
                self.kv.free(request)
            assert self.kv.free_pages == self.kv.num_pages and self.kv.used_bytes == 0
            self.kv.integrity()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestLongHistory(History.TestCase):
    settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


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


def test_a_fork_copies_one_page_when_it_goes_on_and_of_it_only_tokens_held() -> None:
    """What was truncated stays behind: beyond the tokens, the copy's memory is as it was, NaN."""
    kv, expected = filled(a=7)
    kv.truncate("a", 5)
    del expected["a"][5:]
    kv.fork("a", "new")
    assert kv.pages("new") == kv.pages("a") and kv.free_pages == 7
    check(kv, {"a": expected["a"], "new": expected["a"]})
    assert kv.used_bytes == LAYERS * 5 * kv.token_bytes
    step(kv, {"new": [77]})
    k, _ = kv.layer(0)
    assert kv.pages("new")[0] == kv.pages("a")[0] and k[kv.pages("new")[1], 2:].isnan().all()
    check(kv, {"a": expected["a"], "new": [*expected["a"], 77]})
    step(kv, {"a": [78]})  # the last one in a page needs no copy
    assert kv.free_pages == 6
    check(kv, {"a": [*expected["a"], 78], "new": [*expected["a"], 77]})


def test_the_last_of_several_that_go_on_keeps_the_page() -> None:
    kv, expected = filled(num_pages=4, a=6)
    kv.select(dict.fromkeys("bc", "a"))
    news: dict[Hashable, list[int]] = {"a": [70], "b": [71], "c": [72]}
    assert kv.wanted(dict.fromkeys("abc", 1)) == 2 == kv.free_pages and kv.wanted({"a": 1, "b": 0}) == 1
    step(kv, news)
    check(kv, {r: [*expected["a"], *new] for r, new in news.items()})


def test_room_reserved_is_not_shared() -> None:
    kv, expected = filled(a=6)
    kv.reserve({"a": 7})
    assert len(kv.pages("a")) == 4
    kv.fork("a", "b")
    assert kv.pages("b") == kv.pages("a")[:2]
    step(kv, {"a": [70], "b": [71]})
    assert len(kv.pages("a")) == 4 and kv.free_pages == 4  # one copy
    kv.select({"b": "a"})
    check(kv, {request: [*expected["a"], 70] for request in "ab"})
    kv.select({"a": "b"})  # the room goes with the one that had it
    assert kv.pages("a") == kv.pages("b") and kv.free_pages == 7


def test_a_prompt_is_found_but_for_its_last_token() -> None:
    kv, expected = filled(a=8)
    kv.share("a", expected["a"], salt=b"adapter")
    assert kv.reusable(expected["a"]) == 0 == kv.reusable([]) == kv.reusable([], salt=b"adapter")
    kv.free("a")
    assert (kv.free_pages, kv.idle_pages, kv.used_bytes) == (9, 2, 0)
    assert kv.reuse("b", expected["a"], salt=b"adapter") == 7 and kv.idle_pages == 0
    assert kv.reuse("c", [*expected["a"], 9], salt=b"adapter") == 8
    assert kv.pages("b") == kv.pages("c") and kv.wanted({"b": 1}) == 1  # two hold the page in which b goes on
    kv.free("c")
    assert kv.wanted({"b": 1}) == 0
    step(kv, {"b": [99]})  # not the token that was there
    assert kv.reusable([*expected["a"], 9], salt=b"adapter") == 4
    check(kv, {"b": [*expected["a"][:7], 99]})
    kv.share("b", [*expected["a"][:7], 99], salt=b"adapter")
    assert kv.reusable([*expected["a"][:7], 99, 0], salt=b"adapter") == 8


def test_what_is_not_appended_in_all_layers_is_not_found() -> None:
    kv, expected = filled(a=3)
    batch, tokens = kv.batch(["a"], [6]), [*expected["a"], 10, 11, 12, 13, 14, 15]
    kv.append(0, rows(tokens[3:], 0), -rows(tokens[3:], 0), batch)
    kv.share("a", tokens)
    assert kv.reusable(tokens) == 0
    kv.append(1, rows(tokens[3:], 1), -rows(tokens[3:], 1), batch)
    kv.share("a", tokens[:7])
    assert kv.reusable(tokens) == 4
    kv.share("a", tokens)
    assert kv.reusable(tokens) == 8 and kv.reuse("b", tokens) == 8
    check(kv, {"a": tokens, "b": tokens[:8]})


def test_room_is_made_by_what_was_not_asked_for_longest() -> None:
    kv, expected = filled(num_pages=4, a=8, b=4)
    for request in "ab":
        kv.share(request, expected[request])
        kv.free(request)
    assert kv.reuse("c", [*expected["a"][:4], 1]) == 4
    kv.free("c")  # used again: now it goes after b's
    step(kv, {"d": [0] * 9})
    assert [kv.reusable([*expected[r], 1]) for r in "ab"] == [4, 0]
    assert kv.idle_pages == kv.free_pages == 1


def test_a_copy_is_found_once_the_first_one_is_gone() -> None:
    kv = PagedKV(LAYERS, 4, 4, HEADS, DIM, dtype=torch.float64)
    step(kv, {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]})
    for request in "ab":
        kv.share(request, [1, 2, 3, 4])
    kv.free("a")
    kv.reserve({"c": 12})
    assert kv.reusable([1, 2, 3, 4, 5]) == 0
    kv.share("b", [1, 2, 3, 4])
    assert kv.reusable([1, 2, 3, 4, 5]) == 4


def test_longer_pages_are_not_found_by_shorter_keys() -> None:
    kv = PagedKV.contiguous(LAYERS, 2, 2, HEADS, DIM, dtype=torch.float64)
    step(kv, {"a": [1, 2]})
    kv.share("a", [1, 2])
    kv.grow(num_pages=3)
    assert kv.reusable([1, 2, 3]) == 2
    kv.grow(page_size=4)
    assert kv.reusable([1, 2, 3]) == 0
    step(kv, {"a": [3, 4]})
    kv.share("a", [1, 2, 3, 4])
    assert kv.reusable([1, 2, 3, 4, 5]) == 4


def test_requests_of_a_contiguous_cache_become_one_view() -> None:
    kv = PagedKV.contiguous(LAYERS, 6, 5, HEADS, DIM, dtype=torch.float64)
    expected: dict[Hashable, list[int]] = {r: list(range(10 * i, 10 * i + 3)) for i, r in enumerate("abcdef")}
    step(kv, expected)
    for request in "ad":
        kv.free(request)
        del expected[request]
    before = kv.batch(["b"], [1]), kv.batch(["f"], [1])
    plan = kv.compact("window")
    assert (plan.start, plan.moves, plan.size) == (1, ((5, 3),), 4)
    kv.append(0, rows([5], 0), rows([5], 0), before[0])  # b has not moved
    with pytest.raises(ValueError, match=r"of request 'f' \(version 3\), got 2; ask for a new `batch`"):
        kv.append(0, rows([5], 0), rows([5], 0), before[1])
    for request in "bf":
        kv.truncate(request, 3)
    check(kv, expected)
    k, _ = kv.layer(1)
    who = sorted("bcef", key=lambda r: kv.pages(r))
    assert torch.equal(k[1:5, :3].flatten(0, 1), torch.cat([rows(expected[r], 1) for r in who]))


def test_pages_that_may_be_found_move_and_grow_whole() -> None:
    kv, expected = filled(num_pages=4, a=4, b=8)
    kv.share("b", expected["b"])
    kv.free("a")
    kv.truncate("b", 5)  # holds one token of a page that is found as four
    assert kv.compact("tail").moves == ((2, 0),) and kv.pages("b") == (1, 0)
    kv.grow(num_pages=7)
    assert kv.reuse("c", [*expected["b"], 9]) == 8
    check(kv, {"b": expected["b"][:5], "c": expected["b"]})


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
        lambda kv: kv.fork("a", "c"),
        lambda kv: (kv.free("a"), kv.batch(["a"], [9])),
    ],
    ids=["free", "truncate", "select", "fork", "again"],
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


def test_what_happens_to_others_makes_no_step_stale() -> None:
    """Micro-batches in flight: each is written, whoever comes and goes between."""
    kv, expected = filled(num_pages=12, a=5, b=3, c=6, d=2)
    one, two = kv.batch(["a", "d"], [2, 0]), kv.batch(["b"], [3])
    kv.free("c")
    kv.truncate("d", 1)
    kv.fork("d", "e")
    three = kv.batch(["f"], [7])
    for batch, tokens in ((two, [20, 21, 22]), (three, list(range(30, 37))), (one, [10, 11])):
        for layer in range(LAYERS):
            kv.append(layer, rows(tokens, layer), -rows(tokens, layer), batch)
    e = expected["d"][:1]
    check(kv, {"a": [*expected["a"], 10, 11], "b": [*expected["b"], 20, 21, 22], "d": e, "e": e, "f": [*range(30, 37)]})
    kv.free("a")
    step(kv, {"a": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"of request 'a' \(version 4\), got 0"):  # another of the same name
        kv.append(0, rows([10, 11], 0), rows([10, 11], 0), one)
    by_hand = RaggedBatch.build([1], [1], [[8]], 4)
    with pytest.raises(ValueError, match=r"select of this cache \(version 4\), got 0"):
        kv.append(0, rows([1], 0), rows([1], 0), by_hand)


def test_what_is_refused_makes_no_step_stale() -> None:
    kv, _ = filled(a=5)
    batch = kv.batch(["a"], [1])
    for change in (
        lambda: kv.free("b"),
        lambda: kv.truncate("a", 9),
        lambda: kv.select({"b": "c"}),
        lambda: kv.select({"b": "a", "c": "d"}),
        lambda: kv.fork("b", "c"),
        lambda: kv.fork("a", "a"),
        lambda: kv.reuse("a", [1, 2]),
        lambda: kv.share("b", [1, 2]),
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


def test_a_request_asks_for_room_again_once_it_was_forked_or_cut() -> None:
    """Steps that stay in a page of their own ask nobody; what happens to the page is noticed all the same."""
    kv = PagedKV(1, 8, 4, 1, 1)
    kv.batch(["a"], [1])
    kv.batch(["a"], [1])
    before = kv.pages("a")
    kv.fork("a", "b")
    kv.batch(["a"], [1])
    assert kv.pages("a") != before == kv.pages("b"), "written to a copy"
    kv.truncate("a", 0)
    kv.batch(["a"], [2])
    assert len(kv.pages("a")) == 1
    kv.integrity()


def test_layers_and_pages_that_there_are_not() -> None:
    kv = PagedKV(2, 4, 4, 1, 2)
    batch = kv.batch(["a"], [3])
    k = torch.zeros(3, 1, 2)
    calls: list[Callable[[int], object]] = [
        kv.layer,
        lambda layer: kv.read(layer, batch),
        lambda layer: kv.append(layer, k, k, batch),
        lambda layer: kv.gather(layer, []),
        lambda layer: kv.check_appended(layer, []),
    ]
    for call in calls:
        for layer in (-1, 2):
            with own_errors(), pytest.raises(ValueError, match=f"`layer` must be one of 2 layers, got {layer}"):
                call(layer)
    for page in (-1, 4):
        with pytest.raises(ValueError, match=f"`page` must be one of 4 pages, got {page}"):
            kv._allocator.holders(page)
    striped = StripedKV(1, 4, 4, 1, 2, striping=Striping(2), rank=0)
    with own_errors(), pytest.raises(ValueError, match="`batch` must be one of this cache, got one without a cache"):
        striped.append_own(0, k, k, RaggedBatch.prefill([3]))
