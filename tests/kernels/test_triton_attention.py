"""The attention kernels in Triton's interpreter, in tiles of 16 rows and keys: prompts, decodes, stripes, block lists.

Every output starts as NaN, since the suite fills what `empty` gives, so all that is compared has been written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar.kernels import BlockLists, attention, choose_backend, merge, sparse_attention
from seqpar.kernels.attention import launch
from seqpar.kernels.attention.plan import make_tiles
from seqpar.kernels.attention.triton import config_of
from seqpar.kernels.decode import MAX_QUERIES, split_count
from seqpar.kernels.decode import triton as decode
from seqpar.kernels.tile import placed_attention
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch
from tests.kernels.cases import Case
from tests.kernels.own_errors import own_errors
from tests.kernels.tiles import small_tiles

# Of values of about 4 a half type's output is rounded once and each weight once, float32's sums lose some ulps.
OUT_ATOL = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-9 * 4, torch.float16: 2 * 2**-12 * 4}
LSE_ATOL = 2e-5

MHA, GQA, MQA, UNEVEN = ((0, 1), 2), ((0, 0, 1, 1), 2), ((0, 0, 0), 1), ((0, 1, 1), 3)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_tiles():
        yield


def check(case: Case, dtype: torch.dtype, sinks: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Compare with the float64 definition; what was found."""
    q, k, v, batch = case.inputs(dtype)
    if sinks:
        options["sinks"] = torch.linspace(-2, 3, q.shape[1])
    options |= {"window": case.window, "kv_head_of": case.kv_head_of}
    wide = {name: x.double() if name == "sinks" else x for name, x in options.items() if name != "deterministic"}
    want_out, want_lse = attention(q.double(), k.double(), v.double(), batch, backend="reference", **wide)
    out, lse = attention(q, k, v, batch, backend="triton", **options)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=OUT_ATOL[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=LSE_ATOL)
    return out, lse


@st.composite
def few(draw: st.DrawFn) -> Case:
    """Some requests without tokens, decodes, chunks over cached keys; heads in any ratio, pages of any size."""
    count = draw(st.integers(1, 2))
    q_lens = tuple(draw(st.sampled_from([0, 1, 2, MAX_QUERIES, 9, 19])) for _ in range(count))
    prefixes = tuple(draw(st.sampled_from([0, 5, 30])) if new else 0 for new in q_lens)
    kv_head_of, num_kv_heads = draw(st.sampled_from([MHA, GQA, MQA, UNEVEN]))
    dim, window = draw(st.sampled_from([16, 24])), draw(st.sampled_from([None, 1, 20]))
    page_size = draw(st.sampled_from([0, 1, 5, 16, 32]))
    return Case(q_lens, prefixes, kv_head_of, num_kv_heads, dim, window, page_size, draw(st.integers(0, 99)))


@given(case=few(), sinks=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=2)
@example(case=Case((0, 20, 1), (0, 30, 25), *MQA, 24, 20, 5, 1), sinks=True, dtype=torch.bfloat16)
@example(case=Case((33,), (0,), (0, 1), 3, 16, None, 0, 0), sinks=False, dtype=torch.float16)
@example(case=Case((9, 2), (28, 40), *UNEVEN, 16, None, 32, 1), sinks=True, dtype=torch.float32)
def test_any_batch(case: Case, sinks: bool, dtype: torch.dtype) -> None:
    check(case, dtype, sinks)


@pytest.mark.slow
@given(case=few(), sinks=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=150)
def test_any_of_many_batches(case: Case, sinks: bool, dtype: torch.dtype) -> None:
    check(case, dtype, sinks)


