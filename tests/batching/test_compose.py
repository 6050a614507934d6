"""Steps composed for random requests, caches and budgets, until all of them are through."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.batching import (
    Budget,
    DecodeMaximal,
    Draft,
    Exclusive,
    FullHybrid,
    Policy,
    PrefillFirst,
    Progress,
    RequestLevel,
    Room,
    StallFree,
    Step,
    compose,
)
from tests.kernels.own_errors import own_errors

MAKE: dict[str, Any] = {
    "request": RequestLevel,
    "prefill": PrefillFirst,
    "hybrid": FullHybrid,
    "maximal": lambda: DecodeMaximal(7, 4),
    "stall-free": lambda: StallFree(9, 3),
    "exclusive": Exclusive,
    "mixed": lambda: Exclusive(0.25),
}
requests = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=7)


class Simulation:
    """A cache of which only the pages are counted, and requests that arrive, run and end."""

    def __init__(self, policy: Policy, budget: Budget, page_size: int, num_pages: int) -> None:
        self.policy, self.budget, self.page_size, self.free = policy, budget, page_size, num_pages
        self.running: list[Progress] = []
        self.waiting: deque[Progress] = deque()
        self.log: list[Step] = []

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def step(self) -> Step:
        """Compose a step, twice, and carry it out."""
        room, before = Room(self.page_size, self.free), copy.deepcopy((self.running, self.waiting))
        step = compose(self.running, self.waiting, self.budget, self.policy, room)
        again = compose(*before, self.budget, self.policy, room)
        assert step == again, "a pure function"
        assert [vars_of(each) for each in before[0]] == [vars_of(each) for each in self.running], "of what it leaves"
        self.check(step)
        for request in step.preempted:
            victim = self.running.pop()
            assert victim.id == request, "the newest first"
            self.free += self.pages(victim.scheduled)
            victim.scheduled = victim.computed = 0
            self.waiting.appendleft(victim)
        for request in step.admitted:
            assert self.waiting[0].id == request, "in the order of the queue"
            self.running.append(self.waiting.popleft())
        named = {each.id: each for each in self.running}
        assert len(named) <= self.budget.max_requests
        for request, new in step.items:
            each = named[request]
            self.free -= self.pages(each.scheduled + new) - self.pages(each.scheduled)
            each.scheduled += new
            assert new > 0 and each.scheduled <= each.tokens <= each.limit + 1
            each.computed, each.served = each.scheduled, len(self.log)
            if each.scheduled == each.tokens:
                each.tokens += 1
                if each.tokens > each.limit:
                    self.free += self.pages(each.scheduled)
                    self.running.remove(each)
        assert self.free >= 0, "no page is given that is not there"
        self.log.append(step)
        return step

    def check(self, step: Step) -> None:
        """What every policy promises, and what each of them does."""
        policy, named = self.policy, {each.id: each for each in (*self.running, *self.waiting)}
        assert step.num_tokens <= self.budget.max_tokens and len(set(step.ids)) == len(step.ids)
        assert all(new == 1 for new in step.q_lens[: step.num_decodes])
        assert step.ids or not named, "something runs as long as there is something"
        chunks = [(named[request], new) for request, new in list(step.items)[step.num_decodes :]]
        decodes = [each for each in self.running if each.tokens - each.scheduled == 1 and each.scheduled]
        left = min(self.budget.max_tokens, getattr(policy, "tau", 1 << 30))
        if isinstance(policy, StallFree):
            assert step.num_tokens <= policy.tau
        if isinstance(policy, (StallFree, FullHybrid, DecodeMaximal)) and not step.preempted:
            assert self.budget.admission != "whole" or step.num_decodes == min(len(decodes), left)
        if isinstance(policy, RequestLevel):
            assert not step.admitted or not self.running
        if isinstance(policy, (PrefillFirst, RequestLevel)) or policy == Exclusive():
            assert not (chunks and step.num_decodes)
        if isinstance(policy, DecodeMaximal):
            assert len(chunks) <= 1
        if isinstance(policy, (PrefillFirst, FullHybrid)):
            whole = all(each.scheduled + new == each.tokens for each, new in chunks[1:])
            assert whole or self.budget.admission != "whole"


def vars_of(each: Progress) -> tuple[Any, ...]:
    return each.id, each.tokens, each.limit, each.scheduled, each.computed, each.served


def through(
    policy: Policy, arrivals: list[tuple[int, int, int]], budget: Budget, page_size: int, more_pages: int
) -> list[Step]:
    """All steps until all requests have ended."""
    needs = [-(-(prompt + new - 1) // page_size) for _, prompt, new in arrivals]
    run = Simulation(policy, budget, page_size, max(needs) + more_pages)
    all_pages = run.free
    for number in range(600):
        for at, (when, prompt, new) in enumerate(arrivals):
            if when == number:
                run.waiting.append(Progress(at, prompt, prompt + new - 1))
        if run.running or run.waiting:
            run.step()
        elif number > max(when for when, _, _ in arrivals):
            break
    assert not run.running and not run.waiting and run.free == all_pages, "all end"
    return run.log


@settings(max_examples=100)
@given(
    name=st.sampled_from(sorted(MAKE)),
    arrivals=requests,
    max_tokens=st.integers(1, 12),
    max_requests=st.integers(1, 6),
    page_size=st.integers(1, 5),
    more_pages=st.integers(0, 3),
    admission=st.sampled_from(["known", "whole"]),
    spare=st.integers(0, 2),
)
def test_every_request_gets_through(
    name: str,
    arrivals: list[tuple[int, int, int]],
    max_tokens: int,
    max_requests: int,
    page_size: int,
    more_pages: int,
    admission: Any,
    spare: int,
) -> None:
    budget = Budget(max_tokens, max_requests, admission, spare)
    log = through(MAKE[name](), arrivals, budget, page_size, more_pages)
    assert admission != "whole" or not any(step.preempted for step in log)


def test_caches_that_run_full() -> None:
    """More requests than fit, of which most steps of most runs take pages from one."""
    preempted = 0
    for seed in range(120):
        draw = random.Random(seed)
        arrivals = [(draw.randint(0, 6), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(draw.randint(3, 7))]
        budget = Budget(draw.randint(1, 12), draw.randint(2, 6), "known")
        policy = MAKE[sorted(MAKE)[seed % len(MAKE)]]()
        log = through(policy, arrivals, budget, draw.randint(1, 5), draw.randint(0, 3))
        preempted += any(step.preempted for step in log)
    assert preempted > 60


def decoding(count: int, *, tokens: int = 10, served: int = 0) -> list[Progress]:
    return [Progress(f"d{i}", tokens, 100, tokens - 1, tokens - 1, served) for i in range(count)]


ROOM = Room(16, 1000)


def test_the_chunk_ends_on_a_tile_with_its_decodes() -> None:
    """SARATHI's example: a target of 256 rows on tiles of 128."""
    waiting = [Progress("p", 1000, 1100), Progress("q", 1000, 1100)]
    for decodes, chunk in ((0, 256), (3, 253), (17, 239), (130, 254)):
        step = compose(decoding(decodes), waiting, Budget(1000, 500), DecodeMaximal(256, 128), ROOM)
        assert step.q_lens == (1,) * decodes + (chunk,) and step.admitted == ("p",)
    off = compose(decoding(3), waiting, Budget(1000, 500), DecodeMaximal(64, 128), ROOM)
    assert off.q_lens[-1] == 64, "no tile is in reach"
    short = compose(decoding(3), [Progress("p", 40, 50)], Budget(1000, 500), DecodeMaximal(256, 128), ROOM)
    assert short.q_lens[-1] == 40, "a prompt is not made longer"


