"""`ParallelCache` against lists of tokens, driven through the methods that Transformers calls."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from seqpar.hf.cache import CacheSpec, CacheStore, ParallelCache, store_of
from seqpar.hf.padding import Padding
from seqpar.kv import PagedKV, StripedKV
from seqpar.partition import Striping

SPEC = CacheSpec(2, 1, 1, torch.float32, torch.device("cpu"))
Rows = list[list[int | None]]  # a token, or None where there was padding


def append(cache: Any, rows: Rows, new: Rows) -> Rows:
    """A forward of `new` over the cache: plan, append to every layer, commit."""
    store = store_of(cache, SPEC.num_layers)
    mask = torch.tensor([[token is not None for token in [*old, *row]] for old, row in zip(rows, new, strict=True)])
    padding = Padding.plan((len(new), len(new[0])), mask.long(), store.seen, store.history)
    tokens = torch.tensor([float(token) for row in new for token in row if token is not None])
    kv, batch = store.begin(padding, torch.arange(len(tokens)), SPEC)
    for layer in range(SPEC.num_layers):
        kv.append(layer, (tokens + layer).view(-1, 1, 1), (-tokens - layer).view(-1, 1, 1), batch)
    store.commit(padding)
    return [[*old, *row] for old, row in zip(rows, new, strict=True)]


def check(cache: Any, rows: Rows) -> None:
    """Every layer holds exactly the tokens of every row."""
    store = store_of(cache, SPEC.num_layers)
    if not rows[0]:  # everything was cropped: a cache like a new one
        assert (store.seen, store.lengths, store.history) == (0, [], None)
        return
    assert store.history is None or not store.history.all()
    assert cache.get_seq_length() == len(rows[0]) and len(cache) == SPEC.num_layers
    assert cache.get_mask_sizes(3, 0) == (len(rows[0]) + 3, 0) and not cache.is_compileable and cache.is_croppable
    assert store.kv is not None
    store.kv.integrity()
    for layer in range(SPEC.num_layers):
        k, v = store.kv.layer(layer)
        for request, row in enumerate(rows):
            tokens = [float(token) for token in row if token is not None]
            assert store.kv.length(request) == len(tokens)
            pages = k[list(store.kv.pages(request))].reshape(-1)[: len(tokens)]
            assert pages.tolist() == [token + layer for token in tokens]
            assert v[list(store.kv.pages(request))].reshape(-1)[: len(tokens)].tolist() == [-t - layer for t in tokens]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), paged=st.booleans())
def test_any_sequence_of_operations(data: st.DataObject, paged: bool) -> None:
    cache = ParallelCache(num_pages=400, page_size=3) if paged else ParallelCache()
    counter, rows = 0, [[] for _ in range(data.draw(st.integers(1, 3)))]
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["append", "append", "grow", "reorder", "crop", "repeat", "select", "copy"]))
        if what in ("append", "grow") or not rows[0]:
            length = 70 if what == "grow" else data.draw(st.integers(1, 4))
            kept = data.draw(
                st.lists(
                    st.lists(st.booleans(), min_size=length, max_size=length), min_size=len(rows), max_size=len(rows)
                )
            )
            kept[0][-1] = True
            new: Rows = [[(counter := counter + 1) if keep else None for keep in row] for row in kept]
            rows = append(cache, rows, new)
        elif what == "reorder":
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=len(rows), max_size=len(rows)))
            cache.reorder_cache(torch.tensor(order))
            rows = [list(rows[i]) for i in order]
        elif what == "crop":
            count = data.draw(st.integers(0, len(rows[0])))
            cache.crop(-count)
            rows = [row[: len(row) - count] for row in rows]
        elif what == "repeat" and len(rows) < 6:
            cache.batch_repeat_interleave(2)
            rows = [list(row) for row in rows for _ in range(2)]
        elif what == "select":
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
            cache.batch_select_indices(torch.tensor(chosen))
            rows = [list(rows[i]) for i in chosen]
        elif what == "copy":
            before, cache = cache, copy.deepcopy(cache)
            before.reset()
        check(cache, rows)
    cache.reset()
    assert cache.get_seq_length() == 0
    check(cache, append(cache, [[], []], [[1, 2], [None, 3]]))


def test_an_empty_dynamic_cache_is_adopted_in_place() -> None:
    cache = DynamicCache()
    rows = append(cache, [[], []], [[1, None], [2, 3]])
    check(cache, rows)
    assert store_of(cache, 2) is store_of(cache, 2)
    cache.reorder_cache(torch.tensor([1, 1]))
    check(cache, [rows[1], rows[1]])


def test_a_step_that_was_not_committed_is_forgotten() -> None:
    store = CacheStore()
    for shape in ((3, 5), (2, 4)):
        store.begin(Padding.plan(shape, None, 0, None), torch.zeros(shape[0] * shape[1], dtype=torch.long), SPEC)
    cache = ParallelCache()
    rows = append(cache, [[], []], [[1, 2], [3, 4]])
    kept = store_of(cache, 2)
    kept.begin(Padding.plan((2, 3), None, 2, None), torch.zeros(6, dtype=torch.long), SPEC)
    check(cache, append(cache, rows, [[5], [6]]))


def test_a_cache_that_moves_forgets_a_step_that_failed_and_stays_where_it_cannot_move() -> None:
    cache, there = ParallelCache(), SPEC._replace(striping=Striping(1))
    append(cache, [[], []], [[1, 2], [3, 4]])
    store = store_of(cache, 2)
    store.begin(Padding.plan((2, 3), None, 2, None), torch.zeros(6, dtype=torch.long), SPEC)

    def move(source: PagedKV, target: PagedKV, requests: Sequence[Hashable]) -> None:
        batch = target.batch(requests, [source.length(request) for request in requests])
        assert batch.q_lens == (2, 2)
        for layer in range(2):
            target.append(layer, *source.gather(layer, requests), batch)

    def fail(*_: Any) -> None:
        raise ValueError("nothing moves")

    with pytest.raises(ValueError, match="nothing moves"):
        store.move(2, SPEC, there, fail)
    assert store.home == "heads" and store.spec == SPEC
    with pytest.raises(ValueError, match=r"`input_ids` must have one row per cached request \(2\), got 3"):
        store.move(3, SPEC, there, move)
    store.move(2, SPEC, there, move)
    assert store.home == "tokens" and isinstance(store.kv, StripedKV)
    check(cache, [[1, 2], [3, 4]])


def test_bounded_memory() -> None:
    cache = ParallelCache(num_pages=3, page_size=2)
    rows = append(cache, [[], []], [[1, 2], [3, 4]])
    assert cache.get_max_length() == 6
    with pytest.raises(ValueError, match="out of pages"):
        append(cache, rows, [[5, 5], [6, 6]])
    check(cache, rows)
    check(cache, append(cache, rows, [[5], [None]]))


@pytest.mark.parametrize("sizes", [{"num_pages": 3}, {"page_size": 3}])
def test_bounds_come_together(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`num_pages` and `page_size` must be given together"):
        ParallelCache(**sizes)


def test_another_models_cache() -> None:
    cache = ParallelCache()
    append(cache, [[]], [[1]])
    other = SPEC._replace(head_dim=2)
    with pytest.raises(ValueError, match="`past_key_values` must hold this model's cache"):
        store_of(cache, 2).begin(Padding.plan((1, 1), None, 1, None), torch.zeros(1, dtype=torch.long), other)
    with pytest.raises(ValueError, match=r"`input_ids` must have one row per cached request \(1\), got 2"):
        store_of(cache, 2).begin(Padding.plan((2, 1), None, 1, None), torch.zeros(2, dtype=torch.long), SPEC)
    with pytest.raises(TypeError, match="must be filled by parallel layers, got `update`"):
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be negative or 0"):
        cache.crop(1)
