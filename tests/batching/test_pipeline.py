"""The loop through stages: any policy, depth and company gives each request its own tokens, on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import comm
from seqpar.batching import Budget, Emitted, Generation, PipelineFusion, StallFree
from seqpar.comm import Stages
from tests.batching.test_compose import MAKE
from tests.batching.test_fusion import arrivals, number_of, request_of
from tests.batching.toy import VOCAB, ToyStage, alone, one_stage, text
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned

whole = st.integers


def loop_of(stages: Stages, num_pages: int = 40, page_size: int = 4, **options: Any) -> PipelineFusion:
    stage = ToyStage(num_pages, page_size, stages)
    options = {"policy": StallFree(8), "budget": Budget(8, 6), "text": text, **options}
    return PipelineFusion(stage, stage.kv, vocab_size=VOCAB, **options)


def drive(loop: PipelineFusion, plan: Sequence[tuple[int, int, int, int, int | None]]) -> None:
    """Add and cancel requests as `plan` says, and compare what comes out."""
    wanted = [request_of(number, prompt, new, way) for number, (_, prompt, new, way, _) in enumerate(plan)]
    added: list[Generation] = []
    cancelled: set[int] = set()
    emitted: list[Emitted] = []
    deepest = number = 0
    while number < 13 or loop.live:
        for request, (when, _, _, _, until) in zip(wanted, plan, strict=True):
            if when == number:
                added.append(loop.add(request))
            if until == number and request.id in loop.live:
                cancelled.add(number_of(request))
                loop.cancel(request.id)
        emitted += loop.step()
        deepest = max(deepest, len(loop.queue.steps))
        loop.kv.integrity()
        assert set(loop.kv.ids) == {each.id for each in loop.running}
        for each in loop.running:
            assert each.computed <= each.scheduled == loop.kv.length(each.id) <= each.tokens
        number += 1
        assert number < 2000, "all requests end"
    for generation in added:
        request = generation.request
        tokens, finish = alone(request)
        if generation.finish == "cancelled":
            assert request.id in cancelled and generation.tokens == tokens[: len(generation.tokens)]
        else:
            assert (generation.tokens, generation.finish) == (tokens, finish), request
        mine = [each for each in emitted if each.id == request.id]
        assert [each.token for each in mine if each.token is not None] == generation.tokens
        assert [each.finish for each in mine if each.finish] == [generation.finish]
    assert deepest <= loop.queue.depth and not loop.queue.steps
    assert not loop.kv.ids and loop.kv.free_pages == loop.kv.num_pages, "nothing leaks"


@settings(max_examples=40)
@given(
    plan=arrivals,
    name=st.sampled_from(sorted(MAKE)),
    depth=whole(1, 4),
    page_size=whole(1, 5),
    more_pages=whole(0, 3),
    max_tokens=whole(1, 12),
    admission=st.sampled_from(["known", "whole"]),
    preemption=st.sampled_from(["recompute", "swap"]),
)
def test_any_depth_gives_a_request_its_own_tokens(
    plan: list[tuple[int, int, int, int, int | None]],
    name: str,
    depth: int,
    page_size: int,
    more_pages: int,
    max_tokens: int,
    admission: Any,
    preemption: Any,
) -> None:
    wanted = [request_of(number, prompt, new, way) for number, (_, prompt, new, way, _) in enumerate(plan)]
    pages = max(-(-each.most_cached // page_size) for each in wanted) + more_pages
    budget = Budget(max_tokens, 4, admission)
    options: dict[str, Any] = {"policy": MAKE[name](), "budget": budget, "depth": depth, "preemption": preemption}
    drive(loop_of(one_stage(), pages, page_size, **options), plan)


def on_stages(mesh: comm.DeviceMesh, seeds: Sequence[int]) -> list[Any]:
    """Random scenarios, the same on every rank, with all messages checked in some; what was composed."""
    stages = comm.stages(mesh)
    log = []
    for seed in seeds:
        draw = random.Random(seed)
        plan = [
            (
                draw.randint(0, 6),
                draw.randint(1, 20),
                draw.randint(1, 12),
                draw.randint(0, 4),
                draw.choice([None, 3, 9]),
            )
            for _ in range(draw.randint(1, 6))
        ]
        page_size = draw.randint(1, 5)
        most = max(-(-request_of(0, *each[1:4]).most_cached // page_size) for each in plan)
        options: dict[str, Any] = {
            "policy": MAKE[sorted(MAKE)[seed % len(MAKE)]](),
            "budget": Budget(draw.randint(1, 12), draw.randint(2, 5), draw.choice(["known", "whole"])),
            "depth": draw.choice([None, 1, stages.pp.size() + 1, 4]),
            "preemption": draw.choice(["recompute", "swap"]),
        }
        loop = loop_of(stages, most + draw.randint(0, 3), page_size, **options)
        drive(loop, plan)
        log.append((seed, loop.steps, loop.latest))
    return log


@pytest.mark.parametrize("pp", thinned([2, 3, 4], lambda pp: pp == 2))
def test_stages_agree_without_a_word(pp: int) -> None:
    first, *others = run_mesh((pp, 1, 1), on_stages, list(range(14)))
    assert all(other == first for other in others)


def checked(mesh: comm.DeviceMesh) -> None:
    with comm.check(timeout_s=30.0):
        on_stages(mesh, [4])


def test_messages_pass_the_check() -> None:
    run_mesh((2, 1, 1), checked)


def led(mesh: comm.DeviceMesh) -> int:
    """Only rank 0 knows of the requests; one is cancelled in flight, others when the loop is closed."""
    stages = comm.stages(mesh)
    loop = loop_of(stages, 12, 3, budget=Budget(7, 4, "known"), depth=3, lead=stages.whole)
    if stages.whole.rank():
        loop.follow()
    else:
        with loop:
            generations = [loop.add(request_of(i, 3 + 4 * i, 6, i)) for i in range(4)]
            loop.step()
            loop.step()
            assert 0 in loop.queue.ids, "in flight"
            loop.cancel(0)
            while any(each.finish is None for each in generations):
                loop.step()
            for each in generations[1:]:
                assert (each.tokens, each.finish) == alone(each.request)
            assert generations[0].finish == "cancelled"
            for i in (7, 8):
                loop.add(request_of(i, 9, 9, 0))
            loop.step()
            loop.step()
            assert loop.queue.steps, "something is in flight when the loop is closed"
    assert not loop.live and not loop.queue.steps and loop.kv.free_pages == 12
    return loop.steps


def test_rank_0_leads() -> None:
    first, second = run_mesh((2, 1, 1), led)
    assert first == second


def test_of_a_request_that_is_cancelled_nothing_more_enters() -> None:
    """A long prompt, of which two chunks are in flight: they end, and it is gone."""
    loop = loop_of(one_stage(), policy=StallFree(4), depth=3)
    generation = loop.add(request_of(1, 40, 5, 0))
    loop.step()
    loop.step()
    assert [step.q_lens for step in loop.queue.steps] == [(4,), (4,)]
    loop.cancel(1)
    emitted = [each for _ in range(4) for each in loop.step()]
    assert loop.steps == 2 and emitted == [Emitted(1, None, "cancelled")] and not loop.kv.ids
    assert generation.finish == "cancelled" and not loop.queue.steps


def test_a_prompt_begins_on_pages_of_another() -> None:
    """Those whose tokens are back: all full pages of one that has ended."""
    loop = loop_of(one_stage(), depth=2, share_prefixes=True)
    first, second = request_of(1, 13, 2, 0), request_of(1, 13, 2, 0)
    assert list(loop.add(first)) == list(loop.add(second)) == alone(first)[0]
    assert loop.reused == 12 and not loop.kv.ids


def test_no_depth_is_refused() -> None:
    with own_errors(), pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        loop_of(one_stage(), depth=0)
