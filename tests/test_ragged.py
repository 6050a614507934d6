"""The ragged batch against brute force over its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors

lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=5)


def paged(requests: list[tuple[int, int]], page_size: int) -> tuple[list[list[int]], RaggedBatch]:
    """A batch over pages dealt out in reverse, one spare page a request."""
    kv_lens = [new + old for new, old in requests]
    needs = [-(-keys // page_size) + 1 for keys in kv_lens]
    pool = list(range(sum(needs)))
    pages = [[pool.pop() for _ in range(count)] for count in needs]
    return pages, RaggedBatch.build([new for new, _ in requests], kv_lens, pages, page_size)


@given(lengths, st.integers(1, 6))
@settings(deadline=None)
def test_every_token_has_its_position_and_slot(requests: list[tuple[int, int]], page_size: int) -> None:
    pages, batch = paged(requests, page_size)
    tokens = [(r, old + i) for r, (new, old) in enumerate(requests) for i in range(new)]
    assert batch.num_tokens == len(tokens) and batch.num_requests == len(requests)
    assert batch.positions.tolist() == [index for _, index in tokens]
    assert batch.slots.tolist() == [pages[r][i // page_size] * page_size + i % page_size for r, i in tokens]
    assert len(set(batch.slots.tolist())) == len(tokens)
    used = [-(-keys // page_size) for keys in batch.kv_lens]
    assert batch.pages == tuple(tuple(row[:n]) for row, n in zip(pages, used, strict=True))
    runs = [(start + i, slot + i) for start, slot, count in batch.slot_runs for i in range(count)]
    assert runs == list(enumerate(batch.slots.tolist()))


@given(lengths)
@settings(deadline=None)
def test_derived_indices(requests: list[tuple[int, int]]) -> None:
    batch = RaggedBatch.build([new for new, _ in requests], [new + old for new, old in requests])
    owner = [r for r, (new, _) in enumerate(requests) for _ in range(new)]
    for r, (new, _) in enumerate(requests):
        rows = [row for row, request in enumerate(owner) if request == r]
        assert list(range(*batch.cu_q[r : r + 2].tolist())) == rows
        assert batch.last_idx[r] == (rows[-1] if new else -1)
    assert batch.cu_kv.diff().tolist() == [new + old for new, old in requests]
    assert batch.cu_q.dtype == batch.cu_kv.dtype == torch.int32 and batch.last_idx.dtype == torch.int64
    decodes = [new == 1 for new, _ in requests] + [False]
    assert batch.n_decode == decodes.index(False)


def test_whole_sequences() -> None:
    batch = RaggedBatch.prefill([3, 0, 2])
    assert batch.kv_lens == batch.q_lens == (3, 0, 2) and not batch.has_cache
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.slots.tolist() == [] and batch.page_table.shape == (3, 0) and batch.pages == ((), (), ())


def test_given_positions_do_not_move_slots() -> None:
    """A left-padded prompt numbers its tokens from its first real one."""
    batch = RaggedBatch.build([2], [5], [[4, 1]], 4, positions=torch.tensor([0, 1]))
    assert batch.positions.tolist() == [0, 1] and batch.slots.tolist() == [19, 4]


def test_it_is_frozen_and_moves_whole() -> None:
    batch = RaggedBatch.build([2], [5], [[0, 1]], 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.page_size = 8  # type: ignore[misc]
    moved = batch.to("meta")
    assert {moved.positions.device.type, moved.slots.device.type, moved.page_table.device.type} == {"meta"}
    assert moved.q_lens == batch.q_lens and moved.kv_lens == batch.kv_lens and moved.page_size == batch.page_size
    assert moved.device.type == "meta" and moved.last_idx.device.type == "meta"


def test_tensors_outlive_inference_mode() -> None:
    """Autograd saves none that was made in it; a batch may serve an evaluation first and a training step then."""
    with torch.inference_mode():
        given = RaggedBatch.build([2], [5], [[0, 1]], 4, positions=torch.tensor([0, 1]))
        batches = [RaggedBatch.prefill([3, 0]), given, given.to("meta"), *given.split([1])]
        tensors = [
            getattr(batch, name)
            for batch in batches
            for name in ("positions", "slots", "page_table", "cu_q", "cu_kv", "last_idx")
        ]
    assert not any(x.is_inference() for x in tensors)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "pages", "page_size", "message"),
    [
        ([1], [1, 2], None, 0, r"`kv_lens` must have one entry per request \(1\), got 2"),
        (
            [3],
            [2],
            None,
            0,
            r"`kv_lens` must be at least `q_lens`, .* got 2 keys and 3 new tokens for request 0",
        ),
        ([1, -1], [1, 1], None, 0, "got 1 keys and -1 new tokens for request 1"),
        ([1], [5], [[0]], 4, r"`pages` must hold each request's keys \(5 for request 0\), got 1 pages of 4"),
        ([1], [1], [[0], [1]], 4, r"`pages` must have one entry per request \(1\), got 2"),
        ([1], [1], [[0]], 0, "`page_size` must be at least 1 with `pages` and 0 without, got 0 with pages"),
        ([1], [1], None, 4, "got 4 without pages"),
    ],
)
def test_bad_lengths_are_refused(
    q_lens: Sequence[int], kv_lens: Sequence[int], pages: Sequence[Sequence[int]] | None, page_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedBatch.build(q_lens, kv_lens, pages, page_size)


THREE = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": THREE.long()}, r"`positions` must have one entry per new token \(2\), got \[3\]"),
        ({"slots": THREE.long()}, r"`slots` must have one entry per new token \(2\), .* got \[3\]"),
        ({"page_size": 0}, r"`slots` must have .* none without a cache, got \[2\] with page_size=0"),
        ({"page_table": THREE[:, None]}, r"`page_table` must have one row per request \(1\), got \[3, 1\]"),
        ({"page_table": THREE[None, :1]}, r"`page_table` must hold the longest request \(5 tokens\), got 1 pages of 4"),
    ],
)
def test_tensors_that_describe_another_batch_are_refused(change: dict[str, object], message: str) -> None:
    batch = RaggedBatch.build([2], [5], [[0, 1]], 4)
    with own_errors(), pytest.raises(ValueError, match=message):
        dataclasses.replace(batch, **change)


@given(lengths, st.integers(1, 6), st.data())
@settings(deadline=None)
def test_a_tail_is_a_batch_of_the_last_tokens(
    requests: list[tuple[int, int]], page_size: int, data: st.DataObject
) -> None:
    """Rows are closed upwards, in order, and keep position, slot, keys and pages."""
    _, batch = paged(requests, page_size)
    wanted = data.draw(st.lists(st.sampled_from(range(batch.num_tokens)))) if batch.num_tokens else []
    tail = batch.tail(wanted)
    owner = [r for r, new in enumerate(batch.q_lens) for _ in range(new)]
    rows = [row for row in range(batch.num_tokens) if any(owner[w] == owner[row] and w <= row for w in wanted)]
    assert list(tail.rows) == rows and tail.q_lens == tuple(
        len([row for row in rows if owner[row] == r]) for r in range(len(requests))
    )
    assert tail.batch.q_lens == tail.q_lens and tail.batch.kv_lens == batch.kv_lens and tail.batch.pages == batch.pages
    assert tail.batch.positions.tolist() == batch.positions[rows].tolist()
    assert tail.batch.slots.tolist() == batch.slots[rows].tolist()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, batch.num_tokens)] * 2)))
    assert tail.within(start, stop) == tuple(row for row in rows if start <= row < stop)
    assert tail.take(torch.arange(start, stop), start).tolist() == list(tail.within(start, stop))
    if batch.kv_lens == batch.q_lens:
        assert not tail.without_cache.has_cache and tail.without_cache.q_lens == tail.q_lens


@given(lengths, st.data())
@settings(deadline=None)
def test_chunks_without_a_cache_see_a_slice_of_the_keys(requests: list[tuple[int, int]], data: st.DataObject) -> None:
    """Every token of every chunk finds in its slice of the flat keys the keys that it sees in the whole batch."""
    batch = RaggedBatch.build([new for new, _ in requests], [new + old for new, old in requests])
    keys = [(r, i) for r, keys in enumerate(batch.kv_lens) for i in range(keys)]
    cuts = sorted(data.draw(st.lists(st.integers(0, batch.num_tokens), max_size=4)))
    seen = []
    for chunk, where in batch.split_keys(cuts):
        given_keys = keys[where]
        assert len(given_keys) == sum(chunk.kv_lens)
        assert not chunk.num_tokens or (chunk.q_lens[0] and chunk.q_lens[-1])
        for r in range(chunk.num_requests):
            own = given_keys[slice(*chunk.kv_starts[r : r + 2])]
            for i in range(chunk.q_lens[r]):
                row = len(seen)
                assert chunk.positions[chunk.q_starts[r] + i] == batch.positions[row]
                seen.append(own[: chunk.kv_lens[r] - chunk.q_lens[r] + i + 1])
    expected = []
    for r, (new, old) in enumerate(requests):
        expected += [[(r, key) for key in range(old + i + 1)] for i in range(new)]
    assert seen == expected


def test_chunks_with_a_cache_have_no_slices_of_keys() -> None:
    with pytest.raises(ValueError, match="`split_keys` must be of a batch whose keys are given, got one with a cache"):
        RaggedBatch.build([2], [2], [[0]], 4).split_keys([1])
    with pytest.raises(ValueError, match=r"`cuts` must be in order and lie in \[0, 2\], got \[3\]"):
        RaggedBatch.prefill([2]).split_keys([3])


@given(lengths, st.integers(0, 4), st.one_of(st.integers(1, 9), st.lists(st.integers(1, 60), min_size=1, unique=True)))
@settings(deadline=None)
def test_padding_adds_requests_of_one_token(
    requests: list[tuple[int, int]], page_size: int, size: int | list[int]
) -> None:
    if isinstance(size, list):
        size = sorted(size)
    batch = paged(requests, page_size)[1] if page_size else RaggedBatch.prefill([new for new, _ in requests])
    page = 1000 if page_size else None
    if isinstance(size, list) and size[-1] < batch.num_tokens:
        with own_errors(), pytest.raises(ValueError, match=r"`size` must have one that holds the batch \(\d+ tokens\)"):
            batch.pad_to(size, page=page)
        return
    padded = batch.pad_to(size, page=page)
    if isinstance(size, int):
        assert padded.num_tokens % size == 0 and padded.num_tokens - batch.num_tokens < size
    else:
        assert padded.num_tokens == min(each for each in size if each >= batch.num_tokens)
    new, count = padded.num_tokens - batch.num_tokens, batch.num_requests
    assert padded.q_lens == batch.q_lens + (1,) * new and padded.kv_lens == batch.kv_lens + (1,) * new
    assert torch.equal(padded.positions[: batch.num_tokens], batch.positions)
    assert torch.equal(padded.slots[: len(batch.slots)], batch.slots)
    assert padded.slots[len(batch.slots) :].tolist() == ([1000 * page_size] * new if page_size else [])
    assert padded.pages == batch.pages + ((1000,) if page_size else (),) * new
    assert padded.num_requests == count + new


def test_padding_that_is_refused() -> None:
    batch, plain = paged([(2, 3)], 4)[1], RaggedBatch.prefill([3])
    cases: list[tuple[RaggedBatch, int | list[int], int | None, str]] = [
        (batch, 4, None, "`page` must be one of the cache's, and None without a cache, got None"),
        (plain, 4, 1, "and None without a cache, got 1"),
        (plain, 0, None, "`size` must be at least 1, got 0"),
        (plain, [4, 4], None, r"`size` must be at least 1 and increasing, got \[4, 4\]"),
        (plain, [2], None, r"`size` must have one that holds the batch \(3 tokens\), got \[2\]"),
    ]
    for each, size, page, message in cases:
        with own_errors(), pytest.raises(ValueError, match=message):
            each.pad_to(size, page=page)
    named = RaggedBatch.build([1], [1], [[0]], 4, requests=["a"]).pad_to(3, page=7)
    assert named.requests == ("a", ("padding", 0), ("padding", 1))


class Transfers(TorchDispatchMode):
    """Counts what is copied to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("meta")
        return func(*args, **(kwargs or {}))


