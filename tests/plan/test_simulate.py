"""Traces served in virtual time: against a loop written out step by step, by hand, and what faults cost."""

from __future__ import annotations

import json
from collections import deque
from itertools import pairwise
from math import inf
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar.batching import (
    Budget,
    Composer,
    DecodeMaximal,
    Exclusive,
    FullHybrid,
    Policy,
    PrefillFirst,
    Progress,
    RequestLevel,
    Room,
    StallFree,
    compose,
)
from seqpar.partition import Layout, Shift
from seqpar.plan import Arrival, Curve, Failure, Fleet, Simulation, StepWork, Straggler, percentile, simulate

POLICIES: dict[str, Policy] = {
    "request": RequestLevel(),
    "prefill": PrefillFirst(),
    "hybrid": FullHybrid(),
    "maximal": DecodeMaximal(7, 4),
    "stall-free": StallFree(9, 3),
    "exclusive": Exclusive(),
    "mixed": Exclusive(0.25),
}
ONE = Layout(1, 1)
FOUR = StallFree(4)


def a_second(layout: Layout, work: StepWork) -> float:
    return 1.0


def affine(layout: Layout, work: StepWork) -> float:
    """Of everything that a cost may depend on, with numbers that no two sums of share."""
    prompts = 0.00017 * work.pairs + 0.0000031 * work.keys
    return 0.5 + 0.013 * work.tokens + prompts + 0.000019 * work.cached + 0.0000013 * work.decodes + 0.0071 * work.rows


def served(*requests: tuple[float, int, int], policy: Policy = FOUR, **options: Any) -> Simulation:
    """By one replica with room for all, unless it is said otherwise."""
    budget = options.pop("budget", Budget(64, 8))
    step_s, fleet = options.pop("step_s", a_second), options.pop("fleet", Fleet(100))
    return simulate([Arrival(*each) for each in requests], step_s, Composer(policy, budget), fleet, **options)


