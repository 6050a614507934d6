"""Tokens out of logits: the same ones whatever else is in the batch, and on every rank.

A random number is a hash of the request's seed and the token's number in it, worked out on the host: no generator whose
state another request, another order of steps or another rank could have moved. Rows do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqpar.batching.requests import Sampling

__all__ = ["sample", "uniform"]

_MASK = (1 << 64) - 1


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) for token `number` of a request: SplitMix64, seeded by its own output of the seed.

    >>> uniform(0, 0) == uniform(0, 0) != uniform(0, 1)
    True
    """
    return (_mixed(_mixed(seed) + number) >> 11) / (1 << 53)


def sample(logits: Float[Tensor, "n v"], how: Sequence[Sampling], numbers: Sequence[int]) -> list[int]:
    """A token for each row.

    Temperature, then `top_k`, then `top_p` of what those left, as Transformers orders them. Greedy rows take the first
    of equal logits.

    Args:
        logits: one row for each request.
        how: its parameters.
        numbers: how many tokens it has generated before.

    Raises:
        ValueError: rows without logits, or not as many rows as parameters and numbers.
    """
    if not logits.shape[1] or not len(logits) == len(how) == len(numbers):
        raise ValueError(
            f"`logits` must have a row of at least one for each request, got {list(logits.shape)} for {len(how)} and "
            f"{len(numbers)}"
        )
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, each in enumerate(how) if each.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = _draw(logits[rows], [how[row] for row in drawn], [numbers[row] for row in drawn])
        for row, token in zip(drawn, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Float[Tensor, "n v"], how: Sequence[Sampling], numbers: Sequence[int]) -> Int64[Tensor, " n"]:
    """Inverse transform over the tokens that each row keeps, in the order of their probabilities; float64."""
    vocab = logits.shape[1]

    def column(values: Sequence[float]) -> Float[Tensor, "n 1"]:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    below = logits.double() - logits.amax(-1, keepdim=True)  # so that no temperature makes the largest infinite
    scaled = below / column([each.temperature for each in how])
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    most = column([float(min(each.top_k or vocab, vocab)) for each in how])
    ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= most, -torch.inf)
    share = ordered.softmax(-1)
    before = share.cumsum(-1) - share
    share = share.masked_fill(before >= column([each.top_p for each in how]), 0.0)
    reached = share.cumsum(-1)
    drawn = column([uniform(each.seed, number) for each, number in zip(how, numbers, strict=True)])
    place = torch.searchsorted(reached, drawn * reached[:, -1:], right=True)
    last = (share > 0).sum(-1, keepdim=True) - 1  # rounding must not step beyond what is kept
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


def _mixed(state: int) -> int:
    """One output of SplitMix64."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