def test_prompts_get_what_decodes_leave() -> None:
    waiting = [Progress("p", 20, 30), Progress("q", 500, 510), Progress("r", 5, 8)]
    step = compose(decoding(30), waiting, Budget(1000, 500), StallFree(100), ROOM)
    assert step.q_lens == (1,) * 30 + (20, 50) and step.admitted == ("p", "q") and step.num_decodes == 30
    assert compose(decoding(30), waiting, Budget(64, 500), StallFree(100), ROOM).num_tokens == 64
    assert compose(decoding(30), waiting, Budget(1000, 500), StallFree(100, 32), ROOM).num_tokens == 96


def test_too_many_decodes_take_turns_by_age() -> None:
    """Ten decodes, four rows: each is served once before any is served again."""
    running, served = decoding(10), []
    for number in range(1, 6):
        step = compose(running, [], Budget(100, 100), StallFree(4), ROOM)
        assert len(step.ids) == 4
        served += step.ids
        for each in running:
            if each.id in step.ids:
                each.served = number
    assert served[:8] == [f"d{i}" for i in range(8)] and served[8:12] == ["d0", "d1", "d8", "d9"]


def test_a_decode_without_a_page_leaves_its_row_to_another() -> None:
    """The newest has waited longest, but may take no page from an older one, which would wait for it for ever."""
    old, new = Progress("old", 12, 15, 11, 11, served=7), Progress("new", 5, 6, 4, 4, served=1)
    step = compose([old, new], [], Budget(1, 5, "known"), Exclusive(), Room(2, 0))
    assert step.ids == ("old",) and not step.preempted


