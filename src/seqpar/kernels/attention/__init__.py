"""Attention over ragged, paged, causal, grouped-query and sliding-window input, with the log-sum-exp of its scores."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.attention import named, pytorch, reference, varlen
from seqpar.kernels.dispatch import Backend, NamedBackend, auto_backend, unknown_backend, wants_grad
from seqpar.kernels.merge.sinks import check_sinks
from seqpar.kernels.rows import FP8, Scales
from seqpar.kernels.rows.fp8 import decode
from seqpar.ragged import RaggedBatch

__all__ = ["attention"]


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "*keys g d"],
    v: Float[Tensor, "*keys g d"],
    batch: RaggedBatch,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    kv_head_of: tuple[int, ...] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scales: Scales | None = None,
    deterministic: bool = False,
    backend: Backend | NamedBackend = "auto",
) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t h"]]:
    """What each new token gathers from the keys of its request that it may see, and the mass it saw.

    In:    q[T, H, D]; k, v either flat [sum(kv_lens), G, D], the requests one after another, when the batch has no
           cache, or pages [pages, page_size, G, D] that hold the new tokens already. Views with unit stride in D are
           read in place.
    Out:   out[T, H, D] in the dtype of q; lse[T, H], natural log, float32 (float64 for float64), of all that is in the
           softmax, the sinks included; both contiguous. Of partials that are to be merged, give the sinks to one, or
           to none and `add_sinks` to the merged one.
    Grad:  to q, k, v and the sinks through `out`; through `lse` with backend="reference" only, elsewhere an error.

    Args:
        q: Queries of the new tokens.
        k: Keys.
        v: Values.
        batch: Whose tokens these are; always causal, by index in the request.
        softmax_scale: Factor on the scores; D ** -0.5 by default.
        window: Keys that a token sees, itself included; None for all before it.
        kv_head_of: KV head that each query head reads, non-decreasing; query heads are shared out evenly by default.
        sinks: A score of each query head that joins its softmax and has no value (gpt-oss), in any floating dtype; -inf
            is none. They cost a pass over `out` each way and no further call of an operator (20 us of a decode on
            one Xeon core, November 2026); only on CUDA in half precision does training with them run on the
            memory-efficient operator instead of FlashAttention.
        scales: Those of keys and values that are stored in 8 bits (`PagedKV.scales`), which are then float8_e4m3fn; of
            those that are read the bits are the same with every backend. "torch" makes a copy of all that are read;
            "triton" takes bfloat16 and float16 queries with a head_dim of at most 128.
        deterministic: On a CPU, compute a request's new tokens in blocks of 64, so that chunks cut at multiples of 64
            give the bits of all at once (`is_cut_invariant`). Prompts of 512 and 2048 tokens take 0.8 and 1.25 times
            as long as otherwise (16 / 4 heads of 64; one Xeon core, November 2026). With backend="triton" prompts are
            so in any case; decodes have their keys split every 1024, not as suits the batch, and then do not depend on
            other requests.
        backend: "torch" (fused operators), "triton" (on a GPU, without gradients), "reference" (the definition), or
            "auto", see `choose_backend`: of the first two the one for the device, "torch" where a gradient is wanted;
            "flashinfer" or "flash_attn" where that package is installed (on a GPU, without gradients).

    Raises:
        ValueError: shapes, dtypes, devices, the window, the head map or the sinks contradict each other; a batch whose
            lengths are the device's (`RaggedBatch.decodes`) with another backend than "triton"; with
            "triton", what its kernels do not take: another dtype than float32, bfloat16 and float16, a head_dim above
            256 or that is no multiple of 16 bytes, rows that are not aligned to as many, pages that are not there;
            with a named package, that it is not installed, and what it does not take.
    """
    wide = k.dtype if scales is None else q.dtype
    key = ("attention", q.shape, k.shape, v.shape, q.dtype, wide, v.dtype, q.device, k.device, window, kv_head_of)
    heads: tuple[int, ...] | None = batch.plans.get(key)
    if heads is None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "`batch` must have been attended to once before it is traced, since its plans are made by the host, "
                "got one without them; call `attention` with it first"
            )
        heads = batch.plans[key] = _check(q, k, v, batch, window, kv_head_of, scales is not None)
    if scales is not None:
        _check_scales(k, v, scales)
    if sinks is not None:
        check_sinks(sinks, q)
    grad = wants_grad(q, k, v, *(() if sinks is None else (sinks,)))
    if backend == "auto":
        backend = auto_backend("attention", q.device, q.dtype)
        if backend == "triton" and (grad or (scales is not None and not _triton_reads_scales(q))):
            backend = "torch"
    if not batch.exact and backend != "triton":
        raise ValueError(
            f'`batch` must have lengths that the host knows for backend="{backend}"; "triton" reads others'
        )
    if not heads or not batch.num_tokens:
        return _nothing(q, k, v, sinks)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    options: dict[str, Any] = {"softmax_scale": scale, "window": window, "kv_head_of": heads, "sinks": sinks}
    if backend == "triton":
        from seqpar.kernels.attention import launch

        launch.check(q, k, v, batch, softmax_scale=scale, grad=grad, encoded=scales is not None)
        return launch.attention(q, k, v, batch, scales=scales, deterministic=deterministic, **options)
    if scales is not None and backend in ("torch", "reference"):
        k, v, batch = _decoded(k, v, scales, batch, q.dtype)
    if backend == "torch":
        return pytorch.attention(q, k, v, batch, deterministic=deterministic, **options)
    if backend == "reference":
        return reference.attention(q, k, v, batch, **options)
    if backend == "flashinfer" or backend == "flash_attn":
        named.check(backend, q, k, v, batch, grad=grad, deterministic=deterministic, encoded=scales is not None)
        return named.attention(backend, q, k, v, batch, **options)
    raise unknown_backend(backend, "triton", *named.NAMED)


def _triton_reads_scales(q: Tensor) -> bool:
    """Whether the Triton kernels take these queries over keys in 8 bits."""
    from seqpar.kernels.attention.triton import takes_scales

    return takes_scales(q.shape[2], q.itemsize)


def _check_scales(k: Tensor, v: Tensor, scales: Scales) -> None:
    if k.dtype != FP8 or v.dtype != FP8:
        raise ValueError(f"`k` and `v` must be {FP8} with `scales`, got {k.dtype} and {v.dtype}")
    if any(x.shape != k.shape[:-1] or x.dtype != torch.uint8 or x.device != k.device for x in scales):
        raise ValueError(
            f"`scales` must be two of {list(k.shape[:-1])} in torch.uint8 on {k.device}, got "
            f"{[list(x.shape) for x in scales]} in {[x.dtype for x in scales]} on {[str(x.device) for x in scales]}"
        )


def _decoded(
    k: Tensor, v: Tensor, scales: Scales, batch: RaggedBatch, dtype: torch.dtype
) -> tuple[Tensor, Tensor, RaggedBatch]:
    """The keys and values of a batch in a dtype, one request after another, and the batch that they belong to."""
    if not batch.has_cache:
        return decode(k, scales[0], dtype), decode(v, scales[1], dtype), batch
    addresses = varlen.key_addresses(batch)
    flat: RaggedBatch | None = batch.plans.get("attention.flat")
    if flat is None:
        flat = RaggedBatch.build(batch.q_lens, batch.kv_lens, positions=batch.positions, device=batch.device)
        batch.plans["attention.flat"] = flat
    codes = (x.view(torch.uint8).flatten(0, 1)[addresses].view(FP8) for x in (k, v))
    keys, values = (decode(x, scale.flatten(0, 1)[addresses], dtype) for x, scale in zip(codes, scales, strict=True))
    return keys, values, flat


def _nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The empty result, still a function of all inputs: a rank without tokens has collectives in backward too."""
    out = q + k[:0].sum() + v[:0].sum() + (0 if sinks is None else sinks[:0].sum().to(q.dtype))
    return out, out.sum(-1).to(torch.promote_types(q.dtype, torch.float32))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    window: int | None,
    kv_head_of: tuple[int, ...] | None,
    encoded: bool,
) -> tuple[int, ...]:
    """The KV head of each query head, once everything fits together."""
    if q.dim() != 3 or len(q) != batch.num_tokens:
        raise ValueError(f"`q` must be [{batch.num_tokens} tokens, heads, head_dim], got {list(q.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"`v` must have the shape of `k` ({list(k.shape)}), got {list(v.shape)}")
    if batch.has_cache and (k.dim() != 4 or k.shape[1] != batch.page_size):
        raise ValueError(f"`k` must be pages [pages, {batch.page_size}, kv_heads, head_dim], got {list(k.shape)}")
    if not batch.has_cache and (k.dim() != 3 or len(k) != batch.kv_starts[-1]):
        raise ValueError(f"`k` must be [{batch.kv_starts[-1]} keys, kv_heads, head_dim], got {list(k.shape)}")
    if k.shape[-1] != q.shape[2] or q.shape[2] == 0:
        raise ValueError(f"`k` must have the head_dim of `q` ({q.shape[2]}), at least 1, got {k.shape[-1]}")
    if not (encoded or q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"`q`, `k`, `v` must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"`q`, `k`, `v` must be on one device, got {q.device}, {k.device}, {v.device}")
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1, since a token sees itself, got {window}; None is no window")
    return _check_heads(q.shape[1], k.shape[-2], kv_head_of)


def _check_heads(num_heads: int, num_kv_heads: int, kv_head_of: tuple[int, ...] | None) -> tuple[int, ...]:
    if kv_head_of is None:
        if num_heads and (num_kv_heads == 0 or num_heads % num_kv_heads):
            raise ValueError(
                f"`q` must have a multiple of the KV heads ({num_kv_heads}), got {num_heads}; "
                "pass `kv_head_of` where heads are shared out unevenly"
            )
        return tuple(head * num_kv_heads // num_heads for head in range(num_heads))
    inside = all(0 <= head < num_kv_heads for head in kv_head_of)
    if len(kv_head_of) != num_heads or not inside or list(kv_head_of) != sorted(kv_head_of):
        raise ValueError(
            f"`kv_head_of` must give each of {num_heads} query heads one of {num_kv_heads} KV heads, "
            f"non-decreasing, got {kv_head_of}"
        )
    return kv_head_of
