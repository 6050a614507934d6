"""Attention by packages that are not required: what they take, and the way to them.

A package is imported where its backend is first named. What it cannot do is refused here by name, before it is asked,
so that its own errors are not what a user meets. Uneven heads are a call for each run of heads; sinks rescale what
comes back, since not every version and kernel of theirs knows them.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.attention.plan import head_runs
from seqpar.kernels.dispatch import NamedBackend
from seqpar.kernels.merge.sinks import weigh
from seqpar.ragged import RaggedBatch

__all__ = ["NAMED", "attention", "check"]

NAMED: tuple[str, ...] = get_args(NamedBackend)
DEVICES = frozenset({"cuda"})
DTYPES = (torch.bfloat16, torch.float16)


class _Package(NamedTuple):
    """What is known of a package without asking it."""

    module: str
    install: str
    dims: Collection[int]
    dims_in_words: str
    page_multiple: int


PACKAGES: dict[NamedBackend, _Package] = {
    "flashinfer": _Package("flashinfer", "flashinfer-python", (64, 128, 256), "64, 128 or 256", 1),
    "flash_attn": _Package("flash_attn", "flash-attn", range(8, 257, 8), "a multiple of 8 up to 256", 256),
}


def check(
    backend: NamedBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    *,
    grad: bool,
    deterministic: bool,
    encoded: bool,
) -> None:
    """Raise ValueError for what a package does not take, and where it is not installed."""
    package, takes = PACKAGES[backend], f'for backend="{backend}"'
    if encoded:
        raise ValueError(
            f"`scales` must be None {takes}, which has none for each token, got some; "
            'backend="triton" and "torch" take them'
        )
    if q.device.type not in DEVICES:
        raise ValueError(f'`q` must be on a GPU {takes}, got {q.device}; backend="torch" takes it')
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(
            f'`q` and `k` must be bfloat16 or float16 {takes}, got {q.dtype} and {k.dtype}; backend="triton" takes them'
        )
    if q.shape[2] not in package.dims:
        raise ValueError(
            f"`q` must have a head_dim of {package.dims_in_words} {takes}, got {q.shape[2]}; "
            'backend="triton" takes more of them'
        )
    if grad:
        raise ValueError(
            f'`q`, `k`, `v` and `sinks` must need no gradient {takes}, got one that does; backend="torch" takes them'
        )
    if deterministic:
        raise ValueError(
            f"`deterministic` must be False {takes}, whose splits depend on the batch, got True; "
            'backend="triton" takes it'
        )
    if batch.has_cache and batch.page_size % package.page_multiple:
        raise ValueError(
            f"`batch` must have pages of a multiple of {package.page_multiple} tokens {takes}, got "
            f'{batch.page_size}; backend="triton" takes any'
        )
    strides = [x.stride() for x in (k, v)]
    if q.stride(-1) != 1 or k.stride(-1) != 1 or strides[0] != strides[1]:
        raise ValueError(
            f"`q`, `k`, `v` must have unit stride in head_dim, and `k` and `v` the same strides, {takes}, got "
            f"{q.stride()}, {strides[0]}, {strides[1]}; make them contiguous"
        )
    _module(backend)


def attention(
    backend: NamedBackend,
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float,
    window: int | None,
    kv_head_of: tuple[int, ...],
    sinks: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """`seqpar.kernels.attention.reference`, without gradients; arguments that `check` has passed."""
    module, parts = _module(backend), []
    for run in head_runs(kv_head_of):
        keys, values = (x[..., run.kv_start : run.kv_stop, :] for x in (k, v))
        rows = q[:, run.q_start : run.q_stop]
        parts.append(_run(backend, module, rows, keys, values, batch, softmax_scale, window))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(each, 1) for each in zip(*parts, strict=True))
    lse = lse.contiguous()
    if sinks is not None:
        share, lse = weigh(lse, sinks)
        out = (out * share[..., None]).to(out.dtype)
    return out.contiguous(), lse


def _run(
    backend: NamedBackend,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if backend == "flashinfer":
        from seqpar.kernels.attention import flashinfer

        return flashinfer.attention(module, q, k, v, batch, scale, window)
    from seqpar.kernels.attention import flash_attn

    return flash_attn.attention(module, q, k, v, batch, scale, window)


def _module(backend: NamedBackend) -> Any:
    package = PACKAGES[backend]
    try:
        return import_module(package.module)
    except ImportError as error:
        raise ValueError(
            f'`backend` must be one that is installed, got "{backend}" without it ({error}); '
            f"pip install {package.install}"
        ) from error
