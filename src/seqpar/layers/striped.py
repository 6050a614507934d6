"""Moving keys and values between placements: all tokens of a rank's heads, and a rank's tokens of all heads.

A prompt is computed under Ulysses, which leaves every rank whole sequences of its own heads; decodes that ship queries
want every rank to hold some tokens of all heads of its tensor-parallel shard. Each layer is moved by one all-to-all,
K and V together, for any number of requests at once. Nothing is computed, so either way is exact, and with it the way
there and back.

Caches stay apart: the target finds room for the requests and the source keeps them until it is told to free them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps
from seqpar.kv import PagedKV, StripedKV
from seqpar.partition import HeadMap
from seqpar.ragged import RaggedBatch

__all__ = [
    "heads_to_stripes",
    "heads_to_stripes_steps",
    "stripes_to_heads",
    "stripes_to_heads_steps",
    "tokens_to_stripes",
    "tokens_to_stripes_steps",
]


class _Deal(NamedTuple):
    """How this rank's share of a step's tokens is dealt out."""

    order: Tensor
    """Of its tokens: those of rank 0 first."""
    sent: tuple[int, ...]
    received: tuple[int, ...]
    arriving: Tensor
    """Where each token that arrives stands among those that this rank is to hold."""


def heads_to_stripes_steps(
    source: PagedKV,
    target: StripedKV,
    requests: Sequence[Hashable],
    *,
    heads: HeadMap,
    group: ProcessGroup,
    tp_rank: int = 0,
    label: str = "",
) -> Steps[None]:
    """Copy requests from a cache of this rank's heads to one of this rank's tokens; yields once a layer.

    In:    `source`: all tokens of the KV heads `heads.kv_ranges` of this rank.
    Out:   `target`: this rank's tokens of the KV heads `heads.kv_shard(tp_rank)`.
    Comm:  in each layer a rank sends every other that one's tokens of the heads that it lacks, K and V: 2 * D elements
        for each head of a token. A replicated head is sent by one of its holders.

    Raises:
        ValueError: caches that are not of these ranks or of one another, requests that the target holds already or has
            no room for, or whose keys are not all appended. All ranks raise, and nothing has changed.
    """
    batch = _open(source, target, source, target, requests, heads, group, tp_rank)
    rank, shard, routes = group.rank(), heads.kv_shard(tp_rank), heads.kv_routes(tp_rank)
    mine = heads.kv_ranges[tp_rank * heads.sp + rank]
    rows = [_index(target.own(batch, other), source) for other in range(group.size())]
    columns = [_index([head - mine.start for head in route], source) for route in routes[rank]]
    arriving = [_index([head - shard.start for head in each[rank]], source) for each in routes]
    own = len(rows[rank])
    for layer in range(source.num_layers):
        held = torch.stack(source.gather(layer, requests), 2)
        blocks = [held[there][:, which] for there, which in zip(rows, columns, strict=True)]
        shapes = [(own, len(which), 2, source.head_dim) for which in arriving]
        kv = held.new_empty(own, shard.size, 2, source.head_dim)
        received = yield from _exchange_steps(blocks, shapes, group, label)
        for part, which in zip(received, arriving, strict=True):
            kv[:, which] = part
        target.append_own(layer, kv[:, :, 0], kv[:, :, 1], batch)


def stripes_to_heads_steps(
    source: StripedKV,
    target: PagedKV,
    requests: Sequence[Hashable],
    *,
    heads: HeadMap,
    group: ProcessGroup,
    tp_rank: int = 0,
    label: str = "",
) -> Steps[None]:
    """Copy requests from a cache of this rank's tokens to one of this rank's heads; yields once a layer.

    In, Out: those of `heads_to_stripes`, the other way.
    Comm:  in each layer a rank sends every other its own tokens of that one's heads, K and V.

    Raises:
        ValueError: as `heads_to_stripes`.
    """
    batch = _open(source, target, target, source, requests, heads, group, tp_rank)
    shard = heads.kv_shard(tp_rank)
    ranges = [r.shift(-shard.start) for r in heads.kv_ranges[tp_rank * heads.sp : (tp_rank + 1) * heads.sp]]
    rows = [_index(source.own(batch, other), source) for other in range(group.size())]
    mine = ranges[group.rank()].size
    for layer in range(source.num_layers):
        held = torch.stack(source.gather(layer, requests), 2)
        blocks = [held[:, r.start : r.stop] for r in ranges]
        shapes = [(len(there), mine, 2, source.head_dim) for there in rows]
        kv = held.new_empty(batch.num_tokens, mine, 2, source.head_dim)
        received = yield from _exchange_steps(blocks, shapes, group, label)
        for part, there in zip(received, rows, strict=True):
            kv[there] = part
        target.append(layer, kv[:, :, 0], kv[:, :, 1], batch)


def tokens_to_stripes_steps(
    k: Float[Tensor, "t_local g d"],
    v: Float[Tensor, "t_local g d"],
    batch: RaggedBatch,
    kv: StripedKV,
    *,
    layer_index: int,
    rows: Sequence[Sequence[int]],
    group: ProcessGroup,
    label: str = "",
) -> Steps[None]:
    """Append a step whose tokens lie on the ranks in any way, such as contiguous slices; yields once.

    In:    k, v[t, G, D]: the tokens `rows[rank]` of the batch in that order, all KV heads of the shard.
    Out:   `kv` has appended the step.
    Comm:  each rank sends its tokens to those that are to hold them, K and V: 2 * G * D elements for each that another
        one holds.

    Args:
        k: keys, as they are to be cached.
        v: values.
        batch: the step, made by `kv`.
        kv: the cache of this rank.
        layer_index: which layer of it.
        rows: the tokens that each rank has, every one of the batch on one rank.
        group: the sequence ranks.
        label: names the collective.

    Raises:
        ValueError: rows that are not the batch's or not this tensor's, a cache of other ranks, or what the cache
            refuses.
    """
    rank, held = group.rank(), tuple(map(tuple, rows))
    if (kv.striping.ranks, kv.rank) != (group.size(), rank):
        raise ValueError(
            f"`kv` must be the `StripedKV` of rank {rank} of the group's {group.size()}, got rank {kv.rank} of "
            f"{kv.striping.ranks}"
        )
    if len(held) != group.size() or sorted(chain(*held)) != list(range(batch.num_tokens)):
        raise ValueError(
            f"`rows` must have each of the batch's {batch.num_tokens} tokens on one of the group's {group.size()} "
            f"ranks, got {[len(each) for each in held]} tokens"
        )
    shape = (len(held[rank]), kv.num_kv_heads, kv.head_dim)
    if k.shape != shape or v.shape != shape or k.dtype != kv.dtype or v.dtype != kv.dtype:
        raise ValueError(
            f"`k` and `v` must be {list(shape)} in {kv.dtype}, got {list(k.shape)} in {k.dtype} and "
            f"{list(v.shape)} in {v.dtype}"
        )
    deal = _deal(batch, kv, held)
    both = torch.stack([k.detach(), v.detach()], 1)
    received = yield comm.all_to_all_async(
        both[deal.order], group=group, send_sizes=deal.sent, recv_sizes=deal.received, label=label
    )
    own = torch.empty_like(received)
    own[deal.arriving] = received
    kv.append_own(layer_index, own[:, 0], own[:, 1], batch)


def tokens_to_stripes(
    k: Float[Tensor, "t_local g d"],
    v: Float[Tensor, "t_local g d"],
    batch: RaggedBatch,
    kv: StripedKV,
    *,
    layer_index: int,
    rows: Sequence[Sequence[int]],
    group: ProcessGroup,
    label: str = "",
) -> None:
    """Run `tokens_to_stripes_steps`."""
    options: dict[str, Any] = {"layer_index": layer_index, "rows": rows, "group": group, "label": label}
    comm.run(tokens_to_stripes_steps(k, v, batch, kv, **options))


def _deal(batch: RaggedBatch, kv: StripedKV, held: tuple[tuple[int, ...], ...]) -> _Deal:
    key = ("stripes.deal", kv.striping, kv.rank, held)
    deal: _Deal | None = batch.plans.get(key)
    if deal is None:
        owned = [{row: place for place, row in enumerate(kv.own(batch, rank))} for rank in range(len(held))]
        sent = [[place for place, row in enumerate(held[kv.rank]) if row in those] for those in owned]
        mine = owned[kv.rank]
        received = [[mine[row] for row in there if row in mine] for there in held]
        deal = batch.plans[key] = _Deal(
            _index([*chain(*sent)], kv),
            tuple(map(len, sent)),
            tuple(map(len, received)),
            _index([*chain(*received)], kv),
        )
    return deal


def heads_to_stripes(
    source: PagedKV,
    target: StripedKV,
    requests: Sequence[Hashable],
    *,
    heads: HeadMap,
    group: ProcessGroup,
    tp_rank: int = 0,
    label: str = "",
) -> None:
    """Run `heads_to_stripes_steps`."""
    comm.run(heads_to_stripes_steps(source, target, requests, heads=heads, group=group, tp_rank=tp_rank, label=label))


def stripes_to_heads(
    source: StripedKV,
    target: PagedKV,
    requests: Sequence[Hashable],
    *,
    heads: HeadMap,
    group: ProcessGroup,
    tp_rank: int = 0,
    label: str = "",
) -> None:
    """Run `stripes_to_heads_steps`."""
    comm.run(stripes_to_heads_steps(source, target, requests, heads=heads, group=group, tp_rank=tp_rank, label=label))


def _exchange_steps(
    blocks: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ProcessGroup, label: str
) -> Steps[list[Tensor]]:
    """One all-to-all of a block for every rank, of shapes that both sides know."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([block.flatten() for block in blocks])
    received: Tensor = yield comm.all_to_all_async(
        flat, group=group, send_sizes=[block.numel() for block in blocks], recv_sizes=sizes, label=label
    )
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def _open(
    source: PagedKV,
    target: PagedKV,
    whole: PagedKV,
    striped: StripedKV,
    requests: Sequence[Hashable],
    heads: HeadMap,
    group: ProcessGroup,
    tp_rank: int,
) -> RaggedBatch:
    """The step in which the target appends the requests, once all ranks have found that they can be moved."""
    batch: RaggedBatch | None = None
    error: ValueError | None = None
    try:
        _check(whole, striped, heads, group, tp_rank)
        taken = [request for request in requests if request in target]
        if taken:
            raise ValueError(f"`requests` must not be in the target yet, got {taken}; free them first")
        for layer in range(source.num_layers):
            source.check_appended(layer, requests)
        batch = target.batch(requests, [source.length(request) for request in requests])
    except ValueError as refused:
        error = refused
    try:
        comm.agree(error, group=group)
    except ValueError:
        if batch is not None:
            for request in requests:
                target.free(request)
        raise
    assert batch is not None, "`agree` raises where a rank found an error"
    return batch


