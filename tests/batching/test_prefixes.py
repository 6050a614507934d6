"""Prompts that begin alike: what is computed once, who holds it, and who gives how much of it back."""

from __future__ import annotations

from typing import Any

import pytest

from seqpar.batching import Budget, FullHybrid, Progress, Request, Room, StallFree, TemporalFusion, compose
from tests.batching.toy import VOCAB, Toy, alone, toy_cache
from tests.kernels.own_errors import own_errors

PROMPT = [(3 * i * i + i) % VOCAB for i in range(24)]


def loop_of(num_pages: int = 40, page_size: int = 4, **options: Any) -> TemporalFusion:
    kv = toy_cache(num_pages, page_size)
    options = {"policy": StallFree(100), "budget": Budget(100, 8), "share_prefixes": True, **options}
    return TemporalFusion(Toy(kv), kv, vocab_size=VOCAB, **options)


def rows_of(loop: TemporalFusion, request: Request) -> int:
    """Tokens that are computed for a request that runs to its end."""
    generation, rows = loop.add(request), 0
    while generation.finish is None:
        steps = loop.steps
        loop.step()
        rows += loop.latest.num_tokens if loop.latest is not None and loop.steps > steps else 0
        loop.kv.integrity()
    assert generation.tokens == alone(request)[0]
    return rows


@pytest.mark.parametrize(("page_size", "reused"), [(1, 23), (3, 21), (4, 20), (5, 20), (24, 0), (12, 12)])
def test_only_the_rest_of_a_prompt_is_computed(page_size: int, reused: int) -> None:
    """Full pages, and never the last token, whose logits are wanted; also of a request that has gone."""
    loop = loop_of(60, page_size)
    assert rows_of(loop, Request("a", PROMPT, 3)) == 26 and loop.reused == 0
    assert rows_of(loop, Request("b", PROMPT, 3)) == 26 - reused and loop.reused == reused
    whole = loop_of(60, page_size, share_prefixes=False)
    assert rows_of(whole, Request("a", PROMPT, 3)) == rows_of(whole, Request("b", PROMPT, 3)) == 26
    assert whole.reused == 0 and whole.kv.idle_pages == 0


def test_an_answer_is_part_of_the_next_prompt() -> None:
    loop = loop_of()
    first = loop.add(Request("a", PROMPT[:10], 9))
    list(first)
    second = Request("b", [*PROMPT[:10], *first.tokens, 5, 6], 3)  # 18 of 19 tokens are in the cache
    assert rows_of(loop, second) == 21 + 2 - 16
    other = Request("c", [PROMPT[0] + 1, *PROMPT[1:10]], 1)
    assert rows_of(loop, other) == 10, "another first token is another prompt"


def test_what_is_still_being_computed_is_found_as_far_as_it_is() -> None:
    loop = loop_of(policy=StallFree(9), budget=Budget(9, 8))
    first = loop.add(Request("a", PROMPT, 2))
    loop.step()
    second = loop.add(Request("b", PROMPT, 2))
    loop.step()
    assert (second.reused, loop.running[1].computed if len(loop.running) > 1 else 0) == (0, 0)
    list(loop.run())
    assert second.reused == 16 and first.reused == 0, "the full pages of 18 tokens"
    assert first.tokens == second.tokens == alone(first.request)[0]


def test_pages_of_several_are_counted_once() -> None:
    """Each may have seven pages in the end; five of them are the same ones."""
    for shares, together in ((True, 2), (False, 1)):
        loop = loop_of(9, 4, share_prefixes=shares)
        generations = [loop.add(Request("a", PROMPT, 4))]
        loop.step()
        generations.append(loop.add(Request("b", PROMPT, 4)))
        loop.step()
        assert len(loop.running) == together
        list(loop.run())
        assert all(each.tokens == alone(each.request)[0] for each in generations)
    tight = loop_of(8, 4)
    tight.add(Request("a", PROMPT, 4))
    tight.step()
    tight.add(Request("b", PROMPT, 4))
    tight.step()
    assert len(tight.running) == 1, "one page less is too few"


def test_who_gives_way_gives_back_what_is_its_own() -> None:
    """The newest has six pages, five of them the oldest's: it gives one back."""
    loop = loop_of(9, 4, budget=Budget(100, 8, "known"))
    first = loop.add(Request("a", PROMPT[:23], 8))
    loop.step()
    second, third = loop.add(Request("b", [*PROMPT[:22], 1], 8)), loop.add(Request("c", [*PROMPT[:21], 2, 3], 8))
    loop.step()
    assert len(loop.running) == 3 and loop.kv.free_pages == 1
    given = []
    while loop.live:
        before = loop.kv.given_back([each.id for each in reversed(loop.running)])
        steps = loop.steps
        loop.step()
        loop.kv.integrity()
        if loop.latest is not None and loop.steps > steps and loop.latest.preempted:
            given.append((loop.latest.preempted, before))
    assert given and given[0] == (("c",), (1, 1, 7)), "pages of several come back with the oldest"
    assert all(each.tokens == alone(each.request)[0] for each in (first, second, third))


