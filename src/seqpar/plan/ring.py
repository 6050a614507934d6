"""Ring attention in numbers: the bytes that each rank sends, exactly, and what to send round.

With L tokens evenly over N ranks, h query and g KV heads of size D and b bytes an element, at most

    pass-KV    (N - 1) * L/N * 2 g D * b
    pass-Q     (N - 1) * T/N * h * (D * b + D * b + 4)    queries there, outputs and log-sum-exps back; T new tokens

The mask leaves out some: of contiguous slices rank r sends those of ranks 0 to r alone, and the last one none.

What to send round is a question of time (`ring_costs`): keys cost more where few new tokens follow many cached ones,
but are free as long as the attention of a block takes longer than its transfer; queries have to be answered. Meta's
rules, by name in `ring_method`, compare the same with peak rates, and with all answers exposed at the end.

Source: Context Parallelism, arXiv:2411.01783, Algorithms 1 and 5, equations 1 to 5 and the fit of its appendix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal, NamedTuple

from seqpar.kernels.quantize import Wire, check_wire, encoded_width
from seqpar.partition import RingOrder, Run

__all__ = ["RingCase", "RingCosts", "ring_costs", "ring_method", "ring_seconds", "ring_volumes"]

Method = Literal["kv", "q"]
Rule = Literal["cost", "meta-1", "meta-5", "meta-fit"]


def ring_volumes(
    order: RingOrder,
    method: Method,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    wire: Wire | None = None,
    backward: bool = False,
) -> tuple[int, ...]:
    """Bytes that each rank sends in the forward, or backward, of one `layers.RingAttention`, but for sinks.

    Args:
        order: what travels (`RingAttention.order`).
        method: what goes round in the forward.
        num_heads: h, of one tensor-parallel shard.
        num_kv_heads: g, likewise.
        head_dim: D.
        itemsize: b.
        wire: the layer's format.
        backward: of the backward pass instead: the same for both methods, but that a wire format is for what the
            forward sent round.

    Raises:
        ValueError: an unknown method or format, sizes below 1, or an order whose ranks do not hold the same requests.
    """
    check_order(order)
    check_method(method)
    check_wire(wire)
    sizes = (num_heads, num_kv_heads, head_dim, itemsize)
    if min(sizes) < 1:
        raise ValueError(
            f"`num_heads`, `num_kv_heads`, `head_dim` and `itemsize` must be at least 1, got "
            f"{', '.join(map(str, sizes))}"
        )
    ranks, lse = order.ranks, 8 if itemsize == 8 else 4
    sent = head_dim * itemsize if wire is None else encoded_width(head_dim, wire)
    keys = 2 * num_kv_heads * (sent if method == "kv" else head_dim * itemsize)
    found = []
    for rank in range(ranks):
        total = 0
        for hop in range(1, order.hops + 1):
            behind, ahead = (rank - hop) % ranks, (rank + hop) % ranks
            if backward or method == "kv":
                total += _tokens(order.keys_at((behind + 1) % ranks, hop)) * keys
            if backward:
                total += _tokens(order.seen_at(behind, hop)) * 2 * num_kv_heads * head_dim * lse
            elif method == "q":
                total += _tokens(order.queries_at((ahead - 1) % ranks, hop)) * num_heads * sent
                total += _tokens(order.answered_at(ahead, hop)) * num_heads * (sent + lse)
        found.append(total)
    return tuple(found)


def check_method(method: Method) -> None:
    """Refuse what is none."""
    if method not in ("kv", "q"):
        raise ValueError(f'`method` must be "kv" or "q", got {method!r}')


def check_order(order: RingOrder) -> None:
    """Refuse ranks that hold different numbers of requests."""
    held = [*map(len, order.q), *map(len, order.kv)]
    if not order.q or len(order.q) != len(order.kv) or len({*held}) != 1:
        raise ValueError(
            "`order` must say of at least one rank which queries and keys of the same requests it holds, got "
            f"{len(order.q)} and {len(order.kv)} ranks of {sorted({*held})} requests"
        )


def check_rates(latency_s: float, **rates: float) -> None:
    """Refuse rates that are not positive, and a negative latency."""
    wrong = {name: rate for name, rate in rates.items() if not rate > 0}
    if wrong or not latency_s >= 0:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in rates)} must be > 0 and latencies >= 0, got "
            f"{', '.join(map(str, rates.values()))} and {latency_s}"
        )


def _tokens(held: tuple[tuple[Run, ...], ...]) -> int:
    return sum(run.size for runs in held for run in runs)


@dataclass(frozen=True)
class RingCase:
    """One request's prefill in one layer; tokens spread evenly, and work balanced.

    Args:
        new: T, tokens to be computed.
        cached: P, tokens before them, their keys on the ranks.
        ranks: N.
        num_heads: h, of one tensor-parallel shard.
        num_kv_heads: g, likewise.
        head_dim: D.
        itemsize: b.

    Raises:
        ValueError: no new tokens, or a size that is none.
    """

    new: int
    cached: int
    ranks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2

    def __post_init__(self) -> None:
        sizes = (self.new, self.ranks, self.num_heads, self.num_kv_heads, self.head_dim, self.itemsize)
        if min(sizes) < 1 or self.cached < 0:
            raise ValueError(f"sizes must be at least 1, and `cached` at least 0, got {self}")

    @property
    def new_share(self) -> float:
        """T / (T + P)."""
        return self.new / (self.new + self.cached)

    @property
    def step_flops(self) -> float:
        """Of one rank with one block, causal: 4 h D for each visible pair."""
        pairs = self.new * self.cached + self.new * (self.new + 1) / 2
        return 4 * self.num_heads * self.head_dim * pairs / self.ranks**2

    @property
    def kv_bytes(self) -> int:
        """A block of keys and values."""
        return -(-(self.new + self.cached) // self.ranks) * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def q_bytes(self) -> int:
        """A block of queries."""
        return -(-self.new // self.ranks) * self.num_heads * self.head_dim * self.itemsize

    @property
    def answer_bytes(self) -> int:
        """The output and log-sum-exp of a block of queries."""
        return -(-self.new // self.ranks) * self.num_heads * (self.head_dim * self.itemsize + 4)


class RingCosts(NamedTuple):
    """Seconds of one layer's attention with keys, and with queries going round."""

    kv_s: float
    q_s: float

    @property
    def method(self) -> Method:
        """The faster one; keys where they are equal."""
        return "kv" if self.kv_s <= self.q_s else "q"


