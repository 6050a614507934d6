"""A key-value cache in pages: who holds which page is host integers, what lies in them is one tensor pair per layer.

A contiguous cache is the same cache with one long page per request. Pages are handed out lowest first, so a request
that grows alone holds consecutive pages and is read and written as one slice.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kv.ledger import Ledger
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch

__all__ = ["PagedKV"]


class _Request(NamedTuple):
    pages: tuple[int, ...]
    length: int


class PagedKV:
    """Keys and values of many requests, for the KV heads of one rank.

    A step asks for a `batch` (which finds room for the new tokens and counts them), then every layer does `append` and
    attends to what `read` gives it. Room is found for all requests or for none. Memory is not initialised: what was
    never appended must never be read, and `read` refuses to. Values are stored without their autograd history.

    A batch's tokens are to be appended before a request is freed, truncated or selected: the pages may then belong to
    another. Each of these makes a new `version` of the cache, and `append` refuses the batches of older ones.

    Args:
        num_layers: Layers that append.
        num_pages: Pages, shared by all requests.
        page_size: Tokens in a page.
        num_kv_heads: KV heads that this rank holds, `HeadMap.kv_ranges`.
        head_dim: Dims of a head.
        pages_per_request: The most pages that one request may hold; None for no limit.
        dtype: Of keys and values.
        device: Of keys and values.

    Raises:
        ValueError: a size is negative, or `page_size` is 0.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        pages_per_request: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if page_size < 1 or min(num_layers, num_pages, num_kv_heads, head_dim) < 0:
            raise ValueError(
                "`page_size` must be at least 1 and the other sizes at least 0, got "
                f"{num_layers=}, {num_pages=}, {page_size=}, {num_kv_heads=}, {head_dim=}"
            )
        self.num_pages, self.page_size, self.pages_per_request = num_pages, page_size, pages_per_request
        shape = (num_pages, self._stored(page_size), num_kv_heads, head_dim)
        with torch.inference_mode(False):  # made in it, they could only ever be written in it
            self._k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
            self._v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._free = list(range(num_pages))  # a heap
        self._requests: dict[Hashable, _Request] = {}
        self._ledgers = [Ledger(num_kv_heads) for _ in range(num_layers)]
        self.version = 0
        self.num_kv_heads, self.head_dim, self.dtype, self.device = num_kv_heads, head_dim, dtype, torch.device(device)

    @classmethod
    def contiguous(
        cls,
        num_layers: int,
        num_requests: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PagedKV:
        """One page of `max_len` tokens for each request."""
        return cls(
            num_layers, num_requests, max_len, num_kv_heads, head_dim, pages_per_request=1, dtype=dtype, device=device
        )

    # Who holds what.

    @property
    def num_layers(self) -> int:
        return len(self._k)

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The requests held, oldest first."""
        return tuple(self._requests)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.num_layers * self.num_pages * self._stored(self.page_size) * self.token_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        tokens = sum(self._stored(request.length) for request in self._requests.values())
        return self.num_layers * tokens * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, key and value."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def length(self, request: Hashable) -> int:
        """Tokens of a request; those of the step in progress count."""
        return self._get(request).length

    def pages(self, request: Hashable) -> tuple[int, ...]:
        """Pages of a request, in order."""
        return self._get(request).pages

    def reserve(self, q_lens: Mapping[Hashable, int]) -> None:
        """Find room for that many more tokens of each request; one that is not held yet begins empty.

        Raises:
            ValueError: not all of them fit; then nothing has changed.
        """
        wanted = {request: self._wanted(request, new) for request, new in q_lens.items()}
        if sum(wanted.values()) > len(self._free):
            raise self._out_of_pages("new tokens", sum(wanted.values()), len(self._free))
        for request, count in wanted.items():
            held = self._requests.get(request, _Request((), 0))
            self._requests[request] = held._replace(pages=held.pages + self._take(count))

    def batch(
        self,
        requests: Sequence[Hashable],
        q_lens: Sequence[int],
        *,
        positions: Int64[Tensor, " t"] | None = None,
    ) -> RaggedBatch:
        """Describe a step and count its tokens as held: every layer is now to append them.

        Args:
            requests: Who takes part, in the order of the rows.
            q_lens: New tokens of each.
            positions: Rotary positions; by default each token's index in its request.

        Raises:
            ValueError: a request is named twice, or the step does not fit; then nothing has changed.
        """
        if len(set(requests)) != len(requests) or len(q_lens) != len(requests):
            raise ValueError(
                f"`requests` must be distinct, with one of `q_lens` each, got {list(requests)} and {list(q_lens)}"
            )
        if positions is not None and positions.shape != (sum(q_lens),):
            raise ValueError(
                f"`positions` must have one entry per new token ({sum(q_lens)}), got {list(positions.shape)}"
            )
        self.reserve(dict(zip(requests, q_lens, strict=True)))
        for request, new in zip(requests, q_lens, strict=True):
            held = self._requests[request]
            self._requests[request] = held._replace(length=held.length + new)
        held_now = [self._requests[request] for request in requests]
        kv_lens, pages = [held.length for held in held_now], [held.pages for held in held_now]
        return RaggedBatch.build(
            q_lens,
            kv_lens,
            pages,
            self.page_size,
            positions=positions,
            device=self.device,
            version=self.version,
            requests=requests,
        )

    def free(self, request: Hashable) -> None:
        """Give a request's pages back."""
        self._release(self._get(request).pages)
        self.version += 1
        del self._requests[request]
        for ledger in self._ledgers:
            ledger.free(request)

    def truncate(self, request: Hashable, length: int) -> None:
        """Forget all but the first `length` tokens of a request, and give back the pages that they leave.

        Raises:
            ValueError: the request is not held or has fewer tokens.
        """
        held = self._get(request)
        if not 0 <= length <= held.length:
            raise ValueError(f"`length` must be 0 to the tokens of request {request!r} ({held.length}), got {length}")
        keep = self._pages_for(length)
        self._release(held.pages[keep:])
        self.version += 1
        self._requests[request] = _Request(held.pages[:keep], length)
        for ledger in self._ledgers:
            ledger.truncate(request, length)

    def select(self, sources: Mapping[Hashable, Hashable]) -> None:
        """Let each key hold what its value held, all at once; requests that are no keys stay as they are.

        This is beam search's reordering (`{0: 0, 1: 0, 2: 1}`) and a fork (`{new: old}`). Pages that one key alone
        takes over change hands without a copy; of the others only the tokens held are copied.

        Raises:
            ValueError: a value is not held, or the copies do not fit; then nothing has changed.
        """
        before = {old: self._get(old) for old in sources.values()}
        owner = {old: old if sources.get(old, old) == old else new for new, old in sources.items()}
        copied = [new for new, old in sources.items() if owner[old] != new]
        released = [p for new in sources if new in self and new not in owner for p in self._requests[new].pages]
        wanted = sum(self._pages_for(before[sources[new]].length) for new in copied)
        if wanted > len(self._free) + len(released):
            raise self._out_of_pages("copies", wanted, len(self._free) + len(released))
        self._release(released)
        self.version += 1
        self._requests.update({new: before[old] for new, old in sources.items() if owner[old] == new})
        for new in copied:
            held = before[sources[new]]
            pages = self._take(self._pages_for(held.length))
            self._copy_pages(held.pages, pages, held.length)
            self._requests[new] = _Request(pages, held.length)
        for ledger in self._ledgers:
            ledger.select(sources)

    @torch.inference_mode(False)
    def grow(self, *, num_pages: int | None = None, page_size: int | None = None) -> None:
        """Make room for more, keeping every request: more pages, or longer ones where no request holds more than one.

        Batches made before still fit, for no request has lost a page; but not once pages have become longer.

        Raises:
            ValueError: a size shrinks, or pages would grow under a request that holds several.
        """
        num_pages, page_size = num_pages or self.num_pages, page_size or self.page_size
        if num_pages < self.num_pages or page_size < self.page_size:
            raise ValueError(
                f"a cache must not shrink (below {self.num_pages} pages of {self.page_size}), "
                f"got {num_pages} pages of {page_size}"
            )
        longest = max((len(held.pages) for held in self._requests.values()), default=0)
        if page_size != self.page_size and longest > 1:
            raise ValueError(
                f"`page_size` must stay {self.page_size} while a request holds several pages ({longest}), "
                f"got {page_size}; grow `num_pages`"
            )
        for store in (self._k, self._v):
            for layer, old in enumerate(store):
                store[layer] = new = old.new_empty(num_pages, self._stored(page_size), *old.shape[2:])
                for page, used in self._used_pages():
                    new[page, :used] = old[page, :used]
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._free, page)
        self.num_pages, self.page_size = num_pages, page_size

    def integrity(self) -> None:
        """Raise AssertionError unless every page has exactly one holder and every request room for its tokens."""
        held = [page for request in self._requests.values() for page in request.pages]
        assert sorted(held + self._free) == list(range(self.num_pages)), "every page is free or held once"
        for name, request in self._requests.items():
            room = len(request.pages) * self.page_size
            assert 0 <= request.length <= room, f"request {name!r} has {request.length} tokens in room for {room}"

    # What lies in them.

    def layer(self, index: int) -> tuple[Float[Tensor, "pages page_size g d"], Float[Tensor, "pages page_size g d"]]:
        """Keys and values of a layer, all pages of them, written or not."""
        return self._k[index], self._v[index]

    def read(
        self, layer: int, batch: RaggedBatch, *, heads: Range | None = None
    ) -> tuple[Float[Tensor, "pages page_size g_read d"], Float[Tensor, "pages page_size g_read d"]]:
        """Keys and values of a layer, or of some of its heads, for a step whose keys have all been appended.

        Raises:
            ValueError: keys that a request of the batch may see are not there yet.
        """
        missing = self._ledgers[layer].missing(batch, heads)
        if missing is not None:
            request, promised, appended = missing
            raise ValueError(
                f"`batch` must be read after its keys are appended (layer {layer}, request {request!r}: {promised} "
                f"tokens promised), got {appended} appended; run programs in causal order, each with its `Mark`"
            )
        k, v = self._k[layer], self._v[layer]
        return (k, v) if heads is None else (k[:, :, heads.start : heads.stop], v[:, :, heads.start : heads.stop])

    def append(
        self,
        layer: int,
        k: Float[Tensor, "t g_new d"],
        v: Float[Tensor, "t g_new d"],
        batch: RaggedBatch,
        *,
        heads: Range | None = None,
    ) -> None:
        """Write a step's keys and values where the batch says.

        Args:
            layer: Which one.
            k: Keys of the new tokens.
            v: Values of them.
            batch: The step, or a chunk of it; chunks in their order.
            heads: The local KV heads that `k` and `v` are; all by default. The others are to follow.

        Raises:
            ValueError: shape, dtype or page size differ from the cache's, the heads are none of its own, or the batch
                is older than the last free, truncate or select; then nothing was written.
        """
        self._check_append(k, v, batch, heads, batch.num_tokens)
        for store, new in ((self._k, k), (self._v, v)):
            flat, new = store[layer].flatten(0, 1), new.detach()
            if heads is not None:
                flat = flat[:, heads.start : heads.stop]
            if flat.is_cpu and len(batch.slot_runs) == 1:
                flat.narrow(0, batch.slot_runs[0][1], len(new)).copy_(new)
            else:
                flat.index_copy_(0, batch.slots, new)
        self._ledgers[layer].add(batch, heads)

    def gather(
        self, layer: int, requests: Sequence[Hashable]
    ) -> tuple[Float[Tensor, "keys g d"], Float[Tensor, "keys g d"]]:
        """Copies of the keys and values that are stored here of some requests, one after another, tokens in order.

        Raises:
            ValueError: a request is not held, or some of its tokens are not there yet.
        """
        self.check_appended(layer, requests)
        rows = self._stored(self.page_size)
        slots = [slice(p * rows, p * rows + used) for r in requests for p, used in self._pages_of(self._get(r))]
        k, v = (store[layer].flatten(0, 1) for store in (self._k, self._v))
        return torch.cat([k[:0], *(k[s] for s in slots)]), torch.cat([v[:0], *(v[s] for s in slots)])

    def check_appended(self, layer: int, requests: Sequence[Hashable]) -> None:
        """Raise ValueError unless the requests are held and all their tokens are there."""
        for request in requests:
            appended = self._ledgers[layer].appended(request)
            if appended < self.length(request):
                raise ValueError(
                    f"`requests` must be read after their keys are appended (layer {layer}, request {request!r}: "
                    f"{self.length(request)} tokens promised), got {appended} appended"
                )

    def _check_append(self, k: Tensor, v: Tensor, batch: RaggedBatch, heads: Range | None, tokens: int) -> None:
        """Refuse what is not this step's keys and values of that many tokens."""
        if heads is not None and not 0 <= heads.start <= heads.stop <= self.num_kv_heads:
            raise ValueError(f"`heads` must lie within the {self.num_kv_heads} heads held, got {heads}")
        shape = (tokens, self.num_kv_heads if heads is None else heads.size, self.head_dim)
        if k.shape != shape or v.shape != shape or k.dtype != self.dtype or v.dtype != self.dtype:
            raise ValueError(
                f"`k` and `v` must be {list(shape)} in {self.dtype}, got {list(k.shape)} in {k.dtype} "
                f"and {list(v.shape)} in {v.dtype}"
            )
        if batch.page_size != self.page_size:
            raise ValueError(f"`batch` must have the cache's page size ({self.page_size}), got {batch.page_size}")
        if batch.version != self.version:
            raise ValueError(
                f"`batch` must be made after the last free, truncate or select (version {self.version}), "
                f"got {batch.version}; ask for a new `batch`"
            )

    def _copy_pages(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens from pages to pages, in every layer."""
        for tensor in (*self._k, *self._v):
            for i, (source, target) in enumerate(zip(sources, targets, strict=False)):
                used = self._stored(min(length - i * self.page_size, self.page_size))
                tensor[target, :used] = tensor[source, :used]

    def _stored(self, tokens: int) -> int:
        """How many of the first tokens of a page, or of a request, are stored here: all of them."""
        return tokens

    def _used_pages(self) -> Iterator[tuple[int, int]]:
        """Every page that holds tokens, with the number of those stored here."""
        for held in self._requests.values():
            yield from self._pages_of(held)

    def _pages_of(self, held: _Request) -> Iterator[tuple[int, int]]:
        """The pages of a request that hold tokens, with the number of those stored here."""
        for i, page in enumerate(held.pages[: self._pages_for(held.length)]):
            yield page, self._stored(min(held.length - i * self.page_size, self.page_size))

    def _get(self, request: Hashable) -> _Request:
        if request not in self._requests:
            raise ValueError(f"`request` must be held by the cache, got {request!r}")
        return self._requests[request]

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _wanted(self, request: Hashable, new: int) -> int:
        """Pages that a request lacks for `new` more tokens."""
        held = self._requests.get(request, _Request((), 0))
        if new < 0:
            raise ValueError(f"`q_lens` must be at least 0, got {new} for request {request!r}")
        pages = self._pages_for(held.length + new)
        if self.pages_per_request is not None and pages > self.pages_per_request:
            raise ValueError(
                f"out of pages: a request must fit into {self.pages_per_request} pages of {self.page_size} tokens, "
                f"got {held.length} + {new} tokens for request {request!r}; grow `page_size`"
            )
        return max(0, pages - len(held.pages))

    def _take(self, count: int) -> tuple[int, ...]:
        return tuple(heapq.heappop(self._free) for _ in range(count))

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def _out_of_pages(self, what: str, wanted: int, free: int) -> ValueError:
        return ValueError(
            f"out of pages: the {what} must fit into the free pages ({free} of {self.num_pages}, "
            f"{self.page_size} tokens each), got {wanted} wanted; free requests or grow the cache"
        )
