"""Text out of tokens as they come: no half of a character, and nothing of what may become a stop string.

Tokens are not characters. A character may take several tokens, which decoders write as U+FFFD until the last of them is
there; a token's text may depend on the one before it; a stop string may begin in one token and end in another. So the
text of new tokens is what decoding a window of the last ones adds to what the window said before, an end that is no
whole character waits, and so does an end that is the beginning of a stop string, until it is one or cannot become one.

What comes out does not depend on where tokens end: the stop string that ends first counts, and of those that end at
one place the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["Words"]

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_UNFINISHED = 3  # the most tokens of a character that is not whole: one byte each, of at most four
_GARBAGE = 32  # after so many tokens without a whole character the bytes are taken as they are
_WINDOW = 16  # tokens after which the window is cut
_MARGIN = 4  # tokens that stay in it before new ones, which some tokenizers need to see to write spaces


@dataclass(frozen=True)
class Words:
    """The text of some tokens, as far as it is decided. Adding a token gives another one.

    Attributes:
        stops: texts that end it; neither they nor what follows are part of it.
        told: the text that is decided.
        held: whole characters after it, which may be the beginning of a stop string.
        stopped: whether a stop string has come.
        count: tokens so far.

    >>> words = Words(("stop",))
    >>> for token in "a stoat stops here":
    ...     words = words.add(ord(token), lambda tokens: "".join(map(chr, tokens)))
    >>> words.told, words.stopped
    ('a stoat ', True)
    """

    stops: tuple[str, ...] = ()
    told: str = ""
    held: str = ""
    stopped: bool = False
    count: int = 0
    _window: tuple[int, ...] = ()
    _shown: int = 0  # characters of the window's text that have been told or held
    _broken: str = ""  # what the window's text has after them
    _pending: int = 0  # tokens since there was nothing broken
    _cut: int = 0  # where the window will be cut: after some token with which nothing was broken

    @classmethod
    def of(cls, tokens: Iterable[int], decode: Callable[[Sequence[int]], str], stops: Iterable[str] = ()) -> Words:
        """The text of tokens after which no more come.

        >>> Words.of(b"a stoat stops here", lambda tokens: bytes(tokens).decode(), ["stop"]).told
        'a stoat '
        """
        words = cls(tuple(stops))
        for token in tokens:
            words = words.add(token, decode)
        return words.end()

    def add(self, token: int, decode: Callable[[Sequence[int]], str]) -> Words:
        """The text with one more token.

        Args:
            token: the next one.
            decode: what tokens say, such as a tokenizer's `decode`.
        """
        if self.stopped:
            return replace(self, count=self.count + 1)
        window, pending = (*self._window, token), self._pending + 1
        text = decode(list(window))
        whole = _whole(text, pending)
        shown = max(self._shown, whole)
        broken = text[shown:]
        added = replace(
            self._release(text[self._shown : whole]),
            count=self.count + 1,
            _window=window,
            _shown=shown,
            _broken=broken,
            _pending=pending if broken else 0,
        )
        return added if broken else added._slide(decode)

    def end(self) -> Words:
        """The text where no more tokens come: what was held is told, unless it is a stop string after all."""
        if self.stopped:
            return self
        last = replace(self._release(self._broken), _broken="")
        return last if last.stopped else replace(last, told=last.told + last.held, held="")

    def _release(self, new: str) -> Words:
        """Tell what is decided now that `new` has come."""
        text = self.held + new
        ends = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            return replace(self, told=self.told + text[: min(ends)[1]], held="", stopped=True)
        kept = len(text) - _begun(text, self.stops)
        return replace(self, told=self.told + text[:kept], held=text[kept:])

    def _slide(self, decode: Callable[[Sequence[int]], str]) -> Words:
        """Leave out tokens of long ago, up to one with which a character ended."""
        length = len(self._window)
        if not self._cut:
            return replace(self, _cut=length) if length >= _WINDOW else self
        if length < self._cut + _MARGIN:
            return self
        window = self._window[self._cut :]
        return replace(self, _window=window, _shown=len(decode(list(window))), _cut=0)


def _whole(text: str, pending: int) -> int:
    """How many characters of a text are there, where the last `pending` tokens have not ended with a whole one."""
    if pending > _GARBAGE:
        return len(text)
    broken = len(text) - len(text.rstrip(_BROKEN))
    return len(text) - (broken if pending <= _UNFINISHED else min(broken, _UNFINISHED))


def _begun(text: str, stops: Sequence[str]) -> int:
    """How long an end of a text is that begins a stop string: the longest such."""
    most = min(len(text), max(map(len, stops), default=1) - 1)
    return next((size for size in range(most, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
