"""Safetensors checkpoints, read by slices: a rank reads the bytes of its own rows and columns and no others.

The whole header is checked before a byte of data is read, so that a truncated or corrupt file is an error on opening.
Data is read with `pread` straight into the tensor that is returned. Mapping the file, as the safetensors library does,
lost: what a rank reads is then decided by the kernel's read-ahead, cannot be counted, and a file that shrinks under the
map kills the process instead of raising. Nothing is ever unpickled.

A file that changes after its header was read, by its size, its time or its inode, is an error at the next read. Bytes
that are wrong without that, such as a flipped bit, only a checksum can tell (`Checkpoint.verify`).

Source: the format is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from seqpar.partition import Range

__all__ = ["DTYPES", "Checkpoint", "Entry", "Names", "parse_object", "read_header"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX, SUMS = "model.safetensors", "model.safetensors.index.json", "SHA256SUMS"
PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth"})
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

Names: TypeAlias = str | tuple[tuple[str, ...], ...]
"""A tensor of the files; or the like matrices that one tensor of a model is made of, stacked along dim 0, those of one
entry side by side along dim 1."""


Stamp: TypeAlias = tuple[int, int, int]
"""Inode, size and time of a file."""


class Entry(NamedTuple):
    """One tensor of a file; `begin` and `end` are byte offsets in the file, which was stamped when they were read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    stamp: Stamp


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: the file is truncated, or its header is not one that describes the file's bytes exactly.
    """
    with file.open("rb") as stream:
        stamp = _stamp(stream.fileno())
        size = stamp[1]
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"`{file}` must begin with a safetensors header, got {size} bytes and a length of {length}"
            )
        header = parse_object(file, stream.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    entries = {name: _entry(file, name, value, begin, stamp) for name, value in header.items()}
    at = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise ValueError(
                f"`{file}` must hold its tensors without gaps or overlaps, got `{name}` at byte {entry.begin - begin} "
                f"of the data where {at - begin} comes next"
            )
        at = entry.end
    if at != size:
        raise ValueError(f"`{file}` must have {at} bytes as its header says, got {size}; it is truncated or corrupt")
    return entries


class Checkpoint:
    """The safetensors files of a model, as one collection of named tensors.

    Attributes:
        path: directory of the files.
        entries: every tensor by name.
        bytes_read: bytes of tensor data read so far; headers are not counted.
        names_read: tensors of which some bytes have been read.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, dict(entries)
        self.bytes_read = 0
        self.names_read: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

        Raises:
            ValueError: there is neither, a file is missing or corrupt, or index and files disagree.
        """
        if (path / SINGLE).is_file():
            return cls(path, read_header(path / SINGLE))
        if not (path / INDEX).is_file():
            others = sorted(file.name for file in path.glob("*") if file.suffix in PICKLED)
            got = f"{path} with {others[0]}" if others else f"{path}"
            raise ValueError(f"`path` must hold {SINGLE} or {INDEX}, got {got}; other formats are not read")
        return cls(path, _indexed(path))

    def check(self, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Compare with the tensors that a model needs.

        Args:
            shapes: unsharded shape of every tensor, by name.
            optional: names that may be there without being needed.

        Raises:
            ValueError: a tensor is missing, not expected, of another shape, or not of a floating dtype.
        """
        missing = sorted(shapes.keys() - self.entries.keys())
        if missing:
            raise ValueError(f"`{self.path}` must hold every tensor of the model, got none named {_some(missing)}")
        extra = sorted(self.entries.keys() - shapes.keys() - set(optional))
        if extra:
            raise ValueError(f"`{self.path}` must hold the tensors of the model only, got also {_some(extra)}")
        for name, shape in shapes.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ValueError(f"`{name}` must have shape {list(shape)} as config.json says, got {list(entry.shape)}")
            if entry.dtype not in DTYPES:
                raise ValueError(
                    f"`{name}` must have one of the dtypes {', '.join(DTYPES)}, got {entry.dtype}; "
                    "quantized checkpoints are not supported"
                )

    def verify(self) -> None:
        """Compare the files' bytes, all of them, with the sums that `sha256sum *.safetensors > SHA256SUMS` has written.

        Raises:
            ValueError: the directory holds no such list, or none of these files, or a file has another sum.
        """
        sums = _sums(self.path / SUMS)
        for file in sorted({entry.file for entry in self.entries.values()}):
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sums.get(file.name):
                wanted = sums.get(file.name, "nothing about it")
                raise ValueError(
                    f"`{file}` must have the SHA-256 that {SUMS} says ({wanted}), got {found}; it is corrupt or another"
                )

    def window_bytes(self, names: Names, dim: int, window: Range) -> int:
        """What `read` reads."""
        shape, dtype = self._form(names)
        return math.prod(_with(shape, dim, window.size)) * dtype.itemsize

    def read(self, names: Names, dim: int, window: Range) -> Tensor:
        """A range of a tensor along `dim`, in the files' dtype: one read, or one for each index before `dim`.

        Of a tensor that is made of matrices, each of which is read so, `dim` is one of its three.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        shape, dtype = self._form(names)
        out = torch.empty(_with(shape, dim, window.size), dtype=dtype)
        if isinstance(names, str):
            self._fill(out, names, dim, window)
            return out
        height = shape[1] // len(names[0])
        rows = window if dim == 1 else Range(0, shape[1])
        for index, beside in enumerate(names[slice(*window)] if dim == 0 else names):
            for place, name in enumerate(beside):
                first = place * height
                wanted = Range(*(min(max(row - first, 0), height) for row in rows))
                at = max(first - rows.start, 0)
                part = out[index, at : at + wanted.size]
                self._fill(part, name, *((1, window) if dim == 2 else (0, wanted)))
        return out

    def _form(self, names: Names) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, or of what matrices make up."""
        first = self.entries[names if isinstance(names, str) else names[0][0]]
        shape = first.shape if isinstance(names, str) else (len(names), len(names[0]) * first.shape[0], first.shape[1])
        return shape, DTYPES[first.dtype]

    def _fill(self, out: Tensor, name: str, dim: int, window: Range) -> None:
        """Read a range of one tensor of the files into contiguous memory."""
        if not out.numel():
            return
        self.names_read.add(name)
        entry = self.entries[name]
        inner = math.prod(entry.shape[dim + 1 :]) * out.itemsize
        stride, begin = entry.shape[dim] * inner, entry.begin + window.start * inner
        data = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if window.size == entry.shape[dim]:
            reads = [(begin, data)]
        else:
            chunk = window.size * inner
            reads = [(begin + i * stride, data[i * chunk :][:chunk]) for i in range(math.prod(entry.shape[:dim]))]
        with entry.file.open("rb", buffering=0) as stream:
            for offset, buffer in reads:
                self._read_into(stream.fileno(), entry.file, offset, buffer)
            if _stamp(stream.fileno()) != entry.stamp:
                raise ValueError(f"`{entry.file}` must not change while it is read, got another size, time or inode")

    def _read_into(self, descriptor: int, file: Path, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not got:
                raise ValueError(f"`{file}` must not change while it is read, got its end at byte {offset + done}")
            done += got
        self.bytes_read += done


def parse_object(file: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"`{file}` must hold valid JSON, got {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"`{file}` must hold a JSON object, got {type(header).__name__}")
    return header


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sums(file: Path) -> dict[str, str]:
    """The sums of a list by the names of their files."""
    if not file.is_file():
        raise ValueError(
            f"`path` must hold {SUMS} to be verified, got none; `sha256sum *.safetensors > {SUMS}` makes it"
        )
    lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in file.read_text(errors="replace").splitlines()]
    return {line[2]: line[1] for line in lines if line}


def _entry(file: Path, name: str, value: Any, begin: int, stamp: Stamp) -> Entry:
    """The checked header entry of one tensor."""
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and offsets == sorted(offsets[:2])):
        raise ValueError(f"`{file}` must give dtype, shape and data_offsets of each tensor, got {value!r} for `{name}`")
    if dtype in DTYPES and offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"`{name}` must have as many bytes as its shape and dtype need ({dtype} {shape}), "
            f"got {offsets[1] - offsets[0]} in {file}"
        )
    return Entry(file, dtype, tuple(shape), begin + offsets[0], begin + offsets[1], stamp)


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)


def _indexed(path: Path) -> dict[str, Entry]:
    """The tensors that the index assigns to files."""
    weight_map = parse_object(path / INDEX, (path / INDEX).read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"`{path / INDEX}` must hold a `weight_map` from tensors to files, got {weight_map!r:.80}")
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"`{path / INDEX}` must name files beside it, got {file}, which is not there")
        headers[file] = read_header(path / file)
    stray = sorted((name, file) for file, names in headers.items() for name in names if weight_map.get(name) != file)
    if stray:
        raise ValueError(
            f"`{path / INDEX}` must name every tensor of its files, got also `{stray[0][0]}` in {stray[0][1]}"
        )
    absent = sorted((name, file) for name, file in weight_map.items() if name not in headers[file])
    if absent:
        raise ValueError(
            f"`{path / INDEX}` must name tensors of its files, got `{absent[0][0]}`, not in {absent[0][1]}"
        )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
