"""Reading safetensors by slices, and refusing files that are not what they should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from seqpar.hf.checkpoint import Checkpoint
from seqpar.partition import Range

FILE = "model.safetensors"
TENSORS = {
    "a": torch.arange(35, dtype=torch.float32).view(5, 7),
    "b": torch.arange(11, dtype=torch.bfloat16),
    "c": torch.arange(24, dtype=torch.float64).view(2, 3, 4),
    "empty": torch.zeros(0, 3),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@settings(deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TENSORS)))
def test_a_window_is_that_slice_and_costs_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.mktemp("windows")
    save_file(TENSORS, path / "model.safetensors")
    checkpoint, tensor = Checkpoint.open(path), TENSORS[name]
    dim = data.draw(st.integers(0, tensor.dim() - 1))
    start = data.draw(st.integers(0, tensor.shape[dim]))
    window = Range(start, data.draw(st.integers(start, tensor.shape[dim])))
    expected = tensor.narrow(dim, window.start, window.size)
    found = checkpoint.read(name, dim, window)
    assert torch.equal(found, expected) and found.dtype == tensor.dtype and found.is_contiguous()
    assert checkpoint.bytes_read == expected.numel() * expected.itemsize == checkpoint.window_bytes(name, dim, window)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), dim=st.integers(0, 2))
def test_a_window_of_stacked_matrices_costs_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dim: int
) -> None:
    path = tmp_path_factory.mktemp("stacked")
    tensor = torch.arange(90, dtype=torch.float32).view(3, 6, 5)
    names = tuple(tuple(f"{e}.{part}" for part in "ab") for e in range(3))
    save_file({name: tensor[e, 3 * i : 3 * i + 3] for e in range(3) for i, name in enumerate(names[e])}, path / FILE)
    checkpoint = Checkpoint.open(path)
    start = data.draw(st.integers(0, tensor.shape[dim]))
    window = Range(start, data.draw(st.integers(start, tensor.shape[dim])))
    expected = tensor.narrow(dim, window.start, window.size)
    found = checkpoint.read(names, dim, window)
    assert torch.equal(found, expected) and found.is_contiguous()
    assert checkpoint.bytes_read == expected.numel() * 4 == checkpoint.window_bytes(names, dim, window)
    beside = {i // 3 for i in range(*window)} if dim == 1 else {0, 1}
    stacked = range(*window) if dim == 0 else range(3)
    assert checkpoint.names_read == {names[e][i] for e in stacked for i in beside if window.size}


def test_reads_touch_no_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count at the system call, and compare the addresses with where the numbers lie in the file."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    touched: list[bytes] = []
    plain = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        got = plain(descriptor, buffers, offset)
        touched.append(raw[offset : offset + got])
        return got

    monkeypatch.setattr(os, "preadv", counting)
    column = checkpoint.read("a", 1, Range(2, 5))
    assert b"".join(touched) == column.numpy().tobytes() and len(touched) == 5
    touched.clear()
    rows = checkpoint.read("a", 0, Range(1, 4))
    assert touched == [rows.numpy().tobytes()]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a file and leave its data alone."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def set_in(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda header: header[name].__setitem__(key, value))


def header_is(text: bytes) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda _: text)


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def duplicate(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ', "b": ' + json.dumps(header["b"]) + "}").encode()


CORRUPT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (cut(0), "must begin with a safetensors header, got 0 bytes"),
    "five bytes": (cut(5), "must begin with a safetensors header, got 5 bytes"),
    "half a header": (cut(60), "must begin with a safetensors header, got 60 bytes"),
    "half the data": (cut(-40), "it is truncated or corrupt"),
    "more data": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "it is truncated or corrupt"),
    "a length beyond all": (
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        "a length of 18446744073709551615",
    ),
    "a pickle": (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100), "must begin with a safetensors header"),
    "no JSON": (header_is(b"{not json"), "must hold valid JSON, got Expecting property name"),
    "no text": (header_is(b"\xff\xfe\xfd"), "must hold valid JSON, got 'utf-8' codec"),
    "a list": (header_is(b"[]"), "must hold a JSON object, got list"),
    "a name twice": (lambda path: rewrite(path, duplicate), "must hold valid JSON, got a name occurs twice"),
    "an overlap": (set_in("b", "data_offsets", [100, 122]), "must hold its tensors without gaps or overlaps"),
    "out of bounds": (set_in("a", "data_offsets", [10**6, 10**6 + 140]), "must hold its tensors without gaps"),
    "backwards": (set_in("a", "data_offsets", [140, 0]), "must give dtype, shape and data_offsets of each tensor"),
    "negative": (set_in("a", "shape", [-5, -7]), "must give dtype, shape and data_offsets of each tensor"),
    "a bool as a size": (set_in("a", "shape", [True, 35]), "must give dtype, shape and data_offsets of each tensor"),
    "three offsets": (set_in("a", "data_offsets", [0, 70, 140]), "must give dtype, shape and data_offsets"),
    "no dtype": (set_in("a", "dtype", None), "must give dtype, shape and data_offsets of each tensor"),
    "another shape": (set_in("a", "shape", [5, 8]), "must have as many bytes as its shape and dtype need (F32 [5, 8])"),
    "no entry": (lambda path: rewrite(path, lambda header: header.__setitem__("a", 3)), "must give dtype, shape"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    Checkpoint.open(tmp_path)
    change, message = CORRUPT[name]
    change(tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Checkpoint.open(tmp_path)
    assert message in str(error.value), str(error.value)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    cut(-60)(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must not change while it is read, got"):
        for name, shape in SHAPES.items():
            checkpoint.read(name, 0, Range(0, shape[0]))


def indexed(path: Path, weight_map: dict[str, Any]) -> None:
    save_file({name: TENSORS[name] for name in ("a", "b")}, path / "one.safetensors")
    save_file({"c": TENSORS["c"], "empty": TENSORS["empty"]}, path / "two.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


WHERE = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "empty": "two.safetensors"}


def test_an_index_over_files(tmp_path: Path) -> None:
    indexed(tmp_path, WHERE)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(SHAPES)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name, 0, Range(0, tensor.shape[0])), tensor)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({**WHERE, "c": "three.safetensors"}, "must name files beside it, got three.safetensors, which is not there"),
        ({**WHERE, "c": "../one.safetensors"}, "must name files beside it, got ../one.safetensors"),
        ({**WHERE, "d": "two.safetensors"}, "must name tensors of its files, got `d`, not in two.safetensors"),
        ({**WHERE, "c": "one.safetensors"}, "must name every tensor of its files, got also `c` in two.safetensors"),
        ({name: WHERE[name] for name in "abc"}, "must name every tensor of its files, got also `empty`"),
        ({**WHERE, "c": 2}, "must hold a `weight_map` from tensors to files"),
    ],
)
def test_an_index_that_contradicts_its_files(tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")  # outside, and there
    indexed(path, weight_map)
    with pytest.raises(ValueError) as error:
        Checkpoint.open(path)
    assert message in str(error.value), str(error.value)


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or .*other formats are not read"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "d": (2,)}, "must hold every tensor of the model, got none named `d`"),
        ({name: SHAPES[name] for name in "abc"}, "must hold the tensors of the model only, got also `empty`"),
        ({**SHAPES, "a": (7, 5)}, "`a` must have shape [7, 5] as config.json says, got [5, 7]"),
    ],
)
def test_a_model_that_needs_other_tensors(tmp_path: Path, shapes: dict[str, Any], message: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Checkpoint.open(tmp_path).check(shapes)
    assert message in str(error.value), str(error.value)
    Checkpoint.open(tmp_path).check({name: SHAPES[name] for name in "abc"}, optional=["empty"])


def test_quantized_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`a` must have one of the dtypes F64, F32, F16, BF16, got I8; quantized"):
        Checkpoint.open(tmp_path).check({"a": (3,)})
