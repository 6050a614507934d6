"""One request's keys and values outside its cache: in host memory, or in a file.

A request that gives way to others is saved, freed, and restored when there is room again; nothing is computed twice. A
file takes it to another process, and past the end of this one. Tokens are stored in order, without pages, so that the
cache that takes them may have other ones, or more of them.

A file is safetensors: `k` and `v` [layers, tokens, heads, head_dim] as the cache stores them, and the number of tokens
and whose share of them it is. It is written beside its place and then put there, so that an interruption leaves what
was there before; nothing in it is ever executed, and it is checked whole before a cache is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqpar.kv.paged import PagedKV
from seqpar.kv.striped import StripedKV
from seqpar.partition import Striping

__all__ = ["SavedKV", "load_request", "save_request"]

_FORMAT = "seqpar.kv.request/1"

WHOLE = Striping(1)
"""All tokens on one rank."""


@dataclass(frozen=True, eq=False)
class SavedKV:
    """Keys and values of one request, in host memory.

    Attributes:
        k: what a rank stores, of all layers.
        v: likewise.
        length: tokens of the request, over all ranks.
        striping: who holds which of them.
        rank: whose these are.

    Raises:
        ValueError: keys and values of different shapes or dtypes, or another number of tokens than the rank's share.
    """

    k: Float[Tensor, "layers stored g d"]
    v: Float[Tensor, "layers stored g d"]
    length: int
    striping: Striping = WHOLE
    rank: int = 0

    def __post_init__(self) -> None:
        if self.length < 0 or not 0 <= self.rank < self.striping.ranks:
            raise ValueError(
                f"`length` must be at least 0 and `rank` one of {self.striping.ranks}, "
                f"got {self.length} and {self.rank}"
            )
        stored = self.striping.local_len(self.length, self.rank)
        shapes = [list(self.k.shape), list(self.v.shape)]
        if self.k.shape != self.v.shape or self.k.dtype != self.v.dtype or self.k.dim() != 4:
            raise ValueError(
                f"`k` and `v` must have one shape [layers, tokens, heads, head_dim] and one dtype, got {shapes} in "
                f"{self.k.dtype} and {self.v.dtype}"
            )
        if self.k.shape[1] != stored:
            raise ValueError(f"`k` and `v` must have the {stored} tokens that their rank stores, got {shapes}")

    @classmethod
    @torch.inference_mode(False)  # it may be restored in another mode
    def of(cls, kv: PagedKV, request: Hashable) -> SavedKV:
        """Copy a request out of its cache, which keeps it until it is told to `free` it.

        Raises:
            ValueError: the request is not held, or some of its tokens are not appended in all layers.
        """
        for layer in range(kv.num_layers):
            kv.check_appended(layer, [request])
        striping, rank = _share(kv)
        length = kv.length(request)
        shape = (kv.num_layers, striping.local_len(length, rank), kv.num_kv_heads, kv.head_dim)
        k, v = (torch.empty(shape, dtype=kv.dtype) for _ in range(2))
        for layer in range(kv.num_layers):
            for host, part in zip((k, v), kv.gather(layer, [request]), strict=True):
                host[layer].copy_(part)
        return cls(k, v, length, striping, rank)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def restore(self, kv: PagedKV, request: Hashable) -> None:
        """Put the request into a cache, under any name; all its tokens are then appended in all layers.

        Raises:
            OutOfPages: there is no room for it; then nothing has changed.
            ValueError: the name is held, or the cache has other layers, heads, sizes, dtype or another rank's share;
                likewise.
        """
        if request in kv:
            raise ValueError(f"`request` must not be held yet, got {request!r}; free it first")
        wanted = (kv.num_layers, kv.num_kv_heads, kv.head_dim)
        layers, _, heads, head_dim = self.k.shape
        if (layers, heads, head_dim) != wanted or self.k.dtype != kv.dtype:
            raise ValueError(
                f"a saved request must have the cache's layers, heads and head_dim {wanted} in {kv.dtype}, "
                f"got {(layers, heads, head_dim)} in {self.k.dtype}"
            )
        if _share(kv) != (self.striping, self.rank):
            raise ValueError(
                f"a saved request must be of the cache's share of the tokens, {_words(*_share(kv))}, "
                f"got {_words(self.striping, self.rank)}; restore it where it was saved, then convert"
            )
        batch = kv.batch([request], [self.length])
        for layer in range(layers):
            k, v = self.k[layer].to(kv.device), self.v[layer].to(kv.device)
            if isinstance(kv, StripedKV):
                kv.append_own(layer, k, v, batch)
            else:
                kv.append(layer, k, v, batch)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `read` reads, in place of what `path` may have been."""
        told = {"length": self.length, "ranks": self.striping.ranks, "interleave": self.striping.interleave}
        metadata = {"format": _FORMAT, "request": json.dumps({**told, "rank": self.rank})}
        beside = Path(f"{os.fspath(path)}.{os.getpid()}.part")
        try:
            save_file({"k": self.k, "v": self.v}, beside, metadata)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    @torch.inference_mode(False)
    def read(cls, path: str | os.PathLike[str]) -> SavedKV:
        """Read a file that `write` has written.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is truncated, or no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                if told.get("format") != _FORMAT or sorted(file.keys()) != ["k", "v"]:
                    raise ValueError(f"{_FORMAT!r} with `k` and `v` is expected, got {told.get('format')!r}")
                share = json.loads(told["request"])
                striping = Striping(share["ranks"], share["interleave"])
                k, v = (file.get_tensor(name).clone() for name in "kv")  # the file may change under a map
            return cls(k, v, int(share["length"]), striping, int(share["rank"]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`path` must be a whole file of a saved request, got {os.fspath(path)}: {error}"
            ) from error


def save_request(kv: PagedKV, request: Hashable, path: str | os.PathLike[str]) -> None:
    """Write what a cache holds of a request to a file; every rank its own, under its own path.

    Raises:
        ValueError: as `SavedKV.of`.
    """
    SavedKV.of(kv, request).write(path)


def load_request(kv: PagedKV, request: Hashable, path: str | os.PathLike[str]) -> None:
    """Put a request that was saved into a cache, under any name.

    Raises:
        FileNotFoundError: there is no such file.
        OutOfPages: there is no room for it; then nothing has changed.
        ValueError: as `SavedKV.read` and `SavedKV.restore`; likewise.
    """
    SavedKV.read(path).restore(kv, request)


def _share(kv: PagedKV) -> tuple[Striping, int]:
    """Whose share of the tokens a cache stores."""
    if isinstance(kv, StripedKV) and kv.striping.ranks > 1:
        return kv.striping, kv.rank
    return WHOLE, 0


def _words(striping: Striping, rank: int) -> str:
    if striping.ranks == 1:
        return "all of them"
    return f"rank {rank} of {striping.ranks} in runs of {striping.interleave}"