@pytest.mark.parametrize(("deterministic", "window", "page_size"), [(False, None, 32), (True, 30, 7)])
def test_decodes_of_split_keys(
    deterministic: bool, window: int | None, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that a short request has no keys for, and tokens that others do not have, are left out of the merge."""
    monkeypatch.setattr(launch, "SPLIT_KEYS", 32)
    monkeypatch.setattr(launch, "split_count", lambda tiles, blocks, slots: 3)
    case = Case((1, 3, 0, 2), (70, 4, 0, 30), (0, 0), 1, 16, window, page_size, 1)
    check(case, torch.float32, sinks=True, deterministic=deterministic)


def test_deterministic_decodes_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SPLIT_KEYS", 32)
    both = Case((1, 2), (40, 70), *MQA, 16, None, 0, 0)
    q, k, v, batch = both.inputs(torch.float32)
    out, lse = attention(q, k, v, batch, deterministic=True, backend="triton")
    alone = RaggedBatch.build([1], [41])
    found = attention(q[:1], k[:41], v[:41], alone, deterministic=True, backend="triton")
    assert torch.equal(found[0], out[:1]) and torch.equal(found[1], lse[:1])


def test_decodes_whose_lengths_only_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch and one plan for lengths that change between the calls; what is beyond them is not a number."""
    monkeypatch.setattr(launch, "split_count", lambda tiles, blocks, slots: 2)
    kept: dict[str, Tensor] = {}
    recorded: RaggedBatch | None = None
    for lens in ((39, 4), (7, 40), (16, 17)):
        case = Case((1, 1), tuple(n - 1 for n in lens), *MQA, 16, 20, 8, 1)
        q, k, v, batch = case.inputs(torch.float32)
        table = torch.nn.functional.pad(batch.page_table, (0, 5 - batch.page_table.shape[1]))
        now = {"kv_lens": batch.cu_kv.diff(), "positions": batch.positions, "slots": batch.slots, "page_table": table}
        if recorded is None:
            kept = {name: x.clone() for name, x in now.items()}
            recorded = RaggedBatch.decodes(**kept, page_size=8)
        for name, x in now.items():
            kept[name].copy_(x)
        recorded.write_lengths(kept["kv_lens"])
        found = attention(q, k, v, recorded, window=20, backend="triton")
        plans = [key for key in recorded.plans if key[0] == "attention.triton"]
        assert len(plans) == 1 and recorded.kv_lens == (40, 40)
        want = attention(q.double(), k.double(), v.double(), batch, window=20, backend="reference")
        for got, exact in zip(found, want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)
    assert recorded is not None
    with pytest.raises(
        ValueError, match=r"`kv_lens` must be of the 2 requests of a batch that `decodes` made, got \[2\]"
    ):
        batch.write_lengths(kept["kv_lens"])
    with pytest.raises(ValueError, match='`batch` must have lengths that the host knows for backend="torch"; "triton"'):
        attention(q, k, v, recorded)
    with pytest.raises(ValueError, match="`pages` must be asked of a batch whose lengths the host knows, got one that"):
        _ = recorded.pages


def test_a_chunk_has_the_bits_of_the_whole() -> None:
    """Wherever it is cut, also with the rows of a token on two tiles."""
    q, k, v, batch = Case((40,), (0,), *MQA, 16, 20, 8, 1).inputs(torch.float32)
    whole = attention(q, k, v, batch, window=20, backend="triton")
    rows = slice(11, 34)
    (_, chunk, _) = batch.split([11, 34])
    for got, want in zip(attention(q[rows], k, v, chunk, window=20, backend="triton"), whole, strict=True):
        assert torch.equal(got, want[rows])


@pytest.mark.parametrize(
    ("backend", "window"),
    [
        *[("torch", None), ("torch", 19), ("reference", None), ("reference", 19), ("triton", 19)],
        pytest.param("triton", None, marks=pytest.mark.slow),
    ],
)
def test_stripes_of_the_keys_merge_to_all_of_them(backend: str, window: int | None) -> None:
    """A rank has every third token of each request: the queries of one, over the keys of each, some of which no key."""
    whole = RaggedBatch.prefill((37, 2))
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(39, heads, 16, generator=rng) for heads in (2, 1, 1))
    exact = attention(q.double(), k.double(), v.double(), whole, window=window, backend="reference")
    held = [whole.positions % 3 == rank for rank in range(3)]
    lens = [[int(x[:37].sum()), int(x[37:].sum())] for x in held]
    rows, partials = held[1], []
    for keys, kv_lens in zip(held, lens, strict=True):
        found = placed_attention(
            q[rows],
            k[keys],
            v[keys],
            q_lens=lens[1],
            kv_lens=kv_lens,
            positions=(whole.positions[rows], whole.positions[keys]),
            softmax_scale=0.25,
            kv_head_of=(0, 0),
            window=window,
            backend=backend,
        )
        partials.append(found)
    assert (partials[2][1][0] == -torch.inf).all() and (partials[2][0][0] == 0).all()  # position 1, before 2
    for got, want in zip(merge(*zip(*partials, strict=True)), exact, strict=True):
        torch.testing.assert_close(got.double(), want[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "window"), [(14, None), (31, 16)])
