"""Between Transformers' padded [B, S] and the flat ragged batch: which tokens are kept, and where rows go back to.

Padding is dropped, not masked: a token whose `attention_mask` is 0 is never computed, cached or sent. What comes back
at its place is zeros, where Transformers returns values that depend on the attention implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

__all__ = ["Padding", "Selection", "check_windows"]


class Selection(NamedTuple):
    """Rows of the flat batch that are asked for, and their places in a result of shape [*dims, M].

    Attributes:
        rows: indices of tokens; None for all of them, in order.
        places: row of the flattened result that each of them fills; None where they fill it in order.
        dims: leading dims of the result.
    """

    rows: tuple[int, ...] | None
    places: Int64[Tensor, " rows"] | None
    dims: tuple[int, ...]

    def unpack(self, x: Tensor) -> Tensor:
        """x[R, M] to [*dims, M], zeros where the padding was."""
        if self.places is None:
            return x.view(*self.dims, x.shape[-1])
        out = x.new_zeros(math.prod(self.dims), x.shape[-1]).index_copy(0, self.places, x)
        return out.view(*self.dims, x.shape[-1])


@dataclass(frozen=True, eq=False)
class Padding:
    """How the new tokens of a padded input lie in a flat batch.

    Attributes:
        shape: B and S.
        q_lens: tokens kept of each request (of each packed sequence, where rows hold several).
        kept: places in the flattened [B * S] of the tokens kept; None where all are.
        mask: which tokens of [B, S] are kept, on the host; None where all are.
    """

    shape: tuple[int, int]
    q_lens: tuple[int, ...]
    kept: Int64[Tensor, " t"] | None = None
    mask: Bool[Tensor, "b s"] | None = None

    @classmethod
    def plan(cls, shape: tuple[int, int], attention_mask: Any, seen: int, history: Tensor | None) -> Padding:
        """Read an attention mask over the cached and the new tokens.

        Args:
            shape: B and S of the new tokens.
            attention_mask: what the caller passed; None keeps everything.
            seen: columns of the mask that are cached already.
            history: which of them were kept, [B, seen]; None where all were.

        Raises:
            TypeError: the mask is no tensor.
            ValueError: it is not a 0/1 mask of shape [B, seen + S], or contradicts what was cached.
        """
        batch, length = shape
        if batch < 1 or length < 1:
            raise ValueError(f"`input_ids` must hold at least one token for each of at least one request, got {shape}")
        if attention_mask is None:
            if history is not None:
                raise ValueError(
                    "`attention_mask` must be given, since the cache was filled with padding left out, got None"
                )
            return cls(shape, (length,) * batch)
        mask = _as_bool(attention_mask, (batch, seen + length))
        cached, new = mask[:, :seen], mask[:, seen:]
        if not (cached.all() if history is None else torch.equal(cached, history)):
            raise ValueError(
                f"`attention_mask` must agree with what was cached in its first {seen} columns, got other values there"
            )
        if new.all():
            return cls(shape, (length,) * batch)
        q_lens = tuple(new.sum(1).tolist())
        if not any(q_lens):
            raise ValueError("`attention_mask` must keep at least one of the new tokens, got zeros only")
        return cls(shape, q_lens, new.reshape(-1).nonzero()[:, 0], new)

    @classmethod
    def packed(cls, shape: tuple[int, int], position_ids: Int64[Tensor, "b s"]) -> Padding:
        """Rows that may hold several sequences: each begins where positions do not go on by one (as Transformers)."""
        begins = torch.ones(shape, dtype=torch.bool)
        begins[:, 1:] = torch.diff(position_ids.cpu(), dim=1) != 1
        starts = [*begins.view(-1).nonzero()[:, 0].tolist(), shape[0] * shape[1]]
        return cls(shape, tuple(b - a for a, b in pairwise(starts)))

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    def pack(self, x: Tensor) -> Tensor:
        """x[B, S, ...] to the kept tokens, [T, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.kept is None else flat.index_select(0, self.kept.to(x.device))

    def all_rows(self, device: torch.device) -> Selection:
        """Every token, put back into [B, S]."""
        return Selection(None, None if self.kept is None else self.kept.to(device), self.shape)

    def select(self, logits_to_keep: int | Tensor, device: torch.device) -> Selection:
        """The tokens that `logits_to_keep` asks for, in the shape that Transformers gives them."""
        batch, length = self.shape
        if not isinstance(logits_to_keep, (int, Tensor)) or (isinstance(logits_to_keep, int) and logits_to_keep < 0):
            raise ValueError(
                f"`logits_to_keep` must be a number of rows or a tensor of indices, got {logits_to_keep!r}"
            )
        if isinstance(logits_to_keep, int) and not 0 < logits_to_keep < length:
            return self.all_rows(device)
        if isinstance(logits_to_keep, Tensor):
            logits_to_keep = logits_to_keep.cpu()
        wanted = _slice(torch.arange(batch * length).view(batch, length), logits_to_keep)
        dims, flat = tuple(wanted.shape), wanted.reshape(-1)
        if self.mask is None:
            return Selection(tuple(flat.tolist()), None, dims)
        keep = self.mask.reshape(-1)
        row_of = keep.cumsum(0) - 1
        places = keep[flat].nonzero()[:, 0]
        return Selection(tuple(row_of[flat[places]].tolist()), places.to(device), dims)


def _slice(grid: Int64[Tensor, "b s"], keep: int | Tensor) -> Int64[Tensor, "..."]:
    """What Transformers keeps: a number of last columns, columns, columns of each row, or what a mask marks."""
    if isinstance(keep, Tensor) and keep.ndim == 2:
        return grid[keep] if keep.dtype == torch.bool else grid.take_along_dim(keep, 1)
    return grid[:, -keep:] if isinstance(keep, int) else grid[:, keep]


def check_windows(windows: Sequence[int | None], mask: Bool[Tensor, "b s"] | None) -> None:
    """Refuse a mask with gaps that a sliding window would see: Transformers' window counts padding, ours tokens.

    Raises:
        ValueError: padding lies between the first and the last token of a request that is longer than a window.
    """
    smallest = min((window for window in windows if window is not None), default=None)
    if smallest is None or mask is None or mask.shape[1] <= smallest:
        return
    index = torch.arange(mask.shape[1])
    last = (index * mask).amax(1)
    first = mask.shape[1] - 1 - (index.flip(0) * mask).amax(1)
    gaps = mask.any(1) & (mask.sum(1) != last - first + 1) & (last - first + 1 > smallest)
    if gaps.any():
        raise ValueError(
            f"`attention_mask` must have no zeros between tokens of a request longer than the sliding window "
            f"({smallest}), got some in request {int(gaps.nonzero()[0])}; pad at the ends"
        )


def _as_bool(attention_mask: Any, shape: tuple[int, int]) -> Bool[Tensor, "b s"]:
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"`attention_mask` must be a tensor of shape {list(shape)}, got {type(attention_mask).__name__}"
        )
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"`attention_mask` must have shape {list(shape)} (cached and new tokens, no more dims), "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask.detach().cpu()
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("`attention_mask` must hold zeros and ones, got other values")
    return mask.bool()
