"""How large chunks of prompts and steps should be: from times that were measured, from a workload's shape, from tiles.

A chunk must be large enough that products are bound by compute, small enough that decodes do not wait long and that
there are chunks for all of them to ride on, and it should end, with the decodes beside it, where a tile does.

Sources: SARATHI (arXiv:2308.16369) for the balance of prompts and decodes and for tiles, Sarathi-Serve
(arXiv:2403.02310) for the budget by the time between tokens.
"""

from __future__ import annotations

from seqpar.partition import Layout
from seqpar.plan.shift import StepCosts

__all__ = ["balanced_chunk", "kv_reread", "most_requests", "saturating_chunk", "tbt_budget", "tile_fit"]


def tile_fit(rows: int, num_decodes: int, tile: int) -> int:
    """Tokens of prompts that fill a step of at most `rows` up to a multiple of the tile, beside its decodes; or 0.

    >>> tile_fit(256, 17, 128), tile_fit(300, 17, 128), tile_fit(256, 300, 128)
    (239, 239, 0)
    """
    _check(rows=rows, tile=tile)
    return max(0, rows // tile * tile - num_decodes)


def balanced_chunk(prompt_to_decode: float, most_requests: int, *, low: int = 1, high: int, tile: int = 1) -> int:
    """The chunk under which a workload's prompts carry just all its decodes, within what products run well at.

    A prompt of P tokens gives P / C chunks, each of which carries the decodes of all other requests: with D tokens to
    decode for each, P / C = D / (B - 1). Smaller chunks have places left over, larger ones leave decodes alone.

    >>> balanced_chunk(14.0, 18, high=512, tile=1), balanced_chunk(50.0, 18, low=256, high=512, tile=128)
    (238, 512)

    Args:
        prompt_to_decode: prompt tokens for each token decoded.
        most_requests: that run at a time, B.
        low: the smallest chunk that products run well at.
        high: the largest chunk.
        tile: the chunk is rounded to its multiple where one lies within the bounds.

    Raises:
        ValueError: sizes below 1, `low` above `high`, or a ratio that is not positive.
    """
    _check(most_requests=most_requests, low=low, high=high, tile=tile)
    if low > high or not prompt_to_decode > 0:
        raise ValueError(
            f"`low` must be at most `high` and `prompt_to_decode` positive, got {low}, {high} and {prompt_to_decode}"
        )
    wanted = min(max(low, round(min(prompt_to_decode * (most_requests - 1), high))), high)
    rounded = max(1, round(wanted / tile)) * tile
    rounded -= tile * (rounded > high)
    return rounded if low <= rounded else wanted


def saturating_chunk(costs: StepCosts, *, layout: Layout | None = None, loss: float = 0.1, tile: int = 1) -> int:
    """The smallest chunk that computes tokens at nearly the best rate of all sizes measured.

    Args:
        costs: of steps.
        layout: under which; the costs' base by default.
        loss: share of the best rate that may be lost.
        tile: the chunk is a multiple of it where one is measured.

    Raises:
        ValueError: a loss that is no share, or a tile below 1.
    """
    _check(tile=tile)
    if not 0 <= loss < 1:
        raise ValueError(f"`loss` must be in [0, 1), got {loss}")
    curve, sizes = costs.curves[layout or costs.base], _multiples(costs, tile)
    per_token = {size: curve(size) / size for size in sizes}
    best = min(per_token.values())
    return next(size for size in sizes if per_token[size] * (1 - loss) <= best)


def tbt_budget(costs: StepCosts, seconds: float, *, layout: Layout | None = None, tile: int = 1) -> int:
    """The most tokens of a step, so that it and all smaller ones take no longer than tokens of one request may part.

    Args:
        costs: of steps, with the cached keys that they read on average.
        seconds: the most time between two tokens of a request.
        layout: under which; the costs' base by default.
        tile: the budget is a multiple of it where one is measured.

    Raises:
        ValueError: the smallest step takes longer, or a tile below 1.
    """
    _check(tile=tile)
    curve, best = costs.curves[layout or costs.base], 0
    for size in _multiples(costs, tile):
        if curve(size) > seconds:
            break
        best = size
    if not best:
        first = _multiples(costs, tile)[0]
        raise ValueError(
            f"`seconds` must be at least a step's of {first} token(s) ({curve(first):.3g} s), got {seconds:.3g}; "
            "use more ranks, or a smaller tile"
        )
    return best


def kv_reread(tokens: int, chunk: int) -> float:
    """How often a prompt's keys are read, on average, when it is computed in chunks: (N + 1) / 2 for N whole chunks.

    >>> kv_reread(8192, 512), kv_reread(8192, 2048), kv_reread(8192, 8192)
    (8.5, 2.5, 1.0)
    """
    _check(tokens=tokens, chunk=chunk)
    ends = range(chunk, tokens, chunk)
    return (sum(ends) + tokens) / tokens


def most_requests(memory_bytes: int, weight_bytes: int, token_bytes: int, tokens: int) -> int:
    """Requests of so many tokens whose keys and values fit beside the weights, on one rank.

    >>> most_requests(48 << 30, 26 << 30, 820 << 10, 1024 + 512)
    18
    """
    _check(token_bytes=token_bytes, tokens=tokens)
    return max(0, (memory_bytes - weight_bytes) // (token_bytes * tokens))


def _multiples(costs: StepCosts, tile: int) -> list[int]:
    """The multiples of the tile that are measured; all sizes where there are none."""
    sizes = costs.sizes
    first = -(-sizes.start // tile) * tile
    return list(range(first, sizes.stop, tile)) or list(range(sizes.start, sizes.stop))


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
