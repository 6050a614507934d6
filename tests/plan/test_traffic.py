"""Traces: what a file must hold, and requests drawn from a seed."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from seqpar.plan import Arrival, make_trace, read_trace, write_trace

LINE = '{"at_s": 1, "prompt_tokens": 5, "new_tokens": 2}'


def test_what_is_written_is_read(tmp_path: Path) -> None:
    trace = make_trace(50, per_s=3.0, prompt_tokens=20, new_tokens=4)
    write_trace(tmp_path / "trace.jsonl", trace)
    assert read_trace(tmp_path / "trace.jsonl") == trace


def test_lines_come_in_any_order_and_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(f'{LINE}\n\n{{"at_s": 0.5, "prompt_tokens": 7, "new_tokens": 1}}\n')
    assert read_trace(tmp_path / "trace.jsonl") == (Arrival(0.5, 7, 1), Arrival(1.0, 5, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "Expecting value"),
        ("[1, 2, 3]", "a line must be an object with at_s, prompt_tokens, new_tokens and no more, got list"),
        ('{"at_s": 1, "prompt_tokens": 5}', r"and no more, got \['at_s', 'prompt_tokens'\]"),
        (LINE.replace("}", ', "id": 3}'), r"got \['at_s', 'id', 'new_tokens', 'prompt_tokens'\]"),
        (LINE.replace("1,", '"now",', 1), "`at_s` must be a number, got 'now'"),
        (LINE.replace("1,", "true,", 1), "`at_s` must be a number, got True"),
        (LINE.replace("1,", "NaN,", 1), "`at_s` must be finite and >= 0, got nan"),
        (LINE.replace("1,", "-1,", 1), "`at_s` must be finite and >= 0, got -1.0"),
        (LINE.replace("5", "5.5"), "`prompt_tokens` and `new_tokens` must be integers, got 5.5 and 2"),
        (LINE.replace("5", "0"), "`prompt_tokens` and `new_tokens` must be at least 1, got 0 and 2"),
    ],
)
def test_the_line_that_is_wrong_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_text(f"{LINE}\n{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError, match=rf"trace\.jsonl:3: .*{message}"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="`path` must hold at least one request, got none"):
        read_trace(tmp_path / "trace.jsonl")


def test_traces_are_what_was_asked_for_and_the_same_for_a_seed() -> None:
    options = {"prompt_tokens": 300, "new_tokens": 40}
    trace = make_trace(4000, per_s=5.0, **options)
    assert trace == make_trace(4000, per_s=5.0, **options) != make_trace(4000, per_s=5.0, seed=1, **options)
    waits = [b.at_s - a.at_s for a, b in pairwise(trace)]
    assert statistics.fmean(waits) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(waits) == pytest.approx(0.2, rel=0.1)  # Poisson
    assert statistics.fmean(each.prompt_tokens for each in trace) == pytest.approx(300, rel=0.05)
    assert statistics.fmean(each.new_tokens for each in trace) == pytest.approx(40, rel=0.05)
    alike = make_trace(10, per_s=5.0, spread=0.0, **options)
    assert {(each.prompt_tokens, each.new_tokens) for each in alike} == {(300, 40)}
    bursts = make_trace(4000, per_s=5.0, bursts=9.0, **options)
    waits = [b.at_s - a.at_s for a, b in pairwise(bursts)]
    assert (statistics.stdev(waits) / statistics.fmean(waits)) ** 2 == pytest.approx(9.0, rel=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "`count`, `prompt_tokens` and `new_tokens` must be at least 1, got 0, 1 and 1"),
        ({"per_s": 0.0}, "`per_s` and `bursts` must be positive, `spread` >= 0 and all finite, got 0.0, 1.0 and 0.5"),
    ],
)
def test_what_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace(**{"count": 1, "per_s": 1.0, "prompt_tokens": 1, "new_tokens": 1} | options)  # type: ignore[arg-type]
