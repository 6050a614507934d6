"""Whether cutting a batch changes the bits of its rows, found out by trying.

A chunk of a batch equals those rows of the whole batch mathematically. Bit for bit it does where each kernel adds up a
row in the same order however many rows there are, which libraries neither promise nor tell: they choose kernels by the
number of rows, and treat the last few of them apart. They do not choose by the values, so random values of the real
shapes, on the real weights, show what they do on this machine with this number of threads.

What was seen (a Xeon with AVX-512, one thread, November 2026): products of chunks of 16 rows and more, cut at multiples
of 16, are row-invariant for up to 256 input features, in bfloat16 up to 128; those of fewer rows than 16 or of more
features mostly are not. Causal attention is cut-invariant where requests stay whole; if deterministic, and under a
window anyway, also where they are cut at multiples of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.kernels.attention import attention
from seqpar.kernels.linear import linear
from seqpar.partition import Range, even_ranges
from seqpar.ragged import RaggedBatch

__all__ = ["is_cut_invariant", "is_row_invariant"]


@torch.no_grad()
def is_row_invariant(
    weight: Float[Tensor, "f m"],
    num_tokens: int,
    cuts: Sequence[int],
    *,
    bias: Float[Tensor, " f"] | None = None,
    sp: int = 1,
) -> bool:
    """Whether `linear` of each chunk gives the bits that `linear` of all tokens gives its rows, here and now.

    Args:
        weight: The layer's own, since its size, dtype, strides and place in memory decide.
        num_tokens: Tokens of the step.
        cuts: First tokens of all chunks but the first.
        bias: The layer's, if it has one.
        sp: Ranks that share the tokens of a step, or of each chunk, out evenly.

    Raises:
        ValueError: cuts that are not in order or not within the step.
    """
    bounds = _bounds(num_tokens, cuts)
    x = _random(num_tokens, weight.shape[1], like=weight)
    whole, parts = (
        [linear(x[a:b].clone(), weight, bias) for a, b in _shares(ends, sp)] for ends in ((0, num_tokens), bounds)
    )
    return torch.equal(torch.cat(whole), torch.cat(parts))


@torch.no_grad()
def is_cut_invariant(
    batch: RaggedBatch,
    cuts: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
    deterministic: bool = False,
) -> bool:
    """Whether `attention` of each chunk, over its predecessors' keys too, gives the bits of all tokens at once.

    Args:
        batch: The step; only its lengths and its device matter.
        cuts: First tokens of all chunks but the first.
        num_heads: Query heads of one rank.
        num_kv_heads: Its KV heads.
        head_dim: D.
        dtype: Of the activations.
        window: Keys that a token sees, itself included; None for all before it.
        deterministic: As layers of a deterministic mesh compute it.

    Raises:
        ValueError: cuts that are not in order or not within the step; heads of nothing.
    """
    _bounds(batch.num_tokens, cuts)
    if min(num_heads, num_kv_heads, head_dim) < 1 or not dtype.is_floating_point:
        raise ValueError(
            "`num_heads`, `num_kv_heads` and `head_dim` must be at least 1 and `dtype` a floating one, got "
            f"{num_heads}, {num_kv_heads}, {head_dim} and {dtype}"
        )
    page_size = max(1, *batch.kv_lens) if batch.kv_lens else 1
    pages = [[request] for request in range(batch.num_requests)]
    batch = RaggedBatch.build(batch.q_lens, batch.kv_lens, pages, page_size, device=batch.device)
    like = torch.empty(0, dtype=dtype, device=batch.device)
    q = _random(batch.num_tokens, num_heads, head_dim, like=like)
    k, v = _random(2, len(pages), page_size, num_kv_heads, head_dim, like=like)
    given = [x.flatten(0, 1)[batch.slots] for x in (k, v)]

    def attend(rows: slice, part: RaggedBatch) -> Tensor:
        if part.kv_lens == part.q_lens:  # as layers do: the keys are at hand
            keys, values = (x[rows] for x in given)
            return attention(q[rows], keys, values, part.without_cache, window=window, deterministic=deterministic)[0]
        return attention(q[rows], k, v, part, window=window, deterministic=deterministic)[0]

    bounds = [0, *cuts, batch.num_tokens]
    parts = [attend(slice(a, b), part) for (a, b), part in zip(pairwise(bounds), batch.split(cuts), strict=True)]
    return torch.equal(attend(slice(0, batch.num_tokens), batch), torch.cat(parts))


def _bounds(num_tokens: int, cuts: Sequence[int]) -> tuple[int, ...]:
    bounds = (0, *cuts, num_tokens)
    if any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"`cuts` must be in order and lie in [0, {num_tokens}], got {list(cuts)}")
    return bounds


def _shares(bounds: Sequence[int], sp: int) -> list[Range]:
    """The tokens of every rank in the first chunk, then those in the second, and so on."""
    return [share.shift(a) for a, b in pairwise(bounds) for share in even_ranges(b - a, sp)]


def _random(*shape: int, like: Tensor) -> Tensor:
    """Normal values, the same at every call: their products round at every addition."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
