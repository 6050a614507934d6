"""Plans against searches over everything there is; moves against lists."""

from __future__ import annotations

import random
from collections import deque
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar.kv import CompactionPlan, compaction
from tests.kernels.own_errors import own_errors

STRATEGIES: tuple[compaction.Strategy, ...] = ("none", "tail", "window", "stable")


def check(occupied: list[bool], strategy: compaction.Strategy) -> CompactionPlan:
    """A plan that brings everything into its run; where nothing is moved one by one, nothing is lost."""
    plan = compaction.plan(occupied, strategy)
    live = [slot for slot, taken in enumerate(occupied) if taken]
    after = plan.reorder([slot if taken else None for slot, taken in enumerate(occupied)])
    kept = [plan.follow(slot) for slot in live]
    assert [after[slot] for slot in kept] == live  # everything is where the plan says
    assert plan.num_slots == len(occupied) and all(plan.start <= slot < plan.start + plan.size for slot in kept)
    assert plan.start + plan.size <= len(occupied)
    if strategy == "none":
        assert not plan.moves and (not live or (occupied[plan.start] and occupied[plan.start + plan.size - 1]))
    else:
        assert plan.size == len(live)
    one_by_one = list(occupied)
    for source, target in plan.moves:  # in this order none is filled that lives
        assert one_by_one[source] and not one_by_one[target]
        one_by_one[source], one_by_one[target] = False, True
    if strategy == "stable":
        assert kept == sorted(kept)
    else:
        assert not {source for source, _ in plan.moves} & {target for _, target in plan.moves}  # independent
    return plan


def fewest_moves(num_slots: int) -> list[int]:
    """For each occupancy, as bits: moves of a slot to a hole until all are one run, by searching back from the runs."""
    runs = {((1 << size) - 1) << at for size in range(num_slots + 1) for at in range(num_slots - size + 1)}
    found: list[int] = [0 if mask in runs else -1 for mask in range(1 << num_slots)]
    queue = deque(runs)
    while queue:
        mask = queue.popleft()
        taken = [1 << slot for slot in range(num_slots) if mask >> slot & 1]
        holes = [1 << slot for slot in range(num_slots) if not mask >> slot & 1]
        for one in taken:
            for hole in holes:
                before = mask ^ one ^ hole
                if found[before] < 0:
                    found[before] = found[mask] + 1
                    queue.append(before)
    return found


@pytest.mark.parametrize("num_slots", range(13))
def test_window_moves_as_few_as_any_search_finds(num_slots: int) -> None:
    fewest = fewest_moves(num_slots)
    for mask in range(1 << num_slots):
        occupied = [bool(mask >> slot & 1) for slot in range(num_slots)]
        assert len(check(occupied, "window").moves) == fewest[mask]


@pytest.mark.parametrize("num_slots", range(9))
def test_stable_and_tail_and_none_over_all_occupancies(num_slots: int) -> None:
    for occupied in map(list, product([False, True], repeat=num_slots)):
        live = [slot for slot, taken in enumerate(occupied) if taken]
        fewest = min(
            sum(slot != start + i for i, slot in enumerate(live)) for start in range(num_slots - len(live) + 1)
        )
        assert len(check(occupied, "stable").moves) == fewest
        tail = check(occupied, "tail")
        assert tail.start == 0 and len(tail.moves) == sum(slot >= len(live) for slot in live)
        assert sorted(tail.moves, reverse=True) == list(tail.moves)  # the last to the first hole
        check(occupied, "none")


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_window_reaches_its_bound(count: int) -> None:
    """Moves are the live slots outside the fullest run; tail and stable take no fewer."""
    rng = random.Random(0)
    for _ in range(count):
        num_slots, share = rng.randint(0, 256), rng.random()
        occupied = [rng.random() < share for _ in range(num_slots)]
        size = sum(occupied)
        bits = int("0" + "".join("1" if taken else "0" for taken in reversed(occupied)), 2)
        run = (1 << size) - 1
        best = max((bits >> start & run).bit_count() for start in range(num_slots - size + 1))
        plan = compaction.plan(occupied, "window")
        assert len(plan.moves) == size - best
        assert not {source for source, _ in plan.moves} & {target for _, target in plan.moves}
        after = list(occupied)
        for source, target in plan.moves:
            after[source], after[target] = False, True
        assert sum(after) == sum(after[plan.start : plan.start + size]) == size
        assert len(plan.moves) <= len(compaction.plan(occupied, "tail").moves)
        assert len(plan.moves) <= len(compaction.plan(occupied, "stable").moves)


