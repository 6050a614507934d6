"""A key-value cache in pages: who holds which page is host integers, what lies in them is one tensor pair per layer.

A contiguous cache is the same cache with one long page per request. Pages are handed out lowest first, so a request
that grows alone holds consecutive pages and is read and written as one slice.

Requests may hold the same pages: forks of one request, and requests whose prompts begin alike. What is held by several
is never written: of the page in which a request goes on it first takes a copy, if another holds it too.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.rows import FP8, FP8_DTYPES, Scales, Span, append_rows, copy_spans, fp8
from seqpar.kv import compaction
from seqpar.kv.compaction import CompactionPlan, Strategy
from seqpar.kv.ledger import Ledger
from seqpar.kv.pages import OutOfPages, PageAllocator, page_keys
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch

__all__ = ["PagedKV"]


@dataclass(slots=True)
class _Request:
    """What the cache knows of a request.

    Attributes:
        version: of the cache when tokens of this request were last lost or moved.
        pages: in order, packed as a batch's table takes them.
        keys: of its first pages, as far as those are full and their tokens known.
        ready: tokens up to which it goes on in pages that are its own and found by nobody, so that most steps of most
            requests need not ask for room; 0 where that has to be looked at.
    """

    version: int
    pages: array[int] = field(default_factory=lambda: array("i"))
    length: int = 0
    keys: list[bytes] = field(default_factory=list)
    ready: int = 0


class _Room(NamedTuple):
    """What new tokens need before they can be written.

    Attributes:
        lacking: how many pages requests are to be given; new requests are named in any case.
        copied: requests that go on in a page which others hold too.
        written: pages of one holder whose contents change.
    """

    lacking: dict[Hashable, int]
    copied: list[Hashable]
    written: list[int]

    @property
    def wanted(self) -> int:
        """Free pages that this takes."""
        return sum(self.lacking.values()) + len(self.copied)


class PagedKV:
    """Keys and values of many requests, for the KV heads of one rank.

    A step asks for a `batch` (which finds room for the new tokens and counts them), then every layer does `append` and
    attends to what `read` gives it. Room is found for all requests or for none. Memory is not initialised: what was
    never appended must never be read, and `read` refuses to. Values are stored without their autograd history.

    A batch's tokens are to be appended before one of its requests is freed, truncated, selected or moved: the pages may
    then belong to another. Each of these makes a new `version` of the cache, and `append` refuses the batches that
    are older than the last change of a request which they bring tokens of. What happens to other requests concerns no
    batch, so that several may be in flight.

    Args:
        num_layers: Layers that append.
        num_pages: Pages, shared by all requests.
        page_size: Tokens in a page.
        num_kv_heads: KV heads that this rank holds, `HeadMap.kv_ranges`.
        head_dim: Dims of a head.
        pages_per_request: The most pages that one request may hold; None for no limit.
        dtype: Of keys and values.
        stored: What they are stored in: None for `dtype`, or torch.float8_e4m3fn with a scale for each token and KV
            head, half of bfloat16's bytes (`kernels.rows.fp8` says what that loses). What is read is then to be
            attended to with `scales`.
        device: Of keys and values.

    Raises:
        ValueError: a size is negative, or `page_size` is 0; 8 bits of another dtype than float32, bfloat16 and float16.
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
        stored: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if stored not in (None, FP8) or (stored is not None and (dtype not in FP8_DTYPES or not head_dim)):
            raise ValueError(
                f"`stored` must be None, or {FP8} for a `dtype` of {', '.join(map(str, FP8_DTYPES))} and heads of at "
                f"least 1, got {stored} for {dtype} and heads of {head_dim}"
            )
        if page_size < 1 or min(num_layers, num_pages, num_kv_heads, head_dim) < 0:
            raise ValueError(
                "`page_size` must be at least 1 and the other sizes at least 0, got "
                f"{num_layers=}, {num_pages=}, {page_size=}, {num_kv_heads=}, {head_dim=}"
            )
        self.num_pages, self.page_size, self.pages_per_request = num_pages, page_size, pages_per_request
        shape = (num_pages, self._stored(page_size), num_kv_heads, head_dim)
        # PyTorch moves bytes on every device, and 8-bit floats not everywhere.
        kinds = [(shape, dtype)] * 2 if stored is None else [(shape, torch.uint8)] * 2 + [(shape[:3], torch.uint8)] * 2
        with torch.inference_mode(False):  # made in it, they could only ever be written in it
            self._stores = [
                [torch.empty(size, dtype=kind, device=device) for _ in range(num_layers)] for size, kind in kinds
            ]
        self._k, self._v, *self._scales = self._stores
        self._allocator = PageAllocator(num_pages)
        self._requests: dict[Hashable, _Request] = {}
        self._ledgers = [Ledger(num_kv_heads) for _ in range(num_layers)]
        self.version = 0
        self.num_kv_heads, self.head_dim, self.dtype, self.device = num_kv_heads, head_dim, dtype, torch.device(device)
        self.stored = dtype if stored is None else stored

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
        """Pages that no request holds; those that may be found again by their tokens count."""
        return self._allocator.num_free

    @property
    def idle_pages(self) -> int:
        """Of the free pages, those that may be found again by their tokens."""
        return self._allocator.num_idle

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.num_layers * self.num_pages * self._stored(self.page_size) * self.token_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held; those in a page of several requests count once."""
        return self.num_layers * sum(self._used().values()) * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, key and value."""
        return 2 * self.num_kv_heads * (self.head_dim * self.stored.itemsize + bool(self._scales))

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def length(self, request: Hashable) -> int:
        """Tokens of a request; those of the step in progress count."""
        return self._get(request).length

    def pages(self, request: Hashable) -> tuple[int, ...]:
        """Pages of a request, in order."""
        return tuple(self._get(request).pages)

    def holders(self, page: int) -> int:
        """How many requests hold a page."""
        return self._allocator.holders(page)

    def given_back(self, requests: Sequence[Hashable]) -> tuple[int, ...]:
        """How many pages each of some requests would give back, were they freed in this order.

        A page of several comes back with the last of those that hold it.

        Raises:
            ValueError: a request is not held, or is named twice.
        """
        if len(set(requests)) != len(requests):
            raise ValueError(f"`requests` must be distinct, got {list(requests)}")
        left, given = Counter[int](), []
        for request in requests:
            pages = self._get(request).pages
            left.update(pages)
            given.append(sum([left[page] == self._allocator.holders(page) for page in pages]))
        return tuple(given)

    def wanted(self, q_lens: Mapping[Hashable, int]) -> int:
        """How many free pages room for that many more tokens of each request takes: what `reserve` would take.

        Raises:
            ValueError: a request may never hold as many pages, or a number is negative.
        """
        return self._room(q_lens).wanted

    def reserve(self, q_lens: Mapping[Hashable, int]) -> None:
        """Find room for that many more tokens of each request; one that is not held yet begins empty.

        Raises:
            OutOfPages: not all of them fit; then nothing has changed.
            ValueError: a request may never hold as many pages, or a number is negative; likewise.
        """
        self._hold(q_lens.keys(), q_lens.values())

    def _hold(self, requests: Collection[Hashable], q_lens: Iterable[int]) -> tuple[list[_Request], list[int]]:
        """Some requests, with room for that many more tokens of each, and their tokens with those; see `reserve`."""
        there, absent = self._requests, _Request(self.version, ready=-1)
        q_lens = list(q_lens)
        held = [there.get(request, absent) for request in requests]
        lengths = [each.length + new for each, new in zip(held, q_lens, strict=True)]
        asking = {
            request: new
            for request, new, each, length in zip(requests, q_lens, held, lengths, strict=True)
            if length > each.ready or new < 0
        }
        if asking:
            self._make_room(asking)
            held = [there[request] for request in requests]
        return held, lengths

    def _make_room(self, asking: Mapping[Hashable, int]) -> None:
        """Find pages for all of these requests or for none."""
        there, room = self._requests, self._room(asking)
        if room.wanted > self.free_pages:
            raise OutOfPages(
                f"out of pages: the new tokens must fit into the free pages ({self.free_pages} of {self.num_pages}, "
                f"{self.page_size} tokens each), got {room.wanted} wanted; free requests or grow the cache"
            )
        for request in room.copied:
            self._take_copy(there[request])
        self._allocator.forget(room.written)
        pages = iter(self._allocator.alloc(sum(room.lacking.values())))
        for request, count in room.lacking.items():
            if request not in there:
                there[request] = _Request(self.version)
            there[request].pages.extend(islice(pages, count))
        for request, new in asking.items():
            if new:
                there[request].ready = len(there[request].pages) * self.page_size

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
            OutOfPages: the step does not fit; then nothing has changed.
            ValueError: a request is named twice, or may never hold as many pages; likewise.
        """
        if len(set(requests)) != len(requests) or len(q_lens) != len(requests):
            raise ValueError(
                f"`requests` must be distinct, with one of `q_lens` each, got {list(requests)} and {list(q_lens)}"
            )
        if positions is not None and positions.shape != (sum(q_lens),):
            raise ValueError(
                f"`positions` must have one entry per new token ({sum(q_lens)}), got {list(positions.shape)}"
            )
        held, lengths = self._hold(requests, q_lens)
        for each, length in zip(held, lengths, strict=True):
            each.length = length
        return RaggedBatch.build(
            q_lens,
            lengths,
            [each.pages for each in held],
            self.page_size,
            positions=positions,
            device=self.device,
            version=self.version,
            requests=requests,
        )

    def free(self, request: Hashable) -> None:
        """Give a request's pages back; those that are shared with another stay with it."""
        self._allocator.free(self._get(request).pages)
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
        self._allocator.free(held.pages[keep:])
        self.version += 1
        held.pages, held.length, held.version = held.pages[:keep], length, self.version
        held.keys, held.ready = held.keys[: length // self.page_size], 0
        for ledger in self._ledgers:
            ledger.truncate(request, length)

    def select(self, sources: Mapping[Hashable, Hashable]) -> None:
        """Let each key hold what its value held, all at once; requests that are no keys stay as they are.

        This is beam search's reordering (`{0: 0, 1: 0, 2: 1}`) and a fork (`{new: old}`). Nothing is copied and no free
        page is taken: pages of tokens change hands, or have several holders from then on, and those reserved beyond
        the tokens stay behind. A request that goes on in a page of several takes a copy of its tokens then.

        Raises:
            ValueError: a value is not held; then nothing has changed.
        """
        before = {new: self._get(old) for new, old in sources.items() if new != old}
        for old in sources.values():
            self._get(old)
        if not before:
            return
        self.version += 1
        after = {new: self._fork(held) for new, held in before.items()}
        for new in after:
            if new in self._requests:
                self._allocator.free(self._requests[new].pages)
        for held in before.values():
            held.version, held.ready = self.version, 0  # steps in flight would write where others read
        self._requests.update(after)
        for ledger in self._ledgers:
            ledger.select(sources)

    def fork(self, request: Hashable, new: Hashable) -> None:
        """Let a new request hold what a request holds; see `select`.

        Raises:
            ValueError: the request is not held, or the new one is.
        """
        if new in self._requests:
            raise ValueError(f"`new` must not be held yet, got {new!r}; free it first, or `select`")
        self.select({new: request})

    def find(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """The pages of the first ones of some `page_keys`, up to the first that is not here."""
        return tuple([page for _, page in self._here(keys)])

    def reusable(self, tokens: Sequence[int], *, salt: bytes = b"") -> int:
        """How many of the tokens `reuse` would find."""
        return self._found(tokens, salt).length

    def reuse(self, request: Hashable, tokens: Sequence[int], *, salt: bytes = b"") -> int:
        """Begin a request with those of its first tokens that are still here, and say how many.

        Found are the full pages that `share` has named, of requests held or freed, up to the first that is not there.
        One token at least is left to compute, since a prompt's logits are wanted.

        Args:
            request: The new one.
            tokens: Its prompt.
            salt: What its keys and values depend on besides its tokens, such as an adapter or odd positions.

        Raises:
            ValueError: the request is held.
        """
        if request in self._requests:
            raise ValueError(f"`request` must not be held yet, got {request!r}; free it first")
        found = self._found(tokens, salt)
        self._allocator.fork(found.pages)
        self._requests[request] = found
        for ledger in self._ledgers:
            ledger.begin(request, found.length)
        return found.length

    def share(self, request: Hashable, tokens: Sequence[int], *, salt: bytes = b"") -> None:
        """Let later requests find a request's full pages by its tokens, as far as all layers have appended them.

        Call it once a prompt is computed, and before the request is freed: freed pages are found until their room is
        needed. What was hashed in an earlier call is not hashed again.

        Args:
            request: Whose.
            tokens: Of it, from the first on; more than are appended do no harm.
            salt: As for `reuse`.

        Raises:
            ValueError: the request is not held.
        """
        held = self._get(request)
        there = min(len(tokens), held.length, *(ledger.appended(request) for ledger in self._ledgers))
        first, full = len(held.keys), there // self.page_size
        parent = held.keys[-1] if held.keys else salt
        held.keys += page_keys(tokens[first * self.page_size : full * self.page_size], self.page_size, parent)
        for page, key in zip(held.pages, held.keys, strict=False):
            self._allocator.remember(page, key)  # also those whose key another page had, which may be gone

    def compact(self, strategy: Strategy = "window") -> CompactionPlan:
        """Move pages so that those held form one run, and say which went where; see `compaction.plan`.

        With one page for each request that is one run of requests: their keys are `layer(i)[0][run]`, a view.
        """
        plan = compaction.plan(self._allocator.occupied, strategy)
        if plan.moves:
            contents = self._contents()
            lengths = [contents.get(page, 0) for page in range(self.num_pages)]
            for tensor in chain(*self._stores):
                plan.apply(tensor, lengths=lengths)
            self._allocator.move(plan.moves)
            self.version += 1
            for held in self._requests.values():
                pages = array("i", map(plan.follow, held.pages))
                if pages != held.pages:
                    held.pages, held.version = pages, self.version
        return plan

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
        if page_size != self.page_size:
            self._forget_keys()
        contents = self._contents()
        for store in self._stores:
            for layer, old in enumerate(store):
                store[layer] = new = old.new_empty(num_pages, self._stored(page_size), *old.shape[2:])
                for page, used in contents.items():
                    new[page, :used] = old[page, :used]
        self._allocator.grow(num_pages)
        self.num_pages, self.page_size = num_pages, page_size

    def integrity(self) -> None:
        """Raise AssertionError unless every page is free or held, and every request has room for its tokens."""
        self._allocator.integrity([held.pages for held in self._requests.values()])
        for name, held in self._requests.items():
            room = len(held.pages) * self.page_size
            assert 0 <= held.length <= room, f"request {name!r} has {held.length} tokens in room for {room}"
            spare = held.pages[self._pages_for(held.length) :]
            assert all(self._allocator.holders(page) == 1 for page in spare), f"request {name!r} shares empty pages"
            assert len(held.keys) * self.page_size <= held.length, f"request {name!r} has more keys than full pages"
            if held.length % self.page_size and held.ready > held.length:
                page = held.pages[held.length // self.page_size]
                assert self._allocator.holders(page) == 1, f"request {name!r} goes on in a page of others"
                assert page not in self._allocator.remembered, f"request {name!r} goes on in a page that is found"

    # What lies in them.

    def layer(self, index: int) -> tuple[Float[Tensor, "pages page_size g d"], Float[Tensor, "pages page_size g d"]]:
        """Keys and values of a layer, all pages of them, written or not.

        Raises:
            ValueError: there is no such layer.
        """
        self._ledger(index)
        return self._k[index].view(self.stored), self._v[index].view(self.stored)

    def scales(self, layer: int, *, heads: Range | None = None) -> Scales | None:
        """Those of what `read` gives, for `kernels.attention`; None where keys and values are stored in their dtype."""
        if not self._scales:
            return None
        those = slice(None) if heads is None else slice(*heads)
        k, v = (store[layer][:, :, those] for store in self._scales)
        return k, v

    def read(
        self, layer: int, batch: RaggedBatch, *, heads: Range | None = None
    ) -> tuple[Float[Tensor, "pages page_size g_read d"], Float[Tensor, "pages page_size g_read d"]]:
        """Keys and values of a layer, or of some of its heads, for a step whose keys have all been appended.

        Raises:
            ValueError: keys that a request of the batch may see are not there yet.
        """
        missing = self._ledger(layer).missing(batch, heads)
        if missing is not None:
            request, promised, appended = missing
            raise ValueError(
                f"`batch` must be read after its keys are appended (layer {layer}, request {request!r}: {promised} "
                f"tokens promised), got {appended} appended; run programs in causal order, each with its `Mark`"
            )
        k, v = self.layer(layer)
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
                is older than the last free, truncate, select or move of a request in it; then nothing was written.
        """
        ledger = self._ledger(layer)
        self._check_append(k, v, batch, heads, batch.num_tokens)
        keys, values, *scales = (self._flat(store[layer], heads) for store in self._stores)
        if scales:
            codes = keys.view(FP8), values.view(FP8)
            append_rows(*codes, k.detach(), v.detach(), batch.slots, scales=(scales[0], scales[1]))
        elif keys.is_cpu and len(batch.slot_runs) == 1:
            start = batch.slot_runs[0][1]
            keys.narrow(0, start, len(k)).copy_(k.detach())
            values.narrow(0, start, len(v)).copy_(v.detach())
        else:
            append_rows(keys, values, k.detach(), v.detach(), batch.slots)
        ledger.add(batch, heads)

    def count(self, batch: RaggedBatch) -> None:
        """Count a step's tokens as appended in all layers: a recorded step writes them, and runs no `append`.

        Call it before the tokens are written.

        Raises:
            ValueError: the batch is older than the last free, truncate, select or move of a request in it; then nothing
                was counted.
        """
        if batch.version != self.version:
            self._check_current(batch)
        for ledger in self._ledgers:
            ledger.add(batch)

    def gather(
        self, layer: int, requests: Sequence[Hashable]
    ) -> tuple[Float[Tensor, "keys g d"], Float[Tensor, "keys g d"]]:
        """Copies of the keys and values that are stored here of some requests, one after another, tokens in order.

        Raises:
            ValueError: a request is not held, or some of its tokens are not there yet.
        """
        self.check_appended(layer, requests)
        rows = self._stored(self.page_size)
        spans: list[Span] = []
        for page, used in (pair for request in requests for pair in self._pages_of(self._get(request))):
            spans.append((page * rows, sum(spans[-1][1:]) if spans else 0, used))
        k, v, *scales = (self._gathered(store[layer], spans) for store in self._stores)
        if scales:
            k, v = (fp8.decode(x.view(FP8), scale, self.dtype) for x, scale in zip((k, v), scales, strict=True))
        return k, v

    def check_appended(self, layer: int, requests: Sequence[Hashable]) -> None:
        """Raise ValueError unless the requests are held and all their tokens are there."""
        ledger = self._ledger(layer)
        for request in requests:
            appended = ledger.appended(request)
            if appended < self.length(request):
                raise ValueError(
                    f"`requests` must be read after their keys are appended (layer {layer}, request {request!r}: "
                    f"{self.length(request)} tokens promised), got {appended} appended"
                )

    def _ledger(self, layer: int) -> Ledger:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"`layer` must be one of {self.num_layers} layers, got {layer}")
        return self._ledgers[layer]

    @staticmethod
    def _flat(store: Tensor, heads: Range | None) -> Tensor:
        """The rows of all pages, of some heads."""
        flat = store.flatten(0, 1)
        return flat if heads is None else flat[:, heads.start : heads.stop]

    @staticmethod
    def _gathered(store: Tensor, spans: Sequence[Span]) -> Tensor:
        """Rows of all pages that lie in spans, one after another."""
        rows = store.flatten(0, 1)
        found = rows.new_empty(sum(spans[-1][1:]) if spans else 0, *rows.shape[1:])
        copy_spans(found, rows, spans)
        return found

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
            self._check_current(batch)

    def _check_current(self, batch: RaggedBatch) -> None:
        """Refuse a batch whose tokens may no longer be written where it says."""
        changed: Hashable = "of this cache"
        version = self.version
        news = [request for request, new in zip(batch.requests, batch.q_lens, strict=False) if new]
        if batch.requests and batch.version < self.version:
            stale = [request for request in news if self._changed(request) > batch.version]
            if not stale:
                return
            changed, version = f"of request {stale[0]!r}", self._changed(stale[0])
        raise ValueError(
            f"`batch` must be made after the last free, truncate or select {changed} (version {version}), "
            f"got {batch.version}; ask for a new `batch`"
        )

    def _changed(self, request: Hashable) -> int:
        """The version in which tokens of a request were last lost or moved; for one not held the newest."""
        held = self._requests.get(request)
        return self.version if held is None else held.version

    def _take_copy(self, held: _Request) -> None:
        """Let a request go on in a page of its own instead of one that others hold too."""
        last, rest = divmod(held.length, self.page_size)
        source, (target,), used = held.pages[last], self._allocator.alloc(1), self._stored(rest)
        for tensor in chain(*self._stores):
            tensor[target, :used] = tensor[source, :used]
        self._allocator.free([source])
        held.pages[last] = target

    def _fork(self, held: _Request) -> _Request:
        """A request that holds the same tokens, in the same pages."""
        pages = held.pages[: self._pages_for(held.length)]
        self._allocator.fork(pages)
        return _Request(self.version, pages, held.length, list(held.keys))

    def _found(self, tokens: Sequence[int], salt: bytes) -> _Request:
        """A request with those of its tokens that are here, at least one being left to compute."""
        pages, keys = array("i"), []
        for key, page in self._here(page_keys(tokens, self.page_size, salt)):
            pages.append(page)
            keys.append(key)
        length = max(0, min(len(pages) * self.page_size, len(tokens) - 1))
        return _Request(self.version, pages[: self._pages_for(length)], length, keys[: length // self.page_size])

    def _here(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
        """The first keys and their pages, up to a key that has none."""
        for key in keys:
            page = self._allocator.find(key)
            if page is None:
                return
            yield key, page

    def _forget_keys(self) -> None:
        """Let no page be found by its tokens any more."""
        self._allocator.forget(self._allocator.remembered)
        for held in self._requests.values():
            held.keys = []

    def _stored(self, tokens: int) -> int:
        """How many of the first tokens of a page, or of a request, are stored here: all of them."""
        return tokens

    def _used(self) -> dict[int, int]:
        """Every page that holds tokens of a request, with the number of those stored here."""
        used: dict[int, int] = {}
        for held in self._requests.values():
            for page, tokens in self._pages_of(held):
                used[page] = max(tokens, used.get(page, 0))
        return used

    def _contents(self) -> dict[int, int]:
        """Every page whose contents must be kept, with the tokens stored here; those that are found by a key, whole."""
        whole = dict.fromkeys(self._allocator.remembered, self._stored(self.page_size))
        return {**self._used(), **whole}

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

    def _room(self, q_lens: Mapping[Hashable, int]) -> _Room:
        """What is to be done before those new tokens can be written.

        Of the requests that go on in one page, the last needs no copy where nobody else is left to hold it.
        """
        room, leaving, size = _Room({}, [], []), Counter[int](), self.page_size
        for request, new in q_lens.items():
            held = self._requests.get(request) or _Request(self.version)
            self._check_length(request, held.length, new)
            short = self._pages_for(held.length + new) - len(held.pages)
            if short > 0 or request not in self._requests:
                room.lacking[request] = max(0, short)
            if new and held.length % size:
                page = held.pages[held.length // size]
                if self._allocator.holders(page) > 1 + leaving[page]:
                    leaving[page] += 1
                    room.copied.append(request)
                else:
                    room.written.append(page)
        return room

    def _check_length(self, request: Hashable, length: int, new: int) -> None:
        """Refuse a request that would be longer than any may be."""
        if new < 0:
            raise ValueError(f"`q_lens` must be at least 0, got {new} for request {request!r}")
        if self.pages_per_request is not None and length + new > self.pages_per_request * self.page_size:
            raise ValueError(
                f"out of pages: a request must fit into {self.pages_per_request} pages of {self.page_size} tokens, "
                f"got {length} + {new} tokens for request {request!r}; grow `page_size`"
            )
