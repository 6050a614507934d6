"""What one decoder layer sends under a layout: bytes that leave each rank, to the last one.

`layer_volumes` is what `comm.record()` counts, also for tokens and heads that do not divide and for KV heads that
travel to several ranks; `closed_volume` is the formula of a paper's table, which holds where everything divides.

With n tokens, h query and g KV heads of size D, hidden size M, p = tp * sp and b bytes an element:

    all-to-alls   (sp-1)/sp * n/sp * (2 h/tp + 2 max(g/tp, sp)) * D * b    one in, one back
    all-reduces   4 (tp-1)/tp * n/sp * M * b                               two, each 2 (tp-1)/tp of what it sums

Under pure Ulysses a rank sends a p-th of what it would under pure tensor parallelism, and less as ranks are added.

Source: Shift Parallelism, arXiv:2509.16495, table of communication volumes; Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

from seqpar.comm import all_reduce_algorithm
from seqpar.partition import HeadMap, Layout, even_split

__all__ = ["Volume", "closed_volume", "layer_volumes"]


class Volume(NamedTuple):
    """Bytes that leave a rank, by collective."""

    all_to_all: Fraction | int = 0
    all_reduce: Fraction | int = 0
    all_gather: Fraction | int = 0
    reduce_scatter: Fraction | int = 0

    @property
    def total(self) -> Fraction | int:
        return sum(self)


def layer_volumes(
    layout: Layout,
    num_tokens: int,
    heads: HeadMap,
    *,
    hidden_size: int,
    head_dim: int,
    itemsize: int = 2,
    sequence_sharded: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    deterministic: bool = False,
) -> tuple[Volume, ...]:
    """Bytes that each flat rank sends in the forward of one `ParallelDecoderLayer`, without a wire format.

    Args:
        layout: that the step runs under.
        num_tokens: n, over all ranks.
        heads: of the model, split over as many ranks in any layout.
        hidden_size: M.
        head_dim: D.
        itemsize: b.
        sequence_sharded: all-gathers and reduce-scatters instead of all-reduces.
        device: where sums are by the algorithm that `comm.all_reduce_algorithm` takes there (`Count.sent_bytes`);
            None for one that sends the least (`Count.num_bytes`).
        deterministic: whether the groups are; only with a `device`.

    Raises:
        ValueError: a layout of other ranks than the heads'.
    """
    if layout.size != heads.size:
        raise ValueError(f"`layout` must be of the {heads.size} ranks that `heads` are split over, got {layout}")
    shares, found = even_split(num_tokens, layout.sp), []
    widths = [q.size + 2 * kv.size for q, kv in zip(heads.q_ranges, heads.kv_ranges, strict=True)]
    for rank in range(layout.size):
        tp_rank, sp_rank = divmod(rank, layout.sp)
        rows = shares[sp_rank]
        there = rows * (sum(widths[rank - sp_rank : rank - sp_rank + layout.sp]) - widths[rank])
        back = (num_tokens - rows) * heads.q_ranges[rank].size
        volume = Volume(all_to_all=(there + back) * head_dim * itemsize)
        if sequence_sharded:
            own = even_split(rows, layout.tp)[tp_rank]
            scattered = 2 * (rows - own) * hidden_size * itemsize
            volume = volume._replace(
                all_gather=2 * (layout.tp - 1) * own * hidden_size * itemsize, reduce_scatter=scattered
            )
        else:
            algorithm = device and all_reduce_algorithm(rows * hidden_size * itemsize, layout.tp, deterministic, device)
            sent = _summed(rows * hidden_size, layout.tp, tp_rank, one_shot=algorithm == "one_shot")
            volume = volume._replace(all_reduce=2 * sent * itemsize)
        found.append(volume)
    return tuple(found)


def closed_volume(
    layout: Layout, num_tokens: int, heads: HeadMap, *, hidden_size: int, head_dim: int, itemsize: int = 2
) -> Volume:
    """Bytes that every rank sends in one layer, where tokens, heads and the hidden size divide; see the module.

    Linear in the tokens: of one token it is the mean over many.
    """
    tp, sp = layout
    tokens = Fraction(num_tokens, sp)
    width = Fraction(2 * heads.num_heads, tp) + 2 * max(Fraction(heads.num_kv_heads, tp), Fraction(sp))
    return Volume(
        all_to_all=Fraction(sp - 1, sp) * tokens * width * head_dim * itemsize,
        all_reduce=4 * Fraction(tp - 1, tp) * tokens * hidden_size * itemsize,
    )


def _summed(elements: int, ranks: int, rank: int, *, one_shot: bool) -> int:
    """Elements that a rank sends for a sum: all of them to all others; or the others' parts, and the sum of its own."""
    own = even_split(elements, ranks)[rank]
    return (ranks - 1) * elements if one_shot else elements - own + (ranks - 1) * own