def test_turns_of_exclusive_steps() -> None:
    """Decodes never wait for two prompts in a row."""
    running, waiting = decoding(3, served=4), [Progress("p", 5, 9), Progress("q", 5, 9)]
    budget = Budget(5, 10)
    step = compose(running, waiting, budget, Exclusive(), ROOM)
    assert step.ids == ("p",), "all decodes have just run"
    joined = waiting.pop(0)
    joined.scheduled = joined.computed = 5
    joined.tokens, joined.served = 6, 5
    step = compose([*running, joined], waiting, budget, Exclusive(), ROOM)
    assert step.ids == ("d0", "d1", "d2", "p") and not step.admitted
    step = compose(decoding(1), waiting, budget, Exclusive(0.2), ROOM)
    assert step.q_lens == (1, 4), "few enough to be mixed"


def test_a_prompt_that_is_longer_than_a_step_is_cut_rather_than_left() -> None:
    waiting = [Progress("long", 90, 99), Progress("short", 3, 5)]
    step = compose(decoding(2), waiting, Budget(50, 10), FullHybrid(), ROOM)
    assert step.q_lens == (1, 1, 48) and step.admitted == ("long",)
    begun = Progress("begun", 200, 210, 48, 48)
    for policy, q_lens in ((FullHybrid(), (1, 1, 48)), (PrefillFirst(), (50,))):
        step = compose([*decoding(2), begun], waiting, Budget(50, 10), policy, ROOM)
        assert step.q_lens == q_lens and step.ids[-1] == "begun", "and goes on beside decodes"
    step = compose([], list(reversed(waiting)), Budget(50, 10), PrefillFirst(), ROOM)
    assert step.ids == ("short",), "a whole prompt waits for a step of its own"


def test_whole_needs_are_counted_before_a_request_joins() -> None:
    """Two of 40 tokens each may become 60; 100 pages of one token hold one of them to its end."""
    room = Room(1, 100)
    waiting = [Progress("a", 40, 60), Progress("b", 40, 60)]
    assert compose([], waiting, Budget(500, 9), FullHybrid(), room).admitted == ("a",)
    assert compose([], waiting, Budget(500, 9, "known"), FullHybrid(), room).admitted == ("a", "b")
    assert compose([], waiting, Budget(500, 9, "known", 21), FullHybrid(), room).admitted == ("a",)


def test_the_newest_gives_way() -> None:
    running = decoding(3, tokens=9)  # of two full pages each
    step = compose(running, [Progress("p", 1, 1)], Budget(50, 9), StallFree(50), Room(4, 0))
    assert step.preempted == ("d2",) and step.ids == ("d0", "d1") and not step.admitted
    short = Progress("short", 3, 9, 2, 2)  # of one half of a page
    step = compose([*running[:2], short], [], Budget(50, 9), StallFree(50), Room(4, 0))
    assert step.preempted == ("short",) and step.ids == ("d0",), "one page is one decode's"
    running[2].computed = 7  # in flight: its pages are being written
    step = compose(running, [], Budget(50, 9), StallFree(50), Room(4, 0))
    assert not step.preempted and not step.ids


class ChunksFirst:
    """A policy of somebody else's, which gives prompts what decodes need."""

    def fill(self, draft: Draft) -> None:
        draft.prefill()
        draft.decode()


def test_what_gives_way_leaves_the_step() -> None:
    """A chunk that was taken is given back, with its pages and its rows, when an older decode needs them."""
    running = [*decoding(1, tokens=9), Progress("p", 20, 30, 4, 4)]
    step = compose(running, [], Budget(9, 9), ChunksFirst(), Room(4, 2))
    assert list(step.items) == [("d0", 1)] and step.preempted == ("p",)


def test_what_is_in_flight_is_not_scheduled_again() -> None:
    """A decode whose token is not there yet waits; a prompt's next chunk may follow at once."""
    busy = Progress("busy", 10, 100, 10, 9)
    chunked = Progress("chunked", 50, 100, 16, 0)
    step = compose([busy, chunked], [], Budget(8, 9), StallFree(8), ROOM)
    assert list(step.items) == [("chunked", 8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(0, 1), "`max_tokens` and `max_requests` must be at least 1, got 0 and 1"),
        (lambda: Budget(1, 0), "must be at least 1, got 1 and 0"),
        (lambda: Budget(1, 1, spare_pages=-1), "`spare_pages` must be at least 0, got -1"),
        (lambda: StallFree(0), "`tau` and `tile` must be at least 1, got 0 and 1"),
        (lambda: DecodeMaximal(0), "`chunk` and `tile` must be at least 1, got 0 and 1"),
        (lambda: DecodeMaximal(4, 0), "got 4 and 0"),
        (lambda: Exclusive(1.5), r"`threshold` must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message):
        make()