def _check(whole: PagedKV, striped: StripedKV, heads: HeadMap, group: ProcessGroup, tp_rank: int) -> None:
    size, rank = group.size(), group.rank()
    if heads.sp != size or not 0 <= tp_rank < heads.tp:
        raise ValueError(
            f"`heads` must be split over the group's {size} sequence ranks and hold tp rank {tp_rank}, "
            f"got tp={heads.tp}, sp={heads.sp}"
        )
    if isinstance(whole, StripedKV) or (striped.striping.ranks, striped.rank) != (size, rank):
        got = f"{type(whole).__name__} and a rank {striped.rank} of {striped.striping.ranks}"
        raise ValueError(
            f"caches must be a `PagedKV` and a `StripedKV` of rank {rank} of {size} (the group's), got {got}"
        )
    mine, shard = heads.kv_ranges[tp_rank * heads.sp + rank].size, heads.kv_shard(tp_rank).size
    wanted = (mine, shard, whole.head_dim, whole.dtype, whole.num_layers)
    got_sizes = (whole.num_kv_heads, striped.num_kv_heads, striped.head_dim, striped.dtype, striped.num_layers)
    if wanted != got_sizes:
        raise ValueError(
            f"caches must hold {mine} KV heads by heads and {shard} by tokens, and have one head_dim, dtype and number "
            f"of layers ({wanted[2:]}), got {got_sizes[:2]} heads and {got_sizes[2:]}"
        )


