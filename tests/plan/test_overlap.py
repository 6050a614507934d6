"""The tuner: laws of its choice on random costs, the gates, what it says, and what costs are."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import plan
from seqpar.partition import Interleave
from seqpar.plan import Curve, LayerCosts, SlotCosts, makespan, overlap
from seqpar.plan.costs import Prompt


def tensor_parallel(
    compute: tuple[float, float],
    comm: tuple[float, float],
    attention: float = 0.0,
    *,
    mlp: float = 2.0,
    contention: float = 0.0,
) -> LayerCosts:
    """Attention half and MLP half: (fixed, per token) compute, the second `mlp` times the first; (alpha, beta) sums."""
    fixed, rate = compute
    sends = Curve.line(*comm)
    halves = [SlotCosts(Curve.line(fixed, rate), sends, attention), SlotCosts(Curve.line(fixed, rate * mlp), sends)]
    return LayerCosts(tuple(halves), contention=contention)


TIMES = st.floats(1e-7, 1e-4)
RANDOM = st.fixed_dictionaries(
    {
        "compute": st.tuples(st.floats(0, 1e-3), TIMES),
        "comm": st.tuples(st.floats(0, 1e-3), TIMES),
        "attention": st.floats(0, 1e-8),
        "mlp": st.floats(0.2, 5),
        "contention": st.sampled_from([0.0, 0.2]),
    }
)


@settings(max_examples=40, deadline=None)
@given(RANDOM, st.integers(1, 9000), st.integers(1, 20), st.sampled_from([0, 5000]))
def test_a_choice_is_never_slower_than_serial_nor_than_even_cuts(
    numbers: dict[str, Any], tokens: int, layers: int, prefix: int
) -> None:
    costs = tensor_parallel(**numbers)
    choice = overlap(costs, tokens, num_layers=layers, prefix=prefix, chunks=(2, 3))
    assert choice.predicted_s <= choice.serial_s
    assert choice.bound_s <= choice.predicted_s * (1 + 1e-9)
    assert all(a < b for a, b in pairwise((0, *choice.cuts, tokens)))
    for candidate in choice.candidates:
        assert candidate.predicted_s <= candidate.even_s * (1 + 1e-9)
        assert choice.predicted_s <= candidate.predicted_s * 1.03 / (1 - 2e-3)
    if choice.cuts:
        assert choice.predicted_s * 1.03 < choice.serial_s


@settings(max_examples=20, deadline=None)
@given(RANDOM, st.integers(2, 700))
def test_two_chunks_are_the_best_of_all_cuts_on_the_grid(numbers: dict[str, Any], tokens: int) -> None:
    costs = tensor_parallel(**numbers)
    choice = overlap(costs, tokens, num_layers=3, chunks=(2,), grid=64)
    prompt = Prompt(tokens)
    for candidate in choice.candidates:
        for cut in range(64, tokens, 64):
            programs = [[*costs.chunk(prompt, a, b)] * 3 for a, b in ((0, cut), (cut, tokens))]
            exhaustive = makespan(programs, contention=costs.contention).total_s
            assert candidate.predicted_s * (1 - 2.1e-3) <= exhaustive


def test_three_chunks_pay_where_the_slots_straddle_the_sum() -> None:
    """With a < X < m two chunks give X + m, three approach max(a + m, 2 X)."""
    costs = tensor_parallel((0.0, 1e-6), (0.0, 2e-6), mlp=3.0)
    choice = overlap(costs, 6144, num_layers=50)
    two, three = choice.candidates[:2]
    layer = 6144 * 1e-6
    assert two.even_s == pytest.approx(50 * (2 + 3) * layer, rel=0.02)
    assert choice.chunks >= 3 and three.predicted_s < 0.9 * two.even_s


def test_attention_moves_the_cut_back() -> None:
    """The second chunk sees all keys, so where communication bounds the first half, it is to be the shorter one."""
    costs = tensor_parallel((0.0, 1e-6), (0.0, 3e-6), 2e-10, mlp=1.0)
    choice = overlap(costs, 32768, num_layers=40, chunks=(2,))
    assert choice.cuts[0] > 32768 // 2 and choice.cuts[0] % 128 == 0
    assert choice.predicted_s < choice.candidates[0].even_s


def test_the_first_gate() -> None:
    """Repeated compute of 2 ms against 1 ms to hide; latency of 4 ms a layer behind 3 ms of compute."""
    heavy = tensor_parallel((1e-3, 1e-7), (0.0, 5e-7))
    late = tensor_parallel((0.0, 1e-6), (2e-3, 0.0))
    for costs in (heavy, late):
        choice = overlap(costs, 1000, num_layers=4)
        assert choice.cuts == () and choice.candidates == () and choice.predicted_s == choice.serial_s
        assert choice.interleave is None and choice.reduction == 0
        assert choice.explain().endswith(": no") and "run whole" in choice.explain()


def test_the_second_gate() -> None:
    """A gain of 2 % is none."""
    costs = tensor_parallel((0.0, 1e-5), (0.0, 3e-7))
    choice = overlap(costs, 4096, num_layers=40, margin=0.03)
    assert choice.cuts == () and choice.candidates
    assert overlap(costs, 4096, num_layers=40, margin=0.01).cuts
    assert "3% more is not less" in choice.explain()


def test_explain() -> None:
    costs = tensor_parallel((0.0, 1e-6), (1e-5, 1e-6))
    choice = overlap(costs, 4096, num_layers=32)
    assert choice.cuts and choice.interleave == Interleave(cuts=choice.cuts, min_tokens=4096)
    text = choice.explain()
    assert text.startswith(f"4,096 tokens through 32 layer(s): {choice.chunks} chunks, cut at")
    assert text.count("<- chosen") == 1 and f"serial {choice.serial_s * 1e3:,.1f} ms" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_explanation_in_the_docs_is_the_one_given() -> None:
    page = (Path(__file__).parents[2] / "docs/plan-overlap.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "choice.chunks == 3" in block)
    names: dict[str, Any] = {"plan": plan}
    exec(code, names)
    assert f"```text\n{names['choice'].explain()}\n```" in page


def test_requests_of_a_step_see_their_own_keys() -> None:
    prompt = Prompt((3, 2), (10, 0))
    assert [prompt.pairs(i, i + 1) for i in range(5)] == [11, 12, 13, 1, 2]
    assert prompt.pairs(0, 5) == 39 and Prompt(()).pairs(0, 0) == 0
    assert [Prompt(5, window=2).pairs(i, i + 1) for i in range(5)] == [1, 2, 2, 2, 2]
    assert Prompt(2, 7, window=4).pairs(0, 2) == 8


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), st.integers(1, 12))
def test_pairs_are_those_of_every_token(requests: list[tuple[int, int]], window: int) -> None:
    for limit in (None, window):
        prompt = Prompt([n for n, _ in requests], [p for _, p in requests], limit)
        each = [min(p + i + 1, limit or 1000) for n, p in requests for i in range(n)]
        for start in range(len(each) + 1):
            for stop in range(start, len(each) + 1):
                assert prompt.pairs(start, stop) == sum(each[start:stop])


def test_the_last_layer_runs_on_few_rows() -> None:
    """Up to the append for all tokens, whole for one row: a layer less, and no sum to wait for at the end."""
    costs = tensor_parallel((0.0, 1e-6), (0.0, 1e-6))
    short = LayerCosts(costs.slots, last=(SlotCosts(Curve.line(0.0, 5e-7)),))
    whole, tail = overlap(short, 4096, num_layers=8), overlap(short, 4096, num_layers=8, last_rows=1)
    assert tail.serial_s == pytest.approx(whole.serial_s * 7 / 8 + 5e-7 * 4096 + 5e-6, rel=1e-3)
    assert tail.predicted_s < whole.predicted_s
    assert tail.explain().startswith("4,096 tokens through 8 layer(s), 1 row(s) of the last: ")
    exposed = [choice.candidates[0].exposed_s for choice in (whole, tail)]
    assert exposed[1] < exposed[0]


def test_curves() -> None:
    curve = Curve((100, 200, 400), (1.0, 1.5, 4.0))
    assert [curve(n) for n in (0, 50, 100, 150, 200, 300, 400, 800)] == [0, 0.75, 1.0, 1.25, 1.5, 2.75, 4.0, 9.0]
    assert Curve((10, 20), (1.0, 3.0))(1) == 0.0 and Curve((10,), (2.0,))(5) == 1.0
    assert Curve.line(2.0, 0.5)(8) == pytest.approx(6.0)


def test_costs_survive_a_file(tmp_path: Path) -> None:
    costs = LayerCosts(
        (SlotCosts(Curve((1, 2), (0.1, 0.2)), Curve((1,), (0.3,)), 1e-9), SlotCosts(Curve.line(0.1, 0.2))),
        window=7,
        contention=0.1,
        last=(SlotCosts(Curve.line(0.3, 0.4)),),
        source="made up",
    )
    costs.save(tmp_path / "costs.json")
    assert LayerCosts.load(tmp_path / "costs.json") == costs
    (tmp_path / "other.json").write_text('{"slots": 3}')
    with pytest.raises(ValueError, match=r"`path` must hold layer costs as `save` writes them, got .*other\.json"):
        LayerCosts.load(tmp_path / "other.json")


def test_refusals() -> None:
    costs = tensor_parallel((0.0, 1e-6), (0.0, 1e-6))
    with pytest.raises(ValueError, match="`num_layers` and `grid` must be at least 1, got 0 and 128"):
        overlap(costs, 10, num_layers=0)
    with pytest.raises(ValueError, match=r"`chunks` must name numbers of at least 2, got \[1\]"):
        overlap(costs, 10, num_layers=1, chunks=(1,))
    with pytest.raises(ValueError, match=r"`margin` must be >= 0, got -0\.5"):
        overlap(costs, 10, num_layers=1, margin=-0.5)
    with pytest.raises(ValueError, match=r"`last_rows` must be at least 1, and None for costs without `last`"):
        overlap(costs, 10, num_layers=1, last_rows=1)
    with pytest.raises(ValueError, match=r"counts >= 0, one for each request, got \[5\] and \[1, 2\]"):
        overlap(costs, 5, num_layers=1, prefix=(1, 2))
    with pytest.raises(ValueError, match=r"`tokens` must be >= 0 and increasing, got \[2, 1\]"):
        Curve((2, 1), (0.0, 0.0))
    with pytest.raises(ValueError, match="`seconds` must have one entry for each of `tokens`"):
        Curve((2, 1), (0.0,))
    with pytest.raises(ValueError, match=r"`seconds` must be finite and >= 0, got \[-1.0\]"):
        Curve((2,), (-1.0,))
    with pytest.raises(ValueError, match="`slots` must have at least one entry, got none"):
        LayerCosts(())
    with pytest.raises(ValueError, match="`per_pair_s` must be finite and >= 0, got -1"):
        SlotCosts(Curve.line(0.0, 0.0), None, -1.0)


def test_what_the_costs_cannot_tell_apart_is_cut_evenly_and_seldom() -> None:
    """Attention makes the best cut a late one, by less than 1 %."""
    sums = plan.Curve.line(2e-4, 2.2e-5)
    costs = plan.LayerCosts(
        (
            plan.SlotCosts(plan.Curve.line(1e-3, 3.2e-5), sums, per_pair_s=5e-9),
            plan.SlotCosts(plan.Curve.line(1e-3, 6e-5), sums),
        )
    )
    fine = plan.overlap(costs, 4096, num_layers=8, chunks=(2,))
    coarse = plan.overlap(replace(costs, resolution=0.05), 4096, num_layers=8, chunks=(2, 3, 4))
    assert fine.cuts != (2048,) and fine.predicted_s < coarse.predicted_s < fine.predicted_s * 1.05
    assert coarse.cuts == (2048,)
    with pytest.raises(ValueError, match=r"`resolution` must be in \[0, 1\), got 1.0"):
        replace(costs, resolution=1.0)
