"""What a decode costs by heads and with queries that travel, measured on the ranks at hand.

The attention layers themselves are timed, without the projections around them, which are the same for both. Of two
layers over one batch the second counts: what a step needs to know of its requests is worked out in the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from seqpar import comm
from seqpar.comm import Groups
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import QShipDecodeAttention, UlyssesAttention, heads_to_stripes
from seqpar.partition import HeadMap, Striping, even_split
from seqpar.plan.calibrate_layers import Progress, finish, on_device
from seqpar.plan.costs import Curve
from seqpar.plan.decode import DecodeCosts, Exchange, MethodCosts

__all__ = ["calibrate_decode"]

_SHORT = 16  # tokens of context that every request has where what a step takes without one is measured
_LAYERS = 2


def calibrate_decode(
    heads: HeadMap,
    head_dim: int,
    *,
    groups: Groups,
    under: Groups | None = None,
    contexts: Sequence[int] = (512, 2048, 8192, 32768),
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 10,
    window: int | None = None,
    exchange: Exchange | int = "a2a",
    whole: bool = False,
    interleave: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DecodeCosts:
    """Measure what decodes of a model with these heads cost, alike on every rank.

    Every rank of the mesh calls it with the same arguments. A round counts as its slowest rank's, of the rounds the
    fastest; methods take turns in every round. The context is filled by `heads_to_stripes`, which so is timed too. On
    a simulated link in force, that link's times are measured.

    Args:
        heads: of the model, over the mesh.
        head_dim: D.
        groups: of the mesh; its sp ranks hold the context between them.
        under: of the layout that decodes run under (`comm.layout_groups`); `groups` by default.
        contexts: cached tokens to measure, increasing: of a single request, and shared by the most requests.
        batches: numbers of requests with little context to measure, increasing.
        rounds: measurements of each, after one that is not counted.
        window: keys that a token sees, itself included; None for all.
        exchange: how partials return, as `layers.QShipDecodeAttention` takes it.
        whole: every rank has the projections of all tokens and heads (Helix).
        interleave: of the striped cache.
        dtype: of activations and cache.
        device: of both.
        progress: told how many measurements are done, and of how many.

    Comm:  the layers' own, a gather of one number before each measurement, and of all results at the end.

    Raises:
        ValueError: heads of another mesh, sizes that are not increasing, no rounds, or what the layers refuse.
    """
    if heads.layout != groups.layout:
        raise ValueError(f"`heads` must be over the mesh of `groups` {tuple(groups.layout)}, got {tuple(heads.layout)}")
    for name, sizes in (("contexts", contexts), ("batches", batches)):
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"`{name}` must be at least 1 and increasing, got {list(sizes)}")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}")
    many = batches[-1]
    shared = [context // many for context in contexts if context // many >= 2 * _SHORT and many > 1]
    cases = [(batch, _SHORT) for batch in batches]
    cases += [*((many, each) for each in shared), *((1, context) for context in (_SHORT, *contexts))]
    first = len(cases) - len(contexts) - 1  # of the single request's
    timed = torch.full((len(cases), 3, rounds), torch.inf)
    options: dict[str, Any] = {"window": window, "interleave": interleave, "dtype": dtype, "device": device}
    # One page for each request, as the fastest layout of a cache has it.
    sizes_of_caches = ((many, max(_SHORT, *shared, 0) + 1), (1, max(_SHORT, contexts[-1]) + 1))
    made = [
        _Bench(heads, head_dim, groups, under or groups, exchange, whole, *sizes, **options)
        for sizes in sizes_of_caches
    ]
    with torch.no_grad():
        for index, (batch, context) in enumerate(cases):
            bench = made[index >= first]
            for turn, seconds in enumerate(bench.rounds(batch, context, rounds + 1)):
                if turn:
                    timed[index, :, turn - 1] = torch.tensor(seconds)
                if progress is not None:
                    progress(index * (rounds + 1) + turn + 1, len(cases) * (rounds + 1))
    everyone = comm.all_gather(on_device(timed[None], groups.flat), group=groups.flat, label="calibrate").cpu()
    best = everyone.amax(dim=0).amin(dim=2).double().tolist()
    short, several, long = best[: len(batches)], best[len(batches) - 1 : first], best[first:]
    local, qship = (
        MethodCosts(
            Curve(tuple(batches), tuple(at[which] for at in short)),
            {
                1: _added(contexts, [at[which] for at in long]),
                **({many: _added([many * each for each in shared], [at[which] for at in several])} if shared else {}),
            },
        )
        for which in range(2)
    )
    where = f"{groups.flat.size()} rank(s) of {torch.device(device).type}"
    return DecodeCosts(
        local,
        qship,
        move=Curve((0, *contexts), tuple(at[2] for at in long)),
        window=window,
        source=f"measured on {where}, {contexts[0]} to {contexts[-1]} tokens of context",
    )


def _added(tokens: Sequence[int], seconds: Sequence[float]) -> Curve:
    """What so many tokens of context add to the first of the times, which has next to none."""
    return Curve((0, *tokens), tuple(accumulate((each - seconds[0] for each in seconds), max)))


class _Bench:
    """Both kinds of layers with their caches, for so many requests of so many tokens."""

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        groups: Groups,
        under: Groups,
        exchange: Exchange | int,
        whole: bool,
        requests: int,
        most: int,
        *,
        window: int | None,
        interleave: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.heads, self.groups, self.under, self.whole = heads, groups, under, whole
        tp_rank, rank = groups.tp.rank(), groups.sp.rank()
        options: dict[str, Any] = {"group": groups.sp, "tp_rank": tp_rank, "window": window}
        self.local = [UlyssesAttention(heads, head_dim, layer_index=i, **options) for i in range(_LAYERS)]
        self.ships = [
            QShipDecodeAttention(heads, head_dim, layer_index=i, exchange=exchange, **options) for i in range(_LAYERS)
        ]
        for layer in (*self.local, *self.ships):
            if under.layout != heads.layout:
                layer.add_layout(under.layout, group=under.sp)
        self.kv = PagedKV.contiguous(
            _LAYERS, requests, most, self.local[0].num_kv_heads, head_dim, dtype=dtype, device=device
        )
        self.stripes = StripedKV.contiguous(
            _LAYERS,
            requests,
            most,
            heads.kv_shard(tp_rank).size,
            head_dim,
            striping=Striping(heads.sp, interleave),
            rank=rank,
            dtype=dtype,
            device=device,
        )
        self.x = torch.zeros(1, device=device, dtype=dtype)

    def rounds(self, batch: int, context: int, turns: int) -> Iterator[tuple[float, float, float]]:
        """Seconds of a layer by heads, with queries that travel, and of a layer's move to the latter's cache."""
        for request in list(self.kv.ids):
            self.kv.free(request)
        filled = self.kv.batch(range(batch), [context] * batch)
        zeros = self.x.expand(filled.num_tokens, self.kv.num_kv_heads, self.kv.head_dim)
        for layer in range(_LAYERS):
            self.kv.append(layer, zeros, zeros, filled)
        moved = torch.inf
        for turn in range(turns):
            if turn < 2:  # twice, for the first one finds no memory; it takes long, and says little more
                for request in list(self.stripes.ids):
                    self.stripes.free(request)
                moved = self._move(range(batch))
            seconds = [self._decode(kv, batch, context) for kv in (self.kv, self.stripes)]
            yield seconds[0], seconds[1], moved

    def _move(self, requests: Sequence[int]) -> float:
        start = self._start()
        heads_to_stripes(
            self.kv, self.stripes, requests, heads=self.heads, group=self.groups.sp, tp_rank=self.groups.tp.rank()
        )
        return self._since(start) / _LAYERS

    def _decode(self, kv: PagedKV, batch: int, context: int) -> float:
        """One token for each request, which is then taken back."""
        ships = isinstance(kv, StripedKV)
        layout, whole = self.under.layout, ships and self.whole
        step = kv.batch(range(batch), [1] * batch)
        heads = self.heads if whole else self.heads.on(layout)
        tokens = batch if whole else even_split(batch, layout.sp)[self.under.sp.rank()]
        tp_rank = self.groups.tp.rank() if whole else self.under.tp.rank()
        qkv = self.x.expand(tokens, heads.width(tp_rank) * kv.head_dim).contiguous()
        options: dict[str, Any] = {"whole": True} if whole else {}
        seconds = 0.0
        for layer in self.ships if ships else self.local:
            start = self._start()
            layer(qkv, step, kv=kv, layout=layout, **options)
            seconds = self._since(start)
        for request in range(batch):
            kv.truncate(request, context)
        return seconds

    def _start(self) -> float:
        comm.all_gather(on_device(torch.zeros(1), self.groups.flat), group=self.groups.flat, label="calibrate")
        finish(self.x)
        return time.perf_counter()

    def _since(self, start: float) -> float:
        finish(self.x)
        return time.perf_counter() - start