def check_striped(
    kv: PagedKV | None, batch: RaggedBatch, *, group: ProcessGroup, heads: int, head_dim: int, dtype: torch.dtype
) -> StripedKV:
    """The cache, once it is found to be this rank's share of a group's, of these heads, and the batch's.

    Raises:
        ValueError: it is not.
    """
    size, rank = group.size(), group.rank()
    if not isinstance(kv, StripedKV) or (kv.striping.ranks, kv.rank) != (size, rank):
        got = f"rank {kv.rank} of {kv.striping.ranks}" if isinstance(kv, StripedKV) else type(kv).__name__
        raise ValueError(
            f"`kv` must be the `StripedKV` of rank {rank} of the group's {size}, got {got}; "
            "`heads_to_stripes` fills one from a `PagedKV`"
        )
    wanted, found = (heads, head_dim, dtype), (kv.num_kv_heads, kv.head_dim, kv.dtype)
    if wanted != found:
        raise ValueError(
            f"`kv` must hold the KV heads of this tp shard {wanted} (heads, head_dim, dtype; `heads.kv_shard`), "
            f"got {found}"
        )
    if batch.page_size != kv.page_size:
        raise ValueError(f"`batch` must have the cache's page size ({kv.page_size}), got {batch.page_size}")
    return kv


def _index(places: Sequence[int], like: PagedKV) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=like.device)
