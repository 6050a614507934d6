"""Requests that leave their cache and come back, bit for bit, or are refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqpar.kv import OutOfPages, PagedKV, SavedKV, StripedKV, load_request, save_request
from seqpar.partition import Striping
from tests.kernels.own_errors import own_errors
from tests.ranks import run_ranks

LAYERS, HEADS, DIM = 2, 3, 4


def bits(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Keys of every bit pattern, those that are no numbers too."""
    size = count * HEADS * DIM * dtype.itemsize
    raw = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw.view(dtype).view(count, HEADS, DIM)


def fill(kv: PagedKV, lengths: dict[str, int]) -> None:
    """Append in two steps, so that pages of requests alternate."""
    for part in (0, 1):
        batch = kv.batch(list(lengths), [length // 2 + part * (length % 2) for length in lengths.values()])
        for layer in range(LAYERS):
            k, v = (bits(kv.dtype, batch.num_tokens, 10 * layer + 2 * part + which) for which in (0, 1))
            kv.append(layer, k, v, batch)


def same(a: PagedKV, one: str, b: PagedKV, other: str) -> None:
    for layer in range(LAYERS):
        for x, y in zip(a.gather(layer, [one]), b.gather(layer, [other]), strict=True):
            assert x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def cache(page_size: int = 4, num_pages: int = 12, dtype: torch.dtype = torch.bfloat16) -> PagedKV:
    return PagedKV(LAYERS, num_pages, page_size, HEADS, DIM, dtype=dtype)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_in_other_pages(dtype: torch.dtype, tmp_path: Path) -> None:
    kv, other = cache(dtype=dtype), cache(7, 6, dtype)
    fill(kv, {"a": 13, "b": 5})
    fill(other, {"c": 9})
    untouched = SavedKV.of(other, "c")
    save_request(kv, "a", tmp_path / "a")
    load_request(other, "d", tmp_path / "a")
    same(kv, "a", other, "d")
    saved = SavedKV.of(kv, "a")
    assert saved.nbytes == LAYERS * 13 * kv.token_bytes and saved.k.device.type == "cpu"
    kv.free("a")  # swapped out; others take the room meanwhile
    fill(kv, {"e": 20})
    kv.free("b")
    saved.restore(kv, "a")
    same(kv, "a", other, "d")
    after = SavedKV.of(other, "c")
    assert all(torch.equal(getattr(untouched, n).view(torch.uint8), getattr(after, n).view(torch.uint8)) for n in "kv")
    assert os.listdir(tmp_path) == ["a"]


def test_saved_in_one_inference_mode_and_restored_in_another(tmp_path: Path) -> None:
    kv = cache()
    with torch.inference_mode():
        fill(kv, {"a": 5})
        saved = SavedKV.of(kv, "a")
        save_request(kv, "a", tmp_path / "a")
        read = SavedKV.read(tmp_path / "a")
    saved.restore(kv, "b")
    read.restore(kv, "c")
    same(kv, "a", kv, "b")
    same(kv, "a", kv, "c")


def test_an_empty_request_and_a_rank_without_heads(tmp_path: Path) -> None:
    kv = PagedKV(LAYERS, 4, 2, 0, DIM)
    batch = kv.batch(["a", "b"], [3, 0])
    for layer in range(LAYERS):
        kv.append(layer, torch.zeros(3, 0, DIM), torch.zeros(3, 0, DIM), batch)
    for request, length in (("a", 3), ("b", 0)):
        save_request(kv, request, tmp_path / request)
        kv.free(request)
        load_request(kv, request, tmp_path / request)
        assert kv.length(request) == length


RUNS = Striping(2, 2)


def striped(rank: int, striping: Striping = RUNS, page_size: int = 8) -> StripedKV:
    return StripedKV(LAYERS, 6, page_size, HEADS, DIM, striping=striping, rank=rank, dtype=torch.bfloat16)


def test_every_rank_saves_its_share(tmp_path: Path) -> None:
    ranks, whole = [striped(rank) for rank in (0, 1)], cache()
    for kv in (*ranks, whole):
        fill(kv, {"a": 11})
    for kv in ranks:
        path = tmp_path / str(kv.rank)
        save_request(kv, "a", path)
        other = striped(kv.rank, page_size=12)
        load_request(other, "a", path)
        assert other.length("a") == 11
        same(kv, "a", other, "a")
        for refusing, words in [
            (striped(1 - kv.rank), rf"rank {1 - kv.rank} of 2 in runs of 2, got rank {kv.rank} of 2 in runs of 2"),
            (striped(kv.rank, Striping(2, 1)), rf"rank {kv.rank} of 2 in runs of 1, got rank {kv.rank} of 2 in runs"),
            (whole, rf"of the cache's share of the tokens, all of them, got rank {kv.rank} of 2 in runs of 2; restore"),
        ]:
            with pytest.raises(ValueError, match=words):
                load_request(refusing, "new", path)
            assert "new" not in refusing
    one = striped(0, Striping(1))
    save_request(whole, "a", tmp_path / "whole")
    load_request(one, "a", tmp_path / "whole")  # one rank has all of them
    same(whole, "a", one, "a")


def received(rank: int, p: int, path: str) -> list[int]:
    kv = cache(3)
    load_request(kv, "theirs", path)
    return [x.view(torch.uint8).tolist() for layer in range(LAYERS) for x in kv.gather(layer, ["theirs"])]


def test_another_process_has_the_same_bits(tmp_path: Path) -> None:
    kv = cache()
    fill(kv, {"a": 7, "b": 3})
    save_request(kv, "a", tmp_path / "a")
    (found,) = run_ranks(1, received, str(tmp_path / "a"))
    assert found == [x.view(torch.uint8).tolist() for layer in range(LAYERS) for x in kv.gather(layer, ["a"])]


def refused(kv: PagedKV, call: Callable[[], object], match: str, kind: type[Exception] = ValueError) -> None:
    """The call is an error that leaves the cache as it was."""
    before = (kv.ids, [kv.pages(r) for r in kv.ids], kv.free_pages, kv.version)
    memory = [x.clone() for layer in range(LAYERS) for x in kv.layer(layer)]
    with own_errors(), pytest.raises(kind, match=match):
        call()
    assert before == (kv.ids, [kv.pages(r) for r in kv.ids], kv.free_pages, kv.version)
    kv.integrity()
    for x, y in zip(memory, (x for layer in range(LAYERS) for x in kv.layer(layer)), strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_what_does_not_belong_into_a_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    kv = cache()
    fill(kv, {"a": 7, "b": 3})
    save_request(kv, "a", path)
    sizes = {"num_layers": LAYERS, "num_pages": 4, "page_size": 4, "num_kv_heads": HEADS, "head_dim": DIM}
    for change in ({"num_layers": 3}, {"num_kv_heads": 2}, {"head_dim": 5}):
        other = PagedKV(**{**sizes, **change}, dtype=torch.bfloat16)
        with pytest.raises(
            ValueError, match=r"must have the cache's layers, heads and head_dim .*, got \(2, 3, 4\) in"
        ):
            load_request(other, "a", path)
        assert other.ids == ()
    refused(
        half := cache(dtype=torch.float16), lambda: load_request(half, "a", path), "in torch.float16, got .*bfloat16"
    )
    refused(kv, lambda: load_request(kv, "b", path), "`request` must not be held yet, got 'b'; free it first")
    fill(kv, {"c": 33})
    refused(kv, lambda: load_request(kv, "d", path), r"must fit into the free pages \(0 of 12, .* got 2", OutOfPages)
    refused(kv, lambda: load_request(kv, "d", tmp_path / "none"), "none", FileNotFoundError)
    refused(kv, lambda: save_request(kv, "x", path), "`request` must be held by the cache, got 'x'")
    kv.free("c")
    kv.batch(["b"], [1])
    refused(kv, lambda: save_request(kv, "b", path), r"after their keys are appended \(layer 0, request 'b'")
    load_request(kv, "d", path)  # the file is still what it was
    same(kv, "a", kv, "d")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    kv, path, bad = cache(), tmp_path / "a", tmp_path / "bad"
    fill(kv, {"a": 7})
    save_request(kv, "a", path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [0, 7, 8, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        bad.write_bytes(whole[:length])
        refused(kv, lambda: load_request(kv, "b", bad), f"`path` must be a whole file of a saved request, got {bad}: ")
    bad.write_bytes(whole + b"more")
    refused(kv, lambda: load_request(kv, "b", bad), "`path` must be a whole file")
    tensors = load_file(path)
    told = '{"length": 7, "ranks": 1, "interleave": 1, "rank": 0}'
    good = {"format": "seqpar.kv.request/1", "request": told}
    for change, metadata, words in [
        ({}, None, "expected, got None"),
        ({}, {**good, "format": "seqpar.kv.request/9"}, "expected, got 'seqpar.kv.request/9'"),
        ({}, {"format": good["format"]}, "'request'"),
        ({}, {**good, "request": "7"}, "not subscriptable"),
        ({}, {**good, "request": "{"}, "Expecting"),
        (
            {},
            {**good, "request": told.replace("7", "6")},
            r"must have the 6 tokens that their rank stores, got \[\[2, 7",
        ),
        ({}, {**good, "request": told.replace("7", "-7")}, "`length` must be at least 0"),
        ({}, {**good, "request": told.replace('"rank": 0', '"rank": 1')}, "`rank` one of 1, got 7 and 1"),
        (
            {},
            {**good, "request": told.replace('"ranks": 1', '"ranks": 0')},
            "`ranks` and `interleave` must be at least",
        ),
        ({"k": tensors["k"][:, :6].clone()}, good, "must have one shape"),
        ({"v": tensors["v"].half()}, good, "one dtype"),
        ({"k": tensors["k"].flatten(), "v": tensors["v"].flatten()}, good, r"one shape \[layers, tokens, heads, head"),
        ({"more": tensors["k"].clone()}, good, "with `k` and `v` is expected"),
    ]:
        save_file({**tensors, **change}, bad, metadata)
        refused(kv, lambda: load_request(kv, "b", bad), rf"`path` must be a whole file .*, got {bad}: .*{words}")
    save_file(tensors, bad, good)
    load_request(kv, "b", bad)
    same(kv, "a", kv, "b")


def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, path = cache(), tmp_path / "a"
    fill(kv, {"a": 7})
    save_request(kv, "a", path)
    before = path.read_bytes()

    def fails(tensors: object, beside: Path, metadata: object) -> None:
        beside.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("seqpar.kv.saved.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_request(kv, "a", path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]
