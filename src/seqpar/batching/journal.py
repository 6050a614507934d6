"""Every token as it came, in a file: what is left of a loop whose processes died, and what the next one goes on from.

A line holds what one iteration emitted, and is with the operating system before anybody is told of it. A process that
dies in the middle of a line leaves half of one; it is cut off, and those tokens are generated again, the same ones.
Keys are not kept: a rank that died has taken its heads along, and one prefill computes them again for a whole request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType

from seqpar.batching.requests import Request
from seqpar.batching.words import Words

__all__ = ["Journal"]


class Journal:
    """What has been generated, kept in a file where there is a path, by the rank that leads.

    Args:
        path: of the file; one that is there is read first, and gone on from. None keeps nothing.

    Attributes:
        tokens: of each request, by its id, in the order of their first ones.
        finish: why a request has ended; None while it goes on.

    Raises:
        ValueError: the file is no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.tokens: dict[Hashable, list[int]] = {}
        self.finish: dict[Hashable, str | None] = {}
        self._file = None if path is None else open(path, "a+b")  # noqa: SIM115
        if self._file is None:
            return
        try:
            self._file.seek(0)
            lines = [line for line in self._file if line.endswith(b"\n")]
            for number, line in enumerate(lines, 1):
                self._take(_emitted(line, f"{os.fspath(path or '')}:{number}"))
            self._file.truncate(sum(map(len, lines)))
        except BaseException:
            self._file.close()
            raise

    def add(self, emitted: Iterable[tuple[Hashable, int | None, str | None]]) -> None:
        """Note what an iteration of the loop emitted.

        Raises:
            TypeError: an id that is neither a text nor an integer; nothing is noted then.
        """
        emitted = tuple(emitted)
        for request, _, _ in emitted:
            _check_id(request)
        if emitted and self._file is not None:
            self._file.write(json.dumps(emitted).encode() + b"\n")
            self._file.flush()  # to the system: a process may die from here on, though not the machine
        self._take(emitted)

    def rest(self, request: Request) -> Request | None:
        """What is left to do of a request: all of it, or from the tokens on that are there; None where it has ended.

        Raises:
            TypeError: an id that is neither a text nor an integer.
            ValueError: the tokens that are there are not those of this request.
        """
        _check_id(request.id)
        if self.finish.get(request.id) is not None:
            return None
        return replace(request, generated=tuple(self.tokens.get(request.id, ())))

    def text(self, request: Request, decode: Callable[[Sequence[int]], str]) -> str:
        """What the tokens of a request say, without what ends it; see `Generation.text`.

        Args:
            request: one that has ended, or that no more tokens are waited for.
            decode: what tokens say, such as a tokenizer's `decode`.
        """
        tokens = self.tokens.get(request.id, [])
        said = tokens[:-1] if self.finish.get(request.id) == "stop_token" else tokens
        return Words.of(said, decode, request.stop_strings).told

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, emitted: Iterable[Sequence[object]]) -> None:
        for request, token, finish in emitted:
            assert isinstance(request, (str, int))
            tokens = self.tokens.setdefault(request, [])
            if isinstance(token, int):
                tokens.append(token)
            self.finish[request] = None if finish is None else str(finish)


def _check_id(request: Hashable) -> None:
    if not isinstance(request, (str, int)) or isinstance(request, bool):
        raise TypeError(f"`id` must be a text or an integer to be kept in a journal, got {request!r}")


def _emitted(line: bytes, where: str) -> list[list[object]]:
    """The checked content of a line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # also what is no UTF-8
        found = None
    if not isinstance(found, list) or not all(map(_is_emitted, found)):
        raise ValueError(f"`path` must be of a journal, got another line at {where}: {line[:60]!r}")
    return found


def _is_emitted(each: object) -> bool:
    if not isinstance(each, list) or len(each) != 3:
        return False
    request, token, finish = each
    kinds = type(request) in (str, int), token is None or type(token) is int, finish is None or type(finish) is str
    return all(kinds)
