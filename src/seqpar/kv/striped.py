"""A paged cache whose tokens are dealt out over ranks: every rank has the same pages, and its own tokens of each.

Requests, pages, lengths and versions are those of `PagedKV`, in tokens of all ranks; they are the same host integers on
every rank, so that the ranks agree without talking. Only what lies in a page differs. A page of `page_size` tokens is
a whole number of rounds of the striping, so a rank's tokens of it are the first ones of a page of `page_size / ranks`
rows, and its share of a request reads as that of an ordinary paged request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.kernels.rows import append_rows
from seqpar.kv.paged import PagedKV
from seqpar.partition import Range, Striping
from seqpar.ragged import RaggedBatch

__all__ = ["StripedKV"]


class _Own(NamedTuple):
    """The rows of a batch whose tokens a rank holds, and where it puts them."""

    rows: Int64[Tensor, " own"]
    slots: Int64[Tensor, " own"]


class StripedKV(PagedKV):
    """Keys and values of many requests of which this rank holds some tokens, for all KV heads of its `tp` shard.

    It is used as a `PagedKV` is: `batch`, then in every layer `append` with the keys of all new tokens, of which those
    of this rank are written, and `read`, which gives this rank's share. Whatever changes who holds what (`free`,
    `truncate`, `select`, `share`, `reuse`, `compact`, `grow`) is to be called alike on all ranks.

    Args:
        num_layers: Layers that append.
        num_pages: Pages, shared by all requests.
        page_size: Tokens in a page, over all ranks; a multiple of `striping.period`.
        num_kv_heads: KV heads that the sequence group holds between it, `HeadMap.kv_shard`.
        head_dim: Dims of a head.
        striping: Who holds which tokens.
        rank: Of them, this one.
        pages_per_request: The most pages that one request may hold; None for no limit.
        dtype: Of keys and values.
        device: Of keys and values.

    Raises:
        ValueError: a page is no whole number of rounds, the rank is none of the striping's, or what `PagedKV` refuses.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        striping: Striping,
        rank: int,
        pages_per_request: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < striping.ranks:
            raise ValueError(f"`rank` must be one of the striping's {striping.ranks}, got {rank}")
        self.striping, self.rank = striping, rank
        self._check_page_size(page_size)
        super().__init__(
            num_layers,
            num_pages,
            page_size,
            num_kv_heads,
            head_dim,
            pages_per_request=pages_per_request,
            dtype=dtype,
            device=device,
        )

    @classmethod
    def contiguous(
        cls,
        num_layers: int,
        num_requests: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        striping: Striping = Striping(1),  # noqa: B008 (frozen)
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StripedKV:
        """One page of at least `max_len` tokens for each request."""
        page_size = -(-max_len // striping.period) * striping.period
        sizes = (num_layers, num_requests, page_size, num_kv_heads, head_dim)
        return cls(*sizes, striping=striping, rank=rank, pages_per_request=1, dtype=dtype, device=device)

    def grow(self, *, num_pages: int | None = None, page_size: int | None = None) -> None:
        """See `PagedKV.grow`.

        Raises:
            ValueError: as there, or a page that is no whole number of rounds.
        """
        self._check_page_size(page_size or self.page_size)
        super().grow(num_pages=num_pages, page_size=page_size)

    @property
    def local_page_size(self) -> int:
        """Tokens of a page that a rank stores."""
        return self._stored(self.page_size)

    def own(self, batch: RaggedBatch, rank: int | None = None) -> tuple[int, ...]:
        """The rows of a step, over all its requests, whose tokens a rank (by default this one) holds."""
        rank = self.rank if rank is None else rank
        steps = zip(batch.q_starts, batch.q_lens, batch.kv_lens, strict=False)
        return tuple(
            row + token - (keys - new)
            for row, new, keys in steps
            for token in self.striping.tokens(keys - new, keys, rank)
        )

    def context(self, batch: RaggedBatch) -> tuple[int, ...]:
        """How many tokens of each request from before a step this rank holds: the first ones of its share."""
        lengths = zip(batch.q_lens, batch.kv_lens, strict=True)
        return tuple(self._stored(keys - new) for new, keys in lengths)

    def slots(self, pages: Sequence[int], tokens: Range) -> Int64[Tensor, " own"]:
        """Where this rank's own tokens of a request lie that has these pages: rows of all pages, on the host."""
        index = torch.arange(*tokens)
        size = self.local_page_size
        return torch.tensor(pages, dtype=torch.int64)[index // size] * size + index % size

    def append(
        self,
        layer: int,
        k: Float[Tensor, "t g_new d"],
        v: Float[Tensor, "t g_new d"],
        batch: RaggedBatch,
        *,
        heads: Range | None = None,
    ) -> None:
        """Write those of a step's keys and values that this rank holds; arguments as `PagedKV.append` takes them."""
        self._check_append(k, v, batch, heads, batch.num_tokens)
        rows = self._own(batch).rows
        self._write(layer, k[rows], v[rows], batch, heads)

    def append_own(
        self, layer: int, k: Float[Tensor, "own g d"], v: Float[Tensor, "own g d"], batch: RaggedBatch
    ) -> None:
        """Write a step of which only this rank's tokens are given, the rows `own(batch)`.

        Raises:
            ValueError: as `append`, with the shape of those rows.
        """
        self._check_append(k, v, batch, None, len(self._own(batch).rows))
        self._write(layer, k, v, batch, None)

    def _write(self, layer: int, k: Tensor, v: Tensor, batch: RaggedBatch, heads: Range | None) -> None:
        ledger, slots = self._ledger(layer), self._own(batch).slots
        keys, values = (self._flat(store[layer], heads) for store in (self._k, self._v))
        append_rows(keys, values, k.detach(), v.detach(), slots)
        ledger.add(batch, heads)

    def _own(self, batch: RaggedBatch) -> _Own:
        """The own rows of a batch and their slots; worked out once for all layers."""
        key = ("kv.striped", self.striping, self.rank)
        own: _Own | None = batch.plans.get(key)
        if own is None:
            if not batch.has_cache:
                raise ValueError("`batch` must be one of this cache, got one without a cache; ask `batch`")
            with torch.inference_mode(False):
                rows = torch.tensor(self.own(batch), dtype=torch.int64, device=batch.device)
                page, token = batch.slots[rows] // batch.page_size, batch.slots[rows] % batch.page_size
                run, offset = token // self.striping.period, token % self.striping.interleave
                slots = page * self._stored(batch.page_size) + run * self.striping.interleave + offset
                own = batch.plans[key] = _Own(rows, slots)
        return own

    def _stored(self, tokens: int) -> int:
        return self.striping.local_len(tokens, self.rank)

    def _check_page_size(self, page_size: int) -> None:
        if page_size < 1 or page_size % self.striping.period:
            raise ValueError(
                f"`page_size` must be a multiple of ranks x interleave ({self.striping.ranks} x "
                f"{self.striping.interleave}), got {page_size}; a page holds as many tokens on every rank"
            )