def one_by_one(
    trace: list[Arrival], policy: Policy, budget: Budget, pages: int, size: int
) -> tuple[list[list[float]], int, int]:
    """The loop as `TemporalFusion` runs it, over a clock: times of all tokens, steps, and tokens computed."""
    coming = deque(sorted(enumerate(trace), key=lambda item: item[1].at_s))
    running: list[Progress] = []
    waiting: deque[Progress] = deque()
    times: list[list[float]] = [[] for _ in trace]
    now, steps, computed, free = 0.0, 0, 0, pages
    while coming or running or waiting:
        while coming and coming[0][1].at_s <= now:
            number, arrival = coming.popleft()
            waiting.append(Progress(number, arrival.prompt_tokens, arrival.most_cached))
        if not running and not waiting:
            now = coming[0][1].at_s
            continue
        step = compose(running, waiting, budget, policy, Room(size, free))
        for _ in step.preempted:
            gone = running.pop()
            free += -(-gone.scheduled // size)
            gone.scheduled = gone.computed = 0
            waiting.appendleft(gone)
        running += [waiting.popleft() for _ in step.admitted]
        named = {each.id: each for each in running}
        pairs = cached = keys = rows = 0
        for at, (request, new) in enumerate(step.items):
            each = named[request]
            seen = sum(range(each.scheduled + 1, each.scheduled + new + 1))
            free -= -(-(each.scheduled + new) // size) - -(-each.scheduled // size)
            each.scheduled += new
            rows += each.scheduled == each.tokens
            if at < step.num_decodes:
                cached += seen
            else:
                pairs, keys = pairs + seen, keys + each.scheduled
        now += affine(ONE, StepWork(step.num_tokens, pairs, cached, keys, step.num_decodes, rows))
        steps, computed = steps + 1, computed + step.num_tokens
        for request in step.ids:
            each = named[request]
            each.computed, each.served = each.scheduled, steps
            if each.computed == each.tokens:
                times[each.id].append(now)
                each.tokens += 1
                if each.tokens > each.limit:
                    free += -(-each.scheduled // size)
                    running.remove(each)
    return times, steps, computed


requests = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=7)


@settings(max_examples=60)
@given(
    requests,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["whole", "known"]),
    st.integers(1, 4),
    st.integers(0, 12),
    st.booleans(),
)
@example([(0, 1, 2), (0, 12, 1)], "maximal", "whole", 1, 2, True)  # a prompt's last token counts as a decode
@example([(0, 1, 3), (1, 1, 3), (3, 1, 8)], "exclusive", "known", 1, 0, True)  # decodes and prompts in turn
def test_a_replica_serves_as_the_loop_does(
    asked: list[tuple[int, int, int]], policy: str, admission: Any, size: int, more: int, repeat: bool
) -> None:
    """Steps that repeat are not composed, and are costed by their ends; that changes nothing of what is found."""
    trace = [Arrival(at / 4, prompt, new) for at, prompt, new in asked]
    pages = max(-(-each.most_cached // size) for each in trace) + more
    budget = Budget(16, 4, admission)
    times, steps, computed = one_by_one(trace, POLICIES[policy], budget, pages, size)
    fleet = Fleet(pages, page_size=size)
    found = simulate(trace, affine, Composer(POLICIES[policy], budget), fleet, repeat=repeat)
    assert (found.steps, found.computed_tokens, found.unfinished) == (steps, computed, 0)
    assert found.composed == steps or repeat
    for row, tokens in zip(found.rows, times, strict=True):
        assert (row.first_s, row.end_s) == (pytest.approx(tokens[0]), pytest.approx(tokens[-1]))
    gaps = sorted(b - a for tokens in times for a, b in pairwise(tokens))
    seen = sorted(gap for gap, n in zip(found.gaps_s, found.gap_counts, strict=True) for _ in range(n))
    assert seen == pytest.approx(gaps)
    assert computed == sum(each.most_cached for each in trace) + found.redone_tokens
    assert 0 < found.kv_most <= 1 and found.bubble == pytest.approx(0.0, abs=1e-9)
    assert sum(spent.seconds for spent in found.layouts.values()) == pytest.approx(found.busy_s)


def test_a_trace_by_hand() -> None:
    """Four tokens a step: 4 of A; the other 2 of A and 2 of B, both first tokens; the second and third one of A."""
    found = served((0.0, 6, 3), (0.5, 2, 1))
    assert [(row.ttft_s, row.end_s, row.tpot_s) for row in found.rows] == [(2.0, 4.0, 1.0), (1.5, 2.0, None)]
    assert found.percentiles("tbt", (0.5, 1.0)) == (1.0, 1.0)
    assert (found.steps, found.computed_tokens, found.duration_s) == (4, 10, 4.0)
    assert (found.tokens_per_s, found.throughput) == (1.0, 3.0)


def test_steps_that_repeat_are_not_composed() -> None:
    long = served((0.0, 1, 1000))
    assert (long.steps, long.composed) == (1000, 2)  # the prompt, and the first decode
    broken = served((0.0, 1, 1000), (500.5, 1, 1))
    assert (broken.steps, broken.rows[1].ttft_s) == (1000, 1.5)  # waits for the step under way, rides on the next
    assert served((0.0, 1, 1000), repeat=False).composed == 1000


def test_the_request_that_waits_is_served_when_another_ends() -> None:
    """Room for one at a time: the second waits for the whole of the first."""
    found = served((0.0, 4, 5), (1.0, 4, 2), fleet=Fleet(8, page_size=1))
    assert [row.end_s for row in found.rows] == [5.0, 7.0]
    assert found.kv_most == 1.0


def test_what_fits_into_no_cache_is_refused_and_the_others_are_served() -> None:
    found = served((0.0, 100, 5), (0.0, 4, 1), fleet=Fleet(2))
    assert (found.refused, found.finished, found.unfinished) == ((0,), 1, 0)
    assert "1 refused" in found.explain()


def test_replicas_share_the_requests() -> None:
    """Four requests, two replicas: each takes two, the long one is left alone with the last."""
    found = served((0.0, 4, 9), (0.0, 4, 1), (0.5, 4, 1), (2.5, 4, 1), fleet=Fleet(100, replicas=2))
    assert [row.replica for row in found.rows] == [0, 1, 1, 1]
    assert found.rows[0].end_s == 9.0


def test_a_pipeline_by_hand() -> None:
    """A prompt in two chunks through two stages of half a second each: of three slots of both stages a third is empty.

    The second chunk follows although the first one is not done.
    """
    fleet = Fleet(100, stages=(0.5, 0.5))
    found = served((0.0, 8, 1), fleet=fleet)
    assert (found.rows[0].ttft_s, found.steps) == (1.5, 2)
    assert found.bubble == pytest.approx(1 / 3)
    slow = served((0.0, 8, 1), fleet=Fleet(100, stages=(0.25, 0.75), hop=Curve.line(0.0, 0.01)))
    assert slow.rows[0].ttft_s == pytest.approx(0.25 + 0.04 + 0.75 + 0.75)


def test_micro_batches_of_different_requests_take_turns() -> None:
    """Two decodes, one a micro-batch, in two stages: a token of each in a second, as if there were no pipeline."""
    fleet = Fleet(100, stages=(0.5, 0.5))
    found = served((0.0, 1, 41), (0.5, 1, 41), policy=StallFree(1), fleet=fleet)
    assert [row.tpot_s for row in found.rows] == [pytest.approx(1.0)] * 2
    assert found.bubble < 0.02
    alone = served((0.0, 1, 41), policy=StallFree(1), fleet=fleet)
    assert alone.bubble == pytest.approx(0.5) and alone.rows[0].tpot_s == pytest.approx(1.0)


def test_layouts_go_by_the_tokens_of_a_step() -> None:
    rule = Shift.threshold(2, Layout(1, 4))
    found = served((0.0, 8, 5), fleet=Fleet(100, rule), step_s=lambda layout, work: 1.0 * layout.sp)
    assert {tuple(layout): tuple(spent) for layout, spent in found.layouts.items()} == {
        (1, 4): (2, 8.0),
        (4, 1): (4, 4.0),
    }
    assert Fleet(100, rule, replicas=3, stages=(0.5, 0.5)).ranks == 24


def test_ranks_are_numbered_by_replica_stage_and_mesh() -> None:
    fleet = Fleet(100, Layout(2, 2), replicas=3, stages=(0.5, 0.5))
    assert [tuple(fleet.place(rank)) for rank in (0, 3, 4, 7, 8, 23)] == [
        (0, 0),
        (0, 0),
        (0, 1),
        (0, 1),
        (1, 0),
        (2, 1),
    ]
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 24\), got 24"):
        fleet.place(24)


def test_a_slow_rank_slows_its_replica_for_a_while() -> None:
    """From 2.5 s to 6 s steps take two seconds; the one under way at either end is as it set out."""
    found = served((0.0, 4, 9), faults=[Straggler(0, 2.0, 2.5, 6.0)])
    assert found.rows[0].end_s == 3.0 + 2.0 * 2 + 4.0  # 1, 2, 3 | 5, 7 | 8, 9, 10, 11
    two = served((0.0, 4, 9), (0.0, 4, 9), fleet=Fleet(100, replicas=2), faults=[Straggler(1, 3.0)])
    assert [row.end_s for row in two.rows] == [9.0, 27.0]
    stages = Fleet(100, stages=(0.5, 0.5))
    assert served((0.0, 4, 1), fleet=stages, faults=[Straggler(1, 3.0)]).rows[0].end_s == 0.5 + 1.5


def test_a_failed_rank_takes_its_cache_with_it() -> None:
    """Replica 0 dies in its fifth step: prompt and four tokens are computed again by the other, none is said twice."""
    fleet = Fleet(100, replicas=2)
    found = served((0.0, 4, 9), (0.0, 4, 2), fleet=fleet, faults=[Failure(0, 4.5)], policy=StallFree(8))
    first, second = found.rows
    assert (second.replica, second.end_s, second.preempted) == (1, 2.0, 0)
    assert (first.replica, first.first_s, first.preempted) == (1, 1.0, 1)
    assert first.end_s == 4.5 + 5  # one step for the eight tokens there are, four more tokens
    assert (found.redone_tokens, found.lost_s) == (7, 0.5)
    assert found.computed_tokens == 12 + 5 + 7
    assert found.percentiles("tbt", (1.0,)) == (1.5,)  # from 4.0 to 5.5
    assert "7 tokens computed again, 0.5 s lost" in found.explain()


def test_those_that_ran_go_on_in_their_order() -> None:
    """Three decode when their replica dies; one step does not hold all their tokens any more: the oldest goes first."""
    found = served((0.0, 4, 9), (0.1, 4, 9), (0.2, 4, 9), policy=StallFree(6), faults=[Failure(0, 4.5, 1.0)])
    assert [(row.first_s, row.end_s, row.preempted) for row in found.rows] == [(1, 11.5, 1), (2, 13.5, 1), (3, 15.5, 1)]


def test_requests_go_where_tokens_are_fewest_now() -> None:
    """A long request that has ended weighs nothing: the third goes to its replica."""
    found = served((0.0, 4, 9), (0.5, 1, 11), (10.0, 4, 1), fleet=Fleet(100, replicas=2))
    assert [row.replica for row in found.rows] == [0, 1, 0]


def test_requests_wait_for_a_replica_that_comes_back() -> None:
    found = served((0.0, 4, 3), (2.0, 4, 1), faults=[Failure(0, 1.5, 10.0)], policy=StallFree(16))
    assert [row.end_s for row in found.rows] == [13.5, 12.5]  # both prompts in a step at 11.5, the oldest first
    assert found.rows[1].preempted == 0
    never = served((0.0, 4, 3), (2.0, 4, 1), faults=[Failure(0, 1.5)])
    assert (never.finished, never.unfinished) == (0, 2) and "nobody to serve them" in never.explain()
    assert never.duration_s == never.tokens_per_s == never.utilisation == 0.0


def test_a_run_of_steps_that_is_lost_keeps_what_was_done() -> None:
    options = {"policy": StallFree(2000), "budget": Budget(2000, 8), "fleet": Fleet(1000, replicas=2)}
    found = served((0.0, 1, 1000), faults=[Failure(0, 700.25)], **options)
    assert found.rows[0].end_s == 700.25 + 1000 - 700
    assert (found.redone_tokens, found.lost_s) == (700, pytest.approx(0.25))


def test_a_second_failure_while_away_lasts_as_long_as_the_longer() -> None:
    found = served((0.0, 4, 3), faults=[Failure(0, 1.5, 10.0), Failure(0, 2.0, 20.0)])
    assert found.rows[0].end_s == 22.0 + 2 + 1  # five tokens in two steps, then the third one


def test_of_many_failures_nothing_is_lost_but_time() -> None:
    """Random faults over three replicas of two stages: every request ends, and what is computed twice is counted."""
    asked = [(0.37 * i, 1 + i * 7 % 11, 1 + i * 5 % 17) for i in range(60)]
    faults = [Failure(i % 6, 1.3 + 2.9 * i, 2.0) for i in range(8)] + [Straggler(5, 1.7, 3.0, 9.0)]
    for stages in ((1.0,), (0.6, 0.4)):
        fleet = Fleet(9, Layout(2 // len(stages), 1), replicas=3, stages=stages, page_size=4)
        found = served(*asked, fleet=fleet, faults=faults, step_s=affine, budget=Budget(64, 8, "known"))
        assert found.unfinished == 0 and found.preempted > 0
        asked_for = sum(row.prompt_tokens + row.new_tokens - 1 for row in found.rows)
        assert found.computed_tokens == asked_for + found.redone_tokens
        assert found.kv[-1][1] <= found.kv_most <= 1.0


def test_it_says_what_it_found() -> None:
    found = served((0.0, 6, 3), (0.5, 2, 1), fleet=Fleet(4, stages=(0.5, 0.5)))
    said = found.explain()
    assert said.startswith("2 of 2 requests in ") and "TTFT" in said and "bubbles: " in said
    content = json.loads(found.to_json())
    assert content["ttft_s"]["p50"] == found.percentiles("ttft")[0] and content["requests"] == 2
    assert content["layouts"] == [{"tp": 1, "sp": 1, "steps": found.steps, "seconds": pytest.approx(found.busy_s)}]


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], share) for share in (0.0, 0.25, 0.26, 1.0)] == [1.0, 1.0, 2.0, 4.0]
    assert percentile([1.0, 5.0], 0.9, weights=[9, 1]) == 1.0 and percentile([1.0, 5.0], 0.91, weights=[9, 1]) == 5.0
    assert percentile([], 0.5) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fleet(0), "`num_pages`, `replicas` and `page_size` must be at least 1, got 0, 1 and 16"),
        (lambda: Fleet(1, stages=(0.5, 0.4)), r"`stages` must be positive shares that add up to 1, got \(0.5, 0.4\)"),
        (lambda: Straggler(0, 0.5), "`factor` must be at least 1 and 0 <= `from_s` < `until_s`, got 0.5, 0.0 and inf"),
        (lambda: Failure(0, inf), "`at_s` must be finite and both times >= 0, got inf and inf"),
        (lambda: served(), "`trace` must hold at least one request, got none"),
        (lambda: served((0.0, 1, 1), faults=[Failure(1, 0.0)]), r"`rank` must be in \[0, 1\), got 1"),
        (lambda: served((0.0, 1, 1), step_s=lambda *_: -1.0), "`step_s` must give a finite time >= 0, got -1.0 for "),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_policy_that_does_nothing_is_named() -> None:
    class Lazy(Composer):
        def __call__(self, *args: Any) -> Any:
            return compose([], [], self.budget, self.policy, Room(1, 1))

    with pytest.raises(
        ValueError, match="`compose` must find a step for 0 running and 1 waiting requests, got an empty"
    ):
        simulate([Arrival(0.0, 1, 1)], a_second, Lazy(StallFree(4), Budget(4, 4)), Fleet(10))
