"""Rows of requests: the lowest free one, for as long as the request stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.kv import SlotTable, compaction


@given(
    st.integers(0, 5), st.lists(st.integers(0, 7), max_size=30), st.sampled_from(["none", "tail", "window", "stable"])
)
def test_rows_never_move_but_by_a_plan(num_rows: int, history: list[int], strategy: compaction.Strategy) -> None:
    """Each request that is named comes, or goes where it is there."""
    table, rows = SlotTable(num_rows), {}
    for request in history:
        if request in rows:
            assert table.release(request) == rows.pop(request)
        elif len(rows) == num_rows:
            with pytest.raises(ValueError, match=rf"must find a free row \(0 of {num_rows}\), got {request}"):
                table.acquire(request)
        else:
            rows[request] = min(set(range(num_rows)) - set(rows.values()))
            assert table.acquire(request) == rows[request]
        assert table.ids == tuple(rows) and table.rows(list(rows)) == tuple(rows.values())
        assert len(table) == len(rows) == num_rows - table.num_free and (request in table) == (request in rows)
        assert table.occupied == tuple(row in rows.values() for row in range(num_rows))
    plan = compaction.plan(table.occupied, strategy)
    who: list[object] = [None] * num_rows
    for request, row in rows.items():
        who[row] = request
    moved = plan.reorder(who)
    table.follow(plan)
    assert all(moved[table.row(request)] == request for request in rows)
    free = [row for row in range(num_rows) if not table.occupied[row]]
    assert [table.acquire(("new", row)) for row in free] == free


def test_what_is_refused_changes_nothing() -> None:
    table = SlotTable(3)
    for request in "abc":
        table.acquire(request)
    table.release("b")
    before = table.rows(["a", "c"])
    for call, message in [
        (lambda: table.acquire("c"), "`request` must have no row yet, got 'c' in row 2"),
        (lambda: table.release("b"), "`request` must have a row, got 'b'"),
        (lambda: table.rows(["a", "x"]), "`request` must have a row, got 'x'"),
        (lambda: table.follow(compaction.plan([True, False], "tail")), r"occupied rows \(3 in all\)"),
        (lambda: table.follow(compaction.plan([False, True, True], "tail")), r"`plan` must be made of .* for \[0, 2\]"),
        (lambda: table.follow(compaction.CompactionPlan(0, ((0, 2),), 1, 3)), "`plan` must be made of"),
        (lambda: table.follow(compaction.CompactionPlan(0, ((1, 2),), 2, 3)), "`plan` must be made of"),
        (lambda: SlotTable(-1), "`num_rows` must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert table.rows(["a", "c"]) == before and table.acquire("d") == 1 == table.release("d")