def test_who_gave_way_finds_its_own_pages_again() -> None:
    """But for the last one, which the other needed."""
    computed = {}
    for shares in (True, False):
        loop = loop_of(6, 4, budget=Budget(50, 2, "known"), share_prefixes=shares)
        generations = [loop.add(Request(i, [*PROMPT[i : i + 9]], 7)) for i in range(2)]
        rows = 0
        while loop.live:
            steps = loop.steps
            loop.step()
            rows += loop.latest.num_tokens if loop.latest is not None and loop.steps > steps else 0
        assert all(each.tokens == alone(each.request)[0] for each in generations)
        computed[shares] = rows, loop.reused
    assert sum(computed[True]) == computed[False][0] > 30 and computed[True][1] == 8 and not computed[False][1]


def test_what_is_to_be_found_is_not_given_to_who_is_restored() -> None:
    """One step admits a request that was swapped and one whose prompt lies in free pages."""
    loop = loop_of(12, 2, budget=Budget(50, 3, "known"), preemption="swap")
    old = [loop.add(Request(i, PROMPT[6 * i : 6 * i + 6], 9)) for i in range(2)]
    while not any(each.id == 1 for each in loop.waiting) or loop.latest is None or not loop.latest.preempted:
        loop.step()
        assert loop.live
    late = loop.add(Request(2, PROMPT[:6], 3))
    list(loop.run())
    assert late.reused == 4
    assert all(each.tokens == alone(each.request)[0] for each in (*old, late))


def test_what_cancelled_ones_hold_is_free_for_others() -> None:
    """Pages that a request shares with one that leaves are charged to it."""
    loop = loop_of(8, 4)
    loop.add(Request("a", PROMPT, 8))
    loop.step()
    loop.cancel("a")
    generation = loop.add(Request("b", PROMPT, 9))
    loop.step()
    assert generation.reused == 20 and len(loop.running) == 1
    assert list(generation) == alone(generation.request)[0]


def test_pages_that_are_shared_with_one_who_leaves_are_not_shared() -> None:
    """Nine pages beside four, of twelve: it waits, though five of the nine are found."""
    loop = loop_of(12, 4)
    loop.add(Request("other", PROMPT[1:10], 8))
    loop.add(Request("a", PROMPT, 8))
    loop.step()
    loop.cancel("a")
    late = loop.add(Request("late", PROMPT, 13))
    loop.step()
    assert [each.id for each in loop.running] == ["other"]
    assert list(late) == alone(late.request)[0]


def test_pages_found_by_two_at_once_come_back_with_the_older() -> None:
    """Both were to take them when they joined; four older ones need a page when the newest has two of its own."""
    loop = loop_of(21, 4, budget=Budget(100, 8, "known"))
    list(loop.add(Request("gone", PROMPT[:21], 1)))
    generations = [loop.add(Request(i, PROMPT[i + 1 : i + 10], 15)) for i in range(3)]
    generations += [loop.add(Request(name, PROMPT[:21], 15)) for name in "bc"]
    loop.step()
    assert [each.shared for each in loop.running] == [0] * 5 and loop.reused == 40
    assert loop.kv.given_back(["c", "b"]) == (1, 6) and loop.kv.free_pages == 5
    list(loop.run())
    assert all(each.tokens == alone(each.request)[0] for each in generations)


def test_shared_pages_in_a_plan() -> None:
    """Of six pages for 24 tokens five are there: one is taken, and with eight there is room."""
    waiting = Progress("new", 24, 31, 20, 20, shared=5)
    running = [Progress("old", 25, 31, 24, 24)]
    step = compose(running, [waiting], Budget(50, 8), FullHybrid(), Room(4, 5))
    assert list(step.items) == [("old", 1), ("new", 4)]
    assert not compose(running, [waiting], Budget(50, 8), FullHybrid(), Room(4, 4)).admitted
    apart = Progress("new", 24, 31, 20, 20)
    assert not compose(running, [apart], Budget(50, 8), FullHybrid(), Room(4, 9)).admitted
    newest = Progress("new", 25, 31, 24, 24, shared=5)
    middle = Progress("middle", 25, 31, 24, 24, shared=0)
    step = compose([*running, middle, newest], [], Budget(50, 8, "known"), FullHybrid(), Room(4, 0))
    assert step.preempted == ("new",) and step.ids == ("old",), "one page is one decode's"
    full = Progress("full", 25, 31, 24, 24, shared=6)
    step = compose([*running, middle, full], [], Budget(50, 8, "known"), FullHybrid(), Room(4, 0))
    assert step.preempted == ("full", "middle"), "which has none of its own"


def test_pages_given_back_in_an_order() -> None:
    loop = loop_of()
    for name in "abc":
        loop.add(Request(name, PROMPT, 9))
        loop.step()
    kv = loop.kv
    assert kv.given_back(["c", "b", "a"]) == (1, 2, 7) and kv.given_back(["a", "b"]) == (2, 2)
    assert kv.given_back(["a", "c", "b"]) == (2, 1, 7) and kv.given_back([]) == ()
    assert kv.holders(kv.pages("a")[0]) == 3 and kv.holders(kv.pages("a")[-1]) == 1
    for names, message in ((["a", "x"], "must be held by the cache, got 'x'"), (["a", "a"], "must be distinct")):
        with own_errors(), pytest.raises(ValueError, match=message):
            kv.given_back(names)
