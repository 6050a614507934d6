"""The loop over a toy model: any policy, arrivals, cancellations, preemptions and pages give a request's own tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import comm
from seqpar.batching import Budget, Emitted, FullHybrid, Generation, Request, Sampling, StallFree, TemporalFusion, share
from tests.batching.test_compose import MAKE
from tests.batching.toy import VOCAB, Toy, alone, text, toy_cache
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

WAYS: list[dict[str, Any]] = [
    {},
    {"stop_tokens": [3, 11, 17, 28]},
    {"stop_strings": ["a", "qx"]},
    {"sampling": (0.8, None, 1.0, 5)},
    {"sampling": (1.5, 6, 0.7, 9), "stop_tokens": [2]},
]


def request_of(number: int, prompt: int, new: int, way: int) -> Request:
    options = dict(WAYS[way])
    if "sampling" in options:
        options["sampling"] = Sampling(*options["sampling"])
    return Request(number, [(7 * number + 3 * i) % VOCAB for i in range(prompt)], new, **options)


def loop_of(num_pages: int = 40, page_size: int = 4, **options: Any) -> TemporalFusion:
    kv = toy_cache(num_pages, page_size)
    options = {"policy": StallFree(8), "budget": Budget(8, 6), "text": text, **options}
    return TemporalFusion(Toy(kv), kv, vocab_size=VOCAB, **options)


whole = st.integers
arrivals = st.lists(
    st.tuples(whole(0, 6), whole(1, 10), whole(1, 12), whole(0, 4), st.none() | whole(1, 12)), min_size=1, max_size=6
)


@settings(max_examples=60)
@given(
    plan=arrivals,
    name=st.sampled_from(sorted(MAKE)),
    page_size=whole(1, 5),
    more_pages=whole(0, 3),
    max_tokens=whole(1, 12),
    max_requests=whole(1, 6),
    admission=st.sampled_from(["known", "whole"]),
    preemption=st.sampled_from(["recompute", "swap"]),
    compaction=st.sampled_from(["none", "tail", "window", "stable"]),
)
def test_any_mixture_gives_a_request_its_own_tokens(
    plan: list[tuple[int, int, int, int, int | None]],
    name: str,
    page_size: int,
    more_pages: int,
    max_tokens: int,
    max_requests: int,
    admission: Any,
    preemption: Any,
    compaction: Any,
) -> None:
    wanted = [request_of(number, prompt, new, way) for number, (_, prompt, new, way, _) in enumerate(plan)]
    most = max(-(-each.most_cached // page_size) for each in wanted)
    budget = Budget(max_tokens, max_requests, admission)
    options: dict[str, Any] = {"preemption": preemption, "compaction": compaction}
    loop = loop_of(most + more_pages, page_size, policy=MAKE[name](), budget=budget, **options)
    model: Any = loop._model
    added: list[Generation] = []
    cancelled: set[int] = set()
    emitted: list[Emitted] = []
    number = 0
    while number < 7 or loop.live:
        for request, (when, _, _, _, until) in zip(wanted, plan, strict=True):
            if when == number:
                added.append(loop.add(request))
            if until == number and request.id in loop.live:
                cancelled.add(number_of(request))
                loop.cancel(request.id)
        before = loop.steps
        emitted += loop.step()
        assert model.calls == loop.steps <= before + 1, "one forward, whatever the mix"
        check(loop)
        number += 1
    for generation in added:
        request = generation.request
        tokens, finish = alone(request)
        if generation.finish == "cancelled":
            assert request.id in cancelled and generation.tokens == tokens[: len(generation.tokens)]
        else:
            assert (generation.tokens, generation.finish) == (tokens, finish)
        mine = [each for each in emitted if each.id == request.id]
        assert [each.token for each in mine if each.token is not None] == generation.tokens, "streamed as they come"
        assert [each.finish for each in mine if each.finish] == [generation.finish]
    assert not loop.kv.ids and loop.kv.free_pages == loop.kv.num_pages, "nothing leaks"


def number_of(request: Request) -> int:
    assert isinstance(request.id, int)
    return request.id


def check(loop: TemporalFusion) -> None:
    """Between the steps the loop and its cache agree."""
    loop.kv.integrity()
    assert set(loop.kv.ids) == {each.id for each in loop.running}
    for each in loop.running:
        assert each.computed == each.scheduled == loop.kv.length(each.id) <= each.tokens <= each.limit + 1
    for each in loop.waiting:
        assert each.computed == each.scheduled == (loop._saved[each.id].length if each.id in loop._saved else 0)


def test_tokens_are_streamed_by_iterating() -> None:
    loop = loop_of()
    first, second = loop.add(request_of(1, 9, 6, 0)), loop.add(request_of(2, 3, 8, 3))
    assert list(first) == alone(first.request)[0]
    assert list(second) == alone(second.request)[0] and not loop.live
    assert list(second) == second.tokens, "again, without a step"


def test_others_go_on_when_a_request_is_refused() -> None:
    loop = loop_of(num_pages=6, page_size=4)
    good = loop.add(request_of(1, 9, 6, 0))
    loop.step()
    bad: list[tuple[Any, str]] = [
        (lambda: loop.add(request_of(1, 3, 3, 0)), "`id` must be of no other live request, got 1 again"),
        (
            lambda: loop.add(request_of(2, 20, 6, 0)),
            r"must fit into the cache \(24 tokens for a request\), got 20 and 6 for request 2; grow the cache",
        ),
        (lambda: loop.add(Request(3, [5, VOCAB], 2)), "`prompt` must hold ids below 31, got 31 for request 3"),
        (lambda: loop.cancel(7), "`request` must be the id of a live request, got 7"),
        (lambda: loop.add(Request(4, [], 2)), "`prompt` must have at least one token"),
        (lambda: loop.follow(), "`follow` must be called where another rank leads"),
    ]
    for call, message in bad:
        with own_errors(), pytest.raises(ValueError, match=message):
            call()
        loop.step()
    assert list(good) == alone(good.request)[0]
    loop.add(request_of(2, 20, 5, 0))  # just fits
    loop.cancel(2)
    with pytest.raises(ValueError, match="got 2"):
        loop.cancel(2)
    assert loop.step() == (Emitted(2, None, "cancelled"),)
    loop.close()
    with pytest.raises(ValueError, match="`add` must be called before the loop is closed"):
        loop.add(request_of(5, 3, 3, 0))
    plain = loop_of(text=None)
    with pytest.raises(ValueError, match="`stop_strings` must be empty for a loop without `text`"):
        plain.add(request_of(1, 3, 3, 2))


def test_a_model_that_fails_leaves_everything_as_it_was() -> None:
    loop = loop_of()
    model: Any = loop._model
    generations = [loop.add(request_of(i, 5 + i, 6, 0)) for i in range(3)]
    loop.step()
    for _ in range(3):
        model.fails = True
        with pytest.raises(RuntimeError, match="the model failed"):
            loop.step()
        check(loop)
        model.fails = False
        loop.step()
    words, loop._text = loop._text, lambda tokens: str(1 // 0)
    stopped = loop.add(request_of(9, 4, 5, 2))
    with pytest.raises(ZeroDivisionError):
        list(stopped)
    check(loop)
    loop._text = words
    for generation in (*generations, stopped):
        assert list(generation) == alone(generation.request)[0]


def test_buffers_are_reordered_when_a_request_leaves() -> None:
    """One page for each request: what is left is one run of pages, by as few moves as there can be."""
    loop = loop_of(8, 16, budget=Budget(100, 8), policy=StallFree(100), compaction="window")
    generations = [loop.add(request_of(i, 4, 3 if i in (1, 3) else 9, 0)) for i in range(6)]
    while loop.live:
        before = {each: loop.kv.pages(each) for each in loop.kv.ids}
        loop.step()
        pages = {each: loop.kv.pages(each)[0] for each in loop.kv.ids}
        if len(pages) == 4 < len(before):
            assert sorted(pages.values()) == [2, 3, 4, 5], "the window with the most of them"
            assert [before[each] for each in pages] == [(0,), (2,), (4,), (5,)] and pages[0] == 3
    assert all(each.tokens == alone(each.request)[0] for each in generations)


def preempts(preemption: Any) -> tuple[list[int], int]:
    """Tokens of prompts that are computed while memory runs out: both need a fourth page at once."""
    loop = loop_of(6, 4, budget=Budget(50, 2, "known"), policy=StallFree(50), preemption=preemption)
    model: Any = loop._model
    generations = [loop.add(request_of(i, 9, 7, 0)) for i in range(2)]
    generations.append(loop.add(request_of(2, 1, 1, 0)))
    rows = []
    while loop.live:
        loop.step()
        check(loop)
        if loop.latest is not None and loop.latest.preempted:
            assert [each.id for each in loop.waiting] == [1, 2], "at the head of the queue"
        rows.append(0 if loop.latest is None else loop.latest.num_tokens)
    assert all(each.tokens == alone(each.request)[0] for each in generations)
    return rows, model.calls


def test_who_gives_way_is_computed_again_or_kept() -> None:
    again, kept = preempts("recompute")[0], preempts("swap")[0]
    assert sum(kept) == 2 * 15 + 1 < sum(again)
    assert again[0] == kept[0] == 18 and max(again[1:]) > 9 and max(kept[1:]) <= 2
    for option in ("preemption", "compaction"):
        with own_errors(), pytest.raises(ValueError, match=f"`{option}` must be .*, got 'none of them'"):
            loop_of(**{option: "none of them"})


def test_a_stop_string_is_found_across_tokens_and_not_before() -> None:
    loop = loop_of()
    request = request_of(4, 6, 40, 0)
    tokens = alone(request)[0]
    stop = text(tokens[17:20])
    first = text(tokens).index(stop) + len(stop)
    found = loop.add(Request(4, request.prompt, 40, stop_strings=["never there", stop]))
    assert list(found) == tokens[:first] and found.finish == "stop_string"


def led(mesh: comm.DeviceMesh) -> tuple[list[tuple[Any, Any]], int, int]:
    """Only rank 0 knows of the requests."""
    group = comm.groups(mesh).flat
    loop = loop_of(num_pages=9, page_size=3, policy=FullHybrid(), budget=Budget(7, 4, "known"), lead=group)
    steps: list[Any] = []
    if group.rank():
        with pytest.raises(
            ValueError, match=f"`add` must be called on the rank that leads \\(0\\), got {group.rank()}"
        ):
            loop.add(request_of(0, 2, 2, 0))
        inner = loop._advance
        loop._advance = lambda plan: (steps.append(plan), inner(plan))[1]  # type: ignore[method-assign]
        loop.follow()
    else:
        with loop:
            generations = [loop.add(request_of(i, 3 + 4 * i, 6, i)) for i in range(4)]
            for _ in range(5):
                loop.step()
                steps.append(loop.latest)
            loop.cancel(3)
            while any(each.finish is None for each in generations):
                before = loop.steps
                loop.step()
                steps += [loop.latest] * (loop.steps - before)
            for each in generations[:3]:
                assert (each.tokens, each.finish) == alone(each.request)
            loop.add(request_of(9, 3, 3, 0))
        assert not loop.live
    assert loop.kv.free_pages == 9 and not loop.live
    return steps, loop.steps, len(share(list(range(3000)) if group.rank() == 0 else None, group=group))


def test_rank_0_leads() -> None:
    first, second = run_mesh((2, 1), led)
    assert first == second and first[2] == 3000
