"""One step's tokens: the requests lie flat, one after another, with one frozen description of who they are.

A prompt chunk, a decode, a mixture of both and a pipeline micro-batch are the same thing, and a batch without a cache
(training, a whole prompt at once) is one whose keys are given rather than paged. Lengths are host integers, so that
planning never waits for a device; what a device needs is kept beside them as tensors. Those are never inference
tensors: a batch that first serves an evaluation may serve a training step, whose graph keeps them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from operator import le
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

__all__ = ["PageCSR", "RaggedBatch", "Tail"]


class PageCSR(NamedTuple):
    """Page tables without their fill, as FlashInfer takes them; a request of n pages has (n - 1) * size + last keys.

    Attributes:
        indptr: first page of each request, and the number of pages.
        indices: pages of all requests, one after another.
        last_page_len: keys in each request's last page; the page size for a request without keys.
    """

    indptr: Int32[Tensor, " starts"]
    indices: Int32[Tensor, " used"]
    last_page_len: Int32[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """The frozen description of one step's tokens.

    Causality goes by index: new token `i` of request `r` sees that request's keys `0 .. kv_lens[r] - q_lens[r] + i`.
    `positions` serve rotary embeddings alone, so padded prompts may number their tokens as they like.

    Attributes:
        q_lens: New tokens of each request; a request may have none.
        kv_lens: Keys of each request once the new tokens are appended.
        positions: Rotary position of each new token.
        slots: Flat cache address, `page * page_size + offset`, of each new token; empty without a cache.
        page_table: Pages of each request in order, rows filled up with zeros; no columns without a cache.
        page_size: Tokens in a page, 0 without a cache.
        version: Of the cache when it gave the pages; once they may hold another request, it refuses the batch.
        requests: What the cache knows the requests as; nothing without a cache.
        exact: Whether `kv_lens` are the lengths. If not they are bounds, and the lengths are on the device alone; see
            `decodes`.
        plans: What users of this batch have worked out from it once and need again in every layer.

    Raises:
        ValueError: lengths, positions, slots and pages do not describe one batch.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    positions: Int64[Tensor, " t"]
    slots: Int64[Tensor, " s"]
    page_table: Int32[Tensor, "n pages"]
    page_size: int = 0
    version: int = 0
    requests: tuple[Hashable, ...] = ()
    exact: bool = True
    plans: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_lengths(self.q_lens, self.kv_lens)
        tokens, requests = self.num_tokens, self.num_requests
        if self.positions.shape != (tokens,):
            raise ValueError(
                f"`positions` must have one entry per new token ({tokens}), got {list(self.positions.shape)}"
            )
        if self.slots.shape != (tokens if self.page_size else 0,):
            raise ValueError(
                f"`slots` must have one entry per new token ({tokens}), none without a cache, "
                f"got {list(self.slots.shape)} with page_size={self.page_size}"
            )
        if self.page_table.dim() != 2 or len(self.page_table) != requests:
            raise ValueError(
                f"`page_table` must have one row per request ({requests}), got {list(self.page_table.shape)}"
            )
        if self.requests and len(self.requests) != requests:
            raise ValueError(f"`requests` must name every request ({requests}) or none, got {len(self.requests)}")
        room = self.page_table.shape[1] * self.page_size
        if self.has_cache and room < max(self.kv_lens, default=0):
            raise ValueError(
                f"`page_table` must hold the longest request ({max(self.kv_lens)} tokens), "
                f"got {self.page_table.shape[1]} pages of {self.page_size}"
            )

    @classmethod
    def prefill(cls, q_lens: Sequence[int], device: torch.device | str = "cpu") -> RaggedBatch:
        """Whole sequences without a cache: the keys are the tokens themselves, positions count from 0."""
        return cls.build(q_lens, q_lens, device=device)

    @classmethod
    @torch.inference_mode(False)
    def build(
        cls,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        pages: Sequence[Sequence[int]] | None = None,
        page_size: int = 0,
        *,
        positions: Int64[Tensor, " t"] | None = None,
        device: torch.device | str = "cpu",
        version: int = 0,
        requests: Sequence[Hashable] = (),
    ) -> RaggedBatch:
        """Compute positions and slots from lengths and pages.

        Args:
            q_lens: New tokens of each request.
            kv_lens: Keys of each request, its new tokens included.
            pages: Pages of each request in order, or None for a batch without a cache.
            page_size: Tokens in a page.
            positions: Rotary positions of the new tokens; by default each token's index in its request.
            device: Where the tensors are to lie.
            version: Of the cache when it gave the pages.
            requests: What the cache knows the requests as.

        Raises:
            ValueError: lengths are negative, keys are fewer than new tokens, or pages do not hold the keys.
        """
        q_lens, kv_lens = tuple(q_lens), tuple(kv_lens)
        _check_lengths(q_lens, kv_lens)
        table = _page_table(kv_lens, pages, page_size)
        request, index = _tokens(q_lens, kv_lens)
        slots = index[:0]
        if page_size:
            page = index // page_size
            slots = table[request, page].long().sub_(page).mul_(page_size).add_(index)
        where = index if positions is None else positions.clone() if positions.is_inference() else positions
        tensors = where.to(device), slots.to(device), table.to(device)
        batch = cls(q_lens, kv_lens, *tensors, page_size, version, tuple(requests))
        return batch._with_host_table(table)

    @classmethod
    @torch.inference_mode(False)
    def decodes(
        cls,
        kv_lens: Int32[Tensor, " n"],
        positions: Int64[Tensor, " n"],
        slots: Int64[Tensor, " n"],
        page_table: Int32[Tensor, "n pages"],
        page_size: int,
        *,
        version: int = 0,
    ) -> RaggedBatch:
        """A token of each request, whose lengths are the device's to know: a step that can be recorded and replayed.

        Its tensors are those that are given. For the host `kv_lens` are what the tables have room for, so that a plan
        made of them holds whatever the lengths are; `write_lengths` is to follow each change of them. Kernels that read
        lengths and tables on the device take such a batch, and `pages` are not to be had.

        Args:
            kv_lens: Keys of each request once its token is appended.
            positions: Rotary positions.
            slots: Where the tokens are appended.
            page_table: Pages of each request.
            page_size: Tokens in a page.
            version: Of the cache.

        Raises:
            ValueError: tensors that are not of one batch.
        """
        n, room = len(kv_lens), page_table.shape[1] * page_size
        batch = cls((1,) * n, (room,) * n, positions, slots, page_table, page_size, version, exact=False)
        batch.__dict__["cu_kv"] = torch.zeros(n + 1, dtype=torch.int32, device=kv_lens.device)
        batch.write_lengths(kv_lens)
        return batch

    def write_lengths(self, kv_lens: Int32[Tensor, " n"]) -> None:
        """Let the requests of a batch that `decodes` has made have so many keys.

        Raises:
            ValueError: another batch, whose lengths are as it was built, or not a length for each request.
        """
        if self.exact or kv_lens.shape != (self.num_requests,):
            raise ValueError(
                f"`kv_lens` must be of the {self.num_requests} requests of a batch that `decodes` made, got "
                f"{list(kv_lens.shape)} for {'another' if self.exact else 'it'}"
            )
        self.cu_kv[1:].copy_(kv_lens.cumsum(0))

    def _with_host_table(self, table: Int32[Tensor, "n pages"] | None) -> RaggedBatch:
        """This batch, whose `pages` need not ask the device where its table is known."""
        if table is not None:
            self.__dict__["_host_table"] = table
        return self

    @cached_property
    def _host_table(self) -> Int32[Tensor, "n pages"]:
        return self.page_table.cpu()

    def split(self, cuts: Sequence[int]) -> tuple[RaggedBatch, ...]:
        """The batch as consecutive chunks, cut before the tokens `cuts`, also inside a request.

        A chunk sees the keys of the chunks before it in the cache, so they must be appended first; requests that lie
        wholly after a chunk are part of it with no new tokens and no keys of this step.

        Raises:
            ValueError: cuts that are not in order or not within the batch, or a batch without a cache.
        """
        bounds = self._bounds(cuts)
        if cuts and not self.has_cache:
            raise ValueError("`cuts` must be empty for a batch without a cache, whose chunks could not see each other")
        return tuple(self._chunk(start, stop) for start, stop in pairwise(bounds))

    def split_keys(self, cuts: Sequence[int]) -> tuple[tuple[RaggedBatch, slice], ...]:
        """A batch without a cache as consecutive chunks, each with the keys that it may see, out of the flat ones.

        Those are consecutive: from the first key of the chunk's first request on. A chunk consists of the requests
        from its first token's to its last token's.

        Raises:
            ValueError: cuts that are not in order or not within the batch, or a batch with a cache.
        """
        if self.has_cache:
            raise ValueError("`split_keys` must be of a batch whose keys are given, got one with a cache; use `split`")
        bounds = self._bounds(cuts)
        return tuple(self._chunk_keys(start, stop) for start, stop in pairwise(bounds))

    def _bounds(self, cuts: Sequence[int]) -> list[int]:
        bounds = [0, *cuts, self.num_tokens]
        if any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"`cuts` must be in order and lie in [0, {self.num_tokens}], got {list(cuts)}")
        return bounds

    def _chunk_keys(self, start: int, stop: int) -> tuple[RaggedBatch, slice]:
        """The tokens [start, stop) with their requests alone, and where their keys lie."""
        chunk = self._chunk(start, stop)
        those = slice(0, 0)
        if start < stop:
            those = slice(bisect_right(self.q_starts, start) - 1, bisect_left(self.q_starts, stop))
        kv_lens, first = chunk.kv_lens[those], self.kv_starts[those.start]
        alone = replace(
            chunk,
            q_lens=chunk.q_lens[those],
            kv_lens=kv_lens,
            page_table=chunk.page_table[those],
            requests=chunk.requests[those],
        )
        return alone, slice(first, first + sum(kv_lens))

    def _chunk(self, start: int, stop: int) -> RaggedBatch:
        """The tokens [start, stop) and the keys that they may see."""
        ends = [min(max(stop, first), last) for first, last in pairwise(self.q_starts)]
        begins = [min(max(start, first), last) for first, last in pairwise(self.q_starts)]
        later = [last - end for end, last in zip(ends, self.q_starts[1:], strict=True)]
        chunk = replace(
            self,
            q_lens=tuple(end - begin for begin, end in zip(begins, ends, strict=True)),
            kv_lens=tuple(keys - rest for keys, rest in zip(self.kv_lens, later, strict=True)),
            positions=self.positions[start:stop],
            slots=self.slots[start:stop],
        )
        return chunk._with_host_table(self.__dict__.get("_host_table"))

    def tail(self, rows: Iterable[int]) -> Tail:
        """The tokens `rows` and all that follow them in their requests: what a last layer need compute.

        Raises:
            ValueError: rows that the batch does not have.
        """
        first = list(self.q_starts[1:])
        for row in rows:
            if not 0 <= row < self.num_tokens:
                raise ValueError(f"`rows` must lie in [0, {self.num_tokens}), got {row}")
            request = bisect_right(self.q_starts, row) - 1
            first[request] = min(first[request], row)
        wanted = tuple(row for a, b in zip(first, self.q_starts[1:], strict=True) for row in range(a, b))
        lengths = tuple(b - a for a, b in zip(first, self.q_starts[1:], strict=True))
        return Tail(wanted, lengths, self)

    @torch.inference_mode(False)
    def pad_to(self, size: int | Sequence[int], *, page: int | None = None) -> RaggedBatch:
        """Fill the batch up with requests of one token each: to a multiple, or to the first size that holds it.

        They come last and their rows mean nothing. All write to, and read, the first slot of a page that is kept for
        them: reserve it under some name.

        Args:
            size: what the number of tokens is to be a multiple of; or the sizes, increasing.
            page: the page; None without a cache.

        Raises:
            ValueError: a size below 1, or none that holds the batch; a page without a cache, or none with one.
        """
        if (page is None) == self.has_cache or (page or 0) < 0:
            raise ValueError(f"`page` must be one of the cache's, and None without a cache, got {page}")
        new = _padded(self.num_tokens, size) - self.num_tokens
        if not new:
            return self
        slots = self.slots.new_full((new if self.has_cache else 0,), (page or 0) * self.page_size)
        width = max(self.page_table.shape[1], int(self.has_cache))
        table = torch.zeros(self.num_requests + new, width, dtype=torch.int32)
        table[: self.num_requests, : self.page_table.shape[1]] = self._host_table
        table[self.num_requests :] = page or 0
        names = tuple(("padding", number) for number in range(new)) if self.requests else ()
        padded = replace(
            self,
            q_lens=self.q_lens + (1,) * new,
            kv_lens=self.kv_lens + (1,) * new,
            positions=torch.cat([self.positions, self.positions.new_zeros(new)]),
            slots=torch.cat([self.slots, slots]),
            page_table=table.to(self.device),
            requests=self.requests + names,
        )
        return padded._with_host_table(table)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> RaggedBatch:
        """The same batch with its tensors on `device`; from the host they travel as one."""
        device = torch.device(device)
        if device == self.device:
            return self
        if self.device.type != "cpu":
            moved = {name: getattr(self, name).to(device) for name in ("positions", "slots", "page_table")}
            return replace(self, **moved)._with_host_table(self._host_table)
        packed = self._pack()
        if device.type == "cuda":
            packed = packed.pin_memory()
        return self._unpack(packed.to(device, non_blocking=True))

    def _packs(self) -> tuple[Tensor, ...]:
        return self.positions, self.slots, self.page_table, self.cu_q, self.cu_kv, self.last_idx

    def _pack(self) -> Tensor:
        """Everything that a device needs, in one tensor, of int32 where that is wide enough."""
        packed = torch.cat([tensor.flatten().long() for tensor in self._packs()])
        return packed.int() if int(packed.abs().max()) < 1 << 31 else packed

    def _unpack(self, packed: Tensor) -> RaggedBatch:
        """This batch with its tensors out of one that `_pack` gave."""
        wanted = self._packs()
        parts = [
            part.view(tensor.shape).to(tensor.dtype)
            for part, tensor in zip(packed.split([tensor.numel() for tensor in wanted]), wanted, strict=True)
        ]
        batch = replace(self, positions=parts[0], slots=parts[1], page_table=parts[2])
        batch.__dict__.update(zip(("cu_q", "cu_kv", "last_idx"), parts[3:], strict=True))
        return batch._with_host_table(self._host_table)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def num_requests(self) -> int:
        return len(self.q_lens)

    @property
    def has_cache(self) -> bool:
        """Whether keys are addressed by pages; otherwise they are given, request after request."""
        return self.page_size > 0

    @cached_property
    def q_starts(self) -> tuple[int, ...]:
        """First row of each request, and the number of rows."""
        return (0, *accumulate(self.q_lens))

    @cached_property
    def kv_starts(self) -> tuple[int, ...]:
        """First key of each request when keys lie flat, and their number."""
        return (0, *accumulate(self.kv_lens))

    @cached_property
    @torch.inference_mode(False)
    def cu_q(self) -> Int32[Tensor, " starts"]:
        """`q_starts` on the device."""
        return torch.tensor(self.q_starts, dtype=torch.int32, device=self.device)

    @cached_property
    @torch.inference_mode(False)
    def cu_kv(self) -> Int32[Tensor, " starts"]:
        """`kv_starts` on the device."""
        assert self.exact, "`decodes` gave them, and parts of such a batch have none"
        return torch.tensor(self.kv_starts, dtype=torch.int32, device=self.device)

    @cached_property
    @torch.inference_mode(False)
    def last_idx(self) -> Int64[Tensor, " n"]:
        """Row of each request's last new token; -1, which no gather accepts, for a request without new tokens."""
        rows = [stop - 1 if length else -1 for length, stop in zip(self.q_lens, self.q_starts[1:], strict=True)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    @cached_property
    def n_decode(self) -> int:
        """Leading requests that have exactly one new token."""
        return sum(1 for _ in takewhile(lambda length: length == 1, self.q_lens))

    @cached_property
    def pages(self) -> tuple[tuple[int, ...], ...]:
        """The pages that hold each request's keys, as host integers; waits for the device when it is not the host."""
        if not self.exact:
            raise ValueError("`pages` must be asked of a batch whose lengths the host knows, got one that is recorded")
        used = [-(-length // self.page_size) if self.page_size else 0 for length in self.kv_lens]
        return tuple([tuple(row[:n]) for row, n in zip(self._host_table.tolist(), used, strict=True)])

    @cached_property
    @torch.inference_mode(False)
    def csr(self) -> PageCSR:
        """The page tables as compressed rows; `page_table` with `kv_lens` is the other form."""
        sizes = [len(part) for part in self.host_csr]
        return PageCSR(*torch.cat(self.host_csr).to(self.device).split(sizes))

    @cached_property
    @torch.inference_mode(False)
    def host_csr(self) -> PageCSR:
        """`csr` on the host."""
        starts = [0, *accumulate(map(len, self.pages))]
        filled = [len(row) * self.page_size - keys for row, keys in zip(self.pages, self.kv_lens, strict=True)]
        flat = [page for row in self.pages for page in row]
        return PageCSR(*map(_host_ints, (starts, flat, [self.page_size - empty for empty in filled])))

    @cached_property
    def slot_runs(self) -> tuple[tuple[int, int, int], ...]:
        """(row, slot, count) of the longest runs of rows whose slots are consecutive; waits as `pages` does."""
        slots = self.slots.tolist()
        cuts = [row for row in range(1, len(slots)) if slots[row] != slots[row - 1] + 1]
        bounds = [0, *cuts, len(slots)] if slots else []
        return tuple((a, slots[a], b - a) for a, b in pairwise(bounds))

    @cached_property
    def without_cache(self) -> RaggedBatch:
        """The same new tokens as a batch of their own, whose keys are given rather than paged.

        Raises:
            ValueError: a request has keys in the cache that the new tokens would no longer see.
        """
        if self.kv_lens != self.q_lens:
            raise ValueError(
                f"`kv_lens` must equal `q_lens` ({self.q_lens}) to leave the cache out, got {self.kv_lens}"
            )
        if not self.has_cache:
            return self
        return replace(self, slots=self.slots[:0], page_table=self.page_table[:, :0], page_size=0)


@dataclass(frozen=True, eq=False)
class Tail:
    """The last tokens of each request of a batch, such as those whose logits are asked for.

    The last layer of a model need not compute more of them than keys and values; the rows of a tail are the queries.
    They are the last of their requests, so that a plain batch over the same keys describes them.

    Attributes:
        rows: Of the whole batch, in order.
        q_lens: How many each request has; some or all may have none.
        whole: The batch.
    """

    rows: tuple[int, ...]
    q_lens: tuple[int, ...]
    whole: RaggedBatch

    @cached_property
    def batch(self) -> RaggedBatch:
        """The rows as a batch of their own, whose requests have all keys of the whole batch's."""
        whole = self.whole
        slots = self.take(whole.slots) if whole.has_cache else whole.slots
        chosen = replace(whole, q_lens=self.q_lens, positions=self.take(whole.positions), slots=slots)
        return chosen._with_host_table(whole.__dict__.get("_host_table"))

    @cached_property
    def without_cache(self) -> RaggedBatch:
        """The same queries, over keys that are given rather than paged; see `RaggedBatch.without_cache`."""
        return replace(self, whole=self.whole.without_cache).batch

    def within(self, start: int, stop: int) -> tuple[int, ...]:
        """The rows in [start, stop)."""
        return self.rows[bisect_left(self.rows, start) : bisect_left(self.rows, stop)]

    def take(self, x: Tensor, start: int = 0) -> Tensor:
        """The rows that `x` holds, whose first row is the whole batch's `start`; a view where they are consecutive."""
        rows = self.within(start, start + len(x))
        if not rows or rows[-1] - rows[0] == len(rows) - 1:
            first = rows[0] - start if rows else 0
            return x[first : first + len(rows)]
        return x[torch.tensor(rows, device=x.device) - start]


def _check_lengths(q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> None:
    if len(q_lens) != len(kv_lens):
        raise ValueError(f"`kv_lens` must have one entry per request ({len(q_lens)}), got {len(kv_lens)}")
    if all(map(le, q_lens, kv_lens)) and min(q_lens, default=0) >= 0:
        return
    for request, (new, keys) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if new < 0 or keys < new:
            raise ValueError(
                f"`kv_lens` must be at least `q_lens`, and `q_lens` at least 0, got {keys} keys "
                f"and {new} new tokens for request {request}; keys include the new tokens"
            )


def _padded(tokens: int, size: int | Sequence[int]) -> int:
    """The number of tokens that a batch is filled up to."""
    if isinstance(size, int):
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}")
        return -(-tokens // size) * size
    if not size or size[0] < 1 or list(size) != sorted(set(size)):
        raise ValueError(f"`size` must be at least 1 and increasing, got {list(size)}")
    if size[-1] < tokens:
        raise ValueError(f"`size` must have one that holds the batch ({tokens} tokens), got {list(size)}")
    return size[bisect_left(size, tokens)]


def _host_ints(values: Sequence[int], code: Literal["i", "q"] = "i") -> Shaped[Tensor, " n"]:
    """A host tensor of int32 or int64, without what `torch.tensor` takes to look at every number."""
    dtype = {"i": torch.int32, "q": torch.int64}[code]
    return torch.frombuffer(array(code, values), dtype=dtype) if values else torch.zeros(0, dtype=dtype)


def _tokens(q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
    """Each new token's request, and its index in it."""
    keys = _host_ints(kv_lens, "q")
    if q_lens.count(1) == len(q_lens):  # decodes
        return torch.arange(len(q_lens)), keys - 1
    counts, rows = _host_ints(q_lens, "q"), sum(q_lens)
    request = torch.repeat_interleave(counts, output_size=rows)
    return request, torch.arange(rows) + (keys - counts.cumsum(0))[request]


def _page_table(
    kv_lens: tuple[int, ...], pages: Sequence[Sequence[int]] | None, page_size: int
) -> Int32[Tensor, "n pages"]:
    if page_size < 0 or (page_size == 0) != (pages is None):
        raise ValueError(
            f"`page_size` must be at least 1 with `pages` and 0 without, got {page_size} "
            f"with{'out' if pages is None else ''} pages"
        )
    if pages is None:
        return torch.zeros(len(kv_lens), 0, dtype=torch.int32)
    if len(pages) != len(kv_lens):
        raise ValueError(f"`pages` must have one entry per request ({len(kv_lens)}), got {len(pages)}")
    counts = list(map(len, pages))
    if not all(map(le, kv_lens, [count * page_size for count in counts])):
        request = next(i for i, keys in enumerate(kv_lens) if counts[i] * page_size < keys)
        raise ValueError(
            f"`pages` must hold each request's keys ({kv_lens[request]} for request {request}), "
            f"got {counts[request]} pages of {page_size}"
        )
    width = max(counts, default=0)
    if not width:
        return torch.zeros(len(pages), 0, dtype=torch.int32)
    row_bytes = width * array("i").itemsize
    rows = [(row if isinstance(row, array) else array("i", row)).tobytes().ljust(row_bytes, b"\0") for row in pages]
    return torch.frombuffer(bytearray().join(rows), dtype=torch.int32).view(len(pages), width)
