"""A Transformers cache over one `PagedKV` or `StripedKV`: what `generate` asks of a cache, without its tensors.

Transformers caches [B, heads, S, D] per layer, padding included; here the layers append to `PagedKV`, and only tokens
that the attention mask keeps are stored. `CacheStore` knows both views: how many columns of the mask are cached, and
how many tokens of each request that is. The layer objects that Transformers iterates over share one store.

An empty `DynamicCache` is adopted in place rather than replaced, since callers hold on to the object that they passed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from seqpar.hf.attend import Home
from seqpar.hf.padding import Padding
from seqpar.kv import PagedKV, StripedKV
from seqpar.partition import Striping
from seqpar.ragged import RaggedBatch

__all__ = ["CacheSpec", "CacheStore", "ParallelCache", "store_of"]

_ROUND = 64  # tokens; a contiguous cache grows by half its length, rounded up to this


class CacheSpec(NamedTuple):
    """What one rank caches of a model: all tokens of its own heads, or with a striping its tokens of all heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    striping: Striping | None = None
    rank: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes for one token in all layers; of a striping the most that a rank's share comes to, rounded up."""
        whole = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return whole if self.striping is None else -(-whole // self.striping.ranks)

    def make(
        self, num_pages: int, page_size: int, pages_per_request: int | None, *, stored: torch.dtype | None = None
    ) -> PagedKV:
        """An empty cache; `stored` is for whole sequences only."""
        sizes = (self.num_layers, num_pages, page_size, self.num_kv_heads, self.head_dim)
        options: dict[str, Any] = {
            "pages_per_request": pages_per_request,
            "dtype": self.dtype,
            "device": self.device,
        }
        if self.striping is None:
            return PagedKV(*sizes, stored=stored, **options)
        return StripedKV(*sizes, striping=self.striping, rank=self.rank, **options)


Move = Callable[[PagedKV, PagedKV, Sequence[Hashable]], None]
"""Copies requests from one cache to another that lies elsewhere."""


class CacheStore:
    """The tokens that a cache holds, as pages and as columns of an attention mask.

    Args:
        num_pages: pages for all requests; None for a contiguous cache that grows with them.
        page_size: tokens in a page.

    Attributes:
        kv: the pages, from the first step on.
        seen: columns of the attention mask that are cached.
        history: which of them are tokens, [B, seen]; None where all are.
        lengths: tokens of each request.
    """

    def __init__(self, num_pages: int | None = None, page_size: int | None = None) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.kv: PagedKV | None = None
        self.spec: CacheSpec | None = None
        self.seen = 0
        self.history: Bool[Tensor, "b seen"] | None = None
        self.lengths: list[int] = []

    @property
    def home(self) -> Home:
        """Where the cache lies."""
        return "tokens" if self.spec is not None and self.spec.striping is not None else "heads"

    def check_stripes(self, striping: Striping) -> None:
        """Refuse pages that tokens could not be dealt out in, before they have to be.

        Raises:
            ValueError: `page_size` is no whole number of rounds of the striping.
        """
        if self.page_size is not None and self.page_size % striping.period:
            raise ValueError(
                f"`page_size` must be a multiple of the {striping.period} sequence ranks, over which tokens are dealt "
                f"out, got {self.page_size}"
            )

    def begin(self, padding: Padding, positions: Int64[Tensor, " t"], spec: CacheSpec) -> tuple[PagedKV, RaggedBatch]:
        """Find room for a step. It counts only once `commit` is called: a step that failed leaves nothing behind.

        Raises:
            ValueError: another number of requests, another model's cache, or no room; then nothing has changed.
        """
        requests = padding.shape[0]
        if not any(self.lengths) and self.spec not in (None, spec):
            self.kv = self.spec = None  # it is empty, and the next prompt lies elsewhere
        self._check(requests, spec)
        lengths = self.lengths or [0] * requests
        kv = self._with_room([old + new for old, new in zip(lengths, padding.q_lens, strict=True)], spec)
        self._forget(kv, lengths)
        return kv, kv.batch(range(requests), padding.q_lens, positions=positions)

    def move(self, requests: int, here: CacheSpec, there: CacheSpec, move: Move) -> None:
        """Let what is cached lie elsewhere; until it does, both places need memory.

        Raises:
            ValueError: another number of requests, another model's cache, or one that cannot be moved; then it is where
                it was.
        """
        self._check(requests, here)
        source = self.kv
        assert source is not None, "there is something cached"
        self._forget(source, self.lengths)
        self.kv = None
        try:
            move(source, self._with_room(self.lengths, there), range(requests))
        except BaseException:
            self.kv, self.spec = source, here
            raise

    def _check(self, requests: int, spec: CacheSpec) -> None:
        """Refuse another model's cache, and other requests than those that it holds."""
        if self.spec not in (None, spec):
            raise ValueError(f"`past_key_values` must hold this model's cache ({spec}), got {self.spec}")
        if self.lengths and len(self.lengths) != requests:
            raise ValueError(f"`input_ids` must have one row per cached request ({len(self.lengths)}), got {requests}")

    @staticmethod
    def _forget(kv: PagedKV, lengths: Sequence[int]) -> None:
        """Leave nothing of a step that failed, which may have begun with more requests than there are."""
        for request in range(len(kv.ids)):  # ids count from 0
            if request >= len(lengths):
                kv.free(request)
            elif kv.length(request) > lengths[request]:
                kv.truncate(request, lengths[request])

    def commit(self, padding: Padding) -> None:
        """Count the tokens of the step begun last as cached."""
        old, (requests, columns) = self.seen, padding.shape
        if padding.mask is not None or self.history is not None:
            past = torch.ones(requests, old, dtype=torch.bool) if self.history is None else self.history
            new = torch.ones(requests, columns, dtype=torch.bool) if padding.mask is None else padding.mask
            self.history = torch.cat([past, new], 1)
        lengths = self.lengths or [0] * requests
        self.lengths = [length + new for length, new in zip(lengths, padding.q_lens, strict=True)]
        self.seen = old + columns

    def select(self, indices: Sequence[int]) -> None:
        """Let request i hold what request `indices[i]` held."""
        if self.kv is None or not self.lengths or list(indices) == list(range(len(self.lengths))):
            return
        self.kv.select(dict(enumerate(indices)))
        for request in range(len(indices), len(self.lengths)):
            self.kv.free(request)
        self.lengths = [self.lengths[i] for i in indices]
        if self.history is not None:
            self.history = _with_padding(self.history[list(indices)])

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        keep = max(self.seen - columns, 0)
        if keep == 0:
            return self.reset()
        if self.history is not None:
            self.history = self.history[:, :keep]
            self.lengths = self.history.sum(1).tolist()
            self.history = _with_padding(self.history)
        else:
            self.lengths = [keep] * len(self.lengths)
        for request, length in enumerate(self.lengths):
            if self.kv is not None:
                self.kv.truncate(request, length)
        self.seen = keep

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        if self.kv is not None:
            for request in self.kv.ids:
                self.kv.free(request)
        self.seen, self.history, self.lengths = 0, None, []

    def _with_room(self, lengths: list[int], spec: CacheSpec) -> PagedKV:
        """The pages, made or grown so that requests of these lengths fit; pages of a fixed number never grow."""
        longest, unit = max(lengths), lcm(_ROUND, 1 if spec.striping is None else spec.striping.period)
        room = -(-longest * 3 // (2 * unit)) * unit
        if self.kv is None:
            pages, page_size = self.num_pages or len(lengths), self.page_size or room
            self.kv = spec.make(pages, page_size, 1 if self.num_pages is None else None)
            self.spec = spec
        elif self.num_pages is None:
            page_size = max(self.kv.page_size, room if longest > self.kv.page_size else 0)
            if page_size > self.kv.page_size or len(lengths) > self.kv.num_pages:
                self.kv.grow(num_pages=max(len(lengths), self.kv.num_pages), page_size=page_size)
        return self.kv


def _with_padding(history: Bool[Tensor, "b seen"]) -> Bool[Tensor, "b seen"] | None:
    """The history, or None once all of it are tokens: then a step needs no mask."""
    return None if history.all() else history


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer as Transformers' `Cache` sees it; the first acts for all, as they share the store."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: CacheStore, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store, self.index = store, index

    @property
    def batch_size(self) -> int:
        return len(self.store.lengths) or -1

    def get_seq_length(self) -> int:
        return self.store.seen

    def get_max_length(self) -> int:
        store = self.store
        return -1 if store.num_pages is None or store.page_size is None else store.num_pages * store.page_size

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a parallel cache must be filled by parallel layers, got `lazy_initialization`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a parallel cache must be filled by parallel layers, got `update`; was the swap undone?")

    def offload(self) -> None:
        raise TypeError("a parallel cache must stay on its device, got `offload`")

    def reset(self) -> None:
        if self.index == 0:
            self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.index == 0:
            self.store.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.index == 0 and self.store.lengths:
            chosen = torch.arange(len(self.store.lengths))[indices.cpu()]
            self.store.select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0:
            self.store.select([request for request in range(len(self.store.lengths)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 counts rejected candidates in a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be negative or 0 (how many to remove), got {tokens_to_remove}")
        if self.index == 0:
            self.store.crop(-tokens_to_remove)


class ParallelCache(Cache):
    """A cache of the KV heads that this rank owns, for a parallelized model.

    A model makes one by itself where it is given none. Build one to keep a conversation between calls of `generate`,
    or, with both arguments, to bound its memory: steps that do not fit are then refused before anything is computed.

    Args:
        num_pages: pages for all requests; without it the cache is contiguous and grows.
        page_size: tokens in a page.

    Raises:
        ValueError: one of `num_pages` and `page_size` is given alone.
    """

    def __init__(self, *, num_pages: int | None = None, page_size: int | None = None) -> None:
        if (num_pages is None) != (page_size is None):
            raise ValueError(
                f"`num_pages` and `page_size` must be given together, got {num_pages} and {page_size}; "
                "leave both out for a cache that grows"
            )
        super().__init__(layers=[])
        self.store = CacheStore(num_pages, page_size)


def store_of(cache: Any, num_layers: int) -> CacheStore:
    """The store behind a cache, after adopting one that is empty.

    Raises:
        TypeError: it is no cache that can be adopted.
        ValueError: it holds tensors of Transformers' own, or another number of layers.
    """
    layers = getattr(cache, "layers", None)
    if isinstance(cache, Cache) and layers and isinstance(layers[0], _Layer):
        if len(layers) != num_layers:
            raise ValueError(f"`past_key_values` must have the model's {num_layers} layers, got {len(layers)}")
        return layers[0].store
    if isinstance(cache, ParallelCache):
        store = cache.store
    elif type(cache) is not DynamicCache or cache.offloading:
        raise TypeError(
            f"`past_key_values` must be a ParallelCache or an empty DynamicCache, got {type(cache).__name__}"
            + (" with offloading" if getattr(cache, "offloading", False) else "")
        )
    elif cache.get_seq_length():
        raise ValueError(
            f"`past_key_values` must be filled by this model, got a DynamicCache of {cache.get_seq_length()} tokens"
        )
    else:
        store = CacheStore()
    cache.layers, cache.layer_class_to_replicate = [_Layer(store, index) for index in range(num_layers)], None
    return store