def ring_seconds(step_s: float, hop_s: float, ranks: int, end_s: float = 0.0) -> float:
    """A ring of `ranks` blocks of `step_s`, each but the first under a transfer of `hop_s`; what comes at the end."""
    return step_s + (ranks - 1) * max(step_s, hop_s) + end_s


def ring_costs(
    case: RingCase,
    *,
    flops: float,
    bytes_per_s: float,
    latency_s: float = 0.0,
    answers: Literal["hops", "end"] = "hops",
) -> RingCosts:
    """What both methods take, given what attention and a link of one rank achieve.

    Args:
        case: the request.
        flops: of attention on one rank, a second.
        bytes_per_s: that one rank sends.
        latency_s: of a message.
        answers: "hops" sends each answer under the next block and exposes the last, as `layers.RingAttention` does;
            "end" sends all of them after the last block.

    Raises:
        ValueError: a rate that is not positive, or a negative latency.
    """
    check_rates(latency_s, flops=flops, bytes_per_s=bytes_per_s)
    step = case.step_flops / flops
    keys, queries, answer = (latency_s + n / bytes_per_s for n in (case.kv_bytes, case.q_bytes, case.answer_bytes))
    kv_s = ring_seconds(step, keys, case.ranks)
    if case.ranks == 1:
        return RingCosts(kv_s, step)
    if answers == "end":
        end = latency_s + (case.ranks - 1) * case.answer_bytes / bytes_per_s
        return RingCosts(kv_s, ring_seconds(step, queries, case.ranks, end))
    # Under the first two blocks the link carries queries, under the last one an answer, under the others both.
    under = [queries, *[queries + answer] * (case.ranks - 3), answer] if case.ranks > 2 else [0.0]
    return RingCosts(kv_s, sum(max(step, hop) for hop in (queries, *under)) + answer)


def ring_method(
    case: RingCase, *, flops: float, bytes_per_s: float, latency_s: float = 0.0, rule: Rule = "cost"
) -> Method:
    """What to send round.

    Args:
        case: the request.
        flops: of attention on one rank, a second; Meta's rules start from the peak rate.
        bytes_per_s: that one rank sends.
        latency_s: of a message; Meta's rules know none.
        rule: "cost", the faster of `ring_costs`; "meta-1" keys where they hide or are smaller (Algorithm 1); "meta-5"
            the same with the answers' all-to-all counted (Algorithm 5); "meta-fit", the fit to their measurements with
            its published coefficients, which knows no rates. Read with natural logarithms that fit says "q" for every
            row of their own table, also where they measured that keys are faster; with decimal ones "kv" for all.

    Raises:
        ValueError: an unknown rule; rates as for `ring_costs`.
    """
    check_rates(latency_s, flops=flops, bytes_per_s=bytes_per_s)
    if rule == "cost":
        return ring_costs(case, flops=flops, bytes_per_s=bytes_per_s, latency_s=latency_s).method
    if rule == "meta-fit":
        return "kv" if -1.059 * log(case.new) + 1.145 * log(case.new_share) + 12.112 > 0 else "q"
    if rule not in ("meta-1", "meta-5"):
        raise ValueError(f'`rule` must be one of "cost", "meta-1", "meta-5", "meta-fit", got {rule!r}')
    threshold = 2 * case.num_kv_heads / case.num_heads
    if rule == "meta-5":
        threshold -= 4 * case.new * bytes_per_s / (case.ranks * flops * case.itemsize)
    return "kv" if case.new >= hidden_from(case, flops, bytes_per_s) or case.new_share >= threshold else "q"


def hidden_from(case: RingCase, flops: float, bytes_per_s: float) -> float:
    """The new tokens from which keys hide under attention, however many are cached (Meta's equation 2)."""
    return case.ranks * flops * case.num_kv_heads * case.itemsize / (2 * case.num_heads * bytes_per_s)
