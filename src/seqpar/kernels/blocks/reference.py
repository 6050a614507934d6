"""The definitions of what blocks of keys are like, in PyTorch; they are its fast form too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from seqpar.partition import Range

__all__ = ["block_balls", "block_masses", "block_means", "score_bounds", "smallest_cover"]


def block_means(x: Float[Tensor, "n *rest"], blocks: Sequence[Range]) -> Float[Tensor, "b *rest"]:
    """See `seqpar.kernels.blocks`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sizes = torch.tensor([block.size for block in blocks], device=x.device)
    sums = wide.new_zeros(len(blocks), *x.shape[1:]).index_add_(0, _block_of(x, blocks, len(x)), wide)
    return sums / sizes.view(-1, *[1] * (x.dim() - 1))


def block_balls(
    k: Float[Tensor, "n g d"], blocks: Sequence[Range]
) -> tuple[Float[Tensor, "b g d"], Float[Tensor, "b g"]]:
    """See `seqpar.kernels.blocks`."""
    centre = block_means(k, blocks)
    apart = (k.to(centre.dtype) - centre[_block_of(k, blocks, len(k))]).norm(dim=-1)
    parts = [part.amax(0) for part in apart.split([block.size for block in blocks])]
    return centre, torch.stack([*parts]) if parts else apart[:0]


def score_bounds(
    q: Float[Tensor, "s h d"],
    centre: Float[Tensor, "b g d"],
    radius: Float[Tensor, "b g"],
    softmax_scale: float,
    kv_head_of: tuple[int, ...],
) -> Float[Tensor, "s h b"]:
    """See `seqpar.kernels.blocks`."""
    wide, heads = q.to(centre.dtype), list(kv_head_of)
    most = wide.norm(dim=-1)[..., None] * radius[:, heads].T
    found: Tensor = (torch.einsum("shd,bhd->shb", wide, centre[:, heads]) + most) * softmax_scale
    return found


def block_masses(
    scores: Float[Tensor, "*rows n"], so_far: Float[Tensor, "*rows"], blocks: Sequence[Range]
) -> tuple[Float[Tensor, "*rows b"], Float[Tensor, "*rows"]]:
    """See `seqpar.kernels.blocks`."""
    every = torch.logaddexp(so_far, scores.logsumexp(-1))
    shares = (scores - every[..., None]).exp()
    of = _block_of(scores, blocks, scores.shape[-1])
    found = shares.new_zeros(*shares.shape[:-1], len(blocks)).index_add_(-1, of, shares)
    return found, (so_far - every).exp()


def smallest_cover(
    mass: Float[Tensor, "*rows b"], base: Float[Tensor, "*rows"], coverage: float
) -> Bool[Tensor, "*rows b"]:
    """See `seqpar.kernels.blocks`."""
    largest, order = mass.sort(dim=-1, descending=True, stable=True)
    before = base[..., None] + largest.cumsum(-1) - largest
    wanted = coverage * (base + mass.sum(-1))[..., None]
    chosen = (before < wanted) & (largest > 0)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _block_of(like: Tensor, blocks: Sequence[Range], count: int) -> Int64[Tensor, " n"]:
    """Which block each of `count` keys is in."""
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.int64, device=like.device)
    return torch.arange(len(blocks), device=like.device).repeat_interleave(sizes, output_size=count)
