"""Text out of tokens, beside the text of all of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from seqpar.batching import Words

CHECKPOINT = Path(__file__).parent.parent.parent / "examples" / "tiny-llama"
PIECES = (b"a", b"b", b"ab", b" c", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xf0", b"\x9f", b"\x98\x80", b"\xff", b"")
STOPS = ("ab", "ba", "a", "b c", "cab", "\u00e9", "\u20aca", "bb", "\ufffdb")

Decode = Callable[[Sequence[int]], str]


def say_bytes(tokens: Sequence[int]) -> str:
    """Of tokens that are some bytes each, as byte-level tokenizers decode."""
    return b"".join(PIECES[token] for token in tokens).decode("utf-8", "replace")


def say_fallback(tokens: Sequence[int]) -> str:
    """Of words and single bytes, as SentencePiece does: a run of bytes is text or all broken; the first space goes."""
    text, run = "", b""
    for token in [*tokens, -1]:
        if 0 <= token < 256:
            run += bytes([token])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += "" if token < 0 else (" one", " two", "three", "")[token - 256]
    return text.removeprefix(" ")


def streamed(tokens: Sequence[int], decode: Decode, stops: tuple[str, ...] = ()) -> tuple[list[str], Words]:
    """What is told after each token, and at last what there is at the end."""
    words, told = Words(stops), list[str]()
    for token in tokens:
        words = words.add(token, decode)
        told.append(words.told)
    return told, words


def cut(text: str, stops: Sequence[str]) -> str:
    """Up to the stop string that ends first, character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


def begun(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end that begins a stop string."""
    starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
    return max((len(start) for start in starts if text.endswith(start)), default=0)


@settings(max_examples=150)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=40), stops=st.lists(st.sampled_from(STOPS), max_size=3)
)
def test_any_bytes_and_any_stops(tokens: list[int], stops: list[str]) -> None:
    told, words = streamed(tokens, say_bytes, tuple(stops))
    text = cut(say_bytes(tokens), stops)
    assert words.end().told == text and words.end().end() == words.end()
    assert words.end().stopped == (text != say_bytes(tokens))
    before = ""
    for count, now in enumerate(told, 1):
        assert now.startswith(before) and text.startswith(now), "nothing is taken back"
        before = now
        whole = say_bytes(tokens[:count])
        if stops and cut(whole, stops) == whole and not re.search("\ufffd", whole):
            assert now == whole[: len(whole) - begun(whole, stops)], "no more is held than must be, and no less"
    assert words.count == len(tokens)


@settings(max_examples=60)
@given(
    parts=st.lists(st.sampled_from(["\u00e9", "\u20ac", "\U0001f600", "one", "two", "three"]), max_size=40),
    stop=st.sampled_from(["\u00e9\u00e9", "\u20ac", "one t", "\U0001f600 one"]),
)
def test_runs_of_bytes_that_are_one_text_or_none(parts: list[str], stop: str) -> None:
    names = {"one": [256], "two": [257], "three": [258]}
    tokens = [token for part in parts for token in names.get(part, list(part.encode()))]
    text = say_fallback(tokens)
    told, words = streamed(tokens, say_fallback)
    assert words.end().told == text and all("\ufffd" not in each for each in told)
    assert streamed(tokens, say_fallback, (stop,))[1].end().told == cut(text, [stop])


def test_tokens_that_say_nothing_hide_no_space() -> None:
    """Where the window is cut before one, the word after it would be the first of a text."""
    for count in range(12, 24):
        tokens = [256] * count + [259, 259, 257, 256]
        assert streamed(tokens, say_fallback)[1].told == say_fallback(tokens)


def test_a_character_that_never_comes_is_told_at_the_end() -> None:
    told, words = streamed([0, 4], say_bytes)
    assert told == ["a", "a"] and words.end().told == "a\ufffd"
    told, words = streamed([11] * 200, say_bytes)
    assert len(told[100]) > 60, "bytes that are none are not held for ever"
    assert words.end().told == "\ufffd" * 200 and len(words._window) < 64


def test_a_stop_string_in_what_was_broken() -> None:
    words = streamed([1, 11], say_bytes, ("b\ufffd",))[1]
    assert (words.told, words.held, words.stopped) == ("", "b", False)
    assert words.end().stopped and words.end().told == "" and words.end().end() == words.end()
    after = words.end().add(0, say_bytes)
    assert after.told == "" and after.stopped and after.count == 3


def test_the_bundled_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "def f(x):\n    return '\u00e9\u20ac\U0001f600' * 3  # \u4e2d\u6587, \t and \U0001f468\u200d\U0001f469\n" * 6
    tokens = tokenizer(text).input_ids
    calls, most = [], 0

    def decode(window: Sequence[int]) -> str:
        nonlocal most
        calls.append(window)
        most = max(most, len(window))
        said: str = tokenizer.decode(window)
        return said

    told, words = streamed(tokens, decode)
    assert words.end().told == tokenizer.decode(tokens) and len(calls) < 1.3 * len(tokens) and most < 40
    assert not any("\ufffd" in each for each in told)
    stop = "# \u4e2d"
    assert streamed(tokens, decode, (stop,))[1].told == tokenizer.decode(tokens).split(stop)[0]


@pytest.mark.parametrize(
    ("text", "expected"), [("xabc", "xa"), ("abcd", ""), ("ab", "ab"), ("aab", "aab"), ("abcdx", "a")]
)
def test_the_stop_that_ends_first(text: str, expected: str) -> None:
    """In one token or in many: of "abcd" and "b c" the first is not begun twice."""
    stops = {"xabc": ("xabcd", "bc"), "abcd": ("abc", "bcd"), "ab": ("abc",), "aab": ("ac",), "abcdx": ("abcd", "bc")}[
        text
    ]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(text if token < 0 else chr(token) for token in tokens)

    for tokens in ([-1], [ord(letter) for letter in text]):
        assert streamed(tokens, decode, stops)[1].end().told == expected


def test_what_is_held_is_told_where_no_more_comes() -> None:
    assert Words.of(b"a sto", lambda tokens: bytes(tokens).decode(), ["stop"]).told == "a sto"
