"""Requests that come with tokens go on as if they had never stopped; a journal keeps every token, whole lines only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.batching import Journal, Request, Sampling
from tests.batching.test_fusion import check, loop_of, request_of
from tests.batching.toy import VOCAB, alone, text
from tests.kernels.own_errors import own_errors


@settings(max_examples=40)
@given(data=st.data(), prompt=st.integers(1, 9), new=st.integers(1, 12), way=st.integers(0, 4))
def test_a_request_goes_on_from_any_token(data: st.DataObject, prompt: int, new: int, way: int) -> None:
    whole = request_of(3, prompt, new, way)
    tokens, finish = alone(whole)
    begun = data.draw(st.integers(0, len(tokens) - 1))
    loop = loop_of()
    rest = Request(
        3, whole.prompt, new, whole.sampling, whole.stop_tokens, whole.stop_strings, generated=tokens[:begun]
    )
    other, generation = loop.add(request_of(4, 5, 6, 0)), loop.add(rest)
    assert generation.tokens == tokens[:begun]
    emitted = [each.token for each in loop.run() if each.id == 3]
    assert (generation.tokens, generation.finish, emitted) == (tokens, finish, tokens[begun:])
    assert list(generation) == tokens, "all of them, when it is asked for them"
    assert other.tokens == alone(other.request)[0]
    check(loop)


def test_the_journal_of_a_loop_that_stops_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    wanted = [request_of(number, 3 + number, 4 + number, number) for number in range(5)]
    expected = {each.id: alone(each) for each in wanted}
    for _ in range(30):
        with Journal(path) as journal:
            loop = loop_of()
            for request in wanted:
                if (rest := journal.rest(request)) is not None:
                    loop.add(rest)
            for _ in range(2):  # and it is gone
                journal.add(loop.step())
        with path.open("ab") as file:
            file.write(b"[[0, 1, null], [1")
        if not loop.live:
            break
    with Journal(path) as journal:
        assert {name: (journal.tokens[name], journal.finish[name]) for name in journal.tokens} == expected
        assert all(journal.rest(request) is None for request in wanted)
    assert path.read_bytes().endswith(b"]]\n")


def test_no_file() -> None:
    with Journal(None) as journal:
        loop = loop_of()
        generation = loop.add(request_of(1, 3, 4, 0))
        while loop.live:
            journal.add(loop.step())
        assert journal.tokens == {1: generation.tokens} and journal.finish == {1: "length"}
        loop.add(request_of(2, 3, 4, 0))
        loop.cancel(2)
        journal.add(loop.step())
        assert journal.tokens[2] == [] and journal.rest(request_of(2, 3, 4, 0)) is None


@pytest.mark.parametrize(
    "line", ["not json", "{}", "[3]", "[[1, 2]]", '[["a", 1.5, null]]', "[[null, 1, null]]", "[[1, 2, 3]]", "\xff" * 3]
)
def test_what_is_no_journal(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal"
    content = b'[["a", 5, null]]\n' + line.encode("latin-1") + b"\n[[1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be of a journal, got another line at .*:2: "):
        Journal(path)
    assert path.read_bytes() == content, "untouched"


def test_refusals(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with own_errors(), pytest.raises(TypeError, match=r"`id` must be a text or an integer .*, got \(1, 2\)"):
        journal.add([("a", 3, None), ((1, 2), 3, None)])
    with own_errors(), pytest.raises(TypeError, match=r"`id` must be a text or an integer .*, got None"):
        journal.rest(Request(None, [3], 4))
    assert not journal.tokens and not (tmp_path / "journal").read_bytes()
    journal.add([("a", 3, None), ("a", 4, None)])
    journal.close()
    assert json.loads((tmp_path / "journal").read_text()) == [["a", 3, None], ["a", 4, None]]
    bad: list[tuple[dict[str, Any], str]] = [
        (
            {"generated": [3, 4]},
            "`generated` must be fewer than 2 tokens and no stop token, got 2 for request 'a'; it has",
        ),
        ({"generated": [3], "stop_tokens": [3]}, "`generated` must be fewer than 2 tokens and no stop token, got 1"),
        ({"generated": [-3]}, "`prompt` must hold token ids >= 0, got -3"),
    ]
    for options, message in bad:
        with own_errors(), pytest.raises(ValueError, match=message):
            Request("a", [5], 2, Sampling(), **options)
    with own_errors(), pytest.raises(TypeError, match="must be integers, got others for request 'a'"):
        Request("a", [5], 2, generated=[0.5])  # type: ignore[list-item]
    with own_errors(), pytest.raises(ValueError, match=f"`prompt` must hold ids below 31, got {VOCAB}"):
        loop_of().add(Request("a", [5], 2, generated=[VOCAB]))


def test_the_text_of_what_was_kept() -> None:
    """Neither the stop token or stop string that ends it nor what follows, as the loop itself tells it."""
    loop = loop_of()
    generations = [loop.add(request_of(number, 3 + number, 20, number % 3)) for number in range(15)]
    with Journal(None) as journal:
        journal.add(loop.run())
        for each in generations:
            assert journal.text(each.request, text) == each.text
        assert {each.finish for each in generations} == {"length", "stop_token", "stop_string"}
        assert journal.text(request_of(99, 3, 4, 0), text) == ""
