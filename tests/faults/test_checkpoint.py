"""Checkpoints that are damaged, lie or change meanwhile: an error on every rank, though one rank alone sees it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seqpar import comm, hf
from seqpar.hf.checkpoint import Checkpoint
from tests.hf.test_checkpoint import FILE, SHAPES, TENSORS
from tests.hf.test_load import saved
from tests.ranks import run_mesh


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_every_bit_of_a_header(tmp_path: Path, step: int) -> None:
    """It is seen, or it says nothing of a tensor."""
    file = tmp_path / FILE
    save_file(TENSORS, file, metadata={"format": "pt"})
    raw, entries = file.read_bytes(), Checkpoint.open(tmp_path).entries
    start = 8 + int.from_bytes(raw[:8], "little")
    said = [(name, entry[1:5]) for name, entry in sorted(entries.items())]
    unseen = 0
    for bit in range(0, 8 * start, step):
        file.write_bytes(flipped(raw, bit))
        try:
            found = Checkpoint.open(tmp_path)
            found.check(SHAPES)
        except ValueError:
            continue
        assert [(name, entry[1:5]) for name, entry in sorted(found.entries.items())] == said, bit
        unseen += 1
    assert unseen < 8 * len('"__metadata__":{"format":"pt"}') + 64, "those of the metadata, and of the padding"


def lists(path: Path) -> None:
    """As `sha256sum *.safetensors > SHA256SUMS`."""
    files = sorted(path.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (path / "SHA256SUMS").write_text("".join(lines))


def test_any_bit_of_the_data_where_sums_are_compared(tmp_path: Path) -> None:
    file = tmp_path / FILE
    save_file(TENSORS, file)
    with pytest.raises(ValueError, match="`path` must hold SHA256SUMS to be verified, got none; `sha256sum"):
        Checkpoint.open(tmp_path).verify()
    lists(tmp_path)
    raw = file.read_bytes()
    Checkpoint.open(tmp_path).verify()
    start = 8 + int.from_bytes(raw[:8], "little")
    for bit in range(8 * start, 8 * len(raw), 101):
        file.write_bytes(flipped(raw, bit))
        with pytest.raises(ValueError, match=r"must have the SHA-256 that SHA256SUMS says .*, got .*; it is corrupt"):
            Checkpoint.open(tmp_path).verify()
    file.write_bytes(raw)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *other.safetensors\n\xff\nnonsense\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS says \(nothing about it\)"):
        Checkpoint.open(tmp_path).verify()


def grows(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


def is_written(file: Path) -> None:
    """In place, as many bytes."""
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\0" * 8)


def is_replaced(file: Path) -> None:
    """By another one of the same size and time."""
    status, beside = file.stat(), file.with_suffix(".other")
    beside.write_bytes(file.read_bytes())
    os.utime(beside, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(beside, file)


def shrinks(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


CHANGES = (grows, is_written, is_replaced, shrinks)


def changes(mesh: comm.DeviceMesh, path: Path, change: Callable[[Path], None]) -> None:
    """After a few tensors, and while rank 0 may be through with all of them."""
    plain, left = Checkpoint.read, [5]

    def read(self: Checkpoint, *args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            change(path / FILE)
        return plain(self, *args)

    if comm.groups(mesh).flat.rank() == 1:
        Checkpoint.read = read  # type: ignore[method-assign]
    try:
        with pytest.raises(ValueError, match=rf"`.*{FILE}` must not change while it is read, got"):
            hf.load(path, mesh, progress=False)
    finally:
        Checkpoint.read = plain  # type: ignore[method-assign]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_checkpoint_that_changes_during_the_load(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = saved(tmp_path, "llama", num_hidden_layers=1)
    run_mesh((2, 1), changes, path, change)


def verifies(mesh: comm.DeviceMesh, good: Path, bad: Path) -> None:
    hf.load(good, mesh, verify=True, progress=False)
    mine = bad if comm.groups(mesh).flat.rank() == 1 else good
    hf.load(mine, mesh, progress=False)  # a bit of a number is one number or another
    with pytest.raises(ValueError, match=r"must have the SHA-256 that SHA256SUMS says .*, got .*; it is corrupt"):
        hf.load(mine, mesh, verify=True, progress=False)


def test_a_bit_on_the_disk_of_one_rank(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        lists(saved(tmp_path / name, "llama", num_hidden_layers=1))
    file = tmp_path / "bad" / FILE
    file.write_bytes(flipped(file.read_bytes(), 8 * file.stat().st_size - 3))
    run_mesh((2, 1), verifies, tmp_path / "good", tmp_path / "bad")


def test_a_header_that_lies(tmp_path: Path) -> None:
    """Of sizes beyond all memory, of numbers that are none: refused before anything is allocated."""
    file = tmp_path / FILE
    save_file({"a": torch.zeros(4)}, file)
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    lies: list[dict[str, Any]] = [
        {"shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 1 << 62]},
        {"shape": [4], "data_offsets": [-16, 0]},
        {"shape": [4.0], "data_offsets": [0, 16]},
        {"shape": [1e400], "data_offsets": [0, 16]},
        {"shape": "4", "data_offsets": [0, 16]},
        {"shape": [0, 1 << 70], "data_offsets": [0, 16]},
        {"shape": [[4]], "data_offsets": [0, 16]},
    ]
    for lie in lies:
        header = json.dumps({"a": {"dtype": "F32", **lie}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[start:])
        with pytest.raises(ValueError, match="must "):
            Checkpoint.open(tmp_path)
    deep = b"[" * 100_000
    file.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ValueError, match="must hold valid JSON"):
        Checkpoint.open(tmp_path)


class Bomb:
    """Who unpickles it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "unpickled")


def refuses_pickles(mesh: comm.DeviceMesh, path: Path) -> None:
    weights = (path / FILE).read_bytes()
    for name in ("pytorch_model.bin", "model.pt", FILE):
        (path / FILE).unlink()
        (path / name).write_bytes(pickle.dumps(Bomb(path / "exploded")))
        said = "must begin with a safetensors header" if name == FILE else f"with {name}; other formats are not read"
        with pytest.raises(ValueError, match=re.escape(said)):
            hf.load(path, mesh, progress=False, verify=name == FILE)
        (path / name).unlink()
        (path / FILE).write_bytes(weights)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(path / "exploded")))
    hf.load(path, mesh, progress=False)  # beside what is read, it is not looked at
    assert not (path / "exploded").exists()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    run_mesh((1, 1), refuses_pickles, saved(tmp_path, "llama", num_hidden_layers=1))


LOADERS = {"numpy.load", "np.load", "torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load"}
UNPICKLERS = {"cloudpickle", "cPickle", "dill", "joblib", "marshal", "pickle", "shelve"}
BETWEEN_RANKS = {
    "batching/sharing.py": "what rank 0 says to the others",
    "batching/fusion.py": "tries whether a name travels",
}
"""Who pickles what never was in a file."""


def test_no_file_can_be_unpickled() -> None:
    """Nothing in the package could: no module that does is imported, and no loader of PyTorch's or NumPy's is named."""
    source = Path(hf.__file__).parent.parent
    assert len(list(source.rglob("*.py"))) > 50
    for path in source.rglob("*.py"):
        where = str(path.relative_to(source))
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute) and node.attr == "load":
                names = [ast.unparse(node)]
            found = {name for name in names if name.split(".")[0] in UNPICKLERS or name in LOADERS}
            assert not found or where in BETWEEN_RANKS, f"{where}: {found}"
