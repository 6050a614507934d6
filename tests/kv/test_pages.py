"""Pages, their holders and their keys against a model that keeps lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seqpar.kv import OutOfPages, PageAllocator, page_keys


class Pages(RuleBasedStateMachine):
    """Tables of pages that are taken, forked and given back; keys as the order of what was let go has them."""

    @initialize(pages=st.integers(0, 7))
    def start(self, pages: int) -> None:
        self.pages = PageAllocator(pages)
        self.tables: list[list[int]] = []
        self.keys: dict[int, int] = {}  # by page
        self.idle: list[int] = []

    def counts(self, page: int) -> int:
        return sum(table.count(page) for table in self.tables)

    @rule(count=st.integers(0, 5))
    def alloc(self, count: int) -> None:
        free = [page for page in range(self.pages.num_pages) if not self.counts(page)]
        if count > len(free):
            with pytest.raises(OutOfPages, match=rf"at most the free pages \({len(free)}\), got {count}"):
                self.pages.alloc(count)
            return
        blank = [page for page in free if page not in self.idle]
        expected = (blank + self.idle)[:count]
        assert list(self.pages.alloc(count)) == expected
        self.idle = [page for page in self.idle if page not in expected]
        for page in expected:
            self.keys.pop(page, None)
        self.tables.append(expected)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        there = [page for page in range(self.pages.num_pages) if self.counts(page) or page in self.idle]
        table = data.draw(st.lists(st.integers(-1, self.pages.num_pages), unique=True, max_size=3))
        if set(table) <= set(there):
            self.pages.fork(table)
            self.tables.append(table)
            self.idle = [page for page in self.idle if page not in table]
        else:
            with pytest.raises(ValueError, match="must be held or remembered to be forked"):
                self.pages.fork(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pages.free(table)
        self.idle += [page for page in reversed(table) if not self.counts(page) and page in self.keys]

    @rule(data=st.data())
    def free_what_nobody_holds(self, data: st.DataObject) -> None:
        free = [page for page in range(self.pages.num_pages) if not self.counts(page)] + [-1, self.pages.num_pages]
        wrong = data.draw(st.sampled_from(free))
        held = [page for page in range(self.pages.num_pages) if self.counts(page)]
        for table in ([*held, wrong], [*held, *held[:1]]):
            if len(table) > len(held):
                with pytest.raises(ValueError, match="`pages` must be distinct and held to be freed"):
                    self.pages.free(table)

    @rule(page=st.integers(0, 6), key=st.integers(0, 5))
    def remember(self, page: int, key: int) -> None:
        if page >= self.pages.num_pages or not self.counts(page):
            with pytest.raises(ValueError, match=f"`page` must be held to be remembered, got {page}"):
                self.pages.remember(page, key)
            return
        self.pages.remember(page, key)
        if key not in self.keys.values():
            self.keys[page] = key

    @rule(page=st.integers(0, 6))
    def forget(self, page: int) -> None:
        self.pages.forget([page, -1])
        self.keys.pop(page, None)
        self.idle = [other for other in self.idle if other != page]

    @rule(more=st.integers(0, 2))
    def grow(self, more: int) -> None:
        if self.pages.num_pages < 9:
            self.pages.grow(self.pages.num_pages + more)
        with pytest.raises(ValueError, match="`num_pages` must be at least what there is"):
            self.pages.grow(self.pages.num_pages - 1)

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        held = [page for page in range(self.pages.num_pages) if self.counts(page)]
        free = [page for page in range(self.pages.num_pages) if page not in held]
        sources, targets = (data.draw(st.permutations(pages)) for pages in (held, free))
        moves = list(zip(sources, targets, strict=False))
        self.pages.move(moves)
        where = dict(moves)
        self.tables = [[where.get(page, page) for page in table] for table in self.tables]
        for source, target in moves:
            self.keys.pop(target, None)
            self.idle = [page for page in self.idle if page != target]
            if source in self.keys:
                self.keys[target] = self.keys.pop(source)
        if moves:
            with pytest.raises(ValueError, match="`moves` must go from held pages to free ones"):
                self.pages.move([(moves[0][1], moves[0][0]), moves[0]])

    @invariant()
    def holders_are_entries_of_tables(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.pages.integrity(self.tables)
        held = [page for page in range(self.pages.num_pages) if self.counts(page)]
        assert [self.pages.holders(page) for page in held] == [self.counts(page) for page in held]
        assert self.pages.num_free + len(held) == self.pages.num_pages
        assert self.pages.num_idle == len(self.idle) and set(self.pages.remembered) == set(self.keys)
        assert self.pages.occupied == tuple(page in held for page in range(self.pages.num_pages))
        for page, key in self.keys.items():
            assert self.pages.find(key) == page
        assert self.pages.find(-1) is None


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_the_end_of_what_was_let_go_first_goes_first() -> None:
    pages = PageAllocator(6)
    one, two = pages.alloc(3), pages.alloc(2)
    for page in (*one, *two):
        pages.remember(page, page)
    pages.free(one)
    pages.free(two)
    pages.fork([2])  # found again: out of the middle of what is idle
    assert pages.alloc(1) == (5,) and pages.find(1) == 1  # blank ones first
    assert pages.alloc(3) == (1, 0, 4) and pages.find(3) == 3 and pages.find(0) is None


@pytest.mark.parametrize(
    "break_it",
    [
        lambda pages: pages._holders.__setitem__(0, 2),
        lambda pages: pages._blank.append(0),
        lambda pages: pages._blank.pop(),
        lambda pages: pages._idle.__setitem__(1, None),
        lambda pages: pages._pages.__setitem__("odd", 1),
    ],
)
def test_integrity_finds_what_is_wrong(break_it: Callable[[PageAllocator], object]) -> None:
    pages = PageAllocator(4)
    table = pages.alloc(2)
    pages.remember(1, "key")
    pages.integrity([table])
    break_it(pages)
    with pytest.raises(AssertionError):
        pages.integrity([table])


def test_refused_sizes() -> None:
    with pytest.raises(ValueError, match="`num_pages` must be at least 0, got -1"):
        PageAllocator(-1)
    with pytest.raises(ValueError, match="`count` must be at least 0, got -1"):
        PageAllocator(3).alloc(-1)


def test_keys_name_whole_prefixes() -> None:
    tokens = list(range(11))
    keys = list(page_keys(tokens, 4, b"model"))
    assert len(keys) == len(set(keys)) == 2
    assert list(page_keys(tokens[4:], 4, keys[0])) == keys[1:]  # a chain goes on
    assert list(page_keys([*tokens[:7], 99], 4, b"model"))[:1] == keys[:1]
    for other in ([9, *tokens[1:]], [1, 0, *tokens[2:]]):  # what differs early differs in all that follows
        assert not set(page_keys(other, 4, b"model")) & set(keys)
    assert not set(page_keys(tokens, 4, b"adapter")) & set(keys)
    assert list(page_keys(tokens, 12, b"")) == []


def test_keys_are_those_of_any_process() -> None:
    """Those that another one has computed."""
    assert [key.hex() for key in page_keys(range(6), 3, b"x")] == [
        "e74f6c2300c0b6bddb030265cfb1f5ce81d721ff91f22fb1622ed71167c37cc1",
        "b4f875f4798d4d3630855259f200775b86005c24a22f2439737550e24172efe6",
    ]