def test_ends_of_the_run_cost_nothing() -> None:
    """What Flover does without a search: a request that ends at either end of the run leaves a shorter run."""
    for occupied in ([False, True, True, False], [False, False, True, True], [True, False, False, False], [False] * 4):
        assert compaction.plan(occupied, "window").moves == ()
    assert compaction.plan([True, False, True, True], "window") == CompactionPlan(0, ((3, 1),), 3, 4)
    assert compaction.plan([], "window") == compaction.plan([], "none") == CompactionPlan(0, (), 0, 0)


@given(data=st.data(), occupied=st.lists(st.booleans(), max_size=9), strategy=st.sampled_from(STRATEGIES))
def test_any_tensor_is_moved_along_any_dim(
    data: st.DataObject, occupied: list[bool], strategy: compaction.Strategy
) -> None:
    plan, room = compaction.plan(occupied, strategy), 5
    dim = data.draw(st.integers(0, 2))
    lengths = data.draw(st.none() | st.lists(st.integers(0, room), min_size=len(occupied), max_size=len(occupied)))
    shape = [2, 3]
    shape.insert(dim, len(occupied))
    shape.insert(dim + 1, room)
    before = torch.arange(2 * 3 * room * len(occupied), dtype=torch.float64).view(shape)
    moved = before.clone()
    plan.apply(moved, dim - 4 if data.draw(st.booleans()) else dim, lengths)
    expected = before.clone().movedim((dim, dim + 1), (0, 1))
    for source, target in plan.moves:
        used = room if lengths is None else lengths[source]
        expected[target, :used] = before.movedim((dim, dim + 1), (0, 1))[source, :used]
    assert torch.equal(moved.movedim((dim, dim + 1), (0, 1)), expected)


def test_only_what_is_used_is_copied() -> None:
    plan = compaction.plan([True, False, True], "tail")
    tensor = torch.tensor([[1, 2, 3], [7, 7, 7], [4, 5, float("nan")]])
    plan.apply(tensor, lengths=[3, 0, 2])
    assert tensor[1].tolist() == [4, 5, 7]


def test_bad_input_moves_nothing() -> None:
    plan = compaction.plan([True, False, True], "tail")
    tensor = torch.arange(9).view(3, 3)
    for call, message in [
        (lambda: plan.apply(tensor[:2]), r"`tensor` must have 3 slots along dim 0, got \[2, 3\]"),
        (lambda: plan.apply(tensor[:, :1], 1), r"`tensor` must have 3 slots along dim 1, got \[3, 1\]"),
        (lambda: plan.apply(tensor, lengths=[1, 1]), r"`lengths` must be 3 numbers, .* got \[1, 1\]"),
        (lambda: plan.apply(tensor, lengths=[1, 1, 4]), r"of 0 to 3 \(the size of dim 1\), got \[1, 1, 4\]"),
        (lambda: plan.apply(tensor, lengths=[1, 1, -1]), r"got \[1, 1, -1\]"),
        (lambda: plan.apply(tensor, -1, lengths=[1, 1, 1]), r"of 0 to 0 \(the size of dim 2\)"),
        (lambda: plan.reorder("ab"), "`items` must have one for each of 3 slots, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(tensor, torch.arange(9).view(3, 3))
    with (
        own_errors(),
        pytest.raises(ValueError, match="`strategy` must be one of 'none', 'tail', 'window', 'stable', got 'best'"),
    ):
        compaction.plan([True], "best")
