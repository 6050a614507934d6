"""The loop over a toy model, case by case; what any history of it gives is in `test_master`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from seqpar import comm
from seqpar.batching import Budget, Emitted, FullHybrid, Request, Sampling, StallFree, TemporalFusion, share
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
    words, loop.text = loop.text, lambda tokens: str(1 // 0)
    stopped = loop.add(request_of(9, 4, 5, 2))
    with pytest.raises(ZeroDivisionError):
        list(stopped)
    check(loop)
    loop.text = words
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


def test_text_is_told_as_it_is_decided() -> None:
    """What may begin a stop string waits, in one request and not in others; tokens that complete one are kept."""
    loop = loop_of()
    request = request_of(4, 6, 40, 0)
    tokens = alone(request)[0]
    stop = text(tokens[17:20])
    end = text(tokens).index(stop)
    stopped = loop.add(Request(4, request.prompt, 40, stop_strings=[stop, stop[1:] + "zzz"]))
    plain = loop.add(Request("plain", request.prompt, 40))
    pieces = []
    for piece in stopped.texts():
        pieces.append(piece)
        assert text(stopped.tokens).startswith("".join(pieces)) and len("".join(pieces)) <= end
    assert "".join(pieces) == stopped.text == text(tokens)[:end] and stopped.finish == "stop_string"
    assert stopped.tokens == tokens[: end + 3]
    assert "".join(plain.texts()) == plain.text == text(tokens) and list(plain.texts()) == [plain.text]
    cancelled = loop.add(Request(5, request.prompt, 40, stop_strings=[text(tokens[5:8])]))
    while len(cancelled.tokens) < 7:
        loop.step()
    assert cancelled.text == text(tokens[:5]), "two letters of three"
    loop.cancel(5)
    loop.step()
    assert cancelled.text == text(tokens[:7])
    ended = loop.add(Request(6, request.prompt, 40, stop_tokens=[tokens[3]]))
    assert "".join(ended.texts()) == text(tokens[: tokens.index(tokens[3])]), "a stop token says nothing"
    assert ended.tokens[-1] == tokens[3]
    wordless = loop_of(text=None).add(request_of(1, 3, 3, 0))
    with pytest.raises(ValueError, match="`text` must be given to the loop for the text of a request"):
        next(wordless.texts())


def test_that_a_request_was_cancelled_is_said_after_a_step_that_failed() -> None:
    loop = loop_of()
    model: Any = loop._model
    generations = [loop.add(request_of(i, 5, 6, 0)) for i in range(2)]
    loop.step()
    loop.cancel(0)
    model.fails = True
    with pytest.raises(RuntimeError, match="the model failed"):
        loop.step()
    model.fails = False
    assert generations[0].finish == "cancelled" and loop.live == (1,)
    assert loop.step()[0] == Emitted(0, None, "cancelled")
    assert list(generations[1]) == alone(generations[1].request)[0]


def test_a_policy_that_fails_leaves_everything_as_it_was() -> None:
    loop = loop_of()
    loop.add(request_of(0, 5, 6, 0))
    loop.step()
    late = loop.add(request_of(1, 5, 6, 0))
    loop.cancel(0)
    policy, loop.policy = loop.policy, object()  # type: ignore[assignment]
    with own_errors(), pytest.raises(AttributeError, match="fill"):
        loop.step()
    loop.policy = policy
    assert loop.step()[0] == Emitted(0, None, "cancelled")
    assert list(late) == alone(late.request)[0] and not loop.live


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
            with own_errors(), pytest.raises(ValueError, match="`id` must be equal to its copy on another rank"):
                loop.add(Request(object(), [1], 1))
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
