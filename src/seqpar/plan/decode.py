"""Whether decodes ship their queries, or are computed where the cache of whole sequences lies.

A decode reads its whole context once in every layer. By heads (Ulysses or tensor parallelism over the cache as a prompt
leaves it) a rank reads all tokens of its KV heads, at least one of them; on one rank, all of all. Spread over the N
sequence ranks by tokens, each reads an N-th of all heads, and queries and partials travel. So with kappa bytes of a
token's KV in a layer that one rank reads locally, and P tokens of context, shipping pays iff

    P * kappa / memory rate * (1 - 1/N) > what the exchange takes more

and never where by heads, too, every rank reads an N-th: where the KV heads divide by the ranks. Moving the cache once
is worth it only after some steps of such savings (`consolidation_steps`).

Costs are curves for each method: what a step takes without context, by requests, and what its context adds, by tokens
over all requests. The latter is nearly the same however many they are, but what shipping saves is a difference of two
such numbers, so it is measured for one request and for many. The rule is one number of tokens for a batch size.
Choosing the faster of the two at each size lost: where they are close, noise would have a growing request change sides,
and each change moves a cache.

Source: the queries that travel are CSPS's, arXiv:2409.15104v1; the exchange in one hop as in Helix, arXiv:2507.07120.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from seqpar.comm import LinkCosts, Wire
from seqpar.kernels.quantize import encoded_width
from seqpar.partition import HeadMap, Layout, even_split
from seqpar.plan.costs import Curve
from seqpar.plan.volumes import Volume, layer_volumes

__all__ = [
    "DecodeChoice",
    "DecodeCosts",
    "MethodCosts",
    "consolidation_steps",
    "decode",
    "decode_costs",
    "decode_volumes",
    "exchange_from",
]

Method = Literal["local", "qship"]
Exchange = Literal["a2a", "ag_rs"]

_METHODS: tuple[Method, Method] = ("local", "qship")
_REQUESTS = tuple(1 << i for i in range(13))
_MOST = 1 << 24


@dataclass(frozen=True)
class MethodCosts:
    """Seconds of one layer's attention in a decode, on the slowest rank, its exchanges included.

    Args:
        step: by number of requests, what does not depend on their context.
        context: for some numbers of requests, by tokens of context over all of them, what those add: nothing for none,
            and never less for more. Between two numbers it goes straight, beyond them it is as at the nearest.

    Raises:
        ValueError: no context, or one that starts otherwise or takes less as it grows.
    """

    step: Curve
    context: Mapping[int, Curve] = field(hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", dict(sorted(self.context.items())))
        if not self.context or min(self.context) < 1:
            raise ValueError(f"`context` must be for numbers of requests of at least 1, got {list(self.context)}")
        for curve in self.context.values():
            if (curve.tokens[0], curve.seconds[0]) != (0, 0.0) or any(a > b for a, b in pairwise(curve.seconds)):
                raise ValueError(
                    "`context` must start with 0 seconds for 0 tokens and never fall, "
                    f"got {list(curve.seconds)} for {list(curve.tokens)}"
                )

    def seconds(self, batch: int, tokens: int) -> float:
        """A step of `batch` requests over so many tokens of context between them."""
        known = [*self.context]
        after = bisect_left(known, batch)
        low, high = known[max(after - 1, 0)], known[min(after, len(known) - 1)]
        share = (batch - low) / (high - low) if low < batch < high else float(batch >= high)
        return self.step(batch) + (1 - share) * self.context[low](tokens) + share * self.context[high](tokens)


@dataclass(frozen=True)
class DecodeCosts:
    """What decodes take in one layer, by where they are computed.

    Args:
        local: over the cache as it lies, by heads or on one rank.
        qship: over the context spread by tokens.
        move: of tokens of context from the one cache to the other; None where it is not known.
        window: keys that a token sees, itself included; None for all.
        source: where the numbers are from.

    Raises:
        ValueError: a window below one key.
    """

    local: MethodCosts
    qship: MethodCosts
    move: Curve | None = None
    window: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"`window` must be at least 1, got {self.window}")

    def of(self, method: Method) -> MethodCosts:
        """Those of one method."""
        return self.local if method == "local" else self.qship

    def seconds(self, method: Method, context_tokens: int, batch: int = 1) -> float:
        """One step of `batch` requests, each over that many cached tokens."""
        return self.of(method).seconds(batch, batch * self._seen(context_tokens))

    def saved_s(self, context_tokens: int, batch: int = 1) -> float:
        """What a step takes less with queries that travel; negative where it takes more."""
        return self.seconds("local", context_tokens, batch) - self.seconds("qship", context_tokens, batch)

    def crossover(self, batch: int = 1) -> int | None:
        """The number of cached tokens of each request from which on shipping is the faster one; None for never.

        Curves are straight between their points, so a bisection between two of them is exact. Beyond the last point of
        the contexts nothing is known, and what holds there holds.
        """
        sizes = self._sizes(batch)
        slower = [size for size in sizes if self.saved_s(size, batch) <= 0]
        if not slower:
            return 0
        if slower[-1] == sizes[-1]:
            return None
        between = range(slower[-1], sizes[sizes.index(slower[-1]) + 1] + 1)
        return between[bisect_left(between, True, key=lambda size: self.saved_s(size, batch) > 0)]

    @property
    def longest(self) -> int:
        """The longest context of a request that is known."""
        curves = (item for method in _METHODS for item in self.of(method).context.items())
        return max(curve.tokens[-1] // requests for requests, curve in curves)

    def _seen(self, context_tokens: int) -> int:
        return context_tokens if self.window is None else min(context_tokens, self.window - 1)

    def _sizes(self, batch: int) -> list[int]:
        """Contexts up to the last one that is known, with all at which a curve bends."""
        points = {n for method in _METHODS for curve in self.of(method).context.values() for n in curve.tokens}
        most = self._seen(self.longest)
        bends = (bend for n in points for bend in (n // batch, -(-n // batch)))
        return sorted({0, most, *(bend for bend in bends if bend < most)})

    def to_json(self) -> str:
        """The costs as text."""
        return json.dumps(_plain(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DecodeCosts:
        """Read what `to_json` gave.

        Raises:
            ValueError: the text does not hold such costs.
        """
        try:
            return _costs(json.loads(text))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"`text` must hold decode costs as `to_json` gives them, got {error!r}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> DecodeCosts:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold such costs.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"`path` must hold decode costs as `save` writes them, got {path}: {error}") from None


@dataclass(frozen=True)
class DecodeChoice:
    """Where decodes are computed, with the numbers that it was decided by.

    Args:
        costs: of both methods.
        context_tokens: cached tokens of each request that the choice was asked for.
        batch: requests of a step, likewise.

    Raises:
        ValueError: a negative context, or no requests.
    """

    costs: DecodeCosts
    context_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.context_tokens < 0 or self.batch < 1:
            raise ValueError(
                f"`context_tokens` must be at least 0 and `batch` at least 1, got {self.context_tokens}, {self.batch}"
            )

    @property
    def method(self) -> Method:
        """The choice."""
        return self.method_of(self.context_tokens, self.batch)

    @property
    def crossover_tokens(self) -> int | None:
        """The number of cached tokens of each request from which on queries are shipped; None for never."""
        return self.costs.crossover(self.batch)

    def method_of(self, context_tokens: int, batch: int = 1) -> Method:
        """The choice for steps of another size: the same on every rank that has the same costs."""
        crossover = self.costs.crossover(batch)
        return "local" if crossover is None or context_tokens < crossover else "qship"

    def payback_steps(self) -> float:
        """Steps after which the move to where the choice is, from where it is not, has paid; infinite for never.

        A layer moves once, and is as much faster in every step.
        """
        saved = abs(self.costs.saved_s(self.context_tokens, self.batch))
        if self.costs.move is None or not saved:
            return inf
        return self.costs.move(self.batch * self.context_tokens) / saved

    def explain(self) -> str:
        """Why, for people: the choice, the crossover, and the times of both at the sizes that are known."""
        costs, batch, context = self.costs, self.batch, self.context_tokens
        window = "" if costs.window is None else f", window of {costs.window:,}"
        what = {"local": "decode locally", "qship": "ship queries"}[self.method]
        lines = [f"{batch} request(s) over {context:,} cached tokens each{window}: {what}"]
        lines.append(f"costs of one layer: {costs.source or 'given'}")
        lines.append(_crossing(self))
        for name in _METHODS:
            bare, whole = costs.of(name).step(batch), costs.seconds(name, context, batch)
            lines.append(f"{name} {_us(whole)} = {_us(bare)} without context + {_us(whole - bare)} for it")
        if costs.move is not None:
            steps = self.payback_steps()
            after = "never pays" if steps == inf else f"pays after {steps:,.0f} step(s)"
            lines.append(f"moving the cache from the other placement {after}")
        return "\n".join([*lines, *_table(self)])

    def to_json(self) -> str:
        """The choice as text, with its costs."""
        content = {"costs": _plain(self.costs), "context_tokens": self.context_tokens, "batch": self.batch}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DecodeChoice:
        """Read what `to_json` gave.

        Raises:
            ValueError: the text does not hold such a choice.
        """
        try:
            content = json.loads(text)
            return cls(_costs(content["costs"]), content["context_tokens"], content["batch"])
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"`text` must hold a decode choice as `to_json` gives it, got {error!r}") from None


def decode(costs: DecodeCosts, context_tokens: int, batch: int = 1) -> DecodeChoice:
    """Choose where decodes are computed.

    Args:
        costs: of both; see `calibrate_decode` and `decode_costs`.
        context_tokens: cached tokens of each request.
        batch: requests of a step.

    Raises:
        ValueError: a negative context, or no requests.
    """
    return DecodeChoice(costs, context_tokens, batch)


def decode_volumes(
    heads: HeadMap,
    num_tokens: int,
    method: Method,
    *,
    head_dim: int,
    itemsize: int = 2,
    layout: Layout | None = None,
    exchange: Exchange = "a2a",
    whole: bool = False,
    wire: Wire | None = None,
) -> tuple[Volume, ...]:
    """Bytes that each flat rank sends in one layer's attention of a step: what `comm.record()` counts, to the last one.

    Args:
        heads: of the model, over tp x sp; the sp ranks hold the context between them.
        num_tokens: new tokens, over all requests and ranks.
        method: "local" for `layers.UlyssesAttention`, "qship" for `layers.QShipDecodeAttention`.
        head_dim: D.
        itemsize: bytes of an element.
        layout: that the step runs under; the heads' by default.
        exchange: the form in which partials return.
        whole: every rank has computed the projection of all tokens and heads (Helix).
        wire: the layers' wire format.
    """
    layout = heads.layout if layout is None else layout
    row = head_dim * itemsize if wire is None else encoded_width(head_dim, wire)
    if method == "local":
        return layer_volumes(layout, num_tokens, heads.on(layout), hidden_size=0, head_dim=row, itemsize=1)
    lse, others, found = 8 if itemsize == 8 else 4, heads.sp - 1, []
    held = _held(heads.on(layout), num_tokens)
    for first in range(0, heads.size, heads.sp):
        group = held[first : first + heads.sp]
        masses = num_tokens * heads.q_shard(first // heads.sp).size * lse
        answers = sum(there.tokens * there.q for there in group)
        for mine in group:
            gathered = 0 if whole else mine.tokens * (mine.q + 2 * mine.kv) * row
            away = answers - mine.tokens * mine.q
            if exchange == "a2a":
                found.append(Volume(all_to_all=away * (row + lse), all_gather=others * gathered))
            else:
                found.append(Volume(all_gather=others * (gathered + masses), reduce_scatter=away * row))
    return tuple(found)


class _Held(NamedTuple):
    """How many new tokens and heads a rank has in a step."""

    tokens: int
    q: int
    kv: int


def _held(heads: HeadMap, num_tokens: int) -> list[_Held]:
    """Of each flat rank."""
    shards = [(heads.q_shard(tp_rank).size, heads.kv_shard(tp_rank).size) for tp_rank in range(heads.tp)]
    return [_Held(tokens, *shard) for shard in shards for tokens in even_split(num_tokens, heads.sp)]


def decode_costs(
    heads: HeadMap,
    head_dim: int,
    *,
    link: LinkCosts,
    memory_bytes_per_s: float,
    itemsize: int = 2,
    layout: Layout | None = None,
    local: Literal["heads", "one"] = "heads",
    queries: int = 1,
    exchange: Exchange = "a2a",
    whole: bool = False,
    window: int | None = None,
) -> DecodeCosts:
    """Costs from sizes and rates, where there is nothing to measure: reading the context, and what travels.

    Args:
        heads: of the model, over tp x sp; the sp ranks hold the context between them.
        head_dim: D.
        link: latency of a collective, and the rate at which a rank sends.
        memory_bytes_per_s: that one rank reads.
        itemsize: bytes of an element of activations and cache.
        layout: that steps run under; the heads' by default.
        local: "heads", a cache of whole sequences of each rank's heads; "one", of all heads of a tp shard on one rank,
            where nothing travels.
        queries: new tokens of each request.
        exchange: the form in which partials return.
        whole: see `decode_volumes`.
        window: keys that a token sees, itself included; None for all.

    Raises:
        ValueError: rates that are not positive, or no queries.
    """
    if not (link.alpha_s >= 0 and link.bytes_per_s > 0 and memory_bytes_per_s > 0 and queries >= 1):
        raise ValueError(
            "rates must be positive, latencies >= 0 and `queries` at least 1, got "
            f"{link}, memory_bytes_per_s={memory_bytes_per_s}, queries={queries}"
        )
    layout = heads.layout if layout is None else layout
    options: dict[str, Any] = {"head_dim": head_dim, "itemsize": itemsize, "layout": layout}

    def travel_s(method: Method, num_tokens: int) -> float:
        volumes = decode_volumes(heads, num_tokens, method, exchange=exchange, whole=whole, **options)
        launches = 2 * (layout.sp > 1)
        if method == "qship":
            launches = (heads.sp > 1) * ((not whole) + 1 + (exchange == "ag_rs"))
        return launches * link.alpha_s + max(float(volume.total) for volume in volumes) / link.bytes_per_s

    def step(method: Method) -> Curve:
        if method == "local" and local == "one":
            return Curve.line(0.0, 0.0)
        return Curve(_REQUESTS, tuple(travel_s(method, n * queries) for n in _REQUESTS))

    head = 2 * head_dim * itemsize
    shard = max(heads.kv_shard(tp_rank).size for tp_rank in range(heads.tp)) * head
    by_heads = max(held.size for held in heads.kv_ranges) * head
    reads = {"local": shard if local == "one" else by_heads, "qship": shard / heads.sp}
    stays, qship = (
        MethodCosts(step(method), {1: Curve((0, _MOST), (0.0, _MOST * reads[method] / memory_bytes_per_s))})
        for method in _METHODS
    )
    sent = (heads.sp - 1) / heads.sp * shard if local == "one" else _dealt(heads) * head
    moved = sent / link.bytes_per_s
    return DecodeCosts(
        stays,
        qship,
        move=Curve((0, _MOST), (link.alpha_s, link.alpha_s + _MOST * moved)),
        window=window,
        source=f"predicted for tp={heads.tp}, sp={heads.sp}, {memory_bytes_per_s * 1e-9:,.0f} GB/s of memory, "
        f"{link.bytes_per_s * 1e-9:,.3g} GB/s and {link.alpha_s * 1e6:,.3g} us of link",
    )


def _dealt(heads: HeadMap) -> float:
    """KV heads of a token that the busiest rank sends, on average, when whole sequences are dealt out by tokens."""
    routes = (route for tp_rank in range(heads.tp) for route in enumerate(heads.kv_routes(tp_rank)))
    return max(sum(len(held) for to, held in enumerate(route) if to != rank) for rank, route in routes) / heads.sp


def consolidation_steps(remote_tokens: int, *, token_bytes: int, bytes_per_s: float, saved_s: float) -> float:
    """Steps after which moving a cache once has paid, in latency; infinite where a step saves nothing.

    Of a context that is spread, the remote tokens to one rank: each step then saves the exchange, as long as it does
    not wait for memory. The other way, of one rank's to all: each saves what `DecodeCosts.saved_s` says.

    Args:
        remote_tokens: that travel over one rank's link.
        token_bytes: of a token's keys and values in a layer.
        bytes_per_s: of the link.
        saved_s: in one layer of a step.
    """
    return remote_tokens * token_bytes / (bytes_per_s * saved_s) if saved_s > 0 else inf


def exchange_from(
    heads: HeadMap,
    head_dim: int,
    *,
    link: LinkCosts,
    adding: LinkCosts,
    itemsize: int = 2,
    layout: Layout | None = None,
    most: int = 1 << 16,
) -> int | None:
    """The number of queries from which a reduce-scatter brings partials back sooner than an all-to-all; None for never.

    It sends more, in one collective more, so it pays only where sums are added on their way and arrive faster.
    The number is what `layers.QShipDecodeAttention` takes as `exchange`.

    Args:
        heads: of the model, over tp x sp.
        head_dim: D.
        link: of all-gathers and all-to-alls.
        adding: of reduce-scatters.
        itemsize: bytes of an element.
        layout: that steps run under; the heads' by default.
        most: queries of the largest step to consider.
    """

    def back_s(exchange: Exchange, queries: int) -> float:
        volumes = decode_volumes(
            heads,
            queries,
            "qship",
            head_dim=head_dim,
            itemsize=itemsize,
            layout=layout,
            exchange=exchange,
            whole=True,
        )
        moved = max(
            float(volume.all_to_all + volume.all_gather) / link.bytes_per_s
            + float(volume.reduce_scatter) / adding.bytes_per_s
            for volume in volumes
        )
        return moved + link.alpha_s + (adding.alpha_s if exchange == "ag_rs" else 0.0)

    sizes = range(1, most + 1)
    found = bisect_left(sizes, True, key=lambda n: back_s("ag_rs", n) < back_s("a2a", n))
    return sizes[found] if found < len(sizes) else None


def _plain(costs: DecodeCosts) -> dict[str, Any]:
    """What JSON can hold: its keys are no numbers."""
    content = asdict(costs)
    for name in _METHODS:
        content[name]["context"] = [{"requests": n, **curve} for n, curve in content[name]["context"].items()]
    return content


def _costs(content: dict[str, Any]) -> DecodeCosts:
    def curve(points: dict[str, Any]) -> Curve:
        return Curve(tuple(points["tokens"]), tuple(points["seconds"]))

    local, qship = (
        MethodCosts(curve(content[name]["step"]), {each["requests"]: curve(each) for each in content[name]["context"]})
        for name in _METHODS
    )
    move = content["move"]
    return DecodeCosts(local, qship, move and curve(move), content["window"], content["source"])


def _crossing(choice: DecodeChoice) -> str:
    costs, batch = choice.costs, choice.batch
    tokens = choice.crossover_tokens
    if tokens is None:
        return "crossover: none; shipping is slower, or no faster, at the longest context that is known"
    if not tokens:
        return "crossover: none; shipping is faster at every context"
    times = (f"{name} {_us(costs.seconds(name, tokens, batch))}" for name in _METHODS)
    return f"crossover at {tokens:,} tokens: {', '.join(times)}"


def _table(choice: DecodeChoice) -> list[str]:
    """A line for the context asked for and each power of four that is known: both times, and the choice."""
    costs, batch = choice.costs, choice.batch
    most = min(costs.longest, 1 << 20)
    rows = [("context", "local", "qship", "chosen", "other")]
    for n in sorted({choice.context_tokens, *(4**i for i in range(4, 11) if 4**i <= most)}):
        local, qship = (costs.seconds(name, n, batch) for name in _METHODS)
        chosen = choice.method_of(n, batch)
        mine, other = (local, qship) if chosen == "local" else (qship, local)
        rows.append((f"{n:,}", _us(local), _us(qship), chosen, f"{other / mine - 1:+,.0%}" if mine else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _us(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f} us" if us >= 100 else f"{us:.3g} us"
