"""What to send round: the published table and thresholds, and the rule against a replay of the ring in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.plan import RingCase, ring_costs, ring_method, ring_seconds
from seqpar.plan.ring import hidden_from
from tests.kernels.own_errors import own_errors

RATES = {"flops": 8e14, "bytes_per_s": 50e9}


def llama_405b(new: int, total: int = 128_000) -> RingCase:
    """4 ranks of 8 GPUs: rates of one GPU, whose tensor-parallel factor cancels."""
    return RingCase(new, total - new, 4, 128, 8, 128)


def test_the_thresholds_of_the_paper() -> None:
    assert hidden_from(llama_405b(1), 8e14, 50e9) == 4000
    rows = {share: llama_405b(round(128_000 * share)) for share in (0.01, 0.024, 0.026, 0.05, 0.1, 1.0)}
    chosen = {share: ring_method(case, rule="meta-5", **RATES) for share, case in rows.items()}
    assert chosen == {0.01: "q", 0.024: "q", 0.026: "kv", 0.05: "kv", 0.1: "kv", 1.0: "kv"}  # they cross at 2.5 %
    assert ring_method(rows[0.026], rule="meta-1", **RATES) == "q"  # whose threshold is 12.5 %, or 4000 tokens
    assert ring_method(llama_405b(4000), rule="meta-1", **RATES) == "kv"


def test_the_microseconds_of_the_paper() -> None:
    """CP4, each step: send-receive of keys, of queries, attention, and all answers at the end."""
    for keys, queries, step, answers, exposed, better in (
        (627.0, 166.0, 414.0, 424.0, 639, "q"),
        (631.0, 544.0, 1608.0, 1023.0, 0, "kv"),
    ):
        kv_s, q_s = ring_seconds(step, keys, 4), ring_seconds(step, queries, 4, answers)
        assert kv_s - 4 * step == exposed and q_s - 4 * step == answers
        assert better == ("kv" if kv_s <= q_s else "q")


def test_the_published_fit_does_not_separate_its_own_table() -> None:
    assert {ring_method(llama_405b(n), rule="meta-fit", **RATES) for n in (1280, 3200, 6400, 12_800, 128_000)} == {"q"}
    assert ring_method(RingCase(1000, 0, 4, 128, 8, 128), rule="meta-fit", **RATES) == "kv"


def replay(case: RingCase, flops: float, bytes_per_s: float, latency_s: float) -> tuple[float, float]:
    """Both rings step by step: one link that carries messages in their order, one stream of compute."""
    step = case.step_flops / flops
    keys, queries, answer = (latency_s + n / bytes_per_s for n in (case.kv_bytes, case.q_bytes, case.answer_bytes))
    now = link = arrival = 0.0
    for hop in range(case.ranks):
        if hop + 1 < case.ranks:
            link = arrival = max(now, link) + keys
        now = max(now + step, arrival)
    kv_s, now, link, arrival, back = now, 0.0, 0.0, 0.0, 0.0
    for hop in range(case.ranks):
        if hop + 1 < case.ranks:
            link = arrival = max(now, link) + queries
        now = max(now + step, back)
        if hop:
            link = back = max(now, link) + answer
        if hop + 1 < case.ranks:
            now = max(now, arrival)
    return kv_s, max(now, back)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    g = draw(st.integers(1, 8))
    return {
        "new": draw(st.integers(1, 2**17)),
        "cached": draw(st.sampled_from([0, 0, 2**12, 2**17, 2**20])),
        "ranks": draw(st.integers(1, 16)),
        "num_heads": g * draw(st.integers(1, 16)),
        "num_kv_heads": g,
        "head_dim": 128,
    }


@given(problems(), st.sampled_from([1.25e9, 12.5e9, 50e9, 400e9]), st.sampled_from([0.0, 1e-5, 1e-4]))
def test_the_costs_are_those_of_a_replay(problem: dict[str, Any], bytes_per_s: float, latency_s: float) -> None:
    case = RingCase(**problem)
    rates = {"flops": 4e14, "bytes_per_s": bytes_per_s, "latency_s": latency_s}
    costs, (kv_s, q_s) = ring_costs(case, **rates), replay(case, **rates)
    assert (costs.kv_s, costs.q_s) == (pytest.approx(kv_s), pytest.approx(q_s))
    chosen = kv_s if ring_method(case, **rates) == "kv" else q_s
    assert chosen <= min(kv_s, q_s) * (1 + 1e-9)


def test_refusals() -> None:
    with own_errors():
        with pytest.raises(ValueError, match="sizes must be at least 1, and `cached` at least 0, got RingCase"):
            RingCase(0, 5, 4, 8, 8, 128)
        with pytest.raises(
            ValueError, match='`rule` must be one of "cost", "meta-1", "meta-5", "meta-fit", got \'best\''
        ):
            ring_method(llama_405b(100), rule="best", **RATES)
