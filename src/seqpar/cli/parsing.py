"""Arguments: a parser whose errors are one line, and the values that commands share. No PyTorch."""

from __future__ import annotations

import argparse
import re
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["Parser", "Tuned", "count", "duration", "positive", "shares", "whole_file"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


class Parser(argparse.ArgumentParser):
    """Prints help as it is written, and errors in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def count(text: str) -> int:
    """A size of at least 1: 512, 32k, 1m.

    >>> count("512"), count("32k"), count("1.5k"), count("1M")
    (512, 32768, 1536, 1048576)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower())
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if size < 1 or size != int(size):
        raise argparse.ArgumentTypeError(f"a size must be at least 1, such as 512 or 32k, got {text!r}")
    return int(size)


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "above 0", lambda value: value > 0)


def duration(text: str) -> float:
    """Seconds: a finite number that is not negative."""
    return _number(text, "at least 0", lambda value: value >= 0)


def _number(text: str, bound: str, holds: Any) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -inf
    if not (isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"a number must be finite and {bound}, got {text!r}")
    return value


def shares(text: str) -> tuple[float, ...]:
    """Pipeline stages: how many, or what each weighs.

    >>> shares("4"), shares("3,1")
    ((0.25, 0.25, 0.25, 0.25), (0.75, 0.25))
    """
    try:
        parts = [1.0] * int(text) if "," not in text else [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(isfinite(part) and part > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"stages must be a number such as 4 or weights such as 3,3,2, got {text!r}")
    return tuple(part / sum(parts) for part in parts)


def whole_file(text: str) -> Path:
    """A file, or a folder, that exists."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return path


class Tuned(NamedTuple):
    """A rank and numbers that go with it, written RANK:NUMBER[:NUMBER...]."""

    rank: int
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, most: int, form: str) -> Tuned:
        """One to `most` numbers after a rank; `form` is what to say otherwise."""
        first, *rest = text.split(":")
        try:
            rank, numbers = int(first), tuple(map(float, rest))
        except ValueError:
            rank, numbers = -1, ()
        if rank < 0 or not 1 <= len(numbers) <= most:
            raise argparse.ArgumentTypeError(f"it must be written {form}, got {text!r}")
        return cls(rank, numbers)
