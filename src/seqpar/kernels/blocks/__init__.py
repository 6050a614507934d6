"""What blocks of keys are like, what scores they may have, and which of them carry how much of a softmax.

Blocks are consecutive and tile the keys. "triton" takes float32, bfloat16 and float16, a head_dim of up to 256, blocks
of up to 1024 keys, and up to 8192 of them to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar.kernels.blocks import reference
from seqpar.kernels.blocks.reference import block_means
from seqpar.kernels.dispatch import Backend, choose_backend, refuse_dtype, unknown_backend
from seqpar.partition import Range

__all__ = ["block_balls", "block_masses", "block_means", "score_bounds", "smallest_cover"]

MOST_DIM, MOST_KEYS, MOST_BLOCKS = 256, 1024, 8192


def block_balls(
    k: Float[Tensor, "n g d"], blocks: Sequence[Range], *, backend: Backend = "auto"
) -> tuple[Float[Tensor, "b g d"], Float[Tensor, "b g"]]:
    """The mean of each block and head, and how far the key furthest from it is; in at least float32.

    Raises:
        ValueError: blocks that do not tile the keys or have none; what "triton" does not take.
    """
    if not _tile(blocks, len(k)) or any(not block.size for block in blocks):
        raise ValueError(f"`blocks` must have keys and tile the {len(k)} that there are, got {list(blocks)}")
    if _is_triton(backend, k):
        from seqpar.kernels.blocks import triton

        _check_dim(k)
        return triton.block_balls(k, blocks)
    return reference.block_balls(k, blocks)


def score_bounds(
    q: Float[Tensor, "s h d"],
    centre: Float[Tensor, "b g d"],
    radius: Float[Tensor, "b g"],
    *,
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
    backend: Backend = "auto",
) -> Float[Tensor, "s h b"]:
    """What no score of a query with a key of a block exceeds, up to rounding: that of the centre, and |q| radius more.

    Args:
        q: Queries.
        centre: Of each block and KV head, in float32 or float64.
        radius: Likewise.
        softmax_scale: Factor on the scores, not negative.
        kv_head_of: KV head that each query head reads, non-decreasing.
        backend: See `kernels.attention`.

    Raises:
        ValueError: heads that are not there, another dtype; what "triton" does not take.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if len(kv_head_of) != q.shape[1] or any(not 0 <= head < centre.shape[1] for head in kv_head_of):
        raise ValueError(
            f"`kv_head_of` must give each of {q.shape[1]} query heads one of {centre.shape[1]}, got {kv_head_of}"
        )
    if (centre.dtype, radius.dtype) != (wide, wide) or softmax_scale < 0:
        raise ValueError(
            f"`centre` and `radius` must be {wide} and `softmax_scale` at least 0, got {centre.dtype}, {radius.dtype} "
            f"and {softmax_scale}"
        )
    if _is_triton(backend, q):
        from seqpar.kernels.blocks import triton

        _check_dim(q)
        return triton.score_bounds(q, centre, radius, softmax_scale, kv_head_of)
    return reference.score_bounds(q, centre, radius, softmax_scale, kv_head_of)


def block_masses(
    scores: Float[Tensor, "*rows n"],
    so_far: Float[Tensor, "*rows"],
    blocks: Sequence[Range],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*rows b"], Float[Tensor, "*rows"]]:
    """The share of a softmax that each block of keys has, and what was there before.

    Args:
        scores: of all keys, which the blocks tile; -inf for those that are not seen.
        so_far: log-sum-exp of the other keys, finite.
        blocks: which keys lie together; they may be empty.
        backend: See `kernels.attention`.

    Raises:
        ValueError: blocks that do not tile the keys; what "triton" does not take.
    """
    if not _tile(blocks, scores.shape[-1]):
        raise ValueError(f"`blocks` must tile the {scores.shape[-1]} keys that there are, got {list(blocks)}")
    if _is_triton(backend, scores):
        from seqpar.kernels.blocks import triton

        most = max((block.size for block in blocks), default=0)
        if most > MOST_KEYS or scores.dtype != torch.float32:
            raise ValueError(
                f'`blocks` must have at most {MOST_KEYS} keys and scores be float32 for backend="triton", got {most} '
                f'and {scores.dtype}; backend="torch" takes them'
            )
        return triton.block_masses(scores, so_far, blocks)
    return reference.block_masses(scores, so_far, blocks)


def smallest_cover(
    mass: Float[Tensor, "*rows b"], base: Float[Tensor, "*rows"], coverage: float, *, backend: Backend = "auto"
) -> Bool[Tensor, "*rows b"]:
    """The fewest blocks of each row that raise its mass to the coverage of all: the largest ones, none that have none.

    Where two choices are equally good but for rounding, backends may choose differently.

    Args:
        mass: of each block, not negative.
        base: what the row has in any case.
        coverage: share of base and all blocks together.
        backend: See `kernels.attention`.

    Raises:
        ValueError: what "triton" does not take.
    """
    if _is_triton(backend, mass):
        from seqpar.kernels.blocks import triton

        if mass.shape[-1] > MOST_BLOCKS or mass.dtype != torch.float32:
            raise ValueError(
                f'`mass` must be float32 of at most {MOST_BLOCKS} blocks for backend="triton", got {mass.dtype} of '
                f'{mass.shape[-1]}; backend="torch" takes it'
            )
        return triton.smallest_cover(mass, base, coverage)
    return reference.smallest_cover(mass, base, coverage)


def _is_triton(backend: Backend, x: Tensor) -> bool:
    """Whether Triton is to be asked, which `x` must then suit."""
    chosen = choose_backend("blocks", x.device, x.dtype) if backend == "auto" else backend
    if chosen not in ("torch", "reference", "triton"):
        raise unknown_backend(chosen, "triton")
    if chosen == "triton":
        refuse_dtype("x", x.dtype)
    return chosen == "triton"


def _check_dim(x: Tensor) -> None:
    if x.shape[-1] > MOST_DIM or x.stride(-1) != 1:
        raise ValueError(
            f'heads must have at most {MOST_DIM} numbers, with unit stride, for backend="triton", got {x.shape[-1]} '
            f'with stride {x.stride(-1)}; backend="torch" takes them'
        )


def _tile(blocks: Sequence[Range], count: int) -> bool:
    ends = [0, *(block.stop for block in blocks)]
    return ends[-1] == count and [block.start for block in blocks] == ends[:-1] and ends == sorted(ends)
