"""Which pages are held, by how many, and what those that nobody holds still contain: host integers alone.

Pages that nobody holds are of two kinds. Blank ones are handed out first, the lowest first, so that a request which
grows alone lies in one run. Those that are remembered under a key keep what they contain until no blank one is left;
then the one let go longest ago is taken. A key is any name of contents, such as those of `page_keys`: whoever wants the
same contents finds the page by it, held or not.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import blake2b

__all__ = ["OutOfPages", "PageAllocator", "page_keys"]


class OutOfPages(ValueError):
    """Fewer pages are free than were asked for; nothing has changed."""


class PageAllocator:
    """Pages 0 to `num_pages` - 1 with the number of their holders.

    `alloc`, `fork` and `free` each take or give all pages that are named, or none. All are O(1) a page, but for the
    heap of blank pages (O(log n)).

    Args:
        num_pages: that there are.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"`num_pages` must be at least 0, got {num_pages}")
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages))  # a heap
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered and held by nobody, let go longest ago first
        self._keys: dict[int, Hashable] = {}
        self._pages: dict[Hashable, int] = {}

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Of them, those that are remembered."""
        return len(self._idle)

    @property
    def remembered(self) -> tuple[int, ...]:
        """All pages that have a key, held or not."""
        return tuple(self._keys)

    @property
    def occupied(self) -> tuple[bool, ...]:
        """Of each page, whether somebody holds it."""
        return tuple(map(bool, self._holders))

    def holders(self, page: int) -> int:
        """How many hold a page.

        Raises:
            ValueError: there is no such page.
        """
        if not 0 <= page < self.num_pages:
            raise ValueError(f"`page` must be one of {self.num_pages} pages, got {page}")
        return self._holders[page]

    def alloc(self, count: int) -> tuple[int, ...]:
        """Take that many free pages, each for one holder; what they contained is forgotten.

        Raises:
            OutOfPages: fewer are free.
            ValueError: a negative count.
        """
        if count < 0:
            raise ValueError(f"`count` must be at least 0, got {count}")
        if count > self.num_free:
            raise OutOfPages(f"out of pages: `count` must be at most the free pages ({self.num_free}), got {count}")
        pages = tuple(heapq.heappop(self._blank) if self._blank else self._evict() for _ in range(count))
        for page in pages:
            self._holders[page] = 1
        return pages

    def fork(self, pages: Sequence[int]) -> None:
        """Hold pages once more, with what they contain: pages that are held, or remembered.

        Raises:
            ValueError: a page that is neither; then nothing has changed.
        """
        wrong = [page for page in pages if not (self._is_held(page) or page in self._idle)]
        if wrong:
            raise ValueError(f"`pages` must be held or remembered to be forked, got {wrong}")
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Hold pages once less. Those that nobody holds then are free, the last of them to be taken first.

        Raises:
            ValueError: a page that is not held, or one that is named twice; then nothing has changed.
        """
        wrong = [page for page in pages if not self._is_held(page)]
        if wrong or len(set(pages)) != len(pages):
            raise ValueError(f"`pages` must be distinct and held to be freed, got {wrong or list(pages)}")
        for page in reversed(pages):  # the end of a prefix is of less use than its beginning
            self._holders[page] -= 1
            if not self._holders[page]:
                self._let_go(page)

    def remember(self, page: int, key: Hashable) -> None:
        """Let a held page be found by a key. A key stays with its first page; a page has one key, the newest.

        Raises:
            ValueError: the page is not held.
        """
        if not self._is_held(page):
            raise ValueError(f"`page` must be held to be remembered, got {page}")
        if key not in self._pages:
            self.forget([page])
            self._keys[page], self._pages[key] = key, page

    def forget(self, pages: Iterable[int]) -> None:
        """Let pages be found no more, because their contents are to change."""
        for page in self._keys.keys() & pages:
            del self._pages[self._keys.pop(page)]
            if page in self._idle:
                del self._idle[page]
                heapq.heappush(self._blank, page)

    def find(self, key: Hashable) -> int | None:
        """The page of a key, if it is still there."""
        return self._pages.get(key)

    def grow(self, num_pages: int) -> None:
        """Add blank pages, so that there are `num_pages`.

        Raises:
            ValueError: fewer than there are.
        """
        if num_pages < self.num_pages:
            raise ValueError(f"`num_pages` must be at least what there is ({self.num_pages}), got {num_pages}")
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._blank, page)
        self._holders += [0] * (num_pages - len(self._holders))

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Let each second page be what the first was, holders and key, one after another; the first becomes blank.

        Raises:
            ValueError: a first page that is not held, or a second one that is; then nothing has changed.
        """
        holders = list(self._holders)
        for source, target in moves:
            if not (self._is_held(source) and 0 <= target < self.num_pages and holders[source] and not holders[target]):
                raise ValueError(f"`moves` must go from held pages to free ones, got {source} to {target}")
            holders[source], holders[target] = 0, holders[source]
        for source, target in moves:
            self.forget([target])
            if source in self._keys:
                key = self._keys.pop(source)
                self._keys[target], self._pages[key] = key, target
        self._holders = holders
        self._blank = [page for page, count in enumerate(holders) if not count and page not in self._idle]

    def integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless pages are held as often as they stand in those tables, and the others free."""
        counts = [0] * self.num_pages
        for table in tables:
            assert len(set(table)) == len(table), f"a table names no page twice, got {list(table)}"
            for page in table:
                counts[page] += 1
        assert counts == self._holders, f"a page has as many holders as tables, got {self._holders} for {counts}"
        free = sorted([*self._blank, *self._idle])
        assert free == [page for page, count in enumerate(counts) if not count], "a page is free or held"
        assert self._pages == {key: page for page, key in self._keys.items()}, "keys and pages name each other"
        assert set(self._idle) == {page for page in self._keys if not counts[page]}, "free pages with keys are idle"

    def _is_held(self, page: int) -> bool:
        return 0 <= page < self.num_pages and self._holders[page] > 0

    def _let_go(self, page: int) -> None:
        if page in self._keys:
            self._idle[page] = None
        else:
            heapq.heappush(self._blank, page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._keys.pop(page)]
        return page


def page_keys(tokens: Sequence[int], page_size: int, parent: bytes) -> Iterator[bytes]:
    """A key for each full page of tokens: a hash of them and of all that came before.

    Equal keys mean equal prefixes, to within a collision of 256 bits, in any process.

    Args:
        tokens: token numbers, from the first one of a page on.
        page_size: tokens in a page.
        parent: the key of the page before, or of the first page any bytes that say what else the contents depend on,
            such as a model or an adapter.
    """
    for first in range(0, len(tokens) - page_size + 1, page_size):
        page = array("q", tokens[first : first + page_size]).tobytes()
        parent = blake2b(parent + page, digest_size=32).digest()
        yield parent