@given(lengths, st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_a_batch_travels_as_one_tensor(requests: list[tuple[int, int]], page_size: int) -> None:
    _, batch = paged(requests, page_size)
    with Transfers() as seen:
        moved = batch.to("meta")
        shapes = [tensor.shape for tensor in (moved.cu_q, moved.cu_kv, moved.last_idx, moved.positions)]
    assert seen.count == 1 and batch.to("cpu") is batch
    assert shapes == [batch.cu_q.shape, batch.cu_kv.shape, batch.last_idx.shape, batch.positions.shape]
    assert moved.pages == batch.pages and moved.device.type == "meta"
    packed = batch._pack()
    assert packed.dtype == torch.int32
    back = batch._unpack(packed)
    for name in ("positions", "slots", "page_table", "cu_q", "cu_kv", "last_idx"):
        assert torch.equal(getattr(back, name), getattr(batch, name))
        assert getattr(back, name).dtype == getattr(batch, name).dtype


def test_addresses_that_need_more_than_32_bits_travel_too() -> None:
    batch = RaggedBatch.build([2], [2], [[5]], 1 << 30)
    assert torch.equal(batch._unpack(batch._pack()).slots, batch.slots) and int(batch.slots[1]) == 5 * (1 << 30) + 1


@given(lengths, st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_page_tables_as_compressed_rows(requests: list[tuple[int, int]], page_size: int) -> None:
    _, batch = paged(requests, page_size)
    indptr, indices, last = (tensor.tolist() for tensor in batch.csr)
    assert all(tensor.dtype == torch.int32 for tensor in batch.csr)
    for request, keys in enumerate(batch.kv_lens):
        row = indices[indptr[request] : indptr[request + 1]]
        assert tuple(row) == batch.pages[request]
        assert page_size * (len(row) - 1) + last[request] == keys and 1 <= last[request] <= page_size
