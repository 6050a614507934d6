"""Whatever is done to a loop, under any policy and on any ranks: a request generates what it generates alone.

What is done is a script, drawn here and played on every rank; `RUNNERS` says on which. After every step the loop, its
cache and its plan are checked by `tests.batching.session`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from seqpar.partition import Interleave
from tests.batching.session import (
    CUT,
    LONGEST,
    NEW,
    TAIL,
    WAYS,
    Script,
    Session,
    Setup,
    ToyCase,
    counts,
    play,
    play_random,
    soak,
)
from tests.batching.test_compose import MAKE
from tests.ranks import run_mesh, thinned

whole = st.integers
SETUPS = st.builds(
    Setup,
    policy=st.sampled_from(sorted(MAKE)),
    page_size=whole(1, 5) | st.just(LONGEST),
    more_pages=whole(0, 8),
    max_tokens=whole(1, 12),
    max_requests=whole(1, 6),
    admission=st.sampled_from(["known", "whole"]),
    spare_pages=whole(0, 1),
    preemption=st.sampled_from(["recompute", "swap"]),
    compaction=st.sampled_from(["none", "tail", "window", "stable"]),
    share_prefixes=st.booleans(),
    leads=st.booleans(),
    depth=whole(0, 4),
)
ASKED = (whole(0, 1), whole(0, CUT), whole(0, TAIL), whole(1, NEW), whole(0, len(WAYS) - 1))
ACTIONS = st.one_of(
    st.tuples(st.just("add"), *ASKED),
    st.tuples(st.just("add"), *ASKED),
    st.tuples(st.just("steps"), whole(1, 6)),
    st.tuples(st.just("cancel"), whole(0, 9)),
    st.tuples(st.just("fail"), st.sampled_from(["before", "after"])),
    st.tuples(st.just("refuse")),
)
Runner = Callable[..., list[Any]]


class Master(RuleBasedStateMachine):
    """One rank, and a model of a few lines."""

    session: Session | None = None

    @initialize(setup=SETUPS)
    def begin(self, setup: Setup) -> None:
        self.session = Session(setup, ToyCase())

    def act(self, *action: Any) -> None:
        assert self.session is not None
        self.session.act(action)

    @rule(asked=st.tuples(*ASKED))
    def add(self, asked: tuple[int, ...]) -> None:
        self.act("add", *asked)

    @rule(asked=st.tuples(*ASKED), count=whole(2, 4))
    def add_alike(self, asked: tuple[int, ...], count: int) -> None:
        for _ in range(count):
            self.act("add", *asked)

    @rule(which=whole(0, 9))
    def cancel(self, which: int) -> None:
        self.act("cancel", which)

    @rule(count=whole(1, 5))
    def steps(self, count: int) -> None:
        self.act("steps", count)

    @rule(when=st.sampled_from(["before", "after"]))
    def fail(self, when: str) -> None:
        self.act("fail", when)

    @rule()
    def refuse(self) -> None:
        self.act("refuse")

    def teardown(self) -> None:
        if self.session is not None:
            self.session.finish()


@pytest.mark.parametrize(("examples", "steps"), [(20, 16), pytest.param(300, 40, marks=pytest.mark.slow)])
def test_any_history_of_one_rank(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=checks, deadline=None)
    run_state_machine_as_test(Master, settings=how)  # type: ignore[no-untyped-call]


def on(*layout: int) -> Runner:
    """Runs a function of a mesh, tp x sp or pp x tp x sp, on every rank of it."""
    return partial(run_mesh, layout, timeout_s=240.0)


RUNNERS: dict[str, tuple[Runner, str, dict[str, Any]]] = {
    "tiny-1x2": (on(1, 2), "tiny", {"shift": 4}),
    "tiny-1x1": (on(1, 1), "tiny", {}),
    "tiny-2x1": (on(2, 1), "tiny", {"sequence_sharded": True}),
    "tiny-2x2": (on(2, 2), "tiny", {"shift": 3}),
    "bundled-1x1": (on(1, 1), "bundled", {}),
    "bundled-2x1": (on(2, 1), "bundled", {}),
    "bundled-1x2": (on(1, 2), "bundled", {"overlap": Interleave(chunks=2, min_tokens=6)}),
    "bundled-2x2": (on(2, 2), "bundled", {"shift": 6}),
    "bundled-1x4": (on(1, 4), "bundled", {}),
    "stages-2x1x1": (on(2, 1, 1), "stages", {"overlap": Interleave(chunks=2, min_tokens=6)}),
    "stages-2x2x1": (on(2, 2, 1), "stages", {"overlap": Interleave(chunks=3, min_tokens=5)}),
    "stages-2x1x2": (on(2, 1, 2), "stages", {"shift": 4, "overlap": Interleave(chunks=2, min_tokens=3)}),
    "stages-4x1x1": (on(4, 1, 1), "stages", {}),
}
FAST = ("tiny-1x2", "stages-2x1x1")


@pytest.mark.parametrize("name", thinned(RUNNERS, lambda name: name in FAST))
def test_any_history_of_several_ranks(name: str) -> None:
    run, kind, options = RUNNERS[name]

    @settings(max_examples=3 if name in FAST else 40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(setup=SETUPS, script=st.lists(ACTIONS, min_size=4, max_size=14))
    def histories(setup: Setup, script: Script) -> None:
        told = run(play, kind, options, setup, script)
        assert all(each == told[0] for each in told), "every rank does the same"

    histories()


def crowded(**changes: Any) -> Setup:
    """Far more requests than there is room for."""
    options: dict[str, Any] = {"page_size": 2, "more_pages": 4, "max_tokens": 9, "max_requests": 6, **changes}
    return Setup(**options)


SOAKS = {
    "swap": crowded(preemption="swap", compaction="window"),
    "recompute": crowded(preemption="recompute", compaction="tail", policy="maximal"),
    "alone": crowded(share_prefixes=False, preemption="swap", compaction="stable", policy="mixed"),
    "whole": crowded(admission="whole", policy="hybrid", more_pages=30),
    "stages": crowded(preemption="swap", depth=3),
}


@pytest.mark.parametrize(
    "case", thinned([(name, steps) for name in SOAKS for steps in (200, 10_000)], lambda case: case == ("swap", 200))
)
def test_nothing_leaks(case: tuple[str, int]) -> None:
    """Random admissions, cancellations and failures, and requests that run out of memory all the time."""
    name, steps = case
    found = counts(soak(SOAKS[name], ToyCase(), steps, seed=steps))
    print(name, found)
    assert found["steps"] >= steps and found["served"] > steps // 10 and found["cancelled"]
    assert bool(found["preempted"]) == (name != "whole") and bool(found["reused"]) == (name != "alone")
    assert bool(found["failed"]) == (name != "stages"), "a pipeline would not survive it"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-1x1", "tiny-1x2", "tiny-2x2", "stages-2x2x1"])
def test_nothing_leaks_on_ranks(name: str) -> None:
    run, kind, options = RUNNERS[name]
    found = run(play_random, kind, options, SOAKS["swap"], 600, 1)
    print(name, found[0][0])
    assert all(each == found[0] for each in found) and found[0][0]["preempted"]
