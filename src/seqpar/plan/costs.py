"""What a layer costs, as a function of which tokens of a prompt it is given: the numbers that decisions are made from.

A layer is a row of slots, one for each collective: local work, then what travels. Under tensor parallelism there are
two (attention and its sum, MLP and its sum), under Ulysses three (the last has nothing to send), under both four. The
attention's share grows with the keys that a chunk sees, everything else with its tokens alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from seqpar.plan.schedule import Slot

__all__ = ["Curve", "LayerCosts", "Prompt", "SlotCosts"]

Counts: TypeAlias = int | Sequence[int]


@dataclass(frozen=True)
class Curve:
    """Seconds by number of tokens: straight between the points, and beyond them as between the nearest two.

    Args:
        tokens: increasing.
        seconds: one for each; never negative. What the line would make negative is 0.

    Raises:
        ValueError: no points, or points that are not as said.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "seconds", tuple(self.seconds))
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise ValueError(
                f"`seconds` must have one entry for each of `tokens`, and there must be one, got {len(self.seconds)} "
                f"for {len(self.tokens)}"
            )
        if self.tokens[0] < 0 or any(a >= b for a, b in pairwise(self.tokens)):
            raise ValueError(f"`tokens` must be >= 0 and increasing, got {list(self.tokens)}")
        if not all(0 <= value < inf for value in self.seconds):
            raise ValueError(f"`seconds` must be finite and >= 0, got {list(self.seconds)}")

    @classmethod
    def line(cls, fixed_s: float, per_token_s: float) -> Curve:
        """`fixed_s + per_token_s * tokens`: launch and latency, then a rate."""
        return cls((0, 1 << 20), (fixed_s, fixed_s + per_token_s * (1 << 20)))

    def __call__(self, tokens: int) -> float:
        """Seconds for that many tokens; none take none."""
        if not tokens:
            return 0.0
        if len(self.tokens) == 1:
            return self.seconds[0] * tokens / self.tokens[0] if self.tokens[0] else self.seconds[0]
        at = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        (a, b), (start, stop) = self.tokens[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return max(0.0, start + (stop - start) * (tokens - a) / (b - a))


@dataclass(frozen=True)
class SlotCosts:
    """One slot of a layer.

    Args:
        compute: the local work for a chunk's tokens, without what `per_pair_s` counts.
        comm: the collective for a chunk's tokens, from launch to result; None where nothing is sent.
        per_pair_s: attention, for each query and key that it sees.
    """

    compute: Curve
    comm: Curve | None = None
    per_pair_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.per_pair_s < inf:
            raise ValueError(f"`per_pair_s` must be finite and >= 0, got {self.per_pair_s}")


@dataclass(frozen=True)
class LayerCosts:
    """One layer, on the slowest rank.

    Args:
        slots: in the layer's order.
        window: keys that a token sees, itself included; None for all.
        contention: share of the compute rate that is lost while a collective is under way.
        link_contention: share of the link's rate that is lost meanwhile.
        last: slots of a last layer of which few rows are wanted, for the tokens of all chunks: up to its append to the
            cache. The wanted rows then go through a whole layer. Empty where the last layer is like the others.
        source: where the numbers are from.
        resolution: what predictions from them are worth, as a share: cuts that differ by less are taken to do as well.
    """

    slots: tuple[SlotCosts, ...]
    window: int | None = None
    contention: float = 0.0
    link_contention: float = 0.0
    last: tuple[SlotCosts, ...] = ()
    source: str = ""
    resolution: float = 2e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))
        object.__setattr__(self, "last", tuple(self.last))
        if not self.slots:
            raise ValueError("`slots` must have at least one entry, got none")
        if self.window is not None and self.window < 1:
            raise ValueError(f"`window` must be at least 1, got {self.window}")
        if not 0 <= self.resolution < 1:
            raise ValueError(f"`resolution` must be in [0, 1), got {self.resolution}")

    def chunk(self, prompt: Prompt, start: int, stop: int, *, last: bool = False) -> tuple[Slot, ...]:
        """The slots of one layer for the tokens [start, stop) of a step."""
        tokens, pairs = stop - start, prompt.pairs(start, stop)
        return tuple(
            Slot(
                slot.compute(tokens) + slot.per_pair_s * pairs,
                0.0 if slot.comm is None else slot.comm(tokens),
            )
            for slot in (self.last if last else self.slots)
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerCosts:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold such costs.
        """
        try:
            content = json.loads(Path(path).read_text())
            slots, last = (tuple(map(_slot, content.pop(name))) for name in ("slots", "last"))
            return cls(slots, last=last, **content)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"`path` must hold layer costs as `save` writes them, got {path}: {error}") from None


def curve_of(tokens: list[int], seconds: list[float]) -> Curve:
    """What JSON holds of one."""
    return Curve(tuple(tokens), tuple(seconds))


def _slot(content: dict[str, Any]) -> SlotCosts:
    curves = {name: None if content[name] is None else curve_of(**content[name]) for name in ("compute", "comm")}
    assert curves["compute"] is not None
    return SlotCosts(curves["compute"], curves["comm"], content["per_pair_s"])


class Prompt:
    """The new tokens of a step in their flat order, and which keys they see.

    Args:
        tokens: of one request, or of each.
        prefix: keys of each request that are cached already.
        window: keys that a token sees, itself included; None for all.

    Raises:
        ValueError: a negative count, or prefixes of another number of requests.
    """

    def __init__(self, tokens: Counts, prefix: Counts = 0, window: int | None = None) -> None:
        self.lengths = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        self.prefixes = (prefix,) * len(self.lengths) if isinstance(prefix, int) else tuple(prefix)
        if len(self.prefixes) != len(self.lengths) or min((*self.lengths, *self.prefixes), default=0) < 0:
            raise ValueError(
                "tokens and prefixes must be counts >= 0, one for each request, got "
                f"{list(self.lengths)} and {list(self.prefixes)}"
            )
        self._window = window
        self._starts = (0, *accumulate(self.lengths))
        wholes = (self._seen(p + n) - self._seen(p) for p, n in zip(self.prefixes, self.lengths, strict=True))
        self._pairs = (0, *accumulate(wholes))

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    def pairs(self, start: int, stop: int) -> int:
        """(query, key) pairs of the tokens [start, stop)."""
        return self._pairs_before(stop) - self._pairs_before(start)

    def _pairs_before(self, token: int) -> int:
        request = min(max(bisect_right(self._starts, token) - 1, 0), len(self.lengths) - 1)
        if request < 0:
            return 0
        prefix = self.prefixes[request]
        return self._pairs[request] + self._seen(prefix + token - self._starts[request]) - self._seen(prefix)

    def _seen(self, tokens: int) -> int:
        """Keys that the first `tokens` tokens of a request see, in all."""
        full = tokens if self._window is None else min(tokens, self._window)
        return full * (full + 1) // 2 + (tokens - full) * full
