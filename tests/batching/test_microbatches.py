"""Steps in flight: which may be composed beside others, under every policy, and what is refused."""

from __future__ import annotations

import copy
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.batching import (
    Budget,
    DecodeMaximal,
    Draft,
    MicroBatchQueue,
    Progress,
    Room,
    Spread,
    StallFree,
    Step,
    compose,
)
from tests.batching.test_compose import MAKE
from tests.kernels.own_errors import own_errors

whole = st.integers


@settings(max_examples=60)
@given(
    wanted=st.lists(st.tuples(whole(1, 20), whole(1, 6)), min_size=1, max_size=6),
    name=st.sampled_from(sorted(MAKE)),
    depth=whole(1, 4),
    max_tokens=whole(1, 12),
    max_requests=whole(1, 6),
)
def test_chunks_run_back_to_back_and_decodes_one_at_a_time(
    wanted: list[tuple[int, int]], name: str, depth: int, max_tokens: int, max_requests: int
) -> None:
    """All requests end, with as many tokens as they want, and no step in flight needs a token of another."""
    queue, policy = MicroBatchQueue(depth), Spread(MAKE[name](), depth)
    waiting = deque(Progress(i, prompt, prompt + new - 1) for i, (prompt, new) in enumerate(wanted))
    prompts = {i: prompt for i, (prompt, _) in enumerate(wanted)}
    ends = {i: prompt + new for i, (prompt, new) in enumerate(wanted)}
    running: dict[int, Progress] = {}
    for _ in range(2000):
        step = Step((), ())
        if queue.is_ready:
            step = compose([*running.values()], waiting, Budget(max_tokens, max_requests), policy, Room(4, 999))
            for _ in step.admitted:
                each = waiting.popleft()
                running[each.id] = each
            starts = {request: running[request].scheduled for request in step.ids}
            if step.ids:
                queue.push(step, running)
        for request, new in zip(step.ids, step.q_lens, strict=True):
            begun = [other for other in queue.steps[:-1] if request in other.ids]
            assert starts[request] + new <= prompts[request] or not begun, "a decode needs the token before it"
            assert running[request].scheduled == starts[request] + new <= running[request].tokens
        if step.ids and queue.is_ready:
            continue
        if queue.steps:
            for request in queue.complete().ids:
                each = running[request]
                if each.computed == each.tokens:
                    each.tokens += 1
                    if each.tokens == ends[request]:
                        del running[request]
        elif not running and not waiting:
            break
    assert not running and not waiting and not queue.steps


def test_a_prompt_fills_the_pipeline_alone() -> None:
    queue, policy = MicroBatchQueue(3), Spread(DecodeMaximal(4), 3)
    prompt = {"a": Progress("a", 10, 12)}
    for number, new in enumerate((4, 4, 2)):
        step = compose([*prompt.values()], [], Budget(99, 9), policy, Room(4, 99))
        assert step.q_lens == (new,)
        queue.push(step, prompt)
        assert prompt["a"].scheduled == (4, 8, 10)[number] and prompt["a"].computed == 0
    assert not queue.is_ready and queue.ids == {"a"}
    assert compose([*prompt.values()], [], Budget(99, 9), policy, Room(4, 99)) == Step((), ())
    assert [queue.complete().num_tokens for _ in range(3)] == [4, 4, 2]
    assert prompt["a"].computed == 10 and queue.is_ready and not queue.ids


def test_decodes_are_shared_out_by_who_waited_longest() -> None:
    decoding = {i: Progress(i, 5, 9, 4, 4, served=(3, 1, 2, 0, 5)[i]) for i in range(5)}
    prompt = Progress("p", 50, 60)
    draft = Draft([*decoding.values()], [prompt], Budget(16, 9), Room(4, 99))
    Spread(StallFree(16), 2).fill(draft)
    assert draft.step() == Step((1, 2, 3, "p"), (1, 1, 1, 13), 3, (), ("p",))
    queue = MicroBatchQueue(2)
    queue.push(Step((1, 2, 3), (1, 1, 1), 3), decoding)
    step = compose([*decoding.values()], [], Budget(16, 9), Spread(StallFree(16), 2), Room(4, 99))
    assert step.ids == (0, 4), "those in flight count among those that decode"


def test_what_is_refused() -> None:
    progress = {i: Progress(i, 5, 9, 4, 4) for i in range(3)}
    queue = MicroBatchQueue(2)
    with pytest.raises(ValueError, match="a step must be in flight to be completed, got an empty queue"):
        queue.complete()
    queue.push(Step((0, 1), (1, 1), 2), progress)
    before = copy.deepcopy(progress)
    with own_errors(), pytest.raises(ValueError, match=r"known tokens of each request \(request 1 has 0 left\), got 1"):
        queue.push(Step((2, 1), (1, 1), 2), progress)
    assert repr(progress) == repr(before) and queue.pushed == 1
    queue.push(Step((2,), (1,), 1), progress)
    with pytest.raises(ValueError, match=r"room for a step \(depth 2\), got a full one; complete one"):
        queue.push(Step((2,), (1,), 1), progress)
    for make in (MicroBatchQueue, lambda depth: Spread(StallFree(4), depth)):
        with own_errors(), pytest.raises(ValueError, match="must be at least 1, got 0"):
            make(0)