def test_a_block_of_which_a_query_sees_all_but_one_key(first: int, window: int | None) -> None:
    """At the last of its keys, and at the first under a window."""
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(length, 1, 16, generator=rng) for length in (2, 33, 33))
    options: dict[str, Any] = {"q_lens": (2,), "kv_lens": (33,), "softmax_scale": 1.0, "kv_head_of": (0,)}
    options |= {"positions": (torch.tensor([first, first + 1]), torch.arange(33)), "window": window}
    found, want = (placed_attention(q, k, v, **options, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
@settings(max_examples=2)
def test_block_lists(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    """Blocks of any size, listed in any order, by some heads; queries that are in no block, or see none."""
    heads = data.draw(st.sampled_from([(0, 1), (0, 0, 1, 1), (0, 1, 1)]))
    row_sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=2))
    key_sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
    window = data.draw(st.sampled_from([None, 9]))
    named = st.lists(st.integers(0, len(key_sizes) - 1), unique=True).map(tuple)
    of_heads = st.tuples(*[named] * (max(heads) + 1))
    lists = BlockLists(ranges(row_sizes), ranges(key_sizes), tuple(data.draw(of_heads) for _ in row_sizes))
    check_lists(lists, heads, window, dtype, seed)


@pytest.mark.parametrize("window", [25, pytest.param(None, marks=pytest.mark.slow)])
def test_block_lists_that_all_queries_see_whole(window: int | None) -> None:
    """33 queries after 64 keys, in an order that is not theirs: blocks of the kernel without a mask, and with one."""
    lists = BlockLists(ranges([33]), ranges([7, 40, 17, 33]), (((2, 0, 1, 3), (1, 3)),))
    check_lists(lists, (0, 1, 1), window, torch.float32, 0, torch.arange(97))


def ranges(sizes: list[int]) -> tuple[Range, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def check_lists(
    lists: BlockLists,
    heads: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    seed: int,
    positions: Tensor | None = None,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows, keys = lists.rows[-1].stop, lists.keys[-1].stop
    if positions is None:
        rows, keys = rows + 1, keys + 1  # the last ones are in no block
        where = torch.randint(0, 30, (rows,), generator=rng), torch.randint(0, 30, (keys,), generator=rng)
    else:
        where = positions[-rows:], positions[torch.randperm(keys, generator=rng)]
    q = torch.randn(rows, len(heads) + 1, 24, generator=rng).to(dtype)[:, 1:]
    k, v = torch.randn(2, keys, 24, generator=rng).to(dtype)
    rule: dict[str, Any] = {"q_positions": where[0], "k_positions": where[1], "softmax_scale": 0.3}
    rule |= {"kv_head_of": heads, "window": window}
    want = sparse_attention(q.double(), k.double(), v.double(), lists, backend="reference", **rule)
    out, lse = sparse_attention(q, k, v, lists, backend="triton", **rule)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=OUT_ATOL[dtype])
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=LSE_ATOL)


# What is decided on the host.


@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    ratio=st.integers(1, 5),
    rows=st.sampled_from([16, 64]),
)
@settings(max_examples=25)
def test_tiles_have_every_row_once_and_the_longest_come_first(
    lens: list[tuple[int, int]], ratio: int, rows: int
) -> None:
    q_lens, kv_lens = [new for new, _ in lens], [new + old for new, old in lens]
    tiles = make_tiles(q_lens, kv_lens, range(len(lens)), ratio, rows)
    found = sorted((r, row) for r, tile in tiles for row in range(tile * rows, tile * rows + rows))
    assert sorted(set(found)) == found
    assert {(r, row) for r, new in enumerate(q_lens) for row in range(new * ratio)} <= set(found)
    assert len(found) == sum(-(-new * ratio // rows) * rows for new in q_lens)
    ends = [kv_lens[r] - q_lens[r] + (tile + 1) * rows // ratio for r, tile in tiles]
    assert ends == sorted(ends, reverse=True)


@given(tiles=st.integers(1, 500), blocks=st.integers(1, 2000), slots=st.sampled_from([8, 216, 264]))
@settings(max_examples=25)
def test_keys_are_split_for_processors_that_would_stand_still(tiles: int, blocks: int, slots: int) -> None:
    splits = split_count(tiles, blocks, slots)
    assert 1 <= splits <= blocks
    if tiles % slots == 0 or blocks == 1:
        assert splits == 1
    assert split_count(tiles + slots, blocks, slots) <= splits  # the more there is to do, the less is split
    if splits > 1:  # and a split never makes the wave of work longer than without it
        assert -(-tiles * splits // slots) * -(-blocks // splits) <= -(-tiles // slots) * blocks


@pytest.mark.parametrize("module", [config_of, decode.config_of])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 64, 72, 128, 192, 256])
def test_every_head_has_a_tile(module: Any, itemsize: int, dim: int) -> None:
    for arch in (80, 89, 90, 100):
        for rows in (1, 16, 64, 100, 5000) if module is config_of else (1, 8, 64):
            config = module(dim, itemsize, rows, arch)
            assert config.itemsize == itemsize and config.dim >= dim and config.arch <= arch
            assert config.rows >= rows or module is config_of


def test_the_choice_is_triton_on_a_gpu() -> None:
    for op in ("attention", "sparse", "placed", "merge"):
        assert choose_backend(op, torch.device("cuda"), torch.bfloat16) == "triton"
        assert choose_backend(op, torch.device("cpu"), torch.bfloat16) == "torch"


Q, K = torch.zeros(4, 4, 16), torch.zeros(4, 2, 16)
WIDE = torch.zeros(4, 4, 264)
ALIGNED = torch.zeros(4 * 4 * 16 + 4)
REST = ' for backend="triton", got'


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        (Q.double(), K.double(), {}, f"`q` must be float32, bfloat16 or float16{REST} torch.float64"),
        (Q[..., :10], K[..., :10], {}, "`q` must have a head_dim that is a multiple of 4, from 16 to 256,"),
        (WIDE, WIDE, {}, f'from 16 to 256,{REST} 264; backend="torch" takes it'),
        (Q.half()[..., :12], K.half()[..., :12], {}, f"multiple of 8, from 16 to 256,{REST} 12"),
        (Q, K.transpose(1, 2).contiguous().transpose(1, 2), {}, "`k` must have unit stride in head_dim and"),
        (torch.zeros(4, 4, 18)[..., :16], K, {}, "`q` must have unit stride in head_dim and others that are multiples"),
        (ALIGNED[1 : 4 * 4 * 16 + 1].view(4, 4, 16), K, {}, f"`q` must start at a multiple of 16 bytes{REST}"),
        (Q.clone().requires_grad_(), K, {}, f'must need no gradient{REST} one that does; backend="torch" takes them'),
        (Q, K, {"softmax_scale": 0.0}, f'`softmax_scale` must be positive{REST} 0.0; backend="torch" takes it'),
        (Q, K, {"backend": "cuda"}, '"reference", "triton", "flashinfer", "flash_attn", got'),
    ],
)
@own_errors()
def test_what_the_kernels_do_not_take_is_refused(q: Tensor, k: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        attention(q, k, k, RaggedBatch.prefill([4]), **{"backend": "triton", **options})
    assert message in str(error.value)


@own_errors()
def test_pages_that_are_not_there_are_refused() -> None:
    pages = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match="`batch` must have pages of the 2 that `k` has, got page 2"):
        attention(Q, pages, pages, RaggedBatch.build([4], [4], [[2]], 4), backend="triton")
    lists = BlockLists((Range(0, 4),), (Range(0, 9),), (((0,),),))
    rule = {"q_positions": torch.arange(4), "k_positions": torch.arange(4), "softmax_scale": 1.0}
    with pytest.raises(ValueError, match=r"`lists.keys` must lie in the 4 that there are"):
        sparse_attention(Q, K[:, 0], K[:, 1], lists, **rule, kv_head_of=(0,) * 4, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lens": (3,)}, "must be those of 4 queries and 4 keys"),
        ({"kv_lens": (2, 2)}, "must be those of 4 queries and 4 keys"),
        ({"positions": (torch.tensor([0, 2, 1, 3]), torch.arange(4))}, "`positions` must increase in each request"),
        ({"window": 0}, "`window` must be at least 1"),
        ({"backend": "cuda"}, '"triton", got'),
    ],
)
@own_errors()
def test_bad_positions_are_refused(change: dict[str, Any], message: str) -> None:
    options = {"q_lens": (4,), "kv_lens": (4,), "positions": (torch.arange(4), torch.arange(4)), "softmax_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        placed_attention(Q, K, K, **{**options, "kv_head_of": (0, 0, 1, 1), **change})
