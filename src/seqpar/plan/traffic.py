"""Requests as they come: when, with how long a prompt, and for how many tokens; read, written, or drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, log
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["Arrival", "make_trace", "read_trace", "write_trace"]

_KEYS = ("at_s", "prompt_tokens", "new_tokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Args:
        at_s: when it comes.
        prompt_tokens: of its prompt.
        new_tokens: that it generates.

    Raises:
        ValueError: a time that is not finite or below 0, no prompt, or nothing to generate.
    """

    at_s: float
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < inf:
            raise ValueError(f"`at_s` must be finite and >= 0, got {self.at_s}")
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise ValueError(
                f"`prompt_tokens` and `new_tokens` must be at least 1, got {self.prompt_tokens} and {self.new_tokens}"
            )

    @property
    def most_cached(self) -> int:
        """The most tokens that a cache ever holds of it: the last one generated is never appended."""
        return self.prompt_tokens + self.new_tokens - 1


def read_trace(path: str | PathLike[str]) -> tuple[Arrival, ...]:
    """The requests of a JSONL file, in the order in which they come.

    A line is an object with `at_s`, `prompt_tokens` and `new_tokens`; empty lines are skipped.

    Raises:
        ValueError: a line that is none, named by its number, or no requests.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                found.append(_parse(json.loads(line)))
            except ValueError as error:  # which one of JSON is, too
                raise ValueError(f"`path` must hold a request on every line, got {path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"`path` must hold at least one request, got none in {path}")
    return tuple(sorted(found, key=lambda arrival: arrival.at_s))


def write_trace(path: str | PathLike[str], trace: Iterable[Arrival]) -> None:
    """Write what `read_trace` reads."""
    lines = (json.dumps({key: getattr(arrival, key) for key in _KEYS}) for arrival in trace)
    Path(path).write_text("".join(f"{line}\n" for line in lines))


def make_trace(
    count: int,
    *,
    per_s: float,
    prompt_tokens: int,
    new_tokens: int,
    spread: float = 0.5,
    bursts: float = 1.0,
    seed: int = 0,
) -> tuple[Arrival, ...]:
    """Requests that come at random, the same for a seed.

    Args:
        count: of the requests.
        per_s: how many come in a second, on average.
        prompt_tokens: of a prompt, on average.
        new_tokens: generated for a request, on average.
        spread: of both lengths, which are log-normal: the standard deviation of their logarithms; 0 for all alike.
        bursts: how uneven arrivals are: squared coefficient of variation of the time between two, 1 for Poisson's.
        seed: of the random numbers.

    Raises:
        ValueError: sizes below 1, a rate or bursts that are not positive, a negative spread.
    """
    if min(count, prompt_tokens, new_tokens) < 1:
        raise ValueError(
            "`count`, `prompt_tokens` and `new_tokens` must be at least 1, got "
            f"{count}, {prompt_tokens} and {new_tokens}"
        )
    if not (0 < per_s < inf and 0 < bursts < inf and 0 <= spread < inf):
        raise ValueError(
            f"`per_s` and `bursts` must be positive, `spread` >= 0 and all finite, got {per_s}, {bursts} and {spread}"
        )
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        lengths = (_length(draw, mean, spread) for mean in (prompt_tokens, new_tokens))
        found.append(Arrival(now, *lengths))
        now += draw.gammavariate(1 / bursts, bursts / per_s)
    return tuple(found)


def _length(draw: random.Random, mean: int, spread: float) -> int:
    """A log-normal number with that mean, at least 1."""
    return max(1, round(draw.lognormvariate(log(mean) - spread**2 / 2, spread)))


def _parse(content: Any) -> Arrival:
    """The request of one line; ValueError where it is none."""
    if not isinstance(content, dict) or set(content) != set(_KEYS):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"a line must be an object with {', '.join(_KEYS)} and no more, got {keys}")
    at_s, *tokens = (content[key] for key in _KEYS)
    if isinstance(at_s, bool) or not isinstance(at_s, (int, float)):
        raise ValueError(f"`at_s` must be a number, got {at_s!r}")
    if any(type(size) is not int for size in tokens):
        raise ValueError(f"`prompt_tokens` and `new_tokens` must be integers, got {tokens[0]!r} and {tokens[1]!r}")
    return Arrival(float(at_s), *tokens)
